"""Attempts: what is kept of each, what they report, when they are tried again, and with how much room.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests.
"""

from collections.abc import Awaitable, Callable

import pytest

from manager.core.lifecycle import CRASHES_MAX, LOSSES_MAX, Cordon, Outcome, SlotFlag, TaskStatus
from manager.core.model import Claim, End, ProgressNote, TenantRow
from manager.core.shapes import encode_shape
from manager.store.calls_leader import DueReply
from tests.contract.store_harness import RED, TRIES_MAX, Agent, Lab, check_invariants, dump, end, submission

S = TaskStatus
LARGER = submission(memory_gib=2)
"""In whose shape a task of `Lab.submit` is tried again that ran out of device memory."""


async def larger_slot(lab: Lab, agent: Agent) -> str:
    """A slot of the shape with more room."""
    await lab.raw("HSETNX", f"{lab.store.keys.prefix}shapes", LARGER.shape_id, encode_shape(LARGER.shape))
    return await lab.open(agent, LARGER.shape_id)


# --- history ------------------------------------------------------------------------------------------------------------

# outcome of the end, and why the attempt ended as the history has it; None: the attempt was the last, and is the record
HISTORY = [
    (Outcome.SUCCEEDED, None, ""),
    (Outcome.FAILED_FOR_GOOD, None, ""),
    (Outcome.FAILED, "ValueError", "no"),
    (Outcome.OUT_OF_MEMORY, "ValueError", "no"),
    (Outcome.CRASHED, "ValueError", "no"),
    (Outcome.SUSPECTED, "Failed", ""),
    (Outcome.RETURNED, "Returned", ""),
    (Outcome.LOST, "Lost", ""),
    (Outcome.CANCELLED, "Lost", ""),
]


@pytest.mark.parametrize(("outcome", "why", "message"), HISTORY)
async def test_an_attempt_that_does_not_end_its_task_is_kept(lab: Lab, outcome: Outcome, why: str | None, message: str):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3)
    slot = await lab.open(agent)
    ended = end(await lab.claim(agent, slot), outcome)
    await lab.next(agent, slot, 0, ended)
    found = await lab.store.attempts(task)
    await lab.next(agent, slot, 0, ended)
    assert await lab.store.attempts(task) == found, "an attempt was noted by a repeat"
    if why is None:
        assert found == []
        return
    assert len(found) == 1, "an attempt was not noted"
    ((number, attempt),) = found
    assert (number, attempt.node, attempt.slot, attempt.why, attempt.message) == (1, "n1", slot, why, message)
    assert 0 < attempt.claimed_ms <= attempt.ended_ms
    assert (attempt.started_ms > 0) == (outcome is not Outcome.RETURNED), "an attempt that was returned had not started"


def test_the_table_of_histories_is_complete():
    assert {outcome for outcome, *_ in HISTORY} == set(Outcome)


async def preempt(lab: Lab, agent: Agent, slot: str) -> None:
    await lab.store.flag(lab.token, SlotFlag.PREEMPT, [slot])
    await lab.store.close_slot(slot, agent.incarnation, "Preempted")


SLOT_ENDS: dict[str, tuple[Callable[[Lab, Agent, str], Awaitable[object]], str, int]] = {
    # how the slot ends, why the attempt did, and losses counted
    "closed": (lambda lab, agent, slot: lab.store.close_slot(slot, agent.incarnation, "Failed"), "Failed", 1),
    "fenced": (lambda lab, agent, slot: lab.store.fence(lab.token, "Unplaced", [slot]), "Unplaced", 1),
    "lost": (lambda lab, agent, slot: lab.store.lost(lab.token, "n1", agent.incarnation), "NodeLost", 1),
    "restart": (lambda lab, agent, slot: lab.agent("n1"), "AgentRestarted", 1),
    "leaves": (lambda lab, agent, slot: lab.store.leave("n1", agent.incarnation), "AgentStopped", 1),
    "preempted": (preempt, "Preempted", 0),
}


@pytest.mark.parametrize("how", SLOT_ENDS)
async def test_an_attempt_that_ends_with_its_slot_says_what_took_that(lab: Lab, how: str):
    act, why, losses = SLOT_ENDS[how]
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await lab.store.started(slot, agent.incarnation, [(task, claim.attempt, 0.1)])
    await act(lab, agent, slot)
    ((number, attempt),) = await lab.store.attempts(task)
    assert (number, attempt.slot, attempt.why) == (1, slot, why)
    assert attempt.started_ms > 0
    record = await lab.record(task)
    assert (record.status, record.losses, record.failures, record.crashes) == (S.QUEUED, losses, 0, 0), "somebody was blamed"


async def test_the_last_attempt_is_the_record_whatever_ended_it(lab: Lab):
    agent = await lab.agent()
    failed, crashed, lost = await lab.submit(3, max_attempts=1)
    slot = await lab.open(agent)
    await lab.raw("HSET", lab.store.keys.task(crashed), "crashes", CRASHES_MAX - 1)
    await lab.raw("HSET", lab.store.keys.task(lost), "losses", LOSSES_MAX - 1)
    claims = (await lab.next(agent, slot, 3)).claims
    outcomes = (Outcome.FAILED, Outcome.CRASHED, Outcome.LOST)
    ends = [end(c, o) for c, o in zip(claims, outcomes, strict=True)]
    assert (await lab.next(agent, slot, 0, *ends)).statuses == (S.FAILED,) * 3
    assert [await lab.store.attempts(task) for task in (failed, crashed, lost)] == [[], [], []]


async def test_a_record_tells_of_its_newest_attempts_only(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    for _ in range(TRIES_MAX + 5):
        await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.RETURNED))
    found = await lab.store.attempts(task)
    assert [number for number, _ in found] == list(range(6, TRIES_MAX + 6)), "a record grows with every attempt"


@pytest.mark.parametrize("text", ["x" * 600, "é" * 600, "a" + "🦜" * 300, "x" * 500, "é" * 250])
async def test_a_long_message_of_an_attempt_is_cut_between_characters(lab: Lab, text: str):
    agent = await lab.agent()
    task = await lab.one(max_attempts=2)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    payload = b'{"type":"E","message":"%s"}' % text.encode()
    await lab.next(agent, slot, 0, End(task, claim.attempt, Outcome.FAILED, payload, 0.1, 0.1))
    kept = await lab.raw("HGET", lab.store.keys.task(task), "try:1")
    assert kept == kept.decode(errors="ignore").encode(), "a character was cut"
    ((_, attempt),) = await lab.store.attempts(task)
    assert text.startswith(attempt.message)
    assert 490 < len(attempt.message.encode()) <= 500


# --- retries ------------------------------------------------------------------------------------------------------------


async def test_what_is_not_worth_another_attempt_is_not_tried_again(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=5)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 0, end(claim, Outcome.FAILED_FOR_GOOD))).statuses == (S.FAILED,), "it was tried again"
    record = await lab.record(task)
    assert record.failures == 1
    assert record.error is not None
    assert record.error.type == "ValueError"


async def fail_all(lab: Lab, count: int, tenant: str = "red", chance: float = 0.0) -> list[float]:
    """So many tasks fail at once; in how many seconds each is tried again."""
    agent = await lab.agent(f"n-{tenant}")
    tasks = set()
    for first in range(0, count, 500):
        tasks |= set(await lab.submit(min(500, count - first), tenant=tenant, max_attempts=9))
    slot = await lab.open(agent, submission(tenant).shape_id)
    for _ in range(0, count, 500):
        claims = (await lab.next(agent, slot, 500)).claims
        await lab.next(agent, slot, 0, *(end(claim, Outcome.FAILED, chance=chance) for claim in claims))
    now_ms = (await lab.store.look(leader=False)).now_ms
    return sorted((at - now_ms) / 1000 for task, at in (await dump(lab.store)).zset("due").items() if task in tasks)


async def test_ten_thousand_failures_at_once_are_tried_again_at_the_tenants_pace(lab: Lab):
    await lab.lead()
    assert await lab.store.share(lab.token, [TenantRow(tenant="red", retries_per_minute_max=600)], [])
    waits = await fail_all(lab, 10_000)
    assert len(waits) == 10_000
    at_once = sum(wait <= 1.0 for wait in waits)
    assert at_once == pytest.approx(600, abs=100), "retries were not counted"
    for minute in range(1, 15):
        within = sum(60 * (minute - 1) + 1 < wait <= 60 * minute + 1 for wait in waits)
        assert within == pytest.approx(600, abs=10), f"minute {minute} has {within} retries"
    assert waits[-1] == pytest.approx((10_000 - 600) / 10, abs=30)


async def test_a_budget_of_retries_is_its_tenants_and_fills_up_again(lab: Lab):
    await lab.lead()
    tenants = [TenantRow(tenant="red", retries_per_minute_max=2), TenantRow(tenant="blue", retries_per_minute_max=0)]
    assert await lab.store.share(lab.token, tenants, [])
    assert await fail_all(lab, 4) == pytest.approx([0, 0, 30, 60], abs=1)
    assert await fail_all(lab, 4, "blue") == pytest.approx([0, 0, 0, 0], abs=1)
    dry = int(await lab.raw("HGET", lab.store.keys.tenant("red"), "retry_dry"))
    await lab.raw("HSET", lab.store.keys.tenant("red"), "retry_dry", dry - 120_000)  # two minutes later
    later = (await fail_all(lab, 1))[0]
    assert later == pytest.approx(0, abs=1), "a budget never fills up again"


async def test_retries_that_are_cancelled_leave_the_budget_to_others(lab: Lab):
    await lab.lead()
    assert await lab.store.share(lab.token, [TenantRow(tenant="red", retries_per_minute_max=60)], [])
    assert (await fail_all(lab, 300))[-1] == pytest.approx(240, abs=5)
    for task in (await dump(lab.store)).zset("due"):
        await lab.store.cancel(task, "red")
    assert (await fail_all(lab, 1))[0] == pytest.approx(0, abs=1), "retries that never began used the budget up"


async def test_a_retry_that_waits_for_longer_by_itself_is_not_hurried(lab: Lab):
    await lab.lead()
    assert await lab.store.share(lab.token, [TenantRow(tenant="red", retries_per_minute_max=600)], [])
    assert await fail_all(lab, 3, chance=0.5) == pytest.approx([2, 2, 2], abs=0.5)


# --- out of device memory -------------------------------------------------------------------------------------------------


async def test_a_task_that_ran_out_of_memory_is_tried_once_where_there_is_more(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=2)
    slot, larger = await lab.open(agent), await larger_slot(lab, agent)
    assert (await lab.next(agent, larger)).word == "IDLE"
    claim = await lab.claim(agent, slot)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        reply = await lab.next(agent, slot, 1, end(claim, Outcome.OUT_OF_MEMORY))
        assert (reply.statuses, reply.word) == ((S.QUEUED,), "IDLE")
        assert await heard.all(lab) == [f"work {larger}"], "work has come and nobody was told"
    record = await lab.record(task)
    assert (record.shape_id, record.failures, record.more_memory) == (LARGER.shape_id, 0, True)
    assert record.error is not None  # for people, until it has ended
    again = await lab.claim(agent, larger)
    assert (again.task_id, again.attempt, again.more_memory) == (task, 2, True)
    assert (await lab.next(agent, larger, 0, end(again, Outcome.OUT_OF_MEMORY, chance=0.0))).statuses == (S.RETRY_WAIT,)
    assert (await lab.record(task)).failures == 1, "the second time counts like any failure"
    await lab.store.due()
    last = await lab.claim(agent, larger)
    assert (await lab.next(agent, larger, 0, end(last, Outcome.OUT_OF_MEMORY))).statuses == (S.FAILED,), "it was tried for ever"


async def test_without_a_larger_shape_it_fails_like_any_other(lab: Lab):
    agent = await lab.agent()
    await lab.one(max_attempts=2)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 0, end(claim, Outcome.OUT_OF_MEMORY, room=None))).statuses == (S.RETRY_WAIT,)


async def test_what_nothing_can_hold_fails_with_what_it_said(lab: Lab):
    agent = await lab.agent()
    out = await lab.submit(3)
    asked = await lab.submit(2, memory_gib=2, priority=10)  # who asked for that much by themselves go on waiting
    child = await lab.one(after=(out[0],))
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    await lab.next(agent, slot, 0, *(end(claim, Outcome.OUT_OF_MEMORY) for claim in claims))
    old = lab.token
    await lab.lead()
    assert await lab.store.refuse(old, LARGER.shape_id) is None, "an old leader's write was not refused"
    assert [await lab.status(task) for task in out] == [S.QUEUED] * 3, "an old leader's write had an effect"
    assert await lab.store.refuse(lab.token, RED) == 0
    assert await lab.store.refuse(lab.token, LARGER.shape_id) == 3
    assert await lab.store.refuse(lab.token, LARGER.shape_id) == 0
    for task in out:
        record = await lab.record(task)
        assert (record.status, record.failures) == (S.FAILED, 1)
        assert record.error is not None
        assert record.error.type == "ValueError"
    assert [await lab.status(task) for task in asked] == [S.QUEUED] * 2
    assert await lab.status(child) is S.FAILED, "nobody told it"


# --- progress and checkpoints ---------------------------------------------------------------------------------------------


def note(claim: Claim, **more: object) -> ProgressNote:
    return ProgressNote(claim.task_id, claim.attempt, **more)  # type: ignore[arg-type]


async def test_what_an_attempt_reports_is_in_the_record(lab: Lab):
    agent = await lab.agent()
    await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    send = lambda **more: lab.store.progress(slot, agent.incarnation, [note(claim, **more)])  # noqa: E731  # one word
    assert await send(progress=0.25, message="half of a half") == 1
    assert await send(checkpoint="/c/1") == 1
    record = await lab.record(claim.task_id)
    assert (record.progress, record.progress_message, record.checkpoint) == (0.25, "half of a half", "/c/1")
    assert await send(progress=0.0, message="") == 1
    record = await lab.record(claim.task_id)
    assert (record.progress, record.progress_message, record.checkpoint) == (0.0, "", "/c/1")
    await lab.next(agent, slot, 0, end(claim))
    assert await send(progress=1.0) == 0, "a task that has ended reports"


@pytest.mark.parametrize("who", ["another slot", "another incarnation", "an old attempt", "a closed slot"])
async def test_what_others_report_of_a_task_is_not_taken(lab: Lab, who: str):
    agent = await lab.agent()
    task = await lab.one(max_attempts=9)
    slot, other = await lab.open(agent), await lab.open(agent)
    old = await lab.claim(agent, slot)
    by, incarnation, said = slot, agent.incarnation, note(old, progress=0.9, checkpoint="/old")
    if who == "another slot":
        by = other
    elif who == "another incarnation":
        incarnation = "somebody-else"
    elif who == "an old attempt":
        await lab.claim(agent, slot, end(old, Outcome.RETURNED))
    else:
        await lab.store.close_slot(slot, agent.incarnation, "Failed")
        await lab.claim(agent, other)
    assert await lab.store.progress(by, incarnation, [said]) == 0, f"{who} was believed"
    record = await lab.record(task)
    assert (record.progress, record.checkpoint) == (None, ""), f"{who} was believed"


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.FAILED, Outcome.OUT_OF_MEMORY, Outcome.CRASHED, None])
async def test_the_next_attempt_has_the_checkpoint_and_begins_with_no_progress(lab: Lab, outcome: Outcome | None):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3)
    slot, other = await lab.open(agent), await lab.open(agent)
    larger = await larger_slot(lab, agent)
    claim = await lab.claim(agent, slot)
    said = note(claim, progress=0.5, message="on", checkpoint="/c/é")
    await lab.store.progress(slot, agent.incarnation, [said])
    if outcome is None:
        await lab.store.close_slot(slot, agent.incarnation, "Failed")
    else:
        await lab.next(agent, slot, 0, end(claim, outcome, chance=0.0))
    record = await lab.record(task)
    assert (record.progress, record.progress_message, record.checkpoint) == (None, "", "/c/é"), "it has made no progress yet"
    await lab.store.due()
    by = larger if outcome is Outcome.OUT_OF_MEMORY else other
    assert (await lab.claim(agent, by)).checkpoint == "/c/é"
    assert (await lab.next(agent, by)).claims[0].checkpoint == "/c/é"  # also where the answer was lost


# --- a full store -----------------------------------------------------------------------------------------------------------


async def test_a_full_store_lets_all_of_that_go_on(lab: Lab):
    """What ends, or tells of it, gives room back; only new work is refused."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    out, done, late, parent = await lab.submit(4, total_timeout_s=3600.0)
    array = (await lab.submit(1, count=600))[0]
    for _ in range(3):
        await lab.submit(100, after=(parent,))
    claims = {claim.task_id: claim for claim in (await lab.next(agent, slot, 4)).claims}
    await lab.raw("HSET", lab.store.keys.task(late), "end_by", 1)
    await lab.raw("ZADD", f"{lab.store.keys.prefix}exp", 1, late)
    await lab.raw("CONFIG", "SET", "maxmemory", 1)
    try:
        assert await lab.store.progress(slot, agent.incarnation, [note(claims[done], progress=0.5)]) == 1
        ends = [end(claims[out], Outcome.OUT_OF_MEMORY), end(claims[parent]), end(claims[done])]
        assert (await lab.next(agent, slot, 0, *ends)).statuses == (S.QUEUED, S.SUCCEEDED, S.SUCCEEDED)
        assert await lab.store.cancel(late, "red") is S.RUNNING
        assert (await lab.store.due())[0] == DueReply(0, 1, 0, 100)  # of the children, the cancellation has told the rest
        assert await lab.store.expand() == 0
        assert await lab.store.cancel_array(array, "red", 0) == (500, 500, 0)
        assert await lab.store.cancel_array(array, "red", 500) == (None, 100, 0)
        assert await lab.store.refuse(lab.token, LARGER.shape_id) == 1
        assert await lab.store.cordon("n1", Cordon.CORDON, "operator") == "OK"
        assert (await lab.store.sweep(lab.token, 10**15, 0, 10**15)).tasks == 500
    finally:
        await lab.raw("CONFIG", "SET", "maxmemory", 0)
    await check_invariants(lab.store)
