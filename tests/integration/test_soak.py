"""Schedulers and Dask workers killed at random: no task starts twice, and afterwards ledger, agents and store agree."""

import asyncio
import contextlib
import random
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from distributed import Client as DaskClient

from manager.core.lifecycle import SlotStatus, TaskStatus
from manager.core.quantities import GIB
from tests.integration.cluster import Cluster, clusters, eventually, overcommitted

pytestmark = pytest.mark.timeout(240)
SECONDS = 20.0
TASKS = 400


@pytest.fixture
def soaked(tmp_path: Path) -> Iterator[Cluster]:
    yield from clusters(tmp_path)


def test_random_deaths_of_schedulers_and_workers(soaked: Cluster, request: pytest.FixtureRequest) -> None:
    seed = int(request.config.getoption("--soak-seed"))
    chance = random.Random(seed)
    path = str(soaked.witness_path)
    tasks = [
        soaked.client.submit(
            "hold",
            {"path": path, "seconds": chance.uniform(0.05, 0.5), "memory_bytes": size * GIB},
            memory=f"{size}GiB",
        )
        for size in (chance.choice((40, 60, 90)) for _ in range(TASKS))
    ]
    deadline = time.monotonic() + SECONDS
    kills = 0
    while time.monotonic() < deadline:
        victim = soaked.role_or_none("scheduler") if chance.random() < 0.4 else _some_worker(soaked, chance)
        if victim is not None:
            with contextlib.suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
                eventually(lambda v=victim: not _alive(v), 5, "a death")
                kills += 1
        pause = time.monotonic() + chance.uniform(0.3, 2.0)
        eventually(lambda p=pause: time.monotonic() > p, 5, "the pause between two deaths")
    views = soaked.wait_all(tasks, 120)
    assert kills >= 5
    assert {view.status for view in views} == {TaskStatus.SUCCEEDED}
    twice = [task.task_id for task in tasks if len(soaked.started(task)) != 1]
    assert twice == [], f"again: pytest {__file__} --soak-seed {seed}"
    assert overcommitted(soaked.witness(), 192 * GIB) == []
    eventually(lambda: _agree(soaked), 40, "ledger = agents = store")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _some_worker(cluster: Cluster, chance: random.Random) -> psutil.Process | None:
    workers = cluster.find("plugins.worker_process")
    return chance.choice(workers) if workers else None


def _agree(cluster: Cluster) -> bool:
    """Whether plugin, agents and store know the same slots, each with a Dask task."""
    store = {slot.slot_id: slot.node for slot in cluster.state().slots if slot.status is SlotStatus.OPEN}
    plugin = asyncio.run(_plugin_slots(cluster))
    live = sum(_live_slots(cluster, node) for node in ("node-0", "node-1"))
    return plugin == {slot: ["placed", node] for slot, node in store.items()} and live == len(store)


async def _plugin_slots(cluster: Cluster) -> dict[str, list[str]]:
    async with DaskClient(cluster.dask_address(), asynchronous=True, timeout=5) as client:
        answer = await client.scheduler.rocyard_slots()
        return {slot: list(known) for slot, known in answer["slots"].items()}


def _live_slots(cluster: Cluster, node: str) -> int:
    url = next(row.info.metrics_url for row in cluster.state().nodes if row.node == node)
    with urllib.request.urlopen(url, timeout=5) as answer:
        found = re.search(r'rocyard_slots\{status="live"\} (\S+)', answer.read().decode())
    return int(float(found[1])) if found else 0
