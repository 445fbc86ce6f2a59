"""The ledger as a value: nodes, devices, what is leased on them to which slot, and what room is kept.

Keyed by node and device, changed only by deltas, and it knows nothing of Dask. Free memory of a device = total − reserve −
foreign − Σ over its slots max(lease, measured use). Which devices a slot gets is `manager.core.placement`'s.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from manager.core.devices import Device
from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState, DeviceUse

SLOTS_MAX: Final = 64
"""Slots of one node where it says nothing else: each is a process of its own."""


class Grant(msgspec.Struct, frozen=True):
    """Devices and bytes on one node."""

    node: str
    devices: tuple[str, ...]
    memory_bytes: int


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

    __slots__ = ("cordoned", "incarnation", "lost", "name", "pools", "reachable", "slots", "slots_max")

    def __init__(
        self, name: str, incarnation: str, devices: Iterable[Device], reserve_bytes: int, slots_max: int = SLOTS_MAX
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.slots: set[str] = set()
        self.slots_max = slots_max
        self.pools = {device.uuid: Pool(device, reserve_bytes) for device in devices}
        self.reachable = True
        self.cordoned = False
        self.lost = False

    @property
    def placeable(self) -> bool:
        """Whether anything new may be placed here at all."""
        return self.usable and len(self.slots) < self.slots_max

    @property
    def usable(self) -> bool:
        """Whether it could take something new if some of its slots ended."""
        return self.reachable and not self.cordoned and not self.lost


class Index:
    """The ledger: which slot has leased what, on which device; and what room is kept for slots that wait for it."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeView] = {}
        self.grants: dict[str, Grant] = {}
        self.kept: dict[str, Grant] = {}

    def add_node(
        self, node: str, incarnation: str, devices: Iterable[Device], reserve_bytes: int, slots_max: int = SLOTS_MAX
    ) -> None:
        """A node as it registers. The same incarnation keeps its leases; another one ends those of its predecessor."""
        known = self.nodes.get(node)
        fresh = NodeView(node, incarnation, devices, reserve_bytes, slots_max)
        if known is not None and known.incarnation != incarnation:
            for slot in self.slots_on(node):
                self.free(slot)
            known = None
        self.nodes[node] = fresh
        fresh.slots.update(self.slots_on(node))
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
        if (view := self.nodes.get(grant.node)) is not None:
            view.slots.add(slot)
        for pool in self._pools(grant):
            pool.leases[slot] = grant.memory_bytes
            pool.changed_s = max(pool.changed_s, now_s)
            pool.settle()

    def free(self, slot: str, now_s: float = 0.0) -> Grant | None:
        """End the lease of `slot`; None where it had none."""
        grant = self.grants.pop(slot, None)
        if grant is not None and (view := self.nodes.get(grant.node)) is not None:
            view.slots.discard(slot)
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
            twin = other.nodes[name] = NodeView(name, view.incarnation, (), 0, view.slots_max)
            twin.slots = view.slots.copy()
            twin.cordoned, twin.lost, twin.reachable = view.cordoned, view.lost, view.reachable
            twin.pools = {uuid: pool.copy() for uuid, pool in view.pools.items()}
        return other


def index_of(state: ClusterState) -> Index:
    """The ledger as it follows from the store: what the leader plans with and the API explains with."""
    index = Index()
    for row in state.nodes:
        if row.left:
            continue
        index.add_node(row.node, row.incarnation, row.info.devices, row.info.reserve_bytes, row.info.slots_max)
        view = index.nodes[row.node]
        view.lost = row.fenced
        view.reachable = bool(row.address)
        view.cordoned = row.cordon is not Cordon.NONE
    shapes = {queue.shape_id: queue.shape for queue in state.queues}
    for slot in state.slots:
        if slot.node and slot.devices and (slot.memory_bytes or slot.shape_id in shapes):
            memory_bytes = slot.memory_bytes or shapes[slot.shape_id].memory_bytes
            index.lease(slot.slot_id, Grant(slot.node, slot.devices, memory_bytes))
    for row in state.nodes:
        for use in row.uses:
            index.observe(row.node, use, 0.0)
    return index
