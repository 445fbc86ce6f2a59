"""Time that is up: before a task has started, before it has ended; in each state that it may be in then.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests. No test waits for
a time: it writes into the record that the time was up long ago.
"""

import pytest

from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import TaskRecord
from manager.store.calls_leader import DueReply
from tests.contract.store_harness import Lab, check_invariants, dump, end

S = TaskStatus
LONG_S = 3600.0


async def time_is_up(lab: Lab, *task_ids: str, field: str = "end_by") -> None:
    """The moment that the record names has passed."""
    for task_id in task_ids:
        assert await lab.raw("HEXISTS", lab.store.keys.task(task_id), field), f"{task_id} has no {field}"
        await lab.raw("HSET", lab.store.keys.task(task_id), field, 1)
        await lab.raw("ZADD", f"{lab.store.keys.prefix}exp", 1, task_id)


async def failed_with(lab: Lab, task_id: str) -> str:
    """The type of the error with which the task has failed."""
    record: TaskRecord = await lab.record(task_id)
    assert record.status is S.FAILED, f"its time was up, and it is {record.status}"
    assert record.error is not None
    return record.error.type


async def test_when_time_is_up_is_counted_from_the_submission(lab: Lab):
    task = await lab.one(start_timeout_s=5.0, total_timeout_s=60.0)
    record = (await dump(lab.store)).tasks[task]
    created = int(record["created"])
    assert (int(record["start_by"]), int(record["end_by"])) == (created + 5_000, created + 60_000)
    assert (await dump(lab.store)).zset("exp") == {task: created + 5_000}
    _, following_s = await lab.store.due()
    assert following_s is not None
    assert 4.0 < following_s <= 5.0, "nobody is told when to look again"


@pytest.mark.parametrize(("deadline_s", "total_timeout_s"), [(30, 60.0), (60, 30.0), (30, 0.0)])
async def test_of_a_deadline_and_a_total_timeout_the_earlier_one_counts(lab: Lab, deadline_s: int, total_timeout_s: float):
    now_ms = (await lab.store.look(leader=False)).now_ms
    task = await lab.one(deadline_ms=now_ms + deadline_s * 1000, total_timeout_s=total_timeout_s)
    assert int((await dump(lab.store)).tasks[task]["end_by"]) - now_ms == pytest.approx(30_000, abs=1_000)


@pytest.mark.parametrize(("field", "reason"), [("start_by", "StartTimeout"), ("end_by", "DeadlineExceeded")])
async def test_what_waits_fails_when_its_time_is_up(lab: Lab, field: str, reason: str):
    limits = {"start_timeout_s": LONG_S} if field == "start_by" else {"total_timeout_s": LONG_S}
    parent = await lab.one()
    queued, blocked = await lab.one(**limits), await lab.one(after=(parent,), **limits)
    assert await lab.store.due() == (DueReply(0, 0, 0, 0), pytest.approx(LONG_S, abs=5))
    await time_is_up(lab, queued, blocked, field=field)
    assert await lab.store.due() == (DueReply(0, 2, 0, 0), None)
    assert [await failed_with(lab, task) for task in (queued, blocked)] == [reason] * 2
    await check_invariants(lab.store)
    await lab.store.cancel(parent, "red")
    await lab.store.due()
    assert await failed_with(lab, blocked) == reason


async def test_what_waits_for_a_retry_fails_when_its_time_is_up(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3, total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.FAILED, chance=0.9))
    await time_is_up(lab, task)
    assert await lab.store.due() == (DueReply(0, 1, 0, 0), None)
    assert await failed_with(lab, task) == "DeadlineExceeded"


async def test_a_running_task_is_told_and_then_fails(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=5, total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await time_is_up(lab, task)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert await lab.store.due() == (DueReply(0, 1, 0, 0), None)
        assert await heard.all(lab) == [f"cancel {slot}"]
    record = await lab.record(task)
    assert record.status is S.RUNNING, "a task that runs was failed under its agent"
    assert not record.cancel_requested, "nobody had asked for it"
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, False)])).words == ((slot, f"cancel:{task}"),)
    await check_invariants(lab.store)
    before = await dump(lab.store)
    assert await lab.store.due() == (DueReply(0, 0, 0, 0), None), "it was ended twice"
    assert await dump(lab.store) == before
    assert (await lab.next(agent, slot, 0, end(claim, Outcome.CANCELLED))).statuses == (S.FAILED,)
    assert await failed_with(lab, task) == "DeadlineExceeded"
    assert await lab.store.cancels(slot) == set()


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.SUCCEEDED])
async def test_however_the_last_attempt_ends_it_is_not_tried_again_after_its_time(lab: Lab, outcome: Outcome):
    agent = await lab.agent()
    task = await lab.one(max_attempts=5, total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await time_is_up(lab, task)
    await lab.store.due()
    await lab.next(agent, slot, 0, end(claim, outcome))
    assert await failed_with(lab, task) == "DeadlineExceeded"


async def test_a_task_that_was_to_end_fails_with_its_slot(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    await time_is_up(lab, task)
    await lab.store.due()
    await lab.store.close_slot(slot, agent.incarnation, "Failed")
    assert await failed_with(lab, task) == "DeadlineExceeded"


async def test_success_before_the_end_wins(lab: Lab):
    agent = await lab.agent()
    before, after = await lab.submit(2, total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    assert (await lab.next(agent, slot, 0, end(claims[0]))).statuses == (S.SUCCEEDED,)
    await time_is_up(lab, after)
    await lab.store.due()
    assert (await lab.next(agent, slot, 0, end(claims[1]))).statuses == (S.SUCCEEDED,), "it was done before it could be ended"
    assert await lab.store.due() == (DueReply(0, 0, 0, 0), None)
    assert [await lab.status(task) for task in (before, after)] == [S.SUCCEEDED] * 2


@pytest.mark.parametrize("first", ["user", "time"])
async def test_a_users_cancellation_wins_over_time(lab: Lab, first: str):
    agent = await lab.agent()
    task = await lab.one(total_timeout_s=LONG_S)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await time_is_up(lab, task)
    if first == "time":
        await lab.store.due()
    assert await lab.store.cancel(task, "red") is S.RUNNING
    await lab.store.due()
    assert (await lab.record(task)).cancel_requested
    await check_invariants(lab.store)
    assert (await lab.next(agent, slot, 0, end(claim, Outcome.CANCELLED))).statuses == (S.CANCELLED,)


# --- the time until it has started ------------------------------------------------------------------------------------


@pytest.mark.parametrize("total_timeout_s", [0.0, LONG_S])
@pytest.mark.parametrize("told_by", ["started", "end"])
async def test_a_task_that_has_started_once_has_all_the_time_that_is_left(lab: Lab, told_by: str, total_timeout_s: float):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3, start_timeout_s=60.0, total_timeout_s=total_timeout_s)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    if told_by == "started":
        await lab.store.started(slot, agent.incarnation, [(task, 1, 0.1)])
        assert "start_by" not in (await check_invariants(lab.store)).tasks[task], "it has started"
    await lab.next(agent, slot, 0, end(claim, Outcome.LOST, age_s=0.1))
    found = await check_invariants(lab.store)
    assert found.tasks[task]["state"] == "QUEUED"
    assert "start_by" not in found.tasks[task], "it has started once"
    assert (task in found.zset("exp")) == (total_timeout_s > 0)
    assert (await lab.claim(agent, slot)).attempt == 2


async def test_a_claim_that_was_returned_unstarted_is_no_start(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(start_timeout_s=60.0)
    slot = await lab.open(agent)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.RETURNED))
    await time_is_up(lab, task, field="start_by")
    await lab.store.due()
    assert await failed_with(lab, task) == "StartTimeout"


async def test_whether_a_claimed_task_has_started_is_waited_for(lab: Lab):
    """The agent's word of the start may be on its way: what is claimed is looked at again, and never failed for that."""
    agent = await lab.agent()
    starts, returned = await lab.submit(2, start_timeout_s=60.0)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    await time_is_up(lab, starts, returned, field="start_by")
    done, again_s = await lab.store.due()
    assert done.expired == 2
    assert again_s is not None
    assert 0 < again_s <= 1.0
    assert [await lab.status(task) for task in (starts, returned)] == [S.RUNNING] * 2, "a task was failed under its agent"
    assert await lab.store.cancels(slot) == set()
    await check_invariants(lab.store)
    await lab.store.started(slot, agent.incarnation, [(starts, 1, 0.1)])
    await lab.next(agent, slot, 0, end(claims[1], Outcome.RETURNED))
    for task in (returned,):
        await lab.raw("ZADD", f"{lab.store.keys.prefix}exp", 1, task)
    await lab.store.due()
    assert await failed_with(lab, returned) == "StartTimeout"
    assert (await lab.next(agent, slot, 0, end(claims[0]))).statuses == (S.SUCCEEDED,)


# --- nobody looks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["start_by", "end_by"])
async def test_nothing_is_claimed_whose_time_is_up(lab: Lab, field: str):
    """Also while no controller lives: a claim ends what is too late, and goes on to what is not."""
    agent = await lab.agent()
    late = await lab.submit(20, start_timeout_s=LONG_S, total_timeout_s=LONG_S)
    good = await lab.submit(3)
    await time_is_up(lab, *late, field=field)
    slot = await lab.open(agent)
    assert (await lab.claim(agent, slot)).task_id == good[0], "work was there, and the slot is idle"
    reply = await lab.next(agent, slot, 2)
    await check_invariants(lab.store)
    reasons = {await failed_with(lab, task) for task in late}
    assert reasons == {"StartTimeout" if field == "start_by" else "DeadlineExceeded"}
    assert reply.word == "WORK"


async def test_a_batch_is_filled_with_what_is_not_too_late(lab: Lab):
    agent = await lab.agent()
    tasks = [(await lab.submit(1, total_timeout_s=LONG_S))[0] for _ in range(8)]
    await time_is_up(lab, *tasks[::2])
    slot = await lab.open(agent)
    assert [claim.task_id for claim in (await lab.next(agent, slot, 3)).claims] == tasks[1:6:2]


async def test_time_that_is_up_for_many_is_told_in_bounded_calls(lab: Lab):
    tasks = await lab.submit(300, total_timeout_s=LONG_S) + await lab.submit(300, total_timeout_s=LONG_S)
    await time_is_up(lab, *tasks)
    assert await lab.store.due() == (DueReply(0, 500, 0, 0), 0)
    assert await lab.store.due() == (DueReply(0, 100, 0, 0), None)
