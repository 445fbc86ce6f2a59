"""Whether a run would notice: with a store that does not sync each write, and with a fault planted in the library.

Both use a store alone, with clients and agents that do as they are told, and the same histories and checker as a whole run.
"""

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from manager.core.errors import StoreUnavailable
from manager.core.ids import new_id
from manager.core.lifecycle import Outcome as EndedAs
from manager.core.model import Claim, End, Submission, TaskSpec
from manager.core.quantities import GIB
from manager.core.shapes import Resources, shape_id, shape_of
from manager.store import Store, StoreConnection
from manager.store.schema import library_source
from manager.store.server import EmbeddedStore, ServerSpec, is_ready
from tests.chaos import history
from tests.chaos.checker import Verdict, check
from tests.chaos.cluster import Unavailable, build_synced, install_program
from tests.chaos.history import Call, Due, Fault, Note, Outcome, Run, Writer, now
from tests.chaos.store_program import CUT
from tests.chaos.witnesses import Watch, dump_store
from tests.contract.store_harness import Lab

WRITE_S = 1.6
"""Longer than the second for which `everysec` may keep a write from the disk."""
CLIENTS = 8
"""At once, so that one sync serves many, as in a busy API."""


class Alone:
    """A store of the product's own kind, under a program that can cut its power; and the histories of one run with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = install_program(folder, 0)
        self.store = EmbeddedStore(folder / "data", program=str(binaries / "redis-server"))
        self.process: subprocess.Popen[bytes] | None = None
        self.calls, self.notes, self.faults, self.ends, self.rows = (
            Writer(folder / name) for name in (history.CALLS, history.TASKS, history.FAULTS, history.ENDS, history.STORE)
        )

    def start(self) -> ServerSpec:
        spec = self.store.prepare()
        self.process = subprocess.Popen(spec.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self.process.stdin is not None
        self.process.stdin.write(spec.stdin_text.value.encode())
        self.process.stdin.close()
        deadline = time.monotonic() + 20
        while not is_ready(spec.url.value):
            assert self.process.poll() is None
            assert time.monotonic() < deadline, "the store did not start"
            time.sleep(0.005)
        return spec

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    async def judge(self, url: str) -> Verdict:
        """Write down what there is, and have it judged."""
        watch = Watch(lambda: url, self.folder / history.TASKS, self.ends)
        connection = StoreConnection(url, 5.0, "control")
        await watch.look(connection)
        await connection.close()
        recount = await dump_store(url, self.rows, self.folder / "results")
        run = Run(seed=0, seconds=0, heal_s=0, began=0, ended=now(), program="", cpus=1, recount=recount)
        (self.folder / history.RUN).write_bytes(msgspec.json.encode(run))
        return check(self.folder)


@pytest.fixture
def alone(tmp_path: Path):
    there = Alone(tmp_path)
    yield there
    there.kill()


@contextlib.asynccontextmanager
async def connected(url: str, source: str = "") -> AsyncIterator[Store]:
    """A store with the library, or with that one."""
    store = Store(StoreConnection(url, 5.0, "control"))
    try:
        await store.deploy()
        if source:
            await store.connection.call("FUNCTION", "LOAD", "REPLACE", source)
        yield store
    finally:
        await store.connection.close()


def submission(key: str) -> Submission:
    shape = shape_of("red", "env", Resources(memory_bytes=GIB))
    spec = TaskSpec("echo", msgspec.Raw(msgspec.json.encode({"key": key})), Resources(memory_bytes=GIB))
    return Submission(new_id(), shape_id(shape), shape, spec)


class Client:
    """Submits straight to the store, and writes that down as the clients of a run do."""

    def __init__(self, store: Store, calls: Writer, number: int) -> None:
        self.store = store
        self.calls = calls
        self.number = number * 1_000_000

    async def submit(self) -> bool:
        """Whether the store is there."""
        self.number += 1
        wanted = submission(f"key-{self.number}")
        call = Call(
            number=self.number, outcome=Outcome.INVOKE, op="submit", at=now(), keys={f"key-{self.number}": Due.SUCCEEDED}
        )
        self.calls.write(call)
        try:
            await self.store.submit("red", 1_000_000, [wanted])
        except StoreUnavailable:
            self.calls.write(msgspec.structs.replace(call, outcome=Outcome.UNKNOWN))
            return False
        self.calls.write(msgspec.structs.replace(call, outcome=Outcome.OK, ids=(wanted.task_id,)))
        return True


async def cut_power_of(alone: Alone, policy: str) -> Verdict:
    """Submit until the power is cut; the verdict on the store that comes back."""
    spec = alone.start()
    async with connected(spec.url.value) as store:
        await store.connection.call("CONFIG", "SET", "appendfsync", policy)
        clients = [Client(store, alone.calls, number) for number in range(1, CLIENTS + 1)]

        async def go_on(client: Client) -> None:
            while await client.submit():
                pass

        writing = [asyncio.create_task(go_on(client)) for client in clients]
        await asyncio.sleep(WRITE_S / 2)  # how long they write
        await store.connection.call("BGREWRITEAOF")  # the log's file changes on the way
        await asyncio.sleep(WRITE_S / 2)
        (alone.folder / CUT).touch()
        await asyncio.to_thread(alone.kill)
        await asyncio.gather(*writing)
    spec = await asyncio.to_thread(alone.start)
    assert not (alone.folder / CUT).exists()
    return await alone.judge(spec.url.value)


@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(alone: Alone, policy: str) -> None:
    try:
        build_synced(alone.folder)
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    verdict = await cut_power_of(alone, policy)
    assert verdict.acknowledged > 200
    if policy == "everysec":
        assert verdict.lost, "every second is not always, and this test cannot tell them apart"
    else:
        assert verdict.lost == ()
    assert not verdict.inconsistent


# --- one fault in the library ---------------------------------------------------------------------------------------

GUARDS = (
    ("if record[1] ~= 'OPEN' or record[2] ~= incarnation then return { 'FENCED', {}, {} } end", ""),
    ("or task.slot ~= slot then", "then"),
    ("if task.attempt ~= attempt then return '' end", ""),
)
"""What keeps an attempt that was replaced from committing: the fence of its slot, its slot, its number."""


async def a_zombie_ends_its_task(alone: Alone, source: str) -> Verdict:
    """An agent stands still with a task, is fenced, wakes up and reports the end, while its task runs elsewhere."""
    url = alone.start().url.value
    async with connected(url, source) as store:
        lab = Lab(store, url)
        assert await Client(store, alone.calls, 1).submit()
        shape = submission("").shape_id
        agents = [await lab.agent("n1"), await lab.agent("n2")]
        first = await lab.open(agents[0], shape)
        old = await lab.claim(agents[0], first)
        _note(alone, old, "start", agent=1)
        began = now()
        await store.lost(lab.token, "n1", agents[0].incarnation)
        alone.faults.write(Fault(number=1, what="freeze", whom="agent", pids=(1,), at=began, until=now()))
        second = await lab.open(agents[1], shape)
        new = await lab.claim(agents[1], second)
        _note(alone, new, "start", agent=2)
        _note(alone, old, "end", agent=1)
        await lab.next(agents[0], first, 0, _ended(old))
        _note(alone, new, "end", agent=2)
        await lab.next(agents[1], second, 0, _ended(new))
    return await alone.judge(url)


def _note(alone: Alone, claim: Claim, event: str, agent: int) -> None:
    alone.notes.write(Note(event, claim.task_id, claim.attempt, "key-1000001", now(), agent * 100, agent))


def _ended(claim: Claim) -> End:
    result = msgspec.json.encode({"key": "key-1000001", "attempt": claim.attempt})
    return End(claim.task_id, claim.attempt, EndedAs.SUCCEEDED, result, age_s=0.01, duration_s=0.01)


async def test_a_replaced_attempt_that_commits_is_found(alone: Alone) -> None:
    source = library_source()
    for guard, nothing in GUARDS:
        assert source.count(guard) == 1, f"the library has changed: {guard}"
        source = source.replace(guard, nothing)
    verdict = await a_zombie_ends_its_task(alone, source)
    assert "duplicated" in verdict.problems


async def test_the_same_story_with_the_library_as_it_is_breaks_nothing(alone: Alone) -> None:
    verdict = await a_zombie_ends_its_task(alone, "")
    assert verdict.problems == {}
    assert verdict.explained == {"agent-freeze": 1}
