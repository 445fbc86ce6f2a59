"""The worker plugin: reports devices and that this Dask worker lives, and refuses GPU work that nobody placed.

It asks the agent, which alone probes. What it learns goes to the scheduler (as Dask metrics and with each heartbeat) and to
the store as the worker's heartbeat: the one key that a Dask worker may write.
"""

import asyncio
import os
import time
from typing import Any, Final

from dask._task_spec import Task
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.worker import Worker

from manager.core.errors import StoreUnavailable
from manager.core.model import DeviceUse
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS
from manager.store import Store
from plugins.node.link import AgentLink, Beat, LinkBroken, Report, encode_report
from plugins.slot import LINK_EXTENSION, GpuWorkNotPlaced, assigned_of

REPORT_DEADLINE_S: Final = 5.0
BEAT_DEADLINE_S: Final = 1.0
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

    def setup(self, worker: Worker) -> None:
        """Start to beat."""
        self.worker = worker
        self._beating = asyncio.get_running_loop().create_task(self._beat_forever(worker))

    def teardown(self, worker: Worker) -> None:
        """Stop to beat."""
        if self._beating is not None:
            self._beating.cancel()

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """GPU work without a grant fails here, whatever the scheduler was thinking."""
        if self.worker is None or finish not in ("ready", "executing", "constrained"):
            return
        task = self.worker.state.tasks.get(key)
        if task is None:
            return
        annotations = task.annotations
        if annotations and "gpu" in annotations and assigned_of(annotations) is None:
            task.run_spec = Task(key, _refuse_unplaced)
            log.error("gpu_work_refused", key=str(key), reason="NotPlaced")

    async def report(self, _: Worker) -> bytes:
        """What the worker registers with. It ends the process rather than register without."""
        try:
            report: Report = await self.link.report(REPORT_DEADLINE_S)
        except LinkBroken as error:
            log.error("worker_has_no_report", error=str(error))
            os._exit(NO_REPORT_EXIT)
        return encode_report(report)

    def heartbeat(self) -> dict[str, Any]:
        """Travels with each of Dask's heartbeats, to the extension of the same name at the scheduler."""
        if self.beat is None:
            return {}
        return {"beat": encode_report(self.beat), "silent_s": time.monotonic() - self.answered_s}

    def uses(self) -> tuple[DeviceUse, ...]:
        """The devices at the agent's last reading."""
        return self.beat.uses if self.beat is not None else ()

    async def _beat_forever(self, worker: Worker) -> None:
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
    # The keys that Dask's own GPU pages read; one bar per worker, so the sum over its devices.
    worker.metrics["gpu_memory_used"] = lambda _: sum(use.used_bytes for use in plugin.uses())
    worker.metrics["gpu_utilization"] = lambda _: _mean_percent(plugin.uses())


def _mean_percent(uses: tuple[DeviceUse, ...]) -> float:
    known = [use.utilisation_ratio for use in uses if use.utilisation_ratio is not None]
    return 100 * sum(known) / len(known) if known else 0.0
