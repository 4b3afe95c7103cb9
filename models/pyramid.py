"""The four-stage pyramid backbone of SpectFormer-H and SVT-H, with strides 4, 8, 16 and 32.

The two families differ in the mixer of the early blocks (SpectFormer, section 3; SVT, section 3). The stem,
feed-forward network and class block come from Wave-ViT (https://arxiv.org/abs/2207.04978), MixToken from
token labelling (https://arxiv.org/abs/2104.10858).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .base import ImageModel, build_variant, model_cfg, resize_mixers
from .layers import (
    SPECTRAL_PRECISIONS,
    Block,
    ClassBlock,
    Downsample,
    FeedForward,
    FinalNorm,
    LayerNorm,
    Stem,
    init_conv,
    init_linear,
    set_spectral_precision,
)
from .mixers import Options, build_mixer, check_names, choose_mixers
from .resampling import Grid, to_grid

HEAD_DIM = 32
WEIGHTS = Path(__file__).resolve().parent / "weights"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The ten ImageNet classes of Imagenette, sorted by WordNet id.
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
# The published sizes s, b and l, plus n for 32-pixel images and ti for 128-pixel photographs.
SIZES = {
    "n": {
        "img_size": 32,
        "stem_width": 24,
        "stem_stride": 2,
        "embed_dims": (32, 64, 112, 128),
        "depths": (1, 2, 3, 1),
        "num_heads": (2, 2, 4, 4),
        "mlp_ratios": (4, 4, 4, 4),
    },
    "ti": {
        "img_size": 128,
        "embed_dims": (32, 64, 160, 160),
        "depths": (1, 2, 4, 1),
        "mlp_ratios": (4, 4, 4, 3),
    },
    "s": {"embed_dims": (64, 128, 320, 448), "depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "b": {"stem_width": 64, "embed_dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "drop_path_rate": 0.1},
    "l": {"stem_width": 64, "embed_dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3), "drop_path_rate": 0.3},
}
Box = tuple[int, int, int, int] | Tensor


class Stage(nn.Module):
    """Downsampling (except in the first stage), blocks and norm, from one (B, H, W, C) grid to another."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.downsample(x)))


class Pyramid(ImageModel):
    """The SpectFormer-H and SVT-H model: images (B, in_chans, H, W) to logits (B, num_classes).

    A stem is followed by four stages of blocks, each with half the resolution of the previous one, and a class block
    that summarizes the last grid in a class token. Features are tokens (B, 1 + N, C), the class token first.

    With `token_label`, a second linear layer, `aux_head`, classifies every token of the last stage. The logits in
    evaluation are then class logits + 0.5 * maximum of the token logits. In training, `forward(x, box)` applies
    MixToken: it swaps the stem's tokens inside the box with those of the flipped batch. It returns the class logits,
    the token logits (B, h * w, num_classes), swapped back, and the box: (x1, y1, x2, y2) on the last stage's grid
    `token_label_size`, x along the width. Without a box, `sample_mix_box` draws one. Pass the box as a tensor of four
    integers to avoid recompiling for every box.

    Args (see `ImageModel` for the others):
        global_pool: "token" classifies the class token, "avg" the mean of the other tokens, "" every token.
        stem_width: number of channels of the stem's convolutions.
        stem_stride: stride of the first stage, 4, 2 or 1; every later stage doubles the stride.
        embed_dims: number of channels in each stage.
        depths: number of blocks in each stage.
        num_heads: number of attention heads in each stage; by default a head has 32 channels.
        mlp_ratios: ratio of hidden to embedding channels in each stage's feed-forward networks.
        spectral_depths: number of leading blocks in each stage that use `mixer`, by default all blocks of the first
            `spectral_stages` stages. The remaining blocks use attention.
        spectral_stages: see `spectral_depths`.
        token_label: whether to add `aux_head`, see above.

    Raises:
        ValueError: if arguments are inconsistent, or if `forward` gets images of another size without
            `dynamic_img_size`.
    """

    pools = ("token", "avg", "")
    num_prefix_tokens = 1
    parts_name = "stages"

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
        spectral_stages: int = 2,
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
        if {len(stages) for stages in (depths, embed_dims, num_heads, mlp_ratios)} != {4}:
            raise ValueError("depths, embed_dims, num_heads and mlp_ratios must each have four values")
        default = [depth if i < spectral_stages else 0 for i, depth in enumerate(depths)]
        names = choose_mixers(depths, spectral_depths, default, mixer, mixers)
        options = mixer_options or {}
        check_names(options)
        self.embed_dims = tuple(embed_dims)
        self.token_label = token_label
        self.stem = Stem(in_chans, stem_width, embed_dims[0], stem_stride)
        self.stem_stride = stem_stride
        stages = []
        grids = stage_grids(self.img_size, len(depths), stem_stride)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (dim, grid, heads) in enumerate(zip(embed_dims, grids, num_heads, strict=True)):
            blocks = []
            for name, rate in zip(names[i], rates[i], strict=True):
                token_mixer = build_mixer(name, dim, grid, heads, **options.get(name, {}))
                blocks.append(Block(dim, token_mixer, FeedForward(dim, int(dim * mlp_ratios[i]), depthwise=True), rate))
            downsample = Downsample(embed_dims[i - 1], dim) if i else nn.Identity()
            last = i == len(depths) - 1  # the last stage's norm follows the class block
            norm = nn.Identity() if last else LayerNorm(dim, eps=1e-6)
            stages.append(Stage(downsample, blocks, norm))
        self.stages = nn.Sequential(*stages)
        self.token_label_size = grids[-1]
        self.class_block = ClassBlock(dim, num_heads[-1], FeedForward(dim, int(dim * mlp_ratios[-1])))
        self.norm = FinalNorm(dim, eps=1e-6)
        self.head = self._classifier()
        self.aux_head = self._classifier() if token_label else None
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(embed_dims)
        ]
        self.design = {"stem_width": stem_width, "stem_stride": stem_stride, "embed_dims": self.embed_dims}
        self.design |= {"num_heads": tuple(num_heads), "mlp_ratios": tuple(mlp_ratios)}
        self.design |= {"mixers": names, "mixer_options": options}
        self.apply(init_linear)
        self.apply(init_conv)
        set_spectral_precision(self, spectral_precision)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return regular expressions that group parameters by depth, for layer-wise learning rate decay."""
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
        """Replace the classifier, and `aux_head` if present, with one for `num_classes` (0 for no classifier)."""
        super().reset_classifier(num_classes, global_pool)
        if self.token_label:
            self.aux_head = self._classifier()

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize the model to another image size: each mixer resamples its grid-dependent weights."""
        grids = stage_grids(to_grid(img_size), len(self.stages), self.stem_stride)
        for stage, grid in zip(self.stages, grids, strict=True):
            resize_mixers(stage.blocks, grid)
        self.token_label_size = grids[-1]
        self._record_input_size(img_size)

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.stem(x)

    def _to_tokens(self, x: Tensor) -> Tensor:
        return self.norm(self.class_block(x.flatten(1, 2)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, 1 + N, C) to logits (B, num_classes), or with `pre_logits` to pooled features (B, C)."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self._labels_tokens or not self.global_pool:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    @property
    def _labels_tokens(self) -> bool:
        return self.token_label and self.num_classes > 0

    def forward(self, x: Tensor, box: Box | None = None) -> Tensor | tuple[Tensor, Tensor, Box]:
        """Map images (B, in_chans, H, W) to logits (B, num_classes); see the class for training with token labels."""
        if self.training and self._labels_tokens:
            return self._forward_mixed(x, box)
        return super().forward(x)

    def _forward_mixed(self, x: Tensor, box: Box | None) -> tuple[Tensor, Tensor, Box]:
        grid = stage_grids((x.shape[-2], x.shape[-1]), len(self.stages), self.stem_stride)[-1]
        box = given_or_sampled(box, grid)
        x = swap_box(self._embed(x), box, scale=2 ** (len(self.stages) - 1))
        x = self._to_tokens(self.stages(x))
        token_logits = self.aux_head(x[:, 1:])
        token_logits = swap_box(token_logits.unflatten(1, grid), box).flatten(1, 2)
        return super().forward_head(x), token_logits, box

    def _prefix_token(self, grid: Tensor, norm: bool, last_stage: bool) -> Tensor:
        tokens = grid.flatten(1, 2)
        if not last_stage or isinstance(self.class_block, nn.Identity):  # pruned
            return tokens.mean(1, keepdim=True)
        token = self.class_block(tokens)[:, :1]
        return self.norm(token) if norm else token


def stage_grids(img_size: Grid, stages: int, stem_stride: int = 4) -> list[Grid]:
    """Return (rows, columns) of each stage's grid. Halving rounds up, as the padded convolution does."""
    height, width = img_size
    strides = [stem_stride * 2**i for i in range(stages)]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


@torch.fx.wrap
def given_or_sampled(box: Box | None, grid_size: Grid) -> Box:
    """Return the box, or sample one if it is None."""
    return sample_mix_box(grid_size) if box is None else box


def sample_mix_box(grid_size: Grid, device: torch.device | None = None) -> Box:
    """Sample a MixToken box (x1, y1, x2, y2) on a (rows, columns) grid with torch's CPU generator.

    lambda ~ Beta(1, 1). The sides are sqrt(1 - lambda) times the grid's, the centre is uniform, and the box is clipped
    to the grid. Returns four integers; with `device`, a tensor there, copied asynchronously, to avoid recompiling.
    """
    height, width = grid_size
    lam, column, row = torch.rand(3).tolist()
    side = (1.0 - lam) ** 0.5
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    x, y = int(column * width), int(row * height)
    top_left = max(x - half_width, 0), max(y - half_height, 0)
    box = *top_left, min(x + half_width, width), min(y + half_height, height)
    if device is None:
        return box
    return torch.tensor(box, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@torch.fx.wrap
def swap_box(x: Tensor, box: Box, scale: int = 1) -> Tensor:
    """Swap the tokens of (B, H, W, C) inside box * scale with those of the batch in reverse order."""
    x1, y1, x2, y2 = (scale * side for side in box)
    rows = torch.arange(x.shape[1], device=x.device)
    columns = torch.arange(x.shape[2], device=x.device)
    inside = ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))
    return torch.where(inside[..., None], x.flip(0), x)


def pyramid_cfgs(family: str, source: dict[str, str]) -> dict[str, dict]:
    """Timm's default configurations of a family's pyramids; `source` names paper and repository.

    The two smallest have weights in this package: h_n for CIFAR-10's images, which are not cropped, and h_ti for
    Imagenette's photographs.
    """
    cfg = model_cfg("stem.conv.0", crop_pct=0.96, source=source)
    trained = {
        f"{family}_h_n.cifar10": {"input_size": (3, 32, 32), "crop_pct": 1.0, "label_names": CIFAR10},
        f"{family}_h_ti.imagenette": {"input_size": (3, 128, 128), "crop_pct": 0.875, "label_names": IMAGENETTE},
    }
    files = {name: {"file": str(WEIGHTS / f"{name}.safetensors"), "num_classes": 10} for name in trained}
    cfgs = {name: cfg | files[name] | own for name, own in trained.items()}
    return cfgs | {f"{family}_h_{size}": cfg for size in ("s", "b", "l")}


def build_pyramid(name: str, pretrained: bool, overrides: dict) -> Pyramid:
    """Build the registered model `name`, whose last part is its size; `overrides` replace the size's arguments."""
    size = SIZES[name.rpartition("_")[2]]
    if "embed_dims" in overrides:
        size = size | {"num_heads": None}  # the size's heads only fit its own widths
    arguments = size | overrides
    if arguments.get("token_label"):
        # Loading a checkpoint with another number of classes replaces both heads.
        overlay = {"classifier": ("head", "aux_head"), **(arguments.get("pretrained_cfg_overlay") or {})}
        arguments["pretrained_cfg_overlay"] = overlay
    return build_variant(Pyramid, name, pretrained, (0, 1, 2, 3), arguments)
