"""A full store refuses new work, and lets everything end that runs."""

import pytest

from manager.controller import Controller
from manager.core.errors import StoreFull
from manager.core.lifecycle import Outcome, SlotFlag, TaskStatus
from manager.core.mix import NO_MIX
from manager.dask_side import DaskSide
from manager.settings import Settings, TaskSettings
from tests.contract.store_harness import INFO, RED, Lab, end, granted


@pytest.fixture
async def full(lab: Lab):
    """`fill()` takes all memory from the store."""

    async def fill() -> None:
        await lab.raw("CONFIG", "SET", "maxmemory", 1)

    yield fill
    await lab.raw("CONFIG", "SET", "maxmemory", 0)


async def test_a_full_store_refuses_submissions_and_nothing_else(lab: Lab, full):
    agent = await lab.agent()
    tasks = await lab.submit(8, max_attempts=2)
    slot, other, requested, unwanted = await lab.open(agent), await lab.open(agent), await lab.request(), await lab.request()
    claims = (await lab.next(agent, slot, 5)).claims
    await full()

    with pytest.raises(StoreFull):
        await lab.submit()
    ends = (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CRASHED, Outcome.LOST, Outcome.RETURNED)
    assert (await lab.next(agent, slot, 0, *(end(c, o, chance=0.0) for c, o in zip(claims, ends, strict=True)))).statuses == (
        TaskStatus.SUCCEEDED,
        TaskStatus.RETRY_WAIT,
        TaskStatus.QUEUED,
        TaskStatus.QUEUED,
        TaskStatus.QUEUED,
    )
    assert (await lab.store.due())[0].retried == 1
    claim = await lab.claim(agent, slot)
    await lab.store.started(slot, agent.incarnation, [(claim.task_id, claim.attempt, 0.1)])
    await lab.store.keep_log(claim.task_id, claim.attempt, b"x" * 1000, b"", 0)  # logs are dropped, without an error
    assert await lab.store.cancel(claim.task_id, "red") is TaskStatus.RUNNING
    assert await lab.store.cancels(slot) == {claim.task_id}
    assert await lab.store.cancel(tasks[7], "red") is TaskStatus.CANCELLED
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, False), (other, True)])).holds
    assert (await lab.store.open_slot(requested, agent.incarnation, granted("n1", "gpu-0"))).word == "OK"
    assert await lab.store.flag(lab.token, SlotFlag.CLOSE, [requested])
    assert await lab.store.drop(lab.token, "Test", [unwanted]) == [unwanted]
    assert await lab.store.request_slot(lab.token, "one-more", RED, 0)
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    assert await lab.store.fence(lab.token, "Test", [other])
    assert await lab.store.planned(lab.token, 0, [(claim.task_id, 1)])
    assert await lab.store.put_mix(lab.token, NO_MIX)
    await lab.store.look(leader=True)
    assert len((await lab.store.tasks("red", None, 10, None, ""))[1]) == 8
    assert (await lab.store.lost(lab.token, "n1", agent.incarnation))[0]
    assert not await lab.store.register("n1", agent.incarnation, INFO)
    await lab.lead()
    await lab.store.sweep(lab.token, 10**15, 0, 10**15)
    fresh = await lab.agent()
    await lab.store.leave("n1", fresh.incarnation)


async def test_a_new_leader_makes_room_in_a_full_store(lab: Lab, full):
    """It cannot say where it is, nor reach Dask: what it forgets makes the room."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    done = await lab.submit(2)
    for claim in (await lab.next(agent, slot, 2)).claims:
        await lab.next(agent, slot, 0, end(claim, Outcome.SUCCEEDED))
    waiting = await lab.one()
    await full()
    settings = Settings(tasks=TaskSettings(retained_max=1))
    leader = Controller(settings, lab.store, lab.store.connection, DaskSide("tcp://127.0.0.1:1", run_nothing))
    _, token, _, holder = await lab.store.lead("", 0, 0, "read")
    await lab.store.lead(holder, token, 0, "resign")
    assert await leader.leadership.step()
    await leader.round()
    assert await lab.store.services() == {}
    assert [await lab.store.task(task_id) is None for task_id in done].count(True) == 1
    assert await lab.status(waiting) is TaskStatus.QUEUED
    await lab.raw("CONFIG", "SET", "maxmemory", 0)
    await leader.round()
    assert "controller" in await lab.store.services()


async def run_nothing(_slot_id: str) -> str:
    raise AssertionError("nothing reaches Dask")


async def test_a_full_store_takes_submissions_again_once_there_is_room(lab: Lab, full):
    await full()
    with pytest.raises(StoreFull):
        await lab.submit()
    await lab.raw("CONFIG", "SET", "maxmemory", 0)
    assert await lab.submit()
