"""HTTP as it is on the wire: heads and bodies that no client library would send, and the limits that uvicorn leaves out."""

import asyncio
import contextlib
import hashlib
import json
import socket

import httpx
import pytest

from manager.api import exchange, protocol
from manager.core.lifecycle import Outcome
from manager.core.model import End, ResultFile
from manager.results.folder import FolderResults
from manager.settings import ResultSettings, Settings
from tests.integration.api_world import World, serving, until, until_answer

pytestmark = pytest.mark.integration

LARGE_BYTES = 32 * 1024 * 1024
"""More than sockets take in while nobody reads."""


class Peer:
    """A connection that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def of(cls, world: World) -> "Peer":
        host, port = world.base_url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def ended(self) -> bool:
        async with asyncio.timeout(20):
            try:
                return await self.reader.read(1) == b""
            except ConnectionResetError:
                return True


def post(world: World, *headers: str, body: bytes = b"") -> bytes:
    lines = ("POST /v1/tasks HTTP/1.1", "host: x", f"authorization: Bearer {world.keys['user']}", *headers)
    return "\r\n".join((*lines, "content-type: application/json", "\r\n")).encode() + body


GOOD = b'{"function":"echo","args":{"x":1}}'


async def test_one_connection_serves_many_requests_also_when_pipelined(world: World):
    peer = await Peer.of(world)
    one = post(world, f"content-length: {len(GOOD)}", body=GOOD)
    peer.writer.write(one * 3)
    assert [(await peer.answer())[0] for _ in range(3)] == [202, 202, 202]


async def test_a_chunked_body_is_taken(world: World):
    peer = await Peer.of(world)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (GOOD[:5], GOOD[5:])) + b"0\r\n\r\n"
    assert (await peer.ask(post(world, "transfer-encoding: chunked", body=chunks)))[0] == 202


async def test_an_endless_chunked_body_is_cut_at_the_limit(world: World):
    """A8: no length was told, so the connection ends. A plain socket: asyncio's would forget an answer that it has not read
    when a write fails.
    """
    host, port = world.base_url.removeprefix("http://").split(":")

    def pour(connection: socket.socket) -> None:
        with pytest.raises(ConnectionError):
            connection.sendall((b"10000\r\n" + b"x" * 65536 + b"\r\n") * 1000)

    def read(connection: socket.socket) -> bytes:
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
        return answer

    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(post(world, "transfer-encoding: chunked"))
        _, answer = await asyncio.gather(asyncio.to_thread(pour, connection), asyncio.to_thread(read, connection))
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 413 ")
    assert "connection: close" in head.lower()
    assert "content-type: application/problem+json" in head.lower()
    assert json.loads(body)["status"] == 413


async def test_a_length_over_the_limit_is_refused_before_the_body_comes(world: World):
    peer = await Peer.of(world)
    status, headers, _ = await peer.ask(post(world, "content-length: 1000000000000"))
    assert (status, headers["connection"]) == (413, "close")
    assert await peer.ended()


async def test_a_body_over_the_limit_is_dropped_and_the_connection_lives(world: World):
    peer = await Peer.of(world)
    body = b"x" * (2 * 1024 * 1024)
    status, headers, _ = await peer.ask(post(world, f"content-length: {len(body)}", body=body))
    assert (status, "connection" in headers) == (413, False)
    assert (await peer.ask(post(world, f"content-length: {len(GOOD)}", body=GOOD)))[0] == 202


async def test_a_length_that_promises_too_much_ends_in_408(world: World, monkeypatch):
    monkeypatch.setattr(exchange, "BODY_S_MAX", 0.2)
    peer = await Peer.of(world)
    status, _, body = await peer.ask(post(world, "content-length: 1000", body=GOOD))
    assert (status, b"RequestTimeout" in body) == (408, True)


async def test_a_length_that_promises_too_little_ends_the_connection(world: World):
    """What follows the short body is no request, and nothing of it is run."""
    peer = await Peer.of(world)
    assert (await peer.ask(post(world, "content-length: 5", body=GOOD)))[0] == 400
    assert await peer.ended()
    assert (await world.client().get("/v1/tasks")).json()["tasks"] == []


@pytest.mark.parametrize(
    "headers",
    [
        ("content-length: 5", "content-length: 6"),
        ("content-length: -1",),
        ("content-length: x",),
        ("content-length: 34", "transfer-encoding: chunked"),
        ("transfer-encoding: gzip, chunked", "content-length: 34"),
        ("bad header: \x00",),
    ],
)
async def test_lengths_that_contradict_are_refused(world: World, headers):
    """What two servers in a row could read differently is read by none."""
    peer = await Peer.of(world)
    status, answered, body = await peer.ask(post(world, *headers, body=GOOD))
    assert (status, answered["content-type"], b"BadRequest" in body) == (400, "application/problem+json", True)
    assert await peer.ended()


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 64, b"GET / HTTP/9.9\r\n\r\n"]
)
async def test_what_is_no_http_is_answered_and_closed(world: World, data):
    peer = await Peer.of(world)
    status, headers, _ = await peer.ask(data)
    assert (status, headers["connection"], headers["x-content-type-options"]) == (400, "close", "nosniff")
    assert await peer.ended()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", id="a long line"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", id="a long header"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(5000)) + b"\r\n", id="many headers"),
    ],
)
async def test_a_head_over_the_limit_is_431(world: World, data):
    peer = await Peer.of(world)
    status, _, body = await peer.ask(data)
    assert (status, b"HeadTooLarge" in body) == (431, True)
    assert await peer.ended()


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_is_408(world: World, monkeypatch, said):
    """Slow senders hold a connection for so long and no longer."""
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.2)
    peer = await Peer.of(world)
    if said:
        peer.writer.write(said)
    status, _, body = await peer.answer()
    assert (status, b"RequestTimeout" in body) == (408, True)
    assert await peer.ended()


async def test_connections_over_the_limit_are_asked_to_come_again(world: World, monkeypatch):
    monkeypatch.setattr(protocol, "CONNECTIONS_MAX", 3)
    peers = [await Peer.of(world) for _ in range(3)]
    await until(lambda: len(world.server.server_state.connections) == 3)
    status, headers, _ = await (await Peer.of(world)).answer()
    assert (status, headers["retry-after"]) == (503, "1")
    peers[0].writer.close()
    await until(lambda: len(world.server.server_state.connections) <= 2)
    assert (await (await Peer.of(world)).ask(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"))[0] == 200


async def test_requests_over_the_limit_are_asked_to_come_again(world: World, monkeypatch):
    monkeypatch.setattr("manager.api.app.IN_HAND_MAX", 2)
    task_id = await world.submit()
    waiting = [asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=20")) for _ in range(2)]
    await until(lambda: len(world.server.api.ends._waiters.get(task_id, [])) == 2)
    for path in ("/v1/tasks", f"/v1/tasks/{task_id}", "/docs", "/livez/x"):
        reply = await world.client().get(path)
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "Overloaded", "1")
    for path in ("/livez", "/readyz", "/metrics", "/health"):  # who is refused there restarts the process
        assert (await world.client("nobody").get(path)).status_code == 200, path
    await world.agent.run_all()
    assert [(await one).status_code for one in waiting] == [200, 200]
    assert (await world.client().get("/v1/tasks")).status_code == 200


async def test_a_key_that_waits_often_enough_is_answered_as_if_its_time_were_up(store_server, monkeypatch):
    """One key must not take the places of all others."""
    monkeypatch.setattr("manager.api.tasks.WAITS_MAX", 2)
    async with serving(store_server.url) as world:
        task_id = await world.submit()
        path, waiters = f"/v1/tasks/{task_id}", world.server.api.ends._waiters

        def wait(who: str = "user", more: str = "") -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(world.client(who).get(f"{path}{more}?wait=25"))

        waiting = [wait(), wait()]
        await until(lambda: len(waiters.get(task_id, [])) == 2)
        async with asyncio.timeout(15):
            assert (await wait()).json()["status"] == "QUEUED"
            assert (await wait(more="/logs")).json()["ended"] is False
        waiting.append(wait("reader"))
        await until(lambda: len(waiters.get(task_id, [])) == 3)
        await world.agent.run_all()
        assert [(await one).json().get("status") for one in waiting] == ["SUCCEEDED"] * 3
        task_id = await world.submit()  # places that were left can be taken again
        path = f"/v1/tasks/{task_id}"
        waiting = [wait(), wait(more="/logs")]
        await until(lambda: len(waiters.get(task_id, [])) == 2)
        await world.agent.run_all()
        assert [(await one).status_code for one in waiting] == [200, 200]


async def test_a_key_that_reads_many_large_results_is_asked_to_come_again(store_server, monkeypatch, tmp_path):
    monkeypatch.setattr("manager.api.results.STREAMS_MAX", 1)
    settings = Settings(results=ResultSettings(url=str(tmp_path)))
    async with serving(store_server.url, settings) as world:
        task_id = await world.submit()
        slot = await world.agent.open(await world.agent.shape_of_first_queue())
        (claim,) = await world.agent.claim(slot)
        file = await kept(FolderResults(tmp_path), task_id, slot, LARGE_BYTES)
        end = End(task_id, claim.attempt, Outcome.SUCCEEDED, age_s=0.0, file=file)
        assert None not in (await world.store.next(slot, world.agent.incarnation, 0, [end])).statuses
        path = f"/v1/tasks/{task_id}/result"
        slow = await Peer.of(world)
        slow.writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.keys['user']}\r\n\r\n".encode())
        await slow.reader.readuntil(b"\r\n\r\n")
        refused = await world.client().get(path)
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "Overloaded", "1")
        assert len((await world.client("reader").get(path)).content) == LARGE_BYTES
        slow.writer.transport.abort()
        whole = await until_answer(lambda: world.client().get(path), lambda reply: reply.status_code == 200)
        assert len(whole.content) == LARGE_BYTES


async def kept(results: FolderResults, task_id: str, slot: str, size: int) -> ResultFile:
    """A result of so many bytes, as an agent keeps it."""
    results.prepare()
    path = results.place(task_id, 1, slot)
    assert path is not None
    path.write_bytes(bytes(size))
    return await results.keep(path, task_id, 1, slot, size, hashlib.sha256(bytes(size)).hexdigest())


@pytest.mark.parametrize(
    "header", [b"authorization: Bearer \r\n", b"authorization:\r\n", b"authorization: Bearer ry_\xff\xfe\r\n"]
)
async def test_headers_no_library_would_send_are_401(world: World, header):
    peer = await Peer.of(world)
    assert (await peer.ask(b"GET /v1/tasks HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n"))[0] == 401


@pytest.mark.parametrize("host", [b"host: a b\r\n", b"host: <script>\r\n", b"host: \xff\r\n"])
async def test_a_strange_host_is_no_harm(world: World, host):
    peer = await Peer.of(world)
    status, headers, _ = await peer.ask(b"GET /v1/nothing HTTP/1.1\r\n" + host + b"\r\n")
    assert (status in {400, 404}, headers["content-type"]) == (True, "application/problem+json")


async def test_an_upgrade_is_not_made(world: World):
    peer = await Peer.of(world)
    head = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\r\n"
    assert (await peer.ask(head))[0] in {200, 400}
