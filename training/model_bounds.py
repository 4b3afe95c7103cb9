"""How large and what kind of a model a file may describe.

A checkpoint may come from anybody, and its arguments go to a model's constructor. Of these only the model's own
pass, none of those by which timm finds weights, files and servers; their values are small; and what they
describe may not outgrow the tensors that the file holds.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from runtime.contents import FIELDS
from utils import UserError, one_line, quote

# Where a model and its weights come from and how it is run, wherever a constructor takes it; and what is said apart.
NOT_OF_THE_MODEL = {
    "device",
    "dtype",
    "img_size",  # a checkpoint's input_size, a run's --input-size
    "num_classes",
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
}
VALUES = FIELDS["model_kwargs"]
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
OF_EVERY_MODEL = {"drop_rate", "drop_path_rate", "global_pool"}  # as documented in `timm.create_model`
# Parameters, and numbers in them, that are built for any file: what it lacks is then told by name.
FEW_PARAMETERS, FEW_NUMBERS = 1000, 2**24


def check_arguments(name: str, arguments: Mapping[str, Any], source: str) -> None:
    """Raise UserError, which begins with `source`, unless `arguments` are of the constructor of model `name`.

    Args:
        name: a name registered with timm.
        arguments: constructor arguments as a file or a command line gives them.
        source: how messages call that.
    """
    if problem := VALUES.problem(arguments):
        raise UserError(f"{source}{problem}")
    accepted = constructor_arguments(name) if arguments else frozenset()
    for key in sorted(arguments.keys() - accepted):
        raise UserError(f"{source} {quote(key)}: no argument of {name}; it has {', '.join(sorted(accepted))}")


@cache
def constructor_arguments(name: str) -> frozenset[str]:
    """The arguments by which a registered model's constructor can be told what to build."""
    with torch.device("meta"):
        model = timm.create_model(name)
    # From the function that is called by that name to the model's class: a second name has a function of its own.
    entries = (model_entrypoint(entry) for entry in (name, model.pretrained_cfg["architecture"]))
    constructors = (vars(base)["__init__"] for base in type(model).__mro__ if "__init__" in vars(base))
    accepted = set(OF_EVERY_MODEL)
    for function in (*entries, *constructors):
        parameters = inspect.signature(function).parameters.values()
        accepted |= {parameter.name for parameter in parameters if parameter.kind in NAMED}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break  # it passes nothing on
    return frozenset(accepted - {"self"} - NOT_OF_THE_MODEL)


class _Outgrown(Exception):
    """A model under construction has more parameters than it may."""


def check_size(build: Callable[[], nn.Module], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, which begins with `source`, unless `build` makes a model that `weights` can fill.

    It is built without data, and left off when it outgrows them.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    try:
        # Not to the number, since some constructors make parts and replace them.
        parameters, numbers = max(2 * len(weights), FEW_PARAMETERS), max(sum(storages.values()), FEW_NUMBERS)
        with torch.device("meta"), _at_most(parameters, numbers), warnings.catch_warnings(action="ignore"):
            build()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except _Outgrown as error:
        raise UserError(f"{source}: it describes a larger model than its {len(weights)} tensors fill") from error
    except Exception as error:  # a constructor stumbles over odd values in ways of its own
        raise UserError(f"{source}: no model can be built from its arguments: {one_line(error)[:200]}") from error


@contextmanager
def _at_most(parameters: int, numbers: int) -> Iterator[None]:
    """Raise _Outgrown in the constructor that registers more parameters than that."""

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, numbers
        if parameter is not None:
            parameters, numbers = parameters - 1, numbers - parameter.numel()
            if min(parameters, numbers) < 0:
                raise _Outgrown

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
