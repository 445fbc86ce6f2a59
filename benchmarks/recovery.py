# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""How long work stands still after a fault: ``python benchmarks/recovery.py [--injections 30] [--faults agent,node] [--json]``.

A cluster of its own with default settings (but no autoscaler, which would add nodes for what waits), four nodes of two devices,
and a warm executor on each device. Faults come one after the other, each process is let alone until it counts as well again:

* ``agent``: kill -9 of a node's agent, which its supervisor restarts. Until each task that it interrupted runs again.
* ``node``: an agent and all processes below it stopped (two nodes at once). Until the same.
* ``store``: kill -9. Until a task that is submitted right after, again and again, runs.
* ``api``: kill -9. Until it has accepted a task.
* ``leader``: kill -9 of the controller. Until another has the lead.
* ``scheduler``, ``worker``: kill -9 of the Dask scheduler, or of all Dask workers, while 10,000 tasks wait. Until a task that
  needs a new slot, submitted right after, runs.

Times of starts are those in the task's record. A task that runs elsewhere meanwhile must not be interrupted: that is counted.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import httpx
import msgspec
import psutil

from manager.cli.own_cluster import OwnCluster, own_cluster
from manager.client import Client, Task, task_request
from manager.core.answers_nodes import WorkerState
from manager.core.answers_tasks import TaskView
from manager.core.errors import RocyardError
from manager.core.ids import new_id
from manager.core.lifecycle import SlotStatus, TaskStatus
from manager.core.model import ClusterState
from manager.store.store import connect

T = TypeVar("T")
FLEET = "4x2:mi300x"
DEVICES = 8
MEMORY = "150GiB"
"""More than half of a device: one slot on each."""
SMALL = "8GiB"
"""Fits beside it."""
WAITING = 10_000
STEADY_S = 11.0
"""Who has lived for so long is started again without a pause (`manager.children.STEADY_S`)."""
GIVE_UP_S = 60.0
ANSWER_S = 5.0
POLL_S = 0.02
LONG_S = 80_000.0


class Bar(msgspec.Struct, frozen=True):
    """What a fault is measured by."""

    what: str
    p95_s: float


BARS = {
    "agent": Bar("interrupted tasks run again", 3.0),
    "node": Bar("interrupted tasks run again", 20.0),
    "store": Bar("a new task runs", 5.0),
    "api": Bar("a new task is accepted", 3.0),
    "leader": Bar("another leads", 15.0),
    "scheduler": Bar("a new slot serves", 15.0),
    "worker": Bar("a new slot serves", 15.0),
}


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of fault gave. Times in seconds; `interrupted` counts tasks that it must not have interrupted."""

    fault: str
    until: str
    injections: int
    measured: int
    p50_s: float
    p95_s: float
    max_s: float
    bar_p95_s: float
    interrupted: int

    @property
    def holds(self) -> bool:
        """Whether the bar was met."""
        return self.p95_s <= self.bar_p95_s and self.interrupted == 0


def eventually(check: Callable[[], T | None], what: str) -> T:
    """The first true answer of `check`."""
    deadline_s = time.monotonic() + GIVE_UP_S
    while not (answer := check()):
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {GIVE_UP_S:g} s: {what}")
        time.sleep(POLL_S)
    return answer


class Lab:
    """The cluster, and what is done to it."""

    def __init__(self, cluster: OwnCluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client
        self.hit_s: dict[str, float] = {}  # part, or node → when it was killed last
        self.probes = 0
        # Without the client's own patience, whose pauses would be in what is measured.
        headers = {"Authorization": f"Bearer {cluster.address.api_key.value}"}
        self.http = httpx.Client(base_url=cluster.address.url, headers=headers, timeout=ANSWER_S, trust_env=False)

    # --- processes ----------------------------------------------------------------------------------------------

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those below the supervisor whose command line has one of `words`, or ends in it."""
        found = []
        for process in psutil.Process(self.cluster.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "manager.lifeline" not in line and any(word in line[:1] + line[-1:] + line[1:3] for word in words):
                    found.append(process)
        return found

    def store_process(self) -> list[psutil.Process]:
        """The store's."""
        below = psutil.Process(self.cluster.pid).children()
        return [process for process in below if process.name().startswith(("redis", "valkey"))]

    def look(self) -> ClusterState:
        """One look at the store."""
        return asyncio.run(self._look())

    async def _look(self) -> ClusterState:
        store = connect(self._store_url(), 3.0, "benchmark")
        try:
            return await store.look(leader=False)
        finally:
            await store.connection.close()

    def leader(self) -> str:
        """Who leads; empty while the store is away."""
        return asyncio.run(self._leader())

    async def _leader(self) -> str:
        store = connect(self._store_url(), 3.0, "benchmark")
        try:
            return (await store.lead("", 0, 0, "read"))[3]
        finally:
            await store.connection.close()

    def _store_url(self) -> str:
        kept = json.loads((self.cluster.folder / "store.json").read_text())
        return f"redis://rocyard:{kept['password']}@127.0.0.1:{kept['port']}/0"

    # --- rest between faults --------------------------------------------------------------------------------------

    def rest(self, *names: str) -> None:
        """Wait until nobody of these starts with a pause, every node is live, and every device has its slot."""
        for name in names:
            pause_s = self.hit_s.get(name, -STEADY_S) + STEADY_S - time.monotonic()
            time.sleep(max(0.0, pause_s))
        eventually(self.is_well, "the cluster is well again")

    def is_well(self) -> bool:
        """Whether nothing of the last fault is left."""
        try:
            workers = self.client.workers()
            state = self.look()
        except RocyardError:
            return False
        live = [worker for worker in workers if worker.state is WorkerState.LIVE]
        full = [slot for slot in state.slots if slot.status is SlotStatus.OPEN and slot.memory_bytes > 100 * 2**30]
        return len(live) == len(workers) == DEVICES // 2 and len(full) == DEVICES and bool(self.leader())

    # --- tasks --------------------------------------------------------------------------------------------------

    def long_task(self) -> Task:
        """A task that runs until it is cancelled; on return it does."""
        task = self.client.submit("sleep", {"seconds": LONG_S}, memory=MEMORY)
        eventually(lambda: _runs(task.view()), "a long task runs")
        return task

    def runs_again_s(self, tasks: Sequence[Task], before: dict[str, int], hit: float) -> list[float]:
        """For each task the seconds from the fault to the start of its next attempt."""
        seconds = {}

        def all_run() -> bool:
            for task in tasks:
                if task.task_id not in seconds:
                    view = self.view(task)
                    if view is not None and _runs(view) and view.attempt > before[task.task_id]:
                        assert view.started_at is not None
                        seconds[task.task_id] = view.started_at.timestamp() - hit
            return len(seconds) == len(tasks)

        eventually(all_run, "interrupted tasks run again")
        return list(seconds.values())

    def view(self, task: Task) -> TaskView | None:
        """The task; None while the API or the store is away."""
        try:
            return task.view()
        except RocyardError:
            return None

    def attempt(self, task: Task) -> int:
        """Which attempt of it runs."""
        return eventually(lambda: self.view(task), "an answer of the API").attempt

    def accepted(self, memory: str, model: str = "") -> Task:
        """A short task, submitted until it is accepted: once, since it bears a key."""
        body = {"function": "echo", "args": {"x": 1}, "resources": {"memory": memory, "model": model}}
        key = {"Idempotency-Key": new_id()}

        def submit() -> Task | None:
            try:
                answer = self.http.post("/v1/tasks", json=body, headers=key)
            except httpx.TransportError:
                return None
            if answer.status_code >= 500:
                return None
            answer.raise_for_status()
            return Task(self.client, answer.json()["task_id"])

        return eventually(submit, "a task is accepted")

    def serves_s(self, hit: float, memory: str, model: str = "") -> float:
        """Seconds from the fault until a task that is submitted now has started."""
        task = self.accepted(memory, model)
        view = task.wait(GIVE_UP_S)
        assert view.started_at is not None, view
        return view.started_at.timestamp() - hit

    def new_slot_serves_s(self, hit: float) -> float:
        """The same of a task of a shape that no task had before."""
        self.probes += 1
        return self.serves_s(hit, SMALL, f"probe-{self.probes}")


def _runs(view: TaskView) -> bool:
    return view.status is TaskStatus.RUNNING and view.started_at is not None


def _kill(victims: Sequence[psutil.Process]) -> float:
    """Kill them; when, by the clock of records."""
    if not victims:
        raise SystemExit("there is nobody to kill")
    hit = time.time()
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    return hit


# --- one injection of each kind: how long it took, for each task that it interrupted or was put to it --------------------


def hit_agent(lab: Lab) -> list[float]:
    task = lab.long_task()
    view = task.view()
    assert view.node is not None
    lab.rest(view.node)
    agent = next(row.info.pid for row in lab.look().nodes if row.node == view.node)
    hit = _kill([psutil.Process(agent)])
    lab.hit_s[view.node] = time.monotonic()
    seconds = lab.runs_again_s([task], {task.task_id: view.attempt}, hit)
    _end([task])
    return seconds


def hit_node(lab: Lab) -> list[float]:
    lab.rest()
    # With the spectator four: as many as the other two nodes have devices.
    tasks = [lab.long_task() for _ in range(3)]
    views = {task.task_id: task.view() for task in tasks}
    nodes = sorted({view.node for view in views.values() if view.node})[:2]
    agents = [psutil.Process(row.info.pid) for row in lab.look().nodes if row.node in nodes]
    frozen = [process for agent in agents for process in (agent, *agent.children(recursive=True))]
    hit = time.time()
    try:
        _signal(frozen, signal.SIGSTOP)
        met = [task for task in tasks if views[task.task_id].node in nodes]
        seconds = lab.runs_again_s(met, {task_id: view.attempt for task_id, view in views.items()}, hit)
    finally:
        _signal(frozen, signal.SIGCONT)
    _end(tasks)
    return seconds


def hit_store(lab: Lab) -> list[float]:
    lab.rest("store")
    hit = _kill(lab.store_process())
    lab.hit_s["store"] = time.monotonic()
    return [lab.serves_s(hit, MEMORY)]


def hit_api(lab: Lab) -> list[float]:
    lab.rest("api")
    hit = _kill(lab.processes("api"))
    lab.hit_s["api"] = time.monotonic()
    task = lab.accepted(MEMORY)
    seconds = time.time() - hit
    task.wait(GIVE_UP_S)
    return [seconds]


def hit_leader(lab: Lab) -> list[float]:
    lab.rest("controller")
    before = lab.leader()
    hit = _kill(lab.processes("controller"))
    lab.hit_s["controller"] = time.monotonic()
    eventually(lambda: lab.leader() not in {"", before}, "another leader")
    return [time.time() - hit]


def hit_scheduler(lab: Lab) -> list[float]:
    lab.rest("scheduler")
    hit = _kill(lab.processes("scheduler"))
    lab.hit_s["scheduler"] = lab.hit_s["worker"] = time.monotonic()  # Dask workers end with their scheduler
    return [lab.new_slot_serves_s(hit)]


def hit_worker(lab: Lab) -> list[float]:
    lab.rest("worker")
    hit = _kill(lab.processes("plugins.worker_process"))
    lab.hit_s["worker"] = time.monotonic()
    return [lab.new_slot_serves_s(hit)]


def _end(tasks: Sequence[Task]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        task.wait(GIVE_UP_S)


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


HITS = {
    "agent": hit_agent,
    "node": hit_node,
    "store": hit_store,
    "api": hit_api,
    "leader": hit_leader,
    "scheduler": hit_scheduler,
    "worker": hit_worker,
}
MANY = ("scheduler", "worker")
"""These are measured with many tasks waiting, and with a long task on each device."""


@contextlib.contextmanager
def held(lab: Lab, count: int) -> Iterator[list[Task]]:
    """So many long tasks, until the end of the block."""
    tasks = [lab.long_task() for _ in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


def measure(lab: Lab, faults: Sequence[str], injections: int, spectators: list[Task]) -> list[Recovery]:
    """All these faults in turn, so that each process has time to be well again; `spectators` must not notice."""
    seconds: dict[str, list[float]] = {fault: [] for fault in faults}
    done = dict.fromkeys(faults, 0)
    interrupted = dict.fromkeys(faults, 0)
    attempts = {task.task_id: task.view().attempt for task in spectators}
    for number in range(injections):
        for fault in faults:
            found = HITS[fault](lab)
            done[fault] += 1
            seconds[fault] += found
            for task in spectators:
                attempt = lab.attempt(task)
                if fault in {"agent", "node"}:  # it may have been there
                    attempts[task.task_id] = attempt
                interrupted[fault] += attempt != attempts[task.task_id]
                attempts[task.task_id] = attempt
            print(f"{number + 1:>3} {fault:<10} {', '.join(f'{one:.2f}' for one in found)} s", file=sys.stderr, flush=True)
    return [_recovery(fault, done[fault], seconds[fault], interrupted[fault]) for fault in faults]


def _recovery(fault: str, injections: int, seconds: list[float], interrupted: int) -> Recovery:
    ordered = sorted(seconds)
    return Recovery(
        fault=fault,
        until=BARS[fault].what,
        injections=injections,
        measured=len(ordered),
        p50_s=round(ordered[len(ordered) // 2], 2),
        p95_s=round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        max_s=round(ordered[-1], 2),
        bar_p95_s=BARS[fault].p95_s,
        interrupted=interrupted,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=30, help="of each kind")
    parser.add_argument("--faults", default=",".join(HITS), help="which kinds, with commas between")
    parser.add_argument("--waiting", type=int, default=WAITING, help="tasks that wait while scheduler and workers are killed")
    parser.add_argument("--json", action="store_true", help="one JSON array in the last line")
    options = parser.parse_args()
    faults = options.faults.split(",")
    if unknown := sorted(set(faults) - HITS.keys()):
        parser.error(f"there is no fault {unknown[0]!r}: choose from {', '.join(HITS)}")
    found: list[Recovery] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever is stopped must be let go again
    variables = {"ROCYARD_AUTOSCALER__MODE": "off"}
    with own_cluster(os.environ, simulate=FLEET, variables=variables) as cluster, Client(cluster.address) as client:
        lab = Lab(cluster, client)
        few = [fault for fault in faults if fault not in MANY]
        many = [fault for fault in faults if fault in MANY]
        if few:
            client.warm("sleep", slots=DEVICES, for_="10h", memory=MEMORY)
            with held(lab, 1) as spectators:
                found += measure(lab, few, options.injections, spectators)
        if many:
            client.warm("sleep", slots=0, for_=1, memory=MEMORY)
            with held(lab, DEVICES) as spectators:
                client.submit_many([task_request("echo", {"x": 1}, memory=MEMORY)] * options.waiting)
                found += measure(lab, many, options.injections, spectators)
    print("| fault | until | injections | measured | p50 s | p95 s | max s | bar, p95 s | tasks interrupted that must not be |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one.fault} | {one.until} | {one.injections} | {one.measured} | {one.p50_s} | {one.p95_s} | {one.max_s} "
            f"| {one.bar_p95_s:g}{'' if one.holds else ' missed'} | {one.interrupted} |"
        )
    if options.json:
        print(msgspec.json.encode(found).decode())
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
