"""Uvicorn's HTTP protocol with the limits that httptools leaves out: the size of a request's head, the time that it may take,
and the number of connections. Refusals have the form of all others. Head and body of an answer leave in one write.

Knows uvicorn's class as it is in 0.34 to 0.54; tests/integration/test_api_wire.py holds each limit.
"""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manager.api import problems
from manager.api.exchange import BASE_HEADERS
from manager.core.errors import BadRequest, RocyardError

HEAD_BYTES_MAX: Final = 16 * 1024
"""Request line and headers: a key has 62 bytes, and no cookie is used."""
HEAD_S_MAX: Final = 10.0
"""From the connection, or the first byte of a request, to the end of its head."""
GOODBYE_S: Final = 1.0
CONNECTIONS_MAX: Final = 1024
"""Twice the requests in hand: most of a connection's life is idle."""
_REASONS: Final = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large",
                   503: b"Service Unavailable"}  # fmt: skip


class JoinedWrites:
    """A transport that sends what is written in one turn of the loop together: uvicorn writes head and body apart, which
    costs a system call and a packet for each answer.
    """

    __slots__ = ("_loop", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def _flush(self) -> None:
        if self._parts:
            data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_extra_info("sslcontext") is not None:
            # With TLS both sides say goodbye. A client with an idle connection does not listen, and would hold up our end.
            self._loop.call_later(GOODBYE_S, self._transport.abort)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_pending = True
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]  # it is all that is used of one
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(problems.Overloaded())
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            if self._head_pending and self._head_timer is None:
                self._await_head()

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._head_pending = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_pending = False
        self._stop_head_timer()
        if not self._refused:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete and self.timeout_keep_alive_task is None:
            # The rest of a body that was refused has gone by: the connection is idle from here.
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn names it
        """What the parser cannot read."""
        self._refuse(BadRequest("That is no HTTP/1.1 request."))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(problems.HeadTooLarge(f"The request's line and headers are over {HEAD_BYTES_MAX} bytes."))
            raise _HeadTooLargeError

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S_MAX, self._head_is_late)

    def _head_is_late(self) -> None:
        self._refuse(problems.RequestTimeout("The request does not come."))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: RocyardError) -> None:
        """Answer and close, without a request having been read."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_head_timer()
        body = problems.problem(error, "")
        headers = [
            *problems.headers(error),
            *BASE_HEADERS,
            (b"content-type", problems.PROBLEM_JSON),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (error.status, _REASONS[error.status], lines, body))
        self.transport.close()


class _HeadTooLargeError(Exception):
    """Ends the parser's work; it has been answered."""
