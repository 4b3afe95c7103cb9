"""The feature pyramid of a detector: a classification model without its head, and an FPN."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

import models
from utils import UserError

IMAGENET_CLASSES = 1000


class Backbone(nn.Module):
    """Images (B, 3, H, W) to an OrderedDict of maps (B, out_channels, h, w), the finest first.

    Lin et al., "Feature Pyramid Networks for Object Detection" (https://arxiv.org/abs/1612.03144), over features
    after the model's own norms.

    Args:
        body: returns a list of maps; its `feature_info` has their widths.
        out_channels: width of every map.
        extra: makes coarser maps.
        norm: the norm after each of the FPN's convolutions, if any.
    """

    def __init__(
        self, body: FeatureGetterNet, out_channels: int, extra: ExtraFPNBlock, norm: Callable[[int], nn.Module] | None
    ):
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra, norm)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        features = self.body(images)
        maps = self.fpn(OrderedDict((str(level), grid) for level, grid in enumerate(features)))
        return OrderedDict((level, in_full_precision(grid)) for level, grid in maps.items())


def in_full_precision(values: Tensor) -> Tensor:
    """The values in at least float32, for everything that box coordinates are computed from.

    Anchors, proposals and boxes get the dtype of the maps and of the heads' offsets. In bf16, coordinates
    above 256 pixels would be rounded to multiples of 2, above 1024 to multiples of 8.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def create_classifier(
    arch: str, input_size: tuple[int, int], model_kwargs: dict[str, Any], drop_path: float | None
) -> nn.Module:
    """A model of this project or of timm, with its classifier, for images of any size.

    Raises:
        ModelError: there is no such model, or it does not take these arguments.
    """
    options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    name = models.resolve_arch(arch)
    if timm.is_model(name) and get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size:
        options["dynamic_img_size"] = True
    return models.create_model(name, IMAGENET_CLASSES, input_size, options | model_kwargs)


def pyramid_features(model: nn.Module, arch: str, strides: Sequence[int]) -> FeatureGetterNet:
    """The model as an extractor of normalised features at these strides, without the layers after the last of them.

    Raises:
        UserError: it has no features at one of the strides.
    """
    found = [info["reduction"] for info in getattr(model, "feature_info", None) or ()]
    if not hasattr(model, "forward_intermediates") or any(found.count(stride) != 1 for stride in strides):
        way_out = "; --model-kwargs stem_stride=4 moves them" if getattr(model, "stem_stride", 4) != 4 else ""
        raise UserError(
            f"--arch {arch}: a detector needs one feature map at each of the strides "
            f"{', '.join(map(str, strides))}; this model's are at {', '.join(map(str, found)) or 'none'}{way_out}"
        )
    return FeatureGetterNet(model, out_indices=[found.index(stride) for stride in strides], norm=True)


def freeze_batch_norms(model: nn.Module) -> None:
    """Freeze the affine weights of batch norms."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
