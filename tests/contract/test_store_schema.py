"""Whose the store is and which library it has: processes of several versions side by side, and a store that is not ours.

`golden/` has calls as processes of each version send them; every later library must go on to answer them.
"""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from manager import controller
from manager.core.errors import StoreNew, StoreReplaced, StoreTooNew, StoreUnavailable
from manager.core.keys import SCHEMA_VERSION, Keys
from manager.store import Store, StoreConnection, schema
from manager.store.connection import Ask, StoreReplyError
from manager.store.schema import Library, Membership, deploy, library_source, library_text, own_library
from tests.contract.golden_calls import argument, digests, golden, shape_of_answer
from tests.contract.store_harness import Lab, StoreServer, check_invariants, connected, end

META = Keys().meta


@asynccontextmanager
async def process(url: str, **more: Any) -> AsyncIterator[tuple[Store, Membership]]:
    """The store of a process of a cluster."""
    membership = Membership(**more)
    store = Store(StoreConnection(url, 5.0, "process", gate=membership))
    try:
        yield store, membership
    finally:
        await store.connection.close()


@pytest.fixture
async def empty(store_server: StoreServer) -> AsyncIterator[Lab]:
    """A store without anything in it."""
    async with connected(store_server.url) as made:
        await made.raw("FLUSHALL")
        await made.raw("FUNCTION", "FLUSH")
        yield made


# --- identity -----------------------------------------------------------------------------------------------------


async def test_only_a_founder_gives_an_empty_store_an_identity(empty: Lab):
    async with process(empty.url) as (other, _):
        with pytest.raises(StoreNew, match="has no identity yet"):
            await other.counts()
        assert await empty.raw("DBSIZE") == 0, "somebody wrote into a store that is nobody's"
        async with process(empty.url, founder=True) as (_store, founder):
            await _store.counts()
            await other.counts()
            assert await empty.store.identity() == founder.cluster != ""
        assert (await schema.read_facts(empty.raw, Keys())).schema == SCHEMA_VERSION


async def test_many_founders_give_one_identity(empty: Lab):
    async def found() -> str:
        async with process(empty.url, founder=True) as (store, membership):
            await store.counts()
            return membership.cluster

    assert len(set(await asyncio.gather(*(found() for _ in range(8))))) == 1


async def test_a_store_that_comes_back_empty_is_refused_until_the_data_are_back(own_server: StoreServer):
    """By every call, without a word written into it, over the connections that are made anew."""
    async with process(own_server.url, founder=True) as (store, membership):
        await store.counts()
        cluster = membership.cluster
        folder = Path(own_server.spec.stdin_text.value.split('dir "')[1].split('"')[0])
        own_server.kill()
        kept = folder.with_name("kept")
        shutil.move(folder, kept)
        own_server.start()
        with pytest.raises(StoreReplaced, match=f"is empty, but this process belongs to cluster {cluster}"):
            await _until_answered(store)
        for call in (store.look(leader=False), store.due(), store.services()):
            with pytest.raises(StoreReplaced):
                await call
        async with connected_raw(own_server.url) as raw:
            assert await raw("DBSIZE") == 0
            assert not await raw("FUNCTION", "LIST"), "the library was loaded into a store that is not ours"
        own_server.kill()
        shutil.move(folder, folder.with_name("empty"))
        shutil.move(kept, folder)
        own_server.start()
        assert await _until_answered(store) == {}
        assert membership.refusal is None


@asynccontextmanager
async def connected_raw(url: str) -> AsyncIterator[Any]:
    connection = StoreConnection(url, 5.0, "raw")
    yield connection.call
    await connection.close()


async def _until_answered(store: Store) -> dict[str, int]:
    """What the store says, once it is there."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await store.counts()
            except StoreReplaced:
                raise
            except StoreUnavailable:
                await asyncio.sleep(0.02)


async def test_another_clusters_store_is_refused(empty: Lab):
    await empty.store.identify("theirs")
    async with process(empty.url, cluster="ours", founder=True) as (store, _):
        with pytest.raises(StoreReplaced, match=r"belongs to another cluster \(theirs\)"):
            await store.counts()


async def test_a_store_that_is_emptied_behind_a_connection_is_noticed(empty: Lab):
    async with process(empty.url, founder=True) as (store, _):
        await store.counts()
        await empty.raw("FLUSHALL")
        with pytest.raises(StoreReplaced):
            await _asked_for_long(store)


async def _asked_for_long(store: Store) -> None:
    """Ask again and again; the first refusal ends it."""
    async with asyncio.timeout(5):
        while True:
            await store.counts()
            await asyncio.sleep(0.02)


async def test_nobody_is_fenced_by_a_store_that_is_not_ours(empty: Lab):
    """The beat of an agent that an empty store does not know: its executors go on."""
    async with process(empty.url, founder=True) as (store, _):
        await store.counts()
        agent = await Lab(store, empty.url).agent()
        await empty.raw("FLUSHALL")
        with pytest.raises(StoreReplaced):
            await store.beat(agent.node, agent.incarnation, [])


async def test_the_library_is_not_loaded_into_a_store_that_is_not_ours(empty: Lab):
    async with process(empty.url, founder=True) as (store, _):
        await store.counts()
        await empty.raw("FLUSHALL")
        await empty.raw("FUNCTION", "FLUSH")
        with pytest.raises(StoreReplaced):
            await store.due()
        assert not await empty.raw("FUNCTION", "LIST")


async def test_a_refusal_is_said_once(empty: Lab, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(schema.log, "error", lambda event, **_: said.append(event))
    await empty.store.identify("theirs")
    async with process(empty.url, cluster="ours") as (store, _):
        for _ in range(3):
            with pytest.raises(StoreReplaced):
                await store.counts()
    assert said == ["store_refused"]


async def test_a_store_that_is_being_restored_is_founded_by_nobody(empty: Lab):
    await empty.raw("HSET", META, "restoring", "backup")
    async with process(empty.url, founder=True) as (store, _):
        with pytest.raises(StoreUnavailable, match="run 'rocyard restore' again"):
            await store.counts()


# --- versions -----------------------------------------------------------------------------------------------------


async def test_a_process_that_is_too_old_is_told_so_and_ends(empty: Lab):
    ended: list[bool] = []
    await empty.store.identify("ours")
    await empty.raw("HSET", META, "schema", SCHEMA_VERSION + 2, "schema_min", SCHEMA_VERSION + 1)
    async with process(empty.url, on_outdated=lambda: ended.append(True)) as (store, membership):
        for _ in range(2):
            with pytest.raises(StoreTooNew) as caught:
                await store.counts()
        assert ended == [True]
        words = str(caught.value)
        assert f"schema {SCHEMA_VERSION + 2}" in words
        assert f"schema {SCHEMA_VERSION + 1} or newer" in words
        assert f"this process knows schema {SCHEMA_VERSION}" in words
        with pytest.raises(StoreTooNew):
            membership.raise_if_outdated()


async def test_a_process_learns_while_it_runs_that_it_is_too_old(empty: Lab):
    ended = asyncio.Event()
    async with process(empty.url, founder=True, on_outdated=ended.set) as (store, _):
        await store.counts()
        await empty.raw("HSET", META, "schema_min", SCHEMA_VERSION + 1)
        async with asyncio.timeout(5):
            await ended.wait()
        with pytest.raises(StoreTooNew):
            await store.counts()


async def test_a_newer_schema_that_older_processes_may_use_is_no_reason_to_stop(empty: Lab):
    await empty.store.identify("ours")
    await empty.raw("HSET", META, "schema", SCHEMA_VERSION + 5)
    async with process(empty.url) as (store, _):
        assert await store.counts() == {}
        assert await store.migrate() == 0


async def test_an_older_process_does_not_replace_a_newer_library(empty: Lab):
    """And goes on to work with it; the newer one replaces an older one."""
    source = f"{library_source()}\nredis.register_function('ry_newer', function() return 1 end)"
    newer = Library(schema.LIBRARY_VERSION + 1, source)
    async with process(empty.url, founder=True) as (old, _):
        await old.counts()
        async with process(empty.url, library=newer) as (new, _):
            await new.counts()
        assert await empty.raw("FCALL", "ry_newer", 0) == 1
        async with process(empty.url) as (late, _):  # an older one that starts beside it
            await late.counts()
            lab = Lab(late, empty.url)
            agent = await lab.agent()
            task = await lab.one()
            claim = await lab.claim(agent, await lab.open(agent))
            assert claim.task_id == task
            await old.next(lab_slot(claim, await late.look(leader=False)), agent.incarnation, 0, [end(claim)])
            await late.deploy()
        assert await empty.raw("FCALL", "ry_newer", 0) == 1
        await check_invariants(old)


def lab_slot(claim: Any, state: Any) -> str:
    return next(slot.slot_id for slot in state.slots if slot.running)


async def test_an_older_process_does_not_bring_back_a_newer_library_that_was_lost(empty: Lab):
    async with process(empty.url, founder=True) as (store, _):
        await store.counts()
        await empty.raw("HSET", META, "library_version", schema.LIBRARY_VERSION + 1)
        await empty.raw("FUNCTION", "FLUSH")
        with pytest.raises(StoreUnavailable, match="a process of the newer version loads them again"):
            await store.due()
        assert not await empty.raw("FUNCTION", "LIST")


async def test_processes_that_start_at_once_never_lower_the_library(empty: Lab):
    """Each looks, then loads: between the two somebody newer may have come."""

    async def load(version: int) -> None:
        code = f"#!lua name=rocyard\nredis.register_function('ry_version', function() return {version} end)"

        async def action(ask: Ask) -> None:
            async def slowly(*args: Any) -> Any:
                reply = await ask(*args)
                await asyncio.sleep(0.001 * (version % 3))
                return reply

            await deploy(slowly, Keys(), Library(version, code))

        await empty.store.connection.apart(action)

    for _ in range(5):
        await empty.raw("FLUSHALL")
        await empty.raw("FUNCTION", "FLUSH")
        await asyncio.gather(*(load(version) for version in (3, 7, 5, 4, 6, 3)))
        assert await empty.raw("HGET", META, "library_version") == b"7"
        assert await empty.raw("FCALL", "ry_version", 0) == 7


async def test_the_same_version_with_other_text_is_replaced(empty: Lab):
    """What a developer has while he changes it."""
    await empty.store.deploy()
    await empty.raw("HSET", META, "library", "another")
    await empty.raw("FUNCTION", "LOAD", "REPLACE", "#!lua name=rocyard\nredis.register_function('ry_old', function() end)")
    await empty.store.deploy()
    with pytest.raises(StoreReplyError, match="not found"):
        await empty.raw("FCALL", "ry_old", 0)


async def test_a_library_that_was_replaced_by_hand_is_put_right(empty: Lab):
    """What is noted of it still says that all is well."""
    await empty.store.deploy()
    noted = await empty.raw("HGETALL", META)
    changed = library_source().replace("function_name = 'ry_cancel'", "function_name = 'ry_cancel_other'")
    await empty.raw("FUNCTION", "LOAD", "REPLACE", changed)
    await empty.store.deploy()
    listed = await empty.raw("FUNCTION", "LIST", "LIBRARYNAME", "rocyard", "WITHCODE")
    assert library_text(listed) == library_source() != changed
    assert await empty.raw("HGETALL", META) == noted


async def test_a_controller_puts_a_library_right_while_it_runs(empty: Lab, monkeypatch: pytest.MonkeyPatch):
    looks: asyncio.Queue[None] = asyncio.Queue()
    deploy_once = empty.store.deploy

    async def looked() -> None:
        await deploy_once()
        looks.put_nowait(None)

    monkeypatch.setattr(controller, "SWEEP_S", 0.02)
    monkeypatch.setattr(empty.store, "deploy", looked)
    keeping_up = asyncio.create_task(controller._keep_up(empty.store))
    async with asyncio.timeout(10):
        await looks.get()
        await empty.raw("FUNCTION", "LOAD", "REPLACE", "#!lua name=rocyard\nredis.register_function('ry_old', function() end)")
        while not looks.empty():
            looks.get_nowait()
        for _ in range(2):  # the first may have looked before
            await looks.get()
    keeping_up.cancel()
    assert library_text(await empty.raw("FUNCTION", "LIST", "LIBRARYNAME", "rocyard", "WITHCODE")) == library_source()


async def test_a_library_that_cannot_be_loaded_is_told(empty: Lab):
    with pytest.raises(StoreReplyError, match="compiling"):
        async with process(empty.url, founder=True, library=Library(99, "#!lua name=rocyard\nthis is no lua")) as (store, _):
            await store.counts()


# --- golden calls -------------------------------------------------------------------------------------------------


def test_the_golden_calls_use_every_function():
    """A function that is new needs new calls: see golden_calls.py. What upkeep calls is of one version by itself."""
    registered = set(re.findall(r"'(ry_\w+)'", library_source())) - {"ry_upgrade_ends", "ry_upgraded", "ry_restored"}
    assert {call.function for call in golden()} == registered


async def test_the_library_answers_the_calls_of_older_processes(lab: Lab):
    """Byte for byte what they send; answers of the shape that they read."""
    for number, call in enumerate(golden()):
        reply = await lab.raw("FCALL", call.function, 1, "{ry}:", *map(argument, call.args))
        assert shape_of_answer(reply) == call.answer, f"call {number}: {call.function} {call.args}"


# --- migration ----------------------------------------------------------------------------------------------------


async def of_schema_1(lab: Lab, count: int) -> dict[str, float]:
    """Finish tasks, and put them where schema 1 had them."""
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.submit(count)
    claims = (await lab.next(agent, slot, count)).claims
    await lab.next(agent, slot, 0, *(end(claim) for claim in claims))
    (_, ended) = await lab.raw("ZSCAN", "{ry}:dn:red", 0, "COUNT", 100_000)
    before = {task.decode(): float(at) for task, at in zip(ended[::2], ended[1::2], strict=True)}
    await lab.raw("RENAME", "{ry}:dn:red", "{ry}:done")
    await lab.raw("DEL", "{ry}:dt")
    await lab.raw("HSET", META, "schema", 1, "cluster", "ours")
    return before


async def indexed(lab: Lab) -> dict[str, float]:
    _, ended = await lab.raw("ZSCAN", "{ry}:dn:red", 0, "COUNT", 100_000)
    return {task.decode(): float(at) for task, at in zip(ended[::2], ended[1::2], strict=True)}


async def test_data_of_schema_1_are_brought_to_schema_2(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema, "STEP", 5)
    before = await of_schema_1(lab, 11)
    assert await lab.store.migrate() == 3
    facts = await schema.read_facts(lab.raw, Keys())
    assert (facts.schema, facts.schema_min) == (2, 2)
    assert await indexed(lab) == before
    assert await lab.raw("SMEMBERS", "{ry}:dt") == [b"red"]
    assert await lab.raw("EXISTS", "{ry}:done") == 0
    assert await lab.store.migrate() == 0


async def test_an_upgrade_that_is_killed_or_made_twice_at_once_comes_to_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema, "STEP", 2)
    before = await of_schema_1(lab, 11)
    assert await lab.raw("FCALL", "ry_upgrade_ends", 1, "{ry}:", 5) == 6  # and then it was killed
    await asyncio.gather(lab.store.migrate(), lab.store.migrate())
    assert await indexed(lab) == before
    assert (await schema.read_facts(lab.raw, Keys())).schema == 2


async def test_data_that_nobody_has_named_are_of_schema_1(lab: Lab):
    await lab.submit()
    async with process(lab.url, founder=True) as (store, _):
        await store.counts()
        assert (await schema.read_facts(lab.raw, Keys())).schema == 1
        await store.migrate()
    assert (await schema.read_facts(lab.raw, Keys())).schema == 2


def test_a_library_that_changes_gets_a_version():
    version, digest = schema.LIBRARY_VERSION, own_library().digest
    known = digests()
    assert known.get(version) == digest, (
        f"the functions in manager/store/lua have changed. If a release has had version {version} of them, raise "
        "LIBRARY_VERSION in manager/store/schema.py first. Then: python -m tests.contract.golden_calls"
    )
    assert max(known) == version
    assert len(set(known.values())) == len(known), "two versions are the same"
