"""Start the processes of one executor, and hold what the agent keeps of them: descriptors, and nothing that decides.

The program itself is ``executor.py``; what it says and what that means is `plugins.node.executor_handle`.
"""

import contextlib
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from manager.core import wire
from manager.core.quantities import KIB, MIB
from plugins.node.executor_output import OutputSplitter, Written
from plugins.node.pulse import Pulse, sealed_page

CHUNK_BYTES: Final = 64 * KIB  # what a pipe holds
MARKER_BYTES: Final = 24

_PROGRAM: Final = Path(__file__).with_name("executor.py")
_TARGET: Final = Path(__file__).with_name("executor_target.py")
_ATTEMPT: Final = Path(__file__).with_name("executor_attempt.py")
_PACKAGES: Final = Path(__file__).parents[2]  # the built-in functions are there, for executors of our own interpreter
_FACE: Final = "rocyard"  # the package that functions import; of all of ours, other interpreters see it alone


class ExecutorStartError(Exception):
    """An executor did not start: its interpreter is missing, has no msgspec, or is too slow."""


class Launch(msgspec.Struct, frozen=True):
    """What to start.

    Attributes:
        python: the interpreter; empty is the agent's own.
        env: all of its environment (see `scrubbed_environment`); its working directory is ``HOME``.
        lease_s: it ends itself when the pulse stands still for so long.
        path: directories put at the front of its import path.
        log_bytes_max: bytes kept of each stream of each call, the last ones.
        inline_bytes_max: a larger result is written to a file; without a place for one it fails its call.
        result_bytes_max: a larger result fails its call.
        marker: what it writes after each call's output; random where it is empty.
    """

    python: str
    env: Mapping[str, str]
    lease_s: float
    path: tuple[str, ...] = ()
    log_bytes_max: int = 64 * KIB
    inline_bytes_max: int = 256 * KIB
    result_bytes_max: int = 256 * MIB
    marker: bytes = b""


class OutputPipe:
    """The reading end of the executor's stdout or stderr."""

    def __init__(self, marker: bytes, bytes_max: int) -> None:
        self.fd, self.write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        self._splitter = OutputSplitter(marker, bytes_max)

    def read(self) -> int:
        """Take one chunk: how many bytes; 0 at the end, -1 where there is nothing now."""
        try:
            data = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return -1
        self._splitter.feed(data)
        return len(data)

    def so_far(self) -> Written:
        """What the running call has written."""
        return self._splitter.so_far()

    def take(self) -> Written:
        """What the oldest call that is done wrote: its marker was in the pipe before its answer was in the socket."""
        parts = self._splitter.parts
        while not parts:
            if self.read() <= 0:
                return self._splitter.cut()  # the task broke the pipe; what came belongs to it
        return parts.popleft()


def _face_in(home: Path) -> Path:
    """A folder that has nothing but the package which functions may import, so that nothing else of ours is found there.

    A folder rather than a hook: `multiprocessing` hands folders on to the processes that it starts.
    """
    folder = home / ".rocyard"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / _FACE).symlink_to(_PACKAGES / _FACE)
    return folder


class ExecutorProcess:
    """The processes of one executor, as the agent holds them.

    Attributes:
        python: the interpreter.
        guard: the agent's child; it ends last, as the executor ended, when every process below it is gone.
        pidfd: of the guard; readable once it has ended.
        socket: to the executor, not blocking.
        tokens_fd, tokens_back_fd: where tokens are put, and where they are taken back (`manager.core.wire`).
        stdout, stderr: its output.
    """

    def __init__(self, launch: Launch, pulse: Pulse) -> None:
        """Start them.

        Raises:
            ExecutorStartError: the interpreter cannot be started.
        """
        marker = launch.marker or secrets.token_bytes(MARKER_BYTES)
        self.python = python = launch.python or sys.executable
        ours = Path(python).absolute() == Path(sys.executable).absolute()
        path_last = _PACKAGES if ours else _face_in(Path(launch.env["HOME"]))
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.stdout = OutputPipe(marker, launch.log_bytes_max)
        self.stderr = OutputPipe(marker, launch.log_bytes_max)
        page_fd = sealed_page("rocyard-started")
        self._page = mmap.mmap(page_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
        tokens_read_fd, self.tokens_fd = os.pipe()
        # Opened anew, since "not blocking" belongs to an open file: the executor's reading must block.
        self.tokens_back_fd = os.open(f"/proc/self/fd/{tokens_read_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        inherited = (theirs.fileno(), tokens_read_fd, pulse.fd, page_fd)
        numbers = ",".join(map(str, (*inherited, os.getpid(), launch.inline_bytes_max, launch.result_bytes_max)))
        options = [
            wire.__file__,
            _TARGET,
            _ATTEMPT,
            marker.hex(),
            numbers,
            launch.lease_s,
            os.pathsep.join(launch.path),
            path_last,
        ]
        try:
            self.guard = subprocess.Popen(
                [python, str(_PROGRAM), *map(str, options)],
                env=dict(launch.env),
                cwd=launch.env["HOME"],
                stdin=subprocess.DEVNULL,
                stdout=self.stdout.write_fd,
                stderr=self.stderr.write_fd,
                pass_fds=inherited,
                start_new_session=True,
            )
        except OSError as error:
            self._close_shared()
            raise ExecutorStartError(f"{python} cannot be started: {error}") from None
        finally:
            theirs.close()
            for fd in (page_fd, tokens_read_fd, self.stdout.write_fd, self.stderr.write_fd):
                os.close(fd)
        self.pidfd = os.pidfd_open(self.guard.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the guard, and never to another process that came to have its pid."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:  # it has just ended
            return

    def put_tokens(self, first: int, count: int) -> None:
        """Allow the executor to begin the messages of these numbers."""
        os.write(self.tokens_fd, b"".join(map(wire.TOKEN.pack, range(first, first + count))))

    def take_tokens(self) -> list[int]:
        """Take back what the executor has not begun; it cannot begin it any more."""
        try:
            data = os.read(self.tokens_back_fd, CHUNK_BYTES)
        except BlockingIOError:
            return []
        return [number for (number,) in wire.TOKEN.iter_unpack(data)]

    def started(self) -> tuple[int, float]:
        """The number of the last call that has started, and when on the monotonic clock; 0 at first."""
        number, began_s = wire.STARTED.unpack_from(self._page)
        return number, began_s

    def close(self) -> None:
        """Give back all descriptors. Only after the guard has ended."""
        self._close_shared()
        os.close(self.pidfd)

    def _close_shared(self) -> None:
        self.socket.close()
        self._page.close()
        for fd in (self.tokens_fd, self.tokens_back_fd, self.stdout.fd, self.stderr.fd):
            os.close(fd)
