"""What somebody with a Dask client can do to a running cluster, and what not."""

import os
from pathlib import Path

import dask
import pytest
from distributed import Client as DaskClient

import rocyard
from manager.core.lifecycle import TaskStatus
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.timeout(180)


def _gated(cluster: Cluster, name: str) -> tuple[object, str]:
    gate = str(cluster.directory / name)
    task = cluster.client.submit("until", {"path": str(cluster.witness_path), "gate": gate}, memory="20GiB")
    cluster.wait_started(task)
    return task, gate


def test_plain_futures_run_beside_slots_and_see_no_device(cluster: Cluster) -> None:
    task, gate = _gated(cluster, "plain")
    with DaskClient(cluster.dask_address(), timeout=10, set_as_default=False) as client:
        assert client.gather(client.map(lambda x: x + 1, range(50)), errors="raise") == list(range(1, 51))
        visible = client.submit(lambda: os.environ["ROCR_VISIBLE_DEVICES"], pure=False).result(timeout=30)
        assert visible == "-1"
    Path(gate).touch()
    assert cluster.wait_all([task])[0].status is TaskStatus.SUCCEEDED  # type: ignore[list-item]


def test_a_gpu_annotation_gives_a_task_a_device_and_a_bad_one_is_refused_clearly(cluster: Cluster) -> None:
    with DaskClient(cluster.dask_address(), timeout=10, set_as_default=False) as client:
        with dask.annotate(gpu={"memory": "16GiB"}):
            device = client.submit(lambda: os.environ["ROCYARD_DEVICES"], pure=False)
        with dask.annotate(gpu={"memory": "16GiB", "devices": 2}):
            wrong = client.submit(lambda: 1, pure=False)
        known = {each.uuid for row in cluster.state().nodes for each in row.info.devices}
        assert device.result(timeout=30) in known
        with pytest.raises(rocyard.GpuAnnotationRefused, match="'devices', which means nothing"):
            wrong.result(timeout=30)


def test_cancel_and_restart_of_a_client_end_no_slot(cluster: Cluster) -> None:
    task, gate = _gated(cluster, "restart")
    before = {slot.slot_id for slot in cluster.state().slots}
    with DaskClient(cluster.dask_address(), timeout=10, set_as_default=False) as client:
        key = next(f"slot-{slot_id}" for slot_id in before)
        client.cancel([key], force=True)
        client.restart(timeout=30, wait_for_workers=False)
    eventually(lambda: all(row.address for row in cluster.state().nodes), 20, "the Dask workers' return")
    assert len(cluster.started(task)) == 1  # type: ignore[arg-type]
    Path(gate).touch()
    (view,) = cluster.wait_all([task])  # type: ignore[list-item]
    assert view.status is TaskStatus.SUCCEEDED
    assert view.attempt == 1
    after = cluster.client.submit("echo", {"x": 1}, memory="50GiB")
    assert after.result(30) == {"x": 1}
