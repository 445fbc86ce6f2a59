"""The agent's sign of life to its executors: a counter in memory that they share, and nothing else."""

import fcntl
import mmap
import os
import struct
import time
from typing import Final

GAP_KEPT_S: Final = 10.0
"""So long after the agent was silent the end of an executor may still be news of that."""

_COUNTER = struct.Struct("=Q")


class Pulse:
    """A counter that the agent raises; executors end themselves where it stands still for one lease.

    `fd` is open for reading only and its size is sealed: an executor can neither forge the pulse nor break the agent.
    """

    def __init__(self) -> None:
        writable = sealed_page("rocyard-pulse")
        self._page = mmap.mmap(writable, mmap.PAGESIZE)
        self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(writable)
        self._count = 0
        self._beaten_s = time.monotonic()
        self._gap_s = 0.0  # the longest between two beats, of those that ended since `_gap_ended_s`
        self._gap_ended_s = 0.0

    def beat(self) -> None:
        """Say that the agent lives. Call it from the loop that does the agent's work, at least four times per lease."""
        now_s = time.monotonic()
        if now_s - self._beaten_s >= self._gap_s or now_s - self._gap_ended_s > GAP_KEPT_S:
            self._gap_s, self._gap_ended_s = now_s - self._beaten_s, now_s
        self._beaten_s = now_s
        self._count += 1
        _COUNTER.pack_into(self._page, 0, self._count)

    def stood_still(self, lease_s: float) -> bool:
        """Whether the agent was silent of late for so long that executors may have ended themselves for it."""
        return max(time.monotonic() - self._beaten_s, self._gap_s) >= lease_s / 2

    def close(self) -> None:
        """Give the memory back. Executors that still run end within their lease."""
        self._page.close()
        os.close(self.fd)


def sealed_page(name: str) -> int:
    """A descriptor of one page of shared memory whose size nobody can change: a smaller one would kill its readers."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mmap.PAGESIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd
