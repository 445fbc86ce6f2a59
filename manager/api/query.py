"""Query parameters: each route names those that it takes, and anything else is refused. Pure, with bounded caches."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl

from manager.api.body import near
from manager.core.errors import BadRequest
from manager.core.quantities import parse_duration

QUERY_BYTES_MAX: Final = 4096
_SECRETS: Final = frozenset({"key", "api_key", "apikey", "token", "access_token", "authorization"})


@lru_cache(maxsize=1024)
def parse_query(raw: bytes, known: tuple[str, ...]) -> Mapping[str, str]:
    """The parameters of a query string.

    Args:
        raw: as it stands in the URL.
        known: what the route takes.

    Raises:
        BadRequest: one that is not known, or stands twice, or is not UTF-8.
    """
    if not raw:
        return {}
    if len(raw) > QUERY_BYTES_MAX:
        raise BadRequest(f"The query is over {QUERY_BYTES_MAX} bytes.")
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=32)
    except (UnicodeDecodeError, ValueError):
        raise BadRequest("The query cannot be read: write name=value&name=value, percent-encoded UTF-8.") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name.lower() in _SECRETS:
            raise BadRequest("A key is never taken from a URL: send 'Authorization: Bearer ry_…'.")
        if name not in known:
            takes = f" It takes: {', '.join(known)}." if known else " This route takes none."
            raise BadRequest(f"There is no parameter {name[:80]!r}.{near(name, known)}{takes}", field=name[:80])
        if name in found:
            raise BadRequest(f"{name}: it stands twice.", field=name)
        found[name] = value
    return found


@lru_cache(maxsize=256)
def wait_s(text: str, most_s: float) -> float:
    """Seconds to wait, cut to `most_s`.

    Raises:
        BadRequest: no duration.
    """
    try:
        return min(parse_duration(text), most_s)
    except ValueError as error:
        raise BadRequest(f"wait: {error}.", field="wait") from None


def whole_number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        BadRequest: another one, or none at all.
    """
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise BadRequest(f"{name}: {text[:40]!r} is not a whole number from {low} to {high}.", field=name)
    return int(text)


def yes_or_no(query: Mapping[str, str], name: str) -> bool:
    """``true`` or ``false``, the latter where it is left out.

    Raises:
        BadRequest: something else.
    """
    text = query.get(name, "false")
    if text not in {"true", "false"}:
        raise BadRequest(f"{name}: write true or false.", field=name)
    return text == "true"


def one_of(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """One of `allowed`, or an empty text where it is left out.

    Raises:
        BadRequest: something else.
    """
    text = query.get(name, "")
    if text and text not in allowed:
        raise BadRequest(f"{name}: {text[:40]!r} is none of {', '.join(allowed)}.{near(text, allowed)}", field=name)
    return text
