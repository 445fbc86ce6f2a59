"""Why a task is where it is: a reason, a sentence, what would change it, and a verdict for every node. Pure.

The same look gives the same answer. Why one waits is `manager.core.waiting`'s; what nodes say is `manager.core.verdicts`'s.
"""

from collections.abc import Sequence
from typing import Final, assert_never

import msgspec

from manager.core.ahead import Ahead, Setup, ahead_for, is_serving
from manager.core.lifecycle import ACTIVE, AfterFailed, SlotStatus, TaskStatus
from manager.core.model import ClusterState, QueueRow, TaskRecord
from manager.core.needs import priority_rank
from manager.core.quantities import format_duration
from manager.core.shapes import shape_of
from manager.core.verdicts import VerdictClass, WorkerVerdict, classes_of, verdicts_of
from manager.core.waiting import Answer, Place, Unblock, Why, answer_of

NODES_SHOWN_MAX: Final = 200
"""Verdicts in one explanation: those of the nearest misses; a person reads no more. Groups of them count all."""
PARENTS_NAMED_MAX: Final = 5
"""Tasks that are named in one sentence; `unblocks` has all of them."""
RETRY_PAUSE_S_MAX: Final = 300
"""The longest pause of a task by itself, as manager/store/lua/1_tasks.lua has it."""


class Parent(msgspec.Struct, frozen=True):
    """What a task comes after and that has not ended.

    Attributes:
        task_id: or an array's id.
        standing: where it stands, in a word or two.
    """

    task_id: str
    standing: str


class Pending(msgspec.Struct, frozen=True):
    """What a task that is not queued waits for, as the store has it.

    Attributes:
        parents: what it comes after and that has not ended; of a task that is BLOCKED.
        due_ms: when it is queued again; of a task that waits for another attempt.
    """

    parents: tuple[Parent, ...] = ()
    due_ms: int | None = None


NOTHING_PENDING: Final = Pending()


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a task is where it is.

    Attributes:
        reason: the kind of answer.
        message: the answer in a sentence or two.
        memory_bytes: what its slot leases on each device: what was asked for, rounded up, or what was learned.
        learned_bytes: what tasks of its shape were seen to need, where that is more than was asked for; else 0.
        position: how many tasks of its shape stand before it; null where it does not wait in a queue.
        before: how many tasks of all shapes are served before it: those of its shape, and others of a higher priority.
        beside: how many tasks of other shapes have its priority: they and it take turns by fair share.
        slots_open, slots_opening: slots that serve its shape, and those that were asked for.
        wait_s: how long it has waited since it was last queued; null where it does not wait.
        left_s: in how many seconds it fails because its time is up, unless it starts or ends before; null: it has no limit.
        start_s: in how many seconds it may start; null where too little is known to say.
        start_by: what `start_s` was made of; empty where there is none.
        nearest: the node that lacks least memory; null where memory is not the matter.
        unblocks: what would let it run, the most likely first.
        groups: nodes that say the same, those that lack least first.
        workers: a verdict for each node (the nearest 200) while it waits, in the same order.
    """

    task_id: str
    status: TaskStatus
    reason: Why
    message: str
    memory_bytes: int
    gpus: int
    learned_bytes: int = 0
    position: int | None = None
    before: int | None = None
    beside: int | None = None
    slots_open: int = 0
    slots_opening: int = 0
    wait_s: float | None = None
    left_s: float | None = None
    start_s: float | None = None
    start_by: str = ""
    nearest: WorkerVerdict | None = None
    unblocks: tuple[Unblock, ...] = ()
    groups: tuple[VerdictClass, ...] = ()
    workers: tuple[WorkerVerdict, ...] = ()


def explain(
    record: TaskRecord,
    ahead: Ahead,
    setup: Setup,
    place: Place | None,
    now_ms: int,
    silent: frozenset[str] = frozenset(),
    pending: Pending = NOTHING_PENDING,
    *,
    leads: bool = True,
) -> Explanation:
    """Why the task is where it is.

    Args:
        record: the task; with its `spec`.
        ahead: one look at the cluster and what follows from it; not changed.
        setup: what decides besides it.
        place: where it stands, if it is queued.
        now_ms: the store's time.
        silent: nodes that have not beaten for a lease, as the observer's own clock has it.
        pending: what it waits for, if that is no queue.
        leads: whether a controller leads.
    """
    state = ahead.state
    queue = _queue_of(record, state)
    ahead = ahead_for(ahead, queue.shape_id)
    resources = queue.resources
    slots = [slot for slot in state.slots if slot.shape_id == queue.shape_id]
    serving = [slot for slot in slots if is_serving(slot)]
    waits = record.status in {TaskStatus.QUEUED, TaskStatus.RETRY_WAIT, TaskStatus.BLOCKED}
    rows = {row.node: row for row in state.nodes}
    verdicts = verdicts_of(resources, ahead.index, rows, now_ms, silent) if waits else ()
    match record.status:
        case TaskStatus.SUCCEEDED | TaskStatus.FAILED | TaskStatus.CANCELLED:
            answer = Answer(Why.FINISHED, _finished(record))
        case TaskStatus.RUNNING:
            answer = Answer(*_running(record, now_ms, silent))
        case TaskStatus.RETRY_WAIT:
            answer = _retry(record, pending.due_ms, now_ms)
        case TaskStatus.BLOCKED:
            answer = _blocked(record, pending.parents)
        case TaskStatus.QUEUED:
            rank = priority_rank(msgspec.structs.replace(queue, head=record.score))
            answer = answer_of(queue, rank, place or Place(0), ahead, setup, verdicts, silent, leads=leads)
        case _:
            assert_never(record.status)
    left_s, limits = _time_left(record, now_ms)
    waited = record.queued_ms if record.queued_ms is not None else record.created_ms
    is_queued = record.status is TaskStatus.QUEUED and place is not None
    return Explanation(
        task_id=record.task_id,
        status=record.status,
        reason=answer.reason,
        message=answer.message + limits,
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        learned_bytes=queue.learned_bytes if queue.learned_bytes > queue.shape.memory_bytes else 0,
        position=place.own if is_queued and place is not None else None,
        before=place.own + place.higher if is_queued and place is not None else None,
        beside=_beside(record, queue, state) if is_queued else None,
        slots_open=len(serving),
        slots_opening=sum(slot.status is SlotStatus.REQUESTED for slot in slots),
        wait_s=max(0, now_ms - waited) / 1000 if waits else None,
        left_s=left_s,
        start_s=answer.start_s,
        start_by=answer.start_by,
        nearest=next((found for found in verdicts if found.short_by_bytes > 0), None),
        unblocks=answer.unblocks,
        groups=classes_of(verdicts),
        workers=verdicts[:NODES_SHOWN_MAX],
    )


def _queue_of(record: TaskRecord, state: ClusterState) -> QueueRow:
    """The task's shape as the look has it; one made from the record where it has it not (any more)."""
    for queue in state.queues:
        if queue.shape_id == record.shape_id:
            return queue
    assert record.spec is not None
    return QueueRow(shape_id=record.shape_id, shape=shape_of(record.tenant, "", record.spec.resources), depth=0)


def _beside(record: TaskRecord, own: QueueRow, state: ClusterState) -> int:
    """Tasks of other shapes whose first has the same priority."""
    rank = priority_rank(msgspec.structs.replace(own, head=record.score))
    return sum(q.depth for q in state.queues if q.shape_id != own.shape_id and q.depth and priority_rank(q) == rank)


def _finished(record: TaskRecord) -> str:
    where = f" on {record.node}" if record.node else ""
    match record.status:
        case TaskStatus.SUCCEEDED:
            return f"It succeeded{where} in attempt {record.attempt}."
        case TaskStatus.CANCELLED:
            return f"It was cancelled{where if record.started_ms is not None else ' before it ran'}."
        case _:
            why = f": {_error(record)}" if record.error is not None else ""
            return f"It failed{where} in attempt {record.attempt}{why}"


def _running(record: TaskRecord, now_ms: int, silent: frozenset[str]) -> tuple[Why, str]:
    if record.node in silent:
        return Why.NODE_UNREACHABLE, (
            f"It was running on {record.node}, whose agent is silent. If that lasts, the node is declared lost "
            "and the task is queued again; nobody is blamed."
        )
    if record.cancel_requested:
        return Why.CANCELLING, f"Its cancellation was asked; {record.node} is ending it."
    if record.started_ms is None:
        return (
            Why.RUNNING,
            f"A slot on {record.node} has taken it (attempt {record.attempt}); it starts with its turn there.",
        )
    for_s = format_duration(max(0, now_ms - record.started_ms) / 1000)
    return Why.RUNNING, f"It has been running on {record.node} for {for_s} (attempt {record.attempt})."


def _retry(record: TaskRecord, due_ms: int | None, now_ms: int) -> Answer:
    allowed = record.spec.max_attempts if record.spec is not None else 1
    why = f": {_error(record)}" if record.error is not None else "."
    head = f"Failure {record.failures} of the {allowed} that it may have{why}"
    if due_ms is None:
        return Answer(Why.RETRY_WAIT, f"{head} It is queued again after a pause.")
    left_s = max(0, due_ms - now_ms) / 1000
    unblock = Unblock("its pause before the next attempt is over", left_s)
    # No pause of its own is so long: the budget of its tenant is what puts it off.
    budget = " (by tenant.retries_per_minute_max: its tenant has retried too often)" if left_s > RETRY_PAUSE_S_MAX else ""
    return Answer(Why.RETRY_WAIT, f"{head} It is queued again in {format_duration(left_s)}{budget}.", (unblock,))


def _blocked(record: TaskRecord, parents: Sequence[Parent]) -> Answer:
    if not parents:
        return Answer(Why.WAITING_FOR_DEPENDENCIES, "All that it comes after has ended: it is queued within a moment.")
    spec = record.spec
    many = spec is not None and len(spec.after) > 1
    which = f"{len(parents)} of the {len(spec.after)} that it comes after: " if spec is not None and many else ""
    named = ", ".join(f"{parent.task_id} ({parent.standing})" for parent in parents[:PARENTS_NAMED_MAX])
    more = f" and {len(parents) - PARENTS_NAMED_MAX} more" if len(parents) > PARENTS_NAMED_MAX else ""
    if spec is not None and spec.after_failed is AfterFailed.RUN:
        then = f"It runs however {'they end' if many else 'that ends'}."
    else:
        then = f"If {'one of them' if many else 'that'} does not succeed, it fails with DependencyFailed."
    words = f"It waits for {which}{named}{more}. {then}"
    return Answer(Why.WAITING_FOR_DEPENDENCIES, words, tuple(Unblock(f"{parent.task_id} ends") for parent in parents))


def _time_left(record: TaskRecord, now_ms: int) -> tuple[float | None, str]:
    """Seconds until its time is up, and a sentence about that."""
    spec = record.spec
    if spec is None or record.status not in ACTIVE:
        return None, ""
    ends = [spec.deadline_ms] if spec.deadline_ms else []
    if spec.total_timeout_s:
        ends.append(record.created_ms + int(spec.total_timeout_s * 1000))
    end_s = (min(ends) - now_ms) / 1000 if ends else None
    start_s = None
    if spec.start_timeout_s and record.attempt == 0:
        start_s = (record.created_ms - now_ms) / 1000 + spec.start_timeout_s
    if start_s is not None and (end_s is None or start_s < end_s):
        return max(0.0, start_s), f" It has {format_duration(max(0.0, start_s))} to start, else it fails with StartTimeout."
    if end_s is None:
        return None, ""
    if end_s <= 0:
        return 0.0, " Its time is up: it is being ended."
    return end_s, f" It has {format_duration(end_s)} to end, else it fails with DeadlineExceeded."


def _error(record: TaskRecord) -> str:
    assert record.error is not None
    text = " ".join(record.error.message.split())
    return f"{record.error.type}: {text[:300]}".rstrip(" :.") + "."
