"""Rocyard's public face: ``rocyard.Client``, and the errors it raises.

    import rocyard

    with rocyard.Client() as client:  # the cluster of this machine, or that of ROCYARD_URL and ROCYARD_API_KEY
        print(client.submit("echo", {"x": 1}, memory="1GiB").result())

Names are loaded when they are first used: task functions import this package too, where little else is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from manager.client import Task, task_request
    from manager.client_errors import ClusterUnreachable, TaskCancelled, TaskFailed, UnexpectedAnswer, WaitTimeout
    from manager.core.errors import (
        BadRequest,
        Forbidden,
        FunctionNotFound,
        Infeasible,
        InvalidArguments,
        NotFound,
        QuotaExceeded,
        RocyardError,
        SettingsError,
        StoreFull,
        StoreUnavailable,
        TooLarge,
        Unauthorized,
        Unprocessable,
        UnsupportedMediaType,
    )
    from rocyard.client import Client

__all__ = [
    "BadRequest",
    "Client",
    "ClusterUnreachable",
    "Forbidden",
    "FunctionNotFound",
    "Infeasible",
    "InvalidArguments",
    "NotFound",
    "QuotaExceeded",
    "RocyardError",
    "SettingsError",
    "StoreFull",
    "StoreUnavailable",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "TooLarge",
    "Unauthorized",
    "UnexpectedAnswer",
    "Unprocessable",
    "UnsupportedMediaType",
    "WaitTimeout",
    "task_request",
]

_ELSEWHERE: Final = {
    "Client": "rocyard.client",
    "Task": "manager.client",
    "task_request": "manager.client",
    "ClusterUnreachable": "manager.client_errors",
    "TaskCancelled": "manager.client_errors",
    "TaskFailed": "manager.client_errors",
    "UnexpectedAnswer": "manager.client_errors",
    "WaitTimeout": "manager.client_errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rocyard' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "manager.core.errors")), name)
