"""Dask tasks with a gpu annotation on a real cluster: real agents, executor processes, store; what the tasks see and write.

Functions are made by functions, so that they travel by value, as those of a notebook do.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

import rocyard
from manager.core.devices import Device
from manager.core.lifecycle import Cordon, SlotKind, TaskStatus
from manager.core.model import SlotRow
from manager.core.quantities import GIB
from tests.integration.cluster import Cluster, eventually, overcommitted

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture
def dask_client(cluster: Cluster) -> Iterator[Client]:
    eventually(lambda: all(row.address for row in cluster.state().nodes), 30, "all nodes have Dask workers")
    with Client(cluster.dask_address(), timeout=10, set_as_default=False) as client:
        eventually(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2, 30, "both are registered")
        yield client
    nothing_left(cluster)


def nothing_left(cluster: Cluster) -> None:
    """No direct slot is open, and the scheduler has no lease of one."""
    eventually(lambda: direct_slots(cluster) == [], 20, "no direct slot is open in the store")

    def leases(dask_scheduler: Any) -> list[str]:
        plugin = dask_scheduler.plugins["rocyard-placement"]
        return [*plugin.direct.keys, *(slot for slot in plugin.ledger.index.grants if slot not in plugin.ledger.requests)]

    with Client(cluster.dask_address(), timeout=40, set_as_default=False) as client:
        eventually(lambda: client.run_on_scheduler(leases) == [], 20, "nor has the scheduler a lease or request of one")


def direct_slots(cluster: Cluster) -> list[SlotRow]:
    return [slot for slot in cluster.state().slots if slot.kind is SlotKind.DIRECT]


def noting(path: Path, gate: Path | None = None, seconds: float = 0.0) -> Callable[..., dict[str, Any]]:
    """A function that writes down when it starts and ends, waits for `gate` or `seconds`, and returns what it sees."""
    file, door = str(path), str(gate) if gate is not None else ""

    def task(name: str, memory_bytes: int = 0) -> dict[str, Any]:
        import json
        import os
        import sys
        import time
        from pathlib import Path

        def note(event: str) -> None:
            devices = os.environ["ROCYARD_DEVICES"].split(",")
            line = {"event": event, "at": time.monotonic(), "task": name, "pid": os.getpid(), "devices": devices}
            handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(handle, (json.dumps({**line, "memory_bytes": memory_bytes}) + "\n").encode())
            os.close(handle)

        note("start")
        try:
            deadline_s = time.monotonic() + seconds
            while (door and not Path(door).exists()) or time.monotonic() < deadline_s:
                time.sleep(0.005)
        finally:
            note("end")
        print(f"{name} was here")  # noqa: T201
        return {"name": name, "pid": os.getpid(), "env": dict(os.environ), "modules": [m for m in sys.modules if "." not in m]}

    return task


def notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(path: Path, name: str) -> list[dict[str, Any]]:
    return [note for note in notes(path) if (note["task"], note["event"]) == (name, "start")]


def started(path: Path, name: str, times: int = 1) -> dict[str, Any]:
    return eventually(lambda: found[-1] if len(found := starts(path, name)) >= times else None, 30, f"start {times} of {name}")


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


# --- what a task sees -----------------------------------------------------------------------------------------------


def test_a_task_runs_in_a_process_of_its_own_that_sees_its_devices_only(
    cluster: Cluster, dask_client: Client, tmp_path: Path
) -> None:
    known = {device.uuid for row in cluster.state().nodes for device in row.info.devices}
    with rocyard.gpu(memory="100GiB"):
        one = dask_client.submit(noting(tmp_path / "n"), "one", pure=False)
    with rocyard.gpu(memory="10GiB", count=2):
        two = dask_client.submit(noting(tmp_path / "n"), "two", pure=False)
    seen = {answer["name"]: answer for answer in dask_client.gather([one, two])}
    workers = set(dask_client.run(os.getpid).values())
    assert len({seen["one"]["pid"], seen["two"]["pid"]} | workers) == 4
    for name, count in (("one", 1), ("two", 2)):
        devices = seen[name]["env"]["ROCYARD_DEVICES"].split(",")
        assert len(set(devices)) == count
        assert set(devices) <= known
        assert seen[name]["env"]["ROCYARD_SIMULATED_DEVICES"].split(",") == devices
        assert not [key for key in seen[name]["env"] if "URL" in key or "PASSWORD" in key]
        assert "distributed" not in seen[name]["modules"], "a plain call needs no Dask in its process, which is slow to import"


def test_lambdas_closures_dependencies_and_graphs(dask_client: Client) -> None:
    factor = 3
    with rocyard.gpu(memory="1GiB"):
        doubled = dask_client.submit(lambda x: x * 2, 5, pure=False)
        tripled = dask_client.submit(lambda x: x * factor, doubled, pure=False)
    total = dask_client.submit(lambda a, b: sum(a) + b, [doubled, tripled], tripled, pure=False)
    assert total.result(timeout=60) == 10 + 30 + 30


def test_no_worker_and_no_client_inside(dask_client: Client) -> None:
    def inside() -> str:
        from distributed import get_worker

        try:
            get_worker()
        except ValueError as error:
            return str(error)
        return "found"

    with rocyard.gpu(memory="1GiB"):
        assert "No worker found" in dask_client.submit(inside, pure=False).result(timeout=60)


def test_uploaded_modules_are_found(dask_client: Client, tmp_path: Path) -> None:
    module = tmp_path / "uploaded_for_gpu.py"
    module.write_text("def answer():\n    return 42\n")
    dask_client.upload_file(str(module))

    def ask() -> int:
        import uploaded_for_gpu

        return uploaded_for_gpu.answer()

    with rocyard.gpu(memory="1GiB"):
        assert dask_client.submit(ask, pure=False).result(timeout=60) == 42


def test_large_arguments_and_results(dask_client: Client) -> None:
    with rocyard.gpu(memory="1GiB"):
        made = dask_client.submit(lambda: b"x" * 100_000_000, pure=False)
        length = dask_client.submit(len, made, pure=False)
    assert length.result(timeout=60) == 100_000_000
    assert len(made.result(timeout=60)) == 100_000_000


def test_what_a_task_prints_is_in_its_workers_log(dask_client: Client, tmp_path: Path) -> None:
    with rocyard.gpu(memory="1GiB"):
        dask_client.submit(noting(tmp_path / "n"), "printer", pure=False).result(timeout=60)
    logs = dask_client.get_worker_logs()
    assert any("printer was here" in message for lines in logs.values() for _, message in lines)


# --- beside others --------------------------------------------------------------------------------------------------


def test_nothing_is_promised_twice_with_slots_of_the_leader_beside(
    cluster: Cluster, dask_client: Client, tmp_path: Path
) -> None:
    chance = random.Random(3)
    path = str(cluster.witness_path)
    before = len(cluster.witness())
    tasks = [
        cluster.client.submit(
            "hold", {"path": path, "seconds": 0.1, "memory_bytes": gib * GIB}, memory=f"{gib}GiB", gpus=chance.choice([1, 1, 2])
        )
        for gib in (chance.choice([30, 60, 100]) for _ in range(20))
    ]
    hold = noting(cluster.witness_path, seconds=0.1)
    futures = []
    for number in range(40):
        gib = chance.choice([20, 50, 90, 150])
        with rocyard.gpu(memory=f"{gib}GiB", count=chance.choice([1, 1, 2])):
            futures.append(dask_client.submit(hold, f"d{number}", gib * GIB, pure=False, priority=number % 3))
    plain = dask_client.map(lambda x: x + 1, range(50), pure=False)
    assert dask_client.gather(plain) == list(range(1, 51))
    assert {answer["name"] for answer in dask_client.gather(futures)} == {f"d{number}" for number in range(40)}
    assert all(view.status is TaskStatus.SUCCEEDED for view in cluster.wait_all(tasks))
    events = cluster.witness()[before:]
    assert len(events) == 2 * 60
    assert overcommitted(events, 192 * GIB) == []


def test_a_map_of_two_hundred(dask_client: Client) -> None:
    with rocyard.gpu(memory="8GiB"):
        futures = dask_client.map(lambda x: x + 1, range(200), pure=False)
    assert dask_client.gather(futures) == list(range(1, 201))


def test_no_more_tasks_than_slots_and_threads_stay_free(cluster: Cluster, dask_client: Client, tmp_path: Path) -> None:
    """Each worker has four threads; all of ten tasks run at once, and plain ones beside them."""
    gate = tmp_path / "gate"
    with rocyard.gpu(memory="8GiB"):
        futures = [dask_client.submit(noting(tmp_path / "n", gate), f"t{n}", pure=False) for n in range(10)]
    eventually(lambda: len(notes(tmp_path / "n")) == 10, 40, "all ten have started")
    assert len(direct_slots(cluster)) == 10
    assert sum(worker.slots for worker in cluster.client.status().workers) == 10
    assert dask_client.submit(lambda: "free", pure=False).result(timeout=10) == "free"
    gate.touch()
    assert len(dask_client.gather(futures)) == 10


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_exceptions_keep_their_class_cause_and_traceback(dask_client: Client) -> None:
    def outer() -> None:
        def inner() -> None:
            {}["missing"]

        try:
            inner()
        except KeyError as error:
            raise ValueError("no such thing", 7) from error

    with rocyard.gpu(memory="1GiB"):
        future = dask_client.submit(outer, pure=False)
    with pytest.raises(ValueError, match="no such thing") as raised:
        future.result(timeout=60)
    assert raised.value.args == ("no such thing", 7)
    assert isinstance(raised.value.__cause__, KeyError)
    names = [entry.name for entry in raised.traceback]
    assert names[-1] == "outer"


def test_exceptions_that_cannot_travel_come_as_text_and_sys_exit_ends_no_worker(dask_client: Client) -> None:
    def odd() -> None:
        import threading

        raise LookupError("one and", threading.Lock())

    def leave() -> None:
        import sys

        sys.exit(3)

    with rocyard.gpu(memory="1GiB"):
        futures = [dask_client.submit(function, pure=False) for function in (odd, leave)]
    with pytest.raises(RuntimeError, match=r"LookupError: .*one and.*cannot be pickled"):
        futures[0].result(timeout=60)
    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        futures[1].result(timeout=60)


def test_retries_really_retry(dask_client: Client, tmp_path: Path) -> None:
    counter = str(tmp_path / "tries")

    def at_the_third() -> int:
        from pathlib import Path

        file = Path(counter)
        file.write_text(file.read_text() + "x" if file.exists() else "x")
        if len(file.read_text()) < 3:
            raise OSError("not yet")
        return len(file.read_text())

    with rocyard.gpu(memory="1GiB"):
        assert dask_client.submit(at_the_third, pure=False, retries=2).result(timeout=60) == 3


def test_a_crash_ends_its_own_task_only_and_names_the_signal(dask_client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def crash() -> None:
        import ctypes

        ctypes.string_at(0)

    with rocyard.gpu(memory="1GiB"):
        neighbour = dask_client.submit(noting(tmp_path / "n", gate), "neighbour", pure=False)
        started(tmp_path / "n", "neighbour")
        crashed = dask_client.submit(crash, pure=False)
    with pytest.raises(rocyard.GpuTaskCrashed, match=r"killed by SIGSEGV \(slot "):
        crashed.result(timeout=60)
    gate.touch()
    assert neighbour.result(timeout=60)["name"] == "neighbour"
    assert len(starts(tmp_path / "n", "neighbour")) == 1


def test_more_memory_than_was_asked_for_ends_the_task(dask_client: Client) -> None:
    def greedy() -> None:
        import time

        from plugins.node.functions.device_memory import hold

        with hold(20 * 1024**3):
            time.sleep(60)

    with rocyard.gpu(memory="2GiB"):
        future = dask_client.submit(greedy, pure=False)
    said = "used 20 GiB of a device, and its slot leases 2 GiB of it; ask for 20 GiB or more"
    with pytest.raises(rocyard.MemoryExceeded, match=said):
        future.result(timeout=60)


def test_a_result_that_needs_a_device_is_a_clear_error(dask_client: Client) -> None:
    def bad() -> object:
        class OnDevice:
            def __reduce__(self) -> object:
                return eval, ("1/0",)

        return OnDevice()

    with rocyard.gpu(memory="1GiB"):
        future = dask_client.submit(bad, pure=False)
    with pytest.raises(rocyard.GpuResultUnreadable, match="moved to the CPU"):
        future.result(timeout=60)


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancelling_ends_the_process_and_its_lease_stays_until_then(
    cluster: Cluster, dask_client: Client, tmp_path: Path, stubborn: bool
) -> None:
    file = str(tmp_path / "n")

    def endless() -> None:
        import os
        import signal
        import time
        from pathlib import Path

        if stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            Path(file).write_text(str(os.getpid()))
            while True:
                time.sleep(0.01)
        finally:
            Path(file + ".tidied").touch()

    with rocyard.gpu(memory="190GiB"):
        future = dask_client.submit(endless, pure=False)
    pid = int(eventually(lambda: Path(file).exists() and Path(file).read_text(), 30, "it runs"))
    (slot,) = direct_slots(cluster)
    assert slot.memory_bytes == 190 * GIB
    dask_client.cancel([future])
    eventually(lambda: is_gone(pid), 5, "its process is gone")
    eventually(lambda: direct_slots(cluster) == [], 5, "its slot is closed")
    assert Path(file + ".tidied").exists() is not stubborn, "its finally blocks had their chance"


def test_a_client_that_goes_away_takes_its_tasks_with_it(cluster: Cluster, dask_client: Client, tmp_path: Path) -> None:
    with Client(cluster.dask_address(), timeout=10, set_as_default=False) as other, rocyard.gpu(memory="1GiB"):
        future = other.submit(noting(tmp_path / "n", tmp_path / "never"), "left", pure=False)
        pid = started(tmp_path / "n", "left")["pid"]
        assert future.status == "pending"
    eventually(lambda: is_gone(pid), 10, "its process is gone")


def test_a_drain_with_a_deadline_moves_the_task_without_blame(cluster: Cluster, dask_client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with rocyard.gpu(memory="100GiB"):
        future = dask_client.submit(noting(tmp_path / "n", gate), "moved", pure=False, retries=0)
    first = started(tmp_path / "n", "moved")
    (slot,) = direct_slots(cluster)
    cluster.with_store(lambda store: store.cordon(slot.node, Cordon.DRAIN, "operator", 0.0))
    try:
        second = started(tmp_path / "n", "moved", 2)
        assert set(first["devices"]).isdisjoint(second["devices"])
        gate.touch()
        assert future.result(timeout=30)["name"] == "moved"
    finally:
        cluster.with_store(lambda store: store.cordon(slot.node, Cordon.NONE, "operator"))


# --- who may die ------------------------------------------------------------------------------------------------------


def test_death_of_a_dask_worker_ends_its_tasks_and_they_run_elsewhere(
    cluster: Cluster, dask_client: Client, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with rocyard.gpu(memory="100GiB"):
        future = dask_client.submit(noting(tmp_path / "n", gate), "t", pure=False)
    pid = started(tmp_path / "n", "t")["pid"]
    (slot,) = direct_slots(cluster)
    cluster.dask_worker(slot.node).kill()
    eventually(lambda: is_gone(pid), 5, "its process is gone")
    started(tmp_path / "n", "t", 2)
    gate.touch()
    assert future.result(timeout=30)["name"] == "t"


def test_death_of_an_agent_ends_its_tasks_and_they_run_again(cluster: Cluster, dask_client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with rocyard.gpu(memory="100GiB"):
        future = dask_client.submit(noting(tmp_path / "n", gate), "t", pure=False)
    pid = started(tmp_path / "n", "t")["pid"]
    (slot,) = direct_slots(cluster)
    cluster.agent(slot.node).kill()
    eventually(lambda: is_gone(pid), 5, "its process is gone")
    started(tmp_path / "n", "t", 2)
    gate.touch()
    assert future.result(timeout=30)["name"] == "t"
    eventually(lambda: all(row.address and not row.fenced for row in cluster.state().nodes), 40, "the node is back")


def test_an_executor_that_ended_for_a_silent_agent_blames_nobody(cluster: Cluster, dask_client: Client, tmp_path: Path) -> None:
    """Executors end themselves when their agent is silent for a lease; no retry is asked for here."""
    gate = tmp_path / "gate"
    with rocyard.gpu(memory="100GiB"):
        future = dask_client.submit(noting(tmp_path / "n", gate), "t", pure=False)
    pid = started(tmp_path / "n", "t")["pid"]
    (slot,) = direct_slots(cluster)
    agent = cluster.agent(slot.node)
    agent.suspend()
    try:
        eventually(lambda: is_gone(pid), 15, "its process has ended itself")
        started(tmp_path / "n", "t", 2)  # elsewhere, as soon as the leader has declared the node lost
    finally:
        agent.resume()
    gate.touch()
    assert future.result(timeout=30)["name"] == "t"
    eventually(lambda: all(row.address and not row.fenced for row in cluster.state().nodes), 40, "the node is back")


def test_death_of_the_scheduler_loses_futures_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with Client(cluster.dask_address(), timeout=10, set_as_default=False) as client:
        with rocyard.gpu(memory="100GiB"):
            future = client.submit(noting(tmp_path / "n", tmp_path / "never"), "t", pure=False)
        pid = started(tmp_path / "n", "t")["pid"]
        scheduler = cluster.role("scheduler")
        scheduler.kill()
        eventually(lambda: is_gone(pid), 15, "its process is gone")
        eventually(future.cancelled, 15, "the client has noticed")
    cluster.wait_role("scheduler", scheduler.pid)
    nothing_left(cluster)
    with Client(cluster.dask_address(), timeout=10, set_as_default=False) as client, rocyard.gpu(memory="190GiB"):
        assert client.gather(client.map(lambda x: x, range(4))) == [0, 1, 2, 3]


def test_held_tasks_say_why_they_wait(cluster: Cluster, dask_client: Client) -> None:
    with rocyard.gpu(memory="500GiB"):
        future = dask_client.submit(lambda: 1, pure=False)
    eventually(lambda: rocyard.explain(future).state == "held", 10, "it is held")
    text = str(rocyard.explain(future))
    nodes = sorted(row.node for row in cluster.state().nodes)
    assert text.startswith("waits for room (1 × 500 GiB), 0 of its size before it")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == nodes
    assert "ExceedsLargestDevice" in text
    started_s = time.monotonic()
    dask_client.cancel([future])
    assert time.monotonic() - started_s < 10
    assert isinstance(cluster.state().nodes[0].info.devices[0], Device)
