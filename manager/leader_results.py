"""What the leading controller removes from the results store: files that no record names any more.

A record names a file that is there already, so a file without a record is left over: of an agent that died between the two, of
an attempt that was replaced, of a task that was forgotten. What a sweep has forgotten goes at once, by its name; a scan finds
the rest, whoever died when.

A scan takes what the store does not know for left over, which is right only if all that lies there is this cluster's. So it
removes nothing unless that is noted there (`ResultStore.owner`), and no other cluster has noted of late that it keeps results
there too (`guests`); and only on the word of the store to who leads it. A store that came back empty, and was made a new
cluster, has another identity than is noted: the files wait for its backup.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from manager.core.errors import StoreUnavailable
from manager.core.lifecycle import FINAL, TaskStatus
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS, RESULTS_REFUSED, RESULTS_REMOVED
from manager.results import Leftover, ResultStore
from manager.results.store import Kind
from manager.store import Store
from manager.store.calls_leader import Kept

SCAN_S: Final = 3600.0
AGAIN_S: Final = 60.0
"""After a scan that failed or broke off: the results store is away, or the store, or the leader's term may have ended."""
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

    An attempt that runs by its record may commit its file at any time, however long its agent has not reached the store. The
    number of one that is yet to come, or runs, may have been given before (the store is back from a backup or a failover): a
    file of that time, which bears another slot, stays until its task has ended.
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
        self._refusal = ""

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
            RESULTS_REFUSED.set(0)
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
                removed = await self.scan()
            except OSError as error:
                log.warning("results_not_scanned", error=str(error))
            else:
                if removed is not None:
                    self._next_s = now_s + SCAN_S

    async def scan(self) -> int | None:
        """Look at all that lies there once; how much was removed. None: it broke off, and is to be made again soon."""
        cluster = await self._store.identity()
        refusal = await self._why_not(cluster) if cluster else None
        if refusal is None:
            return None
        self._note(refusal, cluster)
        if not refusal:
            return await self._scan()
        if await self._results.owner() != cluster:
            await self._results.visit(cluster)  # its owner must not take for left over what is kept here from now on
        return 0

    async def _why_not(self, cluster: str) -> str | None:
        """Why a scan removes nothing; empty: all that lies there is the cluster's; None: that is to be asked again soon."""
        owner = await self._results.owner()
        if not owner:
            refusal = await self._why_not_claimed(cluster)
            if refusal != "":
                return refusal
            owner = await self._results.claim(cluster)
            if owner == cluster:
                log.info("results_claimed", cluster=cluster)
        if not owner:
            return None
        if owner != cluster:
            return f"it is marked as that of cluster {owner}"
        others = [guest for guest in await self._results.guests() if guest != cluster]
        return f"cluster {', '.join(others)} keeps results there too" if others else ""

    async def _why_not_claimed(self, cluster: str) -> str | None:
        """Why what bears no mark cannot be taken for the cluster's. Ids sort by time: the cluster's own tasks came after it."""
        seen, known = False, False
        async for batch in self._results.scan():
            before = next((found.name for found in batch if found.task_id < cluster), "")
            if before:
                return f"no cluster is marked there, and {before} is of a task from before this one was made"
            seen = True
            if not known:
                kept = await self._store.kept(self._token(), [found.task_id for found in batch])
                if kept is None:
                    return None
                known = any(record.status is not None for record in kept)
        return "" if known or not seen else "no cluster is marked there, and nothing in it is of a task that this one knows"

    def _note(self, refusal: str, cluster: str) -> None:
        """Say it once per change."""
        RESULTS_REFUSED.set(bool(refusal))
        if refusal and refusal != self._refusal:
            marker = self._results.marker(cluster)
            remedy = (
                "give each cluster a results.url of its own; or, if the store of these results was lost, restore its backup; "
                f"or, if they are given up, make {marker} the one file of its folder"
            )
            log.warning("results_not_ours", cluster=cluster, error=refusal, remedy=remedy)
        self._refusal = refusal

    async def _scan(self) -> int | None:
        began_s, seen, removed, whole = time.monotonic(), 0, 0, True
        async for batch in self._results.scan():
            seen += len(batch)
            old = [found for found in batch if found.age_s >= AGE_S]
            if not old:
                continue
            kept = await self._store.kept(self._token(), [found.task_id for found in old])
            if kept is None:
                whole = False  # somebody else leads, or this controller does not know whether it does
                break
            names = [found.name for found, record in zip(old, kept, strict=True) if is_left_over(found, record)]
            removed += await self._results.remove(names)
        if removed:
            RESULTS_REMOVED.labels(why="left_over").inc(removed)
            log.info("results_removed", seen=seen, removed=removed)
        log.debug("results_scanned", seen=seen, removed=removed, duration_s=round(time.monotonic() - began_s, 3))
        return removed if whole else None
