"""What both bodies share as timm models: forward pass, features, classifier, gradient checkpointing, registration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Block, GridMixer, LayerNorm, format_grid
from .loading import pretrained_filter_fn
from .resampling import Grid, to_grid


class ImageModel(nn.Module):
    """Base of the models. Images are (B, in_chans, H, W); features are a token sequence (B, N, C).

    `_embed` makes a grid of the images, the modules of `parts` transform it one after the other, and `_to_tokens` makes
    a normalised sequence of the last grid.

    Arguments of both families:
        img_size: in pixels, a side or (height, width). Position embeddings, filters and blending weights fit its grids;
            `set_input_size` resamples them for another one.
        in_chans: of the images.
        num_classes: 0 for none, and features (B, C) instead of logits.
        mixer: a name in `models.mixers.MIXERS`, by default "spectral".
        mixers: instead of `mixer` and the numbers of blocks that have it, the mixer of each block: lists, or a text
            like "spectral*4,attention*8", with a slash between stages.
        mixer_options: arguments of mixers by their name, such as {"afno": {"blocks": 4}}.
        drop_rate: of dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        dynamic_img_size: take images of any size, for which weights are resampled each time.
        spectral_precision: how exact spectral mixers are under autocast: "half", in its precision with products that
            add up in float32, or "float32" throughout.
    """

    pools: tuple[str, ...]  # what global_pool can be, the default first
    num_prefix_tokens: int  # 1 where a class block puts a class token in front of the sequence
    parts_name: str  # the attribute that is `parts`
    design: dict[str, Any]  # the arguments that a checkpoint must agree with, see `loading.pretrained_filter_fn`

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        img_size: int | Grid,
        num_features: int,
        global_pool: str,
        drop_rate: float,
        dynamic_img_size: bool,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = to_grid(img_size)
        self.num_features = self.head_hidden_size = num_features
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self._set_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in self.pools:
            raise ValueError(f"global_pool is one of {', '.join(map(repr, self.pools))}, not {global_pool!r}")
        self.global_pool = global_pool

    def _classifier(self) -> nn.Module:
        """A new classifier, the identity for no classes, where the model's weights are."""
        if self.num_classes == 0:
            return nn.Identity()
        like = next(self.parameters())
        head = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.train(self.training)

    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or the identity for no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none, the model returns its features)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        self.head = self._classifier()

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides all one-dimensional ones."""
        return set()

    @property
    def parts(self) -> nn.Sequential:
        """The blocks of a vanilla model, the stages of a pyramid."""
        return getattr(self, self.parts_name)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens (B, N, C), in pyramids the class token first."""
        return self._to_tokens(self.parts(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, N, C) to logits (B, num_classes), or to the pooled features (B, C)."""
        pooled = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]] | tuple[Tensor, list]:
        """Outputs of chosen `parts`, and the features unless `intermediates_only`.

        indices: the last n parts, all for None, or a list. norm: apply the final norm to those that have none of their
        own, which are all blocks and the last stage. stop_early: run nothing after the last chosen one; the features of
        a pyramid that leaves stages out are its grid. output_fmt: "NCHW", "NHWC" or "NLC".
        return_prefix_tokens: of a pyramid, pairs of a grid and a class token (B, 1, C), the class block's for the last
        stage. The others have none: theirs is the mean of the grid, as which the class token begins.
        """
        take, last = feature_take_indices(len(self.parts), indices)
        parts = self.parts[: last + 1] if stop_early else self.parts
        x = self._embed(x)
        intermediates = []
        for i, part in enumerate(parts):
            x = part(x)
            if i not in take:
                continue
            has_norm = isinstance(getattr(part, "norm", None), LayerNorm)
            grid = format_grid(self.norm(x) if norm and not has_norm else x, output_fmt)
            pairs = return_prefix_tokens and self.num_prefix_tokens
            intermediates.append((grid, self._prefix_token(x, norm, last_stage=not has_norm)) if pairs else grid)
        if intermediates_only:
            return intermediates
        if self.num_prefix_tokens and len(parts) < len(self.feature_info):  # the class block is for the last stage
            return format_grid(x, output_fmt), intermediates
        return self._to_tokens(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the `parts` after the last of `indices`; returns the indices kept, counted from the front."""
        take, last = feature_take_indices(len(self.parts), indices)
        setattr(self, self.parts_name, self.parts[: last + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            if self.num_prefix_tokens:
                self.class_block = nn.Identity()
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def compile(self, *, mode: str | None = None, options: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """`nn.Module.compile`, in place, without TorchInductor's layout optimization.

        It takes every tensor of four axes for (B, C, H, W), and would transpose each (B, H, W, C) that is kept for the
        backward pass, and back. `torch.compile(model, options={"layout_optimization": False})` is the same. Unlike
        there, `mode` and `options` go together: a mode is a set of options.
        """
        if arguments.get("backend", "inductor") == "inductor":
            of_mode = torch._inductor.list_mode_options(mode) if mode else {}
            mode, options = None, {"layout_optimization": False, **of_mode, **(options or {})}
        super().compile(mode=mode, options=options, **arguments)

    def _check_input(self, x: Tensor) -> None:
        if not self.dynamic_img_size:
            check_image_size(x, self.img_size)

    def _record_input_size(self, img_size: int | Grid) -> None:
        """Keep the size where timm looks for a model's current input and its construction arguments."""
        self.img_size = to_grid(img_size)
        self._traits = dict(getattr(self, "_traits", {}), img_size=self.img_size)
        self._model_args = dict(getattr(self, "_model_args", {}), img_size=self.img_size)


@torch.fx.wrap
def check_image_size(x: Tensor, img_size: Grid) -> None:
    """See that images (B, 3, H, W) have the size that the model is built for.

    Raises:
        ValueError: they have another one.
    """
    height, width = x.shape[-2:]
    if (height, width) != img_size:
        raise ValueError(
            f"the model is built for images of {img_size[0]}x{img_size[1]} pixels, not {height}x{width}: "
            "use img_size, set_input_size or dynamic_img_size=True"
        )


def resize_mixers(blocks: nn.Module, grid_size: Grid) -> None:
    """Give every mixer in `blocks` whose weights depend on the grid those of another one."""
    for block in blocks:
        if isinstance(block.mixer, GridMixer):
            block.mixer.set_grid_size(grid_size)


def model_cfg(first_conv: str, crop_pct: float, source: dict[str, str]) -> dict:
    """Timm's default configuration of a model; `source` names paper and repository.

    There is no pool size: unpooled features are a sequence of tokens.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": "mit",
        **source,
    }


def build_variant(
    model: type[ImageModel], name: str, pretrained: bool, out_indices: int | Sequence[int], arguments: dict
) -> ImageModel:
    """The registered model `name`.

    By default `features_only` gives the outputs at `out_indices`, of images of any size: detection and segmentation
    have them.
    """
    if arguments.get("features_only"):
        arguments = {"dynamic_img_size": True} | arguments
    return build_model_with_cfg(
        model,
        name,
        pretrained,
        pretrained_filter_fn=pretrained_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )
