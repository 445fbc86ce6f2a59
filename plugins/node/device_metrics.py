"""What the node's devices look like, as Prometheus gauges."""

from collections.abc import Mapping, Sequence

from manager.core.devices import Device
from manager.core.model import DeviceUse
from manager.metrics import (
    DEVICE_HEALTHY,
    DEVICE_MEMORY_FOREIGN,
    DEVICE_MEMORY_LEASED,
    DEVICE_MEMORY_TOTAL,
    DEVICE_MEMORY_USED,
    DEVICE_UTILISATION,
)


class DeviceMetrics:
    """Shows one node's devices; a node has few, so the labels are bounded."""

    def __init__(self, node: str) -> None:
        self.node = node

    def show(self, devices: Sequence[Device], uses: Sequence[DeviceUse], leases: Mapping[str, Mapping[str, int]]) -> None:
        """Set every gauge to the present. Memory that several devices share is shown with the first of them: sums are right.

        Args:
            devices: the inventory.
            uses: of them.
            leases: by pool and slot.
        """
        by_uuid = {use.uuid: use for use in uses}
        first = {device.pool_key: device.uuid for device in reversed(devices)}
        for device in devices:
            labels = {
                "hostname": self.node,
                "gpu_id": str(device.index),
                "gpu_uuid": device.uuid,
                "card_model": device.model,
            }
            use = by_uuid.get(device.uuid)
            if first[device.pool_key] == device.uuid:
                DEVICE_MEMORY_TOTAL.labels(**labels).set(device.memory_bytes)
                DEVICE_MEMORY_LEASED.labels(**labels).set(sum(leases.get(device.pool_key, {}).values()))
                if use is not None:
                    DEVICE_MEMORY_USED.labels(**labels).set(use.used_bytes)
                    DEVICE_MEMORY_FOREIGN.labels(**labels).set(use.foreign_bytes)
            if use is not None:
                DEVICE_HEALTHY.labels(**labels).set(use.healthy)
                if use.utilisation_ratio is not None:
                    DEVICE_UTILISATION.labels(**labels).set(use.utilisation_ratio)
