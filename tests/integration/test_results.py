"""Large results on a real cluster: kept as files, streamed whole or not at all, and survived when their disk is full."""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manager.client import Client, Task
from manager.client_errors import ClusterUnreachable, TaskFailed
from manager.core.errors import ResultMissing
from manager.core.ids import new_id
from manager.core.lifecycle import FINAL, TaskStatus
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.integration

DISK_BYTES = 2 * 1024 * 1024
TEXT = "x" * 200_000
AGO_S = 7200


class Store:
    """The results folder of the cluster, on a small disk of its own where one can be mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.leftovers: list[Path] = []
        self.checkpoints = root / "checkpoints" / new_id()
        root.mkdir(parents=True)
        mount = shutil.which("mount")
        options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(root)]
        self.mounted = (
            mount is not None
            and os.geteuid() == 0
            and subprocess.run([mount, *options], capture_output=True, check=False).returncode == 0
        )

    def plant(self) -> None:
        """What agents that died two hours ago have left, one of them of a version whose names had no slot."""
        written = [
            f"files/7k/{new_id()}-1-{new_id()}.json",
            f"files/7k/{new_id()}-1.json",
            f"writing/{new_id()}-2-{new_id()}.json",
        ]
        self.leftovers = [self.root / name for name in written]
        (self.checkpoints / "deep").mkdir(parents=True)
        for path in (*self.leftovers, self.checkpoints / "deep" / "model.pt"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"[1]")
        for path in (*self.leftovers, self.checkpoints):
            moment = path.stat().st_mtime - AGO_S
            os.utime(path, (moment, moment))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.root)], check=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    found = Store(tmp_path_factory.mktemp("results") / "data" / "results")
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def cluster(store: Store) -> Iterator[Cluster]:
    running = Cluster(store.root.parents[1], {"ROCYARD_RESULTS__INLINE_BYTES_MAX": "1KiB"}, simulate="1x1:mi300x")
    try:
        running.start()
        yield running
    finally:
        running.destroy()


@pytest.fixture(scope="module")
def large(cluster: Cluster) -> Task:
    task = cluster.client.submit("echo", {"text": TEXT}, name="large/1")
    cluster.client.wait(task, 30)
    return task


def file_of(store: Store, task: Task) -> Path:
    (found,) = store.root.glob(f"files/*/{task.task_id}-*.json")
    return found


def run_cli(cluster: Cluster, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "manager.cli.main", *args], env=cluster.environ, capture_output=True, timeout=30, check=False
    )


def test_a_large_result_lies_in_a_file_and_comes_back_whole(cluster: Cluster, store: Store, large: Task):
    view = large.view()
    data = file_of(store, large).read_bytes()
    assert json.loads(data)["text"] == TEXT
    assert view.status is TaskStatus.SUCCEEDED
    assert view.result_file is not None
    assert bytes(view.result) == b"null"
    assert (view.result_file.bytes, view.result_file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert large.result(10)["text"] == TEXT
    assert b"".join(cluster.client.read_result(large)) == data
    for called in (large.task_id, "large/1"):
        printed = run_cli(cluster, "result", called)
        assert (printed.returncode, printed.stdout) == (0, data), called
    assert f"rocyard result {large.task_id}" in run_cli(cluster, "show", large.task_id).stdout.decode()


def test_its_headers_say_what_it_is(cluster: Cluster, store: Store, large: Task):
    data = file_of(store, large).read_bytes()
    address = cluster.client.address
    answer = httpx.get(
        f"{address.url}/v1/tasks/{large.task_id}/result", headers={"Authorization": f"Bearer {address.api_key.value}"}
    )
    digest = hashlib.sha256(data)
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == data


def test_a_small_result_stays_in_the_record(cluster: Cluster, store: Store):
    task = cluster.client.submit("echo", {"text": "small"})
    view = task.wait(30)
    assert view.result_file is None
    assert json.loads(bytes(view.result))["text"] == "small"
    assert b"".join(cluster.client.read_result(task)) == bytes(view.result)
    assert list(store.root.glob(f"files/*/{task.task_id}-*.json")) == []


def test_a_result_that_is_gone_or_damaged_is_never_taken_for_whole(cluster: Cluster, store: Store):
    task = cluster.client.submit("echo", {"text": TEXT})
    task.wait(30)
    path = file_of(store, task)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(ClusterUnreachable, match="broke off"):
        b"".join(cluster.client.read_result(task))
    path.write_bytes(data + b"?")
    with pytest.raises(ResultMissing, match=f"the file has {len(data) + 1} bytes"):
        task.result(10)
    path.unlink()
    with pytest.raises(ResultMissing, match="Rocyard has not removed it"):
        task.result(10)
    refused = run_cli(cluster, "result", task.task_id)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert task.view().status is TaskStatus.SUCCEEDED


def test_who_reads_slowly_and_leaves_holds_up_nobody(cluster: Cluster, large: Task):
    for _ in range(3):
        pieces = Client.read_result(cluster.client, large)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]  # a generator
    assert large.result(10)["text"] == TEXT


def test_what_was_left_is_removed_soon_after_the_start(cluster: Cluster, store: Store, large: Task):
    identity = json.loads((cluster.directory / "data" / "cluster.json").read_text())["cluster"]
    marker = store.root / "cluster" / identity
    eventually(marker.exists, 15, "the first leader has noted whose results these are")
    store.plant()
    controller = cluster.role("controller")
    controller.kill()
    cluster.wait_role("controller", controller.pid)
    eventually(lambda: not any(path.exists() for path in store.leftovers), 20, "the leftovers are gone")
    eventually(lambda: not store.checkpoints.exists(), 15, "checkpoints of nobody are gone")
    assert file_of(store, large).exists()
    assert [path.name for path in marker.parent.iterdir()] == [identity]
    log = (cluster.directory / "data" / "logs" / "controller.log").read_text()
    assert "results_removed" in log


@pytest.mark.parametrize(("url", "words"), [("results", "is a relative path"), ("/proc/results", "cannot be written")])
def test_a_cluster_does_not_start_with_a_place_that_cannot_work(tmp_path: Path, url: str, words: str):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
    own = {"ROCYARD_DATA_DIR": str(tmp_path), "ROCYARD_API__PORT": "0", "ROCYARD_DASK__PORT": "0", "ROCYARD_RESULTS__URL": url}
    done = subprocess.run(
        [sys.executable, "-m", "manager.cli.main", "up"],
        env=environ | own | {"ROCYARD_DASK__DASHBOARD_PORT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {1, 2}
    assert words in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_a_full_disk_fails_the_task_and_nothing_else(cluster: Cluster, store: Store, large: Task):
    if not store.mounted:
        pytest.skip("needs root and the right to mount, for a small disk")
    filler = store.root / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as opened:  # until there is no room
        while opened.write(b"\0" * 65536):
            pass
    task = cluster.client.submit("echo", {"text": TEXT})
    with pytest.raises(TaskFailed) as caught:
        task.result(30)
    assert caught.value.type == "ResultNotStored"
    assert cluster.client.submit("echo", {"text": "small"}).result(30)["text"] == "small"
    again = cluster.client.submit("echo", {"text": TEXT}, max_attempts=20)
    eventually(lambda: again.view().failures, 30, "it has failed once for want of room")
    filler.unlink()
    assert again.wait(60).status in FINAL
    assert again.result()["text"] == TEXT
    assert large.result(10)["text"] == TEXT
    assert list((store.root / "writing").iterdir()) == [], "what could not be written was left"
