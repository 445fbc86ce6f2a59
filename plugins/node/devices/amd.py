"""AMD's devices by amdsmi, and the only module that imports it.

amdsmi is the thin Python half of a C library and must match it in version, so it is imported late, the one that ROCm
ships is preferred, and every call may be missing. Its calls can hang: only the prober's child process uses this module.
Units (amdsmi 7.0): memory in bytes, activity in percent, temperature in degrees, power in watts. All is range-checked.
"""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from manager.core.devices import (
    POWER_WATTS_MAX,
    TEMPERATURE_CELSIUS,
    Device,
    RawReading,
    Reading,
    memory_total,
    number_within,
    reading_of,
)
from plugins.node.devices.identity import Identity, Key, keys_of
from plugins.node.devices.interface import DeviceError, driver_pids_are_ours, visibility
from plugins.node.devices.pools import memory_of

_NOT_SUPPORTED: Final = frozenset({2, 3})
_NO_PERMISSION: Final = 10
_POWER_KEYS: Final = ("socket_power", "current_socket_power", "average_socket_power")
_SENSORS: Final = ("HOTSPOT", "EDGE", "VRAM")
"""In this order: MI300 has no EDGE, older cards have nothing else."""
_ARCHITECTURE: Final = re.compile(r"gfx[0-9a-f]{3,5}")


class _Failure(msgspec.Struct, frozen=True):
    """A call that gave no value. `expected`: the device or this version does not have it, which is no trouble."""

    text: str
    expected: bool


class _Logical(msgspec.Struct, frozen=True):
    """One logical device: how the driver knows it, and what is told of it."""

    handle: Any
    device: Device
    partition_id: int
    problem: str


class AmdSource:
    """AMD's devices of this machine.

    Args:
        rocm_path: where ROCm is installed; its own amdsmi is tried first.
        match_pids: whether process ids of the driver mean the same here; None finds out.

    Raises:
        DeviceError: there is no amdsmi, or no driver.
    """

    def __init__(self, rocm_path: Path = Path("/opt/rocm"), match_pids: bool | None = None) -> None:
        self._match_pids = driver_pids_are_ours() if match_pids is None else match_pids
        self._logical: tuple[_Logical, ...] = ()
        self._amdsmi: Any = load_amdsmi(rocm_path)
        # Another version of the wrapper than ours was written for shows itself by these, rather than by its own error.
        self._errors = (self._amdsmi.AmdSmiException, AttributeError, KeyError, TypeError, ValueError)
        started = self._ask("amdsmi_init")
        if isinstance(started, _Failure):
            raise DeviceError(f"amdsmi does not start: {started.text}")
        self._open = True

    def discover(self) -> tuple[Device, ...]:
        """See `DeviceSource`."""
        handles = self._ask("amdsmi_get_processor_handles") if self._open else _Failure("amdsmi is shut down", False)
        if isinstance(handles, _Failure):
            raise DeviceError(f"amdsmi shows no devices: {handles.text}")
        # A device of which nothing can be told has fallen off the bus; its handle outlives it.
        told = [(handle, identity) for handle in handles if (identity := self._identity(handle)).told]
        keys = keys_of([identity for _, identity in told])
        self._logical = tuple(
            self._describe(index, handle, identity, key)
            for index, ((handle, identity), key) in enumerate(zip(told, keys, strict=True))
        )
        return tuple(each.device for each in self._logical)

    def read(self) -> tuple[Reading, ...]:
        """See `DeviceSource`."""
        if not self._open:
            raise DeviceError("amdsmi is shut down")
        return tuple(reading_of(each.device, self._raw(each)) for each in self._logical)

    def visibility(self, devices: Sequence[Device]) -> dict[str, str]:
        """See `DeviceSource`."""
        return visibility(devices)

    def close(self) -> None:
        """See `DeviceSource`."""
        if self._open:
            self._open = False
            self._ask("amdsmi_shut_down")

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What amdsmi's `function` answers, or `_Failure`."""
        try:
            return getattr(self._amdsmi, function)(*arguments)
        except self._errors as error:
            code = getattr(error, "err_code", None)
            told = getattr(error, "err_info", None) or f"{type(error).__name__}: {error}"
            text = f"{function}: {' '.join(str(told).split())}" + (f" (code {code})" if code is not None else "")
            return _Failure(text, expected=code in _NOT_SUPPORTED or isinstance(error, AttributeError))

    def _answer(self, function: str, *arguments: Any) -> Any:
        """What amdsmi's `function` answers, or None: for what is good to know and no trouble to miss."""
        answer = self._ask(function, *arguments)
        return None if isinstance(answer, _Failure) else answer

    def _identity(self, handle: Any) -> Identity:
        enumeration = self._answer("amdsmi_get_gpu_enumeration_info", handle) or {}
        asic = self._answer("amdsmi_get_gpu_asic_info", handle) or {}
        kfd = self._answer("amdsmi_get_gpu_kfd_info", handle) or {}
        hip_id = number_within(enumeration.get("hip_id"), 0, 4096)
        return Identity(
            unique_id=_text(enumeration.get("hip_uuid")) or _text(asic.get("asic_serial")),
            uuid=_text(self._answer("amdsmi_get_gpu_device_uuid", handle)),
            bdf=_text(self._answer("amdsmi_get_gpu_device_bdf", handle)),
            hip_id=None if hip_id is None else int(hip_id),
            partition_id=int(number_within(kfd.get("current_partition_id"), 0, 64) or 0),
            compute=_text(self._answer("amdsmi_get_gpu_compute_partition", handle)),
            memory=_text(self._answer("amdsmi_get_gpu_memory_partition", handle)),
        )

    def _describe(self, index: int, handle: Any, identity: Identity, key: Key) -> _Logical:
        asic = self._answer("amdsmi_get_gpu_asic_info", handle) or {}
        architecture = _text(asic.get("target_graphics_version"))
        total = self._ask("amdsmi_get_gpu_memory_total", handle, self._amdsmi.AmdSmiMemoryType.VRAM)
        model = _text(asic.get("market_name")) or "AMD GPU"
        memory = memory_of(identity, key, model, memory_total(total))
        device = Device(
            uuid=key.uuid,
            index=index,
            vendor="amd",
            model=model,
            architecture=architecture if _ARCHITECTURE.fullmatch(architecture) else "",
            memory_bytes=memory.total_bytes,
            visible_id=key.visible_id,
            bdf=identity.bdf,
            partition=key.partition,
            pool=memory.pool,
        )
        problem = total.text if isinstance(total, _Failure) else memory.problem
        return _Logical(handle, device, identity.partition_id, problem)

    def _raw(self, each: _Logical) -> RawReading:
        used = self._ask("amdsmi_get_gpu_memory_usage", each.handle, self._amdsmi.AmdSmiMemoryType.VRAM)
        failed = used.text if isinstance(used, _Failure) else ""
        activity = self._answer("amdsmi_get_gpu_activity", each.handle) or {}
        power = self._answer("amdsmi_get_power_info", each.handle) or {}
        return RawReading(
            used_bytes=None if failed else used,
            # In a partitioned GPU the driver counts activity for partition 0 only; the others would read as idle.
            utilisation_percent=activity.get("gfx_activity") if each.partition_id == 0 else None,
            temperature_celsius=self._temperature(each.handle),
            power_watts=_first_number(power, _POWER_KEYS),
            processes=self._processes(each.handle) if self._match_pids else None,
            error=each.problem or failed,
        )

    def _temperature(self, handle: Any) -> object:
        """Degrees of the first sensor that the device has."""
        current = self._amdsmi.AmdSmiTemperatureMetric.CURRENT
        for name in _SENSORS:
            sensor = getattr(self._amdsmi.AmdSmiTemperatureType, name, None)
            value = None if sensor is None else self._answer("amdsmi_get_temp_metric", handle, sensor, current)
            if number_within(value, *TEMPERATURE_CELSIUS) is not None:
                return value
        return None

    def _processes(self, handle: Any) -> tuple[tuple[object, object], ...] | None:
        """(process id, bytes of device memory), or None if the driver does not tell, which takes rights."""
        processes = self._answer("amdsmi_get_gpu_process_list", handle)
        if not isinstance(processes, list):
            return None
        return tuple(
            (each.get("pid"), (each.get("memory_usage") or {}).get("vram_mem", each.get("mem")))
            for each in processes
            if isinstance(each, dict)
        )


def load_amdsmi(rocm_path: Path) -> Any:
    """The module amdsmi: ROCm's own if it is there and loads, else the installed one.

    Raises:
        DeviceError: with what each try said.
    """
    shipped = rocm_path / "share" / "amd_smi"
    reasons: list[str] = []
    for folder in [str(shipped), ""] if (shipped / "amdsmi").is_dir() else [""]:
        loaded = _import_from(folder)
        if not isinstance(loaded, str):
            return loaded
        reasons.append(loaded)
    raise DeviceError("; ".join(reasons))


def _import_from(folder: str) -> Any:
    """The module amdsmi, looked for in `folder` first; or the reason why not, as text.

    Its import explains itself on standard output and raises whatever comes: KeyError without the library,
    AttributeError on a library of another version.
    """
    printed = io.StringIO()
    path = list(sys.path)
    try:
        sys.path[:0] = [folder] if folder else []
        with contextlib.redirect_stdout(printed):
            return importlib.import_module("amdsmi")
    except Exception as error:  # noqa: BLE001  see above: there is no narrower type
        missing = isinstance(error, ModuleNotFoundError) and error.name == "amdsmi"
        said = " ".join(printed.getvalue().split())
        reason = f"amdsmi cannot be loaded: {type(error).__name__}: {error}" + (f" ({said})" if said else "")
    finally:
        sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "amdsmi"]:
        del sys.modules[name]
    return "the Python package amdsmi is not installed" if missing else reason


def _text(value: object) -> str:
    """`value` if it is text that says something."""
    return value if isinstance(value, str) and value not in {"", "N/A"} else ""


def _first_number(values: dict[str, Any], names: Sequence[str]) -> object:
    """The first of `names` in `values` that can be a power in watts, else any there is, to be complained about."""
    present = [values[name] for name in names if isinstance(values.get(name), int | float)]
    believable = [value for value in present if number_within(value, 0.0, POWER_WATTS_MAX) is not None]
    return next(iter(believable + present), None)
