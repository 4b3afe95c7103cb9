from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.losses import (
    ClassLoss,
    DistillationLoss,
    balanced_class_weights,
    token_label_loss,
)

GOLDEN = {
    name: torch.from_numpy(np.asarray(value))
    for name, value in np.load(Path(__file__).parent / "golden" / "token_labels.npz").items()
}
LOGITS, TOKEN_LOGITS, TARGETS = GOLDEN["logits"], GOLDEN["aux_logits"], GOLDEN["target_7"]
CLASSES = LOGITS.shape[1]
BOX = (1, 2, 5, 6)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------- token labels


@pytest.mark.parametrize("ground_truth", [False, True])
@pytest.mark.parametrize("box", [None, (), (3, 3, 3, 3), BOX], ids=["none", "empty", "no area", "mixed"])
def test_token_label_loss_equals_the_golden_values(ground_truth, box):
    expected = GOLDEN[f"loss_{'gt_' if ground_truth else ''}{'mixed' if box == BOX else 'none'}"]
    found = token_label_loss((LOGITS, TOKEN_LOGITS, box), TARGETS, 1.0, 0.5, ground_truth)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- class labels


@pytest.mark.parametrize(
    "criterion, targets",
    [
        (ClassLoss(soft_targets=True), TARGETS[..., 0]),
        (ClassLoss(), GOLDEN["ground_truth"]),
    ],
    ids=["soft", "smoothed"],
)
def test_soft_targets_and_smoothing_are_the_same_loss(criterion, targets):
    expected = F.cross_entropy(LOGITS, GOLDEN["ground_truth"], label_smoothing=0.1)
    torch.testing.assert_close(criterion(torch.zeros(4), LOGITS, targets), expected)


# ----------------------------------------------------------------------------------------------- distillation


def teacher() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.Dropout(0.5))
    with torch.no_grad():
        net[1].weight.copy_(draw(CLASSES, 12, seed=5))
    return net.train()


IMAGES = draw(4, 3, 2, 2, seed=6)


@pytest.mark.parametrize("alpha, tau", [(0.5, 1.0), (0.3, 3.0)])
@pytest.mark.parametrize("pair", [False, True], ids=["one output", "two outputs"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_is_deits(kind, pair, alpha, tau):
    net = teacher()
    criterion = DistillationLoss(ClassLoss(), net, kind, alpha, tau)
    student = draw(4, CLASSES, seed=7) if pair else LOGITS
    found = criterion(IMAGES, (LOGITS, student) if pair else LOGITS, GOLDEN["ground_truth"])

    taught = F.linear(IMAGES.flatten(1), net[1].weight, net[1].bias)  # the images as they come, no dropout
    if kind == "hard":
        distilled = F.cross_entropy(student, taught.argmax(1))
    else:
        p, q = (taught / tau).softmax(1), (student / tau).softmax(1)
        distilled = (p * (p / q).log()).sum() * tau**2 / student.numel()
    base = F.cross_entropy(LOGITS, GOLDEN["ground_truth"], label_smoothing=0.1)
    torch.testing.assert_close(found, (1 - alpha) * base + alpha * distilled)


def test_the_teacher_is_not_trained():
    logits = LOGITS.clone().requires_grad_()
    criterion = DistillationLoss(ClassLoss(soft_targets=True), teacher(), "soft")
    criterion(IMAGES, logits, TARGETS[..., 0]).backward()
    assert logits.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in criterion.teacher.parameters())


# -------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_inside_under_autocast(dtype):
    outputs = (LOGITS.to(dtype), TOKEN_LOGITS.to(dtype), BOX)
    criteria = [
        (token_label_loss, lambda loss, out: loss(out, TARGETS)),
        (ClassLoss(), lambda loss, out: loss(IMAGES, out[0], GOLDEN["ground_truth"])),
        (
            DistillationLoss(ClassLoss(), teacher(), "soft"),
            lambda loss, out: loss(IMAGES, out[0], GOLDEN["ground_truth"]),
        ),
    ]
    for criterion, evaluate in criteria:
        expected = evaluate(criterion, (*(o.float() for o in outputs[:2]), BOX))
        with torch.autocast("cpu", dtype=dtype):
            found = evaluate(criterion, outputs)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # the teacher runs under autocast


def test_class_weights_apply_to_hard_soft_and_binary_targets():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = balanced_class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    hard = torch.from_numpy(labels)
    soft = 0.7 * torch.nn.functional.one_hot(hard, 3) + 0.3 * torch.nn.functional.one_hot(hard.flip(0), 3)

    def found(targets, **options):
        loss = ClassLoss(0, targets.ndim == 2, weights, **options)
        return loss(None, logits, targets)

    log = logits.log_softmax(1)
    expected = -(weights[hard] * log[range(10), hard]).sum() / weights[hard].sum()
    torch.testing.assert_close(found(hard), expected)
    torch.testing.assert_close(found(soft), -(weights * soft * log).sum(1).mean())
    yes, no = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    for targets in (torch.nn.functional.one_hot(hard, 3).float(), soft):
        expected = -(weights * targets * yes + (1 - targets) * no).mean()
        torch.testing.assert_close(found(targets, bce=True), expected)
    torch.testing.assert_close(found(hard, bce=True), found(torch.nn.functional.one_hot(hard, 3).float(), bce=True))
