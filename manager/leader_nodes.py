"""Nodes as the leading controller watches them: who is silent for a lease is declared lost, and its tasks go elsewhere.

Silence counts only while nodes could be heard: not while the store was away or slow, nor while this whole machine stood still.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

from manager.core.leadership import BeatWatch
from manager.core.model import ClusterState
from manager.log import get_logger
from manager.settings import Settings
from manager.store import Store

TICK_S: Final = 0.5
STAND_STILL_S: Final = 1.0
"""A timer that came so much later than it was due means that this process stood still."""

SLOW_S: Final = 1.0
"""A look that took so long was held up by the store, as the beats of the nodes were."""

log = get_logger("rocyard.controller")


class LeaderNodes:
    """Watches beats.

    Args:
        settings: with the lease.
        store: where nodes are declared lost.
        token: the leader's, 0 while this controller does not lead.
    """

    def __init__(self, settings: Settings, store: Store, token: Callable[[], int]) -> None:
        self._store = store
        self._token = token
        self._lease_s = settings.node.beat_s * settings.node.lease_beats
        self._watch = BeatWatch()
        self._heard_s: float | None = None
        self._deaf = False
        self._tick: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Notice from now on when this process stands still."""
        self._on_tick(time.monotonic())

    def stop(self) -> None:
        """The contrary."""
        if self._tick is not None:
            self._tick.cancel()

    def forget(self) -> None:
        """Another leads now: when this one does again, everybody's silence begins anew."""
        self._watch.keep(())
        self._heard_s, self._deaf = None, False

    def deaf(self) -> None:
        """The store could not be asked: since the last look that was answered, nobody could be heard either."""
        self._deaf = True

    def silence(self, state: ClusterState, asked_s: float, answered_s: float) -> dict[str, float]:
        """For how many seconds each node has been silent, by a look between these two moments."""
        if self._deaf and self._heard_s is not None:
            self._watch.forgive(answered_s - self._heard_s)
        elif answered_s - asked_s > SLOW_S:
            self._watch.forgive(answered_s - asked_s)
        self._heard_s, self._deaf = answered_s, False
        self._watch.keep(row.node for row in state.nodes)
        return {
            row.node: self._watch.silent_s(row.node, (row.incarnation, row.beat), asked_s, answered_s) for row in state.nodes
        }

    async def fence(self, state: ClusterState, silent_s: Mapping[str, float]) -> bool:
        """Declare lost who has been silent for too long; whether anybody was."""
        fenced = False
        for row in state.nodes:
            if row.left or row.fenced or silent_s[row.node] < self._lease_s:
                continue
            done, slots = await self._store.lost(self._token(), row.node, row.incarnation)
            if done:
                fenced = True
                log.warning("node_lost", node=row.node, incarnation=row.incarnation, silent_s=silent_s[row.node], slots=slots)
        return fenced

    def _on_tick(self, due_s: float) -> None:
        """Where a whole machine stood still, its nodes did as well, and are not to blame; a slow answer is no such time."""
        now_s = time.monotonic()
        if now_s - due_s > STAND_STILL_S:
            self._watch.forgive(now_s - due_s)
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick, now_s + TICK_S)
