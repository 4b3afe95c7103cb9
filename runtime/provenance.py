"""The provenance of a run: command, arguments, versions and state of the code."""

import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from utils import UserError

PACKAGES = ("torch", "torchvision", "timm", "numpy")


def describe_run(args: Mapping[str, Any], argv: Sequence[str], processes: int) -> dict[str, Any]:
    """The content of args.yaml: the command (`argv`, like sys.argv), versions, the code's state, all arguments."""
    return {
        "command": shlex.join(["python", *argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processes": processes,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git": _git_state(),
        "args": plain(dict(sorted(args.items()))),
    }


def read_yaml(path: str | Path, where: str) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: the file contains no mapping; the message begins with `where`.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        found = [near for suffix in (".yaml", ".yml") if (near := Path(path).with_suffix(suffix)).is_file()]
        raise UserError(f"{where}: {error.strerror}" + (f"; did you mean {found[0]}?" if found else "")) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected lines of 'flag: value'")
    return content


def last_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run's last command, from the content of its args.yaml."""
    args = dict(record["args"])
    for later in record.get("resumed", []):
        args |= later["changed"]
    return args


def _git_state() -> dict[str, Any] | None:
    """The commit of this code and whether tracked files have changed; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, dirty, _ = described.strip().partition("-dirty")
    return {"commit": commit, "dirty": bool(dirty)}


def plain(value: Any) -> Any:
    """Convert a value for YAML and JSON: tuples to lists, unsupported types to text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
