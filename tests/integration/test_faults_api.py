"""The API is killed in the middle of a submission, before and after the store has it: nothing is lost, nothing comes twice.

A proxy between the API and the store knows each call. It kills the process with a submission that the store has not seen, or
with an answer that the API has not seen; clients repeat what was not answered, with its key, until it is.
"""

import asyncio
import contextlib
import itertools
import random
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any, Final

import hiredis
import httpx
import msgspec
import pytest

from manager.api.serve import bind
from manager.core.requests import KeyScope
from manager.keys import create_key
from manager.settings import Secret, Settings
from manager.store import Store
from manager.store.store import connect
from tests.integration.api_world import Agent, running_store, until_answer

pytestmark = pytest.mark.integration

HOST: Final = "127.0.0.1"
TENANT: Final = "alpha"
SUBMISSIONS: Final = 60
CLIENTS: Final = 6
BATCH: Final = 3
DEATHS: Final = ("before", "after", "before", "after")
"""Whether the store has the submission when the process dies with it."""
SUBMIT_AT: Final = 1
"""Where the name of the function stands in a call."""
KEY_AT: Final = 6
SHAPES_AT: Final = 8
"""Where the number of shapes stands in a submission; then come two values for each, then seven for each task, its id first."""

Called = deque[tuple[str, ...]]
"""Of each call under way, in order: the ids of the submission to die with; mostly there are none."""


class Killer:
    """A proxy before the store, which kills who talks through it at one submission and lets nothing of that one pass."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.victim: asyncio.subprocess.Process | None = None
        self.deaths: list[tuple[str, tuple[str, ...]]] = []
        self._point = ""
        self._left = 0
        self._keys: set[bytes] = set()
        self._links: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._meet, HOST, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def arm(self, point: str, number: int) -> None:
        """Kill at the `number`-th new submission from now on."""
        self._point, self._left = point, number

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        link.add_done_callback(self._links.discard)
        try:
            their_reader, their_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        called: Called = deque()
        pumps = [
            asyncio.create_task(self._calls(reader, their_writer, called)),
            asyncio.create_task(self._answers(their_reader, writer, called)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.transport.abort()
            their_writer.transport.abort()

    async def _calls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, called: Called) -> None:
        parser = hiredis.Reader()  # a call is an array, as answers are
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                parser.feed(data)
                while (call := parser.gets()) is not False:
                    ids = self._chosen(call)
                    if ids and self._point == "before":
                        self._kill(ids)
                        return
                    called.append(ids)
                    writer.write(hiredis.pack_command(tuple(call)))
                await writer.drain()

    async def _answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, called: deque[tuple[str, ...]]
    ) -> None:
        parser = hiredis.Reader()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                parser.feed(data)
                while parser.gets() is not False:
                    if ids := called.popleft():
                        self._kill(ids)
                        return
                writer.write(data)
                await writer.drain()

    def _chosen(self, call: list[bytes]) -> tuple[str, ...]:
        """The ids of the submission that the process is to die with; none where this is not it."""
        if call[SUBMIT_AT : SUBMIT_AT + 1] != [b"ry_submit"] or call[KEY_AT] in self._keys:
            return ()  # nor is it one that repeats another: the store may have that
        self._keys.add(call[KEY_AT])
        if not self._left:
            return ()
        self._left -= 1
        if self._left:
            return ()
        first = SHAPES_AT + 1 + 2 * int(call[SHAPES_AT])
        return tuple(task_id.decode() for task_id in call[first::7])

    def _kill(self, ids: tuple[str, ...]) -> None:
        assert self.victim is not None
        self.victim.kill()
        self.deaths.append((self._point, ids))


class Api:
    """The real process, started again whenever it has ended."""

    def __init__(self, settings: Settings, killer: Killer) -> None:
        self._settings = msgspec.json.encode(settings)
        self._killer = killer
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._spawn()
        self._keeping = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        argv = (sys.executable, "-m", "manager.cli.process", "api")
        devnull = asyncio.subprocess.DEVNULL
        process = self._killer.victim = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=devnull, stderr=devnull
        )
        assert process.stdin is not None
        process.stdin.write(self._settings)
        process.stdin.close()

    async def _keep(self) -> None:
        while True:
            assert self._killer.victim is not None
            await self._killer.victim.wait()
            await self._spawn()

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._killer.victim is not None and self._killer.victim.returncode is None:
            self._killer.victim.kill()
            await self._killer.victim.wait()


class Bench:
    """Store, killer, API, a client, and what the test knows of them."""

    def __init__(self, store: Store, killer: Killer, client: httpx.AsyncClient) -> None:
        self.store = store
        self.killer = killer
        self.client = client
        self.unanswered = 0
        self.answers: dict[int, tuple[tuple[str, ...], bool]] = {}
        """Of each submission: the ids that the client was told, and whether they were told as a replay."""

    async def submit(self, number: int) -> None:
        """One submission, every fifth of three tasks at once, repeated until it is answered."""
        task = {"function": "echo", "args": {"x": number}}
        batch = number % 5 == 0
        path, body = ("/v1/tasks/batch", {"tasks": [task] * BATCH}) if batch else ("/v1/tasks", task)
        while True:
            try:
                reply = await self.client.post(path, json=body, headers={"Idempotency-Key": f"submission {number}"})
            except httpx.TransportError:
                self.unanswered += 1
                await asyncio.sleep(0.05)  # as a client waits before it tries again
                continue
            if reply.status_code != 503:
                break
        assert reply.status_code == 202, reply.text
        told = reply.json()
        ids = tuple(one["task_id"] for one in (told["tasks"] if batch else [told]))
        self.answers[number] = (ids, "replayed" in told)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with running_store() as server:
        store = connect(server.url, 5.0, "test")
        await store.identify("cluster")
        await store.deploy()
        await Agent(store).join()
        secret, _ = await create_key(store, TENANT, KeyScope.USER)
        killer = Killer(server.spec.port)
        through = server.url.replace(f":{server.spec.port}/", f":{await killer.listen()}/")
        with bind(HOST, 0) as free:
            port = free.getsockname()[1]
        given = Settings()
        settings = msgspec.structs.replace(
            given,
            store=msgspec.structs.replace(given.store, url=Secret(through)),
            api=msgspec.structs.replace(given.api, port=port),
        )
        api = Api(settings, killer)
        headers = {"authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", headers=headers, timeout=10, trust_env=False) as client:
            try:
                await api.start()
                yield Bench(store, killer, client)
            finally:
                await api.stop()
                await killer.close()
                await store.connection.close()


async def serves(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/readyz")).status_code == 200
    return False


async def test_a_submission_with_which_the_api_dies_is_neither_lost_nor_doubled(bench: Bench):
    random_ = random.Random(5)
    await until_answer(lambda: serves(bench.client), bool, 30)
    numbers = iter(range(SUBMISSIONS))
    killer = bench.killer

    async def client() -> None:
        for number in numbers:
            await bench.submit(number)

    async def deaths() -> None:
        for count, point in enumerate(DEATHS, 1):
            killer.arm(point, random_.randint(1, SUBMISSIONS // len(DEATHS) - CLIENTS))
            await until_answer(lambda: asyncio.sleep(0, len(killer.deaths)), lambda met, count=count: met == count, 30)

    await asyncio.gather(deaths(), *(client() for _ in range(CLIENTS)))

    assert [point for point, _ in killer.deaths] == list(DEATHS)
    assert bench.unanswered >= len(DEATHS), "nobody noticed"
    told = [task_id for ids, _ in bench.answers.values() for task_id in ids]
    singles, batches = SUBMISSIONS - SUBMISSIONS // 5, SUBMISSIONS // 5
    assert len(set(told)) == len(told) == singles + BATCH * batches, "two submissions were told the same task"
    kept = await bench.store.connection.call("ZRANGE", f"{bench.store.keys.prefix}tt:{TENANT}", 0, -1)
    assert {task_id.decode() for task_id in kept} == set(told), "a task is lost, or came twice"
    for point, ids in killer.deaths:
        answered = [(number, replayed) for number, (mine, replayed) in bench.answers.items() if mine == ids]
        if point == "before":  # the store never heard of these ids: its repetition was the first that it had
            assert answered == [], ids
        else:
            assert [replayed for _, replayed in answered] == [True], ids
    args = Counter([await argument(bench.store, task_id) for task_id in told])
    assert args == Counter(itertools.chain.from_iterable([n] * (BATCH if n % 5 == 0 else 1) for n in range(SUBMISSIONS)))


async def argument(store: Store, task_id: str) -> Any:
    """Which submission it was."""
    record = await store.task(task_id)
    assert record is not None
    return msgspec.json.decode(record.spec.args)["x"]
