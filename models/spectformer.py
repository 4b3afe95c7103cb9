"""SpectFormer: vanilla models, and pyramids (SpectFormer-H), with spectral gates in their first blocks.

Patro, Namboodiri, Agneeswaran: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
https://arxiv.org/abs/2304.06446. As in the released code, all blocks of the pyramids' stages 1 and 2 are spectral. In
the paper's Table 1, the last block of each has attention: `spectral_depths=(2, 3, 0, 0)` for S.
"""

from timm.models import generate_default_cfgs

from .base import ImageModel, register
from .pyramid import build_pyramid, pyramid_cfgs
from .vanilla import build_vanilla, vanilla_cfgs

SOURCE = {
    "paper_ids": "arXiv:2304.06446",
    "paper_name": "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    "origin_url": "https://github.com/badripatro/SpectFormers",
}

default_cfgs = generate_default_cfgs(vanilla_cfgs("spectformer", SOURCE) | pyramid_cfgs("spectformer", SOURCE))
# The parameters of H-S, H-B and H-L include the token-label head, those of H-N and H-Ti a head for 10 classes.
MODELS = {
    "spectformer_ti": "SpectFormer-Ti: 9.2M parameters, 1.8 GFLOPs at 224.",
    "spectformer_xs": "SpectFormer-XS: 20.0M parameters, 4.0 GFLOPs at 224.",
    "spectformer_s": "SpectFormer-S: 32.4M parameters, 6.6 GFLOPs at 224.",
    "spectformer_b": "SpectFormer-B: 57.2M parameters, 11.5 GFLOPs at 224.",
    "spectformer_h_n": "SpectFormer-H-N, for 32-pixel images: 1.2M parameters, 24 MFLOPs at 32. Not in the paper.",
    "spectformer_h_ti": "SpectFormer-H-Ti, for 128-pixel photographs: 2.3M parameters. Not in the paper.",
    "spectformer_h_s": "SpectFormer-H-S: 22.2M parameters, 3.9 GFLOPs at 224.",
    "spectformer_h_b": "SpectFormer-H-B: 33.1M parameters, 6.3 GFLOPs at 224.",
    "spectformer_h_l": "SpectFormer-H-L: 54.7M parameters, 12.7 GFLOPs at 224.",
}


def build(name: str, pretrained: bool, arguments: dict) -> ImageModel:
    """Build the model `name` with arguments of `Pyramid` (H) or `Vanilla`."""
    return (build_pyramid if "_h_" in name else build_vanilla)(name, pretrained, arguments)


for _name, _description in MODELS.items():
    register(build, _name, _description)
