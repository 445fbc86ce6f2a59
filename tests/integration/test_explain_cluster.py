"""Why a task waits, on a real cluster whose devices somebody else uses."""

import re

import pytest

from manager.client import task_request
from manager.core.foresee import When
from manager.core.lifecycle import TaskStatus
from manager.core.mix import Mix
from manager.core.quantities import GIB
from manager.core.snapshot import decode_snapshot, encode_snapshot, replays
from manager.policies import policy_named, policy_names
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
        found = eventually(lambda: (e := task.explain()).reason == "ForeignMemory" and e, 20, "the reason")
        assert re.search(r"ForeignMemory 150 GiB on node-[01]/gpu-[01]", found.message)
        assert found.nearest is not None
        assert (found.nearest.foreign_bytes, found.start_s) == (150 * GIB, None)
        assert any(each.what.startswith("free ") for each in found.unblocks)
        planned = cluster.client.plan(task_request("hold", memory="100GiB"))
        assert (planned.when, planned.requests[0].reason) == (When.LATER, "ForeignMemory")
        assert not cluster.started(task)
    finally:
        for folder in folders:
            write_faults(folder, Faults())
    assert cluster.wait_all([task])[0].status is TaskStatus.SUCCEEDED


def test_a_task_lands_where_the_plan_said(cluster: Cluster) -> None:
    request = task_request("hold", {"path": str(cluster.witness_path), "seconds": 0}, memory="101GiB", gpus=2)
    planned = eventually(lambda: (view := cluster.client.plan(request)).when is When.NOW and view, 30, "room for it")
    (task,) = cluster.client.submit_many([request])
    view = cluster.wait_all([task])[0]
    assert view.status is TaskStatus.SUCCEEDED
    assert view.node in {place.node for place in planned.requests[0].places}


def test_a_snapshot_of_a_live_cluster_replays(cluster: Cluster) -> None:
    snapshot = cluster.client.snapshot()
    assert {row.node for row in snapshot.state.nodes} >= {"node-0", "node-1"}
    again = decode_snapshot(encode_snapshot(snapshot))
    policies = [policy_named(name) for name in policy_names()]
    assert replays(again, policies) == replays(snapshot, policies)


def test_what_the_scheduler_has_learned_is_known_outside_and_outlives_it(cluster: Cluster) -> None:
    def learned(sizes: range) -> Mix:
        """What the store has, once slots of all these sizes were asked for and the scheduler has told of them."""
        call = {"path": str(cluster.witness_path), "seconds": 0}
        cluster.wait_all([cluster.client.submit("hold", call, memory=f"{size}GiB") for size in sizes])

        def told() -> Mix | None:
            mix = cluster.state().mix
            return mix if any(needs.memory_bytes // GIB in sizes for needs, _ in mix.shares) else None

        return eventually(told, 20, "what was learned, in the store")

    before = learned(range(2, 10))
    assert cluster.client.snapshot().demand == before.shares
    scheduler = cluster.role("scheduler")
    scheduler.kill()
    cluster.wait_role("scheduler", scheduler.pid)
    after = learned(range(12, 20))
    assert after.counted > before.counted, "the next scheduler began anew"
    assert {needs for needs, _ in before.shares} <= {needs for needs, _ in after.shares}
