"""Devices as values: what a device is, what it reads, what one look at a node's devices gave; and simulated fleets.

Owns the checks that keep a wrong number of a driver out of the system. A figure that cannot be true is dropped, and the
reading says why; a reading whose memory cannot be trusted is unhealthy, and nothing may be placed by it. Must not ask a
driver, the clock or the file system: `plugins.node.devices` does.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from manager.core.quantities import GIB, MEMORY_BYTES_MAX
from manager.core.shapes import GPUS_MAX

SourceKind = Literal["amd", "nvidia", "simulated"]
DeviceKind = Literal["auto", "amd", "nvidia", "simulated"]

CARRIED_S_MAX: Final = 30.0
"""How long a last good reading stands in for one that did not come: ten default beats, so that one slow driver call
costs no placement, while a driver that stays silent does."""
NAMELESS: Final = "BDF-"
"""Begins the uuid of a device that does not tell one; its PCI address follows."""
TEMPERATURE_CELSIUS: Final = (-50.0, 200.0)
POWER_WATTS_MAX: Final = 10_000.0
"""Above any device there is; a driver that answers in milli- or microwatts is over it."""
NODES_MAX: Final = 256
"""Simulated nodes of one fleet: each is an agent with processes of its own, so more is a typing error."""
_PID_MAX: Final = 2**22
_UNKNOWN: Final = frozenset({0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})
"""What drivers answer for "not known". No device holds memory in odd bytes, so none of these is a true size either."""


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """One device that tasks can be given, as the driver describes it.

    Attributes:
        uuid: names the device; unique on its node and stable over restarts. The ledger's key, with the node.
        index: position in the driver's order, for people. It may change when another device goes away.
        vendor: who makes it, or "simulated".
        model: for people, such as "AMD Instinct MI300X".
        architecture: what code is compiled for, such as "gfx942" or "sm_90"; empty if unknown.
        memory_bytes: device memory in all; 0 if the driver did not say, and then nothing fits on it.
        visible_id: what the vendor's visibility variable takes to name this device.
        bdf: PCI address, such as "0000:05:00.0"; empty if unknown.
        partition: which part of a physical device this is, such as "DPX/NPS2/1" or "mig"; empty for a whole one.
        pool: names the memory that it shares with other devices of its node, such as the quadrant of a MI300X in
            CPX/NPS4; `memory_bytes` is then of all of that memory. Empty: the memory is its own.
    """

    uuid: str
    index: int
    vendor: Literal["amd", "nvidia", "simulated"]
    model: str
    architecture: str
    memory_bytes: int
    visible_id: str
    bdf: str = ""
    partition: str = ""
    pool: str = ""

    @property
    def pool_key(self) -> str:
        """Names the device's memory on its node."""
        return self.pool or self.uuid


class ProcessUse(msgspec.Struct, frozen=True, array_like=True):
    """Memory that one process holds on one device."""

    pid: int
    memory_bytes: int


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one device read at one moment.

    Attributes:
        uuid: of the `Device`.
        used_bytes: memory in use, from 0 to the device's total. If it could not be read, the total: a reader that
            overlooks `healthy` then finds no room, rather than room that is not there.
        healthy: whether the device answers and `used_bytes` was measured.
        problem: what was wrong, for people; may be set on a healthy reading of which a lesser figure was dropped.
        utilisation_ratio: share of time that the device computes, 0 to 1; None if not known.
        temperature_celsius, power_watts: None if not known.
        processes: who holds memory, by process id; at most one entry for each.
        processes_known: whether `processes` is all of them, with ids as this machine has them. If not, what is in use
            cannot be attributed.
    """

    uuid: str
    used_bytes: int
    healthy: bool
    problem: str = ""
    utilisation_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    processes: tuple[ProcessUse, ...] = ()
    processes_known: bool = False


class Probe(msgspec.Struct, frozen=True):
    """One look at all devices of a node.

    Attributes:
        devices: all that were ever seen by this prober.
        readings: one for each of `devices`, in the same order.
        error: why the look is not complete; empty if it is.
        complete: whether the driver answered now. If not, readings are of earlier, and nothing may be concluded from
            what is missing.
    """

    devices: tuple[Device, ...]
    readings: tuple[Reading, ...]
    error: str
    complete: bool


class RawReading(msgspec.Struct, frozen=True):
    """What a driver said of one device, unchecked: any field may hold anything.

    None, and text such as "N/A", mean that the driver does not tell: no problem, except for `used_bytes`.

    Attributes:
        used_bytes: bytes.
        utilisation_percent: 0 to 100.
        temperature_celsius, power_watts: in these units.
        processes: (process id, bytes), several entries for one process add up; None if the driver does not tell.
        error: why the device cannot be used, if that is so.
    """

    used_bytes: object = None
    utilisation_percent: object = None
    temperature_celsius: object = None
    power_watts: object = None
    processes: tuple[tuple[object, object], ...] | None = None
    error: str = ""


def number_within(value: object, low: float, high: float) -> float | None:
    """`value` if it is a number from `low` to `high` and none of those that drivers use for "not known"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or value in _UNKNOWN or not low <= value <= high:
        return None
    return value


def memory_total(value: object) -> int:
    """A device's total memory in bytes if `value` can be one, else 0."""
    return int(number_within(value, 1, MEMORY_BYTES_MAX) or 0)


def reading_of(device: Device, raw: RawReading) -> Reading:
    """The reading that can be believed of what a driver said about `device`."""
    problems = [raw.error] if raw.error else []
    figures: list[float | None] = []
    for name, value, low, high in (
        ("utilisation", raw.utilisation_percent, 0.0, 100.0),
        ("temperature", raw.temperature_celsius, *TEMPERATURE_CELSIUS),
        ("power", raw.power_watts, 0.0, POWER_WATTS_MAX),
    ):
        figure = number_within(value, low, high)
        if figure is None and isinstance(value, int | float) and value not in _UNKNOWN:
            problems.append(f"{name} of {value} is out of range")
        figures.append(figure)
    percent, temperature, power = figures
    processes = _processes_of(raw.processes or (), device.memory_bytes)
    used = number_within(raw.used_bytes, 0, device.memory_bytes)
    if device.memory_bytes <= 0:
        problems.append("the driver does not tell the total memory")
    elif used is None and not raw.error:
        problems.append(f"memory in use of {raw.used_bytes} cannot be true: the device has {device.memory_bytes} bytes")
    healthy = used is not None and device.memory_bytes > 0 and not raw.error
    return Reading(
        uuid=device.uuid,
        used_bytes=int(used) if used is not None and healthy else device.memory_bytes,
        healthy=healthy,
        problem="; ".join(problems),
        utilisation_ratio=None if percent is None else percent / 100,
        temperature_celsius=temperature,
        power_watts=power,
        processes=processes or (),
        processes_known=healthy and raw.processes is not None and processes is not None,
    )


def _processes_of(raw: Iterable[tuple[object, object]], total_bytes: int) -> tuple[ProcessUse, ...] | None:
    """One entry for each process, by process id; None if any entry cannot be true."""
    held: dict[int, int] = {}
    for pid, size in raw:
        checked_pid, checked_size = number_within(pid, 1, _PID_MAX), number_within(size, 0, total_bytes)
        if checked_pid is None or checked_size is None:
            return None
        held[int(checked_pid)] = held.get(int(checked_pid), 0) + int(checked_size)
    return tuple(ProcessUse(pid, size) for pid, size in sorted(held.items()))


def unreadable(device: Device, problem: str) -> Reading:
    """A reading that says nothing but that there is none."""
    return Reading(device.uuid, device.memory_bytes, healthy=False, problem=problem)


def with_known(known: Sequence[Device], probe: Probe) -> Probe:
    """`probe` in terms of the `known` devices: an inventory does not shrink or change names while leases exist.

    A known device that is not shown is unhealthy. One that cannot tell its name or its total any more keeps those it
    had. One that had no name and has one now is entered under it, and under the old one no more.
    """
    by_uuid = {device.uuid: device for device in known}
    by_address = {device.bdf: device for device in known if device.bdf and not device.partition}
    shown = [
        _as_known(by_uuid.get(device.uuid) or by_address.get(device.bdf), device, reading)
        for device, reading in zip(probe.devices, probe.readings, strict=True)
    ]
    uuids = {device.uuid for device, _ in shown}
    addresses = {device.bdf for device, _ in shown if not device.partition}
    gone = [
        (device, unreadable(device, "the driver no longer shows this device"))
        for device in known
        if device.uuid not in uuids and not (device.uuid.startswith(NAMELESS) and device.bdf in addresses)
    ]
    entries = shown + gone
    return Probe(tuple(d for d, _ in entries), tuple(r for _, r in entries), probe.error, probe.complete)


def _as_known(old: Device | None, device: Device, reading: Reading) -> tuple[Device, Reading]:
    """`device` and its `reading`, or where it cannot tell who or how large it is, the `old` one's."""
    if old is None or old.uuid.startswith(NAMELESS):
        return device, reading
    if device.memory_bytes == 0:
        return old, unreadable(old, reading.problem)
    if device.uuid.startswith(NAMELESS):
        return old, msgspec.structs.replace(reading, uuid=old.uuid)
    return device, reading


def carried(last: Probe | None, age_s: float, error: str) -> Probe:
    """What to say when a look failed: the `last` good one while at most `CARRIED_S_MAX` old, and never as complete."""
    if last is None:
        return Probe((), (), error, complete=False)
    if age_s <= CARRIED_S_MAX:
        return Probe(last.devices, last.readings, error, complete=False)
    problem = f"no reading for {age_s:.0f} s: {error}"
    return Probe(last.devices, tuple(unreadable(device, problem) for device in last.devices), error, complete=False)


class Model(msgspec.Struct, frozen=True):
    """A device that can be simulated. Watts are of the order of the real one's, and only for show.

    Attributes:
        dies: compute dies, by which it can be split into logical devices; 1: it cannot.
    """

    model: str
    architecture: str
    memory_bytes: int
    power_watts: float
    dies: int = 1


class Partitioning(msgspec.Struct, frozen=True):
    """How one physical device is split: into so many logical devices, and its memory into so many parts.

    Fewer parts than devices: as many consecutive devices share each part as there are devices for one.
    """

    compute: str
    devices: int
    memory_parts: int

    @property
    def sharing(self) -> int:
        """How many devices share a part of the memory."""
        return max(1, self.devices // self.memory_parts)

    def part_of(self, partition_id: int) -> int:
        """The part of the memory that a logical device, counted from 0, has or shares."""
        return partition_id // self.sharing


_COMPUTE_MODES: Final[dict[str, int]] = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4}
"""Logical devices of a mode; CPX has one for each compute die."""


def partitioning_of(compute: str, memory: str, dies: int) -> Partitioning | None:
    """What modes such as CPX and NPS4 make of a device with so many compute dies; None where it cannot have them."""
    devices = dies if compute == "CPX" else _COMPUTE_MODES.get(compute, 0)
    parts = int(memory.removeprefix("NPS")) if re.fullmatch(r"NPS[1-9]", memory) else 0
    if not devices or not parts or dies % devices or devices % parts:
        return None
    return Partitioning(compute, devices, parts)


class SimulatedNode(msgspec.Struct, frozen=True):
    """One node of a simulated fleet.

    Attributes:
        number: from 0, in the order of the fleet's text.
        devices: what it has.
        power_watts: of one device at work.
    """

    number: int
    devices: tuple[Device, ...]
    power_watts: float


MODELS: Final[dict[str, Model]] = {
    "mi355x": Model("AMD Instinct MI355X", "gfx950", 288 * GIB, 1400.0, dies=8),
    "mi350x": Model("AMD Instinct MI350X", "gfx950", 288 * GIB, 1000.0, dies=8),
    "mi325x": Model("AMD Instinct MI325X", "gfx942", 256 * GIB, 1000.0, dies=8),
    "mi300x": Model("AMD Instinct MI300X", "gfx942", 192 * GIB, 750.0, dies=8),
    "mi300a": Model("AMD Instinct MI300A", "gfx942", 128 * GIB, 550.0, dies=6),
    "mi250x": Model("AMD Instinct MI250X (one GCD)", "gfx90a", 64 * GIB, 280.0),
    "mi210": Model("AMD Instinct MI210", "gfx90a", 64 * GIB, 300.0),
    "mi100": Model("AMD Instinct MI100", "gfx908", 32 * GIB, 300.0),
    "w7900": Model("AMD Radeon PRO W7900", "gfx1100", 48 * GIB, 295.0),
    "rx7900xtx": Model("AMD Radeon RX 7900 XTX", "gfx1100", 24 * GIB, 355.0),
    "h200": Model("NVIDIA H200", "sm_90", 141 * GIB, 700.0),
    "h100": Model("NVIDIA H100", "sm_90", 80 * GIB, 700.0),
    "a100": Model("NVIDIA A100", "sm_80", 80 * GIB, 400.0),
    "l40s": Model("NVIDIA L40S", "sm_89", 48 * GIB, 350.0),
}

_GROUP: Final = re.compile(r"([0-9]{1,4})x([0-9]{1,4}):([a-z0-9]{1,20})(?:/([a-z0-9]{1,8})-([a-z0-9]{1,8}))?")


def reserve_of(devices: Sequence[Device], reserve_bytes: int, memory_ratio_max: float) -> int:
    """Bytes of each device of a node that are never leased: what was set, or what the largest may not use."""
    largest = max((device.memory_bytes for device in devices), default=0)
    return max(reserve_bytes, largest - int(largest * memory_ratio_max))


def parse_fleet(text: str) -> tuple[SimulatedNode, ...]:
    """The nodes of a simulated fleet such as ``"2x2:mi300x"`` or ``"1x8:mi300x,4x1:rx7900xtx"``.

    Args:
        text: groups ``NODESxDEVICES:MODEL`` with commas between, with partitioned devices ``NODESxDEVICES:MODEL/CPX-NPS4``;
            case and blanks do not matter.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    nodes: list[SimulatedNode] = []
    for part in text.lower().replace(" ", "").split(","):
        match = _GROUP.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{part[:40]!r} is not a group of simulated nodes: write NODESxDEVICES:MODEL, "
                "such as '2x2:mi300x' for two nodes of two MI300X, with commas between groups"
            )
        count, devices, name = int(match.group(1)), int(match.group(2)), match.group(3)
        model = MODELS.get(name)
        if model is None:
            near = difflib.get_close_matches(name, MODELS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no model {name!r} can be simulated{hint} (known: {', '.join(MODELS)})")
        split = partitioning_asked(name, model, match.group(4), match.group(5))
        if not 1 <= devices * split.devices <= GPUS_MAX:
            raise ValueError(f"{part!r}: a node has from 1 to {GPUS_MAX} devices, and this makes {devices * split.devices}")
        if count < 1 or len(nodes) + count > NODES_MAX:
            raise ValueError(f"{part!r}: a fleet has from 1 to {NODES_MAX} nodes")
        nodes += [_simulated_node(number, devices, model, split) for number in range(len(nodes), len(nodes) + count)]
    return tuple(nodes)


_WHOLE: Final = Partitioning("SPX", 1, 1)


def partitioning_asked(name: str, model: Model, compute: str | None, memory: str | None) -> Partitioning:
    """What was written behind a model's name, as in ``mi300x/cpx-nps4``; None and None: nothing.

    Raises:
        ValueError: says what was wrong and what would be right.
    """
    if compute is None or memory is None:
        return _WHOLE
    split = partitioning_of(compute.upper(), memory.upper(), model.dies)
    if split is not None:
        return split
    if model.dies == 1:
        raise ValueError(f"{name!r} cannot be split into {compute}-{memory}: leave that out")
    modes = [f"{mode}-nps{parts}" for mode in ("spx", "dpx", "tpx", "qpx", "cpx") for parts in (1, 2, 4, 8)
             if partitioning_of(mode.upper(), f"NPS{parts}", model.dies) is not None]  # fmt: skip
    raise ValueError(f"{name!r} cannot be split into {compute}-{memory} (known: {', '.join(modes)})")


def _simulated_node(number: int, count: int, model: Model, split: Partitioning) -> SimulatedNode:
    devices: list[Device] = []
    for package in (f"SIM-{number:03d}-{index:02d}" for index in range(count)):
        for partition_id in range(split.devices):
            whole = split.devices == 1
            name = package if whole else f"{package}.{partition_id}"
            devices.append(
                Device(
                    uuid=name,
                    index=len(devices),
                    vendor="simulated",
                    model=f"{model.model} (simulated)",
                    architecture=model.architecture,
                    memory_bytes=model.memory_bytes // split.memory_parts,
                    visible_id=name,
                    partition="" if whole else f"{split.compute}/NPS{split.memory_parts}/{partition_id}",
                    pool=f"{package}/NPS{split.memory_parts}/{split.part_of(partition_id)}" if split.sharing > 1 else "",
                )
            )
    return SimulatedNode(number, tuple(devices), model.power_watts / split.devices)
