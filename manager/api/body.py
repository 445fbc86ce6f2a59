"""From the bytes of a body to a checked request: strict JSON, and errors that say where and what would be right.

Refuses before decoding what could hurt (depth) and what decoders forgive (duplicate keys, NaN, numbers that overflow,
lone surrogates). Pure: bytes in, values out.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from manager.core.errors import BadRequest
from manager.core.requests import (
    TASKS_PER_BATCH_MAX,
    DrainRequest,
    KeyRequest,
    PlanRequest,
    Request,
    ResourceRequest,
    TaskRequest,
    UnloadRequest,
    WarmRequest,
)

DEPTH_MAX: Final = 32
"""Far over any honest request, far under what a recursive decoder can bear."""

_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]")
_STRINGS: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<field>.*?)`(?: - at `(?P<path>.*)`)?$", re.DOTALL)
_HINTS: Final = {
    "deadline": "Write a time in UTC, or with its offset: '2027-01-31T18:00:00Z'.",
    "name": "Up to 128 letters, digits and . _ : / -, the first of them a letter or a digit.",
    "retry_on": "Write names of exceptions, such as 'ConnectionError'.",
    "after": "Write up to 100 ids of tasks; in a batch also numbers of tasks that stand before it.",
}
_PLACE: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>.*)`)?$", re.DOTALL)

R = TypeVar("R", bound=Request)


class _Many(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`BatchRequest` with its tasks undecoded, so that an error can name the one that it is in."""

    tasks: tuple[msgspec.Raw, ...]


_task = msgspec.json.Decoder(TaskRequest).decode
_plan = msgspec.json.Decoder(PlanRequest).decode
_many = msgspec.json.Decoder(_Many).decode


def task_request(body: bytes) -> tuple[TaskRequest, dict[str, Any]]:
    """One task, and its arguments as plain values.

    Raises:
        BadRequest: says where, and what would be right.
    """
    return _with_arguments(body, _task, TaskRequest)


def plan_request(body: bytes) -> tuple[PlanRequest, dict[str, Any]]:
    """Tasks that are asked about, and their arguments as plain values.

    Raises:
        BadRequest: says where, and what would be right.
    """
    return _with_arguments(body, _plan, PlanRequest)


def _with_arguments(body: bytes, decode: Callable[[bytes], R], kind: type[R]) -> tuple[R, dict[str, Any]]:
    """A request that has arguments, and these as plain values."""
    tree = checked_json(body)
    try:
        request = decode(body)
    except msgspec.ValidationError as error:
        _refuse(str(error), kind)
    return request, _object(tree.get("args", {}), "args")


def batch_request(body: bytes) -> list[tuple[TaskRequest, dict[str, Any]]]:
    """The tasks of a batch, each with its arguments as plain values.

    Raises:
        BadRequest: says in which task, where, and what would be right.
    """
    tree = checked_json(body)
    try:
        raw = _many(body).tasks
    except msgspec.ValidationError as error:
        _refuse(str(error), _Many)
    if not 1 <= len(raw) <= TASKS_PER_BATCH_MAX:
        raise BadRequest(f"tasks: a batch has from 1 to {TASKS_PER_BATCH_MAX} tasks, this one has {len(raw)}.")
    found: list[tuple[TaskRequest, dict[str, Any]]] = []
    for number, (part, plain) in enumerate(zip(raw, tree["tasks"], strict=True)):
        try:
            found.append((_task(part), _object(plain.get("args", {}), f"tasks[{number}].args")))
        except msgspec.ValidationError as error:
            _refuse(str(error), TaskRequest, f"tasks[{number}]")
    return found


def key_request(body: bytes) -> KeyRequest:
    """The key that is asked for.

    Raises:
        BadRequest: says where, and what would be right.
    """
    return plain_request(body, KeyRequest)


def plain_request(body: bytes, kind: type[R]) -> R:
    """The request of that kind.

    Raises:
        BadRequest: says where, and what would be right.
    """
    checked_json(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _refuse(str(error), kind)


def checked_json(body: bytes) -> Any:
    """`body` as plain values, if it is strict JSON of bounded depth without duplicate keys.

    Raises:
        BadRequest: says what is wrong with it.
    """
    _check_depth(body)
    try:
        tree = _strict.decode(body.decode())
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8: byte {error.start} cannot stand there.") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        said = "a number has too many digits" if "digits" in str(error) else str(error)[:300]
        raise BadRequest(f"The body is not JSON that can be taken: {said}.") from None
    if b"\\u" in body:
        try:
            msgspec.json.decode(body)  # Python's own decoder forgives half of a surrogate pair
        except msgspec.DecodeError:
            raise BadRequest("The body is not JSON: a \\u escape in it is half of a surrogate pair.") from None
    if not isinstance(tree, dict):
        raise BadRequest("The body must be a JSON object: {…}.")
    return tree


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{field}: Expected `object`, the keyword arguments by name.", field=field)
    return value


def near(name: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """``" Did you mean 'x'?"`` where one of `known` is like `name`, else nothing."""
    found = difflib.get_close_matches(name[:100], list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(one) for one in found)}?" if found else ""


def _check_depth(body: bytes) -> None:
    """Refuses nesting above `DEPTH_MAX` without recursion, and without a Python step for each character."""
    if body.count(b"{") + body.count(b"[") <= DEPTH_MAX:
        return
    brackets = _STRINGS.sub(b"", body).translate(_BRACKETS, _ALL_BUT_BRACKETS.replace(b"{", b"").replace(b"}", b""))
    for _ in range(DEPTH_MAX):
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"")  # takes exactly the innermost level away
        if len(brackets) == before:
            break
    if b"[" in brackets:  # deeper than that, or not closed, which is no JSON either
        raise BadRequest(f"The body is nested deeper than {DEPTH_MAX} levels, or its brackets are not closed.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} stands twice in one object")
            seen.add(name)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_strict = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=_no_constant)

_FIELDS: Final[dict[type[msgspec.Struct], dict[str, tuple[str, ...]]]] = {
    TaskRequest: {"": TaskRequest.__struct_fields__, "resources": ResourceRequest.__struct_fields__},
    PlanRequest: {"": PlanRequest.__struct_fields__, "resources": ResourceRequest.__struct_fields__},
    _Many: {"": _Many.__struct_fields__},
    KeyRequest: {"": KeyRequest.__struct_fields__},
    DrainRequest: {"": DrainRequest.__struct_fields__},
    WarmRequest: {"": WarmRequest.__struct_encode_fields__, "resources": ResourceRequest.__struct_fields__},
    UnloadRequest: {"": UnloadRequest.__struct_fields__, "resources": ResourceRequest.__struct_fields__},
}


def _refuse(message: str, kind: type[msgspec.Struct], within: str = "") -> NoReturn:
    """Turns a decoder's message into an error that names the field."""
    unknown = _UNKNOWN.match(message)
    match = unknown or _PLACE.match(message)
    assert match is not None
    path = (match.group("path") or "").removeprefix("$").removeprefix(".")
    field = ".".join(part for part in (within, path) if part)
    if unknown is not None:
        name = unknown.group("field")[:80]
        known = _FIELDS[kind].get(path, ())
        field = f"{field}.{name}" if field else name
        raise BadRequest(f"{field}: there is no such field.{near(name, known)}", field=field, known=list(known))
    what = match.group("what")
    hint = _HINTS.get(path.partition("[")[0], "") if kind in {TaskRequest, PlanRequest} else ""
    raise BadRequest(f"{field}: {what}. {hint}".rstrip() if field else f"{what}.", field=field)
