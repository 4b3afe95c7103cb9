"""SVT: pyramids, SVT-H, and vanilla models with scattering mixers in their first blocks.

Patro, Agneeswaran: "Scattering Vision Transformer: Spectral Mixing Matters", NeurIPS 2023,
https://arxiv.org/abs/2311.01310. SVT-H scatters in its first stage (alpha = 1: released code); the paper's figure,
alpha = 2, is `spectral_depths=(3, 4, 0, 0)` for S. Of the vanilla models only the table was published: these are
SpectFormer's bodies with scattering instead of the gate.
"""

from timm.models import generate_default_cfgs, register_model

from .mixers import MIXERS
from .pyramid import TINY, Pyramid, build_pyramid, photograph_cfg, pyramid_cfg, small_pyramid_cfg
from .scattering import check_mixing
from .vanilla import Vanilla, build_vanilla, vanilla_cfg

SOURCE = {
    "paper_ids": "arXiv:2311.01310",
    "paper_name": "Scattering Vision Transformer: Spectral Mixing Matters",
    "origin_url": "https://github.com/badripatro/svt",
}

default_cfgs = generate_default_cfgs(
    {
        "svt_h_n.cifar10": small_pyramid_cfg("svt_h_n", SOURCE),
        "svt_h_ti": photograph_cfg(SOURCE),
        "svt_h_s": pyramid_cfg(SOURCE),
        "svt_h_b": pyramid_cfg(SOURCE),
        "svt_h_l": pyramid_cfg(SOURCE),
        "svt_s": pyramid_cfg(SOURCE),
        "svt_b": pyramid_cfg(SOURCE),
        "svt_l": pyramid_cfg(SOURCE),
        "svt_vanilla_ti": vanilla_cfg(SOURCE),
        "svt_vanilla_xs": vanilla_cfg(SOURCE),
        "svt_vanilla_s": vanilla_cfg(SOURCE),
        "svt_vanilla_b": vanilla_cfg(SOURCE),
    }
)


def _scattering(mixing: str | None, default: str, wavelet_backend: str, overrides: dict) -> dict:
    """The caller's arguments with scattering as `mixer`, unless they say what each block has.

    Raises:
        ValueError: there is no such mixing, or one is given beside `mixers`.
    """
    options = {name: {"backend": wavelet_backend} for name in MIXERS if name.startswith("scattering_")}
    overrides = {"mixer_options": options, **overrides}
    if overrides.get("mixers") is None:
        check_mixing(mixing or default)
        return {"mixer": f"scattering_{mixing or default}", **overrides}
    if mixing is not None:
        raise ValueError("mixers says what each block has: leave out mixing")
    return overrides


@register_model
def svt_h_n(pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-N, for small images: 1.2M parameters (10 classes), 26 MFLOPs at 32. Not of the paper.

    It scatters in two stages. Arguments as `svt_h_s`, but mixing is "channel_token" by default.
    """
    variant = {
        "img_size": 32,
        "stem_width": 24,
        "stem_stride": 2,
        "embed_dims": (32, 64, 112, 128),
        "depths": (1, 2, 3, 1),
        "num_heads": (2, 2, 4, 4),
        "mlp_ratios": (4, 4, 4, 4),
    }
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_pyramid("svt_h_n", pretrained, variant, spectral_stages=2, overrides=overrides)


@register_model
def svt_h_ti(pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-Ti, for photographs of 128 pixels: 2.4M parameters (10 classes). Not in the paper.

    It scatters in two stages. Arguments as `svt_h_s`, but mixing is "channel_token" by default.
    """
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_pyramid("svt_h_ti", pretrained, TINY, spectral_stages=2, overrides=overrides)


@register_model
def svt_h_s(pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-S: 22.1M parameters with the token-label head, 3.9 GFLOPs at 224.

    mixing: "channel" (released code, the default), "channel_token" (the published models) or another one of
    `ScatteringMixer`.
    """
    variant = {
        "stem_width": 32,
        "embed_dims": (64, 128, 320, 448),
        "depths": (3, 4, 6, 3),
        "num_heads": (2, 4, 10, 14),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.1,
    }
    overrides = _scattering(mixing, "channel", wavelet_backend, kwargs)
    return build_pyramid("svt_h_s", pretrained, variant, spectral_stages=1, overrides=overrides)


@register_model
def svt_h_b(pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-B: 32.9M parameters with the token-label head, 6.3 GFLOPs at 224. Arguments as `svt_h_s`."""
    variant = {
        "stem_width": 64,
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 4, 12, 3),
        "num_heads": (2, 4, 10, 16),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.1,
    }
    overrides = _scattering(mixing, "channel", wavelet_backend, kwargs)
    return build_pyramid("svt_h_b", pretrained, variant, spectral_stages=1, overrides=overrides)


@register_model
def svt_h_l(pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-L: 54.6M parameters with the token-label head, 12.7 GFLOPs at 224. Arguments as `svt_h_s`."""
    variant = {
        "stem_width": 64,
        "embed_dims": (96, 192, 384, 512),
        "depths": (3, 6, 18, 3),
        "num_heads": (3, 6, 12, 16),
        "mlp_ratios": (8, 8, 4, 4),
        "drop_path_rate": 0.3,
    }
    overrides = _scattering(mixing, "channel", wavelet_backend, kwargs)
    return build_pyramid("svt_h_l", pretrained, variant, spectral_stages=1, overrides=overrides)


@register_model
def svt_s(pretrained: bool = False, **kwargs) -> Pyramid:
    """Another name of `svt_h_s`."""
    return svt_h_s(pretrained, **kwargs)


@register_model
def svt_b(pretrained: bool = False, **kwargs) -> Pyramid:
    """Another name of `svt_h_b`."""
    return svt_h_b(pretrained, **kwargs)


@register_model
def svt_l(pretrained: bool = False, **kwargs) -> Pyramid:
    """Another name of `svt_h_l`."""
    return svt_h_l(pretrained, **kwargs)


@register_model
def svt_vanilla_ti(
    pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs
) -> Vanilla:
    """Vanilla SVT-Ti: 9.1M parameters, 1.8 GFLOPs at 224.

    mixing: "channel_token" (the default, with which the published parameters come out) or another one of
    `ScatteringMixer`.
    """
    variant = {"embed_dim": 256, "depth": 12, "num_heads": 4}
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_vanilla("svt_vanilla_ti", pretrained, variant, overrides)


@register_model
def svt_vanilla_xs(
    pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs
) -> Vanilla:
    """Vanilla SVT-XS: 20.0M parameters, 4.0 GFLOPs at 224. Arguments as `svt_vanilla_ti`."""
    variant = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_vanilla("svt_vanilla_xs", pretrained, variant, overrides)


@register_model
def svt_vanilla_s(
    pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs
) -> Vanilla:
    """Vanilla SVT-S: 32.4M parameters (published: 32.2M), 6.6 GFLOPs at 224. Arguments as `svt_vanilla_ti`."""
    variant = {"embed_dim": 384, "depth": 19, "num_heads": 6, "drop_path_rate": 0.15}
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_vanilla("svt_vanilla_s", pretrained, variant, overrides)


@register_model
def svt_vanilla_b(
    pretrained: bool = False, mixing: str | None = None, wavelet_backend: str = "native", **kwargs
) -> Vanilla:
    """Vanilla SVT-B: 57.2M parameters (published: 57.6M), 11.5 GFLOPs at 224. Arguments as `svt_vanilla_ti`."""
    variant = {"embed_dim": 512, "depth": 19, "num_heads": 8, "drop_path_rate": 0.25}
    overrides = _scattering(mixing, "channel_token", wavelet_backend, kwargs)
    return build_vanilla("svt_vanilla_b", pretrained, variant, overrides)
