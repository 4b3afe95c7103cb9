"""What training minimises: class labels hard or mixed, token labels, a teacher's outputs.

A run has one criterion, called as ``criterion(images, outputs, targets)``. All of it is computed in float32 at least,
whatever autocast made of the model's outputs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from models.precision import full_precision
from utils import UserError

# The teacher's share of a class target that blends in the ground truth: where both name one class, and not.
AGREED_SHARE, DISPUTED_SHARE = 0.5, 0.9


def token_label_loss(
    outputs: Sequence, targets: Tensor, cls_weight: float = 1.0, dense_weight: float = 0.5, ground_truth: bool = False
) -> Tensor:
    """The scalar loss of token labelling with MixToken (Jiang et al. 2021, "All Tokens Matter", section 3).

    cls_weight · cross-entropy of the class logits + dense_weight · mean cross-entropy of the token logits.
    The swapped box of MixToken covers a share 1 − λ of the tokens, and the class target is
    λ·t + (1 − λ)·t.flip(0). The model puts the token logits back in their own images, so their targets are
    not mixed.

    Args:
        outputs: class logits (B, classes), token logits (B, N, classes), and optionally MixToken's box
            (x1, y1, x2, y2) on the token grid, None or of no area where nothing was mixed.
        targets: (B, classes, 2 + N) as `token_labels.dense_targets` lays them out; with two columns every
            token has the class token's target.
        ground_truth: blend the ground truth into the class target t: 0.9 or, where it and the teacher name
            the same class, 0.5 of the teacher's, and the rest of the ground truth's.
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
    """The criterion of class labels.

    Args:
        soft_targets: the targets are distributions, which mixup and cutmix smooth themselves.
        class_weights: (classes,), weights of the target's terms, hard or mixed, of cross-entropy and of BCE.
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
        """Raises UserError for a model that mixes images by itself, whose targets these are not."""
        if not isinstance(outputs, Tensor):
            raise UserError("this model also returns token logits: train it with --token-label and label maps")
        with torch.autocast(outputs.device.type, enabled=False):
            return self.loss(full_precision(outputs), targets)


class DistillationLoss(nn.Module):
    """Knowledge distillation (Hinton et al. 2015; Touvron et al. 2021, "DeiT", section 4), as a criterion.

    (1 − alpha) · loss of the labels + alpha · loss of the teacher's outputs for the same, possibly mixed,
    images. The model's outputs may be a pair of logits, for the labels and for the teacher; a single tensor
    serves both.

    Args:
        base: the criterion of the labels.
        teacher: any classifier of the same images and classes; put in evaluation mode, never trained.
        kind: "soft", Kullback-Leibler divergence at temperature tau, or "hard", cross-entropy with the class
            that the teacher chooses.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        self.base = base
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
        """Raises UserError where the teacher knows another number of classes."""
        logits, student = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        with torch.no_grad():
            taught = self.teacher(images)
        if taught.shape != student.shape:
            raise UserError(f"--teacher-model: it has {taught.shape[1]} classes, the data {student.shape[1]}")
        with torch.autocast(student.device.type, enabled=False):
            distilled = self._distilled(full_precision(student), full_precision(taught))
        return (1 - self.alpha) * self.base(images, logits, targets) + self.alpha * distilled

    def _distilled(self, student: Tensor, taught: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, taught.argmax(1))
        divergence = F.kl_div(
            F.log_softmax(student / self.tau, 1), F.log_softmax(taught / self.tau, 1), reduction="sum", log_target=True
        )
        return divergence * self.tau**2 / student.numel()  # mean over batch and classes, as DeiT's


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Images / (classes · images of the class), as scikit-learn's "balanced"; 1 where all classes are equally large."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
