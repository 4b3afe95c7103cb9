"""A classifier's loss and accuracies on a data set."""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import timm
import torch
from torch import Tensor, nn

from inputs.data import Data, build_eval
from inputs.loader import Batch, EvalLoader
from runtime.processes import Distributed
from training.classification import evaluate
from training.precision import choose_precision
from utils import UserError, printable, say

from .from_checkpoint import ModelInfo
from .reports import class_accuracies, write_report
from .results import check_output, prepare_folder, write_results


class Watched:
    """Keeps the true and the predicted class of what passes from a loader through a model.

    Stands between `engine.evaluate` and its loader; `watch` is the model's forward hook.
    """

    def __init__(self, loader: EvalLoader):
        self.rounds = loader.rounds
        self._loader = loader
        self._pairs: list[list[Tensor]] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._pairs.append([batch.targets])
            yield batch

    def watch(self, _module: nn.Module, _images: tuple[Tensor, ...], logits: Tensor) -> None:
        self._pairs[-1].append(logits.argmax(1))

    def pairs(self, dist: Distributed) -> np.ndarray:
        """(2, images) of all processes: true and predicted classes."""
        own = [torch.stack(pair).cpu().numpy() for pair in self._pairs]
        return np.concatenate([part for parts in dist.gather_objects(own) for part in parts], axis=1)


def run_evaluation(args: argparse.Namespace, dist: Distributed, model: nn.Module, info: ModelInfo) -> None:
    """Evaluate on all processes; the main one prints, and writes the results and the report."""
    data = build_eval(args, dist, mean=info.mean, std=info.std, interpolation=info.interpolation)
    check_classes(args, data, info)
    output = args.output or info.path.with_name(f"{info.path.stem}_{args.data_set.lower().replace('/', '-')}.json")
    if dist.is_main:
        check_output(output)
        if args.report is not None:
            prepare_folder(args.report)
    watched = Watched(data.val)
    model.register_forward_hook(watched.watch)
    began = time.perf_counter()
    results = evaluate(model, watched, dist, choose_precision(args, dist.device))
    seconds = time.perf_counter() - began
    pairs = watched.pairs(dist)
    if not dist.is_main:
        return
    results["mean_per_class"] = 100 * float(np.nanmean(class_accuracies(pairs, info.num_classes)))
    results |= {"images_per_second": results["images"] / seconds, "seconds": seconds}
    model_name = f"{info.arch}{' (EMA)' if info.ema else ''}{', mirrored too,' if args.tta else ''}"
    line = (
        f"{model_name} on {args.data_set} at "
        f"{args.input_size[0]}x{args.input_size[1]}, {results['images']} images: "
        f"loss {results['loss']:.4f}, acc@1 {results['acc1']:.2f} %, "
        f"acc@5 {results['acc5']:.2f} %, mean per class {results['mean_per_class']:.2f} %, "
        f"{results['images_per_second']:.1f} images/s"
    )
    say(printable(line))
    setting = {
        "model_path": str(info.path),
        "arch": info.arch,
        "model_kwargs": info.model_kwargs,
        "ema": info.ema,
        "data_set": args.data_set,
        "data_path": args.data_path,
        "input_size": args.input_size,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
        "batch_size": args.batch_size,
        "processes": dist.world_size,
        "device": str(dist.device),
        "amp": args.amp,
        "tta": args.tta,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    write_results(output, results | setting)
    say(printable(f"results: {output}"))
    if args.report is not None:
        correct = f"{results['correct1']} of {results['images']} images"
        title = f"{model_name} on {args.data_set}: top-1 {results['acc1']:.2f} % ({correct})"
        write_report(args.report, pairs, [info.class_name(i) for i in range(info.num_classes)], title)
        say(printable(f"report: {args.report}"))


def check_classes(args: argparse.Namespace, data: Data, info: ModelInfo) -> None:
    """Raise UserError unless the data's classes are the model's."""
    if data.num_classes != info.num_classes:
        raise UserError(
            f"--data-set {args.data_set} has {data.num_classes} classes, {info.path} knows "
            f"{info.num_classes}; --classes chooses some of a data set's"
        )
    if info.class_names is not None and info.class_names != tuple(data.class_names):
        i = next(i for i, name in enumerate(info.class_names) if name != data.class_names[i])
        raise UserError(
            f"--data-set {args.data_set}: its class {i} is {data.class_names[i]!r}, for {info.path} "
            f"it is {info.class_names[i]!r}; --classes chooses classes and their order"
        )
