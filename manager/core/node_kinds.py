"""What nodes are when they are empty: of what kinds those are that there are or could be added, and what these could hold.

A request that none of them could ever hold is known here before it waits for nothing. What is free now is
`manager.core.index`'s.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from manager.core.devices import MODELS, Device, Model, partitioning_asked
from manager.core.index import SLOTS_MAX, NodeView
from manager.core.model import NodeInfo
from manager.core.placement import NEVER, Reason, devices_for, verdict
from manager.core.quantities import format_memory, parse_memory
from manager.core.shapes import GPUS_MAX, Labels, Resources
from manager.core.table import DeviceKind
from manager.core.verdicts import BY_HOPE, most_words, usable_bytes
from manager.core.wanted import text_of

REFUSALS_MAX: Final = 4096
"""Answers that are remembered: as many as shapes that are alive at once."""
NAMED_MAX: Final = 8
"""Kinds of devices that a refusal lists."""
_KIND: Final = re.compile(r"([0-9]{1,4}):([a-z0-9. ]{1,30})(?:/([a-z0-9]{1,8})-([a-z0-9]{1,8}))?")


class NodeDevice(msgspec.Struct, frozen=True):
    """One device of a kind of node. Those with the same `pool` share its memory."""

    memory_bytes: int
    pool: int
    architecture: str = ""
    model: str = ""


class NodeKind(msgspec.Struct, frozen=True):
    """What an empty node offers. Its devices' memory is what can be promised; of the host, 0 is not known."""

    devices: tuple[NodeDevice, ...]
    slots_max: int = SLOTS_MAX
    labels: Labels = ()
    cpus: int = 0
    host_memory_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What all its memory could promise."""
        return sum({device.pool: device.memory_bytes for device in self.devices}.values())


def node_kind(
    text: str,
    reserve_bytes: int = 0,
    memory_ratio_max: float = 1.0,
    slots_max: int = SLOTS_MAX,
    labels: Labels = (),
) -> NodeKind:
    """What one node of a group is, from ``COUNT:MODEL``, ``COUNT:MODEL/CPX-NPS4`` where each of them is split into devices, or
    ``COUNT:SIZE`` whose devices nobody can select.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    match = _KIND.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not the devices of a node: write COUNT:MODEL such as '8:mi300x', or '8:192GiB'")
    count, name = int(match[1]), match[2].strip()
    model = MODELS.get(name)
    try:
        whole = Model("", "", parse_memory(name), 0.0) if model is None else model
    except ValueError:
        raise ValueError(f"{name!r} is neither a size such as '192GiB' nor one of the models {', '.join(MODELS)}") from None
    split = partitioning_asked(name, whole, match[3], match[4])
    if not 1 <= count * split.devices <= GPUS_MAX:
        raise ValueError(f"{text[:40]!r}: a node has from 1 to {GPUS_MAX} devices")
    total = whole.memory_bytes // split.memory_parts
    reserve = max(reserve_bytes, total - int(total * memory_ratio_max))
    usable = max(0, total - reserve)
    devices = tuple(
        NodeDevice(usable, package * split.memory_parts + split.part_of(number), whole.architecture, whole.model)
        for package in range(count)
        for number in range(split.devices)
    )
    return NodeKind(devices, slots_max, labels)


def kind_of(info: NodeInfo) -> NodeKind:
    """What a node that has registered is."""
    pools: dict[str, tuple[int, int]] = {}
    for device in info.devices:  # as the ledger has it, a pool's memory is what its first device says
        pools.setdefault(device.pool_key, (max(0, device.memory_bytes - info.reserve_bytes), len(pools)))
    devices = tuple(NodeDevice(*pools[device.pool_key], device.architecture, device.model) for device in info.devices)
    return NodeKind(devices, info.slots_max, info.labels, info.cpus, info.host_memory_bytes)


def empty_node(name: str, kind: NodeKind) -> NodeView:
    """A node of this kind, with nothing on it."""
    devices = [
        Device(
            uuid=str(index),
            index=index,
            vendor="simulated",
            model=device.model,
            architecture=device.architecture,
            memory_bytes=device.memory_bytes,
            visible_id="",
            pool=f"pool {device.pool}",
        )
        for index, device in enumerate(kind.devices)
    ]
    return NodeView(
        name,
        "",
        devices,
        0,
        kind.slots_max,
        cpu_milli=kind.cpus * 1000,
        host_memory_bytes=kind.host_memory_bytes,
        labels=kind.labels,
    )


class Refusal(msgspec.Struct, frozen=True):
    """Why no node could ever hold a request.

    Attributes:
        reason: what is wrong with the nearest node.
        node: which that is; of a group, ``a node of group NAME``.
        field: what of the request would have to be another.
        detail: what is wrong with it, and what there is.
        usable_bytes: what the node could promise on each of so many devices; 0 where memory is not the matter.
    """

    reason: Reason
    node: str
    field: str
    detail: str
    usable_bytes: int = 0


class Capacity:
    """What all nodes that are known, or could be added, could hold were they empty.

    Args:
        kinds: each with the name of a node of that kind.
    """

    def __init__(self, kinds: Mapping[NodeKind, str]) -> None:
        self._nodes = [empty_node(name, kind) for kind, name in kinds.items()]
        self._known: dict[Resources, Refusal | None] = {}

    @classmethod
    def of(cls, nodes: Iterable[tuple[str, NodeInfo]], groups: Iterable[tuple[str, NodeKind]]) -> "Capacity":
        """That of nodes that have registered, by name, and of groups that nodes can be added to.

        What a node of a group turned out to be counts more than the settings, which may promise more than it has.
        """
        kinds: dict[NodeKind, str] = {}
        seen: set[str] = set()
        for name, info in nodes:
            kinds.setdefault(kind_of(info), name)
            if info.devices:
                seen.add(info.group)
        for name, kind in groups:
            if name not in seen:
                kinds.setdefault(kind, f"a node of group {name}")
        return cls(kinds)

    @property
    def is_known(self) -> bool:
        """Whether there is any node; with none, nothing can be said."""
        return bool(self._nodes)

    def refusal(self, resources: Resources) -> Refusal | None:
        """Why nothing could ever hold the request; None where something could, and where no node is known."""
        try:
            return self._known[resources]
        except KeyError:
            pass
        if len(self._known) >= REFUSALS_MAX:
            self._known.clear()
        found = self._known[resources] = self._refusal(resources)
        return found

    def _refusal(self, resources: Resources) -> Refusal | None:
        nearest: tuple[int, int, str] | None = None
        found: tuple[Reason, NodeView] | None = None
        for view in self._nodes:
            if devices_for(resources, view) is not None:
                return None
            said = verdict(resources, view)
            if said.reason not in NEVER:
                return None
            short = said.short_bytes
            if said.reason is Reason.EXCEEDS_HOST:
                short = max(resources.cpu_milli - view.cpu_milli, resources.host_memory_bytes - view.host_memory_bytes)
            rank = (BY_HOPE.index(said.reason), short, view.name)
            if nearest is None or rank < nearest:
                nearest, found = rank, (said.reason, view)
        return None if found is None else _refused(resources, *found, self._nodes)


def _refused(resources: Resources, reason: Reason, view: NodeView, nodes: list[NodeView]) -> Refusal:
    """The refusal in words; `view` is the nearest node."""
    gpus = resources.gpus
    no_device = "no device" if gpus == 1 else f"no node has {gpus} devices that"
    verb = "is" if gpus == 1 else "are"
    kinds = [device.kind for node in nodes for device in node.devices.values()]
    most_bytes = 0
    match reason:
        case Reason.TOO_FEW_DEVICES:
            field, most = "gpus", max(len(node.devices) for node in nodes)
            detail = f"{gpus} devices on one node are asked for; no node has more than {most}."
        case Reason.NO_MATCHING_LABELS:
            field, there = "labels", _listed(text_of(node.labels) for node in nodes)
            detail = f"no node has {text_of(resources.labels)}. Labels of nodes: {there}."
        case Reason.NO_MATCHING_DEVICE:
            field, there = "device_model", _listed(kind.model for kind in kinds)
            called = " or ".join(repr(name) for name in resources.device_model.split("|"))
            detail = f"{no_device} {verb} called {called}{_besides(resources.labels)}. There is: {there}."
        case Reason.NO_MATCHING_ARCHITECTURE:
            field, there = "architecture", _listed(_architecture(kind) for kind in kinds)
            others = _besides(resources.device_model, resources.labels)
            detail = f"{no_device} {verb} {' or '.join(resources.architectures)}{others}. There is: {there}."
        case Reason.EXCEEDS_HOST if view.cpu_milli < resources.cpu_milli:
            field = "cpus"
            detail = f"more than any host has that could hold the rest. The nearest, {view.name}, has {view.cpu_milli // 1000}."
        case Reason.EXCEEDS_HOST:
            field, has = "host_memory", format_memory(view.host_memory_bytes)
            detail = f"more than any host has that could hold the rest. The nearest, {view.name}, has {has}."
        case _:
            field, most_bytes = "memory", usable_bytes(resources, view)
            such = " such" if _besides(resources.architectures, resources.device_model, resources.labels) else ""
            largest = "The largest device" if gpus == 1 else f"On {gpus} devices at once, the largest"
            model = next(device.kind.model for device in view.devices.values() if device.kind.matches(resources))
            detail = (
                f"more than any{such} device here could ever hold. {largest}, {model or 'one'} on {view.name}, "
                f"can {'each ' if gpus > 1 else ''}hold {most_words(most_bytes)}."
            )
    return Refusal(reason, view.name, field, detail, most_bytes)


def _besides(*selectors: object) -> str:
    return " and all else that was named" if any(selectors) else ""


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(names) - {""})
    rest = f" and {len(found) - NAMED_MAX} more" if len(found) > NAMED_MAX else ""
    return ", ".join(found[:NAMED_MAX]) + rest if found else "none"


def _architecture(kind: DeviceKind) -> str:
    return f"{kind.architecture} ({kind.model})" if kind.model else kind.architecture
