"""A store that cannot write, whose log is torn or damaged, or whose place a replica takes: what is refused, kept and lost."""

import asyncio
import os
import random
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest

from manager import supervisor
from manager.core.errors import StartError, StoreUnavailable
from manager.core.lifecycle import TaskStatus
from manager.screen import Screen
from manager.settings import ApiSettings, DaskSettings, Settings
from manager.store import Store, StoreConnection
from manager.store.server import damage_in
from tests.chaos.proxy import Proxy
from tests.contract.store_harness import PROGRAMS, Lab, StoreServer, check_invariants, connected, dump, end, program, submission
from tests.integration.api_world import RunningStore, World, serving, until_answer

pytestmark = pytest.mark.integration

HOST: Final = "127.0.0.1"
DISK_BYTES: Final = 2 * 1024 * 1024
TELLS_S: Final = 5.0
"""By then /readyz has said what is wrong."""


# --- a store that cannot write ------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small disk (root)")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def started(folder: Path) -> Iterator[RunningStore]:
    store = RunningStore(folder)
    store.start()
    try:
        yield store
    finally:
        store.kill()


async def post(world: World) -> httpx.Response:
    return await world.client().post("/v1/tasks", json={"function": "echo", "args": {"x": 1}})


async def until_refused(world: World) -> list[str]:
    """Submissions until one is refused; the ids of those that were accepted."""
    kept: list[str] = []
    async with asyncio.timeout(20):
        while True:
            reply = await post(world)
            if reply.status_code != 202:
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "1"), reply.text
                assert reply.json()["code"] == "StoreUnavailable"
                return kept
            kept.append(reply.json()["task_id"])


async def told(world: World, words: str) -> None:
    await until_answer(
        lambda: world.client("nobody").get("/readyz"),
        lambda reply: reply.status_code == 503 and words in reply.json()["detail"],
        TELLS_S,
    )


async def healed(world: World, kept: list[str]) -> None:
    await until_answer(lambda: post(world), lambda reply: reply.status_code == 202)
    await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: reply.status_code == 200)
    assert [await world.status_of(task_id) for task_id in kept] == [TaskStatus.QUEUED] * len(kept)


async def test_a_full_disk_under_a_store_that_syncs_each_second_is_named_and_heals(disk: Disk):
    with started(disk.folder) as server:
        async with serving(server.url) as world:
            await world.store.connection.call("CONFIG", "SET", "appendfsync", "everysec")
            disk.fill()
            kept = await until_refused(world)
            await told(world, "cannot write its log, mostly because its disk is full")
            assert (await post(world)).status_code == 503
            disk.free()
            await healed(world, kept)


async def test_a_full_disk_under_a_store_that_syncs_always_ends_it_and_loses_nothing(disk: Disk):
    """It cannot take back what it has done in memory, and so ends by itself; its supervisor starts it again and again."""
    with started(disk.folder) as server:
        async with serving(server.url) as world:
            disk.fill()
            kept = await until_refused(world)
            assert server.process is not None
            assert server.process.wait(5) == 1, "it answers although it cannot write"
            await told(world, "does not answer")
            server.start()  # it can be read
            assert [await world.status_of(task_id) for task_id in kept] == [TaskStatus.QUEUED] * len(kept)
            assert await until_refused(world) == []
            assert server.process.wait(5) == 1
            disk.free()
            server.start()
            await healed(world, kept)


async def test_a_store_that_became_a_replica_is_named_and_heals(tmp_path: Path):
    with started(tmp_path) as server:
        async with serving(server.url) as world:
            kept = [await world.submit() for _ in range(3)]
            admin = StoreConnection(server.url, 3.0, "admin")
            await admin.call("REPLICAOF", HOST, 1)
            assert await until_refused(world) == []
            await told(world, "is a replica and refuses writes")
            await admin.call("REPLICAOF", "NO", "ONE")
            await healed(world, kept)
            await admin.close()


# --- its log ------------------------------------------------------------------------------------------------------


def log_of(folder: Path) -> Path:
    (found,) = (folder / "store" / "appendonlydir").glob("*.incr.aof")
    return found


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_log_that_ends_in_the_middle_of_a_write_loses_only_that(tmp_path: Path, name: str):
    server = StoreServer(tmp_path, name).start()
    try:
        async with connected(server.url) as lab:
            kept = await lab.submit(20)
            log = log_of(tmp_path)
            before = log.stat().st_size
            torn = submission()
            await lab.store.submit("red", 100, [torn])
        whole = log.read_bytes()
        seed = random.Random(30)
        for cut in (before + 1, seed.randrange(before + 2, len(whole) - 1), len(whole) - 1):
            server.kill()
            log.write_bytes(whole[:cut])
            server.start()
            store = Store(StoreConnection(server.url, 5.0, "test"))
            found = await check_invariants(store)
            assert set(found.tasks) == set(kept), f"cut at byte {cut - before} of {len(whole) - before} of the last write"
            # Whoever sent it was never answered, and sends it again.
            assert (await store.submit("red", 100, [torn])).tasks == ((torn.task_id, TaskStatus.QUEUED),)
            assert set((await check_invariants(store)).tasks) == {*kept, torn.task_id}
            await store.connection.close()
    finally:
        server.kill()


async def refusal(data_dir: Path) -> str:
    """Why ``rocyard up`` does not start on this folder."""
    settings = Settings(data_dir=str(data_dir), api=ApiSettings(port=0), dask=DaskSettings(port=0, dashboard_port=0))
    with pytest.raises(StartError) as refused:
        await supervisor.Supervisor(settings, Screen()).run()
    return str(refused.value)


@pytest.mark.parametrize("what", ["log", "snapshot", "manifest"])
async def test_data_damaged_in_the_middle_are_refused_with_what_to_do(tmp_path: Path, what: str):
    server = StoreServer(tmp_path, "redis").start()
    async with connected(server.url) as lab:
        kept = await lab.submit(10)
        half = log_of(tmp_path).stat().st_size
        await lab.submit(10)
    server.kill()
    folder = tmp_path / "store" / "appendonlydir"
    damaged = next(folder.glob({"log": "*.incr.aof", "snapshot": "*.base.rdb", "manifest": "*.manifest"}[what]))
    data = bytearray(damaged.read_bytes())
    place = {"log": data.find(b"\r\n*", half) + 2, "snapshot": len(data) // 4, "manifest": data.find(b"seq")}[what]
    data[place] ^= 0x10
    damaged.write_bytes(data)

    said = await refusal(tmp_path)

    words = {"log": "Bad file format", "snapshot": "RDB|loading DB", "manifest": "Invalid AOF manifest"}
    assert re.search(words[what], said), said
    for remedy in (f"copy {folder.parent} to a safe place", "rocyard restore FILE", "redis-check-aof --fix", "operations.md"):
        assert remedy in said
    assert damaged.read_bytes() == data, "it was changed by a start"
    if what == "log":  # the last remedy that it names
        (manifest,) = folder.glob("*.manifest")
        check = shutil.which("redis-check-aof") or str(Path(program("redis")).with_name("redis-check-aof"))
        subprocess.run([check, "--fix", str(manifest)], input=b"y\n", capture_output=True, check=True)  # noqa: ASYNC221
        server.start()
        async with connected_as_is(server.url) as lab:
            assert set(kept) <= set((await check_invariants(lab.store)).tasks)
        server.kill()


@pytest.mark.parametrize(
    ("said", "damage"),
    [
        (
            "1:M 3 Nov * Server initialized\n1:M 3 Nov # Unknown command 'HSEX' reading the append only file a.aof",
            "Unknown command",
        ),
        ("1:M 3 Nov # Error reading the append only file a.aof, error: unknown command 'HSEX'", "Error reading"),
        ("1:M 3 Nov # Wrong RDB checksum expected: (76) but got (c5). Aborting now.", "Wrong RDB checksum"),
        ("1:M 3 Nov # Short read or OOM loading DB. Unrecoverable error, aborting now.", "Short read"),
        ("1:M 3 Nov # Unable to obtain the AOF file a.aof length. stat: No such file or directory", "Unable to obtain"),
        (
            "1:M 3 Nov # Bad file format reading the append only file a.aof\n2:C 4 Nov # Redis is starting oO0\n2:M * Ready",
            "",
        ),
        ("1:M 3 Nov # Can't recover from AOF write error when the AOF fsync policy is 'always'. Exiting...", ""),
    ],
)
def test_only_what_a_server_says_of_its_data_in_its_last_start_is_damage(said: str, damage: str):
    """As Redis 7.0 and Valkey 9 say it."""
    found = damage_in(f"1:C 3 Nov # oO0 Valkey is starting oO0\n{said}\n")
    assert (found is not None) == bool(damage)
    assert damage in (found or "")


# --- a replica that takes over ------------------------------------------------------------------------------------


class connected_as_is:  # noqa: N801  # reads as a function
    """A lab over a connection of its own, on the store as it is."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = Store(StoreConnection(url, 5.0, "test"))

    async def __aenter__(self) -> Lab:
        return Lab(self._store, self._url)

    async def __aexit__(self, *_: object) -> None:
        await self._store.connection.close()


async def follow(replica: Lab, primary: StoreServer, port: int) -> None:
    """`replica` copies what is at `port`, with the right of `primary`'s user."""
    password = re.search("rocyard:(.*)@", primary.url)
    assert password is not None
    await replica.raw("CONFIG", "SET", "masteruser", "rocyard", "masterauth", password[1])
    await replica.raw("REPLICAOF", HOST, port)

    async def link() -> bytes:
        return bytes(await replica.raw("INFO", "replication"))

    await until_answer(link, lambda text: b"master_link_status:up" in text)


@pytest.fixture
async def lagging(tmp_path: Path) -> AsyncIterator[Proxy]:
    """What stands between a primary and its replica."""
    proxy = Proxy(HOST, 0)
    yield proxy
    await proxy.close()


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_replica_that_takes_over_lacks_what_it_had_not_heard_and_no_more(tmp_path: Path, name: str, lagging: Proxy):
    first, second = StoreServer(tmp_path / "first", name).start(), StoreServer(tmp_path / "second", name).start()
    try:
        async with connected(first.url) as lab, connected_as_is(second.url) as taking:
            assert first.spec is not None
            lagging.target = first.spec.port
            port = supervisor.ports.free_port(HOST)
            await lagging.listen(port)
            for each in (lab, taking):
                await each.raw("CONFIG", "SET", "repl-diskless-sync-delay", 0)
            await follow(taking, first, port)

            agent = await lab.agent()
            slot, other = await lab.open(agent), await lab.open(agent)
            heard = await lab.submit(10)
            done = await lab.claim(agent, slot)
            running = await lab.claim(agent, slot, end(done))
            assert await lab.raw("WAIT", 1, 5000) == 1
            with lagging.still(lambda _: True):
                unheard = await lab.submit(20)  # each was answered with a 202
                assert (await lab.next(agent, slot, 0, end(running))).statuses == (TaskStatus.SUCCEEDED,)
                ahead = await lab.claim(agent, other)
                assert (await lab.next(agent, other, 0, end(ahead))).statuses == (TaskStatus.SUCCEEDED,)
                first.kill()
                await lagging.close()
            await taking.raw("REPLICAOF", "NO", "ONE")

            # What was answered before the replica fell behind is there, the rest is not: by the test's own record.
            found = await check_invariants(taking.store)
            lost = {*heard, *unheard} - found.tasks.keys()
            assert lost == set(unheard)
            states = {task_id: record["state"] for task_id, record in found.tasks.items()}
            assert states.pop(done.task_id) == "SUCCEEDED"
            assert states.pop(running.task_id) == "RUNNING", "an end that it had heard"
            assert set(states.values()) == {"QUEUED"}

            # An end that is repeated counts; one of an attempt that this store has never begun does not.
            assert (await taking.next(agent, other, 0, end(ahead))).statuses == (None,)
            assert (await taking.next(agent, slot, 0, end(running))).statuses == (TaskStatus.SUCCEEDED,)
            again = await taking.claim(agent, slot)
            assert again.task_id == ahead.task_id
            assert (await taking.next(agent, other, 0, end(ahead))).statuses == (None,), "the same attempt, by another slot"
            assert (await taking.next(agent, slot, 0, end(again))).statuses == (TaskStatus.SUCCEEDED,)
            assert (await taking.next(agent, slot, 0, end(again))).statuses == (None,), "committed twice"

            # A lost submission that is repeated is a new one, and no id comes back by itself.
            fresh = set(await taking.submit(20))
            assert not fresh & {*heard, *unheard}
            assert set((await check_invariants(taking.store)).tasks) == {*heard, *fresh}

            # The old primary comes back as a replica: what it knows alone is gone, and it takes nothing from anybody.
            first.start()
            async with connected_as_is(first.url) as old:
                assert second.spec is not None
                assert set(unheard) <= (await dump(old.store)).tasks.keys()
                await follow(old, second, second.spec.port)
                with pytest.raises(StoreUnavailable, match="READONLY"):
                    await old.submit()
                assert (await dump(old.store)).tasks.keys() == {*heard, *fresh}
    finally:
        first.kill()
        second.kill()
