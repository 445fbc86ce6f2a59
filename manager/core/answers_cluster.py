"""What the REST API gives of the cluster as a whole: how it is doing, and its parts. See `answers`."""

import enum

import msgspec

from manager.core.answers import Time
from manager.core.answers_nodes import WorkerView
from manager.core.answers_slots import QueueView, SlotView


class TaskCounts(msgspec.Struct, frozen=True):
    """Tasks of all tenants by status; final ones as long as they are kept."""

    blocked: int = 0
    queued: int = 0
    running: int = 0
    retry_wait: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


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
