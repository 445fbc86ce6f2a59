"""A whole cluster of one's own, in a temporary folder on free ports: for the demo and the benchmarks.

It is started as people start one, by ``rocyard up`` in a process of its own, and ends with the block, or with this
process however that ends.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

import manager
from manager.client import Client
from manager.client_address import ClusterAddress, find_cluster
from manager.client_errors import ClusterUnreachable
from manager.core.answers_nodes import WorkerState
from manager.core.errors import RocyardError, SettingsError, StartError

START_S: Final = 90.0
"""Over the supervisor's own deadline, so that its words come first."""
STOP_S: Final = 60.0
POLL_S: Final = 0.05
TAIL_LINES: Final = 25

_PORTS: Final = {"ROCYARD_API__PORT": "0", "ROCYARD_DASK__PORT": "0", "ROCYARD_DASK__DASHBOARD_PORT": "0"}


class OwnCluster(msgspec.Struct, frozen=True):
    """A running cluster.

    Attributes:
        pid: of its supervisor, the parent of all its processes.
        started_s: seconds from the start of `rocyard up` until nodes were live.
    """

    address: ClusterAddress
    pid: int
    folder: Path
    started_s: float


@contextlib.contextmanager
def own_cluster(
    environ: Mapping[str, str],
    *,
    simulate: str | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[OwnCluster]:
    """Run a cluster for the block.

    Args:
        environ: of this process; its ROCYARD_… variables are not passed on.
        simulate: the fleet, as for ``rocyard up --simulate``; None takes what the machine has.
        variables: settings, as ROCYARD_… variables.
        folder: where its data lie; None makes a temporary one and removes it at the end.

    Raises:
        StartError: it did not start, with the end of its log.
    """
    data = folder or Path(tempfile.mkdtemp(prefix="rocyard-"))
    try:
        with _supervisor(data, environ, simulate, variables or {}) as (process, log):
            yield _wait_until_ready(process, data, log)
    finally:
        if folder is None:
            shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def _supervisor(
    data: Path, environ: Mapping[str, str], simulate: str | None, variables: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    kept = {name: value for name, value in environ.items() if not name.startswith("ROCYARD_")}
    # This very copy of the code, wherever it lies: the child's working folder is another.
    code = str(Path(manager.__file__).parents[1])
    path = os.pathsep.join(part for part in (code, kept.get("PYTHONPATH", "")) if part)
    env = {**kept, **_PORTS, **variables, "ROCYARD_DATA_DIR": str(data), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    up = [sys.executable, "-m", "manager.cli.main", "up", *(["--simulate", simulate] if simulate else [])]
    log = data / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "manager.lifeline", str(os.getpid()), *up],
            cwd=data,  # neither a rocyard.yaml nor a .env of somebody's may count
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we stop it
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], data: Path, log: Path) -> OwnCluster:
    began_s = time.monotonic()
    while time.monotonic() < began_s + START_S and process.poll() is None:
        # Read anew each time: the file may still be that of an earlier start, on another port.
        with contextlib.suppress(SettingsError, ClusterUnreachable):
            address = find_cluster(None, None, {}, str(data))
            with Client(address) as client:
                if _is_ready(client):
                    return OwnCluster(address, process.pid, data, time.monotonic() - began_s)
        time.sleep(POLL_S)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    raise StartError(f"a cluster of its own did not start; 'rocyard up' said:\n{tail}")


def _is_ready(client: Client) -> bool:
    """Whether tasks can run: every node that said it is there also has its Dask worker."""
    try:
        states = [worker.state for worker in client.workers()]
        return bool(states) and all(state is WorkerState.LIVE for state in states) and bool(client.functions())
    except ClusterUnreachable:
        raise
    except RocyardError:
        return False
