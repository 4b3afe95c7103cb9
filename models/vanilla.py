"""The vanilla backbone: spectral blocks, then attention blocks, on a single patch grid (SpectFormer, section 3)."""

from collections.abc import Sequence

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from .base import ImageModel, build_variant, model_cfg, resize_mixers
from .layers import (
    SPECTRAL_PRECISIONS,
    Block,
    FeedForward,
    FinalNorm,
    PatchEmbed,
    SpectralBlock,
    init_linear,
    set_spectral_precision,
)
from .mixers import Options, build_mixer, check_names, choose_mixers
from .precision import to_autocast
from .resampling import Grid, resize_pos_embed, to_grid

torch.fx.wrap("resize_pos_embed")  # torch.fx must not trace these
torch.fx.wrap("to_autocast")
HEAD_DIM = 64
ALPHA = 4
# The published sizes.
SIZES = {
    "ti": {"embed_dim": 256, "depth": 12},
    "xs": {"embed_dim": 384, "depth": 12},
    "s": {"embed_dim": 384, "depth": 19, "drop_path_rate": 0.15},
    "b": {"embed_dim": 512, "depth": 19, "drop_path_rate": 0.25},
}


class Vanilla(ImageModel):
    """The vanilla SpectFormer and SVT model: images (B, in_chans, H, W) to logits (B, num_classes).

    An attention block has two residual connections, around the mixer and around the feed-forward network. Every other
    block has a single one around both. Features are tokens (B, N, embed_dim).

    Args (see `ImageModel` for the others):
        patch_size: side of a patch in pixels.
        global_pool: "avg" classifies the mean of the tokens, "" every token.
        embed_dim: number of channels.
        depth: number of blocks.
        num_heads: number of attention heads; by default a head has 64 channels.
        mlp_ratio: ratio of hidden channels to `embed_dim` in the feed-forward networks.
        alpha: number of leading blocks that use `mixer`, by default the paper's 4. The remaining blocks use attention.

    Raises:
        ValueError: if arguments are inconsistent or the image is smaller than a patch, or if `forward` gets images of
            another size without `dynamic_img_size`.
    """

    pools = ("avg", "")
    num_prefix_tokens = 0
    parts_name = "blocks"

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        alpha: int | None = None,
        mixer: str | None = None,
        mixers: str | Sequence[str] | None = None,
        mixer_options: Options | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        spectral_precision: str = SPECTRAL_PRECISIONS[0],
    ):
        super().__init__(num_classes, in_chans, img_size, embed_dim, global_pool, drop_rate, dynamic_img_size)
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.grid_size = patch_grid(self.img_size, patch_size)
        num_heads = num_heads or max(embed_dim // HEAD_DIM, 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        given = None if alpha is None else [alpha]
        (names,) = choose_mixers([depth], given, [ALPHA], mixer, None if mixers is None else [mixers])
        options = mixer_options or {}
        check_names(options)
        blocks = []
        for name, rate in zip(names, calculate_drop_path_rates(drop_path_rate, depth), strict=True):
            token_mixer = build_mixer(name, embed_dim, self.grid_size, num_heads, **options.get(name, {}))
            mlp = FeedForward(embed_dim, int(embed_dim * mlp_ratio))
            blocks.append((Block if name == "attention" else SpectralBlock)(embed_dim, token_mixer, mlp, rate))
        self.blocks = nn.Sequential(*blocks)
        self.norm = FinalNorm(embed_dim, eps=1e-6)
        self.head = self._classifier()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.design = {"patch_size": patch_size, "embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        self.design |= {"mixers": names, "mixer_options": options}
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)
        set_spectral_precision(self, spectral_precision)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay, in addition to all one-dimensional ones."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        blocks = r"^blocks\.(\d+)"
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": blocks if coarse else [(blocks, None), (r"^norm", (99999,))],
        }

    @torch.no_grad()
    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize the model to another image size: resample position embeddings and the mixers' weights."""
        grid_size = patch_grid(to_grid(img_size), self.patch_size)
        resized = resize_pos_embed(self.pos_embed, self.grid_size, grid_size)
        self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)
        resize_mixers(self.blocks, grid_size)
        self.grid_size = grid_size
        self._record_input_size(img_size)

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        pos_embed = resize_pos_embed(self.pos_embed, self.grid_size, grid)
        return x + to_autocast(pos_embed).view(1, *grid, -1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1, 2)


def patch_grid(img_size: Grid, patch_size: int) -> Grid:
    """Return the (rows, columns) of patches in an image. Pixels beyond the last whole patch are ignored.

    Raises:
        ValueError: if the image is smaller than a patch.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, not {patch_size}")
    grid = (img_size[0] // patch_size, img_size[1] // patch_size)
    if 0 in grid:
        raise ValueError(f"img_size {img_size[0]}x{img_size[1]} is smaller than patch_size {patch_size}")
    return grid


def vanilla_cfgs(family: str, source: dict[str, str]) -> dict[str, dict]:
    """Return timm's default configurations of a family's vanilla models; `source` has the paper and repository."""
    cfg = model_cfg("patch_embed.proj", crop_pct=0.875, source=source)  # resize to 256, crop 224
    return {f"{family}_{size}": cfg for size in SIZES}


def build_vanilla(name: str, pretrained: bool, overrides: dict) -> Vanilla:
    """Build the registered model `name`, whose last part is its size; `overrides` replace the size's arguments."""
    return build_variant(Vanilla, name, pretrained, 3, SIZES[name.rpartition("_")[2]] | overrides)
