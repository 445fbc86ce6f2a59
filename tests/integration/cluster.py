"""A real cluster of its own for tests: ``rocyard up`` in a folder of the test's, on free ports, and its processes by name."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
import pytest

from manager.client import Client, Task
from manager.core.answers_tasks import TaskView
from manager.core.lifecycle import FINAL
from manager.core.model import ClusterState
from manager.store import Store
from manager.store.store import connect

T = TypeVar("T")
START_S: Final = 90.0
WITNESS: Final = Path(__file__).parent / "witness"
FUNCTIONS: Final = ("hold", "until", "greedy", "segfault", "stubborn", "environment", "chatter")
QUICK: Final = {
    "ROCYARD_NODE__BEAT_S": "0.5",
    "ROCYARD_NODE__PROBE_S": "0.5",
    "ROCYARD_CONTROLLER__PERIOD_S": "0.5",
    "ROCYARD_CONTROLLER__TERM_S": "3",
    "ROCYARD_SLOTS__OPEN_DEADLINE_S": "5",
    # A test says itself when nodes may come and go.
    "ROCYARD_AUTOSCALER__MODE": "off",
}


def eventually(check: Callable[[], T], timeout_s: float, what: str) -> T:
    """The first true answer of `check`; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        answer = check()
        if answer:
            return answer
        now = time.monotonic()
        assert now < deadline, f"not within {timeout_s} s: {what} (last: {answer!r})"
        # The period of looking, not a guess of when. A look that costs much comes less often: what is waited for needs the CPU.
        time.sleep(max(0.02, min(0.2, 3 * (now - began))))


def program_or_skip(name: str, package: str) -> str:
    """Path of a program. Without it the test is skipped, in CI it fails."""
    found = shutil.which(name)
    if found is None:
        reason = f"needs {name} (on Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Cluster:
    """One running cluster."""

    def __init__(self, directory: Path, environ: dict[str, str] | None = None, simulate: str = "2x2:mi300x") -> None:
        self.directory = directory
        self.witness_path = directory / "witness.jsonl"
        self._witnessed: list[dict[str, Any]] = []
        self._witnessed_bytes = 0
        functions = {
            name: {"target": f"witness_functions:{name}", "path": str(WITNESS), "memory": "1GiB"} for name in FUNCTIONS
        }
        config = directory / "rocyard.yaml"
        directory.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({"functions": functions}))  # JSON is YAML
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
        self.environ = {
            **kept,
            **QUICK,
            "ROCYARD_CONFIG": str(config),
            "ROCYARD_DATA_DIR": str(directory / "data"),
            "ROCYARD_API__PORT": "0",
            "ROCYARD_DASK__PORT": "0",
            "ROCYARD_DASK__DASHBOARD_PORT": "0",
            **(environ or {}),
        }
        self.simulate = simulate
        self.tie: tuple[str, ...] = ()  # a command that becomes the one after it, see manager.lifeline
        self.output = directory / "up.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.client: Client

    def start(self) -> None:
        """Start it and wait until a task could run."""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*self.tie, sys.executable, "-m", "manager.cli.main", "up", "--simulate", self.simulate],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def up() -> bool:
            assert self.process is not None
            text = self.output.read_text(errors="replace")
            assert self.process.poll() is None, f"rocyard up ended with {self.process.returncode}:\n{text}"
            return "Rocyard is up" in text

        eventually(up, START_S, "rocyard up")
        record = json.loads((self.directory / "data" / "client.json").read_text())
        self.client = Client.at(record["url"], record["api_key"], record["ca"])

    def stop(self) -> int:
        """Ctrl-C; its exit status."""
        assert self.process is not None
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(40)

    def destroy(self) -> None:
        """End it whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            family = [self.process_of(self.process.pid)]
            with contextlib.suppress(psutil.Error):
                family += psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.kill()

    # --- its processes ------------------------------------------------------------------------------------------

    @staticmethod
    def process_of(pid: int) -> psutil.Process:
        """A process, safe against reuse of its pid."""
        return psutil.Process(pid)

    def family(self) -> list[psutil.Process]:
        """All processes of the cluster below the supervisor."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, *words: str) -> list[psutil.Process]:
        """Processes whose command line has all `words`."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if all(any(word in part for part in line) for word in words):
                    found.append(process)
        return found

    def role(self, role: str) -> psutil.Process:
        """The process of one role: store, scheduler, controller, api."""
        found = self.role_or_none(role)
        assert found is not None, f"there is no {role}"
        return found

    def role_or_none(self, role: str) -> psutil.Process | None:
        """As `role`, None while it is being started again."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if role == "store" and process.name().startswith(("redis", "valkey")):
                    return process
                if line[-1:] == [role] and "manager.cli.process" in line:
                    return process
        return None

    def wait_role(self, role: str, not_pid: int) -> psutil.Process:
        """The next process of a role after the one that was `not_pid`."""
        return eventually(
            lambda: p if (p := self.role_or_none(role)) is not None and p.pid != not_pid else None, 20, f"the next {role}"
        )

    def agent(self, node: str) -> psutil.Process:
        """The agent of a node."""
        state = self.state()
        return psutil.Process(next(row.info.pid for row in state.nodes if row.node == node))

    def dask_worker(self, node: str, not_pid: int = 0) -> psutil.Process:
        """The Dask worker of a node; with `not_pid` the one after that."""

        def find() -> psutil.Process | None:
            with contextlib.suppress(psutil.Error):
                for process in self.agent(node).children():
                    if process.pid != not_pid and "plugins.worker_process" in process.cmdline():
                        return process
            return None

        return eventually(find, 20, f"a Dask worker on {node}")

    # --- its state ----------------------------------------------------------------------------------------------

    def with_store(self, action: Callable[[Store], Awaitable[T]]) -> T:
        """What `action` answers on a connection of its own."""

        async def run() -> T:
            store = connect(self.store_url(), 3.0, "test")
            try:
                return await action(store)
            finally:
                await store.connection.close()

        return asyncio.run(run())

    def store_url(self) -> str:
        """URL of the embedded store."""
        kept = json.loads((self.directory / "data" / "store.json").read_text())
        return f"redis://rocyard:{kept['password']}@127.0.0.1:{kept['port']}/0"

    def dask_address(self) -> str:
        """Where the Dask scheduler listens, as the screen says."""
        found = re.search(r"Dask scheduler and placement, (\S+)", self.output.read_text())
        assert found is not None
        return f"tcp://{found[1]}"

    def state(self) -> ClusterState:
        """One look at the store."""
        return self.with_store(lambda store: store.look(leader=False))

    def witness(self) -> list[dict[str, Any]]:
        """All that tasks have written down."""
        with contextlib.suppress(FileNotFoundError), self.witness_path.open("rb") as file:
            file.seek(self._witnessed_bytes)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # somebody may be writing the last line now
            self._witnessed += map(json.loads, whole.splitlines())
            self._witnessed_bytes += len(whole)
        return list(self._witnessed)

    def started(self, task: Task | str) -> list[dict[str, Any]]:
        """The starts of one task."""
        task_id = task if isinstance(task, str) else task.task_id
        return [event for event in self.witness() if event["task"] == task_id and event["event"] == "start"]

    def wait_started(self, task: Task, times: int = 1, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until the task has started so often; its last start."""
        return eventually(
            lambda: found[-1] if len(found := self.started(task)) >= times else None,
            timeout_s,
            f"start number {times} of {task.task_id}",
        )

    def wait_all(self, tasks: Sequence[Task], timeout_s: float = 60.0) -> list[TaskView]:
        """The final views of tasks."""
        deadline = time.monotonic() + timeout_s
        views = []
        for task in tasks:
            view = self.client.wait(task.task_id, max(0.1, deadline - time.monotonic()))
            assert view.status in FINAL, f"{task.task_id} is {view.status} after {timeout_s} s"
            views.append(view)
        return views


def overcommitted(events: Sequence[dict[str, Any]], total_bytes: int) -> list[str]:
    """Moments at which the tasks' own notes hold more of a device than it has."""
    changes: dict[str, list[tuple[float, int, int]]] = {}
    for event in events:
        sign = 1 if event["event"] == "start" else -1
        for device in event["devices"]:
            changes.setdefault(device, []).append((event["at"], sign, sign * event["memory_bytes"]))
    problems = []
    for device, moments in changes.items():
        held = 0
        for at, _, delta in sorted(moments):
            held += delta
            if held > total_bytes:
                problems.append(f"{device} held {held} at {at}")
    return problems


def clusters(directory: Path, environ: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster that ends with its fixture."""
    cluster = Cluster(directory, environ)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()
