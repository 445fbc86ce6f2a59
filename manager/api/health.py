"""Routes for probes and Prometheus. They need no key and tell nothing of tasks or tenants."""

import asyncio
import time
from typing import Final

import msgspec

from manager import metrics
from manager.api.exchange import Call, Reply
from manager.api.operations import PUBLIC, Operation
from manager.api.watch import ClusterWatch
from manager.core.answers_cluster import Live, Readiness, StoreView
from manager.core.errors import StoreNew, StoreReplaced, StoreTooNew, StoreUnavailable
from manager.store import Store

CHECK_S: Final = 1.0
"""A probe's answer is this old at most: anybody may ask, and must not load the store by it."""
PROBE_S: Final = 1.5
"""A store that takes longer is not ready."""

_encode = msgspec.json.Encoder().encode


class HealthRoutes:
    """What these routes need.

    Args:
        store: the process's connection.
        watch: what is known of leader and nodes.
    """

    def __init__(self, store: Store, watch: ClusterWatch) -> None:
        self._store = store
        self._watch = watch
        self._last: Readiness | None = None
        self._last_s = float("-inf")

    async def livez(self, _call: Call) -> Reply:
        """The process answers."""
        return Reply(200, _encode(Live()))

    async def readyz(self, _call: Call) -> Reply:
        """Whether tasks can be accepted and are kept; what somebody should know of the store is told as well."""
        if self._last is None or time.monotonic() - self._last_s >= CHECK_S:
            self._last = await self._check()
            self._last_s = time.monotonic()
        return Reply(200 if self._last.ready else 503, _encode(self._last), None if self._last.ready else _RETRY)

    async def _check(self) -> Readiness:
        snapshot = self._watch.snapshot
        beating = snapshot.leader.beating if snapshot is not None else None
        nodes = len(snapshot.live()) if snapshot is not None else 0
        try:
            async with asyncio.timeout(PROBE_S):
                found = await self._store.durability()
        except (StoreUnavailable, TimeoutError) as error:
            refused = isinstance(error, StoreNew | StoreReplaced | StoreTooNew)
            detail = str(error) if refused else "The store does not answer; nothing can be accepted."
            store = StoreView(refused, "unknown")
            return Readiness(ready=False, store=store, leader_beating=None, nodes_live=0, detail=detail)
        return Readiness(
            ready=not found.faults,
            store=StoreView(True, found.fsync),
            leader_beating=beating,
            nodes_live=nodes,
            detail=" ".join(found.faults or found.warnings),
        )

    async def metrics(self, _call: Call) -> Reply:
        """All metrics of this process as text."""
        body, content_type = metrics.exposition()
        return Reply(200, body, content_type=content_type.encode())

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="livez", method="GET", path="/livez", access=PUBLIC, handler=self.livez,
                summary="Whether the process answers.", answer=Live,
            ),
            Operation(
                name="readyz", method="GET", path="/readyz", access=PUBLIC, handler=self.readyz,
                summary="Whether tasks can be accepted durably: 200, or 503 with what is wrong.", answer=Readiness,
            ),
            Operation(
                name="metrics", method="GET", path="/metrics", access=PUBLIC, handler=self.metrics,
                summary="Metrics for Prometheus.", answer_type="text/plain",
            ),
        )  # fmt: skip


_RETRY: Final = [(b"retry-after", b"1")]
