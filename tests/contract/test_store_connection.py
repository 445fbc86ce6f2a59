"""The connection: every call answers in time, every answer goes to its own caller, and it comes back by itself.

Real servers, stopped and killed; where a server cannot be brought to an answer, a small one that says it.
"""

import asyncio
import gc
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from manager.core.errors import SettingsError, StoreFull, StoreUnavailable
from manager.store import Store, StoreConnection
from manager.store.connection import StoreReplyError
from manager.store.store import connect
from tests.contract.store_harness import Lab, StoreServer, check_invariants, connected, end, submission

SLACK_S = 0.5


@pytest.fixture(autouse=True)
async def quiet(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """No test leaves a task behind, nor an exception that nobody has retrieved."""
    caplog.set_level(logging.DEBUG, "asyncio")
    before = asyncio.all_tasks()
    yield
    gc.collect()
    if left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        _, left = await asyncio.wait(left, timeout=1.0)
    assert not left, left
    noise = [record.getMessage() for record in caplog.records if record.name == "asyncio" and record.levelno > logging.DEBUG]
    assert not noise, noise


async def took_s(call: Awaitable[object]) -> tuple[float, object]:
    began = time.monotonic()
    try:
        answer: object = await call
    except (StoreUnavailable, StoreReplyError) as error:
        answer = error
    return time.monotonic() - began, answer


async def until(ready: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    """Try until it is so; the store may be away meanwhile."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                if await ready():
                    return
            except StoreUnavailable:
                pass
            await asyncio.sleep(0.02)


# --- deadlines ----------------------------------------------------------------------------------------------------


async def test_a_stopped_server_costs_a_call_its_deadline_and_not_more(own_server: StoreServer):
    async with connected(own_server.url, 0.6) as lab:
        agent = await lab.agent()
        await lab.submit(2)
        slot = await lab.open(agent)
        claim = await lab.claim(agent, slot)
        own_server.send(signal.SIGSTOP)
        try:
            for _ in range(2):  # over the old connection, then over one that is not answered either
                calls = (
                    lab.store.next(slot, agent.incarnation, 1, [end(claim)]),
                    lab.store.submit("red", 9, [submission()]),
                    lab.store.task(claim.task_id),
                    lab.store.beat("n1", agent.incarnation, []),
                    lab.store.look(leader=False),
                )
                for seconds, answer in await asyncio.gather(*(took_s(call) for call in calls)):
                    assert isinstance(answer, StoreUnavailable)
                    assert seconds <= 0.6 + SLACK_S, f"a call took {seconds:.2f} s"
        finally:
            own_server.send(signal.SIGCONT)

        async def answers() -> bool:
            return await lab.store.task(claim.task_id) is not None

        await until(answers)
        reply = await lab.next(agent, slot, 1, end(claim))  # whether the first send got through or not
        assert reply.word in ("WORK", "IDLE")
        await check_invariants(lab.store)


async def test_a_call_that_waits_for_a_connection_has_one_deadline_for_both(unused_tcp_port: int):
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)  # the greeting, and never an answer
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", unused_tcp_port)
    store = connect(f"redis://127.0.0.1:{unused_tcp_port}", 0.4, "test")
    for _ in range(2):
        seconds, answer = await took_s(store.task("x"))
        assert isinstance(answer, StoreUnavailable)
        assert seconds <= 0.4 + SLACK_S
    await store.connection.close()
    server.close()


async def test_a_server_that_is_not_there_is_told_at_once(unused_tcp_port: int):
    store = connect(f"redis://127.0.0.1:{unused_tcp_port}", 2.0, "test")
    seconds, answer = await took_s(store.task("x"))
    assert isinstance(answer, StoreUnavailable)
    assert "cannot be reached" in str(answer)
    assert seconds <= 1.0
    await store.connection.close()
    assert isinstance((await took_s(store.task("x")))[1], StoreUnavailable)


async def test_closing_while_connecting_ends_who_waits(unused_tcp_port: int):
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", unused_tcp_port)
    connection = StoreConnection(f"redis://127.0.0.1:{unused_tcp_port}", 5.0, "test")
    waiting = asyncio.create_task(took_s(connection.call("PING")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await connection.close()
    seconds, answer = await waiting
    assert isinstance(answer, StoreUnavailable)
    assert seconds < 1.0
    server.close()


async def test_too_many_calls_are_refused_not_kept(store_server: StoreServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("manager.store.connection.PENDING_MAX", 10)
    async with connected(store_server.url) as lab:
        answers = await asyncio.gather(*(lab.raw("PING") for _ in range(50)), return_exceptions=True)
        assert answers.count(b"PONG") == 10
        assert sum(isinstance(answer, StoreUnavailable) for answer in answers) == 40
        assert await lab.raw("PING") == b"PONG"


# --- coming back --------------------------------------------------------------------------------------------------


async def test_a_server_that_is_killed_and_started_again_has_everything(own_server: StoreServer):
    again: list[bool] = []
    store = Store(StoreConnection(own_server.url, 2.0, "test", lambda: again.append(True)))
    await store.deploy()
    lab = Lab(store, own_server.url)
    agent = await lab.agent()
    tasks = await lab.submit(3)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    url = own_server.url
    own_server.kill()
    seconds, answer = await took_s(lab.status(tasks[0]))
    assert isinstance(answer, StoreUnavailable)
    assert seconds <= 2.0 + SLACK_S
    own_server.start()
    assert own_server.url == url

    async def answers() -> bool:
        return await store.task(tasks[0]) is not None

    await until(answers)
    assert again == [True]
    assert [claim.task_id for claim in (await lab.next(agent, slot)).claims] == [tasks[0]], "the library or a claim is gone"
    await lab.next(agent, slot, 0, end(claim))
    await check_invariants(store)
    await store.connection.close()


async def test_a_connection_that_breaks_under_a_call_is_made_again_for_it(lab: Lab):
    """The caller hears nothing of it: the call is sent once more."""
    await lab.raw("PING")
    async with connected_only(lab) as other:
        for _ in range(3):
            await other.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await lab.submit(1)


@asynccontextmanager
async def connected_only(lab: Lab) -> AsyncIterator[StoreConnection]:
    connection = StoreConnection(lab.url, 5.0, "other")
    yield connection
    await connection.close()


async def test_a_library_that_was_flushed_is_loaded_again(lab: Lab):
    task = await lab.one()
    await lab.raw("FUNCTION", "FLUSH")
    answers = await asyncio.gather(*(lab.submit() for _ in range(20)))
    assert len(answers) == 20
    assert await lab.store.cancel(task, "red") == "CANCELLED"


async def test_deploying_replaces_another_version(lab: Lab):
    await lab.raw("FUNCTION", "LOAD", "REPLACE", "#!lua name=rocyard\nredis.register_function('ry_old', function() end)")
    await lab.raw("HSET", "{ry}:meta", "library", "another")
    await lab.store.deploy()
    assert await lab.one()
    loaded = await lab.raw("INFO", "commandstats")
    await lab.store.deploy()
    assert b"function|load:calls=" in loaded
    again = await lab.raw("INFO", "commandstats")
    assert _calls(again) == _calls(loaded), "a library that is there was loaded again"


def _calls(stats: bytes) -> str:
    line = next(line for line in stats.decode().splitlines() if line.startswith("cmdstat_function|load:"))
    return line.split(",")[0]


# --- errors of the store ------------------------------------------------------------------------------------------


@asynccontextmanager
async def says(port: int, *answers: bytes) -> AsyncIterator[list[bytes]]:
    """A server that answers each command with the next of `answers`, and to greetings with OK."""
    left, heard = list(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100_000):
            heard.append(data)
            for _ in range(data.count(b"SETNAME")):
                writer.write(b"+OK\r\n")
            if b"SETNAME" not in data:
                writer.write(left.pop(0))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    yield heard
    server.close()


@pytest.mark.parametrize(
    ("line", "error", "word"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable, "LOADING"),
        (b"-READONLY You can't write against a read only replica.\r\n", StoreUnavailable, "READONLY"),
        (b"-MISCONF Errors writing to the AOF file\r\n", StoreUnavailable, "MISCONF"),
        (b"-BUSY Redis is busy running a script\r\n", StoreUnavailable, "BUSY"),
        (b"-NOAUTH Authentication required.\r\n", StoreUnavailable, "store.url"),
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", StoreFull, "memory"),
        (b"-ERR something else\r\n", StoreReplyError, "something else"),
    ],
)
async def test_the_stores_errors_are_told_in_our_words(unused_tcp_port: int, line: bytes, error: type, word: str):
    async with says(unused_tcp_port, line, line, line, b"$1\r\n7\r\n") as heard:
        connection = StoreConnection(f"redis://127.0.0.1:{unused_tcp_port}", 2.0, "test")
        with pytest.raises(error, match=word):
            await connection.call("GET", "x")
        with pytest.raises(error, match=word):
            await connection.call("GET", "x")
        greetings = sum(b"SETNAME" in data for data in heard)
        assert greetings == (2 if word == "READONLY" else 1), "a replica must be left, and nothing else"
        await connection.close()


async def test_a_loading_store_is_asked_again_once(unused_tcp_port: int):
    async with says(unused_tcp_port, b"-LOADING wait\r\n", b"*0\r\n"):
        store = connect(f"redis://127.0.0.1:{unused_tcp_port}", 2.0, "test")
        assert await store.services() == {}
        await store.connection.close()


async def test_a_replica_is_told_as_unavailable(own_server: StoreServer):
    async with connected(own_server.url, 2.0) as lab:
        await lab.raw("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(StoreUnavailable, match="READONLY"):
            await lab.submit()
        await lab.raw("REPLICAOF", "NO", "ONE")
        assert await lab.submit()


@pytest.mark.parametrize("secret", ["rocyard:wrong@", "nobody:wrong@", ":wrong@", ""])
async def test_a_wrong_password_names_the_setting(store_server: StoreServer, secret: str):
    url = f"redis://{secret}127.0.0.1:{urlsplit(store_server.url).port}/0"
    store = connect(url, 2.0, "test")
    with pytest.raises(StoreUnavailable, match=r"refuses this user or password, see store\.url"):
        await store.ping()
    with pytest.raises(StoreUnavailable, match=r"store\.url"):
        await store.task("x")
    await store.connection.close()


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:6379", ""])
def test_an_address_that_is_none_is_told_at_the_start(url: str):
    with pytest.raises(SettingsError, match=r"store\.url"):
        StoreConnection(url, 1.0, "test")


# --- one connection, many callers ---------------------------------------------------------------------------------


async def test_calls_of_one_turn_leave_in_one_write(lab: Lab):
    await lab.raw("PING")
    protocol = lab.store.connection._protocol
    assert protocol is not None
    writes: list[int] = []
    write = protocol.transport.write
    protocol.transport = _Spy(protocol.transport, lambda data: (writes.append(len(data)), write(data)))
    answers = await asyncio.gather(*(lab.raw("ECHO", f"text {i}") for i in range(300)))
    assert answers == [f"text {i}".encode() for i in range(300)]
    assert len(writes) == 1


class _Spy:
    def __init__(self, inner: object, write: Callable[[bytes], object]) -> None:
        self._inner = inner
        self.write = write

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@pytest.mark.parametrize("seed", range(3))
async def test_callers_that_are_cancelled_shift_no_answers(lab: Lab, seed: int):
    """Thousands of calls, a third of them cancelled at any point, the connection cut now and then: every answer that
    comes is the caller's own."""
    rng = random.Random(seed)
    connection = lab.store.connection
    wrong: list[tuple[bytes, bytes]] = []
    answered = 0

    async def one(number: int) -> None:
        nonlocal answered
        text = f"{seed}:{number}".encode()
        try:
            reply = await connection.call("ECHO", text)
        except StoreUnavailable:
            return
        answered += 1
        if reply != text:
            wrong.append((text, reply))

    for round_ in range(60):
        tasks = [asyncio.create_task(one(round_ * 100 + i)) for i in range(50)]
        for task in tasks:
            if rng.random() < 0.33:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                task.cancel()
        if rng.random() < 0.1 and connection._protocol is not None:
            connection._protocol.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not wrong
    assert answered > 1000
    assert await connection.call("ECHO", b"last") == b"last"


# --- subscribers --------------------------------------------------------------------------------------------------


async def test_a_subscriber_hears_what_breaks_and_can_come_back(own_server: StoreServer):
    connection = StoreConnection(own_server.url, 1.0, "listener")
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def listen() -> None:
        while True:
            try:
                await connection.subscribe(["news"], lambda channel, text: heard.put_nowait((channel, text)))
            except StoreUnavailable:
                await asyncio.sleep(0.02)

    listener = asyncio.create_task(listen())
    async with asyncio.timeout(20):
        assert await heard.get() == ("", "subscribed")
        async with connected(own_server.url) as lab:
            await lab.raw("PUBLISH", "news", "one")
        assert await heard.get() == ("news", "one")
        own_server.kill()
        own_server.start()
        assert await heard.get() == ("", "subscribed")
        async with connected(own_server.url) as lab:
            await lab.raw("PUBLISH", "news", "two")
        assert await heard.get() == ("news", "two")
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    await connection.close()


async def test_a_subscriber_notices_a_store_that_is_silent(own_server: StoreServer, monkeypatch: pytest.MonkeyPatch):
    """A machine that vanishes sends nothing, not even an end of the connection."""
    monkeypatch.setattr("manager.store.connection.PING_S", 0.1)
    connection = StoreConnection(own_server.url, 0.4, "listener")
    subscribed = asyncio.Event()
    listener = asyncio.create_task(took_s(connection.subscribe(["news"], lambda *_: subscribed.set())))
    async with asyncio.timeout(10):
        await subscribed.wait()
        await asyncio.wait({listener}, timeout=0.5)
        assert not listener.done(), "a store that answers its pings was left"
        own_server.send(signal.SIGSTOP)
        _, answer = await listener
        own_server.send(signal.SIGCONT)
    assert isinstance(answer, StoreUnavailable)
    await connection.close()


async def test_a_subscriber_that_is_cancelled_leaves_a_connection_that_works(lab: Lab):
    connection = StoreConnection(lab.url, 2.0, "listener")
    subscribed = asyncio.Event()
    listener = asyncio.create_task(connection.subscribe(["news"], lambda *_: subscribed.set()))
    await subscribed.wait()
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    assert await connection.call("PING") == b"PONG"
    await connection.close()


# --- what the server says of its disk ------------------------------------------------------------------------------


async def test_the_servers_durability_is_read(own_server: StoreServer):
    async with connected(own_server.url) as lab:
        assert await lab.store.fsync_policy() == "always"
        await lab.raw("CONFIG", "SET", "appendfsync", "everysec")
        assert await lab.store.fsync_policy() == "everysec"
        await lab.raw("CONFIG", "SET", "appendonly", "no")
        assert await lab.store.fsync_policy() == "off"


async def test_a_worker_may_write_its_heartbeat_and_nothing_else(own_server: StoreServer):
    async with connected(own_server.url) as lab:
        task = await lab.one()
        assert own_server.spec is not None
        worker = connect(own_server.spec.worker_url.value, 2.0, "worker")
        await worker.put_heartbeat("n1", "tcp://1", [])
        for forbidden in (worker.submit("red", 9, [submission()]), worker.cancel(task, "red"), worker.task(task)):
            with pytest.raises(StoreReplyError, match="NOPERM"):
                await forbidden
        assert await worker.fsync_policy() == "unknown"
        await worker.connection.close()
