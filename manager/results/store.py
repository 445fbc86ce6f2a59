"""The results store as its users see it: names, and what each kind of place can do.

A result is written beside (`place`), checked, synced and moved to its name (`keep`), and only then named by the task's record:
so a record never names what is not there, and what no record names is left over and may go (`manager.leader_results`). Names
hold task, attempt and slot: an attempt's number may be given again by a store that is back from a backup or a failover, but
the id of a slot never is, so nobody ever writes over, or removes, what another one has written.

A place for results is one cluster's. Which one's is noted there, by the name of a file: who removes what no record names must
know that whatever lies there is that store's to judge.
"""

import enum
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from manager.core.errors import ResultMissing
from manager.core.model import ResultFile

CHUNK_BYTES: Final = 128 * 1024
"""Read at once: what one slow reader of the API holds in memory."""
FILES: Final = "files"
WRITING: Final = "writing"
CHECKPOINTS: Final = "checkpoints"
CLOCK: Final = "clock"
"""A file that is written to learn what time it is there."""
OWNER: Final = "cluster"
"""A folder with one file, whose name is the identity of the cluster that owns all that lies there."""
GUESTS: Final = "guests"
"""A folder of such files, for clusters that keep results there although they are another's."""
GUEST_S: Final = 3 * 3600.0
"""What says so holds for so long after it was written: its leader writes it each hour."""

# Without a slot: as version 0.1.0 called them, and records name them so.
_ATTEMPT: Final = r"([0-9a-z]{26})-([1-9][0-9]{0,8})(?:-[0-9a-z]{26})?\.json"
_FILE: Final = re.compile(f"{FILES}/[0-9a-z]{{2}}/{_ATTEMPT}")
_WRITING: Final = re.compile(f"{WRITING}/{_ATTEMPT}")
_CHECKPOINTS: Final = re.compile(r"checkpoints/([0-9a-z]{26})")


class Kind(enum.StrEnum):
    """What lies there."""

    RESULT = "result"
    WRITING = "writing"  # a result that is being written, or was when its executor ended
    CHECKPOINTS = "checkpoints"  # the folder of one task


class Leftover(msgspec.Struct, frozen=True):
    """Something that a scan has found, of which the store's records must say whether it is needed.

    Attributes:
        name: below the root.
        attempt: 0 for a folder of checkpoints, which all attempts share.
        age_s: since it was changed, by the clock of the place where it lies.
    """

    name: str
    kind: Kind
    task_id: str
    attempt: int
    age_s: float


class ResultStore(Protocol):
    """A place for results. Blocking work is done in threads; nothing here needs the store of tasks."""

    def place(self, task_id: str, attempt: int, slot_id: str) -> Path | None:
        """Where an executor writes a large result, and nothing else does; None where there is no room for such results."""

    async def keep(self, path: Path, task_id: str, attempt: int, slot_id: str, size: int, sha256: str) -> ResultFile:
        """Have what was written to `place` lie safely under its name. On return it survives a power cut.

        Raises:
            ResultNotStored: it could not be kept, or is not what it was said to be.
        """

    async def discard(self, file: ResultFile) -> None:
        """Remove a result that no record will name; that it is gone already is well."""

    def folder(self, task_id: str) -> str:
        """Where a task may make a folder for checkpoints that each of its attempts sees; empty where it cannot."""

    async def open(self, file: ResultFile) -> AsyncIterator[bytes]:
        """The bytes of a result. The last of them come only if they are all what was kept.

        Raises:
            ResultMissing: it is not there, or is another; also while it is read.
        """

    async def owner(self) -> str:
        """The cluster whose results lie here, as is noted there; empty: nothing is. Several, with commas: nobody can be sure.

        Raises:
            OSError: it is away.
        """

    async def guests(self) -> list[str]:
        """Clusters that have noted of late that they keep results here as well.

        Raises:
            OSError: it is away.
        """

    async def visit(self, cluster: str) -> None:
        """Note that a cluster keeps results here that does not own what lies here.

        Raises:
            OSError: it is away.
        """

    async def claim(self, cluster: str) -> str:
        """Note that the results here are that cluster's, unless they are noted to be another's. Whose they are by then.

        Of two clusters that claim at once, one at most is told that it has it. Empty: nobody has it, try again later.

        Raises:
            OSError: it is away.
        """

    def marker(self, cluster: str) -> str:
        """Where it is noted that the results are that cluster's, for a person who has to see to it."""

    def scan(self) -> AsyncIterator[list[Leftover]]:
        """All that lies there, in lists of bounded length.

        Raises:
            OSError: it is away.
        """

    async def remove(self, names: Sequence[str]) -> int:
        """Remove what a scan has found, or what a record has named; how much of it was there."""


def file_name(task_id: str, attempt: int, slot_id: str) -> str:
    """The name of a result. Ids begin with the time, so it is their end that spreads them over folders."""
    return f"{FILES}/{task_id[-2:]}/{task_id}-{attempt}-{slot_id}.json"


def writing_name(task_id: str, attempt: int, slot_id: str) -> str:
    """The name of a result that is being written."""
    return f"{WRITING}/{task_id}-{attempt}-{slot_id}.json"


def owner_of(names: Iterable[str]) -> str:
    """Whose all is that lies there, by the names of the files that say so."""
    return ", ".join(sorted(names))


def leftover_of(name: str, age_s: float) -> Leftover | None:
    """What a name below the root stands for; None where it is none of ours."""
    for kind, pattern in ((Kind.RESULT, _FILE), (Kind.WRITING, _WRITING)):
        if found := pattern.fullmatch(name):
            return Leftover(name, kind, found[1], int(found[2]), age_s)
    if found := _CHECKPOINTS.fullmatch(name):
        return Leftover(name, Kind.CHECKPOINTS, found[1], 0, age_s)
    return None


def checked_name(file: ResultFile) -> str:
    """The file's name, which is one that we have made: never a way to another file.

    Raises:
        ResultMissing: it is none of ours.
    """
    if _FILE.fullmatch(file.name) is None:
        raise missing(file, "its record names no result of ours")
    return file.name


def missing(file: ResultFile, why: str) -> ResultMissing:
    """The error for a result that cannot be had."""
    return ResultMissing(
        f"The task has succeeded, but its result ({file.bytes} bytes, {file.name}) cannot be had: {why}. "
        "Submit the task again, or put the file back.",
        name=file.name,
        bytes=file.bytes,
    )


class NoResults:
    """Stands for a results store where none is set: larger results fail, and there are no folders for checkpoints."""

    def place(self, task_id: str, attempt: int, slot_id: str) -> Path | None:  # noqa: ARG002 -- as `ResultStore` has it; so below
        """Nowhere."""
        return None

    async def keep(self, path: Path, task_id: str, attempt: int, slot_id: str, size: int, sha256: str) -> ResultFile:  # noqa: ARG002
        """Never called: there is no place to have written to."""
        raise AssertionError(f"{path} was written without a results store")

    async def discard(self, file: ResultFile) -> None:
        """Nothing to do: whoever kept it had a results store, and a scan of that finds it."""

    def folder(self, task_id: str) -> str:  # noqa: ARG002
        """None."""
        return ""

    async def open(self, file: ResultFile) -> AsyncIterator[bytes]:
        """Cannot be had from here."""
        raise missing(file, "this process has no results store (results.url), and the agent that kept it had one")

    async def owner(self) -> str:
        """Nobody."""
        return ""

    async def guests(self) -> list[str]:
        """Nobody."""
        return []

    async def visit(self, cluster: str) -> None:
        """Nothing to note: nobody can come here."""

    async def claim(self, cluster: str) -> str:
        """Granted: there is nothing that could be another's."""
        return cluster

    def marker(self, cluster: str) -> str:  # noqa: ARG002
        """Nowhere."""
        return ""

    async def scan(self) -> AsyncIterator[list[Leftover]]:
        """Nothing."""
        nothing: tuple[list[Leftover], ...] = ()
        for found in nothing:
            yield found

    async def remove(self, names: Sequence[str]) -> int:  # noqa: ARG002
        """Nothing."""
        return 0
