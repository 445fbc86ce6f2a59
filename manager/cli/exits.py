"""Exit codes, which scripts rely on, and which error gives which. docs/cli.md lists them; a test compares."""

import enum
from typing import Final

from manager.client_errors import ClusterUnreachable, NotFinished, TaskCancelled, TaskFailed, WaitTimeout
from manager.core import errors
from manager.core.errors import RocyardError


class Exit(enum.IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1  # the task failed or was cancelled; or the command could not do what it was asked
    USAGE = 2  # a wrong option, argument or setting; a process that is too old for its store
    NOT_FOUND = 3  # no such task, function, node or key
    NOT_AUTHORISED = 4  # no valid key, or one without the right
    UNREACHABLE = 5  # the cluster, or its store, does not answer
    TIMED_OUT = 6  # the wait is over, or there was none, and the task is not over
    REFUSED = 7  # understood, but not accepted: it could never fit, or a limit is reached
    UNHEALTHY = 8  # `rocyard doctor` has found something that fails
    INTERRUPTED = 130  # Ctrl-C


# The first that fits counts, so what is more special stands first.
_BY_ERROR: Final[tuple[tuple[type[RocyardError], Exit], ...]] = (
    (TaskFailed, Exit.FAILED),
    (TaskCancelled, Exit.FAILED),
    (WaitTimeout, Exit.TIMED_OUT),
    (NotFinished, Exit.TIMED_OUT),
    (ClusterUnreachable, Exit.UNREACHABLE),
    (errors.StoreTooNew, Exit.USAGE),
    (errors.StoreUnavailable, Exit.UNREACHABLE),
    (errors.NotFound, Exit.NOT_FOUND),
    (errors.Unauthorized, Exit.NOT_AUTHORISED),
    (errors.Forbidden, Exit.NOT_AUTHORISED),
    (errors.Infeasible, Exit.REFUSED),
    (errors.QuotaExceeded, Exit.REFUSED),
    (errors.StoreFull, Exit.REFUSED),
    (errors.BadRequest, Exit.USAGE),
    (errors.Unprocessable, Exit.USAGE),
    (errors.TooLarge, Exit.USAGE),
    (errors.UnsupportedMediaType, Exit.USAGE),
    (errors.SettingsError, Exit.USAGE),
    (RocyardError, Exit.FAILED),
)


def exit_of(error: RocyardError) -> Exit:
    """The exit code for `error`."""
    return next(code for cls, code in _BY_ERROR if isinstance(error, cls))
