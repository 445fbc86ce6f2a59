"""What Dask's own GPU pages read of a worker, and what the leader says of nodes."""

import asyncio

import msgspec
import pytest
from prometheus_client import REGISTRY

from manager.core.devices import parse_fleet
from manager.core.lifecycle import Cordon
from manager.core.model import DeviceUse
from manager.core.quantities import GIB
from manager.leader_metrics import NODE_STATES, LeaderMetrics, node_state
from plugins.gpu_metrics import GpuMetrics, attach_gpu_metrics
from plugins.node.link import encode_report
from tests.unit import factories as make


class PlayedReadings:
    def __init__(self, *uses: DeviceUse):
        self.said = uses

    async def report(self, _):
        return encode_report(make.report("a", [100, 50]))

    def uses(self):
        return self.said


class PlayedWorker:
    def __init__(self):
        self.metrics = {}
        self.startup_information = {}


def registered(*uses: DeviceUse) -> GpuMetrics:
    gpu = GpuMetrics(PlayedReadings(*uses))
    assert asyncio.run(gpu.startup(None)) == {"memory-total": 150 * GIB, "name": "2 × test"}
    return gpu


def test_a_worker_shows_the_sum_of_its_devices():
    busy = [
        DeviceUse(uuid="d0", used_bytes=30 * GIB, foreign_bytes=GIB, utilisation_ratio=0.5),
        DeviceUse(uuid="d1", used_bytes=10 * GIB, utilisation_ratio=1.0),
    ]
    gpu = registered(*busy)
    assert gpu.memory_used(None) == 40 * GIB
    assert gpu.memory_total(None) == 150 * GIB
    assert gpu.utilisation(None) == 75.0
    assert gpu.gpu(None) == {"utilization": 75.0, "memory-used": 40 * GIB}
    assert [(device["uuid"], device.get("memory-used")) for device in gpu.each_device(None)] == [
        ("d0", 30 * GIB),
        ("d1", 10 * GIB),
    ]


def test_a_device_that_cannot_be_read_is_not_shown_as_full():
    gpu = registered(DeviceUse(uuid="d0", used_bytes=100 * GIB, healthy=False, problem="ring hang"))
    assert gpu.memory_used(None) == 0
    assert gpu.utilisation(None) == 0.0
    sick, unread = gpu.each_device(None)
    assert (sick["healthy"], sick["problem"], "memory-used" in sick) == (False, "ring hang", False)
    assert "healthy" not in unread


def test_every_key_that_the_pages_read_is_given():
    worker = PlayedWorker()
    attach_gpu_metrics(worker, PlayedReadings())
    assert {"gpu_memory_used", "gpu-memory-total", "gpu_utilization", "gpu", "rmm"} < worker.metrics.keys()
    assert set(worker.startup_information) == {"gpu"}


@pytest.mark.parametrize(
    ("changes", "silent", "expected"),
    [
        ({}, False, "live"),
        ({}, True, "silent"),
        ({"fenced": True}, True, "lost"),
        ({"address": ""}, False, "no_worker"),
        ({"cordon": Cordon.CORDON}, False, "cordoned"),
        ({"cordon": Cordon.DRAIN}, False, "draining"),
        ({"cordon": Cordon.DRAIN, "address": ""}, False, "no_worker"),
    ],
)
def test_the_state_of_a_node(changes, silent, expected):
    row = msgspec.structs.replace(make.node_row("a", [100]), **changes)
    assert node_state(row, silent=silent) == expected
    assert expected in NODE_STATES


def sample(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def test_the_leader_tells_of_nodes_and_waits_and_who_stops_leading_does_not():
    shape = make.shape(8)
    queues = [make.queue("x", shape, 1, waited_s=30), make.queue("y", shape, 2, waited_s=90), make.queue("z", shape, 0)]
    state = make.state(queues, nodes={"a": [100], "b": [100]})
    left = make.node_row("c", [100], left=True)
    state = msgspec.structs.replace(state, nodes=(*state.nodes, left))
    metrics = LeaderMetrics(lease_s=10.0)
    metrics.show(state, lambda row: 6.0 if row.node == "b" else 1.0)
    metrics.show_fsync("everysec")
    assert [sample("rocyard_nodes", state=name) for name in ("live", "silent", "lost")] == [1, 1, 0]
    assert sample("rocyard_queue_oldest_wait_seconds") == 90
    assert sample("rocyard_store_unsynced") == 1
    metrics.hide()
    assert sample("rocyard_nodes", state="live") is None
    assert sample("rocyard_queue_oldest_wait_seconds") == 0
    assert sample("rocyard_store_unsynced") == 0


@pytest.mark.parametrize(("policy", "expected"), [("always", 0), ("unknown", 0), ("no", 1), ("off", 1)])
def test_only_a_store_that_is_known_not_to_sync_is_told_of(policy, expected):
    metrics = LeaderMetrics(10.0)
    metrics.show_fsync(policy)
    assert sample("rocyard_store_unsynced") == expected
    metrics.hide()


def test_memory_that_devices_share_is_summed_once():
    devices = parse_fleet("1x1:mi300x/cpx-nps4")[0].devices
    readings = PlayedReadings(*(DeviceUse(uuid=device.uuid, used_bytes=3 * GIB) for device in devices))
    gpu = GpuMetrics(readings)
    gpu.devices = devices
    assert (gpu.memory_total(None), gpu.memory_used(None)) == (192 * GIB, 4 * 3 * GIB)
