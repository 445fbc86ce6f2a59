"""The live view as lines of text. Pure: from answers of the API, a size and what the reader chose to one frame.

A frame is never wider or higher than it may be: what does not fit is cut by importance (devices before nodes, nodes before
the queue), and says how much is missing.
"""

import enum
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.text import Text

from manager.cli.screens_cluster import STATES, first_of_pools, short_model, tasks_line
from manager.cli.screens_tasks import needs
from manager.cli.text import bar, count, one_line, plain, seconds
from manager.core.answers_cluster import ClusterView, DependencyState, TaskCounts
from manager.core.answers_nodes import DeviceView, WorkerView
from manager.core.answers_slots import QueueView
from manager.core.quantities import GIB, format_memory

RATE_WINDOW_S: Final = 10.0
"""Rates are means over the last seconds: one sample would jump."""
PROBLEMS_MAX: Final = 3
NAME_MAX: Final = 20
NEEDS_MAX: Final = 48
BAR_MIN, BAR_MAX = 12, 72
USED, LEASED, FOREIGN, OVER, FREE = "█", "▄", "▒", "▓", "·"
_STYLES: Final = {USED: "blue", LEASED: "cyan", FOREIGN: "yellow", OVER: "bold red", FREE: "dim"}


class Sort(enum.StrEnum):
    """What comes first among nodes."""

    NAME = "name"
    FULL = "fullest"
    EMPTY = "emptiest"
    BUSY = "busiest"

    def next(self) -> "Sort":
        """The one after this."""
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


class Sample(msgspec.Struct, frozen=True):
    """The cluster, and when it was asked on our own clock."""

    view: ClusterView
    at_s: float


class Rates(msgspec.Struct, frozen=True):
    """Per second; None while they are not known."""

    submitted: float | None = None
    succeeded: float | None = None
    failed: float | None = None


class Look(msgspec.Struct, frozen=True):
    """What the reader chose, and how the view gets its news.

    Attributes:
        first: the first node that is shown, where not all fit.
        trouble: why there is no newer answer; empty where all is well.
        keys: whether there are keys to be pressed, which the last line then names.
    """

    sort: Sort = Sort.NAME
    first: int = 0
    paused: bool = False
    trouble: str = ""
    keys: bool = False


class Bytes(msgspec.Struct, frozen=True):
    """What one or more devices have, leave out and hold."""

    usable: int
    leased: int
    used: int
    foreign: int

    @property
    def taken(self) -> int:
        """What cannot be promised."""
        return max(self.leased, self.used) + self.foreign


def rates(samples: Sequence[Sample]) -> Rates:
    """What has happened per second between the first and the last of `samples`.

    Final tasks are kept for a time only, so counts may shrink: a rate is then taken to be nothing, never less.
    """
    if len(samples) < 2 or samples[-1].at_s <= samples[0].at_s:
        return Rates()
    first, last, elapsed_s = samples[0].view.tasks, samples[-1].view.tasks, samples[-1].at_s - samples[0].at_s

    def per_s(before: int, after: int) -> float:
        return max(0, after - before) / elapsed_s

    return Rates(
        submitted=per_s(_all(first), _all(last)),
        succeeded=per_s(first.succeeded, last.succeeded),
        failed=per_s(first.failed, last.failed),
    )


def _all(tasks: TaskCounts) -> int:
    return sum(msgspec.structs.astuple(tasks))


def frame(view: ClusterView, speed: Rates, look: Look, url: str, width: int, height: int | None) -> list[Text]:
    """One frame.

    Args:
        view: what the API said last.
        speed: what happens per second.
        look: what the reader chose.
        url: the API.
        width: columns.
        height: lines; None where nothing is cut.
    """
    head = _head(view, speed, look, url)
    foot = [Text(), _keys(look, width)] if look.keys else []
    left = None if height is None else max(0, height - len(head) - len(foot))
    queue = _queue(view, width, None if left is None else max(4, left // 3))
    if left is not None:
        left = max(2, left - len(queue))
    body = [*queue, *_nodes(view.workers, look, width, left)]
    if height is not None:
        body = body[: max(0, height - len(head) - len(foot))]
        body += [Text()] * (height - len(head) - len(body) - len(foot))  # the last line stands at the bottom
    lines = [*head, *body, *foot]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines if height is None else lines[:height]


# --- above ----------------------------------------------------------------------------------------------------------


def _head(view: ClusterView, speed: Rates, look: Look, url: str) -> list[Text]:
    leader = "leader beats" if view.leader.beating else "no leader" if view.leader.beating is False else "leader unknown"
    lines = [
        Text.assemble(
            ("Rocyard", "bold"),
            f" {plain(view.version)} · {plain(url)} · {view.at:%H:%M:%S} UTC · ",
            (leader, "" if view.leader.beating else "bold red" if view.leader.beating is False else "dim"),
            *([("  PAUSED", "bold yellow")] if look.paused else []),
        )
    ]
    if look.trouble:
        lines.append(Text.assemble(("● ", "bold red"), (one_line(look.trouble), "bold red")))
    lines += [Text.assemble(("● ", "red"), one_line(problem)) for problem in view.problems[:PROBLEMS_MAX]]
    if len(view.problems) > PROBLEMS_MAX:
        lines.append(Text(f"  and {count(len(view.problems) - PROBLEMS_MAX, 'more problem')}: rocyard status", "red"))
    if not view.problems and not look.trouble:
        lines.append(Text.assemble(("● ", "green"), "all is well"))
    busy = sum(1 for slot in view.slots if slot.running)
    slots = Text.assemble(("Slots   ", "bold"), f"{len(view.slots):,} open   {busy:,} busy")
    if any(worker.devices for worker in view.workers):
        nodes = [_bytes(worker.devices) for worker in view.workers]
        leased, usable = sum(node.leased for node in nodes), sum(node.usable for node in nodes)
        slots.append(f"   {format_memory(leased)} of {format_memory(usable)} leased")
    return [*lines, tasks_line(view.tasks), _speed(speed), slots, *_autoscaler(view)]


def _speed(speed: Rates) -> Text:
    line = Text.assemble(("Rates   ", "bold"))
    for name, value in (("submitted", speed.submitted), ("succeeded", speed.succeeded), ("failed", speed.failed)):
        line.append("–" if value is None else f"{value:,.1f}", "red" if name == "failed" and value else "")
        line.append(f"/s {name}   ", "" if value else "dim")
    line.rstrip()
    return line


def _autoscaler(view: ClusterView) -> list[Text]:
    """Groups of nodes that may grow and shrink, in one line; none where there are none."""
    if not view.groups:
        return []
    line = Text.assemble(("Groups  ", "bold"))
    for group in view.groups:
        bounds = "" if group.workers_max is None else f" ({group.workers_min or 0} to {group.workers_max})"
        line.append(f"{one_line(group.name, NAME_MAX)} {group.workers}{bounds}")
        moves = [f"{number} {word}" for number, word in ((group.starting, "starting"), (group.draining, "draining")) if number]
        line.append(f" {', '.join(moves)}" if moves else "", "yellow")
        line.append("   ")
    scaler = next((part for part in view.dependencies if part.name == "autoscaler"), None)
    if scaler is not None and scaler.state is not DependencyState.OK:
        line.append(f"autoscaler {scaler.state.value}", "red" if scaler.state is DependencyState.DOWN else "dim")
    line.rstrip()
    return [line]


# --- the queue ------------------------------------------------------------------------------------------------------


def _queue(view: ClusterView, width: int, lines_max: int | None) -> list[Text]:
    """Shapes with work or slots; those that wait first."""
    shapes = sorted(view.queues, key=lambda queue: (-queue.depth, -queue.slots_open, queue.shape_id))
    if not shapes:
        return [Text(), Text("nothing waits", "dim")]
    running: dict[str, int] = {}
    for slot in view.slots:
        running[slot.shape_id] = running.get(slot.shape_id, 0) + slot.running
    room = len(shapes) if lines_max is None else max(1, lines_max - 2)
    shown = shapes if len(shapes) <= room else shapes[: max(1, room - 1)]
    tenant = max(8, min(NAME_MAX, width - 66))
    asked = max(13, min(NEEDS_MAX, width - 53 - tenant))
    head = f"{'NEEDS':<{asked}}{'TENANT':<{tenant}}"
    head += f"{'WAITING':>9}{'RUNNING':>9}{'SLOTS':>7}{'ASKED':>7}{'OLDEST':>9}{'RUN TIME':>10}"
    lines = [Text(), Text(head, "bold")]
    lines += [_queue_line(queue, running.get(queue.shape_id, 0), asked, tenant) for queue in shown]
    if len(shown) < len(shapes):
        lines.append(Text(f"… and {count(len(shapes) - len(shown), 'more shape')}", "dim"))
    return lines


def _queue_line(queue: QueueView, running: int, asked: int, tenant: int) -> Text:
    return Text.assemble(
        f"{one_line(needs(queue), asked - 1):<{asked}}{one_line(queue.tenant, tenant - 1):<{tenant}}",
        (f"{queue.depth:>9,}", "yellow" if queue.depth else "dim"),
        (f"{running:>9,}", "" if running else "dim"),
        (f"{queue.slots_open:>7,}", "" if queue.slots_open else "dim"),
        (f"{queue.slots_opening:>7,}", "" if queue.slots_opening else "dim"),
        f"{seconds(queue.oldest_wait_s):>9}{seconds(queue.run_s):>10}",
    )


# --- nodes and devices ----------------------------------------------------------------------------------------------


def _nodes(workers: Sequence[WorkerView], look: Look, width: int, lines_max: int | None) -> list[Text]:
    ordered = sorted(workers, key=lambda worker: _order(worker, look.sort))
    if not ordered:
        return [Text(), Text("no nodes: start an agent where the devices are (rocyard node)", "bold")]
    detailed = sum(1 + len(worker.devices) for worker in ordered) + 1
    if lines_max is None or detailed <= lines_max:
        return [Text(), *(line for worker in ordered for line in _node_with_devices(worker, width))]
    lines = [Text()]
    room = max(1, lines_max - 1)
    first = 0
    if len(ordered) > room:
        room = max(1, room - 1)
        first = min(max(0, look.first), len(ordered) - room)
    shown = ordered[first : first + room]
    lines += [_node_line(worker, width) for worker in shown]
    if len(shown) < len(ordered):
        lines.append(Text(f"nodes {first + 1} to {first + len(shown)} of {len(ordered)}", "dim"))
    return lines


def _order(worker: WorkerView, sort: Sort) -> tuple[float, str]:
    total = _bytes(worker.devices)
    share = total.taken / total.usable if total.usable else 0.0
    match sort:
        case Sort.NAME:
            return 0.0, worker.node
        case Sort.FULL:
            return -share, worker.node
        case Sort.EMPTY:
            return share, worker.node
        case Sort.BUSY:
            return -float(worker.tasks_running), worker.node


def _bytes(devices: Sequence[DeviceView]) -> Bytes:
    """The sum over devices of one node; memory that several share counts once.

    What cannot be read is taken to be used as leased.
    """
    parts = {device.pool or at: device for at, device in enumerate(devices)}.values()
    return Bytes(
        usable=sum(part.usable_bytes for part in parts),
        leased=sum(part.leased_bytes for part in parts),
        used=sum(_used(part) for part in parts),
        foreign=sum(part.foreign_bytes for part in parts),
    )


def _used(device: DeviceView) -> int:
    """What slots use of a device."""
    if device.used_bytes is None or not device.healthy:
        return 0
    return max(0, device.used_bytes - device.foreign_bytes)


def _node_with_devices(worker: WorkerView, width: int) -> list[Text]:
    notes = _notes(worker)
    head = Text.assemble((one_line(worker.node, NAME_MAX), "bold"), "  ", _state(worker), *notes)
    first = first_of_pools(worker.devices)
    return [head, *(_device_line(device, width, first.get(device.uuid)) for device in worker.devices)]


def _notes(worker: WorkerView) -> list[Text]:
    texts = [Text(f"  {worker.tasks_running} running in {count(worker.slots, 'slot')}", "" if worker.tasks_running else "dim")]
    sick = [str(device.index) for device in worker.devices if not device.healthy]
    if sick:
        texts.append(Text(f"  unhealthy: {', '.join(sick)}", "bold red"))
    return texts


def _state(worker: WorkerView) -> Text:
    return Text(worker.state.replace("_", " "), STATES[worker.state])


def _device_line(device: DeviceView, width: int, first: int | None) -> Text:
    """One device; `first` is the number of the device with which it shares its memory, where that stands before it."""
    sizes = _bytes([device])
    line = Text(f"  {device.index:>2} {short_model(device.model)[:12]:<12} ")
    if first is not None and device.healthy:
        return line.append(f"its memory is that of {first}", "dim")
    facts = _facts(device, wide=width >= 110)
    line.append_text(_bar(sizes, _bar_width(width - len(line) - len(facts) - 1)))
    line.append(" ")
    line.append_text(facts)
    return line


def _facts(device: DeviceView, *, wide: bool) -> Text:
    if not device.healthy:
        return Text(f"unhealthy: {one_line(device.problem)}", "bold red")
    facts = Text(f"{device.leased_bytes / GIB:>4.0f} of {device.usable_bytes / GIB:>3.0f} GiB")
    busy = "–" if device.utilisation_ratio is None else f"{device.utilisation_ratio:.0%}"
    facts.append(f"{busy:>5}", "" if device.utilisation_ratio else "dim")
    if wide:
        facts.append(f"  used {_used(device) / GIB:>5.0f}", "" if _used(device) else "dim")
        facts.append(f"  others {device.foreign_bytes / GIB:>4.0f}", "yellow" if device.foreign_bytes else "dim")
        facts.append("" if device.temperature_celsius is None else f"  {device.temperature_celsius:>3.0f} °C")
        facts.append("" if device.power_watts is None else f" {device.power_watts:>5.0f} W")
    return facts


def _node_line(worker: WorkerView, width: int) -> Text:
    """A node in one line: its devices together."""
    sizes = _bytes(worker.devices)
    devices = f"{len(worker.devices)} × {short_model(worker.devices[0].model)[:8]}" if worker.devices else "no devices"
    line = Text.assemble((f"{one_line(worker.node, 14):<15}", "bold"))
    facts = Text(f"{sizes.leased / GIB:>5,.0f} of {sizes.usable / GIB:>5,.0f} GiB{worker.tasks_running:>4} run ")
    facts.append_text(_state(worker))
    if any(not device.healthy for device in worker.devices):
        facts.append(" unhealthy", "bold red")
    line.append(f"{devices:<13}")
    line.append_text(_bar(sizes, _bar_width(width - len(line) - max(33, len(facts)) - 1)))
    line.append(" ")
    line.append_text(facts)
    return line


def _bar_width(room: int) -> int:
    return max(BAR_MIN, min(BAR_MAX, room))


def _bar(sizes: Bytes, width: int) -> Text:
    usable = max(1, sizes.usable)
    within = min(sizes.used, sizes.leased)
    parts = (
        (within / usable, USED),
        ((sizes.leased - within) / usable, LEASED),
        (max(0, sizes.used - sizes.leased) / usable, OVER),
        (sizes.foreign / usable, FOREIGN),
    )
    return Text.assemble(*((text, _STYLES[character]) for character, text in bar(parts, width)))


# --- below ----------------------------------------------------------------------------------------------------------


def _keys(look: Look, width: int) -> Text:
    line = Text("q quit  p pause  ", "dim")
    line.append("s ", "dim").append(f"sort: {look.sort.value}", "").append("  ↑↓ scroll", "dim")
    legend = ((USED, "used"), (LEASED, "leased"), (FOREIGN, "others"), (OVER, "over its lease"), (FREE, "free"))
    line.append(" ")
    for character, name in legend:
        if len(line) + len(name) + 4 <= width:
            line.append(f"  {character}", _STYLES[character]).append(f" {name}", "dim")
    line.rstrip()
    return line
