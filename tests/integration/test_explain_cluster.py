"""Why a task waits, on a real cluster whose devices somebody else uses."""

import pytest

from manager.core.lifecycle import TaskStatus
from manager.core.quantities import GIB
from plugins.node.devices.simulated import DeviceFault, Faults, write_faults
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.timeout(120)


def test_memory_of_strangers_is_never_promised(cluster: Cluster) -> None:
    folders = [cluster.directory / "data" / "nodes" / node / "devices" for node in ("node-0", "node-1")]
    strangers = Faults(devices={str(index): DeviceFault(foreign_bytes=150 * GIB) for index in range(2)})

    def foreign() -> list[int]:
        return [device.foreign_bytes for worker in cluster.client.workers() for device in worker.devices]

    for folder in folders:
        write_faults(folder, strangers)
    try:
        eventually(lambda: all(size >= 150 * GIB for size in foreign()), 20, "the strangers to be seen")
        task = cluster.client.submit("hold", {"path": str(cluster.witness_path), "seconds": 0}, memory="100GiB")
        eventually(lambda: task.explain().reason == "ForeignMemory", 20, "the reason")
        assert not cluster.started(task)
    finally:
        for folder in folders:
            write_faults(folder, Faults())
    assert cluster.wait_all([task])[0].status is TaskStatus.SUCCEEDED
