"""What the client can tell its caller beyond the server's own errors, and how an answer becomes an exception."""

from typing import Any, ClassVar, Final

import msgspec

from manager.core import errors
from manager.core.errors import RocyardError


class ClusterUnreachable(RocyardError):
    """The cluster does not answer."""

    retryable = True


class TaskFailed(RocyardError):
    """The task has failed: `type`, `message` and `traceback` are those of its last attempt."""

    def __init__(self, task_id: str, type: str, message: str, traceback: str = "") -> None:  # noqa: A002 -- as on the wire
        super().__init__(f"{type}: {message} (task {task_id})", task_id=task_id)
        self.task_id = task_id
        self.type = type
        self.message = message
        self.traceback = traceback
        if traceback:
            self.add_note(f"Where it ran:\n{traceback.rstrip()}")


class TaskCancelled(RocyardError):
    """The task was cancelled."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"Task {task_id} was cancelled.", task_id=task_id)
        self.task_id = task_id


class WaitTimeout(RocyardError, TimeoutError):
    """The task has not ended in the time given; it goes on."""

    retryable: ClassVar[bool] = True


class UnexpectedAnswer(RocyardError):
    """The server answered something that this client does not understand: are their versions the same?"""


class _Problem(msgspec.Struct, frozen=True):
    """As much of a problem+json as is needed; a proxy's error page has none of it."""

    detail: str = ""
    title: str = ""
    code: str = ""


_decode_problem = msgspec.json.Decoder(_Problem).decode
_decode_fields = msgspec.json.Decoder(dict[str, Any]).decode
_SHOWN_ELSEWHERE: Final = frozenset({"type", "title", "status", "detail", "code", "instance", "retryable"})

_BY_STATUS: Final[dict[int, type[RocyardError]]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.BadRequest,
    413: errors.TooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.Unprocessable,
    429: errors.QuotaExceeded,
    502: ClusterUnreachable,
    503: errors.StoreUnavailable,
    504: ClusterUnreachable,
}


def _tree(root: type[RocyardError]) -> dict[str, type[RocyardError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE: Final = {name: cls for name, cls in _tree(RocyardError).items() if cls.__module__ == errors.__name__}


def error_of(status: int, body: bytes) -> RocyardError:
    """The exception for an answer that is no success: that of its code, else that of its status; the server's words."""
    try:
        problem = _decode_problem(body)
        fields = _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem, fields = _Problem(), {}
    cls = _BY_CODE.get(problem.code) or _BY_STATUS.get(status) or RocyardError
    words = problem.detail or problem.title
    details = {name: value for name, value in fields.items() if name not in _SHOWN_ELSEWHERE}
    return cls(words or f"The server answered {status}: {body[:200].decode(errors='replace').strip() or 'nothing'}", **details)
