"""What the REST API gives, as values, and how a record becomes one. The API and the Python client both use these.

Owns the names of JSON fields. Memory is integer bytes (``*_bytes``), times are ISO-8601 in UTC (``*_at``), durations are
seconds (``*_s``). Answers may gain fields; who reads them must not mind. Long, since each answer is a struct of its own.
"""

import datetime as dt
import enum
from typing import Annotated

import msgspec

from manager.core.lifecycle import AfterFailed, TaskStatus
from manager.core.model import TaskError, TaskRecord
from manager.core.quantities import KIB
from manager.core.requests import KeyScope
from manager.core.shapes import Resources

AnyJson = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={})]
"""Any JSON, undecoded. (As one of a union, msgspec would not take it.)"""
Time = Annotated[dt.datetime, msgspec.Meta(tz=True)]
TaskId = Annotated[str, msgspec.Meta(description="26 characters, 0-9 and a-z; sorts by the time it was made.")]


def no_result() -> msgspec.Raw:
    """JSON's null."""
    return msgspec.Raw(b"null")


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


class ResourcesView(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked for of one node; what is not, is left out.

    Attributes:
        memory_bytes: on each device.
        gpus: how many devices.
        share: of the compute of each device, 0 to 1.
        architecture: of which each device must have one.
        device_model: what its model must be called.
        labels: what the node's labels must be.
        cpus, host_memory_bytes: of the node.
        exclusive: nobody else may have anything on the devices.
        model: what should be loaded already.
    """

    memory_bytes: int
    gpus: int = 1
    share: float = 0  # no 0.0: a default is left out where it is the same object
    architecture: tuple[str, ...] = ()
    device_model: str = ""
    labels: dict[str, str] = {}
    cpus: float = 0
    host_memory_bytes: int = 0
    exclusive: bool = False
    model: str = ""


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


class FunctionView(msgspec.Struct, frozen=True, kw_only=True):
    """A function that tasks may name.

    Attributes:
        resources: what a task of it asks for unless it says otherwise.
        schema: JSON Schema of its arguments; null where it cannot be used.
        problem: why it cannot be used at the moment, else empty.
    """

    name: str
    description: str
    memory_bytes: int
    gpus: int
    resources: ResourcesView | None = None
    time_limit_s: float
    schema: AnyJson = msgspec.field(default_factory=no_result)
    problem: str = ""


class FunctionList(msgspec.Struct, frozen=True):
    """All functions, by name."""

    functions: tuple[FunctionView, ...]


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the cluster sees it.

    Attributes:
        usable_bytes: what an empty device could promise: its memory without the reserve.
        leased_bytes: promised to slots.
        foreign_bytes: used by processes that are none of ours.
        free_bytes: what can be promised now; negative where others took what was promised.
        share_leased: of its compute, 0 to 1, to slots that asked for a share.
        exclusive: whether a slot has it for itself.
        partition: which part of a physical device it is; empty: a whole one.
        pool: names the memory that it shares with other devices of the node, of which the figures are then; empty: its own.
        used_bytes: in use by anybody; null without a reading.
    """

    uuid: str
    index: int
    vendor: str
    model: str
    architecture: str
    memory_bytes: int
    usable_bytes: int
    leased_bytes: int
    foreign_bytes: int
    free_bytes: int
    share_leased: float = 0.0
    exclusive: bool = False
    partition: str = ""
    pool: str = ""
    used_bytes: int | None = None
    utilisation_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    healthy: bool = True
    problem: str = ""


class WorkerState(enum.StrEnum):
    """How a node is doing."""

    LIVE = "live"
    REGISTERING = "registering"  # its agent beats, its Dask worker has not reported yet
    NO_WORKER = "no_worker"  # nor has it within node.registration_s: the node failed to register
    CORDONED = "cordoned"  # takes no new slots; those that are open go on
    DRAINING = "draining"  # and those that are open end at their next task boundary
    DRAINED = "drained"  # none is left
    SILENT = "silent"  # its agent has not beaten for a lease
    LOST = "lost"  # the leader has declared it lost
    LEFT = "left"  # its agent stopped cleanly


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A node with its agent, its Dask worker and its devices.

    Attributes:
        source: what its devices are: amd, nvidia or simulated.
        readings_age_s: how old what is said of its devices is; null without readings.
        group: of the autoscaler; empty: none.
        labels: the operator's.
        cpus, host_memory_bytes: of its host; 0: not known.
        cpus_leased, host_leased_bytes: of these, to slots that asked for them.
        cordon: what it may not take on: empty, ``cordon`` (new slots), ``drain`` (open ones end too).
        cordoned_by: ``operator``, ``autoscaler``, or ``agent``: it is being stopped.
        deadline_at: when a drain gives running tasks back to the queue; null: it waits for them.
        remove: whether it goes for good once it is drained.
    """

    node: str
    state: WorkerState
    hostname: str
    source: str
    version: str
    slots: int
    tasks_running: int
    readings_age_s: float | None = None
    devices: tuple[DeviceView, ...] = ()
    group: str = ""
    labels: dict[str, str] = {}
    cpus: int = 0
    host_memory_bytes: int = 0
    cpus_leased: float = 0.0
    host_leased_bytes: int = 0
    cordon: str = ""
    cordoned_by: str = ""
    cordoned_at: Time | None = None
    deadline_at: Time | None = None
    remove: bool = False


class WorkerList(msgspec.Struct, frozen=True):
    """All nodes, by name."""

    workers: tuple[WorkerView, ...]


class TaskCounts(msgspec.Struct, frozen=True):
    """Tasks of all tenants by status; final ones as long as they are kept."""

    blocked: int = 0
    queued: int = 0
    running: int = 0
    retry_wait: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks of one shape that wait, and the slots that serve them.

    Attributes:
        memory_bytes: what a slot leases on each device: what was asked for, rounded up.
        resources: all that a slot leases.
        oldest_wait_s: since its first task was queued; null where none waits.
        run_s: learned run time of its tasks; null where none has ended.
        slots_warm: how many are to be open although nothing waits.
    """

    shape_id: str
    tenant: str
    memory_bytes: int
    gpus: int
    resources: ResourcesView | None = None
    depth: int
    slots_open: int
    slots_opening: int
    oldest_wait_s: float | None = None
    run_s: float | None = None
    slots_warm: int = 0


class SlotView(msgspec.Struct, frozen=True, kw_only=True):
    """A slot: devices and bytes on one node, leased to one shape.

    Attributes:
        flag: what it was asked to do next: close, drain, preempt, or nothing.
        served: tasks that have ended in it.
        kind: ``direct`` for one that runs a Dask task of somebody who uses Dask directly: it has no shape, and its tenant is
            called ``dask``. Empty for all others.
    """

    slot_id: str
    shape_id: str
    tenant: str
    status: str
    node: str | None
    devices: tuple[str, ...]
    memory_bytes: int
    flag: str
    running: int
    served: int
    open_s: float | None = None
    idle_s: float | None = None
    kind: str = ""


class LeaderView(msgspec.Struct, frozen=True):
    """The controller that leads. `beating` is null until it has been watched for long enough."""

    holder: str
    token: int
    beating: bool | None


class StoreView(msgspec.Struct, frozen=True):
    """The store. Tasks are safe from a power cut only where `fsync` is ``always``."""

    reachable: bool
    fsync: str


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A process that said where it is."""

    name: str
    kind: str
    host: str
    pid: int
    url: str = ""
    metrics_url: str = ""
    version: str = ""


class DependencyState(enum.StrEnum):
    """What is known of a part that others need."""

    OK = "ok"
    UNKNOWN = "unknown"
    DOWN = "down"


class DependencyView(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the cluster that others need.

    Attributes:
        name: store, scheduler, api, controller or autoscaler.
        since_at: since when it was seen so, at the latest.
        detail: in words, where there is something to say.
    """

    name: str
    state: DependencyState
    since_at: Time
    detail: str = ""


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """A group of nodes: what the autoscaler may change.

    Attributes:
        workers: nodes of it that have not left and are not lost.
        starting, draining: how many of them.
        workers_min, workers_max: bounds; null for a group that nodes name and the settings do not.
    """

    name: str
    workers: int
    starting: int
    draining: int
    provider: str = ""
    workers_min: int | None = None
    workers_max: int | None = None


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster at one moment. Queues and slots are those of the key's tenant; an admin sees all.

    Attributes:
        problems: what is wrong, each in one sentence; empty where all is well.
    """

    at: Time
    cluster_id: str
    version: str
    problems: tuple[str, ...]
    tasks: TaskCounts
    queues: tuple[QueueView, ...]
    slots: tuple[SlotView, ...]
    workers: tuple[WorkerView, ...]
    leader: LeaderView
    store: StoreView
    services: tuple[ServiceView, ...]
    dependencies: tuple[DependencyView, ...] = ()
    groups: tuple[GroupView, ...] = ()


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """An API key, without its secret."""

    key_id: str
    tenant: str
    scope: KeyScope
    created_at: Time
    revoked_at: Time | None = None


class KeyCreated(KeyView, frozen=True, kw_only=True):
    """A new API key. `key` is shown this once: only its hash is kept."""

    key: str


class KeyList(msgspec.Struct, frozen=True):
    """All API keys, by id."""

    keys: tuple[KeyView, ...]


class TenantView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant: what it has, what it may have, and its part where room is short. A limit of null is none.

    Attributes:
        tasks_active: not finished: those that wait, run, or are to be tried again.
        gpus: devices of its slots at work, each slot's counted for itself; an idle slot's are not.
        memory_bytes: device memory that these slots lease together.
        weight: with twice the weight it gets twice as much as another, where both want more than there is.
        device_seconds: what it has had, by its weight and beside that of others; null where nothing of it is unfinished.
    """

    tenant: str
    tasks_active: int
    tasks_waiting: int
    tasks_running: int
    gpus: int
    memory_bytes: int
    active_tasks_max: int
    running_tasks_max: int | None
    gpus_max: int | None
    memory_bytes_max: int | None
    weight: float
    device_seconds: float | None


class TenantList(msgspec.Struct, frozen=True):
    """Tenants with unfinished tasks, and those that the settings name, by name."""

    tenants: tuple[TenantView, ...]


class Live(msgspec.Struct, frozen=True):
    """The process answers."""

    status: str = "ok"


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the API can accept tasks that survive a power cut, and what else is true of the cluster.

    Attributes:
        ready: the store is reachable and syncs always. The rest is told, and does not change it: tasks may be accepted
            while no controller leads or no node lives.
        nodes_live: nodes whose agent beats.
    """

    ready: bool
    store: StoreView
    leader_beating: bool | None
    nodes_live: int
    detail: str = ""


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error, as application/problem+json (RFC 9457). Clients match on `code`; more fields may stand beside these.

    Attributes:
        type: a URN that names the kind of error.
        title: that kind in words.
        detail: what was wrong here, and what would be right.
        code: PascalCase name of the kind.
        instance: the path that was asked for.
        retryable: whether the same request may succeed later.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str
    retryable: bool = False


def utc(ms: int) -> dt.datetime:
    """A time of the store's clock, in milliseconds, as UTC."""
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def utc_or_none(ms: int | None) -> dt.datetime | None:
    """As `utc`, where there is a time."""
    return None if ms is None else dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def resources_view(resources: Resources) -> ResourcesView:
    """What was asked for, as people read it."""
    return ResourcesView(
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        share=resources.share_milli / 1000 or 0,
        architecture=resources.architectures,
        device_model=resources.device_model,
        labels=dict(resources.labels),
        cpus=resources.cpu_milli / 1000 or 0,
        host_memory_bytes=resources.host_memory_bytes,
        exclusive=resources.exclusive,
        model=resources.model,
    )


def resources_in(view: ResourcesView) -> Resources:
    """What `view` was made of."""
    return Resources(
        memory_bytes=view.memory_bytes,
        gpus=view.gpus,
        share_milli=round(view.share * 1000),
        architectures=view.architecture,
        device_model=view.device_model,
        labels=tuple(sorted(view.labels.items())),
        cpu_milli=round(view.cpus * 1000),
        host_memory_bytes=view.host_memory_bytes,
        exclusive=view.exclusive,
        model=view.model,
    )


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


class JoinStore(msgspec.Struct, frozen=True):
    """Where the store listens, with passwords. `worker_url` is empty where Dask workers have no user of their own."""

    url: str
    worker_url: str
    deadline_s: float


class JoinDask(msgspec.Struct, frozen=True):
    """Where the Dask scheduler listens."""

    host: str
    port: int
    worker_threads: int


class JoinLimits(msgspec.Struct, frozen=True):
    """Settings that are the same on all nodes of a cluster.

    Attributes:
        results_url: where larger results go; empty: the cluster keeps them on its own machine.
    """

    beat_s: float
    lease_beats: int
    executor_crashes_max: int
    grace_s: float
    result_bytes_max: int
    log_bytes_max: int
    inline_bytes_max: int = 256 * KIB
    results_url: str = ""


class JoinView(msgspec.Struct, frozen=True):
    """What a node agent on another machine needs. A host that means every address stands for the one that was called."""

    version: str
    store: JoinStore
    dask: JoinDask
    limits: JoinLimits


class ScalingGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One group in a decision of the autoscaler.

    Attributes:
        need: nodes that it should have, by the metrics; null where they are not known.
        truth: the same from the queue itself, where that was looked up.
        size: nodes that there are, those that start included.
        starting, busy, draining: how many of them.
        target: how many it is brought to.
        reason: why something is done, or nothing.
        blocked_s: no nodes are added for so long, for `blocked_reason`.
    """

    group: str
    need: int | None
    truth: int | None = None
    size: int
    starting: int = 0
    busy: int = 0
    draining: int = 0
    target: int
    reason: str
    blocked_s: float = 0.0
    blocked_reason: str = ""


class ScalingAction(msgspec.Struct, frozen=True):
    """What was done: `action` is add, drain, uncordon or remove; `result` is done, shadow, or what went wrong."""

    action: str
    group: str
    names: tuple[str, ...]
    reason: str
    result: str


class DecisionNote(msgspec.Struct, frozen=True, kw_only=True):
    """A decision of the autoscaler with what it knew, as it lies in its journal.

    Attributes:
        metrics: why the metrics were not believed; empty where they were.
        infeasible: waiting tasks that no node could ever hold, by reason.
        repeats: how many decisions before this one were like the one before it, and were not written.
    """

    mode: str
    metrics: str
    groups: tuple[ScalingGroup, ...]
    actions: tuple[ScalingAction, ...]
    infeasible: dict[str, int] = {}
    repeats: int = 0


class DecisionView(DecisionNote, frozen=True, kw_only=True):
    """A decision of the autoscaler, as the API shows it."""

    id: str
    at: Time


class DecisionList(msgspec.Struct, frozen=True):
    """Decisions, newest first. `next_cursor` leads on to older ones; null: there are none."""

    decisions: tuple[DecisionView, ...]
    next_cursor: str | None


class GroupBounds(msgspec.Struct, frozen=True, kw_only=True):
    """A group as the settings have it."""

    name: str
    provider: str
    devices: str
    workers_min: int
    workers_max: int


class AutoscalerView(msgspec.Struct, frozen=True):
    """The autoscaler: what it may do, and what it decided last."""

    mode: str
    groups: tuple[GroupBounds, ...]
    last: DecisionView | None


class WarmView(msgspec.Struct, frozen=True):
    """Slots that are kept open although nothing waits for them, until then."""

    shape_id: str
    memory_bytes: int
    gpus: int
    slots: int
    until_at: Time


class Unloaded(msgspec.Struct, frozen=True):
    """Idle slots that close now. One that is busy stays until it has been idle for long enough by itself."""

    shapes: int
    slots: int
