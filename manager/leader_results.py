"""What the leading controller removes from the results store: files that no record names any more.

A record names a file that is there already, so a file without a record is left over: of an agent that died between the two, of
an attempt that was replaced, of a task that was forgotten. What a sweep has forgotten goes at once; a scan finds the rest,
whoever died when. Everything is removed on the word of the store to who leads it alone: a store that came back empty has no
leader.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from manager.core.errors import StoreUnavailable
from manager.core.lifecycle import FINAL, TaskStatus
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS, RESULTS_REMOVED
from manager.results import Leftover, ResultStore
from manager.results.store import Kind
from manager.store import Store
from manager.store.calls_leader import Kept

SCAN_S: Final = 3600.0
AGAIN_S: Final = 60.0
"""After a scan that failed: the results store is away, or the store."""
FIRST_SCAN_S: Final = 2.0
"""After a leader's first round: what was left when the one before it died need not lie there for an hour."""
AGE_S: Final = 3600.0
"""What is younger stays: nobody should have to think about what is just being written or read."""
FORGOTTEN_MAX: Final = 100_000
"""Names of files that wait to be removed; a scan finds those above."""
BATCH: Final = 500
PAUSE_S: Final = 0.5

log = get_logger("rocyard.results")


def is_left_over(found: Leftover, kept: Kept) -> bool:
    """Whether no record names it, or will ever name it.

    An attempt that runs by its record may commit its file at any time, however long its agent has not reached the store; one
    that is yet to come (the store is back from a backup) will write its own over it.
    """
    if kept.status is None:
        return True
    if kept.status in FINAL:
        return found.name != kept.file
    if found.kind is Kind.CHECKPOINTS:
        return False
    return found.attempt < kept.attempt or (found.attempt == kept.attempt and kept.status is not TaskStatus.RUNNING)


class LeaderResults:
    """Removes what is left over, beside the controller's rounds: a slow results store holds up nobody.

    Args:
        store: whose records say what is needed.
        results: where to look.
        token: the leader's, 0 while this controller does not lead.
    """

    def __init__(self, store: Store, results: ResultStore, token: Callable[[], int]) -> None:
        self._store = store
        self._results = results
        self._token = token
        self._forgotten: list[str] = []
        self._next_s: float | None = None

    def forget(self, names: Sequence[str]) -> None:
        """Have files removed whose records are gone."""
        self._forgotten += names[: FORGOTTEN_MAX - len(self._forgotten)]

    async def run(self) -> None:
        """Remove and scan, until cancelled."""
        while True:
            try:
                await self._step()
            except StoreUnavailable as error:
                log.warning("results_scan_without_store", error=str(error))
            except Exception:
                LOOP_ERRORS.labels(loop="results").inc()
                log.exception("loop_failed", loop="results")
            await asyncio.sleep(PAUSE_S)

    async def _step(self) -> None:
        if not self._token():
            self._next_s = None
            return
        now_s = time.monotonic()
        if self._next_s is None:
            self._next_s = now_s + FIRST_SCAN_S
        if self._forgotten:
            names, self._forgotten = self._forgotten[:BATCH], self._forgotten[BATCH:]
            RESULTS_REMOVED.labels(why="retention").inc(await self._results.remove(names))
        if now_s >= self._next_s:
            self._next_s = now_s + AGAIN_S
            try:
                await self.scan()
            except OSError as error:
                log.warning("results_not_scanned", error=str(error))
            else:
                self._next_s = now_s + SCAN_S

    async def scan(self) -> int:
        """Look at all that lies there once; how much was removed."""
        began_s, seen, removed = time.monotonic(), 0, 0
        async for batch in self._results.scan():
            seen += len(batch)
            old = [found for found in batch if found.age_s >= AGE_S]
            if not old:
                continue
            kept = await self._store.kept(self._token(), [found.task_id for found in old])
            if kept is None:
                break  # somebody else leads
            names = [found.name for found, record in zip(old, kept, strict=True) if is_left_over(found, record)]
            removed += await self._results.remove(names)
        if removed:
            RESULTS_REMOVED.labels(why="left_over").inc(removed)
            log.info("results_removed", seen=seen, removed=removed)
        log.debug("results_scanned", seen=seen, removed=removed, duration_s=round(time.monotonic() - began_s, 3))
        return removed
