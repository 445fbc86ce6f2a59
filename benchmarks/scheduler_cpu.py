# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""What placement adds to the CPU time of the Dask scheduler: ``python benchmarks/scheduler_cpu.py``.

A real Scheduler with workers that only it believes in: what it sends them is dropped, and they finish a task when the
benchmark says so. Three ways in turn, in one process: plain tasks, tasks with Dask's own ``resources=``, and tasks with a
``gpu`` annotation under the placement plugin, which places what waits after each completion. More tasks come than fit at once,
so that most of them are held first. Log lines are made as they are in the product, and written to the null device.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import asyncio
import contextlib
import gc
import os
import random
import statistics
import time
from collections import deque
from typing import Any, Final

from dask._task_spec import Task
from distributed.core import Status
from distributed.scheduler import Scheduler, WorkerState

from manager.core.devices import Device
from manager.core.placement import Policy
from manager.core.quantities import GIB
from manager.log import configure_logging
from manager.policies import policy_named
from manager.settings import LogSettings, Settings
from plugins.node.link import Report, encode_report
from plugins.scheduler import PlacementPlugin

GPUS: Final = 8
CARD_GIB: Final = 192
WAYS: Final = ("plain", "resources=", "plugin")
NATIVE_MAX: Final = 2_000
"""Tasks with ``resources=`` in one run: each costs milliseconds where there are many workers."""
SEED: Final = 7
RAN: Final = ({"action": "compute", "start": 0.0, "stop": 0.1},)
FINISHED: Final[dict[str, Any]] = {"metadata": {}, "nbytes": 8, "typename": "int", "type": b"", "startstops": RAN}
"""What a worker says of a task that has ended, beside who it was."""


class Connection:
    """A worker's: what it is told to run is noted in `running`, everything else is dropped."""

    def __init__(self, address: str, running: deque[tuple[str, Any, int]]) -> None:
        self.address = address
        self.running = running

    def send(self, *messages: dict[str, Any]) -> None:
        """Dask's, to a worker or a client."""
        for message in messages:
            if message["op"] == "compute-task":
                self.running.append((self.address, message["key"], message["run_id"]))


def add_worker(scheduler: Scheduler, number: int, way: str, running: deque[tuple[str, Any, int]]) -> None:
    """What Scheduler.add_worker does, without a worker at the other end."""
    address = f"tcp://10.{number // 65536}.{number // 256 % 256}.{number % 256}:9000"
    devices = tuple(
        Device(f"n{number}-d{at}", at, "simulated", "MI300X", "gfx942", CARD_GIB * GIB, str(at)) for at in range(GPUS)
    )
    report = Report(f"n{number:04}", "i1", 1, devices, GIB // 2, ())
    worker = WorkerState(
        address=address,
        status=Status.running,
        pid=1,
        name=f"n{number:04}",
        nthreads=GPUS,
        memory_limit=0,
        local_directory="",
        nanny="",
        server_id=address,
        services={},
        versions={},
        extra={"rocyard": encode_report(report)} if way == "plugin" else {},
        scheduler=scheduler,
    )
    scheduler.workers[address] = worker
    scheduler.running.add(worker)
    scheduler.aliases[worker.name] = address
    scheduler.total_nthreads += GPUS
    scheduler.stream_comms[address] = Connection(address, running)  # type: ignore[assignment]
    if way == "resources=":
        scheduler.add_resources(worker=address, resources={"GPU": GPUS})
    scheduler.check_idle_saturated(worker)
    for plugin in list(scheduler.plugins.values()):
        plugin.add_worker(scheduler, address)


def annotations_of(way: str, keys: list[str], sizes: int) -> dict[str, dict[str, Any]]:
    """What the tasks ask for, as Dask gives it to the scheduler. Sizes from an eighth of a card to a whole one."""
    if way == "plain":
        return {}
    if way == "resources=":
        return {"resources": {key: {"GPU": 1} for key in keys}}
    chance = random.Random(SEED)
    classes = [CARD_GIB * (number + 1) // (sizes + 1) for number in range(sizes)]
    return {"gpu": {key: {"memory": chance.choice(classes) * GIB} for key in keys}}


def submit(scheduler: Scheduler, graph: dict[Any, Any], annotations: dict[str, dict[str, Any]]) -> None:
    """What a client's graph does, once it has been read."""
    scheduler._create_taskstate_from_graph(  # noqa: SLF001  # what update_graph calls when it has decoded the graph
        start=time.time(),
        dsk=dict(graph),
        keys=set(graph),
        ordered={key: number for number, key in enumerate(graph)},
        client="benchmark",
        annotations_by_type=annotations,
        global_annotations=None,
        stimulus_id="benchmark",
        submitting_task=None,
        span_metadata={"collections": []},
    )


async def cost_us(way: str, workers: int, tasks: int, policy: Policy, sizes: int) -> float:
    """CPU microseconds per task, from its arrival to its end."""
    scheduler = await Scheduler(host="127.0.0.1", port=0, dashboard=False, validate=False)
    try:
        if way == "plugin":
            scheduler.add_plugin(PlacementPlugin(scheduler, policy))
        running: deque[tuple[str, Any, int]] = deque()
        for number in range(workers):
            add_worker(scheduler, number, way, running)
        keys = [f"work-{number}" for number in range(tasks)]
        graph = {key: Task(key, abs, 1) for key in keys}
        annotations = annotations_of(way, keys, sizes)
        gc.collect()
        began_s = time.process_time()
        submit(scheduler, graph, annotations)
        await asyncio.sleep(0)  # the pump's turn
        for left in range(tasks, 0, -1):
            assert running, f"{left} of {tasks} wait, and nothing runs"
            address, key, run_id = running.popleft()
            scheduler.handle_task_finished(key=key, worker=address, stimulus_id="done", run_id=run_id, **FINISHED)
            await asyncio.sleep(0)
        return (time.process_time() - began_s) / tasks * 1e6
    finally:
        for address in list(scheduler.workers):
            del scheduler.workers[address], scheduler.stream_comms[address]
        await scheduler.close()


def measure(workers: int, tasks: int, policy: Policy, sizes: int, runs: int) -> str:
    """One line of the table: the median of some runs of each way, taken in turns."""
    costs: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way in WAYS:
            count = min(tasks, NATIVE_MAX) if way == "resources=" else tasks
            costs[way].append(asyncio.run(cost_us(way, workers, count, policy, sizes)))
    plain, native, plugin = (statistics.median(costs[way]) for way in WAYS)
    spread = f"{min(costs['plugin']):.0f} to {max(costs['plugin']):.0f}"
    return (
        f"| {workers:,} | {tasks:,} | {sizes} | {plain:.0f} | {native:,.0f} | {plugin:.0f} ({spread}) | {plugin - plain:+.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 100, 1000], help="workers of 8 GPUs")
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000], help="tasks of one run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8], help="different sizes of memory that tasks ask for")
    parser.add_argument("--policy", default=Settings().placement.policy, help="placement policy")
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the median counts")
    given = parser.parse_args()
    print("| workers | tasks | sizes | plain µs | `resources=` µs | plugin µs | plugin − plain µs |")
    print("|---|---|---|---|---|---|---|")
    policy = policy_named(given.policy)
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        configure_logging("scheduler", LogSettings())
        for workers in given.workers:
            for tasks in given.tasks:
                for sizes in given.sizes:
                    print(measure(workers, tasks, policy, sizes, given.runs), flush=True)


if __name__ == "__main__":
    main()
