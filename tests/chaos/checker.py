"""Judges a run from what it left behind, without the cluster: ``python -m tests.chaos.checker FOLDER``.

It knows nothing of how Rocyard works but its promise: what was acknowledged is there and has ended as it must, once; and a
task that ran again did so because it was to be tried again, or because of a fault on its own agent, executor or store
between its start and its next one. Everything else that ran twice is unexplained.
"""

import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.chaos import history
from tests.chaos.history import Call, Due, Fault, Note, Outcome, Row, Run, TaskEnd

FINAL: Final = ("SUCCEEDED", "FAILED", "CANCELLED")
SHOWN_MAX: Final = 10
WRITING_S: Final = 2.0
"""A result is written within this time after its function has come to its end."""
OWN: Final = ("agent", "node", "executor", "machine")
OF_ALL: Final = ("store", "all", "machine")


class Times(msgspec.Struct, frozen=True):
    """Seconds from faults of one kind until what they interrupted ran again."""

    count: int
    p50_s: float
    p95_s: float
    max_s: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run.

    Attributes:
        attempted: tasks that clients tried to submit.
        acknowledged: those that were accepted, to a client's knowledge.
        recovered: those of which no client knows, that are in the store.
        unknown: those of which no client knows.
        refused: those that were refused.
        lost: acknowledged, and not in the store.
        unfinished: in the store, and not ended.
        duplicated: ended more than once, accepted more than once, or with the result of an attempt that was replaced.
        wrong: ended otherwise than they must, or than somebody was told.
        unexplained: ran again for no reason.
        unexpected: in the store, and submitted by nobody.
        inconsistent: what does not add up in the store.
        died: processes that no fault has ended.
        starts, reruns: how often tasks started, and how often again.
        explained: reruns by what explains them.
        ends: tasks by state.
        faults: by kind.
        recovery: by kind of fault.
        unknown_calls: calls of clients without a useful answer.
    """

    attempted: int
    acknowledged: int
    recovered: int
    unknown: int
    refused: int
    lost: tuple[str, ...]
    unfinished: tuple[str, ...]
    duplicated: tuple[str, ...]
    wrong: tuple[str, ...]
    unexplained: tuple[str, ...]
    unexpected: tuple[str, ...]
    inconsistent: tuple[str, ...]
    died: tuple[str, ...]
    starts: int
    reruns: int
    explained: dict[str, int]
    ends: dict[str, int]
    faults: dict[str, int]
    recovery: dict[str, Times]
    calls: int
    unknown_calls: int
    replays: int

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """What breaks the promise; empty: nothing."""
        names = ("lost", "unfinished", "duplicated", "wrong", "unexplained", "unexpected", "inconsistent", "died")
        return {name: found for name in names if (found := getattr(self, name))}


_ERRORS: Final = {Due.FAILED: "RuntimeError", Due.POISON: "ExecutorCrashed", Due.LATE: "DeadlineExceeded"}


class _Submissions:
    """What clients know of the tasks that they submitted."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self.due: dict[str, Due] = {}
        self.ids: dict[str, set[str]] = defaultdict(set)  # key → ids that it was told
        self.unknown: set[str] = set()
        self.asked_to_cancel: set[str] = set()
        self.told: dict[str, set[str]] = defaultdict(set)  # id → final states that somebody was told
        self.calls = self.unknown_calls = self.replays = 0
        for call in calls:
            self._take(call)

    def _take(self, call: Call) -> None:
        self.calls += call.outcome is Outcome.INVOKE
        self.unknown_calls += call.outcome is Outcome.UNKNOWN
        self.replays += call.replayed
        if call.op == "submit":
            self.due |= call.keys
            if call.outcome is Outcome.UNKNOWN:
                self.unknown |= call.keys.keys()
            for key, task in zip(call.keys, call.ids, strict=False):
                self.ids[key].add(task)
            return
        if call.op == "cancel" and call.outcome is not Outcome.FAIL:
            self.asked_to_cancel.add(call.task)
        if call.state in FINAL:
            self.told[call.task].add(call.state)


def check(folder: Path) -> Verdict:
    """The verdict on the run in `folder`."""
    said = _Submissions(history.read(folder / history.CALLS, Call))
    rows = {row.task: row for row in history.read(folder / history.STORE, Row)}
    notes: dict[str, list[Note]] = defaultdict(list)
    for note in history.read(folder / history.TASKS, Note):
        notes[note.task].append(note)
    faults = tuple(history.read(folder / history.FAULTS, Fault))
    ends = list({end.entry: end for end in history.read(folder / history.ENDS, TaskEnd)}.values())
    run = msgspec.json.decode((folder / history.RUN).read_bytes(), type=Run)
    by_key: dict[str, list[str]] = defaultdict(list)
    for row in rows.values():
        by_key[row.key].append(row.task)
    acknowledged = {task for ids in said.ids.values() for task in ids}
    doubtful = said.unknown - said.ids.keys()
    reruns = _Reruns(notes, faults)
    return Verdict(
        attempted=len(said.due),
        acknowledged=len(acknowledged),
        recovered=sum(key in by_key for key in doubtful),
        unknown=len(doubtful),
        refused=len(said.due.keys() - said.ids.keys() - doubtful),
        lost=tuple(sorted(acknowledged - rows.keys())),
        unfinished=tuple(f"{row.task} is {row.state}" for row in rows.values() if row.state not in FINAL),
        duplicated=(*_twice_accepted(said, by_key), *_twice_ended(rows, ends), *_replaced(rows)),
        wrong=tuple(_wrong(said, rows, notes, faults)),
        unexplained=tuple(reruns.unexplained),
        unexpected=tuple(sorted(row.task for row in rows.values() if row.key not in said.due)),
        inconsistent=(run.recount,) if run.recount else (),
        died=tuple(_died(run, faults)),
        starts=sum(note.event == "start" for those in notes.values() for note in those),
        reruns=sum(reruns.explained.values()) + len(reruns.unexplained),
        explained=dict(sorted(reruns.explained.items())),
        ends=dict(sorted(Counter(row.state for row in rows.values()).items())),
        faults=dict(sorted(Counter(fault.kind for fault in faults).items())),
        recovery={kind: times(found) for kind, found in sorted(reruns.recovery.items())},
        calls=said.calls,
        unknown_calls=said.unknown_calls,
        replays=said.replays,
    )


def _twice_accepted(said: _Submissions, by_key: dict[str, list[str]]) -> Iterable[str]:
    """One submission, several tasks."""
    for key in said.due:
        ids = said.ids.get(key, set()) | set(by_key.get(key, ()))
        if len(ids) > 1:
            yield f"{key} was accepted as {', '.join(sorted(ids))}"


def _twice_ended(rows: dict[str, Row], ends: Sequence[TaskEnd]) -> Iterable[str]:
    """A final state that was entered twice, or that is not the one in the record."""
    told: dict[str, list[TaskEnd]] = defaultdict(list)
    for end in ends:
        told[end.task].append(end)
    for task, those in told.items():
        if len(those) > 1:
            yield f"{task} ended {len(those)} times: {', '.join(f'{end.state} in attempt {end.attempt}' for end in those)}"
        row = rows.get(task)
        if row is not None and row.state in FINAL and those[-1].state != row.state:
            yield f"{task} is {row.state}, and it was told that it is {those[-1].state}"
    for row in rows.values():
        if row.state in FINAL and row.task not in told:
            yield f"{row.task} is {row.state}, and nobody was told of its end"


def _replaced(rows: dict[str, Row]) -> Iterable[str]:
    """A result that another attempt than the newest has brought."""
    for row in rows.values():
        if row.state == "SUCCEEDED":
            if row.damage:
                continue
            result = msgspec.json.decode(row.result) if row.result else {}
            if result.get("attempt") != row.attempt or result.get("key") != row.key:
                yield f"{row.task} of attempt {row.attempt} ({row.key}) has the result {row.result}"


def _wrong(said: _Submissions, rows: dict[str, Row], notes: dict[str, list[Note]], faults: Sequence[Fault]) -> Iterable[str]:
    for row in rows.values():
        due = said.due.get(row.key)
        if row.state not in FINAL or due is None:
            continue
        if row.damage:
            yield f"{row.task} succeeded, and its result is damaged: {row.damage}"
            continue
        if early := _too_early(row, rows, notes):
            yield early
        if others := said.told[row.task] - {row.state}:
            yield f"{row.task} is {row.state}, and a client was told {', '.join(sorted(others))}"
        if row.state == "CANCELLED":
            if row.task not in said.asked_to_cancel:
                yield f"{row.task} was cancelled, and nobody had asked for that"
        elif any(rows[parent].state != "SUCCEEDED" for parent in row.after if parent in rows) and not row.whatever:
            if row.error != "DependencyFailed":
                yield f"{row.task} is {row.state} ({row.error or 'no error'}), and what it waited for has not succeeded"
        elif row.state == "FAILED":
            if row.error != _ERRORS.get(due) and not _had_no_disk(row, notes, faults):
                yield f"{row.task} failed with {row.error}, and must end as {due}"
        elif due is not Due.SUCCEEDED:
            yield f"{row.task} succeeded, and must end as {due}"
        elif not any(note.event == "end" and note.attempt == row.attempt for note in notes[row.task]):
            yield f"{row.task} succeeded in attempt {row.attempt}, and no task has written that it came to its end there"


def _had_no_disk(row: Row, notes: dict[str, list[Note]], faults: Sequence[Fault]) -> bool:
    """Whether it failed because its result could not be kept, and there was no room for it when it came to its end."""
    ends = [note.at for note in notes.get(row.task, ()) if note.event == "end" and note.attempt == row.attempt]
    full = [fault for fault in faults if fault.kind == "results-full"]
    return row.error == "ResultNotStored" and any(f.at <= at + WRITING_S and at <= f.until for f in full for at in ends)


def _too_early(row: Row, rows: dict[str, Row], notes: dict[str, list[Note]]) -> str:
    """Whether it began before one that it waited for had come to its end, in the attempt that counts."""
    began = min((note.at for note in notes.get(row.task, ()) if note.event == "start"), default=math.inf)
    for parent in row.after:
        counts = rows[parent].attempt if parent in rows else 0
        if any(note.at > began and note.attempt == counts for note in notes.get(parent, ())):
            return f"{row.task} started at {began:.3f}, before {parent}, which it waited for, was done"
    return ""


def _died(run: Run, faults: Sequence[Fault]) -> Iterable[str]:
    """A store that must sync each write and cannot is right to end: its disk was full."""
    full = any(fault.kind == "store-full" for fault in faults)
    return (one for one in run.died if not (full and one.startswith("store ")))


class _Reruns:
    """Why tasks ran again.

    Attributes:
        explained: how many, by what explains them.
        unexplained: those that nothing does.
        recovery: kind of fault → seconds from the fault to the next start, for each task that it interrupted.
    """

    def __init__(self, notes: dict[str, list[Note]], faults: Sequence[Fault]) -> None:
        self.explained: Counter[str] = Counter()
        self.unexplained: list[str] = []
        self.recovery: dict[str, list[float]] = defaultdict(list)
        for task, those in notes.items():
            # By attempt, not by time: who wakes up with a task that was given to another may still start it.
            starts = sorted((note for note in those if note.event == "start"), key=lambda note: (note.attempt, note.at))
            for before, after in itertools.pairwise(starts):
                self._explain(task, before, after, those, faults)

    def _explain(self, task: str, before: Note, after: Note, notes: list[Note], faults: Sequence[Fault]) -> None:
        own = {note.event for note in notes if note.attempt == before.attempt}
        if own & {"raise", "crash"}:
            self.explained["own failure"] += 1
            return
        met = [fault for fault in faults if _meets(fault, before, after)]
        if not met:
            self.unexplained.append(
                f"{task} started as attempt {before.attempt} at {before.at:.3f} (executor {before.pid}, agent {before.agent}) "
                f"and as attempt {after.attempt} at {after.at:.3f}"
            )
            return
        # The nearer one: what befell the task itself, and of that what came first.
        nearest = min(met, key=lambda fault: (fault.whom not in OWN, fault.at))
        self.explained[nearest.kind] += 1
        if nearest.whom in OWN:
            self.recovery[nearest.kind].append(max(0.0, after.at - nearest.at))


def _meets(fault: Fault, before: Note, after: Note) -> bool:
    """Whether the fault was on the task's own agent, executor or store, between its start and its next one."""
    if fault.at > max(before.at, after.at) or fault.until < min(before.at, after.at):
        return False
    match fault.whom:
        case "executor":
            return before.pid in fault.pids
        case "agent" | "node":
            return before.agent in fault.pids
        case _:
            return fault.whom in OF_ALL


def times(seconds: Sequence[float]) -> Times:
    """The usual figures."""
    ordered = sorted(seconds)
    return Times(
        len(ordered),
        round(ordered[len(ordered) // 2], 2),
        round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 2),
        round(ordered[-1], 2),
    )


def main() -> int:
    """Print the verdict on a folder; 1 where the promise is broken."""
    from tests.chaos.report import table

    verdict = check(Path(sys.argv[1]))
    print(table(verdict))
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
