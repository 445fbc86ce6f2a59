"""How many slots of which shape: the leader's decision. Pure: values in, `Plan` out.

A slot of a shape serves its tasks one after the other, so the question is how many slots drain the queue in time, whether
they fit, and, where they do not, whose slots end for them. What cannot be placed is asked for once per shape: the held slot
is what victims are chosen for, again in each round, until it is placed. What victims give back is kept for it: otherwise
small shapes would take each piece as it comes, and a large one would never see them all together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from manager.core.index import Grant, Index
from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.placement import find, victims
from manager.core.shapes import Shape

UNKNOWN_RUN_S: Final = 1.0
"""A shape whose run time is not known is taken to need this, so that long tasks start side by side at once."""
UNKNOWN_OPEN_MAX: Final = 4
"""But so many slots at first: a burst of tiny tasks must not start a process for each."""
BUSY_COST: Final = 1e6
"""Ending a busy slot at its task boundary costs more than ending any number of idle ones on a device."""
RESIDENT_COST: Final = 1e12
"""And waiting until a slot has been there for long enough, more than ending any number of busy ones."""
SEARCHES_MAX: Final = 16
"""Held shapes that get victims in one round; the others follow a quarter of a second later. Bounds a round's time."""
STARTING_S: Final = 3.0
"""An executor is taken to start for so long after its slot has opened, unless it has ended a task: imports take seconds."""
AGAIN_S: Final = 0.25
NEVER: Final = 2**31
"""As a depth to ask again at: more work of a shape that is held changes nothing."""


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
        keep: room that is kept for held slots, by slot; what is not in it is kept no longer.
    """

    open: tuple[Open, ...] = ()
    close: tuple[Close, ...] = ()
    drop: tuple[str, ...] = ()
    wake_at: tuple[tuple[str, int], ...] = ()
    again_s: float | None = None
    held: int = 0
    keep: tuple[tuple[str, Grant], ...] = ()


class _Need(msgspec.Struct, frozen=True):
    """One shape in this round: its slots, and how many it should have."""

    queue: QueueRow
    serving: int
    requested: int
    held: tuple[str, ...]
    wanted: int

    @property
    def asked(self) -> int:
        """Slots that were asked for and are on their way, with room or not."""
        return self.requested + len(self.held)

    @property
    def waits(self) -> bool:
        """Whether a slot is held that is still wanted."""
        return bool(self.held) and self.wanted > self.serving


class _TooLarge:
    """Sizes that were found not to fit. Room only shrinks within a round, so what is as large need not be tried again."""

    def __init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []

    def add(self, shape: Shape) -> None:
        self._sizes.append((shape.memory_bytes, shape.gpus))

    def __contains__(self, shape: Shape) -> bool:
        return any(shape.memory_bytes >= memory and shape.gpus >= gpus for memory, gpus in self._sizes)


def slots_wanted(queue: QueueRow, slots: Sequence[SlotRow], now_ms: int, limits: Limits) -> int:
    """How many slots drain the queue within the target, from what was learned of its run time.

    Where that is not known, or the head has waited for longer than the target although all slots have been at work for as
    long, they are doubled in each such time: a start of many processes costs more than it gives where tasks are short.
    """
    if queue.depth == 0:
        return 0
    busy = sum(1 for slot in slots if slot.running)
    run_s = UNKNOWN_RUN_S if queue.run_s is None else queue.run_s
    needed = math.ceil((queue.depth + busy) * run_s / limits.drain_target_s)
    target_ms = limits.drain_target_s * 1000
    settled = all(slot.opened_ms is not None and now_ms - slot.opened_ms > target_ms for slot in slots)
    if queue.run_s is None:
        needed = min(needed, max(UNKNOWN_OPEN_MAX, 2 * len(slots) if settled else len(slots)))
    elif (
        settled
        and all(slot.served for slot in slots)  # else some are loading what they need, and will help when they have
        and queue.head_queued_ms is not None
        and now_ms - queue.head_queued_ms > target_ms
    ):
        needed = max(needed, 2 * len(slots))
    if limit := queue.shape.max_tasks_per_slot:
        # Each slot ends by itself: what those that are open will not serve needs new ones.
        left = sum(max(0, limit - slot.served - slot.running) for slot in slots)
        needed = max(needed, len(slots) + math.ceil((queue.depth - left) / limit))
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
    needs = _needs(state, held, vtimes, limits)
    closes, keep = _closes(state, index, needs, vtimes, limits)
    scratch = index.copy()
    for slot_id, grant in keep:
        scratch.keep(slot_id, grant)
    for need in needs:
        # Asked for and not held: the plugin is placing these now, so their room is taken.
        _take(need.queue, scratch, need.requested, "asked")
    opens: list[Open] = []
    drops: list[str] = []
    wake_at: list[tuple[str, int]] = []
    too_large = _TooLarge()
    starts = _starts(state, held)
    put_off = False
    for need in needs:
        queue = need.queue
        missing = need.wanted - need.serving - need.asked
        if missing > 0 and starts is not None:
            # Hosts that start more processes than they have CPUs finish none of them sooner. A first one always may.
            allowed = max(starts, 0 if need.serving or need.asked else 1)
            put_off = put_off or missing > allowed
            missing = min(missing, allowed)
        count = 0
        if missing > 0 and not need.held:
            if queue.shape not in too_large:
                count = _take(queue, scratch, missing, "new")
            if count < missing:
                too_large.add(queue.shape)
                # One that is held makes the need visible: to explain, to victims, to the autoscaler.
                count += need.requested == 0
        elif missing < 0:
            surplus = need.held[missing:]
            drops += surplus if need.wanted else [*surplus, *_requested(state, queue.shape_id, held)]
        if starts is not None:
            starts -= count
        if count:
            opens.append(Open(queue.shape_id, count, queue.shape.max_tasks_per_slot))
        alive = need.serving + need.asked + count
        wake_at.append((queue.shape_id, NEVER if need.waits else wake_depth(queue, alive, limits)))
    unsettled = put_off or any(need.waits or need.requested for need in needs)
    return Plan(
        open=tuple(opens),
        close=tuple(closes),
        drop=tuple(drops),
        wake_at=tuple(wake_at),
        again_s=AGAIN_S if opens or unsettled else None,
        held=len(held) + len(opens),
        keep=tuple(keep),
    )


def _starts(state: ClusterState, held: frozenset[str]) -> int | None:
    """How many executors may be started now: one per CPU of all hosts, less those that are starting. None: no limit known."""
    cpus: dict[str, int] = {}
    for row in state.nodes:
        if not row.left and not row.fenced:
            cpus[row.info.hostname] = max(cpus.get(row.info.hostname, 0), row.info.cpus)
    if not cpus or not all(cpus.values()):
        return None
    young_ms = state.now_ms - STARTING_S * 1000
    starting = sum(
        slot.slot_id not in held and slot.served == 0 and (slot.opened_ms is None or slot.opened_ms > young_ms)
        for slot in state.slots
    )
    return max(0, max(UNKNOWN_OPEN_MAX, sum(cpus.values())) - starting)


def _needs(state: ClusterState, held: frozenset[str], vtimes: Mapping[str, float], limits: Limits) -> list[_Need]:
    """Each shape's slots and need, in the order in which they are served."""
    by_shape: dict[str, list[SlotRow]] = {queue.shape_id: [] for queue in state.queues}
    for slot in state.slots:
        by_shape.setdefault(slot.shape_id, []).append(slot)
    needs = []
    for queue in sorted(state.queues, key=lambda q: (_priority_rank(q), vtimes.get(q.shape_id, 0.0), q.shape_id)):
        slots = by_shape[queue.shape_id]
        serving = [s for s in slots if s.status is SlotStatus.OPEN and s.flag is SlotFlag.NONE]
        requested = [s.slot_id for s in slots if s.status is SlotStatus.REQUESTED]
        waiting = tuple(sorted(slot_id for slot_id in requested if slot_id in held))
        wanted = slots_wanted(queue, serving, state.now_ms, limits)
        needs.append(_Need(queue, len(serving), len(requested) - len(waiting), waiting, wanted))
    return needs


def _requested(state: ClusterState, shape_id: str, held: frozenset[str]) -> list[str]:
    """Slots of the shape that were asked for and are neither open nor held."""
    return [
        slot.slot_id
        for slot in state.slots
        if slot.shape_id == shape_id and slot.status is SlotStatus.REQUESTED and slot.slot_id not in held
    ]


def _priority_rank(queue: QueueRow) -> int:
    """Rank of the head's priority class: lower is served first."""
    return 2**9 if queue.head is None else queue.head >> 44


def _take(queue: QueueRow, scratch: Index, count: int, name: str) -> int:
    """How many of `count` slots fit on what is left; what fits is taken from `scratch`."""
    shape = queue.shape
    taken = 0
    while taken < count and (grant := find(shape, scratch)) is not None:
        pools = scratch.nodes[grant.node].pools
        # Best fit goes on with the devices that it began with, until they are full: so all of these at once.
        room = min(pools[uuid].free_bytes for uuid in grant.devices) // max(1, shape.memory_bytes)
        several = min(room, count - taken)
        whole = Grant(grant.node, grant.devices, shape.memory_bytes * several)
        scratch.lease(f"{name} {queue.shape_id}/{taken}", whole)
        taken += several
    return taken


def _closes(
    state: ClusterState, index: Index, needs: Sequence[_Need], vtimes: Mapping[str, float], limits: Limits
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
        too_large = _TooLarge()
        searches = 0
        for need in waiting:
            queue = need.queue
            if queue.shape in too_large:
                continue
            fit = find(queue.shape, scratch)
            if fit is None and searches < SEARCHES_MAX:
                costs = _costs(candidates, queue, vtimes, devices, limits)
                chosen = victims(queue.shape, scratch, costs)
                for slot_id in chosen:
                    scratch.free(slot_id)
                    if costs[slot_id] < RESIDENT_COST:
                        closes[slot_id] = Close(slot_id, queue.shape_id)
                if chosen:
                    searches += 1
                    candidates = [c for c in candidates if c.slot_id not in chosen]
                    fit = find(queue.shape, scratch)
                else:
                    too_large.add(queue.shape)
            if fit is not None:
                scratch.lease(f"for {queue.shape_id}", fit)
                keep.append((need.held[0], fit))
    for slot in state.slots:
        if (
            slot.slot_id not in closes
            and slot.status is SlotStatus.OPEN
            and slot.flag is SlotFlag.NONE
            and slot.idle_ms is not None
            and (slot.shape_id not in queues or queues[slot.shape_id].depth == 0)
            and state.now_ms - slot.idle_ms >= limits.idle_s * 1000
        ):
            closes[slot.slot_id] = Close(slot.slot_id, "Idle")
    return list(closes.values()), keep


class _Candidate(msgspec.Struct, frozen=True):
    """A slot that may have to end for another shape. `rank` is of what waits behind it, None where nothing does."""

    slot_id: str
    shape_id: str
    cost: float
    idle: bool
    rank: int | None


def _candidate(slot: SlotRow, queues: Mapping[str, QueueRow], now_ms: int, limits: Limits) -> _Candidate | None:
    """What ending the slot costs; None where it is not open, or ends already.

    Of the idle ones the one that has been idle for longest is the cheapest; of the busy ones the one whose tasks are short.
    """
    if slot.status is not SlotStatus.OPEN or slot.flag is not SlotFlag.NONE or slot.opened_ms is None:
        return None
    own = queues.get(slot.shape_id)
    rank = None if own is None or own.depth == 0 else _priority_rank(own)
    if slot.idle_ms is not None and slot.running == 0:
        idle_s = max(0.0, (now_ms - slot.idle_ms) / 1000)
        return _Candidate(slot.slot_id, slot.shape_id, 1.0 / (1.0 + idle_s), idle=True, rank=rank)
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
    rank, had = _priority_rank(wanting), vtimes.get(wanting.shape_id, 0.0) + limits.residence_s
    has = devices.get(wanting.shape_id, 0)

    def may_go(c: _Candidate) -> bool:
        if c.idle or (c.rank is not None and rank < c.rank):
            return True
        if c.rank is not None and rank > c.rank:
            return False
        return devices.get(c.shape_id, 0) > has and vtimes.get(c.shape_id, 0.0) > had

    return {c.slot_id: c.cost for c in candidates if c.shape_id != wanting.shape_id and may_go(c)}
