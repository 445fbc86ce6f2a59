"""Backup and restore between real servers: what a copy has, who may write after it, and what is refused."""

import asyncio
import contextlib
import errno
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from manager import backup
from manager.backup import BackupError, checked_head, inspected, make_backup, read_head, restore_embedded, restore_into
from manager.core.keys import SCHEMA_VERSION
from manager.core.lifecycle import Outcome
from manager.store import Store, StoreConnection
from manager.store.restoring import NotRestored
from manager.store.snapshot import NoCopy, copy_of
from tests.contract.store_harness import Lab, StoreServer, check_invariants, connected, dump, end


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def quietly(_done: int, _total: int) -> None:
    """Nobody looks."""


class Busy:
    """A store with tasks in every state, and agents that hold some of them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    async def fill(self) -> "Busy":
        await self.lab.store.identify("ours")
        self.agent = await self.lab.agent("n1", "gpu-0")
        self.tasks = await self.lab.submit(12, max_attempts=3)
        self.slot = await self.lab.open(self.agent)
        self.ended = await self.lab.claim(self.agent, self.slot)
        self.failed = await self.lab.claim(self.agent, self.slot, end(self.ended))
        self.running = await self.lab.claim(self.agent, self.slot, end(self.failed, Outcome.FAILED))
        await self.lab.store.started(self.slot, self.agent.incarnation, [(self.running.task_id, self.running.attempt, 0.0)])
        await self.lab.request()  # one that nobody has opened
        self.token = self.lab.token
        return self


@pytest.fixture
async def busy(own_server: StoreServer) -> AsyncIterator[Busy]:
    async with connected(own_server.url) as lab:
        yield await Busy(lab).fill()


@pytest.fixture
async def target(own_server: StoreServer, tmp_path: Path) -> AsyncIterator[Lab]:
    """An empty store of the same program."""
    server = StoreServer(tmp_path / "target", own_server.name).start()
    async with connected(server.url) as lab:
        await lab.raw("FLUSHALL")
        await lab.raw("FUNCTION", "FLUSH")
        yield lab
    server.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For files."""
    made = tmp_path / "files"
    made.mkdir()
    return made


async def assert_nobody_from_before_writes(lab: Lab, before: Busy) -> None:
    """And all goes on with those that come now."""
    running = before.running
    assert await lab.status(running.task_id) == "QUEUED"
    record = await lab.record(running.task_id)
    assert (record.failures, record.crashes, record.losses) == (0, 0, 0), "somebody was blamed"
    assert await lab.status(before.ended.task_id) == "SUCCEEDED"
    reply = await lab.next(before.agent, before.slot, 1, end(running))
    assert reply.word == "FENCED"
    assert not (await lab.store.beat("n1", before.agent.incarnation, [(before.slot, False)])).holds
    assert not await lab.store.request_slot(before.token, "late", "any", 0), "a leader from before was believed"
    assert await lab.status(running.task_id) == "QUEUED"
    await check_invariants(lab.store)
    # The next incarnation of the same agent has the same devices, and everything ends.
    agent = await lab.agent("n1", "gpu-0")
    slot = await lab.open(agent)
    done: set[str] = set()
    claims = (await lab.next(agent, slot, 20)).claims
    while claims:
        done |= {claim.task_id for claim in claims}
        claims = (await lab.next(agent, slot, 20, *(end(claim) for claim in claims))).claims
    await lab.raw("ZINCRBY", f"{lab.store.keys.prefix}due", -3_600_000, before.failed.task_id)
    await lab.store.due()
    claim = await lab.claim(agent, slot)
    await lab.next(agent, slot, 0, end(claim))
    assert done | {claim.task_id, before.ended.task_id} == set(before.tasks)
    await check_invariants(lab.store)


async def test_into_an_empty_store(busy: Busy, target: Lab, folder: Path):
    file = folder / "b"
    head = await make_backup(busy.lab.url, file, quietly)
    assert (head.cluster, head.schema) == ("ours", SCHEMA_VERSION)
    assert head.tasks == {"QUEUED": 9, "SUCCEEDED": 1, "RETRY_WAIT": 1, "RUNNING": 1}
    assert file.stat().st_mode & 0o777 == 0o600
    assert checked_head(file, quietly) == head
    assert {status: count for status, count in (await inspected(file)).items() if count} == head.tasks
    assert await restore_into(file, target.url, quietly) == 2
    async with connected_as_it_is(target.url) as lab:
        assert await lab.store.identity() == "ours"
        await lab.store.deploy()
        await assert_nobody_from_before_writes(lab, busy)


@contextlib.asynccontextmanager
async def connected_as_it_is(url: str) -> AsyncIterator[Lab]:
    store = Store(StoreConnection(url, 5.0, "test"))
    lab = Lab(store, url)
    lab._numbers = itertools.count(1000)  # ids of slots from before are tombstones
    yield lab
    await store.connection.close()


async def test_into_the_embedded_store(busy: Busy, own_server: StoreServer, folder: Path):
    file, data_dir = folder / "b", folder / "new"
    await make_backup(busy.lab.url, file, quietly)
    assert await restore_embedded(file, data_dir, quietly) == 2
    assert names_in(data_dir) == ["store"], "something was left over"
    server = StoreServer(data_dir, own_server.name).start()
    try:
        async with connected_as_it_is(server.url) as lab:
            await assert_nobody_from_before_writes(lab, busy)
        server.kill()
        server.start()  # what was restored is on disk
        async with connected_as_it_is(server.url) as lab:
            assert await lab.store.identity() == "ours"
            await check_invariants(lab.store)
        with pytest.raises(BackupError, match="a store runs on"):
            await restore_embedded(file, data_dir, quietly)
    finally:
        server.kill()
    with pytest.raises(BackupError, match="has data already"):
        await restore_embedded(file, data_dir, quietly)


async def test_a_copy_is_of_one_moment_while_others_write(busy: Busy, target: Lab, folder: Path):
    """Whatever was accepted before it was begun is in it, and every counter fits every record."""
    accepted: list[str] = []
    enough, stop = asyncio.Event(), asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            accepted.extend(await busy.lab.submit(20))
            if len(accepted) >= 400:
                enough.set()

    loading = asyncio.create_task(load())
    await enough.wait()
    before = list(accepted)
    await make_backup(busy.lab.url, folder / "b", quietly)
    stop.set()
    await loading
    assert len(accepted) > len(before), "nobody wrote meanwhile"
    await restore_into(folder / "b", target.url, quietly)
    async with connected_as_it_is(target.url) as lab:
        found = await check_invariants(lab.store)
        assert set(before) <= found.tasks.keys() <= {*accepted, *busy.tasks}


async def test_a_store_that_is_not_empty_is_left_alone(busy: Busy, target: Lab, folder: Path):
    await make_backup(busy.lab.url, folder / "b", quietly)
    await target.raw("SET", "mine", 1)
    with pytest.raises(NotRestored, match="not empty: it has 'mine'"):
        await restore_into(folder / "b", target.url, quietly)
    assert await target.raw("DBSIZE") == 1


async def test_heartbeats_of_a_cluster_that_waits_are_no_data(busy: Busy, target: Lab, folder: Path):
    await make_backup(busy.lab.url, folder / "b", quietly)
    await target.store.put_heartbeat("n1", "tcp://1", [])
    await restore_into(folder / "b", target.url, quietly)
    assert await target.store.identity() == "ours"


async def test_a_restoration_that_was_broken_off_is_nobodys_until_it_is_finished(busy: Busy, target: Lab, folder: Path):
    for _ in range(3):
        await busy.lab.submit(500)
    await make_backup(busy.lab.url, folder / "b", quietly)

    def break_off(done: int, total: int) -> None:
        if done == total:  # all but the identity is there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await restore_into(folder / "b", target.url, break_off)
    assert await target.store.identity() == ""
    assert await target.raw("DBSIZE") > 1
    await restore_into(folder / "b", target.url, quietly)
    async with connected_as_it_is(target.url) as lab:
        assert await lab.store.identity() == "ours"
        assert len((await check_invariants(lab.store)).tasks) == 1512


async def test_others_keys_are_not_restored(busy: Busy, target: Lab, folder: Path):
    await busy.lab.raw("SET", "theirs", 1)
    await make_backup(busy.lab.url, folder / "b", quietly)
    await restore_into(folder / "b", target.url, quietly)
    found = await target.raw("KEYS", "*")
    assert all(key.startswith(b"{ry}:") for key in found)
    async with connected_as_it_is(target.url) as lab:
        assert (await dump(lab.store)).tasks.keys() == set(busy.tasks)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [20, backup.HEAD_BYTES + 50, -1])
async def test_a_damaged_file_is_told(busy: Busy, folder: Path, at: int):
    file = folder / "b"
    await make_backup(busy.lab.url, file, quietly)
    text = bytearray(file.read_bytes())
    text[at] ^= 1
    file.write_bytes(text)
    with pytest.raises(BackupError, match="damaged"):
        checked_head(file, quietly)


async def test_a_file_that_was_cut_off_is_told(busy: Busy, folder: Path):
    file = folder / "b"
    await make_backup(busy.lab.url, file, quietly)
    text = file.read_bytes()
    for length, words in ((0, "is no backup"), (100, "was cut off"), (len(text) - 1, "bytes of data, and was written with")):
        file.write_bytes(text[:length])
        with pytest.raises(BackupError, match=words):
            checked_head(file, quietly)


async def test_data_of_a_newer_schema_are_not_restored(busy: Busy, folder: Path):
    file = folder / "b"
    head = await make_backup(busy.lab.url, file, quietly)
    newer = msgspec.structs.replace(head, schema=SCHEMA_VERSION + 1)
    text = (backup.MAGIC + msgspec.json.encode(newer) + b"\n").ljust(backup.HEAD_BYTES, b"\0")
    file.write_bytes(text + file.read_bytes()[backup.HEAD_BYTES :])
    with pytest.raises(BackupError, match=f"schema {SCHEMA_VERSION + 1}.*knows {SCHEMA_VERSION}"):
        checked_head(file, quietly)
    newer = msgspec.structs.replace(head, format=2)
    file.write_bytes((backup.MAGIC + msgspec.json.encode(newer) + b"\n").ljust(backup.HEAD_BYTES, b"\0"))
    with pytest.raises(BackupError, match="format 2"):
        read_head(file)


async def test_a_backup_replaces_no_file_and_leaves_none_behind(busy: Busy, folder: Path):
    (folder / "b").write_text("kept")
    with pytest.raises(BackupError, match="exists"):
        await make_backup(busy.lab.url, folder / "b", quietly)
    assert (folder / "b").read_text() == "kept"
    await busy.lab.raw("FLUSHALL")
    with pytest.raises(BackupError, match="no cluster in this store"):
        await make_backup(busy.lab.url, folder / "c", quietly)
    assert names_in(folder) == ["b"]


@pytest.mark.parametrize("hard_links", [True, False], ids=["hard links", "none"])
async def test_of_two_backups_to_one_name_one_is_made_and_whole(
    busy: Busy, folder: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
):
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_link)
    file = folder / "b"
    done = await asyncio.gather(*(make_backup(busy.lab.url, file, quietly) for _ in range(2)), return_exceptions=True)
    (refused,) = [each for each in done if isinstance(each, BackupError)]
    assert "exists, and a backup replaces nothing" in str(refused)
    assert checked_head(file, quietly) in done
    assert file.stat().st_mode & 0o777 == 0o600
    assert names_in(folder) == ["b"]


def refuse_link(*_: object, **__: object) -> None:
    """As a file system that knows no hard links."""
    raise OSError(errno.EPERM, "Operation not permitted")


async def test_a_file_that_appears_while_a_backup_is_made_is_not_replaced(busy: Busy, folder: Path):
    file = folder / "b"
    with pytest.raises(BackupError, match="exists"):
        await make_backup(busy.lab.url, file, lambda *_: file.write_text("kept"))
    assert file.read_text() == "kept"
    assert names_in(folder) == ["b"]


async def test_what_a_killed_run_has_left_is_in_nobodys_way(busy: Busy, folder: Path):
    left = folder / ".b.part"
    left.write_text("half of a backup")
    await make_backup(busy.lab.url, folder / "b", quietly)
    assert (left.read_text(), names_in(folder)) == ("half of a backup", [".b.part", "b"])


@pytest.mark.parametrize("name", ["nowhere/b", "b" * 255], ids=["no such folder", "too long with the draft's ending"])
async def test_a_backup_that_cannot_be_written_says_so(busy: Busy, folder: Path, name: str):
    with pytest.raises(BackupError, match=r"cannot be written: (No such file|File name too long)"):
        await make_backup(busy.lab.url, folder / name, quietly)
    assert names_in(folder) == []


async def test_a_store_that_gives_no_copy_says_what_to_use_instead(busy: Busy, folder: Path):
    await busy.lab.raw("ACL", "SETUSER", "managed", "on", ">secret", "~*", "&*", "+@all", "-sync", "-psync")
    url = busy.lab.url.replace(busy.lab.url.split("//")[1].split("@")[0], "managed:secret")
    with pytest.raises(NoCopy, match=r"NOPERM.*service's own backups"):
        await make_backup(url, folder / "b", quietly)
    await busy.lab.raw("ACL", "DELUSER", "managed")
    assert names_in(folder) == []


async def test_a_copy_whose_length_is_not_known_ends_at_its_mark(unused_tcp_port: int):
    mark, data = b"m" * 40, bytes(range(256)) * 3000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"SETNAME")
        writer.write(b"+OK\r\n")
        await reader.readuntil(b"SYNC\r\n")
        for piece in (b"\n", b"\n", b"$EOF:" + mark + b"\r\n", data[:1000], data[1000:] + mark[:7], mark[7:] + b"*1\r\n"):
            writer.write(piece)
            await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", unused_tcp_port)
    got = bytearray()
    connection = StoreConnection(f"redis://127.0.0.1:{unused_tcp_port}", 2.0, "test")
    assert await copy_of(connection, got.extend, quietly) == len(data)
    assert bytes(got) == data
    server.close()
