"""Built-in functions that need nothing: to try a cluster, and to see what it does when tasks fail."""

import contextlib
import ctypes
import sys
import time
from typing import Annotated, Any, Literal

import msgspec

from plugins.node.functions.device_memory import hold

SECONDS_MAX = 86_400.0


def echo(**values: Any) -> dict[str, Any]:
    """Return the arguments as they are."""
    return values


def sleep(
    seconds: Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)],
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0,
) -> dict[str, float]:
    """Wait, and hold device memory meanwhile.

    Args:
        seconds: how long.
        memory_bytes: how much memory to hold on each device of the slot.

    Returns:
        ``slept_s``: seconds that it really took.
    """
    began = time.monotonic()
    with hold(memory_bytes) if memory_bytes else contextlib.nullcontext():  # `hold` needs a device
        time.sleep(seconds)
    return {"slept_s": time.monotonic() - began}


def fail(message: str = "failed as asked", kind: Literal["error", "exit", "crash"] = "error") -> None:
    """Fail: raise an error, leave by sys.exit, or crash the executor by a segmentation fault."""
    match kind:
        case "error":
            raise RuntimeError(message)
        case "exit":
            sys.exit(message)
        case "crash":
            sys.stderr.write(message + "\n")
            ctypes.string_at(0)
