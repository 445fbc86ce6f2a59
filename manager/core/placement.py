"""Which devices a slot gets. Pure: the same index and shape give the same answer.

`Index` is the ledger as a value, keyed by node and device and changed only by deltas; it knows nothing of Dask. Free memory
of a device = total − reserve − foreign − Σ over its slots max(lease, measured use). `place` never raises: "cannot" is an
answer, with a verdict for every node.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from manager.core.devices import Device
from manager.core.model import ClusterState, DeviceUse
from manager.core.quantities import MEMORY_BYTES_MAX
from manager.core.shapes import Shape


class Reason(enum.StrEnum):
    """Why a node cannot take a shape now."""

    INSUFFICIENT_MEMORY = "InsufficientMemory"  # leased to other slots
    FOREIGN_MEMORY = "ForeignMemory"  # would fit but for memory used by processes that are not ours
    EXCEEDS_LARGEST_DEVICE = "ExceedsLargestDevice"  # would not fit on the empty node
    TOO_FEW_DEVICES = "TooFewDevices"
    UNHEALTHY_DEVICE = "UnhealthyDevice"
    CORDONED = "Cordoned"
    NO_WORKER = "NoWorker"  # the agent lives, its Dask worker does not (yet)
    NODE_LOST = "NodeLost"


class Verdict(msgspec.Struct, frozen=True):
    """What one node says to one shape. `short_bytes` is what is missing per device, 0 where memory is not the matter."""

    node: str
    reason: Reason
    short_bytes: int = 0


class Grant(msgspec.Struct, frozen=True):
    """Devices and bytes on one node."""

    node: str
    devices: tuple[str, ...]
    memory_bytes: int


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """The shape fits there."""

    grant: Grant


class Unplaced(msgspec.Struct, frozen=True, tag="unplaced"):
    """The shape fits nowhere now; one verdict for each node, by name."""

    verdicts: tuple[Verdict, ...]


class Pool:
    """One device's memory. Mutable, owned by `Index`; `free_bytes` is what can be promised now, kept up to date.

    `free_bytes` is negative where others have taken what was promised, or where room is kept that is not free yet.
    """

    __slots__ = (
        "changed_s",
        "foreign_bytes",
        "free_bytes",
        "healthy",
        "kept",
        "leases",
        "reserve_bytes",
        "total_bytes",
        "used",
        "uuid",
    )

    def __init__(self, device: Device, reserve_bytes: int) -> None:
        self.uuid = device.uuid
        self.total_bytes = device.memory_bytes
        self.reserve_bytes = min(reserve_bytes, device.memory_bytes)
        self.leases: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.foreign_bytes = 0
        self.healthy = True
        self.changed_s = 0.0
        self.free_bytes = self.usable_bytes

    @property
    def usable_bytes(self) -> int:
        """What an empty device could promise."""
        return self.total_bytes - self.reserve_bytes

    @property
    def promised_bytes(self) -> int:
        """Σ max(lease, measured use) over its slots."""
        used = self.used
        return sum(max(lease, used.get(slot, 0)) for slot, lease in self.leases.items())

    def settle(self) -> None:
        """Bring `free_bytes` up to date; called after each change."""
        self.free_bytes = self.usable_bytes - self.foreign_bytes - self.promised_bytes - sum(self.kept.values())

    def copy(self) -> "Pool":
        """The same, to be tried on."""
        twin = object.__new__(Pool)
        twin.uuid, twin.total_bytes, twin.reserve_bytes = self.uuid, self.total_bytes, self.reserve_bytes
        twin.leases, twin.kept, twin.used = self.leases.copy(), self.kept.copy(), self.used.copy()
        twin.foreign_bytes, twin.healthy, twin.changed_s = self.foreign_bytes, self.healthy, self.changed_s
        twin.free_bytes = self.free_bytes
        return twin


class NodeView:
    """One node in the index. Mutable, owned by `Index`."""

    __slots__ = ("cordoned", "incarnation", "lost", "name", "pools", "reachable")

    def __init__(self, name: str, incarnation: str, devices: Iterable[Device], reserve_bytes: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.pools = {device.uuid: Pool(device, reserve_bytes) for device in devices}
        self.reachable = True
        self.cordoned = False
        self.lost = False

    @property
    def placeable(self) -> bool:
        """Whether anything new may be placed here at all."""
        return self.reachable and not self.cordoned and not self.lost


class Index:
    """The ledger: which slot has leased what, on which device; and what room is kept for slots that wait for it."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeView] = {}
        self.grants: dict[str, Grant] = {}
        self.kept: dict[str, Grant] = {}

    def add_node(self, node: str, incarnation: str, devices: Iterable[Device], reserve_bytes: int) -> None:
        """A node as it registers. The same incarnation keeps its leases; another one ends those of its predecessor."""
        known = self.nodes.get(node)
        fresh = NodeView(node, incarnation, devices, reserve_bytes)
        if known is not None and known.incarnation != incarnation:
            for slot in self.slots_on(node):
                self.free(slot)
            known = None
        self.nodes[node] = fresh
        if known is not None:
            fresh.cordoned, fresh.lost, fresh.reachable = known.cordoned, known.lost, known.reachable
        for uuid, pool in fresh.pools.items():
            if known is not None and (before := known.pools.get(uuid)) is not None:
                pool.healthy, pool.changed_s = before.healthy, before.changed_s
                pool.foreign_bytes, pool.used = before.foreign_bytes, before.used
            # From the grants, not from the old view: a device may have been away when it was leased.
            pool.leases = self._on_device(self.grants, node, uuid)
            pool.kept = self._on_device(self.kept, node, uuid)
            pool.settle()

    @staticmethod
    def _on_device(grants: dict[str, Grant], node: str, uuid: str) -> dict[str, int]:
        return {slot: g.memory_bytes for slot, g in grants.items() if g.node == node and uuid in g.devices}

    def remove_node(self, node: str) -> None:
        """A node that is gone for good, with its leases."""
        for slot in self.slots_on(node):
            self.free(slot)
        self.nodes.pop(node, None)

    def slots_on(self, node: str) -> list[str]:
        """Slots with a lease on the node."""
        return [slot for slot, grant in self.grants.items() if grant.node == node]

    def _pools(self, grant: Grant) -> list[Pool]:
        view = self.nodes.get(grant.node)
        return [] if view is None else [view.pools[uuid] for uuid in grant.devices if uuid in view.pools]

    def lease(self, slot: str, grant: Grant, now_s: float = 0.0) -> None:
        """Promise `grant` to `slot`. A slot that already has a lease keeps exactly that one."""
        if slot in self.grants:
            return
        self.grants[slot] = grant
        for pool in self._pools(grant):
            pool.leases[slot] = grant.memory_bytes
            pool.changed_s = max(pool.changed_s, now_s)
            pool.settle()

    def free(self, slot: str, now_s: float = 0.0) -> Grant | None:
        """End the lease of `slot`; None where it had none."""
        grant = self.grants.pop(slot, None)
        for pool in self._pools(grant) if grant is not None else ():
            pool.leases.pop(slot, None)
            pool.used.pop(slot, None)
            pool.changed_s = max(pool.changed_s, now_s)
            pool.settle()
        return grant

    def keep(self, slot: str, grant: Grant) -> None:
        """Keep the room of `grant`, free or not yet, for `slot`, which waits for it: nobody else is placed into it."""
        self.unkeep(slot)
        self.kept[slot] = grant
        for pool in self._pools(grant):
            pool.kept[slot] = grant.memory_bytes
            pool.settle()

    def unkeep(self, slot: str) -> Grant | None:
        """Keep no room for `slot`; what was kept, None where nothing was."""
        grant = self.kept.pop(slot, None)
        for pool in self._pools(grant) if grant is not None else ():
            pool.kept.pop(slot, None)
            pool.settle()
        return grant

    def observe(self, node: str, use: DeviceUse, read_s: float) -> None:
        """A reading of one device, made at `read_s`. One older than the last lease change may not raise free memory."""
        view = self.nodes.get(node)
        pool = view.pools.get(use.uuid) if view is not None else None
        if pool is None:
            return
        pool.healthy = use.healthy
        if not use.healthy:
            return
        known = {slot: size for slot, size in use.slots.items() if slot in pool.leases}
        foreign = max(0, use.foreign_bytes)
        if read_s < pool.changed_s:
            foreign = max(foreign, pool.foreign_bytes)
            known = {slot: max(known.get(slot, 0), pool.used.get(slot, 0)) for slot in known.keys() | pool.used.keys()}
        pool.foreign_bytes = foreign
        pool.used = known
        pool.settle()

    def copy(self) -> "Index":
        """An index that can be tried on."""
        other = Index()
        other.grants, other.kept = self.grants.copy(), self.kept.copy()
        for name, view in self.nodes.items():
            twin = other.nodes[name] = NodeView(name, view.incarnation, (), 0)
            twin.cordoned, twin.lost, twin.reachable = view.cordoned, view.lost, view.reachable
            twin.pools = {uuid: pool.copy() for uuid, pool in view.pools.items()}
        return other


Demand = tuple[tuple[Shape, float], ...]
"""The known mix of shapes with their shares, for policies that look ahead."""
NO_DEMAND: Final[Demand] = ()


def place(shape: Shape, index: Index, demand: Demand = NO_DEMAND) -> Placed | Unplaced:  # noqa: ARG001
    """Best fit (see `find`), or why not.

    Args:
        shape: what is asked for.
        index: the ledger; not changed.
        demand: part of every policy's signature; this one does not look ahead.
    """
    grant = find(shape, index)
    if grant is not None:
        return Placed(grant)
    return Unplaced(tuple(verdict(shape, view) for _, view in sorted(index.nodes.items())))


def find(shape: Shape, index: Index) -> Grant | None:
    """Best fit: the node and devices with the least free memory that still hold the shape; ties by name. None: no room."""
    if shape.gpus == 1:
        return _find_one(shape.memory_bytes, index)
    memory_bytes, gpus = shape.memory_bytes, shape.gpus
    best: tuple[int, str, tuple[str, ...]] | None = None
    for name, view in index.nodes.items():
        if not view.placeable or len(view.pools) < gpus:
            continue
        pools = view.pools.values()
        fitting = [(pool.free_bytes, pool.uuid) for pool in pools if pool.free_bytes >= memory_bytes and pool.healthy]
        if len(fitting) >= gpus:
            chosen = sorted(fitting)[:gpus]
            candidate = (sum(free for free, _ in chosen), name, tuple(uuid for _, uuid in chosen))
            if best is None or candidate < best:
                best = candidate
    return None if best is None else Grant(best[1], best[2], memory_bytes)


def _find_one(memory_bytes: int, index: Index) -> Grant | None:
    """`find` for one device: nearly all requests, and a round over a large cluster makes thousands."""
    best_bytes, best = MEMORY_BYTES_MAX + 1, ("", "")
    for name, view in index.nodes.items():
        if view.placeable:
            for pool in view.pools.values():
                free_bytes = pool.free_bytes
                if (
                    memory_bytes <= free_bytes <= best_bytes
                    and pool.healthy
                    and (free_bytes < best_bytes or (name, pool.uuid) < best)
                ):
                    best_bytes, best = free_bytes, (name, pool.uuid)
    return None if best_bytes > MEMORY_BYTES_MAX else Grant(best[0], (best[1],), memory_bytes)


def verdict(shape: Shape, view: NodeView) -> Verdict:
    """Why the node cannot take the shape now; asked only where it cannot."""
    if view.lost:
        return Verdict(view.name, Reason.NODE_LOST)
    if len(view.pools) < shape.gpus:
        return Verdict(view.name, Reason.TOO_FEW_DEVICES)

    def short(sizes: Iterable[int]) -> int:
        """What the last device needed would still lack."""
        return shape.memory_bytes - sorted(sizes, reverse=True)[shape.gpus - 1]

    pools = list(view.pools.values())
    if (missing := short(pool.usable_bytes for pool in pools)) > 0:
        return Verdict(view.name, Reason.EXCEEDS_LARGEST_DEVICE, missing)
    if view.cordoned:
        return Verdict(view.name, Reason.CORDONED)
    if not view.reachable:
        return Verdict(view.name, Reason.NO_WORKER)
    healthy = [pool for pool in pools if pool.healthy]
    if len(healthy) < shape.gpus or short(pool.usable_bytes for pool in healthy) > 0:
        return Verdict(view.name, Reason.UNHEALTHY_DEVICE)
    missing = max(0, short(pool.free_bytes for pool in healthy))
    if short(pool.free_bytes + pool.foreign_bytes for pool in healthy) <= 0:
        return Verdict(view.name, Reason.FOREIGN_MEMORY, missing)
    return Verdict(view.name, Reason.INSUFFICIENT_MEMORY, missing)


def victims(shape: Shape, index: Index, costs: Mapping[str, float]) -> tuple[str, ...]:
    """Slots on one node whose end makes the shape fit there, cheapest first; empty where no such set exists.

    Args:
        shape: what must fit.
        index: the ledger.
        costs: what ending each slot costs; slots that are not in it stay.
    """
    best: tuple[float, int, str, tuple[str, ...]] | None = None
    for name, view in index.nodes.items():
        if not view.placeable or len(view.pools) < shape.gpus:
            continue
        options: list[tuple[float, str, tuple[str, ...]]] = []
        for uuid, pool in view.pools.items():
            chosen = _clear(pool, shape.memory_bytes, costs) if pool.healthy else None
            if chosen is not None:
                options.append((sum(costs[slot] for slot in chosen), uuid, chosen))
        if len(options) < shape.gpus:
            continue
        chosen_slots = sorted({slot for _, _, slots in sorted(options)[: shape.gpus] for slot in slots})
        candidate = (sum(costs[s] for s in chosen_slots), len(chosen_slots), name, tuple(chosen_slots))
        if best is None or candidate < best:
            best = candidate
    return best[3] if best is not None else ()


def _clear(pool: Pool, memory_bytes: int, costs: Mapping[str, float]) -> tuple[str, ...] | None:
    """Slots whose end frees `memory_bytes` on the device, none of them needlessly; None where none do.

    The cheaper of: the cheapest slot that is enough alone, and cheap ones taken until it is enough, less those that were
    not needed in the end.
    """
    missing = memory_bytes - pool.free_bytes
    if missing <= 0:
        return ()
    used = pool.used
    sizes = {slot: max(lease, used.get(slot, 0)) for slot, lease in pool.leases.items() if slot in costs}
    if sum(sizes.values()) < missing:
        return None
    chosen: list[str] = []
    given = 0
    for slot in sorted(sizes, key=lambda s: (costs[s], -sizes[s], s)):
        if given >= missing:
            break
        given += sizes[slot]
        chosen.append(slot)
    for slot in sorted(chosen, key=lambda s: (-costs[s], sizes[s], s)):
        if given - sizes[slot] >= missing:
            given -= sizes[slot]
            chosen.remove(slot)
    alone = min((slot for slot in sizes if sizes[slot] >= missing), key=lambda s: (costs[s], sizes[s], s), default=None)
    if alone is not None and costs[alone] < sum(costs[slot] for slot in chosen):
        return (alone,)
    return tuple(chosen)


def index_of(state: ClusterState) -> Index:
    """The ledger as it follows from the store: what the leader plans with and the API explains with."""
    index = Index()
    for row in state.nodes:
        if row.left:
            continue
        index.add_node(row.node, row.incarnation, row.info.devices, row.info.reserve_bytes)
        view = index.nodes[row.node]
        view.lost = row.fenced
        view.reachable = bool(row.address)
    shapes = {queue.shape_id: queue.shape for queue in state.queues}
    for slot in state.slots:
        if slot.node and slot.devices and slot.shape_id in shapes:
            index.lease(slot.slot_id, Grant(slot.node, slot.devices, shapes[slot.shape_id].memory_bytes))
    for row in state.nodes:
        for use in row.uses:
            index.observe(row.node, use, 0.0)
    return index
