"""The cluster as people see it: from one look to workers, queues, slots and a list of what is wrong. Pure."""

from collections.abc import Mapping

import msgspec

from manager.api.watch import Snapshot
from manager.core.answers import DeviceView, QueueView, ServiceView, SlotView, TaskCounts, WorkerState, WorkerView
from manager.core.devices import Device
from manager.core.index import Pool
from manager.core.lifecycle import SlotStatus, TaskStatus
from manager.core.model import DeviceUse, NodeRow, QueueRow, SlotRow
from manager.core.quantities import format_duration

READINGS_S_MAX = 30.0
"""Readings older than this are said to be old."""


class _Service(msgspec.Struct, frozen=True):
    """What a process says of itself; each may leave out what it does not know."""

    host: str = ""
    pid: int = 0
    url: str = ""
    metrics_url: str = ""
    version: str = ""


_service = msgspec.json.Decoder(_Service).decode


def task_counts(counts: Mapping[str, int]) -> TaskCounts:
    """Tasks by status."""
    return TaskCounts(**{status.value.lower(): max(0, counts.get(status.value, 0)) for status in TaskStatus})


def workers(snapshot: Snapshot) -> tuple[WorkerView, ...]:
    """Every node that has not left, by name."""
    return tuple(_worker(row, snapshot) for row in snapshot.state.nodes)


def worker_state(row: NodeRow, snapshot: Snapshot) -> WorkerState:
    """How a node is doing."""
    if row.left:
        return WorkerState.LEFT
    if row.fenced:
        return WorkerState.LOST
    if row.node in snapshot.silent:
        return WorkerState.SILENT
    return WorkerState.LIVE if row.address else WorkerState.NO_WORKER


def queues(snapshot: Snapshot, tenant: str | None) -> tuple[QueueView, ...]:
    """Shapes with work or slots; those of `tenant`, or all."""
    state, now_ms = snapshot.state, snapshot.store_now_ms()
    found: list[QueueView] = []
    for row in state.queues:
        if tenant is not None and row.shape.tenant != tenant:
            continue
        slots = [slot for slot in state.slots if slot.shape_id == row.shape_id]
        since_ms = row.head_queued_ms
        found.append(
            QueueView(
                shape_id=row.shape_id,
                tenant=row.shape.tenant,
                memory_bytes=row.shape.memory_bytes,
                gpus=row.shape.gpus,
                depth=row.depth,
                slots_open=sum(1 for slot in slots if slot.status is SlotStatus.OPEN),
                slots_opening=sum(1 for slot in slots if slot.status is SlotStatus.REQUESTED),
                oldest_wait_s=None if since_ms is None else max(0, now_ms - since_ms) / 1000,
                run_s=row.run_s,
            )
        )
    return tuple(found)


def slots(snapshot: Snapshot, tenant: str | None) -> tuple[SlotView, ...]:
    """Slots that are not closed; those of `tenant`, or all."""
    shapes = {queue.shape_id: queue for queue in snapshot.state.queues}
    now_ms = snapshot.store_now_ms()
    found: list[SlotView] = []
    for row in snapshot.state.slots:
        queue = shapes.get(row.shape_id)
        if queue is not None and (tenant is None or queue.shape.tenant == tenant):
            found.append(_slot(row, queue, now_ms))
    return tuple(found)


def services(blobs: Mapping[str, bytes]) -> tuple[ServiceView, ...]:
    """Processes that said where they are. A name is ``KIND`` or ``KIND:which one``."""
    found: list[ServiceView] = []
    for name, blob in sorted(blobs.items()):
        try:
            said = _service(blob)
        except msgspec.DecodeError:
            said = _Service()
        found.append(
            ServiceView(
                name=name,
                kind=name.partition(":")[0],
                host=said.host,
                pid=said.pid,
                url=said.url,
                metrics_url=said.metrics_url,
                version=said.version,
            )
        )
    return tuple(found)


def problems(snapshot: Snapshot, depth: int) -> tuple[str, ...]:
    """What is wrong, each in one sentence that names the remedy.

    Args:
        depth: tasks that wait.
    """
    found: list[str] = []
    waiting = f" while {depth} tasks wait" if depth else ""
    if snapshot.fsync not in {"always", "unknown"}:
        found.append(
            f"The store does not sync each write to disk (appendfsync is {snapshot.fsync}): accepted tasks may be lost "
            "in a power cut. Set 'appendonly yes' and 'appendfsync always'."
        )
    if snapshot.leader.beating is False:
        found.append(f"No controller leads{waiting}: no slots are opened or closed. Start one (rocyard up).")
    if not snapshot.live():
        found.append(f"No node lives{waiting}. Start one where the devices are (rocyard node).")
    for row in snapshot.state.nodes:
        match worker_state(row, snapshot):
            case WorkerState.SILENT:
                found.append(f"The agent of {row.node} has been silent for a lease; its tasks are queued again soon.")
            case WorkerState.LOST:
                found.append(f"{row.node} was declared lost; it is used again when its agent registers anew.")
            case WorkerState.NO_WORKER:
                found.append(f"The Dask worker of {row.node} does not report; its agent restarts it.")
            case WorkerState.LEFT | WorkerState.LIVE:
                pass
        if not row.left:
            sick = [use for use in row.uses if not use.healthy]
            found += [f"{use.uuid} on {row.node} is not healthy: {use.problem or 'no reason given'}." for use in sick]
            age_s = _age_s(row, snapshot)
            if row.address and age_s is not None and age_s > READINGS_S_MAX:
                found.append(f"The readings of {row.node} are {format_duration(age_s)} old.")
    return tuple(found)


def _age_s(row: NodeRow, snapshot: Snapshot) -> float | None:
    return None if row.uses_ms is None else max(0, snapshot.store_now_ms() - row.uses_ms) / 1000


def _worker(row: NodeRow, snapshot: Snapshot) -> WorkerView:
    own = [slot for slot in snapshot.state.slots if slot.node == row.node]
    uses = {use.uuid: use for use in row.uses}
    view = snapshot.index.nodes.get(row.node)
    pools = view.pools if view is not None else {}
    return WorkerView(
        node=row.node,
        state=worker_state(row, snapshot),
        hostname=row.info.hostname,
        source=row.info.source,
        version=row.info.version,
        slots=len(own),
        tasks_running=sum(slot.running for slot in own),
        readings_age_s=_age_s(row, snapshot),
        devices=tuple(
            _device(device, pools.get(device.uuid), uses.get(device.uuid), row.info.reserve_bytes)
            for device in row.info.devices
        ),
    )


def _device(device: Device, pool: Pool | None, use: DeviceUse | None, reserve_bytes: int) -> DeviceView:
    usable = max(0, device.memory_bytes - reserve_bytes)
    return DeviceView(
        uuid=device.uuid,
        index=device.index,
        vendor=device.vendor,
        model=device.model,
        architecture=device.architecture,
        memory_bytes=device.memory_bytes,
        usable_bytes=usable if pool is None else pool.usable_bytes,
        leased_bytes=0 if pool is None else sum(pool.leases.values()),
        foreign_bytes=0 if pool is None else pool.foreign_bytes,
        free_bytes=0 if pool is None else pool.free_bytes,
        used_bytes=None if use is None else use.used_bytes,
        utilisation_ratio=None if use is None else use.utilisation_ratio,
        temperature_celsius=None if use is None else use.temperature_celsius,
        power_watts=None if use is None else use.power_watts,
        healthy=True if use is None else use.healthy,
        problem="" if use is None else use.problem,
    )


def _slot(row: SlotRow, queue: QueueRow, now_ms: int) -> SlotView:
    return SlotView(
        slot_id=row.slot_id,
        shape_id=row.shape_id,
        tenant=queue.shape.tenant,
        status=row.status.value,
        node=row.node or None,
        devices=row.devices,
        memory_bytes=queue.shape.memory_bytes,
        flag=row.flag.value,
        running=row.running,
        served=row.served,
        open_s=None if row.opened_ms is None else max(0, now_ms - row.opened_ms) / 1000,
        idle_s=None if row.idle_ms is None else max(0, now_ms - row.idle_ms) / 1000,
    )
