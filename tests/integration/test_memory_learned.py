"""A task that takes more device memory than its slot leases is ended, and its shape learns: later slots lease more."""

import pytest

from manager.core.lifecycle import TaskStatus
from manager.core.quantities import GIB
from tests.integration.cluster import Cluster

pytestmark = pytest.mark.integration

SEEN_S = 2.5
"""Longer than two readings take, and the next one."""


def greedy(cluster: Cluster, gib: int, asked: str, *, attempts: int = 1) -> str:
    arguments = {"memory_bytes": gib * GIB, "seconds": SEEN_S}
    return cluster.client.submit("greedy", arguments, memory=asked, max_attempts=attempts).task_id


def test_a_task_that_takes_more_than_its_lease_fails_and_is_told_what_would_be_right(cluster: Cluster) -> None:
    task = cluster.client.wait(greedy(cluster, 9, "3GiB"), 60)
    assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)
    assert task.error is not None
    assert task.error.type == "MemoryExceeded"
    assert task.error.message == "the task used 9 GiB of a device, and its slot leases 3 GiB of it; ask for 9 GiB or more"


def test_it_finds_a_larger_lease_when_it_is_tried_again_and_so_does_the_next(cluster: Cluster) -> None:
    first = cluster.client.wait(greedy(cluster, 7, "5GiB", attempts=2), 60)
    assert (first.status, first.attempt, first.failures) == (TaskStatus.SUCCEEDED, 2, 1)
    after = cluster.client.wait(greedy(cluster, 7, "5GiB"), 60)
    assert (after.status, after.attempt, after.failures) == (TaskStatus.SUCCEEDED, 1, 0)
