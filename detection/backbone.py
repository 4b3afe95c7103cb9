"""The backbone of a detector: a classification model without its head, and a feature pyramid network (FPN)."""

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
    """Maps images (B, 3, H, W) to an OrderedDict of feature maps (B, out_channels, h, w), the finest first.

    Lin et al., "Feature Pyramid Networks for Object Detection" (https://arxiv.org/abs/1612.03144), applied to the
    model's normalized features.

    Args:
        body: model that returns a list of feature maps, with their numbers of channels in `feature_info`.
        out_channels: number of channels of every output map.
        extra: block that adds coarser maps.
        norm: norm layer after each of the FPN's convolutions, or None.
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
    """Cast values to at least float32. Apply this to everything that box coordinates are computed from.

    Anchors, proposals and boxes get the dtype of the feature maps and the heads' offsets. In bf16, coordinates
    above 256 pixels would be rounded to multiples of 2, above 1024 to multiples of 8.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def create_classifier(
    arch: str, input_size: tuple[int, int], model_kwargs: dict[str, Any], drop_path: float | None
) -> nn.Module:
    """Create a classification model of this project or timm that accepts images of any size.

    Raises:
        ModelError: if the model does not exist or does not accept the arguments.
    """
    options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    name = models.resolve_arch(arch)
    if timm.is_model(name) and get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size:
        options["dynamic_img_size"] = True
    return models.create_model(name, IMAGENET_CLASSES, input_size, options | model_kwargs)


def pyramid_features(model: nn.Module, arch: str, strides: Sequence[int]) -> FeatureGetterNet:
    """Wrap a model to return normalized features at the given strides; later layers are removed.

    Raises:
        UserError: if the model has no features at one of the strides.
    """
    found = [info["reduction"] for info in getattr(model, "feature_info", None) or ()]
    if not hasattr(model, "forward_intermediates") or any(found.count(stride) != 1 for stride in strides):
        way_out = "; set --model-kwargs stem_stride=4" if getattr(model, "stem_stride", 4) != 4 else ""
        raise UserError(
            f"--arch {arch}: a detector needs one feature map at each of the strides "
            f"{', '.join(map(str, strides))}; this model has strides {', '.join(map(str, found)) or 'none'}{way_out}"
        )
    return FeatureGetterNet(model, out_indices=[found.index(stride) for stride in strides], norm=True)


def freeze_batch_norms(model: nn.Module) -> None:
    """Freeze the affine weights of all batch norms."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
