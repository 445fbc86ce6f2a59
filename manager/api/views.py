"""The cluster as people see it: from one look to workers, queues, slots and a list of what is wrong. Pure."""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from manager.api.watch import Snapshot
from manager.core.answers import resources_view, utc_or_none
from manager.core.answers_cluster import DependencyState, GroupView, ServiceView, TaskCounts
from manager.core.answers_nodes import DeviceView, WorkerState, WorkerView
from manager.core.answers_slots import QueueView, SlotView
from manager.core.devices import Device
from manager.core.index import DeviceView as LedgerDevice
from manager.core.lifecycle import Cordon, SlotKind, SlotStatus, TaskStatus
from manager.core.model import DeviceUse, NodeRow, SlotRow
from manager.core.quantities import format_duration
from manager.settings import GroupSettings

READINGS_S_MAX: Final = 30.0
"""Readings older than this are said to be old."""
REFUSED_S_MAX: Final = 10.0
"""An agent that is refused asks again each second: one that has not for so long is gone."""
DASK_TENANT: Final = "dask"
"""What stands for the tenant of slots that run Dask tasks; only admins see them."""


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
    """Every node that is known and was not removed, by name."""
    return tuple(_worker(row, snapshot) for row in snapshot.state.nodes if not _is_removed(row))


def worker(snapshot: Snapshot, node: str) -> WorkerView | None:
    """One of them."""
    return next((view for view in workers(snapshot) if view.node == node), None)


def _is_removed(row: NodeRow) -> bool:
    return (row.remove or row.cordon_by == "autoscaler") and (row.left or row.fenced)


def worker_state(row: NodeRow, snapshot: Snapshot) -> WorkerState:
    """How a node is doing."""
    if row.left:
        return WorkerState.LEFT
    if row.fenced:
        return WorkerState.LOST
    if row.node in snapshot.silent:
        return WorkerState.SILENT
    if not row.address:
        since_ms = row.registered_ms or 0
        late = snapshot.store_now_ms() - since_ms > snapshot.registration_s * 1000
        return WorkerState.NO_WORKER if late else WorkerState.REGISTERING
    match row.cordon:
        case Cordon.NONE:
            return WorkerState.LIVE
        case Cordon.CORDON:
            return WorkerState.CORDONED
        case Cordon.DRAIN:
            return WorkerState.DRAINING if _slots_on(row.node, snapshot) else WorkerState.DRAINED


def _slots_on(node: str, snapshot: Snapshot) -> list[SlotRow]:
    return [slot for slot in snapshot.state.slots if slot.node == node]


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
                resources=resources_view(row.resources),
                depth=row.depth,
                slots_open=sum(1 for slot in slots if slot.status is SlotStatus.OPEN),
                slots_opening=sum(1 for slot in slots if slot.status is SlotStatus.REQUESTED),
                oldest_wait_s=None if since_ms is None else max(0, now_ms - since_ms) / 1000,
                run_s=row.run_s,
                slots_warm=row.warm,
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
        if row.kind is SlotKind.DIRECT:
            if tenant is None:
                found.append(_slot(row, DASK_TENANT, row.memory_bytes, now_ms))
        elif queue is not None and (tenant is None or queue.shape.tenant == tenant):
            found.append(_slot(row, queue.shape.tenant, queue.shape.memory_bytes, now_ms))
    return tuple(found)


def services(blobs: Mapping[str, bytes]) -> tuple[ServiceView, ...]:
    """Processes that said where they are. A name is ``KIND``, ``KIND/NODE`` or ``KIND:which one``."""
    found: list[ServiceView] = []
    for name, blob in sorted(blobs.items()):
        try:
            said = _service(blob)
        except msgspec.DecodeError:
            said = _Service()
        found.append(
            ServiceView(
                name=name,
                kind=re.split("[:/]", name)[0],
                host=said.host,
                pid=said.pid,
                url=said.url,
                metrics_url=said.metrics_url,
                version=said.version,
            )
        )
    return tuple(found)


def groups(snapshot: Snapshot, known: Mapping[str, GroupSettings]) -> tuple[GroupView, ...]:
    """Every group that the settings or a node name."""
    rows = snapshot.live()
    found: list[GroupView] = []
    for name in sorted({*known, *(row.info.group for row in rows if row.info.group)}):
        own = [row for row in rows if row.info.group == name]
        settings = known.get(name)
        found.append(
            GroupView(
                name=name,
                workers=len(own),
                starting=sum(1 for row in own if not row.address),
                draining=sum(1 for row in own if row.cordon is Cordon.DRAIN),
                provider="" if settings is None else settings.provider,
                workers_min=None if settings is None else settings.workers_min,
                workers_max=None if settings is None else settings.workers_max,
            )
        )
    return tuple(found)


def problems(snapshot: Snapshot, depth: int) -> tuple[str, ...]:
    """What is wrong, each in one sentence that names the remedy.

    Args:
        depth: tasks that wait.
    """
    found: list[str] = []
    waiting = f" while {depth} {'task waits' if depth == 1 else 'tasks wait'}" if depth else ""
    if snapshot.fsync not in {"always", "unknown"}:
        found.append(
            f"The store does not sync each write to disk (appendfsync is {snapshot.fsync}): accepted tasks may be lost "
            "in a power cut. Set 'appendonly yes' and 'appendfsync always'."
        )
    if snapshot.leader.beating is False:
        found.append(f"No controller leads{waiting}: no slots are opened or closed. Start one (rocyard up).")
    states = {part.name: part.state for part in snapshot.dependencies}
    if states["scheduler"] is DependencyState.DOWN:
        found.append(f"The controller does not reach the Dask scheduler{waiting}: no new slot is placed; open ones go on.")
    if states.get("autoscaler") is DependencyState.DOWN:
        found.append("No autoscaler runs, though one has: no node is added or removed. Start one (rocyard autoscaler).")
    if not snapshot.live():
        found.append(f"No node lives{waiting}. Start one where the devices are (rocyard node).")
    for row in snapshot.state.nodes:
        match worker_state(row, snapshot):
            case WorkerState.SILENT:
                found.append(f"The agent of {row.node} has been silent for a lease; its tasks are queued again soon.")
            case WorkerState.LOST:
                found.append(f"{row.node} was declared lost; it is used again when its agent registers anew.")
            case WorkerState.NO_WORKER:
                limit = format_duration(snapshot.registration_s)
                found.append(
                    f"{row.node} has failed to register: its Dask worker has not reported within {limit} "
                    "(node.registration_s). Its agent goes on starting it; its log says why it ends."
                )
            case WorkerState.CORDONED | WorkerState.DRAINING | WorkerState.DRAINED:
                found += _cordon_problems(row, snapshot)
            case WorkerState.LEFT | WorkerState.LIVE | WorkerState.REGISTERING:
                pass
        if not row.left:
            sick = [use for use in row.uses if not use.healthy]
            found += [f"{use.uuid} on {row.node} is not healthy: {use.problem or 'no reason given'}." for use in sick]
            age_s = _age_s(row, snapshot)
            if row.address and age_s is not None and age_s > READINGS_S_MAX:
                found.append(f"The readings of {row.node} are {format_duration(age_s)} old.")
    for refusal in snapshot.state.refused:
        if snapshot.store_now_ms() - refusal.at_ms < REFUSED_S_MAX * 1000:
            found.append(f"Node {refusal.node} may not join: {refusal.problem}.")
    return tuple(found)


def _cordon_problems(row: NodeRow, snapshot: Snapshot) -> list[str]:
    """What somebody did on purpose is only told so that it is not forgotten; the autoscaler and agents do not forget."""
    now_ms = snapshot.store_now_ms()
    left = len(_slots_on(row.node, snapshot))
    if left and row.deadline_ms is not None and now_ms - row.deadline_ms > READINGS_S_MAX * 1000:
        over = format_duration((now_ms - row.deadline_ms) / 1000)
        return [f"{row.node} should have been drained {over} ago, and has {left} slots: does its agent, or a controller, hang?"]
    if row.cordon_by != "operator" or row.remove:
        return []
    since = "" if row.cordon_ms is None else f" for {format_duration(max(0, now_ms - row.cordon_ms) / 1000)}"
    what = "cordoned" if row.cordon is Cordon.CORDON else "draining" if left else "drained"
    return [f"{row.node} has been {what}{since}: nothing new is placed there until 'rocyard uncordon {row.node}'."]


def _age_s(row: NodeRow, snapshot: Snapshot) -> float | None:
    return None if row.uses_ms is None else max(0, snapshot.store_now_ms() - row.uses_ms) / 1000


def _worker(row: NodeRow, snapshot: Snapshot) -> WorkerView:
    own = _slots_on(row.node, snapshot)
    uses = {use.uuid: use for use in row.uses}
    view = snapshot.index.nodes.get(row.node)
    ledger = view.devices if view is not None else {}
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
            _device(device, ledger.get(device.uuid), uses.get(device.uuid), row.info.reserve_bytes)
            for device in row.info.devices
        ),
        group=row.info.group,
        labels=dict(row.info.labels),
        cpus=row.info.cpus,
        host_memory_bytes=row.info.host_memory_bytes,
        cpus_leased=0.0 if view is None else (view.cpu_milli - view.cpu_free_milli) / 1000,
        host_leased_bytes=0 if view is None else view.host_memory_bytes - view.host_free_bytes,
        cordon=row.cordon.value,
        cordoned_by=row.cordon_by,
        cordoned_at=utc_or_none(row.cordon_ms),
        deadline_at=utc_or_none(row.deadline_ms),
        remove=row.remove,
    )


def _device(device: Device, ledger: LedgerDevice | None, use: DeviceUse | None, reserve_bytes: int) -> DeviceView:
    usable = max(0, device.memory_bytes - reserve_bytes)
    pool = None if ledger is None else ledger.pool
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
        share_leased=0.0 if ledger is None else sum(ledger.slots.values()) / 1000,
        exclusive=ledger is not None and bool(ledger.alone & ledger.slots.keys()),
        partition=device.partition,
        pool=device.pool,
        used_bytes=None if use is None else use.used_bytes,
        utilisation_ratio=None if use is None else use.utilisation_ratio,
        temperature_celsius=None if use is None else use.temperature_celsius,
        power_watts=None if use is None else use.power_watts,
        healthy=True if use is None else use.healthy,
        problem="" if use is None else use.problem,
    )


def _slot(row: SlotRow, tenant: str, memory_bytes: int, now_ms: int) -> SlotView:
    return SlotView(
        slot_id=row.slot_id,
        shape_id=row.shape_id,
        tenant=tenant,
        status=row.status.value,
        node=row.node or None,
        devices=row.devices,
        memory_bytes=memory_bytes,
        flag=row.flag.value,
        running=row.running,
        served=row.served,
        open_s=None if row.opened_ms is None else max(0, now_ms - row.opened_ms) / 1000,
        idle_s=None if row.idle_ms is None else max(0, now_ms - row.idle_ms) / 1000,
        kind=row.kind.value,
    )
