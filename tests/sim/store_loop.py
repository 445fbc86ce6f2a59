"""An event loop on a virtual clock, whose processes can be frozen, thawed and killed.

Time passes only when nobody has anything left to do: then it jumps to the next timer. A process is a label that every task
inherits from the one that started it; what a frozen process was about to do waits until it is thawed, and finds that time
has passed. The order of everything follows from the program alone, so one seed always gives one history.
"""

import asyncio
import contextvars
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from manager.core import ids

EPOCH_MS = 1_700_000_000_000
STEPS_MAX = 50_000
"""So much happens at no single moment: something turns without ever waiting."""


class Process:
    """One process of the simulated machines."""

    def __init__(self, loop: "SimLoop", name: str) -> None:
        self.loop = loop
        self.name = name
        self.frozen = False
        self.dead = False
        self.parked: list[SimHandle] = []
        self.context = contextvars.Context()
        self.context.run(CURRENT.set, self)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this process."""
        task = self.loop.create_task(coroutine, context=self.context.copy())
        task.add_done_callback(self.loop.end, context=_NOBODY.copy())
        return task

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have it called by this process, once it can."""
        self.loop.call_soon(function, *args, context=self.context.copy())

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: all that should have happened happens now, in the order in which it should have."""
        self.frozen = False
        self.loop.ready.extend(self.parked)
        self.parked.clear()

    def kill(self) -> None:
        """SIGKILL: nothing more of it happens. What it was about to do is kept, since tasks must be ended properly at last."""
        self.dead = True


_NOBODY = contextvars.Context()
CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class SimHandle(asyncio.TimerHandle):
    """A call that knows its process."""

    __slots__ = ("process",)

    def __init__(self, when: float, function: Callable[..., object], args: Any, loop: "SimLoop", context: Any) -> None:
        context = context if context is not None else contextvars.copy_context()
        super().__init__(when, function, args, loop, context)
        self.process: Process | None = context.get(CURRENT)


class SimLoop(asyncio.AbstractEventLoop):
    """The loop. It does no input and output: the simulated network does its own, at once."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.ready: deque[SimHandle] = deque()
        self.errors: list[BaseException] = []
        self.tasks: list[asyncio.Task[Any]] = []  # none may vanish with a process that was killed: it would clean up behind it
        self.steps = 0
        self._steps_here = 0
        self._timers: list[tuple[float, int, SimHandle]] = []
        self._numbers = itertools.count()

    # --- what asyncio asks of a loop ------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> SimHandle:  # type: ignore[override]
        handle = SimHandle(self.now_s, callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> SimHandle:  # type: ignore[override]
        # A clock has a resolution: what is almost due is not due at the very same moment again and again.
        return self.call_at(self.now_s + (max(delay, 1e-6) if delay > 0 else 0.0), callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> SimHandle:  # type: ignore[override]
        handle = SimHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # as a thread would hand it over
            future.set_exception(error)
        return future

    def end(self, task: asyncio.Task[Any]) -> None:
        """What a process ended with is the simulation's end, where it is an error."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context.get("exception") or RuntimeError(context["message"]))

    def close(self, processes: list[Process]) -> None:
        """Cancel whatever waits, in processes that were killed too, until nothing does."""
        for process in processes:
            process.dead = False
            process.thaw()
        for _ in range(20):
            waiting = [task for task in self.tasks if not task.done()]
            if not waiting:
                return
            for task in waiting:
                task.cancel()
            while not all(task.done() for task in waiting):
                try:
                    if not self.run_until(lambda: all(task.done() for task in waiting), 10.0):  # noqa: B023
                        break
                except BaseException:  # noqa: BLE001  # what ends here is not judged
                    continue

    # --- running --------------------------------------------------------------------------------------------------

    def run_until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Run until `done`, or until so much time has passed; whether it was the former."""
        end_s = self.now_s + limit_s
        asyncio.events._set_running_loop(self)
        try:
            while not done():
                if not self._step(end_s):
                    return done()
            return True
        finally:
            asyncio.events._set_running_loop(None)

    def _step(self, end_s: float) -> bool:
        if not self.ready:
            if not self._timers or self._timers[0][0] > end_s:
                self.now_s = max(self.now_s, end_s)
                return False
            self.now_s = max(self.now_s, self._timers[0][0])
            self._steps_here = 0
            while self._timers and self._timers[0][0] <= self.now_s:
                self.ready.append(heapq.heappop(self._timers)[2])
        handle = self.ready.popleft()
        process = handle.process
        if handle.cancelled():
            return True
        if process is not None and (process.frozen or process.dead):
            process.parked.append(handle)
            return True
        self.steps += 1
        self._steps_here += 1
        if self._steps_here > STEPS_MAX:
            raise RuntimeError(f"time stands still: {handle}")
        handle._run()
        if self.errors:
            raise self.errors.pop()
        return True


@contextmanager
def virtual(loop: SimLoop, seed: int) -> Iterator[None]:
    """Clocks and chance of everything that runs in this thread are the simulation's."""
    chance = random.Random(seed)
    state = random.getstate()
    random.seed(seed)

    def now_ns() -> int:
        return EPOCH_MS * 1_000_000 + int(loop.now_s * 1e9)

    class Source:
        """Where new ids come from."""

        urandom = staticmethod(chance.randbytes)

    with (
        mock.patch.object(time, "monotonic", loop.time),
        mock.patch.object(time, "time_ns", now_ns),
        mock.patch.object(ids, "os", Source),
    ):
        try:
            yield
        finally:
            random.setstate(state)
