"""Why a task is where it is, in one reason, one sentence and a verdict for every node. Pure: the same look, the same answer.

Owns the words that people read when a task waits. It must not decide anything: it asks `placement` what it would say, so
that the explanation cannot differ from what happens.
"""

import enum
from collections.abc import Iterable
from typing import Final, assert_never

import msgspec

from manager.core.index import Index, NodeView
from manager.core.lifecycle import SlotFlag, SlotStatus, TaskStatus
from manager.core.model import ClusterState, SlotRow, TaskRecord
from manager.core.placement import Reason, devices_for, verdict
from manager.core.quantities import format_duration, format_memory
from manager.core.shapes import Shape, memory_class

NODES_SHOWN_MAX: Final = 200
"""Verdicts in one explanation: those of the nearest misses; a person reads no more."""


class Why(enum.StrEnum):
    """Why a task is where it is."""

    FINISHED = "Finished"
    RUNNING = "Running"
    CANCELLING = "Cancelling"
    RETRY_WAIT = "RetryWait"
    BLOCKED = "Blocked"
    WAITING_FOR_TURN = "WaitingForTurn"  # slots of its shape are open; others are before it
    SLOT_OPENING = "SlotOpening"  # one was asked for, and there is room
    WAITING_FOR_SLOT = "WaitingForSlot"  # there is room; the controller has not asked for one yet
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    FOREIGN_MEMORY = "ForeignMemory"
    TOO_MANY_SLOTS = "TooManySlots"
    RESERVED_FOR_LARGER = "ReservedForLarger"
    INSUFFICIENT_SHARE = "InsufficientShare"
    DEVICE_IN_USE = "DeviceInUse"
    INSUFFICIENT_CPU = "InsufficientCpu"
    INSUFFICIENT_HOST_MEMORY = "InsufficientHostMemory"
    EXCEEDS_LARGEST_DEVICE = "ExceedsLargestDevice"
    EXCEEDS_HOST = "ExceedsHost"
    NO_MATCHING_ARCHITECTURE = "NoMatchingArchitecture"
    NO_MATCHING_DEVICE = "NoMatchingDevice"
    NO_MATCHING_LABELS = "NoMatchingLabels"
    TOO_FEW_DEVICES = "TooFewDevices"
    UNHEALTHY_DEVICE = "UnhealthyDevice"
    CORDONED = "Cordoned"
    NODE_UNREACHABLE = "NodeUnreachable"
    NO_WORKERS = "NoWorkers"


# In the order of hope: the first of these that any node says is what the task waits for.
_BY_HOPE: Final[dict[Reason, Why]] = {
    Reason.INSUFFICIENT_MEMORY: Why.INSUFFICIENT_MEMORY,
    Reason.FOREIGN_MEMORY: Why.FOREIGN_MEMORY,
    Reason.RESERVED_FOR_LARGER: Why.RESERVED_FOR_LARGER,
    Reason.INSUFFICIENT_SHARE: Why.INSUFFICIENT_SHARE,
    Reason.DEVICE_IN_USE: Why.DEVICE_IN_USE,
    Reason.INSUFFICIENT_CPU: Why.INSUFFICIENT_CPU,
    Reason.INSUFFICIENT_HOST_MEMORY: Why.INSUFFICIENT_HOST_MEMORY,
    Reason.TOO_MANY_SLOTS: Why.TOO_MANY_SLOTS,
    Reason.NO_WORKER: Why.NODE_UNREACHABLE,
    Reason.NODE_LOST: Why.NODE_UNREACHABLE,
    Reason.CORDONED: Why.CORDONED,
    Reason.UNHEALTHY_DEVICE: Why.UNHEALTHY_DEVICE,
    Reason.EXCEEDS_LARGEST_DEVICE: Why.EXCEEDS_LARGEST_DEVICE,
    Reason.EXCEEDS_HOST: Why.EXCEEDS_HOST,
    Reason.TOO_FEW_DEVICES: Why.TOO_FEW_DEVICES,
    Reason.NO_MATCHING_ARCHITECTURE: Why.NO_MATCHING_ARCHITECTURE,
    Reason.NO_MATCHING_DEVICE: Why.NO_MATCHING_DEVICE,
    Reason.NO_MATCHING_LABELS: Why.NO_MATCHING_LABELS,
}
assert _BY_HOPE.keys() == set(Reason)
_HOPE: Final = {reason: rank for rank, reason in enumerate(_BY_HOPE)}


class WorkerVerdict(msgspec.Struct, frozen=True):
    """What one node says to the task.

    Attributes:
        verdict: ``Fits``, or a reason such as InsufficientMemory.
        short_by_bytes: memory that is missing on each device; 0 where memory is not the matter.
        detail: the same in words.
    """

    node: str
    verdict: str
    short_by_bytes: int
    detail: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a task is where it is.

    Attributes:
        reason: the kind of answer.
        message: the answer in a sentence or two.
        position: how many tasks of its shape stand before it; null where it does not wait in a queue.
        memory_bytes: what its slot leases on each device: what was asked for, rounded up.
        slots_open, slots_opening: slots that serve its shape, and those that were asked for.
        wait_s: how long it has waited since it was last queued; null where it does not wait.
        nearest: the node that lacks least memory; null where memory is not the matter.
        workers: a verdict for every node while it waits, those that lack least first.
    """

    task_id: str
    status: TaskStatus
    reason: Why
    message: str
    memory_bytes: int
    gpus: int
    position: int | None = None
    slots_open: int = 0
    slots_opening: int = 0
    wait_s: float | None = None
    nearest: WorkerVerdict | None = None
    workers: tuple[WorkerVerdict, ...] = ()


def explain(
    record: TaskRecord,
    state: ClusterState,
    index: Index,
    position: int | None,
    now_ms: int,
    silent: frozenset[str] = frozenset(),
) -> Explanation:
    """Why the task is where it is.

    Args:
        record: the task; with its `spec`.
        state: one look at the cluster.
        index: the ledger that goes with it; not changed.
        position: how many tasks of its shape stand before it, if it is queued.
        now_ms: the store's time.
        silent: nodes that have not beaten for a lease, as the observer's own clock has it.
    """
    shape = _shape_of(record, state)
    slots = [slot for slot in state.slots if slot.shape_id == record.shape_id]
    serving = [s for s in slots if s.status is SlotStatus.OPEN and s.flag is SlotFlag.NONE]
    opening = [s for s in slots if s.status is SlotStatus.REQUESTED]
    waits = record.status in {TaskStatus.QUEUED, TaskStatus.RETRY_WAIT, TaskStatus.BLOCKED}
    verdicts = _verdicts(shape, index, silent) if waits else ()
    nearest = next((v for v in verdicts if v.short_by_bytes > 0), None)
    match record.status:
        case TaskStatus.SUCCEEDED | TaskStatus.FAILED | TaskStatus.CANCELLED:
            reason, message = Why.FINISHED, _finished(record)
        case TaskStatus.RUNNING:
            reason, message = _running(record, now_ms, silent)
        case TaskStatus.RETRY_WAIT:
            reason, message = Why.RETRY_WAIT, _retry(record)
        case TaskStatus.BLOCKED:
            reason, message = Why.BLOCKED, "It waits for other tasks to end."
        case TaskStatus.QUEUED:
            reason, message = _queued(shape, serving, opening, verdicts, position, silent)
        case _:
            assert_never(record.status)
    waited = record.queued_ms if record.queued_ms is not None else record.created_ms
    return Explanation(
        task_id=record.task_id,
        status=record.status,
        reason=reason,
        message=message,
        memory_bytes=shape.memory_bytes,
        gpus=shape.gpus,
        position=position if record.status is TaskStatus.QUEUED else None,
        slots_open=len(serving),
        slots_opening=len(opening),
        wait_s=max(0, now_ms - waited) / 1000 if waits else None,
        nearest=nearest,
        workers=verdicts[:NODES_SHOWN_MAX],
    )


def _shape_of(record: TaskRecord, state: ClusterState) -> Shape:
    for queue in state.queues:
        if queue.shape_id == record.shape_id:
            return queue.shape
    assert record.spec is not None
    resources = record.spec.resources
    return Shape(record.tenant, "", memory_class(resources.memory_bytes), resources.gpus)


def _verdicts(shape: Shape, index: Index, silent: frozenset[str]) -> tuple[WorkerVerdict, ...]:
    """What every node says; what fits first, then by what is missing, then by hope, then by name."""
    ranked = sorted((_ranked(shape, view, silent) for view in index.nodes.values()), key=lambda item: item[0])
    return tuple(found for _, found in ranked)


def _ranked(shape: Shape, view: NodeView, silent: frozenset[str]) -> tuple[tuple[int, int, int, str], WorkerVerdict]:
    if view.name in silent and not view.lost:
        detail = "its agent has been silent for a lease; nothing is placed there until it speaks again"
        return (2, _HOPE[Reason.NO_WORKER], 0, view.name), WorkerVerdict(view.name, "NodeUnreachable", 0, detail)
    if devices_for(shape.resources, view) is not None:
        return (0, 0, 0, view.name), WorkerVerdict(view.name, "Fits", 0, "it fits there now")
    said = verdict(shape.resources, view)
    found = WorkerVerdict(view.name, said.reason.value, said.short_bytes, _detail(said.reason, said.short_bytes, shape, view))
    temporary = said.reason in {Reason.INSUFFICIENT_MEMORY, Reason.FOREIGN_MEMORY, Reason.TOO_MANY_SLOTS}
    return (1 if temporary else 2, _HOPE[said.reason] if not temporary else 0, said.short_bytes, view.name), found


def _detail(reason: Reason, short_bytes: int, shape: Shape, view: NodeView) -> str:
    short = format_memory(short_bytes)
    usable = max((pool.usable_bytes for pool in view.pools.values()), default=0)
    match reason:
        case Reason.INSUFFICIENT_MEMORY:
            return f"{short} short: the rest is leased to other slots"
        case Reason.FOREIGN_MEMORY:
            return f"{short} short: processes that are none of ours use it"
        case Reason.TOO_MANY_SLOTS:
            return f"it has {len(view.slots)} slots, all that it may have (node.slots_max)"
        case Reason.EXCEEDS_LARGEST_DEVICE:
            return f"{short} more than it could ever hold; its largest device holds {format_memory(usable)}"
        case Reason.RESERVED_FOR_LARGER:
            return f"{short} short: room is kept for what has waited longer"
        case Reason.INSUFFICIENT_SHARE:
            return "the compute of its devices is promised to other slots"
        case Reason.DEVICE_IN_USE:
            return "it would have to be alone on the device" if shape.exclusive else "another slot has the device for itself"
        case Reason.INSUFFICIENT_CPU:
            return f"{view.cpu_free_milli / 1000:g} of its CPUs are free, {shape.cpu_milli / 1000:g} are asked for"
        case Reason.INSUFFICIENT_HOST_MEMORY:
            return f"{format_memory(view.host_free_bytes)} of the host's memory is free"
        case Reason.EXCEEDS_HOST:
            return "its host has fewer CPUs or less memory than that"
        case Reason.NO_MATCHING_ARCHITECTURE:
            return f"too few of its devices are {' or '.join(shape.architectures)}"
        case Reason.NO_MATCHING_DEVICE:
            return f"too few of its devices are called {shape.device_model!r}"
        case Reason.NO_MATCHING_LABELS:
            return "it has not these labels"
        case Reason.TOO_FEW_DEVICES:
            return f"it has {len(view.devices)} of the {shape.gpus} devices"
        case Reason.UNHEALTHY_DEVICE:
            return "too few of its devices are healthy"
        case Reason.CORDONED:
            return "it takes no new slots (cordoned)"
        case Reason.NO_WORKER:
            return "its Dask worker does not report (yet)"
        case Reason.NODE_LOST:
            return "it was declared lost; it is used again when its agent has registered anew"
        case _:
            assert_never(reason)


def _finished(record: TaskRecord) -> str:
    where = f" on {record.node}" if record.node else ""
    match record.status:
        case TaskStatus.SUCCEEDED:
            return f"It succeeded{where} in attempt {record.attempt}."
        case TaskStatus.CANCELLED:
            return f"It was cancelled{where if record.started_ms is not None else ' before it ran'}."
        case _:
            why = f": {_error(record)}" if record.error is not None else ""
            return f"It failed{where} in attempt {record.attempt}{why}"


def _running(record: TaskRecord, now_ms: int, silent: frozenset[str]) -> tuple[Why, str]:
    if record.node in silent:
        return Why.NODE_UNREACHABLE, (
            f"It was running on {record.node}, whose agent is silent. If that lasts, the node is declared lost "
            "and the task is queued again; nobody is blamed."
        )
    if record.cancel_requested:
        return Why.CANCELLING, f"Its cancellation was asked; {record.node} is ending it."
    if record.started_ms is None:
        return (
            Why.RUNNING,
            f"A slot on {record.node} has taken it (attempt {record.attempt}); it starts with its turn there.",
        )
    for_s = format_duration(max(0, now_ms - record.started_ms) / 1000)
    return Why.RUNNING, f"It has been running on {record.node} for {for_s} (attempt {record.attempt})."


def _retry(record: TaskRecord) -> str:
    allowed = record.spec.max_attempts if record.spec is not None else 1
    why = f": {_error(record)}" if record.error is not None else ""
    return f"Failure {record.failures} of the {allowed} that it may have{why} It is queued again after a pause."


def _error(record: TaskRecord) -> str:
    assert record.error is not None
    text = " ".join(record.error.message.split())
    return f"{record.error.type}: {text[:300]}".rstrip(" :.") + "."


def _queued(
    shape: Shape,
    serving: list[SlotRow],
    opening: list[SlotRow],
    verdicts: tuple[WorkerVerdict, ...],
    position: int | None,
    silent: frozenset[str],
) -> tuple[Why, str]:
    need = _need(shape)
    if not verdicts:
        return Why.NO_WORKERS, (
            f"No node is registered. The task is kept, and runs when a node comes that has {need} "
            "(start one there with: rocyard node)."
        )
    before = f" {position} of its shape stand before it." if position else ""
    reachable = [slot for slot in serving if slot.node not in silent]
    if reachable:
        ahead = "it is next" if not position else f"{position} of its shape stand before it"
        return Why.WAITING_FOR_TURN, f"{_slots(len(reachable))} its shape; {ahead}."
    if serving:
        return Why.NODE_UNREACHABLE, (
            f"The {len(serving)} slots of its shape are on nodes that are silent ({_names(s.node for s in serving)}); "
            "others are opened when these are declared lost."
        )
    fits = [found.node for found in verdicts if found.verdict == "Fits"]
    if fits and opening:
        return Why.SLOT_OPENING, f"A slot is opening for {need}; there is room on {_names(fits)}.{before}"
    if fits:
        return Why.WAITING_FOR_SLOT, (
            f"There is room for {need} on {_names(fits)}; the controller has not asked for a slot yet "
            f"(it looks every few seconds, if one leads).{before}"
        )
    return _unplaced(shape, verdicts, need, before)


def _unplaced(shape: Shape, verdicts: tuple[WorkerVerdict, ...], need: str, before: str) -> tuple[Why, str]:
    """What to say where no node can take it now: what the most hopeful node says."""
    temporary = [v for v in verdicts if v.verdict in {"InsufficientMemory", "ForeignMemory"}]
    if temporary:
        nearest = temporary[0]
        return Why(nearest.verdict), f"No node has room for {need} now; {nearest.node} is nearest: {nearest.detail}.{before}"
    said = {v.verdict for v in verdicts}
    if "NodeUnreachable" in said:
        why = Why.NODE_UNREACHABLE
    else:
        why = _BY_HOPE[min((Reason(word) for word in said), key=lambda reason: _HOPE[reason])]
    match why:
        case Why.EXCEEDS_LARGEST_DEVICE:
            nearest = next(v for v in verdicts if v.verdict == "ExceedsLargestDevice")
            return why, f"No node could ever hold {need}; {nearest.node} is nearest: {nearest.detail}."
        case Why.TOO_FEW_DEVICES:
            return why, f"No node has {shape.gpus} devices."
        case _:
            concerned = [v for v in verdicts if v.verdict not in {"ExceedsLargestDevice", "TooFewDevices"}]
            return why, f"No node can take {need} now; {concerned[0].node}: {concerned[0].detail}."


def _need(shape: Shape) -> str:
    memory = format_memory(shape.memory_bytes)
    return memory if shape.gpus == 1 else f"{shape.gpus} × {memory} on one node"


def _slots(count: int) -> str:
    return "1 slot serves" if count == 1 else f"{count} slots serve"


def _names(nodes: Iterable[str]) -> str:
    names = sorted(set(nodes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
