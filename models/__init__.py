"""SpectFormer and SVT. Importing this package registers the models with timm (`timm.create_model(name)`)."""

from pathlib import Path

from timm.models import get_pretrained_cfg

from . import spectformer, svt
from .convert import to_original, to_ours
from .layers import set_spectral_precision
from .loading import WeightMismatch, checkpoint_filter_fn, load_weights
from .pyramid import Pyramid, sample_mix_box
from .vanilla import Vanilla

__all__ = [
    "ARCHITECTURES",
    "Pyramid",
    "Vanilla",
    "WeightMismatch",
    "checkpoint_filter_fn",
    "load_weights",
    "resolve_arch",
    "sample_mix_box",
    "set_spectral_precision",
    "shipped",
    "to_original",
    "to_ours",
]

# All names this package registers.
ARCHITECTURES = tuple(name for family in (spectformer, svt) for name in family.default_cfgs)


def resolve_arch(name: str) -> str:
    """A model's registered name from the papers' spelling: "spectformer-xs", "SpectFormer-H-S".

    Other names come back with underscores for hyphens, for timm to judge; sources ("hf-hub:...") as they are.
    """
    if ":" in name or "/" in name:
        return name
    plain = name.replace("-", "_")
    ours = {"spectformer_t": "spectformer_ti"}.get(plain.lower(), plain.lower())
    return ours if ours in ARCHITECTURES else plain


def shipped() -> dict[str, Path]:
    """The files of the weights that come with this package, by the models' names."""
    files = {name: get_pretrained_cfg(name).file for name in ARCHITECTURES}
    return {name: Path(file) for name, file in files.items() if file is not None}
