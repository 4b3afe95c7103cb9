"""Losses for hard or mixed class labels, token labels, and distillation.

A run has one criterion, called as ``criterion(images, outputs, targets)``. It is computed at least in float32, even
under autocast.
"""

from collections.abc import Sequence

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from models.precision import full_precision
from utils import UserError

# The teacher's share of a blended class target: if teacher and ground truth agree on the class, and if not.
AGREED_SHARE, DISPUTED_SHARE = 0.5, 0.9


def token_label_loss(
    outputs: Sequence, targets: Tensor, cls_weight: float = 1.0, dense_weight: float = 0.5, ground_truth: bool = False
) -> Tensor:
    """The scalar loss of token labelling with MixToken (Jiang et al. 2021, "All Tokens Matter", section 3).

    cls_weight · cross-entropy of the class logits + dense_weight · mean cross-entropy of the token logits.
    MixToken swaps a box that covers a fraction 1 − λ of the tokens, so the class target is
    λ·t + (1 − λ)·t.flip(0). The model swaps the token logits back to their own images, so the token targets
    are not mixed.

    Args:
        outputs: class logits (B, classes), token logits (B, N, classes), and optionally MixToken's box
            (x1, y1, x2, y2) on the token grid, None or empty if nothing was mixed.
        targets: (B, classes, 2 + N), see `token_labels.dense_targets`; with only two columns, every token has
            the class token's target.
        ground_truth: blend the ground truth into the class target t. The teacher's target has a weight of 0.5
            if both agree on the class and 0.9 otherwise; the ground truth has the rest.
    """
    class_logits, token_logits, box = (*outputs, None)[:3]
    targets = targets.to(full_precision(class_logits).dtype)
    tokens = token_logits.shape[1]
    label, target = targets[..., 0], targets[..., 1]
    token_targets = targets[..., 2:] if targets.shape[2] > 2 else targets[..., 1:].expand(-1, -1, tokens)
    if ground_truth:
        agreed = label.argmax(1, keepdim=True) == target.argmax(1, keepdim=True)
        share = torch.where(agreed, AGREED_SHARE, DISPUTED_SHARE)
        target = share * target + (1 - share) * label
    if box is not None and len(box):
        x1, y1, x2, y2 = box
        mixed = (x2 - x1) * (y2 - y1) / tokens
        target = (1 - mixed) * target + mixed * target.flip(0)
    with torch.autocast(targets.device.type, enabled=False):
        class_loss = F.cross_entropy(full_precision(class_logits), target)
        token_loss = F.cross_entropy(full_precision(token_logits).mT, token_targets)
        return cls_weight * class_loss + dense_weight * token_loss


class ClassLoss(nn.Module):
    """The criterion for class labels.

    Args:
        soft_targets: the targets are distributions, which mixup and cutmix have already smoothed.
        class_weights: (classes,), weights of the classes in cross-entropy or BCE, for hard or mixed targets.
        bce: binary cross-entropy for each class instead of cross-entropy.
    """

    def __init__(
        self, smoothing: float = 0.1, soft_targets: bool = False, class_weights: Tensor | None = None, bce: bool = False
    ):
        super().__init__()
        if bce:
            self.loss = BinaryCrossEntropy(smoothing, pos_weight=class_weights)
        else:
            self.loss = nn.CrossEntropyLoss(class_weights, label_smoothing=0.0 if soft_targets else smoothing)

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise UserError("this model also returns token logits: train it with --token-label and label maps")
        with torch.autocast(outputs.device.type, enabled=False):
            return self.loss(full_precision(outputs), targets)


class DistillationLoss(nn.Module):
    """Knowledge distillation (Hinton et al. 2015; Touvron et al. 2021, "DeiT", section 4), as a criterion.

    (1 − alpha) · label loss + alpha · distillation loss against the teacher's outputs for the same, possibly
    mixed, images. The model may return a pair of logits, for the labels and for the teacher; a single tensor is
    used for both.

    Args:
        base: the criterion for the labels.
        teacher: a classifier for the same images and classes; it is set to evaluation mode and never trained.
        kind: "soft" for the Kullback-Leibler divergence at temperature tau, or "hard" for cross-entropy with the
            teacher's predicted class.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        self.base = base
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
        logits, student = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        with torch.no_grad():
            taught = self.teacher(images)
        with torch.autocast(student.device.type, enabled=False):
            student, taught = full_precision(student), full_precision(taught)
            if self.kind == "hard":
                distilled = F.cross_entropy(student, taught.argmax(1))
            else:  # mean over batch and classes, as in DeiT
                student, taught = (F.log_softmax(logits / self.tau, 1) for logits in (student, taught))
                divergence = F.kl_div(student, taught, reduction="sum", log_target=True)
                distilled = divergence * self.tau**2 / student.numel()
        return (1 - self.alpha) * self.base(images, logits, targets) + self.alpha * distilled


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Images / (classes · images of the class), like scikit-learn's "balanced"; 1 if all classes are equally large."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
