"""Whose memory is it: from a pool's readings and the slots' sessions to what each slot uses. Pure."""

from collections.abc import Callable, Mapping, Sequence

from manager.core.devices import Reading
from manager.core.model import DeviceUse


def attribute(
    readings: Sequence[Reading], slot_of: Callable[[int], str | None], leases: Mapping[str, int]
) -> tuple[DeviceUse, ...]:
    """What each slot uses of the memory of one device, or of several that share it; everything else is foreign.

    Args:
        readings: of each device of the pool; all of them read the same memory.
        slot_of: pid → slot id, None for a process that is no slot's.
        leases: bytes leased in this pool by slot id.

    Returns:
        One for each reading, in order; their memory is the pool's.
    """
    trusted = [reading for reading in readings if reading.healthy] or readings
    used_bytes = max(reading.used_bytes for reading in trusted)
    slots: dict[str, int] = {}
    foreign = 0
    if all(reading.processes_known for reading in trusted):
        # Each device may tell of a process that uses the pool, so what several tell of one process is not added up. Where
        # each told its part only, the rest counts as foreign: too little may be promised then, and never too much.
        held: dict[int, int] = {}
        for reading in trusted:
            for process in reading.processes:
                held[process.pid] = max(held.get(process.pid, 0), process.memory_bytes)
        for pid, memory_bytes in held.items():
            slot = slot_of(pid)
            if slot is None:
                foreign += memory_bytes
            else:
                slots[slot] = slots.get(slot, 0) + memory_bytes
        # What no process is charged with (a driver's own tables) is nobody's slot either.
        foreign = max(foreign, used_bytes - sum(slots.values()))
    else:
        foreign = max(0, used_bytes - sum(leases.values()))
    return tuple(
        DeviceUse(
            uuid=reading.uuid,
            used_bytes=used_bytes if reading.healthy else reading.used_bytes,
            foreign_bytes=max(0, foreign),
            slots=slots,
            utilisation_ratio=reading.utilisation_ratio,
            temperature_celsius=reading.temperature_celsius,
            power_watts=reading.power_watts,
            healthy=reading.healthy,
            problem=reading.problem,
        )
        for reading in readings
    )
