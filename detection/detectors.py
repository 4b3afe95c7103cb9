"""torchvision's detectors on any feature pyramid, with the heads of their v2 builders or the classic ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detection.backbone import Backbone, in_full_precision
from detection.pasting import paste
from detection.subsampling import KeyedSubsampler
from utils import UserError

Target = dict[str, Any]
# Group norm, where torchvision's v2 builders have batch norm: it is the same for any batch and number of processes.
GROUPS = 32
RATIOS = (0.5, 1.0, 2.0)
STRIDES = {"mask_rcnn": (4, 8, 16, 32), "faster_rcnn": (4, 8, 16, 32), "retinanet": (8, 16, 32)}
COUNTS = ("fpn_channels", "anchor_sizes", "detections")  # --detector-kwargs that are positive integers
OFFSETS = ("bbox_pred", "bbox_reg")  # the layers that say where boxes are, relative to anchors or proposals
# How many anchors or proposals each loss is a mean over.
COUNTED = {
    "loss_objectness": ("rpn", "drawn"),
    "loss_rpn_box_reg": ("rpn", "drawn"),
    "loss_classifier": ("roi_heads", "drawn"),
    "loss_box_reg": ("roi_heads", "drawn"),
    "loss_mask": ("roi_heads", "positives"),
}


def wrong_argument(arguments: Mapping[str, Any]) -> str:
    """What is wrong with --detector-kwargs, or ""; torchvision's own errors are less clear and come later."""
    for name, value in arguments.items():
        numbers = value if name == "anchor_sizes" else [value]
        kinds = (int,) if name in COUNTS else (int, float)
        if not isinstance(numbers, (list, tuple)) or any(type(number) not in kinds for number in numbers):
            return f"{name} is {value!r}, not {' or '.join(kind.__name__ for kind in kinds)}"
        if name in COUNTS and min(numbers, default=0) < 1:
            return f"{name} is {value!r}, not positive"
    return ""


def kinds_of(detector: str) -> tuple[str, ...]:
    """What a detector finds: "box" and perhaps "mask"."""
    return ("box", "mask") if detector == "mask_rcnn" else ("box",)


class Detector(nn.Module):
    """One of torchvision's detectors, whose random choices and losses do not depend on how a batch is distributed.

    Images are a list of (3, H, W), values 0 to 1, of any sizes. In evaluation `forward` returns a dict for each image:
    "boxes" (N, 4) in its own pixels (x1, y1, x2, y2), "labels" (N,) from 1, "scores" (N,) and, with masks, "masks"
    (N, 1, H, W), probabilities. In training it takes such targets, with "masks" (N, H, W) and a "seed" for each image.
    It returns, for each loss, its value and the number of terms that it is the mean of.
    """

    def __init__(self, network: FasterRCNN | RetinaNet):
        super().__init__()
        self.network = network
        self._subsamplers: dict[str, KeyedSubsampler] = {}
        for name in ("rpn", "roi_heads"):
            if hasattr(network, name):
                part = getattr(network, name)
                part.fg_bg_sampler = self._subsamplers[name] = KeyedSubsampler(part.fg_bg_sampler)
        for name, layer in network.named_modules():
            if name.endswith(OFFSETS):
                layer.register_forward_hook(_in_full_precision)

    @property
    def body(self) -> FeatureGetterNet:
        return self.network.backbone.body

    @property
    def detections(self) -> int:
        """The upper limit of detections per image."""
        heads = getattr(self.network, "roi_heads", self.network)
        return heads.detections_per_img

    @property
    def pretrained_cfg(self) -> dict[str, tuple[str, ...]]:
        """The names of the layers to replace for other classes, under the key that timm's models use."""
        names = ("roi_heads.box_predictor", "roi_heads.mask_predictor", "head.classification_head.cls_logits")
        owned = dict(self.named_modules())
        return {"classifier": tuple(name for name in (f"network.{name}" for name in names) if name in owned)}

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, tuple[Tensor, int]] | list[dict[str, Tensor]]:
        if not self.network.training:
            return self.network(images)
        for subsampler in self._subsamplers.values():
            subsampler.seeds = [target["seed"] for target in targets]
        losses = self.network(images, targets)
        return {name: (loss, self._parts(name, len(images))) for name, loss in losses.items()}

    def _parts(self, loss: str, images: int) -> int:
        """The number of terms of a loss: images for RetinaNet, sampled anchors or proposals otherwise."""
        if loss not in COUNTED:
            return images
        owner, counter = COUNTED[loss]
        return getattr(self._subsamplers[owner], counter)

    def features(self, image: Tensor) -> Iterable[Tensor]:
        """The maps that the heads see of one image."""
        images, _ = self.network.transform([image])
        return self.network.backbone(images.tensors).values()

    def no_weight_decay(self) -> set[str]:
        """The body's parameters that are exempt from weight decay."""
        names = getattr(self.body.model, "no_weight_decay", set)()
        return {f"network.backbone.body.model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layer of a parameter, for layer-wise rates and freezing: the body's own, then FPN and heads as one."""
        body = self.body.model
        if not hasattr(body, "group_matcher"):
            raise UserError("--freeze-at and --layer-decay: this model does not say what its layers are")
        layers = group_parameters(body, body.group_matcher(coarse=coarse))
        prefix = "network.backbone.body.model."
        layer_of = {f"{prefix}{name}": layer for layer, names in layers.items() for name in names}
        return lambda name: layer_of.get(name, len(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the body's blocks in the backward pass."""
        self.body.model.set_grad_checkpointing(enable)


def _in_full_precision(_layer: nn.Module, _inputs: tuple, offsets: Tensor) -> Tensor:
    return in_full_precision(offsets)


class ScaledImages(GeneralizedRCNNTransform):
    """Normalises and pads images, and maps detections back to the pixels of the original image.

    In evaluation it also scales images; in training the augmentation has done so.
    """

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        height, width = image.shape[-2:]
        size = scaled_size(height, width, self.min_size[-1], self.max_size)
        if not self.training and size != (height, width):
            image = interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
        return image, target

    def postprocess(
        self, found: list[dict[str, Tensor]], sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        if self.training:
            return found
        masks = [image.pop("masks", None) for image in found]
        found = super().postprocess(found, sizes, original_sizes)
        for image, on_boxes, size in zip(found, masks, original_sizes, strict=True):
            if on_boxes is not None:
                image["masks"] = paste(on_boxes, image["boxes"], size)
        return found


def scaled_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) with the short side `short`, or less so that the long side is at most `long`.

    The rule of `v2.RandomShortestSize`.
    """
    ratio = min(short / min(height, width), long / max(height, width))
    return int(height * ratio), int(width * ratio)


def build_detector(
    kind: str,
    body: FeatureGetterNet,
    num_classes: int,
    *,
    heads: str = "v2",
    min_size: int = 800,
    max_size: int = 1333,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    detections: int = 100,
    **settings: float,
) -> Detector:
    """A detector with the heads of torchvision's v2 builders, or with the classic ones.

    Args:
        kind: "mask_rcnn", "faster_rcnn" or "retinanet".
        body: features at `STRIDES[kind]`.
        num_classes: without the background.
        heads: "v2" or "classic".
        min_size, max_size: of an image's short and long side in evaluation, in pixels.
        fpn_channels: width of the FPN and the heads.
        anchor_sizes: side of a square anchor in pixels, one per level.
        detections: upper limit per image.
        settings: numbers that torchvision's constructor takes, such as ``box_batch_size_per_image=128``.

    Raises:
        UserError: an argument is unknown or does not fit.
    """
    network = {"mask_rcnn": MaskRCNN, "faster_rcnn": FasterRCNN, "retinanet": RetinaNet}[kind]
    build = _build_retinanet if kind == "retinanet" else partial(_build_rcnn, network)
    _check_settings(network, settings)
    levels = len(STRIDES[kind]) + (2 if kind == "retinanet" else 1)
    if len(anchor_sizes) != levels:
        raise UserError(
            f"--detector-kwargs: {kind} needs {levels} anchor_sizes, one per level, not {len(anchor_sizes)}"
        )
    if heads == "v2" and fpn_channels % GROUPS:
        raise UserError(f"--detector-kwargs: fpn_channels must be a multiple of {GROUPS}, not {fpn_channels}")
    norm = partial(nn.GroupNorm, GROUPS) if heads == "v2" else None
    detector = build(body, num_classes, fpn_channels, anchor_sizes, detections, norm, settings)
    like = detector.transform
    detector.transform = ScaledImages(min_size, max_size, like.image_mean, like.image_std)
    return Detector(detector)


def _check_settings(network: type[nn.Module], settings: dict[str, float]) -> None:
    """Refuse unknown names, which torchvision ignores."""
    known = {name: p.default for name, p in inspect.signature(network).parameters.items()}
    known = {name: default for name, default in known.items() if isinstance(default, int | float)}
    taken = [name for name in known if name not in ("min_size", "max_size")]
    for name, value in settings.items():
        if name not in taken:
            raise UserError(f"--detector-kwargs: {name} is unknown; there are {', '.join(taken)}")
        if not isinstance(value, int | float) or (isinstance(known[name], int) and not isinstance(value, int)):
            raise UserError(f"--detector-kwargs: {name} is {value!r}, not a number like {known[name]}")


def _build_rcnn(
    network: type[FasterRCNN],
    body: FeatureGetterNet,
    num_classes: int,
    width: int,
    anchor_sizes: Sequence[int],
    detections: int,
    norm: Callable[[int], nn.Module] | None,
    settings: dict[str, float],
) -> FasterRCNN:
    anchors = AnchorGenerator(tuple((size,) for size in anchor_sizes), (RATIOS,) * len(anchor_sizes))
    box_width = 4 * width  # of the last layer before class and box
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(width, len(RATIOS), conv_depth=1 if norm is None else 2),
        "box_head": TwoMLPHead(width * 7**2, box_width)
        if norm is None
        else FastRCNNConvFCHead((width, 7, 7), [width] * 4, [box_width], norm_layer=norm),
        "box_predictor": FastRCNNPredictor(box_width, num_classes + 1),
        "box_detections_per_img": detections,
    }
    if network is MaskRCNN:
        parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
    return network(Backbone(body, width, LastLevelMaxPool(), norm), **parts, **settings)


def _build_retinanet(
    body: FeatureGetterNet,
    num_classes: int,
    width: int,
    anchor_sizes: Sequence[int],
    detections: int,
    norm: Callable[[int], nn.Module] | None,
    settings: dict[str, float],
) -> RetinaNet:
    octaves = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in anchor_sizes)
    head = RetinaNetHead(width, 3 * len(RATIOS), num_classes + 1, norm_layer=norm)
    if norm is not None:
        head.regression_head._loss_type = "giou"  # as torchvision's own v2 builder says it
    backbone = Backbone(body, width, LastLevelP6P7(body.feature_info.channels()[-1], width), None)
    return RetinaNet(
        backbone,
        num_classes + 1,
        anchor_generator=AnchorGenerator(octaves, (RATIOS,) * len(octaves)),
        head=head,
        detections_per_img=detections,
        **settings,
    )
