"""What is about to happen, from one look at the store: what is on its way, what room is kept, when slots end. Pure.

The store does not know which requested slots the scheduler plugin holds, nor what room is kept: both follow from the same
decisions that leader and plugin make, so they are made here once more. Times are what was learned of run times and nothing
else: what was never learned is None.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from manager.core.index import Index
from manager.core.lifecycle import SlotFlag, SlotKind, SlotStatus
from manager.core.mix import Mix
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.needs import Limits, needs_of, priority_rank
from manager.core.packing import PackGroup
from manager.core.placement import NO_DEMAND, Demand, Policy, find
from manager.core.planner import plan
from manager.core.shapes import Grant, Resources
from manager.core.victims import victims

UNKNOWN_END: Final = 1e9
"""In place of the seconds until a slot ends, where nothing is known: such a slot is named last."""

SETTLING_MAX: Final = 4
"""Looks at what is held, each with the room that is kept for what was held before; seldom more than two change anything."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What decides besides the state.

    Attributes:
        limits: the operator's, of slots.
        policy: says which of all places that fit is best.
        demand: what is expected to be asked for, where that is known.
        groups: those that nodes can be added to; none where nothing adds any.
        drain_target_s: within what time the autoscaler wants work done.
    """

    limits: Limits
    policy: Policy
    demand: Demand = NO_DEMAND
    groups: tuple[PackGroup, ...] = ()
    drain_target_s: float = 30.0


def with_mix(setup: Setup, mix: Mix) -> Setup:
    """The same with the requests that the scheduler expects."""
    return msgspec.structs.replace(setup, demand=Demand(mix.shares) if mix.shares else NO_DEMAND)


class Kept(msgspec.Struct, frozen=True):
    """What the leader has of the plugin, and has told it: requested slots that are held, and room that is kept for some."""

    held: frozenset[str] = frozenset()
    keep: tuple[tuple[str, Grant], ...] = ()


class Ahead(msgspec.Struct, frozen=True):
    """What follows from one look.

    Attributes:
        base: the ledger as it follows from the state. Nobody may change it.
        index: the same, with what is on its way leased and with the room that is kept. Nobody may change it.
        held: requested slots that have no room now.
        coming: where requested slots go that have room.
    """

    state: ClusterState
    base: Index
    index: Index
    held: frozenset[str]
    coming: dict[str, Grant]


def ahead_of(state: ClusterState, index: Index, setup: Setup, kept: Kept | None = None) -> Ahead:
    """What is about to happen.

    Args:
        state: one look at the store.
        index: the ledger that follows from it; not changed.
        setup: what decides besides it.
        kept: as it was a moment ago, where that is good enough; else it is worked out, which is most of the work.
    """
    kept = kept or kept_of(state, index, setup)
    requested = {slot.slot_id for slot in state.slots if slot.status is SlotStatus.REQUESTED}
    if not requested:
        return Ahead(state, index, index, frozenset(), {})
    scratch, placed = _with(kept, requested, state, index, setup)
    coming = {slot_id: grant for slot_id, grant in placed.items() if grant is not None}
    return Ahead(state, index, scratch, _unplaced(placed), coming)


def kept_of(state: ClusterState, index: Index, setup: Setup) -> Kept:
    """What is held and what room is kept, as leader and plugin find it."""
    requested = {slot.slot_id for slot in state.slots if slot.status is SlotStatus.REQUESTED}
    if not requested:
        return Kept()
    kept = Kept(_unplaced(_with(Kept(), requested, state, index, setup)[1]))
    for _ in range(SETTLING_MAX):
        kept = Kept(kept.held, plan(state, index, kept.held, setup.limits).keep)
        held = _unplaced(_with(kept, requested, state, index, setup)[1])
        # Room that is kept for some is not there for others: these are held then, and room may be kept for them too.
        if held <= kept.held:
            break
        kept = Kept(kept.held | held, kept.keep)
    return kept


def _with(
    kept: Kept, requested: Collection[str], state: ClusterState, index: Index, setup: Setup
) -> tuple[Index, dict[str, Grant | None]]:
    """The ledger with that room kept and with what was asked for placed, and where it is."""
    scratch = index.copy()
    for slot_id, grant in kept.keep:
        if slot_id in requested and grant.node in scratch.nodes:
            scratch.keep(slot_id, grant)
    return scratch, _place_requested(state, scratch, setup)


def _unplaced(placed: Mapping[str, Grant | None]) -> frozenset[str]:
    return frozenset(slot_id for slot_id, grant in placed.items() if grant is None)


def _place_requested(state: ClusterState, scratch: Index, setup: Setup) -> dict[str, Grant | None]:
    """Place what was asked for and is not open, in the order in which it is served; None where there is no room."""
    requested: dict[str, list[str]] = {}
    for slot in state.slots:
        if slot.status is SlotStatus.REQUESTED:
            requested.setdefault(slot.shape_id, []).append(slot.slot_id)
    found: dict[str, Grant | None] = {}
    if not requested:
        return found
    for need in needs_of(state, frozenset(), setup.limits):
        for slot_id in requested.get(need.queue.shape_id, ()):
            kept = scratch.unkeep(slot_id)
            grant = find(need.queue.resources, scratch, setup.policy, setup.demand)
            if grant is not None:
                scratch.lease(slot_id, grant)
            elif kept is not None:
                scratch.keep(slot_id, kept)
            found[slot_id] = grant
    return found


def ahead_for(ahead: Ahead, shape_id: str) -> Ahead:
    """The same as it is for work of that shape: room that is kept for it is no room that is taken from it."""
    own = [slot.slot_id for slot in ahead.state.slots if slot.shape_id == shape_id and slot.slot_id in ahead.index.kept]
    if not own:
        return ahead
    index = ahead.index.copy()
    for slot_id in own:
        index.unkeep(slot_id)
    return msgspec.structs.replace(ahead, index=index)


class Ending(msgspec.Struct, frozen=True):
    """Slots of one node whose end would make room.

    Attributes:
        seconds: until the last of them has ended, by the learned run times of what they run; None: not known.
    """

    node: str
    slots: tuple[str, ...]
    seconds: float | None


def ends_of(state: ClusterState, rank: int, limits: Limits) -> dict[str, float | None]:
    """Seconds until each open slot may make room for work of that priority; None where nothing is known.

    A slot that is idle goes at once, one that is asked to end with its running task. One that works for others of the same
    or a lower priority goes at a task boundary, once it has had its residence. One that works for a higher one stays until
    nothing waits behind it.
    """
    queues = {queue.shape_id: queue for queue in state.queues}
    serving = Counter(slot.shape_id for slot in state.slots if is_serving(slot))
    return {
        slot.slot_id: _end(slot, queues.get(slot.shape_id), serving[slot.shape_id], rank, state.now_ms, limits)
        for slot in state.slots
        if slot.status is SlotStatus.OPEN
    }


def _end(slot: SlotRow, queue: QueueRow | None, serving: int, rank: int, now_ms: int, limits: Limits) -> float | None:
    if slot.kind is SlotKind.DIRECT:
        return None
    if slot.running == 0 and slot.idle_ms is not None:
        return 0.0
    if queue is None or queue.run_s is None:
        return None
    if slot.flag is not SlotFlag.NONE:
        return queue.run_s
    if queue.depth and priority_rank(queue) < rank:
        return (queue.depth + serving) * queue.run_s / max(1, serving)
    residence_left_s = 0.0 if slot.opened_ms is None else limits.residence_s - (now_ms - slot.opened_ms) / 1000
    return queue.run_s + max(0.0, residence_left_s)


def is_serving(slot: SlotRow) -> bool:
    """Whether the slot takes tasks of its shape and goes on doing so."""
    return slot.status is SlotStatus.OPEN and slot.flag is SlotFlag.NONE and slot.kind is SlotKind.TASKS


def ending_for(resources: Resources, ahead: Ahead, rank: int, limits: Limits) -> Ending | None:
    """Which slots have to end so that the request fits, those that end soonest; None where no set of them does.

    Args:
        resources: what must fit; it does not now.
        ahead: what is about to happen; room that is kept for others stays kept.
        rank: of the priority of what asks.
        limits: the operator's.
    """
    ends = ends_of(ahead.state, rank, limits)
    costs = {slot_id: UNKNOWN_END if seconds is None else seconds + 1e-3 for slot_id, seconds in ends.items()}
    chosen = victims(resources, ahead.index, costs)
    if not chosen:
        return None
    known = [seconds for slot_id in chosen if (seconds := ends[slot_id]) is not None]
    seconds = max(known, default=0.0) if len(known) == len(chosen) else None
    return Ending(ahead.index.grants[chosen[0]].node, chosen, seconds)


def opening_s(slots: Iterable[SlotRow]) -> float | None:
    """How long a slot that has room takes to open: the lower quartile of those that are open (others were held before).

    None where none is open.
    """
    took = sorted(
        max(0, slot.opened_ms - slot.requested_ms) / 1000
        for slot in slots
        if slot.status is SlotStatus.OPEN and slot.opened_ms is not None and slot.requested_ms
    )
    return took[len(took) // 4] if took else None


def turn_s(queue: QueueRow, before: int, serving: int) -> float | None:
    """Seconds until a task with so many of its shape before it is taken by one of the slots that serve it, all at work."""
    if queue.run_s is None or serving == 0:
        return None
    return (before + 1) * queue.run_s / serving
