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


def is_id(text: str) -> bool:
    """Whether `text` could be an id of ours."""
    return _ID.match(text) is not None and len(text) == 26
