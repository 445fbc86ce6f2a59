"""A TCP proxy between the parts and the store, with faults: links that are cut, slow, or stand still.

A link is known by the name that the part gives its connection in its greeting (CLIENT SETNAME), so one part can be cut off
while the others go on.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Final

CHUNK_BYTES: Final = 65536
_NAME: Final = re.compile(rb"SETNAME\r\n\$\d+\r\n([^\r]+)\r\n", re.IGNORECASE)

Matches = Callable[[str], bool]


class _Link:
    """One connection through the proxy."""

    def __init__(self, inner: asyncio.StreamWriter, outer: asyncio.StreamWriter) -> None:
        self.name = ""
        self.inner = inner
        self.outer = outer

    def abort(self) -> None:
        for writer in (self.inner, self.outer):
            writer.transport.abort()


class Proxy:
    """Listens on one port, and passes on to another."""

    def __init__(self, host: str, target: int) -> None:
        self.host = host
        self.target = target
        self._links: set[_Link] = set()
        self._cut: dict[int, Matches] = {}
        self._still: dict[int, tuple[Matches, asyncio.Event]] = {}
        self._slow: dict[int, tuple[Matches, float]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._meet, self.host, port)

    async def deafen(self) -> None:
        """Listen no more, until told to again; links that there are stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        await self.deafen()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def names(self) -> list[str]:
        """Of the links that there are."""
        return sorted({link.name for link in self._links if link.name})

    # --- faults -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cut(self, matches: Matches) -> Iterator[None]:
        """Links are broken, and new ones break as soon as they say who they are."""
        number = next(self._numbers)
        self._cut[number] = matches
        for link in list(self._links):
            if matches(link.name):
                link.abort()
        try:
            yield
        finally:
            del self._cut[number]

    @contextlib.contextmanager
    def still(self, matches: Matches) -> Iterator[None]:
        """Nothing passes, and nobody is told."""
        number = next(self._numbers)
        event = asyncio.Event()
        self._still[number] = (matches, event)
        try:
            yield
        finally:
            del self._still[number]
            event.set()

    @contextlib.contextmanager
    def slow(self, matches: Matches, delay_s: float) -> Iterator[None]:
        """What passes is held for so long, in each direction."""
        number = next(self._numbers)
        self._slow[number] = (matches, delay_s)
        try:
            yield
        finally:
            del self._slow[number]

    # --- links --------------------------------------------------------------------------------------------------

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            their_reader, their_writer = await asyncio.open_connection(self.host, self.target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, their_writer)
        self._links.add(link)
        pumps = [
            asyncio.create_task(self._pump(link, reader, their_writer, greets=True)),
            asyncio.create_task(self._pump(link, their_reader, writer, greets=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._links.discard(link)
            link.abort()

    async def _pump(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, greets: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if greets and not link.name and (found := _NAME.search(data)):
                    link.name = found[1].decode()
                    if any(matches(link.name) for matches in self._cut.values()):
                        return
                await self._hold(link.name)
                writer.write(data)
                await writer.drain()

    async def _hold(self, name: str) -> None:
        delay_s = sum(delay_s for matches, delay_s in self._slow.values() if matches(name))
        if delay_s:
            await asyncio.sleep(delay_s)
        while events := [event for matches, event in self._still.values() if matches(name)]:
            await events[0].wait()
