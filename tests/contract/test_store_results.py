"""Files of results and the store's records: what a record names stays, all else goes, on the word of the leader's store."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from manager.core.ids import new_id
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import Claim, ResultFile
from manager.leader_results import AGE_S, LeaderResults
from manager.results.folder import FolderResults
from manager.store.calls import IDS_MAX
from manager.store.calls_leader import Kept, Retention, Swept
from tests.contract.store_harness import Agent, Lab, check_invariants, end, submission


@pytest.fixture
def results(tmp_path: Path) -> FolderResults:
    found = FolderResults(tmp_path / "results")
    found.prepare()
    return found


async def kept(results: FolderResults, task_id: str, attempt: int, data: bytes = b"[1]") -> ResultFile:
    path = results.place(task_id, attempt)
    assert path is not None
    path.write_bytes(data)
    return await results.keep(path, task_id, attempt, len(data), hashlib.sha256(data).hexdigest())


def age(results: FolderResults, seconds: float = AGE_S + 60) -> None:
    """Everything that lies there is so old."""
    for path in results.root.rglob("*"):
        moment = path.stat().st_mtime - seconds
        os.utime(path, (moment, moment))


def checkpoint(results: FolderResults, task_id: str) -> None:
    """As a function keeps one."""
    folder = Path(results.folder(task_id))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").write_bytes(b"x")


def names(results: FolderResults) -> set[str]:
    return {str(path.relative_to(results.root)) for path in results.root.rglob("*-*.json")}


async def succeeded(lab: Lab, results: FolderResults, agent: Agent, slot: str) -> tuple[Claim, ResultFile]:
    """One task more, with its result in a file."""
    await lab.submit()
    claim = await lab.claim(agent, slot)
    file = await kept(results, claim.task_id, claim.attempt)
    await lab.next(agent, slot, 0, end(claim, payload=b"", file=file))
    return claim, file


async def test_a_result_in_a_file_is_named_by_its_record_and_stays(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    claim, file = await succeeded(lab, results, agent, await lab.open(agent))
    record = await lab.record(claim.task_id)
    assert (record.status, record.result, record.result_file) == (TaskStatus.SUCCEEDED, None, file)
    assert await lab.store.kept(lab.token, [claim.task_id, "nobody"]) == [Kept(TaskStatus.SUCCEEDED, 1, file.name), Kept(None)]
    age(results)
    assert await LeaderResults(lab.store, results, lambda: lab.token).scan() == 0
    assert names(results) == {file.name}
    await check_invariants(lab.store)


async def test_what_died_at_any_point_leaves_nothing(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    slots = [await lab.open(agent) for _ in range(3)]
    needed = {(await succeeded(lab, results, agent, slots[0]))[1].name}
    # Killed while it was written; killed when it was written and not told of: the task goes back.
    await lab.submit(2)
    cut, untold = await lab.claim(agent, slots[0]), await lab.claim(agent, slots[1])
    path = results.place(cut.task_id, cut.attempt)
    assert path is not None
    path.write_bytes(b"half")
    await kept(results, untold.task_id, untold.attempt)
    await lab.store.fence(lab.token, "Killed", slots[:2])
    # The attempt after it is written by another agent, which has not told of it yet.
    other = await lab.agent("n2")
    slot = await lab.open(other)
    again = await lab.claim(other, slot)
    needed.add((await kept(results, again.task_id, again.attempt)).name)
    # Tasks that were forgotten, or never were in this store.
    await kept(results, new_id(), 7)
    checkpoint(results, new_id())
    checkpoint(results, again.task_id)
    keeper = LeaderResults(lab.store, results, lambda: lab.token)
    assert await keeper.scan() == 0, "something young was removed"
    age(results)
    assert await keeper.scan() == 4
    assert names(results) == needed
    assert [path.name for path in (results.root / "checkpoints").iterdir()] == [again.task_id]
    await lab.next(other, slot, 0, end(again, Outcome.FAILED))
    age(results)
    assert await keeper.scan() == 2, "the file and the checkpoints of what has failed"
    await check_invariants(lab.store)


async def test_nothing_is_removed_on_the_word_of_another_store(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    _, file = await succeeded(lab, results, agent, await lab.open(agent))
    age(results)
    old = lab.token
    await lab.lead()
    assert await lab.store.kept(old, [new_id()]) is None
    assert await LeaderResults(lab.store, results, lambda: old).scan() == 0
    await lab.raw("FLUSHDB")  # it came back empty
    assert await LeaderResults(lab.store, results, lambda: lab.token).scan() == 0
    assert names(results) == {file.name}


async def test_a_sweep_tells_where_the_results_lay_that_it_forgot(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    slot = await lab.open(agent)
    forgotten = [(await succeeded(lab, results, agent, slot))[1].name for _ in range(3)]
    await lab.submit()
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))  # its result is in the record
    swept = await lab.store.sweep(lab.token, 10**15, 0, 0)
    assert (swept.tasks, sorted(swept.files)) == (4, sorted(forgotten))
    keeper = LeaderResults(lab.store, results, lambda: lab.token)
    keeper.forget(swept.files)
    running = asyncio.create_task(keeper.run())
    try:
        async with asyncio.timeout(5):
            while names(results):  # noqa: ASYNC110 -- files tell nobody that they go
                await asyncio.sleep(0.02)
    finally:
        running.cancel()
    await check_invariants(lab.store)


async def test_each_tenant_is_kept_for_as_long_as_is_set_for_it(lab: Lab):
    for tenant in ("red", "blue", "green"):
        for task_id in await lab.submit(2, tenant=tenant):
            await lab.store.cancel(task_id, tenant)
    now_ms = (await lab.store.look(leader=False)).now_ms + 1000
    await lab.lead()
    own = {"red": Retention(now_ms, 1000), "blue": Retention(0, 1)}
    assert await lab.store.sweep(lab.token, 0, 1000, 0, own) == Swept(3, 0)
    left = {tenant: len((await lab.store.tasks(tenant, None, 10, None, ""))[1]) for tenant in ("red", "blue", "green")}
    assert left == {"red": 0, "blue": 1, "green": 2}
    await check_invariants(lab.store)


async def test_the_look_says_where_tasks_wait_that_ran_out_of_memory(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    task_id = await lab.one()
    larger = submission(memory_gib=2).shape_id

    async def marked() -> dict[str, bool]:
        return {queue.shape_id: queue.out_of_memory for queue in (await lab.store.look(leader=True)).queues}

    assert not any((await marked()).values())
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot), Outcome.OUT_OF_MEMORY))
    assert (await marked())[larger]
    slot = await lab.open(agent, larger)
    claim = await lab.claim(agent, slot)
    assert await lab.store.refuse(lab.token, larger) == 0, "one that runs was refused"
    assert not (await marked())[larger], "nothing that ran out of memory waits there"
    await lab.next(agent, slot, 0, end(claim, Outcome.RETURNED))
    assert (await marked())[larger], "it has come back"
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    assert await lab.store.refuse(lab.token, larger) == 1
    record = await lab.record(task_id)
    assert (record.status, record.error is not None) == (TaskStatus.FAILED, True)
    assert larger not in await marked()
    await check_invariants(lab.store)


async def test_more_files_than_one_call_takes_are_looked_at(lab: Lab, results: FolderResults):
    await lab.lead()
    folder = results.root / "writing"
    for _ in range(IDS_MAX + 5):
        (folder / f"{new_id()}-1.json").write_bytes(b"")
    age(results)
    assert await LeaderResults(lab.store, results, lambda: lab.token).scan() == IDS_MAX + 5
    assert names(results) == set()
