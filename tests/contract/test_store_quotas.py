"""Quotas of tenants: checked where a task is claimed, counted exactly, and nobody whom they keep waiting is forgotten.

The walk at the end plays random histories of one tenant against a count of its own: never over a limit, never a slot that could
work and was not told.  ``SEEDS=500 python -m pytest tests/contract/test_store_quotas.py -k walk`` runs more.
"""

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from manager.core.lifecycle import Outcome, SlotFlag, TaskStatus
from manager.core.model import Claim, TenantRow, priority_of
from manager.core.quantities import GIB
from manager.leader_shares import LeaderShares
from manager.settings import Settings, TenantSettings
from manager.store.calls import IDS_MAX
from tests.contract.store_harness import RED, Agent, Lab, StoreServer, Violation, check_invariants, connected, end, granted

SEEDS = 12
STEPS = 120


async def limit(lab: Lab, **limits: int) -> None:
    """Set the limits of the tenant red, and no others."""
    if not lab.token:
        await lab.lead()
    assert await lab.store.share(lab.token, [TenantRow(tenant="red", **limits)], [])


async def opened(lab: Lab, agent: Agent, memory_gib: int = 1, gpus: int = 1) -> str:
    """A slot of the shape that asks for so much, on so many devices."""
    slot = await lab.request(await shape(lab, memory_gib))
    grant = granted(agent.node, *(f"gpu-{i}" for i in range(gpus)), memory_bytes=memory_gib * GIB)
    assert (await lab.store.open_slot(slot, agent.incarnation, grant)).word == "OK"
    return slot


async def shape(lab: Lab, memory_gib: int) -> str:
    """The id of a shape that at least one task has."""
    task = await lab.one(memory_gib=memory_gib)
    record = await lab.record(task)
    await lab.store.cancel(task, "red")
    return record.shape_id


async def use(lab: Lab) -> TenantRow:
    (row,) = (await lab.store.look(leader=False)).tenants
    return row


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"running_max": 2}, id="tasks"),
        pytest.param({"gpus_max": 2}, id="devices"),
        pytest.param({"memory_bytes_max": 2 * GIB}, id="memory"),
        pytest.param({"running_max": 2, "gpus_max": 9, "memory_bytes_max": 99 * GIB}, id="the least of them"),
    ],
)
async def test_a_claim_over_the_quota_waits_and_is_woken_by_the_next_end(lab: Lab, limits: dict[str, int]):
    agent = await lab.agent()
    slots = [await opened(lab, agent) for _ in range(3)]
    await limit(lab, **limits)
    await lab.submit(5)
    claims = [await lab.claim(agent, slot) for slot in slots[:2]]
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert (await lab.next(agent, slots[2])).word == "IDLE"
        assert await heard.all(lab) == []
        row = await use(lab)
        assert (row.running, row.gpus, row.memory_bytes) == (2, 2, 2 * GIB)
        assert (await lab.next(agent, slots[0], 0, end(claims[0]))).word == "OK"
        assert await heard.all(lab) == [f"work {slots[2]}"]
    await lab.claim(agent, slots[2])


async def test_no_limit_is_none(lab: Lab):
    agent = await lab.agent()
    await lab.submit(4)
    for _ in range(4):
        await lab.claim(agent, await opened(lab, agent))
    assert (await use(lab)).running == 4


async def test_a_batch_takes_no_more_than_is_left(lab: Lab):
    agent = await lab.agent()
    slot, other = await opened(lab, agent), await opened(lab, agent)
    await limit(lab, running_max=3)
    await lab.submit(9)
    await lab.claim(agent, other)
    assert len((await lab.next(agent, slot, 8)).claims) == 2


async def test_what_ends_in_a_call_makes_room_for_what_it_claims(lab: Lab):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    await limit(lab, running_max=1, gpus_max=1)
    await lab.submit(3)
    claim = await lab.claim(agent, slot)
    for _ in range(2):
        claim = await lab.claim(agent, slot, end(claim))


async def test_tenants_do_not_count_for_each_other(lab: Lab):
    agent = await lab.agent()
    red, blue = await opened(lab, agent), await lab.open(agent, (await lab.record(await lab.one(tenant="blue"))).shape_id)
    await limit(lab, running_max=1)
    await lab.submit(2)
    await lab.claim(agent, red)
    await lab.claim(agent, blue)
    assert [(row.tenant, row.running) for row in (await lab.store.look(leader=False)).tenants] == [("blue", 1), ("red", 1)]


async def test_a_higher_quota_wakes_who_waits_and_a_lower_one_ends_nothing(lab: Lab):
    agent = await lab.agent()
    slots = [await opened(lab, agent) for _ in range(3)]
    await limit(lab, gpus_max=1)
    await lab.submit(9)
    claim = await lab.claim(agent, slots[0])
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in slots[1:]:
            assert (await lab.next(agent, slot)).word == "IDLE"
        await limit(lab, gpus_max=2)
        assert await heard.all(lab) == [f"work {slots[1]}"]
        await lab.claim(agent, slots[1])
        await limit(lab)
        assert await heard.all(lab) == [f"work {slots[2]}"]
        await lab.claim(agent, slots[2])
    await limit(lab, gpus_max=1)
    assert (await use(lab)).gpus == 3
    assert (await lab.next(agent, slots[0], 1, end(claim))).word == "IDLE", "over the new limit, nothing more is taken"


Ending = Callable[[Lab, Agent, str], Awaitable[object]]
ENDINGS: dict[str, Ending] = {
    "close": lambda lab, agent, slot: lab.store.close_slot(slot, agent.incarnation, "Idle"),
    "fence": lambda lab, agent, slot: lab.store.fence(lab.token, "Test", [slot]),
    "lost": lambda lab, agent, slot: lab.store.lost(lab.token, agent.node, agent.incarnation),
    "leave": lambda lab, agent, slot: lab.store.leave(agent.node, agent.incarnation),
    "restart": lambda lab, agent, slot: lab.agent(agent.node),
}


@pytest.mark.parametrize("how", ENDINGS)
async def test_whatever_ends_a_slot_returns_what_it_had_and_wakes_another(lab: Lab, how: str):
    here, there = await lab.agent("n2"), await lab.agent("n1")
    busy, waiting = await opened(lab, here), await opened(lab, there)
    await limit(lab, running_max=2, gpus_max=1, memory_bytes_max=GIB)
    await lab.submit(3)
    assert len((await lab.next(here, busy, 2)).claims) == 2
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert (await lab.next(there, waiting)).word == "IDLE"
        await ENDINGS[how](lab, here, busy)
        assert f"work {waiting}" in await heard.all(lab)
    row = await use(lab)
    assert (row.running, row.gpus, row.memory_bytes) == (0, 0, 0)
    await lab.claim(there, waiting)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CRASHED, Outcome.RETURNED, Outcome.LOST, Outcome.SUSPECTED])
async def test_whatever_ends_an_attempt_returns_it_once(lab: Lab, outcome: Outcome):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    await lab.one(max_attempts=3)
    claim = await lab.claim(agent, slot)
    for _ in range(2):  # sent again, it changes nothing
        await lab.next(agent, slot, 0, end(claim, outcome))
        assert (await use(lab)).running == 0


async def test_a_cancelled_task_counts_until_it_has_ended(lab: Lab):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    task, _ = await lab.submit(2)
    claim = await lab.claim(agent, slot)
    await lab.store.cancel(task, "red")
    assert (await use(lab)).running == 1
    await lab.next(agent, slot, 0, end(claim, Outcome.CANCELLED))
    assert (await use(lab)).running == 0


async def test_turns_go_by_priority_and_then_by_how_long_a_slot_has_waited(lab: Lab):
    agent = await lab.agent()
    busy, first, second, urgent = [await opened(lab, agent, gib) for gib in (1, 2, 3, 4)]
    await limit(lab, gpus_max=1)
    for gib, priority in ((1, 0), (2, 0), (3, 0), (4, 5)):
        await lab.submit(3, memory_gib=gib, priority=priority)
    claim = await lab.claim(agent, busy)
    order: list[str] = []
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in (first, second, urgent, busy):
            assert slot == busy or (await lab.next(agent, slot)).word == "IDLE"
        await lab.next(agent, busy, 0, end(claim))
        for _ in range(3):
            (word,) = await heard.all(lab)
            slot = word.removeprefix("work ")
            order.append(slot)
            claim = await lab.claim(agent, slot)
            await lab.next(agent, slot, 0, end(claim))
    assert order == [urgent, first, second]


async def test_a_slot_gives_way_at_a_task_boundary_once_its_turn_is_over(lab: Lab):
    agent = await lab.agent()
    busy, waiting = await opened(lab, agent, 1), await opened(lab, agent, 2)
    await limit(lab, gpus_max=1)
    await lab.submit(9, memory_gib=1)
    await lab.submit(9, memory_gib=2)
    claim = await lab.claim(agent, busy)
    assert (await lab.next(agent, waiting)).word == "IDLE"
    claim = await lab.claim(agent, busy, end(claim))
    key = lab.store.keys.slot(busy)
    since = int(await lab.raw("HGET", key, "since"))
    await lab.raw("HSET", key, "since", since - 5000)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert (await lab.next(agent, busy, 1, end(claim))).word == "IDLE"
        assert await heard.all(lab) == [f"work {waiting}"]
        claim = await lab.claim(agent, waiting)
        await lab.next(agent, waiting, 0, end(claim))
        assert await heard.all(lab) == [f"work {busy}"]


@pytest.mark.parametrize(("theirs", "word"), [(5, "IDLE"), (-5, "WORK")])
async def test_what_waits_with_a_higher_priority_does_not_wait_for_the_turn_to_end(lab: Lab, theirs: int, word: str):
    agent = await lab.agent()
    busy, waiting = await opened(lab, agent, 1), await opened(lab, agent, 2)
    await limit(lab, gpus_max=1)
    await lab.submit(9, memory_gib=1)
    await lab.submit(9, memory_gib=2, priority=theirs)
    claim = await lab.claim(agent, busy)
    assert (await lab.next(agent, waiting)).word == "IDLE"
    assert (await lab.next(agent, busy, 1, end(claim))).word == word


async def test_the_first_in_line_is_not_passed_by_smaller_ones(lab: Lab):
    agent = await lab.agent()
    busy, other = await opened(lab, agent), await opened(lab, agent)
    large, small = await opened(lab, agent, 2, gpus=2), await opened(lab, agent, 3)
    await limit(lab, gpus_max=2)
    for gib in (1, 2, 3):
        await lab.submit(9, memory_gib=gib)
    claims = [await lab.claim(agent, slot) for slot in (busy, other)]
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in (large, small):
            assert (await lab.next(agent, slot)).word == "IDLE"
        await lab.next(agent, busy, 0, end(claims[0]))
        assert (await lab.next(agent, small)).word == "IDLE", "asked again, it passes nobody either"
        assert await heard.all(lab) == []
        await lab.next(agent, other, 0, end(claims[1]))
        assert await heard.all(lab) == [f"work {large}"]
    assert len((await lab.next(agent, large)).claims) == 1


async def test_what_the_quota_never_allows_stands_in_nobodys_way(lab: Lab):
    agent = await lab.agent()
    busy, never, small = await opened(lab, agent), await opened(lab, agent, 2, gpus=2), await opened(lab, agent, 3)
    await limit(lab, gpus_max=1)
    for gib in (1, 2, 3):
        await lab.submit(2, memory_gib=gib)
    claim = await lab.claim(agent, busy)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in (never, small):
            assert (await lab.next(agent, slot)).word == "IDLE"
        await lab.next(agent, busy, 0, end(claim))
        assert await heard.all(lab) == [f"work {small}"]
        await limit(lab, gpus_max=3)
        assert await heard.all(lab) == [f"work {never}"]


async def test_what_the_quota_never_allows_is_passed_at_once(lab: Lab):
    agent = await lab.agent()
    never, small = await opened(lab, agent, 2, gpus=2), await opened(lab, agent, 3)
    await limit(lab, gpus_max=1)
    for gib in (2, 3):
        await lab.submit(2, memory_gib=gib)
    assert (await lab.next(agent, never)).word == "IDLE"
    await lab.claim(agent, small)


@pytest.mark.parametrize("how", ["finds nothing", "is closed", "is flagged"])
async def test_a_turn_that_is_not_used_goes_to_the_next(lab: Lab, how: str):
    agent = await lab.agent()
    busy, first, second = await opened(lab, agent, 1), await opened(lab, agent, 2), await opened(lab, agent, 3)
    await limit(lab, gpus_max=1)
    await lab.one(memory_gib=1)
    task = await lab.one(memory_gib=2)
    await lab.one(memory_gib=3)
    claim = await lab.claim(agent, busy)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in (first, second):
            assert (await lab.next(agent, slot)).word == "IDLE"
        await lab.next(agent, busy, 0, end(claim))
        assert await heard.all(lab) == [f"work {first}"]
        if how == "finds nothing":
            await lab.store.cancel(task, "red")
            assert (await lab.next(agent, first)).word == "IDLE"
        elif how == "is closed":
            await lab.store.close_slot(first, agent.incarnation, "Idle")
        else:
            await lab.store.flag(lab.token, SlotFlag.CLOSE, [first])
            assert (await lab.next(agent, first)).word == "CLOSE"
        assert f"work {second}" in await heard.all(lab)


async def test_a_slot_whose_queue_ran_dry_while_it_waited_hears_of_new_work(lab: Lab):
    agent = await lab.agent()
    busy, waiting = await opened(lab, agent, 1), await opened(lab, agent, 2)
    await limit(lab, gpus_max=1)
    await lab.one(memory_gib=1)
    task = await lab.one(memory_gib=2)
    claim = await lab.claim(agent, busy)
    assert (await lab.next(agent, waiting)).word == "IDLE"
    await lab.store.cancel(task, "red")
    await lab.next(agent, busy, 0, end(claim))
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.one(memory_gib=2)
        assert await heard.all(lab) == [f"work {waiting}"]


async def test_what_was_claimed_before_anybody_counted_is_counted(lab: Lab):
    """As on the first start after an upgrade."""
    agent = await lab.agent()
    slot = await opened(lab, agent)
    await lab.submit(3)
    claims = (await lab.next(agent, slot, 2)).claims
    await lab.raw("HDEL", lab.store.keys.slot(slot), "tenant", "gpus", "bytes", "since")
    await lab.raw("HDEL", lab.store.keys.tenant("red"), "running", "gpus", "memory")
    await lab.next(agent, slot, 0, end(claims[0]))
    assert (await use(lab)).running == 1
    await check_invariants(lab.store)
    await lab.next(agent, slot, 1, end(claims[1]))
    assert (await use(lab)).running == 1


# --- pre-emption and age ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["an end", "the slot's end"])
@pytest.mark.parametrize(("flag", "losses"), [(SlotFlag.PREEMPT, 0), (SlotFlag.DRAIN, 1)])
async def test_pre_emption_counts_against_nothing(lab: Lab, flag: SlotFlag, losses: int, through: str):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    task = await lab.one()
    claim = await lab.claim(agent, slot)
    await lab.store.flag(lab.token, flag, [slot])
    if through == "an end":
        await lab.next(agent, slot, 0, end(claim, Outcome.LOST))
    else:
        await lab.store.close_slot(slot, agent.incarnation, "Preempted")
    record = await lab.record(task)
    assert (record.status, record.losses) == (TaskStatus.QUEUED, losses)


async def waited(lab: Lab, task: str, seconds: float) -> None:
    """Make it as if the task had come so long ago."""
    key = lab.store.keys.task(task)
    await lab.raw("HSET", key, "queued", int(await lab.raw("HGET", key, "queued")) - int(seconds * 1000))


async def priority(lab: Lab, task: str) -> int:
    return priority_of((await lab.record(task)).score)


async def aged(lab: Lab, highest: int = 10) -> int:
    """Have tasks rise that have waited for a minute, while something of that priority waits in another shape."""
    if not lab.token:
        await lab.lead()
    other = await lab.one(memory_gib=9, priority=highest)
    risen = await lab.store.age(lab.token, 60, [RED, (await lab.record(other)).shape_id])
    await lab.store.cancel(other, "red")
    assert risen is not None
    return risen


async def test_what_has_waited_for_long_rises_by_one_priority_at_a_time(lab: Lab):
    task, young = await lab.submit(2, priority=3)
    await waited(lab, task, 61)
    assert await aged(lab) == 1
    assert (await priority(lab, task), await priority(lab, young)) == (4, 3)
    assert await aged(lab) == 0, "it has to wait as long again"
    key = lab.store.keys.task(task)
    await lab.raw("HSET", key, "rose", int(await lab.raw("HGET", key, "rose")) - 61_000)
    assert await aged(lab) == 1
    assert await priority(lab, task) == 5
    await check_invariants(lab.store)


@pytest.mark.parametrize(("own", "highest", "risen"), [(3, 4, 1), (3, 3, 0), (3, 0, 0), (10, 10, 0)])
async def test_nothing_rises_over_the_highest_priority_that_waits(lab: Lab, own: int, highest: int, risen: int):
    """Where all are alike, age is no reason to take more than one's share."""
    task = await lab.one(priority=own)
    await waited(lab, task, 61)
    assert await aged(lab, highest) == risen


async def test_what_has_risen_is_no_reason_for_others_to_rise(lab: Lab):
    """Else each would lift the other to the top."""
    task, other = await lab.one(), await lab.one(memory_gib=2)
    for each in (task, other):
        await waited(lab, each, 61)
    shapes = [(await lab.record(each)).shape_id for each in (task, other)]
    top = await lab.one(memory_gib=9, priority=1)
    await lab.lead()
    assert await lab.store.age(lab.token, 60, [shapes[0], (await lab.record(top)).shape_id]) == 1
    await lab.store.cancel(top, "red")
    assert await lab.store.age(lab.token, 60, shapes) == 0
    assert (await priority(lab, task), await priority(lab, other)) == (1, 0)


async def test_what_has_risen_stands_by_sequence_among_those_that_it_has_reached(lab: Lab):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    old = await lab.one(priority=9)
    high = await lab.one(priority=10)
    await waited(lab, old, 61)
    assert await aged(lab) == 1
    claims = (await lab.next(agent, slot, 2)).claims
    assert [claim.task_id for claim in claims] == [old, high], "it came first, and has the same priority now"


async def test_what_rose_keeps_its_place_when_it_comes_back(lab: Lab):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    task = await lab.one()
    await waited(lab, task, 61)
    assert await aged(lab) == 1
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.LOST))
    assert await priority(lab, task) == 1


async def test_those_behind_young_ones_are_found_and_one_call_is_bounded(lab: Lab):
    requeued = await lab.submit(7)
    tasks = [*await lab.submit(300), *await lab.submit(300)]
    for task in tasks:
        await waited(lab, task, 61)
    risen = await aged(lab)
    assert 400 < risen <= IDS_MAX
    assert [await priority(lab, task) for task in (*requeued, tasks[0], tasks[-1])] == [0] * 7 + [1, 0]
    assert await aged(lab) == 600 - risen
    assert await aged(lab) == 0


# --- rows -------------------------------------------------------------------------------------------------------------


async def test_the_look_tells_of_tenants_with_work_and_forgets_the_past_of_others(lab: Lab):
    await lab.lead()
    task = await lab.one()
    row = TenantRow(tenant="red", gpus_max=2, memory_bytes_max=5 * GIB, running_max=3, weight=2.5, vtime_s=12.5)
    assert await lab.store.share(lab.token, [row], [(RED, 7.25)])
    state = await lab.store.look(leader=True)
    assert state.tenants == (msgspec.structs.replace(row, active=1),)
    assert [queue.vtime_s for queue in state.queues] == [7.25]
    await lab.store.cancel(task, "red")
    assert (await lab.store.look(leader=True)).tenants == ()
    await lab.one()
    state = await lab.store.look(leader=True)
    assert state.tenants == (msgspec.structs.replace(row, active=1, vtime_s=None),), "limits stay, what was had does not"
    assert [queue.vtime_s for queue in state.queues] == [None]


async def test_a_shape_that_is_gone_is_not_written_to(lab: Lab):
    await lab.lead()
    assert await lab.store.share(lab.token, [], [("gone", 1.0)])
    assert await lab.raw("EXISTS", f"{lab.store.keys.prefix}sh:gone") == 0


async def test_a_leader_that_follows_goes_on_with_what_was_had(lab: Lab):
    agent = await lab.agent()
    slot = await opened(lab, agent)
    await lab.submit(2)
    await lab.claim(agent, slot)
    settings = Settings(tenants={"red": TenantSettings(gpus_max=3, weight=2.0)})
    first = LeaderShares(settings, lab.store)
    first.account(await lab.store.look(leader=True), 0.0)
    state = first.account(await lab.store.look(leader=True), 10.0)
    await first.tell(lab.token, state)
    (row,) = state.tenants
    assert row.vtime_s == 5.0, "a device that is not known counts whole, and the weight is two"
    assert (await use(lab)).gpus_max == 3
    follower = LeaderShares(settings, lab.store)
    assert follower.account(await lab.store.look(leader=True), 0.0).tenants == state.tenants
    follower.forget()
    assert follower.account(await lab.store.look(leader=True), 4.0).tenants[0].vtime_s == 7.0


async def test_limits_are_told_at_once_and_what_was_had_every_now_and_then(lab: Lab):
    await lab.lead()
    await lab.one()
    shares = LeaderShares(Settings(tenants={"blue": TenantSettings(running_tasks_max=1)}), lab.store)
    await shares.tell(lab.token, shares.account(await lab.store.look(leader=True), 0.0))
    state = shares.account(await lab.store.look(leader=True), 0.0)
    later = tuple(msgspec.structs.replace(row, vtime_s=9.0) for row in state.tenants)
    await shares.tell(lab.token, msgspec.structs.replace(state, tenants=later))
    assert (await use(lab)).vtime_s == 0.0, "a moment after the last time"
    await lab.one(tenant="blue")
    await shares.tell(lab.token, shares.account(await lab.store.look(leader=True), 0.0))
    assert [row.running_max for row in (await lab.store.look(leader=False)).tenants] == [1, None]


# --- random histories -------------------------------------------------------------------------------------------------


@dataclass
class Player:
    """A slot as its agent has it."""

    slot: str
    agent: Agent
    memory_gib: int
    gpus: int
    claims: list[Claim] = field(default_factory=list)


class QuotaWalk:
    """One tenant under limits: what its slots have claimed is counted here, without the store."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.rng = random.Random(seed)
        self.players: dict[str, Player] = {}
        self.limits = {"running_max": 99, "gpus_max": 99, "memory_bytes_max": 99 * GIB}

    def used(self) -> dict[str, int]:
        busy = [player for player in self.players.values() if player.claims]
        return {
            "running_max": sum(len(player.claims) for player in busy),
            "gpus_max": sum(player.gpus for player in busy),
            "memory_bytes_max": sum(player.gpus * player.memory_gib * GIB for player in busy),
        }

    async def go_on(self, player: Player, n: int) -> None:
        """The slot reports what has ended, and asks for more."""
        ends = [end(claim, self.rng.choice((Outcome.SUCCEEDED, Outcome.LOST, Outcome.RETURNED))) for claim in player.claims]
        reply = await self.lab.next(player.agent, player.slot, n, *ends)
        player.claims = list(reply.claims)
        if reply.claims and any(used > self.limits[name] for name, used in self.used().items()):
            raise Violation("quota-never-exceeded", f"{self.used()} of {self.limits}")
        if reply.word in ("CLOSE", "PREEMPT"):
            await self.close(player)

    async def close(self, player: Player) -> None:
        del self.players[player.slot]
        await self.lab.store.close_slot(player.slot, player.agent.incarnation, "Test")

    async def step(self, agent: Agent, heard: "list[str]") -> None:
        rng, players = self.rng, list(self.players.values())
        match rng.choices(("submit", "open", "end", "limit", "close", "flag", "ask", "cancel"), (6, 3, 14, 2, 1, 1, 2, 1))[0]:
            case "submit":
                count, gib = rng.choice((1, 3)), rng.choice((1, 2, 3))
                heard += await self.lab.submit(count, memory_gib=gib, priority=rng.choice((0, 0, 5)))
            case "open" if len(players) < 8:
                gib, gpus = rng.choice(((1, 1), (2, 1), (3, 2)))  # slots of a shape have the same
                player = Player(await opened(self.lab, agent, gib, gpus), agent, gib, gpus)
                self.players[player.slot] = player
                await self.go_on(player, 1)
            case "end" if busy := [player for player in players if player.claims]:
                player, n = rng.choice(busy), rng.choice((0, 1, 1, 3))
                await self.go_on(player, n)
                if not n:  # it has only told what has ended so far, and asks now
                    await self.go_on(player, 1)
            case "limit":
                self.limits = {
                    "running_max": rng.choice((1, 3, 99)),
                    "gpus_max": rng.choice((1, 2, 4, 99)),
                    "memory_bytes_max": rng.choice((2, 6, 99)) * GIB,
                }
                await limit(self.lab, **self.limits)
            case "close" if players:
                await self.close(rng.choice(players))
            case "flag" if players:
                await self.lab.store.flag(self.lab.token, SlotFlag.CLOSE, [rng.choice(players).slot])
            case "ask" if idle := [player for player in players if not player.claims]:
                await self.go_on(rng.choice(idle), 1)
            case "cancel" if heard:
                await self.lab.store.cancel(heard.pop(), "red")

    async def run(self) -> None:
        agent = await self.lab.agent()
        tasks: list[str] = []
        await limit(self.lab, **self.limits)
        async with self.lab.listening(self.lab.store.keys.wake("n1")) as heard:
            for number in range(STEPS):
                await self.step(agent, tasks)
                while words := await heard.all(self.lab):
                    self.rng.shuffle(words)
                    for word in words:
                        kind, _, slot = word.partition(" ")
                        player = self.players.get(slot)
                        if player is not None and not player.claims and kind in ("work", "flag"):
                            await self.go_on(player, 1)
                if number % 10 == 0:
                    await check_invariants(self.lab.store)
                await self.check_nobody_is_forgotten(number)

    async def check_nobody_is_forgotten(self, step: int) -> None:
        """All that were told have gone on. If work waits for an idle slot, the quota must be in the way of one of these."""
        waiting = []
        for player in self.players.values():
            record = await self.lab.raw("HMGET", self.lab.store.keys.slot(player.slot), "shape", "flag")
            depth = await self.lab.raw("ZCARD", self.lab.store.keys.queue(record[0].decode()))
            if not player.claims and depth and not record[1]:
                waiting.append(player)
        used = self.used()
        needs = {
            player.slot: {
                "running_max": 1,
                "gpus_max": player.gpus,
                "memory_bytes_max": player.gpus * player.memory_gib * GIB,
            }
            for player in waiting
        }
        # What is over a limit by itself may wait for as long as it likes.
        able = [need for need in needs.values() if all(need[name] <= self.limits[name] for name in need)]
        if able and all(used[name] + need[name] <= self.limits[name] for need in able for name in need):
            raise Violation("no-wake-up-is-lost", f"step {step}: {waiting} with {used} of {self.limits}")


async def walk_quotas(lab: Lab, seed: int) -> None:
    """One seed in this lab, which must be empty."""
    try:
        await QuotaWalk(lab, seed).run()
    except Exception as error:
        error.add_note(f"SEED={seed} python -m pytest tests/contract/test_store_quotas.py -k walk")
        raise


async def test_every_quota_walk_keeps_the_limits_and_forgets_nobody(store_server: StoreServer):
    one = os.environ.get("SEED")
    for seed in [int(one)] if one else range(int(os.environ.get("SEEDS", SEEDS))):
        async with connected(store_server.url) as lab:
            await walk_quotas(lab, seed)
