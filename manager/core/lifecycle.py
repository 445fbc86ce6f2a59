"""The life of a task and of a slot, each as a table. The store's functions implement these tables and nothing else.

Task: BLOCKED (waits for others) → QUEUED → RUNNING → SUCCEEDED | FAILED | CANCELLED, and RETRY_WAIT.
A claim makes a task RUNNING. Nothing leaves a final state.
"""

import enum
from typing import Final


class TaskStatus(enum.StrEnum):
    """Where a task is in its life."""

    BLOCKED = "BLOCKED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    RETRY_WAIT = "RETRY_WAIT"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class AfterFailed(enum.StrEnum):
    """What becomes of a task when one that it waits for does not succeed."""

    FAIL = "fail"  # it fails too, with DependencyFailed
    RUN = "run"  # it runs all the same: it waits for their ends, not for their success


class SlotStatus(enum.StrEnum):
    """Where a slot is in its life. An id opens once; CLOSED is its tombstone."""

    REQUESTED = "REQUESTED"
    OPEN = "OPEN"
    CLOSED = "CLOSED"


class SlotFlag(enum.StrEnum):
    """What the controller asks of an open slot, told in the reply to `next` or in the beat."""

    NONE = ""
    CLOSE = "close"  # at the next task boundary: its memory is wanted elsewhere, or it is idle
    DRAIN = "drain"  # at the next task boundary: its node is going
    PREEMPT = "preempt"  # now: the running task goes back to the queue and nobody is blamed


class SlotKind(enum.StrEnum):
    """What a slot is for."""

    TASKS = ""  # serves the tasks of its shape, one after the other
    DIRECT = "direct"  # runs one Dask task of somebody who uses Dask directly, and claims nothing


class Cordon(enum.StrEnum):
    """What a node may still take on."""

    NONE = ""
    CORDON = "cordon"  # no new slots; those that are open go on
    DRAIN = "drain"  # and those that are open end at their next task boundary


class Outcome(enum.StrEnum):
    """How an attempt ended, as the agent tells the store. One letter: it travels once per task."""

    SUCCEEDED = "S"
    FAILED = "F"  # the function raised, or broke a limit: counts against max_attempts
    FAILED_FOR_GOOD = "N"  # the same, with an error that its `retry_on` does not name: not tried again
    OUT_OF_MEMORY = "O"  # the device had no memory left: once, it is tried again with more room, uncounted
    CANCELLED = "C"  # ended because its cancellation was asked
    CRASHED = "X"  # the executor died while this task alone could have been the cause
    SUSPECTED = "A"  # the executor died, others ran in it before: run this one again alone, no blame
    RETURNED = "R"  # claimed, never started, given back: counts against nothing
    LOST = "L"  # ended by infrastructure (agent stopping, preemption): blames nobody, with a cap


S = TaskStatus
NEXT: Final[dict[TaskStatus, frozenset[TaskStatus]]] = {
    S.BLOCKED: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.QUEUED: frozenset({S.RUNNING, S.FAILED, S.CANCELLED}),
    S.RUNNING: frozenset({S.QUEUED, S.RETRY_WAIT, S.SUCCEEDED, S.FAILED, S.CANCELLED}),  # QUEUED: its slot was lost
    S.RETRY_WAIT: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
assert NEXT.keys() == set(TaskStatus)

FINAL: Final = frozenset(status for status, following in NEXT.items() if not following)
ACTIVE: Final = frozenset(TaskStatus) - FINAL

SLOT_NEXT: Final[dict[SlotStatus, frozenset[SlotStatus]]] = {
    SlotStatus.REQUESTED: frozenset({SlotStatus.OPEN, SlotStatus.CLOSED}),  # CLOSED: fenced before it was opened
    SlotStatus.OPEN: frozenset({SlotStatus.CLOSED}),
    SlotStatus.CLOSED: frozenset(),
}
assert SLOT_NEXT.keys() == set(SlotStatus)

CRASHES_MAX: Final = 3
"""A task that crashed its executor so often, alone, is poison."""

REMOVED_EXIT: Final = 90
"""Exit status of an agent whose node was removed: who supervises it must not start it again. No shell or library uses it."""

OUTDATED_EXIT: Final = 91
"""Exit status of a process that is too old for its store: it is no use to start it again soon."""

ROOM_AFTER_OUT_OF_MEMORY: Final = 1.5
"""A task whose device ran out of memory is tried once more with so many times the room."""

LOSSES_MAX: Final = 50
"""Losses of infrastructure that a task survives: a bound against a cluster that cannot run it at all."""
