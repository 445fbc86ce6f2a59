"""The executor of one slot and the batch that it works on: from claims to how each of them ended.

It starts the executor, replaces it when it has died, ends tasks that were cancelled or ran for too long, and keeps ends and
output until the runner has told the store. It claims nothing and commits nothing.
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

from manager.core.lifecycle import Outcome
from manager.core.model import Claim, End, MemoryNote, ProgressNote, ResultFile, TaskError
from manager.core.quantities import format_memory
from manager.core.shapes import Grant, Shape
from manager.core.wire import FRAME_BYTES_MAX, Batch, Call, Done, Note
from manager.log import get_logger
from manager.metrics import EXECUTOR_RESTARTS
from manager.results import ResultStore
from manager.settings import SlotSettings, TaskSettings
from manager.store import Store
from plugins.node.attempt_ends import GPU_OUT_OF_MEMORY, arguments_of, error_of, failed_as, kept_result, room_for
from plugins.node.attempt_notes import checked, merged
from plugins.node.executors import Executor, ExecutorStartError, Exit, Output, Pulse
from plugins.node.registry import FunctionSpec

LOOK_S: Final = 0.05
"""A task that runs for longer than this is said to have started, and what waits behind it in its batch goes back."""
LOG_PERIOD_S: Final = 1.0
NOTE_PERIOD_S: Final = 0.5
"""What running functions report is told to the store so often at most."""
STOP_GRACE_S_MAX: Final = 3.0
"""Of an agent that stops: less than the time in which it must be gone (`plugins.node.agent.STOP_S`)."""

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
        interpreter: environment id → (python, import path).
        environment: of an executor on these devices with this home directory.
        lease_s: an executor that has not seen the agent's pulse for so long ends itself.
        results: where results lie that are larger than `inline_bytes_max`.
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
    results: ResultStore
    inline_bytes_max: int


class TaskOutput(msgspec.Struct, frozen=True):
    """What an attempt has written so far."""

    task_id: str
    attempt: int
    output: Output


class LongTask(msgspec.Struct, frozen=True):
    """A task that turned out to be long: to be reported as started."""

    task_id: str
    attempt: int
    began_s: float


class SlotExecutor:
    """One slot's executor, and its successors.

    Attributes:
        ends: attempts that have ended and are not committed.
        outputs: output that is not kept yet.
        notes: what running attempts have reported, and the store does not know yet.
        long: the running task, once it is known to be long and until that is reported.
        news: set when any of these has changed, or when the batch is done.
        crashes: starts and executors that failed in a row, without a task done between.
    """

    def __init__(self, slot_id: str, grant: Grant, context: SlotContext) -> None:
        self.slot_id = slot_id
        self.grant = grant
        self.context = context
        self.ends: list[End] = []
        self.outputs: list[TaskOutput] = []
        self.notes: dict[str, ProgressNote] = {}
        self.long: LongTask | None = None
        self.news = asyncio.Event()
        self.crashes = 0
        self.run_s: float | None = None
        self._executor: Executor | None = None
        self._starting = asyncio.Lock()
        self._served = 0  # calls that this executor has ended
        self._claims: dict[str, Claim] = {}
        self._ending: tuple[Ending, str] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began_s = 0.0
        self._told: tuple[str, int] | None = None
        self._note: MemoryNote | None = None
        self._shape: Shape | None = None
        self._seen = TaskOutput("", 0, Output(b"", b""))
        self._note_timer: asyncio.TimerHandle | None = None
        self._noted_s = 0.0
        self._keeping: set[asyncio.Task[None]] = set()

    # --- the process --------------------------------------------------------------------------------------------

    @property
    def session(self) -> int | None:
        """Session id of all processes of the executor."""
        return self._executor.guard_pid if self._executor is not None else None

    async def start(self, shape: Shape) -> bool:
        """Have an executor; False where it does not start."""
        async with self._starting:
            if self._executor is not None:
                return True
            context = self.context
            python, path = context.interpreter(shape.environment)
            home = context.scratch / self.slot_id
            try:
                home.mkdir(parents=True, exist_ok=True)
                self._executor = await Executor.start(
                    python=python,
                    env=context.environment(self.grant.devices, home),
                    pulse=context.pulse,
                    lease_s=context.lease_s,
                    path=path,
                    log_bytes_max=context.tasks.log_bytes_max,
                    inline_bytes_max=min(context.inline_bytes_max, FRAME_BYTES_MAX // 2),
                    result_bytes_max=context.tasks.result_bytes_max,
                    on_done=self._on_done,
                    on_exit=self._on_exit,
                    on_note=self._on_note,
                )
            except (ExecutorStartError, OSError) as error:  # a full disk is no reason to lose the slot's claims
                self.crashes += 1
                log.error("executor_not_started", slot=self.slot_id, error=str(error))
                return False
            self._served = 0
            self._ending = None
            return True

    async def stop(self) -> None:
        """End it; returns when nothing of it is left, so that its memory is free, and its results are kept."""
        async with self._starting:
            if self._executor is not None:
                self.end(Ending.STOPPED)
                await self._executor.exited
        while self._keeping:
            await asyncio.wait(self._keeping)

    # --- the batch ----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a claim of the batch has not ended."""
        return bool(self._claims)

    async def begin(self, claims: tuple[Claim, ...], shape: Shape) -> None:
        """Have the claims run, one after the other; how each ended comes in `ends`."""
        runnable = [claim for claim in claims if self._known(claim)]
        self._shape = shape
        self._claims = {claim.task_id: claim for claim in runnable}
        if not runnable:
            return
        if runnable[0].alone and self._served:
            await self.stop()
        if not await self.start(shape) or self._executor is None:
            for claim in runnable:
                self._end(claim.task_id, Outcome.RETURNED)
            return
        self._began_s = time.monotonic()
        self._arm(LOOK_S)
        self._executor.send(Batch(tuple(self._call(claim) for claim in runnable)))

    def _known(self, claim: Claim) -> bool:
        function = self.context.functions.get(claim.spec.function)
        if function is not None and not function.error:
            return True
        why = function.error if function is not None else "no function of that name is registered on this node"
        error = TaskError("FunctionNotFound", f"{claim.spec.function}: {why}")
        outcome = failed_as(error.type, (), claim)
        self.ends.append(End(claim.task_id, claim.attempt, outcome, msgspec.json.encode(error), 0.0, 0.0))
        return False

    def _call(self, claim: Claim) -> Call:
        results = self.context.results
        place = results.place(claim.task_id, claim.attempt, self.slot_id)
        return Call(
            claim.task_id,
            claim.attempt,
            self.context.functions[claim.spec.function].target,
            arguments_of(claim),
            index=-1 if claim.index is None else claim.index,
            count=claim.spec.count,
            checkpoint=claim.checkpoint,
            folder=results.folder(claim.task_id),
            result_path="" if place is None else str(place),
        )

    def cancel(self, task_ids: set[str]) -> None:
        """The cancellation of these tasks was asked: what has not started goes back, what runs is ended."""
        if not task_ids & self._claims.keys():
            return
        self._recall()
        current = self._current_id()
        if current in task_ids:
            self._terminate(Ending.CANCELLED, current)

    def end(self, why: Ending) -> None:
        """End the executor, and with it whatever it runs: a task whose end can wait is given a moment to bring that about."""
        executor = self._executor
        if executor is None:
            return
        already, self._ending = self._ending, self._ending or (why, self._current_id())
        if why not in (Ending.PREEMPTED, Ending.STOPPED) or executor.started_at_s is None:
            executor.kill()
        elif why is Ending.STOPPED:
            self._recall()
            executor.terminate(min(self.context.tasks.grace_s, STOP_GRACE_S_MAX))
        elif already is None:  # else it is ending; each beat says so again
            self._recall()
            executor.terminate(self.context.tasks.grace_s)

    def exceeded(self, note: MemoryNote) -> None:
        """It has used more device memory than its slot leases: end it."""
        self._note = note
        self.end(Ending.MEMORY)

    def _current_id(self) -> str:
        current = self._executor.current if self._executor is not None else None
        return current.task_id if current is not None else ""

    def _terminate(self, why: Ending, task_id: str) -> None:
        if self._executor is not None and self._ending is None:
            self._ending = (why, task_id)
            self._executor.terminate(self.context.tasks.grace_s)

    def _recall(self) -> None:
        """Take back what has not started; nothing that the executor has taken can be among it."""
        if self._executor is not None:
            for call in self._executor.recall():
                self._end(call.task_id, Outcome.RETURNED)

    # --- answers ------------------------------------------------------------------------------------------------

    def _on_note(self, note: Note) -> None:
        """The running function has reported something: the store hears of it soon, and of a checkpoint as soon as of others."""
        news = checked(note)
        known = self.notes.get(note.task_id)
        self.notes[note.task_id] = merged(known, news) if known is not None else news
        self.tell_notes_soon()

    def tell_notes_soon(self) -> None:
        """Say that there is news of them, at their pace."""
        if self._note_timer is None:
            wait_s = self._noted_s + NOTE_PERIOD_S - time.monotonic()
            self._note_timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._tell_notes)

    def _tell_notes(self) -> None:
        self._note_timer = None
        self._noted_s = time.monotonic()
        self.news.set()

    def noted(self, told: Mapping[str, ProgressNote]) -> None:
        """The store knows these."""
        self.notes = {task_id: note for task_id, note in self.notes.items() if told.get(task_id) is not note}

    def _on_done(self, done: Done, output: Output) -> None:
        self.crashes = 0
        self._served += 1
        if output.stdout or output.stderr:
            self._keep(TaskOutput(done.task_id, done.attempt, output))
        if done.ok and done.file_sha256:
            self._keep_result(done)
        elif done.ok:
            self._end(done.task_id, Outcome.SUCCEEDED, done.result, done.duration_s)
        elif done.terminated:
            self._end_terminated(done.task_id, done.duration_s)
        else:
            self._end_failed(done)
        self.run_s = done.duration_s if self.run_s is None else self.run_s * 0.7 + done.duration_s * 0.3
        if self._claims:
            self._began_s = time.monotonic()
            self._arm(LOOK_S)
        if self._keeping:
            self.news.set()  # the last of its batch may take long to be kept: others do not wait for it

    def _on_exit(self, end: Exit) -> None:
        fresh = self._served == 0
        self._executor = None
        ended = ended_by(end.returncode)
        meant = end.asked and self._ending is not None
        if end.started is not None:
            out = end.output
            if out.stdout or out.stderr:
                self._keep(TaskOutput(end.started.task_id, end.started.attempt, out))
            if meant:
                self._end_terminated(end.started.task_id, None)
            else:
                error = TaskError("ExecutorCrashed", f"the executor {ended}")
                outcome = Outcome.CRASHED if fresh else Outcome.SUSPECTED
                self._end(end.started.task_id, outcome, msgspec.json.encode(error))
        for call in end.unstarted:
            self._end(call.task_id, Outcome.RETURNED)
        if not meant:
            self.crashes += 1
            log.warning("executor_crashed", slot=self.slot_id, ended=ended, fresh=fresh)
        EXECUTOR_RESTARTS.labels(reason=self._ending[0].value if meant and self._ending else "Crashed").inc()
        self._ending = None
        self.news.set()

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
            self._end_broken(claim, TaskError(why.value, message), duration_s)
        elif why is Ending.MEMORY and self._note is not None:
            self._end_broken(claim, TaskError(why.value, exceeded_text(self._note, self.grant)), duration_s)
        else:
            self._end(task_id, Outcome.LOST)

    def _end_broken(self, claim: Claim, error: TaskError, duration_s: float | None) -> None:
        """A limit was broken, or a result lost: a failure of which we know, and not the function."""
        self._end(claim.task_id, failed_as(error.type, (), claim), msgspec.json.encode(error), duration_s)

    def _end_failed(self, done: Done) -> None:
        """The function has failed by itself. A device without memory for it is tried once more with more of that."""
        claim = self._claims.get(done.task_id)
        if claim is None or self._shape is None:
            return
        failure = error_of(done.result)
        if failure.type == GPU_OUT_OF_MEMORY and not claim.more_memory:
            room = room_for(self._shape, self.grant)
            if room is not None:
                self._end(done.task_id, Outcome.OUT_OF_MEMORY, done.result, done.duration_s, room=room)
                return
        self._end(done.task_id, failed_as(failure.type, failure.bases, claim), done.result, done.duration_s)

    def _keep_result(self, done: Done) -> None:
        """A result lies in a file: once that is safe the task has succeeded. Other tasks of the batch go on meanwhile."""
        task = asyncio.create_task(self._kept(done))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def _kept(self, done: Done) -> None:
        claim = self._claims.get(done.task_id)
        if claim is None:
            return
        kept = await kept_result(self.context.results, done, self.slot_id)
        if isinstance(kept, TaskError):
            self._end_broken(claim, kept, done.duration_s)
        else:
            self._end(done.task_id, Outcome.SUCCEEDED, b"", done.duration_s, file=kept)
        self.news.set()

    def _end(
        self,
        task_id: str,
        outcome: Outcome,
        payload: bytes = b"",
        duration_s: float | None = None,
        *,
        file: ResultFile | None = None,
        room: tuple[str, Shape] | None = None,
    ) -> None:
        claim = self._claims.pop(task_id, None)
        if claim is None:
            return
        age_s = None
        if outcome is not Outcome.RETURNED:
            age_s = duration_s if duration_s is not None else time.monotonic() - self._began_s
        chance = random.random()  # noqa: S311  # jitter of a retry, not a secret
        self.ends.append(End(task_id, claim.attempt, outcome, payload, age_s, age_s, chance, file, room))
        if not self._claims:
            self._disarm()
            self.news.set()

    def _keep(self, output: TaskOutput) -> None:
        """The newest output of an attempt replaces what was there of it."""
        same = (output.task_id, output.attempt)
        self.outputs = [other for other in self.outputs if (other.task_id, other.attempt) != same]
        self.outputs.append(output)

    # --- a task that takes its time -----------------------------------------------------------------------------

    def _arm(self, delay_s: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The present task runs for a while: let others have what waits behind it, and mind its limit."""
        self._timer = None
        executor = self._executor
        claim = self._claims.get(self._current_id())
        if executor is None or claim is None:
            return
        began_s = executor.started_at_s
        if began_s is None:
            self._arm(LOOK_S)
            return
        left_s = claim.spec.time_limit_s - (time.monotonic() - began_s)
        if left_s <= 0:
            self._terminate(Ending.TIME_LIMIT, claim.task_id)
            return
        if self._told != (claim.task_id, claim.attempt):
            self._told = (claim.task_id, claim.attempt)
            self._recall()
            self.long = LongTask(claim.task_id, claim.attempt, began_s)
            self.news.set()
        written = TaskOutput(claim.task_id, claim.attempt, executor.output_so_far())
        if (written.output.stdout or written.output.stderr) and written != self._seen:
            self._seen = written
            self._keep(written)
            self.news.set()
        self._arm(min(left_s, LOG_PERIOD_S))


def ended_by(returncode: int) -> str:
    """How a process ended, by its status as `subprocess` has it, in words that follow its name."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}"


def exceeded_text(note: MemoryNote, grant: Grant) -> str:
    """What a person is told whose task took more device memory than its slot leases, and what would be right."""
    used, lease = format_memory(note.peak_bytes), format_memory(grant.memory_bytes)
    said = f"the task used {used} of a device, and its slot leases {lease} of it"
    if note.learned_bytes <= grant.memory_bytes:
        return f"{said}, and no more of it can be leased: it needs a larger device, or less memory"
    return f"{said}; ask for {format_memory(note.learned_bytes)} or more"
