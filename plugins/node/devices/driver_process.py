"""The agent's end of the child process that talks to the driver: start it, ask it, end it.

Owns the pipes. Decides nothing: deadlines, restarts and what stands in for an answer are the prober's.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from manager.core.devices import Probe
from manager.core.wire import FrameReader, pack
from plugins.node.devices.child import Answer, Ask, Order

KILL_S: Final = 1.0
"""A killed process is gone within milliseconds, or it sits in the kernel for long."""
_STDERR_BYTES_MAX: Final = 2000
_PACKAGES: Final = Path(__file__).parents[3]


class NoAnswerError(Exception):
    """The child gave no answer; the text says why. Control flow between it and the prober only."""


class DriverProcess:
    """One child process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("a child needs all three pipes")
        self.answered = False
        self._process = process
        self._questions, self._answers = process.stdin, process.stdout
        self._frames = FrameReader()
        self._number = 0
        self._stderr = b""
        self._drain = asyncio.create_task(self._keep_stderr(process.stderr))

    @classmethod
    async def start(cls, order: Order, env: Mapping[str, str]) -> "DriverProcess":
        """A child that carries out `order`, apart from our terminal's signals and with none of our settings."""
        scrubbed = {name: value for name, value in env.items() if not name.startswith("ROCYARD_")}
        path = os.pathsep.join(filter(None, [str(_PACKAGES), env.get("PYTHONPATH", "")]))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "plugins.node.devices.child", msgspec.json.encode(order).decode(),
            stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True,
            env=scrubbed | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path},
        )  # fmt: skip
        return cls(process)

    async def ask(self, known: int) -> Probe:
        """One look; `known`: as in `Ask`.

        Raises:
            NoAnswerError: it ended, or answered what is no answer.
        """
        self._number += 1
        with contextlib.suppress(ConnectionError):  # it has ended; why stands below
            self._questions.write(pack(Ask(self._number, known)))
            await self._questions.drain()
        try:
            while data := await self._answers.read(65536):
                for body in self._frames.feed(data):
                    answer = msgspec.msgpack.decode(body, type=Answer)
                    if answer.number == self._number:
                        self.answered = True
                        return answer.probe
        except (ValueError, msgspec.DecodeError) as error:
            raise NoAnswerError(f"the device prober cannot be understood: {type(error).__name__}: {error}") from error
        await self._drain
        code = await self._process.wait()
        raise NoAnswerError(f"the device prober ended with {code}: {self._stderr.decode(errors='replace').strip()}")

    async def kill(self, wait_s: float = KILL_S) -> bool:
        """End it. Whether it is gone within `wait_s`: a process inside a hung driver stays."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        try:
            async with asyncio.timeout(wait_s):
                await self._process.wait()
        except TimeoutError:
            return False
        self._drain.cancel()
        return True

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _keep_stderr(self, stderr: asyncio.StreamReader) -> None:
        """Keep the end of what it says, and keep the pipe from filling up."""
        while data := await stderr.read(4096):
            self._stderr = (self._stderr + data)[-_STDERR_BYTES_MAX:]
