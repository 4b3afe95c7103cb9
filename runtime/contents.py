"""What a checkpoint may hold: the kind of each of its fields, and how deep and how much it may be."""

import argparse
from typing import Any

from runtime.pickles import Unusable
from runtime.schema import Either, Fields, Items, Kind, Number, Text, Typed
from utils import quote

MAX_DEPTH = 32  # containers in containers
MAX_VALUES = 2**21  # with those of a shared container each time it is referred to

COUNT = Number(0, 2**40, whole=True)
_SIDE = Number(1, 2**14, whole=True)
_CHANNELS = 2**10
_SCALAR = Either((Typed((bool, type(None))), Number(-(2**16), 2**16), Text(200)))
_LIST = Items(Either((_SCALAR, Items(_SCALAR, most=2**10))), most=2**10)

# Where they are there, every user of a checkpoint may rely on these. What a run needs beside is its own to check.
FIELDS: dict[str, Kind] = {
    "optimizer": Typed((dict,)),
    "scaler": Typed((dict,)),
    "model_ema": Typed((dict,)),
    "state_dict_ema": Typed((dict,)),
    "args": Fields(),
    "meters": Fields(others=Number()),
    "epoch": COUNT,
    "step": COUNT,
    "updates": COUNT,
    "best_epoch": Number(-1, 2**40, whole=True),
    "best_acc1": Number(),
    "world_size": COUNT,
    "lineage": Items(Items(Number(0, 2**63, whole=True), 3, 3), 1, 2**16),
    "arch": Text(200),
    "model_kwargs": Fields(others=Either((_SCALAR, _LIST, Fields(others=_SCALAR)))),
    "num_classes": Number(0, 2**20, whole=True),
    "class_names": Items(Text()),
    "input_size": Either((_SIDE, Items(_SIDE, 1, 3))),
    "mean": Items(Number(), 1, _CHANNELS),
    "std": Items(Number(0, above=True), 1, _CHANNELS),
    "crop_pct": Number(0.01, 1),
    "interpolation": Text(50),
}


def checked(state: Any) -> dict[str, Any]:
    """`state`, without the FIELDS that are None, and a namespace as its dict.

    Raises:
        Unusable: it is not what anybody who uses a checkpoint would expect.
    """
    if not isinstance(state, dict):
        raise Unusable(f"it holds a {type(state).__name__}, not the dict that a checkpoint is")
    _measure(state, 1, {})
    state = {
        name: vars(value) if isinstance(value, argparse.Namespace) else value
        for name, value in state.items()
        if value is not None or name not in FIELDS
    }
    for name, problem in Fields(FIELDS).problems(state):
        raise Unusable(f"its {'' if isinstance(name, str) else 'key '}{quote(str(name))}{problem}")
    return state


def _measure(value: Any, depth: int, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(levels of containers, values) of what is in `value`, itself `depth` levels down.

    `seen` has those of the containers that were measured. Whoever walks through what passes, in whatever way,
    comes to an end: nothing contains itself, or is shared so often that visiting it each time takes long.
    """
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple)):
        return 0, 1
    if id(value) not in seen and depth <= MAX_DEPTH:
        levels, count = 1, 1
        for item in value.values() if isinstance(value, dict) else value:
            levels_below, count_below = _measure(item, depth + 1, seen)
            levels, count = max(levels, 1 + levels_below), count + count_below
        seen[id(value)] = levels, count
    levels, count = seen.get(id(value), (1, 1))
    if depth + levels - 1 > MAX_DEPTH:
        raise Unusable(f"its content is nested more than {MAX_DEPTH} deep")
    if count > MAX_VALUES:
        raise Unusable(f"its content is more than {MAX_VALUES:,} values")
    return levels, count
