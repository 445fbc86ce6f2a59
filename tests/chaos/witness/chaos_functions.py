"""What the tasks of a chaos run do. Each writes down when it starts and how it ends, so that somebody other than Rocyard knows.

They run in executors, with nothing but the standard library. One line per event, appended in one write, which the kernel
keeps whole. A line names the executor and the agent whose child it is: a run again is explained by a fault on these alone.
"""

import json
import os
import time
from pathlib import Path


def _agent(guard: int) -> int:
    """The agent's pid: the parent of the executor's guard."""
    return int(Path(f"/proc/{guard}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _note(path: str, key: str, event: str) -> None:
    guard = os.getppid()
    line = {
        "event": event,
        "task": os.environ["ROCYARD_TASK_ID"],
        "attempt": int(os.environ["ROCYARD_ATTEMPT"]),
        "key": key,
        "at": time.monotonic(),
        "pid": os.getpid(),
        "agent": _agent(guard),
    }
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, (json.dumps(line) + "\n").encode())
    os.close(file)


def _hold(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)


def work(path: str, key: str, seconds: float, size: int = 0, index: int = -1) -> dict[str, object]:
    """Take so long, and say who did it, in so many bytes more than that needs. `index` is that of a task of an array."""
    key = key if index < 0 else f"{key}/{index}"
    _note(path, key, "start")
    try:
        _hold(seconds)
    except BaseException:
        _note(path, key, "terminated")
        raise
    _note(path, key, "end")
    return {"key": key, "attempt": int(os.environ["ROCYARD_ATTEMPT"]), "more": "x" * size}


def fail(path: str, key: str, times: int) -> dict[str, object]:
    """Raise in the first so many attempts."""
    _note(path, key, "start")
    if int(os.environ["ROCYARD_ATTEMPT"]) <= times:
        _note(path, key, "raise")
        raise RuntimeError(f"attempt {os.environ['ROCYARD_ATTEMPT']} of {key} was told to fail")
    _note(path, key, "end")
    return {"key": key, "attempt": int(os.environ["ROCYARD_ATTEMPT"])}


def crash(path: str, key: str, times: int) -> dict[str, object]:
    """Take the executor down in the first so many attempts."""
    _note(path, key, "start")
    if int(os.environ["ROCYARD_ATTEMPT"]) <= times:
        _note(path, key, "crash")
        os.abort()
    _note(path, key, "end")
    return {"key": key, "attempt": int(os.environ["ROCYARD_ATTEMPT"])}
