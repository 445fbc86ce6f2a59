"""`rocyard doctor` on a real cluster: it finds nothing wrong with it, and finds what is made wrong, within its deadlines."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager.cli.doctor import SLOW_S
from manager.cli.exits import Exit
from tests.integration.api_world import running_store
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.integration

DEADLINE_S = SLOW_S + 20
"""The longest that any question may take, and the start of a process on a busy machine."""


class Diagnosis:
    """One run of the doctor."""

    def __init__(self, environ: dict[str, str], *flags: str) -> None:
        began = time.monotonic()
        argv = [sys.executable, "-m", "manager.cli.main", "doctor", "--output", "json", *flags]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=100, check=False)
        self.seconds = time.monotonic() - began
        self.code = done.returncode
        self.stderr = done.stderr
        self.report = json.loads(done.stdout)

    def check(self, name: str) -> tuple[str, str]:
        """Status and finding of a check."""
        (found,) = [check for check in self.report["checks"] if check["name"] == name]
        return found["status"], found["finding"]


def alone(folder: Path, **variables: str) -> dict[str, str]:
    """An environment in which no cluster is known."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
    free = {"ROCYARD_API__PORT": "0", "ROCYARD_DASK__PORT": "0", "ROCYARD_DASK__DASHBOARD_PORT": "0"}
    return {**kept, **free, "ROCYARD_DATA_DIR": str(folder / "data"), **variables}


@pytest.fixture
def frozen() -> Iterator[list[int]]:
    """Processes to be thawed in the end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_healthy_cluster_has_nothing_that_fails(cluster: Cluster):
    eventually(lambda: cluster.state().nodes, 10, "nodes")
    found = Diagnosis(cluster.environ)
    wrong = [check for check in found.report["checks"] if check["status"] in {"fail", "warn"}]
    # The machine that runs the tests may have a small /dev/shm, few files or a full disk: that is its own affair.
    assert [check for check in wrong if check["section"] in {"Store", "Cluster"} or check["name"] == "imports"] == []
    assert found.report["healthy"] == (found.code == 0)
    assert found.check("durability") == ("ok", "every write is on disk before it is answered")
    assert found.check("functions") == ("ok", "those of this version")
    assert "placement plugin; nodes 2" in found.check("scheduler")[1]
    assert "nodes live: 2" in found.check("API")[1]
    assert found.stderr == ""


def test_a_scheduler_that_hangs_is_found_within_the_deadline(cluster: Cluster, frozen: list[int]):
    pid = cluster.role("scheduler").pid
    frozen.append(pid)
    os.kill(pid, signal.SIGSTOP)
    found = Diagnosis(cluster.environ)
    assert found.code == Exit.UNHEALTHY
    assert found.check("scheduler")[0] == "fail"
    assert "does not answer" in found.check("scheduler")[1]
    assert found.check("durability")[0] == "ok", "the rest is looked at all the same"
    assert found.seconds < DEADLINE_S


def test_a_store_that_hangs_is_found_within_the_deadline(cluster: Cluster, frozen: list[int]):
    pid = cluster.role("store").pid
    frozen.append(pid)
    os.kill(pid, signal.SIGSTOP)
    found = Diagnosis(cluster.environ)
    assert found.code == Exit.UNHEALTHY
    assert found.check("reachable")[0] == "fail"
    assert found.check("API")[0] == "fail"
    assert found.seconds < DEADLINE_S


def test_a_store_that_would_lose_tasks_is_found(tmp_path: Path):
    with running_store() as server:
        password = server.url.partition("rocyard:")[2].partition("@")[0]
        for name, value in (("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")):
            port = server.url.rpartition(":")[2].partition("/")[0]
            _configure(int(port), password, name, value)
        found = Diagnosis(alone(tmp_path, ROCYARD_STORE__URL=server.url))
    assert found.code == Exit.UNHEALTHY
    assert found.check("durability") == ("fail", "appendonly yes, appendfsync everysec: a power cut would lose accepted tasks")
    assert found.check("eviction")[0] == "fail"
    assert found.check("functions")[0] == "warn", "no cluster has used this store yet"
    assert found.check("store program")[0] == "skip"
    assert password not in json.dumps(found.report) + found.stderr


def _configure(port: int, password: str, name: str, value: str) -> None:
    from manager.store.connection import StoreConnection

    async def run() -> None:
        connection = StoreConnection(f"redis://rocyard:{password}@127.0.0.1:{port}/0", 3.0, "test")
        try:
            await connection.call("CONFIG", "SET", name, value)
        finally:
            await connection.close()

    asyncio.run(run())


def test_without_a_cluster_there_is_nothing_to_ask(tmp_path: Path):
    found = Diagnosis(alone(tmp_path))
    assert {found.check(name)[0] for name in ("reachable", "API", "scheduler")} == {"skip"}
    assert not (tmp_path / "data").exists(), "it only looks"


def test_a_taken_port_an_open_folder_and_a_hidden_device_are_found(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = alone(tmp_path, ROCYARD_API__PORT=str(port), HIP_VISIBLE_DEVICES="1")
        found = Diagnosis(environ, "--url", "http://127.0.0.1:9")
    assert found.code == Exit.UNHEALTHY
    assert found.check("api.port")[0] == "fail"
    assert f"pid {os.getpid()}" in found.check("api.port")[1]
    assert found.check("data_dir")[0] == "fail"
    assert found.check("visibility")[0] == "warn"
    assert found.check("API")[0] == "fail", "somebody named it, so it must answer"


def test_a_dask_scheduler_without_our_plugin_is_told_apart(tmp_path: Path):
    """A plain one takes slots and knows nothing of devices."""
    argv = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    file = tmp_path / "scheduler.json"
    with subprocess.Popen([*argv, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            address = eventually(lambda: _address(file), 30, "a Dask scheduler")
            port = address.rpartition(":")[2]
            # A host other than loopback means that there is a scheduler to ask, though no cluster runs here.
            found = Diagnosis(alone(tmp_path, ROCYARD_DASK__PORT=port), "--set", "dask.host=0.0.0.0")
        finally:
            process.terminate()
            process.wait(20)
    assert found.check("scheduler")[0] == "fail"
    assert "without the placement plugin" in found.check("scheduler")[1]


def _address(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError, KeyError):
        return ""
