"""What a run leaves behind: one folder, a file of JSON lines for each of its witnesses, and what stands in a line.

All times are of the machine's monotonic clock, which every process of it shares. Whoever reads these files needs no cluster.
"""

import enum
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

CALLS: Final = "calls.jsonl"
TASKS: Final = "tasks.jsonl"
FAULTS: Final = "faults.jsonl"
ENDS: Final = "ends.jsonl"
STORE: Final = "store.jsonl"
RUN: Final = "run.json"


class Due(enum.StrEnum):
    """How a task must end, unless somebody asked for its cancellation."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"  # its function raises whenever it is run
    POISON = "POISON"  # it takes its executor down whenever it is run
    LATE = "LATE"  # it takes longer than the time that it has been given in all


class Outcome(enum.StrEnum):
    """What a client knows of its call."""

    INVOKE = "invoke"  # it is about to be made
    OK = "ok"  # done
    FAIL = "fail"  # refused, or never sent: it has had no effect
    UNKNOWN = "unknown"  # no answer, or one that does not say whether it was done


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line about one call of a client: that it is made, or what came of it.

    Attributes:
        number: the same in both lines.
        op: submit, get or cancel.
        keys: of the tasks that are submitted, each with how it must end.
        task: the task's id, of a get or a cancel.
        ids: of the tasks that were accepted, in the order of the keys.
        status: of the answer: HTTP's.
        state: what the answer said of the task.
    """

    number: int
    outcome: Outcome
    op: str
    at: float
    keys: dict[str, Due] = {}
    task: str = ""
    ids: tuple[str, ...] = ()
    status: int = 0
    state: str = ""
    replayed: bool = False


class Note(msgspec.Struct, frozen=True):
    """What a task has written down: start, end, raise, crash or terminated."""

    event: str
    task: str
    attempt: int
    key: str
    at: float
    pid: int
    agent: int


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fault that was injected.

    Attributes:
        what: kill, freeze, cut, slow, stall, power or full.
        whom: the part: store, agent, executor …
        pids: of the processes that it was about; of a link, of those at its end that is not the store's.
        at: when it began.
        until: when it was taken back; of a kill, when it was done.
        detail: in words.
    """

    number: int
    what: str
    whom: str
    pids: tuple[int, ...] = ()
    at: float
    until: float
    detail: str = ""

    @property
    def kind(self) -> str:
        """Part and fault in one word."""
        return f"{self.whom}-{self.what}"


class TaskEnd(msgspec.Struct, frozen=True):
    """A final state, as the store told of it: `entry` is the entry of its stream."""

    entry: str
    task: str
    state: str
    attempt: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it lay in the store at the end.

    Attributes:
        key: of its arguments; of a task of an array with its index.
        result: as its function returned it, from the record or from the results store.
        damage: what is wrong with its file in the results store; empty: nothing, or it has none.
        after: tasks that it had to wait for.
        whatever: whether it was to run even if those did not succeed.
    """

    task: str
    state: str
    key: str
    attempt: int
    failures: int = 0
    crashes: int = 0
    losses: int = 0
    error: str = ""
    result: str = ""
    damage: str = ""
    after: tuple[str, ...] = ()
    whatever: bool = False


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What was run.

    Attributes:
        recount: what a recount of the whole store at the end found wrong; empty: nothing.
        died: processes that ended by an exit status, and were started again.
        skipped: faults that this machine does not allow, and why.
    """

    seed: int
    seconds: float
    heal_s: float
    began: float
    ended: float
    program: str
    cpus: int
    recount: str = ""
    died: tuple[str, ...] = ()
    skipped: dict[str, str] = {}


class Writer:
    """Appends lines to one file; each is with the kernel when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, line: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path, kind: type[T]) -> Iterator[T]:
    """The lines of a file; none where there is no file. A last line that was not finished is left out."""
    if not path.exists():
        return
    decode = msgspec.json.Decoder(kind).decode
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decode(line)


def now() -> float:
    """The clock of all lines."""
    return time.monotonic()
