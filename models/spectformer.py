"""SpectFormer: the vanilla models and the pyramids, SpectFormer-H, with spectral gates in their first blocks.

Patro, Namboodiri, Agneeswaran: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
https://arxiv.org/abs/2304.06446. Released code: stages 1 and 2 of the pyramids are spectral throughout. The paper's
Table 1 puts an attention block last in each of them: `spectral_depths=(2, 3, 0, 0)` for S.
"""

from timm.models import generate_default_cfgs, register_model

from .pyramid import TINY, Pyramid, build_pyramid, photograph_cfg, pyramid_cfg, small_pyramid_cfg
from .vanilla import Vanilla, build_vanilla, vanilla_cfg

SOURCE = {
    "paper_ids": "arXiv:2304.06446",
    "paper_name": "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    "origin_url": "https://github.com/badripatro/SpectFormers",
}

default_cfgs = generate_default_cfgs(
    {
        "spectformer_ti": vanilla_cfg(SOURCE),
        "spectformer_xs": vanilla_cfg(SOURCE),
        "spectformer_s": vanilla_cfg(SOURCE),
        "spectformer_b": vanilla_cfg(SOURCE),
        "spectformer_h_n.cifar10": small_pyramid_cfg("spectformer_h_n", SOURCE),
        "spectformer_h_ti": photograph_cfg(SOURCE),
        "spectformer_h_s": pyramid_cfg(SOURCE),
        "spectformer_h_b": pyramid_cfg(SOURCE),
        "spectformer_h_l": pyramid_cfg(SOURCE),
    }
)


@register_model
def spectformer_ti(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-Ti: 9.2M parameters, 1.8 GFLOPs at 224."""
    variant = {"embed_dim": 256, "depth": 12, "num_heads": 4}
    return build_vanilla("spectformer_ti", pretrained, variant, kwargs)


@register_model
def spectformer_xs(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-XS: 20.0M parameters, 4.0 GFLOPs at 224."""
    variant = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return build_vanilla("spectformer_xs", pretrained, variant, kwargs)


@register_model
def spectformer_s(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-S: 32.4M parameters, 6.6 GFLOPs at 224."""
    variant = {"embed_dim": 384, "depth": 19, "num_heads": 6, "drop_path_rate": 0.15}
    return build_vanilla("spectformer_s", pretrained, variant, kwargs)


@register_model
def spectformer_b(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-B: 57.2M parameters, 11.5 GFLOPs at 224."""
    variant = {"embed_dim": 512, "depth": 19, "num_heads": 8, "drop_path_rate": 0.25}
    return build_vanilla("spectformer_b", pretrained, variant, kwargs)


@register_model
def spectformer_h_n(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-N, for small images: 1.2M parameters (10 classes), 24 MFLOPs at 32. Not of the paper."""
    variant = {
        "img_size": 32,
        "stem_width": 24,
        "stem_stride": 2,
        "embed_dims": (32, 64, 112, 128),
        "depths": (1, 2, 3, 1),
        "num_heads": (2, 2, 4, 4),
        "mlp_ratios": (4, 4, 4, 4),
    }
    return build_pyramid("spectformer_h_n", pretrained, variant, spectral_stages=2, overrides=kwargs)


@register_model
def spectformer_h_ti(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-Ti, for photographs of 128 pixels: 2.4M parameters (10 classes). Not in the paper."""
    return build_pyramid("spectformer_h_ti", pretrained, TINY, spectral_stages=2, overrides=kwargs)


@register_model
def spectformer_h_s(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-S: 22.2M parameters with the token-label head, 3.9 GFLOPs at 224."""
    variant = {
        "stem_width": 32,
        "embed_dims": (64, 128, 320, 448),
        "depths": (3, 4, 6, 3),
        "num_heads": (2, 4, 10, 14),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.1,
    }
    return build_pyramid("spectformer_h_s", pretrained, variant, spectral_stages=2, overrides=kwargs)


@register_model
def spectformer_h_b(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-B: 33.1M parameters with the token-label head, 6.3 GFLOPs at 224."""
    variant = {
        "stem_width": 64,
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 4, 12, 3),
        "num_heads": (2, 4, 10, 16),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.1,
    }
    return build_pyramid("spectformer_h_b", pretrained, variant, spectral_stages=2, overrides=kwargs)


@register_model
def spectformer_h_l(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-L: 54.7M parameters with the token-label head, 12.7 GFLOPs at 224."""
    variant = {
        "stem_width": 64,
        "embed_dims": (96, 192, 384, 512),
        "depths": (3, 6, 18, 3),
        "num_heads": (3, 6, 12, 16),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.3,
    }
    return build_pyramid("spectformer_h_l", pretrained, variant, spectral_stages=2, overrides=kwargs)
