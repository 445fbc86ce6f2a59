"""Child processes of the machine's supervisor: started, restarted on any exit, ended with it.

A child leads a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone, and the kernel kills it when
the supervisor dies. Its output goes to a bounded log file.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from manager.core.lifecycle import OUTDATED_EXIT
from manager.log import get_logger
from manager.metrics import PROCESS_RESTARTS

PAUSE_S: Final = (0.2, 5.0)
STEADY_S: Final = 10.0
"""A child that lived for so long was well: its next start does not wait."""
OUTDATED_PAUSE_S: Final = 60.0
"""A process that is too old for its store is as old at its next start: somebody must install the newer version first."""
LOG_BYTES_MAX: Final = 32 * 1024 * 1024
LOG_CHECK_S: Final = 30.0

log = get_logger("rocyard.supervisor")


class Command(msgspec.Struct, frozen=True):
    """How to start a child.

    Attributes:
        name: for people and the log file.
        argv: the command.
        stdin: what is written to it, secrets among it.
        stop_s: seconds that it has after SIGTERM.
        final: exit status after which it is not started again.
    """

    name: str
    argv: tuple[str, ...]
    stdin: bytes = b""
    stop_s: float = 10.0
    final: int | None = None


def tied(argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv`, started so that the kernel kills it when this process dies."""
    return (sys.executable, "-m", "manager.lifeline", str(os.getpid()), *argv)


class Child:
    """One child process and its successors.

    Args:
        command: how to start it.
        directory: where its log lies.
        on_restart: told the name when it is started again.
        on_final: told the name when it has ended for good, by itself.
    """

    def __init__(
        self,
        command: Command,
        directory: Path,
        on_restart: Callable[[str, int], None],
        on_final: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.command = command
        self.log_path = directory / f"{command.name}.log"
        self.restarts = 0
        self._on_restart = on_restart
        self._on_final = on_final
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the present process."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """Of the present process, once it has ended."""
        return self._process.returncode if self._process is not None else None

    async def start(self) -> None:
        """Start it, and keep it running from now on."""
        await self._spawn()
        self._running = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *tied(self.command.argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_environment(),
            )
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):
            stdin.write(self.command.stdin)
            await stdin.drain()
        stdin.close()

    async def _keep(self) -> None:
        pause_s = PAUSE_S[0]
        while True:
            began_s = time.monotonic()
            await self._wait_for_exit()
            if self._stopping.is_set():
                return
            if self.returncode == self.command.final:
                log.info("process_ended", process=self.command.name)
                self._on_final(self.command.name)
                return
            lived_s = time.monotonic() - began_s
            pause_s = PAUSE_S[0] if lived_s > STEADY_S else min(PAUSE_S[1], pause_s * 2)
            code = self.returncode or 0
            if code == OUTDATED_EXIT:
                pause_s = OUTDATED_PAUSE_S
            log.warning("process_exited", process=self.command.name, status=code, lived_s=round(lived_s, 3))
            PROCESS_RESTARTS.labels(process=self.command.name.split("-")[0]).inc()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            if self._stopping.is_set():
                return
            self.restarts += 1
            self._on_restart(self.command.name, code)
            try:
                await self._spawn()
            except OSError as error:
                log.error("process_not_started", process=self.command.name, error=str(error))

    async def _wait_for_exit(self) -> None:
        process = self._process
        assert process is not None
        while process.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_CHECK_S):
                    await process.wait()
            _bound_log(self.log_path)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; returns when it is gone."""
        self._stopping.set()
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(self.command.stop_s):
                    await process.wait()
            except TimeoutError:
                log.warning("process_killed", process=self.command.name, after_s=self.command.stop_s)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._running is not None:
            await self._running

    def tail(self, lines: int = 15) -> str:
        """The end of its log, for people."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - 16384))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def _environment() -> dict[str, str]:
    """Children are told their settings on stdin; of ours they need only what any program does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
    return {**kept, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _bound_log(path: Path) -> None:
    """Start a log that has grown too large over, keeping one of its kind beside it."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_BYTES_MAX:
            path.with_suffix(".log.1").write_bytes(path.read_bytes())
            os.truncate(path, 0)  # the child appends, so it goes on at the new end
