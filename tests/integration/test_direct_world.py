"""Dask tasks with a gpu annotation in a real Dask, with agents that are played: each run has a slot, and none is left over."""

import asyncio
import random
import threading
import time
from pathlib import Path

import dask
import pytest
from dask import bag
from distributed import Client

import rocyard
from manager.core.gpu_tasks import GpuAnnotationRefused, GpuExplanation, GpuTaskCrashed, MemoryExceeded
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from plugins.node.functions.direct import PART
from plugins.node.link import DirectOutcome
from tests.integration.dask_world import World, configured, eventually, worlds
from tests.unit import factories as make

pytestmark = pytest.mark.integration


@pytest.fixture
async def world(tmp_path):
    async for made in worlds(tmp_path):
        yield made


def plus(number, more=1):
    return number + more


def fail(message):
    raise ZeroDivisionError(message)


def submit(world, function, *args, gib=16.0, count=1, **more):
    with rocyard.gpu(memory=int(gib * GIB), count=count):
        return world.client.submit(function, *args, pure=False, **more)


async def running(agent, many=1):
    """The slots that run Dask tasks there, once there are so many."""
    await eventually(lambda: len(agent.direct) == many, f"{many} run on {agent.node}")
    return list(agent.direct)


async def nothing_left(world):
    """No lease, no request, and no slot of a task that is over."""
    await eventually(lambda: world.ledger.index.grants == {}, "all leases have ended")
    await eventually(lambda: world.plugin.direct.keys == {}, "no task has a slot")
    assert len(world.ledger.held) == 0
    assert world.ledger.requests == {}


# --- the usual ------------------------------------------------------------------------------------------------------


async def test_a_task_is_held_until_it_fits_and_runs_with_a_lease_of_its_own(world):
    agent = await world.agent("a", 24)
    futures = [submit(world, plus, number) for number in range(3)]
    for number in range(3):
        (slot_id,) = await running(agent)
        assert world.ledger.index.grants == {slot_id: make.grant("a", "d0", 16)}
        await eventually(lambda left=2 - number: len(world.ledger.held) == left, "the others are held")
        agent.finish(slot_id)
        await eventually(lambda number=number: futures[number].done(), "it has its result")
    assert await world.client.gather(futures) == [1, 2, 3]
    await nothing_left(world)
    assert len(set(agent.asked)) == 3, "an id opens once"


async def test_a_task_on_several_devices_and_memory_is_rounded_to_its_class(world):
    agent = await world.agent("a", 24, 24)
    future = submit(world, plus, 1, gib=9.9, count=2)
    (slot_id,) = await running(agent)
    assert world.ledger.index.grants[slot_id] == make.grant("a", "d0 d1", 10)
    agent.finish(slot_id)
    assert await future == 2


async def test_a_task_is_held_only_when_its_dependencies_are_there(world):
    agent = await world.agent("a", 24)
    first = world.client.submit(plus, 0, pure=False)
    middle = submit(world, plus, first)
    last = submit(world, plus, middle)
    (slot_id,) = await running(agent)
    assert world.plugin.direct.keys == {slot_id: middle.key}, "the last one wants nothing yet"
    agent.finish(slot_id)
    (slot_id,) = await running(agent)
    agent.finish(slot_id)
    assert await last == 3


async def test_what_is_held_is_placed_by_dasks_priority_across_sizes_and_kinds(world):
    agent = await world.agent("a", 24)
    submit_first = submit(world, plus, 0, gib=20)
    (slot_id,) = await running(agent)
    futures = {
        name: submit(world, plus, 0, gib=gib, priority=priority)
        for name, gib, priority in [("low", 20, -5), ("usual", 18, 0), ("high", 20, 5), ("higher", 18, 9)]
    }
    await eventually(lambda: len(world.ledger.held) == 4, "they are held")
    await world.submit("leader", 20)
    await world.held("leader")
    order = []
    agent.finish(slot_id)
    for _ in range(5):
        await eventually(lambda: len(agent.live) == 1, "the next one runs")
        (slot_id,) = agent.live
        order.append(world.plugin.direct.keys.get(slot_id, "leader"))
        (agent.finish if slot_id in agent.direct else agent.close)(slot_id)
        await eventually(lambda slot_id=slot_id: slot_id not in agent.live, "it is over")
    await submit_first
    names = {future.key: name for name, future in futures.items()}
    assert [names.get(key, key) for key in order] == ["higher", "high", "usual", "leader", "low"]


async def test_a_small_task_is_not_held_up_by_a_large_one(world):
    agent = await world.agent("a", 24)
    submit_large = submit(world, plus, 0, gib=20)
    (slot_id,) = await running(agent)
    blocked = submit(world, plus, 0, gib=24, priority=9)
    small = submit(world, plus, 0, gib=4)
    await running(agent, 2)
    for each in list(agent.direct):
        agent.finish(each)
    assert await world.client.gather([submit_large, small]) == [1, 1]
    agent.finish((await running(agent))[0])
    assert await blocked == 1
    assert slot_id in agent.closed


async def test_a_large_task_that_small_ones_pass_has_room_kept_and_runs_among_them(world):
    """Small ones come for as long as it takes: without room that is kept it would never see all of a device."""
    agents = [await world.agent(node, 24) for node in "ab"]
    world.ledger.reserve_after_s = 0.2
    small = [submit(world, plus, number, gib=12) for number in range(4)]
    await eventually(lambda: sum(len(agent.direct) for agent in agents) == 4, "both devices are full")
    large = submit(world, plus, 0, gib=24, priority=1)
    waiting = submit(world, plus, 0, gib=4)
    await eventually(lambda: len(world.ledger.held) == 2, "they wait")

    def is_reserved():
        """Small ones come and go, and never is a whole device free."""
        if world.ledger.reserved:
            return True
        if all(len(agent.direct) >= 2 for agent in agents):
            first = agents[0]
            first.finish(next(iter(first.direct)))
            small.append(submit(world, plus, 0, gib=12))
        return False

    await eventually(is_reserved, "room is kept for it")
    ((slot_id, kept),) = world.ledger.reserved.items()
    assert is_of(world, slot_id, large)
    assert len(small) > 4, "small ones had passed it"
    agent = next(agent for agent in agents if agent.node == kept.node)

    def half_is_free():
        for each in list(agent.direct)[1:]:
            agent.finish(each)
        return len(world.ledger.index.slots_on(kept.node)) == 1

    await eventually(half_is_free, "half of it has been given back")
    small.append(submit(world, plus, 0, gib=12))
    await eventually(lambda: small[-1].key in world.plugin.direct.keys.values(), "the next one waits")
    assert "ReservedForLarger" in str(await rocyard.explain(small[-1]))
    for each in list(agent.direct):
        agent.finish(each)
    await eventually(lambda: slot_id in agent.direct, "the large one runs")
    assert world.ledger.reserved == {}

    def finish_all():
        for agent in agents:
            for slot_id in list(agent.direct):
                agent.finish(slot_id)
        return all(future.done() for future in (*small, large, waiting))

    await eventually(finish_all, "all are over")
    await nothing_left(world)


def is_of(world, slot_id, future):
    return world.plugin.direct.keys.get(slot_id) == future.key


async def test_coroutine_functions_and_methods_run_on_the_device_too(world):
    agent = await world.agent("a", 24)

    async def slowly(number):
        await asyncio.sleep(0)
        return number + 1, threading.current_thread() is threading.main_thread()

    future = submit(world, slowly, 1)
    (slot_id,) = await running(agent)
    await asyncio.to_thread(agent.call, slot_id)
    agent.close(slot_id, DirectOutcome.DONE)
    assert await future == (2, False), "not in the event loop of the worker"


async def test_nested_arguments_and_uploaded_modules_arrive(world, tmp_path):
    agent = await world.agent("a", 24)
    one, two = world.client.submit(plus, 0), world.client.submit(plus, 1)
    nested = dask.delayed(sum)([one, two, dask.delayed(plus)(one, more=dask.delayed(plus)(two))])
    with rocyard.gpu(memory="16GiB"):
        future = world.client.compute(nested)
    for _ in range(20):
        await eventually(lambda: agent.direct or future.done(), "something runs, or it is over")
        for slot_id in list(agent.direct):
            agent.finish(slot_id)
        if future.done():
            break
    assert await future == 1 + 2 + 4
    assert agent.asked, "it was placed"


# --- beside others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
async def test_a_collection_is_annotated_where_it_is_computed_or_is_not_optimised(world, whole):
    agent = await world.agent("a", 24)
    numbers = bag.from_sequence([1, 2], npartitions=2)
    with rocyard.gpu(memory="16GiB"):
        more = numbers.map(plus)
        future = world.client.compute(more) if whole else None
    if future is None:
        future = world.client.compute(more.map(plus), optimize_graph=False)
    while not future.done():
        await eventually(lambda: agent.direct or future.done(), "the next one runs")
        for slot_id in list(agent.direct):
            agent.finish(slot_id)
    assert await future == ([2, 3] if whole else [3, 4])
    if whole:
        assert len(agent.asked) >= 3, "both parts, and what joins them"
    else:
        assert len(agent.asked) == 2, "the middle of each part"
    await nothing_left(world)


async def test_plain_tasks_run_while_many_gpu_tasks_do(world):
    """The worker has one thread."""
    agent = await world.agent("a", 96)
    futures = [submit(world, plus, number, gib=16) for number in range(8)]
    await running(agent, 6)
    assert await world.client.gather(world.client.map(plus, range(20))) == list(range(1, 21))

    def finish_all():
        for slot_id in list(agent.direct):
            agent.finish(slot_id)
        return all(future.done() for future in futures)

    await eventually(finish_all, "all are over")
    await nothing_left(world)


async def test_gpu_work_starts_although_all_threads_are_busy(world):
    agent = await world.agent("a", 48)
    gate, entered = threading.Event(), threading.Event()
    BUSY.update(gate=gate, entered=entered)
    busy = world.client.submit(be_busy, pure=False)
    queued = world.client.map(plus, range(3))
    await eventually(entered.is_set, "the only thread is busy")
    future = submit(world, plus, 1)
    await world.submit("leader")
    await eventually(lambda: len(agent.live) == 2, "both are open", timeout_s=5.0)
    agent.finish((await running(agent))[0])
    assert await future == 2
    assert agent.worker.state.executing_count == 1, "and no plain task has taken a thread that is not there"
    gate.set()
    await busy
    assert await world.client.gather(queued) == [1, 2, 3]


BUSY = {}


def be_busy():
    BUSY["entered"].set()
    BUSY["gate"].wait(30)


async def test_stealing_leaves_gpu_tasks_alone(world):
    agent = await world.agent("a", 96)
    futures = [submit(world, plus, number, gib=8) for number in range(8)]
    await running(agent, 8)
    other = await world.agent("b", 96)
    await world.client.gather(world.client.map(plus, range(200)))
    assert (len(agent.asked), other.asked) == (8, [])
    for slot_id in list(agent.direct):
        agent.finish(slot_id)
    assert await world.client.gather(futures) == list(range(1, 9))


@pytest.mark.parametrize("name", ["slot-mine", ("tuple", 1)])
async def test_any_key_will_do(world, name):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1, key=name)
    agent.finish((await running(agent))[0])
    assert await future == 2
    await nothing_left(world)


# --- where ----------------------------------------------------------------------------------------------------------


async def test_the_users_own_choice_of_workers_is_kept(world):
    first, second = await world.agent("a", 24), await world.agent("b", 96)
    future = submit(world, plus, 1, workers=[second.worker.address])
    (slot_id,) = await running(second)
    waiting = submit(world, plus, 1, gib=90, workers=[second.worker.address])
    large = submit(world, plus, 1, gib=90, workers=[first.worker.address])
    wish = submit(world, plus, 1, gib=20, workers=["nowhere"], allow_other_workers=True)
    named = submit(world, plus, 1, gib=4, workers=["a"])
    await running(first, 2)  # best fit, and the one that named it
    await eventually(lambda: len(world.ledger.held) == 2, "two wait for room where they were told")
    assert {row.count for row in world.ledger.direct_waiting(time.monotonic())} == {2}
    second.finish(slot_id)
    (slot_id,) = await running(second)
    second.finish(slot_id)
    for each in list(first.direct):
        first.finish(each)
    assert await world.client.gather([future, waiting, wish, named]) == [2] * 4
    assert len(world.ledger.held) == 1
    await world.client.cancel([large])
    await nothing_left(world)


async def test_a_node_that_refuses_is_not_asked_again_at_once_and_another_takes_it(world):
    world.ledger.policy = BEST_FIT  # the second one is the better place, though not by every policy
    first = await world.agent("a", 24)
    first.cordoned = True
    future = submit(world, plus, 1)
    await eventually(lambda: len(first.asked) >= 1, "it was asked")
    second = await world.agent("b", 20)
    (slot_id,) = await running(second)
    assert len(first.asked) <= 4
    second.finish(slot_id)
    assert await future == 2
    await nothing_left(world)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({}, "says no memory"),
        ({"memory": "16GiB", "gpus": 2}, "'gpus', which means nothing"),
        ({"memory": "16 apples"}, "is not a size"),
        ({"memory": 0}, "out of range"),
        ({"memory": 1.5}, r"got `float` - at `\$.memory`"),
        ({"memory": "1GiB", "count": 0}, "count of the gpu annotation is 0"),
        ({"memory": "1GiB", "count": True}, "count of the gpu annotation is True"),
        ({"memory": "1GiB", "count": 65}, "from 1 to 64"),
        (7, "is 7, not a mapping"),
        ("16GiB", "not a mapping"),
        ({"slot": "x", "shape": "{}"}, "'slot', which means nothing"),
    ],
)
async def test_an_annotation_that_cannot_be_read_fails_its_task_and_says_what_is_right(world, wanted, says):
    agent = await world.agent("a", 24)
    with dask.annotate(gpu=wanted):
        future = world.client.submit(plus, 1, pure=False)
    with pytest.raises(GpuAnnotationRefused, match=says) as refused:
        await future
    assert "gpu=" in str(refused.value) or "size" in str(refused.value) or "from 1 to" in str(refused.value)
    assert (agent.asked, world.ledger.index.grants) == ([], {})


async def test_actors_and_resources_are_refused(world):
    await world.agent("a", 24)
    with pytest.raises(GpuAnnotationRefused, match="actor cannot have"):
        await submit(world, threading.Event, actor=True)
    with pytest.raises(GpuAnnotationRefused, match="resources="):
        await submit(world, plus, 1, resources={"GPU": 1})
    with pytest.raises(GpuAnnotationRefused, match="not a size"), rocyard.gpu(memory="much"):
        pass


@pytest.mark.parametrize(
    ("outcome", "error"), [(DirectOutcome.CRASHED, GpuTaskCrashed), (DirectOutcome.MEMORY, MemoryExceeded)]
)
async def test_how_a_process_ended_is_told_and_its_lease_ends(world, outcome, error):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1)
    agent.close((await running(agent))[0], outcome)
    with pytest.raises(error, match="as played"):
        await future
    await nothing_left(world)


async def test_an_exception_keeps_type_text_and_traceback_and_retries_retry(world):
    agent = await world.agent("a", 24)
    future = submit(world, fail, "thrice", retries=2)
    for number in range(3):
        (slot_id,) = await running(agent)
        assert len(agent.asked) == number + 1
        agent.finish(slot_id)
        await eventually(lambda slot_id=slot_id: slot_id not in world.ledger.index.grants, "the lease has ended")
    with pytest.raises(ZeroDivisionError, match="thrice"):
        await future
    assert [frame.tb_frame.f_code.co_name for frame in frames(await future._traceback())][-1] == "fail"
    await nothing_left(world)
    await future.retry()
    agent.finish((await running(agent))[0])
    await eventually(lambda: future.status == "error", "once more")
    await nothing_left(world)


def frames(trace):
    while trace is not None:
        yield trace
        trace = trace.tb_next


async def test_what_is_preempted_runs_again_without_blame(world):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1)
    for _ in range(5):
        (slot_id,) = await running(agent)
        agent.close(slot_id, DirectOutcome.AGAIN)
        await eventually(lambda slot_id=slot_id: slot_id not in world.ledger.index.grants, "the lease has ended")
    agent.finish((await running(agent))[0])
    assert await future == 2
    assert len(set(agent.asked)) == 6
    await nothing_left(world)


async def test_what_cannot_be_pickled_fails_and_leaves_nothing(world):
    agent = await world.agent("a", 24)
    lock = world.client.submit(threading.Lock, pure=False)
    await eventually(lock.done, "it is there")
    future = submit(world, plus, lock)
    with pytest.raises(TypeError, match="pickle"):
        await future
    await nothing_left(world)
    assert agent.live == {}


async def test_cancelling_a_running_task_ends_it_and_its_lease_stays_until_then(world):
    agent = await world.agent("a", 24)
    agent.ending.clear()
    future = submit(world, plus, 1)
    (slot_id,) = await running(agent)
    await world.client.cancel([future])
    await eventually(lambda: agent.ended == [slot_id], "the agent was asked to end it")
    following = submit(world, plus, 2)
    await eventually(lambda: len(world.ledger.held) == 1, "the next one waits")
    assert set(world.ledger.index.grants) == {slot_id}, "its process is still there"
    agent.ending.set()
    await eventually(lambda: slot_id in agent.closed, "it is over")
    (slot_id,) = await running(agent)
    agent.finish(slot_id)
    assert await following == 3
    await nothing_left(world)


async def test_cancelling_what_is_held_leaves_nothing(world):
    futures = [submit(world, plus, number) for number in range(50)]
    await eventually(lambda: len(world.ledger.held) == 50, "they are held")
    await world.client.cancel(futures)
    await nothing_left(world)
    assert world.plugin.direct.by_key == {}


async def test_a_client_that_goes_away_takes_its_tasks_with_it(world):
    agent = await world.agent("a", 24)
    client = await Client(world.address, asynchronous=True, set_as_default=False)
    with rocyard.gpu(memory="16GiB"):
        futures = client.map(plus, range(3))
    (slot_id,) = await running(agent)
    await client.close()
    await eventually(lambda: agent.ended == [slot_id], "what ran is ended")
    await nothing_left(world)
    assert futures


async def test_the_same_key_again_while_its_first_run_is_being_ended(world):
    agent = await world.agent("a", 96)
    agent.ending.clear()
    future = submit(world, plus, 1, key="k")
    (first,) = await running(agent)
    await world.client.cancel([future])
    await eventually(
        lambda: agent.ended == [first], "Dask has told every client of it: one that joined before would believe it"
    )
    other = await Client(world.address, asynchronous=True, set_as_default=False)  # the first one knows the key as cancelled
    with rocyard.gpu(memory="16GiB"):
        again = other.submit(plus, 1, key="k")
    await eventually(lambda: len(world.ledger.index.grants) == 2, "it is placed anew")
    agent.ending.set()
    await eventually(lambda: first in agent.closed, "the first run is over")
    for _ in range(3):  # Dask goes on with the first run until it hears of its end
        await eventually(lambda: agent.direct or again.done(), "it runs")
        for slot_id in list(agent.direct):
            agent.finish(slot_id)
    assert await again == 2
    await other.close()
    await nothing_left(world)


async def test_a_lost_worker_ends_its_tasks_and_they_run_again(world):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1)
    (slot_id,) = await running(agent)
    await agent.kill_worker()
    await eventually(lambda: slot_id in agent.closed, "its connection is gone, and so is its slot")
    await eventually(lambda: len(world.ledger.held) == 1, "it waits")
    await agent.start_worker()
    (second,) = await running(agent)
    assert second != slot_id
    agent.finish(second)
    assert await future == 2
    await nothing_left(world)


async def test_tasks_of_a_lost_node_run_elsewhere_although_its_dask_worker_lives(world):
    lost = await world.agent("a", 24)
    future = submit(world, plus, 1)
    (slot_id,) = await running(lost)
    lost.frozen.clear()  # it answers nobody, and may never again
    other = await world.agent("b", 24)
    await world.dask.lost("a", "i0")
    assert set(world.ledger.index.grants) == {slot_id}, "that was its predecessor"
    await world.dask.lost("a", "i1")
    other.finish((await running(other))[0])
    assert await future == 2
    lost.frozen.set()
    await eventually(lambda: slot_id in lost.ended, "Dask's word reaches it when it wakes up")
    await nothing_left(world)


async def test_what_a_killed_process_had_begun_to_write_is_removed(world):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1)
    (slot_id,) = await running(agent)
    part = Path(agent.direct[slot_id].result_path + PART)
    await asyncio.to_thread(part.write_bytes, b"half of it")
    assert len(list(part.parent.iterdir())) == 2, "it, and the call"
    agent.close(slot_id, DirectOutcome.CRASHED)
    with pytest.raises(GpuTaskCrashed):
        await future
    assert list(part.parent.iterdir()) == []


async def test_a_lost_result_is_computed_again_in_a_slot(world):
    agent = await world.agent("a", 24)
    future = submit(world, plus, 1)
    agent.finish((await running(agent))[0])
    await eventually(future.done, "it is over")
    await agent.kill_worker()
    await agent.start_worker()
    agent.finish((await running(agent))[0])
    await eventually(lambda: len(agent.closed) == 2, "it has run twice")
    assert await future == 2
    await nothing_left(world)


async def test_a_new_scheduler_knows_no_task_and_no_lease_is_left(world):
    agent = await world.agent("a", 24)
    lost = submit(world, plus, 1)
    await running(agent)
    agent.ending.clear()  # its process takes its time
    port = world.scheduler.port
    await world.client.close()
    assert lost.cancelled()
    await world.dask.close()
    await world.scheduler.close()
    await agent.worker.close(timeout=1, executor_wait=False, nanny=False)
    await world.start(port=port)
    await agent.start_worker()
    await eventually(lambda: len(world.ledger.index.grants) == 1, "the report still has it")
    future = submit(world, plus, 1)
    await eventually(lambda: len(world.ledger.held) == 1, "the next one waits")
    (old,) = agent.direct
    agent.ending.set()
    await eventually(lambda: old in agent.closed, "the old one is over")
    agent.finish((await running(agent))[0])
    assert await future == 2
    await nothing_left(world)


async def test_client_restart_ends_the_tasks_and_no_slot_of_the_leader(world):
    agent = await world.agent("a", 48)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "the leader's is open")
    future = submit(world, plus, 1)
    await running(agent)
    old = agent.worker
    await world.client.restart(wait_for_workers=False, timeout=5)
    await old.finished()
    assert future.cancelled()
    assert world.plugin.direct.by_key == {}
    await eventually(lambda: set(agent.live) == {"s"}, "only the leader's slot lives")
    await agent.start_worker()
    await eventually(lambda: set(world.ledger.index.grants) == {"s"}, "and its lease alone is known")


async def test_what_is_held_is_told_and_explained(world):
    await world.agent("a", 24)
    futures = [submit(world, plus, number, gib=gib) for number, gib in enumerate([32, 32, 40])]
    plain = world.client.submit(plus, 1)
    await plain
    await eventually(lambda: len(world.ledger.held) == 3, "they are held")
    client = await world.dask._connected()
    answer = await client.scheduler.rocyard_slots()
    needs = [(row["resources"], row["count"]) for row in answer["direct"]]
    assert needs == [({"memory_bytes": 32 * GIB}, 2), ({"memory_bytes": 40 * GIB}, 1)]
    assert all(row["oldest_wait_s"] >= 0 for row in answer["direct"])
    assert answer["slots"] == {}
    second = await rocyard.explain(futures[1])
    assert (second.state, second.before, [verdict.reason.value for verdict in second.verdicts]) == (
        *("held", 1),
        ["ExceedsLargestDevice"],
    )
    assert "8 GiB short" in str(second)
    assert (await rocyard.explain(plain)).state == "plain"
    agent = await world.agent("b", 64)
    await running(agent, 2)
    placed = await rocyard.explain(futures[0])
    assert isinstance(placed, GpuExplanation)
    assert str(placed).startswith("placed (1 × 32 GiB) on b, d0, slot ")
    await world.client.cancel(futures)
    await nothing_left(world)


async def test_in_a_storm_nothing_is_promised_twice_and_nothing_is_left(world):
    """Ends, errors, crashes, cancellations, losses of workers, and slots of the leader, in any order."""
    chance = random.Random(11)
    agents = [await world.agent(node, 24, 24) for node in "ab"]
    calls = [chance.choice([(plus, 1), (fail, "so")]) for _ in range(80)]
    futures = [submit(world, *call, gib=chance.choice([2, 6, 12, 20]), count=chance.choice([1, 1, 2])) for call in calls]
    for number in range(12):
        await world.submit(f"s{number}", chance.choice([4, 12]))
    left = list(futures)
    lives = 4
    for _ in range(2000):
        for agent in agents:
            for slot_id in [slot for slot in agent.live if chance.random() < 0.4]:
                if slot_id not in agent.direct:
                    agent.close(slot_id)
                elif chance.random() < 0.6:
                    agent.finish(slot_id)
                else:
                    agent.close(slot_id, chance.choice([DirectOutcome.CRASHED, DirectOutcome.AGAIN]))
        left = [future for future in left if not future.done()]
        if left and chance.random() < 0.2:
            await world.client.cancel([left.pop(chance.randrange(len(left)))])
        if lives and chance.random() < 0.05:
            lives -= 1
            agent = chance.choice(agents)
            await agent.kill_worker()
            await agent.start_worker()
        # A slot that is placed and not yet open is in the ledger's requests alone.
        if not left and not any(agent.live for agent in agents) and not world.ledger.requests:
            break
        await asyncio.sleep(0.01)
    assert left == []
    await nothing_left(world)


async def test_without_the_plugin_no_task_is_refused_silently(tmp_path):
    """A task that asks for a GPU must never run unplaced."""
    with configured():
        bare = World(tmp_path)
        await bare.start(preload=False)
        agent = await bare.agent("a", 24)
        future = submit(bare, plus, 1)
        with pytest.raises(RuntimeError, match="without having been placed"):
            await future
        assert agent.asked == []
        await bare.stop()
