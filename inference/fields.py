"""What a checkpoint says about its images, beyond what `runtime.contents` has made sure of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from torchvision.transforms import InterpolationMode

from runtime.schema import Either, Fields, Items, Number, Text
from utils import UserError, quote

SMALLEST_CROP = 0.1  # part of the resized image's side; it is resized to 1 / crop of what is seen
_SIDE = Number(1, whole=True)

FIELDS = Fields(
    {
        "input_size": Either((_SIDE, Items(_SIDE, 2, 2))),
        "mean": Items(Number(-1000, 1000), 3, 3),
        "std": Items(Number(1e-3, 1000), 3, 3),
        "crop_pct": Number(SMALLEST_CROP, 1),
        "interpolation": Text(among=("random", *(mode.value for mode in InterpolationMode))),
    }
)
# Of the arguments of the run that wrote it.
RUN_FIELDS = Fields({"data_set": Text(), "classes": Items(Text()), "val_split": Items(Number(0), 2, 2)})


def read_fields(state: Mapping[str, Any], cfg: PretrainedCfg, path: Path) -> dict[str, Any]:
    """All FIELDS and RUN_FIELDS of a checkpoint and its `class_names`, `cfg`'s or None where it does not say.

    `input_size` is (height, width); lists are tuples.

    Raises:
        UserError: a field is of the wrong kind or out of bounds.
    """
    defaults = {name: getattr(cfg, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    told = {name: state.get(name) for name in (*FIELDS.known, "class_names")}
    told = {name: defaults.get(name) if value is None else value for name, value in told.items()}
    run = {name: (state.get("args") or {}).get(name) for name in RUN_FIELDS.known}
    for name, problem in (*FIELDS.problems(told), *RUN_FIELDS.problems(run)):
        raise UserError(f"{path}: its {quote(name)}{problem}")
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in (told | run).items()}
    size = told["input_size"]
    return told | {"input_size": (size, size) if isinstance(size, int) else size}
