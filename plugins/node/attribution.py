"""Whose memory is it: from a device's reading and the slots' sessions to what each slot uses. Pure."""

from collections.abc import Callable, Mapping

from manager.core.devices import Reading
from manager.core.model import DeviceUse


def attribute(reading: Reading, slot_of: Callable[[int], str | None], leases: Mapping[str, int]) -> DeviceUse:
    """What each slot uses of one device; everything else is foreign.

    Args:
        reading: of the device.
        slot_of: pid → slot id, None for a process that is no slot's.
        leases: bytes leased on this device by slot id.
    """
    slots: dict[str, int] = {}
    foreign = 0
    if reading.processes_known:
        for process in reading.processes:
            slot = slot_of(process.pid)
            if slot is None:
                foreign += process.memory_bytes
            else:
                slots[slot] = slots.get(slot, 0) + process.memory_bytes
        # What no process is charged with (a driver's own tables) is nobody's slot either.
        foreign = max(foreign, reading.used_bytes - sum(slots.values()))
    else:
        foreign = max(0, reading.used_bytes - sum(leases.values()))
    return DeviceUse(
        uuid=reading.uuid,
        used_bytes=reading.used_bytes,
        foreign_bytes=max(0, foreign),
        slots=slots,
        utilisation_ratio=reading.utilisation_ratio,
        temperature_celsius=reading.temperature_celsius,
        power_watts=reading.power_watts,
        healthy=reading.healthy,
        problem=reading.problem,
    )
