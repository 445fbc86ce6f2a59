"""Everything that a person can ask for, on a real cluster of three kinds of devices."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributed import Client as DaskClient
from distributed import Future

import rocyard
from manager.cli.exits import Exit
from manager.client import Task, task_request
from manager.core.answers import resources_in
from manager.core.answers_tasks import TaskView
from manager.core.errors import BadRequest, Infeasible
from manager.core.lifecycle import TaskStatus
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from tests.integration.cluster import Cluster, eventually
from tests.integration.test_cli_cluster import rocyard as command

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

AMD, DESK, GREEN = "node-0", "node-1", "node-2"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two MI300X, one RX 7900 XTX, one H100; all nodes are in zone a."""
    directory = tmp_path_factory.mktemp("mixed")
    environ = {"ROCYARD_NODE__LABELS__ZONE": "a", "ROCYARD_SLOTS__IDLE_S": "0.5"}
    cluster = Cluster(directory, environ, "1x2:mi300x,1x1:rx7900xtx,1x1:h100")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


class Gate:
    """Tasks that run until it is opened."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster = cluster
        self.path = path

    def submit(self, **needs: Any) -> Task:
        args = {"path": str(self.cluster.witness_path), "gate": str(self.path)}
        return self.cluster.client.submit("until", args, **{"memory": "1GiB", **needs})

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(mixed: Cluster, tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(mixed, tmp_path / "gate")
    yield gate
    gate.open()
    ids = [event["task"] for event in mixed.witness()]
    assert all(view.status is TaskStatus.SUCCEEDED for view in mixed.wait_all([Task(mixed.client, task) for task in set(ids)]))


def where(cluster: Cluster, task: Task) -> tuple[str, tuple[str, ...]]:
    """The node of a running task and its devices, as it saw them itself."""
    event = cluster.wait_started(task)
    view = eventually(lambda: found if (found := task.view()).node else None, 10, "its node")
    return view.node or "", tuple(event["devices"])


@pytest.mark.parametrize(
    ("needs", "node"),
    [
        ({"architecture": "gfx942"}, AMD),
        ({"architecture": ["rdna3", "gfx950"]}, DESK),
        ({"architecture": "sm_9*", "labels": {"zone": "a"}}, GREEN),
        ({"device_model": "MI325X|h100"}, GREEN),
        ({"device_model": "radeon", "share": "50%", "cpus": 0.5, "host_memory": "1MiB"}, DESK),
        ({"memory": "100GiB", "gpus": 2}, AMD),
    ],
)
def test_a_task_lands_where_its_selectors_say(mixed: Cluster, gate: Gate, needs: dict[str, Any], node: str) -> None:
    task = gate.submit(**needs)
    found, devices = where(mixed, task)
    assert found == node
    assert len(devices) == needs.get("gpus", 1)


IMPOSSIBLE = [
    ({"memory": "500GiB"}, "ExceedsLargestDevice", AMD),
    ({"architecture": "gfx950"}, "NoMatchingArchitecture", None),
    ({"architecture": "gfx1100", "memory": "30GiB"}, "ExceedsLargestDevice", DESK),
    ({"device_model": "MI355X"}, "NoMatchingDevice", None),
    ({"labels": {"zone": "b"}}, "NoMatchingLabels", None),
    ({"gpus": 3}, "TooFewDevices", AMD),
    ({"architecture": "hopper", "gpus": 2}, "NoMatchingArchitecture", None),
    ({"cpus": 4000}, "ExceedsHost", None),
]


@pytest.mark.parametrize(("needs", "reason", "node"), IMPOSSIBLE)
def test_what_could_never_run_is_refused_at_once(mixed: Cluster, needs: dict[str, Any], reason: str, node: str | None) -> None:
    began_s = time.monotonic()
    with pytest.raises(Infeasible) as refused:
        mixed.client.submit("echo", {}, **{"memory": "1GiB", **needs})
    assert time.monotonic() - began_s < 1.0
    assert refused.value.details["reason"] == reason
    assert node in {None, refused.value.details["node"]}
    with pytest.raises(Infeasible, match=r"tasks\[1\]\.resources\."):
        mixed.client.submit_many([task_request("echo", {}), task_request("echo", {}, **{"memory": "1GiB", **needs})])


def test_what_could_never_run_is_kept_where_the_caller_says_so(mixed: Cluster) -> None:
    task = mixed.client.submit("echo", {}, memory="1GiB", architecture="gfx950", allow_infeasible=True)
    try:
        eventually(lambda: task.explain().reason == "NoMatchingArchitecture", 20, "the reason")
        assert task.view().status is TaskStatus.QUEUED
    finally:
        task.cancel()
    assert task.wait(10).status is TaskStatus.CANCELLED


def test_who_asks_for_a_device_alone_is_alone_on_it(mixed: Cluster, gate: Gate) -> None:
    alone = gate.submit(architecture="gfx942", exclusive=True)
    _, (mine,) = where(mixed, alone)
    others = [gate.submit(architecture="gfx942", memory="4GiB") for _ in range(3)]
    theirs = {device for task in others for device in where(mixed, task)[1]}
    assert mine not in theirs
    second = gate.submit(architecture="gfx942", exclusive=True, memory="2GiB")  # of one shape they would take turns
    eventually(lambda: second.explain().reason == "DeviceInUse", 20, "the reason")
    shown = [device for device in mixed.client.worker(AMD).devices if device.exclusive]
    assert [device.uuid for device in shown] == [mine]
    gate.open()
    mixed.wait_started(second)


def test_two_halves_fill_a_device_and_a_third_waits(mixed: Cluster, gate: Gate) -> None:
    halves = [gate.submit(architecture="sm_90", share=0.5), gate.submit(architecture="sm_90", share="50%", memory="2GiB")]
    assert {where(mixed, task)[0] for task in halves} == {GREEN}
    third = gate.submit(architecture="sm_90", share=0.1, memory="3GiB")
    eventually(lambda: third.explain().reason == "InsufficientShare", 20, "the reason")
    assert not mixed.started(third)
    assert mixed.client.worker(GREEN).devices[0].share_leased == 1.0
    plain = gate.submit(architecture="sm_90", memory="4GiB")  # asks for no share, so none is counted
    assert where(mixed, plain)[0] == GREEN
    gate.open()
    mixed.wait_started(third)


def test_what_was_asked_for_is_shown_as_it_was(mixed: Cluster) -> None:
    task = mixed.client.submit(
        "echo", {}, memory="1.5GiB", architecture="CDNA3, sm_90", device_model="H100|MI300X", labels={"zone": "a"}, cpus=0.5,
        host_memory="10MiB", share="25%", exclusive=True, model="m:1", priority="high",
    )  # fmt: skip
    view = task.wait(30)
    assert view.priority == 5
    assert view.resources is not None
    assert resources_in(view.resources) == Resources(
        GIB * 3 // 2, 1, 250, ("cdna3", "sm_90"), "h100|mi300x", (("zone", "a"),), 500, 10 * 2**20, exclusive=True, model="m:1"
    )
    plain = mixed.client.submit("echo", {}, memory="1GiB").view()
    assert json.loads(msgspec.json.encode(plain))["resources"] == {"memory_bytes": GIB}


def test_nonsense_names_its_field_and_what_would_be_right(mixed: Cluster) -> None:
    for needs, words in (
        ({"share": 50}, "resources.share: 50.0 is not a share"),
        ({"architecture": "cdna33"}, "did you mean 'cdna3'"),
        ({"priority": "urgnet"}, "did you mean 'urgent'"),
    ):
        with pytest.raises(BadRequest, match=words):
            mixed.client.submit("echo", {}, **needs)  # type: ignore[arg-type]


def test_the_command_line_says_the_same(mixed: Cluster) -> None:
    wants = ["--memory", "1GiB", "--architecture", "rdna3", "--architecture", "sm_90", "--label", "zone=a", "--share", "50%"]
    done = command(mixed, "submit", *wants, "--priority", "low", "--wait", "-o", "json", "echo", '{"x": 1}')
    assert done.returncode == Exit.OK, done.stderr
    view = msgspec.json.decode(done.stdout, type=TaskView)
    assert view.node in {DESK, GREEN}
    assert view.priority == -5
    shown = command(mixed, "show", view.task_id)
    assert "gfx" not in shown.stdout
    assert "rdna3 or sm_90, 50 % of the compute, zone=a" in " ".join(shown.stdout.split())
    refused = command(mixed, "submit", "--label", "zone=b", "echo")
    assert refused.returncode == Exit.REFUSED
    assert "no node has zone=b. Labels of nodes: zone=a." in refused.stderr
    kept = command(mixed, "submit", "--label", "zone=b", "--allow-infeasible", "echo")
    assert kept.returncode == Exit.OK
    assert command(mixed, "cancel", kept.stdout.strip()).returncode == Exit.OK


def test_a_dask_task_lands_where_its_annotation_says(mixed: Cluster) -> None:
    with DaskClient(mixed.dask_address(), timeout=10, set_as_default=False) as client:

        def ask() -> Future:
            return client.submit(os.getenv, "ROCYARD_DEVICES", pure=False)

        with rocyard.gpu("1GiB", architecture=["rdna3", "gfx950"], share="50%", labels={"zone": "a"}, cpus=0.5):
            future = ask()
        assert future.result(timeout=60) == "SIM-001-00"  # of node-1
        with rocyard.gpu("1GiB", architecture="sm_90", model="m"):
            future = ask()
        assert future.result(timeout=60) == "SIM-002-00"
    with pytest.raises(rocyard.GpuAnnotationRefused, match="did you mean 'cdna3'"):
        rocyard.gpu("1GiB", architecture="cdna33")
