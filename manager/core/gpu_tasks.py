"""What somebody asks for who uses Dask directly (``dask.annotate(gpu=…)``), and how such a task of theirs can fail.

Owns the annotation's form and the errors, since both sides need them: `rocyard.gpu` checks before anything is sent, the
scheduler plugin checks again, and the errors travel from the worker to the client. It knows nothing of Dask.

    RocyardError
    └── GpuTaskError
        ├── GpuAnnotationRefused   the annotation cannot be read, or the task can never be placed
        ├── GpuTaskCrashed         the task's own process ended
        ├── MemoryExceeded         it took more device memory than it had asked for
        └── GpuResultUnreadable    what it returned cannot be read where no device is
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from manager.core.errors import RocyardError
from manager.core.placement import Verdict
from manager.core.quantities import format_memory
from manager.core.requests import ResourceRequest
from manager.core.shapes import GPUS_MAX, Grant, Resources, Shape, shape_of
from manager.core.wanted import WrongField, more_words_of, resources_of

GPU_ANNOTATION: Final = "gpu"
DIRECT_TENANT: Final = "dask"
"""All who hold a certificate of the Dask scheduler are administrators, so they share one tenant."""
_KEYS: Final = ("memory", "count", *(name for name in ResourceRequest.__struct_fields__ if name not in {"memory", "gpus"}))
_EXAMPLE: Final = 'write gpu={"memory": "16GiB", "count": 1}'


class GpuTaskError(RocyardError):
    """A GPU task of a Dask client failed."""


class GpuAnnotationRefused(GpuTaskError):
    """The gpu annotation of a Dask task cannot be read."""

    status = 422


class GpuTaskCrashed(GpuTaskError):
    """The process of a GPU task ended before the task did."""


class MemoryExceeded(GpuTaskError):
    """A GPU task used more device memory than it had asked for."""


class GpuResultUnreadable(GpuTaskError):
    """The result of a GPU task cannot be read in the Dask worker, which sees no device."""


class GpuExplanation(msgspec.Struct, frozen=True):
    """Why a Dask task with a gpu annotation is where it is.

    Attributes:
        state: ``held`` (it could run, and waits for room), ``placed``, or as Dask has it; ``plain`` for a task without a
            gpu annotation, ``unknown`` for no such task.
        memory_bytes: what it leases on each device: what was asked for, rounded up.
        gpus: how many devices.
        resources: all that was asked for, where that is known.
        slot_id, grant: where it runs.
        before: tasks of its size that are to be placed before it.
        verdicts: what each node says to it, while it is held; empty where there is room, and others are before it.
    """

    state: str
    memory_bytes: int = 0
    gpus: int = 0
    slot_id: str = ""
    grant: Grant | None = None
    before: int = 0
    verdicts: tuple[Verdict, ...] = ()
    resources: Resources | None = None

    def __str__(self) -> str:
        wants = f"{self.gpus} × {format_memory(self.memory_bytes)}"
        if self.resources is not None and (more := more_words_of(self.resources)):
            wants += f", {more}"
        match self.state:
            case "unknown":
                return "the scheduler knows no such task (any more)"
            case "plain":
                return "the task has no gpu annotation: it runs on the CPU of any worker"
            case "placed" if self.grant is not None:
                return f"placed ({wants}) on {self.grant.node}, {', '.join(self.grant.devices)}, slot {self.slot_id}"
            case "held":
                lines = [f"waits for room ({wants}), {self.before} of its size before it"]
                for verdict in self.verdicts:
                    short = f", {format_memory(verdict.short_bytes)} short" if verdict.short_bytes else ""
                    lines.append(f"  {verdict.node}: {verdict.reason.value}{short}")
                return "\n".join(lines)
            case _:
                return f"{self.state} ({wants})"


def gpu_resources(wanted: Any) -> Resources:
    """What a ``gpu`` annotation asks for.

    Args:
        wanted: a mapping with ``memory`` (text such as ``"16GiB"``, or bytes) and, if there is more than one device,
            ``count``. The other keys are those of a task's ``resources``: ``share``, ``architecture``, ``device_model``,
            ``labels``, ``cpus``, ``host_memory``, ``exclusive`` and ``model``.

    Raises:
        GpuAnnotationRefused: says what was wrong and what would be right.
    """
    if not isinstance(wanted, Mapping):
        raise GpuAnnotationRefused(f"the gpu annotation is {_shown(wanted)}, not a mapping: {_EXAMPLE}")
    if unknown := [key for key in wanted if key not in _KEYS]:
        known = ", ".join(_KEYS)
        raise GpuAnnotationRefused(
            f"the gpu annotation has {_shown(unknown[0])}, which means nothing: {_EXAMPLE} (there are {known})"
        )
    if wanted.get("memory") is None:
        raise GpuAnnotationRefused(f"the gpu annotation says no memory: {_EXAMPLE}")
    count = wanted.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= GPUS_MAX:
        raise GpuAnnotationRefused(f"the count of the gpu annotation is {_shown(count)}: a number from 1 to {GPUS_MAX}")
    named = {key: value for key, value in wanted.items() if key != "count"}
    try:
        return resources_of(msgspec.convert({**named, "gpus": count}, ResourceRequest))
    except WrongField as error:
        raise GpuAnnotationRefused(f"the {error.field} of the gpu annotation: {error}") from None
    except msgspec.ValidationError as error:
        raise GpuAnnotationRefused(f"the gpu annotation: {error}; {_EXAMPLE}") from None


def direct_shape(resources: Resources) -> Shape:
    """The shape of a slot that runs one Dask task."""
    return shape_of(DIRECT_TENANT, "", resources, max_tasks_per_slot=1)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
