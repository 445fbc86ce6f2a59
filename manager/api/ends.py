"""Ends of tasks: one reader of the store's event stream for the whole process, and who waits for them.

The stream only notifies. A waiter is registered before the record is read, so nothing falls between; when the reader has
lost its connection, and every few seconds besides, the records of all waiters are read again. Final states never change,
so what was seen to end is remembered, within bounds, and answered without asking the store.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from manager.api.exchange import Disconnected
from manager.core.answers_tasks import view_of
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.model import TaskEvent, TaskRecord, TaskSpec
from manager.store import Store

REMEMBERED_MAX: Final = 20_000
"""Tasks that are remembered: with small results about 1 KiB each, and never more than 100 MiB in all."""
BODY_BYTES_MAX: Final = 5 * 1024
"""A larger answer is not remembered; results above 4 KiB are not in the event either."""
BLOCK_MS: Final = 2000
REREAD_S: Final = 5.0
"""A notice that was lost costs this long, not the answer."""
REREAD_AT_ONCE: Final = 100
PATIENCE_S: Final = 2.0
"""A wait that is longer also watches whether the peer is still there."""

_NO_ARGS: Final = msgspec.Raw(b"{}")

_encode = msgspec.json.Encoder().encode


class Remembered:
    """A task that this process submitted, or has seen to be final."""

    __slots__ = ("body", "event", "since", "spec", "submitted_ms", "task_id", "tenant")

    def __init__(self, task_id: str, tenant: str, spec: TaskSpec | None, submitted_ms: int, since: int) -> None:
        self.task_id = task_id
        self.tenant = tenant
        self.spec = spec
        self.submitted_ms = submitted_ms
        self.since = since  # the reader's connection at that time: its end would have been seen while that lasts
        self.event: TaskEvent | None = None
        self.body: bytes | None = None

    def final_body(self, shape_id: str = "") -> bytes | None:
        """The task's JSON, if its end is known well enough to write it without reading the record."""
        if self.body is None and self.event is not None and self.spec is not None:
            event, self.event = self.event, None
            # Only a success in the first attempt says what the counters of failures, crashes and losses are.
            if event.status is TaskStatus.SUCCEEDED and event.attempt == 1 and event.inline:
                record = TaskRecord(
                    task_id=self.task_id,
                    status=event.status,
                    tenant=self.tenant,
                    function=self.spec.function,
                    shape_id=shape_id,
                    attempt=event.attempt,
                    node=event.node,
                    created_ms=self.submitted_ms,
                    queued_ms=self.submitted_ms,
                    started_ms=event.started_ms,
                    finished_ms=event.finished_ms,
                    spec=self.spec,
                    result=event.result,
                )
                self.body = _encode(view_of(record))
            self.spec = None
        return self.body


class Ends:
    """Who waits for which task, and what is known to have ended.

    Args:
        read: the record of a task.
        reader: a store over a connection of its own: reading the stream blocks it.
    """

    def __init__(self, read: Callable[[str], Awaitable[TaskRecord | None]], reader: Store) -> None:
        self._read = read
        self._reader = reader
        self._remembered: dict[str, Remembered] = {}
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._after = ""
        self._connection = 0  # counts connections of the reader; 0 is none yet
        self._live = False
        self._closing = False

    # --- what is remembered -------------------------------------------------------------------------------------

    def submitting(self, task_id: str, tenant: str, spec: TaskSpec, now_ms: int) -> None:
        """A task is about to be submitted: its end may come before the answer to its submission."""
        if spec.after or spec.retry_on:  # its queue is entered later than it is submitted; or it is long
            return
        light = msgspec.structs.replace(spec, args=_NO_ARGS)
        self._remember(Remembered(task_id, tenant, light, now_ms, self._connection if self._live else -1))

    def forget(self, task_id: str) -> None:
        """It was not accepted."""
        self._remembered.pop(task_id, None)

    def keep(self, record: TaskRecord, body: bytes) -> None:
        """Remember the answer for a task that was read and is final."""
        if record.status in FINAL and len(body) <= BODY_BYTES_MAX:
            known = Remembered(record.task_id, record.tenant, None, 0, -1)
            known.body = body
            self._remember(known)

    def known(self, task_id: str, tenant: str) -> Remembered | None:
        """What is remembered of a task of the tenant."""
        found = self._remembered.get(task_id)
        return found if found is not None and found.tenant == tenant else None

    def goes_on(self, known: Remembered) -> bool:
        """Whether the task has not ended: it was submitted while the reader was connected, as it still is, and no end came."""
        return self._live and known.since == self._connection and known.spec is not None

    def _remember(self, known: Remembered) -> None:
        remembered = self._remembered
        if len(remembered) >= REMEMBERED_MAX:
            remembered.pop(next(iter(remembered)))
        remembered[known.task_id] = known

    # --- waiting ------------------------------------------------------------------------------------------------

    def register(self, task_id: str) -> asyncio.Future[None]:
        """A future that is done when the task has ended, or may have."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closing:
            future.set_result(None)
        self._waiters.setdefault(task_id, []).append(future)
        return future

    def unregister(self, task_id: str, future: asyncio.Future[None]) -> None:
        """The waiter waits no more."""
        waiting = self._waiters.get(task_id)
        if waiting is not None and future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._waiters[task_id]

    async def wait(self, future: asyncio.Future[None], wait_s: float, gone: Callable[[], Awaitable[None]]) -> None:
        """Return when `future` is done or `wait_s` has passed.

        Raises:
            Disconnected: the peer is gone, as `gone` tells.
        """
        patience = _Patience(future, wait_s, gone)
        try:
            await future
        finally:
            patience.end()

    def release(self) -> None:
        """The process ends: every waiter gets its task as it is now."""
        self._closing = True
        for waiting in self._waiters.values():
            for future in waiting:
                _done(future)

    # --- the reader ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Read the stream until the connection breaks.

        Raises:
            StoreUnavailable: it broke; call again.
        """
        try:
            if self._after:
                await self._reader.ping()
            else:
                self._after = await self._reader.last_event()
            self._connection += 1
            self._live = True
            await self.reread(list(self._waiters))
            while True:
                self._after, events = await self._reader.events(self._after, BLOCK_MS)
                for event in events:
                    self._ended(event)
        finally:
            self._live = False

    async def sweep(self) -> None:
        """Read the records of those again who have waited since the last sweep, every `REREAD_S`."""
        waited: set[str] = set()
        while True:
            await asyncio.sleep(REREAD_S)
            await self.reread([task_id for task_id in self._waiters if task_id in waited])
            waited = set(self._waiters)

    async def reread(self, task_ids: list[str]) -> None:
        """Wake the waiters of those tasks that have ended, or are gone.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        for at in range(0, len(task_ids), REREAD_AT_ONCE):
            part = task_ids[at : at + REREAD_AT_ONCE]
            for task_id, record in zip(part, await asyncio.gather(*map(self._read, part)), strict=True):
                if record is None or record.status in FINAL:
                    self._wake(task_id)

    def _ended(self, event: TaskEvent) -> None:
        known = self._remembered.get(event.task_id)
        if known is not None and known.body is None:
            known.event = event
        self._wake(event.task_id)

    def _wake(self, task_id: str) -> None:
        waiting = self._waiters.pop(task_id, None)
        if waiting is not None:
            for future in waiting:
                _done(future)


class _Patience:
    """Ends a wait after its time. One that is long watches, after a moment, whether the peer is still there."""

    __slots__ = ("_future", "_gone", "_loop", "_rest_s", "_timer", "_watcher")

    def __init__(self, future: asyncio.Future[None], wait_s: float, gone: Callable[[], Awaitable[None]]) -> None:
        self._future = future
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._rest_s = wait_s - PATIENCE_S
        self._watcher: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(min(wait_s, PATIENCE_S), self._first)

    def _first(self) -> None:
        if self._rest_s <= 0:
            _done(self._future)
            return
        self._watcher = self._loop.create_task(_end_when(self._gone, self._future))
        self._timer = self._loop.call_later(self._rest_s, _done, self._future)

    def end(self) -> None:
        """The wait is over."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _end_when(gone: Callable[[], Awaitable[None]], future: asyncio.Future[None]) -> None:
    await gone()
    if not future.done():
        future.set_exception(Disconnected())
