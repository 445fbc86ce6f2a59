"""What an attempt leaves to the next one, and which failures have a next one, on a real cluster."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manager.client import Task
from manager.core.answers_tasks import Accepted, TaskView
from manager.core.ids import id_in_array
from manager.core.lifecycle import TaskStatus
from manager.core.model import Attempt, TaskRecord
from manager.core.quantities import GIB, MIB, format_memory
from manager.core.requests import ResourceRequest, TaskRequest
from manager.core.shapes import Shape
from manager.store import Store
from tests.integration.cluster import WITNESS, Cluster, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

FUNCTIONS = (
    *("resumes", "saves_in_time", "stays_with_memory", "out_of_memory", "key_error", "sleeps", "large", "place_in_array"),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for this module, with functions of its own."""
    cluster = Cluster(tmp_path_factory.mktemp("attempts"))
    config = Path(cluster.environ["ROCYARD_CONFIG"])
    known = json.loads(config.read_text())
    for name in FUNCTIONS:
        known["functions"][name] = {"target": f"attempt_functions:{name}", "path": str(WITNESS), "memory": "1GiB"}
    config.write_text(json.dumps(known))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


def submit(cluster: Cluster, function: str, **more: object) -> Task:
    args = msgspec.Raw(msgspec.json.encode(more.pop("args", {})))
    body = msgspec.json.encode(TaskRequest(function=function, args=args, **more))  # type: ignore[arg-type]
    return Task(cluster.client, cluster.client._wire.post("/v1/tasks", body, Accepted).task_id)


def record(cluster: Cluster, task: Task) -> TaskRecord:
    found = cluster.with_store(lambda store: store.task(task.task_id))
    assert found is not None
    return found


def attempts(cluster: Cluster, task: Task) -> dict[int, Attempt]:
    return dict(cluster.with_store(lambda store: store.attempts(task.task_id)))


def ended(cluster: Cluster, *tasks: Task) -> list[TaskView]:
    return cluster.wait_all(tasks, 60)


def value(view: TaskView) -> object:
    assert view.status is TaskStatus.SUCCEEDED, view.error
    assert view.result is not None
    return msgspec.json.decode(view.result)


def test_the_next_attempt_finds_what_the_last_one_has_left(cluster: Cluster) -> None:
    """The executor is killed: progress, output and checkpoint were told before, and the next attempt goes on from there."""
    task = submit(cluster, "resumes", args={"path": str(cluster.witness_path)})
    pid = cluster.wait_started(task)["pid"]
    told_by = time.monotonic() + 3
    eventually(lambda: record(cluster, task).progress == 0.5, 3, "the progress")
    seen = record(cluster, task)
    assert (seen.status, seen.progress_message) == (TaskStatus.RUNNING, "half way")
    assert seen.checkpoint.endswith("/half")
    kept = eventually(
        lambda: log if (log := cluster.with_store(lambda store: store.kept_log(task.task_id))).stderr else None,
        max(0.1, told_by - time.monotonic()),
        "the output while it runs",
    )
    assert (kept.attempt, kept.stdout, kept.stderr) == (1, b"so far\n", b"so bad\n")
    os.kill(pid, signal.SIGKILL)
    (view,) = ended(cluster, task)
    assert value(view) == {"found": "one half", "same_folder": True, "attempt": 2}
    assert (view.crashes, view.attempt) == (1, 2)
    assert "was killed by SIGKILL" in attempts(cluster, task)[1].message


def test_an_agent_that_stops_gives_a_task_the_time_to_save(cluster: Cluster) -> None:
    task = submit(cluster, "saves_in_time", args={"path": str(cluster.witness_path)})
    cluster.wait_started(task)
    cluster.agent(record(cluster, task).node).send_signal(signal.SIGTERM)
    (view,) = ended(cluster, task)
    assert value(view) == "saved in time"
    assert (view.crashes, view.failures) == (0, 0)


def test_a_cancelled_task_and_its_device_memory_are_gone_within_five_seconds(cluster: Cluster) -> None:
    held = 100 * GIB
    args = {"path": str(cluster.witness_path), "memory_bytes": held}
    task = submit(cluster, "stays_with_memory", args=args, resources=ResourceRequest(memory=120 * GIB))
    cluster.wait_started(task)

    def used() -> int:
        return sum(device.used_bytes or 0 for worker in cluster.client.workers() for device in worker.devices)

    eventually(lambda: used() >= held, 10, "the memory is seen to be in use")
    began = time.monotonic()
    task.cancel()
    assert ended(cluster, task)[0].status is TaskStatus.CANCELLED
    eventually(lambda: used() < held, max(0.1, began + 5 - time.monotonic()), "the memory of the cancelled task")


def test_a_task_without_device_memory_is_tried_once_more_with_half_as_much_again(cluster: Cluster) -> None:
    recovers = submit(cluster, "out_of_memory", args={"times": 1}, resources=ResourceRequest(memory=3 * GIB))
    never = submit(cluster, "out_of_memory", args={"times": 9}, resources=ResourceRequest(memory=3 * GIB))
    once, failed = ended(cluster, recovers, never)
    assert value(once) == 2
    assert once.failures == 0
    assert record(cluster, recovers).more_memory
    assert memory_of(cluster, recovers) == 4 * GIB + 512 * MIB, format_memory(memory_of(cluster, recovers))
    first = attempts(cluster, recovers)[1]
    assert (first.why, first.message) == ("GpuOutOfMemory", "loading failed")
    assert failed.status is TaskStatus.FAILED
    assert failed.error is not None
    assert failed.error.type == "GpuOutOfMemory"
    assert (failed.attempt, failed.failures) == (2, 1)


def memory_of(cluster: Cluster, task: Task) -> int:
    """Memory that the task's shape asks for."""

    async def look(store: Store) -> Shape:
        shape_id = (await store.task(task.task_id)).shape_id  # type: ignore[union-attr]
        blob = await store.connection.call("HGET", f"{store.keys.prefix}shapes", shape_id)
        return msgspec.json.decode(blob, type=Shape)

    return cluster.with_store(look).memory_bytes


def test_only_what_is_named_is_tried_again(cluster: Cluster) -> None:
    by_base = submit(cluster, "key_error", max_attempts=2, retry_on=("LookupError",))
    by_reason = submit(cluster, "sleeps", args={"seconds": 60}, max_attempts=2, retry_on=("TimeLimitExceeded",), time_limit=0.2)
    other_error = submit(cluster, "key_error", max_attempts=2, retry_on=("ConnectionError",))
    other_reason = submit(cluster, "sleeps", args={"seconds": 60}, max_attempts=2, retry_on=("ValueError",), time_limit=0.2)
    views = ended(cluster, by_base, by_reason, other_error, other_reason)
    assert [view.status for view in views] == [TaskStatus.FAILED] * 4
    assert [view.failures for view in views] == [2, 2, 1, 1]
    assert [view.error.type for view in views if view.error] == ["KeyError", "TimeLimitExceeded"] * 2
    assert "KeyError" in {attempt.why for attempt in attempts(cluster, by_base).values()}


def test_a_large_result_lies_in_a_file_that_its_record_names(cluster: Cluster) -> None:
    task = submit(cluster, "large", args={"size": 400_000})
    small = submit(cluster, "large", args={"size": 4})
    view, other = ended(cluster, task, small)
    assert view.status is TaskStatus.SUCCEEDED, view.error
    assert value(other) == "xxxx"
    file = record(cluster, task).result_file
    assert file is not None
    data = (cluster.directory / "data" / "results" / file.name).read_bytes()
    assert data == b'"' + b"x" * 400_000 + b'"'
    assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list((cluster.directory / "data" / "results" / "writing").iterdir())


def test_each_task_of_an_array_knows_its_place(cluster: Cluster) -> None:
    array = submit(cluster, "place_in_array", args={"other": "same"}, count=3, index_as="number")
    tasks = [Task(cluster.client, id_in_array(array.task_id, index)) for index in range(3)]
    assert [value(view) for view in ended(cluster, *tasks)] == [[index, "same", index, index, 3] for index in range(3)]
