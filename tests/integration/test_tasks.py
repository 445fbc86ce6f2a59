"""What a person can ask of a task, on a real cluster: limits, cancellation, crashes, memory, logs, environment."""

import time
from pathlib import Path

import pytest

from manager.core.lifecycle import TaskStatus
from manager.core.quantities import GIB
from tests.integration.cluster import Cluster, eventually, overcommitted

pytestmark = pytest.mark.timeout(180)
MI300X_BYTES = 192 * GIB


def test_a_segfault_fails_alone_after_three_crashes(cluster: Cluster) -> None:
    path = str(cluster.witness_path)
    neighbours = [cluster.client.submit("hold", {"path": path, "seconds": 0.05}) for _ in range(20)]
    poison = cluster.client.submit("segfault", {"path": path})
    more = [cluster.client.submit("hold", {"path": path, "seconds": 0.05}) for _ in range(20)]
    (view,) = cluster.wait_all([poison])
    assert view.status is TaskStatus.FAILED
    assert view.error is not None
    assert view.error.type == "ExecutorCrashed"
    assert "SIGSEGV" in view.error.message
    assert view.crashes == 3
    for neighbour in cluster.wait_all([*neighbours, *more]):
        assert neighbour.status is TaskStatus.SUCCEEDED
        assert (neighbour.crashes, neighbour.failures) == (0, 0)


def test_a_task_over_its_time_limit_is_ended_and_its_memory_is_free(cluster: Cluster) -> None:
    task = cluster.client.submit("sleep", {"seconds": 600, "memory_bytes": 100 * GIB}, memory="120GiB", time_limit=1.0)
    began = time.monotonic()
    (view,) = cluster.wait_all([task], 30)
    assert view.status is TaskStatus.FAILED
    assert view.error is not None
    assert view.error.type == "TimeLimitExceeded"
    assert time.monotonic() - began < 20

    def used() -> int:
        return sum(d.used_bytes or 0 for worker in cluster.client.workers() for d in worker.devices)

    eventually(lambda: used() < 100 * GIB, 10, "the memory of the ended task")


@pytest.mark.parametrize("function", ["hold", "stubborn"])
def test_cancel_ends_a_running_task_within_five_seconds(cluster: Cluster, function: str) -> None:
    args = {"path": str(cluster.witness_path)} | ({"seconds": 600} if function == "hold" else {})
    task = cluster.client.submit(function, args)
    pid = cluster.wait_started(task)["pid"]
    began = time.monotonic()
    task.cancel()
    (view,) = cluster.wait_all([task], 10)
    assert view.status is TaskStatus.CANCELLED
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{pid}").exists() or function == "hold"


def test_a_queued_task_is_cancelled_at_once_and_never_starts(cluster: Cluster) -> None:
    blockers = [
        cluster.client.submit("hold", {"path": str(cluster.witness_path), "seconds": 3}, memory="180GiB") for _ in range(4)
    ]
    for blocker in blockers:
        cluster.wait_started(blocker)
    queued = cluster.client.submit("hold", {"path": str(cluster.witness_path), "seconds": 0}, memory="180GiB")
    assert queued.cancel().status is TaskStatus.CANCELLED
    for blocker in blockers:
        blocker.cancel()
    cluster.wait_all(blockers)
    assert not cluster.started(queued)


def test_two_tasks_never_hold_more_memory_of_a_device_than_it_has(cluster: Cluster) -> None:
    sizes = [8, 20, 36, 60, 90, 120, 150]
    path = str(cluster.witness_path)
    tasks = [
        cluster.client.submit(
            "hold",
            {"path": path, "seconds": 0.1 + (number % 3) * 0.1, "memory_bytes": sizes[number % len(sizes)] * GIB},
            memory=f"{sizes[number % len(sizes)]}GiB",
            gpus=2 if number % 9 == 0 else 1,
        )
        for number in range(70)
    ]
    views = cluster.wait_all(tasks, 120)
    assert {view.status for view in views} == {TaskStatus.SUCCEEDED}
    ids = {task.task_id for task in tasks}
    events = [event for event in cluster.witness() if event["task"] in ids]
    assert len(events) == 2 * len(tasks)
    assert overcommitted(events, MI300X_BYTES) == []
    assert max(len(event["devices"]) for event in events) == 2


def test_a_task_that_takes_more_than_its_lease_is_seen_and_ended(cluster: Cluster) -> None:
    greedy = cluster.client.submit("sleep", {"seconds": 600, "memory_bytes": 40 * GIB}, memory="20GiB")
    modest = cluster.client.submit("sleep", {"seconds": 5, "memory_bytes": 20 * GIB}, memory="20GiB")
    views = cluster.wait_all([greedy, modest], 60)
    assert [view.status for view in views] == [TaskStatus.FAILED, TaskStatus.SUCCEEDED]
    assert views[0].error is not None
    assert views[0].error.type == "MemoryExceeded"


def test_logs_are_the_tasks_own_and_bounded(cluster: Cluster) -> None:
    few = cluster.client.submit("chatter", {"lines": 2})
    many = cluster.client.submit("chatter", {"lines": 20_000})
    cluster.wait_all([few, many])
    logs = few.logs()
    assert logs.stdout == "out 0\nout 1\n"
    assert logs.stderr == "err 0\nerr 1\n"
    bounded = many.logs()
    assert bounded.stdout.endswith("out 19999\n")
    assert len(bounded.stdout) <= 64 * 1024
    assert bounded.dropped_bytes > 0


def test_an_executor_sees_its_devices_and_no_credential(cluster: Cluster) -> None:
    task = cluster.client.submit("environment", {}, gpus=2, memory="2GiB")
    environment = task.result(30)
    assert len(environment["ROCYARD_DEVICES"].split(",")) == 2
    text = "\n".join(f"{name}={value}" for name, value in environment.items())
    for secret in (cluster.store_url(), "redis://", "ry_", "ROCYARD_STORE", "ROCYARD_API_KEY"):
        assert secret not in text


def test_short_tasks_are_not_held_up_behind_a_long_one_of_their_batch(cluster: Cluster) -> None:
    warm = [cluster.client.submit("sleep", {"seconds": 0}) for _ in range(30)]
    cluster.wait_all(warm)
    long = cluster.client.submit("sleep", {"seconds": 20})
    short = [cluster.client.submit("sleep", {"seconds": 0}) for _ in range(30)]
    cluster.wait_all(short, 10)
    assert long.view().status is TaskStatus.RUNNING
    long.cancel()
    cluster.wait_all([long], 10)


def test_a_retry_is_counted_and_the_last_failure_is_kept(cluster: Cluster) -> None:
    task = cluster.client.submit("fail", {"message": "as asked"}, max_attempts=2)
    (view,) = cluster.wait_all([task], 60)
    assert view.status is TaskStatus.FAILED
    assert view.failures == 2
    assert view.error is not None
    assert "as asked" in view.error.message
