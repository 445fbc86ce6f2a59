"""A store that comes back empty under a running cluster: refused by every process, never served as "no tasks"."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from manager import client_wire
from manager.core.errors import NotFound, StoreReplaced, StoreUnavailable
from tests.integration.cluster import QUICK, Cluster, clusters, eventually

LEASE_S: Final = 4 * float(QUICK["ROCYARD_NODE__BEAT_S"])


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that this test may break."""
    yield from clusters(tmp_path)


def answer(cluster: Cluster, path: str) -> httpx.Response | None:
    """What the API answers; None while it does not."""
    try:
        url = json.loads((cluster.directory / "data" / "client.json").read_text())["url"]
        return httpx.get(f"{url}{path}", trust_env=False, timeout=5)
    except httpx.TransportError:
        return None


def refused(cluster: Cluster) -> bool:
    reply = answer(cluster, "/readyz")
    return reply is not None and reply.status_code == 503 and "is empty, but this process belongs" in reply.json()["detail"]


def test_an_empty_store_is_refused_and_heals_when_the_data_are_back(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    cluster = own_cluster
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.1)  # this lasts
    data = cluster.directory / "data" / "store"
    running = cluster.client.submit("until", {"path": str(cluster.witness_path), "gate": str(cluster.directory / "go")})
    cluster.wait_started(running)
    waiting = cluster.client.submit("echo", {"value": 7})
    assert cluster.client.wait(waiting.task_id, 20).status == "SUCCEEDED"
    agent = cluster.agent("node-0")
    executors = {process.pid for process in agent.children(recursive=True)}

    # The store ends, its data go, and its supervisor starts it again, empty.
    store = cluster.role("store")
    store.suspend()
    kept = data.with_name("kept")
    shutil.copytree(data, kept)
    shutil.rmtree(data / "appendonlydir")
    store.kill()
    emptied = cluster.wait_role("store", store.pid)
    eventually(lambda: refused(cluster), 20, "/readyz names the empty store")
    with pytest.raises(StoreReplaced):
        cluster.client.get(running.task_id)
    with pytest.raises(StoreReplaced):
        cluster.client.submit("echo", {"value": 1})

    # A process that starts now knows whose store it must be.
    api = cluster.role("api")
    api.kill()
    cluster.wait_role("api", api.pid)
    eventually(lambda: refused(cluster), 20, "the next API refuses it as well")
    over_s = time.monotonic() + 2 * LEASE_S
    while time.monotonic() < over_s:
        assert {process.pid for process in agent.children(recursive=True)} >= executors, "an executor was ended"
        time.sleep(0.05)  # the period of looking
    assert len(cluster.started(running)) == 1

    # The right data come back.
    emptied.suspend()
    shutil.rmtree(data / "appendonlydir")
    shutil.copytree(kept / "appendonlydir", data / "appendonlydir")
    emptied.kill()
    cluster.wait_role("store", emptied.pid)

    def knows() -> bool:
        try:
            return cluster.client.get(waiting.task_id).status == "SUCCEEDED"
        except (StoreUnavailable, NotFound):
            return False

    eventually(knows, 20, "the API serves the data again")
    (cluster.directory / "go").touch()
    assert cluster.wait_all([running])[0].status == "SUCCEEDED"
    assert len(cluster.started(running)) == 1, "the task ran again"
    eventually(lambda: answer(cluster, "/readyz").status_code == 200, 20, "/readyz")  # type: ignore[union-attr]
    log = (cluster.directory / "data" / "logs" / "controller.log").read_text()
    assert log.count("store_refused") == 1, "said once per change"


def test_processes_that_are_too_old_end_and_are_not_started_again_and_again(own_cluster: Cluster):
    cluster = own_cluster
    roles = {role: cluster.role(role).pid for role in ("controller", "api")}
    cluster.with_store(lambda store: store.connection.call("HSET", store.keys.meta, "schema", 98, "schema_min", 97))

    def gone() -> bool:
        return all(cluster.role_or_none(role) is None for role in roles) and not cluster.find("manager.cli.process", "node")

    eventually(gone, 20, "the processes end")
    for name in (*roles, "node-0"):
        log = (cluster.directory / "data" / "logs" / f"{name}.log").read_text()
        assert log.count("StoreTooNew: ") == 1, "it was started again at once"
        assert "schema 98" in log
        assert "schema 97 or newer may work" in log
    cluster.destroy()
    done = subprocess.run(
        [sys.executable, "-m", "manager.cli.main", "up"],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "schema 97 or newer may work" in done.stderr
