"""Errors as application/problem+json: every refusal of the API has this one form.

Owns the errors that only an HTTP API has, and how an error becomes bytes. A body never shows a stack, a path of this
machine or a secret: an exception that is not one of ours becomes one fixed text.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from manager.core.errors import RocyardError

PROBLEM_JSON: Final = b"application/problem+json"
INSTANCE_CHARS_MAX: Final = 200
RETRY_AFTER_S: Final = 1
"""A store that restarts is back within a second, and a queue has moved on."""


class MethodNotAllowed(RocyardError):
    """That method is not for this path."""

    status = 405


class RequestTimeout(RocyardError):
    """The request's body did not come in time."""

    status = 408
    retryable = True


class NotFinished(RocyardError):
    """The task has not ended: ask with '?wait=30s' for the task, or again later."""

    status = 409
    retryable = True


class TaskFailed(RocyardError):
    """The task failed: it has no result."""

    status = 409


class TaskCancelled(RocyardError):
    """The task was cancelled: it has no result."""

    status = 409


class HeadTooLarge(RocyardError):
    """The request's line and headers are over the limit."""

    status = 431


class InternalError(RocyardError):
    """Something went wrong in the API itself; its log has the details under this request's X-Request-Id."""


class Overloaded(RocyardError):
    """The API has as many requests in hand as it takes; nothing was accepted. Try again."""

    status = 503
    retryable = True


_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")
_encode = msgspec.json.Encoder(enc_hook=str).encode


def title_of(code: str) -> str:
    """``InvalidArguments`` → ``Invalid arguments``."""
    return _WORDS.sub(" ", code).capitalize()


def problem(error: RocyardError, path: str) -> bytes:
    """The body of the answer to a request for `path` that ended in `error`."""
    code = error.code
    body: dict[str, Any] = {
        "type": f"urn:rocyard:{code}",
        "title": title_of(code),
        "status": error.status,
        "detail": str(error),
        "code": code,
        "instance": path[:INSTANCE_CHARS_MAX],
        "retryable": error.retryable,
    }
    body.update(_own(error.details, body))
    return _encode(body)


def headers(error: RocyardError) -> list[tuple[bytes, bytes]]:
    """Headers that the error's status asks for."""
    match error.status:
        case 401:
            return [(b"www-authenticate", b"Bearer")]
        case 429 | 503:
            return [(b"retry-after", b"%d" % RETRY_AFTER_S)]
        case _:
            return []


def _own(details: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    """What the error adds; it may not replace what every problem has."""
    return {name: value for name, value in details.items() if name not in taken}
