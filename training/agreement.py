"""Processes of a job have to be started alike: one with another learning rate would quietly spoil the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import timm
import torch

from runtime.processes import Distributed
from utils import UserError

VERSIONS = {"torch": torch.__version__, "timm": timm.__version__}


def check_same_everywhere(dist: Distributed, what: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError, on every process, unless all have the same settings and versions.

    `what` names the settings in the message. Each setting is compared by its digest.
    """
    own = {name: _digest(value) for name, value in (VERSIONS | dict(settings)).items()}
    others = dist.gather_objects(own)
    names = sorted({name for each in others for name in own.keys() | each.keys() if each.get(name) != own.get(name)})
    if names:
        listed = ", ".join(name.replace("_", "-") for name in names)
        raise UserError(f"the processes of this job differ in {what}: {listed}; start all of them alike")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=repr, sort_keys=True).encode()).hexdigest()
