"""The ledger as a value: nodes, devices, what is leased on them to which slot, and what room is kept.

Keyed by node, device and pool (memory that devices of a node share), changed only by deltas, and it knows nothing of Dask.
Free memory of a pool = total − reserve − foreign − Σ over its slots max(lease, measured use). What is free is also held in
columns (`manager.core.table`), which follow the changes, so that no request looks at every node. Which devices a slot gets is
`manager.core.placement`'s.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from manager.core.devices import Device
from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState, DeviceUse
from manager.core.shapes import SHARE_MILLI_MAX, Grant, Labels
from manager.core.table import UNKNOWN, DeviceKind, Table

NOBODY: Final[frozenset[str]] = frozenset()
SLOTS_MAX: Final = 64
"""Slots of one node where it says nothing else: each is a process of its own."""


class Pool:
    """Memory of one device, or of several that share it. Mutable, owned by `Index`; `free_bytes` is what can be promised now.

    `free_bytes` is negative where others have taken what was promised, or where room is kept that is not free yet.
    """

    __slots__ = (
        "changed_s",
        "devices",
        "foreign_bytes",
        "free_bytes",
        "kept",
        "key",
        "leases",
        "reserve_bytes",
        "sick",
        "total_bytes",
        "used",
    )

    def __init__(self, key: str, total_bytes: int, reserve_bytes: int) -> None:
        self.key = key
        self.devices: list[str] = []
        self.total_bytes = total_bytes
        self.reserve_bytes = min(reserve_bytes, total_bytes)
        self.leases: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.foreign_bytes = 0
        self.sick = NOBODY
        self.changed_s = 0.0
        self.free_bytes = self.usable_bytes

    @property
    def usable_bytes(self) -> int:
        """What an empty one could promise."""
        return self.total_bytes - self.reserve_bytes

    @property
    def healthy(self) -> bool:
        """Whether all its devices are: the memory that a sick one reads cannot be trusted for the others."""
        return not self.sick

    @property
    def promised_bytes(self) -> int:
        """Σ max(lease, measured use) over its slots."""
        used = self.used
        if not used:
            return sum(self.leases.values())
        return sum(max(lease, used.get(slot, 0)) for slot, lease in self.leases.items())

    def settle(self) -> None:
        """Bring `free_bytes` up to date; called after each change."""
        self.free_bytes = self.usable_bytes - self.foreign_bytes - self.promised_bytes - sum(self.kept.values())

    def copy(self) -> "Pool":
        """The same, to be tried on."""
        twin = object.__new__(Pool)
        twin.key, twin.devices = self.key, self.devices
        twin.total_bytes, twin.reserve_bytes = self.total_bytes, self.reserve_bytes
        twin.leases, twin.kept, twin.used = self.leases.copy(), self.kept.copy(), self.used.copy()
        twin.foreign_bytes, twin.sick, twin.changed_s = self.foreign_bytes, self.sick, self.changed_s
        twin.free_bytes = self.free_bytes
        return twin


class DeviceView:
    """One device in the index: who is on it, and what of its compute is free. Mutable, owned by `Index`.

    Attributes:
        slots, kept: share of each slot that has it, or for which it is kept, in thousandths.
        alone: those of them that want it for themselves.
        free_milli: the share that can be promised now; negative where what is kept is not free yet.
    """

    __slots__ = ("alone", "free_milli", "kept", "kind", "pool", "slots", "uuid")

    def __init__(self, uuid: str, kind: DeviceKind, pool: Pool) -> None:
        self.uuid = uuid
        self.kind = kind
        self.pool = pool
        self.slots: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.alone = NOBODY
        self.free_milli = SHARE_MILLI_MAX

    def settle(self) -> None:
        """Bring `free_milli` up to date; called after each change."""
        self.free_milli = SHARE_MILLI_MAX - sum(self.slots.values()) - sum(self.kept.values())

    def copy(self, pool: Pool) -> "DeviceView":
        """The same, to be tried on, over the copy of its pool."""
        twin = object.__new__(DeviceView)
        twin.uuid, twin.kind, twin.pool = self.uuid, self.kind, pool
        twin.slots, twin.kept, twin.alone = self.slots.copy(), self.kept.copy(), self.alone
        twin.free_milli = self.free_milli
        return twin


class NodeView:
    """One node in the index. Mutable, but only by an `Index` that has it for itself: copies of an index share nodes.

    Attributes:
        reachable: whether it has a Dask worker.
        cordoned: whether somebody said that it takes nothing new.
        lost: whether the leader has declared it dead.
        cpu_milli, host_memory_bytes: what the host has, `UNKNOWN` where it does not say.
        cpu_free_milli, host_free_bytes: what of that can be promised now.
        kept: slots that wait for room here which is kept for them.
        models: what its slots have loaded, and how many of them.
    """

    __slots__ = (
        "cordoned",
        "cpu_free_milli",
        "cpu_milli",
        "devices",
        "host_free_bytes",
        "host_memory_bytes",
        "incarnation",
        "kept",
        "labels",
        "lost",
        "models",
        "name",
        "pools",
        "reachable",
        "slots",
        "slots_max",
    )

    def __init__(
        self,
        name: str,
        incarnation: str,
        devices: Iterable[Device],
        reserve_bytes: int,
        slots_max: int = SLOTS_MAX,
        *,
        cpu_milli: int = 0,
        host_memory_bytes: int = 0,
        labels: Labels = (),
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.slots: set[str] = set()
        self.kept: set[str] = set()
        self.slots_max = slots_max
        self.labels = labels
        self.cpu_milli = self.cpu_free_milli = cpu_milli or UNKNOWN
        self.host_memory_bytes = self.host_free_bytes = host_memory_bytes or UNKNOWN
        self.models: Counter[str] = Counter()
        self.pools: dict[str, Pool] = {}
        self.devices: dict[str, DeviceView] = {}
        kinds: dict[tuple[str, str], DeviceKind] = {}
        for device in devices:
            key = device.pool_key
            pool = self.pools.get(key)
            if pool is None:
                pool = self.pools[key] = Pool(key, device.memory_bytes, reserve_bytes)
            pool.devices.append(device.uuid)
            kind = kinds.get(of := (device.architecture, device.model))
            if kind is None:
                kind = kinds[of] = DeviceKind(*of, labels)
            self.devices[device.uuid] = DeviceView(device.uuid, kind, pool)
        self.reachable = True
        self.cordoned = False
        self.lost = False

    @property
    def placeable(self) -> bool:
        """Whether anything new may be placed here at all."""
        return self.usable and len(self.slots) + len(self.kept) < self.slots_max

    @property
    def usable(self) -> bool:
        """Whether it could take something new if some of its slots ended."""
        return self.reachable and not self.cordoned and not self.lost

    def enter(self, slot: str, grant: Grant, *, kept: bool = False) -> None:
        """Write a grant in, as a lease or as room that is kept; devices that are not there (any more) are left out."""
        self.cpu_free_milli -= grant.cpu_milli
        self.host_free_bytes -= grant.host_memory_bytes
        (self.kept if kept else self.slots).add(slot)
        if grant.model and not kept:
            self.models[grant.model] += 1
        for uuid in grant.devices:
            device = self.devices.get(uuid)
            if device is None:
                continue
            pool = device.pool
            sizes = pool.kept if kept else pool.leases
            sizes[slot] = sizes.get(slot, 0) + grant.memory_bytes
            (device.kept if kept else device.slots)[slot] = grant.share_milli
            if grant.exclusive:
                device.alone |= {slot}
            device.settle()
            pool.settle()

    def remove(self, slot: str, grant: Grant, *, kept: bool = False) -> None:
        """Take a grant out again."""
        self.cpu_free_milli += grant.cpu_milli
        self.host_free_bytes += grant.host_memory_bytes
        (self.kept if kept else self.slots).discard(slot)
        if grant.model and not kept:
            self.models[grant.model] -= 1
            if not self.models[grant.model]:
                del self.models[grant.model]
        for uuid in grant.devices:
            device = self.devices.get(uuid)
            if device is None:
                continue
            pool = device.pool
            (pool.kept if kept else pool.leases).pop(slot, None)
            if not kept:
                pool.used.pop(slot, None)
            (device.kept if kept else device.slots).pop(slot, None)
            if slot not in device.slots and slot not in device.kept:
                device.alone -= {slot}
            device.settle()
            pool.settle()

    def copy(self) -> "NodeView":
        """The same, to be tried on."""
        twin = object.__new__(NodeView)
        twin.name, twin.incarnation, twin.labels = self.name, self.incarnation, self.labels
        twin.slots, twin.kept, twin.slots_max = self.slots.copy(), self.kept.copy(), self.slots_max
        twin.models = self.models.copy()
        twin.cpu_milli, twin.cpu_free_milli = self.cpu_milli, self.cpu_free_milli
        twin.host_memory_bytes, twin.host_free_bytes = self.host_memory_bytes, self.host_free_bytes
        twin.reachable, twin.cordoned, twin.lost = self.reachable, self.cordoned, self.lost
        twin.pools = {key: pool.copy() for key, pool in self.pools.items()}
        twin.devices = {uuid: device.copy(twin.pools[device.pool.key]) for uuid, device in self.devices.items()}
        return twin


class Index:
    """The ledger: which slot has leased what, on which device; and what room is kept for slots that wait for it.

    Nodes are changed by its methods only, and read anew after each: one that a copy has too is copied before it is changed.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, NodeView] = {}
        self.grants: dict[str, Grant] = {}
        self.kept: dict[str, Grant] = {}
        self._table: Table | None = None
        self._changed: set[str] = set()
        self._shared: set[str] = set()  # nodes that another index may have too

    @property
    def table(self) -> Table:
        """What is free, in columns; up to date."""
        # Threads may ask at once for that of an index that nobody changes any more: each would find the same.
        table = self._table
        if table is None:
            table = Table(self.nodes.values())
            self._changed = set()
            self._table = table
        elif self._changed:
            table.refresh([self.nodes[name] for name in self._changed if name in self.nodes])
            self._changed = set()
        return table

    def _to_change(self, node: str) -> NodeView | None:
        """The node, nobody else's and noted as changed; None where there is none."""
        view = self.nodes.get(node)
        if view is None:
            return None
        if node in self._shared:
            self._shared.discard(node)
            view = self.nodes[node] = view.copy()
        self._changed.add(node)
        return view

    def add_node(
        self,
        node: str,
        incarnation: str,
        devices: Iterable[Device],
        reserve_bytes: int,
        slots_max: int = SLOTS_MAX,
        *,
        cpu_milli: int = 0,
        host_memory_bytes: int = 0,
        labels: Labels = (),
    ) -> None:
        """A node as it registers. The same incarnation keeps its leases; another one ends those of its predecessor."""
        known = self.nodes.get(node)
        fresh = NodeView(
            node,
            incarnation,
            devices,
            reserve_bytes,
            slots_max,
            cpu_milli=cpu_milli,
            host_memory_bytes=host_memory_bytes,
            labels=labels,
        )
        if known is not None and known.incarnation != incarnation:
            for slot in self.slots_on(node):
                self.free(slot)
            known = None
        self.nodes[node] = fresh
        self._shared.discard(node)
        self._table = None
        if known is not None:
            self.mark(node, reachable=known.reachable, cordoned=known.cordoned, lost=known.lost)
            for key, pool in fresh.pools.items():
                if (before := known.pools.get(key)) is not None:
                    pool.sick, pool.changed_s = before.sick & set(pool.devices), before.changed_s
                    pool.foreign_bytes, pool.used = before.foreign_bytes, before.used.copy()
        # From the grants, not from the old view: a device may have been away when it was leased.
        for slot, grant in self.grants.items():
            if grant.node == node:
                fresh.enter(slot, grant)
        for slot, grant in self.kept.items():
            if grant.node == node:
                fresh.enter(slot, grant, kept=True)
        for pool in fresh.pools.values():
            pool.settle()

    def remove_node(self, node: str) -> None:
        """A node that is gone for good, with its leases."""
        for slot in self.slots_on(node):
            self.free(slot)
        self.nodes.pop(node, None)
        self._shared.discard(node)
        self._table = None

    def mark(self, node: str, *, reachable: bool | None = None, cordoned: bool | None = None, lost: bool | None = None) -> None:
        """Set flags of a node; None leaves one as it is. Of a node that is not there (any more) nothing is noted."""
        if (view := self._to_change(node)) is None:
            return
        view.reachable = view.reachable if reachable is None else reachable
        view.cordoned = view.cordoned if cordoned is None else cordoned
        view.lost = view.lost if lost is None else lost

    def slots_on(self, node: str) -> list[str]:
        """Slots with a lease on the node."""
        view = self.nodes.get(node)
        if view is not None:
            return sorted(view.slots)
        return [slot for slot, grant in self.grants.items() if grant.node == node]

    @staticmethod
    def _stamp(view: NodeView, grant: Grant, now_s: float) -> None:
        for uuid in grant.devices:
            if (device := view.devices.get(uuid)) is not None:
                device.pool.changed_s = max(device.pool.changed_s, now_s)

    def lease(self, slot: str, grant: Grant, now_s: float = 0.0) -> None:
        """Promise `grant` to `slot`. A slot that already has a lease keeps exactly that one."""
        if slot in self.grants:
            return
        self.grants[slot] = grant
        if (view := self._to_change(grant.node)) is not None:
            view.enter(slot, grant)
            self._stamp(view, grant, now_s)

    def free(self, slot: str, now_s: float = 0.0) -> Grant | None:
        """End the lease of `slot`; None where it had none."""
        grant = self.grants.pop(slot, None)
        if grant is not None and (view := self._to_change(grant.node)) is not None:
            view.remove(slot, grant)
            self._stamp(view, grant, now_s)
        return grant

    def keep(self, slot: str, grant: Grant) -> None:
        """Keep the room of `grant`, free or not yet, for `slot`, which waits for it: nobody else is placed into it."""
        self.unkeep(slot)
        self.kept[slot] = grant
        if (view := self._to_change(grant.node)) is not None:
            view.enter(slot, grant, kept=True)

    def unkeep(self, slot: str) -> Grant | None:
        """Keep no room for `slot`; what was kept, None where nothing was."""
        grant = self.kept.pop(slot, None)
        if grant is not None and (view := self._to_change(grant.node)) is not None:
            view.remove(slot, grant, kept=True)
        return grant

    def observe(self, node: str, use: DeviceUse, read_s: float) -> None:
        """A reading of one device, made at `read_s`. One older than the last lease change may not raise free memory."""
        view = self._to_change(node)
        device = view.devices.get(use.uuid) if view is not None else None
        if device is None:
            return
        pool = device.pool
        if not use.healthy:
            pool.sick |= {use.uuid}
            return
        pool.sick -= {use.uuid}
        known = {slot: size for slot, size in use.slots.items() if slot in pool.leases}
        foreign = max(0, use.foreign_bytes)
        if read_s < pool.changed_s:
            foreign = max(foreign, pool.foreign_bytes)
            known = {slot: max(known.get(slot, 0), pool.used.get(slot, 0)) for slot in known.keys() | pool.used.keys()}
        if foreign == pool.foreign_bytes and known == pool.used:
            return
        pool.foreign_bytes = foreign
        pool.used = known
        pool.settle()

    def copy(self) -> "Index":
        """An index that can be tried on: a change of either is none of the other, and costs no more than what it changes."""
        other = Index()
        other.grants, other.kept, other.nodes = self.grants.copy(), self.kept.copy(), self.nodes.copy()
        other._shared, self._shared = set(self.nodes), set(self.nodes)
        other._table = self.table.copy()
        return other


def index_of(state: ClusterState) -> Index:
    """The ledger as it follows from the store: what the leader plans with and the API explains with."""
    index = Index()
    for row in state.nodes:
        if row.left:
            continue
        info = row.info
        index.add_node(
            row.node,
            row.incarnation,
            info.devices,
            info.reserve_bytes,
            info.slots_max,
            cpu_milli=info.cpus * 1000,
            host_memory_bytes=info.host_memory_bytes,
            labels=info.labels,
        )
        index.mark(row.node, reachable=bool(row.address), cordoned=row.cordon is not Cordon.NONE, lost=row.fenced)
    shapes = {queue.shape_id: queue.shape for queue in state.queues}
    for slot in state.slots:
        if (grant := slot.grant(shapes.get(slot.shape_id))) is not None:
            index.lease(slot.slot_id, grant)
    for row in state.nodes:
        for use in row.uses:
            index.observe(row.node, use, 0.0)
    return index
