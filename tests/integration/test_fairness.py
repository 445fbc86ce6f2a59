"""Fair shares, quotas and no starvation on real processes, seen by a witness inside the tasks.

What is asserted is what happened, in bounds wide enough for a machine that does other work too; the figures of a quiet one
stand in docs/performance.md. ``ROCYARD_FIGURES=1 python -m pytest tests/integration/test_fairness.py -s`` prints them.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from manager.client import Client, Task, task_request
from manager.core.requests import KeyScope
from tests.integration.cluster import Cluster, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

WEIGHTED = ("heavy", "light")
SETTINGS = {
    "ROCYARD_TENANTS__HEAVY__WEIGHT": "3",
    "ROCYARD_TENANTS__BOUNDED__GPUS_MAX": "1",
    "ROCYARD_TENANTS__BOUNDED__RUNNING_TASKS_MAX": "3",
    "ROCYARD_TASKS__AGEING_S": "1",
    "ROCYARD_TASKS__PREEMPT_S": "1",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node of two devices of 192 GiB."""
    made = Cluster(tmp_path_factory.mktemp("fairness"), SETTINGS, "1x2:mi300x")
    try:
        made.start()
        yield made
    finally:
        made.destroy()


class Crowd:
    """Tenants with their clients and tasks; whatever has not run is cancelled in the end."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.clients: dict[str, Client] = {}
        self.owner: dict[str, str] = {}
        self.after_s = time.monotonic()

    def client(self, tenant: str) -> Client:
        if tenant not in self.clients:
            record = self.cluster.client.create_key(tenant, KeyScope.USER)
            address = self.cluster.client.address
            self.clients[tenant] = Client.at(address.url, record.key, address.ca)
        return self.clients[tenant]

    def flood(
        self, name: str, count: int, *, tenant: str = "", memory_gib: int = 150, seconds: float = 0.05, **more: Any
    ) -> list[Task]:
        """So many tasks, counted under `name`."""
        args = {"path": str(self.cluster.witness_path), "seconds": seconds, "memory_bytes": 0}
        requests = [task_request("hold", args, memory=f"{memory_gib}GiB", **more) for _ in range(count)]
        tasks = self.client(tenant or name).submit_many(requests)
        self.owner |= {task.task_id: name for task in tasks}
        return tasks

    def starts(self) -> list[tuple[float, str]]:
        """When tasks of whom have started."""
        return [
            (e["at"], self.owner[e["task"]])
            for e in self.cluster.witness()
            if e["event"] == "start" and e["task"] in self.owner
        ]

    def served(self, until_s: float = float("inf")) -> Counter[str]:
        return Counter(name for at, name in self.starts() if at <= until_s)

    def disband(self) -> None:
        for tenant, client in self.clients.items():
            for task in list(client.tasks(status="QUEUED")):
                client.cancel(task.task_id, tenant=tenant)
            for task in list(client.tasks(status="RUNNING")):
                client.cancel(task.task_id, tenant=tenant)
            client.close()
        eventually(lambda: all(not q.depth for q in self.cluster.state().queues), 30, "an empty queue")


@pytest.fixture
def crowd(cluster: Cluster) -> Iterator[Crowd]:
    made = Crowd(cluster)
    yield made
    made.disband()


def figure(name: str, value: object) -> None:
    """For the page of figures."""
    if os.environ.get("ROCYARD_FIGURES"):
        sys.stdout.write(f"\n{name}: {value}\n")


def test_of_six_equal_shapes_none_gets_nothing(crowd: Crowd) -> None:
    """Oldest head first would be one queue for all: two of six got nothing in 8 s."""
    names = [f"equal{i}" for i in range(6)]
    for name in names:
        crowd.flood(name, 250)
    eventually(lambda: len(crowd.served()) == 6, 30, "a task of each of the six")
    began_s, all_s = min(at for at, _ in crowd.starts()), max({name: at for at, name in reversed(crowd.starts())}.values())
    eventually(lambda: max(at for at, _ in crowd.starts()) > began_s + 12, 60, "twelve seconds of work")
    served = crowd.served(began_s + 12)
    figure("six equal shapes, each served after", round(all_s - began_s, 2))
    figure("six equal shapes, in 8 s", crowd.served(began_s + 8))
    figure("six equal shapes, in 12 s", served)
    assert min(served.values()) > max(served.values()) / 4


def test_weights_of_three_to_one_give_three_times_as_much(crowd: Crowd) -> None:
    for name in WEIGHTED:
        crowd.flood(name, 500)
    eventually(lambda: len(crowd.served()) == 2, 30, "a task of each")
    began_s = max({name: at for at, name in reversed(crowd.starts())}.values())
    eventually(lambda: max(at for at, _ in crowd.starts()) > began_s + 12, 60, "twelve seconds of work")
    served = crowd.served(began_s + 12)
    figure("weights 3:1, in 12 s", served)
    assert 1.7 < served["heavy"] / served["light"] < 5.0


def test_a_large_request_is_not_starved_by_a_flood_of_small_ones(crowd: Crowd) -> None:
    """With victims anywhere, what came free lay on different devices and two requests waited for 6 s each."""
    for number in range(3):
        crowd.flood(f"small{number}", 300, memory_gib=48, seconds=0.2)
    eventually(lambda: len(crowd.served()) == 3, 30, "a task of each small shape")
    waits = []
    for _ in range(3):
        asked_s = time.monotonic()
        (task,) = crowd.flood("large", 1, memory_gib=190, gpus=2, seconds=0.2)
        waits.append(crowd.cluster.wait_started(task)["at"] - asked_s)
        assert any(queue.depth for queue in crowd.cluster.state().queues), "the flood went on all the time"
    figure("large under small, waits", [round(wait, 2) for wait in waits])


def test_a_quota_is_never_exceeded_and_all_shapes_of_its_tenant_get_their_turn(crowd: Crowd) -> None:
    for memory_gib in (10, 20, 30):
        crowd.flood(f"bounded{memory_gib}", 150, tenant="bounded", memory_gib=memory_gib, seconds=0.02)
    crowd.flood("others", 300, memory_gib=10, seconds=0.02)
    eventually(lambda: len(crowd.served()) == 4, 30, "a task of each shape")
    eventually(lambda: crowd.served().total() > 500, 60, "500 tasks")
    changes = [
        (event["at"], event["event"] == "start", event["pid"])
        for event in crowd.cluster.witness()
        if crowd.owner.get(event["task"], "others").startswith("bounded")
    ]
    running, pids, most, most_pids = 0, Counter[int](), 0, 0
    for _, starts, pid in sorted(changes):
        running += 1 if starts else -1
        pids[pid] += 1 if starts else -1
        most, most_pids = max(most, running), max(most_pids, len(+pids))
    assert most_pids == 1, f"{most_pids} slots of one device each worked at once"
    assert most <= 3
    row = next(row for row in crowd.cluster.state().tenants if row.tenant == "bounded")
    assert (row.gpus_max, row.running_max) == (1, 3)
    figure("quota of one device, three shapes", crowd.served())


def test_what_waits_behind_a_flood_of_higher_priority_rises_until_it_is_served(crowd: Crowd) -> None:
    crowd.flood("before", 100, tenant="one", priority=10)
    (low,) = crowd.flood("low", 1, tenant="one", priority=8)
    crowd.flood("after", 400, tenant="one", priority=10)
    at = crowd.cluster.wait_started(low, timeout_s=60)["at"]
    served = crowd.served(at)
    figure("served before one of lower priority by two", served)
    assert served["after"] < 300, "it was last, as if it had not aged"


def test_an_urgent_task_takes_the_place_of_a_low_one_which_runs_again(crowd: Crowd) -> None:
    low = crowd.flood("low", 2, priority=-5, seconds=600.0)
    for task in low:
        crowd.cluster.wait_started(task)
    asked_s = time.monotonic()
    (urgent,) = crowd.flood("urgent", 1, priority=5, seconds=0.2)
    wait_s = crowd.cluster.wait_started(urgent)["at"] - asked_s
    figure("urgent after", round(wait_s, 2))
    assert wait_s > 0.9, "it waits for a task boundary first"
    again = eventually(lambda: next((t for t in low if len(crowd.cluster.started(t)) == 2), None), 30, "the second start")
    view = crowd.client("low").get(again)
    assert (view.status, view.losses, view.crashes) == ("RUNNING", 0, 0)
