"""`rocyard backup` and `rocyard restore` as people use them: a cluster at work, a copy of it, and another one made of that."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manager.core.errors import NotFound
from tests.integration.cluster import Cluster, eventually


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[Cluster]]:
    """Clusters that end with the test."""
    found: list[Cluster] = []
    yield found
    for cluster in found:
        cluster.destroy()


def rocyard(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """One command, as on the cluster's machine."""
    argv = [sys.executable, "-m", "manager.cli.main", *words]
    return subprocess.run(argv, env=cluster.environ, capture_output=True, text=True, timeout=60, check=False)


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_cluster_that_is_lost_comes_back_from_its_backup(made: list[Cluster], tmp_path: Path):
    file = str(tmp_path / "monday")
    old = Cluster(tmp_path / "old", simulate="1x1:mi300x")
    made.append(old)
    old.start()
    gate = tmp_path / "go"
    args = {"path": str(old.witness_path), "gate": str(gate)}
    ended = old.client.submit("echo", {"value": 1})
    assert old.client.wait(ended, 20).status == "SUCCEEDED"
    running = old.client.submit("until", args, memory="90GiB")
    old.wait_started(running)
    queued = [old.client.submit("until", args, memory="90GiB") for _ in range(3)]
    accepted = [ended, running, *queued]

    # Under load: what is acknowledged before the command is called must be in the copy.
    stop = threading.Event()
    later: list[str] = []

    def load() -> None:
        while not stop.is_set():
            later.append(old.client.submit("echo", {"value": 2}).task_id)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        eventually(lambda: len(later) > 20, 20, "load")
        before = list(later)
        view = told(rocyard(old, "backup", file, "--output", "json"))
    finally:
        stop.set()
        loading.join()
    assert view["tasks"]["RUNNING"] >= 1
    assert "exists, and a backup replaces nothing" in rocyard(old, "backup", file).stderr
    assert "a store runs on" in rocyard(old, "restore", file).stderr
    checked = told(rocyard(old, "backup", "--check", file, "--output", "json"))
    assert checked["loaded"] is True
    assert checked["cluster"] == view["cluster"]
    after = old.client.submit("echo", {"value": 3})
    old.destroy()
    started = len(old.started(running))

    new = Cluster(tmp_path / "new", simulate="1x1:mi300x")
    made.append(new)
    restored = told(rocyard(new, "restore", file, "--output", "json"))
    assert restored["cluster"] == view["cluster"]
    assert restored["slots_closed"] >= 1
    gate.touch()
    new.start()
    for task in [*accepted, *before]:
        assert new.client.wait(task, 60).status == "SUCCEEDED"
    record = new.client.get(running)
    assert (record.failures, record.crashes, record.losses) == (0, 0, 0)
    assert len(old.started(running)) == started + 1, "what ran is run once more, and that was blamed on nobody"
    with pytest.raises(NotFound):
        new.client.get(after)
    assert new.client.submit("echo", {"value": 4}).result(30) == {"value": 4}


def test_what_cannot_be_done_says_what_would_be_right(made: list[Cluster], tmp_path: Path):
    nowhere = Cluster(tmp_path / "nowhere")
    done = rocyard(nowhere, "backup", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "no cluster runs on" in done.stderr
    (tmp_path / "b").write_text("no backup")
    for words in (("backup", "--check"), ("restore",)):
        done = rocyard(nowhere, *words, str(tmp_path / "b"))
        assert done.returncode == 1
        assert "is no backup of Rocyard's" in done.stderr
    assert not (tmp_path / "nowhere" / "data").exists(), "something was made although nothing was done"
