"""SpectFormer, vanilla: spectral blocks first, attention blocks after, on one grid of 16x16 patches.

Patro, Namboodiri, Agneeswaran: "SpectFormer: Frequency and Attention is what you need in a Vision
Transformer", https://arxiv.org/abs/2304.06446.
"""

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .base import ImageModel, resize_mixers
from .checkpoints import checkpoint_filter_fn
from .feed_forward import FeedForward
from .layers import Block, Grid, PatchEmbed, format_grid, init_linear, resize_grid, to_grid
from .mixers import build_mixer

PATCH_SIZE = 16
HEAD_DIM = 64


class SpectralBlock(Block):
    """One residual around both: x + mlp(norm2(mixer(norm1(x))))."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.mixer(self.norm1(x)))))


class SpectFormer(ImageModel):
    """Images (B, in_chans, H, W) to logits (B, num_classes); features are tokens (B, N, embed_dim).

    The first `alpha` of `depth` blocks are spectral (the paper's alpha), the rest attention. `num_heads`
    follows from a head's width of 64 unless given. ValueError for sizes that leave no patch, alpha beyond the
    depth, heads that do not divide the width, and in `forward` images of another size, unless
    `dynamic_img_size`.
    """

    pools = ("avg", "")
    num_prefix_tokens = 0
    checkpoint_format = "vanilla"

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        alpha: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__(num_classes, in_chans, img_size, embed_dim, global_pool, drop_rate, dynamic_img_size)
        if not 0 <= alpha <= depth:
            raise ValueError(f"alpha counts spectral blocks: 0 to the depth {depth}, not {alpha}")
        self.embed_dim = embed_dim
        self.grid_size = patch_grid(self.img_size)
        num_heads = num_heads or max(embed_dim // HEAD_DIM, 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, PATCH_SIZE)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            spectral = i < alpha
            mixer = build_mixer("spectral" if spectral else "attention", embed_dim, self.grid_size, num_heads)
            mlp = FeedForward(embed_dim, int(embed_dim * mlp_ratio))
            self.blocks.append((SpectralBlock if spectral else Block)(embed_dim, mixer, mlp, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = self._classifier()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": PATCH_SIZE, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides all one-dimensional ones."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = r"^blocks\.(\d+)"
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": blocks if coarse else [(blocks, None), (r"^norm", (99999,))],
        }

    @torch.no_grad()
    def set_input_size(self, img_size: int | Grid) -> None:
        """Resample position embeddings and filters to another image size, by the authors' rule."""
        grid_size = patch_grid(to_grid(img_size))
        resized = resize_pos_embed(self.pos_embed, self.grid_size, grid_size)
        self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)
        resize_mixers(self.blocks, grid_size)
        self.grid_size = grid_size
        self._record_input_size(img_size)

    def resize_weights(self, weights: dict[str, Tensor], source_grid: Grid) -> dict[str, Tensor]:
        """The model's own grid-dependent weights, read from a checkpoint of another grid, for this one's."""
        return {"pos_embed": resize_pos_embed(weights["pos_embed"], source_grid, self.grid_size)}

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        return x + resize_pos_embed(self.pos_embed, self.grid_size, grid).view(1, *grid, -1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens (B, N, embed_dim)."""
        x = self._embed(x)
        for block in self.blocks:
            x = self._run_block(block, x)
        return self.norm(x).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen blocks, and the features unless `intermediates_only`.

        indices: the last n blocks, all for None, or a list. norm: apply the final norm to them.
        stop_early: run no block after the last chosen one. output_fmt: "NCHW", "NHWC" or "NLC".
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt is NCHW, NHWC or NLC, not {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x = self._embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x)
            if i in take:
                intermediates.append(format_grid(self.norm(x) if norm else x, output_fmt))
        if intermediates_only:
            return intermediates
        return self.norm(x).flatten(1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`; returns the indices kept, counted from the front."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def patch_grid(img_size: Grid) -> Grid:
    """Patches in an image, (rows, columns). What is left of a side that is no multiple is not seen."""
    grid = (img_size[0] // PATCH_SIZE, img_size[1] // PATCH_SIZE)
    if 0 in grid:
        raise ValueError(f"an image of {img_size[0]}x{img_size[1]} pixels holds no {PATCH_SIZE}-pixel patch")
    return grid


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """(1, N, C) position embeddings of one grid for another: bicubic, align_corners=False (the authors')."""
    if old == new:
        return pos_embed
    return resize_grid(pos_embed[0].unflatten(0, old), new, align_corners=False).flatten(0, 1)[None]


def _cfg() -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,  # resize to 256, crop 224
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2304.06446",
        "paper_name": "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        "origin_url": "https://github.com/badripatro/SpectFormers",
    }


default_cfgs = generate_default_cfgs({f"spectformer_{size}": _cfg() for size in ("ti", "xs", "s", "b")})


def _create(variant: str, pretrained: bool, defaults: dict, overrides: dict) -> SpectFormer:
    return build_model_with_cfg(
        SpectFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **overrides},
    )


@register_model
def spectformer_ti(pretrained: bool = False, **kwargs) -> SpectFormer:
    """SpectFormer-Ti: 9.2M parameters, 1.8 GFLOPs at 224."""
    return _create("spectformer_ti", pretrained, {"embed_dim": 256, "depth": 12}, kwargs)


@register_model
def spectformer_xs(pretrained: bool = False, **kwargs) -> SpectFormer:
    """SpectFormer-XS: 20.0M parameters, 4.0 GFLOPs at 224."""
    return _create("spectformer_xs", pretrained, {"embed_dim": 384, "depth": 12}, kwargs)


@register_model
def spectformer_s(pretrained: bool = False, **kwargs) -> SpectFormer:
    """SpectFormer-S: 32.4M parameters, 6.6 GFLOPs at 224."""
    defaults = {"embed_dim": 384, "depth": 19, "drop_path_rate": 0.15}
    return _create("spectformer_s", pretrained, defaults, kwargs)


@register_model
def spectformer_b(pretrained: bool = False, **kwargs) -> SpectFormer:
    """SpectFormer-B: 57.2M parameters, 11.5 GFLOPs at 224."""
    defaults = {"embed_dim": 512, "depth": 19, "drop_path_rate": 0.25}
    return _create("spectformer_b", pretrained, defaults, kwargs)
