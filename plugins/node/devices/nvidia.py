"""NVIDIA's devices by NVML (the Python package nvidia-ml-py), imported late: it is optional.

Its calls can hang: only the prober's child process uses this module. Units (NVML): memory in bytes, utilisation in
percent, temperature in degrees, power in milliwatts. All is range-checked. With MIG, its instances are the devices.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import msgspec

from manager.core.devices import NAMELESS, Device, RawReading, Reading, memory_total, reading_of
from plugins.node.devices.interface import DeviceError, driver_pids_are_ours, visibility


class _Failure(msgspec.Struct, frozen=True):
    """A call that gave no value."""

    text: str


class _Logical(msgspec.Struct, frozen=True):
    """One device: its handle, that of the card it is part of (the same for a whole one), and what is told of it."""

    handle: Any
    card: Any
    device: Device
    problem: str


class NvidiaSource:
    """NVIDIA's devices of this machine.

    Args:
        match_pids: whether process ids of the driver mean the same here; None finds out.

    Raises:
        DeviceError: there is no NVML, or no driver.
    """

    def __init__(self, match_pids: bool | None = None) -> None:
        self._match_pids = driver_pids_are_ours() if match_pids is None else match_pids
        self._logical: tuple[_Logical, ...] = ()
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise DeviceError(f"the Python package nvidia-ml-py is not installed ({error})") from error
        # UnicodeDecodeError is a ValueError; a call that a version of the package lacks is an AttributeError.
        self._errors = (self._nvml.NVMLError, AttributeError, ValueError)
        started = self._ask("nvmlInit")
        if isinstance(started, _Failure):
            raise DeviceError(f"NVML does not start: {started.text}")
        self._open = True

    def discover(self) -> tuple[Device, ...]:
        """See `DeviceSource`."""
        count = self._ask("nvmlDeviceGetCount") if self._open else _Failure("NVML is shut down")
        if isinstance(count, _Failure):
            raise DeviceError(f"NVML shows no devices: {count.text}")
        found: list[_Logical] = []
        for position in range(count):
            card = self._answer("nvmlDeviceGetHandleByIndex", position)
            if card is None:  # one card that fell off the bus does not hide the others
                continue
            instances = self._instances(card)
            found += [self._describe(len(found) + i, handle, card) for i, handle in enumerate(instances or [card])]
        self._logical = tuple(found)
        return tuple(each.device for each in self._logical)

    def read(self) -> tuple[Reading, ...]:
        """See `DeviceSource`."""
        if not self._open:
            raise DeviceError("NVML is shut down")
        return tuple(reading_of(each.device, self._raw(each)) for each in self._logical)

    def visibility(self, devices: Sequence[Device]) -> dict[str, str]:
        """See `DeviceSource`."""
        return visibility(devices)

    def close(self) -> None:
        """See `DeviceSource`."""
        if self._open:
            self._open = False
            self._ask("nvmlShutdown")

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What NVML's `function` answers, or `_Failure`."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._errors as error:
            return _Failure(f"{function}: {error}")

    def _answer(self, function: str, *arguments: Any) -> Any:
        """What NVML's `function` answers, or None: for what is good to know and no trouble to miss."""
        answer = self._ask(function, *arguments)
        return None if isinstance(answer, _Failure) else answer

    def _instances(self, card: Any) -> list[Any]:
        """Handles of the MIG instances of a card; none if it is not split."""
        mode = self._answer("nvmlDeviceGetMigMode", card)
        if not mode or mode[0] != 1:
            return []
        count = self._answer("nvmlDeviceGetMaxMigDeviceCount", card) or 0
        handles = [self._answer("nvmlDeviceGetMigDeviceHandleByIndex", card, position) for position in range(count)]
        return [handle for handle in handles if handle is not None]

    def _describe(self, index: int, handle: Any, card: Any) -> _Logical:
        capability = self._answer("nvmlDeviceGetCudaComputeCapability", card)
        pci = self._answer("nvmlDeviceGetPciInfo", card)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        bdf = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0" if pci is not None else ""
        uuid = self._answer("nvmlDeviceGetUUID", handle)
        device = Device(
            uuid=uuid or f"{NAMELESS}{bdf}",
            index=index,
            vendor="nvidia",
            model=self._answer("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            architecture=f"sm_{capability[0]}{capability[1]}" if capability else "",
            memory_bytes=memory_total(getattr(memory, "total", None)),
            visible_id=uuid or str(index),
            bdf=bdf,
            partition="mig" if handle is not card else "",
        )
        return _Logical(handle, card, device, memory.text if isinstance(memory, _Failure) else "")

    def _raw(self, each: _Logical) -> RawReading:
        memory = self._ask("nvmlDeviceGetMemoryInfo", each.handle)
        failed = memory.text if isinstance(memory, _Failure) else ""
        whole = each.handle is each.card
        utilisation = self._answer("nvmlDeviceGetUtilizationRates", each.card) if whole else None
        power = self._answer("nvmlDeviceGetPowerUsage", each.card) if whole else None
        return RawReading(
            used_bytes=None if failed else memory.used,
            # Of a card in MIG mode, activity and power belong to all instances together: to none of them.
            utilisation_percent=None if utilisation is None else utilisation.gpu,
            temperature_celsius=self._temperature(each.card),
            power_watts=None if power is None else power / 1000,
            processes=self._processes(each.handle) if self._match_pids else None,
            error=failed or each.problem,
        )

    def _temperature(self, card: Any) -> object:
        """Degrees, by the call of this driver's generation."""
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        older = self._answer("nvmlDeviceGetTemperature", card, sensor)
        return self._answer("nvmlDeviceGetTemperatureV", card, sensor) if older is None else older

    def _processes(self, handle: Any) -> tuple[tuple[object, object], ...] | None:
        """(process id, bytes), or None if the driver does not tell.

        A process that both computes and draws stands in both lists with the same memory, so the larger one counts; in
        one list it stands once for each of its instances.
        """
        computing = self._answer("nvmlDeviceGetComputeRunningProcesses", handle)
        if computing is None:
            return None
        drawing = self._answer("nvmlDeviceGetGraphicsRunningProcesses", handle) or []
        if any(each.usedGpuMemory is None for each in (*computing, *drawing)):
            return None
        held: dict[int, int] = {}
        for processes in (computing, drawing):
            sums: dict[int, int] = {}
            for each in processes:
                sums[each.pid] = sums.get(each.pid, 0) + each.usedGpuMemory
            held |= {pid: max(size, held.get(pid, 0)) for pid, size in sums.items()}
        return tuple(held.items())
