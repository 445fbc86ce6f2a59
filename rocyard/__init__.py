"""Rocyard's public face: ``rocyard.Client``, ``rocyard.gpu`` for people who use Dask, the errors of both, and what a running
function can say of itself, such as ``rocyard.progress``.

    import rocyard

    with rocyard.Client() as client:  # the cluster of this machine, or that of ROCYARD_URL and ROCYARD_API_KEY
        print(client.submit("echo", {"x": 1}, memory="1GiB").result())

Names are loaded when they are first used: task functions import this package too, where little else is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from manager.client_errors import (
        ClusterUnreachable,
        NotFinished,
        TaskCancelled,
        TaskFailed,
        UnexpectedAnswer,
        WaitTimeout,
    )
    from manager.client_tasks import Array, Task, task_request
    from manager.core.errors import (
        BadRequest,
        DeadlinePassed,
        Forbidden,
        FunctionNotFound,
        IdempotencyConflict,
        Infeasible,
        InvalidArguments,
        NameTaken,
        NotFound,
        QuotaExceeded,
        ResultMissing,
        RocyardError,
        SettingsError,
        StoreFull,
        StoreUnavailable,
        TooLarge,
        Unauthorized,
        UnknownDependency,
        Unprocessable,
        UnsupportedMediaType,
    )
    from manager.core.gpu_tasks import (
        GpuAnnotationRefused,
        GpuResultUnreadable,
        GpuTaskCrashed,
        GpuTaskError,
        MemoryExceeded,
    )
    from rocyard.client import Client
    from rocyard.gpu_tasks import explain, gpu
    from rocyard.task import array_index, attempt, checkpoint, checkpoint_folder, last_checkpoint, progress, task_id

__all__ = [
    "Array",
    "BadRequest",
    "Client",
    "ClusterUnreachable",
    "DeadlinePassed",
    "Forbidden",
    "FunctionNotFound",
    "GpuAnnotationRefused",
    "GpuResultUnreadable",
    "GpuTaskCrashed",
    "GpuTaskError",
    "IdempotencyConflict",
    "Infeasible",
    "InvalidArguments",
    "MemoryExceeded",
    "NameTaken",
    "NotFinished",
    "NotFound",
    "QuotaExceeded",
    "ResultMissing",
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
    "UnknownDependency",
    "Unprocessable",
    "UnsupportedMediaType",
    "WaitTimeout",
    "array_index",
    "attempt",
    "checkpoint",
    "checkpoint_folder",
    "explain",
    "gpu",
    "last_checkpoint",
    "progress",
    "task_id",
    "task_request",
]

_ELSEWHERE: Final = {
    "Client": "rocyard.client",
    "Array": "manager.client_tasks",
    "Task": "manager.client_tasks",
    "task_request": "manager.client_tasks",
    "ClusterUnreachable": "manager.client_errors",
    "NotFinished": "manager.client_errors",
    "TaskCancelled": "manager.client_errors",
    "TaskFailed": "manager.client_errors",
    "UnexpectedAnswer": "manager.client_errors",
    "WaitTimeout": "manager.client_errors",
    "gpu": "rocyard.gpu_tasks",
    "explain": "rocyard.gpu_tasks",
    "GpuAnnotationRefused": "manager.core.gpu_tasks",
    "GpuResultUnreadable": "manager.core.gpu_tasks",
    "GpuTaskCrashed": "manager.core.gpu_tasks",
    "GpuTaskError": "manager.core.gpu_tasks",
    "MemoryExceeded": "manager.core.gpu_tasks",
    "array_index": "rocyard.task",
    "attempt": "rocyard.task",
    "checkpoint": "rocyard.task",
    "checkpoint_folder": "rocyard.task",
    "last_checkpoint": "rocyard.task",
    "progress": "rocyard.task",
    "task_id": "rocyard.task",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rocyard' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "manager.core.errors")), name)
