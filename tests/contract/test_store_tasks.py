"""Tasks in the store: submission, claims, ends, cancellation, retries; against both servers.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests.
"""

import asyncio
import math

import pytest

from manager.core.errors import QuotaExceeded
from manager.core.lifecycle import CRASHES_MAX, LOSSES_MAX, Outcome, TaskStatus
from manager.core.model import End, Submission, SubmitReply
from manager.store.calls_leader import DueReply
from tests.contract.store_harness import RED, Lab, check_invariants, dump, end, submission

S = TaskStatus


# --- submission ---------------------------------------------------------------------------------------------------


async def test_a_submitted_task_is_on_record(lab: Lab):
    wanted = submission(priority=3, max_attempts=4)
    await lab.store.submit("red", 10, [wanted])
    record = await lab.record(wanted.task_id)
    assert (record.status, record.tenant, record.attempt) == (S.QUEUED, "red", 0)
    assert record.spec == wanted.spec
    assert record.shape_id == wanted.shape_id
    assert record.queued_ms == record.created_ms > 0


async def test_a_batch_over_the_quota_leaves_nothing(lab: Lab):
    await lab.submit(3, active_max=5)
    before = await dump(lab.store)
    with pytest.raises(QuotaExceeded) as refused:
        await lab.submit(3, active_max=5, memory_gib=2)
    assert refused.value.details == {"active_tasks": 3, "active_tasks_max": 5}
    assert await dump(lab.store) == before
    await lab.submit(2, active_max=5)


async def test_of_200_parallel_submits_at_the_quota_one_gets_in(lab: Lab):
    await lab.submit(4)
    answers: list[BaseException | None] = []
    async with connected_clients(lab, 4) as clients:
        answers = await asyncio.gather(
            *(clients[i % 4].store.submit("red", 5, [submission()]) for i in range(200)), return_exceptions=True
        )
    assert sum(isinstance(answer, SubmitReply) for answer in answers) == 1
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == 199


class connected_clients:  # noqa: N801  # reads as a function
    """More connections to the lab's store."""

    def __init__(self, lab: Lab, count: int) -> None:
        self.lab, self.count = lab, count

    async def __aenter__(self) -> list[Lab]:
        from manager.store import Store, StoreConnection

        stores = [Store(StoreConnection(self.lab.url, 10.0, "client")) for _ in range(self.count)]
        self.clients = [Lab(store, self.lab.url) for store in stores]
        return self.clients

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.store.connection.close()


async def test_the_quota_is_given_back_by_every_kind_of_end(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    ends = (Outcome.SUCCEEDED, Outcome.FAILED)
    for outcome in ends:
        await lab.submit(active_max=1)
        claim = await lab.claim(agent, slot)
        with pytest.raises(QuotaExceeded):
            await lab.submit(active_max=1)
        await lab.next(agent, slot, 0, end(claim, outcome))
    cancelled = await lab.one(active_max=1)
    await lab.store.cancel(cancelled, "red")
    assert await lab.one(active_max=1)


async def test_a_submission_that_is_sent_again_changes_nothing(lab: Lab):
    agent = await lab.agent()
    batch = [submission(), submission()]
    await lab.store.submit("red", 2, batch)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    before = await dump(lab.store)
    await lab.store.submit("red", 100, batch)  # one of them runs
    assert await dump(lab.store) == before, "a submission wrote over a task"
    await lab.store.submit("red", 2, batch)  # at the tenant's quota
    assert await dump(lab.store) == before
    await lab.next(agent, slot, 0, end(claim))
    before = await dump(lab.store)
    await lab.store.submit("red", 2, batch)
    assert await dump(lab.store) == before, "a submission wrote over a task"


async def test_a_task_that_exists_is_never_written_again(lab: Lab):
    agent = await lab.agent()
    known = submission()
    await lab.store.submit("red", 10, [known])
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    before = await dump(lab.store)
    await lab.store.submit("red", 10, [submission(), known])  # half of a batch, as after a sweep of the other half
    assert await dump(lab.store) == before, "a submission wrote over a task"
    foreign = submission("blue")
    with pytest.raises(ValueError, match="not of blue"):
        await lab.store.submit("blue", 10, [foreign, Submission(known.task_id, foreign.shape_id, foreign.shape, foreign.spec)])
    assert await dump(lab.store) == before, "a submission wrote over a task"


async def test_a_batch_for_more_than_the_idle_slots_also_asks_the_controller(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    assert (await lab.next(agent, slot)).word == "IDLE"
    await lab.store.look(leader=True)
    async with lab.listening(lab.store.keys.ctl, lab.store.keys.wake("n1")) as heard:
        await lab.submit(5)
        assert sorted(text for text in await heard.all(lab) if text != "mark") == ["plan", f"work {slot}"]


# --- claims -------------------------------------------------------------------------------------------------------


async def test_claims_come_by_priority_then_by_order(lab: Lab):
    agent = await lab.agent()
    low, first, second, high = [await lab.one(priority=p) for p in (-10, 0, 0, 10)]
    slot = await lab.open(agent)
    reply = await lab.next(agent, slot, 16)
    assert [claim.task_id for claim in reply.claims] == [high, first, second, low]


async def test_what_comes_back_keeps_its_place(lab: Lab):
    agent = await lab.agent()
    first, second, third = await lab.submit(3)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    await lab.next(agent, slot, 0, end(claims[1], Outcome.RETURNED), end(claims[0], Outcome.LOST))
    position = [await lab.store.position(RED, (await lab.record(t)).score) for t in (first, second, third)]
    assert position == [0, 1, 2]
    assert (await lab.claim(agent, slot)).task_id == first


async def test_a_claim_raises_the_attempt_and_nothing_lowers_it(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=9)
    slot = await lab.open(agent)
    attempts = []
    for outcome in (Outcome.RETURNED, Outcome.LOST, Outcome.SUSPECTED, Outcome.CRASHED, Outcome.FAILED):
        claim = await lab.claim(agent, slot)
        attempts.append(claim.attempt)
        assert (await lab.record(task)).attempt == claim.attempt, "the record's attempt is not the claim's"
        await lab.next(agent, slot, 0, end(claim, outcome, chance=0.0))
        await lab.store.due()
        assert (await lab.record(task)).attempt == claim.attempt, "an end changed the attempt"
    assert attempts == [1, 2, 3, 4, 5], "a claim did not raise the attempt"


async def test_a_batch_is_claimed_in_one_call_and_what_is_returned_counts_against_nothing(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(20)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 16)).claims
    assert [claim.task_id for claim in claims] == tasks[:16]
    await lab.next(agent, slot, 0, *(end(claim, Outcome.RETURNED) for claim in claims))
    for task in tasks[:16]:
        record = await lab.record(task)
        counted = (record.failures, record.crashes, record.losses)
        assert (record.status, *counted) == (S.QUEUED, 0, 0, 0), "an unstarted claim counted against a limit"
    assert (await lab.store.look(leader=False)).slots[0].served == 0


async def test_a_task_that_must_run_alone_comes_alone(lab: Lab):
    agent = await lab.agent()
    first, second, third = await lab.submit(3)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    crashed, *rest = claims
    suspects = [end(crashed, Outcome.SUSPECTED), *(end(claim, Outcome.RETURNED) for claim in rest)]
    (alone,) = (await lab.next(agent, slot, 16, *suspects)).claims
    assert (alone.task_id, alone.alone) == (first, True)
    together = (await lab.next(agent, slot, 16, end(alone))).claims
    assert [(claim.task_id, claim.alone) for claim in together] == [(second, False), (third, False)]


async def test_a_task_that_must_run_alone_is_not_claimed_behind_others(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(3)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    ends = [end(claims[1], Outcome.CRASHED), end(claims[0], Outcome.RETURNED), end(claims[2], Outcome.RETURNED)]
    assert [c.task_id for c in (await lab.next(agent, slot, 16, *ends)).claims] == tasks[:1]


# --- ends ---------------------------------------------------------------------------------------------------------


async def test_an_end_is_committed_once(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 0, end(claim, payload=b'"first"'))).statuses == (S.SUCCEEDED,)
    before = await dump(lab.store)
    again = (end(claim, payload=b'"second"'), end(claim, Outcome.FAILED), end(claim, Outcome.LOST))
    reply = await lab.next(agent, slot, 0, *again)
    assert reply.statuses == (None, None, None), "an end was committed twice"
    assert await dump(lab.store) == before, "a repeated end changed something"
    assert (await lab.record(task)).result == b'"first"'


async def test_an_end_of_an_attempt_that_was_replaced_is_refused(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    old = await lab.claim(agent, slot)
    await lab.next(agent, slot, 0, end(old, Outcome.RETURNED))
    new = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 0, end(old))).statuses == (None,), "a replaced attempt was committed"
    assert (await lab.status(task), new.attempt) == (S.RUNNING, 2)


async def test_an_end_from_another_slot_is_refused(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    mine, other = await lab.open(agent), await lab.open(agent)
    claim = await lab.claim(agent, mine)
    assert (await lab.next(agent, other, 0, end(claim))).statuses == (None,), "another slot committed it"
    assert await lab.status(task) is S.RUNNING


async def test_an_end_from_another_incarnation_is_refused(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    reply = await lab.store.next(slot, "somebody-else", 1, [end(claim)])
    assert (reply.word, reply.statuses, reply.claims) == ("FENCED", (), ()), "another incarnation committed it"
    assert await lab.status(task) is S.RUNNING


ENDS = [
    # outcome, cancel asked, status after, (failures, crashes, losses)
    (Outcome.SUCCEEDED, False, S.SUCCEEDED, (0, 0, 0)),
    (Outcome.SUCCEEDED, True, S.SUCCEEDED, (0, 0, 0)),  # it was done before it could be ended
    (Outcome.FAILED, False, S.RETRY_WAIT, (1, 0, 0)),
    (Outcome.FAILED, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.FAILED_FOR_GOOD, False, S.FAILED, (1, 0, 0)),  # although it might be tried again
    (Outcome.FAILED_FOR_GOOD, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.OUT_OF_MEMORY, False, S.QUEUED, (0, 0, 0)),  # with more room
    (Outcome.OUT_OF_MEMORY, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.CANCELLED, False, S.QUEUED, (0, 0, 1)),  # nobody had asked
    (Outcome.CANCELLED, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.CRASHED, False, S.QUEUED, (0, 1, 0)),
    (Outcome.CRASHED, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.SUSPECTED, False, S.QUEUED, (0, 0, 0)),
    (Outcome.SUSPECTED, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.RETURNED, False, S.QUEUED, (0, 0, 0)),
    (Outcome.RETURNED, True, S.CANCELLED, (0, 0, 0)),
    (Outcome.LOST, False, S.QUEUED, (0, 0, 1)),
    (Outcome.LOST, True, S.CANCELLED, (0, 0, 0)),
]


@pytest.mark.parametrize(("outcome", "asked", "after", "counted"), ENDS)
async def test_each_outcome_has_its_status(lab: Lab, outcome: Outcome, asked: bool, after: TaskStatus, counted):
    agent = await lab.agent()
    task = await lab.one(max_attempts=2)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    if asked:
        assert await lab.store.cancel(task, "red") is S.RUNNING
    reply = await lab.next(agent, slot, 0, end(claim, outcome))
    assert reply.statuses == (after,)
    record = await lab.record(task)
    assert (record.status, record.failures, record.crashes, record.losses) == (after, *counted)
    assert not record.cancel_requested
    assert record.slot == ""
    assert await lab.store.cancels(slot) == set()


def test_the_table_of_ends_is_complete():
    assert {(outcome, asked) for outcome, asked, *_ in ENDS} == {(o, a) for o in Outcome for a in (False, True)}


async def test_a_success_leaves_no_error_of_an_earlier_attempt(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=2)
    slot = await lab.open(agent)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.FAILED, chance=0.0))
    waiting = await lab.record(task)
    assert waiting.error is not None
    assert waiting.error.type == "ValueError"
    await lab.store.due()
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))
    record = await lab.record(task)
    assert (record.status, record.result, record.error) == (S.SUCCEEDED, b"1", None)


async def test_times_are_of_the_start_and_the_end(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await lab.store.started(slot, agent.incarnation, [(task, 1, 5.0)])
    began = (await lab.record(task)).started_ms
    await lab.store.started(slot, agent.incarnation, [(task, 1, 3.0)])  # a repeat is later, not the start
    assert (await lab.record(task)).started_ms == began
    await lab.store.started(slot, agent.incarnation, [(task, 7, 99.0)])
    assert (await lab.record(task)).started_ms == began, "another attempt's start was taken"
    await lab.next(agent, slot, 0, end(claim, age_s=60.0))
    record = await lab.record(task)
    assert record.finished_ms is not None
    assert record.started_ms == record.finished_ms - 60_000


@pytest.mark.parametrize("absurd", [math.nan, math.inf, -math.inf, -5.0, 1e300])
async def test_absurd_durations_from_an_executor_do_no_harm(lab: Lab, absurd: float):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await lab.store.started(slot, agent.incarnation, [(task, 1, absurd)])
    await lab.next(agent, slot, 0, end(claim, age_s=absurd, duration_s=absurd))
    assert await lab.status(task) is S.SUCCEEDED
    run_s = (await lab.store.look(leader=False)).queues[0].run_s
    assert run_s is not None
    assert 0 <= run_s <= 1e9


# --- retries, crashes, losses -------------------------------------------------------------------------------------


async def test_a_failure_is_tried_again_after_a_while_and_not_beyond_its_limit(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3)
    slot = await lab.open(agent)
    for number, delay_s in ((1, 4.0), (2, 8.0)):
        await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.FAILED, chance=0.999))
        moved, next_s = await lab.store.due()
        assert moved == DueReply(0, 0, 0, 0)
        assert next_s is not None
        assert delay_s * 0.9 < next_s <= delay_s, f"delay {number} is {next_s}"
        await lab.raw("ZADD", "{ry}:due", 0, task)
        assert await lab.store.due() == (DueReply(1, 0, 0, 0), None)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.FAILED))
    record = await lab.record(task)
    assert (record.status, record.failures) == (S.FAILED, 3), "it was tried again beyond its limit"
    assert record.error is not None
    assert record.error.message == "no"


async def test_the_jitter_is_the_callers_and_at_most_five_minutes(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(3, max_attempts=100)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    for task in tasks[1:]:
        await lab.raw("HSET", lab.store.keys.task(task), "failures", 50)
    ends = [end(claim, Outcome.FAILED, chance=c) for claim, c in zip(claims, (0.0, 0.5, 0.999999), strict=True)]
    await lab.next(agent, slot, 0, *ends)
    now_ms = (await lab.store.look(leader=False)).now_ms
    waits = [(score - now_ms) / 1000 for _, score in sorted((await dump(lab.store)).zset("due").items(), key=lambda x: x[1])]
    assert waits == pytest.approx([0, 150, 300], abs=1.0)


async def test_retries_that_are_due_wake_a_slot(lab: Lab):
    agent = await lab.agent()
    await lab.one(max_attempts=2)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 1, end(claim, Outcome.FAILED, chance=0.0))).word == "IDLE"
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert (await lab.store.due())[0].retried == 1
        assert await heard.all(lab) == [f"work {slot}"]


@pytest.mark.parametrize("payload", [b'{"type":"E","message":"died"}', b"", b"[]", b'{"message":7}', b"\xff{"])
async def test_a_task_that_crashes_its_executor_alone_fails_at_the_third_time(lab: Lab, payload: bytes):
    agent = await lab.agent()
    task = await lab.one(max_attempts=9)
    slot = await lab.open(agent)
    for number in range(1, CRASHES_MAX + 1):
        claim = await lab.claim(agent, slot)
        assert claim.alone == (number > 1)
        status = S.QUEUED if number < CRASHES_MAX else S.FAILED
        ended = End(task, claim.attempt, Outcome.CRASHED, payload, 0.1, 0.1)
        assert (await lab.next(agent, slot, 0, ended)).statuses == (status,)
        if number < CRASHES_MAX:
            await lab.raw("HDEL", lab.store.keys.task(task), "error")  # the record must be readable; not so all payloads
    error = (await lab.record(task)).error
    assert error is not None
    assert error.type == "ExecutorCrashed"
    assert error.message.endswith("3 crashes that this task alone can have caused")


async def test_losses_blame_nobody_but_have_a_cap(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    await lab.raw("HSET", lab.store.keys.task(task), "losses", LOSSES_MAX - 2)
    assert (await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.LOST))).statuses == (S.QUEUED,)
    claim = await lab.claim(agent, slot)
    assert (await lab.next(agent, slot, 0, end(claim, Outcome.LOST))).statuses == (S.FAILED,), "no cap on losses"
    record = await lab.record(task)
    assert record.losses == LOSSES_MAX
    assert record.error is not None
    assert record.error.type == "InfrastructureLost"


# --- cancellation -------------------------------------------------------------------------------------------------


async def test_cancelling_what_waits_ends_it_at_once(lab: Lab):
    agent = await lab.agent()
    queued, waiting = await lab.submit(2, max_attempts=2)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    await lab.next(agent, slot, 0, end(claims[0], Outcome.RETURNED), end(claims[1], Outcome.FAILED))
    assert await lab.status(waiting) is S.RETRY_WAIT
    for task in (queued, waiting):
        assert await lab.store.cancel(task, "red") is S.CANCELLED
        assert await lab.store.cancel(task, "red") is S.CANCELLED
    await check_invariants(lab.store)  # before a claim clears up
    assert (await lab.next(agent, slot)).word == "IDLE"
    assert await lab.store.due() == (DueReply(0, 0, 0, 0), None)


async def test_cancelling_what_runs_tells_its_agent_until_it_has_ended(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert await lab.store.cancel(task, "red") is S.RUNNING
        assert await heard.all(lab) == [f"cancel {slot}"]
    assert (await lab.record(task)).cancel_requested
    assert await lab.store.cancels(slot) == {task}
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, False)])).words == ((slot, f"cancel:{task}"),)
    await lab.next(agent, slot, 0, end(claim, Outcome.CANCELLED))
    assert await lab.status(task) is S.CANCELLED
    assert await lab.store.cancels(slot) == set()


async def test_another_tenants_task_does_not_exist(lab: Lab):
    task = await lab.one()
    assert await lab.store.cancel(task, "blue") is None
    assert await lab.store.cancel("no-such-task", "red") is None
    assert await lab.status(task) is S.QUEUED


async def test_cancel_and_success_in_both_orders(lab: Lab):
    agent = await lab.agent()
    first, second = await lab.submit(2)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    await lab.store.cancel(first, "red")
    assert (await lab.next(agent, slot, 0, end(claims[0]))).statuses == (S.SUCCEEDED,), "a finished task was cancelled"
    await lab.next(agent, slot, 0, end(claims[1]))
    assert await lab.store.cancel(second, "red") is S.SUCCEEDED, "a final state was left"
    assert await lab.status(second) is S.SUCCEEDED, "a final state was left"


async def test_a_cancelled_task_whose_slot_is_lost_is_cancelled(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    await lab.store.cancel(task, "red")
    await lab.store.close_slot(slot, agent.incarnation, "Failed")
    assert await lab.status(task) is S.CANCELLED


# --- calls that are sent twice, and answers that are lost ----------------------------------------------------------


async def test_claims_whose_answer_was_lost_are_told_again(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(5)
    slot = await lab.open(agent)
    lost = await lab.next(agent, slot, 3)
    again = await lab.next(agent, slot, 3)
    assert sorted(again.claims, key=lambda c: c.task_id) == sorted(lost.claims, key=lambda c: c.task_id)
    assert {claim.task_id for claim in again.claims} == set(tasks[:3])
    await lab.next(agent, slot, 0, end(again.claims[0]))
    assert {c.task_id for c in (await lab.next(agent, slot, 3)).claims} == {c.task_id for c in again.claims[1:]}


async def test_the_first_send_of_a_next_may_come_after_the_second(lab: Lab):
    """The agent has acted on the second one's answer; the late first one claims nothing that nobody runs."""
    agent = await lab.agent()
    await lab.submit(4)
    slot = await lab.open(agent)
    first_end = end(await lab.claim(agent, slot))
    second = await lab.next(agent, slot, 1, first_end)
    late = await lab.next(agent, slot, 1, first_end)
    assert late.statuses == (None,)
    assert late.claims == second.claims
    third = await lab.next(agent, slot, 1, end(second.claims[0]))
    stale = await lab.next(agent, slot, 1, first_end)
    assert stale.claims == third.claims, "a late repeat claimed more"


@pytest.mark.parametrize("outcome", [Outcome.RETURNED, Outcome.LOST, Outcome.SUSPECTED, Outcome.CRASHED])
async def test_a_repeat_does_not_forget_what_its_first_send_claimed_anew(lab: Lab, outcome: Outcome):
    """One call gives a task back and claims it again; its repeat must not take that claim from the slot."""
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    ends = end(await lab.claim(agent, slot), outcome)
    first = await lab.next(agent, slot, 1, ends)
    again = await lab.next(agent, slot, 1, ends)
    assert again.claims == first.claims, "a claim was forgotten by its slot"
    await lab.store.close_slot(slot, agent.incarnation, "Failed")
    assert await lab.status(task) is S.QUEUED, "a task runs nowhere"


async def test_a_repeat_is_served_and_learned_from_once(lab: Lab):
    agent = await lab.agent()
    await lab.submit(3)
    slot = await lab.open(agent, served_max=2)
    claim = await lab.claim(agent, slot)
    ended = end(claim, duration_s=1.0)
    await lab.next(agent, slot, 0, ended)
    await lab.next(agent, slot, 0, ended)
    assert (await lab.store.look(leader=False)).slots[0].served == 1, "a repeat was counted"
    second = await lab.claim(agent, slot, ended)
    reply = await lab.next(agent, slot, 1, end(second))
    assert (reply.word, reply.claims) == ("CLOSE", ())
    assert (await lab.record((await lab.submit(1))[0])).status is S.QUEUED


async def test_a_slot_takes_no_more_than_it_may_serve(lab: Lab):
    agent = await lab.agent()
    await lab.submit(5)
    slot = await lab.open(agent, served_max=3)
    claims = (await lab.next(agent, slot, 16)).claims
    assert len(claims) == 3
    reply = await lab.next(agent, slot, 16, *(end(claim) for claim in claims))
    assert (reply.word, reply.claims) == ("CLOSE", ())


# --- wake-ups -----------------------------------------------------------------------------------------------------


async def test_no_wake_up_is_lost_between_an_empty_queue_and_the_idle_mark(lab: Lab):
    """A slot that found nothing is idle in the same step: whoever submits next wakes it."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for _ in range(20):
            reply, _ = await asyncio.gather(lab.next(agent, slot), lab.submit())
            if reply.word == "IDLE":
                assert await heard.all(lab) == [f"work {slot}"], "a wake-up was lost"
                reply = await lab.next(agent, slot)
            assert reply.word == "WORK"
            await lab.next(agent, slot, 0, end(reply.claims[0]))
        assert (await lab.next(agent, slot)).word == "IDLE"
        assert await lab.idle() == {slot}, "an idle slot is not marked"
        await lab.submit()
        assert await heard.all(lab) == [f"work {slot}"], "a wake-up was lost"


async def test_a_submission_wakes_as_many_slots_as_it_has_tasks(lab: Lab):
    agent = await lab.agent()
    slots = {await lab.open(agent) for _ in range(4)}
    for slot in slots:
        await lab.next(agent, slot)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.submit(2)
        woken = {text.removeprefix("work ") for text in await heard.all(lab)}
    assert len(woken) == 2
    assert await lab.idle() == slots - woken


async def test_what_a_slot_gives_back_wakes_another(lab: Lab):
    agent = await lab.agent()
    await lab.submit(3)
    busy, other = await lab.open(agent), await lab.open(agent)
    claims = (await lab.next(agent, busy, 3)).claims
    assert (await lab.next(agent, other)).word == "IDLE"
    back = [end(claim, Outcome.RETURNED) for claim in claims[1:]]
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.next(agent, busy, 0, *back)
        assert await heard.all(lab) == [f"work {other}"]


async def test_what_a_slot_gives_back_and_does_not_take_again_wakes_another(lab: Lab):
    agent = await lab.agent()
    await lab.submit(3)
    busy, other = await lab.open(agent), await lab.open(agent)
    claims = (await lab.next(agent, busy, 3)).claims
    await lab.next(agent, other)
    crashed = [end(claims[0], Outcome.SUSPECTED), *(end(claim, Outcome.RETURNED) for claim in claims[1:])]
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert len((await lab.next(agent, busy, 3, *crashed)).claims) == 1
        assert await heard.all(lab) == [f"work {other}"], "work came back and nobody was told"


async def test_a_slot_that_closes_with_work_queued_wakes_another(lab: Lab):
    agent = await lab.agent()
    woken, other = await lab.open(agent), await lab.open(agent)
    await lab.next(agent, woken)
    await lab.submit()
    await lab.next(agent, other)
    await lab.next(agent, other, 0)
    claimed = [slot for slot in (woken, other) if (await lab.next(agent, slot)).word == "WORK"]
    idle = ({woken, other} - set(claimed)).pop()
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.store.close_slot(claimed[0], agent.incarnation, "Failed")
        assert await heard.all(lab) == [f"work {idle}"], "work is queued and nobody was told"


async def test_a_slot_that_closes_with_work_queued_and_nobody_idle_asks_the_controller(lab: Lab):
    agent = await lab.agent()
    await lab.submit(2)
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    await lab.store.look(leader=True)
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.close_slot(slot, agent.incarnation, "Failed")
        assert await heard.all(lab) == ["plan"]
