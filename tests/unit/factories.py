"""Values for the tests of decisions: devices, shapes, indexes, and what the store says of queues, slots and nodes."""

from collections.abc import Iterable, Mapping
from typing import Any

from manager.core.devices import Device
from manager.core.index import Index
from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import ClusterState, DeviceUse, NodeInfo, NodeRow, QueueRow, SlotRow, priority_offset
from manager.core.needs import Limits
from manager.core.quantities import GIB
from manager.core.shapes import Grant, Resources, Shape
from plugins.node.link import Beat, LiveSlot, Report

NOW_MS = 1_000_000
LIMITS = Limits(drain_target_s=1.0, idle_s=60.0, residence_s=1.0, slots_per_shape_max=64, idle_per_node_max=64)


def device(uuid: str, gib: float) -> Device:
    return Device(
        uuid=uuid,
        index=0,
        vendor="simulated",
        model="test",
        architecture="gfx942",
        memory_bytes=int(gib * GIB),
        visible_id=uuid,
    )


def devices(*gib: float) -> tuple[Device, ...]:
    """Devices d0, d1, … of so many GiB."""
    return tuple(device(f"d{i}", size) for i, size in enumerate(gib))


def shape(gib: float, gpus: int = 1, tenant: str = "t", max_tasks_per_slot: int = 0) -> Shape:
    return Shape(
        tenant=tenant,
        environment="default",
        memory_bytes=int(gib * GIB),
        gpus=gpus,
        max_tasks_per_slot=max_tasks_per_slot,
    )


def need(gib: float, gpus: int = 1, **more: Any) -> Resources:
    """What one task asks for; `more` are fields of `Resources`."""
    return Resources(int(gib * GIB), gpus, **more)


def index(nodes: Mapping[str, Iterable[float]], reserve_gib: float = 0.0) -> Index:
    """An empty ledger: node → GiB of each of its devices."""
    made = Index()
    for name, sizes in nodes.items():
        made.add_node(name, "i1", devices(*sizes), int(reserve_gib * GIB))
    return made


def grant(node: str, uuids: str, gib: float) -> Grant:
    return Grant(node, tuple(uuids.split()), int(gib * GIB))


def use(uuid: str, *, foreign: float = 0.0, healthy: bool = True, **slots: float) -> DeviceUse:
    """What a device reads: GiB of others, and of each slot."""
    sizes = {slot: int(gib * GIB) for slot, gib in slots.items()}
    foreign_bytes = int(foreign * GIB)
    used_bytes = foreign_bytes + sum(sizes.values())
    return DeviceUse(uuid=uuid, used_bytes=used_bytes, foreign_bytes=foreign_bytes, slots=sizes, healthy=healthy)


def queue(
    name: str,
    of: Shape,
    depth: int,
    *,
    run_s: float | None = None,
    priority: int = 0,
    waited_s: float = 0.0,
    now_ms: int = NOW_MS,
) -> QueueRow:
    return QueueRow(
        shape_id=name,
        shape=of,
        depth=depth,
        head=priority_offset(priority) + 1 if depth else None,
        head_queued_ms=now_ms - int(waited_s * 1000) if depth else None,
        run_s=run_s,
    )


def requested(slot_id: str, shape_id: str, age_s: float = 0.0) -> SlotRow:
    asked_ms = NOW_MS - int(age_s * 1000)
    return SlotRow(slot_id=slot_id, shape_id=shape_id, status=SlotStatus.REQUESTED, requested_ms=asked_ms)


def opened(
    slot_id: str,
    shape_id: str,
    node: str,
    uuids: str,
    *,
    age_s: float = 30.0,
    idle_s: float | None = None,
    running: int = 1,
    flag: SlotFlag = SlotFlag.NONE,
    served: int = 0,
    now_ms: int = NOW_MS,
) -> SlotRow:
    """An open slot: busy, unless it has been idle for `idle_s`."""
    return SlotRow(
        slot_id=slot_id,
        shape_id=shape_id,
        status=SlotStatus.OPEN,
        node=node,
        incarnation="i1",
        devices=tuple(uuids.split()),
        flag=flag,
        opened_ms=now_ms - int(age_s * 1000),
        idle_ms=None if idle_s is None else now_ms - int(idle_s * 1000),
        running=running if idle_s is None else 0,
        served=served,
    )


def node_row(name: str, sizes: Iterable[float], *, fenced: bool = False, left: bool = False) -> NodeRow:
    info = NodeInfo(hostname=name, pid=1, source="simulated", version="v", devices=devices(*sizes))
    return NodeRow(node=name, incarnation="i1", beat=1, info=info, fenced=fenced, left=left, address=f"tcp://{name}")


def state(
    queues: Iterable[QueueRow],
    slots: Iterable[SlotRow] = (),
    nodes: Mapping[str, Iterable[float]] | None = None,
    now_ms: int = NOW_MS,
) -> ClusterState:
    rows = tuple(node_row(name, sizes) for name, sizes in (nodes or {}).items())
    return ClusterState(now_ms=now_ms, queues=tuple(queues), slots=tuple(slots), nodes=rows)


def report(node: str, sizes: Iterable[float], *, incarnation: str = "i1", cordoned: bool = False, **slots: Grant) -> Report:
    live = tuple(LiveSlot(slot_id, granted) for slot_id, granted in slots.items())
    return Report(node, incarnation, 1, devices(*sizes), 0, live, cordoned)


def beat(node: str, *uses: DeviceUse, closed: tuple[str, ...] = (), age_s: float = 0.0, cordoned: bool = False) -> Beat:
    return Beat(node, closed, uses, age_s, cordoned)


def over_committed(ledger: Index) -> list[str]:
    """Devices on which more was promised than they have; empty, or there is a bug."""
    return [
        f"{view.name}/{pool.key}"
        for view in ledger.nodes.values()
        for pool in view.pools.values()
        if sum(pool.leases.values()) > pool.usable_bytes
    ]
