"""The vanilla body: spectral blocks first, attention blocks after, on one grid of patches (SpectFormer, section 3)."""

from collections.abc import Sequence

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .base import ImageModel, build_variant, model_cfg, resize_mixers, run_block
from .layers import (
    SPECTRAL_PRECISIONS,
    Block,
    FeedForward,
    FinalNorm,
    PatchEmbed,
    SpectralBlock,
    format_grid,
    init_linear,
    set_spectral_precision,
)
from .mixers import Options, block_mixers, build_mixer, check_options
from .precision import to_autocast
from .resampling import Grid, resize_grid, to_grid

torch.fx.wrap("to_autocast")  # torch.fx must not look into it
HEAD_DIM = 64
ALPHA = 4


class Vanilla(ImageModel):
    """The body of the vanilla SpectFormer and SVT: images (B, in_chans, H, W) to logits (B, num_classes).

    Blocks of attention are residual pairs, all others have one residual around mixer and feed-forward network. Features
    are tokens (B, N, embed_dim).

    Args:
        img_size: in pixels, a side or (height, width). Position embeddings and filters fit its grid; `set_input_size`
            resamples them for another one.
        patch_size: pixels of a patch's side.
        in_chans: of the images.
        num_classes: 0 for none, and features (B, embed_dim) instead of logits.
        global_pool: what is classified: "avg", the mean of the tokens; "", each of them.
        embed_dim: channels.
        depth: blocks.
        num_heads: of attention; by default a head is 64 channels wide.
        mlp_ratio: hidden channels of the feed-forward networks as a multiple of `embed_dim`.
        alpha: how many of the first blocks have `mixer`, by default the paper's 4; the others have attention.
        mixer: a name in `models.mixers.MIXERS`, by default "spectral".
        mixers: instead of both, the mixer of each block: a list of names, or a text like "spectral*4,attention*8".
        mixer_options: arguments of mixers by their name, such as {"afno": {"blocks": 4}}.
        drop_rate: of dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        dynamic_img_size: take images of any size, for which weights are resampled each time.
        spectral_precision: how exact spectral mixers are under autocast: "half", in its precision with products that
            add up in float32, or "float32" throughout.

    Raises:
        ValueError: arguments do not fit together, or leave no patch; in `forward`, images have another size, unless
            `dynamic_img_size`.
    """

    pools = ("avg", "")
    num_prefix_tokens = 0
    checkpoint_format = "vanilla"

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
        self.blocks = nn.ModuleList()
        names, options = _block_mixers(depth, alpha, mixer, mixers), check_options(mixer_options)
        for name, rate in zip(names, calculate_drop_path_rates(drop_path_rate, depth), strict=True):
            token_mixer = build_mixer(name, embed_dim, self.grid_size, num_heads, **options.get(name, {}))
            mlp = FeedForward(embed_dim, int(embed_dim * mlp_ratio))
            self.blocks.append((Block if name == "attention" else SpectralBlock)(embed_dim, token_mixer, mlp, rate))
        self.norm = FinalNorm(embed_dim, eps=1e-6)
        self.head = self._classifier()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)
        set_spectral_precision(self, spectral_precision)

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
        grid_size = patch_grid(to_grid(img_size), self.patch_size)
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
        pos_embed = resize_pos_embed(self.pos_embed, self.grid_size, grid)
        return x + to_autocast(pos_embed).view(1, *grid, -1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens (B, N, embed_dim)."""
        x = self._embed(x)
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        return self.norm(x).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
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
            x = run_block(block, x, self.grad_checkpointing)
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


def _block_mixers(depth: int, alpha: int | None, mixer: str | None, mixers: str | Sequence[str] | None) -> list[str]:
    if mixers is not None:
        if alpha is not None or mixer is not None:
            raise ValueError("mixers says what each block has: leave out alpha and mixer")
        return block_mixers(mixers, depth)
    alpha = ALPHA if alpha is None else alpha
    if not 0 <= alpha <= depth:
        raise ValueError(f"alpha counts spectral blocks: 0 to the depth {depth}, not {alpha}")
    return [mixer or "spectral"] * alpha + ["attention"] * (depth - alpha)


def patch_grid(img_size: Grid, patch_size: int) -> Grid:
    """Patches in an image, (rows, columns). What is left of a side that is no multiple is not seen.

    Raises:
        ValueError: there is none.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size is at least 1, not {patch_size}")
    grid = (img_size[0] // patch_size, img_size[1] // patch_size)
    if 0 in grid:
        raise ValueError(f"an image of {img_size[0]}x{img_size[1]} pixels holds no {patch_size}-pixel patch")
    return grid


@torch.fx.wrap
def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """(1, N, C) position embeddings of one grid for another: bicubic, align_corners=False (the authors')."""
    if old == new:
        return pos_embed
    return resize_grid(pos_embed[0].unflatten(0, old), new, align_corners=False).flatten(0, 1)[None]


def vanilla_cfg(source: dict[str, str]) -> dict:
    """Timm's default configuration of a vanilla model; `source` names paper and repository."""
    return model_cfg("patch_embed.proj", crop_pct=0.875, source=source)  # resize to 256, crop 224


def build_vanilla(name: str, pretrained: bool, variant: dict, overrides: dict) -> Vanilla:
    """The registered model `name`: the arguments of its variant, and those that the caller gives instead."""
    if "embed_dim" in overrides:
        variant = variant | {"num_heads": None}  # those of the variant fit its own width
    return build_variant(Vanilla, name, pretrained, 3, variant | overrides)
