"""Small pieces of text for screens: times, sizes, bars, and other people's words made safe for a terminal. Pure."""

import datetime as dt
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from manager.core.quantities import format_duration, format_memory

# Control characters can move the cursor, rewrite what was printed, or answer questions in the reader's name.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLOUR: Final = re.compile(r"(\x1b\[[0-9;]{0,20}m)")
NONE: Final = "–"


def plain(text: str) -> str:
    """`text` without control characters; line breaks and tabs stay."""
    return _CONTROL.sub("�", text)


def coloured(text: str) -> str:
    """As `plain`, but escapes that only set colours stay: programs that write logs do that."""
    return "".join(part if _COLOUR.fullmatch(part) else plain(part.replace("\r\n", "\n")) for part in _COLOUR.split(text))


def one_line(text: str, width: int = 200) -> str:
    """`text` in one line of at most `width` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def wrapped(text: str, width: int) -> str:
    """`text` with its long lines broken between words; indented ones are code, and stay."""
    lines = (
        line if len(line) <= width or line.startswith(" ") else textwrap.fill(line, width, break_on_hyphens=False)
        for line in text.split("\n")
    )
    return "\n".join(lines)


def ago(moment: dt.datetime | None, now: dt.datetime) -> str:
    """``12s ago``, ``3m ago``, ``2h ago``, ``5d ago``. What lies ahead by another clock is now."""
    if moment is None:
        return NONE
    seconds = max(0, int((now - moment).total_seconds()))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def span(start: dt.datetime | None, end: dt.datetime | None) -> str:
    """How long it took from `start` to `end`."""
    if start is None or end is None:
        return NONE
    return format_duration(max(0.0, (end - start).total_seconds()))


def clock(moment: dt.datetime | None) -> str:
    """A moment in UTC, to the millisecond."""
    return NONE if moment is None else f"{moment.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def seconds(value: float | None) -> str:
    """A duration, or a dash."""
    return NONE if value is None else format_duration(value)


def memory(size_bytes: int, gpus: int = 1) -> str:
    """``24 GiB``, or ``2 × 24 GiB``."""
    return format_memory(size_bytes) if gpus == 1 else f"{gpus} × {format_memory(size_bytes)}"


def count(number: int, noun: str) -> str:
    """``1 task``, ``3 tasks``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def bar(parts: Sequence[tuple[float, str]], width: int) -> list[tuple[str, str]]:
    """A bar of `width` characters.

    Args:
        parts: share of the whole (0 to 1) and character, from left to right. Any share above 0 shows as one character.
        width: characters in all; the rest is ``·``.

    Returns:
        Runs of (character, text), so that the caller can colour each.
    """
    left = width
    runs: list[tuple[str, str]] = []
    for share, character in parts:
        length = min(left, max(round(share * width), 1 if share > 0 else 0))
        if length:
            runs.append((character, character * length))
            left -= length
    if left:
        runs.append(("·", "·" * left))
    return runs


def arguments_of(schema: Mapping[str, Any] | None) -> list[str]:
    """The arguments in a JSON Schema: ``seconds: number``, ``memory_bytes: integer = 0``."""
    if schema is None:
        return []
    definitions = schema.get("$defs", {})
    target = schema
    if "$ref" in schema:
        target = definitions.get(str(schema["$ref"]).rpartition("/")[2], {})
    required = set(target.get("required", ()))
    found = []
    for name, field in target.get("properties", {}).items():
        text = f"{name}: {_kind(field)}"
        if "default" in field:
            text += f" = {field['default']!r}"
        elif name not in required:
            text += " (optional)"
        found.append(plain(text))
    if target.get("additionalProperties", False) is not False or not target:
        found.append("any others")
    return found


def _kind(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " or ".join(repr(value) for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    return str(field.get("type", "anything"))
