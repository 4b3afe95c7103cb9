"""torchvision's detectors on any feature pyramid, with the heads of torchvision's v2 builders or the classic ones."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.v2 import RandomShortestSize

from detection.backbone import Backbone, in_full_precision
from detection.pasting import paste
from utils import UserError

Target = dict[str, Tensor]
GROUPS = 32  # of group norm, which replaces the batch norm of torchvision's v2 builders because batches are small
RATIOS = (0.5, 1.0, 2.0)
NETWORKS = {"mask_rcnn": MaskRCNN, "faster_rcnn": FasterRCNN, "retinanet": RetinaNet}
STRIDES = {"mask_rcnn": (4, 8, 16, 32), "faster_rcnn": (4, 8, 16, 32), "retinanet": (8, 16, 32)}
OFFSETS = ("bbox_pred", "bbox_reg")  # the layers that predict boxes relative to anchors or proposals


def kinds_of(detector: str) -> tuple[str, ...]:
    """Return the kinds of a detector's predictions: "box", and for Mask R-CNN "mask"."""
    return ("box", "mask") if detector == "mask_rcnn" else ("box",)


class Detector(nn.Module):
    """A torchvision detector with the interface that the engine expects of a model.

    Images are a list of (3, H, W) tensors of any size with values from 0 to 1. In evaluation, `forward` returns a dict
    per image: "boxes" (N, 4) in its pixels (x1, y1, x2, y2), "labels" (N,) from 1, "scores" (N,), and for Mask R-CNN
    "masks" (N, 1, H, W), probabilities. In training, it takes targets with the same keys, "masks" being (N, H, W), and
    returns a dict of losses.
    """

    def __init__(self, network: FasterRCNN | RetinaNet):
        super().__init__()
        self.network = network
        for name, layer in network.named_modules():
            if name.endswith(OFFSETS):
                layer.register_forward_hook(lambda _layer, _inputs, offsets: in_full_precision(offsets))

    @property
    def body(self) -> FeatureGetterNet:
        return self.network.backbone.body

    @property
    def detections(self) -> int:
        """The maximum number of detections per image."""
        return getattr(self.network, "roi_heads", self.network).detections_per_img

    @property
    def pretrained_cfg(self) -> dict[str, tuple[str, ...]]:
        """The names of the layers that depend on the classes, under the key that timm's models use."""
        names = ("roi_heads.box_predictor", "roi_heads.mask_predictor", "head.classification_head.cls_logits")
        owned = dict(self.named_modules())
        return {"classifier": tuple(name for name in (f"network.{name}" for name in names) if name in owned)}

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Target | list[Target]:
        return self.network(images, targets)

    def features(self, image: Tensor) -> Iterable[Tensor]:
        """Return the feature maps of one image that the heads get."""
        images, _ = self.network.transform([image])
        return self.network.backbone(images.tensors).values()

    def no_weight_decay(self) -> set[str]:
        """Return the body's parameters that are exempt from weight decay."""
        names = getattr(self.body.model, "no_weight_decay", set)()
        return {f"network.backbone.body.model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return a function that maps a parameter's name to its layer; FPN and heads form the last layer."""
        body = self.body.model
        if not hasattr(body, "group_matcher"):
            raise UserError("--freeze-at and --layer-decay: this model does not support them (it has no group_matcher)")
        layers = group_parameters(body, body.group_matcher(coarse=coarse))
        prefix = "network.backbone.body.model."
        layer_of = {f"{prefix}{name}": layer for layer, names in layers.items() for name in names}
        return lambda name: layer_of.get(name, len(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the body's blocks in the backward pass instead of storing their activations."""
        self.body.model.set_grad_checkpointing(enable)


class ScaledImages(GeneralizedRCNNTransform):
    """Normalizes and pads images, and maps detections back to the pixels of the original image.

    In evaluation, it also resizes images, with antialiasing like the training augmentation.
    """

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        if not self.training:
            image = RandomShortestSize(self.min_size[-1], self.max_size)(image)
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
    """Build a detector with the heads of torchvision's v2 builders or the classic ones.

    Args:
        kind: "mask_rcnn", "faster_rcnn" or "retinanet".
        body: model that returns features at `STRIDES[kind]`.
        num_classes: number of classes without the background.
        heads: "v2" or "classic".
        min_size, max_size: size of the short side and upper limit of the long side in evaluation, in pixels.
        fpn_channels: number of channels of the FPN and the heads.
        anchor_sizes: side of a square anchor in pixels, one value per level.
        detections: maximum number of detections per image.
        settings: numeric arguments of torchvision's constructor, such as ``box_batch_size_per_image=128``.

    Raises:
        ValueError or TypeError: if an argument is unknown or invalid.
    """
    network = NETWORKS[kind]
    defaults = {name: parameter.default for name, parameter in inspect.signature(network).parameters.items()}
    for name, value in settings.items():  # torchvision would ignore unknown names
        kind_of_default = type(defaults.get(name))
        if not isinstance(value, int | float if kind_of_default is float else kind_of_default):
            raise ValueError(f"torchvision's {network.__name__} does not accept {name}={value!r}")
    width, classes, ratios = fpn_channels, num_classes + 1, (RATIOS,) * len(anchor_sizes)
    norm = partial(nn.GroupNorm, GROUPS) if heads == "v2" else None
    if kind == "retinanet":
        backbone = Backbone(body, width, LastLevelP6P7(body.feature_info.channels()[-1], width), None)
        octaves = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in anchor_sizes)
        head = RetinaNetHead(width, 3 * len(RATIOS), classes, norm_layer=norm)
        if norm is not None:
            head.regression_head._loss_type = "giou"  # as in torchvision's v2 builder
        parts = {"num_classes": classes, "anchor_generator": AnchorGenerator(octaves, ratios), "head": head}
        parts |= {"detections_per_img": detections}
    else:
        backbone = Backbone(body, width, LastLevelMaxPool(), norm)
        box_width = 4 * width  # channels of the last layer before the predictors
        parts = {
            "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in anchor_sizes), ratios),
            "rpn_head": RPNHead(width, len(RATIOS), conv_depth=1 if norm is None else 2),
            "box_head": TwoMLPHead(width * 7**2, box_width)
            if norm is None
            else FastRCNNConvFCHead((width, 7, 7), [width] * 4, [box_width], norm_layer=norm),
            "box_predictor": FastRCNNPredictor(box_width, classes),
            "box_detections_per_img": detections,
        }
        if kind == "mask_rcnn":
            parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm)
            parts["mask_predictor"] = MaskRCNNPredictor(width, width, classes)
    detector = network(backbone, **parts, **settings)
    like = detector.transform
    detector.transform = ScaledImages(min_size, max_size, like.image_mean, like.image_std)
    return Detector(detector)
