"""The worker plugin: reports devices and that this Dask worker lives, and refuses GPU work that nobody placed.

It asks the agent, which alone probes. What it learns goes to the scheduler (as Dask metrics and with each heartbeat) and to
the store as the worker's heartbeat: the one key that a Dask worker may write.
"""

import asyncio
import os
import time
from typing import Any, Final

from dask._task_spec import Task
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.worker import Worker
from distributed.worker_state_machine import UnpauseEvent

from manager.core.errors import StoreUnavailable
from manager.core.gpu_tasks import GPU_ANNOTATION
from manager.core.model import DeviceUse
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS
from manager.store import Store
from plugins.gpu_executor import CLOSED_TOPIC, GPU_EXECUTOR, GpuExecutor
from plugins.gpu_metrics import attach_gpu_metrics
from plugins.node.link import AgentLink, Beat, LinkBroken, Report, encode_report
from plugins.slot import END_DIRECT_OP, LINK_EXTENSION, GpuWorkNotPlaced, assigned_of

REPORT_DEADLINE_S: Final = 5.0
BEAT_DEADLINE_S: Final = 1.0
FIRST: Final[Any] = float("-inf")
"""Before every priority that Dask gives."""
REGISTERING_PAUSE_S: Final = 0.05
NO_REPORT_EXIT: Final = 70
"""Exit status of a worker that cannot report: without one it must not register, and Dask swallows our exception."""

log = get_logger("rocyard.worker")


def _refuse_unplaced() -> None:
    raise GpuWorkNotPlaced(GpuWorkNotPlaced.__doc__)


class RocyardWorkerPlugin(WorkerPlugin):
    """One per Dask worker. Holds the agent's last news for Dask's metrics and heartbeats.

    Args:
        link: to the agent.
        store: with the worker's own rights; None where the worker was given none.
        node: the node's name.
        period_s: seconds between two beats.
    """

    name = "rocyard-worker"

    def __init__(self, link: AgentLink, store: Store | None, node: str, period_s: float) -> None:
        self.link = link
        self.store = store
        self.node = node
        self.period_s = period_s
        self.beat: Beat | None = None
        self.answered_s = time.monotonic()
        self.worker: Worker | None = None
        self._beating: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def setup(self, worker: Worker) -> None:
        """Start to beat."""
        self.worker = worker
        self._beating = asyncio.get_running_loop().create_task(self._beat_forever(worker))

    def teardown(self, worker: Worker) -> None:
        """Stop to beat."""
        if self._beating is not None:
            self._beating.cancel()

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """GPU work without a grant fails here, whatever the scheduler was thinking. That with a grant waits for no thread."""
        if self.worker is None or finish not in ("ready", "executing", "constrained"):
            return
        task = self.worker.state.tasks.get(key)
        if task is None or not task.annotations or GPU_ANNOTATION not in task.annotations:
            return
        if assigned_of(task.annotations) is None:
            task.run_spec = Task(key, _refuse_unplaced)
            task.annotations = {name: value for name, value in task.annotations.items() if name != "executor"}
            log.error("gpu_work_refused", key=str(key), reason="NotPlaced")
            return
        if task.annotations.get("executor") == GPU_EXECUTOR and task.run_spec is not None:
            # Dask's memory of whether the function is a coroutine's: it would run such a one here, and not on the device.
            setattr(task.run_spec, "_is_coro", False)  # noqa: B010
        if finish == "ready" and task.state == "ready":
            asyncio.get_running_loop().call_soon(self._start_now, key)

    def _start_now(self, key: Any) -> None:
        """Have Dask begin a task that is ready, although all threads are busy: GPU work needs none.

        Without this a lease would wait, unused, for the end of somebody's long CPU task. The task goes to the front, and
        for one look at what is ready there is one thread more.
        """
        worker = self.worker
        task = worker.state.tasks.get(key) if worker is not None else None
        if worker is None or task is None or task.state != "ready" or not worker.state.running:
            return
        assert task.priority is not None
        state = worker.state
        state.ready.discard(task)
        task.priority = (FIRST, *task.priority[1:])
        state.ready.add(task)
        threads, state.nthreads = state.nthreads, len(state.executing) + 1
        try:
            worker.handle_stimulus(UnpauseEvent(stimulus_id=f"rocyard-start-{time.time()}"))
        finally:
            state.nthreads = threads

    def end_direct(self, slot_id: str) -> None:
        """The scheduler lets go of a GPU task: have its slot ended, and say so when nothing is left of it."""
        task = asyncio.get_running_loop().create_task(self._end_direct(slot_id))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end_direct(self, slot_id: str) -> None:
        try:
            await self.link.end_direct(slot_id)
        except LinkBroken as error:  # the agent is gone, and the slot with it: the next registration says so
            log.warning("end_not_asked", slot=slot_id, error=str(error))
        else:
            if self.worker is not None:
                self.worker.log_event(CLOSED_TOPIC, {"slots": [slot_id]})

    async def report(self, _: Worker) -> bytes:
        """What the worker registers with. It ends the process rather than register without."""
        try:
            report: Report = await self.link.report(REPORT_DEADLINE_S)
        except LinkBroken as error:
            log.error("worker_has_no_report", error=str(error))
            os._exit(NO_REPORT_EXIT)
        self.answered_s = time.monotonic()
        return encode_report(report)

    def heartbeat(self) -> dict[str, Any]:
        """Travels with each of Dask's heartbeats, to the extension of the same name at the scheduler."""
        silent_s = time.monotonic() - self.answered_s
        return {"silent_s": silent_s} if self.beat is None else {"beat": encode_report(self.beat), "silent_s": silent_s}

    def uses(self) -> tuple[DeviceUse, ...]:
        """The devices at the agent's last reading."""
        return self.beat.uses if self.beat is not None else ()

    async def _beat_forever(self, worker: Worker) -> None:
        # A worker that has not registered can run nothing, however well it is otherwise: it does not count as alive.
        while worker.status is Status.init:  # noqa: ASYNC110 -- Dask tells nobody when a worker has registered
            await asyncio.sleep(REGISTERING_PAUSE_S)
        while True:
            try:
                self.beat = await self.link.beat(worker.address, BEAT_DEADLINE_S)
                self.answered_s = time.monotonic()
                if self.store is not None:
                    await self.store.put_heartbeat(self.node, worker.address, self.beat.uses)
            except (LinkBroken, StoreUnavailable) as error:
                log.warning("beat_failed", error=str(error))
            except Exception:
                LOOP_ERRORS.labels(loop="worker_beat").inc()
                log.exception("loop_failed", loop="worker_beat")
            await asyncio.sleep(self.period_s)


class LinkExtension:
    """What the slot's task and Dask's heartbeat find under ``worker.extensions``."""

    def __init__(self, plugin: RocyardWorkerPlugin) -> None:
        self.link = plugin.link
        self.plugin = plugin

    def heartbeat(self) -> dict[str, Any]:
        """Called by Dask for each of its heartbeats."""
        return self.plugin.heartbeat()


def attach(worker: Worker, plugin: RocyardWorkerPlugin) -> None:
    """Give `worker`, which has not started yet, its report, its extension and its device metrics."""
    worker.startup_information["rocyard"] = plugin.report
    worker.extensions[LINK_EXTENSION] = LinkExtension(plugin)
    worker.executors[GPU_EXECUTOR] = GpuExecutor(worker, plugin.link)
    worker.stream_handlers[END_DIRECT_OP] = plugin.end_direct
    attach_gpu_metrics(worker, plugin)
