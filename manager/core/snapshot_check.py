"""Whether the numbers of a snapshot can be decided on: the file may be damaged, or written by hand. Pure.

What the store says was bounded when it was written, so that rows of the store have no bounds of their own, and what reads them
on its way to a decision need not look.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

from manager.core.quantities import MEMORY_BYTES_MAX
from manager.core.shapes import CPU_MILLI_MAX, GPUS_MAX, SHARE_MILLI_MAX

_NUMBER_MAX: Final = 2**53
"""Of any number: what JSON holds exactly wherever it is read. Sums of a node's devices still fit 64 bits."""
_SECONDS: Final = (0.001, 31_622_400)
_SLOTS_MAX: Final = 10_000_000
_BOUNDS: Final[dict[tuple[str, str], tuple[float, float]]] = {
    ("", "drain_target_s"): _SECONDS,
    ("", "demand"): (0, 1),
    ("limits", "drain_target_s"): _SECONDS,
    ("limits", "slots_per_shape_max"): (1, _SLOTS_MAX),
    ("shape", "gpus"): (1, GPUS_MAX),
    ("info", "cpus"): (0, CPU_MILLI_MAX),
    ("kind", "cpus"): (0, CPU_MILLI_MAX),
    ("queues", "run_s"): (0, 31_622_400),
    ("tenants", "weight"): (0.001, 1000),
}
"""Where a number is, as the field that it is in and its own name, and what it may be."""
_EVERYWHERE: Final[dict[str, tuple[float, float]]] = {
    "memory_bytes": (0, MEMORY_BYTES_MAX),
    "memory_bytes_max": (0, _NUMBER_MAX),
    "host_memory_bytes": (0, MEMORY_BYTES_MAX),
    "share_milli": (0, SHARE_MILLI_MAX),
    "cpu_milli": (0, CPU_MILLI_MAX),
}
"""The same by name alone."""


def wrong_number(snapshot: Any) -> str | None:
    """What is wrong with the first number that nothing can be decided on, and where it is; None: all are right.

    Args:
        snapshot: as decoded from JSON, without types.
    """
    for path, within, name, value in _numbers(snapshot, "$", "", ""):
        least, most = _BOUNDS.get((within, name)) or _EVERYWHERE.get(name) or (-_NUMBER_MAX, _NUMBER_MAX)
        if not (math.isfinite(value) and least <= value <= most):
            return f"{str(value)[:40]} is not a number from {least} to {most} - at `{path}`"
    return None


def _numbers(value: Any, path: str, within: str, name: str) -> Iterator[tuple[str, str, str, float]]:
    """All numbers below `value`, each with its path, the field that its struct is in, and its own."""
    match value:
        case bool():
            return
        case int() | float():
            yield path, within, name, value
        case dict():
            for key, each in value.items():
                yield from _numbers(each, f"{path}.{key}", name, key)
        case list():
            for at, each in enumerate(value):
                yield from _numbers(each, f"{path}[{at}]", within, name)
        case _:
            return
