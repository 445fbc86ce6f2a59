"""How tasks and arrays of tasks come into the store: all of a submission or nothing of it."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from manager.core.errors import IdempotencyConflict, NameTaken, QuotaExceeded, UnknownDependency
from manager.core.lifecycle import AfterFailed, TaskStatus
from manager.core.model import IdempotencyKey, Submission, SubmitReply, priority_offset
from manager.core.shapes import encode_shape
from manager.store import rows
from manager.store.calls import IDS_MAX, Calls, milliseconds

_encode = msgspec.json.Encoder().encode


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


class SubmitCalls(Calls):
    """Submissions, and the tasks of arrays that were accepted."""

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
            args += (s.task_id, s.shape_id, offset, spec.max_attempts, spec.function, _encode(spec), _more(s))
        word, *said = await self._run("ry_submit", *args)
        match word:
            case b"OK":
                return SubmitReply(tuple((s.task_id, rows.status(status)) for s, status in zip(submissions, said, strict=True)))
            case b"REPLAY":
                known = _known(said)
                # The first send of this very call, of which the answer was lost, is no earlier submission.
                return SubmitReply(known, [task_id for task_id, _ in known] != [s.task_id for s in submissions])
            case b"CONFLICT":
                raise _conflict(said)
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

    async def known(self, tenant: str, key: IdempotencyKey | None, named: Sequence[tuple[str, str]]) -> SubmitReply | None:
        """What the same request was accepted as before, by its key or by the names of its tasks; None: it is new.

        Args:
            named: the name of each task, and the digest of what it asks for; two empty texts where it has no name.

        Raises:
            IdempotencyConflict, NameTaken: the key, or a name, was used for something else.
            StoreUnavailable: nothing is known.
        """
        args = ("", "") if key is None else (key.key, key.digest)
        word, *said = await self._run("ry_known", tenant, *args, *(text for pair in named for text in pair))
        match word:
            case b"REPLAY":
                return SubmitReply(_known(said), replayed=True)
            case b"CONFLICT":
                raise _conflict(said)
            case _:
                return None

    async def expand(self) -> int:
        """Give tasks of arrays that were accepted their records, a bounded number; how many arrays have more to come."""
        return int(await self._run("ry_expand", IDS_MAX))


def _more(submission: Submission) -> bytes:
    spec = submission.spec
    more = _More(
        name=spec.name or None,
        digest=submission.digest if spec.name else None,
        start_ms=int(milliseconds(spec.start_timeout_s)) or None,
        total_ms=int(milliseconds(spec.total_timeout_s)) or None,
        deadline_ms=spec.deadline_ms or None,
        after=spec.after or None,
        run=spec.after_failed is AfterFailed.RUN or None,
        count=spec.count or None,
    )
    return b"" if more == _NO_MORE else _encode(more)


def _known(said: list[bytes]) -> tuple[tuple[str, TaskStatus | None], ...]:
    """Ids and statuses, as a replay tells them in turns."""
    return tuple((said[i].decode(), rows.status(said[i + 1])) for i in range(0, len(said), 2))


def _conflict(said: list[bytes]) -> IdempotencyConflict | NameTaken:
    return IdempotencyConflict() if said[0] == b"key" else _name_taken(said[1].decode())


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
