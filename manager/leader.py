"""Leadership among the processes of one role: one holds a token, and every write of its bears it.

A candidate takes over when the holder resigned, or when the holder's beat has not changed for one term on the candidate's
own clock. A leader trusts itself only for a part of the term, counted from the start of its last renewal that worked.
"""

import math
import time
from collections.abc import Callable
from typing import Final

from manager.core.errors import StoreUnavailable
from manager.core.leadership import BeatWatch
from manager.log import get_logger
from manager.metrics import LEADER
from manager.store import Store

TRUST_RATIO: Final = 0.8
"""Part of a term for which a leader believes in itself: it must stop before anybody else can start."""

log = get_logger("rocyard.leader")


class Leadership:
    """One candidate.

    Args:
        store: where the term lies.
        holder: names this process, new with each start.
        term_s: a leader that is silent for this long is replaced.
        role: empty among controllers; each other role has a leader of its own.
        clock: monotonic seconds.
    """

    def __init__(
        self, store: Store, holder: str, term_s: float, role: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store
        self.holder = holder
        self.term_s = term_s
        self.role = role
        self.clock = clock
        self.token = 0
        self._watch = BeatWatch()
        self._trusted_until_s = 0.0
        self._stands_back_until_s = -math.inf

    @property
    def leads(self) -> bool:
        """Whether this process may act as leader now."""
        return self.token > 0 and self.clock() < self._trusted_until_s

    async def step(self) -> bool:
        """Renew the term, or try to get it. Whether this process leads afterwards."""
        began_s = self.clock()
        try:
            if self.token:
                renewed, *_ = await self.store.lead(self.holder, self.token, 0, "renew", self.role)
                if renewed:
                    self._trust(began_s)
                else:
                    self._lose("replaced")
            elif began_s >= self._stands_back_until_s:
                await self._try(began_s)
        except StoreUnavailable:
            if self.token and not self.leads:
                self._lose("store unavailable")
        return self.leads

    async def _try(self, began_s: float) -> None:
        _, token, beat, holder = await self.store.lead(self.holder, 0, 0, "read", self.role)
        silent_s = self._watch.silent_s("leader", (token, beat, holder), began_s, self.clock())
        if holder and silent_s < self.term_s:
            return
        taken, token, *_ = await self.store.lead(self.holder, token, beat, "take", self.role)
        if taken:
            self.token = token
            self._trust(began_s)
            self._show(leads=True)
            log.info("leadership_taken", token=token, holder=self.holder, silent_s=round(silent_s, 3))

    def _show(self, *, leads: bool) -> None:
        """The metric is about controllers: an autoscaler that leads must not hide that none of them does."""
        if not self.role:
            LEADER.set(leads)

    def _trust(self, began_s: float) -> None:
        self._trusted_until_s = began_s + self.term_s * TRUST_RATIO

    def _lose(self, reason: str) -> None:
        log.warning("leadership_lost", token=self.token, reason=reason)
        self.token = 0
        self._show(leads=False)

    async def give_way(self, seconds: float) -> None:
        """Give the term back, and do not ask for it for so long: another candidate may do better."""
        self._stands_back_until_s = self.clock() + seconds
        await self.resign()

    async def resign(self) -> None:
        """Give the term back, so that the next start need not wait for its end."""
        if self.token:
            try:
                await self.store.lead(self.holder, self.token, 0, "resign", self.role)
                log.info("leadership_resigned", token=self.token)
            except StoreUnavailable as error:
                log.warning("leadership_not_resigned", error=str(error))
            self.token = 0
            self._show(leads=False)
