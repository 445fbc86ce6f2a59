"""One open slot: claims tasks of its shape, has its executor run them, commits how they ended, until it is told to close.

The runner owns its executor and the ends that are not committed yet. It decides nothing about which tasks come; it never
throws an end away while its incarnation holds, and never claims while it cannot commit.
"""

import asyncio
import enum
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from manager.core.errors import StoreUnavailable
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import Claim, End, NextReply, TaskError
from manager.core.placement import Grant
from manager.core.shapes import Shape
from manager.core.wire import Batch, Call, Done
from manager.log import get_logger
from manager.metrics import EXECUTOR_RESTARTS, TASK_DURATION, TASKS
from manager.settings import SlotSettings, TaskSettings
from manager.store import Store
from plugins.node.executors import Executor, ExecutorStartError, Exit, Pulse
from plugins.node.registry import FunctionSpec

BATCH_S: Final = 0.005
"""Tasks are claimed together as long as all of them together are expected to need less than this."""
BATCH_MAX: Final = 16
LOOK_S: Final = 0.05
"""A task that runs for longer than this is reported as started, and what waits behind it in its batch goes back."""
STORE_PAUSE_S: Final = (0.1, 1.0)
LOG_PERIOD_S: Final = 1.0

log = get_logger("rocyard.slot")


class Ending(enum.StrEnum):
    """Why the agent ends a running task."""

    CANCELLED = "Cancelled"
    TIME_LIMIT = "TimeLimitExceeded"
    MEMORY = "MemoryExceeded"
    PREEMPTED = "Preempted"
    FENCED = "Fenced"
    STOPPED = "AgentStopped"


class SlotContext(msgspec.Struct, frozen=True):
    """What all slots of an agent share.

    Attributes:
        functions: the registry, by name.
        environment: of an executor on these devices with this home directory.
        interpreter: environment id → (python, import path).
        lease_s: an executor that has not seen the agent's pulse for so long ends itself.
    """

    store: Store
    incarnation: str
    functions: Mapping[str, FunctionSpec]
    interpreter: Callable[[str], tuple[str, tuple[str, ...]]]
    environment: Callable[[tuple[str, ...], Path], dict[str, str]]
    pulse: Pulse
    lease_s: float
    scratch: Path
    slots: SlotSettings
    tasks: TaskSettings


class SlotRunner:
    """One slot. Make it when the request is accepted, `run` it once the store has opened it."""

    def __init__(self, slot_id: str, grant: Grant, context: SlotContext) -> None:
        self.slot_id = slot_id
        self.grant = grant
        self.context = context
        self.shape: Shape | None = None
        self.idle = False
        self.finished: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._executor: Executor | None = None
        self._served = 0  # calls that this executor has ended
        self._crashes = 0  # in a row, without a task done between
        self._claims: dict[str, Claim] = {}
        self._ends: list[End] = []
        self._logs: list[tuple[str, int, bytes, bytes, int]] = []
        self._news = asyncio.Event()
        self._wake = asyncio.Event()
        self._ending: tuple[Ending, str] | None = None
        self._closing: Ending | None = None
        self._run_s: float | None = None
        self._reported: tuple[str, int] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._batch_began_s = 0.0

    # --- what others tell it ------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be work, or a flag."""
        self._wake.set()

    def cancel(self, task_ids: set[str]) -> None:
        """The cancellation of these tasks was asked."""
        executor = self._executor
        if executor is None or not task_ids & self._claims.keys():
            return
        self._recall()
        current = executor.current
        if current is not None and current.task_id in task_ids:
            self._end_current(Ending.CANCELLED, current.task_id)

    def end(self, why: Ending) -> None:
        """End now: fenced, preempted, or the agent stops."""
        if self._closing is None:
            self._closing = why
        if self._executor is not None:
            self._ending = self._ending or (why, self._current_id())
            self._executor.kill()
        self._news.set()
        self._wake.set()

    def exceeded(self, used_bytes: int) -> None:
        """The slot has used more than its lease for two readings in a row."""
        log.warning("memory_exceeded", slot=self.slot_id, used_bytes=used_bytes, lease_bytes=self.grant.memory_bytes)
        if self._executor is not None:
            self._ending = (Ending.MEMORY, self._current_id())
            self._executor.kill()

    @property
    def session(self) -> int | None:
        """Session id of all processes of its executor."""
        return self._executor.guard_pid if self._executor is not None else None

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self, shape: Shape) -> None:
        """Serve until told to close; resolves `finished` with the reason when nothing of the slot is left."""
        self.shape = shape
        reason = "Failed"
        try:
            reason = await self._serve()
        except Exception:
            log.exception("slot_failed", slot=self.slot_id)
        finally:
            await self._stop_executor()
            if reason != Ending.FENCED:
                reason = await self._close(reason)
            log.info("slot_closed", slot=self.slot_id, reason=reason)
            if not self.finished.done():
                self.finished.set_result(reason)

    async def _serve(self) -> str:
        starting = asyncio.create_task(self._start_executor())
        try:
            while self._closing is None:
                self._wake.clear()
                reply = await self._next(self._batch_size())
                match reply.word:
                    case "WORK":
                        await asyncio.wait({starting})
                        if (problem := await self._work(reply.claims)) is not None:
                            return problem
                    case "IDLE":
                        self.idle = True
                        await self._wake.wait()
                        self.idle = False
                    case word:
                        return Ending.FENCED if word == "FENCED" else word.capitalize()
            return self._closing
        finally:
            await asyncio.wait({starting})

    def _batch_size(self) -> int:
        if self._run_s is None:
            return 1
        return max(1, min(BATCH_MAX, int(BATCH_S / max(self._run_s, 1e-6))))

    async def _next(self, n: int) -> NextReply:
        """Commit what has ended and claim; waits for as long as the store is away. Ends are kept until they are told."""
        pause_s = STORE_PAUSE_S[0]
        while True:
            ends = tuple(self._ends)
            try:
                for entry in self._logs:
                    await self.context.store.keep_log(*entry)
                self._logs.clear()
                reply = await self.context.store.next(self.slot_id, self.context.incarnation, n, ends)
            except StoreUnavailable as error:
                if self._closing is Ending.FENCED:
                    return NextReply("FENCED", (), ())
                log.warning("store_unavailable", slot=self.slot_id, ends=len(ends), error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
                continue
            del self._ends[: len(ends)]
            _count(ends, reply.statuses)
            return reply

    async def _work(self, claims: tuple[Claim, ...]) -> str | None:
        """Run the claims to their ends; a reason to close the slot, or None."""
        runnable = [claim for claim in claims if self._known(claim)]
        if not runnable:
            return None
        if runnable[0].alone and self._served:
            await self._stop_executor()
        executor = await self._start_executor()
        if executor is None:
            self._ends += [End(claim.task_id, claim.attempt, Outcome.RETURNED) for claim in runnable]
            return "ExecutorsFail" if self._crashes >= self.context.slots.executor_crashes_max else None
        self._claims = {claim.task_id: claim for claim in runnable}
        self._news.clear()
        self._batch_began_s = time.monotonic()
        self._arm(LOOK_S)
        executor.send(Batch(tuple(self._call(claim) for claim in runnable)))
        while True:
            await self._news.wait()
            self._news.clear()
            if not self._claims:
                break
            if self._ends or self._logs:
                if (await self._next(0)).word == "FENCED":
                    self.end(Ending.FENCED)
        self._disarm()
        return "ExecutorsFail" if self._crashes >= self.context.slots.executor_crashes_max else None

    def _known(self, claim: Claim) -> bool:
        function = self.context.functions.get(claim.spec.function)
        if function is not None and not function.error:
            return True
        why = function.error if function is not None else "no function of that name is registered on this node"
        error = TaskError("FunctionNotFound", f"{claim.spec.function}: {why}")
        self._ends.append(End(claim.task_id, claim.attempt, Outcome.FAILED, msgspec.json.encode(error), 0.0, 0.0))
        return False

    def _call(self, claim: Claim) -> Call:
        target = self.context.functions[claim.spec.function].target
        return Call(claim.task_id, claim.attempt, target, bytes(claim.spec.args))

    # --- executor -----------------------------------------------------------------------------------------------

    async def _start_executor(self) -> Executor | None:
        """The executor, started if there is none; None where it does not start."""
        if self._executor is not None:
            return self._executor
        assert self.shape is not None
        context = self.context
        python, path = context.interpreter(self.shape.environment)
        home = context.scratch / self.slot_id
        home.mkdir(parents=True, exist_ok=True)
        try:
            self._executor = await Executor.start(
                python=python,
                env=context.environment(self.grant.devices, home),
                pulse=context.pulse,
                lease_s=context.lease_s,
                path=path,
                log_bytes_max=context.tasks.log_bytes_max,
                result_bytes_max=context.tasks.result_bytes_max,
                on_done=self._on_done,
                on_exit=self._on_exit,
            )
        except ExecutorStartError as error:
            self._crashes += 1
            log.error("executor_not_started", slot=self.slot_id, error=str(error))
            return None
        self._served = 0
        self._ending = None
        return self._executor

    async def _stop_executor(self) -> None:
        executor = self._executor
        if executor is not None:
            self._ending = self._ending or (Ending.STOPPED, self._current_id())
            executor.kill()
            await executor.exited

    def _current_id(self) -> str:
        current = self._executor.current if self._executor is not None else None
        return current.task_id if current is not None else ""

    def _end_current(self, why: Ending, task_id: str) -> None:
        if self._executor is not None and self._ending is None:
            self._ending = (why, task_id)
            self._executor.terminate(self.context.tasks.grace_s)

    def _recall(self) -> None:
        """Take back what has not started; nothing that the executor has taken can be among it."""
        if self._executor is None:
            return
        for call in self._executor.recall():
            self._end(call.task_id, Outcome.RETURNED)

    # --- answers ------------------------------------------------------------------------------------------------

    def _on_done(self, done: Done, stdout: bytes, stderr: bytes, dropped: int) -> None:
        self._crashes = 0
        self._served += 1
        if stdout or stderr:
            self._logs.append((done.task_id, done.attempt, stdout, stderr, dropped))
        if done.ok:
            self._end(done.task_id, Outcome.SUCCEEDED, done.result, done.duration_s)
        elif done.terminated:
            self._end_terminated(done.task_id, done.duration_s)
        else:
            self._end(done.task_id, Outcome.FAILED, done.result, done.duration_s)
        self._run_s = done.duration_s if self._run_s is None else self._run_s * 0.7 + done.duration_s * 0.3
        if self._claims:
            self._batch_began_s = time.monotonic()
            self._arm(LOOK_S)

    def _on_exit(self, exit_: Exit) -> None:
        fresh = self._served == 0
        self._executor = None
        if exit_.started is not None:
            output = exit_.output
            if output.stdout or output.stderr:
                self._logs.append(
                    (exit_.started.task_id, exit_.started.attempt, output.stdout, output.stderr, output.dropped_bytes)
                )
            if exit_.asked and self._ending is not None:
                self._end_terminated(exit_.started.task_id, None)
            else:
                error = TaskError("ExecutorCrashed", f"the executor {_ended_by(exit_.returncode)}")
                outcome = Outcome.CRASHED if fresh else Outcome.SUSPECTED
                self._end(exit_.started.task_id, outcome, msgspec.json.encode(error))
        for call in exit_.unstarted:
            self._end(call.task_id, Outcome.RETURNED)
        reason = self._ending[0].value if exit_.asked and self._ending is not None else "Crashed"
        if not exit_.asked:
            self._crashes += 1
            log.warning("executor_crashed", slot=self.slot_id, ended=_ended_by(exit_.returncode), fresh=fresh)
        EXECUTOR_RESTARTS.labels(reason=reason).inc()
        self._ending = None
        self._news.set()

    def _end_terminated(self, task_id: str, duration_s: float | None) -> None:
        """A task that we have ended. Where the signal met another one than was meant, that one is run again."""
        why, meant = self._ending or (Ending.STOPPED, "")
        claim = self._claims.get(task_id)
        if claim is None:
            return
        if why is Ending.CANCELLED and meant == task_id:
            self._end(task_id, Outcome.CANCELLED, b"", duration_s)
        elif why is Ending.TIME_LIMIT and meant == task_id:
            message = f"the task ran for longer than its limit of {claim.spec.time_limit_s:g} s and was ended"
            self._end(task_id, Outcome.FAILED, msgspec.json.encode(TaskError(why.value, message)), duration_s)
        elif why is Ending.MEMORY:
            message = "the task used more device memory than it had asked for; ask for more"
            self._end(task_id, Outcome.FAILED, msgspec.json.encode(TaskError(why.value, message)), duration_s)
        else:
            self._end(task_id, Outcome.LOST)

    def _end(self, task_id: str, outcome: Outcome, payload: bytes = b"", duration_s: float | None = None) -> None:
        claim = self._claims.pop(task_id, None)
        if claim is None:
            return
        started = outcome is not Outcome.RETURNED
        age_s = duration_s if duration_s is not None else time.monotonic() - self._batch_began_s
        self._ends.append(
            End(
                task_id,
                claim.attempt,
                outcome,
                payload,
                age_s=age_s if started else None,
                duration_s=age_s if started else None,
                chance=random.random(),  # noqa: S311  # jitter of a retry, not a secret
            )
        )
        if not self._claims:
            self._news.set()

    # --- a task that takes its time -----------------------------------------------------------------------------

    def _arm(self, delay_s: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The present task runs for a while: say that it has started, let others have what waits, mind its limit."""
        self._timer = None
        executor = self._executor
        current = executor.current if executor is not None else None
        if executor is None or current is None or (claim := self._claims.get(current.task_id)) is None:
            return
        began_s = executor.started_at_s
        if began_s is None:
            self._arm(LOOK_S)
            return
        elapsed_s = time.monotonic() - began_s
        left_s = claim.spec.time_limit_s - elapsed_s
        if left_s <= 0:
            self._end_current(Ending.TIME_LIMIT, claim.task_id)
            return
        if self._reported != (claim.task_id, claim.attempt):
            self._reported = (claim.task_id, claim.attempt)
            self._recall()
            self._news.set()
            self._spawn(self._report_started(claim, elapsed_s))
        output = executor.output_so_far()
        if output.stdout or output.stderr:
            entry = (claim.task_id, claim.attempt, output.stdout, output.stderr, output.dropped_bytes)
            if entry not in self._logs:
                self._logs.append(entry)
                self._news.set()
        self._arm(min(left_s, LOG_PERIOD_S))

    async def _report_started(self, claim: Claim, elapsed_s: float) -> None:
        try:
            await self.context.store.started(
                self.slot_id, self.context.incarnation, [(claim.task_id, claim.attempt, elapsed_s)]
            )
        except StoreUnavailable:
            self._reported = None  # said again at the next look

    def _spawn(self, coroutine: "asyncio.Future[None] | object") -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
        _background.add(task)
        task.add_done_callback(_background.discard)

    async def _close(self, reason: str) -> str:
        """Tell the store that the slot has ended, for as long as that takes."""
        if self._ends or self._logs:
            if (await self._next(0)).word == "FENCED":
                return Ending.FENCED
        pause_s = STORE_PAUSE_S[0]
        while True:
            try:
                await self.context.store.close_slot(self.slot_id, self.context.incarnation, reason)
            except StoreUnavailable:
                if self._closing is Ending.FENCED:
                    return Ending.FENCED
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
            else:
                return reason


_background: set["asyncio.Future[None]"] = set()
"""Reports under way; without a reference the event loop may drop them."""


def _count(ends: tuple[End, ...], statuses: tuple[TaskStatus | None, ...]) -> None:
    for end, status in zip(ends, statuses, strict=False):
        if status in (TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED):
            TASKS.labels(status=status.value).inc()
            if end.duration_s is not None:
                TASK_DURATION.observe(end.duration_s)


def _ended_by(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}"
