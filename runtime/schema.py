"""What a value from outside may be: declared once, as data, and checked at the door.

    ROW = Fields({"epoch": Number(0, 10**6, whole=True)}, others=Number(finite=False), required={"epoch"})
    ROW.problem({"epoch": -1})  # "['epoch'] is -1, not at least 0 and at most 1000000"

A kind of value says what is wrong with one, in words that follow its name, or "". It ends at the first thing that
is wrong, takes no longer than the value is large, and quotes little of it.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from utils import quote


class Kind:
    """Values of one kind; `types` are what Python calls them, where a bool is no int."""

    types: tuple[type, ...]

    def problem(self, value: Any) -> str:
        """What keeps `value` from being of this kind, to be read after its name; "" for nothing."""
        fits = bool in self.types if isinstance(value, bool) else isinstance(value, self.types)
        if not fits:
            return f" is a {type(value).__name__}, not {' or '.join(kind.__name__ for kind in self.types)}"
        return self._fault(value)

    def _fault(self, value: Any) -> str:
        """The problem of a value that has one of the types."""
        return ""


@dataclass(frozen=True)
class Typed(Kind):
    """Anything of certain types."""

    types: tuple[type, ...]


@dataclass(frozen=True)
class Number(Kind):
    """A number from `low` to `high`.

    whole: an int alone; above: `low` itself is too low; finite: neither NaN nor infinite.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    finite: bool = True

    @property
    def types(self) -> tuple[type, ...]:
        return (int,) if self.whole else (float, int)

    @property
    def range(self) -> str:
        """Which numbers are allowed: "at least 0 and at most 1"."""
        limits = [f"{'above' if self.above else 'at least'} {self.low}"] if self.low > -math.inf else []
        return " and ".join(limits + ([f"at most {self.high}"] if self.high < math.inf else []))

    def _fault(self, value: float) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f" is {value}" if self.finite else ""
        if not self.low <= value <= self.high or (self.above and value == self.low):
            return f" is {quote(value)}, not {self.range}"
        return ""


@dataclass(frozen=True)
class Text(Kind):
    """Text of at most `longest` characters; one of `among`, where there are any."""

    longest: int = 1000
    among: Collection[str] = ()
    types = (str,)

    def _fault(self, value: str) -> str:
        if len(value) > self.longest:
            return f" has {len(value):,} characters, not at most {self.longest:,}"
        if self.among and value not in self.among:
            return f" is {quote(value)}, not one of {', '.join(self.among)}"
        return ""


@dataclass(frozen=True)
class Items(Kind):
    """A list or tuple of `least` to `most` values of one kind."""

    kind: Kind
    least: int = 0
    most: int = 2**20
    types = (list, tuple)

    def _fault(self, value: list | tuple) -> str:
        if not self.least <= len(value) <= self.most:
            return f" has {len(value):,} entries, not {self.least:,} to {self.most:,}"
        found = ((i, self.kind.problem(item)) for i, item in enumerate(value))
        return next((f"[{i}]{problem}" for i, problem in found if problem), "")


@dataclass(frozen=True)
class Fields(Kind):
    """A dict from names to values, of which None counts as absent.

    known: the kind of each name; others: that of all other names (None: anything); required: the names that
    have to be there.
    """

    known: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None
    required: Set[str] = frozenset()
    types = (dict,)

    def _fault(self, value: Mapping[Any, Any]) -> str:
        return next((f"[{quote(name)}]{problem}" for name, problem in self.problems(value)), "")

    def problems(self, value: Mapping[Any, Any]) -> Iterator[tuple[Any, str]]:
        """(name, problem) of every name that has one."""
        yield from ((name, " is missing") for name in sorted(self.required) if value.get(name) is None)
        for name, item in value.items():
            kind = self.known.get(name, self.others) if isinstance(name, str) else None
            problem = "" if kind is None or item is None else kind.problem(item)
            if not isinstance(name, str):
                problem = " is not a name"
            if problem:
                yield name, problem


@dataclass(frozen=True)
class Either(Kind):
    """A value of one of several kinds."""

    kinds: tuple[Kind, ...]

    @property
    def types(self) -> tuple[type, ...]:
        return tuple(dict.fromkeys(found for kind in self.kinds for found in kind.types))

    def _fault(self, value: Any) -> str:
        problems = [kind.problem(value) for kind in self.kinds if isinstance(value, kind.types)]
        return "" if "" in problems else problems[-1]


def parse_json(text: str | bytes) -> Any:
    """What JSON holds; ValueError for anything else, such as a nesting deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
