"""Object detection and instance segmentation as a task of the engine."""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import models
from detection.backbone import create_classifier, freeze_batch_norms, pyramid_features
from detection.coco import CocoImages
from detection.coco_metrics import Result, evaluate_results, numbers, to_results
from detection.data import build_data
from detection.detectors import STRIDES, Detector, build_detector, kinds_of
from detection.flags import FLAGS
from inputs.loader import Batch, EvalLoader
from models.checkpoints import read_checkpoint, weights_of
from runtime.processes import Distributed
from training.evaluation import evaluation_batches
from training.model import load
from training.precision import Precision
from training.resume import load_initial
from training.task import Task
from training.trainer import Run
from utils import StopSignals, UserError, one_line


class Detection(Task):
    """Trains a `Detector`. The best checkpoint has the highest mask AP for Mask R-CNN, otherwise the highest box AP."""

    flags = FLAGS
    ranked_by = "AP"
    shown = ("AP", "AP50")
    sample_flags = ("data_set",)
    fixed_sizes = False
    plots = {
        "loss_plot.png": {"Loss": {"train_loss": "training"}},
        "ap_plot.png": {
            "AP (%)": {"test_box_AP": "boxes", "test_mask_AP": "masks"},
            "AP at IoU 0.5 (%)": {"test_box_AP50": "boxes", "test_mask_AP50": "masks"},
        },
    }

    def __init__(self, run: Run):
        self._run = run
        self.args = run.args
        self.kinds = kinds_of(self.args.detector)
        self.score_format = f"{self.kinds[-1]} AP {{:.2f}}"
        self.train, self.val = build_data(self.args, run.dist, "mask" in self.kinds)
        self.model = build_model(run, self.train.dataset)

    def set_mode(self, model: Detector) -> None:
        """Keep the heads in training mode, because a detector in evaluation mode has no losses."""
        training = model.training
        model.train()
        model.body.train(training)

    def prepare(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Any]]]:
        dtype = self._run.precision.dtype
        targets = [target | {"boxes": target["boxes"].to(dtype)} for target in batch.targets]
        return as_inputs(batch.images, self._run.precision), targets

    def loss(self, model: nn.Module, prepared: tuple[list[Tensor], list[dict[str, Any]]]) -> Tensor:
        return sum(model(*prepared).values())

    @torch.no_grad()
    def finite_samples(self, model: Detector, batch: Batch) -> list[tuple[int, bool]]:
        images = as_inputs(batch.images, self._run.precision)
        finite = [all(bool(grid.isfinite().all()) for grid in model.features(image)) for image in images]
        return list(zip(batch.indices.tolist(), finite, strict=True))

    def evaluate(self, model: nn.Module, stop: StopSignals | None) -> dict[str, float]:
        """COCO's metrics under names such as ``box_AP50``. "AP" and "AP50" are those of the last kind."""
        dist, metrics = self._run.dist, {}
        results = predict(model, self.val, dist, self._run.precision, stop)
        if dist.is_main:
            truth = self.val.dataset.ground_truth()
            for kind in self.kinds:
                found = numbers(evaluate_results(truth, results, kind, model.detections))
                metrics |= {f"{kind}_{name}": value for name, value in found.items()}
                metrics |= {name: found.get(name, 0.0) for name in ("AP", "AP50")}
        return dist.gather_objects(metrics)[0]

    def identity(self) -> dict[str, Any]:
        args, data = self.args, self.train.dataset
        return {
            "arch": models.resolve_arch(args.arch),
            "model_kwargs": args.model_kwargs,
            "detector": args.detector,
            "heads": args.heads,
            "detector_kwargs": args.detector_kwargs,
            "num_classes": len(data.class_names),
            "input_size": list(args.input_size),
            "class_names": list(data.class_names),
            "category_ids": list(data.category_ids),
        }

    def record(self) -> dict[str, Any]:
        return {"min_size": self.args.min_size[-1], "max_size": self.args.max_size}

    def describe(self) -> str:
        data = self.train.dataset
        left_out = f", {data.without_area} without area skipped" if data.without_area else ""
        return (
            f"{self.args.detector} on {self.args.data_set}, {len(data)} images with {data.objects} objects of "
            f"{len(data.class_names)} categories{left_out}, {len(self.val.dataset)} validation images"
        )


def as_inputs(images: list[Tensor], precision: Precision) -> list[Tensor]:
    """Convert uint8 images to a detector's input, values 0 to 1."""
    return [image.to(precision.dtype) / 255 for image in images]


def build_model(run: Run, data: CocoImages) -> Detector:
    """Build the detector that the flags describe, with its initial weights."""
    args = run.args
    torch.manual_seed(args.seed)
    body = create_classifier(args.arch, args.input_size, args.model_kwargs, args.drop_path)
    if run.checkpoint is None and args.backbone_weights is not None:
        weights = weights_of(read_checkpoint(args.backbone_weights), path=args.backbone_weights)
        load(body, weights, args.backbone_weights, new_head=True)
        run.dist.say(f"loaded {args.backbone_weights} into the backbone")
    model = detector_over(body, args, len(data.class_names))
    load_initial(run, model, data.class_names)
    if args.freeze_bn:
        freeze_batch_norms(model)
    return model


def detector_over(body: nn.Module, args: argparse.Namespace, num_classes: int) -> Detector:
    """Build the detector that the flags describe on a classification model; UserError if they are inconsistent."""
    features = pyramid_features(body, args.arch, STRIDES[args.detector])
    sizes = {"min_size": args.min_size[-1], "max_size": args.max_size}
    try:
        return build_detector(args.detector, features, num_classes, heads=args.heads, **sizes, **args.detector_kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--detector-kwargs: {one_line(error)}") from error


@torch.no_grad()
def predict(
    model: nn.Module, loader: EvalLoader, dist: Distributed, precision: Precision, stop: StopSignals | None = None
) -> list[Result]:
    """Predict a loader's data set; every process returns the predictions of all processes in the order of the images.

    Raises:
        Interrupted: between two images, on every process, if one of the processes gets a signal.
    """
    model.eval()
    dataset: CocoImages = loader.dataset
    own: dict[int, list[Result]] = {}
    for batch in evaluation_batches(loader, dist, stop):
        with precision.autocast():
            predictions = model(as_inputs(batch.images, precision))
        for index, prediction in zip(batch.indices.tolist(), predictions, strict=True):
            own[index] = to_results(prediction, dataset.entry(index)["id"], dataset.category_ids)
    results = {index: found for process in dist.gather_objects(own) for index, found in process.items()}
    return [result for index in sorted(results) for result in results[index]]
