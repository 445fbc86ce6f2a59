"""Who ends so that what waits finds room, and what room is kept for it. Pure, a part of the plan.

Victims come from the ledger: slots on one node whose end makes the shape fit there. What they give back is kept for whom they
ended: otherwise small shapes would take each piece as it comes, and a large one would never see them all together.
Slots that are kept warm end for work that waits, the last of all idle ones; nothing ends so that others can be kept warm.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Final

import msgspec

from manager.core.index import Index
from manager.core.lifecycle import SlotFlag, SlotKind, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.needs import UNKNOWN_RUN_S, Limits, Need, priority_rank
from manager.core.placement import find, victims
from manager.core.policies import BEST_FIT
from manager.core.shapes import Grant, Shape

WARM_COST: Final = 10.0
"""Ending an idle slot that is to be kept warm costs more than ending another idle one."""
BUSY_COST: Final = 1e6
"""Ending a busy slot at its task boundary costs more than ending any number of idle ones on a device."""
RESIDENT_COST: Final = 1e12
"""And waiting until a slot has been there for long enough, more than ending any number of busy ones."""
SEARCHES_MAX: Final = 16
"""Held shapes that get victims in one round; the others follow a quarter of a second later. Bounds a round's time."""


class Close(msgspec.Struct, frozen=True):
    """End a slot at its next task boundary. `reason`: Idle, Unloaded, TooManyIdle, or the shape that wants its memory."""

    slot_id: str
    reason: str


class TooLarge:
    """Sizes that were found not to fit. Room only shrinks within a round, so what is as large need not be tried again."""

    def __init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []

    def add(self, shape: Shape) -> None:
        self._sizes.append((shape.memory_bytes, shape.gpus))

    def __contains__(self, shape: Shape) -> bool:
        return any(shape.memory_bytes >= memory and shape.gpus >= gpus for memory, gpus in self._sizes)


def closes_of(
    state: ClusterState, index: Index, needs: Sequence[Need], vtimes: Mapping[str, float], limits: Limits
) -> tuple[list[Close], list[tuple[str, Grant]]]:
    """Victims for what waits, and the room that is kept for it; then slots that have been idle for too long."""
    queues = {queue.shape_id: queue for queue in state.queues}
    closes: dict[str, Close] = {}
    keep: list[tuple[str, Grant]] = []
    if waiting := [need for need in needs if need.waits]:
        scratch = index.copy()
        for slot in state.slots:
            if slot.flag is not SlotFlag.NONE:
                scratch.free(slot.slot_id)  # on its way out: nobody else need go for what this will give back
        candidates = [c for slot in state.slots if (c := _candidate(slot, queues, state.now_ms, limits)) is not None]
        devices = {need.queue.shape_id: need.serving * need.queue.shape.gpus for need in needs}
        too_large = TooLarge()
        searches = 0
        for need in waiting:
            queue = need.queue
            if queue.shape in too_large:
                continue
            fit = find(queue.resources, scratch, BEST_FIT)
            if fit is None and searches < SEARCHES_MAX:
                costs = _costs(candidates, queue, vtimes, devices, limits)
                chosen = victims(queue.resources, scratch, costs)
                for slot_id in chosen:
                    scratch.free(slot_id)
                    if costs[slot_id] < RESIDENT_COST:
                        closes[slot_id] = Close(slot_id, queue.shape_id)
                if chosen:
                    searches += 1
                    candidates = [c for c in candidates if c.slot_id not in chosen]
                    fit = find(queue.resources, scratch, BEST_FIT)
                else:
                    too_large.add(queue.shape)
            if fit is not None:
                scratch.lease(f"for {queue.shape_id}", fit)
                keep.append((need.held[0], fit))
    for close in _idle_closes(state, queues, needs, closes.keys(), limits):
        closes[close.slot_id] = close
    return list(closes.values()), keep


def _idle_closes(
    state: ClusterState, queues: Mapping[str, QueueRow], needs: Sequence[Need], ending: Container[str], limits: Limits
) -> list[Close]:
    """Slots that end without anybody waiting for their room, the longest idle first: idle for too long, to be unloaded, or
    more on one node than it may keep idle. What is to be warm stays, but counts on its node.
    """
    idle = [
        (slot.idle_ms, slot.slot_id, slot)
        for slot in state.slots
        if slot.idle_ms is not None
        and slot.status is SlotStatus.OPEN
        and slot.flag is SlotFlag.NONE
        and slot.kind is SlotKind.TASKS
        and slot.slot_id not in ending
        and (slot.shape_id not in queues or queues[slot.shape_id].depth == 0)
    ]
    spare = {need.queue.shape_id: need.serving - need.queue.warm for need in needs if need.queue.warm}
    excess = Counter(slot.node for _, _, slot in idle)
    excess.subtract(dict.fromkeys(excess, limits.idle_per_node_max))
    found: list[Close] = []
    for idle_ms, slot_id, slot in sorted(idle, key=lambda each: each[:2]):
        queue = queues.get(slot.shape_id)
        if queue is not None and queue.unload_ms is not None and idle_ms <= queue.unload_ms:
            reason = "Unloaded"
        elif spare.get(slot.shape_id, 1) <= 0:
            continue
        elif state.now_ms - idle_ms >= limits.idle_s * 1000:
            reason = "Idle"
        elif excess[slot.node] > 0:
            reason = "TooManyIdle"
        else:
            continue
        found.append(Close(slot_id, reason))
        excess[slot.node] -= 1
        if slot.shape_id in spare:
            spare[slot.shape_id] -= 1
    return found


class _Candidate(msgspec.Struct, frozen=True):
    """A slot that may have to end for another shape. `rank` is of what waits behind it, None where nothing does."""

    slot_id: str
    shape_id: str
    cost: float
    idle: bool
    rank: int | None


def _candidate(slot: SlotRow, queues: Mapping[str, QueueRow], now_ms: int, limits: Limits) -> _Candidate | None:
    """What ending the slot costs; None where it is not open, ends already, or is somebody's Dask task.

    Of the idle ones the one that has been idle for longest is the cheapest; of the busy ones the one whose tasks are short.
    """
    if slot.status is not SlotStatus.OPEN or slot.flag is not SlotFlag.NONE or slot.opened_ms is None:
        return None
    if slot.kind is SlotKind.DIRECT:
        return None
    own = queues.get(slot.shape_id)
    rank = None if own is None or own.depth == 0 else priority_rank(own)
    if slot.idle_ms is not None and slot.running == 0:
        idle_s = max(0.0, (now_ms - slot.idle_ms) / 1000)
        cost = 1.0 / (1.0 + idle_s) + (WARM_COST if own is not None and own.warm else 0.0)
        return _Candidate(slot.slot_id, slot.shape_id, cost, idle=True, rank=rank)
    run_s = UNKNOWN_RUN_S if own is None or own.run_s is None else own.run_s
    cost = BUSY_COST + run_s
    if now_ms - slot.opened_ms < limits.residence_s * 1000:
        cost += RESIDENT_COST
    return _Candidate(slot.slot_id, slot.shape_id, cost, idle=False, rank=rank)


def _costs(
    candidates: Sequence[_Candidate],
    wanting: QueueRow,
    vtimes: Mapping[str, float],
    devices: Mapping[str, int],
    limits: Limits,
) -> dict[str, float]:
    """What each slot costs that may be asked to end for `wanting`.

    An idle slot may always go. A busy one goes at its task boundary if the priority of what waits behind it is lower; or,
    with nothing of a higher priority behind it, if its shape has more devices now than the one that waits, and has had
    more, by what a slot has in the minimum residence. Shapes that have about the same would else change places for ever.
    """
    rank, had = priority_rank(wanting), vtimes.get(wanting.shape_id, 0.0) + limits.residence_s
    has = devices.get(wanting.shape_id, 0)

    def may_go(c: _Candidate) -> bool:
        if c.idle or (c.rank is not None and rank < c.rank):
            return True
        if c.rank is not None and rank > c.rank:
            return False
        return devices.get(c.shape_id, 0) > has and vtimes.get(c.shape_id, 0.0) > had

    return {c.slot_id: c.cost for c in candidates if c.shape_id != wanting.shape_id and may_go(c)}
