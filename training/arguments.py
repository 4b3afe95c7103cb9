"""A command line that explains its mistakes: the parser, the types of its values, files of defaults for it."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.utils import ParseKwargs

from inputs import transforms
from utils import UserError, quote

UNSET = object()
MAX_CONFIG_BYTES = 2**20
LONGEST_NAME = 255  # of a file, in bytes, on any system here
LARGEST = 2**63 - 1  # integers that every library takes


class HelpFormatter(argparse.HelpFormatter):
    """Help at 80 columns that ends with the default where there is one to tell."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        untold = action.default in (None, False, "", argparse.SUPPRESS) or action.default == {}
        return action.help if untold or "default" in action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors, and which guesses what an unknown flag meant."""

    def __init__(self, description: str | None, usage: str | None = None, prog: str | None = None):
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        flag = "an argument"
        for word in args:
            flag, equals, value = word.partition("=") if word.startswith("--") else (flag, "=", word)
            action = self._option_string_actions.get(flag)
            as_it_is = getattr(action, "type", None) in (None, Path) and not isinstance(action, ParseKwargs)
            if equals and (as_it_is or value == "--"):
                _check_text(flag, value)
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0]
            raise UserError(f"unknown argument {word}{suggestion(word, self._option_string_actions)}")
        return known

    def settings(self) -> dict[str, argparse.Action]:
        """The flags that a file may set, by attribute."""
        return {action.dest: action for action in self._actions if action.dest not in ("help", "config")}

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """What the words themselves set, without defaults."""
        blank = argparse.Namespace(**{action.dest: UNSET for action in self._actions})
        return {name: value for name, value in vars(self.parse_args(words, blank)).items() if value is not UNSET}


def _check_text(flag: str, value: str) -> None:
    """Refuse what names nothing: argparse takes ``--flag=--`` for a list without anything in it."""
    if value in ("", "--"):
        raise UserError(f"{flag}: {value!r} names nothing")
    if "\0" in value:
        raise UserError(f"{flag}: no name has a NUL in it")
    if max(map(len, os.fsencode(value).split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{flag}: {quote(value)} is longer than a name can be")


class KeyValues(ParseKwargs):
    """timm's ``key=value ...`` with Python literals; anything else is told."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not (equals and key.isidentifier()):
                raise argparse.ArgumentError(self, f"{value!r} is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)


def suggestion(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``"; did you mean X?"`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word.split("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def dashed(word: str) -> str:
    """``--batch_size=8`` -> ``--batch-size=8``: flags are accepted in both spellings."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def switch(group: argparse._ArgumentGroup, flag: str, default: bool | None, text: str) -> None:
    """A flag with its ``--no-`` twin."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)


# ------------------------------------------------------------------------------------------------ types of values


def number(kind: type, low: float = -math.inf, high: float = LARGEST, above: bool = False) -> Callable:
    """An argparse type: a finite int or float within [low, high], or above low if ``above``."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value != value:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {'an integer' if kind is int else 'a number'}")
        if value < low or value > high or (above and value == low):
            limits = [f"{'above' if above else 'at least'} {low}"] if low > -math.inf else []
            limits += [f"at most {high}"]
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: it has to be {' and '.join(limits)}")
        return value

    return convert


COUNT, POSITIVE = number(int, 0), number(int, 1)
AMOUNT, FRACTION = number(float, 0), number(float, 0, 1)
WORKERS = number(int, 0, 1024)  # loader processes


def image_size(text: str) -> tuple[int, int]:
    """``"224"`` -> (224, 224); ``"192x256"`` -> height 192, width 256."""
    try:
        return transforms.image_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def class_list(text: str) -> list[str]:
    """``"cat, dog"`` -> ["cat", "dog"]."""
    classes = [name.strip() for name in str(text).split(",")]
    if not all(classes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of classes separated by commas")
    return classes


def integers(text: str) -> tuple[int, ...]:
    """``"480,800"`` -> (480, 800), all positive and in ascending order."""
    numbers = tuple(POSITIVE(part) for part in str(text).split(","))
    if list(numbers) != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no list of ascending numbers separated by commas")
    return numbers


def split_share(text: str, most: float = 0.999999) -> tuple[float, int]:
    """``"0.1"`` -> (0.1, 0); ``"0.1:7"`` -> (0.1, 7): a share between 0 and 1, and the seed of the choice."""
    share, _, seed = str(text).partition(":")
    return number(float, 1e-6, most)(share), COUNT(seed or "0")


def part(text: str) -> tuple[float, int]:
    """`split_share`, which may be the whole, 1."""
    return split_share(text, most=1)


def policy(text: str) -> str:
    """A policy of timm's auto-augmentation, "" for none."""
    if text in ("", "none"):
        return ""
    name, *settings = text.split("-")
    build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(name)
    try:
        if any(not re.fullmatch(r"[a-z]+\d.*", setting) for setting in settings):
            raise ValueError("timm would pass such a setting over in silence")
        (build or auto_augment_transform)(text, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no policy; rand-m9-mstd0.5-inc1 is one") from error
    return text


# ----------------------------------------------------------------------------------------------- files of defaults


def read_config(path: str | Path, parser: Parser) -> dict[str, Any]:
    """What a YAML file sets, as attributes of the parsed arguments.

    A run's ``args.yaml`` holds its arguments under ``args``; of these, where that run wrote and what it went on from
    are left out.

    Raises:
        UserError: naming the file, and the key that is unknown or has a wrong value.
    """
    where = f"--config {path}"
    content = read_yaml(path, where)
    if isinstance(content.get("args"), dict) and "command" in content:
        content = {key: value for key, value in content["args"].items() if value is not None}
        for place in ("config", "output_dir", "resume", "eval"):
            content.pop(place, None)
    return parser.given(words_of(content, parser, where))


def words_of(content: Mapping[str, Any], parser: Parser, where: str) -> list[str]:
    """A mapping of flags to values as the words of a command line, which the parser understands.

    Raises:
        UserError: naming `where` it stands, and the key that is unknown or has a wrong value.
    """
    settings, words = parser.settings(), []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            raise UserError(f"{where}: unknown key {str(key)[:40]!r}{suggestion(name, settings)}")
        try:
            words += _words(settings[name], value)
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error}") from error
    try:
        parser.given(words)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return words


def read_yaml(path: str | Path, where: str) -> dict:
    """The mapping that a YAML file holds.

    Raises:
        UserError: it holds none; the message begins with `where`.
    """
    try:
        path = Path(path)
        if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{where}: larger than a file of flags can be")
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: not a file")
        content = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected lines of 'flag: value'")
    return content


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a short file can stand for an endless one."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _words(action: argparse.Action, value: Any) -> list[str]:
    """A value as the words after a flag; ValueError where it is of another type than the flag's."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{quote(value)} is not true or false")
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(action, KeyValues):
        if not (isinstance(value, dict) and all(isinstance(key, str) and key.isidentifier() for key in value)):
            raise ValueError(f"{quote(value)} is not a mapping of names to values")
        return [flag, *(f"{key}={item!r}" for key, item in value.items())]
    if value is None and action.default is None:
        return []
    if action.nargs is not None:
        if not (isinstance(value, list) and len(value) == action.nargs):
            raise ValueError(f"{quote(value)} is not a list of {action.nargs}")
        return [flag, *(_scalar(action, item) for item in value)]
    if isinstance(value, list) and action.type in LISTED:
        return [f"{flag}={LISTED[action.type](value)}"]
    return [f"{flag}={_scalar(action, value)}"]


# How a run's args.yaml writes what these types make of a word.
LISTED: dict[Callable, Callable[[list], str]] = {
    image_size: lambda sides: "x".join(map(str, sides)),
    class_list: lambda names: ",".join(map(str, names)),
    split_share: lambda parts: ":".join(map(str, parts)),
    part: lambda parts: ":".join(map(str, parts)),
    integers: lambda numbers: ",".join(map(str, numbers)),
}


def _scalar(action: argparse.Action, value: Any) -> str:
    # Text has to do where a number is wanted: YAML takes 5e-4 for text.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{quote(value)} is not a single value")
    if action.type is None and not isinstance(value, str):
        raise ValueError(f"{quote(value)} is not text")
    return str(value)
