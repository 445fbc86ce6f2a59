"""``rocyard up`` as a person meets it: start, stop, start again, and what it says when it cannot."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from manager import supervisor
from manager.core.errors import StartError
from manager.core.lifecycle import TaskStatus
from manager.core.requests import KeyScope
from manager.screen import Screen
from manager.settings import ApiSettings, DaskSettings, Secret, Settings, StoreSettings
from manager.store.server import EmbeddedStore, is_ready
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.timeout(240)
ONE_NODE = "1x2:mi300x"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One folder for all tests that find in it what those before them have left: each start costs seconds."""
    cluster = Cluster(tmp_path_factory.mktemp("up"), simulate=ONE_NODE)
    yield cluster
    cluster.destroy()


def _runs(cluster: Cluster) -> bool:
    return cluster.process is not None and cluster.process.poll() is None


@pytest.fixture
def running(kept: Cluster) -> Cluster:
    """The cluster of that folder, which runs."""
    if not _runs(kept):
        kept.start()
    return kept


@pytest.fixture
def stopped(kept: Cluster) -> Cluster:
    """The cluster of that folder, which has run."""
    if kept.process is None:
        kept.start()
    if _runs(kept):
        assert kept.stop() == 0
    return kept


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Cluster]:
    """One in a folder of its own, not started."""
    cluster = Cluster(tmp_path, simulate=ONE_NODE)
    yield cluster
    cluster.destroy()


def _up(cluster: Cluster, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manager.cli.main", "up", "--simulate", "1x1:mi300x"]
    return subprocess.run(command, env=cluster.environ | environ, capture_output=True, text=True, timeout=60, check=False)


def _listening(pids: set[int]) -> set[int]:
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.pid in pids and c.status == psutil.CONN_LISTEN}


def test_ctrl_c_leaves_nothing_behind_and_a_second_start_finds_its_state(own: Cluster) -> None:
    own.start()
    assert "admin key" in own.output.read_text()
    done = own.client.submit("echo", {"x": 1})
    assert done.result(30) == {"x": 1}
    hold = {"path": str(own.witness_path), "seconds": 600}
    running = own.client.submit("hold", hold, memory="10GiB")
    own.wait_started(running)
    family = own.family()
    ports = _listening({process.pid for process in family})
    assert len(ports) > 5

    assert own.stop() == 0
    assert [process for process in family if process.is_running()] == []
    assert ports & {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN} == set()

    began = time.monotonic()
    own.start()
    assert "admin key" not in own.output.read_text()
    assert own.client.get(done.task_id).status is TaskStatus.SUCCEEDED
    second = own.wait_started(running, times=2)
    assert second["attempt"] == 2
    assert time.monotonic() - began < 60
    view = own.client.get(running.task_id)
    assert (view.crashes, view.failures) == (0, 0)
    own.client.cancel(running.task_id)


def test_killing_the_supervisor_ends_its_processes_and_the_next_start_recovers(running: Cluster) -> None:
    gate = running.directory / "gate"
    task = running.client.submit("until", {"path": str(running.witness_path), "gate": str(gate)})
    running.wait_started(task)
    family = running.family()
    assert running.process is not None
    running.process.send_signal(signal.SIGKILL)
    running.process.wait(5)
    running.client.close()
    _, alive = psutil.wait_procs(family, 10)
    assert alive == []
    running.start()
    running.wait_started(task, times=2)
    gate.touch()
    (view,) = running.wait_all([task])
    assert view.status is TaskStatus.SUCCEEDED


def test_a_taken_port_is_named_with_who_holds_it(own: Cluster) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = _up(own, ROCYARD_API__PORT=str(port))
    assert ended.returncode != 0
    assert str(port) in ended.stderr
    assert f"pid {os.getpid()}" in ended.stderr
    assert "api.port" in ended.stderr


def test_a_mistyped_setting_stops_the_start_within_two_seconds(own: Cluster) -> None:
    began = time.monotonic()
    ended = _up(own, ROCYARD_NODE__BEET_S="1")
    elapsed_s = time.monotonic() - began
    assert ended.returncode == 2
    assert "ROCYARD_NODE__BEAT_S" in ended.stderr
    assert elapsed_s < 10  # of which the interpreter's own start on a loaded machine is most; two seconds on an idle one


def test_a_second_cluster_on_the_same_folder_is_refused(running: Cluster) -> None:
    ended = _up(running)
    assert ended.returncode != 0
    assert "already" in ended.stderr
    assert running.client.submit("echo", {"x": 1}).result(30) == {"x": 1}


def test_files_with_secrets_are_for_their_owner_alone(running: Cluster) -> None:
    data = running.directory / "data"
    for name in ("client.json", "store.json", "cluster.json"):
        assert (data / name).stat().st_mode & 0o077 == 0
    assert data.stat().st_mode & 0o077 == 0
    key = json.loads((data / "client.json").read_text())["api_key"]
    for log in (data / "logs").iterdir():
        assert key not in log.read_text(errors="replace")


def test_a_machine_whose_key_was_revoked_gets_another_at_the_next_start(running: Cluster) -> None:
    first = json.loads((running.directory / "data" / "client.json").read_text())["api_key"]
    running.client.create_key("default", KeyScope.ADMIN)
    running.client.revoke_key(first.split("_")[1])
    assert running.stop() == 0
    running.start()
    assert "admin key" in running.output.read_text()
    assert running.client.submit("echo", {"x": 1}).result(30) == {"x": 1}


def test_rocyard_down_stops_it(running: Cluster) -> None:
    command = [sys.executable, "-m", "manager.cli.main", "down"]
    ended = subprocess.run(command, env=running.environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    eventually(lambda: not _runs(running), 20, "the end of rocyard up")
    assert not (running.directory / "data" / "rocyard.pid").exists()


def test_a_store_that_came_back_empty_is_refused(stopped: Cluster) -> None:
    store, aside = stopped.directory / "data" / "store", stopped.directory / "aside"
    store.rename(aside)
    try:
        ended = _up(stopped)
    finally:
        shutil.rmtree(store, ignore_errors=True)
        aside.rename(store)
    assert ended.returncode != 0
    assert "is empty" in ended.stderr
    assert "cluster.json" in ended.stderr


def test_a_store_of_ones_own_is_used(own: Cluster, tmp_path: Path) -> None:
    spec = EmbeddedStore(tmp_path / "store").prepare()
    with subprocess.Popen(spec.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as server:
        try:
            assert server.stdin is not None
            server.stdin.write(spec.stdin_text.value.encode())
            server.stdin.close()
            eventually(lambda: is_ready(spec.url.value), 20, "the store")
            own.environ["ROCYARD_STORE__URL"] = spec.url.value
            own.start()
            assert own.role_or_none("store") is None
            tasks = [own.client.submit("hold", {"path": str(own.witness_path), "seconds": 0.5}) for _ in range(8)]
            assert {view.status for view in own.wait_all(tasks)} == {TaskStatus.SUCCEEDED}
            assert own.stop() == 0
            assert server.poll() is None
        finally:
            server.kill()


def test_a_store_that_is_not_ours_and_does_not_answer_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_S", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens not: nobody answers there
        url = f"redis://:hidden@127.0.0.1:{taken.getsockname()[1]}/0"
        settings = Settings(
            data_dir=str(tmp_path),
            store=StoreSettings(url=Secret(url)),
            api=ApiSettings(port=0),
            dask=DaskSettings(port=0, dashboard_port=0),
        )
        with pytest.raises(StartError, match=r"the store of store\.url did not answer in 1 s: .*Connect call failed") as told:
            asyncio.run(supervisor.Supervisor(settings, Screen()).run())
    assert "hidden" not in str(told.value)
