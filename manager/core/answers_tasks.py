"""What the REST API gives of a task: the task itself, its log and its attempts. See `answers`."""

from typing import Annotated

import msgspec

from manager.core.answers import AnyJson, ResourcesView, TaskId, Time, no_result, resources_view, utc, utc_or_none
from manager.core.lifecycle import FINAL, AfterFailed, TaskStatus
from manager.core.model import Attempt, TaskError, TaskRecord

SUCCEEDED = "Succeeded"
CANCELLED = "Cancelled"


class Accepted(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task, or an array of tasks, that is on disk.

    Attributes:
        task_id: of an array its own id, see GET /v1/arrays/{array_id}.
        status: as it is now; null where it was accepted earlier and is not kept any more.
        count: of an array, how many tasks it has.
        replayed: this was accepted by an earlier request, of which the present one is the same again.
    """

    task_id: TaskId
    status: Annotated[TaskStatus | None, msgspec.Meta(examples=["QUEUED"])]
    count: int = 0
    replayed: bool = False


class BatchAccepted(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tasks that are on disk, in the order of the request.

    Attributes:
        replayed: as of each of its tasks.
    """

    tasks: tuple[Accepted, ...]
    replayed: bool = False


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A task in a list.

    Attributes:
        attempt: how often it was claimed by a slot; 0 before the first time.
        failures: of its function; these count against `max_attempts`.
        crashes: of its executor that it alone can have caused.
        losses: of executor, agent or node, which it is not to blame for.
        node: where it runs or ran last.
        progress: 0 to 1, as it said last; null where it has said nothing, and once it has succeeded.
        array_id, index: the array that it belongs to, and its place there.
    """

    task_id: TaskId
    status: TaskStatus
    tenant: str
    function: str
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    losses: int = 0
    node: str | None = None
    created_at: Time
    queued_at: Time | None = None
    started_at: Time | None = None
    finished_at: Time | None = None
    error: TaskError | None = None
    progress: float | None = None
    array_id: str | None = None
    index: int | None = None


class ResultFileView(msgspec.Struct, frozen=True):
    """A result that lies in a file.

    Attributes:
        sha256: of its bytes, in hex.
    """

    bytes: int
    sha256: str


class TaskView(TaskSummary, frozen=True, kw_only=True):
    """A task.

    Attributes:
        memory_bytes: on each device, as asked for.
        resources: all that was asked for.
        name: the tenant's own for it; null where it has none.
        retry_on: errors that are worth another attempt; empty: all are.
        start_timeout_s, total_timeout_s, deadline_at: as asked for; null where there is no such limit.
        after: what it comes after.
        after_failed: what becomes of it when one of these does not succeed.
        waits: how many of these have not ended.
        progress_message: what it said beside its progress.
        checkpoint: what its attempts have reported last, for the next one; empty once it has succeeded.
        more_memory: it ran out of device memory once, and was given more room than it asked for.
        args: only where ``?args=true`` asks for them.
        result: what the function returned, once it has; null until then, and where it is in a file.
        result_file: of a result that is too large for the record: GET /v1/tasks/{task_id}/result has it.
    """

    memory_bytes: int
    gpus: int
    resources: ResourcesView | None = None
    priority: int
    max_attempts: int
    time_limit_s: float
    name: str | None = None
    retry_on: tuple[str, ...] = ()
    start_timeout_s: float | None = None
    total_timeout_s: float | None = None
    deadline_at: Time | None = None
    after: tuple[str, ...] = ()
    after_failed: AfterFailed = AfterFailed.FAIL
    waits: int = 0
    progress_message: str = ""
    checkpoint: str = ""
    more_memory: bool = False
    cancel_requested: bool = False
    args: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: AnyJson = msgspec.field(default_factory=no_result)
    result_file: ResultFileView | None = None


class TaskPage(msgspec.Struct, frozen=True):
    """Tasks, newest first. A page may be short and not the last: go on while there is a `next_cursor`."""

    tasks: tuple[TaskSummary, ...]
    next_cursor: str | None = None


class TaskLog(msgspec.Struct, frozen=True):
    """What the newest attempt that wrote something has written; with a cursor, what is new since then.

    Attributes:
        dropped_bytes: how much of it was not kept, see the setting ``tasks.log_bytes_max``: it came before what is here.
        attempt: which one wrote it; 0 where none has.
        cursor: where to go on.
        ended: the task has ended, and there is nothing to come.
    """

    task_id: TaskId
    stdout: str
    stderr: str
    dropped_bytes: int = 0
    attempt: int = 0
    cursor: str = ""
    ended: bool = False


class Cancelled(msgspec.Struct, frozen=True):
    """What a cancellation did: a task that runs stays RUNNING until its executor has been ended."""

    task_id: TaskId
    status: TaskStatus
    cancel_requested: bool


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a task.

    Attributes:
        number: from 1; a slot that takes the task begins a new one.
        started_at: when its executor had it; null: it never did.
        ended_at: null while it goes on.
        why: it ended: Succeeded, Cancelled, the type of its error, or what took its slot (NodeLost, Preempted, Returned …);
            empty while it goes on.
        message: of the error, cut.
    """

    number: int
    node: str | None
    slot: str | None = None
    claimed_at: Time | None = None
    started_at: Time | None = None
    ended_at: Time | None = None
    why: str = ""
    message: str = ""


class AttemptList(msgspec.Struct, frozen=True):
    """The attempts at a task, oldest first; of very many the newest."""

    task_id: TaskId
    attempts: tuple[AttemptView, ...]


def summary_of(record: TaskRecord) -> TaskSummary:
    """The record as a list shows it."""
    return TaskSummary(
        task_id=record.task_id,
        status=record.status,
        tenant=record.tenant,
        function=record.function,
        attempt=record.attempt,
        failures=record.failures,
        crashes=record.crashes,
        losses=record.losses,
        node=record.node or None,
        created_at=utc(record.created_ms),
        queued_at=utc_or_none(record.queued_ms),
        started_at=utc_or_none(record.started_ms),
        finished_at=utc_or_none(record.finished_ms),
        error=record.error,
        progress=None if record.status is TaskStatus.SUCCEEDED else record.progress,
        array_id=record.array_id or None,
        index=record.index,
    )


def view_of(record: TaskRecord, *, with_args: bool = False) -> TaskView:
    """The record as one task is shown. It must have its `spec`."""
    spec = record.spec
    assert spec is not None
    succeeded = record.status is TaskStatus.SUCCEEDED  # then a result is what it has to say
    return TaskView(
        **msgspec.structs.asdict(summary_of(record)),
        memory_bytes=spec.resources.memory_bytes,
        gpus=spec.resources.gpus,
        resources=resources_view(spec.resources),
        priority=spec.priority,
        max_attempts=spec.max_attempts,
        time_limit_s=spec.time_limit_s,
        name=None if record.array_id else spec.name or None,  # of an array it is the array's
        retry_on=spec.retry_on,
        start_timeout_s=spec.start_timeout_s or None,
        total_timeout_s=spec.total_timeout_s or None,
        deadline_at=utc(spec.deadline_ms) if spec.deadline_ms else None,
        after=spec.after,
        after_failed=spec.after_failed,
        waits=record.waits if record.status is TaskStatus.BLOCKED else 0,
        progress_message="" if succeeded else record.progress_message,
        checkpoint="" if succeeded else record.checkpoint,
        more_memory=record.more_memory,
        cancel_requested=record.cancel_requested,
        args=spec.args if with_args else msgspec.UNSET,
        result=msgspec.Raw(b"null" if record.result is None else record.result),
        result_file=None if record.result_file is None else ResultFileView(record.result_file.bytes, record.result_file.sha256),
    )


def attempts_of(record: TaskRecord, earlier: list[tuple[int, Attempt]]) -> AttemptList:
    """All attempts: those that did not end the task, and the newest where it goes on or has ended it."""
    found = [_earlier(number, attempt) for number, attempt in earlier]
    if record.attempt and (not found or found[-1].number < record.attempt):
        found.append(_newest(record))
    return AttemptList(record.task_id, tuple(found))


def _earlier(number: int, attempt: Attempt) -> AttemptView:
    return AttemptView(
        number=number,
        node=attempt.node or None,
        slot=attempt.slot or None,
        claimed_at=utc_or_none(attempt.claimed_ms or None),
        started_at=utc_or_none(attempt.started_ms or None),
        ended_at=utc_or_none(attempt.ended_ms or None),
        why=attempt.why,
        message=attempt.message,
    )


def _newest(record: TaskRecord) -> AttemptView:
    match record.status:
        case TaskStatus.SUCCEEDED:
            why = SUCCEEDED
        case TaskStatus.CANCELLED:
            why = CANCELLED
        case _:
            why = record.error.type if record.status in FINAL and record.error is not None else ""
    return AttemptView(
        number=record.attempt,
        node=record.node or None,
        slot=record.slot or None,
        claimed_at=utc_or_none(record.claimed_ms),
        started_at=utc_or_none(record.started_ms),
        ended_at=utc_or_none(record.finished_ms),
        why=why,
        message=record.error.message if why and record.error is not None else "",
    )
