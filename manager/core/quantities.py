"""Memory sizes and durations: text for people, integers for machines.

Owns parsing and printing of quantities. Memory is integer bytes everywhere inside; ``GiB`` text is for people only.
"""

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
TIB: Final = 1024**4

# The largest request that is still a request and not a typing error: more than any node's memory will be for years.
MEMORY_BYTES_MAX: Final = 1024 * TIB

_MEMORY_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "ki": KIB,
    "kib": KIB,
    "mi": MIB,
    "mib": MIB,
    "gi": GIB,
    "gib": GIB,
    "ti": TIB,
    "tib": TIB,
}
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER: Final = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*")


def parse_memory(text: str | int) -> int:
    """Bytes of a size such as ``"24GiB"``, ``"500 MB"`` or ``1073741824``.

    Args:
        text: a number of bytes, or a number with a unit (``KiB MiB GiB TiB``, decimal ``kB MB GB TB``).

    Returns:
        Whole bytes, rounded down, from 1 to `MEMORY_BYTES_MAX`.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size: write a number of bytes or a text such as '24GiB'")  # noqa: TRY004
    if isinstance(text, int):
        size = text
    else:
        match = _NUMBER.fullmatch(text)
        unit = match.group(2).lower() if match else None
        if match is None or unit not in _MEMORY_UNITS:
            raise ValueError(f"{text[:40]!r} is not a size: write a number and a unit, such as '24GiB' or '512MiB'")
        size = int(float(match.group(1)) * _MEMORY_UNITS[unit])
    if not 1 <= size <= MEMORY_BYTES_MAX:
        raise ValueError(f"{text!r} is out of range: a size is from 1 byte to {format_memory(MEMORY_BYTES_MAX)}")
    return size


def format_memory(size_bytes: int) -> str:
    """`size_bytes` for people: ``"24 GiB"``, ``"1.5 GiB"``, ``"300 MiB"``, ``"0"``."""
    if size_bytes == 0:
        return "0"
    sign = "-" if size_bytes < 0 else ""
    size = abs(size_bytes)
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{sign}{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{sign}{size} B"


def parse_duration(text: str | float) -> float:
    """Seconds of a duration such as ``"90s"``, ``"5m"``, ``"1.5h"`` or ``30``.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a duration: write seconds or a text such as '90s', '5m', '1h'")  # noqa: TRY004
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        match = _NUMBER.fullmatch(text)
        unit = match.group(2).lower() if match else None
        if match is None or unit not in _DURATION_UNITS:
            raise ValueError(f"{text[:40]!r} is not a duration: write seconds or a text such as '90s', '5m', '1h'")
        seconds = float(match.group(1)) * _DURATION_UNITS[unit]
    if not 0 <= seconds <= 366 * 86400:
        raise ValueError(f"{text!r} is out of range: a duration is from 0 to 366 days")
    return seconds


def format_duration(seconds: float) -> str:
    """`seconds` for people: ``"12 ms"``, ``"3.2 s"``, ``"4m 10s"``, ``"2h 05m"``."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{int(seconds) // 60}m {int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h {int(seconds) % 3600 // 60:02d}m"
