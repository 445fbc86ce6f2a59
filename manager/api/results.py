"""The route of results: from the record, or, where it is large, streamed from the results store.

Owns how a stream ends: what is not all that was kept never looks complete, since its last piece is not sent.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import msgspec

from manager.api.exchange import Call, Headers, Receive, Reply, Scope, Send
from manager.api.operations import Operation
from manager.api.places import STREAMS_MAX, Places
from manager.api.problems import NotFinished, Overloaded, TaskCancelled, TaskFailed
from manager.api.query import parse_query
from manager.api.tasks import TENANT, addressed
from manager.core.errors import NotFound, ResultMissing
from manager.core.lifecycle import TaskStatus
from manager.core.model import ResultFile, TaskRecord
from manager.core.requests import KeyScope
from manager.log import get_logger
from manager.results import ResultStore
from manager.store import Store

STALLED_S: Final = 60.0
"""Who takes nothing for so long is gone, or does not mean to read: it must not hold a place for ever."""

log = get_logger("manager.api")


class FileReply(Reply):
    """A result, piece by piece.

    Args:
        file: its size and checksum, which go before it.
        pieces: of the results store.
        call: tells when the peer has gone.
        ended: called once nothing more will be sent.
    """

    __slots__ = ("_call", "_ended", "_file", "_pieces")

    def __init__(self, file: ResultFile, pieces: AsyncIterator[bytes], call: Call, ended: Callable[[], None]) -> None:
        super().__init__(200, b"", headers_of(file))
        self._file = file
        self._pieces = pieces
        self._call = call
        self._ended = ended

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it; where it breaks off, the connection does too, and so nobody takes a part for the whole."""
        gone = asyncio.create_task(self._call.gone())
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": self.all_headers()})
            async for piece in self._pieces:
                if gone.done():
                    return
                async with asyncio.timeout(STALLED_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except ResultMissing as error:
            log.error("a result broke off", name=self._file.name, error=str(error))
        except TimeoutError:
            log.info("a reader of a result takes nothing", name=self._file.name)
        finally:
            self._ended()
            gone.cancel()
            await self._pieces.aclose()  # type: ignore[attr-defined]  # generators have it, and only they are given

    def all_headers(self) -> Headers:
        """With the length of the file instead of that of the body, which is none."""
        length = (b"content-length", b"%d" % self._file.bytes)
        return [length if name == b"content-length" else (name, value) for name, value in super().all_headers()]


def headers_of(file: ResultFile) -> Headers:
    """How a reader can tell that it has all: by ETag, and by the digest of RFC 9530."""
    digest = base64.b64encode(bytes.fromhex(file.sha256))
    return [(b"etag", b'"%b"' % file.sha256.encode()), (b"repr-digest", b"sha-256=:%b:" % digest)]


class ResultRoutes:
    """What this route needs.

    Args:
        store: for records.
        results: for files.
    """

    def __init__(self, store: Store, results: ResultStore) -> None:
        self._store = store
        self._results = results
        self._places = Places(STREAMS_MAX)

    async def result(self, call: Call) -> Reply:
        """What the function returned, as it is."""
        task_id, tenant = addressed(call, parse_query(call.query, ("tenant",)).get("tenant"))
        record = await self._store.task(task_id)
        if record is None or record.tenant != tenant:
            raise NotFound("There is no such task.")
        check_succeeded(record)
        if record.result_file is not None:
            return await self._streamed(record.result_file, call)
        return Reply(200, record.result or b"null")

    async def _streamed(self, file: ResultFile, call: Call) -> FileReply:
        key_id = call.key.key_id
        if not self._places.take(key_id):
            raise Overloaded(f"This key reads {STREAMS_MAX} large results already; ask again once one has been read.")
        try:
            pieces = await self._results.open(file)
        except BaseException:
            self._places.leave(key_id)
            raise
        return FileReply(file, pieces, call, partial(self._places.leave, key_id))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="get_result", method="GET", path="/v1/tasks/{task_id}/result", access=KeyScope.READ, handler=self.result,
                summary="Get what the function returned, as it is.", answer=msgspec.Raw,
                errors=(NotFound, NotFinished, TaskFailed, TaskCancelled, ResultMissing), query=(TENANT,),
            ),
        )  # fmt: skip


def check_succeeded(record: TaskRecord) -> None:
    """Whether the task has a result.

    Raises:
        TaskFailed, TaskCancelled, NotFinished: it has none, or none yet.
    """
    match record.status:
        case TaskStatus.SUCCEEDED:
            return
        case TaskStatus.FAILED:
            error = record.error
            why = f"{error.type}: {error.message[:500]}" if error is not None else "no reason was left"
            raise TaskFailed(f"The task failed, so it has no result: {why}", task_id=record.task_id, error=error)
        case TaskStatus.CANCELLED:
            raise TaskCancelled(task_id=record.task_id)
        case status:
            raise NotFinished(
                f"The task is {status}: ask for it with '?wait=30s', or again later.",
                task_id=record.task_id,
                task_status=status,
            )
