"""How many slots of which shape: the leader's decision. Pure: values in, `Plan` out.

A slot of a shape serves its tasks one after the other, so the question is how many slots drain the queue in time, whether
they fit, and, where they do not, whose slots end for them. What cannot be placed is asked for once per shape: the held slot
is what victims are chosen for, again in each round, until it is placed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.placement import Index, Placed, place, victims

UNKNOWN_RUN_S: Final = 1.0
"""A shape whose run time is not known is taken to need this, so that long tasks start side by side at once."""
UNKNOWN_OPEN_MAX: Final = 4
"""But so many new slots per round at most: a burst of tiny tasks must not start a process for each."""
BUSY_COST: Final = 1000.0
"""Ending a busy slot at its task boundary costs more than ending any number of idle ones on a device."""


class Limits(msgspec.Struct, frozen=True):
    """What the operator has set (see settings `slots`)."""

    drain_target_s: float
    idle_s: float
    residence_s: float
    slots_per_shape_max: int


class Open(msgspec.Struct, frozen=True):
    """Open `count` slots of a shape, each of which serves at most `served_max` tasks (0: no limit)."""

    shape_id: str
    count: int
    served_max: int


class Close(msgspec.Struct, frozen=True):
    """End a slot at its next task boundary. `reason`: Idle, or the shape that wants its memory."""

    slot_id: str
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """What to do now.

    Attributes:
        open: slots to ask for.
        close: open slots to flag.
        drop: requested slots that nobody needs any more.
        wake_at: per shape, the queue depth at which a round would change something.
        again_s: look again after this, None: at the usual pace.
        held: slots that wait for room.
    """

    open: tuple[Open, ...] = ()
    close: tuple[Close, ...] = ()
    drop: tuple[str, ...] = ()
    wake_at: tuple[tuple[str, int], ...] = ()
    again_s: float | None = None
    held: int = 0


def slots_wanted(queue: QueueRow, slots: Sequence[SlotRow], now_ms: int, limits: Limits) -> int:
    """How many slots drain the queue within the target, from what was learned of its run time.

    A head that has waited for longer than the target shows that what was learned is wrong: then twice as many.
    """
    if queue.depth == 0:
        return 0
    busy = sum(1 for slot in slots if slot.running)
    run_s = UNKNOWN_RUN_S if queue.run_s is None else queue.run_s
    needed = math.ceil((queue.depth + busy) * run_s / limits.drain_target_s)
    if queue.run_s is None:
        needed = min(needed, len(slots) + UNKNOWN_OPEN_MAX)
    if queue.head_queued_ms is not None and now_ms - queue.head_queued_ms > limits.drain_target_s * 1000:
        needed = max(needed, 2 * len(slots))
    if queue.shape.max_tasks_per_slot:
        needed = max(needed, math.ceil(queue.depth / queue.shape.max_tasks_per_slot))
    return max(1, min(needed, queue.depth + busy, limits.slots_per_shape_max))


def wake_depth(queue: QueueRow, slots: int, limits: Limits) -> int:
    """The depth at which `slots` slots would no longer be enough."""
    if slots == 0:
        return 1
    run_s = UNKNOWN_RUN_S if queue.run_s is None else queue.run_s
    return max(1, int(slots * limits.drain_target_s / max(run_s, 1e-4)))


def plan(state: ClusterState, index: Index, held: frozenset[str], vtimes: Mapping[str, float], limits: Limits) -> Plan:
    """What to open and what to close.

    Args:
        state: one look at the store.
        index: the ledger that goes with it; not changed.
        held: ids of requested slots that the scheduler plugin could not place.
        vtimes: weighted device-seconds that each shape has had; the lowest is served first.
        limits: the operator's.
    """
    by_shape: dict[str, list[SlotRow]] = {queue.shape_id: [] for queue in state.queues}
    for slot in state.slots:
        by_shape.setdefault(slot.shape_id, []).append(slot)
    scratch = index.copy()
    opens: list[Open] = []
    drops: list[str] = []
    waiting: list[QueueRow] = []
    wake_at: list[tuple[str, int]] = []
    again = False
    in_order = sorted(state.queues, key=lambda q: (_priority_rank(q), vtimes.get(q.shape_id, 0.0), q.shape_id))
    for queue in in_order:
        slots = by_shape[queue.shape_id]
        serving = [s for s in slots if s.status is SlotStatus.OPEN and s.flag is SlotFlag.NONE]
        requested = [s for s in slots if s.status is SlotStatus.REQUESTED]
        held_here = [s for s in requested if s.slot_id in held]
        wanted = slots_wanted(queue, serving, state.now_ms, limits)
        missing = wanted - len(serving) - len(requested)
        count = 0
        if missing > 0 and not held_here:
            count = _room(queue, scratch, missing)
            if count < missing and not requested:
                count += 1  # one that is held makes the need visible: to explain, to victims, to the autoscaler
            again = again or count > 0
        elif missing < 0:
            surplus = sorted(held_here or requested, key=lambda s: s.slot_id)[missing:]
            drops += [s.slot_id for s in surplus] if wanted == 0 or held_here else []
        if count:
            opens.append(Open(queue.shape_id, count, queue.shape.max_tasks_per_slot))
        if held_here and wanted > len(serving):
            waiting.append(queue)
        wake_at.append((queue.shape_id, wake_depth(queue, len(serving) + len(requested) + count, limits)))
    closes = _closes(state, index, waiting, vtimes, limits)
    return Plan(
        open=tuple(opens),
        close=tuple(closes),
        drop=tuple(drops),
        wake_at=tuple(wake_at),
        again_s=0.25 if again or waiting else None,
        held=len(held) + sum(1 for o in opens if o.count),
    )


def _priority_rank(queue: QueueRow) -> int:
    """Rank of the head's priority class: lower is served first."""
    return 2**9 if queue.head is None else queue.head >> 44


def _room(queue: QueueRow, scratch: Index, missing: int) -> int:
    """How many of `missing` slots fit on what is left; what fits is taken from `scratch`."""
    for count in range(missing):
        match place(queue.shape, scratch):
            case Placed(grant):
                scratch.lease(f"{queue.shape_id}/{count}", grant)
            case _:
                return count
    return missing


def _closes(
    state: ClusterState, index: Index, waiting: Sequence[QueueRow], vtimes: Mapping[str, float], limits: Limits
) -> list[Close]:
    """Victims for what waits, then slots that have been idle for too long."""
    depth = {queue.shape_id: queue.depth for queue in state.queues}
    closes: dict[str, Close] = {}
    scratch = index.copy()
    for slot in state.slots:
        if slot.flag is not SlotFlag.NONE:
            scratch.free(slot.slot_id)  # on its way out: nobody else need go for what this will give back
    for queue in waiting:
        if isinstance(fit := place(queue.shape, scratch), Placed):
            scratch.lease(f"for {queue.shape_id}", fit.grant)
            continue
        costs = {
            slot.slot_id: cost
            for slot in state.slots
            if slot.slot_id not in closes and (cost := _cost(slot, queue, state, vtimes, limits)) is not None
        }
        for slot_id in victims(queue.shape, scratch, costs):
            closes[slot_id] = Close(slot_id, queue.shape_id)
            scratch.free(slot_id)
        if isinstance(fit := place(queue.shape, scratch), Placed):
            scratch.lease(f"for {queue.shape_id}", fit.grant)
    for slot in state.slots:
        if (
            slot.slot_id not in closes
            and slot.status is SlotStatus.OPEN
            and slot.flag is SlotFlag.NONE
            and slot.idle_ms is not None
            and depth.get(slot.shape_id, 0) == 0
            and state.now_ms - slot.idle_ms >= limits.idle_s * 1000
        ):
            closes[slot.slot_id] = Close(slot.slot_id, "Idle")
    return list(closes.values())


def _cost(
    slot: SlotRow, wanting: QueueRow, state: ClusterState, vtimes: Mapping[str, float], limits: Limits
) -> float | None:
    """What ending `slot` for `wanting` costs; None where it may not be asked to.

    An idle slot may always go, the one that has been idle longest first. A busy one goes at its task boundary if its shape
    has had more than the one that waits, and has been there for the minimum residence.
    """
    if slot.status is not SlotStatus.OPEN or slot.flag is not SlotFlag.NONE or slot.shape_id == wanting.shape_id:
        return None
    if slot.idle_ms is not None and slot.running == 0:
        idle_s = max(0.0, (state.now_ms - slot.idle_ms) / 1000)
        return 1.0 / (1.0 + idle_s)
    if slot.opened_ms is None or state.now_ms - slot.opened_ms < limits.residence_s * 1000:
        return None
    own = next((queue for queue in state.queues if queue.shape_id == slot.shape_id), None)
    if own is None or own.depth == 0:
        return BUSY_COST * 2  # nobody waits behind it: it would only be opened again if more came
    rank, own_rank = _priority_rank(wanting), _priority_rank(own)
    if rank > own_rank or (rank == own_rank and vtimes.get(own.shape_id, 0.0) <= vtimes.get(wanting.shape_id, 0.0)):
        return None
    return BUSY_COST
