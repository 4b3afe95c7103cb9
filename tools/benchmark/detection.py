"""Mask R-CNN over one backbone and another, on images of COCO's usual size."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from detection.backbone import create_classifier, pyramid_features
from detection.detectors import STRIDES, Detector, build_detector

from .models import figures
from .settings import Settings
from .stopwatch import speed_ratio, take_turns

HEIGHT, WIDTH = 800, 1333
CATEGORIES = 80
OBJECTS = 7  # an image; COCO's mean is 7.3


def compare_detectors(archs: Sequence[str], settings: Settings, rounds: int) -> dict:
    """Training and inference of Mask R-CNN with the same heads over each of the backbones."""
    detectors = {arch: build(arch).to(settings.device) for arch in archs}
    rows = {arch: {"parameters": sum(p.numel() for p in model.parameters())} for arch, model in detectors.items()}
    size = {"img_size": [HEIGHT, WIDTH]}
    result: dict = {"settings": asdict(settings) | size, "rounds": rounds, "models": rows, "ratios": {}}
    for part, make in (("inference", inference_run), ("training", training_run)):
        runs = {arch: make(model, settings) for arch, model in detectors.items()}
        seconds = take_turns(runs, rounds, settings.device)
        result["ratios"][part] = {a: {b: speed_ratio(seconds, a, b) for b in runs} for a in runs}
        for arch in archs:
            rows[arch] |= figures(part, seconds[arch], settings.batch_size)
    return result


def build(arch: str) -> Detector:
    """Untrained, and so without a threshold for what it detects: as many objects as a trained one finds at most."""
    classifier = create_classifier(arch, (224, 224), {}, drop_path=None)
    body = pyramid_features(classifier, arch, STRIDES["mask_rcnn"])
    return build_detector("mask_rcnn", body, CATEGORIES, box_score_thresh=0.0)


def training_run(detector: Detector, settings: Settings) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([WIDTH - 400.0, HEIGHT - 400.0])
    boxes = torch.cat((corner, corner + 40 + 350 * torch.rand(OBJECTS, 2, generator=generator)), 1)
    target = {
        "boxes": boxes.to(settings.device),
        "labels": torch.arange(1, OBJECTS + 1, device=settings.device),
        "masks": torch.ones(OBJECTS, HEIGHT, WIDTH, dtype=torch.uint8, device=settings.device),
        "seed": 0,
    }
    images = list(torch.rand(settings.batch_size, 3, HEIGHT, WIDTH, device=settings.device))

    def run() -> None:
        detector.train()
        with settings.autocast():
            losses = detector(images, [target] * len(images))
        sum(loss for loss, _ in losses.values()).backward()
        detector.zero_grad()

    return run


def inference_run(detector: Detector, settings: Settings) -> Callable[[], None]:
    images = list(torch.rand(settings.batch_size, 3, HEIGHT, WIDTH, device=settings.device))

    def run() -> None:
        detector.eval()
        with torch.inference_mode(), settings.autocast():
            for image in images:  # as they are evaluated
                detector([image])

    return run
