"""One connection to Redis or Valkey that pipelines by itself, bounds every call and reconnects.

Calls made in the same turn of the event loop leave in one write, and their answers come back in order: a busy process
needs one connection and no pool. Every call has a deadline; a connection that misses one is cut, since what follows on it
would be late as well. A call is sent once: whether to send it again is the caller's decision (every function of the library
is idempotent, so `Store` does).

It must not know any key or any function of ours.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import urlsplit

import hiredis
from redis.connection import parse_url
from redis.exceptions import RedisError

from manager.core.errors import SettingsError, StoreFull, StoreUnavailable

RECONNECT_S_MAX: Final = 0.5
"""A store that restarts is back within a second; one attempt each half second per process is no storm."""
PENDING_MAX: Final = 20_000
"""Calls under way at once, above which a caller is refused: memory stays bounded when the store is slow."""


class StoreReplyError(Exception):
    """The store answered with an error; `code` is its first word."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


class _Protocol(asyncio.Protocol):
    def __init__(self, owner: "StoreConnection") -> None:
        self.owner = owner
        self.reader = hiredis.Reader(replyError=StoreReplyError)
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.transport: asyncio.Transport | None = None
        self.push: Callable[[Any], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        reader = self.reader
        reader.feed(data)
        while True:
            reply = reader.gets()
            if reply is False:
                return
            if self.push is not None:
                self.push(reply)
            elif self.waiting:
                future = self.waiting.popleft()
                if not future.done():
                    if isinstance(reply, StoreReplyError):
                        future.set_exception(reply)
                    else:
                        future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner._lost(self)
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_exception(StoreUnavailable())


class StoreConnection:
    """A pipelining connection.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` URL with user and password.
        deadline_s: seconds that a call may take, connecting included.
        name: client name, seen in ``CLIENT LIST``.
        on_reconnect: called after each connection but the first.
    """

    def __init__(self, url: str, deadline_s: float, name: str, on_reconnect: Callable[[], None] | None = None) -> None:
        try:
            self._options = dict(parse_url(url))
        except ValueError as error:
            scheme = urlsplit(url).scheme or "nothing"
            raise SettingsError(
                f"store.url: {error} (its scheme is {scheme!r}; use redis://, rediss:// or unix://)"
            ) from None
        self._deadline_s = deadline_s
        self._name = name
        self._on_reconnect = on_reconnect
        self._protocol: _Protocol | None = None
        self._connecting: asyncio.Task[_Protocol] | None = None
        self._outgoing: list[bytes] = []
        self._connected_before = False
        self._closed = False
        self._last_failure_at = 0.0

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._protocol is not None

    async def call(self, *args: Any, deadline_s: float | None = None) -> Any:
        """Send one command and await its answer: bytes, int, None or lists of these.

        Raises:
            StoreUnavailable: no connection, no answer in time, loading or read-only.
            StoreFull: the store has no memory left for the command.
            StoreReplyError: any other error answer.
        """
        loop = asyncio.get_running_loop()
        limit = self._deadline_s if deadline_s is None else deadline_s
        protocol = self._protocol
        if protocol is None:
            protocol = await self._connect_within(limit)
        if len(protocol.waiting) >= PENDING_MAX:
            raise StoreUnavailable("too many calls wait for the store")
        future: asyncio.Future[Any] = loop.create_future()
        protocol.waiting.append(future)
        self._write(loop, protocol, hiredis.pack_command(args))
        # A timer handle is half the cost of asyncio.timeout, and this is the hottest line of the product.
        timer = loop.call_later(limit, self._expire, protocol, future)
        try:
            return await future
        except StoreReplyError as error:
            raise _translated(error) from None
        finally:
            timer.cancel()

    def _write(self, loop: asyncio.AbstractEventLoop, protocol: _Protocol, data: bytes) -> None:
        if not self._outgoing:
            loop.call_soon(self._flush, protocol)
        self._outgoing.append(data)

    def _flush(self, protocol: _Protocol) -> None:
        data, self._outgoing = b"".join(self._outgoing), []
        if protocol.transport is not None and not protocol.transport.is_closing():
            protocol.transport.write(data)

    def _expire(self, protocol: _Protocol, future: asyncio.Future[Any]) -> None:
        if not future.done():
            future.set_exception(StoreUnavailable("the store did not answer in time; nothing is known of the call"))
            if protocol.transport is not None:
                protocol.transport.abort()

    def _lost(self, protocol: _Protocol) -> None:
        if self._protocol is protocol:
            self._protocol = None
            self._outgoing = []

    async def _connect_within(self, limit: float) -> _Protocol:
        if self._closed:
            raise StoreUnavailable("the connection was closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
        try:
            return await asyncio.wait_for(asyncio.shield(self._connecting), limit)
        except (OSError, TimeoutError, RedisError, StoreReplyError) as error:
            raise StoreUnavailable(f"the store cannot be reached: {str(error) or type(error).__name__}") from None

    async def _connect(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        pause = self._last_failure_at + RECONNECT_S_MAX - loop.time()
        if pause > 0:
            await asyncio.sleep(pause)
        try:
            async with asyncio.timeout(self._deadline_s):
                protocol = await self._open()
                for command in self._greeting():
                    future: asyncio.Future[Any] = loop.create_future()
                    protocol.waiting.append(future)
                    assert protocol.transport is not None
                    protocol.transport.write(hiredis.pack_command(command))
                    try:
                        await future
                    except StoreReplyError:
                        if command[0] != "CLIENT":  # a name is for people; a user may lack the right to give itself one
                            raise
        except BaseException:
            self._last_failure_at = loop.time()
            raise
        self._protocol = protocol
        self._outgoing = []
        if self._connected_before and self._on_reconnect is not None:
            self._on_reconnect()
        self._connected_before = True
        return protocol

    async def _open(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        options = self._options
        if "path" in options:
            _, protocol = await loop.create_unix_connection(lambda: _Protocol(self), options["path"])
            return protocol
        context: ssl.SSLContext | None = None
        if options.get("connection_class") is not None:
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if certificate := options.get("ssl_certfile"):
                context.load_cert_chain(certificate, options.get("ssl_keyfile"))
        _, protocol = await loop.create_connection(
            lambda: _Protocol(self), options.get("host", "localhost"), int(options.get("port", 6379)), ssl=context
        )
        return protocol

    def _greeting(self) -> list[tuple[str, ...]]:
        options = self._options
        commands: list[tuple[str, ...]] = []
        if password := options.get("password"):
            commands.append(("AUTH", options.get("username") or "default", password))
        if options.get("db"):
            commands.append(("SELECT", str(options["db"])))
        commands.append(("CLIENT", "SETNAME", self._name))
        return commands

    async def subscribe(self, channels: list[str], on_message: Callable[[str, str], None]) -> None:
        """Turn the connection into a subscriber and stay until it breaks; messages go to `on_message(channel, text)`.

        Raises:
            StoreUnavailable: the connection could not be made, or broke.
        """
        protocol = await self._connect_within(self._deadline_s)
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def receive(reply: Any) -> None:
            if isinstance(reply, StoreReplyError):
                if not broken.done():
                    broken.set_exception(StoreUnavailable(str(reply)))
            elif reply[0] == b"message":
                on_message(reply[1].decode(), reply[2].decode())
            elif reply[0] == b"subscribe" and not subscribed.done():
                subscribed.set_result(None)
                on_message("", "subscribed")

        protocol.push = receive
        protocol.waiting.append(broken)
        assert protocol.transport is not None
        protocol.transport.write(hiredis.pack_command(("SUBSCRIBE", *channels)))
        await broken

    async def close(self) -> None:
        """Close for good."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._connecting
        if self._protocol is not None and self._protocol.transport is not None:
            self._protocol.transport.close()


_UNAVAILABLE: Final = frozenset({"LOADING", "MISCONF", "READONLY", "MASTERDOWN", "BUSY", "NOREPLICAS", "CLUSTERDOWN"})


def _translated(error: StoreReplyError) -> Exception:
    if error.code == "OOM" or "OOM" in str(error)[:200]:
        return StoreFull()
    if error.code in _UNAVAILABLE:
        return StoreUnavailable(f"the store refuses work at the moment ({error.code})")
    return error
