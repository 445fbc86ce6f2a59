"""Placement in a real Dask: slots wait until they fit, go where they were told, and outlive workers and schedulers."""

import random
import time

import dask
import pytest
from distributed import Future

import rocyard
from manager.core.gpu_tasks import GpuAnnotationRefused
from manager.core.news import News
from manager.core.quantities import GIB
from manager.core.shapes import Grant, encode_shape
from plugins.scheduler import dask_setup
from plugins.slot import GpuWorkNotPlaced, run_slot
from tests.integration.dask_world import World, configured, eventually, worlds
from tests.unit import factories as make

pytestmark = pytest.mark.integration


@pytest.fixture
async def world(tmp_path):
    async for made in worlds(tmp_path):
        yield made


def plus(number, more=1):
    return number + more


async def test_a_slot_is_held_until_it_fits_and_gets_what_it_asked_for(world):
    agent = await world.agent("a", 24, 24)
    for slot_id in ("s", "t", "u"):
        await world.submit(slot_id, 16)
    await world.held("u")
    await eventually(lambda: len(agent.live) == 2, "two fit")
    assert agent.live == {"s": make.grant("a", "d0", 16), "t": make.grant("a", "d1", 16)}
    agent.close("t")
    await eventually(lambda: "u" in agent.live, "the third follows")
    assert agent.live["u"] == make.grant("a", "d1", 16)
    assert await world.where("s", "t", "u") == ["placed", "", "placed"]


async def test_a_slot_on_several_devices(world):
    agent = await world.agent("a", 24, 24)
    await world.submit("wide", 20, gpus=2)
    await eventually(lambda: agent.live, "it is open")
    assert agent.live["wide"].devices == ("d0", "d1")


async def test_a_node_that_comes_late_is_used_at_once(world):
    await world.submit("s")
    await world.held("s")
    agent = await world.agent("a", 24)
    registered_s = time.monotonic()
    await eventually(lambda: "s" in agent.live, "it is open", timeout_s=5.0)
    assert time.monotonic() - registered_s < 5.0


async def test_many_slots_come_and_go_and_nothing_is_promised_twice(world):
    chance = random.Random(7)
    agents = [await world.agent(node, 24, 24) for node in "abc"]
    names = [f"s{number}" for number in range(60)]
    for name in names:
        await world.submit(name, chance.choice([2, 6, 12, 20]), chance.choice([1, 1, 1, 2]))

    def end_some():
        for agent in agents:
            for slot_id in [slot for slot in agent.live if chance.random() < 0.5]:
                agent.close(slot_id)
        return sum(len(agent.closed) for agent in agents) == len(names)

    await eventually(end_some, "all have had their turn", timeout_s=30.0)
    await eventually(lambda: not world.ledger.requests, "Dask has forgotten them")
    assert world.ledger.index.grants == {}


async def test_cancelling_the_future_of_a_slot_frees_nothing(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await world.client.cancel([Future("slot-s", world.client)], force=True)
    await eventually(lambda: "s" not in world.ledger.requests, "Dask has forgotten it")
    await world.submit("t")
    await world.held("t")
    assert await world.where("s", "t") == ["leased", "held"]
    await world.submit("s", node="a")
    await eventually(lambda: "s" in world.ledger.requests and "s" not in world.ledger.held, "its task is back on its node")
    assert await world.where("s", "t") == ["placed", "held"]
    agent.close("s")
    await eventually(lambda: "t" in agent.live, "its lease ends when the agent says so")
    await eventually(lambda: "s" not in world.ledger.requests, "so does its task")


async def test_a_slot_that_nobody_submits_again_ends_when_the_agent_says_so(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await world.client.cancel([Future("slot-s", world.client)], force=True)
    await world.submit("t")
    await world.held("t")
    agent.close("s")
    await eventually(lambda: "t" in agent.live, "told with a heartbeat")


async def test_a_slot_outlives_its_dask_worker_and_is_placed_on_its_own_node_again(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    other = await world.agent("b", 24)
    await agent.kill_worker()
    await world.held("s")
    await world.submit("t")
    await eventually(lambda: "t" in other.live, "somebody else goes where there is a worker")
    assert await world.where("s") == ["held"]
    await agent.start_worker()
    await eventually(lambda: agent.asked == ["s", "s"], "it is adopted")
    assert set(agent.live) == {"s"}
    assert "s" not in other.asked


async def test_many_deaths_of_workers_blame_no_slot(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    for life in range(1, 6):
        await eventually(lambda life=life: len(agent.asked) == life, "it is open or adopted")
        await agent.kill_worker()
        await world.held("s")
        await agent.start_worker()
    await eventually(lambda: len(agent.asked) == 6, "it is adopted for the fifth time")


async def test_a_slot_that_ended_while_its_worker_was_away(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await agent.kill_worker()
    await world.submit("t")
    await world.held("s", "t")
    agent.close("s")
    await agent.start_worker()
    await eventually(lambda: "t" in agent.live, "the report has freed the lease")
    await eventually(lambda: "s" not in world.ledger.requests, "it is asked for once more, and is gone")


async def test_a_new_scheduler_learns_the_leases_before_it_places_anything(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    port = world.scheduler.port
    await world.client.close()
    await world.dask.close()
    await world.scheduler.close()
    await agent.worker.close(timeout=1, executor_wait=False, nanny=False)
    await world.start(port=port)
    await world.submit("new")
    await world.submit("s", node="a")
    await world.held("new", "s")
    await agent.start_worker()
    await eventually(lambda: agent.asked == ["s", "s"], "it is adopted")
    assert await world.where("s", "new") == ["placed", "held"]
    assert set(agent.live) == {"s"}
    agent.close("s")
    await eventually(lambda: "new" in agent.live, "then the new one")


async def test_client_restart_ends_no_slot(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    old = agent.worker
    await world.client.restart(wait_for_workers=False, timeout=5)
    await old.finished()
    assert set(agent.live) == {"s"}
    await agent.start_worker()
    await eventually(lambda: world.ledger.index.grants, "its lease is known")
    assert await world.where("s") == ["leased"]
    await world.submit("s", node="a")
    await eventually(lambda: agent.asked == ["s", "s"], "it is adopted")


async def test_a_held_slot_that_is_cancelled_leaves_nothing(world):
    await world.submit("s")
    await world.held("s")
    await world.client.cancel([Future("slot-s", world.client)], force=True)
    await eventually(lambda: not world.ledger.requests, "it is forgotten")
    assert (len(world.ledger.held), world.ledger.index.grants) == (0, {})


async def test_slots_outlive_the_client_that_asked_for_them(world):
    """The controller may die: what it has asked for is placed all the same, and what is open stays."""
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await world.submit("t")
    await world.held("t")
    await world.dask.close()
    await eventually(lambda: len(world.scheduler.clients) == 2, "it is gone: ours, and Dask's own for such tasks")
    assert await world.where("s", "t") == ["placed", "held"]
    agent.close("s")
    await eventually(lambda: "t" in agent.live, "the next one follows")


async def test_a_node_whose_agent_is_silent_gets_nothing_new_and_keeps_what_it_has(world):
    agent = await world.agent("a", 24)
    await world.submit("s", 8)
    await eventually(lambda: "s" in agent.live, "it is open")
    agent.frozen.clear()
    await eventually(lambda: world.ledger.index.nodes["a"].cordoned, "its silence is noticed", timeout_s=10.0)
    await world.submit("t", 8)
    with rocyard.gpu(memory="8GiB"):
        future = world.client.submit(plus, 1, pure=False)
    await eventually(lambda: len(world.ledger.held) == 2, "both wait, although there is room")
    assert set(world.ledger.index.grants) == {"s"}
    agent.frozen.set()
    await eventually(lambda: len(agent.live) == 3, "it speaks again, and has both", timeout_s=10.0)
    agent.finish(next(iter(agent.direct)))
    assert await future == 2


async def test_a_retired_worker_takes_nothing_new_and_its_slots_live_on(world):
    agent = await world.agent("a", 48)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    with rocyard.gpu(memory="8GiB"):
        future = world.client.submit(plus, 1, pure=False)
    await eventually(lambda: agent.direct, "a Dask task runs")
    (first,) = agent.direct
    old = agent.worker
    await world.client.retire_workers([old.address])
    await old.finished()
    await world.submit("t")
    await eventually(lambda: first in agent.closed, "the Dask task's process ended with its worker")
    await world.held("s", "t")
    assert set(agent.live) == {"s"}
    await agent.start_worker()
    await eventually(lambda: set(agent.live) >= {"s", "t"} and agent.direct, "all of it is there again")
    assert agent.asked.count("s") == 2, "adopted"
    agent.finish(next(iter(agent.direct)))
    assert await future == 2


async def test_a_slot_whose_link_breaks_keeps_its_lease_until_its_node_has_registered(world):
    """Its Dask task fails, and Dask tries none again by itself."""
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    agent.endings.pop("s").set_exception(ConnectionError("as played"))
    await eventually(lambda: "s" not in world.ledger.requests, "its task has failed")
    assert await world.where("s") == ["leased"]
    assert agent.asked == ["s"]
    del agent.live["s"]
    await agent.kill_worker()
    await agent.start_worker()
    await eventually(lambda: world.ledger.index.grants == {}, "the report has freed the lease")


async def test_a_worker_without_a_report_gets_no_gpu_work_and_plain_work_all_the_same(world):
    worker = await world.plain_worker()
    await world.submit("s")
    await world.held("s")
    assert await world.client.submit(plus, 1, workers=[worker.address]) == 2
    assert await world.where("s") == ["held"]


async def test_plain_tasks_run_while_slots_are_open_and_held(world):
    """The worker has one thread: a slot that held it would stop everything else."""
    agent = await world.agent("a", 24, 24)
    for slot_id in ("s", "t", "u"):
        await world.submit(slot_id)
    await eventually(lambda: len(agent.live) == 2, "two are open")
    await world.held("u")
    assert await world.client.gather(world.client.map(plus, range(20))) == list(range(1, 21))
    assert len(agent.live) == 2


async def test_stealing_leaves_slots_alone(world):
    agent = await world.agent("a", 96)
    for number in range(8):
        await world.submit(f"s{number}", 8)
    await eventually(lambda: len(agent.live) == 8, "all are open")
    other = await world.agent("b", 96)
    await world.client.gather(world.client.map(plus, range(200)))
    assert (len(agent.asked), other.asked) == (8, [])
    assert all(ws.processing for ws in world.scheduler.workers.values() if ws.address == agent.worker.address)


# --- work that must not run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [{"slot": "other", "shape": "{}"}, {"slot": "x"}, {"slot": "x", "shape": "?"}, 7, "16GiB"])
async def test_a_request_that_cannot_be_read_never_runs(world, wanted):
    world.hook_errors_expected = int(isinstance(wanted, dict) and wanted["slot"] == "x")
    agent = await world.agent("a", 24)
    with dask.annotate(gpu=wanted):
        future = world.client.submit(plus, 1, key="slot-x")
    if world.hook_errors_expected:
        await eventually(lambda: "slot-x" in world.scheduler.tasks, "it is known")
        await world.submit("well")
        await eventually(lambda: "well" in agent.live, "another one is placed")
        assert world.scheduler.tasks["slot-x"].state == "no-worker"
        assert (agent.asked, set(world.ledger.index.grants)) == (["well"], {"well"})
    else:
        with pytest.raises(GpuAnnotationRefused):
            await future
        assert (agent.asked, world.ledger.index.grants) == ([], {})


async def test_without_the_plugin_no_slot_is_opened(tmp_path):
    with configured():
        bare = World(tmp_path)
        await bare.start(preload=False)
        agent = await bare.agent("a", 24)
        with dask.annotate(gpu={"slot": "s", "shape": encode_shape(bare.shape(16)).decode(), "node": ""}):
            future = bare.client.submit(run_slot, "s", key="slot-s")
        with pytest.raises(GpuWorkNotPlaced):
            await future
        assert (agent.asked, agent.live) == ([], {})
        await bare.stop()


async def test_without_the_plugin_a_worker_refuses_gpu_work(tmp_path):
    with configured():
        bare = World(tmp_path)
        await bare.start(preload=False)
        agent = await bare.agent("a", 24)
        with dask.annotate(gpu={"memory": "16GiB"}):
            future = bare.client.submit(plus, 1, retries=0)
        with pytest.raises(GpuWorkNotPlaced):
            await future
        assert agent.live == {}
        await bare.stop()


async def test_somebodys_own_task_may_be_called_like_a_slot(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    assert await world.client.submit(plus, 1, key="slot-mine") == 2
    assert "s" in world.ledger.index.grants
    future = world.client.submit(time.monotonic, key="slot-moved", pure=False)
    await future
    await agent.kill_worker()
    await world.plain_worker()
    assert await future > 0, "recomputed elsewhere, and not held like a slot"


# --- the controller's words -----------------------------------------------------------------------------------------


async def test_a_slot_that_was_placed_and_not_opened_is_taken_back(world):
    agent = await world.agent("a", 24)
    agent.frozen.clear()
    await world.submit("s")
    await eventually(lambda: "s" in world.ledger.index.grants, "it is placed")
    await world.drop("s")
    assert await world.where("s") == [""]
    await world.submit("t")
    await eventually(lambda: "t" in world.ledger.index.grants, "its memory is free again")
    agent.frozen.set()
    await eventually(lambda: "t" in agent.live, "the agent refuses the one and opens the other")
    assert "s" not in agent.live


async def test_a_lost_node_gets_nothing_until_another_incarnation_registers(world):
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await world.dask.lost("a", "i1")
    assert world.ledger.index.grants == {}
    await world.submit("t")
    await world.held("t")
    agent.live.clear()
    await agent.kill_worker()
    agent.incarnation = "i2"
    await agent.start_worker()
    await eventually(lambda: "t" in agent.live, "the new incarnation is trusted")


async def test_a_worker_that_registers_after_its_successor_is_not_heard(world):
    agent = await world.agent("a", 24)
    newest, address, generation = agent.worker, agent.worker.address, agent.generation
    agent.generation -= 2
    await agent.start_worker()
    assert world.plugin.addresses == {"a": address}
    await agent.kill_worker()
    assert world.plugin.addresses == {"a": address}, "its end is nothing to its successor"
    agent.worker, agent.generation = newest, generation
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is placed")


async def test_room_that_is_kept_goes_to_the_slot_that_it_is_kept_for(world):
    agent = await world.agent("a", 24)
    await world.submit("s", 12)
    await world.submit("t", 12)
    await eventually(lambda: len(agent.live) == 2, "the device is full")
    await world.submit("small", 12)
    await world.submit("large", 24)
    await world.held("small", "large")
    await world.dask.keep({"large": make.grant("a", "d0", 24)})
    assert world.ledger.index.kept == {"large": Grant("a", ("d0",), 24 * GIB)}
    agent.close("s")
    await eventually(lambda: "s" not in world.ledger.requests, "half of it is free")
    assert await world.where("small", "large") == ["held", "held"]
    agent.close("t")
    await eventually(lambda: "large" in agent.live, "the large one has it all")


async def test_asking_twice_for_a_slot_changes_nothing(world):
    agent = await world.agent("a", 24)
    for _ in range(3):
        await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    await world.submit("s")
    assert await world.where("s") == ["placed"]
    assert agent.asked == ["s"]


# --- the plugin's own errors ----------------------------------------------------------------------------------------


async def test_an_exception_in_a_hook_is_counted_and_stops_nothing(world, monkeypatch):
    world.hook_errors_expected = 1

    def broken(report, now_s):
        raise KeyError(report.node)

    with monkeypatch.context() as patched:
        patched.setattr(world.ledger, "register", broken)
        await world.agent("a", 24)
    await world.submit("s")
    await world.held("s")
    agent = await world.agent("b", 24)
    await eventually(lambda: "s" in agent.live, "the next node is used")


async def test_an_exception_in_the_pump_loses_no_slot(world, monkeypatch):
    world.hook_errors_expected = 1
    agent = await world.agent("a", 24)
    transitions = world.scheduler.transitions

    def broken(recommendations, stimulus_id):
        monkeypatch.setattr(world.scheduler, "transitions", transitions)
        raise RuntimeError(stimulus_id)

    await world.submit("first", 4)
    await eventually(lambda: "first" in agent.live, "it is open")
    await world.submit("s", 24)
    await world.held("s")
    monkeypatch.setattr(world.plugin.scheduler, "transitions", broken)
    world.ledger.ended("first", time.monotonic())
    agent.close("first")
    world.plugin.ask_pump()
    await eventually(lambda: "s" in agent.live, "it is placed by the next pump")


async def test_a_second_preload_changes_nothing(world):
    plugin = world.plugin
    handler = world.scheduler.handlers["rocyard_slots"]
    await dask_setup(world.scheduler)
    assert world.plugin is plugin
    assert world.scheduler.handlers["rocyard_slots"] == handler
    agent = await world.agent("a", 24)
    await world.submit("s")
    await eventually(lambda: "s" in agent.live, "it is open")
    assert await world.where("s") == ["placed"]


async def test_the_mix_of_requests_is_told_until_it_is_known(world):
    names = [f"s{number}" for number in range(8)]
    for number, name in enumerate(names):
        await world.submit(name, 4 + number % 2)
    await world.held(*names)
    await world.dask.slots()
    told = world.dask.mix
    assert told == world.ledger.mix.told
    assert dict(told.shares) == {make.need(4): 0.5, make.need(5): 0.5}
    await world.dask.tell(News(mix_known=told.revision))
    await world.dask.slots()
    assert world.dask.mix is None
    await world.dask.tell(News(mix_known="of another scheduler"))
    await world.dask.slots()
    assert world.dask.mix == told
