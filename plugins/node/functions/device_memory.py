"""Device memory as a function inside an executor holds it: torch's on real devices, a file on simulated ones.

Owns the allocating half of the simulated driver: the files of one process, and the refusal of more than a device has.
Its reading half is `plugins.node.devices.simulated`. Imports the standard library only, and torch late: it runs in
executors. It reads the environment because that is where an executor's devices stand.

The folder of a simulated node holds ``devices.json`` (the devices, by the reading half), ``faults.json`` (by people and
tests), ``lock`` and ``processes/PID.json``: the start time of the process, since process ids are used again, and the
bytes that it holds of each device.
"""

import contextlib
import fcntl
import importlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

LOCK_S_MAX: Final = 10.0
"""How long to wait for other processes that allocate: each holds the lock for milliseconds, unless it is frozen."""

_held: dict[str, int] = {}
_held_by = os.getpid()
_guard = threading.Lock()


class DeviceMemoryError(MemoryError):
    """A device has not that much memory free."""


class ProcessHold(NamedTuple):
    """Bytes that one live process holds of one simulated device."""

    pid: int
    uuid: str
    memory_bytes: int


@contextlib.contextmanager
def hold(memory_bytes: int) -> Iterator[tuple[str, ...]]:
    """Hold `memory_bytes` on each device that this process sees, for the length of the block.

    Yields:
        The devices' names.

    Raises:
        DeviceMemoryError: no device is visible, or one has not that much room; nothing is held then.
    """
    if memory_bytes < 0:
        raise ValueError(f"cannot hold {memory_bytes} bytes")
    names = os.environ.get("ROCYARD_SIMULATED_DEVICES", "")
    if not names:
        with _torch_hold(memory_bytes) as devices:
            yield devices
        return
    if not os.environ.get("ROCYARD_SIMULATED_DIR"):
        raise DeviceMemoryError("ROCYARD_SIMULATED_DEVICES is set, but ROCYARD_SIMULATED_DIR is not")
    directory = Path(os.environ["ROCYARD_SIMULATED_DIR"])
    uuids = tuple(names.split(","))
    _take(directory, uuids, memory_bytes)
    try:
        yield uuids
    finally:
        _give_back(directory, uuids, memory_bytes)


@contextlib.contextmanager
def _torch_hold(memory_bytes: int) -> Iterator[tuple[str, ...]]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise DeviceMemoryError("holding device memory needs torch, which this interpreter does not have") from error
    count = torch.cuda.device_count()
    if not count:
        raise DeviceMemoryError("this process sees no device")
    tensors: list[Any] = []
    try:
        try:
            # One by one: those before a failure must be in the list, to be let go.
            for index in range(count):
                tensors.append(torch.empty(memory_bytes, dtype=torch.uint8, device=f"cuda:{index}"))  # noqa: PERF401
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError(str(error)) from error
        yield tuple(torch.cuda.get_device_name(index) for index in range(count))
    finally:
        # torch keeps what tensors give back: without this the memory would still be in use after the block.
        tensors.clear()
        torch.cuda.empty_cache()


def process_start(pid: int) -> str | None:
    """When `pid` started, as text that differs for every process that ever had this id; None if it does not run.

    A process that has ended and was not waited for holds no memory, so it counts as gone. Where there is no ``/proc``,
    all that can be told is whether the process runs.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "running"
    return None if after_name[0] in {"Z", "X"} else after_name[19]


def holds_of(directory: Path) -> list[ProcessHold]:
    """What live processes hold of the simulated devices in `directory`."""
    holds: list[ProcessHold] = []
    for path in sorted((directory / "processes").glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            pid, started = int(path.stem), str(record["start"])
            sizes = [(uuid, size) for uuid, size in record["bytes"].items() if isinstance(size, int) and size > 0]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # gone since it was listed, or not ours
        if process_start(pid) == started:
            holds += [ProcessHold(pid, uuid, size) for uuid, size in sizes]
    return holds


def _take(directory: Path, uuids: tuple[str, ...], memory_bytes: int) -> None:
    """Add to what this process holds of each of `uuids`; all or nothing.

    Raises:
        DeviceMemoryError: a device has not that much room.
    """
    with _guard, _locked(directory):
        _require_room(directory, uuids, memory_bytes)
        _write_own(directory, uuids, memory_bytes)


def _give_back(directory: Path, uuids: tuple[str, ...], memory_bytes: int) -> None:
    """The reverse of `_take`. It needs no lock and cannot fail: less is held than before, whoever looks."""
    with _guard, contextlib.suppress(OSError):
        _write_own(directory, uuids, -memory_bytes)


def _require_room(directory: Path, uuids: tuple[str, ...], more_bytes: int) -> None:
    """Refuse as a real driver would: by what is physically free, whoever holds the rest."""
    holds = holds_of(directory)
    try:
        described = json.loads((directory / "devices.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DeviceMemoryError(f"{directory}/devices.json cannot be read: {error}") from error
    devices = {str(device["uuid"]): device for device in described}
    faults = _device_faults(directory)
    pools: dict[str, int] = {}
    for uuid in uuids:
        device = devices.get(uuid)
        fault = {} if device is None else faults.get(uuid, faults.get(str(device["index"]), {}))
        if device is None or fault.get("missing") or fault.get("error"):
            raise DeviceMemoryError(f"device {uuid} does not answer")
        pool = _pool_of(device)
        pools[pool] = pools.get(pool, 0) + more_bytes
    for pool, asked_bytes in pools.items():
        sharing = {uuid: device for uuid, device in devices.items() if _pool_of(device) == pool}
        used = sum(each.memory_bytes for each in holds if each.uuid in sharing)
        for uuid, device in sharing.items():
            used += int(faults.get(uuid, faults.get(str(device["index"]), {})).get("foreign_bytes", 0))
        total = next(iter(sharing.values()))["memory_bytes"]
        if used + asked_bytes > total:
            raise DeviceMemoryError(
                f"out of device memory on {pool}: {asked_bytes} bytes asked, {max(0, total - used)} of {total} free"
            )


def _pool_of(device: dict[str, Any]) -> str:
    """Names the memory of a described device, which it may share."""
    return str(device.get("pool") or device["uuid"])


def _device_faults(directory: Path) -> dict[str, Any]:
    try:
        faults = json.loads((directory / "faults.json").read_bytes()).get("devices", {})
    except (OSError, ValueError):
        return {}
    return faults if isinstance(faults, dict) else {}


def _write_own(directory: Path, uuids: tuple[str, ...], change_bytes: int) -> None:
    global _held_by  # noqa: PLW0603  a forked child holds nothing of its own yet
    if _held_by != os.getpid():
        _held.clear()
        _held_by = os.getpid()
    for uuid in uuids:
        _held[uuid] = _held.get(uuid, 0) + change_bytes
        if _held[uuid] <= 0:
            del _held[uuid]
    path = directory / "processes" / f"{os.getpid()}.json"
    if not _held:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"start": process_start(os.getpid()), "bytes": _held}), encoding="ascii")
    fresh.replace(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process at a time sees how much is free and takes it."""
    try:
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DeviceMemoryError(f"the simulated devices in {directory} are gone: {error.strerror}") from error
    try:
        deadline = time.monotonic() + LOCK_S_MAX
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeviceMemoryError(f"another process holds {directory}/lock") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(handle)
