"""COCO's run lengths: the numbers of zeros and ones, in turn, down the columns of a mask."""

from __future__ import annotations

from typing import Any

LONGEST = 13  # characters of a number; a damaged text could go on


def decode_counts(counts: Any) -> list[int]:
    """The run lengths, given as a list or as COCO's compressed text; ValueError for anything else.

    COCO's own decoder trusts its text and would read and write beyond its memory.
    """
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("its run lengths are not counts")
        return counts
    if not isinstance(counts, str):
        raise ValueError(f"its run lengths are a {type(counts).__name__}")
    decoded: list[int] = []
    number = shift = 0
    for character in counts:
        # Five bits a character, the lowest first; bit 5 says that more follow, bit 4 of the last is the sign.
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 5 * LONGEST:
            raise ValueError("its run lengths are no compressed text")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        if len(decoded) > 2:  # from the third on, the difference to the one before the last
            number += decoded[-2]
        if number < 0:
            raise ValueError("its run lengths are not counts")
        decoded.append(number)
        number = shift = 0
    if shift:
        raise ValueError("its run lengths are cut short")
    return decoded
