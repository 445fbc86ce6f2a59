"""The load generator of the HTTP benchmark: one process, raw asyncio and httptools, the same for every system measured.

It reads one `Plan` as JSON from stdin and writes one `Measured` as JSON to stdout. Each of `concurrency` clients has one
kept-alive connection and goes round: POST a task, then GET it with `wait` until it is final. In the second phase the
same clients only POST. It must know nothing of the systems but what the plan says, and do as little as it can: its CPU
comes off the same machine.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine

import httptools
import msgspec
import uvloop

ANSWER_S_MAX = 90.0
"""A connection that is silent for so long is a failure of the run, not a slow answer."""
FINAL = frozenset({"SUCCEEDED", "SUCCESS"})
LOST = frozenset({"FAILED", "CANCELLED", "FAILURE", "REVOKED"})


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where.

    Attributes:
        body: of the POST; every task is the same.
        path: of the collection; a task is at `path`/ID.
        tasks: how many go all the way round.
        submits: how many are only submitted in the second phase.
        concurrency: how many clients, each with one task at a time.
        wait_s: what GET asks the server to wait.
        drain: whether what was only submitted is waited for at the end.
    """

    host: str
    port: int
    path: str
    headers: dict[str, str]
    body: str
    tasks: int
    submits: int
    concurrency: int
    wait_s: int = 30
    drain: bool = True


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. Times in seconds; `round_trips_s` from the POST's first byte to the final answer's last."""

    elapsed_s: float
    round_trips_s: list[float]
    posts_s: list[float]
    gets: int
    submit_elapsed_s: float
    drain_s: float


class _Answer(msgspec.Struct):
    """The two fields that are read of every answer."""

    task_id: str = ""
    status: str = ""


_decode = msgspec.json.Decoder(_Answer).decode


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a TCP transport reads and writes

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        assert self._answer is not None
        status, body = self._parser.get_status_code(), bytes(self._body)
        self._body.clear()
        self._parser = httptools.HttpResponseParser(self)
        self._answer.set_result((status, body))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send `request`; status and body come as a future."""
        assert self.transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer


class Load:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        head = f"Host: {plan.host}:{plan.port}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in plan.headers.items())
        self.plan = plan
        self.post = (
            f"POST {plan.path} HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
            f"Content-Length: {len(plan.body.encode())}\r\n\r\n{plan.body}"
        ).encode()
        self.get_head = f"?wait={plan.wait_s} HTTP/1.1\r\n{head}\r\n".encode()
        self.get_start = f"GET {plan.path}/".encode()
        self.left = plan.tasks
        self.submits_left = plan.submits
        self.last_ids: list[str] = []
        self.round_trips_s: list[float] = []
        self.posts_s: list[float] = []
        self.gets = 0

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.plan.host, self.plan.port)
        return connection

    async def submit(self, connection: Connection) -> str:
        status, body = await connection.ask(self.post)
        if status != 202:
            raise RuntimeError(f"POST answered {status}: {body[:300].decode(errors='replace')}")
        return _decode(body).task_id

    async def wait(self, connection: Connection, task_id: str) -> None:
        """Until the task is final."""
        while True:
            self.gets += 1
            status, body = await connection.ask(self.get_start + task_id.encode() + self.get_head)
            answer = _decode(body) if status == 200 else _Answer()
            if answer.status in FINAL:
                return
            if status != 200 or answer.status in LOST:
                raise RuntimeError(f"GET answered {status}: {body[:300].decode(errors='replace')}")

    async def go_round(self, connection: Connection) -> None:
        while self.left > 0:
            self.left -= 1
            start = time.perf_counter()
            task_id = await self.submit(connection)
            posted = time.perf_counter()
            await self.wait(connection, task_id)
            self.round_trips_s.append(time.perf_counter() - start)
            self.posts_s.append(posted - start)

    async def only_submit(self, connection: Connection) -> None:
        task_id = ""
        while self.submits_left > 0:
            self.submits_left -= 1
            start = time.perf_counter()
            task_id = await self.submit(connection)
            self.posts_s.append(time.perf_counter() - start)
        if task_id and self.plan.drain:
            self.last_ids.append(task_id)

    async def run(self) -> Measured:
        connections = [await self.connect() for _ in range(self.plan.concurrency)]
        start = time.perf_counter()
        await asyncio.wait_for(self._all(self.go_round, connections), ANSWER_S_MAX + self.plan.tasks / 20)
        elapsed_s = time.perf_counter() - start
        start = time.perf_counter()
        await asyncio.wait_for(self._all(self.only_submit, connections), ANSWER_S_MAX + self.plan.submits / 20)
        submit_elapsed_s = time.perf_counter() - start
        start = time.perf_counter()
        for task_id in self.last_ids:
            await asyncio.wait_for(self.wait(connections[0], task_id), ANSWER_S_MAX + self.plan.submits / 20)
        return Measured(
            elapsed_s=elapsed_s,
            round_trips_s=self.round_trips_s,
            posts_s=self.posts_s,
            gets=self.gets,
            submit_elapsed_s=submit_elapsed_s,
            drain_s=time.perf_counter() - start,
        )

    @staticmethod
    async def _all(each: Callable[[Connection], Coroutine[None, None, None]], connections: list[Connection]) -> None:
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(each(connection))


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    measured = uvloop.run(Load(plan).run())
    sys.stdout.buffer.write(msgspec.json.encode(measured))


if __name__ == "__main__":
    main()
