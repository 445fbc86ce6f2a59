"""What to open and what to close: the leader's decision. Pure: values in, `Plan` out.

A slot of a shape serves its tasks one after the other, so the question is how many slots drain the queue in time
(`manager.core.needs`), whether they fit, and, where they do not, whose slots end for them (`manager.core.closing`). What cannot
be placed is asked for once per shape: the held slot is what victims are chosen for, again in each round, until it is placed.
No more slots are asked for than the tenant's quota lets work (`manager.core.shares` says how fair shares are measured).
"""

from typing import Final

import msgspec

from manager.core.closing import Close, TooLarge, closes_of
from manager.core.index import Index
from manager.core.lifecycle import SlotStatus
from manager.core.model import ClusterState, QueueRow
from manager.core.needs import UNKNOWN_OPEN_MAX, Limits, needs_of, wake_depth
from manager.core.placement import copies_of, find, several_of
from manager.core.policies import BEST_FIT
from manager.core.shapes import Grant

STARTING_S: Final = 2.0
"""An executor is taken to start for so long after its slot has opened, unless it has ended a task: imports take seconds."""
AGAIN_S: Final = 0.25
NEVER: Final = 2**31
"""As a depth to ask again at: more work of a shape that is held changes nothing."""


class Open(msgspec.Struct, frozen=True):
    """Open `count` slots of a shape, each of which serves at most `served_max` tasks (0: no limit)."""

    shape_id: str
    count: int
    served_max: int


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


def plan(state: ClusterState, index: Index, held: frozenset[str], limits: Limits) -> Plan:
    """What to open and what to close.

    Args:
        state: one look at the store, with the virtual times of tenants and shapes (see `shares.accounted`).
        index: the ledger that goes with it; not changed.
        held: ids of requested slots that the scheduler plugin could not place.
        limits: the operator's.
    """
    needs = needs_of(state, held, limits)
    closes, keep = closes_of(state, index, needs, limits)
    scratch = index.copy()
    for slot_id, grant in keep:
        scratch.keep(slot_id, grant)
    for need in needs:
        # Asked for and not held: the plugin is placing these now, so their room is taken.
        _take(need.queue, scratch, need.requested, "asked")
    opens: list[Open] = []
    drops: list[str] = []
    wake_at: list[tuple[str, int]] = []
    too_large = TooLarge()
    starts = _starts(state, held)
    put_off = False
    for need in needs:
        queue = need.queue
        missing = need.firm - need.serving - need.asked
        if missing > 0 and starts is not None:
            # Hosts that start more processes than they have CPUs finish none of them sooner. A first one always may.
            allowed = max(starts, 0 if need.serving or need.asked else 1)
            put_off = put_off or missing > allowed
            missing = min(missing, allowed)
        count = 0
        if missing > 0 and not need.held:
            resources = queue.resources
            if resources not in too_large:
                count = _take(queue, scratch, missing, "new")
            if count < missing:
                too_large.add(resources)
                # One that is held makes the need visible: to explain, to victims, to the autoscaler.
                count += need.requested == 0
        elif missing < 0:
            surplus = need.held[missing:]
            drops += surplus if need.wanted else [*surplus, *_requested(state, queue.shape_id, held)]
        if starts is not None:
            starts -= count
        if count:
            opens.append(Open(queue.shape_id, count, queue.shape.max_tasks_per_slot))
        # A slot that is only to be warm may be held for as long as it takes: work that comes does not wait with it.
        alive = need.serving + need.requested + count
        wake_at.append((queue.shape_id, NEVER if need.waits or need.capped else wake_depth(queue, alive, limits)))
    for need in needs:
        # What the quota leaves without a slot gets one last of all, where there is room: it takes turns with its siblings.
        if not need.serving and not need.asked and need.wanted > need.firm and (starts is None or starts > 0):
            if count := _take(need.queue, scratch, 1, "turn"):
                opens.append(Open(need.queue.shape_id, count, need.queue.shape.max_tasks_per_slot))
            starts = None if starts is None else starts - count
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
        slot.slot_id not in held and slot.served == 0 and (slot.opened_ms is None or young_ms < slot.opened_ms <= state.now_ms)
        for slot in state.slots
    )
    return max(0, max(UNKNOWN_OPEN_MAX, sum(cpus.values())) - starting)


def _requested(state: ClusterState, shape_id: str, held: frozenset[str]) -> list[str]:
    """Slots of the shape that were asked for and are neither open nor held."""
    return [
        slot.slot_id
        for slot in state.slots
        if slot.shape_id == shape_id and slot.status is SlotStatus.REQUESTED and slot.slot_id not in held
    ]


def _take(queue: QueueRow, scratch: Index, count: int, name: str) -> int:
    """How many of `count` slots fit on what is left; what fits is taken from `scratch`."""
    resources = queue.resources
    taken = 0
    while taken < count and (grant := find(resources, scratch, BEST_FIT)) is not None:
        # As many as fit on these very devices at once: a round must not ask for each of thousands.
        several = min(copies_of(resources, grant, scratch), count - taken)
        scratch.lease(f"{name} {queue.shape_id}/{taken}", several_of(grant, several))
        taken += several
    return taken
