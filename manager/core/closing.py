"""Who ends so that what waits finds room, and what room is kept for it. Pure, a part of the plan.

Victims come from the ledger: slots on one node whose end makes the shape fit there. What they give back is kept for whom they
ended: otherwise small shapes would take each piece as it comes, and a large one would never see them all together.
Slots that are kept warm end for work that waits, the last of all idle ones; nothing ends so that others can be kept warm.
Where no slot may be asked to end, who stands first in the line has room kept on one node all the same: what ends there by
itself is not given to those behind.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Final

import msgspec

from manager.core.index import Index
from manager.core.lifecycle import SlotFlag, SlotKind, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow, TenantRow, priority_of
from manager.core.needs import UNKNOWN_RUN_S, Limits, Need, priority_rank
from manager.core.placement import find
from manager.core.policies import BEST_FIT
from manager.core.reservations import best_room, grant_in, is_ready
from manager.core.shapes import Grant, Resources, asks_for_all_of
from manager.core.shares import at_work, parts_of
from manager.core.victims import victims

WARM_COST: Final = 10.0
"""Ending an idle slot that is to be kept warm costs more than ending another idle one."""
BUSY_COST: Final = 1e6
"""Ending a busy slot at its task boundary costs more than ending any number of idle ones on a device."""
RESIDENT_COST: Final = 1e12
"""And waiting until a slot has been there for long enough, more than ending any number of busy ones."""
SEARCHES_MAX: Final = 16
"""Held shapes that get victims in one round; the others follow a quarter of a second later. Bounds a round's time."""


HIGH_MIN: Final = 5
"""A task of this priority or more that waits for too long may have tasks pre-empted that are of `LOW_MAX` or less."""
LOW_MAX: Final = -5


class Close(msgspec.Struct, frozen=True):
    """End a slot. `reason`: Idle, Unloaded, TooManyIdle, or the shape that wants its memory; `flag`: CLOSE or PREEMPT."""

    slot_id: str
    reason: str
    flag: SlotFlag = SlotFlag.CLOSE


class TooLarge:
    """What was found not to fit. Room only shrinks within a round, so what needs as much need not be tried again."""

    def __init__(self) -> None:
        self._tried: list[Resources] = []

    def add(self, resources: Resources) -> None:
        self._tried.append(resources)

    def __contains__(self, resources: Resources) -> bool:
        return any(asks_for_all_of(resources, tried) for tried in self._tried)


def closes_of(
    state: ClusterState, index: Index, needs: Sequence[Need], limits: Limits
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
        sides = _Sides(state)
        candidates: dict[_Kind, dict[str, float]] = {}
        for slot in state.slots:
            if (found := _candidate(slot, queues, sides, state.now_ms, limits)) is not None:
                candidates.setdefault(found[0], {})[slot.slot_id] = found[1]
        own = {slot.slot_id: slot.shape_id for slot in state.slots}
        searches = 0
        first_in_line = True
        for need in waiting:
            queue, resources = need.queue, need.queue.resources
            pressing = _is_pressing(queue, state.now_ms, limits)
            fit = find(resources, scratch, BEST_FIT)
            if fit is None and searches < SEARCHES_MAX:
                searches += 1
                costs = sides.costs(candidates, queue, limits, pressing=pressing)
                chosen = victims(resources, scratch, costs)
                for slot_id in chosen:
                    scratch.free(slot_id)
                    if costs[slot_id] < RESIDENT_COST:
                        closes[slot_id] = Close(slot_id, queue.shape_id)
                if chosen:
                    for members in candidates.values():
                        for slot_id in chosen:
                            members.pop(slot_id, None)
                    fit = find(resources, scratch, BEST_FIT)
                elif first_in_line and (room := best_room(resources, scratch)) is not None:
                    first_in_line = False
                    devices = [scratch.nodes[room.node].devices[uuid] for uuid in room.devices]
                    # What its own slots give back comes to it in any case.
                    if any(own.get(slot_id) != queue.shape_id for device in devices for slot_id in device.slots):
                        fit = grant_in(room, resources)
            if fit is not None:
                scratch.keep(need.held[0], fit)
                keep.append((need.held[0], fit))
                if pressing:
                    closes |= {close.slot_id: close for close in _preempted(state, fit, closes, queue.shape_id)}
    for close in _idle_closes(state, queues, needs, closes.keys(), limits):
        closes[close.slot_id] = close
    return list(closes.values()), _undelayed(keep, index)


def _undelayed(keep: Sequence[tuple[str, Grant]], index: Index) -> list[tuple[str, Grant]]:
    """Of rooms to be kept, in the order of service, those that make no earlier one wait whose own room is free already.

    They were found as if all had ended that is to end. Until then, room that is kept for a later one may take from what is free
    now. The earlier one is placed at once; the later one has its room kept from the next round on.
    """
    if len(keep) < 2:
        return list(keep)
    scratch = index.copy()
    ready: list[tuple[str, Grant]] = []
    found: list[tuple[str, Grant]] = []
    for slot_id, grant in keep:
        scratch.keep(slot_id, grant)
        view = scratch.nodes[grant.node]
        if any(room.node == grant.node and not is_ready(earlier, room, view) for earlier, room in ready):
            scratch.unkeep(slot_id)
            continue
        found.append((slot_id, grant))
        if is_ready(slot_id, grant, view):
            ready.append((slot_id, grant))
    return found


def _is_pressing(queue: QueueRow, now_ms: int, limits: Limits) -> bool:
    """Whether what waits may have running tasks of low priority pre-empted."""
    if not limits.preempt_s or queue.head is None or queue.head_queued_ms is None:
        return False
    return priority_of(queue.head) >= HIGH_MIN and now_ms - queue.head_queued_ms >= limits.preempt_s * 1000


def _is_low(slot: SlotRow) -> bool:
    """Whether the slot runs nothing but tasks that may be pre-empted."""
    return slot.running > 0 and slot.score is not None and priority_of(slot.score) <= LOW_MAX


def _preempted(state: ClusterState, fit: Grant, closes: Container[str], shape_id: str) -> list[Close]:
    """Of the slots that end so that `fit` is free, those that need not come to their task boundary first."""
    return [
        Close(slot.slot_id, shape_id, SlotFlag.PREEMPT)
        for slot in state.slots
        if slot.node == fit.node
        and not set(slot.devices).isdisjoint(fit.devices)
        and (slot.slot_id in closes or slot.flag is SlotFlag.CLOSE)
        and _is_low(slot)
    ]


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


class _Kind(msgspec.Struct, frozen=True):
    """What decides whether a slot may have to end for another shape. Few of them are many slots.

    Attributes:
        rank: of what waits behind it, None where nothing does.
        part: of devices that it leases.
        young: it has not been there for the minimum residence.
        low: what it runs may be pre-empted.
    """

    shape_id: str
    tenant: str
    part: float
    idle: bool
    young: bool
    low: bool
    rank: int | None


def _candidate(
    slot: SlotRow, queues: Mapping[str, QueueRow], sides: "_Sides", now_ms: int, limits: Limits
) -> tuple[_Kind, float] | None:
    """What kind of slot it is, and what ending it costs; None where it is not open, ends already, or is somebody's Dask task.

    Of the idle ones the one that has been idle for longest is the cheapest; of the busy ones the one whose tasks are short.
    """
    if slot.status is not SlotStatus.OPEN or slot.flag is not SlotFlag.NONE or slot.opened_ms is None:
        return None
    if slot.kind is SlotKind.DIRECT:
        return None
    own = queues.get(slot.shape_id)
    idle = slot.idle_ms is not None and slot.running == 0
    if idle:
        idle_s = max(0.0, (now_ms - (slot.idle_ms or 0)) / 1000)
        cost = 1.0 / (1.0 + idle_s) + (WARM_COST if own is not None and own.warm else 0.0)
    else:
        cost = BUSY_COST + (UNKNOWN_RUN_S if own is None or own.run_s is None else own.run_s)
    kind = _Kind(
        shape_id=slot.shape_id,
        tenant="" if own is None else own.shape.tenant,
        part=sides.parts.get(slot.slot_id, 0.0),
        idle=idle,
        young=not idle and 0 <= now_ms - slot.opened_ms < limits.residence_s * 1000,  # below: the clock was set back
        low=_is_low(slot),
        rank=None if own is None or own.depth == 0 else priority_rank(own),
    )
    return kind, cost


class _Sides:
    """What tenants, and the shapes of one, have at work now and have had: by this it is decided who may be asked to end."""

    def __init__(self, state: ClusterState) -> None:
        self.parts = parts_of(state)
        self._tenants = {row.tenant: row for row in state.tenants}
        self._queues = {queue.shape_id: queue for queue in state.queues}
        self._tenants_have: defaultdict[str, float] = defaultdict(float)
        self._shapes_have: defaultdict[str, float] = defaultdict(float)
        for slot in state.slots:
            if slot.slot_id in self.parts and slot.flag is SlotFlag.NONE and at_work(slot):
                part = self.parts[slot.slot_id]
                self._shapes_have[slot.shape_id] += part
                if (own := self._queues.get(slot.shape_id)) is not None:
                    self._tenants_have[own.shape.tenant] += part / self._tenant(own.shape.tenant).weight

    def _tenant(self, tenant: str) -> TenantRow:
        return self._tenants.get(tenant) or TenantRow(tenant=tenant)

    def costs(
        self, candidates: Mapping[_Kind, Mapping[str, float]], wanting: QueueRow, limits: Limits, *, pressing: bool
    ) -> dict[str, float]:
        """What each slot costs that may be asked to end for `wanting`.

        An idle slot may always go. A busy one goes at its task boundary if the priority of what waits behind it is lower; or,
        with nothing of a higher priority behind it, if its side has more devices now than the one that waits, and has had
        more, by what the slot has in the minimum residence. Between tenants, their weighted shares are compared; between
        shapes of one tenant, theirs. Sides that have about the same would else change places for ever.
        """
        rank = priority_rank(wanting)
        tenant = self._tenant(wanting.shape.tenant)

        def may_go(c: _Kind) -> bool:
            if c.idle or (c.rank is not None and rank < c.rank) or (pressing and c.low):
                return True
            if c.rank is not None and rank > c.rank:
                return False
            if c.tenant == tenant.tenant:
                theirs, ours = self._shapes_have[c.shape_id], self._shapes_have[wanting.shape_id]
                own = self._queues[c.shape_id]
                ahead_s = (own.vtime_s or 0.0) - (wanting.vtime_s or 0.0) - limits.residence_s * c.part
            else:
                theirs, ours = self._tenants_have[c.tenant], self._tenants_have[tenant.tenant]
                other = self._tenant(c.tenant)
                ahead_s = (other.vtime_s or 0.0) - (tenant.vtime_s or 0.0) - limits.residence_s * c.part / other.weight
            return theirs > ours and ahead_s > 0

        found: dict[str, float] = {}
        for c, costs in candidates.items():
            if c.shape_id != wanting.shape_id and may_go(c):
                is_resident = c.young and not (pressing and c.low)
                found |= {slot_id: cost + RESIDENT_COST for slot_id, cost in costs.items()} if is_resident else costs
        return found
