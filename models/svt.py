"""SVT-H: the pyramid with scattering mixers in its first stages (alpha = 1: released; 2: the paper's figure).

Patro, Agneeswaran: "Scattering Vision Transformer: Spectral Mixing Matters", NeurIPS 2023,
https://arxiv.org/abs/2311.01310. alpha = 2 is `spectral_depths=(3, 4, 0, 0)` for S.
"""

from timm.models import generate_default_cfgs, register_model

from .pyramid import Pyramid, create_pyramid, pyramid_cfg
from .scattering import check_mixing

_ARCHITECTURES = [f"{family}_{size}" for family in ("svt_h", "svt") for size in ("s", "b", "l")]

default_cfgs = generate_default_cfgs(
    {
        name: pyramid_cfg(
            paper_ids="arXiv:2311.01310",
            paper_name="Scattering Vision Transformer: Spectral Mixing Matters",
            origin_url="https://github.com/badripatro/svt",
        )
        for name in _ARCHITECTURES
    }
)


def _create(variant: str, pretrained: bool, mixing: str, wavelet_backend: str, overrides: dict) -> Pyramid:
    check_mixing(mixing)
    mixer = {"mixer": f"scattering_{mixing}", "mixer_options": {"backend": wavelet_backend}}
    return create_pyramid(variant, pretrained, 1, {**mixer, **overrides})


@register_model
def svt_h_s(pretrained: bool = False, mixing: str = "channel", wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-S: 22.1M parameters with the token-label head, 3.9 GFLOPs at 224.

    mixing: "channel", "channel_token" (the published models) or "token", see `ScatteringMixer`.
    """
    return _create("svt_h_s", pretrained, mixing, wavelet_backend, kwargs)


@register_model
def svt_h_b(pretrained: bool = False, mixing: str = "channel", wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-B: 32.9M parameters with the token-label head, 6.3 GFLOPs at 224. Arguments as `svt_h_s`."""
    return _create("svt_h_b", pretrained, mixing, wavelet_backend, kwargs)


@register_model
def svt_h_l(pretrained: bool = False, mixing: str = "channel", wavelet_backend: str = "native", **kwargs) -> Pyramid:
    """SVT-H-L: 54.6M parameters with the token-label head, 12.7 GFLOPs at 224. Arguments as `svt_h_s`."""
    return _create("svt_h_l", pretrained, mixing, wavelet_backend, kwargs)


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
