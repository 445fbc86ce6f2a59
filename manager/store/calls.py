"""How the library's functions are called, for every part of `Store`.

Every function is idempotent, so a call whose answer was lost is sent once more before the caller hears of it, in what is
left of its deadline: no call takes longer than the connection's deadline, however often it is sent. A server that does not
have the library is given it on the way.
"""

import asyncio
from functools import partial
from typing import Any, Final

from manager.core.errors import StoreFull, StoreNew, StoreReplaced, StoreTooNew, StoreUnavailable
from manager.core.keys import Keys
from manager.metrics import STORE_ERRORS
from manager.store import schema
from manager.store.connection import StoreConnection, StoreReplyError

IDS_MAX: Final = 500
"""Ids in one call: a function holds up everybody else for as long as it runs."""

SECONDS_MAX: Final = 10 * 366 * 86_400.0


def milliseconds(seconds: float) -> float:
    """`seconds` in bounds: durations come from executors, which run user code and may say anything."""
    return min(seconds, SECONDS_MAX) * 1000 if seconds > 0 else 0.0  # not so for NaN


class Calls:
    """Calls over one connection.

    Args:
        connection: shared by the whole process.
        keys: names of keys; tests use a prefix of their own.
    """

    def __init__(self, connection: StoreConnection, keys: Keys | None = None) -> None:
        self.connection = connection
        self.keys = keys or Keys()
        self._deploying: asyncio.Task[None] | None = None

    async def deploy(self) -> None:
        """Load the library if the server has neither this one nor a newer one; first it must be the right store."""
        if self._deploying is None or self._deploying.done():
            gate = self.connection.gate
            action = partial(schema.deploy, keys=self.keys) if gate is None else gate.admit
            self._deploying = asyncio.create_task(self.connection.apart(action))
        await asyncio.shield(self._deploying)  # it serves all who wait: a caller's cancellation does not end it

    async def ping(self) -> None:
        """Raises StoreUnavailable where the store does not answer."""
        await self.connection.call("PING")

    async def _run(self, function: str, *args: Any) -> Any:
        try:
            reply = await self._raw("FCALL", function, 1, self.keys.prefix, *args)
        except StoreReplyError as error:
            if "Function not found" not in str(error):
                raise
            await self.deploy()
            reply = await self._raw("FCALL", function, 1, self.keys.prefix, *args)
        if self.connection.gate is not None and (reply == b"FENCED" or (type(reply) is list and reply[:1] == [b"FENCED"])):
            # Before somebody ends what he has because he is nobody there: is it the right store at all?
            await self.connection.gate.still(self.connection.call)
        return reply

    async def _raw(self, *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            try:
                return await self.connection.call(*args)
            except (StoreNew, StoreReplaced, StoreTooNew):
                raise  # the same store would say the same
            except StoreUnavailable:
                left_s = self.connection.deadline_s - (loop.time() - began_s)
                if left_s <= 0:
                    raise
            return await self.connection.call(*args, deadline_s=left_s)
        except (StoreUnavailable, StoreFull) as error:
            STORE_ERRORS.labels(kind=error.code).inc()
            raise
