"""Identifiers: ULIDs in lower case, so that ids sort by the time they were made."""

import os
import re
import time
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
ID_PATTERN: Final = r"^[0-9a-z]{26}$"
_ID: Final = re.compile(ID_PATTERN)


def new_id() -> str:
    """A fresh id: 48 bits of milliseconds, 80 bits of randomness, 26 characters of Crockford's base 32."""
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


_INDEX_DIGITS: Final = 4
ARRAY_MAX: Final = 10_000
"""Tasks of one array; the digits would do for a million."""


def array_id() -> str:
    """A fresh id of an array: its last digits are zeros, in the place of which each of its tasks has its index."""
    return new_id()[:-_INDEX_DIGITS] + "0" * _INDEX_DIGITS


def id_in_array(array: str, index: int) -> str:
    """The id of one task of an array, which is the array's own for none: indexes are counted from 0, the digits from 1."""
    number = index + 1
    digits = "".join(_ALPHABET[number >> shift & 31] for shift in range(5 * (_INDEX_DIGITS - 1), -1, -5))
    return array[:-_INDEX_DIGITS] + digits


def is_array_id(text: str) -> bool:
    """Whether `text` could be an id of an array; one in a million of other ids could be too."""
    return is_id(text) and text.endswith("0" * _INDEX_DIGITS)


def is_id(text: str) -> bool:
    """Whether `text` could be an id of ours."""
    return _ID.match(text) is not None and len(text) == 26
