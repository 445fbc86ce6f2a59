"""What the REST API gives of nodes: each with its agent, its Dask worker and its devices. See `answers`."""

import enum

import msgspec

from manager.core.answers import Time


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
