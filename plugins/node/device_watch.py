"""The node's devices as last seen: what there is, what each slot uses of it, and who takes more than its lease.

It looks through the prober only, and attributes memory to slots by process session.
"""

import asyncio
import os
import time
from typing import Final

from manager.core.devices import Device, Probe
from manager.core.model import DeviceUse
from manager.log import get_logger
from manager.metrics import SLOTS
from plugins.node.attribution import attribute
from plugins.node.device_metrics import DeviceMetrics
from plugins.node.devices.probe import Prober
from plugins.node.slot_table import SlotTable

READINGS_ABOVE_LEASE: Final = 2
"""A slot must be seen above its lease so often in a row before it is ended."""
MEMORY_TOLERANCE_BYTES: Final = 64 * 1024 * 1024
"""What drivers account to a process beyond its own allocations differs by so much from call to call."""

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
        self._above: dict[str, int] = {}
        self._metrics = DeviceMetrics(node)

    async def first_look(self, slots: SlotTable) -> None:
        """Wait for a look that tells which devices there are: a node must not register without them."""
        while True:
            probe = await self.prober.probe()
            if probe.complete or probe.devices:
                self._take(probe, slots)
                return
            log.error("devices_unknown", error=probe.error)
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
        leases: dict[str, dict[str, int]] = {device.uuid: {} for device in self.devices}
        for runner in slots.live.values():
            for uuid in runner.grant.devices:
                leases.setdefault(uuid, {})[runner.slot_id] = runner.grant.memory_bytes
        self.uses = tuple(
            attribute(reading, lambda pid: sessions.get(_session(pid)), leases.get(reading.uuid, {}))
            for reading in probe.readings
        )
        self._metrics.show(self.devices, self.uses, leases)
        SLOTS.labels(status="live").set(len(slots.live))
        self._mind_leases(slots)

    def _mind_leases(self, slots: SlotTable) -> None:
        """End what takes more than its lease, seen twice in a row."""
        above: dict[str, int] = {}
        for use in self.uses:
            for slot_id, used_bytes in use.slots.items():
                runner = slots.live.get(slot_id)
                if runner is not None and used_bytes > runner.grant.memory_bytes + MEMORY_TOLERANCE_BYTES:
                    above[slot_id] = self._above.get(slot_id, 0) + 1
                    if above[slot_id] == READINGS_ABOVE_LEASE:
                        runner.exceeded(used_bytes)
        self._above = above


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1
