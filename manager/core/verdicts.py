"""What every node says to a request, in words: whether it fits there, and if not, why and by how much. Pure.

It decides nothing: it asks `placement` what it would say, so that what people read cannot differ from what happens. Nodes that
say the same are told together, so that a thousand of them are a few lines.
"""

from collections.abc import Iterable, Mapping
from typing import Final, assert_never

import msgspec

from manager.core.index import DeviceView, Index, NodeView
from manager.core.lifecycle import Cordon
from manager.core.model import NodeRow
from manager.core.placement import NEVER, Reason, devices_for, verdict
from manager.core.quantities import format_duration, format_memory
from manager.core.shapes import Resources, memory_class_within

FITS: Final = "Fits"
SILENT: Final = "NodeUnreachable"
DRAINING: Final = "WorkersDraining"
VERDICTS: Final = (FITS, SILENT, DRAINING, *Reason)
"""All that a verdict may be."""
NAMES_SHOWN: Final = 3
"""Nodes that are named where many say the same."""

# In the order of hope: the first of these that any node says is what a request waits for.
BY_HOPE: Final[tuple[Reason, ...]] = (
    Reason.INSUFFICIENT_MEMORY,
    Reason.FOREIGN_MEMORY,
    Reason.RESERVED_FOR_LARGER,
    Reason.INSUFFICIENT_SHARE,
    Reason.DEVICE_IN_USE,
    Reason.INSUFFICIENT_CPU,
    Reason.INSUFFICIENT_HOST_MEMORY,
    Reason.TOO_MANY_SLOTS,
    Reason.NO_WORKER,
    Reason.NODE_LOST,
    Reason.CORDONED,
    Reason.UNHEALTHY_DEVICE,
    # Those that waiting does not change: the earlier, the less is wrong with the node.
    Reason.EXCEEDS_HOST,
    Reason.EXCEEDS_LARGEST_DEVICE,
    Reason.NO_MATCHING_ARCHITECTURE,
    Reason.NO_MATCHING_DEVICE,
    Reason.NO_MATCHING_LABELS,
    Reason.TOO_FEW_DEVICES,
)
assert set(BY_HOPE) == set(Reason)
assert set(BY_HOPE[-len(NEVER) :]) == NEVER
_HOPE: Final = {reason: rank for rank, reason in enumerate(BY_HOPE)}
_BY_MEMORY: Final = frozenset({Reason.INSUFFICIENT_MEMORY, Reason.FOREIGN_MEMORY, Reason.RESERVED_FOR_LARGER})
"""Told apart by how much is missing, not by hope: the nearest of them is what a person wants to see first."""


class WorkerVerdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one node says to a request.

    Attributes:
        verdict: ``Fits``, or a reason such as InsufficientMemory.
        short_by_bytes: memory that is missing on each device; 0 where memory is not the matter.
        detail: the same in words.
        device: the device that is nearest to fitting, where processes that are none of ours are in the way.
        foreign_bytes: what these use there.
    """

    node: str
    verdict: str
    short_by_bytes: int
    detail: str
    device: str = ""
    foreign_bytes: int = 0


class VerdictClass(msgspec.Struct, frozen=True):
    """Nodes that say the same.

    Attributes:
        verdict: as in `WorkerVerdict`.
        count: how many nodes.
        nodes: the first of them.
        short_by_bytes: what is missing on the nearest of them.
        detail: what the nearest says.
    """

    verdict: str
    count: int
    nodes: tuple[str, ...]
    short_by_bytes: int
    detail: str


def verdicts_of(
    resources: Resources,
    index: Index,
    rows: Mapping[str, NodeRow],
    now_ms: int,
    silent: frozenset[str] = frozenset(),
) -> tuple[WorkerVerdict, ...]:
    """What every node says; what fits first, then by what is missing, then by hope, then by name.

    Args:
        resources: what is asked for.
        index: the ledger; not changed.
        rows: the nodes as the store has them, by name.
        now_ms: the store's time.
        silent: nodes that have not beaten for a lease, as the observer's own clock has it.
    """
    ranked = [_ranked(resources, view, rows.get(name), now_ms, silent) for name, view in index.nodes.items()]
    ranked.sort(key=lambda item: item[0])
    return tuple(found for _, found in ranked)


def classes_of(verdicts: Iterable[WorkerVerdict]) -> tuple[VerdictClass, ...]:
    """Nodes that say the same, together; in the order of the first of each."""
    groups: dict[str, list[WorkerVerdict]] = {}
    for found in verdicts:
        groups.setdefault(found.verdict, []).append(found)
    return tuple(
        VerdictClass(
            verdict,
            len(same),
            tuple(each.node for each in same[:NAMES_SHOWN]),
            same[0].short_by_bytes,
            same[0].detail,
        )
        for verdict, same in groups.items()
    )


def could_ever(found: WorkerVerdict) -> bool:
    """Whether waiting may change what the node says."""
    return found.verdict not in NEVER


def _ranked(
    resources: Resources, view: NodeView, row: NodeRow | None, now_ms: int, silent: frozenset[str]
) -> tuple[tuple[int, int, int, str], WorkerVerdict]:
    if view.name in silent and not view.lost:
        detail = "its agent has been silent for a lease; nothing is placed there until it speaks again"
        return (2, _HOPE[Reason.NO_WORKER], 0, view.name), WorkerVerdict(view.name, SILENT, 0, detail)
    if devices_for(resources, view) is not None:
        return (0, 0, 0, view.name), WorkerVerdict(view.name, FITS, 0, "it fits there now")
    said = verdict(resources, view)
    if said.reason in _BY_MEMORY:
        rank = (1, 0, said.short_bytes, view.name)
    elif said.reason in NEVER:
        short = resources.gpus - len(view.devices) if said.reason is Reason.TOO_FEW_DEVICES else said.short_bytes
        rank = (3, _HOPE[said.reason], short, view.name)
    else:
        rank = (2, _HOPE[said.reason], 0, view.name)
    if said.reason is Reason.FOREIGN_MEMORY:
        return rank, _foreign(resources, view, row, said.short_bytes)
    if said.reason is Reason.CORDONED and row is not None and row.cordon is not Cordon.NONE:
        word = DRAINING if row.cordon is Cordon.DRAIN else said.reason.value
        return rank, WorkerVerdict(view.name, word, 0, _cordon(row, now_ms))
    detail = _detail(said.reason, said.short_bytes, resources, view)
    return rank, WorkerVerdict(view.name, said.reason.value, said.short_bytes, detail)


def _foreign(resources: Resources, view: NodeView, row: NodeRow | None, short_bytes: int) -> WorkerVerdict:
    """Of the devices on which strangers are in the way, the one that is nearest to fitting, by its number."""
    able = [d for d in view.devices.values() if d.pool.foreign_bytes > 0 and d.kind.matches(resources) and d.pool.healthy]
    device = max(able, key=lambda d: (d.pool.free_bytes < resources.memory_bytes, d.pool.free_bytes, d.uuid))
    foreign_bytes = device.pool.foreign_bytes
    name = f"{view.name}/{_number(device, row)}"
    detail = f"{format_memory(short_bytes)} short: processes that are none of ours use {format_memory(foreign_bytes)} on {name}"
    return WorkerVerdict(view.name, Reason.FOREIGN_MEMORY.value, short_bytes, detail, name, foreign_bytes)


def _number(device: DeviceView, row: NodeRow | None) -> str:
    """``gpu-1``: the device as people know it."""
    devices = () if row is None else row.info.devices
    return next((f"gpu-{each.index}" for each in devices if each.uuid == device.uuid), device.uuid)


def _cordon(row: NodeRow, now_ms: int) -> str:
    """Who said that nothing new may come, and what happens to what is there."""
    who = f"by {row.cordon_by}" if row.cordon_by else "by nobody who is known"
    if row.cordon_ms is not None:
        who += f", {format_duration(max(0, now_ms - row.cordon_ms) / 1000)} ago"
    if row.cordon is not Cordon.DRAIN:
        return f"it takes no new slots (cordoned {who})"
    if row.deadline_ms is None:
        return f"it is being emptied ({who}); what runs there may run to its end"
    if row.deadline_ms <= now_ms:
        return f"it is being emptied ({who}); its deadline has passed"
    left = format_duration((row.deadline_ms - now_ms) / 1000)
    return f"it is being emptied ({who}); what still runs in {left} goes back to the queue"


def _detail(reason: Reason, short_bytes: int, resources: Resources, view: NodeView) -> str:
    short = format_memory(short_bytes)
    match reason:
        case Reason.INSUFFICIENT_MEMORY:
            return f"{short} short: the rest is leased to other slots"
        case Reason.FOREIGN_MEMORY:
            return f"{short} short: processes that are none of ours use it"
        case Reason.TOO_MANY_SLOTS:
            return f"it has all the slots that it may have, {len(view.slots)} (node.slots_max)"
        case Reason.EXCEEDS_LARGEST_DEVICE:
            return _too_large(short, resources, view)
        case Reason.RESERVED_FOR_LARGER:
            return f"{short} short: room is kept for what has waited longer"
        case Reason.INSUFFICIENT_SHARE:
            return f"less than {resources.share_milli / 10:g} % of the compute of its devices is free"
        case Reason.DEVICE_IN_USE:
            return (
                "it would have to be alone on the device" if resources.exclusive else "another slot has the device for itself"
            )
        case Reason.INSUFFICIENT_CPU:
            return f"{view.cpu_free_milli / 1000:g} of its CPUs are free, {resources.cpu_milli / 1000:g} are asked for"
        case Reason.INSUFFICIENT_HOST_MEMORY:
            free, asked = format_memory(view.host_free_bytes), format_memory(resources.host_memory_bytes)
            return f"{free} of the host's memory is free, {asked} is asked for"
        case Reason.EXCEEDS_HOST:
            return "its host has fewer CPUs or less memory than that"
        case Reason.NO_MATCHING_ARCHITECTURE:
            return f"too few of its devices are {' or '.join(resources.architectures)}; they are {_architectures(view)}"
        case Reason.NO_MATCHING_DEVICE:
            return f"too few of its devices are called {resources.device_model!r}; they are {_models(view)}"
        case Reason.NO_MATCHING_LABELS:
            return f"it has not the labels {', '.join(f'{name}={value}' for name, value in resources.labels)}"
        case Reason.TOO_FEW_DEVICES:
            return f"it has {len(view.devices)} of the {resources.gpus} devices"
        case Reason.UNHEALTHY_DEVICE:
            return "too few of its devices are healthy"
        case Reason.CORDONED:
            return "it takes no new slots (cordoned)"
        case Reason.NO_WORKER:
            return "its Dask worker does not report (yet)"
        case Reason.NODE_LOST:
            return "it was declared lost; it is used again when its agent has registered anew"
        case _:
            assert_never(reason)


def _too_large(short: str, resources: Resources, view: NodeView) -> str:
    """What the node could hold at most, as leases."""
    most = most_words(usable_bytes(resources, view))
    if resources.gpus > 1:
        return f"{resources.gpus} of its devices at once each hold {most}"
    such = "such " if resources.architectures or resources.device_model else ""
    return f"{short} more than it could ever hold; its largest {such}device holds {most}"


def usable_bytes(resources: Resources, view: NodeView) -> int:
    """What each of so many devices that match could be promised at most, if the node were empty; it has so many."""
    taken: dict[str, int] = {}
    sizes: list[int] = []
    for device in view.devices.values():
        if device.kind.matches(resources):
            key = device.pool.key
            taken[key] = taken.get(key, 0) + 1
            sizes.append(device.pool.usable_bytes // taken[key])
    return sorted(sizes, reverse=True)[resources.gpus - 1]


def most_words(memory_bytes: int) -> str:
    """``191.5 GiB, in leases of at most 191 GiB``: the second where the first is not a size that leases have."""
    lease_bytes = memory_class_within(memory_bytes)
    words = format_memory(memory_bytes)
    return words if lease_bytes == memory_bytes else f"{words}, in leases of at most {format_memory(lease_bytes)}"


def _architectures(view: NodeView) -> str:
    return ", ".join(sorted({device.kind.architecture or "of no known architecture" for device in view.devices.values()}))


def _models(view: NodeView) -> str:
    return ", ".join(sorted({device.kind.model or "without a name" for device in view.devices.values()}))


def names_of(nodes: Iterable[str]) -> str:
    """``a, b, c and 4 more``."""
    names = sorted(set(nodes))
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
