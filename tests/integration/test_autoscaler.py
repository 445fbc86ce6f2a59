"""The autoscaler on a real cluster: nodes come for the work and go after it, whoever is killed in between."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from manager import ports
from manager.client import Task, task_request
from manager.core.answers_autoscaler import DecisionView
from manager.core.errors import RocyardError
from manager.core.ids import new_id
from manager.core.lifecycle import Cordon, TaskStatus
from manager.core.model import Submission, TaskSpec
from manager.core.quantities import GIB
from manager.core.shapes import Resources, shape_id, shape_of
from tests.integration.cluster import Cluster, eventually, program_or_skip

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PERIOD_S = 1.0
DEVICES = 4  # of a node of the group
GROUP = {
    "ROCYARD_AUTOSCALER__MODE": "active",
    "ROCYARD_AUTOSCALER__PERIOD_S": str(PERIOD_S),
    "ROCYARD_AUTOSCALER__TERM_S": "3",
    "ROCYARD_AUTOSCALER__DOWN_WINDOW_S": "2",
    "ROCYARD_AUTOSCALER__METRICS_STALE_S": "8",
    "ROCYARD_AUTOSCALER__STEP_UP_MAX": "2",
    # One slot for each task, however long those before it took.
    "ROCYARD_AUTOSCALER__DRAIN_TARGET_S": "0.1",
    "ROCYARD_SLOTS__OPEN_DEADLINE_S": "3",
    "ROCYARD_GROUPS__BIG__DEVICES": f"{DEVICES}:mi300x",
    "ROCYARD_GROUPS__BIG__WORKERS_MIN": "0",
    "ROCYARD_GROUPS__BIG__WORKERS_MAX": "6",
}
BASE = "1x1:w7900"
"""A node of no group, too small for what is asked: the cluster has a part that nobody adds or removes."""


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("scaled"), GROUP, simulate=BASE)
    try:
        cluster.start()
        eventually(lambda: _knows(cluster), 20, "an autoscaler that knows the need")
        yield cluster
    finally:
        cluster.destroy()


def _decisions(cluster: Cluster) -> list[DecisionView]:
    return list(cluster.client.decisions())


def _knows(cluster: Cluster) -> bool:
    return any(not decision.metrics for decision in _decisions(cluster))


def _added(cluster: Cluster, since: int) -> list[str]:
    """Names of all nodes that were added by decisions after the first `since` ones."""
    newest = _decisions(cluster)[: max(0, len(_decisions(cluster)) - since)]
    return [name for each in newest for action in each.actions if action.action == "add" for name in action.names]


def _group_nodes(cluster: Cluster) -> dict[str, str]:
    """Live nodes of the group, and what they are told to take."""
    rows = cluster.state().nodes
    return {row.node: row.cordon.value for row in rows if row.info.group == "big" and not row.left and not row.fenced}


def _agents(cluster: Cluster) -> int:
    """Processes of node agents, the base one aside."""
    found = [process for process in cluster.family() if _line(process)[-2:] == ["manager.cli.process", "node"]]
    return len(found) - 1


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _gated(cluster: Cluster, name: str, count: int, memory: str = "190GiB") -> tuple[Path, list[Task]]:
    """Tasks that each take a whole device until a file appears."""
    gate = cluster.directory / f"gate-{name}"
    args = {"path": str(cluster.witness_path), "gate": str(gate)}
    return gate, cluster.client.submit_many(task_request("until", args, memory=memory) for _ in range(count))


def _empty(cluster: Cluster) -> None:
    eventually(lambda: not _group_nodes(cluster) and _agents(cluster) == 0, 60, "a group without nodes")


def test_work_gets_its_packed_need_in_two_periods_and_the_nodes_go_under_running_tasks(scaled: Cluster) -> None:
    before = len(_decisions(scaled))
    short, tasks = _gated(scaled, "short", 4 * DEVICES - 2)
    long, kept = _gated(scaled, "long", 2)
    eventually(lambda: all(scaled.started(task) for task in (*tasks, *kept)), 90, "all tasks at once")
    assert len(_added(scaled, before)) == 4, "so many whole devices are four nodes, and no more"
    new = _decisions(scaled)[: len(_decisions(scaled)) - before][::-1]
    first_two = [decision for decision in new if decision.groups[0].need][:2]
    assert sum(len(action.names) for decision in first_two for action in decision.actions if action.action == "add") == 4
    assert (first_two[1].at - first_two[0].at).total_seconds() < 2 * PERIOD_S + 3  # which is for a loaded machine

    short.touch()
    scaled.wait_all(tasks)
    busy = {scaled.client.get(task.task_id).node for task in kept}
    eventually(lambda: set(_group_nodes(scaled)) == busy, 60, "only the nodes that work")
    assert all(scaled.client.get(task.task_id).status is TaskStatus.RUNNING for task in kept)
    long.touch()
    views = scaled.wait_all(kept)
    assert [view.attempt for view in views] == [1, 1]
    _empty(scaled)
    for task in (*tasks, *kept):
        assert len(scaled.started(task)) == 1
        assert scaled.client.get(task.task_id).status is TaskStatus.SUCCEEDED
    assert len(_added(scaled, before)) == 4


def test_killed_in_the_middle_of_a_scale_up_all_converge_without_orphans(scaled: Cluster) -> None:
    _empty(scaled)
    before = len(_decisions(scaled))
    gate, tasks = _gated(scaled, "killed", 4 * DEVICES)
    eventually(
        lambda: _agents(scaled) > 0,
        20,
        "the first of its nodes",
    )
    victims = {role: scaled.role(role) for role in ("autoscaler", "controller", "api")}
    for victim in victims.values():
        victim.send_signal(signal.SIGKILL)
    for role, victim in victims.items():
        scaled.wait_role(role, victim.pid)
    eventually(lambda: all(scaled.started(task) for task in tasks), 90, "all tasks at once")
    assert len(_group_nodes(scaled)) == _agents(scaled) == 4
    eventually(lambda: _answers(scaled), 20, "the API")
    assert len(_added(scaled, before)) <= 4  # what a killed autoscaler did last may not stand in the journal
    gate.touch()
    for view in scaled.wait_all(tasks):
        assert view.status is TaskStatus.SUCCEEDED
    assert all(len(scaled.started(task)) == 1 for task in tasks)
    _empty(scaled)


def _answers(cluster: Cluster) -> bool:
    try:
        return bool(cluster.client.autoscaler())
    except RocyardError:
        return False


def test_two_hundred_tasks_that_nothing_could_hold_start_no_node(scaled: Cluster) -> None:
    _empty(scaled)
    before = len(_decisions(scaled))
    # The API would refuse them: such tasks come from a time when there were larger nodes.
    shape = shape_of("default", "default", Resources(500 * GIB))
    spec = TaskSpec("echo", b"{}", Resources(500 * GIB))  # type: ignore[arg-type]
    ids = [new_id() for _ in range(200)]
    submissions = [Submission(task_id, shape_id(shape), shape, spec) for task_id in ids]
    scaled.with_store(lambda store: store.submit("default", 1000, submissions))
    eventually(
        lambda: scaled.client.autoscaler().last.infeasible == {"ExceedsLargestDevice": 200}, 20, "the reason in the journal"
    )
    _, possible = _gated(scaled, "possible", 1)
    scaled.wait_started(possible[0])
    assert _agents(scaled) == 1, "one node, for the one task that is possible"
    for task_id in ids:
        scaled.client.cancel(task_id)
    (scaled.directory / "gate-possible").touch()
    scaled.wait_all(possible)
    assert len(_added(scaled, before)) == 1
    _empty(scaled)


def test_an_operators_cordon_is_kept_and_the_history_is_shown(scaled: Cluster) -> None:
    _empty(scaled)
    gate, tasks = _gated(scaled, "cordon", 1)
    scaled.wait_started(tasks[0])
    (node,) = _group_nodes(scaled)
    scaled.with_store(lambda store: store.cordon(node, Cordon.DRAIN, "operator"))
    gate.touch()
    scaled.wait_all(tasks)
    # Another task needs a node of its own, and when that one has come and gone, the cordoned one is still there.
    gate, tasks = _gated(scaled, "beside", 1, "180GiB")  # of another shape: no slot is open for it there
    scaled.wait_started(tasks[0])
    assert len(_group_nodes(scaled)) == 2
    gate.touch()
    scaled.wait_all(tasks)
    eventually(lambda: _group_nodes(scaled) == {node: "drain"}, 60, "the drained node alone")
    scaled.with_store(lambda store: store.cordon(node, Cordon.NONE, "operator"))
    _empty(scaled)
    shown = scaled.client.autoscaler()
    assert [(group.name, group.workers_max) for group in shown.groups] == [("big", 6)]
    assert shown.last is not None
    environ = {**scaled.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "manager.cli.main", "autoscaler", "history", "--limit", "3", "--output", "json"]
    said = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    listed = json.loads(said.stdout)
    assert len(listed) == 3
    assert listed[0]["id"] >= shown.last.id
    assert {group["group"] for group in listed[0]["groups"]} == {"big"}


# --- with a Prometheus ------------------------------------------------------------------------------------------------


def _scrape_config(cluster: Cluster) -> str:
    """Every process that shows metrics, as a person would list them."""
    urls = {service.name: service.metrics_url for service in cluster.client.status().services}
    urls |= {"api": f"{cluster.client.address.url}/metrics"}
    dashboard = next(line.split()[-1] for line in cluster.output.read_text().splitlines() if line.startswith("metrics"))
    urls |= {"scheduler": dashboard}
    jobs = [
        {
            "job_name": name.replace("/", "-"),
            "static_configs": [{"targets": [httpx.URL(url).netloc.decode()]}],
        }
        for name, url in sorted(urls.items())
    ]
    assert len(jobs) >= 6
    return json.dumps({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs})


def test_a_real_prometheus_scrapes_every_process_and_the_autoscaler_decides_from_it(tmp_path: Path) -> None:
    program = program_or_skip("prometheus", "prometheus")
    port = ports.free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    # It goes silent within the window in which nothing goes yet.
    environ = {**GROUP, "ROCYARD_AUTOSCALER__PROMETHEUS_URL": url, "ROCYARD_AUTOSCALER__DOWN_WINDOW_S": "4"}
    cluster = Cluster(tmp_path, environ, simulate=BASE)
    prometheus: subprocess.Popen[bytes] | None = None
    try:
        cluster.start()
        eventually(lambda: _decisions(cluster), 20, "a decision")
        assert "Prometheus cannot be read" in _decisions(cluster)[0].metrics
        config = tmp_path / "prometheus.yml"
        config.write_text(_scrape_config(cluster))
        with (tmp_path / "prometheus.log").open("wb") as output:
            prometheus = subprocess.Popen(
                [
                    program,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=output,
                stderr=output,
            )
        eventually(lambda: _all_up(url), 30, "every process scraped")
        eventually(lambda: not _decisions(cluster)[0].metrics, 20, "a decision from Prometheus")

        before = len(_decisions(cluster))
        gate, tasks = _gated(cluster, "prometheus", DEVICES + 1)
        eventually(lambda: all(cluster.started(task) for task in tasks), 60, "all tasks at once")
        assert len(_added(cluster, before)) == 2
        gate.touch()
        cluster.wait_all(tasks)
        prometheus.send_signal(signal.SIGKILL)
        prometheus.wait(5)
        eventually(lambda: "Prometheus cannot be read" in _decisions(cluster)[0].metrics, 20, "nothing known any more")
        held = len(_group_nodes(cluster))
        assert held > 0
        assert not any(action.action == "remove" for action in _decisions(cluster)[0].actions)
    finally:
        if prometheus is not None:
            prometheus.kill()
        cluster.destroy()


def _all_up(url: str) -> bool:
    try:
        answer = httpx.post(f"{url}/api/v1/query", data={"query": "up"}, timeout=2.0).json()
    except (httpx.HTTPError, ValueError):
        return False
    values = [series["value"][1] for series in answer["data"]["result"]]
    return len(values) >= 6 and set(values) == {"1"}
