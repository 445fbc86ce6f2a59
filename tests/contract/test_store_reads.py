"""What the API reads: lists, places, logs, events, counts, and the few plain records."""

import itertools

import pytest

from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import BeatReply
from manager.store.calls_tasks import KeptLog
from tests.contract.store_harness import RED, Lab, end, submission


async def pages(lab: Lab, limit: int, status: TaskStatus | None = None, function: str = "", tenant: str = "red"):
    before, found = None, []
    while True:
        before, rows = await lab.store.tasks(tenant, before, limit, status, function)
        found.append([row.task_id for row in rows])
        if before is None:
            return found


def flat(found: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(found))


async def test_a_list_is_newest_first_and_goes_on_from_its_cursor(lab: Lab):
    tasks = await lab.submit(7)
    await lab.submit(2, tenant="blue")
    assert await pages(lab, 3) == [tasks[6:3:-1], tasks[3:0:-1], tasks[:1]]
    assert await pages(lab, 7) == [tasks[::-1]]
    assert await pages(lab, 100) == [tasks[::-1]]
    assert await pages(lab, 3, tenant="nobody") == [[]]


async def test_a_list_is_filtered_by_status_and_function(lab: Lab):
    agent = await lab.agent()
    done, running, waiting, queued = await lab.submit(4, max_attempts=2)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 3)).claims
    await lab.next(agent, slot, 0, end(claims[0]), end(claims[2], Outcome.FAILED))
    wanted = {
        TaskStatus.SUCCEEDED: [done],
        TaskStatus.RUNNING: [running],
        TaskStatus.RETRY_WAIT: [waiting],
        TaskStatus.QUEUED: [queued],
        TaskStatus.FAILED: [],
    }
    for status, tasks in wanted.items():
        assert flat(await pages(lab, 10, status)) == tasks
    assert len(flat(await pages(lab, 10, function="echo"))) == 4
    assert flat(await pages(lab, 10, function="other")) == []
    row = (await lab.store.tasks("red", None, 10, TaskStatus.RETRY_WAIT, ""))[1][0]
    assert (row.function, row.failures, row.attempt, row.error and row.error.type) == ("echo", 1, 1, "ValueError")


async def test_a_list_goes_on_where_its_scan_ended(lab: Lab):
    """A rare match among many: pages may be short, and none is the last before the end."""
    first = await lab.one()
    for _ in range(5):
        await lab.submit(450, memory_gib=2)
    await lab.raw("HSET", lab.store.keys.task(first), "function", "rare")
    found = await pages(lab, 10, function="rare")
    assert flat(found) == [first]
    assert len(found) == 2


async def test_a_round_sequence_number_is_a_cursor_as_well(lab: Lab):
    """Newer servers write such a score as 1e+8."""
    await lab.raw("HSET", "{ry}:meta", "sequence", 10**8 - 2)
    tasks = [await lab.one(priority=10) for _ in range(4)]
    cursor, _ = await lab.raw("FCALL", "ry_list", 1, "{ry}:", "red", "", 3, "", "")
    assert cursor == b"100000000"
    assert await pages(lab, 1) == [[t] for t in tasks[::-1]]
    record = await lab.record(tasks[1])
    assert record.score == 10**8
    assert await lab.store.position(RED, record.score) == 1
    for task in tasks[:1]:
        await lab.store.cancel(task, "red")
    assert (await lab.store.look(leader=False)).queues[0].head == 10**8


async def test_priorities_keep_their_order_at_the_end_of_the_sequence(lab: Lab):
    """Scores are doubles: neighbours must not fall together in the highest of them."""
    await lab.raw("HSET", "{ry}:meta", "sequence", 2**44 - 5)
    tasks = [await lab.one(priority=-10) for _ in range(3)]
    assert [await lab.store.position(RED, (await lab.record(t)).score) for t in tasks] == [0, 1, 2]
    before = await lab.one(priority=-9)
    assert await lab.store.position(RED, (await lab.record(before)).score) == 0


async def test_a_log_is_of_the_newest_attempt_and_grows(lab: Lab):
    agent = await lab.agent()
    task = await lab.one(max_attempts=3)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    assert await lab.store.log(task) == (b"", b"", 0)
    await lab.store.keep_log(task, 1, b"one", b"", 0)
    await lab.store.keep_log(task, 1, b"one two", b"err\xff", 3)
    await lab.store.keep_log(task, 1, b"one", b"", 0)  # a repeat that comes late
    assert await lab.store.log(task) == (b"one two", b"err\xff", 3)
    await lab.next(agent, slot, 0, end(claim, Outcome.RETURNED))
    await lab.claim(agent, slot)
    await lab.store.keep_log(task, 2, b"2", b"", 0)
    await lab.store.keep_log(task, 1, b"an old attempt, and much longer", b"", 0)
    assert await lab.store.log(task) == (b"2", b"", 0)
    await lab.store.keep_log("no-such-task", 1, b"x", b"", 0)
    assert await lab.store.log("no-such-task") == (b"", b"", 0)


async def test_a_log_says_where_each_of_its_streams_begins(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    assert await lab.store.kept_log(task) == KeptLog(0, b"", b"", 0, 0)
    await lab.store.keep_log(task, 1, b"out", b"err", 3, 4)
    assert await lab.store.kept_log(task) == KeptLog(1, b"out", b"err", 3, 4)
    assert await lab.store.log(task) == (b"out", b"err", 7)
    # An agent of the version before says only how much of both was dropped.
    await lab.store._run("ry_log", task, 1, b"out", b"err", 8)
    assert await lab.store.kept_log(task) == KeptLog(1, b"out", b"err", 8, 0)


async def test_events_tell_each_end_and_large_results_are_left_to_the_record(lab: Lab):
    agent = await lab.agent()
    after = await lab.store.last_event()
    small, large = await lab.submit(2)
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 2)).claims
    payload = b'"' + b"x" * 5000 + b'"'
    await lab.next(agent, slot, 0, end(claims[0], payload=b"[1]"), end(claims[1], payload=payload))
    cursor, events = await lab.store.events(after, 10)
    assert [(e.task_id, e.status, e.inline, e.result) for e in events] == [
        (small, TaskStatus.SUCCEEDED, True, b"[1]"),
        (large, TaskStatus.SUCCEEDED, False, None),
    ]
    assert events[0].started_ms is not None
    assert events[0].node == "n1"
    assert (await lab.record(large)).result == payload
    assert await lab.store.events(cursor, 10) == (cursor, [])
    assert await lab.store.last_event() == cursor


async def test_counts_are_of_all_tasks_that_are_remembered(lab: Lab):
    agent = await lab.agent()
    await lab.submit(3)
    slot = await lab.open(agent)
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))
    assert await lab.store.counts() == {"QUEUED": 2, "RUNNING": 0, "SUCCEEDED": 1}


async def test_500_tasks_in_one_call(lab: Lab):
    """The bound of a call: Lua's stack must hold it."""
    tasks = await lab.submit(500)
    assert len((await lab.store.tasks("red", None, 500, None, ""))[1]) == 500
    agent = await lab.agent()
    slot = await lab.open(agent)
    claims = (await lab.next(agent, slot, 500)).claims
    assert [claim.task_id for claim in claims] == tasks
    reply = await lab.next(agent, slot, 500, *(end(claim) for claim in claims))
    assert set(reply.statuses) == {TaskStatus.SUCCEEDED}


async def test_500_slots_of_one_node_in_one_call(lab: Lab):
    agent = await lab.agent()
    slots = [await lab.open(agent) for _ in range(500)]
    beaten = await lab.store.beat("n1", agent.incarnation, [(slot, True) for slot in slots])
    assert beaten == BeatReply(holds=True)
    await lab.submit(500)
    assert await lab.idle() == set()
    assert set((await lab.store.lost(lab.token, "n1", agent.incarnation))[1]) == set(slots)


async def test_plain_records(lab: Lab):
    store = lab.store
    assert await store.functions() == {}
    await store.publish_function("b", b"2")
    await store.publish_function("a", b"1")
    assert await store.functions() == {"a": b"1", "b": b"2"}
    await store.forget_functions()
    assert await store.functions() == {}
    await store.put_api_key("k1", b"record")
    assert await store.api_keys() == {"k1": b"record"}
    assert (await store.api_key("k1"), await store.api_key("k2")) == (b"record", None)
    await store.put_service("api", b"here")
    assert await store.services() == {"api": b"here"}


async def test_the_first_identity_stays(lab: Lab):
    assert await lab.store.identity() == ""
    assert await lab.store.identify("one") == "one"
    assert await lab.store.identify("two") == "one"
    assert await lab.store.identity() == "one"


async def test_a_submission_of_hundreds_of_arguments_comes_back_as_it_was(lab: Lab):
    wanted = [submission(priority=p, max_attempts=1 + abs(p)) for p in range(-10, 11)]
    await lab.store.submit("red", 100, wanted)
    for one in wanted:
        assert (await lab.record(one.task_id)).spec == one.spec


@pytest.mark.parametrize("value", ["\ud800", None])
async def test_what_cannot_be_sent_shifts_no_answers(lab: Lab, value: object):
    with pytest.raises((UnicodeEncodeError, TypeError, ValueError, AttributeError)):
        await lab.raw("GET", value)
    assert await lab.raw("ECHO", "mine") == b"mine"
