"""The cluster, its nodes and its keys as people read them. Pure: from answers of the API to renderables."""

import datetime as dt
from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from manager.cli.screens_tasks import STYLES, needs, plain_table
from manager.cli.text import NONE, ago, bar, clock, count, one_line, plain, seconds
from manager.core.answers_cluster import ClusterView, DependencyState, DependencyView, GroupView, TaskCounts
from manager.core.answers_nodes import DeviceView, WorkerState, WorkerView
from manager.core.answers_slots import QueueView
from manager.core.answers_tenants import KeyView
from manager.core.lifecycle import Cordon, SlotKind, TaskStatus
from manager.core.quantities import format_memory

BAR_WIDTH: Final = 16
QUEUES_SHOWN_MAX: Final = 12
"""The longest ones; a screen holds no more, `--output json` has all."""
NAMES_SHOWN_MAX: Final = 3
"""Nodes that are named where many have the same labels."""

_LEASED, _FOREIGN = "█", "▒"
_MAKERS: Final = frozenset({"AMD", "Instinct", "Radeon", "NVIDIA", "(simulated)"})
_BAR_STYLES: Final = {_LEASED: "blue", _FOREIGN: "red", "·": "dim"}
STATES: Final[dict[WorkerState, str]] = {
    WorkerState.LIVE: "green",
    WorkerState.REGISTERING: "cyan",
    WorkerState.NO_WORKER: "yellow",
    WorkerState.CORDONED: "yellow",
    WorkerState.DRAINING: "yellow",
    WorkerState.DRAINED: "magenta",
    WorkerState.SILENT: "yellow",
    WorkerState.LOST: "bold red",
    WorkerState.LEFT: "dim",
}
assert STATES.keys() == set(WorkerState)
_CORDONED: Final = frozenset({WorkerState.CORDONED, WorkerState.DRAINING, WorkerState.DRAINED})
"""States that say by themselves that the node is cordoned."""
_PARTS: Final[dict[DependencyState, tuple[str, str]]] = {
    DependencyState.OK: ("●", "green"),
    DependencyState.UNKNOWN: ("○", "dim"),
    DependencyState.DOWN: ("●", "red"),
}


def status_screen(cluster: ClusterView, url: str) -> RenderableType:
    """The cluster at a glance: problems first."""
    where = f"{plain(url)} · {cluster.at:%H:%M:%S} UTC"
    parts: list[RenderableType] = [
        Text.assemble(("Rocyard", "bold"), f" {plain(cluster.version)} · {where}"),
        _verdict(cluster),
        Text(),
        tasks_line(cluster.tasks),
    ]
    if direct := sum(1 for slot in cluster.slots if slot.kind == SlotKind.DIRECT):
        parts.append(Text.assemble(("Dask    ", "bold"), f"{count(direct, 'task')} of who uses Dask directly"))
    if cluster.dependencies:
        parts.append(parts_line(cluster.dependencies))
    parts += [group_line(group) for group in cluster.groups]
    waiting = sorted((q for q in cluster.queues if q.depth), key=lambda queue: (-queue.depth, queue.shape_id))
    if waiting:
        parts += [Text(), _queue_table(waiting[:QUEUES_SHOWN_MAX], tenants=len({q.tenant for q in waiting}) > 1)]
        if len(waiting) > QUEUES_SHOWN_MAX:
            parts.append(Text(f"… and {len(waiting) - QUEUES_SHOWN_MAX} more shapes with waiting tasks", "dim"))
    parts += [Text(), workers_screen(cluster.workers)]
    return Group(*parts)


def _verdict(cluster: ClusterView) -> RenderableType:
    if not cluster.problems:
        fsync = "every accepted task is on disk" if cluster.store.fsync == "always" else f"fsync {cluster.store.fsync}"
        return Text.assemble(("● ", "green"), f"all is well; {plain(fsync)}")
    return Group(*(Text.assemble(("● ", "red"), plain(problem)) for problem in cluster.problems))


def tasks_line(tasks: TaskCounts) -> Text:
    """Tasks by status, with a colour for each that there are any of."""
    counts = {
        TaskStatus.QUEUED: tasks.queued,
        TaskStatus.BLOCKED: tasks.blocked,
        TaskStatus.RETRY_WAIT: tasks.retry_wait,
        TaskStatus.RUNNING: tasks.running,
        TaskStatus.SUCCEEDED: tasks.succeeded,
        TaskStatus.FAILED: tasks.failed,
        TaskStatus.CANCELLED: tasks.cancelled,
    }
    line = Text("Tasks   ", "bold")
    quiet = {TaskStatus.BLOCKED, TaskStatus.RETRY_WAIT, TaskStatus.CANCELLED}
    for status, number in counts.items():
        if number or status not in quiet:
            line.append(f"{number:,}", STYLES[status] if number else "dim")
            line.append(f" {status.lower().replace('_', ' ')}   ", "" if number else "dim")
    line.rstrip()
    return line


def parts_line(parts: Sequence[DependencyView]) -> Text:
    """The parts of the cluster, with a dot for how each is."""
    line = Text("Parts   ", "bold")
    for part in parts:
        dot, style = _PARTS[part.state]
        line.append(f"{dot} ", style)
        line.append(plain(part.name), "" if part.state is DependencyState.OK else style)
        line.append(f" ({plain(part.detail)})   " if part.detail else "   ", "dim")
    line.rstrip()
    return line


def group_line(group: GroupView) -> Text:
    """One group of nodes: how many there are, of how many there may be."""
    line = Text.assemble(("Group   ", "bold"), one_line(group.name, 30), f"   {count(group.workers, 'node')}")
    if group.workers_max is not None:
        line.append(f" of {group.workers_min} to {group.workers_max}", "dim")
    for number, word in ((group.starting, "starting"), (group.draining, "draining")):
        if number:
            line.append(f" · {number} {word}", "yellow")
    return line


def _queue_table(queues: Sequence[QueueView], *, tenants: bool) -> RenderableType:
    table = plain_table("WAITING", "NEEDS", *(["TENANT"] if tenants else []), "SLOTS", "OLDEST", "RUN TIME")
    for queue in queues:
        opening = f" +{queue.slots_opening} opening" if queue.slots_opening else ""
        table.add_row(
            Text(f"{queue.depth:,}"),
            Text(one_line(needs(queue), 30)),
            *([Text(one_line(queue.tenant, 16))] if tenants else []),
            Text(f"{queue.slots_open} open{opening}"),
            Text(seconds(queue.oldest_wait_s)),
            Text(seconds(queue.run_s)),
        )
    return table


def workers_screen(workers: Sequence[WorkerView]) -> RenderableType:
    """Every node, a row for each of its devices, and below what is wrong with any of them."""
    if not workers:
        return Text("No nodes. Start an agent on a machine with devices: rocyard node")
    table = plain_table("NODE / DEVICE", "MEMORY", "LEASED", "OF", "USED", "BUSY")
    notes: list[RenderableType] = []
    for worker in workers:
        table.add_row(Text(one_line(worker.node, 24), "bold"), worker_state(worker))
        first = first_of_pools(worker.devices)
        for device in worker.devices:
            table.add_row(*_device_row(device, first.get(device.uuid)))
            notes += _device_notes(worker.node, device)
        notes += _drain_notes(worker)
    return Group(table, *notes, *_label_notes(workers))


def first_of_pools(devices: Sequence[DeviceView]) -> dict[str, int]:
    """Devices whose memory is that of another device that stands before them, by uuid: the number of that one."""
    first: dict[str, int] = {}
    return {
        device.uuid: number
        for device in devices
        if device.pool and (number := first.setdefault(device.pool, device.index)) != device.index
    }


def _label_notes(workers: Sequence[WorkerView]) -> list[RenderableType]:
    """A line for all nodes that have the same labels."""
    names: dict[str, list[str]] = {}
    for worker in workers:
        if worker.labels:
            labels = ", ".join(f"{name}={value}" for name, value in sorted(worker.labels.items()))
            names.setdefault(labels, []).append(one_line(worker.node, 24))
    notes: list[RenderableType] = []
    for labels, nodes in names.items():
        more = f" and {len(nodes) - NAMES_SHOWN_MAX} more" if len(nodes) > NAMES_SHOWN_MAX else ""
        notes.append(Text(f"  {', '.join(nodes[:NAMES_SHOWN_MAX])}{more}: labels {one_line(labels)}", "dim"))
    return notes


def worker_state(worker: WorkerView) -> Text:
    """How a node is, and what it has in hand."""
    text = Text(worker.state.replace("_", " "), STATES[worker.state])
    if worker.cordon and worker.state not in {*_CORDONED, WorkerState.LEFT}:
        text.append(", draining" if worker.cordon == Cordon.DRAIN else ", cordoned", "yellow")
    if worker.state is WorkerState.LEFT:
        return text  # it has nothing in hand, and what was to become of it has
    left = count(worker.slots, "slot") + " left"
    return text.append(f" · {left if worker.cordon == Cordon.DRAIN else f'{worker.tasks_running} running'}", "dim")


def worker_line(worker: WorkerView) -> RenderableType:
    """One node in a line, and what is to happen to it."""
    return Group(Text.assemble((one_line(worker.node, 24), "bold"), ": ", worker_state(worker)), *_drain_notes(worker))


def _drain_notes(worker: WorkerView) -> list[RenderableType]:
    """When a drain gives tasks back, and what follows it."""
    where = f"  {one_line(worker.node, 24)}: "
    notes: list[RenderableType] = []
    if worker.deadline_at is not None and worker.slots:
        notes.append(Text(f"{where}what still runs at {clock(worker.deadline_at)} goes back to the queue", "dim"))
    if worker.remove:
        notes.append(Text(f"{where}its agent ends for good once it is empty", "dim"))
    return notes


def _device_row(device: DeviceView, first: int | None) -> tuple[Text, ...]:
    """One device; `first` is the number of the device with which it shares its memory, where that stands before it."""
    usable = max(device.usable_bytes, 1)
    shares = ((device.leased_bytes / usable, _LEASED), (device.foreign_bytes / usable, _FOREIGN))
    blocks = Text.assemble(*((text, _BAR_STYLES[character]) for character, text in bar(shares, BAR_WIDTH)))
    used = NONE if device.used_bytes is None else format_memory(device.used_bytes)
    busy = NONE if device.utilisation_ratio is None else f"{device.utilisation_ratio:.0%}"
    name, busy_text = (
        Text(f"  {device.index} {short_model(device.model)}"),
        Text(busy, "" if device.utilisation_ratio else "dim"),
    )
    if first is not None:
        return name, Text(f"is that of {first}", "dim"), Text(), Text(), Text(), busy_text
    return (
        name,
        blocks,
        Text(format_memory(device.leased_bytes), "" if device.leased_bytes else "dim"),
        Text(format_memory(device.usable_bytes)),
        Text(used, "" if device.used_bytes else "dim"),
        busy_text,
    )


def _device_notes(node: str, device: DeviceView) -> list[RenderableType]:
    where = f"  {one_line(node, 24)}/{device.index}: "
    notes: list[RenderableType] = []
    if not device.healthy:
        notes.append(Text(f"{where}unhealthy: {one_line(device.problem)}", "red"))
    if device.foreign_bytes:
        foreign = f"{where}{format_memory(device.foreign_bytes)} are used by processes that are none of ours"
        notes.append(Text.assemble(foreign, (f" ({_FOREIGN})", "red")))
    if device.exclusive:
        notes.append(Text(f"{where}a slot has it for itself", "dim"))
    elif device.share_leased:
        notes.append(Text(f"{where}{device.share_leased:.0%} of its compute is leased", "dim"))
    return notes


def short_model(model: str) -> str:
    """A device's model without its maker's names: ``MI300X``."""
    words = [word for word in one_line(model).split() if word not in _MAKERS]
    return one_line(" ".join(words) or model, 18)


def keys_table(keys: Sequence[KeyView], now: dt.datetime | None = None) -> RenderableType:
    """API keys; revoked ones last."""
    now = now or dt.datetime.now(dt.UTC)
    table = plain_table("KEY", "TENANT", "SCOPE", "MADE", "")
    for key in sorted(keys, key=lambda key: (key.revoked_at is not None, key.created_at)):
        revoked = f"revoked {ago(key.revoked_at, now)}" if key.revoked_at else ""
        style = "dim" if key.revoked_at else ""
        cells = (key.key_id, one_line(key.tenant, 30), key.scope.value, ago(key.created_at, now), revoked)
        table.add_row(*(Text(cell, style) for cell in cells))
    return table
