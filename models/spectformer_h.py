"""SpectFormer-H: the pyramid with spectral gates in its first two stages.

Patro, Namboodiri, Agneeswaran: "SpectFormer: Frequency and Attention is what you need in a Vision
Transformer", https://arxiv.org/abs/2304.06446. Released code: stages 1 and 2 are spectral throughout. The
paper's Table 1 puts an attention block last in each of them: `spectral_depths=(2, 3, 0, 0)` for S.
"""

from timm.models import generate_default_cfgs, register_model

from .pyramid import Pyramid, create_pyramid, pyramid_cfg

default_cfgs = generate_default_cfgs(
    {
        f"spectformer_h_{size}": pyramid_cfg(
            paper_ids="arXiv:2304.06446",
            paper_name="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
            origin_url="https://github.com/badripatro/SpectFormers",
        )
        for size in ("s", "b", "l")
    }
)


def _create(variant: str, pretrained: bool, overrides: dict) -> Pyramid:
    return create_pyramid(variant, pretrained, 2, {"mixer": "spectral", **overrides})


@register_model
def spectformer_h_s(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-S: 22.2M parameters with the token-label head, 3.9 GFLOPs at 224."""
    return _create("spectformer_h_s", pretrained, kwargs)


@register_model
def spectformer_h_b(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-B: 33.1M parameters with the token-label head, 6.3 GFLOPs at 224."""
    return _create("spectformer_h_b", pretrained, kwargs)


@register_model
def spectformer_h_l(pretrained: bool = False, **kwargs) -> Pyramid:
    """SpectFormer-H-L: 54.7M parameters with the token-label head, 12.7 GFLOPs at 224."""
    return _create("spectformer_h_l", pretrained, kwargs)
