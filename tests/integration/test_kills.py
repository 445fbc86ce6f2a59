"""Each process killed with tasks queued and running: nothing is lost, nothing runs twice without cause, nobody restarts it."""

import signal
from pathlib import Path

import psutil
import pytest

from manager.client import Task
from manager.core.errors import RocyardError
from manager.core.lifecycle import TaskStatus
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.timeout(180)


def _gated(cluster: Cluster, name: str, count: int) -> tuple[Path, list[Task]]:
    """Tasks that run until a file appears: as many run as there are slots, the others queue behind them."""
    gate = cluster.directory / f"gate-{name}"
    args = {"path": str(cluster.witness_path), "gate": str(gate)}
    tasks = [cluster.client.submit("until", args, memory="90GiB") for _ in range(count)]
    eventually(lambda: sum(bool(cluster.started(task)) for task in tasks) >= 4, 30, "four tasks running")
    return gate, tasks


def _kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def _finish(cluster: Cluster, gate: Path, tasks: list[Task]) -> None:
    gate.touch()
    for view, task in zip(cluster.wait_all(tasks), tasks, strict=True):
        assert view.status is TaskStatus.SUCCEEDED
        assert view.result is not None
        assert bytes(view.result).decode() == f'"{task.task_id}"'
        assert view.crashes == 0


@pytest.mark.parametrize("role", ["scheduler", "controller", "api", "store"])
def test_death_of_a_central_process_interrupts_no_task(cluster: Cluster, role: str) -> None:
    gate, tasks = _gated(cluster, role, 12)
    running = [task for task in tasks if cluster.started(task)]
    victim = cluster.role(role)
    _kill(victim)
    eventually(lambda: not victim.is_running(), 10, f"death of the {role}")
    cluster.wait_role(role, victim.pid)
    if role == "api":
        eventually(lambda: _answers(cluster), 20, "the API")
    _finish(cluster, gate, tasks)
    for task in tasks:
        assert len(cluster.started(task)) == 1, f"{task.task_id} started twice ({'running' if task in running else 'queued'})"


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.client.status()
    except Exception:  # noqa: BLE001  # whatever it is, the API is not back yet
        return False
    return True


def test_a_frozen_store_interrupts_no_task_and_fences_nobody(cluster: Cluster) -> None:
    gate, tasks = _gated(cluster, "frozen-store", 8)
    before = {row.node: row.incarnation for row in cluster.state().nodes}
    store = cluster.role("store")
    store.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(RocyardError):
            cluster.client.get(tasks[0].task_id)  # refused at the store's deadline, which is longer than an agent's lease
        gate.touch()
        eventually(lambda: sum(event["event"] == "end" for event in cluster.witness()) >= 4, 20, "four ends meanwhile")
    finally:
        store.send_signal(signal.SIGCONT)
    _finish(cluster, gate, tasks)
    assert all(len(cluster.started(task)) == 1 for task in tasks)
    assert {row.node: row.incarnation for row in cluster.state().nodes} == before


def test_death_of_a_dask_worker_interrupts_no_task(cluster: Cluster) -> None:
    gate, tasks = _gated(cluster, "worker", 12)
    for node in ("node-0", "node-1"):
        victim = cluster.dask_worker(node)
        _kill(victim)
        cluster.dask_worker(node, not_pid=victim.pid)
    _finish(cluster, gate, tasks)
    assert all(len(cluster.started(task)) == 1 for task in tasks)


def test_death_of_an_agent_requeues_its_tasks_and_blames_nobody(cluster: Cluster) -> None:
    gate, tasks = _gated(cluster, "agent", 8)
    first = next(event for task in tasks for event in cluster.started(task))
    victim = cluster.agent(_node_of(cluster, first["pid"]))
    executors = [p for p in victim.children(recursive=True) if "executor.py" in " ".join(p.cmdline())]
    assert executors
    _kill(victim)
    eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in executors), 5, "its executors' end")
    _finish(cluster, gate, tasks)
    assert {len(cluster.started(task)) for task in tasks} <= {1, 2}


def test_death_of_an_executor_reruns_its_task(cluster: Cluster) -> None:
    task = cluster.client.submit("hold", {"path": str(cluster.witness_path), "seconds": 2.0}, memory="20GiB")
    start = cluster.wait_started(task)
    psutil.Process(start["pid"]).send_signal(signal.SIGKILL)
    (view,) = cluster.wait_all([task])
    assert view.status is TaskStatus.SUCCEEDED
    assert view.attempt == 2
    assert [event["attempt"] for event in cluster.started(task)] == [1, 2]


def test_a_frozen_agent_is_fenced_and_its_executors_end(cluster: Cluster) -> None:
    task = cluster.client.submit(
        "until", {"path": str(cluster.witness_path), "gate": str(cluster.directory / "gate-frozen")}, memory="150GiB"
    )
    first = cluster.wait_started(task)
    agent = cluster.agent(_node_of(cluster, first["pid"]))
    agent.send_signal(signal.SIGSTOP)
    try:
        second = cluster.wait_started(task, times=2, timeout_s=30)
        assert second["attempt"] == first["attempt"] + 1
        eventually(lambda: not psutil.pid_exists(first["pid"]), 10, "the end of the replaced executor")
    finally:
        agent.send_signal(signal.SIGCONT)
    (cluster.directory / "gate-frozen").touch()
    (view,) = cluster.wait_all([task])
    assert view.status is TaskStatus.SUCCEEDED
    assert view.attempt == second["attempt"]
    eventually(lambda: not any(row.fenced for row in cluster.state().nodes), 20, "the frozen node's new incarnation")


def _node_of(cluster: Cluster, pid: int) -> str:
    """The node that a task's process lives on."""
    for row in cluster.state().nodes:
        if any(child.pid == pid for child in cluster.agent(row.node).children(recursive=True)):
            return row.node
    raise AssertionError(f"no node has process {pid}")
