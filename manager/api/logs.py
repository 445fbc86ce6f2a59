"""Logs of tasks as they are written: what is new since a cursor, and who waits for it.

However many follow a task, the store is asked about it once in a while for all of them, and only how long its log is. All logs
that are followed share a bound of such questions, so that they come more slowly the more there are.
"""

import asyncio
import codecs
import re
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from manager.api.ends import Ends
from manager.core.answers_tasks import TaskLog
from manager.core.errors import BadRequest, StoreUnavailable
from manager.store import Store
from manager.store.calls_tasks import KeptLog

LOOK_S: Final = 0.3
"""A follower sees a line this much later than who wrote it, at the most, beside what the agent takes."""
LOOKS_PER_S_MAX: Final = 200
_CURSOR: Final = re.compile(r"(\d{1,9})\.(\d{1,15})\.(\d{1,15})", re.ASCII)


class Cursor(msgspec.Struct, frozen=True):
    """How far somebody has read: of which attempt, and to which byte of each stream."""

    attempt: int
    stdout: int
    stderr: int


BEGINNING: Final = Cursor(0, 0, 0)


def parse_cursor(text: str) -> Cursor:
    """The cursor that `text` is.

    Raises:
        BadRequest: it is none.
    """
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise BadRequest(f"cursor: {text[:40]!r} is none; take it from the answer before, or leave it out.", field="cursor")
    return Cursor(*map(int, match.groups()))


def extent_of(log: KeptLog) -> Cursor:
    """How far the log goes."""
    return Cursor(log.attempt, log.stdout_dropped + len(log.stdout), log.stderr_dropped + len(log.stderr))


def log_since(task_id: str, log: KeptLog, cursor: Cursor, *, ended: bool) -> TaskLog:
    """What is new since `cursor`: all, where another attempt has begun to write."""
    if log.attempt != cursor.attempt:
        cursor = Cursor(log.attempt, 0, 0)
    out, out_at, out_missed = _since(log.stdout, log.stdout_dropped, cursor.stdout, ended=ended)
    err, err_at, err_missed = _since(log.stderr, log.stderr_dropped, cursor.stderr, ended=ended)
    return TaskLog(
        task_id=task_id,
        stdout=out,
        stderr=err,
        dropped_bytes=out_missed + err_missed,
        attempt=log.attempt,
        cursor=f"{log.attempt}.{out_at}.{err_at}",
        ended=ended,
    )


def _since(kept: bytes, dropped: int, seen: int, *, ended: bool) -> tuple[str, int, int]:
    """What is new, where it ends, and how many bytes before it are not kept.

    Of a character that is not complete yet the rest may follow: it is left for the next time.
    """
    new = kept[max(0, seen - dropped) :]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(new, final=ended)
    left = len(decoder.getstate()[0])
    return text, max(seen, dropped + len(kept) - left), max(0, dropped - seen)


class LogFollowers:
    """Who waits for news of which task's log.

    Args:
        store: asked how long logs are.
        ends: tells of tasks that end.
    """

    def __init__(self, store: Store, ends: Ends) -> None:
        self._store = store
        self._ends = ends
        self._waiting: dict[str, dict[asyncio.Future[None], Cursor]] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}

    async def until_new(self, task_id: str, seen: Cursor, wait_s: float, gone: Callable[[], Awaitable[None]]) -> None:
        """Return when the log goes further than `seen`, when the task has ended (or may have), or when `wait_s` is over.

        Raises:
            StoreUnavailable: the store does not answer.
            Disconnected: the peer is gone, as `gone` tells.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(task_id, {})
        waiting[future] = seen
        if task_id not in self._looking:
            self._looking[task_id] = asyncio.create_task(self._look(task_id, waiting))
        try:
            await self._ends.wait(future, wait_s, gone)
        finally:
            waiting.pop(future, None)
            if not waiting and self._waiting.get(task_id) is waiting:
                del self._waiting[task_id]
                self._looking.pop(task_id).cancel()

    async def _look(self, task_id: str, waiting: dict[asyncio.Future[None], Cursor]) -> None:
        """Look until nobody waits any more."""
        ended = self._ends.register(task_id)
        try:
            while not ended.done():
                extent = await self._store.log_extent(task_id)
                _wake([future for future, seen in waiting.items() if seen != Cursor(*extent)])
                await asyncio.wait({ended}, timeout=max(LOOK_S, len(self._looking) / LOOKS_PER_S_MAX))
            _wake(list(waiting))
        except StoreUnavailable as error:
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._ends.unregister(task_id, ended)
            if self._waiting.get(task_id) is waiting:  # who comes from here on needs another look
                del self._waiting[task_id], self._looking[task_id]


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
