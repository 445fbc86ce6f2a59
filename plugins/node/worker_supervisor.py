"""Keeps one Dask worker running: starts it, restarts it on any exit, ends it when it is frozen.

Dask workers end with status 0 when their scheduler dies, so every exit is followed by a new start. Each start is a new
generation; the agent refuses requests of older ones.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Final

import msgspec

from manager.log import get_logger
from manager.metrics import PROCESS_RESTARTS
from plugins.node.worker_config import WorkerConfig

PAUSE_S: Final = (0.1, 1.0)
STEADY_S: Final = 5.0
"""A worker that lived for so long was well: the next start does not wait."""
SILENT_S_MAX: Final = 10.0
"""A Dask worker that has beaten, and then not for so long, is frozen."""
STOP_S: Final = 3.0

log = get_logger("rocyard.agent")


class WorkerSupervisor:
    """Runs Dask workers one after the other.

    Args:
        configure: the configuration of the next worker, by its generation.
        environ: of the worker: no credential, no visible device.
        start_s: a worker that has not beaten so long after its start has failed to register, and is started anew.
    """

    def __init__(self, configure: Callable[[int], WorkerConfig], environ: dict[str, str], start_s: float) -> None:
        self.configure = configure
        self.environ = environ
        self.start_s = start_s
        self.generation = 0
        self.pid: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._until_s = 0.0
        self._beaten = False
        self._stopping = False

    def heard(self) -> None:
        """The worker has beaten."""
        self._until_s = time.monotonic() + SILENT_S_MAX
        self._beaten = True

    def forgive(self, seconds: float) -> None:
        """This process itself stood still for so long."""
        self._until_s += seconds

    async def run(self) -> None:
        """Start, wait, start again, until `stop`."""
        pause_s = PAUSE_S[0]
        while not self._is_stopping():
            self.generation += 1
            began_s = time.monotonic()
            self._until_s, self._beaten = began_s + self.start_s, False
            try:
                await self._run_once()
            except OSError as error:
                log.error("worker_not_started", error=str(error))
            if self._is_stopping():
                return
            lived_s = time.monotonic() - began_s
            pause_s = PAUSE_S[0] if lived_s > STEADY_S else min(PAUSE_S[1], pause_s * 2)
            PROCESS_RESTARTS.labels(process="worker").inc()
            log.warning("worker_exited", generation=self.generation, lived_s=round(lived_s, 3))
            await asyncio.sleep(pause_s)

    def _is_stopping(self) -> bool:
        return self._stopping

    async def _run_once(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "plugins.worker_process"),
            stdin=asyncio.subprocess.PIPE,
            env=self.environ,
            start_new_session=True,
        )
        self._process, self.pid = process, process.pid
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(self.configure(self.generation)))
            with contextlib.suppress(ConnectionError):
                await process.stdin.drain()
            process.stdin.close()
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        await process.wait()
                        return
                except TimeoutError:
                    if time.monotonic() > self._until_s:
                        if self._beaten:
                            log.error("worker_frozen", pid=process.pid, silent_s=SILENT_S_MAX)
                        else:
                            log.error("worker_not_registered", pid=process.pid, waited_s=self.start_s)
                        process.kill()
        finally:
            self.pid = None
            if process.returncode is None:
                process.kill()

    def restart(self) -> None:
        """End the present worker at once; the next one registers afresh."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """End it for good, gently at first."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()


def worker_environment(environ: dict[str, str]) -> dict[str, str]:
    """A Dask worker's environment: what any program needs, none of our settings, and no device."""
    kept = {name: value for name, value in environ.items() if not name.startswith(("ROCYARD_", "DASK_"))}
    hidden = {"HIP_VISIBLE_DEVICES": "-1", "CUDA_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1"}
    return {
        **kept,
        **hidden,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
