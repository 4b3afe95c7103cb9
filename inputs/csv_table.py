"""Images and labels listed in a CSV file."""

import csv
from pathlib import Path

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.folders import validation_part
from inputs.images import ImageDataset, file_dataset
from utils import UserError, one_line

Row = tuple[str, str, str]  # path, label, split


def csv_table(options: DatasetOptions) -> ImageDataset:
    """Open --data-path FILE.csv, a table with a header; --csv-columns names the columns of files, labels and splits.

    Paths are relative to the table's folder. Labels are any text. The validation images come from --val-path (a second
    table), the split column, or --val-split; without any of these, evaluation uses all rows.

    Classes are sorted by name, or by value if all of them are numbers.
    """
    val_path = None if options.val_path is None else Path(options.val_path)
    choices = {"--val-path": val_path, "--val-split": options.val_split, "a split column": options.csv_columns[2:]}
    if len(given := [name for name, value in choices.items() if value]) > 1:
        raise UserError(f"--data-set CSV: use only one of {' and '.join(given)} to choose the validation images")
    rows, left_out = _read(options.root, options.csv_columns)
    val_rows, val_left_out = ([], []) if val_path is None else _read(val_path, options.csv_columns)
    names = {label for _, label, _ in rows + val_rows}
    class_names = sorted(names, key=int if all(name.isdecimal() for name in names) else str)
    label_of = {name: number for number, name in enumerate(class_names)}

    if len(options.csv_columns) == 3:
        present = {split for _, _, split in rows}
        own = next((split for split in options.split_names if split in present), None)
        if own is None:
            raise options.missing(f"rows whose {options.csv_columns[2]} is {' or '.join(options.split_names)}")
        known = {name for names in SPLIT_NAMES.values() for name in names}
        left_out += [f"{file} (its split is {split!r})" for file, _, split in rows if split not in known]
        rows = [row for row in rows if row[2] == own]
    elif options.split == "test":
        raise options.missing("a split column in --csv-columns, for --split test")
    elif val_path is not None and not options.train:
        rows, left_out = val_rows, val_left_out
    elif options.train and val_path is None and options.val_split is None:
        raise UserError(
            "--data-set CSV needs --val-path, --val-split or a split column in --csv-columns, to validate on"
        )
    labels = [label_of[name] for _, name, _ in rows]
    dataset = file_dataset([file for file, _, _ in rows], labels, class_names, left_out=left_out)
    return dataset if options.val_split is None else validation_part(dataset, options)


def _read(path: Path, columns: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    """The rows of a table, and those left out because they have no file or no label."""
    rows, left_out = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            if missing := [name for name in columns if name not in (table.fieldnames or ())]:
                found = ", ".join(table.fieldnames or ()) or "none"
                raise UserError(f"{path}: no column {missing[0]!r} (its columns: {found}); --csv-columns names them")
            for entry in table:
                row = [(entry[name] or "").strip() for name in columns]
                if row[0] and row[1]:
                    rows.append((str(path.parent / row[0]), row[1], row[2] if len(columns) == 3 else ""))
                else:
                    left_out.append(f"{path}:{table.line_num} (no {columns[0]} or no {columns[1]})")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV table: {one_line(error)}") from error
    return rows, left_out
