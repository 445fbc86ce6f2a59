"""Who has had how much: device-seconds of tenants and of their shapes, and what a quota still lets work. Pure.

A slot's *part* of a device is the larger of the memory and the compute that it leases there, and all of it where it has the
device for itself: a small task on a large device is not a whole device. Its tenant is charged its parts for each second that it
is at work, divided by the tenant's weight: the virtual time. Who has the lowest is served first. An idle slot costs nobody
anything, since it ends for whoever waits; so it costs its tenant nothing either.
"""

from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from manager.core.lifecycle import SlotKind, SlotStatus
from manager.core.model import ClusterState, NodeInfo, QueueRow, SlotRow, TenantRow
from manager.core.shapes import SHARE_MILLI_MAX, Grant

CREDIT_MAX_S: Final = 60.0
"""Who waits is never further behind the others than this: what was not to be had for an hour is not made up for in another."""


class DeviceSizes:
    """What one device of each node has of memory: its part of a pool that it shares."""

    def __init__(self, state: ClusterState) -> None:
        self._infos: dict[str, NodeInfo] = {row.node: row.info for row in state.nodes}
        self._nodes: dict[str, dict[str, tuple[float, int]]] = {}

    def part(self, grant: Grant) -> float:
        """How many devices the grant is, all its devices together. One that is not known counts whole."""
        sizes = self._nodes.get(grant.node)
        if sizes is None:
            sizes = self._nodes[grant.node] = self._sizes(grant.node)
        parts = 0.0
        for uuid in grant.devices:
            size_bytes, sharing = sizes.get(uuid, (0.0, 1))
            if grant.exclusive or size_bytes <= 0:
                parts += 1.0
            else:
                # Who takes more than the device's own part of a pool takes it from the others.
                memory = min(float(sharing), grant.memory_bytes / size_bytes)
                parts += max(memory, grant.share_milli / SHARE_MILLI_MAX)
        return parts

    def _sizes(self, node: str) -> dict[str, tuple[float, int]]:
        info = self._infos.get(node)
        devices = () if info is None else info.devices
        sharing: dict[str, int] = {}
        for device in devices:
            sharing[device.pool_key] = sharing.get(device.pool_key, 0) + 1
        return {d.uuid: (d.memory_bytes / sharing[d.pool_key], sharing[d.pool_key]) for d in devices}


def parts_of(state: ClusterState) -> dict[str, float]:
    """The parts of devices that each open slot of the leader's leases."""
    sizes = DeviceSizes(state)
    shapes = {queue.shape_id: queue.shape for queue in state.queues}
    parts: dict[str, float] = {}
    for slot in state.slots:
        if slot.status is SlotStatus.OPEN and slot.kind is SlotKind.TASKS:
            grant = slot.grant(shapes.get(slot.shape_id))
            if grant is not None:
                parts[slot.slot_id] = sizes.part(grant)
    return parts


def at_work(slot: SlotRow) -> bool:
    """Whether the slot is charged for: one that loads what it needs is."""
    return slot.status is SlotStatus.OPEN and (slot.running > 0 or slot.idle_ms is None)


def at_quota(row: TenantRow) -> bool:
    """Whether the tenant has all that it may have."""
    return (
        (row.running_max is not None and row.running >= row.running_max)
        or (row.gpus_max is not None and row.gpus >= row.gpus_max)
        or (row.memory_bytes_max is not None and row.memory_bytes >= row.memory_bytes_max)
    )


def accounted(state: ClusterState, tenants: Mapping[str, float], shapes: Mapping[str, float], elapsed_s: float) -> ClusterState:
    """`state` with the virtual time of each of its tenants and shapes; each shape's tenant has a row in it.

    Args:
        state: one look at the store.
        tenants, shapes: as they were a moment ago; what is not in them is taken from the rows.
        elapsed_s: how long ago that was.
    """
    owner = {queue.shape_id: queue.shape.tenant for queue in state.queues}
    rows = {row.tenant: row for row in state.tenants}
    for tenant in owner.values():
        rows.setdefault(tenant, TenantRow(tenant=tenant))
    parts = parts_of(state)
    had_by_shape: dict[str, float] = {}
    for slot in state.slots:
        if slot.slot_id in parts and slot.shape_id in owner and at_work(slot):
            had_by_shape[slot.shape_id] = had_by_shape.get(slot.shape_id, 0.0) + parts[slot.slot_id]
    had_by_tenant: dict[str, float] = {}
    for shape_id, had in had_by_shape.items():
        had_by_tenant[owner[shape_id]] = had_by_tenant.get(owner[shape_id], 0.0) + had
    of_tenants = _levelled(
        {
            name: _later(tenants.get(name, row.vtime_s), elapsed_s * had_by_tenant.get(name, 0.0) / row.weight)
            for name, row in rows.items()
        },
        waiting={owner[queue.shape_id] for queue in state.queues if queue.depth and not at_quota(rows[owner[queue.shape_id]])},
        served=had_by_tenant.keys(),
    )
    of_shapes: dict[str, float] = {}
    by_tenant: dict[str, list[QueueRow]] = {}
    for queue in state.queues:
        by_tenant.setdefault(queue.shape.tenant, []).append(queue)
    for queues in by_tenant.values():
        of_shapes |= _levelled(
            {
                queue.shape_id: _later(
                    shapes.get(queue.shape_id, queue.vtime_s), elapsed_s * had_by_shape.get(queue.shape_id, 0.0)
                )
                for queue in queues
            },
            waiting={queue.shape_id for queue in queues if queue.depth},
            served=had_by_shape.keys(),
        )
    return msgspec.structs.replace(
        state,
        queues=tuple(msgspec.structs.replace(queue, vtime_s=of_shapes[queue.shape_id]) for queue in state.queues),
        tenants=tuple(msgspec.structs.replace(rows[name], vtime_s=of_tenants[name]) for name in sorted(rows)),
    )


def _later(known_s: float | None, more_s: float) -> float | None:
    return None if known_s is None else known_s + more_s


def _levelled(had: Mapping[str, float | None], waiting: Collection[str], served: Collection[str]) -> dict[str, float]:
    """Who is new, or wants nothing, stands level with the least of those that wait and are served: absence earns nothing.

    Who waits keeps what it is behind, within bounds. What nobody can serve must not be the measure for those who come.
    """
    known = {name: value for name, value in had.items() if value is not None}
    competing = [value for name, value in known.items() if name in served and name in waiting]
    if not competing:
        competing = [value for name, value in known.items() if name in served] or list(known.values())
    floor = min(competing, default=0.0)
    return {
        name: floor if value is None else max(value, floor - CREDIT_MAX_S if name in waiting else floor)
        for name, value in had.items()
    }


class QuotaLeft:
    """What a tenant's quota lets work, while a plan is made: its shapes take of it in the order in which they are served."""

    def __init__(self, row: TenantRow) -> None:
        self._gpus = row.gpus_max
        self._memory_bytes = row.memory_bytes_max
        self._running = row.running_max

    def take(self, gpus: int, memory_bytes: int, wanted: int) -> int:
        """Of so many slots of so many devices and so much memory each, those that may work; they are taken."""
        count = wanted
        if self._running is not None:
            count = min(count, self._running)
        if self._gpus is not None and gpus:
            count = min(count, self._gpus // gpus)
        if self._memory_bytes is not None and memory_bytes:
            count = min(count, self._memory_bytes // memory_bytes)
        if self._running is not None:
            self._running -= count
        if self._gpus is not None:
            self._gpus -= count * gpus
        if self._memory_bytes is not None:
            self._memory_bytes -= count * memory_bytes
        return count
