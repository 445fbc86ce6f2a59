"""The node's devices as last seen: what there is, what each slot uses of it, and who takes more than its lease.

It looks through the prober only, and attributes memory to slots by process session.
"""

import asyncio
import os
import time

from manager.core.devices import Device, Probe, Reading
from manager.core.model import DeviceUse, MemoryNote
from manager.core.shapes import memory_class_within
from manager.log import get_logger
from manager.metrics import SLOTS
from plugins.node.attribution import attribute
from plugins.node.device_metrics import DeviceMetrics
from plugins.node.devices.probe import Prober
from plugins.node.lease_watch import LeaseWatch, SlotUse
from plugins.node.runner import SlotRunner
from plugins.node.slot_table import SlotTable

log = get_logger("rocyard.agent")


class DeviceWatch:
    """Looks at the devices every `period_s`.

    Attributes:
        devices: the inventory; empty until `first_look`.
        uses: at the last look, which was made at `read_s` on the monotonic clock.
    """

    def __init__(self, node: str, prober: Prober, period_s: float) -> None:
        self.prober = prober
        self.period_s = period_s
        self.devices: tuple[Device, ...] = ()
        self.uses: tuple[DeviceUse, ...] = ()
        self.read_s = time.monotonic()
        self._pools: dict[str, str] = {}
        self._leases = LeaseWatch()
        self._metrics = DeviceMetrics(node)

    async def first_look(self, slots: SlotTable) -> None:
        """Wait for a look that tells which devices there are: a node must not register without them."""
        while True:
            probe = await self.prober.probe()
            if probe.complete or probe.devices:
                self._take(probe, slots)
                return
            tell = log.info if self.prober.starting else log.error  # a driver may take its time
            tell("devices_unknown", error=probe.error)
            await asyncio.sleep(self.period_s)

    async def look(self, slots: SlotTable) -> bool:
        """Wait for one period and look; whether there are devices that were not there before."""
        await asyncio.sleep(self.period_s)
        self.read_s = time.monotonic()
        known = {device.uuid for device in self.devices}
        self._take(await self.prober.probe(), slots)
        return bool({device.uuid for device in self.devices} - known)

    def _take(self, probe: Probe, slots: SlotTable) -> None:
        self.devices = probe.devices or self.devices
        sessions = {runner.session: runner.slot_id for runner in slots.live.values()}
        self._pools = {device.uuid: device.pool_key for device in self.devices}
        readings: dict[str, list[Reading]] = {}
        for device, reading in zip(probe.devices, probe.readings, strict=True):
            readings.setdefault(device.pool_key, []).append(reading)
        leases: dict[str, dict[str, int]] = {pool: {} for pool in self._pools.values()}
        for runner in slots.live.values():
            for uuid in runner.grant.devices:
                leased = leases.setdefault(self._pools.get(uuid, uuid), {})
                leased[runner.slot_id] = leased.get(runner.slot_id, 0) + runner.grant.memory_bytes
        self.uses = tuple(
            use
            for pool, those in readings.items()
            for use in attribute(those, lambda pid: sessions.get(_session(pid)), leases[pool])
        )
        self._metrics.show(self.devices, self.uses, leases)
        SLOTS.labels(status="live").set(len(slots.live))
        for note in self._leases.look(self._slot_uses(slots)):
            if (above := slots.live.get(note.slot_id)) is not None:
                above.exceeded(note)

    def _slot_uses(self, slots: SlotTable) -> dict[str, SlotUse]:
        """What each slot uses of one of its devices, by that on which it uses most."""
        totals = {device.pool_key: device.memory_bytes for device in self.devices}
        found: dict[str, SlotUse] = {}
        for use in {self._pools[use.uuid]: use for use in self.uses}.values():
            pool = self._pools[use.uuid]
            for slot_id, used_bytes in use.slots.items():
                runner = slots.live.get(slot_id)
                if runner is None:
                    continue
                devices = max(1, sum(self._pools.get(uuid) == pool for uuid in runner.grant.devices))
                each_bytes = -(-used_bytes // devices)
                if slot_id not in found or each_bytes > found[slot_id].used_bytes:
                    most_bytes = memory_class_within((totals[pool] - slots.reserve_bytes) // devices)
                    found[slot_id] = SlotUse(each_bytes, runner.grant.memory_bytes, runner.asked_bytes, most_bytes)
        return found

    def notes(self, slots: SlotTable) -> list[MemoryNote]:
        """What the store is to know of the memory that slots of shapes use."""
        return [note for note in self._leases.notes(time.monotonic()) if isinstance(slots.live.get(note.slot_id), SlotRunner)]

    def noted(self, notes: list[MemoryNote]) -> None:
        """The store knows these."""
        self._leases.noted(notes, time.monotonic())


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1
