"""Evaluate a classifier on a data set: loss and accuracies."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from inputs.data import eval_loader, open_split
from inputs.images import ImageDataset, choose_classes
from models import LoadedModel
from models.pretrained import PREPROCESSING
from runtime.processes import Distributed
from training.classification import evaluate
from training.options import data_name
from training.precision import choose_precision
from utils import UserError, make_directory, say

from .confusion_report import class_accuracies, write_report
from .output_files import check_output, write_json


def average_mirrored(model: nn.Module) -> None:
    """Make a classifier return the mean of the logits for images (B, C, H, W) and for their mirror images."""

    def add_mirrored(model: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        (images,) = inputs
        return (logits + model.forward(images.flip(-1))) / 2  # calling the model would run this hook again

    model.register_forward_hook(add_mirrored)


def run_evaluation(args: argparse.Namespace, dist: Distributed, loaded: LoadedModel) -> None:
    """Evaluate on all processes. The main process prints the results and writes them to files on request."""
    dataset, present = open_data(args, dist, loaded)
    output = results_file(args, loaded.path)
    model = loaded.model.to(dist.device)
    dataset.labels = np.array(present)[dataset.labels]
    preprocessing = {name: getattr(loaded, name) for name in PREPROCESSING}
    loader = eval_loader(args, dist, dataset, preprocessing)
    columns = torch.tensor(present, device=dist.device)
    own: list[np.ndarray] = []  # (3, B) per batch: true class, prediction, best of the classes in the data

    def watch(logits: Tensor, targets: Tensor) -> None:
        among_present = columns[logits[:, columns].argmax(1)]
        own.append(torch.stack([targets, logits.argmax(1), among_present]).cpu().numpy())

    began = time.perf_counter()
    results = evaluate(model, loader, dist, choose_precision(args, dist.device), watch=watch)
    seconds = time.perf_counter() - began
    gathered = dist.gather_objects(own)
    if not dist.is_main:
        return
    true, predicted, among_present = np.concatenate([batch for batches in gathered for batch in batches], axis=1)
    classes = loaded.num_classes
    confusion = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    results["mean_per_class"] = 100 * float(np.nanmean(class_accuracies(confusion)))
    results |= preprocessing | {"images_per_second": results["images"] / seconds, "seconds": seconds}
    name = f"{loaded.arch}{' (EMA)' if loaded.ema else ''}{' with mirrored images' if args.tta else ''}"
    height, width = loaded.input_size
    source = data_name(args.data_set, args.data_path)
    skipped = f" ({results['skipped']} unreadable skipped)" if "skipped" in results else ""
    line = (
        f"{name} on {source} at {height}x{width}, {results['images']} images{skipped}: "
        f"loss {results['loss']:.4f}, acc@1 {results['acc1']:.2f} %, acc@5 {results['acc5']:.2f} %, "
        f"mean per class {results['mean_per_class']:.2f} %, {results['images_per_second']:.1f} images/s"
    )
    missing = sorted(set(range(loaded.num_classes)) - set(present))
    if missing:
        results["acc1_present"] = 100 * float((true == among_present).mean())
        results["missing_classes"] = [loaded.class_names[i] for i in missing]
        shown = ", ".join(map(loaded.label, missing[:5])) + (", ..." if len(missing) > 5 else "")
        line += (
            f"\n    {len(missing)} of the model's {loaded.num_classes} classes are not in the data ({shown}); "
            f"among the {len(present)} present, acc@1 {results['acc1_present']:.2f} %"
        )
    say(line)
    if output is not None:
        write_json(output, setting(args, dist, loaded) | results)
        say(f"results: {output}")
    if args.report is not None:
        correct = f"{results['correct1']} of {results['images']} images"
        title = f"{name} on {source}: top-1 {results['acc1']:.2f} % ({correct})"
        write_report(args.report, confusion, [loaded.label(i) for i in range(loaded.num_classes)], title)
        say(f"report: {args.report}")


def setting(args: argparse.Namespace, dist: Distributed, loaded: Any) -> dict[str, Any]:
    """Return the settings of the results: the flags, the loaded model or detector and the machine."""
    model = {"model_path": str(loaded.path), "arch": loaded.arch, "ema": loaded.ema}
    machine = {"processes": dist.world_size, "device": str(dist.device)}
    return vars(args) | model | machine | {"torch": torch.__version__, "timm": timm.__version__}


def results_file(args: argparse.Namespace, path: Path) -> Path | None:
    """Return the file for the results of a checkpoint, and check that it and the report can be written.

    It is --output, or next to a run's checkpoint, named after it, the data and the split; None outside a run.
    """
    output = args.output
    if output is None and (path.parent / "args.yaml").is_file():
        data = data_name(args.data_set, args.data_path).lower().replace("/", "-")
        output = path.with_name(f"{path.stem}_{data}{'_test' if args.split == 'test' else ''}.json")
    check_output(output)
    if args.report is not None:
        make_directory(args.report)
    return output


def open_data(args: argparse.Namespace, dist: Distributed, loaded: LoadedModel) -> tuple[ImageDataset, Sequence[int]]:
    """Open the data; return it with the model's index of each of its classes.

    Classes are matched by name, and the data may lack some of the model's classes. If the checkpoint has no class
    names, both numbers of classes must agree, and classes are matched in order. If the model was trained on a subset
    of the data set's classes (--classes), only these are evaluated.

    Raises:
        UserError: if the data has classes that the model does not know.
    """
    dataset, known = open_split(args, dist, args.split), loaded.class_names
    trained_on = (loaded.checkpoint.get("args") or {}).get("classes")
    if args.classes is None and trained_on and (common := [name for name in known if name in dataset.class_names]):
        dataset = choose_classes(dataset, common)
    unknown = [name for name in dataset.class_names if name not in known]
    if not unknown:
        return dataset, [known.index(name) for name in dataset.class_names]
    number = len(dataset.class_names)
    if loaded.checkpoint.get("class_names") is None and number == loaded.num_classes:
        return dataset, range(number)
    shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
    raise UserError(
        f"--data-set {args.data_set}: {loaded.path} does not know {len(unknown)} of its {number} classes: "
        f"{shown}; use --classes to evaluate only some"
    )
