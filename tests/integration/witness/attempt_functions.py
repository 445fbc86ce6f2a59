"""Functions of the tests of attempts: they report, fail and end in every way of which the next attempt is to hear."""

import os
import signal
import sys
import time
from pathlib import Path

from witness_functions import _note

import rocyard


class OutOfMemoryError(RuntimeError):
    """As torch has it."""

    __module__ = "torch"


def resumes(path: str) -> dict[str, object]:
    """Do half of the work, and the other half in the attempt after that."""
    last, folder = rocyard.last_checkpoint(), rocyard.checkpoint_folder()
    if last is None:
        assert folder is not None
        half = Path(folder) / "half"
        half.write_text("one half")
        print("so far", flush=True)
        print("so bad", file=sys.stderr, flush=True)
        rocyard.progress(0.5, "half way")
        rocyard.checkpoint(half)
        _note(path, event="start", memory_bytes=0)
        time.sleep(600)
    assert last is not None
    return {"found": Path(last).read_text(), "same_folder": str(Path(last).parent) == folder, "attempt": rocyard.attempt()}


def saves_in_time(path: str) -> str | None:
    """Save when asked to end, which takes a moment."""
    if rocyard.last_checkpoint() is not None:
        return rocyard.last_checkpoint()
    _note(path, event="start", memory_bytes=0)
    try:
        time.sleep(600)
    finally:
        time.sleep(0.3)
        rocyard.checkpoint("saved in time")
    return None


def stays_with_memory(path: str, memory_bytes: int) -> None:
    """Hold device memory, and ignore every polite request to end."""
    from plugins.node.functions import device_memory

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with device_memory.hold(memory_bytes):
        _note(path, event="start", memory_bytes=memory_bytes)
        while True:
            time.sleep(600)


def out_of_memory(times: int) -> int | None:
    """The device has no memory left, in so many attempts."""
    attempt = rocyard.attempt()
    if attempt is not None and attempt <= times:
        raise ValueError("loading failed") from OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB")
    return attempt


def key_error() -> None:
    """An error whose base is LookupError."""
    raise KeyError("no such thing")


def sleeps(seconds: float) -> None:
    """Take time."""
    time.sleep(seconds)


def large(size: int) -> str:
    """A result of that size."""
    return "x" * size


def place_in_array(number: int, other: str) -> list[object]:
    """What a task of an array is told of its place."""
    told = [int(os.environ["ROCYARD_ARRAY_INDEX"]), int(os.environ["ROCYARD_ARRAY_COUNT"])]
    return [number, other, rocyard.array_index(), *told]
