"""The proxy does to links what it says, and to no others."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from manager.ports import free_port
from tests.chaos.proxy import Proxy

HOST = "127.0.0.1"


class Link:
    """A connection of a part that has said its name."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answers(self) -> bool:
        """Whether what is sent comes back."""
        self.writer.write(b"x")
        return await self.reader.readexactly(1) == b"x"

    async def is_cut(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Proxy, int]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, HOST, 0)
    proxy = Proxy(HOST, server.sockets[0].getsockname()[1])
    port = free_port(HOST)
    await proxy.listen(port)
    try:
        async with asyncio.timeout(10):
            yield proxy, port
    finally:
        await proxy.close()
        server.close()


async def linked(port: int, name: str) -> Link:
    reader, writer = await asyncio.open_connection(HOST, port)
    greeting = f"*3\r\n$6\r\nCLIENT\r\n$7\r\nSETNAME\r\n${len(name)}\r\n{name}\r\n".encode()
    writer.write(greeting)
    link = Link(reader, writer)
    await reader.readexactly(len(greeting))
    return link


async def test_a_link_is_cut_by_its_name_and_the_others_stay() -> None:
    async with proxied() as (proxy, port):
        one, other = await linked(port, "agent-a"), await linked(port, "agent-b")
        with proxy.cut(lambda name: name == "agent-a"):
            assert await one.is_cut()
            assert await other.answers()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await linked(port, "agent-a")
        assert await (await linked(port, "agent-a")).answers()


async def test_a_link_that_stands_still_is_not_cut_and_loses_nothing() -> None:
    async with proxied() as (proxy, port):
        link = await linked(port, "api")
        with proxy.still(lambda _: True):
            answer = asyncio.create_task(link.answers())
            assert not (await asyncio.wait({answer}, timeout=0.1))[0]
        assert await answer


async def test_a_slow_link_takes_its_time_in_each_direction() -> None:
    async with proxied() as (proxy, port):
        link = await linked(port, "api")
        began_s = time.monotonic()
        with proxy.slow(lambda _: True, 0.1):
            assert await link.answers()
        assert time.monotonic() - began_s >= 0.2
