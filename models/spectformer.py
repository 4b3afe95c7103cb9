"""SpectFormer: vanilla models, and pyramids (SpectFormer-H), with spectral gates in their first blocks.

Patro, Namboodiri, Agneeswaran: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
https://arxiv.org/abs/2304.06446. As in the released code, all blocks of the pyramids' stages 1 and 2 are spectral. In
the paper's Table 1, the last block of each has attention: `spectral_depths=(2, 3, 0, 0)` for S.
"""

from timm.models import generate_default_cfgs, register_model

from .pyramid import Pyramid, build_pyramid, pyramid_cfgs
from .vanilla import Vanilla, build_vanilla, vanilla_cfgs

SOURCE = {
    "paper_ids": "arXiv:2304.06446",
    "paper_name": "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    "origin_url": "https://github.com/badripatro/SpectFormers",
}

default_cfgs = generate_default_cfgs(vanilla_cfgs("spectformer", SOURCE) | pyramid_cfgs("spectformer", SOURCE))


@register_model
def spectformer_ti(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-Ti: 9.2M parameters, 1.8 GFLOPs at 224."""
    return build_vanilla("spectformer_ti", pretrained, kwargs)


@register_model
def spectformer_xs(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-XS: 20.0M parameters, 4.0 GFLOPs at 224."""
    return build_vanilla("spectformer_xs", pretrained, kwargs)


@register_model
def spectformer_s(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-S: 32.4M parameters, 6.6 GFLOPs at 224."""
    return build_vanilla("spectformer_s", pretrained, kwargs)


@register_model
def spectformer_b(pretrained: bool = False, **kwargs) -> Vanilla:
    """SpectFormer-B: 57.2M parameters, 11.5 GFLOPs at 224."""
    return build_vanilla("spectformer_b", pretrained, kwargs)


@register_model
def spectformer_h_n(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-N, for 32-pixel images: 1.2M parameters (10 classes), 24 MFLOPs at 32. Not in the paper."""
    return build_pyramid("spectformer_h_n", pretrained, kwargs)


@register_model
def spectformer_h_ti(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-Ti, for 128-pixel photographs: 2.3M parameters (10 classes). Not in the paper."""
    return build_pyramid("spectformer_h_ti", pretrained, kwargs)


@register_model
def spectformer_h_s(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-S: 22.2M parameters with the token-label head, 3.9 GFLOPs at 224."""
    return build_pyramid("spectformer_h_s", pretrained, kwargs)


@register_model
def spectformer_h_b(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-B: 33.1M parameters with the token-label head, 6.3 GFLOPs at 224."""
    return build_pyramid("spectformer_h_b", pretrained, kwargs)


@register_model
def spectformer_h_l(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-L: 54.7M parameters with the token-label head, 12.7 GFLOPs at 224."""
    return build_pyramid("spectformer_h_l", pretrained, kwargs)
