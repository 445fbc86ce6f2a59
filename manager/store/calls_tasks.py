"""What is asked of tasks and arrays that are in the store: their records, logs and ends, and that they are cancelled."""

import asyncio

import msgspec

from manager.core.lifecycle import TaskStatus
from manager.core.model import ArrayRow, Attempt, TaskEvent, TaskRecord
from manager.store import rows
from manager.store.calls import IDS_MAX, Calls


class KeptLog(msgspec.Struct, frozen=True):
    """The end of what an attempt has written to each stream.

    Attributes:
        attempt: which; 0: none has written anything.
        stdout_dropped, stderr_dropped: bytes of the stream that came before what is kept: where that begins.
    """

    attempt: int
    stdout: bytes
    stderr: bytes
    stdout_dropped: int
    stderr_dropped: int


class TaskCalls(Calls):
    """Calls for who submitted tasks, and for who shows or explains them."""

    async def task(self, task_id: str) -> TaskRecord | None:
        """The record of a task."""
        record = rows.task(task_id, await self._raw("HMGET", self.keys.task(task_id), *rows.TASK_FIELDS))
        if record is None or not record.array_id:
            return record
        # What was submitted is kept once for all tasks of an array, and for as long as one of them is kept.
        array = await self.array(record.array_id)
        return record if array is None else msgspec.structs.replace(record, spec=array.spec)

    async def task_named(self, tenant: str, name: str) -> str | None:
        """The id of the task or the array that the tenant calls so."""
        said = await self._raw("HGET", self.keys.names(tenant), name)
        return said.decode().partition(" ")[0] if said else None

    async def tasks(
        self, tenant: str, before: int | None, limit: int, status: TaskStatus | None, function: str
    ) -> tuple[int | None, list[TaskRecord]]:
        """Tasks of a tenant, newest first, and where to go on (None at the end). A page may be short of `limit`."""
        reply = await self._run("ry_list", tenant, "" if before is None else before, limit, status or "", function)
        return (int(reply[0]) if reply[0] else None), [rows.listed(tenant, row) for row in reply[1]]

    async def status(self, task_id: str) -> TaskStatus | None:
        """The status of a task, without the rest of its record."""
        return rows.status(await self._raw("HGET", self.keys.task(task_id), "state") or b"")

    async def attempts(self, task_id: str) -> list[tuple[int, Attempt]]:
        """The attempts that did not end the task, by their number, oldest first; the newest attempt is the record itself."""
        return rows.attempts(await self._raw("HGETALL", self.keys.task(task_id)))

    async def array(self, array_id: str) -> ArrayRow | None:
        """An array of tasks."""
        return rows.array(array_id, await self._raw("HMGET", self.keys.array(array_id), *rows.ARRAY_FIELDS))

    async def cancel(self, task_id: str, tenant: str) -> TaskStatus | None:
        """Ask that a task ends; the status after (RUNNING: its agent has been told), None for no such task."""
        reply = await self._run("ry_cancel", task_id, tenant)
        return None if reply is None else TaskStatus(reply.decode())

    async def cancel_array(self, array_id: str, tenant: str, first: int) -> tuple[int | None, int, int] | None:
        """Ask that a part of an array ends, from the index `first` on.

        Returns:
            Where to go on (None: that was all), how many ended at once, how many agents were told; None for no such array.
        """
        reply = await self._run("ry_cancel_array", array_id, tenant, first, IDS_MAX)
        if reply is None:
            return None
        following, ended, told = reply
        return (None if following < 0 else following), ended, told

    async def due_ms(self, task_id: str) -> int | None:
        """When a task that waits for another attempt is queued again."""
        score = await self._raw("ZSCORE", self.keys.due, task_id)
        return None if score is None else int(float(score))

    async def position(self, shape_id: str, score: int) -> int:
        """How many tasks of the shape stand before that score."""
        return int(await self._run("ry_position", shape_id, score))

    async def log(self, task_id: str) -> tuple[bytes, bytes, int]:
        """Stdout, stderr and dropped bytes of the newest attempt that wrote something."""
        kept = await self.kept_log(task_id)
        return kept.stdout, kept.stderr, kept.stdout_dropped + kept.stderr_dropped

    async def kept_log(self, task_id: str) -> KeptLog:
        """The same with what a reader needs who follows it: whose it is, and where in each stream it begins."""
        fields = ("attempt", "stdout", "stderr", "dropped", "err_dropped")
        attempt, out, err, dropped, err_dropped = await self._raw("HMGET", self.keys.task_log(task_id), *fields)
        from_stderr = int(err_dropped or 0)  # an older agent tells only the sum, which is taken for stdout's
        return KeptLog(int(attempt or 0), out or b"", err or b"", int(dropped or 0) - from_stderr, from_stderr)

    async def log_extent(self, task_id: str) -> tuple[int, int, int]:
        """The attempt, and how far each of its streams goes, as `kept_log` would tell: cheap, whatever was written."""
        key = self.keys.task_log(task_id)
        (attempt, dropped, err_dropped), out, err = await asyncio.gather(
            self._raw("HMGET", key, "attempt", "dropped", "err_dropped"),
            self._raw("HSTRLEN", key, "stdout"),
            self._raw("HSTRLEN", key, "stderr"),
        )
        from_stderr = int(err_dropped or 0)
        return int(attempt or 0), int(dropped or 0) - from_stderr + out, from_stderr + err

    async def events(self, after: str, block_ms: int) -> tuple[str, list[TaskEvent]]:
        """Ends of tasks after the stream id `after` (``$``: from now on). Blocks its connection: give it one of its own."""
        reply = await self.connection.call(
            *("XREAD", "COUNT", 500, "BLOCK", block_ms, "STREAMS", self.keys.events, after),
            deadline_s=block_ms / 1000 + 5,
        )
        if not reply:
            return after, []
        entries = reply[0][1]
        return entries[-1][0].decode(), [rows.event(fields) for _, fields in entries]

    async def last_event(self) -> str:
        """The stream id of the newest event: where a reader begins."""
        newest = await self._raw("XREVRANGE", self.keys.events, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"
