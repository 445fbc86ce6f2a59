"""Dask tasks that somebody has annotated with ``gpu``: which there are, and which slot each of them has now.

Each time that such a task is to run it gets a slot of its own, under an id of its own. This module owns that book, and what
is done to the tasks at the scheduler; when they may run is the ledger's.
"""

from typing import Any, Final

import msgspec
from dask._task_spec import Task
from distributed.scheduler import TaskState

from manager.core.gpu_tasks import GPU_ANNOTATION, GpuAnnotationRefused, direct_shape, gpu_resources
from manager.core.ids import new_id
from manager.core.lifecycle import SlotKind
from manager.core.shapes import Shape
from plugins.gpu_executor import GPU_EXECUTOR
from plugins.ledger import SlotRequest
from plugins.slot import ASSIGNED

_RESOURCES: Final = (
    "a task with a gpu annotation cannot have resources= as well: the workers of GPU nodes declare none, so it would wait for "
    "ever; say what it needs in the annotation"
)
_ACTOR: Final = (
    "an actor cannot have a gpu annotation: it lives in the Dask worker, which sees no device; use tasks, or a model in a slot "
    "(rocyard.Client)"
)


class DirectTask(msgspec.Struct):
    """One task.

    Attributes:
        key: Dask's.
        shape: of each of its slots.
        places: workers or hosts of which its user wants one; empty: any.
        slot_id: its present slot, placed or wanted; empty while it waits for its dependencies, or has ended.
    """

    key: Any
    shape: Shape
    places: frozenset[str]
    slot_id: str = ""


class DirectTasks:
    """All of them, by key and by slot."""

    def __init__(self) -> None:
        self.by_key: dict[Any, DirectTask] = {}
        self.keys: dict[str, Any] = {}  # slot → key

    def take(self, task: TaskState, wanted: Any) -> DirectTask | None:
        """A new task with a ``gpu`` annotation. One that cannot be is made to fail with the reason, and is None."""
        try:
            resources = gpu_resources(wanted)
        except GpuAnnotationRefused as error:
            refuse(task, str(error))
            return None
        if task.actor or task.resource_restrictions:
            refuse(task, _ACTOR if task.actor else _RESOURCES)
            return None
        found = DirectTask(task.key, direct_shape(resources), _places_of(task))
        self.by_key[task.key] = found
        # Replaced, not changed: the same dict may belong to other tasks of the graph.
        task.annotations = {**(task.annotations or {}), "executor": GPU_EXECUTOR}
        return found

    def want(self, direct: DirectTask, task: TaskState) -> SlotRequest:
        """The task is ready to run: a request for a slot of its own."""
        direct.slot_id = new_id()
        self.keys[direct.slot_id] = direct.key
        assert task.priority is not None
        return SlotRequest(direct.slot_id, direct.shape, "", task.priority, SlotKind.DIRECT, direct.places)

    def release(self, direct: DirectTask, task: TaskState | None) -> str:
        """The task has no slot any more; which one it had, or nothing."""
        slot_id, direct.slot_id = direct.slot_id, ""
        self.keys.pop(slot_id, None)
        if task is not None and task.annotations and ASSIGNED in task.annotations:
            task.annotations = {name: value for name, value in task.annotations.items() if name != ASSIGNED}
        return slot_id


def refuse(task: TaskState, reason: str) -> None:
    """The task fails with `reason`, wherever it runs."""
    task.run_spec = Task(task.key, _raise, reason)
    task.actor = False
    task.annotations = {name: value for name, value in (task.annotations or {}).items() if name != GPU_ANNOTATION}
    task.resource_restrictions = None


def _raise(message: str) -> None:
    raise GpuAnnotationRefused(message)


def _places_of(task: TaskState) -> frozenset[str]:
    """What the user's ``workers=`` names; with ``allow_other_workers`` it is a wish, and any node will do."""
    if task.loose_restrictions:
        return frozenset()
    return frozenset((task.worker_restrictions or set()) | (task.host_restrictions or set()))
