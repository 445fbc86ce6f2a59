"""One request and one answer, as small as they can be: these objects are made for every call.

Owns reading of the head and the body of a request within limits, and the headers that every answer bears. It is used
below Litestar's own request and response because those cost more than all else that a submission does (docs/api.md,
"What it costs"). Must not know any route.
"""

import asyncio
import itertools
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from manager.api.problems import PROBLEM_JSON, RequestTimeout, headers, problem
from manager.core.errors import BadRequest, RocyardError, TooLarge, UnsupportedMediaType
from manager.keys import ApiKey

Scope = Any
"""ASGI's scope: Litestar and uvicorn each have a type of their own for it."""
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

BODY_S_MAX: Final = 20.0
"""A body of the largest size takes this long over 0.5 Mbit/s; slower ones hold a place for nothing."""
DRAINED_BYTES_MAX: Final = 16 * 1024 * 1024
"""A body that is too large, but not larger than this, is let in and dropped, so that its sender can read the answer. Above,
or where no length was told, the connection is closed."""

JSON: Final = b"application/json"
BASE_HEADERS: Final[Headers] = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
_WANTED: Final = frozenset({
    *(b"authorization", b"content-type", b"content-encoding", b"content-length"),
    *(b"transfer-encoding", b"idempotency-key", b"x-request-id"),
})  # fmt: skip
_IDEMPOTENCY_KEY: Final = re.compile(rb"[\x20-\x7e]{1,255}")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9-]{1,64}")
_JSON_TYPES: Final = frozenset({b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"})
_NOTHING: Final[Mapping[str, str]] = {}

_process = os.urandom(4).hex()
_numbers = itertools.count(1)


class Disconnected(Exception):
    """The peer is gone: nobody reads an answer."""


class Call:
    """One request on its way to its operation."""

    __slots__ = ("_headers", "key", "params", "path", "query", "receive", "request_id")

    key: ApiKey
    """Who asks; set before an operation that is not public is called."""

    def __init__(self, scope: Scope, receive: Receive, params: Mapping[str, str] = _NOTHING) -> None:
        found: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in _WANTED:
                found[name] = value if name not in found else found[name] + b"," + value
        self._headers = found
        self.receive = receive
        self.params = params
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        given = found.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            self.request_id = given
        else:
            self.request_id = b"%s-%x" % (_process.encode(), next(_numbers))

    @property
    def authorization(self) -> bytes:
        """The header as sent; two of them are joined, which no key survives."""
        return self._headers.get(b"authorization", b"")

    @property
    def idempotency_key(self) -> bytes | None:
        """What makes this request the same one again; None where it has none.

        Raises:
            BadRequest: it is none that could be one.
        """
        given = self._headers.get(b"idempotency-key")
        if given is not None and not _IDEMPOTENCY_KEY.fullmatch(given):
            raise BadRequest("Idempotency-Key: 1 to 255 printable ASCII characters.", field="Idempotency-Key")
        return given

    @property
    def has_body(self) -> bool:
        """Whether a body comes with it, of whatever type; one that is told to have no bytes is none."""
        return b"transfer-encoding" in self._headers or int(self._headers.get(b"content-length", b"0")) > 0

    async def json_body(self, bytes_max: int) -> bytes:
        """The body, if it says that it is JSON and is not over the limit.

        Raises:
            UnsupportedMediaType: another type, or compressed.
            TooLarge: over `bytes_max`; the rest is not kept.
            RequestTimeout: it does not come.
            Disconnected: it will not come.
        """
        headers = self._headers
        if headers.get(b"content-type") not in _JSON_TYPES:
            _check_type(headers.get(b"content-type", b""))
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaType("Send the body as it is: compressed bodies are not taken.")
        length = headers.get(b"content-length")
        if length is not None and int(length) > bytes_max:
            raise _too_large(bytes_max, close=int(length) > DRAINED_BYTES_MAX)
        try:
            async with asyncio.timeout(BODY_S_MAX):
                body = await self._read(bytes_max)
        except TimeoutError:
            raise RequestTimeout from None
        if not body:
            raise BadRequest("The request has no body; send a JSON object.")
        return body

    async def _read(self, bytes_max: int) -> bytes:
        pieces: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await self.receive()
            if message["type"] != "http.request":
                raise Disconnected
            pieces.append(message["body"])
            size += len(message["body"])
            more = message.get("more_body", False)
            if size > bytes_max:
                raise _too_large(bytes_max, close=more and b"content-length" not in self._headers)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def gone(self) -> None:
        """Return once the peer has closed the connection."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


class Reply:
    """An answer, ready to be sent. It is an ASGI application, so that Litestar takes it as a response."""

    __slots__ = ("body", "content_type", "headers", "request_id", "status")

    def __init__(self, status: int, body: bytes, headers: Headers | None = None, content_type: bytes = JSON) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.content_type = content_type
        self.request_id = b"-"

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.all_headers()})
        await send({"type": "http.response.body", "body": self.body})

    def all_headers(self) -> Headers:
        """Its own headers with those that every answer bears."""
        found = [
            (b"content-type", self.content_type),
            (b"content-length", b"%d" % len(self.body)),
            (b"x-request-id", self.request_id),
        ]
        if self.headers is None:
            return found + BASE_HEADERS
        own = {name for name, _ in self.headers}
        return found + self.headers + [pair for pair in BASE_HEADERS if pair[0] not in own]


def problem_reply(error: RocyardError, path: str) -> Reply:
    """The answer to a request that ended in `error`."""
    extra = headers(error)
    if isinstance(error, TooLarge) and error.details.pop("close", False):
        extra.append((b"connection", b"close"))
    return Reply(error.status, problem(error, path), extra, PROBLEM_JSON)


def _too_large(bytes_max: int, *, close: bool) -> TooLarge:
    return TooLarge(f"The body is over the limit of {bytes_max} bytes (api.body_bytes_max).", bytes_max=bytes_max, close=close)


def _check_type(content_type: bytes) -> None:
    """Whether the type is JSON, however it is written."""
    kind, _, parameters = content_type.partition(b";")
    charset = parameters.strip().lower().replace(b'"', b"")
    if kind.strip().lower() != JSON or charset not in {b"", b"charset=utf-8", b"charset=utf8"}:
        raise UnsupportedMediaType
