"""One open slot: claims tasks of its shape, has its executor run them, commits how they ended, until it is told to close.

It never throws an end away while its incarnation holds, and never claims while it cannot commit. Which tasks come is the
store's decision; what happens inside the executor is `SlotExecutor`'s.
"""

import asyncio
import contextlib
import time
from itertools import zip_longest
from typing import Final

from manager.core.errors import StoreFull, StoreUnavailable
from manager.core.lifecycle import FINAL, Outcome, TaskStatus
from manager.core.model import Claim, End, MemoryNote, NextReply
from manager.core.shapes import Grant, Shape
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS, TASK_DURATION, TASK_RETRIES, TASKS
from plugins.node.attempt_ends import discard_result
from plugins.node.slot_executor import Ending, SlotContext, SlotExecutor

BATCH_S: Final = 0.005
"""Tasks are claimed together as long as all of them together are expected to need less than this."""
BATCH_MAX: Final = 16
STORE_PAUSE_S: Final = (0.1, 1.0)
FAILED: Final = "ExecutorsFail"
DRAINED: Final = "Drain"

log = get_logger("rocyard.slot")


class SlotRunner:
    """One slot. Make it when the request is accepted, `run` it once the store has opened it.

    Attributes:
        shape: what it is leased to; None until the store has opened it.
        idle: whether it waits for work.
        finished: resolved with the reason when nothing of the slot is left.
    """

    def __init__(self, slot_id: str, grant: Grant, context: SlotContext) -> None:
        self.slot_id = slot_id
        self.grant = grant
        self.context = context
        self.shape: Shape | None = None
        self.idle = False
        self.finished: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.work = SlotExecutor(slot_id, grant, context)
        self._wake = asyncio.Event()
        self._closing: Ending | None = None
        self._note: MemoryNote | None = None
        self._draining = False

    @property
    def opened(self) -> bool:
        """Whether the store has it open."""
        return self.shape is not None

    @property
    def asked_bytes(self) -> int:
        """Memory on each device that its shape asks for; the lease may be larger, where the shape has learned."""
        return self.shape.memory_bytes if self.shape is not None else self.grant.memory_bytes

    @property
    def session(self) -> int | None:
        """Session id of all processes of its executor."""
        return self.work.session

    # --- what others tell it ------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be work, or a flag."""
        self._wake.set()

    def cancel(self, task_ids: set[str]) -> None:
        """The cancellation of these tasks was asked."""
        self.work.cancel(task_ids)

    def end(self, why: Ending) -> None:
        """End now: fenced, preempted, or the agent stops."""
        self._closing = why if self._closing is None or why is Ending.FENCED else self._closing
        self.work.end(why)
        self.work.news.set()
        self._wake.set()

    def drain(self) -> None:
        """End at the next task boundary: the agent is about to stop."""
        self._draining = True
        self._wake.set()

    def exceeded(self, note: MemoryNote) -> None:
        """The slot has used more than its lease for two readings in a row: it ends, and its shape learns."""
        log.warning("memory_exceeded", slot=self.slot_id, used_bytes=note.peak_bytes, lease_bytes=self.grant.memory_bytes)
        self._note = note
        self._closing = self._closing or Ending.MEMORY
        self.work.exceeded(note)
        self._wake.set()

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self, shape: Shape) -> None:
        """Serve until told to close."""
        self.shape = shape
        reason = "Failed"
        try:
            reason = await self._serve(shape)
        except Exception:
            LOOP_ERRORS.labels(loop="slot").inc()
            log.exception("loop_failed", loop="slot", slot=self.slot_id)
        finally:
            await self.work.stop()
            if reason != Ending.FENCED:
                reason = await self._close(reason)
            log.info("slot_closed", slot=self.slot_id, reason=reason)
            self.finished.set_result(reason)

    async def _serve(self, shape: Shape) -> str:
        starting = asyncio.create_task(self.work.start(shape))  # while the first claim is under way
        try:
            while self._closing is None and not self._draining:
                self._wake.clear()
                reply = await self._next(self._batch_size())
                match reply.word:
                    case "WORK":
                        await self._work(reply.claims, shape)
                        if self.work.crashes >= self.context.slots.executor_crashes_max:
                            return FAILED
                    case "IDLE":
                        self.idle = True
                        await self._wake.wait()
                        self.idle = False
                    case word:
                        return Ending.FENCED if word == "FENCED" else word.capitalize()
            return self._closing or DRAINED
        finally:
            await asyncio.wait({starting})

    def _batch_size(self) -> int:
        run_s = self.work.run_s
        return 1 if run_s is None else max(1, min(BATCH_MAX, int(BATCH_S / max(run_s, 1e-6))))

    async def _work(self, claims: tuple[Claim, ...], shape: Shape) -> None:
        """Run a batch. What ends before the batch does is committed at once where something in it takes long."""
        work = self.work
        work.news.clear()
        await work.begin(claims, shape)
        if self._closing is not None:  # it was said while the executor was starting
            work.end(self._closing)
        while work.busy:
            await work.news.wait()
            work.news.clear()
            if work.busy:
                await self._report_long()
                await self._report_notes()
                if (work.ends or work.outputs) and (await self._next(0)).word == "FENCED":
                    self.end(Ending.FENCED)

    async def _report_long(self) -> None:
        long, self.work.long = self.work.long, None
        if long is None:
            return
        started = [(long.task_id, long.attempt, time.monotonic() - long.began_s)]
        try:
            await self.context.store.started(self.slot_id, self.context.incarnation, started)
        except StoreUnavailable as error:
            log.warning("start_not_reported", slot=self.slot_id, task=long.task_id, error=str(error))

    async def _report_notes(self) -> None:
        try:
            await self._tell_notes()
        except StoreUnavailable as error:
            log.warning("notes_not_reported", slot=self.slot_id, error=str(error))
            self.work.tell_notes_soon()

    async def _tell_notes(self) -> None:
        """Tell the store what running functions have reported; raises StoreUnavailable."""
        notes = dict(self.work.notes)
        if notes:
            with contextlib.suppress(StoreFull):  # it has no room for what only helps: ends must pass
                await self.context.store.progress(self.slot_id, self.context.incarnation, notes.values())
            self.work.noted(notes)

    # --- the store ----------------------------------------------------------------------------------------------

    async def _next(self, n: int) -> NextReply:
        """Commit what has ended and claim `n`; waits for as long as the store is away."""
        pause_s = STORE_PAUSE_S[0]
        store = self.context.store
        while True:
            ends, outputs = tuple(self.work.ends), tuple(self.work.outputs)
            try:
                await self._tell_notes()  # before the end of their attempt: the next one is to find its checkpoint
                for out in outputs:
                    await store.keep_log(out.task_id, out.attempt, *out.output)
                reply = await store.next(self.slot_id, self.context.incarnation, n, ends)
            except StoreUnavailable as error:
                if self._closing is Ending.FENCED:
                    return NextReply("FENCED", (), ())
                log.warning("store_unavailable", slot=self.slot_id, ends=len(ends), error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
                continue
            del self.work.ends[: len(ends)]
            self.work.outputs = [out for out in self.work.outputs if out not in outputs]
            _count(ends, reply.statuses)
            await self._discard(ends, reply.statuses)
            return reply

    async def _discard(self, ends: tuple[End, ...], statuses: tuple[TaskStatus | None, ...]) -> None:
        """Remove the results of ends that came too late, and of these only what no record names: an end that was sent twice
        seems to have come too late when only its answer has.
        """
        late = [end for end, status in zip_longest(ends, statuses) if end is not None and status is None]
        for end in late:
            if end.file is None:
                continue
            try:
                record = await self.context.store.task(end.task_id)
            except StoreUnavailable:  # the leader's scan finds it
                continue
            if record is None or record.result_file is None or record.result_file.name != end.file.name:
                await discard_result(self.context.results, end.file)

    async def _close(self, reason: str) -> str:
        """Tell the store that the slot has ended, for as long as that takes."""
        pause_s = STORE_PAUSE_S[0]
        store, incarnation = self.context.store, self.context.incarnation
        while self._closing is not Ending.FENCED:
            try:
                if self._note is not None:
                    # Before the end of its task is told: where that is tried again, no slot may take it that leases less.
                    await store.note_memory(incarnation, [self._note])
                if (self.work.ends or self.work.outputs) and (await self._next(0)).word == "FENCED":
                    return Ending.FENCED
                await store.close_slot(self.slot_id, incarnation, reason)
            except StoreUnavailable:
                await asyncio.sleep(pause_s)
                pause_s = min(STORE_PAUSE_S[1], pause_s * 2)
            else:
                return reason
        return Ending.FENCED


def _count(ends: tuple[End, ...], statuses: tuple[TaskStatus | None, ...]) -> None:
    for end, status in zip(ends, statuses, strict=False):
        if status in FINAL:
            TASKS.labels(status=str(status)).inc()
            if end.duration_s is not None:
                TASK_DURATION.observe(end.duration_s)
        elif status is not None and end.outcome is not Outcome.RETURNED:
            TASK_RETRIES.labels(reason=end.outcome.name.lower()).inc()
