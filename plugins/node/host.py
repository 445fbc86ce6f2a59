"""What the host of a node has beside its devices: CPUs and memory, as far as this process may use them."""

import os
from pathlib import Path
from typing import Final

import psutil

_CGROUP: Final = Path("/sys/fs/cgroup")
_CPU_LIMIT: Final = "cpu.max"
_MEMORY_LIMITS: Final = ("memory.max", "memory/memory.limit_in_bytes")
"""Of control groups of either version; in a container they are its own."""


def host_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may run on, or the time of so many that it is allowed; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / _CPU_LIMIT).partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def host_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory of this machine, or what this process's container may use of it."""
    total = psutil.virtual_memory().total
    limits = (_read(cgroup / name) for name in _MEMORY_LIMITS)
    return min([total, *(int(limit) for limit in limits if limit.isdigit() and int(limit))])


def _read(path: Path) -> str:
    """What stands in the file, empty where there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
