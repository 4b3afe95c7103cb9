"""Make the weights that come with the package of a run on CIFAR-10, and all that lies beside them.

    python -m tools.ship_weights runs/svt_h_n_again --begun-with runs/svt_h_n

writes into models/weights NAME.cifar10.safetensors (float16), its model card, the log and the curve of both runs. The
accuracy on the card is that of the file itself, on the run's test images. The weights are those of the last epoch: the
best one would be chosen by the very images that it is judged by.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import infer
import models
from inference.figures import save_figure
from inference.from_checkpoint import ModelInfo, build_from_checkpoint
from models.flops import count_flops
from runtime import checkpoints
from runtime.curves import draw_curves
from runtime.entry_point import run_cli
from runtime.lineage import LOG
from runtime.run_directory import read_log
from tools.command_line import ToolParser
from tools.export.__main__ import main as export
from tools.export.hub import CITATIONS
from training.classification import Classification
from training.model import count_parameters
from training.resume import LAST
from utils import UserError, atomic_write, say

ROOT = Path(__file__).resolve().parent.parent
ACCURACY = next(plot for plot in Classification.plots if plot.file == "acc_plot.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("ship_weights", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="the run's directory")
    add("--begun-with", type=Path, metavar="RUN", help="the run whose weights it began with (its --finetune)")
    add("--checkpoint", default=LAST, metavar="FILE", help="of the run (default: %(default)s)")
    add("--data-path", metavar="DIR", help="where the test images lie (default: the run's)")
    add("--stored", default="", metavar="WORDS", help="for the card, how the images were stored: 'as JPEG copies'")
    add("--output", type=Path, default=ROOT / "models" / "weights", metavar="DIR", help="default: models/weights")
    args = parser.parse_args(argv)

    checkpoint = args.run / args.checkpoint
    state = checkpoints.load(checkpoint)
    model, info = build_from_checkpoint(checkpoint)
    if info.arch not in models.shipped():
        raise UserError(f"{checkpoint}: of {info.arch}; those to ship are {', '.join(models.shipped())}")
    if info.model_kwargs or info.data_set is None:
        raise UserError(f"{checkpoint}: it has to be of {info.arch} as it is registered, and of a run")
    if (begun_with := state["args"].get("finetune")) and not args.begun_with:
        raise UserError(
            f"{checkpoint}: it began with {begun_with}; --begun-with RUN says which run these weights are of"
        )
    if args.begun_with and not begun_with:
        raise UserError(f"--begun-with {args.begun_with}: {checkpoint} began with no weights (--finetune)")
    rows = log_of([run for run in (args.begun_with, args.run) if run is not None])
    args.output.mkdir(parents=True, exist_ok=True)
    base = args.output / models.shipped()[info.arch].stem
    weights = base.with_name(f"{base.name}.safetensors")
    export([str(checkpoint), "--to", "safetensors", str(weights), "--half", "--overwrite"])
    results = evaluate(weights, state["args"], args.data_path)
    save_figure(base.with_name(f"{base.name}.png"), draw_curves(rows, ACCURACY, title=base.name))
    atomic_write(base.with_name(f"{base.name}.log.txt"), "".join(json.dumps(row) + "\n" for row in rows))
    figures = {
        "begun_with": args.begun_with,
        "parameters": count_parameters(model),
        "mflops": count_flops(model, info.input_size) / 1e6,
        "row": read_log(args.run / LOG)[state["epoch"] - 1],
        "file": weights.read_bytes(),
        "stored": args.stored and f" {args.stored}",
    }
    atomic_write(
        base.with_name(f"{base.name}.md"), card(base.name, state, info, model.pretrained_cfg, results, figures)
    )
    say(f"{weights}: {len(figures['file']) / 1e6:.2f} MB, top-1 {results['acc1']:.2f} %")


def log_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of one log after the other's, their epochs counted through."""
    logs = {run: read_log(run / LOG) for run in runs}
    for run, rows in logs.items():
        if not rows:
            raise UserError(f"{run}: no {LOG} of a run is there")
    return [row | {"epoch": epoch} for epoch, row in enumerate(itertools.chain.from_iterable(logs.values()))]


def evaluate(weights: Path, settings: Mapping[str, Any], data_path: str | None) -> dict[str, Any]:
    """What infer.py finds for the file on the images that the run validated on."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        words = ["--model-path", str(weights), "--data-set", settings["data_set"], "--output", str(output)]
        words += ["--num-workers", "0", "--amp", "none"]
        if path := data_path or settings.get("data_path"):
            words += ["--data-path", path]
        if settings.get("classes"):
            words += ["--classes", ",".join(settings["classes"])]
        infer.main(words)
        return json.loads(output.read_text())


def card(
    name: str,
    state: Mapping[str, Any],
    info: ModelInfo,
    cfg: Mapping[str, Any],
    results: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> str:
    """A model card in Markdown."""
    settings, row, file = state["args"], figures["row"], figures["file"]
    begun_with = Path(settings["finetune"]).name if figures["begun_with"] else None
    epochs = settings["epochs"] + settings["cooldown_epochs"]
    chosen = "the last" if state["epoch"] == epochs else "chosen by the test images, which flatters it"
    height, width = info.input_size
    return f"""# {name}

`{info.arch}` for {height}×{width}-pixel images of {info.num_classes} classes ({", ".join(info.labels)}):
{figures["parameters"]:,} parameters, {figures["mflops"]:.1f} million multiply-adds an image. A small variant, not of
the paper: {cfg["paper_name"]} ({cfg["paper_ids"]}).

| | top-1 | top-5 | loss |
|---|---|---|---|
| this file (float16 weights, float32 arithmetic), {results["images"]:,} test images | {results["acc1"]:.2f} % | \
{results["acc5"]:.2f} % | {results["loss"]:.4f} |
| the run's own evaluation of that epoch, before rounding{_precision(settings)} | {row["test_acc1"]:.2f} % | \
{row["test_acc5"]:.2f} % | {row["test_loss"]:.4f} |

```python
import timm, models  # or spectformer_svt, where the package is installed

model = timm.create_model("{info.arch}", pretrained=True).eval()
print(model.pretrained_cfg["label_names"])
```

    python infer.py --arch {info.arch} --image photo.jpg

- **Data**: CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009){figures["stored"]}: its
  50,000 training images, and its 10,000 test images for the figures above; no other data and no other pre-training.
- **Recipe**: {_recipes(info.arch, begun_with)},
  on a CPU (torch {state["version"]["torch"]}); the weights are those of epoch {state["epoch"]} of {epochs}, {chosen}.
  Log: [{name}.log.txt]({name}.log.txt), curve below.
- **Seeds**: one training, seed {settings["seed"]}{" the second time" if begun_with else ""}; how far another seed's \
accuracy would be is not known.
- **Images**: RGB, mean {_numbers(info.mean)}, std {_numbers(info.std)}, {info.interpolation} resizing to
  {height}×{width}. Larger photographs are shrunk to that.
- **Limits**: it knows ten classes and calls everything one of them; its probabilities are not calibrated; it has been
  tested on CIFAR-10 alone, and photographs that are cropped or lit in another way were not measured. It is made to try
  the code with, to look at trained filters, and to begin fine-tuning on small images from; not for decisions about
  anything.
- **Licence**: MIT, like the code. CIFAR-10 comes without a licence; its author asks to cite the report above.
- **File**: `{name}.safetensors`, {len(file):,} bytes, SHA-256 `{hashlib.sha256(file).hexdigest()}`.

Made again by

{_commands(info.arch, again=begun_with is not None)}

![top-1 and top-5 accuracy over the epochs]({name}.png)

```bibtex
{CITATIONS[cfg["paper_ids"]]}
```
"""


def _recipes(arch: str, begun_with: str | None) -> str:
    link = "[configs/cifar10/{0}.yaml](../../configs/cifar10/{0}.yaml)"
    more = f", then\n  {link.format(f'{arch}_again')} from its weights (then in `{begun_with}`)" if begun_with else ""
    return link.format(arch) + more


def _commands(arch: str, again: bool) -> str:
    main = "main_svt.py" if arch.startswith("svt") else "main_spectformer.py"
    line = "    python {} --config configs/cifar10/{}.yaml --data-path DIR --output-dir runs/{}{} --resume auto"
    lines = [line.format(main, arch, arch, "")]
    if again:
        lines.append(line.format(main, f"{arch}_again", f"{arch}_again", f" \\\n        --finetune runs/{arch}/{LAST}"))
    ship = f"runs/{arch}_again --begun-with runs/{arch}" if again else f"runs/{arch}"
    return "\n".join([*lines, f"    python -m tools.ship_weights {ship}"])


def _precision(settings: Mapping[str, Any]) -> str:
    return "" if settings["amp"] in ("auto", "none") else f" (autocast {settings['amp']})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    run_cli(main)
