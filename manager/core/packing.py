"""How many nodes each group should have for the work that there is: the packed need. Pure: values in, `Packing` out.

What holds work now stays where it is; what waits is packed onto the free room of those nodes, then onto idle ones, then onto
nodes that do not exist yet, large shapes first. A slot that is idle holds no work: its room counts as free. What no group's
node and no node that there is could ever hold is infeasible, and asks for nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from manager.core.devices import MODELS
from manager.core.index import SLOTS_MAX, Index, index_of
from manager.core.lifecycle import Cordon, SlotKind, SlotStatus
from manager.core.model import ClusterState, QueueRow, SlotRow
from manager.core.placement import Reason
from manager.core.quantities import parse_memory
from manager.core.shapes import GPUS_MAX

_KIND: Final = re.compile(r"([0-9]{1,4}):([a-z0-9. ]{1,30})")


class NodeKind(msgspec.Struct, frozen=True):
    """What an empty node offers: the bytes that each of its devices can promise, and how many slots it may have."""

    sizes: tuple[int, ...]
    slots_max: int = SLOTS_MAX


class PackGroup(msgspec.Struct, frozen=True):
    """A group to which nodes can be added: what one of its nodes is, and how many it may have."""

    name: str
    kind: NodeKind
    nodes_max: int


class DirectDemand(msgspec.Struct, frozen=True):
    """Requests of Dask users that are held for want of room."""

    memory_bytes: int
    gpus: int
    count: int


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


def node_kind(text: str, reserve_bytes: int = 0, memory_ratio_max: float = 1.0, slots_max: int = SLOTS_MAX) -> NodeKind:
    """What one node of a group is, from ``COUNT:MODEL`` or ``COUNT:SIZE``.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    match = _KIND.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not the devices of a node: write COUNT:MODEL such as '8:mi300x', or '8:192GiB'")
    count, name = int(match[1]), match[2].strip()
    if not 1 <= count <= GPUS_MAX:
        raise ValueError(f"{text[:40]!r}: a node has from 1 to {GPUS_MAX} devices")
    model = MODELS.get(name)
    try:
        total = parse_memory(name) if model is None else model.memory_bytes
    except ValueError:
        raise ValueError(f"{name!r} is neither a size such as '192GiB' nor one of the models {', '.join(MODELS)}") from None
    reserve = max(reserve_bytes, total - int(total * memory_ratio_max))
    return NodeKind((max(0, total - reserve),) * count, slots_max)


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
    kinds = {group.name: _true_kind(group, index, group_of) for group in groups}
    budgets = {
        group.name: 0 if group.name in blocked else max(0, group.nodes_max - needs.there[group.name]) for group in groups
    }
    feasible = [NodeKind(tuple(pool.usable_bytes for pool in view.pools.values())) for view in index.nodes.values()]
    feasible += [kinds[group.name] for group in groups if group.nodes_max]
    demand = _demand(state, pinned, drain_target_s, direct)
    infeasible: Counter[Reason] = Counter()
    wanted: dict[tuple[int, int], int] = {}
    for (memory_bytes, gpus), (slots, tasks) in demand.items():
        reason = _impossible(memory_bytes, gpus, feasible)
        if reason is not None:
            if tasks:
                infeasible[reason] += tasks
        elif slots:
            wanted[memory_bytes, gpus] = slots
    rooms = [
        _Room(name, group_of[name], [pool.free_bytes if pool.healthy else -1 for pool in view.pools.values()], left, used)
        for name, view in index.nodes.items()
        if not view.cordoned and not view.lost
        for left, used in ((view.slots_max - len(view.slots), name in busy_nodes),)
    ]
    unplaced = _Packer(rooms, kinds, budgets).pack(wanted)
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


Demand = dict[tuple[int, int], tuple[int, int]]
"""(memory, GPUs) → (further slots, tasks that wait)."""


def _demand(state: ClusterState, pinned: Collection[str], drain_target_s: float, direct: Iterable[DirectDemand]) -> Demand:
    held = Counter(slot.shape_id for slot in state.slots if slot.slot_id in pinned)
    busy = Counter(slot.shape_id for slot in state.slots if slot.slot_id in pinned and slot.running)
    found: Demand = {}

    def add(memory_bytes: int, gpus: int, slots: int, tasks: int) -> None:
        before = found.get((memory_bytes, gpus), (0, 0))
        found[memory_bytes, gpus] = (before[0] + slots, before[1] + tasks)

    for queue in state.queues:
        further = _further(queue, held[queue.shape_id], busy[queue.shape_id], drain_target_s, state.now_ms)
        add(queue.shape.memory_bytes, queue.shape.gpus, further, queue.depth)
    for request in direct:
        add(request.memory_bytes, request.gpus, request.count, request.count)
    return found


def _impossible(memory_bytes: int, gpus: int, kinds: Iterable[NodeKind]) -> Reason | None:
    """Why nothing could ever hold the shape; None where something could."""
    enough = False
    for kind in kinds:
        if len(kind.sizes) >= gpus:
            enough = True
            if sum(size >= memory_bytes for size in kind.sizes) >= gpus:
                return None
    return Reason.EXCEEDS_LARGEST_DEVICE if enough else Reason.TOO_FEW_DEVICES


def _true_kind(group: PackGroup, index: Index, group_of: Mapping[str, str]) -> NodeKind:
    """What a node of the group turned out to be, where there is one: settings may promise more than it has."""
    found = [
        NodeKind(tuple(pool.usable_bytes for pool in view.pools.values()), view.slots_max)
        for name, view in sorted(index.nodes.items())
        if group_of[name] == group.name and view.pools
    ]
    return max(found, key=lambda kind: sum(kind.sizes)) if found else group.kind


class _Room:
    """What is free on one node, there or not yet."""

    __slots__ = ("free", "group", "largest", "left", "name", "touched", "used")

    def __init__(self, name: str, group: str, free: list[int], left: int, used: bool) -> None:
        self.name = name
        self.group = group
        self.free = free
        self.left = left
        self.used = used
        self.touched = False
        self.largest = max(free, default=-1)

    def take(self, memory_bytes: int, gpus: int, count: int) -> int:
        """Place up to `count` slots of a shape at once; how many found room. Devices with least free memory go first."""
        most = min(count, self.left)
        if most <= 0 or memory_bytes > self.largest:
            return 0
        order = sorted(range(len(self.free)), key=lambda i: (self.free[i], i))
        each = {i: self.free[i] // memory_bytes for i in order if self.free[i] >= memory_bytes}
        # So many slots of several devices each find room as no device takes part in one slot twice.
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if sum(min(number, middle) for number in each.values()) >= gpus * middle:
                low = middle
            else:
                high = middle - 1
        shares = low * gpus
        for i, number in each.items():
            share = min(number, low, shares)
            self.free[i] -= share * memory_bytes
            shares -= share
        if low:
            self.left -= low
            self.touched = True
            self.largest = max(self.free)
        return low


class _Packer:
    """First fit, large shapes first, all slots of a shape at once. Rooms in use come before idle ones before new ones."""

    def __init__(self, rooms: list[_Room], kinds: Mapping[str, NodeKind], budgets: dict[str, int]) -> None:
        self.rooms = rooms
        self.kinds = kinds
        self.budgets = budgets

        def order(room: _Room) -> tuple[bool, bool, int, str]:
            # Nodes of no group stay in any case, so they are filled before those that could go.
            return (not room.used, room.group in kinds, sum(size for size in room.free if size > 0), room.name)

        rooms.sort(key=order)

    def pack(self, wanted: Mapping[tuple[int, int], int]) -> int:
        """Place all that can be placed; how many slots cannot."""
        queue = sorted(wanted.items(), key=lambda item: (-item[0][0] * item[0][1], -item[0][0]))
        unplaced = 0
        for at, ((memory_bytes, gpus), count) in enumerate(queue):
            left = count
            for taken in (True, False):  # first where there is work already, by earlier shapes too
                for room in self.rooms:
                    if left and (room.used or room.touched) is taken and room.largest >= memory_bytes:
                        left -= room.take(memory_bytes, gpus, left)
            unplaced += self._place_anew(memory_bytes, gpus, left, queue[at + 1 :])
        return unplaced

    def _place_anew(self, memory_bytes: int, gpus: int, count: int, later: Sequence[tuple[tuple[int, int], int]]) -> int:
        """Place slots on new nodes; how many have none."""
        while count:
            best: tuple[float, int, str] | None = None
            for name, kind in self.kinds.items():
                if self.budgets[name] > 0 and (filled := _fill(kind, memory_bytes, gpus, count, later)):
                    size = sum(kind.sizes)
                    best = min(best or (1.0, 0, ""), (-filled / size, size, name))
            if best is None:
                return count
            name = best[2]
            while True:
                self.budgets[name] -= 1
                room = _Room("", name, list(self.kinds[name].sizes), self.kinds[name].slots_max, used=False)
                taken = room.take(memory_bytes, gpus, count)
                count -= taken
                self.rooms.append(room)
                if count < taken or not self.budgets[name]:
                    break  # until then the next node would hold the same as this one, and the same group be the best
        return 0


def _fill(kind: NodeKind, memory_bytes: int, gpus: int, count: int, later: Sequence[tuple[tuple[int, int], int]]) -> int:
    """Bytes that a new node would hold of a shape and of the smaller ones after it; 0 where the shape does not fit."""
    room = _Room("", "", list(kind.sizes), kind.slots_max, used=False)
    taken = room.take(memory_bytes, gpus, count)
    filled = taken * memory_bytes * gpus
    if taken:
        for (size, devices), number in later:
            if room.left <= 0 or room.largest <= 0:
                break
            filled += room.take(size, devices, number) * size * devices
    return filled
