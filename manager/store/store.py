"""The store's face: one typed method per function of the library, and the few plain records beside it.

Every function is idempotent, so a call whose answer was lost is sent once more before the caller hears of it, in what is
left of its deadline: no call takes longer than the connection's deadline, however often it is sent.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from manager.core.errors import (
    IdempotencyConflict,
    NameTaken,
    QuotaExceeded,
    RegistrationRefused,
    StoreFull,
    StoreNew,
    StoreReplaced,
    StoreTooNew,
    StoreUnavailable,
    UnknownDependency,
)
from manager.core.keys import Keys
from manager.core.lifecycle import AfterFailed, Cordon, SlotFlag, TaskStatus
from manager.core.mix import Mix, encode_mix
from manager.core.model import (
    ArrayRow,
    Attempt,
    BeatReply,
    ClusterState,
    DeviceUse,
    End,
    IdempotencyKey,
    MemoryNote,
    NextReply,
    NodeInfo,
    OpenReply,
    ProgressNote,
    Submission,
    SubmitReply,
    TaskEvent,
    TaskRecord,
    TenantRow,
    priority_offset,
)
from manager.core.shapes import Grant, Shape, encode_shape
from manager.durability import SECTIONS, SETTINGS, Durability, durability_of, fsync_of, info_lines
from manager.metrics import STORE_ERRORS, STORE_RECONNECTS
from manager.store import rows, schema
from manager.store.connection import StoreConnection, StoreReplyError
from manager.store.schema import Membership

IDS_MAX: Final = 500
"""Ids in one call: a function holds up everybody else for as long as it runs."""

SECONDS_MAX: Final = 10 * 366 * 86_400.0

_encode_spec = msgspec.json.Encoder().encode
_encode_uses = msgspec.json.Encoder().encode


def _milliseconds(seconds: float) -> float:
    """`seconds` in bounds: durations come from executors, which run user code and may say anything."""
    return min(seconds, SECONDS_MAX) * 1000 if seconds > 0 else 0.0  # not so for NaN


class DueReply(msgspec.Struct, frozen=True):
    """What time has brought: retries that went back to their queues, tasks whose time was up, tasks that were told of the end
    of one that they come after, and tasks of arrays that were given their records.
    """

    retried: int
    expired: int
    told: int
    made: int


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


class Retention(msgspec.Struct, frozen=True):
    """Which finished tasks of a tenant are forgotten: those that ended before, and those above so many."""

    ended_before_ms: int
    kept: int


class Swept(msgspec.Struct, frozen=True):
    """What was forgotten: how many tasks, how many slots; and where results lay that no record names any more."""

    tasks: int
    slots: int
    files: tuple[str, ...] = ()


class Kept(msgspec.Struct, frozen=True):
    """What a task's record says of files that may belong to it; status None: there is no such task."""

    status: TaskStatus | None
    attempt: int = 0
    file: str = ""


class _More(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the store itself reads of a task, beside what each has."""

    name: str | None = None
    digest: str | None = None
    start_ms: int | None = None
    total_ms: int | None = None
    deadline_ms: int | None = None
    after: tuple[str, ...] | None = None
    run: bool | None = None
    count: int | None = None


_NO_MORE: Final = _More()


def _more(submission: Submission) -> bytes:
    spec = submission.spec
    more = _More(
        name=spec.name or None,
        digest=submission.digest if spec.name else None,
        start_ms=int(_milliseconds(spec.start_timeout_s)) or None,
        total_ms=int(_milliseconds(spec.total_timeout_s)) or None,
        deadline_ms=spec.deadline_ms or None,
        after=spec.after or None,
        run=spec.after_failed is AfterFailed.RUN or None,
        count=spec.count or None,
    )
    return b"" if more == _NO_MORE else _encode_spec(more)


def _end_more(end: End) -> bytes:
    """Of a success the file of its result, of one that ran out of device memory the shape with more room."""
    if end.file is not None:
        return _encode_spec(end.file)
    return b"" if end.room is None else _encode_spec((end.room[0], encode_shape(end.room[1]).decode()))


def _status(text: bytes) -> TaskStatus | None:
    return TaskStatus(text.decode()) if text else None


def _name_taken(name: str) -> NameTaken:
    return NameTaken(
        f"name: {name!r} is the name of another task, which asks for something else, or was not asked for with all of these. "
        "Choose another one.",
        name=name,
    )


def _unknown_dependency(task_id: str) -> UnknownDependency:
    return UnknownDependency(
        f"after: there is no task or array {task_id!r} (any more): name ones that are kept, or that stand before it in the "
        "batch.",
        task_id=task_id,
    )


class Store:
    """Typed calls over one connection.

    Args:
        connection: shared by the whole process.
        keys: names of keys; tests use a prefix of their own.
    """

    def __init__(self, connection: StoreConnection, keys: Keys | None = None) -> None:
        self.connection = connection
        self.keys = keys or Keys()
        self._deploying: asyncio.Task[None] | None = None

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

    # --- deployment ---------------------------------------------------------------------------------------------

    async def deploy(self) -> None:
        """Load the library if the server has neither this one nor a newer one; first it must be the right store."""
        if self._deploying is None or self._deploying.done():
            gate = self.connection.gate
            action = partial(schema.deploy, keys=self.keys) if gate is None else gate.admit
            self._deploying = asyncio.create_task(self.connection.apart(action))
        await asyncio.shield(self._deploying)  # it serves all who wait: a caller's cancellation does not end it

    async def identify(self, cluster_id: str) -> str:
        """The identity of the state in this store; `cluster_id` becomes it where there is none."""
        return await schema.identify(self._raw, self.keys, cluster_id)

    async def identity(self) -> str:
        """The identity of the state in this store, empty where there is none."""
        return (await schema.read_facts(self._raw, self.keys)).cluster

    async def migrate(self) -> int:
        """Bring older data to the schema of this code; in how many steps."""
        return await schema.migrate(self._raw, self.keys)

    async def ping(self) -> None:
        """Raises StoreUnavailable where the store does not answer."""
        await self.connection.call("PING")

    # --- tasks --------------------------------------------------------------------------------------------------

    async def submit(
        self, tenant: str, active_max: int, submissions: Sequence[Submission], key: IdempotencyKey | None = None
    ) -> SubmitReply:
        """Accept tasks and arrays, all or none; on return they are on disk. An array may have tasks to come (see `expand`).

        Args:
            key: the same key with the same digest, within a day, is the same submission: nothing new is accepted then.

        Raises:
            QuotaExceeded: `tenant` would have more than `active_max` tasks that are not final.
            IdempotencyConflict, NameTaken: the key, or a name, was used for something else.
            UnknownDependency: a task is to come after one that the tenant does not have.
            StoreUnavailable, StoreFull: nothing is known of the call, or it was refused.
        """
        assert 0 < len(submissions) <= IDS_MAX
        assert len({s.task_id for s in submissions}) == len(submissions)
        shapes = {s.shape_id: s.shape for s in submissions}
        args: list[Any] = [tenant, active_max, *(("", "") if key is None else (key.key, key.digest)), len(shapes)]
        for shape_id, shape in shapes.items():
            args += (shape_id, encode_shape(shape))
        for s in submissions:
            spec = s.spec
            offset = priority_offset(spec.priority)
            args += (s.task_id, s.shape_id, offset, spec.max_attempts, spec.function, _encode_spec(spec), _more(s))
        word, *said = await self._run("ry_submit", *args)
        match word:
            case b"OK":
                return SubmitReply(tuple((s.task_id, _status(status)) for s, status in zip(submissions, said, strict=True)))
            case b"REPLAY":
                known = tuple((said[i].decode(), _status(said[i + 1])) for i in range(0, len(said), 2))
                # The first send of this very call, of which the answer was lost, is no earlier submission.
                return SubmitReply(known, [task_id for task_id, _ in known] != [s.task_id for s in submissions])
            case b"CONFLICT":
                raise IdempotencyConflict if said[0] == b"key" else _name_taken(said[1].decode())
            case b"PARENT":
                raise _unknown_dependency(said[0].decode())
            case b"QUOTA":
                count = sum(max(1, s.spec.count) for s in submissions)
                raise QuotaExceeded(
                    f"the tenant has {said[0]} unfinished tasks; with {count} more it would pass its limit of "
                    f"{active_max} (tenant.active_tasks_max)",
                    active_tasks=said[0],
                    active_tasks_max=active_max,
                )
            case _:
                raise ValueError(f"a task with the id of one of these exists, and is not of {tenant}")

    async def expand(self) -> int:
        """Give tasks of arrays that were accepted their records, a bounded number; how many arrays have more to come."""
        return int(await self._run("ry_expand", IDS_MAX))

    async def array(self, array_id: str) -> ArrayRow | None:
        """An array of tasks."""
        return rows.array(array_id, await self._raw("HMGET", self.keys.array(array_id), *rows.ARRAY_FIELDS))

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

    async def attempts(self, task_id: str) -> list[tuple[int, Attempt]]:
        """The attempts that did not end the task, by their number, oldest first; the newest attempt is the record itself."""
        return rows.attempts(await self._raw("HGETALL", self.keys.task(task_id)))

    async def task_named(self, tenant: str, name: str) -> str | None:
        """The id of the task or the array that the tenant calls so."""
        said = await self._raw("HGET", self.keys.names(tenant), name)
        return said.decode().partition(" ")[0] if said else None

    async def task(self, task_id: str) -> TaskRecord | None:
        """The record of a task."""
        record = rows.task(task_id, await self._raw("HMGET", self.keys.task(task_id), *rows.TASK_FIELDS))
        if record is None or not record.array_id:
            return record
        # What was submitted is kept once for all tasks of an array, and for as long as one of them is kept.
        array = await self.array(record.array_id)
        return record if array is None else msgspec.structs.replace(record, spec=array.spec)

    async def tasks(
        self, tenant: str, before: int | None, limit: int, status: TaskStatus | None, function: str
    ) -> tuple[int | None, list[TaskRecord]]:
        """Tasks of a tenant, newest first, and where to go on (None at the end). A page may be short of `limit`."""
        reply = await self._run("ry_list", tenant, "" if before is None else before, limit, status or "", function)
        return (int(reply[0]) if reply[0] else None), [rows.listed(tenant, row) for row in reply[1]]

    async def cancel(self, task_id: str, tenant: str) -> TaskStatus | None:
        """Ask that a task ends; the status after (RUNNING: its agent has been told), None for no such task."""
        reply = await self._run("ry_cancel", task_id, tenant)
        return None if reply is None else TaskStatus(reply.decode())

    async def status(self, task_id: str) -> TaskStatus | None:
        """The status of a task, without the rest of its record."""
        return _status(await self._raw("HGET", self.keys.task(task_id), "state") or b"")

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

    async def keep_log(
        self, task_id: str, attempt: int, stdout: bytes, stderr: bytes, stdout_dropped: int, stderr_dropped: int = 0
    ) -> None:
        """Keep what an attempt has written so far. A full store keeps no logs: ends must pass, and they come behind."""
        with contextlib.suppress(StoreFull):
            await self._run("ry_log", task_id, attempt, stdout, stderr, stdout_dropped + stderr_dropped, stderr_dropped)

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

    # --- slots, for agents --------------------------------------------------------------------------------------

    async def open_slot(self, slot_id: str, incarnation: str, grant: Grant) -> OpenReply:
        """Open a slot on the node of its grant; asking the same incarnation again is adoption."""
        return rows.opened(await self._run("ry_open", slot_id, grant.node, incarnation, *rows.grant_fields(grant)))

    async def open_direct(self, slot_id: str, incarnation: str, grant: Grant) -> str:
        """Note a slot that runs a Dask task of somebody's: OK, ADOPTED, FENCED, REFUSED (a known id) or CORDONED."""
        reply = await self._run("ry_open_direct", slot_id, grant.node, incarnation, *rows.grant_fields(grant))
        return str(reply.decode())

    async def note_memory(self, incarnation: str, notes: Iterable[MemoryNote]) -> None:
        """What slots of this incarnation were seen to use. Where more is learned, slots that lease less take no more tasks."""
        args: list[Any] = []
        for note in notes:
            args += (note.slot_id, note.peak_bytes, note.learned_bytes)
        if args:
            await self._run("ry_memory", incarnation, *args)

    async def next(self, slot_id: str, incarnation: str, n: int, ends: Iterable[End]) -> NextReply:
        """Commit `ends`, then claim up to `n` tasks (0: only commit)."""
        args: list[Any] = [slot_id, incarnation, n]
        for end in ends:
            args += (
                *(end.task_id, end.attempt, end.outcome.value, end.payload),
                "" if end.age_s is None else int(_milliseconds(end.age_s)),
                "" if end.duration_s is None else f"{_milliseconds(end.duration_s):.3f}",
                f"{end.chance:.6f}",
                _end_more(end),
            )
        word, commits, flat = await self._run("ry_next", *args)
        return NextReply(word.decode(), tuple(map(_status, commits)), rows.claims(flat))

    async def progress(self, slot_id: str, incarnation: str, notes: Iterable[ProgressNote]) -> int:
        """What running attempts have reported; how many of them are still the newest, on this slot."""
        args: list[Any] = []
        for note in notes:
            args += (
                *(note.task_id, note.attempt, "" if note.progress is None else f"{note.progress:.6g}"),
                "" if note.message is None else note.message or " ",
                note.checkpoint or "",
            )
        return int(await self._run("ry_progress", slot_id, incarnation, *args)) if args else 0

    async def started(self, slot_id: str, incarnation: str, tasks: Iterable[tuple[str, int, float]]) -> None:
        """Executors have taken these (task, attempt, seconds ago)."""
        args: list[Any] = []
        for task_id, attempt, age_s in tasks:
            args += (task_id, attempt, int(_milliseconds(age_s)))
        await self._run("ry_started", slot_id, incarnation, *args)

    async def close_slot(self, slot_id: str, incarnation: str, reason: str) -> None:
        """End a slot; what it still had claimed goes back."""
        await self._run("ry_close", slot_id, incarnation, reason)

    async def register(self, node: str, incarnation: str, info: NodeInfo) -> bool:
        """Register an agent; all that earlier incarnations of the node held ends. False: this incarnation is fenced.

        Raises:
            RegistrationRefused: its inventory cannot be right, or another living node has one of its devices.
        """
        args: list[Any] = [info.machine or info.hostname]
        for device in info.devices:
            args += (device.uuid, device.memory_bytes)
        reply = await self._run("ry_register", node, incarnation, msgspec.json.encode(info), *args)
        if reply[0] == b"REFUSED":
            raise RegistrationRefused(f"node {node} is refused: {reply[1].decode()}")
        return bool(reply[0] == b"OK")

    async def beat(self, node: str, incarnation: str, slots: Iterable[tuple[str, bool]]) -> BeatReply:
        """One heartbeat of an agent with its slots (id, idle)."""
        args: list[Any] = []
        for slot_id, idle in slots:
            args += (slot_id, "i" if idle else "b")
        reply = [part.decode() for part in await self._run("ry_beat", node, incarnation, *args)]
        words = [(reply[i], reply[i + 1]) for i in range(1, len(reply), 2)]
        return BeatReply(
            reply[0] == "OK", ("", "cordoned") in words, ("", "leave") in words, tuple(word for word in words if word[0])
        )

    async def cancels(self, slot_id: str) -> set[str]:
        """Tasks of the slot whose cancellation was asked."""
        return {task_id.decode() for task_id in await self._run("ry_cancels", slot_id)}

    async def leave(self, node: str, incarnation: str) -> None:
        """An agent stops cleanly: its slots end, their tasks go back."""
        await self._run("ry_leave", node, incarnation)

    # --- nodes and slots, for operators and the autoscaler --------------------------------------------------------

    async def cordon(
        self,
        node: str,
        mode: Cordon,
        by: str,
        deadline_s: float | None = None,
        *,
        remove: bool = False,
        token: int = 0,
        incarnation: str = "",
    ) -> str:
        """Say what a node may still take on.

        Args:
            mode: NONE lifts it.
            by: ``operator``, ``autoscaler``, which must lead with `token`, or ``agent``, the node's own of that `incarnation`.
            deadline_s: a drain gives running tasks back after this; None: it waits for them.
            remove: once it is empty the agent ends for good.

        Returns:
            OK, NONE (no such node), STALE (token or incarnation), KEPT (somebody else has cordoned it, and only an operator
            may change that).
        """
        deadline = "" if deadline_s is None else deadline_s
        proof = incarnation or token or ""
        reply = await self._run("ry_cordon", node, mode.value, by, deadline, "1" if remove else "", proof)
        return str(reply.decode())

    async def warm(self, shape_id: str, shape: Shape, slots: int, seconds: float) -> None:
        """Have so many slots of the shape open for so long, although nothing waits; 0: no more than work asks for."""
        await self._run("ry_warm", shape_id, encode_shape(shape), slots, seconds)

    async def unload(self, shape_ids: Sequence[str]) -> None:
        """Have the idle slots of these shapes closed, and none kept warm."""
        await self._run("ry_unload", *shape_ids)

    async def write_journal(self, token: int, decision: bytes, kept: int) -> bool:
        """Append to the autoscaler's journal, which holds about `kept`. False: the token is stale."""
        return bool(await self._run("ry_journal", token, decision, kept) != b"STALE")

    async def journal(self, limit: int, before: str = "+") -> list[tuple[str, bytes]]:
        """Decisions of the autoscaler (id, JSON), newest first, from before the stream id `before`."""
        top = before if before == "+" else f"({before}"
        rows = await self._raw("XREVRANGE", self.keys.journal, top, "-", "COUNT", limit)
        return [(entry_id.decode(), fields[1]) for entry_id, fields in rows]

    # --- for the leader -----------------------------------------------------------------------------------------

    async def lead(self, holder: str, token: int, beat: int, step: str, role: str = "") -> tuple[bool, int, int, str]:
        """One step of leadership: ``read take renew resign``. Returns (done, token, beat, holder).

        `role`: empty for controllers; others, such as ``autoscaler``, have a leader of their own.
        """
        word, now_token, now_beat, now_holder = await self._run("ry_lead", holder, token, beat, step, role)
        return word == b"OK", int(now_token), int(now_beat), now_holder.decode()

    async def look(self, *, leader: bool) -> ClusterState:
        """One consistent look. The leader's look also takes note of what had asked for it."""
        return rows.state(await self._run("ry_state", "1" if leader else "0"))

    async def request_slot(self, token: int, slot_id: str, shape_id: str, served_max: int) -> bool:
        """The leader asks for a slot. False: the token is stale."""
        return bool(await self._run("ry_request", token, slot_id, shape_id, served_max) != b"STALE")

    async def fence(self, token: int, reason: str, slots: Sequence[str]) -> bool:
        """The leader ends slots, opened or not. False: the token is stale."""
        return bool(await self._run("ry_fence", token, reason, *slots) != b"STALE")

    async def drop(self, token: int, reason: str, slots: Sequence[str]) -> list[str] | None:
        """The leader takes back slots that nobody has opened; those that it could, None: the token is stale."""
        reply = await self._run("ry_drop", token, reason, *slots)
        return [slot.decode() for slot in reply[1]] if reply[0] == b"OK" else None

    async def flag(self, token: int, flag: SlotFlag, slots: Sequence[str]) -> bool:
        """The leader asks open slots to end at their next task boundary, or now. False: the token is stale."""
        return bool(await self._run("ry_flag", token, flag.value, *slots) != b"STALE")

    async def lost(self, token: int, node: str, incarnation: str) -> tuple[bool, list[str]]:
        """The leader declares an incarnation dead. Returns (done, slots ended)."""
        reply = await self._run("ry_lost", token, node, incarnation)
        return reply[0] == b"OK", [slot.decode() for slot in reply[1]] if len(reply) > 1 else []

    async def planned(self, token: int, held: int, wake_at: Iterable[tuple[str, int]]) -> bool:
        """What the leader has planned: how many slots are held, and at which depth a shape asks for another round."""
        args = [value for pair in wake_at for value in pair]
        return bool(await self._run("ry_planned", token, held, *args) != b"STALE")

    async def put_mix(self, token: int, mix: Mix) -> bool:
        """The mix of requests that the scheduler has learned. False: the token is stale."""
        return bool(await self._run("ry_mix", token, encode_mix(mix)) != b"STALE")

    async def share(self, token: int, tenants: Sequence[TenantRow], vtimes: Iterable[tuple[str, float]]) -> bool:
        """What tenants may have at work and what they have had, and the same of shapes. False: the token is stale."""
        args: list[Any] = [len(tenants)]
        for row in tenants:
            args += (row.tenant, row.running_max or 0, row.gpus_max or 0, row.memory_bytes_max or 0, row.weight)
            args += (f"{row.vtime_s or 0.0:.3f}", row.retries_per_minute_max or 0)
        for shape_id, vtime_s in vtimes:
            args += (shape_id, f"{vtime_s:.3f}")
        return bool(await self._run("ry_shares", token, *args) != b"STALE")

    async def age(self, token: int, seconds: float, shape_ids: Sequence[str]) -> int | None:
        """Tasks that have waited for so long rise by one priority; how many have, None: the token is stale."""
        risen = int(await self._run("ry_age", token, int(_milliseconds(seconds)), IDS_MAX, *shape_ids))
        return None if risen < 0 else risen

    async def reached(self, token: int, *, dask: bool) -> bool:
        """Whether the leader reaches the Dask scheduler, for people to see. False: the token is stale."""
        return bool(await self._run("ry_reached", token, "ok" if dask else "down") != b"STALE")

    async def due(self) -> tuple[DueReply, float | None]:
        """Do what time brings, a bounded part of it; what was done, and seconds until there is more (None: nothing waits)."""
        *counts, following_ms = await self._run("ry_due", IDS_MAX)
        return DueReply(*counts), None if following_ms < 0 else following_ms / 1000

    async def refuse(self, token: int, shape_id: str) -> int | None:
        """Fail what waits in a shape that nothing can ever hold, and is there since a smaller one ran out of device memory.

        Returns:
            How many tasks, at most `IDS_MAX`; None: the token is stale.
        """
        failed = int(await self._run("ry_refuse", token, shape_id, IDS_MAX))
        return None if failed < 0 else failed

    async def sweep(
        self,
        token: int,
        ended_before_ms: int,
        kept: int,
        closed_before_ms: int,
        tenants: Mapping[str, Retention] | None = None,
    ) -> Swept:
        """Forget old tasks and tombstones, a bounded number.

        Args:
            ended_before_ms, kept: of each tenant that `tenants` does not name.
        """
        args: list[Any] = [ended_before_ms, kept]
        for tenant, own in (tenants or {}).items():
            args += (tenant, own.ended_before_ms, own.kept)
        tasks, slots, files, *_ = await self._run("ry_sweep", token, closed_before_ms, IDS_MAX, *args)
        return Swept(tasks, slots, tuple(name.decode() for name in files))

    async def kept(self, token: int, task_ids: Sequence[str]) -> list[Kept] | None:
        """What the records say of files of these tasks, in their order; None: the token is stale, so nothing may be removed."""
        assert len(task_ids) <= IDS_MAX
        word, *said = await self._run("ry_kept", token, *task_ids)
        if word != b"OK":
            return None
        return [Kept(_status(said[i]), int(said[i + 1] or 0), said[i + 2].decode()) for i in range(0, len(said), 3)]

    # --- plain records ------------------------------------------------------------------------------------------

    async def counts(self) -> dict[str, int]:
        """Tasks by status."""
        flat = await self._raw("HGETALL", self.keys.counts)
        return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}

    async def publish_function(self, name: str, blob: bytes) -> None:
        """Publish a function's schema and defaults."""
        await self._raw("SET", self.keys.function(name), blob)
        await self._raw("SADD", self.keys.functions, name)

    async def forget_functions(self) -> None:
        """Forget what is published; agents publish again when they start."""
        await self._raw("DEL", self.keys.functions)

    async def functions(self) -> dict[str, bytes]:
        """All published functions."""
        names = sorted(name.decode() for name in await self._raw("SMEMBERS", self.keys.functions))
        if not names:
            return {}
        blobs = await self._raw("MGET", *(self.keys.function(name) for name in names))
        return {name: blob for name, blob in zip(names, blobs, strict=True) if blob}

    async def put_api_key(self, key_id: str, blob: bytes) -> None:
        """Keep an API key's record (never its secret)."""
        await self._raw("HSET", self.keys.api_key(key_id), "record", blob)
        await self._raw("SADD", self.keys.api_keys, key_id)

    async def api_key(self, key_id: str) -> bytes | None:
        """An API key's record."""
        blob: bytes | None = await self._raw("HGET", self.keys.api_key(key_id), "record")
        return blob

    async def api_keys(self) -> dict[str, bytes]:
        """All API keys' records by id."""
        ids = sorted(key_id.decode() for key_id in await self._raw("SMEMBERS", self.keys.api_keys))
        found = {key_id: await self.api_key(key_id) for key_id in ids}
        return {key_id: blob for key_id, blob in found.items() if blob is not None}

    async def put_service(self, name: str, blob: bytes) -> None:
        """Say where a process is and where its metrics are."""
        await self._raw("HSET", self.keys.services, name, blob)

    async def services(self) -> dict[str, bytes]:
        """Every process that said where it is."""
        flat = await self._raw("HGETALL", self.keys.services)
        return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}

    async def put_heartbeat(self, node: str, address: str, uses: Sequence[DeviceUse]) -> None:
        """A Dask worker's heartbeat: the one key that it may write."""
        seen = time.time_ns() // 1_000_000  # for people only: its rights do not reach to the store's clock
        await self._raw("HSET", self.keys.heartbeat(node), "address", address, "uses", _encode_uses(uses), "seen", seen)

    async def fsync_policy(self) -> str:
        """What the server says of its durability: ``always``, ``everysec``, ``no``, ``off`` or ``unknown``."""
        return fsync_of(await self._settings())

    async def durability(self) -> Durability:
        """Whether the server keeps what it accepts, by its settings and by how it fares."""
        info = await self._raw("INFO", *SECTIONS)
        return durability_of(await self._settings(), info_lines(info.decode()))

    async def server(self) -> str:
        """Program and version of the server."""
        info = info_lines((await self._raw("INFO", "server")).decode())
        name, version = ("valkey", info["valkey_version"]) if "valkey_version" in info else ("redis", info["redis_version"])
        return f"{name} {version}"

    async def restored(self, restoration: str) -> int:
        """The data are a backup's: see that nobody from before can write. How many slots were closed. May be called again."""
        before = int(await self._raw("SCARD", self.keys.slots))
        while True:
            left = int(await self._run("ry_restored", restoration, IDS_MAX))
            if not left:
                break
        await self._raw("DEL", self.keys.services)  # where processes were that are gone
        return before

    async def _settings(self) -> dict[str, str] | None:
        """Settings of the server; None where they may not be read."""
        try:
            flat = await self._raw("CONFIG", "GET", *SETTINGS)
        except StoreReplyError:
            return None
        return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}


def connect(
    url: str,
    deadline_s: float,
    name: str,
    keys: Keys | None = None,
    on_reconnect: Callable[[], None] | None = None,
    membership: Membership | None = None,
) -> Store:
    """A store over a connection of its own, made at the first call; connections after the first are counted. `membership` says
    whether it is the right store: each process of a cluster has one.
    """

    def reconnected() -> None:
        STORE_RECONNECTS.inc()
        if on_reconnect is not None:
            on_reconnect()

    return Store(StoreConnection(url, deadline_s, name, reconnected, membership), keys)
