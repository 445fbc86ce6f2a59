"""One connection to Redis or Valkey that pipelines by itself, bounds every call and reconnects.

Calls made in the same turn of the event loop leave in one write, and their answers come back in order: a busy process
needs one connection and no pool. Every call has a deadline, which connecting counts against; a connection that misses a
whole one is cut, since what follows on it would be late as well. A call is sent once: whether to send it again is the
caller's decision (every function of the library is idempotent, so `Store` does, within the same deadline).

It must not know any key or any function of ours. Whether what it leads to is the right store is for its `Gate` to say, before
anybody uses a new connection and then again and again.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import hiredis
from redis.connection import parse_url

from manager.core.errors import SettingsError, StoreFull, StoreUnavailable
from manager.tls import STORE_VERSION_MIN, client_context

RECONNECT_S_MAX: Final = 0.5
"""A store that restarts is back within a second; one attempt each half second per process is no storm."""
PENDING_MAX: Final = 20_000
"""Calls under way at once, above which a caller is refused: memory stays bounded when the store is slow."""
UNSENT_BYTES_MAX: Final = 256 * 1024 * 1024
"""The same bound in bytes: calls may be large."""
PING_S: Final = 5.0
"""A subscriber that has heard nothing for so long asks whether the store is still there."""
GATE_S: Final = 1.0
"""A store may be emptied or replaced behind a connection that stands: this often one looks."""

T = TypeVar("T")
Ask = Callable[..., Awaitable[Any]]
"""Sends one command over one connection and awaits its answer. Raises StoreReplyError."""


class Gate(Protocol):
    """Says whether a connection leads to the right store; who is not let in gets its `StoreUnavailable` instead."""

    async def admit(self, ask: Ask) -> None:
        """Before anybody else uses a new connection."""

    async def still(self, ask: Ask) -> None:
        """Again, beside the calls of others."""


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
        self.heard = False
        self.lost = False
        self.outgoing: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self.heard = True
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
                        _fail(future, reply)
                    else:
                        future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.lost = True
        self.owner._lost(self)  # noqa: SLF001  # the two are one thing
        while self.waiting:
            _fail(self.waiting.popleft(), StoreUnavailable("the connection to the store broke; nothing is known of the call"))

    def send(self, command: bytes) -> None:
        """Send it at the end of this turn of the loop, with whatever else is sent in it."""
        if not self.outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self.outgoing.append(command)

    def _flush(self) -> None:
        data, self.outgoing = b"".join(self.outgoing), []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def abort(self) -> None:
        """Cut it; nobody uses it from now on, and who waits hears of it in the next turn of the loop."""
        self.lost = True
        self.owner._lost(self)  # noqa: SLF001  # the two are one thing
        if self.transport is not None:
            self.transport.abort()


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # a caller that is cancelled in this very moment never asks; that is no news for the log


class StoreConnection:
    """A pipelining connection.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` URL with user and password. With ``rediss://`` the store must show a
            certificate for its host, of the CA in ``ssl_ca_certs`` (a path; else one that this machine trusts);
            ``ssl_certfile`` and ``ssl_keyfile`` are shown to it.
        deadline_s: seconds that a call may take, connecting included.
        name: client name, seen in ``CLIENT LIST``.
        on_reconnect: called after each connection but the first.
        gate: asked on each connection. With none, whatever answers is the store.
    """

    def __init__(
        self,
        url: str,
        deadline_s: float,
        name: str,
        on_reconnect: Callable[[], None] | None = None,
        gate: Gate | None = None,
    ) -> None:
        try:
            self._options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
        except ValueError as error:
            scheme = urlsplit(url).scheme or "nothing"
            raise SettingsError(f"store.url: {error} (its scheme is {scheme!r}; use redis://, rediss:// or unix://)") from None
        self.deadline_s = deadline_s
        self._name = name
        self._on_reconnect = on_reconnect
        self.gate = gate
        self._looking: asyncio.Task[None] | None = None
        self._protocol: _Protocol | None = None
        self._connecting: asyncio.Task[_Protocol] | None = None
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
        limit = self.deadline_s if deadline_s is None else deadline_s
        # Before anything waits for an answer: what cannot be packed is never sent, and would shift all answers by one.
        command = hiredis.pack_command(args)
        protocol = self._protocol
        if protocol is None:
            began_s = loop.time()
            protocol = await self._connect_within(limit)
            limit = max(0.0, limit - (loop.time() - began_s))
        if protocol.lost:
            raise StoreUnavailable("the connection to the store broke")
        if len(protocol.waiting) >= PENDING_MAX or protocol.unsent_bytes() > UNSENT_BYTES_MAX:
            raise StoreUnavailable("too many calls wait for the store")
        future: asyncio.Future[Any] = loop.create_future()
        protocol.waiting.append(future)
        protocol.send(command)
        # Who had less than a whole deadline left has not shown that the connection is dead.
        cut = limit >= self.deadline_s
        # A timer handle is half the cost of asyncio.timeout, and this is the hottest line of the product.
        timer = loop.call_later(limit, self._expire, protocol, future, cut)
        try:
            return await future
        except StoreReplyError as error:
            if error.code in _MISPLACED:
                protocol.abort()  # the store's address may lead to another server by now
            raise _translated(error) from None
        finally:
            timer.cancel()

    def _expire(self, protocol: _Protocol, future: asyncio.Future[Any], cut: bool) -> None:
        if not future.done():
            _fail(future, StoreUnavailable("the store did not answer in time; nothing is known of the call"))
            if cut:
                protocol.abort()

    def _lost(self, protocol: _Protocol) -> None:
        if self._protocol is protocol:
            self._protocol = None

    async def _connect_within(self, limit: float) -> _Protocol:
        if self._closed:
            raise StoreUnavailable("the connection was closed")
        connecting = self._connecting
        if connecting is None or connecting.done():
            connecting = self._connecting = asyncio.create_task(self._connect())
            connecting.add_done_callback(_retrieve)
        # It serves all who wait: neither a caller's deadline nor its cancellation ends it.
        await asyncio.wait({connecting}, timeout=limit)
        if not connecting.done():
            raise StoreUnavailable("the store cannot be reached: no connection in time")
        try:
            return connecting.result()
        except asyncio.CancelledError:
            raise StoreUnavailable("the connection was closed") from None
        except (StoreReplyError, OSError) as error:
            raise _unconnected(error) from None

    async def apart(self, action: Callable[[Ask], Awaitable[T]]) -> T:
        """What `action` answers on a connection of its own, for commands that the calls of others may not come between.

        Raises:
            StoreUnavailable: as `call`, and whatever `action` raises.
        """
        protocol: _Protocol | None = None
        try:
            async with asyncio.timeout(self.deadline_s):
                protocol = await self._open()
                for command in self._greeting():
                    await self._greet(protocol, command)
                return await action(_asking(protocol))
        except (StoreReplyError, OSError) as error:
            raise _unconnected(error) from None
        finally:
            if protocol is not None:
                protocol.abort()

    async def _connect(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        pause = self._last_failure_at + RECONNECT_S_MAX - loop.time()
        if pause > 0:
            await asyncio.sleep(pause)
        protocol: _Protocol | None = None
        try:
            async with asyncio.timeout(self.deadline_s):
                protocol = await self._open()
                for command in self._greeting():
                    await self._greet(protocol, command)
                if self.gate is not None:
                    await self.gate.admit(_asking(protocol))
        except BaseException:
            self._last_failure_at = loop.time()
            if protocol is not None:
                protocol.abort()
            raise
        self._protocol = protocol
        if self._connected_before and self._on_reconnect is not None:
            self._on_reconnect()
        self._connected_before = True
        if self.gate is not None:
            loop.call_later(GATE_S, self._look_again, protocol)
        return protocol

    def _look_again(self, protocol: _Protocol) -> None:
        # A subscriber's connection takes no other commands, and what it hears is only a reason to ask over another one.
        if not protocol.lost and protocol.push is None and not self._closed:
            self._looking = asyncio.get_running_loop().create_task(self._look(protocol))

    async def _look(self, protocol: _Protocol) -> None:
        """Ask the gate again; a connection that it refuses is cut, and the next one has to pass it whole."""
        assert self.gate is not None
        try:
            async with asyncio.timeout(self.deadline_s):
                await self.gate.still(_asking(protocol))
        except (StoreUnavailable, StoreReplyError, TimeoutError):
            protocol.abort()
        else:
            asyncio.get_running_loop().call_later(GATE_S, self._look_again, protocol)

    async def _greet(self, protocol: _Protocol, command: tuple[Any, ...]) -> None:
        try:
            await _asking(protocol)(*command)
        except StoreReplyError as error:
            # A name is for people, and a user may lack the right to give itself one.
            if command[0] != "CLIENT" or error.code in _STRANGERS:
                raise

    async def _open(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        if "path" in self._options:
            _, protocol = await loop.create_unix_connection(lambda: _Protocol(self), self._options["path"])
            return protocol
        host, port = self._address()
        _, protocol = await loop.create_connection(lambda: _Protocol(self), host, port, ssl=self._context())
        return protocol

    def _address(self) -> tuple[str, int]:
        return self._options.get("host", "localhost"), int(self._options.get("port", 6379))

    def _context(self) -> ssl.SSLContext | None:
        """For TLS. Made anew for each connection: certificates are renewed while a process runs."""
        if self._options.get("connection_class") is None:
            return None
        ca, certificate, key = (self._options.get(name) or "" for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"))
        return client_context(ca, certificate, key, least=STORE_VERSION_MIN)

    @property
    def database(self) -> int:
        """The number of the database that the URL names."""
        return int(self._options.get("db") or 0)

    async def stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own as a plain stream, greeted, for what is no call and answer.

        Raises:
            StoreUnavailable: it could not be made.
        """
        try:
            async with asyncio.timeout(self.deadline_s):
                if "path" in self._options:
                    reader, writer = await asyncio.open_unix_connection(self._options["path"])
                else:
                    host, port = self._address()
                    reader, writer = await asyncio.open_connection(host, port, ssl=self._context())
                for command in self._greeting():
                    writer.write(hiredis.pack_command(command))
                    line = await reader.readline()
                    if line.startswith(b"-") and command[0] != "CLIENT":
                        writer.close()
                        raise _translated(StoreReplyError(line[1:].strip().decode(errors="replace")))
        except OSError as error:
            raise _unconnected(error) from None
        return reader, writer

    def _greeting(self) -> list[tuple[Any, ...]]:
        options = self._options
        commands: list[tuple[Any, ...]] = []
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
        protocol = await self._connect_within(self.deadline_s)
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
        try:
            command: tuple[Any, ...] = ("SUBSCRIBE", *channels)
            protocol.transport.write(hiredis.pack_command(command))
            while True:
                protocol.heard = False
                await asyncio.wait({broken}, timeout=PING_S)
                if broken.done():
                    broken.result()
                # Silence is no sign: the store may have gone without a word, and would be waited for forever.
                if not protocol.heard:
                    protocol.transport.write(hiredis.pack_command(("PING",)))
                    await asyncio.wait({broken}, timeout=self.deadline_s)
                    if not protocol.heard:
                        raise StoreUnavailable("the store no longer answers its subscriber")
        finally:
            protocol.abort()  # a connection that has subscribed is good for nothing else

    async def close(self) -> None:
        """Close for good."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        if self._protocol is not None and self._protocol.transport is not None:
            self._protocol.transport.close()


_MISPLACED: Final = frozenset({"READONLY", "MASTERDOWN"})
_STRANGERS: Final = frozenset({"NOAUTH", "WRONGPASS"})
_UNAVAILABLE: Final = _MISPLACED | {"LOADING", "MISCONF", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN"}


def _asking(protocol: _Protocol) -> Ask:
    """A way to ask over `protocol` itself, whether anybody else may use it yet or not."""

    async def ask(*args: Any) -> Any:
        if protocol.lost:
            raise StoreUnavailable("the connection to the store broke")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        command = hiredis.pack_command(args)
        protocol.waiting.append(future)
        protocol.send(command)
        return await future

    return ask


def _unconnected(error: Exception) -> Exception:
    """What a caller hears of a connection that could not be made."""
    if isinstance(error, StoreReplyError):
        return _translated(error)
    return StoreUnavailable(f"the store cannot be reached: {str(error) or 'no answer in time'}")  # TimeoutError is an OSError


def _retrieve(task: asyncio.Task[_Protocol]) -> None:
    if not task.cancelled():
        task.exception()  # who waited has its own error; where nobody did, nobody need hear of it


def _translated(error: StoreReplyError) -> Exception:
    if error.code in _STRANGERS:
        return StoreUnavailable(f"the store refuses this user or password, see store.url ({error})")
    if error.code == "OOM" or "OOM" in str(error)[:200]:
        return StoreFull()
    if error.code in _UNAVAILABLE:
        return StoreUnavailable(f"the store refuses work at the moment ({error.code})")
    return error
