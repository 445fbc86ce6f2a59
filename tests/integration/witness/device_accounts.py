"""An account for each device, kept by the tasks themselves: who has what of it now, and the most that was ever had of it.

The witness of the placement exam. It knows nothing of ledgers, slots and agents: a task enters what it was promised on each
device that it finds in its environment, and takes it out again. One file per device, read and written under a lock, so that
no moment is missed. Standard library only, since it runs in executors.

Who is dead holds nothing, so an entry of a process that has ended is taken out by whoever comes next. That is never done
while the process lives (a pid counts with the time of its start), so nothing that is really held can be overlooked. Each
entry that had to be taken out is kept under ``vanished``: who reads the account has to say why that process ended.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ACCOUNT = ".account"
POOLS = "pools.json"
"""Device → name of the memory that it shares with others; where a device is not named, its memory is its own."""


@contextlib.contextmanager
def _account(directory: Path, name: str) -> Iterator[dict[str, Any]]:
    """The account of one device, for one change. Replaced as a whole: who is killed in the middle has changed nothing."""
    path, draft = directory / f"{name}{ACCOUNT}", directory / f"{name}.draft"
    with (directory / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            account = json.loads(path.read_text())
        except FileNotFoundError:
            account = {"now": {}, "peaks": {}, "shared": [], "vanished": [], "entries": 0}
        yield account
        draft.write_text(json.dumps(account))
        draft.replace(path)


def _began(pid: int) -> str:
    """When the process was started, in the kernel's ticks; empty for one that has ended, or is not yet waited for."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _reap(account: dict[str, Any]) -> None:
    for key, entry in list(account["now"].items()):
        if _began(entry["pid"]) != entry["began"]:
            account["vanished"].append(account["now"].pop(key) | {"found": time.monotonic()})


def _enter(account: dict[str, Any], key: str, entry: dict[str, Any]) -> None:
    _reap(account)
    account["now"][key] = entry
    account["entries"] += 1
    held = list(account["now"].values())
    for what in ("memory_bytes", "share_milli"):
        total = sum(each[what] for each in held)
        if total > account["peaks"].get(what, {"total": -1})["total"]:
            account["peaks"][what] = {"total": total, "held": held}
    if len(held) > 1 and any(each["exclusive"] for each in held):
        account["shared"].append(held)


def _of_memory(directory: Path, devices: Sequence[str]) -> list[str]:
    """Names of the accounts of memory that the devices share with others."""
    pools = json.loads((directory / POOLS).read_text())
    return [f"pool-{pools[device]}" for device in devices if device in pools]


@contextlib.contextmanager
def having(
    directory: Path,
    task: str,
    devices: Sequence[str],
    memory_bytes: int,
    share_milli: int = 0,
    *,
    exclusive: bool = False,
) -> Iterator[None]:
    """Have so much of each device for the length of the block, by the books of nobody but us."""
    pid = os.getpid()
    entry = {
        "task": task,
        "pid": pid,
        "began": _began(pid),
        "at": time.monotonic(),
        "memory_bytes": memory_bytes,
        "share_milli": share_milli,
        "exclusive": exclusive,
    }
    # Two devices of one pool are two entries in its account: each has its own memory of it.
    names = [*((name, entry) for name in devices)]
    names += [(name, entry | {"share_milli": 0, "exclusive": False}) for name in _of_memory(directory, devices)]
    entered: list[tuple[str, str]] = []
    try:
        for number, (name, each) in enumerate(names):
            key = f"{task}/{pid}/{number}"
            with _account(directory, name) as account:
                _enter(account, key, each)
            entered.append((name, key))
        yield
    finally:
        for name, key in entered:
            with _account(directory, name) as account:
                account["now"].pop(key, None)


def run(directory: str, task: str, seconds: float, promised: dict[str, Any]) -> str:
    """A task of the exam: have what was promised for so long, and write down that it has run."""
    folder = Path(directory)
    devices = os.environ["ROCYARD_DEVICES"].split(",")
    _note(folder, task, "start", devices)
    with having(folder, task, devices, **promised):
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
    _note(folder, task, "end", devices)
    return task


def _note(folder: Path, task: str, event: str, devices: Sequence[str]) -> None:
    line = {
        "event": event,
        "task": task,
        "at": time.monotonic(),
        "time": time.time(),
        "pid": os.getpid(),
        "devices": devices,
        "attempt": os.environ.get("ROCYARD_ATTEMPT", ""),
    }
    file = os.open(folder / "notes.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (json.dumps(line) + "\n").encode())  # one write, which the kernel keeps whole
    os.close(file)
