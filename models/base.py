"""The timm interface of both backbones: forward pass, features, classifier, gradient checkpointing, registration."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import Format, global_pool_nlc, nhwc_to
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Block, GridMixer, LayerNorm, init_linear
from .loading import pretrained_filter_fn
from .resampling import Grid, to_grid


class ImageModel(nn.Module):
    """Base class of the models. Images are (B, in_chans, H, W); features are a token sequence (B, N, C).

    `_embed` maps the images to a grid, the modules in `parts` transform the grid one after another, and `_to_tokens`
    maps the last grid to a normalized sequence.

    Arguments of both families:
        img_size: image size in pixels, a side or (height, width). Position embeddings, filters and blending weights
            are created for this size; `set_input_size` resamples them for another one.
        in_chans: number of image channels.
        num_classes: number of classes; with 0, the model returns features (B, C) instead of logits.
        mixer: the name of the spectral mixer in `models.mixers.MIXERS`, by default "spectral".
        mixers: the mixer of every block, instead of `mixer` and the number of blocks that use it: lists of names, or a
            string such as "spectral*4,attention*8", with a slash between stages.
        mixer_options: keyword arguments by mixer name, such as {"afno": {"blocks": 4}}.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first block.
        dynamic_img_size: whether to accept images of any size, by resampling the weights in every forward pass.
        spectral_precision: precision of the spectral mixers under autocast: "half" for autocast's dtype with float32
            accumulation, or "float32".
    """

    pools: tuple[str, ...]  # the values of global_pool, the default first
    num_prefix_tokens: int  # 1 if a class block prepends a class token to the sequence
    parts_name: str  # the attribute that `parts` returns
    design: dict[str, Any]  # the arguments that must match a checkpoint's, see `loading.pretrained_filter_fn`

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
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, self.pools))}, not {global_pool!r}")
        self.global_pool = global_pool

    def _classifier(self) -> nn.Module:
        """Create a classifier, or the identity for 0 classes, on the device of the model."""
        if self.num_classes == 0:
            return nn.Identity()
        like = next(self.parameters())
        head = nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)
        init_linear(head)
        return head.train(self.training)

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a linear layer, or the identity for 0 classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with one for `num_classes` (0: the model returns its features)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        self.head = self._classifier()

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay, in addition to all one-dimensional ones."""
        return set()

    @property
    def parts(self) -> nn.Sequential:
        """The blocks of a vanilla model or the stages of a pyramid."""
        return getattr(self, self.parts_name)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to normalized tokens (B, N, C); in a pyramid, the class token is first."""
        return self._to_tokens(self.parts(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, N, C) to logits (B, num_classes), or with `pre_logits` to pooled features (B, C)."""
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
        """Return the features and the outputs of selected `parts`; with `intermediates_only`, only the outputs.

        indices: a list of parts, the last n parts, or None for all. norm: apply the final norm to outputs that have no
        norm of their own, those of all blocks and of the last stage. stop_early: skip the parts after the last
        selected one; a pyramid that skips stages returns its grid as features. output_fmt: "NCHW", "NHWC", "NLC" or
        "NCL".
        return_prefix_tokens: return pairs of a pyramid's grid and class token (B, 1, C). Only the last stage has a
        class token, from the class block; the other stages return the mean of the grid.
        """
        output_fmt = Format(output_fmt)
        take, last = feature_take_indices(len(self.parts), indices)
        parts = self.parts[: last + 1] if stop_early else self.parts
        x = self._embed(x)
        intermediates = []
        for i, part in enumerate(parts):
            x = part(x)
            if i not in take:
                continue
            has_norm = isinstance(getattr(part, "norm", None), LayerNorm)
            grid = nhwc_to(self.norm(x) if norm and not has_norm else x, output_fmt).contiguous()
            pairs = return_prefix_tokens and self.num_prefix_tokens
            intermediates.append((grid, self._prefix_token(x, norm, last_stage=not has_norm)) if pairs else grid)
        if intermediates_only:
            return intermediates
        if self.num_prefix_tokens and len(parts) < len(self.feature_info):  # the class block needs the last stage
            return nhwc_to(x, output_fmt).contiguous(), intermediates
        return self._to_tokens(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the `parts` after the last of `indices`; return the indices as non-negative numbers."""
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
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def compile(self, *, mode: str | None = None, options: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """Compile the model in place (`nn.Module.compile`) without TorchInductor's layout optimization.

        That optimization assumes four-dimensional tensors to be (B, C, H, W) and would transpose every (B, H, W, C)
        saved for the backward pass. `torch.compile(model, options={"layout_optimization": False})` does the same, but
        does not accept `mode` and `options` together.
        """
        if arguments.get("backend", "inductor") == "inductor":
            of_mode = torch._inductor.list_mode_options(mode) if mode else {}
            mode, options = None, {"layout_optimization": False, **of_mode, **(options or {})}
        super().compile(mode=mode, options=options, **arguments)

    def _check_input(self, x: Tensor) -> None:
        if not self.dynamic_img_size:
            check_image_size(x, self.img_size)

    def _record_input_size(self, img_size: int | Grid) -> None:
        """Store the size where timm reads a model's current input size and constructor arguments."""
        self.img_size = to_grid(img_size)
        self._traits = dict(getattr(self, "_traits", {}), img_size=self.img_size)
        self._model_args = dict(getattr(self, "_model_args", {}), img_size=self.img_size)


@torch.fx.wrap
def check_image_size(x: Tensor, img_size: Grid) -> None:
    """Check that images (B, in_chans, H, W) have the model's image size.

    Raises:
        ValueError: if they do not.
    """
    height, width = x.shape[-2:]
    if (height, width) != img_size:
        raise ValueError(
            f"the model expects images of {img_size[0]}x{img_size[1]} pixels, not {height}x{width}: "
            "use img_size, set_input_size or dynamic_img_size=True"
        )


def resize_mixers(blocks: nn.Module, grid_size: Grid) -> None:
    """Resample the grid-dependent weights of all mixers in `blocks` to another grid."""
    for block in blocks:
        if isinstance(block.mixer, GridMixer):
            block.mixer.set_grid_size(grid_size)


def model_cfg(first_conv: str, crop_pct: float, source: dict[str, str]) -> dict:
    """Return timm's default configuration of a model; `source` has the paper and repository.

    `pool_size` is None because unpooled features are a token sequence.
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
    """Build the registered model `name`.

    With `features_only`, it returns the outputs at `out_indices` by default, and accepts images of any size, as
    detection and segmentation need.
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


def register(build: Callable[[str, bool, dict], ImageModel], name: str, description: str) -> None:
    """Register `build(name, pretrained, arguments)` as timm's model `name`, in the module that defines `build`."""

    def model(pretrained: bool = False, **arguments: Any) -> ImageModel:
        return build(name, pretrained, arguments)

    model.__name__ = model.__qualname__ = name
    model.__doc__, model.__module__ = description, build.__module__
    setattr(sys.modules[build.__module__], name, register_model(model))
