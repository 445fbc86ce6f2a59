"""What tasks write to stdout and stderr: split at the agent's marker and bounded.

Owns the splitting, as a plain value machine. Reading the pipes is `plugins.node.executors`.
"""

from collections import deque
from typing import NamedTuple


class Written(NamedTuple):
    """What one task wrote to one stream: its last bytes, and how many before them were dropped."""

    data: bytes
    dropped_bytes: int


class OutputSplitter:
    """Splits a stream of bytes at a marker, and keeps the last `bytes_max` bytes of each part.

    The marker is found across the borders of chunks. Memory is bounded by twice `bytes_max`, one chunk and the parts
    that nobody has taken, of which there is one per call that has ended.
    """

    def __init__(self, marker: bytes, bytes_max: int) -> None:
        self._marker = marker
        self._bytes_max = bytes_max
        self._open = bytearray()
        self._dropped_bytes = 0
        self._searched = 0  # up to here in `_open` no marker begins
        self.parts: deque[Written] = deque()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream; parts that are complete with them are added to `parts`."""
        marker, buffer = self._marker, self._open
        if not buffer and data == marker:  # the usual case: a task that wrote nothing
            self.parts.append(Written(b"", self._dropped_bytes))
            self._dropped_bytes = 0
            return
        buffer += data
        while (end := buffer.find(marker, self._searched)) >= 0:
            self.parts.append(self._bounded(buffer[:end]))
            del buffer[: end + len(marker)]
            self._searched = self._dropped_bytes = 0
        self._searched = max(0, len(buffer) - len(marker) + 1)
        # Half a marker at the end may belong to the part's end, so a little more than the bound is kept.
        if (excess := len(buffer) - self._bytes_max - len(marker)) > self._bytes_max:
            del buffer[:excess]
            self._dropped_bytes += excess
            self._searched = max(0, self._searched - excess)

    def so_far(self) -> Written:
        """What has come since the last marker."""
        return self._bounded(self._open)

    def cut(self) -> Written:
        """What has come since the last marker, as a part of its own."""
        written = self.so_far()
        self._open.clear()
        self._searched = self._dropped_bytes = 0
        return written

    def _bounded(self, data: bytearray) -> Written:
        excess = max(0, len(data) - self._bytes_max)
        return Written(bytes(data[excess:]), self._dropped_bytes + excess)
