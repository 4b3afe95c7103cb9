"""Command lines: a parser with one-line errors, argument types, tables of flags, and flags from YAML."""

import argparse
import contextlib
import difflib
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from inputs.transforms import train_transform
from runtime.provenance import last_arguments, read_yaml
from utils import UserError, one_line

UNSET = object()
LARGEST = 2**63 - 1  # the largest integer that every library accepts
# Group title -> flags: (names, kind, default, metavar, help). The kind is a type, bool for a switch with a --no- twin,
# a list of choices, KeyValues, or (type, number of values).
FlagTable = Mapping[str, Iterable[tuple[str, Any, Any, Any, str]]]


class HelpFormatter(argparse.HelpFormatter):
    """Help that adds each default unless the text mentions it, and wraps only unindented paragraphs."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else fill(part, width, indent) for part in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str:
        obvious = isinstance(action.default, bool) or action.default in (None, "", {}, argparse.SUPPRESS)
        return action.help if obvious or "default" in action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and suggests the closest flag for an unknown one.

    Flags may be spelled with - or _.
    """

    def __init__(self, description: str | None, usage: str | None = None, prog: str | None = None):
        layout = functools.partial(HelpFormatter, max_help_position=28, width=80)
        super().__init__(prog, usage, description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse `args`, by default `sys.argv[1:]`."""
        words = sys.argv[1:] if args is None else args
        known, unknown = self.parse_known_args([dashed(word) for word in words], namespace)
        if unknown:
            raise UserError(f"unknown argument {unknown[0]}{suggestion(unknown[0], self._option_string_actions)}")
        return known

    def add_flags(self, table: FlagTable) -> None:
        """Add a group of flags for each title of a table."""
        for title, flags in table.items():
            group = self.add_argument_group(title)
            for name, kind, default, metavar, text in flags:
                options = {"type": kind, "metavar": metavar}
                if kind is bool:  # argparse would make --no-no-aug of --no-aug, and let neither set it
                    options = {"action": "store_true" if name == "--no-aug" else argparse.BooleanOptionalAction}
                elif kind is KeyValues:
                    options = {"action": KeyValues, "nargs": "*", "metavar": metavar}
                elif isinstance(kind, list):
                    options = {"choices": kind, "metavar": metavar}
                elif isinstance(kind, tuple):
                    options = {"type": kind[0], "nargs": kind[1], "metavar": metavar}
                group.add_argument(*name.split(), default=default, help=text, **options)

    def settings(self) -> dict[str, argparse.Action]:
        """The flags that a YAML file may set, by attribute."""
        return {action.dest: action for action in self._actions if action.dest not in ("help", "config")}

    def given(self, words: Sequence[str] | None) -> dict[str, Any]:
        """The values that `words` set, without defaults."""
        blank = argparse.Namespace(**{action.dest: UNSET for action in self._actions})
        return {name: value for name, value in vars(self.parse_args(words, blank)).items() if value is not UNSET}


class KeyValues(ParseKwargs):
    """timm's ``key=value ...`` with Python literals; raises an error for anything else."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not (equals and key.isidentifier()):
                raise argparse.ArgumentError(self, f"{value!r} is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the closest known word, "" without one."""
    close = difflib.get_close_matches(word.split("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def dashed(word: str) -> str:
    """``--batch_size=8`` -> ``--batch-size=8``: flags are accepted in both spellings."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def number(kind: type, low: float = -math.inf, high: float = LARGEST, above: bool = False) -> Callable:
    """An argparse type: an int or float within [low, high], or above low if ``above``; no NaN."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low):
                return value
        noun, least = "an integer" if kind is int else "a number", "above" if above else "of at least"
        limits = [f"{least} {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < LARGEST or kind is int)
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {noun} {' and '.join(limits)}".rstrip())

    return convert


COUNT, POSITIVE = number(int, 0), number(int, 1)
AMOUNT, FRACTION, ABOVE_ZERO = number(float, 0), number(float, 0, 1), number(float, 0, above=True)
WORKERS = number(int, 0, 1024)  # loader processes


def text(word: str) -> str:
    """An argparse type: text that is not empty, as an unset shell variable would be."""
    if not word:
        raise argparse.ArgumentTypeError("it is empty")
    return word


def image_size(text: str) -> tuple[int, int]:
    """``"224"`` -> (224, 224), ``"192x256"`` -> (192, 256): height and width in pixels."""
    height, _, width = text.lower().partition("x")
    side = number(int, 1, 9999)
    return side(height), side(width or height)


@functools.cache
def python_module(path: str) -> str:
    """Import a Python file once, so that it can add to MIXERS, and return its absolute path."""
    name = f"module of {path}"
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything
        raise argparse.ArgumentTypeError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    return str(Path(path).resolve())


def class_list(text: str) -> list[str]:
    """``"cat, dog"`` -> ["cat", "dog"]."""
    return [name.strip() for name in text.split(",")]


def integers(text: str) -> tuple[int, ...]:
    """``"480,800"`` -> (480, 800), all positive and in ascending order."""
    numbers = tuple(POSITIVE(part) for part in str(text).split(","))
    if list(numbers) != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of ascending numbers separated by commas")
    return numbers


def split_share(text: str) -> tuple[float, int]:
    """``"0.1"`` -> (0.1, 0); ``"0.1:7"`` -> (0.1, 7): a fraction in (0, 1] and a seed."""
    share, _, seed = str(text).partition(":")
    return number(float, 0, 1, above=True)(share), COUNT(seed or "0")


def policy(text: str) -> str:
    """An auto-augmentation policy of timm, "" for none."""
    if text in ("", "none"):
        return ""
    try:
        train_transform(32, aa=text)
    except Exception as error:  # timm's parser may raise anything
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a policy such as rand-m9-mstd0.5-inc1") from error
    return text


# The separator that joins a YAML list, such as one in args.yaml, into one word.
SEPARATORS = {image_size: "x", class_list: ",", integers: ",", split_share: ":"}


def read_config(path: str | Path, parser: Parser) -> dict[str, Any]:
    """The settings in a YAML file, by attribute of the parsed arguments.

    A run's ``args.yaml`` lists them under ``args``; its config, output_dir, resume and eval are ignored.

    Raises:
        UserError: a key is unknown or has a wrong value; the message names the file and the key.
    """
    where = f"--config {path}"
    content = read_yaml(path, where)
    if isinstance(content.get("args"), dict) and "command" in content:
        ignored = ("config", "output_dir", "resume", "eval")
        saved = last_arguments(content)
        content = {key: value for key, value in saved.items() if key not in ignored and value is not None}
    try:
        return parser.given(words_of(content, parser))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def words_of(content: Mapping[str, Any], parser: Parser) -> list[str]:
    """Convert a mapping of flags to values into words for the parser, which checks them.

    Raises:
        UserError: a key is unknown; the message names it.
    """
    settings, words = parser.settings(), []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            raise UserError(f"unknown key {str(key)[:40]!r}{suggestion(name, settings)}")
        action = settings[name]
        flag = action.option_strings[0]
        if isinstance(value, bool) and action.nargs == 0:  # a switch, with its --no- twin if it has one
            words += [flag] if value else action.option_strings[1:]
        elif isinstance(value, dict):
            words += [flag, *(f"{part}={item!r}" for part, item in value.items())]
        elif isinstance(value, list) and action.nargs is not None:
            words += [flag, *map(str, value)]
        elif isinstance(value, list) and action.type in SEPARATORS:
            words.append(f"{flag}={SEPARATORS[action.type].join(map(str, value))}")
        elif value is not None or action.default is not None:
            words.append(f"{flag}={value}")
    return words
