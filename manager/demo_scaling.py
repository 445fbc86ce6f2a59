"""The demo's second act: a minute of real torch work, for which nodes are added, and which are taken away afterwards.

Owns what is asked for and what is found. It knows the autoscaler only by what the API tells, and changes nothing of it.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from manager.client import Client, Task, task_request
from manager.core.answers_autoscaler import ScalingGroup
from manager.core.answers_nodes import WorkerState, WorkerView
from manager.core.errors import RocyardError
from manager.core.lifecycle import FINAL, TaskStatus

LOAD_S: Final = 60.0
"""Work is handed in for so long."""
QUEUED: Final = 24
"""So many tasks are kept waiting: more than the nodes that there are can take, few enough to be done soon afterwards."""
TASK_S: Final = 1.5
"""What one task takes that has the machine to itself; side by side they take longer."""
SIZE: Final = 1024
REPEATS_MAX: Final = 100_000
MEMORY_SHARE: Final = 0.75
"""Of a device: so each task has one, and the work asks for devices."""
SAMPLE_S: Final = 1.0
CALIBRATION_S: Final = 120.0
END_S: Final = 300.0
"""The work that was handed in must be done, and the nodes be gone, within this each: several times what it takes."""


class Sample(msgspec.Struct, frozen=True):
    """One look: seconds since the beginning, and the numbers of nodes and tasks."""

    at_s: float
    need: int | None
    size: int
    live: int
    queued: int
    running: int


class ScalingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the second act found.

    Attributes:
        group: whose nodes came and went.
        tasks, failed: that were handed in, and of those the ones that did not succeed.
        work_s: from the first task to the end of the last one.
        teraflops: floating-point operations that were done, in units of 10¹².
        nodes_before, nodes_most, nodes_after: live nodes of the cluster.
        added, removed: names of nodes.
        reruns: tasks that were started more than once.
    """

    group: str
    tasks: int
    failed: int
    work_s: float
    teraflops: float
    nodes_before: int
    nodes_most: int
    nodes_after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reruns: int
    samples: tuple[Sample, ...]

    @property
    def held(self) -> bool:
        """Whether nodes came and went, and no task was harmed by it."""
        return self.failed == self.reruns == 0 and self.nodes_most > self.nodes_before >= self.nodes_after


def why_not(client: Client) -> str:
    """Why nodes cannot come and go here; empty where they can."""
    found = client.autoscaler()
    if found.mode != "active":
        return f"the autoscaler is {found.mode}"
    if not any(group.provider == "local" for group in found.groups):
        return "there is no group of nodes that can be added on this machine"
    if found.last is None:
        return "the autoscaler has not decided anything yet"
    return ""


def run_scaling(client: Client, say: Callable[[str], None], show: Callable[[Sample], None]) -> ScalingReport:
    """Run it.

    Args:
        client: of the cluster to use.
        say: told what happens.
        show: given each look.

    Raises:
        RocyardError: the cluster does not answer any more.
    """
    return _Act(client, say, show).run()


class _Act:
    def __init__(self, client: Client, say: Callable[[str], None], show: Callable[[Sample], None]) -> None:
        self.client = client
        self.say = say
        self.show = show
        self.began_s = time.monotonic()
        self.samples: list[Sample] = []
        self.seen: dict[str, None] = {}
        self.tasks: list[Task] = []
        self.group = next(group for group in client.autoscaler().groups if group.provider == "local")

    def run(self) -> ScalingReport:
        before = self._settled()
        memory = int(min(device.usable_bytes for worker in before for device in worker.devices) * MEMORY_SHARE)
        repeats = self._repeats(memory)
        self.say(
            f"multiplying matrices of {SIZE} x {SIZE} for a minute, {repeats} times in each task; "
            f"group {self.group.name} may have {self.group.workers_min} to {self.group.workers_max} nodes …"
        )
        names = {worker.node for worker in before}
        self.began_s = time.monotonic()
        self._work(memory, repeats)
        views = [self.client.get(task.task_id) for task in self.tasks]
        work_s = time.monotonic() - self.began_s
        added = [name for name in self.seen if name not in names]
        self.say(f"done; now the nodes that were added go again ({', '.join(added) or 'none was'}) …")
        after = self._wait_for_end(names)
        return ScalingReport(
            group=self.group.name,
            tasks=len(views),
            failed=sum(view.status is not TaskStatus.SUCCEEDED for view in views),
            work_s=work_s,
            teraflops=len(views) * repeats * 2 * SIZE**3 / 1e12,
            nodes_before=len(names),
            nodes_most=max(sample.live for sample in self.samples),
            nodes_after=len(after),
            added=tuple(added),
            removed=tuple(name for name in self.seen if name not in after),
            reruns=sum(view.attempt > 1 for view in views),
            samples=tuple(self.samples),
        )

    def _settled(self) -> list[WorkerView]:
        """The nodes, once the group is as small as it gets: what was done before may have made it grow."""
        end_s = time.monotonic() + END_S
        told = False
        while True:
            live = _live(self.client.workers())
            last = self.client.autoscaler().last
            sizes = [group.size for group in last.groups if group.group == self.group.name] if last is not None else []
            settled = bool(sizes) and sizes[0] <= self.group.workers_min
            if (settled and all(worker.state is WorkerState.LIVE for worker in live)) or time.monotonic() > end_s:
                return live
            if not told:
                self.say(f"the digits made it add nodes; waiting until they are gone and {self.group.workers_min} are left …")
                told = True
            time.sleep(SAMPLE_S)

    def _repeats(self, memory: int) -> int:
        """How often a task multiplies, so that it takes about `TASK_S` alone."""
        first = self.client.submit("matmul", {"size": SIZE, "repeats": 10}, memory=memory)
        seconds: float = first.result(CALIBRATION_S)["seconds"]
        return max(1, min(REPEATS_MAX, round(TASK_S / (seconds / 10))))

    def _work(self, memory: int, repeats: int) -> None:
        """Keep tasks waiting for `LOAD_S`, then wait for the last one."""
        request = task_request("matmul", {"size": SIZE, "repeats": repeats}, memory=memory)
        open_tasks: list[Task] = []
        while True:
            sample = self._look()
            if sample.at_s < LOAD_S and sample.queued < QUEUED:
                fresh = self.client.submit_many([request] * (QUEUED - sample.queued))
                self.tasks += fresh
                open_tasks += fresh
            elif sample.queued == 0:
                open_tasks = [task for task in open_tasks if self.client.get(task.task_id).status not in FINAL]
            if sample.at_s >= LOAD_S and not open_tasks:
                return
            if sample.at_s > LOAD_S + END_S:
                raise RocyardError(f"{len(open_tasks)} tasks have not ended {END_S:g} s after the last was handed in.")
            time.sleep(SAMPLE_S)

    def _wait_for_end(self, names: set[str]) -> set[str]:
        """Wait until no more nodes live than at first; who lives then."""
        end_s = time.monotonic() + END_S
        while True:
            self._look()
            live = {worker.node for worker in _live(self.client.workers())}
            if len(live) <= len(names) or time.monotonic() > end_s:
                return live
            time.sleep(SAMPLE_S)

    def _look(self) -> Sample:
        cluster = self.client.status()
        last = self.client.autoscaler().last
        group: ScalingGroup | None = None
        if last is not None:
            group = next((each for each in last.groups if each.group == self.group.name), None)
        live = _live(cluster.workers)
        self.seen |= dict.fromkeys(worker.node for worker in live)
        sample = Sample(
            at_s=time.monotonic() - self.began_s,
            need=None if group is None else group.need,
            size=0 if group is None else group.size,
            live=len(live),
            queued=cluster.tasks.queued,
            running=cluster.tasks.running,
        )
        self.samples.append(sample)
        self.show(sample)
        return sample


def _live(workers: Iterable[WorkerView]) -> list[WorkerView]:
    return [worker for worker in workers if worker.state not in {WorkerState.LOST, WorkerState.LEFT}]
