"""What the tests of the API stand on: a real store, a real server on a real port, and an agent that is only its calls.

The agent registers a node, publishes functions, and opens a slot for a shape as controller and agent together would; what
a task of it "returns" is its own arguments. Nothing here is mocked: every call goes through the store's functions.
"""

import asyncio
import contextlib
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from manager.api.serve import Server, bind, build_server, url_of
from manager.core.devices import parse_fleet
from manager.core.functions import PublishedFunction, encode_published
from manager.core.ids import new_id
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import Claim, DeviceUse, End, NodeInfo
from manager.core.quantities import GIB
from manager.core.requests import KeyScope
from manager.core.shapes import grant_of
from manager.keys import create_key
from manager.settings import Secret, Settings
from manager.store import Store
from manager.store.server import EmbeddedStore, is_ready
from manager.store.store import connect

T = TypeVar("T")
NODE = "node-1"
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0}, "text": {"type": "string"}},
    "required": ["x"],
    "additionalProperties": False,
}


async def until(met: Callable[[], object], limit_s: float = 15.0) -> None:
    """Turns of the loop until `met()`."""
    async with asyncio.timeout(limit_s):
        while not met():  # noqa: ASYNC110 -- what is waited for cannot be told to set an event
            await asyncio.sleep(0.01)


async def until_answer(ask: Callable[[], Awaitable[T]], met: Callable[[T], object], limit_s: float = 15.0) -> T:
    """Asks until the answer is as it should be."""
    async with asyncio.timeout(limit_s):
        while True:
            found = await ask()
            if met(found):
                return found
            await asyncio.sleep(0.05)


class RunningStore:
    """A real server in a folder of its own; it can be stopped, killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.spec = EmbeddedStore(folder).prepare()
        self.url = self.spec.url.value
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.spec.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self.spec.stdin_text.value.encode())
        self.process.stdin.close()
        for _ in range(100):
            if is_ready(self.url):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        raise AssertionError("the store did not start")

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_store() -> Iterator[RunningStore]:
    with tempfile.TemporaryDirectory() as folder:
        store = RunningStore(Path(folder))
        store.start()
        try:
            yield store
        finally:
            store.kill()


class Agent:
    """A node with two simulated devices, and the leader that asks for its slots."""

    def __init__(self, store: Store, node: str = NODE, fleet: str = "1x2:mi300x") -> None:
        self.store = store
        self.node = node
        self.incarnation = new_id()
        self.devices = parse_fleet(fleet)[0].devices
        self.token = 0

    async def join(self) -> None:
        info = NodeInfo(hostname=self.node, pid=1, source="simulated", version="0", devices=self.devices, reserve_bytes=GIB)
        assert await self.store.register(self.node, self.incarnation, info)
        uses = tuple(DeviceUse(uuid=device.uuid, used_bytes=0) for device in self.devices)
        await self.store.put_heartbeat(self.node, "tcp://127.0.0.1:1", uses)
        for name, schema, memory_bytes in (("echo", SCHEMA, GIB), ("any", {"type": "object"}, 2 * GIB)):
            function = PublishedFunction(
                name=name, doc=f"Does {name}.", schema=msgspec.Raw(msgspec.json.encode(schema)), memory_bytes=memory_bytes
            )
            await self.store.publish_function(name, encode_published(function))
        broken = PublishedFunction(
            name="broken", doc="", schema=msgspec.Raw(b"{}"), memory_bytes=GIB, error="No module named 'torch': pip install it"
        )
        await self.store.publish_function("broken", encode_published(broken))

    async def lead(self) -> None:
        _, token, beat, _ = await self.store.lead("leader", 0, 0, "read")
        done, self.token, _, _ = await self.store.lead("leader", token, beat, "take")
        assert done

    async def open(self, shape_id: str) -> str:
        if not self.token:
            await self.lead()
        slot = new_id()
        assert await self.store.request_slot(self.token, slot, shape_id, 0)
        shapes = {row.shape_id: row.shape for row in (await self.store.look(leader=False)).queues}
        grant = grant_of(shapes[shape_id].resources, self.node, (self.devices[0].uuid,))
        reply = await self.store.open_slot(slot, self.incarnation, grant)
        assert reply.word == "OK", reply
        return slot

    async def shape_of_first_queue(self) -> str:
        state = await self.store.look(leader=False)
        return next(queue.shape_id for queue in state.queues if queue.depth)

    async def claim(self, slot: str, n: int = 1) -> tuple[Claim, ...]:
        return (await self.store.next(slot, self.incarnation, n, [])).claims

    async def finish(self, slot: str, claim: Claim, payload: bytes | None = None, outcome: Outcome = Outcome.SUCCEEDED) -> None:
        end = End(claim.task_id, claim.attempt, outcome, bytes(claim.spec.args) if payload is None else payload, 0.0, 0.0)
        reply = await self.store.next(slot, self.incarnation, 0, [end])
        assert None not in reply.statuses, reply

    async def run_all(self) -> list[str]:
        """Serve what waits until nothing does."""
        served: list[str] = []
        while any(queue.depth for queue in (await self.store.look(leader=False)).queues):
            slot = await self.open(await self.shape_of_first_queue())
            for claim in await self.claim(slot, 16):
                await self.finish(slot, claim)
                served.append(claim.task_id)
            await self.store.close_slot(slot, self.incarnation, "test")
        return served


class World:
    """A server, a client for each key, and the store beside them."""

    def __init__(self, server: Server, store: Store, keys: dict[str, str], base_url: str) -> None:
        self.server = server
        self.store = store
        self.keys = keys
        self.base_url = base_url
        self.agent = Agent(store)
        self._clients: dict[str, httpx.AsyncClient] = {}

    def client(self, who: str = "user") -> httpx.AsyncClient:
        """A client with the key of `who`; "nobody" has none."""
        if who not in self._clients:
            headers = {"authorization": f"Bearer {self.keys[who]}"} if who != "nobody" else {}
            self._clients[who] = httpx.AsyncClient(base_url=self.base_url, headers=headers, timeout=30, trust_env=False)
        return self._clients[who]

    async def submit(self, function: str = "echo", who: str = "user", **fields: object) -> str:
        body = {"function": function, "args": {"x": 1}} | fields
        reply = await self.client(who).post("/v1/tasks", json=body)
        assert reply.status_code == 202, reply.text
        task_id = reply.json()["task_id"]
        assert isinstance(task_id, str)
        return task_id

    async def status_of(self, task_id: str) -> TaskStatus | None:
        record = await self.store.task(task_id)
        return None if record is None else record.status

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()


WHO = {
    "admin": ("ops", KeyScope.ADMIN),
    "user": ("alpha", KeyScope.USER),
    "reader": ("alpha", KeyScope.READ),
    "other": ("beta", KeyScope.USER),
    "other_admin": ("beta", KeyScope.ADMIN),
}


@contextlib.asynccontextmanager
async def serving(
    url: str, settings: Settings | None = None, *, flush: bool = True, keys: dict[str, str] | None = None
) -> AsyncIterator[World]:
    """An API over the store at `url`, in this loop, on a port of its own.

    Args:
        flush: begin with an empty store and an agent that has joined.
        keys: keys that are there already; the store is not asked for anything then.
    """
    settings = settings or Settings()
    settings = msgspec.structs.replace(settings, store=msgspec.structs.replace(settings.store, url=Secret(url)))
    store = connect(url, 3.0, "test")
    if keys is None and flush:
        await store.connection.call("FLUSHALL")
        await store.deploy()
    fresh = flush and keys is None
    keys = keys or {who: (await create_key(store, tenant, scope))[0] for who, (tenant, scope) in WHO.items()}
    listener = bind("127.0.0.1", 0)
    server = build_server(settings, listener)
    running = asyncio.create_task(server.run_until_stopped())
    world = World(server, store, keys, url_of(listener))
    try:
        while not server.started:
            assert not running.done(), running
            await asyncio.sleep(0)
        if fresh:
            await world.agent.join()
        yield world
    finally:
        await world.close()
        server.should_exit = True
        await running
        listener.close()
        await store.connection.close()
