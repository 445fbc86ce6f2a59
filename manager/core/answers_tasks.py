"""What the REST API gives of a task beside the task itself: its attempts, and the array that it is one of. See `answers`."""

import msgspec

from manager.core.answers import TaskId, Time, utc, utc_or_none
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.model import ArrayRow, Attempt, TaskRecord

SUCCEEDED = "Succeeded"
CANCELLED = "Cancelled"


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


class ArrayView(msgspec.Struct, frozen=True, kw_only=True):
    """An array of tasks: how many of them have ended how.

    Attributes:
        name: the tenant's own for it; null where it has none.
        index_as: the argument in which each task finds its index; null: it is in none.
        count: how many tasks it has.
        made: how many of these have a record yet; the others follow by themselves.
        unfinished: how many have not ended.
    """

    array_id: str
    tenant: str
    function: str
    name: str | None = None
    index_as: str | None = None
    count: int
    made: int
    succeeded: int
    failed: int
    cancelled: int
    unfinished: int
    created_at: Time


class ArrayCancelled(msgspec.Struct, frozen=True):
    """What the cancellation of an array did.

    Attributes:
        cancelled: tasks that have ended by it at once.
        ending: tasks that run, and are being ended.
    """

    array_id: str
    cancelled: int
    ending: int


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


def array_view(row: ArrayRow) -> ArrayView:
    """The array as it is shown."""
    spec = row.spec
    return ArrayView(
        array_id=row.array_id,
        tenant=row.tenant,
        function=row.function,
        name=spec.name or None if spec is not None else None,
        index_as=spec.index_as or None if spec is not None else None,
        count=row.count,
        made=row.made,
        succeeded=row.succeeded,
        failed=row.failed,
        cancelled=row.cancelled,
        unfinished=row.count - row.succeeded - row.failed - row.cancelled,
        created_at=utc(row.created_ms),
    )
