"""A direct slot: one Dask task of somebody's, in an executor process of its own. It claims nothing and commits nothing.

It is a slot like others to the store, the report, the devices' readings and the agent's table; its work and its outcome are
files of the Dask worker's, which the agent never reads. Nothing of it outlives the connection that asked for it.
"""

import asyncio
import signal
from typing import Final

import msgspec

from manager.core import wire
from manager.core.errors import StoreUnavailable
from manager.core.functions import DEFAULT_ENVIRONMENT
from manager.core.model import MemoryNote
from manager.core.quantities import KIB
from manager.core.wire import Batch, Call, Done
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS
from plugins.node.executors import Executor, ExecutorStartError, Exit, Output
from plugins.node.link import DirectEnded, DirectOutcome, OpenDirect
from plugins.node.slot_executor import Ending, SlotContext, ended_by, exceeded_text

TARGET: Final = "plugins.node.functions.direct:run_call"
STORE_PAUSE_S: Final = (0.1, 1.0)
NO_OUTPUT: Final = Output(b"", b"")

log = get_logger("rocyard.direct")


class DirectRunner:
    """One direct slot. Make it when the request is accepted, then `run` it.

    `starts` is the node's: many processes that start at once start no sooner, and keep the agent from its other work.

    Attributes:
        opened: whether the store has it open.
        idle: never; slots of the other kind are.
        finished: resolved with the reason when nothing of it is left.
        outcome: how it ended, once it is finished.
    """

    idle = False

    def __init__(self, request: OpenDirect, context: SlotContext, starts: asyncio.Semaphore) -> None:
        self._starts = starts
        self.slot_id = request.slot_id
        self.request = request
        self.grant = request.grant
        self.context = context
        self.opened = False
        self.finished: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.outcome = DirectEnded(DirectOutcome.AGAIN, "the node's agent failed", opened=False)
        self._executor: Executor | None = None
        self._why: Ending | None = None
        self._note: MemoryNote | None = None
        self._done: Done | None = None
        self._exit: Exit | None = None
        self._output = NO_OUTPUT
        self._ended = asyncio.Event()

    # --- what others tell it ------------------------------------------------------------------------------------

    @property
    def asked_bytes(self) -> int:
        """Memory that was asked for on each device."""
        return self.grant.memory_bytes

    @property
    def session(self) -> int | None:
        """Session id of all its processes."""
        return self._executor.guard_pid if self._executor is not None else None

    def end(self, why: Ending) -> None:
        """End now: fenced, pre-empted, its worker is lost, or the agent stops."""
        self._why = why if self._why is None or why is Ending.FENCED else self._why
        self._ended.set()
        if self._executor is not None:
            self._executor.kill()

    def drain(self) -> None:
        """It ends with its task; a drain has a deadline for those that take too long."""

    def wake(self) -> None:
        """There is no work but its own."""

    def end_gently(self) -> None:
        """Nobody wants its outcome: let the task know, and kill it if it does not end soon."""
        if self._why is None:
            self._why = Ending.CANCELLED
            if self._executor is not None:
                self._executor.terminate(self.context.tasks.grace_s)
            else:
                self._ended.set()

    def exceeded(self, note: MemoryNote) -> None:
        """It has used more than its lease for two readings in a row."""
        log.warning("memory_exceeded", slot=self.slot_id, used_bytes=note.peak_bytes, lease_bytes=self.grant.memory_bytes)
        self._note = note
        self.end(Ending.MEMORY)

    # --- its life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """From the store's word to the slot's end."""
        try:
            if refusal := await self._open():
                self.outcome = DirectEnded(DirectOutcome.AGAIN, refusal, opened=False)
            else:
                log.info("slot_opened", slot=self.slot_id, devices=self.grant.devices, kind="direct")
                self.outcome = await self._execute()
        except Exception:
            LOOP_ERRORS.labels(loop="direct").inc()
            log.exception("loop_failed", loop="direct", slot=self.slot_id)
        finally:
            await self._stop()
            reason = self.outcome.outcome.value
            if self.opened:
                await self._close(reason)
            log.info("slot_closed", slot=self.slot_id, reason=reason, detail=self.outcome.detail)
            self.finished.set_result(reason)

    async def _open(self) -> str:
        """Have the store note it: why not, or nothing."""
        store = self.context.store
        pause_s = STORE_PAUSE_S[0]
        unsure = False  # the store may have noted it, and nobody but us would ever close it: its answer must be had
        while self._why is None or (unsure and self._why is not Ending.FENCED):
            try:
                word = await store.open_direct(self.slot_id, self.context.incarnation, self.grant)
            except StoreUnavailable:
                unsure = True
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
                continue
            self.opened = word in {"OK", "ADOPTED"}
            return "" if self.opened else word.capitalize()
        return self._why.value

    async def _execute(self) -> DirectEnded:
        """Run the call in a process of its own."""
        context = self.context
        python, path = context.interpreter(DEFAULT_ENVIRONMENT)
        home = context.scratch / self.slot_id
        home.mkdir(parents=True, exist_ok=True)
        try:
            async with self._starts:
                if self._why is not None:
                    return self._ended_as()
                self._executor = executor = await Executor.start(
                    python=python,
                    env=context.environment(self.grant.devices, home),
                    pulse=context.pulse,
                    lease_s=context.lease_s,
                    path=path,
                    log_bytes_max=context.tasks.log_bytes_max,
                    inline_bytes_max=KIB,  # of the answer on the wire; the result goes into a file, and has no limit
                    on_done=self._on_done,
                    on_exit=self._on_exit,
                )
        except ExecutorStartError as error:
            return DirectEnded(DirectOutcome.CRASHED, str(error))
        if self._why is None:
            arguments = {"call": self.request.call_path, "result": self.request.result_path}
            executor.send(Batch((Call(self.slot_id, 1, TARGET, msgspec.json.encode(arguments)),)))
            await self._ended.wait()
        await self._stop()
        return self._ended_as()

    def _on_done(self, done: Done, output: Output) -> None:
        self._done, self._output = done, output
        self._ended.set()

    def _on_exit(self, end: Exit) -> None:
        self._exit = end
        if self._why is None and end.returncode == -signal.SIGKILL and self.context.pulse.stood_still(self.context.lease_s):
            self._why = Ending.STOPPED  # it has ended itself because this agent was silent: that is not the task's fault
        if self._done is None:
            self._output = end.output
        self._ended.set()

    def _ended_as(self) -> DirectEnded:
        done, out = self._done, self._output
        returned = done is not None and done.ok and msgspec.json.decode(done.result, type=bool)
        if returned or (done is not None and done.ok and self._why is None):
            outcome, detail = DirectOutcome.DONE, ""
        elif self._why is Ending.MEMORY and self._note is not None:
            outcome, detail = DirectOutcome.MEMORY, exceeded_text(self._note, self.grant)
        elif self._why is not None:
            outcome, detail = DirectOutcome.AGAIN, self._why.value
        elif done is not None:
            failure = wire.decode_failure(done.result)
            outcome, detail = DirectOutcome.CRASHED, f"the executor could not run it: {failure.type}: {failure.message}"
        else:
            ended = ended_by(self._exit.returncode) if self._exit is not None else "ended"
            outcome, detail = DirectOutcome.CRASHED, f"the process of the task {ended} (slot {self.slot_id})"
        return DirectEnded(outcome, detail, stdout=out.stdout, stderr=out.stderr)

    async def _stop(self) -> None:
        """Nothing of it is left afterwards, so that its memory is free."""
        if self._executor is not None:
            self._executor.kill()
            await self._executor.exited

    async def _close(self, reason: str) -> None:
        """Tell the store, for as long as that takes."""
        pause_s = STORE_PAUSE_S[0]
        while self._why is not Ending.FENCED:
            try:
                await self.context.store.close_slot(self.slot_id, self.context.incarnation, reason)
            except StoreUnavailable:
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
            else:
                return
