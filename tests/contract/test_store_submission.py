"""Submissions that are told apart from new ones: by an idempotency key, by a name; and what they may come after.

Each test takes a `Lab`, so that the mutants (test_store_mutants.py) can be run against the same tests.
"""

import asyncio

import pytest

from manager.core.errors import IdempotencyConflict, NameTaken, QuotaExceeded, UnknownDependency
from manager.core.ids import new_id
from manager.core.lifecycle import TaskStatus
from manager.core.model import IdempotencyKey, SubmitReply
from tests.contract.store_harness import Lab, check_invariants, dump, end, submission
from tests.contract.test_store_tasks import connected_clients

S = TaskStatus
KEY = IdempotencyKey("k" * 64, "d" * 64)
OTHER_BODY = IdempotencyKey(KEY.key, "e" * 64)
DAY_MS = 86_400_000


async def age_keys(lab: Lab, tenant: str, by_ms: int) -> None:
    """All keys of a tenant are older."""
    prefix = lab.store.keys.prefix
    flat = await lab.raw("HGETALL", f"{prefix}ik:{tenant}")
    for key, said in zip(flat[::2], flat[1::2], strict=True):
        created, _, rest = said.decode().partition(" ")
        await lab.raw("HSET", f"{prefix}ik:{tenant}", key, f"{int(created) - by_ms} {rest}")
        await lab.raw("ZADD", f"{prefix}iks", int(created) - by_ms, f"{tenant} {key.decode()}")


async def forget_all(lab: Lab) -> None:
    """Whatever has ended is swept."""
    if not lab.token:
        await lab.lead()
    for _ in range(10):
        if not (await lab.store.sweep(lab.token, 10**15, 0, 0)).tasks:
            return


# --- idempotency keys -----------------------------------------------------------------------------------------------


async def test_of_50_clients_with_one_key_one_makes_the_task(lab: Lab):
    async with connected_clients(lab, 10) as clients:
        replies: list[SubmitReply] = await asyncio.gather(
            *(clients[i % 10].store.submit("red", 99, [submission()], KEY) for i in range(50))
        )
    assert len({reply.tasks for reply in replies}) == 1, "one key made two tasks"
    assert sorted(reply.replayed for reply in replies) == [False] + [True] * 49
    assert set((await dump(lab.store)).tasks) == {replies[0].tasks[0][0]}, "one key made two tasks"


async def test_a_key_with_another_body_is_a_conflict(lab: Lab):
    await lab.store.submit("red", 10, [submission()], KEY)
    before = await dump(lab.store)
    with pytest.raises(IdempotencyConflict):
        await lab.store.submit("red", 10, [submission()], OTHER_BODY)
    assert await dump(lab.store) == before


async def test_a_key_is_its_tenants(lab: Lab):
    await lab.store.submit("red", 10, [submission()], KEY)
    assert not (await lab.store.submit("blue", 10, [submission("blue")], KEY)).replayed, "a key is every tenant's"


async def test_a_replay_tells_how_the_tasks_are_now(lab: Lab):
    agent = await lab.agent()
    batch = [submission(), submission(), submission()]
    ids = [s.task_id for s in batch]
    first = await lab.store.submit("red", 10, batch, KEY)
    assert first == SubmitReply(tuple((i, S.QUEUED) for i in ids))
    slot = await lab.open(agent)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))
    await lab.claim(agent, slot)
    again = await lab.store.submit("red", 10, [submission(), submission(), submission()], KEY)
    assert again == SubmitReply(((ids[0], S.SUCCEEDED), (ids[1], S.RUNNING), (ids[2], S.QUEUED)), replayed=True)
    await forget_all(lab)
    gone = await lab.store.submit("red", 10, [submission()], KEY)
    assert gone == SubmitReply(((ids[0], None), (ids[1], S.RUNNING), (ids[2], S.QUEUED)), replayed=True)


async def test_the_first_send_of_a_call_is_no_earlier_submission(lab: Lab):
    """Its answer was lost: the same call comes again, and is told what the first send was."""
    one = submission()
    first = await lab.store.submit("red", 1, [one], KEY)
    assert await lab.store.submit("red", 1, [one], KEY) == first == SubmitReply(((one.task_id, S.QUEUED),))
    await lab.store.cancel(one.task_id, "red")
    await forget_all(lab)
    reply = await lab.store.submit("red", 1, [one], KEY)
    assert reply == SubmitReply(((one.task_id, None),)), "a task was made twice"


async def test_a_key_holds_for_a_day(lab: Lab):
    first = await lab.store.submit("red", 10, [submission()], KEY)
    await age_keys(lab, "red", DAY_MS - 60_000)
    assert (await lab.store.submit("red", 10, [submission()], KEY)).tasks == first.tasks
    await age_keys(lab, "red", 61_000)
    await check_invariants(lab.store)
    second = await lab.store.submit("red", 10, [submission()], KEY)
    assert not second.replayed, "a key held for more than a day"
    assert second.tasks != first.tasks
    assert (await lab.store.submit("red", 10, [submission()], KEY)).tasks == second.tasks
    await age_keys(lab, "red", DAY_MS + 1000)
    assert not (await lab.store.submit("red", 10, [submission()], OTHER_BODY)).replayed


async def test_old_keys_go_with_new_ones_and_with_sweeps(lab: Lab):
    keys = [IdempotencyKey(new_id(), "d") for _ in range(6)]
    for key in keys[:5]:
        await lab.store.submit("red", 10, [submission()], key)
    await age_keys(lab, "red", DAY_MS + 1000)
    await lab.store.submit("red", 10, [submission()], keys[5])
    assert len((await check_invariants(lab.store)).hashes["ik:red"]) == 4, "keys become more and more"
    await forget_all(lab)
    assert (await dump(lab.store)).hashes["ik:red"].keys() == {keys[5].key}


async def test_a_full_store_tells_what_a_key_stands_for(lab: Lab):
    first = await lab.store.submit("red", 10, [submission()], KEY)
    await lab.raw("CONFIG", "SET", "maxmemory", 1)
    try:
        assert await lab.store.known("red", KEY, [("", "")]) == SubmitReply(first.tasks, replayed=True)
    finally:
        await lab.raw("CONFIG", "SET", "maxmemory", 0)


async def test_a_refused_submission_takes_neither_key_nor_name(lab: Lab):
    await lab.submit(3)
    with pytest.raises(QuotaExceeded):
        await lab.store.submit("red", 3, [submission(name="a", digest="1")], KEY)
    with pytest.raises(UnknownDependency):
        await lab.store.submit("red", 9, [submission(name="a", digest="1", after=(new_id(),))], KEY)
    assert not (await lab.store.submit("red", 9, [submission(name="a", digest="2")], OTHER_BODY)).replayed


async def test_a_replay_needs_no_quota(lab: Lab):
    first = await lab.store.submit("red", 1, [submission()], KEY)
    assert (await lab.store.submit("red", 1, [submission()], KEY)).tasks == first.tasks


# --- names ----------------------------------------------------------------------------------------------------------


async def test_a_name_asked_for_again_is_the_same_task(lab: Lab):
    wanted = submission(name="train", digest="1")
    await lab.store.submit("red", 10, [wanted])
    assert await lab.store.task_named("red", "train") == wanted.task_id
    before = await dump(lab.store)
    again = await lab.store.submit("red", 10, [submission(name="train", digest="1")])
    assert again == SubmitReply(((wanted.task_id, S.QUEUED),), replayed=True)
    with pytest.raises(NameTaken, match="train"):
        await lab.store.submit("red", 10, [submission(name="train", digest="2")])
    assert await dump(lab.store) == before, "a name that is taken was given again"
    assert not (await lab.store.submit("blue", 10, [submission("blue", name="train", digest="2")])).replayed


async def test_a_name_is_free_again_once_its_task_is_forgotten(lab: Lab):
    first = await lab.one(name="train", digest="1")
    await lab.store.cancel(first, "red")
    with pytest.raises(NameTaken):
        await lab.one(name="train", digest="2")
    await forget_all(lab)
    assert await lab.store.task_named("red", "train") is None
    assert await lab.one(name="train", digest="2")


@pytest.mark.parametrize("digest", ["1", "9"])
async def test_a_batch_with_one_name_taken_is_refused_as_a_whole(lab: Lab, digest: str):
    """Also where that name was asked for by the very same request: the others are new."""
    await lab.one(name="b", digest="1")
    before = await dump(lab.store)
    batch = [submission(name="a", digest="0"), submission(name="b", digest=digest), submission()]
    with pytest.raises(NameTaken, match="'b'"):
        await lab.store.submit("red", 10, batch)
    assert await dump(lab.store) == before


async def test_a_batch_of_names_is_the_same_batch_again(lab: Lab):
    names = [("a", "1"), ("b", "2")]
    first = await lab.store.submit("red", 2, [submission(name=n, digest=d) for n, d in names])
    again = await lab.store.submit("red", 2, [submission(name=n, digest=d) for n, d in names])
    assert again == SubmitReply(first.tasks, replayed=True)


async def test_a_batch_gives_a_name_once(lab: Lab):
    with pytest.raises(NameTaken):
        await lab.store.submit("red", 9, [submission(name="a", digest="1"), submission(name="a", digest="1")])
    assert (await dump(lab.store)).tasks == {}


async def test_of_parallel_submissions_of_a_name_one_gets_it(lab: Lab):
    async with connected_clients(lab, 4) as clients:
        answers = await asyncio.gather(
            *(clients[i % 4].store.submit("red", 99, [submission(name="a", digest=str(i))]) for i in range(40)),
            return_exceptions=True,
        )
    assert sum(isinstance(answer, SubmitReply) for answer in answers) == 1, "a name was given twice"
    assert sum(isinstance(answer, NameTaken) for answer in answers) == 39


async def test_an_array_has_a_name_like_a_task(lab: Lab):
    array = await lab.one(name="sweep", digest="1", count=3)
    assert await lab.store.task_named("red", "sweep") == array
    assert (await lab.store.submit("red", 9, [submission(name="sweep", digest="1", count=3)])).tasks == ((array, S.QUEUED),)
    await lab.store.cancel_array(array, "red", 0)
    assert (await lab.store.submit("red", 9, [submission(name="sweep", digest="1", count=3)])).tasks == ((array, S.CANCELLED),)
    await forget_all(lab)
    assert await lab.store.task_named("red", "sweep") is None


# --- what was asked before, without asking for it ------------------------------------------------------------------


async def test_what_a_key_stands_for_is_told_without_a_submission(lab: Lab):
    batch = [submission(), submission()]
    first = await lab.store.submit("red", 10, batch, KEY)
    before = await dump(lab.store)
    unnamed = [("", "")] * 2
    assert await lab.store.known("red", KEY, unnamed) == SubmitReply(first.tasks, replayed=True)
    with pytest.raises(IdempotencyConflict):
        await lab.store.known("red", OTHER_BODY, unnamed)
    assert await lab.store.known("red", IdempotencyKey("x" * 64, KEY.digest), unnamed) is None
    assert await lab.store.known("blue", KEY, unnamed) is None, "a key is every tenant's"
    assert await dump(lab.store) == before, "asking has changed something"
    await age_keys(lab, "red", DAY_MS + 1000)
    assert await lab.store.known("red", KEY, unnamed) is None


async def test_whose_names_are_is_told_without_a_submission(lab: Lab):
    names = [("a", "1"), ("b", "2")]
    first = await lab.store.submit("red", 9, [submission(name=n, digest=d) for n, d in names])
    await lab.store.cancel(first.tasks[0][0], "red")
    ids = [task_id for task_id, _ in first.tasks]
    before = await dump(lab.store)
    now = ((ids[0], S.CANCELLED), (ids[1], S.QUEUED))
    assert await lab.store.known("red", KEY, names) == SubmitReply(now, replayed=True)
    assert await lab.store.known("red", None, names[1:]) == SubmitReply(now[1:], replayed=True)
    for others in ([("a", "9")], [("a", "1"), ("", "")], [("a", "1"), ("c", "3")]):
        with pytest.raises(NameTaken, match="'a'"):
            await lab.store.known("red", None, others)
    assert await lab.store.known("red", None, [("c", "3"), ("", "")]) is None
    assert await lab.store.known("blue", None, names) is None, "a name is every tenant's"
    assert await dump(lab.store) == before, "asking has changed something"


async def test_a_key_that_came_with_a_name_that_was_known_holds_beyond_the_name(lab: Lab):
    named = submission(name="train", digest=KEY.digest)
    await lab.store.submit("red", 10, [named])
    again = await lab.store.submit("red", 10, [submission(name="train", digest=KEY.digest)], KEY)
    assert again == SubmitReply(((named.task_id, S.QUEUED),), replayed=True)
    with pytest.raises(NameTaken):  # what is refused keeps no key
        await lab.store.submit("red", 10, [submission(name="train", digest="9")], IdempotencyKey("x" * 64, "9"))
    await lab.store.cancel(named.task_id, "red")
    await forget_all(lab)
    late = await lab.store.submit("red", 10, [submission(name="train", digest=KEY.digest)], KEY)
    assert late == SubmitReply(((named.task_id, None),), replayed=True), "a key that was answered made a new task"
    other = IdempotencyKey("x" * 64, "9")
    assert not (await lab.store.submit("red", 10, [submission(name="train", digest="9")], other)).replayed


# --- what it comes after ----------------------------------------------------------------------------------------------


async def test_what_comes_after_nothing_that_is_known_is_refused(lab: Lab):
    blue, gone = await lab.one(tenant="blue"), await lab.one()
    await lab.store.cancel(gone, "red")
    await forget_all(lab)
    later = submission()
    for parent in (new_id(), blue, gone, later.task_id):
        before = await dump(lab.store)
        with pytest.raises(UnknownDependency, match=parent):
            await lab.store.submit("red", 10, [submission(after=(parent,)), later])
        assert await dump(lab.store) == before


async def test_a_task_comes_after_one_that_stands_before_it_in_the_batch(lab: Lab):
    first = submission()
    array = submission(count=2, after=(first.task_id,))
    last = submission(after=(array.task_id,))
    reply = await lab.store.submit("red", 10, [first, array, last])
    assert [status for _, status in reply.tasks] == [S.QUEUED, S.QUEUED, S.BLOCKED]
    assert (await lab.record(last.task_id)).waits == 1


# --- quota ------------------------------------------------------------------------------------------------------------


async def test_an_array_takes_the_quota_of_all_its_tasks_at_once(lab: Lab):
    with pytest.raises(QuotaExceeded) as refused:
        await lab.one(count=1001, active_max=1000)
    assert refused.value.details == {"active_tasks": 0, "active_tasks_max": 1000}
    array = await lab.one(count=1000, active_max=1000)
    assert (await check_invariants(lab.store)).hashes["tn:red"]["active"] == "1000"  # of which 500 have a record
    with pytest.raises(QuotaExceeded):
        await lab.one(active_max=1000)
    for first in (0, 500):
        await lab.store.cancel_array(array, "red", first)
    assert (await check_invariants(lab.store)).hashes["tn:red"]["active"] == "0"
    assert await lab.one(active_max=1)
