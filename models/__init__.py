"""SpectFormer and SVT. Importing this package registers the models with timm (`timm.create_model(name)`)."""

from .checkpoints import CheckpointError, read_checkpoint, weights_of
from .convert import to_original, to_ours
from .cpu.kernels import set_cpu_kernels
from .layers import set_spectral_precision
from .loading import WeightMismatch, checkpoint_filter_fn, load_weights
from .pretrained import (
    ARCHITECTURES,
    LoadedModel,
    ModelError,
    create_model,
    find_checkpoint,
    load_checkpoint,
    resolve_arch,
    shipped,
)
from .pyramid import Pyramid, sample_mix_box
from .vanilla import Vanilla

__all__ = [
    "ARCHITECTURES",
    "CheckpointError",
    "LoadedModel",
    "ModelError",
    "Pyramid",
    "Vanilla",
    "WeightMismatch",
    "checkpoint_filter_fn",
    "create_model",
    "find_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
    "resolve_arch",
    "sample_mix_box",
    "set_cpu_kernels",
    "set_spectral_precision",
    "shipped",
    "to_original",
    "to_ours",
    "weights_of",
]
