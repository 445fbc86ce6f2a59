"""How many nodes each group should have for the work that there is: the packed need. Pure: values in, `Packing` out.

What holds work now stays where it is; what waits is packed onto the free room of those nodes, then onto idle ones, then onto
nodes that do not exist yet, large shapes first. A slot that is idle holds no work: its room counts as free. What no group's
node and no node that there is could ever hold is infeasible, and asks for nothing.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from manager.core.index import index_of
from manager.core.lifecycle import Cordon, SlotKind, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.needs import service_order
from manager.core.node_kinds import Capacity, NodeKind, empty_node, kind_of
from manager.core.placement import Reason
from manager.core.rooms import Part, Room
from manager.core.shapes import Resources
from manager.core.shares import QuotaLeft


class PackGroup(msgspec.Struct, frozen=True):
    """A group to which nodes can be added: what one of its nodes is, and how many it may have."""

    name: str
    kind: NodeKind
    nodes_max: int


class DirectDemand(msgspec.Struct, frozen=True):
    """Requests of Dask users that are held for want of room. `resources` is all of one; None: these two fields are."""

    memory_bytes: int
    gpus: int
    count: int
    resources: Resources | None = None

    @property
    def needs(self) -> Resources:
        """What one of them asks for."""
        return self.resources or Resources(self.memory_bytes, self.gpus)


class GroupNeed(msgspec.Struct, frozen=True):
    """One group.

    Attributes:
        nodes: how many it should have that take new work, those among them that are there already.
        used: of those that are there, how many hold work.
        live, cordoned, lost: nodes that are there, by state.
    """

    group: str
    nodes: int
    used: int = 0
    live: int = 0
    cordoned: int = 0
    lost: int = 0


class Infeasible(msgspec.Struct, frozen=True):
    """Tasks that nothing could ever hold, by reason."""

    reason: Reason
    tasks: int


class Packing(msgspec.Struct, frozen=True):
    """What the work asks for. `unplaced`: slots for which a group has a node, but none more that it may add."""

    needs: tuple[GroupNeed, ...]
    infeasible: tuple[Infeasible, ...] = ()
    unplaced: int = 0


def pack(
    state: ClusterState,
    groups: Sequence[PackGroup],
    drain_target_s: float,
    direct: Iterable[DirectDemand] = (),
    blocked: Collection[str] = (),
) -> Packing:
    """The packed need of each group.

    Args:
        state: one look at the store.
        groups: those that nodes can be added to.
        drain_target_s: what waits should be done within this time.
        direct: what Dask users ask for and waits.
        blocked: groups that cannot get another node now; others take over what they can.
    """
    index = index_of(state)
    pinned = _pinned(state)
    for slot in state.slots:
        if slot.slot_id not in pinned:
            index.free(slot.slot_id)
    busy_nodes = {slot.node for slot in state.slots if slot.slot_id in pinned}
    group_of = {row.node: row.info.group for row in state.nodes}
    needs = _Counts(state, {group.name for group in groups}, busy_nodes)
    kinds = {group.name: _true_kind(group, state) for group in groups}
    budgets = {
        group.name: 0 if group.name in blocked else max(0, group.nodes_max - needs.there[group.name]) for group in groups
    }
    capacity = Capacity.of(
        ((row.node, row.info) for row in state.nodes if not row.left),
        ((group.name, kinds[group.name]) for group in groups if group.nodes_max),
    )
    infeasible: Counter[Reason] = Counter()
    wanted: dict[Resources, int] = {}
    for resources, (slots, tasks) in _demand(state, pinned, drain_target_s, direct).items():
        refusal = capacity.refusal(resources)
        if refusal is not None or not capacity.is_known:
            if tasks:
                infeasible[Reason.TOO_FEW_DEVICES if refusal is None else refusal.reason] += tasks
        elif slots:
            wanted[resources] = slots
    rooms = [
        Room(view, group_of[name], used=name in busy_nodes)
        for name, view in index.nodes.items()
        if not view.cordoned and not view.lost
    ]
    fresh = {name: Room(empty_node("", kind), name) for name, kind in kinds.items()}
    unplaced = _Packer(rooms, fresh, budgets).pack(wanted)
    for room in rooms:
        if room.touched and not room.used:
            needs.nodes[room.group] += 1
    return Packing(
        needs=tuple(needs.of(group.name) for group in groups),
        infeasible=tuple(Infeasible(reason, tasks) for reason, tasks in sorted(infeasible.items())),
        unplaced=unplaced,
    )


class _Counts:
    """Nodes of each group by state, and how many are needed as far as is known."""

    def __init__(self, state: ClusterState, groups: Collection[str], busy_nodes: Collection[str]) -> None:
        self.there: Counter[str] = Counter()
        self.nodes: Counter[str] = Counter()
        self._used: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._cordoned: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        for row in state.nodes:
            group = row.info.group
            if row.left or group not in groups:
                continue
            if row.fenced:
                self._lost[group] += 1
                continue
            self.there[group] += 1
            if row.cordon is not Cordon.NONE:
                self._cordoned[group] += 1
                continue
            self._live[group] += 1
            self._used[group] += row.node in busy_nodes
            self.nodes[group] += row.node in busy_nodes

    def of(self, group: str) -> GroupNeed:
        return GroupNeed(
            group, self.nodes[group], self._used[group], self._live[group], self._cordoned[group], self._lost[group]
        )


def holds_work(slot: SlotRow) -> bool:
    """Whether the slot must stay where it is: it runs something, or is about to. One that is idle may go."""
    return slot.status is SlotStatus.OPEN and (slot.kind is SlotKind.DIRECT or slot.running > 0 or slot.idle_ms is None)


def _pinned(state: ClusterState) -> set[str]:
    """Slots that hold work, and idle ones that are to be kept warm."""
    pinned = {slot.slot_id for slot in state.slots if holds_work(slot)}
    for queue in state.queues:
        if queue.warm:
            own = [slot for slot in state.slots if slot.shape_id == queue.shape_id and slot.status is SlotStatus.OPEN]
            busy = sum(slot.slot_id in pinned for slot in own)
            idle = sorted(slot.slot_id for slot in own if slot.slot_id not in pinned)
            pinned.update(idle[: max(0, queue.warm - busy)])
    return pinned


def _further(queue: QueueRow, held: int, busy: int, drain_target_s: float, now_ms: int) -> int:
    """How many slots the queue needs besides the `held` ones that serve it or are kept warm for it.

    A slot that has just opened is held and not `busy`: what it is about to take still waits, and is counted there.
    """
    wanted = 0
    if queue.depth:
        most = queue.depth + busy
        wanted = most if queue.run_s is None else max(1, min(most, math.ceil(most * queue.run_s / drain_target_s)))
        if queue.head_queued_ms is not None and now_ms - queue.head_queued_ms > drain_target_s * 1000:
            wanted = max(wanted, min(most, 2 * busy))  # they take longer than those did from which that was learned
    return max(0, max(wanted, queue.warm) - held)


Demand = dict[Resources, tuple[int, int]]
"""What is asked for → (further slots, tasks that wait)."""


def _demand(state: ClusterState, pinned: Collection[str], drain_target_s: float, direct: Iterable[DirectDemand]) -> Demand:
    held = Counter(slot.shape_id for slot in state.slots if slot.slot_id in pinned)
    busy = Counter(slot.shape_id for slot in state.slots if slot.slot_id in pinned and slot.running)
    found: Demand = {}

    def add(resources: Resources, slots: int, tasks: int) -> None:
        # What is warm where says where a slot goes best, not how much room it needs.
        resources = msgspec.structs.replace(resources, model="") if resources.model else resources
        before = found.get(resources, (0, 0))
        found[resources] = (before[0] + slots, before[1] + tasks)

    tenants = {row.tenant: row for row in state.tenants}
    quotas = {name: QuotaLeft(row) for name, row in tenants.items()}
    for queue in sorted(state.queues, key=lambda q: service_order(q, tenants)):
        there, needs = held[queue.shape_id], queue.resources
        further = _further(queue, there, busy[queue.shape_id], drain_target_s, state.now_ms)
        if (quota := quotas.get(queue.shape.tenant)) is not None:
            # No node is added for what the tenant's quota would not let work there.
            further = max(0, quota.take(needs.gpus, needs.gpus * needs.memory_bytes, there + further) - there)
        add(needs, further, queue.depth)
    for request in direct:
        add(request.needs, request.count, request.count)
    return found


def _true_kind(group: PackGroup, state: ClusterState) -> NodeKind:
    """What a node of the group turned out to be, where there is one: settings may promise more than it has."""
    found = [kind_of(row.info) for row in state.nodes if row.info.group == group.name and not row.left and row.info.devices]
    return max(found, key=lambda kind: kind.total_bytes) if found else group.kind


class _Packer:
    """First fit, large requests first, all slots of a kind at once. Rooms in use come before idle ones before new ones."""

    def __init__(self, rooms: list[Room], fresh: Mapping[str, Room], budgets: dict[str, int]) -> None:
        self.rooms = rooms
        self.fresh = fresh
        self.budgets = budgets

        def order(room: Room) -> tuple[bool, bool, int, str]:
            # Nodes of no group stay in any case, so they are filled before those that could go.
            return (not room.used, room.group in fresh, sum(size for size in room.free if size > 0), room.name)

        rooms.sort(key=order)

    def pack(self, wanted: Mapping[Resources, int]) -> int:
        """Place all that can be placed; how many slots cannot."""
        queue = sorted(((Part(resources), count) for resources, count in wanted.items()), key=lambda item: item[0].order)
        unplaced = 0
        for at, (part, count) in enumerate(queue):
            left = count
            memory_bytes = part.memory_bytes
            for taken in (True, False):  # first where there is work already, by earlier requests too
                for room in self.rooms:
                    if left and (room.used or room.touched) is taken and room.largest >= memory_bytes:
                        left -= room.take(part, left)
            unplaced += self._place_anew(part, left, queue[at + 1 :])
        return unplaced

    def _place_anew(self, part: Part, count: int, later: Sequence[tuple[Part, int]]) -> int:
        """Place slots on new nodes; how many have none."""
        while count:
            best: tuple[float, int, str] | None = None
            for name, fresh in self.fresh.items():
                if self.budgets[name] > 0 and (filled := _fill(fresh, part, count, later)):
                    size = sum(fresh.free)
                    best = min(best or (1.0, 0, ""), (-filled / size, size, name))
            if best is None:
                return count
            name = best[2]
            while True:
                self.budgets[name] -= 1
                room = self.fresh[name].copy()
                taken = room.take(part, count)
                count -= taken
                self.rooms.append(room)
                if count < taken or not self.budgets[name]:
                    break  # until then the next node would hold the same as this one, and the same group be the best
        return 0


def _fill(fresh: Room, part: Part, count: int, later: Sequence[tuple[Part, int]]) -> int:
    """Bytes that a new node would hold of a request and of the smaller ones after it; 0 where the request does not fit."""
    room = fresh.copy()
    taken = room.take(part, count)
    filled = taken * part.memory_bytes * part.gpus
    if taken:
        for other, number in later:
            if room.left <= 0 or room.largest <= 0:
                break
            filled += room.take(other, number) * other.memory_bytes * other.gpus
    return filled
