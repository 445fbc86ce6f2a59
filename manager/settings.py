"""The one tree of settings: frozen, typed, built once at start and passed down. No other module reads the environment.

`manager.settings_load` reads it from YAML, ``.env`` and ``ROCYARD_…`` variables. Every field is documented in
``config/rocyard.yaml``, and a test keeps the two equal.
"""

from typing import Annotated, Literal

import msgspec

from manager.core.quantities import KIB, MIB

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""A TCP port; 0 takes any free one."""
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_622_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One section: unknown keys are refused."""


class Secret(msgspec.Struct, frozen=True):
    """A value that never shows itself: its text is ``***``."""

    value: str = ""

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


class StoreSettings(_Section, frozen=True):
    """Redis or Valkey, at least 7.0. With no `url` an embedded server is started."""

    url: Secret = Secret()
    worker_url: Secret = Secret()
    host: str = "127.0.0.1"
    port: Port = 0
    deadline_s: Seconds = 3.0
    cluster: str = ""


class TlsSettings(_Section, frozen=True):
    """Mutual TLS between all processes: one folder of certificates, as ``rocyard certs`` makes it. Empty: none."""

    directory: str = ""


class ApiSettings(_Section, frozen=True):
    """The REST API. `key` is one more admin key, fixed by whoever runs the cluster."""

    host: str = "127.0.0.1"
    port: Port = 8000
    key: Secret = Secret()
    body_bytes_max: Bytes = MIB
    args_bytes_max: Bytes = 256 * KIB
    wait_s_max: Seconds = 60.0
    key_cache_s: Seconds = 2.0


class DaskSettings(_Section, frozen=True):
    """The Dask scheduler and its dashboard."""

    host: str = "127.0.0.1"
    port: Port = 8786
    dashboard_port: Port = 8787
    worker_threads: Count = 4


class ControllerSettings(_Section, frozen=True):
    """The controller: how often it looks, and how long a leader's term outlives its silence."""

    period_s: Seconds = 2.0
    term_s: Seconds = 10.0
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0


class NodeSettings(_Section, frozen=True):
    """A node agent and its devices."""

    name: str = ""
    group: str = ""
    labels: dict[str, str] = {}
    host: str = ""
    devices: Literal["auto", "amd", "nvidia", "simulated"] = "auto"
    simulate: str = "2x2:mi300x"
    simulated_node: Annotated[int, msgspec.Meta(ge=0)] = 0
    reserve_bytes: Bytes = 512 * MIB
    memory_ratio_max: Ratio = 1.0
    slots_max: Count = 64
    registration_s: Seconds = 60.0
    stop_drain_s: Annotated[float, msgspec.Meta(ge=0, le=31_622_400)] = 0.0
    beat_s: Seconds = 3.0
    lease_beats: Count = 4
    probe_s: Seconds = 2.0
    probe_deadline_s: Seconds = 2.0
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0


class SlotSettings(_Section, frozen=True):
    """How many slots, and how long they stay."""

    drain_target_s: Seconds = 1.0
    idle_s: Seconds = 60.0
    idle_per_node_max: Count = 64
    residence_s: Seconds = 1.0
    slots_per_shape_max: Count = 10_000
    open_deadline_s: Seconds = 20.0
    executor_crashes_max: Count = 5


class PlacementSettings(_Section, frozen=True):
    """How a place is chosen of all that fit: a policy by name (`manager.policies`); and who has room kept for it."""

    policy: str = "fragmentation"
    reserve_after_s: Seconds = 5.0


class TaskSettings(_Section, frozen=True):
    """Limits of one task, how it gets its turn, and how long its record is kept."""

    time_limit_s: Seconds = 3600.0
    time_limit_s_max: Seconds = 604_800.0
    grace_s: Seconds = 2.0
    result_bytes_max: Bytes = 256 * MIB
    log_bytes_max: Bytes = 64 * KIB
    retention_s: Seconds = 86_400.0
    retained_max: Count = 200_000
    ageing_s: Annotated[float, msgspec.Meta(ge=0, le=31_622_400)] = 600.0
    preempt_s: Annotated[float, msgspec.Meta(ge=0, le=31_622_400)] = 30.0


class ResultSettings(_Section, frozen=True):
    """Where results lie that are too large for the store, and checkpoints: a folder that all machines share, or another URL."""

    url: str = ""
    inline_bytes_max: Bytes = 256 * KIB


class TenantSettings(_Section, frozen=True):
    """What one tenant may have at once, its part where room is short, and how long its tasks are kept.

    A limit of 0 is none; a retention of 0 is that of `tasks`.
    """

    active_tasks_max: Count = 100_000
    running_tasks_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    gpus_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    memory_bytes_max: Bytes = 0
    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0
    retries_per_minute_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 600
    retention_s: Annotated[float, msgspec.Meta(ge=0, le=31_622_400)] = 0.0
    retained_max: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0


class GroupSettings(_Section, frozen=True, kw_only=True):
    """A kind of node that the autoscaler can add and remove.

    `devices` is what one of its nodes has, as ``COUNT:MODEL``; `workload` names what a provider scales, where it scales
    something: ``statefulset/NAME`` with Kubernetes. `labels` are those of its nodes.
    """

    provider: Literal["local", "kubernetes"] = "local"
    devices: str
    workers_min: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    workers_max: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 10
    namespace: str = "default"
    workload: str = ""
    labels: dict[str, str] = {}


class AutoscalerSettings(_Section, frozen=True):
    """The autoscaler: what it reads, how it decides, and which groups of nodes it may change."""

    mode: Literal["active", "shadow", "off"] = "active"
    period_s: Seconds = 5.0
    prometheus_url: str = ""
    metrics_stale_s: Seconds = 20.0
    drain_target_s: Seconds = 30.0
    up_window_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    down_window_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 120.0
    tolerance: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    step_up_max: Count = 4
    step_down_max: Count = 4
    workers_max: Count = 1000
    backoff_s: Seconds = 10.0
    backoff_s_max: Seconds = 300.0
    term_s: Seconds = 15.0
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0


class LogSettings(_Section, frozen=True):
    """Structured logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class FunctionSettings(_Section, frozen=True):
    """One registered function.

    `target` is ``module:callable``; `python` the interpreter of its executor (empty: the agent's own), which needs only
    msgspec; `path` is put on its import path. `memory` to `model` are what a task of it asks for, written as in a request;
    `architecture` has commas between names.
    """

    target: str
    memory: str = "1GiB"
    gpus: Count = 1
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    architecture: str = ""
    device_model: str = ""
    labels: dict[str, str] = {}
    cpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    host_memory: str = ""
    exclusive: bool = False
    model: str = ""
    time_limit_s: Seconds | None = None
    python: str = ""
    path: str = ""
    max_tasks_per_slot: Annotated[int, msgspec.Meta(ge=0)] = 0


class Settings(_Section, frozen=True):
    """Everything that can be set."""

    data_dir: str = "~/.rocyard"
    store: StoreSettings = StoreSettings()
    tls: TlsSettings = TlsSettings()
    api: ApiSettings = ApiSettings()
    dask: DaskSettings = DaskSettings()
    controller: ControllerSettings = ControllerSettings()
    node: NodeSettings = NodeSettings()
    slots: SlotSettings = SlotSettings()
    placement: PlacementSettings = PlacementSettings()
    tasks: TaskSettings = TaskSettings()
    results: ResultSettings = ResultSettings()
    tenant: TenantSettings = TenantSettings()
    tenants: dict[str, TenantSettings] = {}
    autoscaler: AutoscalerSettings = AutoscalerSettings()
    groups: dict[str, GroupSettings] = {}
    log: LogSettings = LogSettings()
    functions: dict[str, FunctionSettings] = {}
