"""The classification task: class labels with mixup and cutmix, token labels, distillation."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

import models
from inputs.data import build_data, chosen_preprocessing
from inputs.images import ImageDataset
from inputs.loader import Batch, EvalLoader
from inputs.token_labels import dense_targets
from models.checkpoints import read_checkpoint, weights_of
from models.pyramid import sample_mix_box
from runtime.processes import Distributed
from runtime.provenance import plain
from training.classification_flags import FLAGS, mixes
from training.evaluation import evaluation_batches
from training.losses import ClassLoss, DistillationLoss, balanced_class_weights, token_label_loss
from training.model import load
from training.options import data_name
from training.precision import Precision, as_input
from training.resume import load_initial
from training.task import Task
from training.trainer import Run
from utils import StopSignals, UserError


class Classification(Task):
    """Train a model that computes logits (B, classes) of images (B, C, H, W)."""

    flags = FLAGS
    ranked_by = "acc1"
    score_format = "top-1 {:.2f} %"
    shown = ("loss", "acc1")
    sample_flags = ("data_set", "repeated_aug", "inat_category", "val_split", "train_part", "balanced_sampling")
    plots = {
        # Augmentation and smoothing raise the training loss, so it is not comparable with the test loss.
        "loss_plot.png": {"Loss (nats)": {"train_loss": "training, augmented", "test_loss": "test"}},
        "acc_plot.png": {"Top-1 accuracy (%)": {"test_acc1": "top-1"}, "Top-5 accuracy (%)": {"test_acc5": "top-5"}},
    }

    def __init__(self, run: Run):
        self._run = run
        self.args, self.precision = run.args, run.precision
        self.train, self.val = build_data(self.args, run.dist)
        self.class_names = self.train.dataset.class_names
        self.model = build_model(run, self.class_names)
        self._mixup = build_mixup(self.args, len(self.class_names))
        self._criterion = build_criterion(run, self.model, self.train.dataset)

    def set_mode(self, model: nn.Module) -> None:
        """Put the root module alone into training mode for token labels: it then returns token logits too."""
        if self.args.token_label:
            model.training = True

    def prepare(self, batch: Batch) -> tuple[Tensor, Any, dict[str, Any]]:
        """Mixed images, mixed targets, and MixToken's box."""
        images, targets = as_input(batch.images, self.precision, self.args.channels_last), batch.targets
        if self._mixup is not None:
            images, targets = self._mixup(images, targets)
        if not self.args.token_label:
            return images, targets, {}
        # A tensor avoids recompiling the model for every box.
        box = sample_mix_box(self.model.token_label_size, images.device if self.args.compile else None)
        return images, targets, {"box": box}

    def loss(self, model: nn.Module, prepared: tuple[Tensor, Any, dict[str, Any]]) -> Tensor:
        images, targets, box = prepared
        return self._criterion(images, model(images, **box), targets)

    @torch.no_grad()
    def finite_samples(self, model: nn.Module, batch: Batch) -> list[tuple[int, bool]]:
        finite = model(as_input(batch.images, self.precision)).isfinite().all(dim=1)
        return list(zip(batch.indices.tolist(), finite.tolist(), strict=True))

    def evaluate(self, model: nn.Module, stop: StopSignals | None) -> dict[str, float]:
        return evaluate(model, self.val, self._run.dist, self.precision, stop)

    def identity(self) -> dict[str, Any]:
        return {
            "arch": models.resolve_arch(self.args.arch),
            "model_kwargs": full_model_kwargs(self.args),
            "num_classes": len(self.class_names),
            "input_size": list(self.args.input_size),
            "class_names": list(self.class_names),
        }

    def record(self) -> dict[str, Any]:
        return plain(chosen_preprocessing(self.args))

    def describe(self) -> str:
        height, width = self.args.input_size
        return (
            f"{data_name(self.args.data_set, self.args.data_path)} at {height}x{width} (evaluation crop "
            f"{self.args.eval_crop_pct:g}), {len(self.class_names)} classes, {len(self.train.dataset)} training and "
            f"{len(self.val.dataset)} validation images"
        )


def full_model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """--model-kwargs, and the arguments from flags that change the model's parameters."""
    flags = {"token_label": args.token_label, "in_chans": args.in_chans if args.in_chans != 3 else None}
    return args.model_kwargs | {name: value for name, value in flags.items() if value}


def build_model(run: Run, class_names: Sequence[str]) -> nn.Module:
    """Create the model of --arch for these classes, with its initial weights."""
    args = run.args
    torch.manual_seed(args.seed)
    kwargs = {"drop_rate": args.drop, "drop_path_rate": args.drop_path} | full_model_kwargs(args)
    model = models.create_model(args.arch, len(class_names), args.input_size, kwargs)
    load_initial(run, model, class_names)
    return model


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(run: Run, model: nn.Module, dataset: ImageDataset) -> Callable[[Tensor, Any, Any], Tensor]:
    """Create the loss on the run's device; call it as ``criterion(images, outputs, targets)``."""
    args, num_classes = run.args, len(dataset.class_names)
    if args.token_label:
        size, swapped = model.token_label_size, args.token_label_crop == "reference"  # grid of the last stage
        if args.token_label_size is not None and size != (args.token_label_size,) * 2:
            raise UserError(f"--token-label-size {args.token_label_size}: this model's token grid is {size}")

        def token_criterion(_images: Tensor, outputs: Any, record: Any) -> Tensor:
            targets = dense_targets(record, num_classes, size, args.smoothing, swapped)
            return token_label_loss(outputs, targets, args.cls_weight, args.dense_weight, args.ground_truth)

        return token_criterion
    weights = None
    if args.class_weights == "auto":
        weights = balanced_class_weights(dataset.labels, num_classes)
    loss = ClassLoss(args.smoothing, mixes(args), weights, args.bce_loss)
    if args.distillation_type != "none":
        teacher = models.create_model(args.teacher_model, num_classes, args.input_size, {})
        teacher_weights = weights_of(read_checkpoint(args.teacher_path), path=args.teacher_path)
        load(teacher, teacher_weights, args.teacher_path, new_head=False)
        loss = DistillationLoss(loss, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return loss.to(run.dist.device, run.precision.dtype)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    dist: Distributed,
    precision: Precision,
    stop: StopSignals | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Evaluate every image of all processes' loaders once.

    Args:
        watch: called with each batch's logits and targets.

    Returns:
        loss: mean cross-entropy; acc1, acc5: percent; correct1, correct5, images: counts; skipped: the number of
        unreadable images, if there are any.

    Raises:
        UserError: no image could be read.
        Interrupted: between two batches, on every process, if any of them received a signal.
    """
    model.eval()
    full = 0  # images of a full batch
    totals = torch.zeros(4, dtype=torch.float64, device=dist.device)
    for batch in evaluation_batches(loader, dist, stop):
        images = as_input(batch.images, precision)
        if model._compiled_call_impl is not None:  # pad the last batch to avoid recompilation
            full = max(full, len(images))
            images = torch.cat([images, images[:1].expand(full - len(images), -1, -1, -1)])
        with precision.autocast():
            logits = model(images)[: len(batch.targets)]
        totals += count(logits.to(precision.dtype), batch.targets)
        if watch is not None:
            watch(logits, batch.targets)
    totals = torch.cat([totals, totals.new_tensor([len(loader.skipped)])])
    loss, correct1, correct5, images, skipped = dist.sum(totals).tolist()
    if images == 0:
        raise UserError(f"none of the {int(skipped)} images to evaluate could be read")
    results = {
        "loss": loss / images,
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "correct1": int(correct1),
        "correct5": int(correct5),
        "images": int(images),
    }
    return results | ({"skipped": int(skipped)} if skipped else {})


def count(logits: Tensor, targets: Tensor) -> Tensor:
    """(4,) float64: summed cross-entropy, correct top-1, correct top-5, number of images."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == targets[:, None]
    sums = [loss, hits[:, 0].sum(), hits.sum(), loss.new_full((), len(targets))]
    return torch.stack([value.double() for value in sums])
