"""Tasks that come after others: nobody runs too early, nobody waits for ever, and no chain holds up the store.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests.
"""

import pytest

from manager.core.lifecycle import AfterFailed, Outcome, TaskStatus
from manager.store.calls_leader import DueReply, Swept
from tests.contract.store_harness import Agent, Lab, check_invariants, dump, end, submission
from tests.contract.test_store_submission import forget_all

S = TaskStatus
RUN = AfterFailed.RUN
TOLD_MAX = 200
"""Tasks that are told in one call."""


async def finish(lab: Lab, agent: Agent, slot: str, task_id: str, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    """This task ends so; whatever else is claimed on the way goes back."""
    claims = (await lab.next(agent, slot, 50)).claims
    (mine,) = [claim for claim in claims if claim.task_id == task_id]
    others = [end(claim, Outcome.RETURNED) for claim in claims if claim is not mine]
    await lab.next(agent, slot, 0, end(mine, outcome), *others)


async def statuses(lab: Lab, *task_ids: str) -> list[TaskStatus]:
    return [await lab.status(task_id) for task_id in task_ids]


async def test_a_task_waits_until_all_that_it_comes_after_have_ended(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    first, second, done = await lab.submit(3)
    await finish(lab, agent, slot, done)
    child = await lab.one(after=(first, second, first, done))
    record = await lab.record(child)
    assert (record.status, record.waits, record.queued_ms) == (S.BLOCKED, 2, None)
    await finish(lab, agent, slot, first)
    assert (await lab.record(child)).waits == 1, "a task that came after two did not wait for both"
    assert await lab.status(child) is S.BLOCKED, "a task that came after two did not wait for both"
    await finish(lab, agent, slot, second)
    record = await lab.record(child)
    assert (record.status, record.waits) == (S.QUEUED, 0), "nobody told it"
    assert record.queued_ms is not None
    await finish(lab, agent, slot, child)


async def test_what_comes_after_what_has_ended_runs_at_once(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    done, failed = await lab.submit(2)
    await finish(lab, agent, slot, done)
    await finish(lab, agent, slot, failed, Outcome.FAILED)
    assert await lab.status(await lab.one(after=(done,))) is S.QUEUED
    assert await lab.status(await lab.one(after=(done, failed), after_failed=RUN)) is S.QUEUED
    refused = await lab.record(await lab.one(after=(done, failed)))
    assert refused.status is S.FAILED, "one that it comes after had failed"
    assert refused.error is not None
    assert refused.error.type == "DependencyFailed"
    assert refused.error.message == f"{failed}, which the task comes after, failed"


@pytest.mark.parametrize("how", [Outcome.FAILED, "cancel", "deadline"])
async def test_a_parent_that_does_not_succeed_fails_its_children_or_not_as_they_asked(lab: Lab, how: Outcome | str):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent, other = await lab.submit(2, total_timeout_s=60.0)
    fails, runs = await lab.one(after=(parent, other)), await lab.one(after=(parent,), after_failed=RUN)
    if isinstance(how, Outcome):
        await finish(lab, agent, slot, parent, how)
    elif how == "cancel":
        await lab.store.cancel(parent, "red")
    else:
        await lab.raw("HSET", lab.store.keys.task(parent), "end_by", 1)
        await lab.raw("ZADD", f"{lab.store.keys.prefix}exp", 1, parent)
        await lab.store.due()
    record = await lab.record(fails)
    assert (record.status, record.attempt) == (S.FAILED, 0), "its parent had failed"
    assert record.error is not None
    assert (record.error.type, record.error.message.split()[0]) == ("DependencyFailed", f"{parent},")
    assert await lab.status(runs) is S.QUEUED, "it was to run all the same"
    before = await dump(lab.store)
    await finish(lab, agent, slot, other)  # whom it would have waited for as well
    assert (await dump(lab.store)).tasks[fails] == before.tasks[fails]


async def test_a_parent_tells_once(lab: Lab):
    """One that waits for two is not told twice by the first, however often anybody looks."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    first, second = await lab.submit(2)
    child = await lab.one(after=(first, second))
    claims = (await lab.next(agent, slot, 2)).claims
    ended = end(claims[0])
    for _ in range(3):
        await lab.next(agent, slot, 0, ended)
        await lab.store.due()
        await check_invariants(lab.store)
    assert (await lab.record(child)).waits == 1, "a parent told twice"
    assert await lab.status(child) is S.BLOCKED, "a parent told twice"
    await lab.next(agent, slot, 0, end(claims[1]))
    assert await lab.status(child) is S.QUEUED


async def test_a_diamond_runs_from_its_top_to_its_bottom(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    top = submission()
    left, right = submission(after=(top.task_id,)), submission(after=(top.task_id,))
    bottom = submission(after=(left.task_id, right.task_id))
    await lab.store.submit("red", 9, [top, left, right, bottom])
    order = []
    while (reply := await lab.next(agent, slot)).word == "WORK" and len(order) < 9:
        order.append(reply.claims[0].task_id)
        await lab.next(agent, slot, 0, end(reply.claims[0]))
        await check_invariants(lab.store)
    assert order[0] == top.task_id
    assert sorted(order[1:3]) == sorted((left.task_id, right.task_id))
    assert order[3:] == [bottom.task_id]


async def test_an_end_frees_a_child_that_the_same_call_claims(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    child = await lab.one(after=(parent,))
    claim = await lab.claim(agent, slot)
    assert (await lab.claim(agent, slot, end(claim))).task_id == child


async def test_a_child_that_may_run_wakes_an_idle_slot(lab: Lab):
    """Its shape is another one than its parent's, and nothing else has waited there."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    child = submission(memory_gib=2, after=(parent,))
    await lab.store.submit("red", 9, [child])
    other = await lab.open(agent, child.shape_id)
    assert (await lab.next(agent, other)).word == "IDLE"
    claim = await lab.claim(agent, slot)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.next(agent, slot, 0, end(claim))
        assert await heard.all(lab) == [f"work {other}"], "work has come and nobody was told"
    assert (await lab.claim(agent, other)).task_id == child.task_id


async def test_a_child_that_has_ended_before_is_left_alone(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    kept, forgotten = await lab.submit(2, after=(parent,))
    assert await lab.store.cancel(forgotten, "red") is S.CANCELLED
    await forget_all(lab)
    assert await lab.store.cancel(kept, "red") is S.CANCELLED
    await finish(lab, agent, slot, parent)
    await lab.store.due()
    assert await statuses(lab, parent, kept) == [S.SUCCEEDED, S.CANCELLED]
    assert set((await check_invariants(lab.store)).tasks) == {parent, kept}


async def test_a_parent_is_not_forgotten_before_its_children_are_told(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    for _ in range(2):
        await lab.submit(150, after=(parent,))
    await finish(lab, agent, slot, parent)  # tells a part of them
    waiting = [t for t in (await check_invariants(lab.store)).tasks.values() if t["state"] == "BLOCKED"]
    assert len(waiting) == 300 - TOLD_MAX
    assert await lab.store.sweep(lab.token, 10**15, 0, 0) == Swept(0, 0), "who is to tell others was forgotten"
    assert (await lab.store.due())[0].told == 100
    assert await lab.store.sweep(lab.token, 10**15, 0, 0) == Swept(1, 0)


async def test_an_array_is_not_forgotten_before_its_children_are_told(lab: Lab):
    array = (await lab.submit(1, count=2))[0]
    await lab.submit(300, after=(array,))
    await lab.store.cancel_array(array, "red", 0)  # tells a part of them
    await forget_all(lab)
    assert await lab.store.array(array) is not None, "who is to tell others was forgotten"
    assert (await lab.store.due())[0].told == 100
    failed = (await lab.store.tasks("red", None, 500, None, ""))[1]
    assert {task.error.message for task in failed if task.error} == {f"{array}, which the task comes after, was cancelled"}
    await forget_all(lab)
    assert await lab.store.array(array) is None


@pytest.mark.parametrize("after_failed", AfterFailed)
async def test_a_chain_of_2000_ends_in_bounded_calls(lab: Lab, after_failed: AfterFailed):
    """Of those that fail with their parent, each ends the next; of those that run all the same, only the first may."""
    first = await lab.one()
    chain = [first]
    for _ in range(4):
        batch = []
        for _ in range(500):
            batch.append(submission(after=(chain[-1],), after_failed=after_failed))
            chain.append(batch[-1].task_id)
        await lab.store.submit("red", 10_000, batch)
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.cancel(first, "red")
        told = "plan" in await heard.all(lab)
    counts = await lab.store.counts()
    if after_failed is AfterFailed.RUN:
        assert (counts["CANCELLED"], counts["QUEUED"], counts["BLOCKED"]) == (1, 1, 1999)
        return
    assert counts["FAILED"] == TOLD_MAX, "one call told more than it may"
    assert told, "nobody goes on"
    calls = []
    while (done := (await lab.store.due()))[0].told and len(calls) < 10:
        calls.append(done[0].told)
        assert (done[1] == 0) == (sum(calls) < 2000 - TOLD_MAX), "whether there is more was not told"
    assert calls == [500, 500, 500, 300]
    assert (await lab.store.counts())["FAILED"] == 2000


async def test_many_that_wait_for_one_are_told_in_bounded_calls(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    for _ in range(2):
        await lab.submit(500, after=(parent,))
    await finish(lab, agent, slot, parent)
    assert (await lab.store.counts())["QUEUED"] == TOLD_MAX
    assert await lab.store.due() == (DueReply(0, 0, 500, 0), 0)
    assert await lab.store.due() == (DueReply(0, 0, 300, 0), None)
    assert (await lab.store.counts())["QUEUED"] == 1000


async def test_a_task_comes_after_an_array(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    array = (await lab.submit(1, count=3))[0]
    fails, runs = await lab.one(after=(array,)), await lab.one(after=(array,), after_failed=RUN)
    claims = (await lab.next(agent, slot, 3)).claims
    await lab.next(agent, slot, 0, end(claims[0]), end(claims[1], Outcome.FAILED))
    assert await statuses(lab, fails, runs) == [S.BLOCKED, S.BLOCKED], "an array had not ended"
    assert await lab.store.sweep(lab.token, 10**15, 0, 0) == Swept(2, 0), "the last of an array is kept for who waits, not all"
    await lab.next(agent, slot, 0, end(claims[2]))
    assert await statuses(lab, fails, runs) == [S.FAILED, S.QUEUED]
    assert await lab.store.sweep(lab.token, 10**15, 0, 0) == Swept(2, 0)
    assert await lab.store.array(array) is None


async def test_an_array_comes_after_a_task_with_all_that_it_has_and_will_have(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    array = (await lab.submit(1, count=600, after=(parent,)))[0]
    assert (await lab.store.counts()) == {"QUEUED": 1, "BLOCKED": 500}
    await finish(lab, agent, slot, parent)
    assert await lab.store.expand() == 0
    for _ in range(2):
        await lab.store.due()
        await check_invariants(lab.store)
    assert await lab.store.counts() == {"QUEUED": 600, "BLOCKED": 0, "RUNNING": 0, "SUCCEEDED": 1}
    assert (await lab.store.array(array)).made == 600  # type: ignore[union-attr]


async def test_what_comes_after_two_arrays_of_which_one_failed_fails(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    good, bad = [(await lab.submit(1, count=2))[0] for _ in range(2)]
    child = await lab.one(after=(good, bad))
    claims = (await lab.next(agent, slot, 4)).claims
    outcomes = (Outcome.SUCCEEDED, Outcome.SUCCEEDED, Outcome.SUCCEEDED, Outcome.FAILED)
    await lab.next(agent, slot, 0, *(end(c, o) for c, o in zip(claims, outcomes, strict=True)))
    record = await lab.record(child)
    assert record.status is S.FAILED, "an array of which one failed had succeeded"
    assert record.error is not None
    assert record.error.message == f"{bad}, which the task comes after, failed"


async def test_a_child_of_what_ends_with_its_slot_is_told_by_the_next_round(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent = await lab.one()
    child = await lab.one(after=(parent,), after_failed=RUN)
    await lab.claim(agent, slot)
    await lab.store.cancel(parent, "red")
    await lab.store.close_slot(slot, agent.incarnation, "Failed")
    assert await lab.status(parent) is S.CANCELLED
    assert await lab.store.due() == (DueReply(0, 0, 1, 0), None)
    assert await lab.status(child) is S.QUEUED
