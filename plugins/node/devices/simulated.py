"""Simulated devices: a folder per node stands for the driver, and processes hold memory by writing a file into it.

Owns the reading half; the allocating half is `plugins.node.functions.device_memory`, which describes the folder. Faults
are asked for in ``faults.json``; a file that is not a `Faults` is an error of the driver, so that a typing error shows.
Utilisation, temperature and power are invented: a device is fully busy while any process holds memory on it, else idle.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from manager.core.devices import Device, RawReading, Reading, SimulatedNode, parse_fleet, reading_of
from plugins.node.devices.interface import DeviceError, visibility
from plugins.node.functions.device_memory import ProcessHold, holds_of

__all__ = ["DeviceFault", "Faults", "SimulatedSource", "parse_fleet", "write_faults"]

_IDLE_CELSIUS: Final = 38.0
_BUSY_CELSIUS: Final = 66.0
_IDLE_SHARE_OF_POWER: Final = 0.15
_BUSY_SHARE_OF_POWER: Final = 0.8
_HANG_POLL_S: Final = 0.05

_Figure = int | float | str | None


class DeviceFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is wrong with one device.

    Attributes:
        missing: it has fallen off the bus.
        error: every call for it fails with this text.
        foreign_bytes: memory held by processes that are not seen; of the whole pool, where it shares its memory.
        used_bytes, utilisation_percent, temperature_celsius, power_watts: what the driver says instead, right or wrong.
        processes_hidden: the driver does not tell who holds memory.
    """

    missing: bool = False
    error: str = ""
    foreign_bytes: int = 0
    used_bytes: _Figure = None
    utilisation_percent: _Figure = None
    temperature_celsius: _Figure = None
    power_watts: _Figure = None
    processes_hidden: bool = False


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is wrong with a node's devices.

    Attributes:
        error: the driver fails with this text.
        hang: the driver does not return while this is set.
        devices: by uuid, or by index as text.
    """

    error: str = ""
    hang: bool = False
    devices: dict[str, DeviceFault] = {}


_decode_faults = msgspec.json.Decoder(Faults).decode


def write_faults(directory: Path, faults: Faults) -> None:
    """Make `faults` those of the node in `directory`, from its next reading on."""
    _write(directory / "faults.json", msgspec.json.encode(faults))


class SimulatedSource:
    """The devices of one simulated node.

    Args:
        node: which devices.
        directory: the node's folder; made if it is not there, and kept by `close`.
    """

    def __init__(self, node: SimulatedNode, directory: Path) -> None:
        self._node = node
        self._directory = directory.absolute()
        self._devices: tuple[Device, ...] = ()
        self._open = True
        (self._directory / "processes").mkdir(parents=True, exist_ok=True)
        _write(self._directory / "devices.json", msgspec.json.encode(node.devices))

    def discover(self) -> tuple[Device, ...]:
        """See `DeviceSource`."""
        faults = self._faults()
        self._devices = tuple(each for each in self._node.devices if not _fault_of(faults, each).missing)
        return self._devices

    def read(self) -> tuple[Reading, ...]:
        """See `DeviceSource`."""
        faults = self._faults()
        holds = holds_of(self._directory)
        return tuple(reading_of(each, self._raw(each, faults, holds)) for each in self._devices)

    def visibility(self, devices: Sequence[Device]) -> dict[str, str]:
        """See `DeviceSource`."""
        return visibility(devices, str(self._directory))

    def close(self) -> None:
        """See `DeviceSource`."""
        self._open = False

    def _faults(self) -> Faults:
        """The faults that hold now; hangs while they say so.

        Raises:
            DeviceError: the source is closed, the file cannot be understood, or it asks for an error.
        """
        if not self._open:
            raise DeviceError("the simulated devices are shut down")
        while (faults := self._read_faults()).hang:
            time.sleep(_HANG_POLL_S)
        if faults.error:
            raise DeviceError(faults.error)
        return faults

    def _read_faults(self) -> Faults:
        path = self._directory / "faults.json"
        try:
            return _decode_faults(path.read_bytes())
        except FileNotFoundError:
            return Faults()
        except (OSError, msgspec.DecodeError) as error:
            raise DeviceError(f"{path} cannot be understood: {error}") from error

    def _raw(self, device: Device, faults: Faults, holds: Sequence[ProcessHold]) -> RawReading:
        fault = _fault_of(faults, device)
        own = any(each.uuid == device.uuid for each in holds)
        sharing = [each for each in self._node.devices if each.pool_key == device.pool_key]
        # As drivers do, a device tells of all that use its memory, also through another device that shares it.
        those = tuple((each.pid, each.memory_bytes) for each in holds if each.uuid in {other.uuid for other in sharing})
        used = sum(size for _, size in those) + sum(_fault_of(faults, each).foreign_bytes for each in sharing)
        share = _BUSY_SHARE_OF_POWER if own else _IDLE_SHARE_OF_POWER
        return RawReading(
            used_bytes=_either(fault.used_bytes, used),
            utilisation_percent=_either(fault.utilisation_percent, 100 if own else 0),
            temperature_celsius=_either(fault.temperature_celsius, _BUSY_CELSIUS if own else _IDLE_CELSIUS),
            power_watts=_either(fault.power_watts, self._node.power_watts * share),
            processes=None if fault.processes_hidden else those,
            error="the device is gone" if fault.missing else fault.error,
        )


def _fault_of(faults: Faults, device: Device) -> DeviceFault:
    return faults.devices.get(device.uuid) or faults.devices.get(str(device.index)) or DeviceFault()


def _either(asked: _Figure, real: float) -> _Figure:
    return real if asked is None else asked


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old one or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)
