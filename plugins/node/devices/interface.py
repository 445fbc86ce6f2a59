"""What a source of devices is, and by which environment variables a child process sees exactly its devices.

The variables, and why these:

- AMD: ``ROCR_VISIBLE_DEVICES`` and nothing else. It works at the lowest layer, so everything above (HIP, torch, OpenCL)
  sees the same; ``HIP_VISIBLE_DEVICES`` counts *within* what ROCR shows, so setting both hides everything. A device is
  named by ``GPU-`` and the 16 hexadecimal digits of its unique id, because ROCR and HIP may number devices differently;
  by ROCR's index only where it has no such id, or shares it (ROCR shows nothing at all for an id that fits two).
- NVIDIA: ``CUDA_VISIBLE_DEVICES`` by uuid, for the same reason.
- Simulated: the names of the devices and the folder they live in; and the real ones' variables set to nothing, so that
  a machine with real devices does not use them behind the simulation's back.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from manager.core.devices import Device, Reading
from manager.core.errors import RocyardError

SIMULATED_DEVICES: Final = "ROCYARD_SIMULATED_DEVICES"
SIMULATED_DIR: Final = "ROCYARD_SIMULATED_DIR"
VISIBILITY_VARIABLES: Final = (
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    SIMULATED_DEVICES,
    SIMULATED_DIR,
)
"""All variables that say which devices a process sees: clear them, then set those of `visibility`."""

_INITIAL_PID_NAMESPACE: Final = "pid:[4026531836]"
"""The kernel's fixed number of the namespace that every other one lies in (PROC_PID_INIT_INO)."""


class DeviceError(RocyardError):
    """The driver of the devices does not answer."""


class DeviceSource(Protocol):
    """Reads the devices of this machine. Not for use from several threads."""

    def discover(self) -> tuple[Device, ...]:
        """All devices that the driver shows now.

        Raises:
            DeviceError: the driver does not answer.
        """
        ...

    def read(self) -> tuple[Reading, ...]:
        """One reading for each device of the last `discover`, in its order. Trouble with one device is in its reading.

        Raises:
            DeviceError: the driver does not answer.
        """
        ...

    def visibility(self, devices: Sequence[Device]) -> dict[str, str]:
        """Environment variables by which a child process sees exactly `devices`."""
        ...

    def close(self) -> None:
        """Let go of the driver; everything but `visibility` raises `DeviceError` from now on."""
        ...


def visibility(devices: Sequence[Device], simulated_dir: str = "") -> dict[str, str]:
    """Environment variables by which a child process sees exactly `devices`, in this order, which are of one vendor.

    Args:
        devices: at least one.
        simulated_dir: the folder that the state of simulated devices lives in.
    """
    names = ",".join(device.visible_id for device in devices)
    vendors = {device.vendor for device in devices}
    if len(vendors) != 1:
        raise ValueError(f"a process sees devices of one vendor, not of {sorted(vendors)}")
    match vendors.pop():
        case "amd":
            return {"ROCR_VISIBLE_DEVICES": names}
        case "nvidia":
            return {"CUDA_VISIBLE_DEVICES": names}
        case "simulated":
            return {
                SIMULATED_DEVICES: names,
                SIMULATED_DIR: simulated_dir,
                "ROCR_VISIBLE_DEVICES": "",
                "HIP_VISIBLE_DEVICES": "",
                "CUDA_VISIBLE_DEVICES": "",
            }


def driver_pids_are_ours() -> bool:
    """Whether process ids that a GPU driver reports mean the same processes here.

    Drivers count in the machine's own namespace. In a container without ``hostPID`` the same number is another process,
    and memory would be charged to the wrong one.
    """
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return False
