"""What Dask's own GPU pages read of a worker, for devices of any vendor: there these come from NVML alone.

Owns the names of those keys. The pages draw one bar per worker, so the flat keys are sums over the node's devices; each
device by itself stands under a key of ours. Readings are the agent's last ones: nothing is probed here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from distributed.worker import Worker

from manager.core.devices import Device
from manager.core.model import DeviceUse
from plugins.node.link import decode_report

DEVICES_KEY: Final = "rocyard_devices"
"""The metric of ours, a list with one mapping for each device."""


class Readings(Protocol):
    """What the worker plugin has: the report that it registers with, and the devices at the agent's last reading."""

    async def report(self, _: Worker, /) -> bytes: ...

    def uses(self) -> tuple[DeviceUse, ...]: ...


class GpuMetrics:
    """One worker's answers. `devices` is empty until the worker registers."""

    def __init__(self, readings: Readings) -> None:
        self.readings = readings
        self.devices: tuple[Device, ...] = ()

    async def startup(self, worker: Worker) -> dict[str, Any]:
        """What the worker registers with under ``gpu``; memory is the sum over its devices."""
        report = decode_report(await self.readings.report(worker))
        assert report is not None  # it was encoded just now
        self.devices = report.devices
        return {"memory-total": self.memory_total(worker), "name": device_names(self.devices)}

    def memory_total(self, _: Worker) -> int:
        """Bytes."""
        return sum({device.pool_key: device.memory_bytes for device in self.devices}.values())

    def memory_used(self, _: Worker) -> int:
        """Bytes in use by anybody. A device that cannot be read counts as empty: its reading is no measurement."""
        pools = {device.uuid: device.pool_key for device in self.devices}
        # Devices that share their memory all read all of it.
        return sum({pools.get(use.uuid, use.uuid): use.used_bytes for use in self.readings.uses() if use.healthy}.values())

    def utilisation(self, _: Worker) -> float:
        """Percent, the mean over devices that tell."""
        known = [use.utilisation_ratio for use in self.readings.uses() if use.utilisation_ratio is not None]
        return round(100 * sum(known) / len(known), 1) if known else 0.0

    def gpu(self, worker: Worker) -> dict[str, Any]:
        """The shape that NVML's metric has."""
        return {"utilization": self.utilisation(worker), "memory-used": self.memory_used(worker)}

    def rmm(self, _: Worker) -> dict[str, int]:
        """No worker has a pool of RAPIDS' memory manager. Without the key its page would not show GPU memory either."""
        return {"rmm-used": 0, "rmm-total": 0}

    def each_device(self, _: Worker) -> list[dict[str, Any]]:
        """Each device by itself."""
        uses = {use.uuid: use for use in self.readings.uses()}
        return [device_details(device, uses) for device in self.devices]


def device_names(devices: Sequence[Device]) -> str:
    """The models, each once: ``2 × AMD Instinct MI300X``."""
    models = [device.model for device in devices]
    counts = {model: models.count(model) for model in models}
    return ", ".join(model if number == 1 else f"{number} × {model}" for model, number in counts.items())


def device_details(device: Device, uses: Mapping[str, DeviceUse]) -> dict[str, Any]:
    """One device with its reading, where there is one."""
    found: dict[str, Any] = {
        "index": device.index,
        "uuid": device.uuid,
        "name": device.model,
        "memory-total": device.memory_bytes,
    }
    use = uses.get(device.uuid)
    if use is not None:
        found |= {"healthy": use.healthy, "problem": use.problem}
        if use.healthy:
            found |= {"memory-used": use.used_bytes, "memory-foreign": use.foreign_bytes}
        if use.utilisation_ratio is not None:
            found["utilization"] = round(100 * use.utilisation_ratio, 1)
    return found


def attach_gpu_metrics(worker: Worker, readings: Readings) -> None:
    """Give `worker`, which has not started yet, the keys that the pages read."""
    gpu = GpuMetrics(readings)
    worker.startup_information["gpu"] = gpu.startup
    worker.metrics["gpu_memory_used"] = gpu.memory_used
    worker.metrics["gpu-memory-total"] = gpu.memory_total
    worker.metrics["gpu_utilization"] = gpu.utilisation
    worker.metrics["gpu"] = gpu.gpu
    worker.metrics["rmm"] = gpu.rmm
    worker.metrics[DEVICES_KEY] = gpu.each_device
