"""The systems that benchmarks run: Rocyard as `rocyard up` starts it, and FastAPI + Celery + Redis beside it.

Each is a context manager that yields where it listens and which processes make it up, and leaves nothing behind.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil

from manager.cli.own_cluster import own_cluster

START_S = 30.0
POLL_S = 0.05
HERE = Path(__file__).parent


class System(msgspec.Struct, frozen=True):
    """A running system.

    Attributes:
        headers: what every request bears.
        roots: process ids; with their descendants they are the whole system.
    """

    host: str
    port: int
    headers: dict[str, str]
    roots: tuple[int, ...]


def cpu_s(system: System) -> float:
    """CPU time of all its processes so far, the ended ones included."""
    total = 0.0
    for process in processes_of(system):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # What ended is counted at the parent that reaped it.
            total += times.user + times.system + times.children_user + times.children_system
    return total


def processes_of(system: System) -> list[psutil.Process]:
    """All its processes."""
    found: dict[int, psutil.Process] = {}
    for root in system.roots:
        process = psutil.Process(root)
        for one in (process, *process.children(recursive=True)):
            found[one.pid] = one
    return list(found.values())


@contextlib.contextmanager
def rocyard(simulate: str) -> Iterator[System]:
    """A whole cluster with authentication, its store syncing always."""
    # A fleet that stays as it is: what is measured is not how fast nodes are added.
    with own_cluster(os.environ, simulate=simulate, variables={"ROCYARD_AUTOSCALER__MODE": "off"}) as cluster:
        url = urlsplit(cluster.address.url)
        assert url.hostname is not None
        assert url.port is not None
        headers = {"Authorization": f"Bearer {cluster.address.api_key.value}"}
        yield System(url.hostname, url.port, headers, (cluster.pid,))


def missing_for_celery() -> list[str]:
    """What is needed for the peer and not installed."""
    missing = [name for name in ("celery", "fastapi") if importlib.util.find_spec(name) is None]
    return missing if shutil.which("redis-server") else [*missing, "redis-server"]


@contextlib.contextmanager
def celery(fsync: str, wait: str) -> Iterator[System]:
    """FastAPI under uvicorn, Celery's prefork pool of two, and Redis.

    Args:
        fsync: Redis' appendfsync: everysec is its default, always loses nothing in a power cut.
        wait: how GET waits: ``result`` or ``listener`` (see peer/fastapi_celery.py).
    """
    redis_port, port = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = {
        **kept,
        "PEER_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
        "PEER_WAIT": wait,
        "PYTHONPATH": str(HERE / "peer"),
        "PYTHONSAFEPATH": "1",
    }
    server = ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(folder)]
    server += ["--appendonly", "yes", "--appendfsync", fsync, "--save", ""]
    module = "fastapi_celery"
    workers = [sys.executable, "-m", "celery", "-A", f"{module}:worker", "worker", "--concurrency", "2"]
    api = [sys.executable, "-m", "uvicorn", f"{module}:app", "--host", "127.0.0.1", "--port", str(port)]
    api += ["--no-access-log", "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        pids = [stack.enter_context(_process(command, env, folder)) for command in (server, workers, api)]
        _wait_for_port(redis_port)
        _wait_for_task(port)
        yield System("127.0.0.1", port, {}, tuple(pids))


@contextlib.contextmanager
def _process(command: Sequence[str], env: dict[str, str], folder: Path) -> Iterator[int]:
    with (folder / "output.log").open("ab") as output:
        tied = [sys.executable, "-m", "manager.lifeline", str(os.getpid()), *command]
        code = str(HERE.parent)
        search = os.pathsep.join((code, env["PYTHONPATH"]))
        process = subprocess.Popen(tied, cwd=folder, env=env | {"PYTHONPATH": search}, stdout=output, stderr=output)
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"nothing listens on port {port}")


def _wait_for_task(port: int) -> None:
    """Until one task has gone all the way round."""
    _wait_for_port(port)
    url = f"http://127.0.0.1:{port}/v1/tasks"
    body = {"function": "echo", "args": {"x": 1}}
    with httpx.Client(timeout=START_S, trust_env=False) as client:
        task_id = client.post(url, json=body).raise_for_status().json()["task_id"]
        answer = client.get(f"{url}/{task_id}", params={"wait": START_S - 5}).raise_for_status().json()
    if answer["status"] != "SUCCESS":
        raise RuntimeError(f"the peer does not work: {answer}")
