"""Files of results and the store's records: what a record names stays, all else goes, on the word of the leader's store."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog.testing

from manager.backup import make_backup, restore_into
from manager.core.ids import new_id
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import Claim, ResultFile
from manager.leader_results import AGAIN_S, AGE_S, SCAN_S, LeaderResults
from manager.metrics import RESULTS_REFUSED
from manager.results.folder import FolderResults
from manager.results.store import GUEST_S
from manager.store.calls import IDS_MAX
from manager.store.calls_leader import Kept, Retention, Swept
from tests.contract.store_harness import FAST, Agent, Lab, StoreServer, check_invariants, connected, end, submission

OURS, THEIRS = "01k9ez00000000000000000001", "01k9ez00000000000000000002"
"""Identities of clusters that were made before any task of these tests."""


@pytest.fixture
def results(tmp_path: Path) -> FolderResults:
    found = FolderResults(tmp_path / "results")
    found.prepare()
    return found


async def kept(results: FolderResults, task_id: str, attempt: int, data: bytes = b"[1]") -> ResultFile:
    slot = new_id()
    path = results.place(task_id, attempt, slot)
    path.write_bytes(data)
    return await results.keep(path, task_id, attempt, slot, len(data), hashlib.sha256(data).hexdigest())


async def keeper_of(lab: Lab, results: FolderResults, cluster: str = OURS) -> LeaderResults:
    """Of the leader that `lab` has at the time; `cluster` becomes the identity of a store that has none."""
    await lab.store.identify(cluster)
    return LeaderResults(lab.store, results, lambda: lab.token)


def give_to(results: FolderResults, cluster: str) -> None:
    """As a person does who was told to: the cluster's mark is the only one."""
    marker = Path(results.marker(cluster))
    marker.parent.mkdir(exist_ok=True)
    for path in marker.parent.iterdir():
        path.unlink()
    marker.touch()


async def refusal_of(keeper: LeaderResults) -> str:
    """What a leader says that removes nothing, and that it does so once."""
    with structlog.testing.capture_logs() as said:
        assert await keeper.scan() == 0
        assert await keeper.scan() == 0
    (line,) = [entry for entry in said if entry["event"] == "results_not_ours"]
    assert RESULTS_REFUSED._value.get() == 1
    return f"{line['cluster']}: {line['error']}; {line['remedy']}"


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
    assert await (await keeper_of(lab, results)).scan() == 0
    assert names(results) == {file.name}
    await check_invariants(lab.store)


async def test_what_died_at_any_point_leaves_nothing(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    slots = [await lab.open(agent) for _ in range(3)]
    needed = {(await succeeded(lab, results, agent, slots[0]))[1].name}
    # Killed while it was written; killed when it was written and not told of: the task goes back.
    await lab.submit(2)
    cut, untold = await lab.claim(agent, slots[0]), await lab.claim(agent, slots[1])
    results.place(cut.task_id, cut.attempt, new_id()).write_bytes(b"half")
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
    keeper = await keeper_of(lab, results)
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
    keeper = await keeper_of(lab, results)
    assert await keeper.scan() == 0
    await kept(results, new_id(), 1)
    age(results)
    old = lab.token
    await lab.lead()
    assert await lab.store.kept(old, [new_id()]) is None
    assert await LeaderResults(lab.store, results, lambda: old).scan() is None
    await lab.raw("FLUSHDB")  # it came back empty
    assert await keeper.scan() is None
    assert len(names(results)) == 2
    assert file.name in names(results)


# --- whose it is ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def other(store_server: StoreServer, tmp_path: Path) -> AsyncIterator[Lab]:
    """The store of another cluster, on a server of its own."""
    server = StoreServer(tmp_path / "other", store_server.name, *FAST).start()
    async with connected(server.url) as lab:
        yield lab
    server.kill()


async def test_of_two_clusters_with_one_results_store_neither_removes_what_the_other_one_keeps(
    lab: Lab, other: Lab, results: FolderResults
):
    ours = await keeper_of(lab, results)
    agent = await lab.agent()
    file = (await succeeded(lab, results, agent, await lab.open(agent)))[1]
    assert await ours.scan() == 0
    left = await kept(results, new_id(), 1)
    age(results)
    theirs = await keeper_of(other, results, THEIRS)
    await other.lead()
    said = await refusal_of(theirs)
    assert said.startswith(f"{THEIRS}: it is marked as that of cluster {OURS}; give each cluster a results.url of its own")
    assert f"cluster {THEIRS} keeps results there too" in await refusal_of(ours)
    assert names(results) == {file.name, left.name}
    # What its own records have named goes as ever.
    named = await kept(results, new_id(), 1)
    theirs.forget([named.name])
    await theirs._step()
    assert names(results) == {file.name, left.name}
    age(results, GUEST_S + 60)  # the second one has been given another place
    assert await ours.scan() == 1
    assert names(results) == {file.name}
    # The first cluster is given up, as the line has said.
    give_to(results, THEIRS)
    assert await theirs.scan() == 1
    assert names(results) == set()
    assert RESULTS_REFUSED._value.get() == 0


async def test_files_of_a_store_that_was_lost_wait_for_its_backup(
    own_server: StoreServer, results: FolderResults, tmp_path: Path
):
    async with connected(own_server.url) as lab:
        agent = await lab.agent()
        keeper = await keeper_of(lab, results)
        claim, file = await succeeded(lab, results, agent, await lab.open(agent))
        assert await keeper.scan() == 0
        await make_backup(lab.url, tmp_path / "b", lambda *_: None)
        # Its volume is gone, and the controllers that are started then make it a new cluster.
        await lab.raw("FLUSHALL")
        await lab.store.deploy()
        await lab.lead()
        founded = await keeper_of(lab, results, new_id())
        agent = await lab.agent()
        meanwhile = (await succeeded(lab, results, agent, await lab.open(agent)))[1]
        age(results)
        assert f"it is marked as that of cluster {OURS}" in await refusal_of(founded)
        assert names(results) == {file.name, meanwhile.name}
        await lab.raw("FLUSHALL")
        await restore_into(tmp_path / "b", lab.url, lambda *_: None)
        await lab.store.deploy()
        await lab.lead()
        assert "keeps results there too" in await refusal_of(keeper)
        age(results, GUEST_S + 60)
        assert await keeper.scan() == 1, "what the cluster in between has kept"
        assert names(results) == {file.name}
        assert (await lab.record(claim.task_id)).result_file == file


async def test_results_without_a_mark_are_claimed_by_whom_they_can_belong_to(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    keeper = await keeper_of(lab, results)
    await kept(results, new_id(), 1)
    await lab.lead()
    age(results)
    assert "nothing in it is of a task that this one knows" in await refusal_of(keeper)
    assert await results.owner() == ""
    file = (await succeeded(lab, results, agent, await lab.open(agent)))[1]
    assert await keeper.scan() == 1, "the one that nobody knows"
    assert await results.owner() == OURS
    assert names(results) == {file.name}


async def test_a_cluster_that_was_just_made_claims_nothing_from_before(lab: Lab, results: FolderResults):
    """Whatever it has kept there itself: the store from before may come back."""
    before = await kept(results, new_id(), 1)
    while (cluster := new_id()) <= before.name.split("/")[2][:26]:
        pass  # the clock of ids has not moved on
    keeper = await keeper_of(lab, results, cluster)
    agent = await lab.agent()
    file = (await succeeded(lab, results, agent, await lab.open(agent)))[1]
    age(results)
    said = await refusal_of(keeper)
    assert f"{before.name} is of a task from before this one was made" in said
    assert f"make {results.root}/cluster/{cluster} the one file of its folder" in said
    assert names(results) == {before.name, file.name}
    give_to(results, cluster)
    assert await keeper.scan() == 1
    assert names(results) == {file.name}


async def test_a_results_store_where_nobody_has_been_is_claimed_once_it_is_there(lab: Lab, tmp_path: Path):
    results = FolderResults(tmp_path / "later")
    keeper = await keeper_of(lab, results)
    assert await keeper.scan() is None
    results.prepare()
    assert await keeper.scan() == 0
    assert await results.owner() == OURS


async def test_a_scan_that_is_cut_short_is_made_again_soon(lab: Lab, results: FolderResults, monkeypatch: pytest.MonkeyPatch):
    await lab.lead()
    now_s = 0.0
    monkeypatch.setattr("manager.leader_results.time.monotonic", lambda: now_s)
    keeper = await keeper_of(lab, results)
    assert await keeper.scan() == 0
    left = await kept(results, new_id(), 1)
    age(results)
    await keeper._step()
    now_s += SCAN_S
    real, token = lab.store.kept, lab.token

    async def doubtful(_token: int, task_ids: list[str]) -> list[Kept] | None:
        return await real(0, task_ids)  # the leader has not been sure of its term for a moment

    monkeypatch.setattr(lab.store, "kept", doubtful)
    await keeper._step()
    assert names(results) == {left.name}
    monkeypatch.setattr(lab.store, "kept", real)
    now_s += AGAIN_S
    await keeper._step()
    assert (names(results), lab.token) == (set(), token)


# --- what a sweep forgets -------------------------------------------------------------------------------------------


async def test_a_sweep_tells_where_the_results_lay_that_it_forgot(lab: Lab, results: FolderResults):
    agent = await lab.agent()
    slot = await lab.open(agent)
    forgotten = [(await succeeded(lab, results, agent, slot))[1].name for _ in range(3)]
    await lab.submit()
    await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))  # its result is in the record
    swept = await lab.store.sweep(lab.token, 10**15, 0, 0)
    assert (swept.tasks, sorted(swept.files)) == (4, sorted(forgotten))
    keeper = await keeper_of(lab, results)
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
    keeper = await keeper_of(lab, results)
    assert await keeper.scan() == 0
    folder = results.root / "writing"
    for _ in range(IDS_MAX + 5):
        (folder / f"{new_id()}-1-{new_id()}.json").write_bytes(b"")
    age(results)
    assert await keeper.scan() == IDS_MAX + 5
    assert names(results) == set()
