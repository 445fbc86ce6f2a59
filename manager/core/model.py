"""The records that parts pass each other: tasks, claims, ends, slots, nodes, and one look at them all.

Times are milliseconds of the store's clock (UTC), since one clock must order them; ``None`` is "not yet".
"""

from typing import Annotated, Final

import msgspec

from manager.core.devices import Device
from manager.core.lifecycle import AfterFailed, Cordon, Outcome, SlotFlag, SlotKind, SlotStatus, TaskStatus
from manager.core.mix import NO_MIX, Mix
from manager.core.shapes import Grant, Labels, Resources, Shape, grant_of, memory_class

PRIORITY_MAX: Final = 10
_PRIORITY_STEP: Final = 2**44
"""Sequence numbers stay below this for centuries; twenty steps of it still fit a double's 53 bits."""

Priority = Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]


def priority_offset(priority: int) -> int:
    """What is added to a task's sequence to give its place in the queue: a higher priority comes first."""
    return (PRIORITY_MAX - priority) * _PRIORITY_STEP


def priority_of(score: int) -> int:
    """The priority at which a task stands in its queue: its own, or what it has risen to with its age."""
    return PRIORITY_MAX - score // _PRIORITY_STEP


class TaskSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was submitted: never changes.

    Attributes:
        function: registered name.
        args: JSON object of keyword arguments.
        resources: as asked for, before rounding to a class.
        priority: -10 to 10, higher first.
        max_attempts: how often the function may fail before the task does.
        time_limit_s: seconds from start to end of one attempt.
        retry_on: names of errors (classes, their bases, or reasons of ours) that are worth another attempt; none: all are.
        start_timeout_s: seconds from submission until an executor has first taken it; 0: no limit.
        total_timeout_s: seconds from submission to its end; 0: no limit.
        deadline_ms: when it must have ended, by the store's clock; 0: no limit.
        name: the tenant's own for it, unique among its tasks; empty: none.
        after: tasks and arrays that must have ended before it may run.
        after_failed: what becomes of it when one of these does not succeed.
        count: of an array, how many tasks it has; each has the same spec. 0: this is no array.
        index_as: the argument in which each task of an array finds its index; empty: in none.
    """

    function: str
    args: msgspec.Raw
    resources: Resources
    priority: int = 0
    max_attempts: int = 1
    time_limit_s: float = 3600.0
    retry_on: tuple[str, ...] = ()
    start_timeout_s: float = 0.0
    total_timeout_s: float = 0.0
    deadline_ms: int = 0
    name: str = ""
    after: tuple[str, ...] = ()
    after_failed: AfterFailed = AfterFailed.FAIL
    count: int = 0
    index_as: str = ""


class Submission(msgspec.Struct, frozen=True):
    """One task, or one array of tasks, on its way into the store.

    Attributes:
        task_id: of an array, what `manager.core.ids.array_id` made.
        digest: of what was asked for; tells a repeated request of a name from another one. Only needed with a name.
    """

    task_id: str
    shape_id: str
    shape: Shape
    spec: TaskSpec
    digest: str = ""


class IdempotencyKey(msgspec.Struct, frozen=True):
    """What makes a submission the same one again.

    Attributes:
        key: SHA-256 of the caller's key.
        digest: of what was asked for.
    """

    key: str
    digest: str


class SubmitReply(msgspec.Struct, frozen=True):
    """What was accepted: ids and statuses in the order of the request; None where the task is not kept any more.

    `replayed`: by an earlier request, of which this is the same again.
    """

    tasks: tuple[tuple[str, TaskStatus | None], ...]
    replayed: bool = False


class TaskError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why an attempt failed. `type` is a PascalCase reason of ours or the name of the exception."""

    type: str
    message: str
    traceback: str = ""


class ResultFile(msgspec.Struct, frozen=True):
    """A result that is too large for the record: where it lies in the results store, its size, and its checksum in hex."""

    name: str
    bytes: int
    sha256: str


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt that has ended without ending its task, as the store keeps it.

    Attributes:
        why: the error's type, or what took the slot (NodeLost, AgentRestarted, Preempted …), or Returned.
        message: of the error, cut.
    """

    node: str = ""
    slot: str = ""
    claimed_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    why: str = ""
    message: str = ""


class ArrayRow(msgspec.Struct, frozen=True, kw_only=True):
    """An array of tasks: how many it has, and how many have ended how. What has not ended is the rest.

    Attributes:
        made: tasks of it that have their record; the others follow.
        sequence: of its first task; those of the others follow without a gap.
    """

    array_id: str
    tenant: str
    function: str
    count: int
    made: int
    sequence: int
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    created_ms: int = 0
    spec: TaskSpec | None = None


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A task as the store has it.

    Attributes:
        result: JSON; None where there is none, or where it lies in `result_file`.
        claimed_ms: when its newest attempt was claimed.
        waits: how many of the tasks that it comes after have not ended.
        progress: 0 to 1, as its newest attempt said; None: it has said nothing.
        checkpoint: what its attempts have reported last, for the next one.
        array_id, index: the array that it belongs to, and its place there.
        more_memory: it ran out of device memory once and asks for more room now.
    """

    task_id: str
    status: TaskStatus
    tenant: str
    function: str
    shape_id: str
    attempt: int
    failures: int = 0
    crashes: int = 0
    losses: int = 0
    score: int = 0
    node: str = ""
    slot: str = ""
    cancel_requested: bool = False
    created_ms: int = 0
    queued_ms: int | None = None
    started_ms: int | None = None
    finished_ms: int | None = None
    spec: TaskSpec | None = None
    result: bytes | None = None
    error: TaskError | None = None
    result_file: ResultFile | None = None
    claimed_ms: int | None = None
    waits: int = 0
    progress: float | None = None
    progress_message: str = ""
    checkpoint: str = ""
    array_id: str = ""
    index: int | None = None
    more_memory: bool = False


class TaskEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A task has ended. With `inline` false, result and error must be read from the record."""

    task_id: str
    status: TaskStatus
    attempt: int
    node: str
    started_ms: int | None
    finished_ms: int
    inline: bool
    result: bytes | None = None
    error: TaskError | None = None


class Claim(msgspec.Struct, frozen=True):
    """A task that a slot has taken.

    Attributes:
        alone: in a fresh executor, with no other task of its batch.
        index: its place in its array; None: it is in none.
        checkpoint: what an earlier attempt has reported last.
        more_memory: it ran out of device memory once before.
    """

    task_id: str
    attempt: int
    alone: bool
    spec: TaskSpec
    index: int | None = None
    checkpoint: str = ""
    more_memory: bool = False


class End(msgspec.Struct, frozen=True):
    """How an attempt ended, on its way to the store.

    Attributes:
        payload: JSON of the result, or of a `TaskError`; empty where there is a `file`.
        age_s: seconds since the executor took it; None where it never did.
        duration_s: seconds in the function; None where unknown.
        chance: in [0, 1), the jitter of a retry.
        file: where the result lies.
        room: of OUT_OF_MEMORY, the shape (id, and itself) with more room in which it is tried again.
    """

    task_id: str
    attempt: int
    outcome: Outcome
    payload: bytes = b""
    age_s: float | None = None
    duration_s: float | None = None
    chance: float = 0.5
    file: ResultFile | None = None
    room: tuple[str, Shape] | None = None


class ProgressNote(msgspec.Struct, frozen=True):
    """What a running attempt has reported; None: nothing new of that.

    Attributes:
        progress: 0 to 1.
        message: beside it, for people.
        checkpoint: what the next attempt is to be given.
    """

    task_id: str
    attempt: int
    progress: float | None = None
    message: str | None = None
    checkpoint: str | None = None


class MemoryNote(msgspec.Struct, frozen=True):
    """What a slot was seen to use.

    Attributes:
        peak_bytes: the most on one of its devices.
        learned_bytes: what slots of its shape are to lease on each from now on; 0: what was asked for will do.
    """

    slot_id: str
    peak_bytes: int
    learned_bytes: int = 0


class NextReply(msgspec.Struct, frozen=True):
    """Answer to `next`: a word (FENCED, CLOSE, DRAIN, PREEMPT, IDLE, WORK, OK), the ends' effects, and claims.

    `statuses` has the status of each ended task after its end, None for an end that came too late.
    """

    word: str
    statuses: tuple[TaskStatus | None, ...]
    claims: tuple[Claim, ...]


class BeatReply(msgspec.Struct, frozen=True):
    """Answer to an agent's beat.

    Attributes:
        holds: whether the incarnation still holds; nothing else counts where it does not.
        cordoned: nothing new may be opened on this node.
        leave: the node was to be removed and is empty: the agent ends for good.
        words: about slots: (slot, ``fenced work close drain preempt cancel:ID``).
    """

    holds: bool
    cordoned: bool = False
    leave: bool = False
    words: tuple[tuple[str, str], ...] = ()


class OpenReply(msgspec.Struct, frozen=True):
    """Answer to `open`: OK, ADOPTED, FENCED or REFUSED; with the shape for the first two."""

    word: str
    shape_id: str = ""
    shape: Shape | None = None


class SlotRow(msgspec.Struct, frozen=True, kw_only=True):
    """A slot as the store has it. `devices` are uuids; `running` counts the tasks that it has claimed.

    `memory_bytes` is what it leases on each device; 0: its shape says. A slot of kind DIRECT has no shape in the store.
    `score` is the place in the queue of the first task that it has claimed, None where it has none.
    """

    slot_id: str
    shape_id: str
    status: SlotStatus
    node: str = ""
    incarnation: str = ""
    devices: tuple[str, ...] = ()
    flag: SlotFlag = SlotFlag.NONE
    requested_ms: int = 0
    opened_ms: int | None = None
    idle_ms: int | None = None
    served: int = 0
    token: int = 0
    running: int = 0
    kind: SlotKind = SlotKind.TASKS
    memory_bytes: int = 0
    share_milli: int = 0
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    exclusive: bool = False
    model: str = ""
    score: int | None = None

    def grant(self, shape: Shape | None) -> Grant | None:
        """What it has leased; None where that is not known (yet).

        Args:
            shape: its own, where the store has one: a slot that was opened by an older agent says no more than its memory.
        """
        if not self.node or not self.devices:
            return None
        if self.memory_bytes:
            return Grant(
                self.node,
                self.devices,
                self.memory_bytes,
                self.share_milli,
                self.cpu_milli,
                self.host_memory_bytes,
                self.exclusive,
                self.model,
            )
        return None if shape is None else grant_of(shape.resources, self.node, self.devices)


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """A shape with work or slots. `head` is the score of its first task; `run_s` its learned run time.

    `warm` slots are to be open although nothing waits; those that have been idle since before `unload_ms` are to close.
    `learned_bytes` is what its slots are to lease on a device because others of it have used so much: more than was asked
    for, or 0. `peak_bytes` is the most that a slot of it was seen to use on a device; 0: nothing was seen yet.
    `vtime_s` is the device-seconds that it has had of its tenant's; None until a leader has seen it.
    `out_of_memory`: tasks may wait there that asked for less and ran out of device memory once.
    """

    shape_id: str
    shape: Shape
    depth: int
    head: int | None = None
    head_queued_ms: int | None = None
    run_s: float | None = None
    warm: int = 0
    unload_ms: int | None = None
    learned_bytes: int = 0
    peak_bytes: int = 0
    vtime_s: float | None = None
    out_of_memory: bool = False

    @property
    def resources(self) -> Resources:
        """What a slot of it needs: what was asked for, or what it turned out to need where that is more."""
        asked = self.shape.resources
        if self.learned_bytes <= asked.memory_bytes:
            return asked
        return msgspec.structs.replace(asked, memory_bytes=memory_class(self.learned_bytes))


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says of itself when it registers.

    `cpus` and `host_memory_bytes` are its host's, which other nodes may share; 0: not known. `group` is the autoscaler's,
    empty: none. `machine` is the same for all nodes that may see the same devices, in containers too; empty: the hostname
    stands for it. `labels` are the operator's.
    """

    hostname: str
    pid: int
    source: str
    version: str
    devices: tuple[Device, ...] = ()
    reserve_bytes: int = 0
    slots_max: int = 64
    cpus: int = 0
    metrics_url: str = ""
    group: str = ""
    machine: str = ""
    host_memory_bytes: int = 0
    labels: Labels = ()


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device as its agent last saw it, with what each slot uses. Memory is that of its pool, where it shares one.

    Attributes:
        used_bytes: memory in use by anybody.
        foreign_bytes: of that, by processes that are no slot of ours; where pids cannot be matched, what is used above
            the leases.
        slots: bytes by slot id.
        healthy: False takes the device out of placement; `problem` says why.
    """

    uuid: str
    used_bytes: int
    foreign_bytes: int = 0
    slots: dict[str, int] = {}
    utilisation_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    healthy: bool = True
    problem: str = ""


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the store has it. `beat` only ever changes; who watches it uses a clock of their own.

    `uses` and `address` come from its Dask worker's heartbeat.

    Attributes:
        registered_ms: when this incarnation registered.
        cordon: what it may still take on, who said so (operator, autoscaler or its own agent, which stops), and when.
        deadline_ms: a drain gives running tasks back to the queue then; None: it waits for them.
        remove: once it is empty the agent ends, and is not started again.
    """

    node: str
    incarnation: str
    beat: int
    info: NodeInfo
    fenced: bool = False
    left: bool = False
    uses: tuple[DeviceUse, ...] = ()
    uses_ms: int | None = None
    address: str = ""
    registered_ms: int | None = None
    cordon: Cordon = Cordon.NONE
    cordon_by: str = ""
    cordon_ms: int | None = None
    deadline_ms: int | None = None
    remove: bool = False


class TenantRow(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant with unfinished tasks: what it has at work, and what it may have. A limit of None is none.

    Only slots that have claimed a task are at work: what an idle one leases is not counted.

    Attributes:
        gpus: devices of its slots at work, each slot's counted for itself.
        memory_bytes: what those slots lease on all their devices.
        running: tasks that are claimed.
        active: tasks that are not finished.
        weight: its part where room is short, beside the weights of others.
        vtime_s: device-seconds that it has had, by its weight; None until a leader has seen it.
        retries_per_minute_max: more of them wait for longer.
    """

    tenant: str
    gpus: int = 0
    memory_bytes: int = 0
    running: int = 0
    active: int = 0
    gpus_max: int | None = None
    memory_bytes_max: int | None = None
    running_max: int | None = None
    weight: float = 1.0
    vtime_s: float | None = None
    retries_per_minute_max: int | None = None


class Refusal(msgspec.Struct, frozen=True):
    """A registration that was refused, and is tried again while its agent runs."""

    node: str
    at_ms: int
    problem: str


class ClusterState(msgspec.Struct, frozen=True):
    """One consistent look at everything that is planned with.

    Attributes:
        dask: whether the leader reaches the Dask scheduler; None until it has tried. `dask_ms`: since when.
        mix: of requests, as the scheduler has learned it and the leader heard last.
    """

    now_ms: int
    queues: tuple[QueueRow, ...]
    slots: tuple[SlotRow, ...]
    nodes: tuple[NodeRow, ...]
    refused: tuple[Refusal, ...] = ()
    dask: bool | None = None
    dask_ms: int | None = None
    tenants: tuple[TenantRow, ...] = ()
    mix: Mix = NO_MIX
