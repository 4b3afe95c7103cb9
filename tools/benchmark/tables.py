"""Figures as tables for a terminal."""

COLUMNS = (  # heading, width, digits, key and divisor
    ("Mparam", 6, 1, "parameters", 1e6),
    ("GMAC", 5, 1, "gmacs", 1),
    ("train/s", 8, 2, "training_images_per_s", 1),
    ("infer/s", 8, 2, "inference_images_per_s", 1),
    ("ms/img", 6, 1, "latency_ms", 1),
    ("train MiB", 9, 0, "training_peak_mib", 1),
    ("infer MiB", 9, 0, "inference_peak_mib", 1),
    ("of peak", 7, 2, "utilisation", 1),
    ("spectral", 8, 2, "spectral_share", 1),
    ("breaks", 6, 0, "graph_breaks", 1),
)


def model_table(result: dict) -> str:
    """A table of the models' figures, one of ratios for each part that has them."""
    rows = result["models"]
    letters = {label: chr(ord("A") + i) for i, label in enumerate(rows)}
    columns = [column for column in COLUMNS if any(column[3] in row for row in rows.values())]
    lines = [f"{letter}  {label}" for label, letter in letters.items()]
    lines += ["", "   " + "".join(f"{heading:>{width + 1}}" for heading, width, *_ in columns)]
    for label, row in rows.items():
        cells = [
            f"{row[key] / divisor:{width + 1}.{digits}f}" if key in row else " " * (width + 1)
            for _, width, digits, key, divisor in columns
        ]
        lines.append(f"{letters[label]}  " + "".join(cells))
    for part, table in result["ratios"].items():
        lines += ["", f"{part}: row / column (more than 1: the row is faster)"]
        lines.append("   " + "".join(f"{letters[label]:>7}" for label in table))
        for label, row in table.items():
            lines.append(f"{letters[label]}  " + "".join(f"{ratio:7.2f}" for ratio in row.values()))
    return "\n".join(lines)


LAYER_HEADING = (
    f"{'layer':24}{'grid':>5}{'batch':>6}   {'fwd+bwd ms':>10}{'plain':>10}{'ratio':>7}"
    f"   {'forward ms':>10}{'plain':>10}{'ratio':>7}"
)


def layer_line(row: dict) -> str:
    figures = "".join(
        f"   {row[f'{part}_ours_ms']:10.2f}{row[f'{part}_plain_ms']:10.2f}{row[f'{part}_ratio']:7.2f}"
        for part in ("training", "inference")
    )
    return f"{row['layer']:24}{row['grid']:5}{row['batch']:6}{figures}"
