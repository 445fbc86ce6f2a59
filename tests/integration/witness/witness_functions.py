"""Functions that tests register: each writes down when it starts and ends, so that somebody other than Rocyard knows.

They run in executors; one line per event, appended in one write, which the kernel keeps whole.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path


def _note(path: str, **event: object) -> None:
    event |= {
        "at": time.monotonic(),
        "task": os.environ["ROCYARD_TASK_ID"],
        "attempt": int(os.environ["ROCYARD_ATTEMPT"]),
        "pid": os.getpid(),
        "devices": os.environ["ROCYARD_DEVICES"].split(","),
    }
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (json.dumps(event) + "\n").encode())
    os.close(file)


def hold(path: str, seconds: float, memory_bytes: int = 0) -> str:
    """Say that this task holds `memory_bytes` of each of its devices for `seconds`."""
    _note(path, event="start", memory_bytes=memory_bytes)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)
    _note(path, event="end", memory_bytes=memory_bytes)
    return os.environ["ROCYARD_TASK_ID"]


def until(path: str, gate: str) -> str:
    """Wait until the file `gate` exists."""
    _note(path, event="start", memory_bytes=0)
    while not Path(gate).exists():
        time.sleep(0.01)
    _note(path, event="end", memory_bytes=0)
    return os.environ["ROCYARD_TASK_ID"]


def greedy(memory_bytes: int, seconds: float) -> str:
    """Take so much of each of its devices for a while, whatever was asked for."""
    from plugins.node.functions import device_memory

    with device_memory.hold(memory_bytes):
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
    return os.environ["ROCYARD_TASK_ID"]


def segfault(path: str) -> None:
    """Read address 0."""
    _note(path, event="start", memory_bytes=0)
    ctypes.string_at(0)


def stubborn(path: str) -> None:
    """Ignore every polite request to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _note(path, event="start", memory_bytes=0)
    while True:
        try:
            time.sleep(3600)
        except BaseException:  # noqa: BLE001  # that is its nature
            continue


def environment() -> dict[str, str]:
    """All that the executor sees."""
    return dict(os.environ)


def chatter(lines: int) -> None:
    """Write to stdout and stderr."""
    import sys

    for number in range(lines):
        print(f"out {number}")
        print(f"err {number}", file=sys.stderr)
