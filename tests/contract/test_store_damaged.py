"""A store whose log was cut off or damaged: what it does at its next start, as docs/operations.md says."""

import subprocess
from pathlib import Path

import pytest

from manager.store import Store, StoreConnection
from tests.contract.store_harness import Lab, StoreServer, check_invariants, connected

PART_BYTES = 37


async def written(server: StoreServer) -> tuple[list[str], Path]:
    """Tasks that were accepted one by one, and the log that has them; its server is gone."""
    async with connected(server.url) as lab:
        tasks = [await lab.one() for _ in range(20)]
    server.kill()
    return tasks, log_of(server)


def log_of(server: StoreServer) -> Path:
    assert server.spec is not None
    folder = Path(server.spec.stdin_text.value.split('\ndir "')[1].split('"')[0])
    return max((folder / "appendonlydir").glob("*.incr.aof"))


async def test_a_log_that_was_cut_off_loads_without_its_last_write(own_server: StoreServer):
    """Which is dropped whole: no record without its index, no counter without its record."""
    tasks, log = await written(own_server)
    cut_off(log, PART_BYTES)
    own_server.start()
    store = Store(StoreConnection(own_server.url, 5.0, "test"))
    found = await check_invariants(store)
    assert found.tasks.keys() == set(tasks[:-1])
    await Lab(store, own_server.url).submit(1)  # and it goes on
    await check_invariants(store)
    await store.connection.close()


def cut_off(log: Path, count: int) -> None:
    content = log.read_bytes()
    log.write_bytes(content[:-count])


async def test_a_log_that_is_damaged_in_the_middle_is_refused(own_server: StoreServer):
    _, log = await written(own_server)
    damage(log)
    said = start_and_hear(own_server)
    assert "Bad file format reading the append only file" in said


def damage(log: Path) -> None:
    content = bytearray(log.read_bytes())
    content[content.index(b"\r\n*", len(content) // 2) + 2] = ord("?")
    log.write_bytes(content)


def start_and_hear(server: StoreServer) -> str:
    spec = server.spec
    assert spec is not None
    done = subprocess.run(
        spec.argv, input=spec.stdin_text.value, capture_output=True, text=True, timeout=20, check=False
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout


@pytest.mark.parametrize("count", [1, 400])
async def test_wherever_it_was_cut_off_it_is_whole(own_server: StoreServer, count: int):
    tasks, log = await written(own_server)
    cut_off(log, count)
    own_server.start()
    store = Store(StoreConnection(own_server.url, 5.0, "test"))
    found = await check_invariants(store)
    assert found.tasks.keys() <= set(tasks)
    await store.connection.close()
