"""What was run: the command, its arguments, the versions and the state of the code."""

import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "numpy")


def describe_run(args: Mapping[str, Any], argv: Sequence[str], processes: int) -> dict[str, Any]:
    """What args.yaml contains: the command (`argv`, like sys.argv), versions, the code's state, all arguments."""
    return {
        "command": shlex.join(["python", *argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processes": processes,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git": _git_state(),
        "args": {name: plain(value) for name, value in sorted(args.items())},
    }


def _git_state() -> dict[str, Any] | None:
    """The commit of this code and whether it was changed since; None without git or a repository."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command],
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: tuples as lists, what they have not as text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
