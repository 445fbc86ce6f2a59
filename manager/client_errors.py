"""What the client can tell its caller beyond the errors of `manager.core.errors`, and how an answer becomes an exception."""

from typing import Any, ClassVar, Final

import msgspec

from manager.core import errors
from manager.core.errors import RocyardError
from manager.core.model import TaskError


class ClusterUnreachable(RocyardError):
    """The cluster does not answer."""

    retryable = True


class TaskFailed(RocyardError):
    """The task has failed: `type`, `message` and `traceback` are those of its last attempt."""

    def __init__(self, task_id: str, type: str, message: str, traceback: str = "") -> None:  # noqa: A002 -- as on the wire
        error = {"type": type, "message": message, "traceback": traceback}
        super().__init__(f"{type}: {message} (task {task_id})", task_id=task_id, error=error)
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


class NotFinished(RocyardError):
    """The task has not ended: it has no result yet."""

    retryable = True


class WaitTimeout(RocyardError, TimeoutError):
    """The task has not ended in the time given; it goes on."""

    retryable: ClassVar[bool] = True


class UnexpectedAnswer(RocyardError):
    """The server answered something that this client does not understand: are their versions the same?"""


def failure_of(task_id: str, error: TaskError | None) -> TaskFailed:
    """The exception for a task that has failed."""
    if error is None:
        return TaskFailed(task_id, "Unknown", "the task failed and left no reason")
    return TaskFailed(task_id, error.type, error.message, error.traceback)


class _Problem(msgspec.Struct, frozen=True):
    """As much of a problem+json as is needed; a proxy's error page has none of it."""

    detail: str = ""
    title: str = ""
    code: str = ""


class _NoResult(msgspec.Struct, frozen=True):
    """What a problem adds about a task that has no result."""

    task_id: str
    error: TaskError | None = None


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


_BY_CODE: Final = {name: cls for name, cls in _tree(RocyardError).items() if cls.__module__ == errors.__name__} | {
    NotFinished.__name__: NotFinished
}


def error_of(status: int, body: bytes) -> RocyardError:
    """The exception for an answer that is no success: that of its code, else that of its status; the server's words."""
    try:
        problem = _decode_problem(body)
        fields = _decode_fields(body)
        if problem.code in {TaskFailed.__name__, TaskCancelled.__name__}:
            task = msgspec.convert(fields, _NoResult)
            failed = problem.code == TaskFailed.__name__
            return failure_of(task.task_id, task.error) if failed else TaskCancelled(task.task_id)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem, fields = _Problem(), {}
    cls = _BY_CODE.get(problem.code) or _BY_STATUS.get(status) or RocyardError
    words = problem.detail or problem.title
    details = {name: value for name, value in fields.items() if name not in _SHOWN_ELSEWHERE}
    return cls(words or f"The server answered {status}: {body[:200].decode(errors='replace').strip() or 'nothing'}", **details)
