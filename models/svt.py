"""SVT: pyramids (SVT-H) and vanilla models with scattering mixers in their first blocks.

Patro, Agneeswaran: "Scattering Vision Transformer: Spectral Mixing Matters", NeurIPS 2023,
https://arxiv.org/abs/2311.01310. SVT-H uses scattering in its first stage, as in the released code (alpha = 1). The
paper's figure has alpha = 2: `spectral_stages=2`. The code of the vanilla models was not published; these are
SpectFormer's vanilla models with scattering instead of the gate.
"""

from timm.models import generate_default_cfgs

from .base import ImageModel, register
from .pyramid import build_pyramid, pyramid_cfgs
from .scattering import MIXINGS
from .vanilla import build_vanilla, vanilla_cfgs

SOURCE = {
    "paper_ids": "arXiv:2311.01310",
    "paper_name": "Scattering Vision Transformer: Spectral Mixing Matters",
    "origin_url": "https://github.com/badripatro/svt",
}

_pyramids = pyramid_cfgs("svt", SOURCE)
ALIASES = {f"svt_{size}": f"svt_h_{size}" for size in ("s", "b", "l")}
_aliased = {alias: _pyramids[name] for alias, name in ALIASES.items()}
default_cfgs = generate_default_cfgs(_pyramids | _aliased | vanilla_cfgs("svt_vanilla", SOURCE))
# The parameters of H-S, H-B and H-L include the token-label head, those of H-N and H-Ti a head for 10 classes.
MODELS = {
    "svt_h_n": "SVT-H-N, for 32-pixel images: 1.2M parameters, 28 MFLOPs at 32. Not in the paper.",
    "svt_h_ti": "SVT-H-Ti, for 128-pixel photographs: 2.3M parameters. Not in the paper.",
    "svt_h_s": "SVT-H-S: 22.1M parameters, 3.9 GFLOPs at 224.",
    "svt_h_b": "SVT-H-B: 32.9M parameters, 6.3 GFLOPs at 224.",
    "svt_h_l": "SVT-H-L: 54.6M parameters, 12.7 GFLOPs at 224.",
    "svt_vanilla_ti": "Vanilla SVT-Ti: 9.1M parameters, 1.8 GFLOPs at 224.",
    "svt_vanilla_xs": "Vanilla SVT-XS: 20.0M parameters, 4.0 GFLOPs at 224.",
    "svt_vanilla_s": "Vanilla SVT-S: 32.4M parameters (published: 32.2M), 6.6 GFLOPs at 224.",
    "svt_vanilla_b": "Vanilla SVT-B: 57.2M parameters (published: 57.6M), 11.5 GFLOPs at 224.",
    **{alias: f"Another name of `{name}`." for alias, name in ALIASES.items()},
}


def build(name: str, pretrained: bool, arguments: dict) -> ImageModel:
    """Build the model `name` with arguments of `Pyramid` (H) or `Vanilla`, with `mixing` and with `wavelet_backend`.

    mixing: a mixing of `ScatteringMixer`. By default, the sizes of the released code (H-S, H-B and H-L) use "channel"
        in one stage, as that code does, and the other models "channel_token". The published H-S and H-B are
        "channel_token", and so are the vanilla models, by their number of parameters.
    wavelet_backend: "native" (the default) or "pytorch_wavelets", which needs that package.
    """
    name = ALIASES.get(name, name)
    released = name in ALIASES.values()
    mixing = arguments.pop("mixing", None)
    if mixing is not None or arguments.get("mixers") is None:
        default = "channel" if released else "channel_token"
        arguments = {"mixer": f"scattering_{mixing or default}"} | arguments
    if backend := arguments.pop("wavelet_backend", None):
        options = {f"scattering_{each}": {"backend": backend} for each in MIXINGS}
        arguments["mixer_options"] = options | (arguments.get("mixer_options") or {})
    if released:
        arguments = {"spectral_stages": 1} | arguments
    return (build_vanilla if "vanilla" in name else build_pyramid)(name, pretrained, arguments)


for _name, _description in MODELS.items():
    register(build, _name, _description)
