"""What `rocyard doctor` looks at on this machine. Facts only: `manager.doctor` says what they mean.

Whatever may hang or must not be loaded here (a driver, torch) is looked at in a process of its own, which has a deadline.
"""

import asyncio
import ctypes
import datetime as dt
import getpass
import grp
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import psutil
from packaging.requirements import Requirement

from manager import doctor, ports
from manager.core.errors import SettingsError, StartError
from manager.doctor import SHM, Check, DeviceFile, DriverLook, Import, Package, Torch
from manager.settings import Settings, TlsSettings
from manager.tls import Role, tls_files
from plugins.node.devices.interface import VISIBILITY_VARIABLES, driver_pids_are_ours
from plugins.node.devices.probe import Prober

DRIVER_S: Final = 15.0
"""A driver that starts takes some seconds."""
TORCH_S: Final = 45.0
"""Loading torch from a cold disk does."""
PACKAGES: Final = ("manager", "plugins", "autoscaler", "rocyard")
KFD: Final = Path("/dev/kfd")
NVIDIA: Final = Path("/dev/nvidiactl")

_TORCH: Final = """
import json, sys
try:
    import torch
except ModuleNotFoundError as error:
    found = {} if error.name == "torch" else {"error": str(error)}
except Exception as error:
    found = {"error": f"{type(error).__name__}: {error}"[:300]}
else:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {"version": torch.__version__, "hip": torch.version.hip or "", "cuda": torch.version.cuda or "", "devices": devices}
json.dump(found, sys.stdout)
"""
_UNSYNCHRONISED: Final = 0x0040
_STATUS_OFFSET: Final = 40  # of `status` in the kernel's struct timex, on 64-bit machines


def packages() -> Check:
    """Python and the packages that the distribution names."""
    try:
        needed = distribution("rocyard").requires or []
    except PackageNotFoundError:
        needed = []
    found = tuple(_package(Requirement(text)) for text in needed if _counts(Requirement(text)))
    return doctor.python_check(platform.python_version(), found, sys.executable)


def _counts(requirement: Requirement) -> bool:
    """Whether it is for this machine, and no extra's."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _package(requirement: Requirement) -> Package:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Package(requirement.name, str(requirement.specifier), "", fits=False)
    fits = requirement.specifier.contains(found, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), found, fits)


def imports() -> Check:
    """Where our own packages come from."""
    try:
        folder = _installed_in(distribution("rocyard"))
    except PackageNotFoundError:
        return doctor.imports_check(())
    found = []
    for name in PACKAGES:
        spec = find_spec(name)
        found.append(Import(name, str(spec.origin) if spec else "", str(folder / name / "__init__.py")))
    return doctor.imports_check(found)


def _installed_in(installed: Distribution) -> Path:
    """The folder that holds our packages: the source tree of an editable install, else where packages are."""
    direct = json.loads(installed.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return Path(direct["url"].removeprefix("file://"))
    return Path(str(installed.locate_file("")))


def store_program(settings: Settings) -> Check:
    """The program of the embedded store."""
    from manager.store.server import find_program

    own = bool(settings.store.url.value)
    try:
        program = find_program(tls=bool(settings.tls.directory))
    except StartError as error:
        return doctor.store_program_check("", str(error), own)
    return doctor.store_program_check(f"{program.path} {'.'.join(map(str, program.version))}", "", own)


def listening(settings: Settings, supervisor: int | None) -> Iterator[Check]:
    """The ports that the settings name."""
    wanted = {
        "api.port": (settings.api.host, settings.api.port),
        "dask.port": (settings.dask.host, settings.dask.port),
        "dask.dashboard_port": (settings.dask.host, settings.dask.dashboard_port),
    }
    for name, (host, port) in wanted.items():
        holder = "" if not port or ports.is_free(host, port) else ports.holder(port)
        ours = bool(holder) and supervisor is not None and _is_below(ports.holder_pid(port), supervisor)
        yield doctor.port_check(name, port, holder, ours, runs=supervisor is not None)


def _is_below(pid: int | None, supervisor: int) -> bool:
    try:
        return pid is not None and any(parent.pid == supervisor for parent in psutil.Process(pid).parents())
    except psutil.Error:
        return False


def data_dir(path: Path) -> Check:
    """The folder of data."""
    there = path
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if there != path:
        return doctor.data_dir_check(str(path), None, owned=True, free_bytes=free)
    status = path.stat()
    return doctor.data_dir_check(str(path), status.st_mode & 0o777, status.st_uid == os.getuid(), free)


def limits() -> tuple[Check, ...]:
    """Open files, and memory that processes share."""
    shm = Path(SHM)
    size = shutil.disk_usage(shm).total if shm.is_dir() else None
    return doctor.files_check(*resource.getrlimit(resource.RLIMIT_NOFILE)), doctor.shm_check(size)


def certificates(directory: str) -> Check:
    """The certificates of the cluster that lie here."""
    if not directory:
        return Check(doctor.MACHINE, "certificates", doctor.Status.SKIP, "tls.directory is empty: no TLS")
    folder = Path(directory).expanduser()
    try:
        from manager.certs import list_certificates
    except ModuleNotFoundError:
        told, remedy = "cannot be read without the package cryptography", "pip install 'rocyard[tls]'"
        return Check(doctor.MACHINE, "certificates", doctor.Status.SKIP, told, remedy)
    try:
        found = list_certificates(folder).certificates
    except (OSError, ValueError) as error:
        told = f"{folder} cannot be read: {error}"
        return Check(doctor.MACHINE, "certificates", doctor.Status.FAIL, told, f"rocyard certs {folder} makes them")
    expires = {f"{view.role}{f' of {view.name}' if view.name else ''}": view.expires_at for view in found}
    dates = doctor.certificates_check(expires, dt.datetime.now(dt.UTC), directory)
    if dates.status is doctor.Status.FAIL:
        return dates
    try:
        for role in Role:
            if (folder / f"{role}.pem").exists():  # another machine has the node's alone
                tls_files(TlsSettings(directory=directory), role)
    except SettingsError as error:
        told, _, remedy = str(error).rpartition(": ")
        return Check(doctor.MACHINE, "certificates", doctor.Status.FAIL, told, remedy)
    return dates


def clock_synchronised() -> bool | None:
    """Whether the kernel says that something keeps its clock right; None where it does not say."""
    buffer = ctypes.create_string_buffer(256)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if state < 0 or sys.maxsize < 2**32:
        return None
    return not int.from_bytes(buffer.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], sys.byteorder) & _UNSYNCHRONISED


# --- devices ------------------------------------------------------------------------------------------------------


def amd_files(settings: Settings) -> Check:
    """The files of AMD's driver."""
    paths = [KFD, *sorted(Path("/dev/dri").glob("renderD*"))] if KFD.exists() else []
    files = tuple(DeviceFile(str(path), os.access(path, os.R_OK | os.W_OK), _group(path)) for path in paths)
    return doctor.amd_files_check(files, settings.node.devices == "amd", getpass.getuser())


def _group(path: Path) -> str:
    number = path.stat().st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def amd_driver(environ: Mapping[str, str]) -> tuple[Check, ...]:
    """What amdsmi shows, and whether it fits."""
    if not KFD.exists():
        return ()
    root = Path(environ.get("ROCM_PATH") or "/opt/rocm")
    return (
        doctor.driver_check("amdsmi", "amdsmi", asyncio.run(_look("amd", environ))),
        doctor.amdsmi_version_check(_amdsmi_version(root), _rocm_version(root)),
    )


def nvidia_driver(environ: Mapping[str, str]) -> Check:
    """What NVML shows."""
    if not NVIDIA.exists():
        return Check(doctor.DEVICES, "NVIDIA driver", doctor.Status.SKIP, f"no NVIDIA driver: {NVIDIA} is not there")
    return doctor.driver_check("NVIDIA driver", "NVML (nvidia-ml-py)", asyncio.run(_look("nvidia", environ)))


async def _look(kind: Literal["amd", "nvidia"], environ: Mapping[str, str]) -> DriverLook:
    prober = Prober(kind, env=environ, deadline_s=DRIVER_S)
    try:
        probe = await prober.probe()
    finally:
        await prober.close()
    unwell = {reading.uuid: reading.problem for reading in probe.readings if not reading.healthy}
    named = (f"{device.model}{f' ({unwell[device.uuid]})' if device.uuid in unwell else ''}" for device in probe.devices)
    return DriverLook(tuple(named), probe.error, bool(unwell))


def _amdsmi_version(root: Path) -> str:
    """Of the amdsmi that is used: ROCm's own has no version of its own, and always fits."""
    if (root / "share" / "amd_smi" / "amdsmi").is_dir():
        return _rocm_version(root)
    try:
        return version("amdsmi")
    except PackageNotFoundError:
        return ""


def _rocm_version(root: Path) -> str:
    try:
        return (root / ".info" / "version").read_text().strip().partition("-")[0]
    except OSError:
        return ""


def torch() -> Check:
    """The torch that is installed, as a process of its own sees it."""
    argv = [sys.executable, "-P", "-c", _TORCH]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TORCH_S, check=False, stdin=subprocess.DEVNULL)
    try:
        found = Torch(**json.loads(done.stdout))
    except (ValueError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or [f"its process ended with {done.returncode}"]
        found = Torch(error=last[0][:300])
    return doctor.torch_check(found, amd=KFD.exists(), nvidia=NVIDIA.exists())


def visibility(environ: Mapping[str, str]) -> Check:
    """Variables that hide devices."""
    return doctor.visibility_check({name: environ[name] for name in VISIBILITY_VARIABLES if environ.get(name)})


def attribution() -> Check:
    """Whether processes can be told apart by their ids."""
    options = next((mount.opts.split(",") for mount in psutil.disk_partitions(all=True) if mount.mountpoint == "/proc"), [])
    hides = any(option.startswith("hidepid=") and option not in {"hidepid=0", "hidepid=off"} for option in options)
    return doctor.attribution_check(driver_pids_are_ours(), hides and os.getuid() != 0, KFD.exists() or NVIDIA.exists())
