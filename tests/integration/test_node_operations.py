"""Nodes are cordoned, drained and removed, and slots opened ahead and closed, on a real cluster while tasks run."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from distributed import Client

from manager.client import Task
from manager.core.answers_nodes import WorkerState, WorkerView
from manager.core.errors import BadRequest, Infeasible, NotFound, QuotaExceeded
from manager.core.lifecycle import REMOVED_EXIT, Cordon, SlotKind, SlotStatus, TaskStatus
from manager.core.model import ClusterState, NodeRow, SlotRow
from rocyard import gpu as rocyard_gpu
from tests.integration.cluster import Cluster, clusters, eventually

pytestmark = pytest.mark.timeout(180)
SIZES = itertools.count(190, -1)
"""GiB with which a task has a device to itself, so that four fill the cluster. Of another size for each gate: the run time
that was learned from one test would tell the next that a slot serves many.
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two devices, whose agents drain when they are stopped."""
    yield from clusters(
        tmp_path_factory.mktemp("lifecycle"), {"ROCYARD_NODE__STOP_DRAIN_S": "20", "ROCYARD_SLOTS__IDLE_S": "2"}
    )


@pytest.fixture(autouse=True)
def _as_it_was(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test begins with two free nodes and no slot, and leaves them so; only the last one removes node-1."""
    yield
    for view in cluster.client.workers():
        if view.cordon:
            cluster.client.uncordon(view.node)
    cluster.client.unload(all=True)
    eventually(lambda: not cluster.state().slots, 30, "no slot left")
    kept = ("node-0",) if request.function is test_the_supervisor_does_not_start_a_removed_node_again else ("node-0", "node-1")
    eventually(lambda: all(states(cluster).get(node) is WorkerState.LIVE for node in kept), 30, f"{kept} live")


def states(cluster: Cluster) -> dict[str, WorkerState]:
    return {view.node: view.state for view in cluster.client.workers()}


class Gate:
    """Tasks that run until it opens."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.memory = f"{next(SIZES)}GiB"
        self.path = cluster.directory / f"gate-{name}-{self.memory}"

    def submit(self, count: int = 1) -> list[Task]:
        args = {"path": str(self.cluster.witness_path), "gate": str(self.path)}
        return [self.cluster.client.submit("until", args, memory=self.memory) for _ in range(count)]

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Gate]:
    made = Gate(cluster, request.node.name.partition("[")[0])
    yield made
    made.open()


def node_of(cluster: Cluster, task: Task) -> str:
    cluster.wait_started(task)
    return eventually(lambda: cluster.client.get(task).node, 10, "the node of a running task") or ""


def other(node: str) -> str:
    return {"node-0": "node-1", "node-1": "node-0"}[node]


def slots_on(state: ClusterState, node: str) -> list[SlotRow]:
    return [slot for slot in state.slots if slot.node == node and slot.status is SlotStatus.OPEN]


def row(cluster: Cluster, node: str) -> NodeRow:
    return next(found for found in cluster.state().nodes if found.node == node)


def wait_state(cluster: Cluster, node: str, state: WorkerState, timeout_s: float = 20) -> WorkerView:
    return eventually(lambda: v if (v := cluster.client.worker(node)).state is state else None, timeout_s, f"{node} {state}")


def succeeded_once(cluster: Cluster, tasks: list[Task], attempt: int = 1) -> None:
    for view, task in zip(cluster.wait_all(tasks), tasks, strict=True):
        assert (view.status, view.attempt, view.crashes, view.failures) == (TaskStatus.SUCCEEDED, attempt, 0, 0)
        assert len(cluster.started(task)) == attempt


# --- cordon and uncordon ------------------------------------------------------------------------------------------


def test_a_cordon_keeps_what_runs_and_places_nothing_new_until_it_is_lifted(cluster: Cluster, gate: Gate) -> None:
    (running,) = gate.submit()
    node = node_of(cluster, running)
    view = cluster.client.cordon(node)
    assert (view.state, view.cordon, view.cordoned_by) == (WorkerState.CORDONED, "cordon", "operator")
    more = gate.submit(3)  # two fit on the other node, one on this one
    for task in more[:2]:
        assert node_of(cluster, task) == other(node), "it was placed on a cordoned node"
    explanation = eventually(
        lambda: e if (e := cluster.client.explain(more[2])).workers else None, 10, "a verdict for each worker"
    )
    assert "Cordoned" in {verdict.verdict for verdict in explanation.workers if verdict.node == node}
    assert not cluster.started(more[2])
    assert cluster.client.get(running).status is TaskStatus.RUNNING, "a cordon ended a running task"
    assert f"{node} has been cordoned" in " ".join(cluster.client.status().problems)
    began = time.monotonic()
    assert cluster.client.uncordon(node).state is WorkerState.LIVE
    assert node_of(cluster, more[2]) == node
    assert time.monotonic() - began < 5, "a lifted cordon takes too long to be used"
    gate.open()
    succeeded_once(cluster, [running, *more])


def test_an_open_slot_on_a_cordoned_node_goes_on_taking_tasks(cluster: Cluster, gate: Gate) -> None:
    (first,) = gate.submit()
    node = node_of(cluster, first)
    cluster.client.cordon(node)
    cluster.client.cordon(other(node))
    (second,) = gate.submit()
    gate.open()
    succeeded_once(cluster, [first, second])
    assert cluster.client.get(second).node == node


# --- drain --------------------------------------------------------------------------------------------------------


def test_a_drain_lets_running_tasks_finish_and_sends_the_others_elsewhere(cluster: Cluster, gate: Gate) -> None:
    tasks = gate.submit(4)
    nodes = {task.task_id: node_of(cluster, task) for task in tasks}
    queued = gate.submit(2)
    view = cluster.client.drain("node-0")
    assert (view.state, view.slots, view.deadline_at) == (WorkerState.DRAINING, 2, None)
    eventually(lambda: {s.flag for s in slots_on(cluster.state(), "node-0")} == {"drain"}, 10, "flags on node-0")
    gate.open()
    succeeded_once(cluster, [*tasks, *queued])
    assert set(nodes.values()) == {"node-0", "node-1"}
    assert {cluster.client.get(task).node for task in queued} == {"node-1"}
    assert wait_state(cluster, "node-0", WorkerState.DRAINED).slots == 0
    assert cluster.client.uncordon("node-0").state is WorkerState.LIVE


def test_a_deadline_hands_tasks_back_and_nobody_is_blamed(cluster: Cluster, gate: Gate) -> None:
    (task,) = gate.submit()
    node = node_of(cluster, task)
    view = cluster.client.drain(node, "1s")
    assert view.deadline_at is not None
    again = cluster.wait_started(task, times=2)
    assert again["attempt"] == 2
    assert cluster.client.get(task).node == other(node)
    gate.open()
    succeeded_once(cluster, [task], attempt=2)
    assert cluster.client.get(task).losses == 0
    wait_state(cluster, node, WorkerState.DRAINED)


@pytest.mark.parametrize("role", ["controller", "scheduler", "agent"])
def test_a_drain_outlives_the_death_of(cluster: Cluster, gate: Gate, role: str) -> None:
    (task,) = gate.submit()
    node = node_of(cluster, task)
    cluster.client.drain(node)
    victim = cluster.agent(node) if role == "agent" else cluster.role(role)
    before = row(cluster, node).incarnation
    victim.send_signal(signal.SIGKILL)
    if role == "agent":
        eventually(lambda: row(cluster, node).incarnation != before, 20, "the next agent")
        cluster.wait_started(task, times=2)
    else:
        cluster.wait_role(role, victim.pid)
    (queued,) = gate.submit()
    assert node_of(cluster, queued) == other(node), "a drain was forgotten"
    assert row(cluster, node).cordon is Cordon.DRAIN
    gate.open()
    succeeded_once(cluster, [task], attempt=2 if role == "agent" else 1)
    succeeded_once(cluster, [queued])
    wait_state(cluster, node, WorkerState.DRAINED)


# --- Dask tasks of who uses Dask directly ----------------------------------------------------------------------------


def waiting_for(gate: Gate) -> Callable[[], str]:
    """A function that travels by value, as those of a notebook do."""
    path = str(gate.path)

    def task() -> str:
        import os
        import time

        while not os.path.exists(path):  # noqa: PTH110 -- it runs where nothing else is installed
            time.sleep(0.01)
        return os.environ["ROCYARD_DEVICES"]

    return task


def direct_on(cluster: Cluster, node: str) -> list[SlotRow]:
    return [slot for slot in slots_on(cluster.state(), node) if slot.kind is SlotKind.DIRECT]


def test_a_dask_task_is_not_placed_on_a_cordoned_node_and_a_drain_waits_for_it(cluster: Cluster, gate: Gate) -> None:
    for node in ("node-0", "node-1"):
        cluster.client.cordon(node)
    with Client(cluster.dask_address(), timeout=10, set_as_default=False) as dask, rocyard_gpu(memory=gate.memory):
        future = dask.submit(waiting_for(gate), pure=False)
        eventually(lambda: held_direct(dask) == 1, 20, "a Dask task that waits for room")
        assert not direct_on(cluster, "node-0") + direct_on(cluster, "node-1"), "it was placed on a cordoned node"
        cluster.client.uncordon("node-1")
        eventually(lambda: direct_on(cluster, "node-1"), 20, "it runs on node-1")
        shown = eventually(lambda: [s for s in cluster.client.status().slots if s.kind == "direct"], 5, "it is shown")
        assert [(slot.tenant, slot.node) for slot in shown] == [("dask", "node-1")]
        assert "1 task of who uses Dask directly" in rocyard(cluster, "status").stdout
        cluster.client.drain("node-1")
        eventually(lambda: cluster.client.worker("node-1").state is WorkerState.DRAINING, 10, "node-1 draining")
        assert direct_on(cluster, "node-1")
        gate.open()
        assert future.result(timeout=20)
    wait_state(cluster, "node-1", WorkerState.DRAINED)


def held_direct(dask: Client) -> int:
    def count(dask_scheduler: Any) -> int:
        ledger = dask_scheduler.plugins["rocyard-placement"].ledger
        return sum(row.count for row in ledger.direct_waiting(0.0))

    return int(dask.run_on_scheduler(count))


# --- removal ------------------------------------------------------------------------------------------------------


def start_agent(cluster: Cluster, name: str, **settings: str) -> subprocess.Popen[bytes]:
    """An agent beside those of the supervisor, as ``rocyard node`` starts it."""
    output = (cluster.directory / f"{name}.log").open("wb")
    given = {
        "ROCYARD_STORE__URL": cluster.store_url(),
        "ROCYARD_DASK__PORT": cluster.dask_address().rpartition(":")[2],
        "ROCYARD_NODE__NAME": name,
        "ROCYARD_NODE__DEVICES": "simulated",
        "ROCYARD_NODE__SIMULATE": "4x2:mi300x",
        "ROCYARD_NODE__SIMULATED_NODE": "3",
        "ROCYARD_DATA_DIR": str(cluster.directory / "beside"),
        **settings,
    }
    command = [sys.executable, "-m", "manager.cli.main", "node"]
    with output:
        return subprocess.Popen(command, env={**cluster.environ, **given}, stdout=output, stderr=output)


def listed(cluster: Cluster, node: str) -> WorkerView | None:
    return next((view for view in cluster.client.workers() if view.node == node), None)


def test_a_removed_node_drains_its_agent_ends_for_good_and_it_is_in_no_list(cluster: Cluster, gate: Gate) -> None:
    agent = start_agent(cluster, "spare")
    try:
        eventually(lambda: (v := listed(cluster, "spare")) and v.state is WorkerState.LIVE, 30, "the spare node")
        for node in ("node-0", "node-1"):
            cluster.client.cordon(node)
        (task,) = gate.submit()
        assert node_of(cluster, task) == "spare"
        view = cluster.client.remove_worker("spare")
        assert (view.state, view.remove) == (WorkerState.DRAINING, True)
        assert agent.poll() is None
        for node in ("node-0", "node-1"):
            cluster.client.uncordon(node)
        gate.open()
        succeeded_once(cluster, [task])
        assert agent.wait(20) == REMOVED_EXIT
    finally:
        agent.kill()
        agent.wait(10)
    assert listed(cluster, "spare") is None, "a removed node is still listed"
    with pytest.raises(NotFound, match="no node 'spare'"):
        cluster.client.worker("spare")


# --- stopping and registering -------------------------------------------------------------------------------------


def test_sigterm_lets_tasks_finish_first_where_there_is_time(cluster: Cluster, gate: Gate) -> None:
    (task,) = gate.submit()
    node = node_of(cluster, task)
    agent = cluster.agent(node)
    agent.send_signal(signal.SIGTERM)
    view = wait_state(cluster, node, WorkerState.DRAINING)
    assert view.cordoned_by == "agent"
    more = gate.submit(2)
    assert [node_of(cluster, each) for each in more] == [other(node)] * 2, "a node that stops took on work"
    assert agent.is_running()
    gate.open()
    succeeded_once(cluster, [task, *more])
    eventually(lambda: not agent.is_running(), 20, "the end of the agent")
    wait_state(cluster, node, WorkerState.LIVE)  # its supervisor started the next one, and nothing of the drain is left


def test_a_second_sigterm_does_not_wait(cluster: Cluster, gate: Gate) -> None:
    (task,) = gate.submit()
    node = node_of(cluster, task)
    agent = cluster.agent(node)
    agent.send_signal(signal.SIGTERM)
    wait_state(cluster, node, WorkerState.DRAINING)
    agent.send_signal(signal.SIGTERM)
    eventually(lambda: not agent.is_running(), 10, "the end of the agent")
    cluster.wait_started(task, times=2)
    gate.open()
    succeeded_once(cluster, [task], attempt=2)


def test_an_agent_with_somebody_elses_devices_is_refused_until_these_are_free(cluster: Cluster) -> None:
    agent = start_agent(cluster, "double", ROCYARD_NODE__SIMULATED_NODE="0")
    try:
        said = eventually(
            lambda: [p for p in cluster.client.status().problems if "double" in p], 30, "a problem that names the node"
        )
        assert "may not join" in said[0]
        assert "is held by node node-0" in said[0]
        assert listed(cluster, "double") is None
        log = (cluster.directory / "double.log").read_text()
        assert "registration_refused" in log
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(15) == 0, "an agent that is refused does not stop when asked"
    finally:
        agent.kill()
        agent.wait(10)


def test_a_node_whose_dask_worker_does_not_report_takes_nothing_and_has_it_started_again(cluster: Cluster) -> None:
    """Nobody listens where it is told that the scheduler is: the agent lives, its Dask worker cannot register."""
    settings = {"DASK__PORT": "9", "NODE__REGISTRATION_S": "2", "NODE__MEMORY_RATIO_MAX": "0.5", "NODE__GROUP": "odd"}
    agent = start_agent(cluster, "mute", **{f"ROCYARD_{name}": value for name, value in settings.items()})
    try:
        view = eventually(lambda: listed(cluster, "mute"), 30, "the node")
        assert (view.state, view.group) == (WorkerState.REGISTERING, "odd")
        assert {device.usable_bytes for device in view.devices} == {96 * 2**30}
        log = cluster.directory / "mute.log"
        eventually(lambda: log.read_text().count("worker_not_registered") >= 2, 30, "its Dask worker started again")
        (group,) = [group for group in cluster.client.status().groups if group.name == "odd"]
        assert (group.workers, group.starting) == (1, 1)
    finally:
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0
    eventually(lambda: (v := listed(cluster, "mute")) and v.state is WorkerState.LEFT, 10, "a clean leave")


# --- warm and unload ----------------------------------------------------------------------------------------------


def idle(cluster: Cluster, memory_bytes: int) -> list[str]:
    return [s.slot_id for s in cluster.client.status().slots if s.memory_bytes == memory_bytes and s.idle_s is not None]


def test_warm_slots_are_open_before_the_first_task_and_unloading_closes_them(cluster: Cluster) -> None:
    view = cluster.client.warm("echo", slots=3, for_="10m", memory="3GiB")
    assert (view.slots, view.memory_bytes) == (3, 3 * 2**30)
    warm = eventually(lambda: w if len(w := idle(cluster, view.memory_bytes)) == 3 else None, 20, "three warm slots")
    assert [q.slots_warm for q in cluster.client.status().queues if q.shape_id == view.shape_id] == [3]
    began = time.monotonic()
    task = cluster.client.submit("echo", {"x": 1}, memory="3GiB")
    succeeded_once_quick = cluster.client.wait(task, 10)
    assert succeeded_once_quick.status is TaskStatus.SUCCEEDED
    assert time.monotonic() - began < 2, "the first task waited for a slot to open"
    # They outlive the time after which idle slots close (2 s here).
    eventually(
        lambda: all(s.idle_s is None or s.idle_s > 2.5 for s in cluster.client.status().slots if s.slot_id in warm),
        20,
        "warm slots that have been idle for longer than others may be",
    )
    assert sorted(idle(cluster, view.memory_bytes)) == sorted(warm), "a warm slot closed"
    found = cluster.client.unload("echo", memory="3GiB")
    assert (found.shapes, found.slots) == (1, 3)
    eventually(lambda: not idle(cluster, view.memory_bytes), 10, "the end of the idle slots")


def test_what_is_warm_makes_room_for_work(cluster: Cluster, gate: Gate) -> None:
    size = next(SIZES)
    cluster.client.warm("until", slots=4, for_="10m", memory=f"{size}GiB")
    eventually(lambda: len(idle(cluster, size * 2**30)) == 4, 20, "warm slots on all four devices")
    tasks = gate.submit(4)
    for task in tasks:
        cluster.wait_started(task)
    gate.open()
    succeeded_once(cluster, tasks)
    eventually(lambda: idle(cluster, size * 2**30), 20, "warm slots again, where work has left room")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        pytest.param({"slots": 1, "for_": "10m"}, BadRequest, "Name a function", id="nothing named"),
        pytest.param({"function": "ehco", "for_": "10m"}, NotFound, "Did you mean 'echo'", id="no such function"),
        pytest.param({"function": "echo", "for_": "10 years"}, BadRequest, "for: '10 years' is not a duration", id="no time"),
        pytest.param({"function": "echo", "for_": 0}, BadRequest, "for: must be more than 0", id="no time at all"),
        pytest.param({"function": "echo", "for_": "8d"}, BadRequest, "for: 192h 00m is over the limit", id="too long"),
        pytest.param({"function": "echo", "for_": "1m", "memory": "500GiB"}, Infeasible, "could ever hold", id="too large"),
        pytest.param({"function": "echo", "for_": "1m", "slots": 10_001}, BadRequest, "slots: Expected", id="too many"),
    ],
)
def test_what_cannot_be_kept_warm_is_refused_with_what_would_be_right(cluster: Cluster, given, error, words: str) -> None:
    with pytest.raises(error, match=words):
        cluster.client.warm(**given)


# --- who may, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["cordon", "uncordon", "drain", "remove_worker", "worker"])
def test_an_unknown_node_is_named_with_its_neighbours(cluster: Cluster, act: str) -> None:
    with pytest.raises(NotFound, match=r"no node 'node-7'\. Did you mean"):
        getattr(cluster.client, act)("node-7")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"deadline": "soon"}, "deadline: 'soon' is not a duration"),
        ({"deadline": "60d"}, "deadline: 1440h 00m is over the limit"),
        ({"deadlin": "5m"}, "Did you mean 'deadline'"),
        ({"remove": "yes"}, "remove: Expected `bool`"),
    ],
)
def test_a_drain_that_cannot_be_read_changes_nothing(cluster: Cluster, body: dict[str, str], words: str) -> None:
    address = cluster.client.address
    answer = httpx.post(
        f"{address.url}/v1/workers/node-0/drain",
        content=json.dumps(body),
        headers={"Authorization": f"Bearer {address.api_key.value}", "Content-Type": "application/json"},
    )
    assert (answer.status_code, words in answer.json()["detail"]) == (400, True), answer.text
    assert row(cluster, "node-0").cordon is Cordon.NONE


def test_only_admins_say_what_nodes_take_on_and_each_act_is_logged_with_its_key(cluster: Cluster) -> None:
    made = cluster.client.create_key("other")
    address = cluster.client.address
    user = {"Authorization": f"Bearer {made.key}"}
    for method, path in (("POST", "cordon"), ("POST", "uncordon"), ("POST", "drain"), ("DELETE", "")):
        answer = httpx.request(method, f"{address.url}/v1/workers/node-0/{path}".rstrip("/"), headers=user)
        assert answer.status_code == 403, f"{method} {path}"
    assert row(cluster, "node-0").cordon is Cordon.NONE
    other_tenants = httpx.post(f"{address.url}/v1/slots/unload?tenant=default", json={"all": True}, headers=user)
    assert other_tenants.status_code == 403
    own = httpx.post(f"{address.url}/v1/slots/unload", json={"all": True}, headers=user)
    assert own.json() == {"shapes": 0, "slots": 0}, "a tenant unloaded what is another's"
    cluster.client.cordon("node-0")
    log = (cluster.directory / "data" / "logs" / "api.log").read_text()
    audits = [json.loads(line) for line in log.splitlines() if '"audit"' in line]
    last = next(line for line in reversed(audits) if line["action"] == "cordon")
    admin = address.api_key.value.split("_")[1]
    assert (last["node"], last["key"]) == ("node-0", admin)
    assert made.key_id in {line["key"] for line in audits if line["action"] == "unload"}


def test_more_warm_slots_than_a_tenant_may_have_tasks_are_refused(cluster: Cluster) -> None:
    most = 10_000
    with pytest.raises((QuotaExceeded, BadRequest), match=str(most)):
        cluster.client.warm("echo", slots=most + 1, for_="1m")


# --- the command line ---------------------------------------------------------------------------------------------


def rocyard(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {**cluster.environ, "COLUMNS": "140", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "manager.cli.main", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_drain_that_waits_returns_when_the_node_is_empty(cluster: Cluster, gate: Gate) -> None:
    (task,) = gate.submit()
    node = node_of(cluster, task)
    environ = {**cluster.environ, "COLUMNS": "140"}
    command = [sys.executable, "-m", "manager.cli.main", "drain", node, "--wait"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as waiting:
        wait_state(cluster, node, WorkerState.DRAINING)
        shown = rocyard(cluster, "workers").stdout
        assert f"{node}" in shown
        assert "draining · 1 slot left" in shown
        assert waiting.poll() is None
        gate.open()
        output, _ = waiting.communicate(timeout=30)
        assert waiting.returncode == 0
    assert output.strip() == f"{node}: drained · 0 slots left"
    shown = rocyard(cluster, "status").stdout
    assert f"{node} has been drained" in shown
    assert "● scheduler" in shown
    assert rocyard(cluster, "uncordon", node).stdout.strip() == f"{node}: live · 0 running"


# --- the last one: node-1 does not come back ----------------------------------------------------------------------


def agents(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in cluster.find("manager.cli.process") if process.cmdline()[-1:] == ["node"]]


def test_the_supervisor_does_not_start_a_removed_node_again(cluster: Cluster) -> None:
    agent = cluster.agent("node-1")
    assert len(agents(cluster)) == 2
    done = rocyard(cluster, "drain", "node-1", "--remove", "--wait", "--deadline", "10s")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (0, "", "node-1 is gone")
    assert "node-1" not in states(cluster)
    eventually(lambda: not agent.is_running(), 10, "the end of its agent")
    # A restart would come after a fraction of a second: less than a few tasks and their looks take.
    for _ in range(3):
        cluster.wait_all([cluster.client.submit("echo", {"x": 1})])
    assert [found.node for found in cluster.state().nodes if not found.left] == ["node-0"]
    assert len(agents(cluster)) == 1
