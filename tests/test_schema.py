"""Kinds of values: what is wrong with one is said in few words, and nothing wrong passes."""

import math
from types import NoneType

import pytest

from runtime.schema import Either, Fields, Items, Number, Text, Typed, parse_json
from utils import quote

COUNT = Number(0, 10, whole=True)
PART = Number(0, 1, above=True)
SCALAR = Either((Typed((bool, NoneType)), Number(-5, 5), Text(3), Items(COUNT, 1, 2)))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (COUNT, 0),
        (COUNT, 10),
        (PART, 1),
        (PART, 0.5),
        (Number(), 10**5000),
        (Number(finite=False), math.nan),
        (Number(finite=False), math.inf),
        (Text(), "é\udcff"),
        (Text(among=("a", "b")), "b"),
        (Items(COUNT, 2, 3), (1, 2)),
        (Typed((bool,)), True),
        (SCALAR, None),
        (SCALAR, False),
        (SCALAR, 5),
        (SCALAR, [0, 1]),
        (Fields({"a": COUNT}), {"a": None, "b": ...}),
        (Fields(), {}),
    ],
    ids=quote,
)
def test_what_a_kind_allows_has_no_problem(kind, value):
    assert kind.problem(value) == ""


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (COUNT, -1, " is -1, not at least 0 and at most 10"),
        (COUNT, 11, " is 11, not at least 0 and at most 10"),
        (COUNT, 1.0, " is a float, not int"),
        (COUNT, True, " is a bool, not int"),
        (COUNT, "1", " is a str, not int"),
        (COUNT, 10**5000, " is a number of 16610 bits, not at least 0 and at most 10"),
        (PART, 0, " is 0, not above 0 and at most 1"),
        (PART, False, " is a bool, not float or int"),
        (Number(), math.nan, " is nan"),
        (Number(), -math.inf, " is -inf"),
        (Text(3), "abcd", " has 4 characters, not at most 3"),
        (Text(), b"a", " is a bytes, not str"),
        (Text(among=("a", "b")), "c", " is 'c', not one of a, b"),
        (Items(COUNT, 2, 3), [1], " has 1 entries, not 2 to 3"),
        (Items(COUNT), [1, -1], "[1] is -1, not at least 0 and at most 10"),
        (Items(COUNT), "12", " is a str, not list or tuple"),
        (Fields({"a": COUNT}), {"b": 1, "a": -1}, "['a'] is -1, not at least 0 and at most 10"),
        (Fields(others=COUNT), {"b": "x"}, "['b'] is a str, not int"),
        (Fields(required={"a"}), {"a": None}, "['a'] is missing"),
        (Fields(), {3: 1}, "[3] is not a name"),
        (Fields({"a": Fields(others=Items(PART))}), {"a": {"b": [0]}}, "['a']['b'][0] is 0, not above 0 and at most 1"),
        (SCALAR, 6, " is 6, not at least -5 and at most 5"),
        (SCALAR, "abcd", " has 4 characters, not at most 3"),
        (SCALAR, {}, " is a dict, not bool or NoneType or float or int or str or list or tuple"),
        (Typed((dict,)), [], " is a list, not dict"),
    ],
    ids=quote,
)
def test_what_a_kind_refuses_is_told_behind_its_name(kind, value, problem):
    assert kind.problem(value) == problem


def test_every_problem_of_a_dicts_fields_is_found():
    found = dict(Fields({"a": COUNT, "b": COUNT}, required={"c"}).problems({"a": -1, "b": 2, "d": None}))
    assert found.keys() == {"c", "a"}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, b"\xff\xff", ""])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
