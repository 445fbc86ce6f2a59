"""Arrays: accepted in one step, made in bounded ones by whoever comes, counted exactly, cancelled and forgotten as a whole.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests.
"""

import asyncio
from collections import Counter

import pytest

from manager.core.ids import array_id, id_in_array, new_id
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import ArrayRow, Submission
from manager.store.calls_leader import DueReply, Retention, Swept
from tests.contract.store_harness import Lab, check_invariants, dump, end, submission
from tests.contract.test_store_submission import forget_all
from tests.contract.test_store_tasks import connected_clients

S = TaskStatus


async def array_of(lab: Lab, count: int, **more: object) -> str:
    return (await lab.submit(1, count=count, **more))[0]


async def row(lab: Lab, array: str) -> ArrayRow:
    found = await lab.store.array(array)
    assert found is not None
    return found


async def test_an_array_is_accepted_with_one_record_per_task(lab: Lab):
    wanted = submission(count=3, index_as="x", priority=4, max_attempts=2)
    reply = await lab.store.submit("red", 3, [wanted])
    assert reply.tasks == ((wanted.task_id, S.QUEUED),)
    ids = [id_in_array(wanted.task_id, index) for index in range(3)]
    assert set((await dump(lab.store)).tasks) == set(ids), "the ids are not those of manager/core/ids.py"
    for index, task_id in enumerate(ids):
        record = await lab.record(task_id)
        assert (record.array_id, record.index, record.spec) == (wanted.task_id, index, wanted.spec)
    found = await row(lab, wanted.task_id)
    assert (found.count, found.made, found.spec, found.tenant) == (3, 3, wanted.spec, "red")
    listed = (await lab.store.tasks("red", None, 10, None, ""))[1]
    assert [(record.task_id, record.array_id, record.index) for record in listed] == [
        (task_id, wanted.task_id, index) for index, task_id in reversed(list(enumerate(ids)))
    ]


async def test_a_claim_of_a_task_of_an_array_names_its_index(lab: Lab):
    agent = await lab.agent()
    wanted = submission(count=3)
    await lab.store.submit("red", 9, [wanted, submission()])
    slot = await lab.open(agent)
    first = await lab.next(agent, slot, 4)
    again = await lab.next(agent, slot, 4)  # the answer was lost
    for reply in (first, again):
        assert sorted((claim.index is None, claim.index) for claim in reply.claims if claim.index is not None) == [
            (False, 0), (False, 1), (False, 2)
        ]  # fmt: skip
        assert all(claim.spec == wanted.spec for claim in reply.claims if claim.index is not None), "its spec is its array's"
    assert {c.task_id for c in first.claims if c.index == 1} == {id_in_array(wanted.task_id, 1)}


async def test_an_array_that_is_sent_again_changes_nothing(lab: Lab):
    wanted = submission(count=600)
    await lab.store.submit("red", 9999, [wanted])
    await lab.store.expand()
    before = await dump(lab.store)
    for active_max in (9999, 600):  # also at the tenant's quota
        assert (await lab.store.submit("red", active_max, [wanted])).tasks == ((wanted.task_id, S.QUEUED),)
        assert await dump(lab.store) == before, "a submission wrote over an array"
    assert await dump(lab.store) == before, "a submission wrote over an array"
    plain = submission()
    assert (await lab.store.submit("red", 999, [plain, wanted])).tasks == ((plain.task_id, None), (wanted.task_id, S.QUEUED))
    assert await dump(lab.store) == before, "a submission wrote over an array"
    foreign = submission("blue", count=2)
    with pytest.raises(ValueError, match="not of blue"):
        await lab.store.submit("blue", 9, [Submission(wanted.task_id, foreign.shape_id, foreign.shape, foreign.spec)])


async def test_a_large_array_is_made_in_bounded_steps_by_whoever_comes(lab: Lab):
    array = await array_of(lab, 10_000)
    assert (await row(lab, array)).made == 500, "one call made more than it may"
    assert await lab.store.expand() == 1
    assert (await row(lab, array)).made == 1000, "one call made more than it may"
    await check_invariants(lab.store)
    async with connected_clients(lab, 4) as clients:  # of which none knows of the others

        async def make(client: Lab) -> None:
            for _ in range(30):
                if await client.store.expand() == 0:
                    return

        await asyncio.gather(*(make(client) for client in clients))
    assert (await row(lab, array)).made == 10_000
    tasks = (await check_invariants(lab.store)).tasks
    assert set(tasks) == {id_in_array(array, index) for index in range(10_000)}
    assert Counter(int(task["index"]) for task in tasks.values()) == Counter(range(10_000)), "an index was given twice"
    sequences = sorted((int(task["sequence"]), int(task["index"])) for task in tasks.values())
    assert [index for _, index in sequences] == list(range(10_000)), "its tasks do not come in order"


async def test_what_a_dying_process_has_not_made_the_controller_makes(lab: Lab):
    array = await array_of(lab, 1200)
    later = await lab.one()
    assert await lab.store.due() == (DueReply(0, 0, 0, 500), 0), "there is more, and nobody is told"
    assert await lab.store.due() == (DueReply(0, 0, 0, 200), None)
    assert await lab.store.expand() == 0
    ends = [await lab.record(task_id) for task_id in (id_in_array(array, 1199), later)]
    position = [await lab.store.position(record.shape_id, record.score) for record in ends]
    assert position == [1199, 1200], "what was made later lost its place to what came later"


async def test_many_arrays_in_one_call_make_no_more_than_one(lab: Lab):
    batch = [submission(count=400) for _ in range(5)]
    await lab.store.submit("red", 2000, batch)
    assert (await lab.store.counts())["QUEUED"] == 500, "one call made more than it may"
    await check_invariants(lab.store)
    for _ in range(3):
        await lab.store.expand()
    assert (await lab.store.counts())["QUEUED"] == 2000


async def test_a_call_that_makes_more_wakes_as_many_slots(lab: Lab):
    agent = await lab.agent()
    slots = {await lab.open(agent) for _ in range(2)}
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        for slot in slots:
            await lab.next(agent, slot)
        await array_of(lab, 3)
        assert {text.removeprefix("work ") for text in await heard.all(lab)} == slots


async def test_an_array_counts_how_its_tasks_have_ended(lab: Lab):
    agent = await lab.agent()
    array = await array_of(lab, 5)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 4)).claims
    outcomes = (Outcome.SUCCEEDED, Outcome.SUCCEEDED, Outcome.FAILED, Outcome.LOST)
    ends = [end(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]
    await lab.next(agent, slot, 0, *ends)
    await lab.next(agent, slot, 0, *ends)  # once more
    await lab.store.cancel(id_in_array(array, 4), "red")
    await lab.store.cancel(id_in_array(array, 4), "red")
    found = await row(lab, array)
    assert (found.succeeded, found.failed, found.cancelled, found.count) == (2, 1, 1, 5), "an end was not counted once"


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_cancelling_an_array_ends_each_of_its_tasks(lab: Lab):
    agent = await lab.agent()
    array = await array_of(lab, 6)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    await lab.next(agent, slot, 0, end(claims[0]))
    assert await lab.store.cancel_array(array, "blue", 0) is None
    assert await lab.store.cancel_array(new_id(), "red", 0) is None
    assert await lab.store.cancel_array(array, "red", 0) == (None, 4, 1)
    assert await lab.store.cancels(slot) == {claims[1].task_id}
    assert await lab.store.cancel_array(array, "red", 0) == (None, 0, 1)  # asked again
    await lab.next(agent, slot, 0, end(claims[1], Outcome.CANCELLED))
    found = await row(lab, array)
    assert (found.succeeded, found.failed, found.cancelled) == (1, 0, 5)
    assert (await lab.next(agent, slot)).word == "IDLE"


async def test_an_array_is_cancelled_while_it_is_being_made(lab: Lab):
    """In bounded steps; each task has an end of its own, also what had no record yet; who goes on making disturbs nothing."""
    array = await array_of(lab, 1800)
    at: int | None = 0
    steps: list[tuple[int, int]] = []
    while at is not None:
        assert len(steps) < 10, "nothing goes on"
        reply = await lab.store.cancel_array(array, "red", at)
        assert reply is not None
        steps.append((at, reply[1]))
        at = reply[0]
        if len(steps) == 1:
            await lab.store.expand()
            await check_invariants(lab.store)
    assert steps == [(0, 500), (500, 500), (1000, 500), (1500, 300)]
    found = await row(lab, array)
    assert (found.made, found.cancelled) == (1800, 1800)
    assert await lab.store.expand() == 0
    assert (await lab.store.counts())["QUEUED"] == 0


async def test_a_call_from_the_end_of_an_array_makes_no_more_than_others(lab: Lab):
    """It goes on from where it was told to go on until that is made."""
    array = await array_of(lab, 3000)
    asked, ended = 0, 0
    at: int | None = 2900
    while at is not None:
        assert asked < 10, "nothing goes on"
        made = (await row(lab, array)).made
        reply = await lab.store.cancel_array(array, "red", at)
        assert reply is not None
        assert (await row(lab, array)).made - made <= 500, "one call made more than it may"
        at, asked, ended = reply[0], asked + 1, ended + reply[1]
    assert (asked, ended) == (5, 100)


async def test_a_child_of_an_array_is_told_when_its_last_task_is_cancelled(lab: Lab):
    array = await array_of(lab, 2)
    child = await lab.one(after=(array,))
    await lab.store.cancel_array(array, "red", 0)
    record = await lab.record(child)
    assert record.status is S.FAILED
    assert record.error is not None
    assert record.error.message == f"{array}, which the task comes after, was cancelled"


async def test_a_parent_that_is_forgotten_while_the_rest_is_made_has_succeeded_for_all(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    parent, going_on = await lab.submit(2)
    claim = await lab.claim(agent, slot)
    await lab.next(agent, slot, 0, end(claim, Outcome.SUCCEEDED))
    array = await array_of(lab, 1200, after=(parent, going_on))
    await lab.store.sweep(lab.token, 10**15, 0, 0)
    assert await lab.store.task(parent) is None
    while await lab.store.expand():
        pass
    counts = await lab.store.counts()
    assert (counts["BLOCKED"], counts.get("FAILED", 0)) == (1200, 0)
    assert (await row(lab, array)).made == 1200
    await check_invariants(lab.store)


# --- forgetting -------------------------------------------------------------------------------------------------------


async def test_an_array_goes_with_the_last_of_its_tasks(lab: Lab):
    agent = await lab.agent()
    array = await array_of(lab, 3)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    await lab.next(agent, slot, 0, end(claims[0]), end(claims[1]))
    await forget_all(lab)
    assert set((await check_invariants(lab.store)).tasks) == {claims[2].task_id}
    assert (await row(lab, array)).succeeded == 2, "an array that has tasks was forgotten"
    assert (await lab.record(claims[2].task_id)).spec is not None
    await lab.next(agent, slot, 0, end(claims[2]))
    assert (await row(lab, array)).succeeded == 3
    await forget_all(lab)
    assert await lab.store.array(array) is None
    found = await check_invariants(lab.store)
    assert not any(key.startswith(("a:", "t:", "ar:")) for key in (*found.hashes, *found.zsets)), "something of it is left"


async def test_what_an_array_has_to_come_is_made_although_the_rest_is_forgotten(lab: Lab):
    array = await array_of(lab, 600)
    await lab.store.cancel_array(array, "red", 0)
    await forget_all(lab)
    assert (await row(lab, array)).made == 500
    assert await lab.store.expand() == 0
    found = await check_invariants(lab.store)
    assert set(found.tasks) == {id_in_array(array, index) for index in range(500, 600)}
    await lab.store.cancel_array(array, "red", 500)
    await forget_all(lab)
    assert await lab.store.array(array) is None


async def test_each_tenant_keeps_as_many_as_it_may(lab: Lab):
    for tenant in ("red", "blue", "green"):
        for task in await lab.submit(5, tenant=tenant):
            await lab.store.cancel(task, tenant)
    await lab.lead()
    rules = {"red": Retention(0, 2), "blue": Retention(10**15, 99)}
    assert await lab.store.sweep(lab.token, 0, 4, 0, rules) == Swept(3 + 5 + 1, 0)
    kept = Counter(task["tenant"] for task in (await check_invariants(lab.store)).tasks.values())
    assert kept == {"red": 2, "green": 4}


def test_an_id_of_an_array_has_room_for_its_indexes():
    array = array_id()
    assert len({array, *(id_in_array(array, index) for index in range(10_000))}) == 10_001
