"""A thousand tasks that several want to end, begin or give back in the same moment: each ends once, and all hear the same.

Who was first is the store's to say. So the judge asks for no order: it compares what anybody was answered with what is on
record when all is over, and sees to it that both orders have come in each pair that matters.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from manager.core.lifecycle import FINAL, Outcome, TaskStatus
from manager.core.model import Claim, NextReply
from manager.store import Store, StoreConnection
from tests.contract.store_harness import Agent, Lab, check_invariants, end

S = TaskStatus
RACES: Final = 1000
AT_ONCE: Final = 50
CONNECTIONS: Final = 8
OUTCOMES: Final = (Outcome.SUCCEEDED, Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETURNED, Outcome.LOST, Outcome.CANCELLED)


@dataclass
class Race:
    """One task, and what everybody was told of it."""

    task_id: str
    slot: str
    claim: Claim | None = None
    calls: list[Callable[[Store], Coroutine[Any, Any, None]]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    cancels: list[TaskStatus | None] = field(default_factory=list)
    commits: list[TaskStatus] = field(default_factory=list)
    attempts: set[int] = field(default_factory=set)


class Field:
    """The tasks that race at once, and the slots on which they may run."""

    def __init__(self, lab: Lab, agent: Agent, seed: random.Random) -> None:
        self.lab = lab
        self.agent = agent
        self.seed = seed
        self.races: dict[str, Race] = {}
        self.open: list[str] = []

    async def prepare(self) -> None:
        """Half of them are claimed, one slot for each; all may fail twice, and have an end."""
        tasks = await self.lab.submit(AT_ONCE, max_attempts=3, total_timeout_s=3600.0)
        self.open = list(await asyncio.gather(*(self.lab.open(self.agent) for _ in tasks)))
        self.races = {task: Race(task, slot) for task, slot in zip(tasks, self.open, strict=True)}
        for slot in self.open[: AT_ONCE // 2]:
            claim = await self.lab.claim(self.agent, slot)
            race = self.races[claim.task_id]
            race.slot, race.claim = slot, claim
            race.attempts.add(claim.attempt)

    def draw(self) -> None:
        """Two or more of what may happen to it, for each task."""
        spare = self.open[AT_ONCE // 2 :]
        for race in self.races.values():
            wanted = {"cancel", self.seed.choice(["end", "close", "claim"] if race.claim else ["claim", "cancel"])}
            wanted |= {kind for kind in ("cancel", "end", "claim", "late") if self.seed.random() < 0.3}
            if race.claim is None:
                wanted -= {"end", "close"}
            race.kinds = wanted
            for kind in sorted(wanted):
                race.calls += self._calls(kind, race, spare)

    def _calls(self, kind: str, race: Race, spare: list[str]) -> list[Callable[[Store], Coroutine[Any, Any, None]]]:
        agent = self.agent
        if kind == "cancel":

            async def cancel(store: Store) -> None:
                race.cancels.append(await store.cancel(race.task_id, "red"))

            return [cancel] * self.seed.randint(1, 3)
        if kind == "claim":
            slot = self.seed.choice(spare)

            async def claim(store: Store) -> None:
                self._take(await store.next(slot, agent.incarnation, 1, []))

            return [claim]
        if kind == "late":

            async def late(store: Store) -> None:
                await store.due()

            return [late] * 2
        if kind == "close":

            async def close(store: Store) -> None:
                await store.close_slot(race.slot, agent.incarnation, "Failed")

            return [close]
        assert race.claim is not None
        ended = end(race.claim, self.seed.choice(OUTCOMES))

        async def finish(store: Store) -> None:
            reply = await store.next(race.slot, agent.incarnation, 0, [ended])
            race.commits += [status for status in reply.statuses if status is not None]

        return [finish] * self.seed.randint(1, 2)  # sent twice, where it is thought that the answer was lost

    def _take(self, reply: NextReply) -> None:
        for claim in reply.claims:
            self.races[claim.task_id].attempts.add(claim.attempt)

    async def run(self, stores: list[Store]) -> None:
        """All calls of all tasks at once, in any order, over connections that do not wait for each other."""
        prefix = self.lab.store.keys.prefix
        for race in self.races.values():
            if "late" in race.kinds:  # the moment is now
                await self.lab.raw("HSET", self.lab.store.keys.task(race.task_id), "end_by", 1)
                await self.lab.raw("ZADD", f"{prefix}exp", 1, race.task_id)
        calls = [call for race in self.races.values() for call in race.calls]
        self.seed.shuffle(calls)
        await asyncio.gather(*(call(self.seed.choice(stores)) for call in calls))

    async def finish(self) -> dict[str, TaskStatus]:
        """What still lives is worked off, as agents would do it; how all of them ended."""
        lab = self.lab
        for _ in range(10):
            await lab.store.due()
            for slot in await self.slots() or [await lab.open(self.agent)]:
                reply = await lab.next(self.agent, slot, 16)
                told = await lab.store.cancels(slot)
                for claim in reply.claims:
                    race = self.races[claim.task_id]
                    new = claim.attempt not in race.attempts
                    assert not (new and race.cancels), f"claimed anew after its cancellation: {race}"
                    race.attempts.add(claim.attempt)
                    outcome = Outcome.CANCELLED if claim.task_id in told else Outcome.SUCCEEDED
                    (status,) = (await lab.next(self.agent, slot, 0, end(claim, outcome))).statuses
                    assert status is not None, race
                    race.commits.append(status)
            states = await self.states()
            if FINAL.issuperset(states.values()):
                return states
        raise AssertionError(f"not all have ended: {states}")

    async def slots(self) -> list[str]:
        return sorted(slot.decode() for slot in await self.lab.raw("SMEMBERS", f"{self.lab.store.keys.prefix}slots"))

    async def states(self) -> dict[str, TaskStatus]:
        found = await asyncio.gather(*(self.lab.store.status(task_id) for task_id in self.races))
        return {task_id: state for task_id, state in zip(self.races, found, strict=True) if state is not None}


@asynccontextmanager
async def connections(url: str) -> AsyncIterator[list[Store]]:
    async with AsyncExitStack() as stack:
        stores = [Store(StoreConnection(url, 5.0, f"test-{number}")) for number in range(CONNECTIONS)]
        for store in stores:
            stack.push_async_callback(store.connection.close)
            await store.ping()
        yield stores


async def test_whatever_happens_in_the_same_moment_a_task_ends_once(lab: Lab):
    seed = random.Random(45)
    agent = await lab.agent()
    await lab.lead()
    seen: Counter[tuple[str, str]] = Counter()
    async with connections(lab.url) as stores:
        for number in range(RACES // AT_ONCE):
            lanes = Field(lab, agent, seed)
            await lanes.prepare()
            lanes.draw()
            await lanes.run(stores)
            if number % 5 == 0:
                await check_invariants(lab.store)  # and when all is over, by `lab`: one event for each end, and all counters
            states = await lanes.finish()
            for race in lanes.races.values():
                judge(race, states[race.task_id])
                seen.update((kind, states[race.task_id].value) for kind in race.kinds)
            await asyncio.gather(*(lab.store.close_slot(slot, agent.incarnation, "test") for slot in await lanes.slots()))
    both = [(kind, state) for kind in ("end", "claim", "late") for state in ("SUCCEEDED", "CANCELLED")]
    assert all(seen[pair] > 10 for pair in (*both, ("late", "FAILED"), ("close", "CANCELLED"))), seen
    assert sum(count for (kind, _), count in seen.items() if kind == "cancel") == RACES


def judge(race: Race, state: TaskStatus) -> None:
    """Nobody was told of another end than the one on record, and success was committed at most once."""
    told = {status for status in (*race.cancels, *race.commits) if status in FINAL}
    assert told <= {state}, f"{state} on record: {race}"
    successes = race.commits.count(S.SUCCEEDED)
    assert successes == (state is S.SUCCEEDED), f"{successes} commits, {state} on record: {race}"
    assert None not in race.cancels, race
