"""The four-stage pyramid body of SpectFormer-H and SVT-H, strides 4, 8, 16, 32.

The two families differ in the mixer of the early blocks (SpectFormer, section 3; SVT, section 3). Stem,
feed-forward and class block are those of Wave-ViT (https://arxiv.org/abs/2207.04978), MixToken is that of
token labelling (https://arxiv.org/abs/2104.10858).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.layers import calculate_drop_path_rates
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .base import ImageModel, build_variant, model_cfg, resize_mixers, run_block
from .layers import (
    SPECTRAL_PRECISIONS,
    Block,
    ClassBlock,
    Downsample,
    FeedForward,
    FinalNorm,
    LayerNorm,
    Stem,
    format_grid,
    init_conv,
    init_linear,
    set_spectral_precision,
)
from .mixers import Options, build_mixer, check_options, stage_mixers
from .resampling import Grid, to_grid

HEAD_DIM = 32
WEIGHTS = Path(__file__).resolve().parent / "weights"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Imagenette's ten classes of ImageNet, in the order of their WordNet ids.
IMAGENETTE = (
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)
# The pyramids for photographs of 128 pixels. The stem's convolutions see the largest grid: 16 channels keep them from
# taking half of the time.
TINY = {
    "img_size": 128,
    "stem_width": 32,
    "embed_dims": (32, 64, 160, 160),
    "depths": (1, 2, 4, 1),
    "num_heads": (1, 2, 5, 5),
    "mlp_ratios": (4, 4, 4, 3),
}
Box = tuple[int, int, int, int] | Tensor


class Stage(nn.Module):
    """Downsampling (but for the first stage), blocks, norm; grids in, grids out."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        return self.norm(x)


class Pyramid(ImageModel):
    """The body of SpectFormer-H and SVT-H: images (B, in_chans, H, W) to logits (B, num_classes).

    Stem, four stages of blocks that halve the grid from one to the next, and a class block that sums the last grid up
    in a class token. Features are tokens (B, 1 + N, C), the class token first.

    With `token_label`, a second linear, `aux_head`, classifies every token of the last stage. In evaluation
    the logits are then class + 0.5 * maximum over tokens. In training `forward(x, box)` swaps the stem's
    tokens inside the box with those of the flipped batch (MixToken) and returns class logits, token logits
    (B, h * w, num_classes), swapped back, and the box: (x1, y1, x2, y2) on the last stage's grid
    `token_label_size`, x along the width, drawn by `sample_mix_box` unless given. Pass a tensor of
    four integers to avoid recompiling for every box.

    Args:
        img_size: in pixels, a side or (height, width). Filters and blending weights fit its grids; `set_input_size`
            resamples them for another one.
        in_chans: of the images.
        num_classes: 0 for none, and features (B, C) instead of logits.
        global_pool: what is classified: "token", the class token; "avg", the mean of the others; "", all tokens.
        stem_width: channels of the stem's convolutions.
        stem_stride: of the first stage, 4, 2 or 1; each of the others doubles it.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: of attention in each stage; by default a head is 32 channels wide.
        mlp_ratios: hidden channels of the feed-forward networks as multiples of a stage's.
        spectral_depths: how many of each stage's first blocks have `mixer`, by default all of stages 1 and 2; the rest
            have attention.
        mixer: a name in `models.mixers.MIXERS`, by default "spectral".
        mixers: instead of both, the mixer of each block: lists, or "spectral*3/conv*4/attention*6/attention*3".
        mixer_options: arguments of mixers by their name, such as {"afno": {"blocks": 4}}.
        token_label: see above.
        drop_rate: of dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        dynamic_img_size: take images of any size, for which weights are resampled each time.
        spectral_precision: how exact spectral mixers are under autocast: "half", in its precision with products that
            add up in float32, or "float32" throughout.

    Raises:
        ValueError: arguments do not fit together; in `forward`, images have another size, unless
            `dynamic_img_size`.
    """

    pools = ("token", "avg", "")
    num_prefix_tokens = 1
    checkpoint_format = "pyramid"

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        stem_width: int = 32,
        stem_stride: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral_depths: Sequence[int] | None = None,
        mixer: str | None = None,
        mixers: str | Sequence[str | Sequence[str]] | None = None,
        mixer_options: Options | None = None,
        token_label: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        spectral_precision: str = SPECTRAL_PRECISIONS[0],
    ):
        dim = embed_dims[-1]
        super().__init__(num_classes, in_chans, img_size, dim, global_pool, drop_rate, dynamic_img_size)
        num_heads = num_heads or [max(dim // HEAD_DIM, 1) for dim in embed_dims]
        _check_stages(depths, embed_dims, num_heads, mlp_ratios)
        names, options = _stage_mixers(depths, spectral_depths, mixer, mixers), check_options(mixer_options)
        self.embed_dims = tuple(embed_dims)
        self.token_label = token_label
        self.stem = Stem(in_chans, stem_width, embed_dims[0], stem_stride)
        self.stem_stride = stem_stride
        self.stages = nn.ModuleList()
        grids = stage_grids(self.img_size, len(depths), stem_stride)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (dim, grid, heads) in enumerate(zip(embed_dims, grids, num_heads, strict=True)):
            blocks = []
            for name, rate in zip(names[i], rates[i], strict=True):
                token_mixer = build_mixer(name, dim, grid, heads, **options.get(name, {}))
                blocks.append(Block(dim, token_mixer, FeedForward(dim, int(dim * mlp_ratios[i]), depthwise=True), rate))
            downsample = Downsample(embed_dims[i - 1], dim) if i else nn.Identity()
            last = i == len(depths) - 1  # its norm follows the class block
            norm = nn.Identity() if last else LayerNorm(dim, eps=1e-6)
            self.stages.append(Stage(downsample, blocks, norm))
        self.token_label_size = grids[-1]
        self.class_block = ClassBlock(dim, num_heads[-1], FeedForward(dim, int(dim * mlp_ratios[-1])))
        self.norm = FinalNorm(dim, eps=1e-6)
        self.head = self._classifier()
        self.aux_head = self._classifier() if token_label else None
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(embed_dims)
        ]
        self.apply(init_linear)
        self.apply(init_conv)
        set_spectral_precision(self, spectral_precision)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides all one-dimensional ones: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        if coarse:
            blocks = r"^stages\.(\d+)"
        else:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ]
        last = [(r"^class_block", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks, "class_block": last}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), and a new `aux_head` where there was one."""
        super().reset_classifier(num_classes, global_pool)
        if self.token_label:
            self.aux_head = self._classifier()

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resample filters and blending weights to another image size, by the rule of each mixer."""
        grids = stage_grids(to_grid(img_size), len(self.stages), self.stem_stride)
        for stage, grid in zip(self.stages, grids, strict=True):
            resize_mixers(stage.blocks, grid)
        self.token_label_size = grids[-1]
        self._record_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def _add_class_token(self, x: Tensor) -> Tensor:
        """The last stage's grid to normalised tokens (B, 1 + N, C)."""
        return self.norm(self.class_block(x.flatten(1, 2)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens (B, 1 + N, C), the class token first."""
        self._check_input(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self._add_class_token(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + N, C) to logits (B, num_classes), or to the pooled features (B, C)."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self._labels_tokens or not self.global_pool:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    @property
    def _labels_tokens(self) -> bool:
        return self.token_label and self.num_classes > 0

    def forward(self, x: Tensor, box: Box | None = None) -> Tensor | tuple[Tensor, Tensor, Box]:
        """Images (B, in_chans, H, W) to logits (B, num_classes); with token labels, in training, see the class."""
        if self.training and self._labels_tokens:
            return self._forward_mixed(x, box)
        check_box(box, self.token_label)
        return self.forward_head(self.forward_features(x))

    def _forward_mixed(self, x: Tensor, box: Box | None) -> tuple[Tensor, Tensor, Box]:
        self._check_input(x)
        grid = stage_grids((x.shape[-2], x.shape[-1]), len(self.stages), self.stem_stride)[-1]
        box = given_or_sampled(box, grid)
        x = swap_box(self.stem(x), box, scale=2 ** (len(self.stages) - 1))
        for stage in self.stages:
            x = stage(x)
        x = self._add_class_token(x)
        token_logits = self.aux_head(x[:, 1:])
        token_logits = swap_box(token_logits.unflatten(1, grid), box).flatten(1, 2)
        return super().forward_head(x), token_logits, box

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
        """Outputs of chosen stages, and the features unless `intermediates_only`.

        indices: the last n stages, all for None, or a list. norm: apply the final norm to the last stage, the
        only one without a norm of its own. stop_early: run no stage after the last chosen one; if that leaves
        stages out, the features are its grid. output_fmt: "NCHW" or "NHWC". return_prefix_tokens: pairs of a grid
        and a class token (B, 1, C), the class block's for the last stage. The others have none: theirs is the mean of
        the grid, as which the class token begins.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is NCHW or NHWC, not {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        self._check_input(x)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                last_stage = i == len(self.feature_info) - 1
                grid = format_grid(self.norm(x) if norm and last_stage else x, output_fmt)
                intermediates.append((grid, self._prefix(x, norm, last_stage)) if return_prefix_tokens else grid)
        if intermediates_only:
            return intermediates
        complete = len(stages) == len(self.feature_info)
        return (self._add_class_token(x) if complete else format_grid(x, output_fmt)), intermediates

    def _prefix(self, grid: Tensor, norm: bool, last_stage: bool) -> Tensor:
        tokens = grid.flatten(1, 2)
        if not last_stage or isinstance(self.class_block, nn.Identity):  # pruned
            return tokens.mean(1, keepdim=True)
        token = self.class_block(tokens)[:, :1]
        return self.norm(token) if norm else token

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`; returns the indices kept, counted from the front."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.class_block = nn.Identity()
            self.reset_classifier(0, "")
        return take


def _check_stages(*arguments: Sequence[float]) -> None:
    if {len(stages) for stages in arguments} != {4}:
        raise ValueError("depths, embed_dims, num_heads, mlp_ratios: four numbers each")


def _stage_mixers(
    depths: Sequence[int],
    spectral_depths: Sequence[int] | None,
    mixer: str | None,
    mixers: str | Sequence[str | Sequence[str]] | None,
) -> list[list[str]]:
    if mixers is not None:
        if spectral_depths is not None or mixer is not None:
            raise ValueError("mixers says what each block has: leave out spectral_depths and mixer")
        return stage_mixers(mixers, depths)
    spectral_depths = (*depths[:2], 0, 0) if spectral_depths is None else spectral_depths
    if len(spectral_depths) != len(depths):
        raise ValueError(f"spectral_depths {tuple(spectral_depths)}: four numbers, as depths")
    if not all(0 <= spectral <= depth for spectral, depth in zip(spectral_depths, depths, strict=True)):
        raise ValueError(f"spectral_depths {tuple(spectral_depths)} exceeds depths {tuple(depths)}")
    return [
        [mixer or "spectral"] * spectral + ["attention"] * (depth - spectral)
        for spectral, depth in zip(spectral_depths, depths, strict=True)
    ]


def stage_grids(img_size: Grid, stages: int, stem_stride: int = 4) -> list[Grid]:
    """(rows, columns) of each stage; every halving rounds up, as its padded convolution does."""
    height, width = img_size
    strides = [stem_stride * 2**i for i in range(stages)]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


@torch.fx.wrap
def check_box(box: Box | None, token_label: bool) -> None:
    """See that the model has use for a box.

    Raises:
        ValueError: it has not.
    """
    if box is not None and not token_label:
        raise ValueError("a box to mix tokens in needs a model with token_label=True")


@torch.fx.wrap
def given_or_sampled(box: Box | None, grid_size: Grid) -> Box:
    """The box, or if there is none one from `sample_mix_box`."""
    return sample_mix_box(grid_size) if box is None else box


def sample_mix_box(grid_size: Grid, device: torch.device | None = None) -> Box:
    """A random MixToken box (x1, y1, x2, y2) on a (rows, columns) grid, from torch's CPU generator.

    lambda ~ Beta(1, 1), sides sqrt(1 - lambda) of the grid's, centre uniform, clipped to the grid. Four integers, or
    with a device a tensor on it, for which a compiled model is compiled once; the copy waits for nothing.
    """
    height, width = grid_size
    lam, column, row = torch.rand(3).tolist()
    side = (1.0 - lam) ** 0.5
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    x, y = int(column * width), int(row * height)
    box = (
        max(x - half_width, 0),
        max(y - half_height, 0),
        min(x + half_width, width),
        min(y + half_height, height),
    )
    if device is None:
        return box
    return torch.tensor(box, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@torch.fx.wrap
def swap_box(x: Tensor, box: Box, scale: int = 1) -> Tensor:
    """(B, H, W, C) with the tokens inside box * scale exchanged with those of the batch in reverse order."""
    x1, y1, x2, y2 = (scale * side for side in box)
    rows = torch.arange(x.shape[1], device=x.device)
    columns = torch.arange(x.shape[2], device=x.device)
    inside = ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))
    return torch.where(inside[..., None], x.flip(0), x)


def pyramid_cfg(source: dict[str, str]) -> dict:
    """Timm's default configuration of a pyramid; `source` names paper and repository."""
    return model_cfg("stem.conv.0", crop_pct=0.96, source=source)


def small_pyramid_cfg(name: str, source: dict[str, str]) -> dict:
    """`pyramid_cfg` of a model for CIFAR-10's images of 32 pixels, seen whole, whose weights come with this package."""
    return pyramid_cfg(source) | {
        "file": str(WEIGHTS / f"{name}.cifar10.safetensors"),
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "num_classes": len(CIFAR10),
        "label_names": CIFAR10,
    }


def photograph_cfg(source: dict[str, str]) -> dict:
    """`pyramid_cfg` of a model for Imagenette's photographs at 128 pixels."""
    return pyramid_cfg(source) | {
        "input_size": (3, 128, 128),
        "crop_pct": 0.875,
        "num_classes": len(IMAGENETTE),
        "label_names": IMAGENETTE,
    }


def build_pyramid(name: str, pretrained: bool, variant: dict, spectral_stages: int, overrides: dict) -> Pyramid:
    """The registered model `name`: the arguments of its variant, and those that the caller gives instead.

    Unless the caller says otherwise, the blocks of the first `spectral_stages` stages are spectral.
    """
    if "embed_dims" in overrides:
        variant = variant | {"num_heads": None}  # those of the variant fit its own widths
    arguments = variant | overrides
    if arguments.get("mixers") is None and arguments.get("spectral_depths") is None:
        depths = arguments["depths"]
        arguments["spectral_depths"] = [depth if i < spectral_stages else 0 for i, depth in enumerate(depths)]
    if arguments.get("token_label"):
        # Both heads are replaced when a checkpoint of another number of classes is loaded.
        overlay = {"classifier": ("head", "aux_head"), **(arguments.get("pretrained_cfg_overlay") or {})}
        arguments["pretrained_cfg_overlay"] = overlay
    return build_variant(Pyramid, name, pretrained, (0, 1, 2, 3), arguments)
