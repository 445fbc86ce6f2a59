"""The scheduler plugin: holds slots until they fit, then names their worker and devices. Preload it: ``plugins.scheduler``.

A slot's task is given a worker restriction that no worker meets, so Dask keeps it in its own ``no-worker`` state; when the
ledger has room the restriction becomes the chosen worker's address. Hooks only change the ledger and ask for a pump; all
transitions are started from the pump, which runs in a turn of the event loop of its own. Dask swallows exceptions of hooks,
so each hook is guarded: logged, counted, and GPU work stays held.
"""

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import msgspec
from dask._task_spec import Task
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Recs, Scheduler, TaskState

from manager.core.index import Grant
from manager.core.keys import SLOT_TASK_PREFIX
from manager.core.news import News, decode_news
from manager.core.shapes import Shape
from manager.log import get_logger
from manager.metrics import HOOK_ERRORS, PLACEMENTS, SLOTS
from plugins.ledger import Assignment, Ledger, SlotRequest
from plugins.node.link import Report, decode_beat, decode_report
from plugins.slot import LINK_EXTENSION

SENTINEL: Final = "rocyard-hold://"
"""No worker has this address."""
AGENT_SILENT_S: Final = 1.5
"""A Dask worker whose agent has not answered for this long gets nothing new: saves most that is placed and never opened."""
ALLOWED_FAILURES: Final = 1_000_000
"""Dask's own blame for deaths of workers is switched off: losses of infrastructure blame nobody."""

P = ParamSpec("P")
log = get_logger("rocyard.scheduler")


class GpuAnnotationRefused(RuntimeError):
    """Dask tasks with a gpu annotation are not placed by this version: submit a task over REST, the CLI or rocyard.Client."""


def _refuse(message: str) -> None:
    raise GpuAnnotationRefused(message)


def _guarded(hook: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(hook)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:
            HOOK_ERRORS.labels(hook=hook.__name__).inc()
            log.exception("hook_failed", hook=hook.__name__)

    return call


class PlacementPlugin(SchedulerPlugin):
    """Places slots. One per scheduler."""

    name = "rocyard-placement"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ledger = Ledger()
        self.addresses: dict[str, str] = {}  # node → address of its Dask worker
        self.nodes: dict[str, str] = {}  # address → node
        self.news = News()
        self._pump_asked = False
        scheduler.no_workers_timeout = None  # held work waits for as long as it takes
        scheduler.allowed_failures = ALLOWED_FAILURES
        scheduler.extensions[LINK_EXTENSION] = _Heartbeats(self)
        scheduler.handlers.update(
            rocyard_slots=self.rpc_slots,
            rocyard_lost=self.rpc_lost,
            rocyard_dropped=self.rpc_dropped,
            rocyard_keep=self.rpc_keep,
            rocyard_tell=self.rpc_tell,
        )

    # --- hooks: change the ledger, ask for a pump ---------------------------------------------------------------

    def update_graph(self, scheduler: Scheduler, *, keys: set[Any], annotations: dict[str, dict[Any, Any]], **_: Any) -> None:
        """New tasks: those that want a GPU are held, or refused, before anything can be placed."""
        for key, wanted in (annotations.get("gpu") or {}).items():
            task = scheduler.tasks.get(key)
            if task is None or task.state not in ("released", "waiting", "no-worker"):
                continue
            try:
                self._take(task, key, wanted)
            except Exception:
                HOOK_ERRORS.labels(hook="update_graph").inc()
                log.exception("hook_failed", hook="update_graph", key=str(key))
                _restrict(task, SENTINEL)

    def _take(self, task: TaskState, key: Any, wanted: Any) -> None:
        request = _slot_request(key, wanted)
        if request is None:
            message = str(GpuAnnotationRefused.__doc__)
            task.run_spec = Task(key, _refuse, message)
            task.annotations = {name: value for name, value in (task.annotations or {}).items() if name != "gpu"}
            log.warning("gpu_annotation_refused", key=str(key))
            return
        _restrict(task, SENTINEL)
        self.ledger.ask(request)
        self.ask_pump()

    @_guarded
    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        """A slot's task has moved: hold it again, or forget it. Only its normal end frees the lease."""
        if start == finish or not (isinstance(key, str) and key.startswith(SLOT_TASK_PREFIX)):
            return
        slot_id = key.removeprefix(SLOT_TASK_PREFIX)
        if slot_id not in self.ledger.requests:
            return  # somebody's own task that is called so
        if start == "processing" and finish == "memory":
            self.ledger.ended(slot_id, time.monotonic())
            self.ask_pump()
            return
        task = self.scheduler.tasks.get(key)
        if finish == "forgotten" or task is None:
            self.ledger.forget(slot_id)
        elif start == "processing" and finish in ("released", "waiting", "no-worker"):
            task.suspicious = 0
            _restrict(task, SENTINEL)
            self.ledger.hold(slot_id)
            self.ask_pump()
        elif finish == "erred":
            self.ledger.forget(slot_id)

    @_guarded
    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """A Dask worker registers with the report of its agent. One without a report gets no GPU work."""
        report = decode_report(scheduler.workers[worker].extra.get("rocyard"))
        if report is None:
            log.info("worker_without_devices", worker=worker)
            return
        self.addresses[report.node] = worker
        self.nodes[worker] = report.node
        self.ledger.register(report, time.monotonic())
        _log_registration(report, worker)
        self.ask_pump()

    @_guarded
    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """A Dask worker is gone. Leases stay: the slots live on in the agent."""
        node = self.nodes.pop(worker, None)
        if node is not None and self.addresses.get(node) == worker:
            del self.addresses[node]
            self.ledger.unreachable(node)
            log.info("worker_gone", node=node, worker=worker)

    @_guarded
    def log_event(self, topic: str, msg: Any) -> None:
        """The only sign that a worker has become able to take tasks."""
        if isinstance(msg, dict) and msg.get("action") == "worker-status-change" and topic in self.nodes:
            self.ask_pump()

    # --- the pump: the only place that starts transitions --------------------------------------------------------

    def ask_pump(self) -> None:
        """Place what fits, soon and once."""
        if not self._pump_asked:
            self._pump_asked = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_asked = False
        assignments: list[Assignment] = []
        try:
            for node, address in self.addresses.items():
                worker = self.scheduler.workers.get(address)
                if (view := self.ledger.index.nodes.get(node)) is not None:
                    view.reachable = worker is not None and worker in self.scheduler.running
            assignments = self.ledger.decide(time.monotonic())
            recommendations: Recs = {}
            for assignment in assignments:
                self._grant(assignment, recommendations)
            if recommendations:
                self.scheduler.transitions(recommendations, stimulus_id=f"rocyard-place-{time.time()}")
        except Exception:
            HOOK_ERRORS.labels(hook="pump").inc()
            log.exception("hook_failed", hook="pump")
        for assignment in assignments:
            self._verify(assignment)
        self._measure()

    def _grant(self, assignment: Assignment, recommendations: Recs) -> None:
        key = SLOT_TASK_PREFIX + assignment.slot_id
        task = self.scheduler.tasks.get(key)
        address = self.addresses.get(assignment.grant.node)
        if task is None or address is None or task.state not in ("no-worker", "waiting", "released"):
            return
        grant = assignment.grant
        _restrict(task, address)
        # Replaced, not changed: the same dict may belong to other tasks of the graph.
        task.annotations = {
            **(task.annotations or {}),
            "gpu_assigned": {"devices": list(grant.devices), "memory_bytes": grant.memory_bytes, "node": grant.node},
        }
        if task.state == "no-worker":
            recommendations[key] = "processing"

    def _verify(self, assignment: Assignment) -> None:
        """What Dask did not start is held again."""
        key = SLOT_TASK_PREFIX + assignment.slot_id
        task = self.scheduler.tasks.get(key)
        if task is not None and task.state in ("processing", "waiting"):
            PLACEMENTS.labels(result="placed").inc()
            log.info("slot_placed", slot=assignment.slot_id, node=assignment.grant.node, devices=assignment.grant.devices)
            return
        PLACEMENTS.labels(result="returned").inc()
        log.warning("slot_not_taken", slot=assignment.slot_id, state=task.state if task is not None else "forgotten")
        if task is not None:
            _restrict(task, SENTINEL)
        self.ledger.undo(assignment, time.monotonic())
        if task is None:
            self.ledger.forget(assignment.slot_id)

    def _measure(self) -> None:
        SLOTS.labels(status="held").set(len(self.ledger.held))
        SLOTS.labels(status="leased").set(len(self.ledger.index.grants))

    # --- for the controller -----------------------------------------------------------------------------------------

    async def rpc_slots(self) -> dict[str, Any]:
        """Every slot known here, as slot → [state, node] with the states of `Ledger.where`; and each node's address."""
        ledger, now_s = self.ledger, time.monotonic()
        slots: dict[str, list[str]] = {slot: ["leased", grant.node] for slot, grant in ledger.index.grants.items()}
        for slot_id, request in ledger.requests.items():
            grant = ledger.index.grants.get(slot_id)
            slots[slot_id] = [ledger.where(slot_id, now_s), grant.node if grant is not None else request.node]
        return {"slots": slots, "nodes": dict(self.addresses)}

    async def rpc_lost(self, node: str, incarnation: str) -> str:
        """The leader has declared an incarnation dead, and ended its slots in the store."""
        self.ledger.lost(node, incarnation, time.monotonic())
        self.ask_pump()
        return "OK"

    async def rpc_dropped(self, slots: list[str]) -> str:
        """The leader has taken these back before anybody had opened them; an agent that tries will be refused."""
        for slot_id in slots:
            self.ledger.ended(slot_id, time.monotonic())
        keys = [SLOT_TASK_PREFIX + slot_id for slot_id in slots]
        self.scheduler.client_releases_keys(
            keys=[key for key in keys if key in self.scheduler.tasks],
            client="fire-and-forget",
            stimulus_id=f"rocyard-drop-{time.time()}",
        )
        self.ask_pump()
        return "OK"

    async def rpc_keep(self, slots: dict[str, list[Any]]) -> str:
        """Held slot → [node, devices, memory_bytes]: the room that the leader is having cleared for it."""
        grants = {slot: Grant(node, tuple(devices), size) for slot, (node, devices, size) in slots.items()}
        self.ledger.keep(grants, time.monotonic())
        self.ask_pump()
        return "OK"

    async def rpc_tell(self, news: bytes) -> str:
        """What the leader knows from the store."""
        self.news = decode_news(news)
        self.ledger.cordon(frozenset(self.news.cordoned))
        self.ask_pump()
        return "OK"


class _Heartbeats:
    """Receives what the worker plugin sends with each Dask heartbeat."""

    def __init__(self, plugin: PlacementPlugin) -> None:
        self.plugin = plugin

    def heartbeat(self, worker: Any, data: Any) -> None:
        try:
            beat = decode_beat(data.get("beat")) if isinstance(data, dict) else None
            if beat is not None and self.plugin.nodes.get(worker.address) == beat.node:
                silent_s = float(data.get("silent_s", 0))
                self.plugin.ledger.hear(beat, time.monotonic(), heard_s=silent_s, silent=silent_s > AGENT_SILENT_S)
                if self.plugin.ledger.held:
                    self.plugin.ask_pump()
        except Exception:
            HOOK_ERRORS.labels(hook="heartbeat").inc()
            log.exception("hook_failed", hook="heartbeat")


def _restrict(task: TaskState, address: str) -> None:
    """Only there. Host restrictions must go: Dask takes the union of both."""
    task.worker_restrictions = {address}
    task.host_restrictions = None
    task.loose_restrictions = False


def _slot_request(key: Any, wanted: Any) -> SlotRequest | None:
    """The request of a slot's task; None for anybody else's."""
    if not (isinstance(key, str) and key.startswith(SLOT_TASK_PREFIX) and isinstance(wanted, dict)):
        return None
    if wanted.get("slot") != key.removeprefix(SLOT_TASK_PREFIX):
        return None
    return SlotRequest(wanted["slot"], msgspec.json.decode(wanted["shape"], type=Shape), wanted.get("node", ""))


def _log_registration(report: Report, worker: str) -> None:
    log.info(
        "worker_registered",
        node=report.node,
        incarnation=report.incarnation,
        worker=worker,
        devices=len(report.devices),
        slots_adopted=len(report.slots),
    )


async def dask_setup(scheduler: Scheduler) -> None:
    """Preload hook. A second call changes nothing: making the plugin alone would put a second ledger behind the handlers."""
    if PlacementPlugin.name not in scheduler.plugins:
        await scheduler.register_scheduler_plugin(PlacementPlugin(scheduler), idempotent=True)
