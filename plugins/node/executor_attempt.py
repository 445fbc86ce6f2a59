"""The attempt that an executor runs, as the function sees it: what ``rocyard/task.py`` asks, and reports through it.

Owns the pace of reports. Loaded by file path into the executor, so it imports only the standard library; it knows neither
frames nor sockets, but calls what it was given.
"""

import os
import time
from _thread import allocate_lock
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

NAME: Final = "rocyard_attempt"
"""As ``rocyard/task.py`` has it."""
PERIOD_S: Final = 0.2
AT_ONCE_MAX: Final = 10
"""Reports that may come together; after them one per period, so that a loop cannot flood the agent."""

Send = Callable[[float | None, str | None, str | None], None]


class RunningAttempt(ModuleType):
    """The attempt that runs now; a module, since it stands among modules.

    Attributes:
        pid: of the executor. Processes that a task forks have this object too, but must not use its socket.
        task_id: empty while none runs.
        attempt, index, count, checkpoint, folder: as in `manager.core.wire.Call`; `checkpoint` follows what is reported.
    """

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        """`send` takes progress, message and checkpoint, each None where there is nothing new of it."""
        super().__init__(NAME)
        self.pid = os.getpid()
        self._send, self._clock = send, clock
        self._lock = allocate_lock()
        self._waiting: tuple[float, str] | None = None  # progress that was too fast
        self._credit, self._credited_s = float(AT_ONCE_MAX), clock()
        self.task_id, self.attempt, self.index, self.count, self.checkpoint, self.folder = "", 0, -1, 0, "", ""

    def begin(self, call: Any) -> None:
        """A call begins."""
        self.attempt, self.index, self.count = call.attempt, call.index, call.count
        self.checkpoint, self.folder = call.checkpoint, call.folder
        self._waiting, self._credit, self._credited_s = None, float(AT_ONCE_MAX), self._clock()
        self.task_id = call.task_id

    def report(self, *, progress: float | None = None, message: str | None = None, checkpoint: str | None = None) -> None:
        """Send what is new: a checkpoint at once, progress at its pace. From any thread; returns when the agent has it."""
        with self._lock:
            if not self.task_id:  # a thread that has outlived its task
                return
            if progress is not None:
                self._waiting = (progress, message or "")
            now_s = self._clock()
            self._credit = min(float(AT_ONCE_MAX), self._credit + (now_s - self._credited_s) / PERIOD_S)
            self._credited_s = now_s
            if checkpoint is not None:
                self.checkpoint = checkpoint
            if checkpoint is not None or self._credit >= 1:
                self._credit = max(0.0, self._credit - 1)
                self._flush(checkpoint)

    def end(self) -> None:
        """The call has ended: what is waiting goes, and nothing comes after it."""
        with self._lock:
            if self._waiting is not None:
                self._flush(None)
            self.task_id = ""

    def _flush(self, checkpoint: str | None) -> None:
        progress, message = self._waiting or (None, None)
        self._waiting = None
        self._send(progress, message, checkpoint)
