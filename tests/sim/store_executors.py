"""Executors of the simulation: what the agent's handle of a process offers, and what a process and its task may do.

A task takes its time, fails, crashes its executor, runs out of device memory, or never ends. The executor goes on while its
agent is frozen, until it has seen no pulse for one lease; it ends with its agent.
"""

import contextvars
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manager.core import wire
from plugins.node.executor_handle import Exit, Output
from plugins.node.executors import ExecutorStartError
from tests.sim.store_loop import CURRENT, Process, SimLoop

NOTHING = Output(b"", b"", 0)
START_S = 0.1
ENDING_S = 0.005


@dataclass(frozen=True)
class Act:
    """What one attempt does."""

    word: str = "ok"  # ok, fail, crash, oom, hang
    seconds: float = 0.02
    checkpoint: str = ""
    stubborn: bool = False  # it does not end when it is asked to


class Theatre:
    """Makes executors, and says what their tasks do.

    Args:
        begins: told of each attempt that begins.
        act: what it does.
    """

    def __init__(
        self, loop: SimLoop, rng: random.Random, begins: Callable[[str, int], None], act: Callable[[wire.Call], Act]
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.begins = begins
        self.act = act
        self.start_fails = 0.0
        self.living: dict[Process, list[SimExecutor]] = {}

    async def start(self, *, on_done: Any, on_exit: Any, on_note: Any = None, **_: Any) -> "SimExecutor":
        """As `Executor.start`."""
        process = CURRENT.get()
        assert process is not None
        ready = self.loop.create_future()
        self.loop.call_later(START_S * (0.5 + self.rng.random()), _resolve, ready)
        await ready
        if self.rng.random() < self.start_fails:
            raise ExecutorStartError("the simulation had it fail")
        executor = SimExecutor(self, process, on_done, on_exit, on_note)
        self.living.setdefault(process, []).append(executor)
        return executor

    def lapse(self, process: Process) -> None:
        """The agent has shown no pulse for a lease."""
        for executor in list(self.living.get(process, ())):
            executor.over(-15)

    def die(self, process: Process) -> None:
        """The agent has died, and its executors with it."""
        for executor in self.living.pop(process, ()):
            executor.ended = True


class SimExecutor:
    """One executor, from both sides."""

    def __init__(self, theatre: Theatre, process: Process, on_done: Any, on_exit: Any, on_note: Any) -> None:
        self.theatre = theatre
        self.loop = theatre.loop
        self.process = process
        self.pid = self.guard_pid = 1
        self.exited = self.loop.create_future()
        self.ended = False  # of the process; the agent hears of it later
        self._on_done, self._on_exit, self._on_note = on_done, on_exit, on_note
        self._calls: deque[wire.Call] = deque()  # as the agent knows them: not done, not taken back
        self._waiting: deque[wire.Call] = deque()  # not begun
        self._running: wire.Call | None = None
        self._act = Act()
        self._began: dict[tuple[str, int], float] = {}
        self._asked = self._leaving = False

    # --- the agent's side -----------------------------------------------------------------------------------------

    @property
    def current(self) -> wire.Call | None:
        return self._calls[0] if self._calls else None

    @property
    def started_at_s(self) -> float | None:
        return self._began.get((self._calls[0].task_id, self._calls[0].attempt)) if self._calls else None

    def output_so_far(self) -> Output:
        return NOTHING

    def send(self, batch: wire.Batch) -> None:
        if self.exited.done():
            raise RuntimeError("the executor has ended")
        self._calls.extend(batch.calls)
        self._waiting.extend(batch.calls)
        if self._running is None:
            self._begin()

    def recall(self) -> tuple[wire.Call, ...]:
        recalled = tuple(self._waiting)
        self._waiting.clear()
        self._calls = deque(call for call in self._calls if call not in recalled)
        return recalled

    def terminate(self, grace_s: float) -> None:
        self._asked = True
        self._later(0.02, self._ask_to_end)
        self._later(grace_s, self.over, -15)

    def kill(self) -> None:
        self._asked = True
        self._later(ENDING_S, self.over, -15)

    def _answer(self, done: wire.Done) -> None:
        self._calls.popleft()
        self._on_done(done, NOTHING)

    def _end(self, returncode: int) -> None:
        started = self._calls.popleft() if self.started_at_s is not None else None
        unstarted = tuple(self._calls)
        self._calls.clear()
        end = Exit(returncode, started, unstarted, NOTHING, self._asked)
        self._on_exit(end)
        self.exited.set_result(end)

    # --- the process's side: it is not frozen with its agent --------------------------------------------------------

    def _later(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        def happen() -> None:
            if not self.ended:
                function(*args)

        self.loop.call_later(seconds, happen, context=_NOBODY.copy())

    def _begin(self) -> None:
        if self.ended or self._leaving or not self._waiting:
            return
        call = self._running = self._waiting.popleft()
        self._began[call.task_id, call.attempt] = self.loop.now_s
        self.theatre.begins(call.task_id, call.attempt)
        act = self._act = self.theatre.act(call)
        if act.checkpoint and self._on_note is not None:
            note = wire.Note(call.task_id, call.attempt, progress=0.5, checkpoint=act.checkpoint)
            self._later(act.seconds / 2, self.process.post, self._on_note, note)
        if act.word == "crash":
            self._later(act.seconds, self.over, -11)
        elif act.word != "hang":
            self._later(act.seconds, self._done, call)

    def _done(self, call: wire.Call) -> None:
        if self._running is not call:
            return
        seconds = self._act.seconds
        if self._act.word == "ok":
            answer = wire.Done(call.task_id, call.attempt, True, f'"{call.task_id}/{call.attempt}"'.encode(), seconds)
        else:
            name = "GpuOutOfMemory" if self._act.word == "oom" else "ValueError"
            said = wire.encode_failure(wire.Failure(name, f"of attempt {call.attempt}", bases=(name, "Exception")))
            answer = wire.Done(call.task_id, call.attempt, False, said, seconds)
        self._tell(answer)

    def _tell(self, answer: wire.Done) -> None:
        self._running = None
        self.process.post(self._answer, answer)
        self._begin()

    def _ask_to_end(self) -> None:
        call = self._running
        self._leaving = True
        if call is None:
            self.over(0)
        elif not self._act.stubborn:
            said = wire.encode_failure(wire.Failure("TaskTerminated", "asked"))
            self._tell(wire.Done(call.task_id, call.attempt, False, said, self._act.seconds, terminated=True))
            self._later(ENDING_S, self.over, 0)

    def over(self, returncode: int) -> None:
        """The process ends."""
        if not self.ended:
            self.ended = True
            living = self.theatre.living.get(self.process, [])
            if self in living:
                living.remove(self)
            self.process.post(self._end, returncode)


def _resolve(future: Any) -> None:
    if not future.done():
        future.set_result(None)


_NOBODY = contextvars.Context()
