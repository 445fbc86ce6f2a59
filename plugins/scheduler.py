"""The scheduler plugin: holds slots until they fit, then names their worker and devices. Preload it: ``plugins.scheduler``.

A slot's task is given a worker restriction that no worker meets, so Dask keeps it in its own ``no-worker`` state; when the
ledger has room the restriction becomes the chosen worker's address. So it is with tasks that people annotate with ``gpu``
(`plugins.direct_tasks`), each of which gets a slot of its own for each run. Hooks only change the ledger and ask for a pump;
all transitions are started from the pump, which runs in a turn of the event loop of its own. Dask swallows exceptions of
hooks, so each hook is guarded: logged, counted, and GPU work stays held.
"""

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import msgspec
from distributed.comm.addressing import get_address_host
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Recs, Scheduler, TaskState

from manager.core.gpu_tasks import GPU_ANNOTATION, GpuExplanation
from manager.core.keys import SLOT_TASK_PREFIX
from manager.core.lifecycle import SlotKind
from manager.core.news import News, decode_news
from manager.core.placement import Policy
from manager.core.policies import DEFAULT_POLICY
from manager.core.shapes import Grant, Resources, Shape
from manager.log import get_logger
from manager.metrics import HOOK_ERRORS, PLACEMENTS, RESERVATIONS, SLOTS
from plugins.direct_tasks import DirectTask, DirectTasks
from plugins.gpu_executor import CLOSED_TOPIC
from plugins.ledger import RESERVE_AFTER_S, Assignment, Ledger, SlotRequest
from plugins.node.link import Report, decode_beat, decode_report
from plugins.slot import ASSIGNED, END_DIRECT_OP, LINK_EXTENSION, Assigned, assignment_of

SENTINEL: Final = "rocyard-hold://"
"""No worker has this address."""
AGENT_SILENT_S: Final = 1.5
"""A Dask worker whose agent has not answered for this long gets nothing new: saves most that is placed and never opened."""
ALLOWED_FAILURES: Final = 1_000_000
"""Dask's own blame for deaths of workers is switched off: losses of infrastructure blame nobody."""
SIZES_MAX: Final = 100
"""Sizes of Dask tasks that wait, told to the controller: those with the most tasks."""

P = ParamSpec("P")
log = get_logger("rocyard.scheduler")

# Looked up once: a label costs as much as the rest of what a pump measures.
_HELD: Final = SLOTS.labels(status="held")
_LEASED: Final = SLOTS.labels(status="leased")
_PLACED: Final = PLACEMENTS.labels(result="placed")


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
    """Places slots, and Dask tasks that want a GPU. One per scheduler.

    Args:
        scheduler: whose tasks they are.
        policy: says which of all places that fit is best.
        reserve_after_s: a Dask task that has waited for longer, while others passed it, has room kept for it.
    """

    name = "rocyard-placement"

    def __init__(self, scheduler: Scheduler, policy: Policy = DEFAULT_POLICY, reserve_after_s: float = RESERVE_AFTER_S) -> None:
        self.scheduler = scheduler
        self.ledger = Ledger(policy, reserve_after_s)
        self.direct = DirectTasks()
        self.addresses: dict[str, str] = {}  # node → address of its Dask worker
        self.nodes: dict[str, str] = {}  # address → node
        self.news = News()
        self._log = log.bind()  # made once: what logs each placement need not make a logger for each
        self._pump_asked = False
        self._restless: set[str] = set()  # nodes whose Dask workers have begun or stopped taking tasks since the last pump
        self._reserved: dict[str, Grant] = {}  # as of the last pump
        scheduler.no_workers_timeout = None  # held work waits for as long as it takes
        scheduler.allowed_failures = ALLOWED_FAILURES
        scheduler.extensions[LINK_EXTENSION] = _Heartbeats(self)
        scheduler.handlers.update(
            rocyard_slots=self.rpc_slots,
            rocyard_lost=self.rpc_lost,
            rocyard_dropped=self.rpc_dropped,
            rocyard_keep=self.rpc_keep,
            rocyard_tell=self.rpc_tell,
            rocyard_explain_direct=self.rpc_explain_direct,
        )

    # --- hooks: change the ledger, ask for a pump ---------------------------------------------------------------

    def update_graph(self, scheduler: Scheduler, *, keys: set[Any], annotations: dict[str, dict[Any, Any]], **_: Any) -> None:
        """New tasks: those that want a GPU are held, or refused, before anything can be placed."""
        for key, wanted in (annotations.get(GPU_ANNOTATION) or {}).items():
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
        request = _slot_request(task, wanted)
        if request is not None:
            self.ledger.ask(request, time.monotonic())
            self.ask_pump()
        elif self.direct.take(task, wanted) is None:
            log.warning("gpu_annotation_refused", key=str(key))
            return
        _restrict(task, SENTINEL)  # a task that may run already is told us as `no-worker` in a moment

    @_guarded
    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        """A slot's task has moved: hold it again, or forget it. Only its normal end frees the lease."""
        if start == finish:
            return
        if (direct := self.direct.by_key.get(key)) is not None:
            self._direct_moved(direct, start, finish)
            return
        if not (isinstance(key, str) and key.startswith(SLOT_TASK_PREFIX)):
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
            self.ledger.hold(slot_id, time.monotonic())
            self.ask_pump()
        elif finish == "erred":
            self.ledger.forget(slot_id)

    def _direct_moved(self, direct: DirectTask, start: str, finish: str) -> None:
        """A task of somebody's has moved. It has a slot while it is ``no-worker`` or ``processing``, and another each time.

        Only a result frees the lease here: Dask tells of it when the agent has closed the slot. After any other end the
        agent is asked to end the slot, and the lease ends with its answer.
        """
        task = self.scheduler.tasks.get(direct.key)
        if start in ("processing", "no-worker") and finish != "processing":
            slot_id = self.direct.release(direct, task)
            if start == "processing" and finish == "memory":
                self.ledger.ended(slot_id, time.monotonic())
            else:
                self.ledger.forget(slot_id)
                self._end_on_node(slot_id)
            if task is not None:
                task.suspicious = 0
                _restrict(task, SENTINEL)
            self.ask_pump()
        if finish == "no-worker" and task is not None:
            self.ledger.ask(self.direct.want(direct, task), time.monotonic())
            self.ask_pump()
        elif finish == "forgotten":
            del self.direct.by_key[direct.key]

    def _end_on_node(self, slot_id: str) -> None:
        """Nobody wants what runs in this slot, if it does. A worker that is gone has ended it by that."""
        grant = self.ledger.index.grants.get(slot_id)
        address = self.addresses.get(grant.node) if grant is not None else None
        if address is not None and address in self.scheduler.stream_comms:
            self.scheduler.worker_send(address, {"op": END_DIRECT_OP, "slot_id": slot_id})

    @_guarded
    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """A Dask worker registers with the report of its agent. One without a report gets no GPU work."""
        report = decode_report(scheduler.workers[worker].extra.get("rocyard"))
        if report is None:
            log.info("worker_without_devices", worker=worker)
            return
        if self.ledger.is_outdated(report):
            log.warning("worker_replaced", node=report.node, worker=worker, generation=report.generation)
            return
        self.addresses[report.node] = worker
        self.nodes[worker] = report.node
        self.ledger.register(report, time.monotonic(), names=(worker, get_address_host(worker)))
        self._restless.add(report.node)
        _log_registration(report, worker)
        self.ask_pump()

    @_guarded
    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """A Dask worker is gone. Leases stay: the slots live on in the agent."""
        node = self.nodes.pop(worker, None)
        if node is not None and self.addresses.get(node) == worker:
            del self.addresses[node]
            self.ledger.unreachable(node, time.monotonic())
            log.info("worker_gone", node=node, worker=worker)

    @_guarded
    def log_event(self, topic: str, msg: Any) -> None:
        """A worker takes tasks from now on, or no more (there is no other sign of that), or says that slots have ended."""
        if topic == CLOSED_TOPIC and isinstance(msg, dict):
            requests = self.ledger.requests
            mine = [s for s in msg["slots"] if s not in requests or requests[s].kind is SlotKind.DIRECT]
            self.ledger.closed(mine, time.monotonic())
            self.ask_pump()
        elif isinstance(msg, dict) and msg.get("action") == "worker-status-change" and topic in self.nodes:
            self._restless.add(self.nodes[topic])  # Dask notes the new status after it has told us
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
            while self._restless:
                self._see_status(self._restless.pop())
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

    def _see_status(self, node: str) -> None:
        """A worker that closes, or is paused, takes no tasks: nothing is placed there."""
        worker = self.scheduler.workers.get(self.addresses.get(node, ""))
        if worker is not None:
            self.ledger.index.mark(node, reachable=worker in self.scheduler.running)

    def _grant(self, assignment: Assignment, recommendations: Recs) -> None:
        key = self._key_of(assignment.slot_id)
        task = self.scheduler.tasks.get(key)
        address = self.addresses.get(assignment.grant.node)
        if task is None or address is None or task.state not in ("no-worker", "waiting", "released"):
            return
        grant = assignment.grant
        _restrict(task, address)
        # Replaced, not changed: the same dict may belong to other tasks of the graph.
        assigned = assignment_of(Assigned(assignment.slot_id, grant))
        task.annotations = {**(task.annotations or {}), ASSIGNED: assigned}
        if task.state == "no-worker":
            recommendations[key] = "processing"

    def _verify(self, assignment: Assignment) -> None:
        """What Dask did not start is held again."""
        if assignment.slot_id not in self.ledger.requests:
            return  # it has come and gone: a direct task, whose next run has another slot
        key = self._key_of(assignment.slot_id)
        task = self.scheduler.tasks.get(key)
        if task is not None and task.state in ("processing", "waiting"):
            _PLACED.inc()
            grant = assignment.grant
            self._log.info("slot_placed", slot=assignment.slot_id, node=grant.node, devices=grant.devices)
            return
        PLACEMENTS.labels(result="returned").inc()
        log.warning("slot_not_taken", slot=assignment.slot_id, state=task.state if task is not None else "forgotten")
        if task is not None:
            _restrict(task, SENTINEL)
        self.ledger.undo(assignment, time.monotonic())
        if task is None:
            self.ledger.forget(assignment.slot_id)

    def _key_of(self, slot_id: str) -> Any:
        """Dask's key of the slot's task."""
        return self.direct.keys.get(slot_id, SLOT_TASK_PREFIX + slot_id)

    def _measure(self) -> None:
        _HELD.set(len(self.ledger.held))
        _LEASED.set(len(self.ledger.index.grants))
        if self.ledger.reserved != self._reserved:
            self._tell_reserved()

    def _tell_reserved(self) -> None:
        now, before = dict(self.ledger.reserved), self._reserved
        self._reserved = now
        RESERVATIONS.set(len(now))
        for slot_id, grant in now.items():
            if before.get(slot_id) != grant:
                log.info("room_reserved", slot=slot_id, node=grant.node, devices=grant.devices)
        for slot_id in before.keys() - now.keys():
            log.info("reservation_ended", slot=slot_id, placed=slot_id in self.ledger.index.grants)

    # --- for the controller -----------------------------------------------------------------------------------------

    async def rpc_slots(self) -> dict[str, Any]:
        """What the controller compares with the store.

        Returns:
            ``slots``: every slot known here, as slot → [state, node] with the states of `Ledger.where`; of Dask tasks
            only those with a lease. ``nodes``: each node's address. ``direct``: how many Dask tasks wait for room, by
            what they need (`DirectWaiting`). ``mix``: what was learned of requests (`Mix`), where the store has another.
        """
        ledger, now_s = self.ledger, time.monotonic()
        slots: dict[str, list[str]] = {slot: ["leased", grant.node] for slot, grant in ledger.index.grants.items()}
        for slot_id, request in ledger.requests.items():
            grant = ledger.index.grants.get(slot_id)
            if request.kind is SlotKind.TASKS:
                slots[slot_id] = [ledger.where(slot_id, now_s), grant.node if grant is not None else request.node]
            elif grant is not None:
                slots[slot_id] = [ledger.where(slot_id, now_s), grant.node]
        direct = [msgspec.to_builtins(row) for row in ledger.direct_waiting(now_s)[:SIZES_MAX]]
        told = ledger.mix.told
        mix = None if told.revision == self.news.mix_known else msgspec.to_builtins(told)
        return {"slots": slots, "nodes": dict(self.addresses), "direct": direct, "mix": mix}

    async def rpc_lost(self, node: str, incarnation: str) -> str:
        """The leader has declared an incarnation dead, and ended its slots in the store."""
        view = self.ledger.index.nodes.get(node)
        if view is not None and view.incarnation == incarnation:
            # Processes of Dask tasks there have ended, or will as soon as the agent does anything. It may never: others run
            # them now.
            recommendations: Recs = {self.direct.keys[slot]: "released" for slot in view.slots if slot in self.direct.keys}
            self.scheduler.transitions(recommendations, stimulus_id=f"rocyard-lost-{time.time()}")
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

    async def rpc_keep(self, slots: dict[str, Any]) -> str:
        """Held slot → `Grant` as plain values: the room that the leader is having cleared for it."""
        self.ledger.keep(msgspec.convert(slots, dict[str, Grant]), time.monotonic())
        self.ask_pump()
        return "OK"

    async def rpc_tell(self, news: bytes) -> str:
        """What the leader knows from the store."""
        self.news = decode_news(news)
        self.ledger.cordon(frozenset(self.news.cordoned))
        self.ledger.left(self.news.left, time.monotonic())
        self.ledger.mix.resume(self.news.mix)
        self.ask_pump()
        return "OK"

    async def rpc_explain_direct(self, key: Any) -> Any:
        """Why a Dask task is where it is: a `GpuExplanation`, as plain values."""
        return msgspec.to_builtins(self._explain_direct(key))

    def _explain_direct(self, key: Any) -> GpuExplanation:
        task, direct = self.scheduler.tasks.get(key), self.direct.by_key.get(key)
        if task is None or direct is None:
            return GpuExplanation("unknown" if task is None else "plain")
        ledger, slot_id, shape = self.ledger, direct.slot_id, direct.shape
        plain = GpuExplanation(task.state, shape.memory_bytes, shape.gpus, resources=shape.resources)
        if (grant := ledger.index.grants.get(slot_id)) is not None:
            return msgspec.structs.replace(plain, state="placed", slot_id=slot_id, grant=grant)
        if slot_id not in ledger.held:
            return plain
        verdicts = tuple(ledger.verdicts(slot_id))
        return msgspec.structs.replace(plain, state="held", before=ledger.held.before(slot_id), verdicts=verdicts)


class _Heartbeats:
    """Receives what the worker plugin sends with each Dask heartbeat."""

    def __init__(self, plugin: PlacementPlugin) -> None:
        self.plugin = plugin

    def heartbeat(self, worker: Any, data: Any) -> None:
        try:
            node = self.plugin.nodes.get(worker.address)
            if node is None or not isinstance(data, dict):
                return
            beat, silent_s = decode_beat(data.get("beat")), float(data.get("silent_s", 0))
            if beat is not None and beat.node == node:
                self.plugin.ledger.hear(beat, time.monotonic(), heard_s=silent_s, silent=silent_s > AGENT_SILENT_S)
                if self.plugin.ledger.held:
                    self.plugin.ask_pump()
            elif beat is None and silent_s > AGENT_SILENT_S:
                self.plugin.ledger.silent(node)
        except Exception:
            HOOK_ERRORS.labels(hook="heartbeat").inc()
            log.exception("hook_failed", hook="heartbeat")


def _restrict(task: TaskState, address: str) -> None:
    """Only there. Host restrictions must go: Dask takes the union of both."""
    task.worker_restrictions = {address}
    task.host_restrictions = None
    task.loose_restrictions = False


def _slot_request(task: TaskState, wanted: Any) -> SlotRequest | None:
    """The request of a slot's task; None for anybody else's."""
    key = task.key
    if not (isinstance(key, str) and key.startswith(SLOT_TASK_PREFIX) and isinstance(wanted, dict)):
        return None
    if wanted.get("slot") != key.removeprefix(SLOT_TASK_PREFIX):
        return None
    shape = msgspec.json.decode(wanted["shape"], type=Shape)
    learned = msgspec.convert(wanted["resources"], Resources) if "resources" in wanted else None
    assert task.priority is not None
    return SlotRequest(wanted["slot"], shape, wanted.get("node", ""), task.priority, learned=learned)


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
