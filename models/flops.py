"""Count the multiply-adds of a model's forward pass without elementwise operations, as papers do.

The published figures of the vanilla models include everything counted here. Those of the pyramids exclude
attention's products of tokens with tokens. SVT's only include the layers, with scattering in two stages.
"""

import copy
import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from .layers import Attention, ClassAttention
from .resampling import Grid, to_grid

aten = torch.ops.aten


def _fft(factor: float, shape, dim, *_, out_shape, **__) -> int:
    """Count factor * N log2 N operations for N points; by convention, the factor is 5 for complex and 2.5 for real."""
    points = max(shape, out_shape, key=math.prod)  # the spectrum of real points is about half as large
    size = math.prod(points[axis] for axis in dim)
    return round(factor * math.prod(points) * math.log2(max(size, 2)))


# Operations that FlopCounterMode does not count.
FORMULAS = {
    aten._fft_r2c: partial(_fft, 2.5),
    aten._fft_c2r: partial(_fft, 2.5),
    aten._fft_c2c: partial(_fft, 5.0),
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
}
_LAYERS = (aten.mm, aten.addmm, aten.convolution)


@torch.no_grad()
def flops_by_kind(model: nn.Module, input_size: int | Grid, in_chans: int = 3) -> dict[str, int]:
    """Count the multiply-adds for an image of `input_size` pixels (a side, or height and width), by kind.

    "layers" are linear layers and convolutions, "attention" products of tokens with tokens, "spectral"
    transforms and blending. It counts on the meta device, which uses no device-specific implementation.
    """
    model = copy.deepcopy(model).to("meta").eval()
    image = torch.zeros(1, in_chans, *to_grid(input_size), device="meta", dtype=next(model.parameters()).dtype)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(image)
    counts = counter.get_flop_counts()
    attention = sum(
        _flops(counts.get(f"{type(model).__name__}.{name}", {}), layers=False)
        for name, module in model.named_modules()
        if isinstance(module, (Attention, ClassAttention))
    )
    kinds = {
        "layers": _flops(counts["Global"], layers=True),
        "attention": attention,
        "spectral": _flops(counts["Global"], layers=False) - attention,
    }
    return {kind: flops // 2 for kind, flops in kinds.items()}  # the counter counts a multiply-add as two operations


def _flops(counts: Mapping, layers: bool) -> int:
    return sum(flops for operation, flops in counts.items() if (operation in _LAYERS) == layers)


def count_flops(model: nn.Module, input_size: int | Grid, in_chans: int = 3) -> int:
    """Count all multiply-adds of the forward pass for one image; see `flops_by_kind`."""
    return sum(flops_by_kind(model, input_size, in_chans).values())
