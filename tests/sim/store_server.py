"""The store of the simulation: a real server, the real library on a clock that is set, and one synchronous connection.

The library's text is changed on its way into the server, and only there: the time is read from a key; what is published is
kept in a list, which comes back with the answer; and what the server would choose or order at random has an order.
"""

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hiredis
from redis.connection import parse_url

from manager.store.connection import StoreReplyError
from manager.store.schema import library_source
from tests.contract.store_harness import FAST, StoreServer

_PREFACE = """
local function sim_call(command, ...)
  if command == 'TIME' then
    local now = redis.call('GET', 'sim:now')
    return { string.sub(now, 1, -4), string.sub(now, -3) .. '000' }
  elseif command == 'PUBLISH' then
    redis.call('RPUSH', 'sim:said', ...)
    return 0
  elseif command == 'SPOP' or command == 'SRANDMEMBER' then
    local key, count = ...
    local members, taken = redis.call('SMEMBERS', key), {}
    table.sort(members)
    for i = 1, math.min(tonumber(count or 1), #members) do taken[i] = members[i] end
    if #taken > 0 and command == 'SPOP' then redis.call('SREM', key, unpack(taken)) end
    if count then return taken end
    return taken[1] or false
  end
  local reply = redis.call(command, ...)
  if command == 'SMEMBERS' then table.sort(reply) end
  return reply
end
"""


_FEW = {"EXPANDED_MAX": 3, "TOLD_MAX": 2}
"""Bounds of one call that a small history would not reach."""


def simulated_library(source: str = "") -> str:
    """The library for the simulation, from the product's or from a mutant of it."""
    source = source or library_source()
    assert source.count("redis.call('TIME')") == 1, "the library has more than one clock, or none"
    head, _, body = source.partition("\n")
    assert head.startswith("#!lua")
    for name, few in _FEW.items():
        body, count = re.subn(rf"(?m)^local {name} = \d+", f"local {name} = {few}", body)
        assert count == 1, f"the library has {count} of {name}"
    changed = body.replace("redis.call(", "sim_call(")
    assert "redis.call" not in changed
    assert "redis.pcall" not in changed
    return f"{head}{_PREFACE}{changed}"


class SimStore:
    """One connection to the server; every call is answered before the next one is made."""

    def __init__(self, url: str, path: str) -> None:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self._reader = hiredis.Reader(replyError=StoreReplyError)
        if options.get("password"):
            self.call("AUTH", options.get("username") or "default", options["password"])
        self._now_ms = 0

    def close(self) -> None:
        self.socket.close()

    def load(self, library: str) -> None:
        """Empty the store and have this library."""
        self.call("FLUSHALL")
        self.call("FUNCTION", "LOAD", "REPLACE", library)
        self._now_ms = 0

    def call(self, *args: Any) -> Any:
        """One command, as it is."""
        reply = self._send(hiredis.pack_command(args), 1)[0]
        if isinstance(reply, StoreReplyError):
            raise reply
        return reply

    def run(self, now_ms: int, args: tuple[Any, ...]) -> tuple[Any, list[tuple[str, str]]]:
        """One command of the simulation at this time: its answer (or error), and what it published."""
        command = hiredis.pack_command(args)
        if args[0] != "FCALL":
            return self._send(command, 1)[0], []
        count = 2
        if now_ms != self._now_ms:
            self._now_ms = now_ms
            command = hiredis.pack_command(("SET", "sim:now", now_ms)) + command
            count = 3
        *_, reply, said = self._send(command + _TAKE, count)
        if not said:
            return reply, []
        texts = [part.decode() for part in said]
        return reply, list(zip(texts[::2], texts[1::2], strict=True))

    def _send(self, data: bytes, count: int) -> list[Any]:
        self.socket.sendall(data)
        replies: list[Any] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is False:
                received = self.socket.recv(1 << 20)
                assert received, "the server has closed the connection"
                self._reader.feed(received)
            else:
                replies.append(reply)
        return replies


@contextmanager
def simulated_store() -> Iterator[SimStore]:
    """A server of its own on a unix socket, and the connection to it; skips where there is no redis-server, unless in CI."""
    with tempfile.TemporaryDirectory(prefix="rocyard-sim-store-") as folder:
        path = f"{folder}/socket"
        server = StoreServer(Path(folder) / "data", "redis", *FAST, f"unixsocket {path}", "unixsocketperm 700").start()
        try:
            store = SimStore(server.url, path)
            try:
                yield store
            finally:
                store.close()
        finally:
            server.kill()


_TAKE = hiredis.pack_command(("LPOP", "sim:said", 10_000))
