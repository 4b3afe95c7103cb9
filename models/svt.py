"""SVT: pyramids (SVT-H) and vanilla models with scattering mixers in their first blocks.

Patro, Agneeswaran: "Scattering Vision Transformer: Spectral Mixing Matters", NeurIPS 2023,
https://arxiv.org/abs/2311.01310. SVT-H uses scattering in its first stage, as in the released code (alpha = 1). The
paper's figure has alpha = 2: `spectral_depths=(3, 4, 0, 0)` for S. The code of the vanilla models was not published;
these are SpectFormer's vanilla models with scattering instead of the gate.
"""

from timm.models import generate_default_cfgs, register_model

from .pyramid import Pyramid, build_pyramid, pyramid_cfgs
from .vanilla import Vanilla, build_vanilla, vanilla_cfgs

SOURCE = {
    "paper_ids": "arXiv:2311.01310",
    "paper_name": "Scattering Vision Transformer: Spectral Mixing Matters",
    "origin_url": "https://github.com/badripatro/svt",
}

_pyramids = pyramid_cfgs("svt", SOURCE)
_aliases = {f"svt_{size}": _pyramids[f"svt_h_{size}"] for size in ("s", "b", "l")}
default_cfgs = generate_default_cfgs(_pyramids | _aliases | vanilla_cfgs("svt_vanilla", SOURCE))


def _scattering(mixing: str | None, default: str, arguments: dict) -> dict:
    """Set `mixer` to scattering, unless `mixers` sets the mixer of every block."""
    if mixing is None and arguments.get("mixers") is not None:
        return arguments
    return {"mixer": f"scattering_{mixing or default}"} | arguments


@register_model
def svt_h_n(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Pyramid:
    """SVT-H-N, for 32-pixel images: 1.2M parameters (10 classes), 28 MFLOPs at 32. Not in the paper.

    It uses scattering in two stages. It has the arguments of `svt_h_s`; mixing is "channel_token" by default.
    """
    return build_pyramid("svt_h_n", pretrained, _scattering(mixing, "channel_token", kwargs))


@register_model
def svt_h_ti(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Pyramid:
    """SVT-H-Ti, for 128-pixel photographs: 2.3M parameters (10 classes). Not in the paper.

    It uses scattering in two stages. It has the arguments of `svt_h_s`; mixing is "channel_token" by default.
    """
    return build_pyramid("svt_h_ti", pretrained, _scattering(mixing, "channel_token", kwargs))


@register_model
def svt_h_s(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Pyramid:
    """SVT-H-S: 22.1M parameters with the token-label head, 3.9 GFLOPs at 224.

    mixing: "channel" (the default, as in the released code), "channel_token" (the published models) or another one
    from `ScatteringMixer`.
    """
    return build_pyramid("svt_h_s", pretrained, _scattering(mixing, "channel", kwargs), spectral_stages=1)


@register_model
def svt_h_b(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Pyramid:
    """SVT-H-B: 32.9M parameters with the token-label head, 6.3 GFLOPs at 224. Same arguments as `svt_h_s`."""
    return build_pyramid("svt_h_b", pretrained, _scattering(mixing, "channel", kwargs), spectral_stages=1)


@register_model
def svt_h_l(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Pyramid:
    """SVT-H-L: 54.6M parameters with the token-label head, 12.7 GFLOPs at 224. Same arguments as `svt_h_s`."""
    return build_pyramid("svt_h_l", pretrained, _scattering(mixing, "channel", kwargs), spectral_stages=1)


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
def svt_vanilla_ti(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Vanilla:
    """Vanilla SVT-Ti: 9.1M parameters, 1.8 GFLOPs at 224.

    mixing: "channel_token" (the default, which matches the published number of parameters) or another one from
    `ScatteringMixer`.
    """
    return build_vanilla("svt_vanilla_ti", pretrained, _scattering(mixing, "channel_token", kwargs))


@register_model
def svt_vanilla_xs(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Vanilla:
    """Vanilla SVT-XS: 20.0M parameters, 4.0 GFLOPs at 224. Same arguments as `svt_vanilla_ti`."""
    return build_vanilla("svt_vanilla_xs", pretrained, _scattering(mixing, "channel_token", kwargs))


@register_model
def svt_vanilla_s(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Vanilla:
    """Vanilla SVT-S: 32.4M parameters (published: 32.2M), 6.6 GFLOPs at 224. Same arguments as `svt_vanilla_ti`."""
    return build_vanilla("svt_vanilla_s", pretrained, _scattering(mixing, "channel_token", kwargs))


@register_model
def svt_vanilla_b(pretrained: bool = False, mixing: str | None = None, **kwargs) -> Vanilla:
    """Vanilla SVT-B: 57.2M parameters (published: 57.6M), 11.5 GFLOPs at 224. Same arguments as `svt_vanilla_ti`."""
    return build_vanilla("svt_vanilla_b", pretrained, _scattering(mixing, "channel_token", kwargs))
