"""The agent's handle of one executor: give it calls, take its answers and output, end it.

Owns the order of calls and answers, and the rule which call has started. It decides nothing about tasks: what an ended
attempt means is the caller's. All methods belong to the thread of the event loop, and none blocks it, but for the few
milliseconds in which a process starts.
"""

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from manager.core import wire
from manager.core.quantities import KIB, MIB
from plugins.node.executor_process import CHUNK_BYTES, ExecutorProcess, ExecutorStartError, Launch, OutputPipe
from plugins.node.pulse import Pulse

READY_S_MAX: Final = 30.0  # an interpreter on a cold network file system
CALLS_MAX: Final = 1000  # far over the largest batch; each call not done is a token of 8 bytes in a pipe of 64 KiB
LEAVING_S: Final = 2.0  # from the end of the socket to the end of the process, for `atexit` of user code


class Output(NamedTuple):
    """What one task wrote: the last bytes of each stream, and how many bytes of each were dropped before them."""

    stdout: bytes
    stderr: bytes
    stdout_dropped: int = 0
    stderr_dropped: int = 0


class Exit(msgspec.Struct, frozen=True):
    """How an executor ended. Every process of it is gone.

    Attributes:
        returncode: as `subprocess.Popen.returncode`: the negative number of the signal that ended it.
        started: the call that was running, if there was one; it alone can be to blame.
        unstarted: calls that had not started, in order.
        output: what the running call had written.
        asked: whether `terminate` or `kill` had been called.
    """

    returncode: int
    started: wire.Call | None
    unstarted: tuple[wire.Call, ...]
    output: Output
    asked: bool


OnDone = Callable[[wire.Done, Output], None]
OnNote = Callable[[wire.Note], None]
OnExit = Callable[[Exit], None]
OnDescribed = Callable[[wire.Described], None]


class Executor:
    """One executor process. Make it with `start`.

    Attributes:
        pid: of the process that runs the tasks; 0 until it is ready. Its process group and children are the task's too.
        guard_pid: of its guard, the agent's child and leader of the session that all of them share.
        python: version of its interpreter.
        exited: resolved when all is over, after `on_exit`.
    """

    def __init__(
        self,
        process: ExecutorProcess,
        on_done: OnDone,
        on_exit: OnExit,
        on_described: OnDescribed | None,
        on_note: OnNote | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pid, self.guard_pid, self.python = 0, process.guard.pid, ""
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._loop, self._process = loop, process
        self._on_done, self._on_exit, self._on_described, self._on_note = on_done, on_exit, on_described, on_note
        self._reader = wire.FrameReader()
        self._outbox = bytearray()
        self._calls: deque[tuple[int, wire.Call]] = deque()  # numbered; not done, not taken back
        self._sent_count = 0
        self._asked = self._ended = False
        self._handed_out = False  # until then its end is an error of `start`, not an event
        self._socket_fd = process.socket.fileno()
        loop.add_reader(process.pidfd, self._on_ended)
        loop.add_reader(self._socket_fd, self._on_readable)
        for pipe in (process.stdout, process.stderr):
            loop.add_reader(pipe.fd, self._on_output, pipe)

    @classmethod
    async def start(
        cls,
        *,
        python: str,
        env: Mapping[str, str],
        pulse: Pulse,
        lease_s: float,
        on_done: OnDone,
        on_exit: OnExit,
        path: Sequence[str] = (),
        marker: bytes = b"",
        log_bytes_max: int = 64 * KIB,
        inline_bytes_max: int = 256 * KIB,
        result_bytes_max: int = 256 * MIB,
        ready_s_max: float = READY_S_MAX,
        on_described: OnDescribed | None = None,
        on_note: OnNote | None = None,
    ) -> "Executor":
        """Start an executor and wait until it is ready for calls.

        Args:
            python, env, lease_s, path, marker, log_bytes_max, inline_bytes_max, result_bytes_max: as in `Launch`.
            pulse: what it watches.
            on_done: called once per call, in order: the answer, and what it wrote.
            on_exit: called once, after the last `on_done`; never if the start fails.
            ready_s_max: seconds from start to ready.
            on_described: called for each answer to `describe`.
            on_note: called for what the running call reports, before its `on_done` or `on_exit`.

        Raises:
            ExecutorStartError: with the remedy, or what it wrote to stderr.
        """
        launch = Launch(python, env, lease_s, tuple(path), log_bytes_max, inline_bytes_max, result_bytes_max, marker)
        executor = cls(ExecutorProcess(launch, pulse), on_done, on_exit, on_described, on_note)
        try:
            async with asyncio.timeout(ready_s_max):
                await executor._ready
        except TimeoutError:
            executor.kill()
            await executor.exited
            raise ExecutorStartError(f"{python or 'the executor'} was not ready after {ready_s_max} s") from None
        except asyncio.CancelledError:
            executor.kill()
            raise
        if executor._ended:
            raise _start_error(executor.exited.result(), executor._process.python)
        executor._handed_out = True
        return executor

    @property
    def current(self) -> wire.Call | None:
        """The oldest call that is not done."""
        return self._calls[0][1] if self._calls else None

    @property
    def pending(self) -> tuple[wire.Call, ...]:
        """All calls that are not done, in order."""
        return tuple(call for _, call in self._calls)

    @property
    def started_at_s(self) -> float | None:
        """When `current` began, on this machine's monotonic clock; None where it has not."""
        if self._ended or not self._calls:
            return None
        number, began_s = self._process.started()
        return began_s if number >= self._calls[0][0] else None

    def send(self, batch: wire.Batch) -> None:
        """Have the calls run after those that were sent before; at most `CALLS_MAX` of them are not done.

        Raises:
            RuntimeError: the executor has ended, so that nobody would ever hear of the calls.
        """
        assert len(self._calls) + len(batch.calls) <= CALLS_MAX, "more calls than tokens fit into a pipe"
        self._calls.extend(enumerate(batch.calls, self._sent_count + 1))
        self._post(batch, len(batch.calls))

    def recall(self) -> tuple[wire.Call, ...]:
        """Take back the calls that have not begun, in order: they never will, and are not answered."""
        if self._ended:
            return ()
        numbers = set(self._process.take_tokens())
        recalled = tuple(call for number, call in self._calls if number in numbers)
        self._calls = deque(entry for entry in self._calls if entry[0] not in numbers)
        return recalled

    def describe(self, targets: Sequence[str]) -> None:
        """Have the callables described, each with an `on_described`.

        Raises:
            RuntimeError: the executor has ended.
        """
        self._post(wire.Describe(tuple(targets)), 1)

    def output_so_far(self) -> Output:
        """What the running call has written until now; nothing once the executor has ended."""
        (stdout, dropped), (stderr, dropped_too) = self._process.stdout.so_far(), self._process.stderr.so_far()
        return Output(stdout, stderr, dropped, dropped_too)

    def terminate(self, grace_s: float) -> None:
        """Raise `TaskTerminated` in the running task and end the executor; `kill` it after `grace_s` seconds.

        The answer of a task that was ended so has `terminated` set. It may be another task than the caller meant, if
        that one had just ended.
        """
        if not self._ended:
            self._asked = True
            self._process.signal(signal.SIGUSR1)
            self._loop.call_later(grace_s, self.kill)

    def kill(self) -> None:
        """End the executor and everything below it at once."""
        if not self._ended:
            self._asked = True
            self._process.signal(signal.SIGTERM)

    def _post(self, message: wire.Batch | wire.Describe, count: int) -> None:
        """Send a message that bears `count` numbers."""
        if self._ended:
            raise RuntimeError("the executor has ended")
        self._write(wire.pack(message))
        self._process.put_tokens(self._sent_count + 1, count)
        self._sent_count += count

    def _write(self, data: bytes) -> None:
        if not self._outbox:
            try:
                sent = self._process.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # it has ended; `exited` follows
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._socket_fd, self._on_writable)
        self._outbox += data

    def _on_writable(self) -> None:
        try:
            del self._outbox[: self._process.socket.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()
        if not self._outbox:
            self._loop.remove_writer(self._socket_fd)

    def _on_output(self, pipe: OutputPipe) -> None:
        if pipe.read() == 0:
            self._loop.remove_reader(pipe.fd)

    def _on_readable(self) -> bool:
        """Take one chunk of answers; whether there may be more."""
        try:
            data = self._process.socket.recv(CHUNK_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        try:
            for frame in self._reader.feed(data):
                self._on_message(wire.decode_from_executor(frame))
        except (ValueError, msgspec.MsgspecError):  # the task wrote into our socket: nothing it says counts any more
            data = b""
        if not data:
            self._loop.remove_reader(self._socket_fd)
            self._loop.call_later(LEAVING_S, self._end_leaver)
        return bool(data)

    def _end_leaver(self) -> None:
        """An executor without its socket is of no use: it ends by itself, or it is ended."""
        if not self._ended:
            self._process.signal(signal.SIGTERM)

    def _on_message(self, message: wire.FromExecutor) -> None:
        match message:
            case wire.Done():
                call = self.current
                if call is None or (call.task_id, call.attempt) != (message.task_id, message.attempt):
                    raise ValueError("an answer to a call that is not the oldest")
                stdout, dropped = self._process.stdout.take()
                stderr, dropped_too = self._process.stderr.take()
                self._calls.popleft()
                self._call_back(self._on_done, message, Output(stdout, stderr, dropped, dropped_too))
            case wire.Note():
                call = self.current
                # A thread may outlive its task, and what it says then is about nothing that runs.
                if (
                    self._on_note is not None
                    and call is not None
                    and (call.task_id, call.attempt) == (message.task_id, message.attempt)
                ):
                    self._call_back(self._on_note, message)
            case wire.Ready():
                self.pid, self.python = message.pid, message.python
                if not self._ready.done():
                    self._ready.set_result(None)
            case wire.Described():
                if self._on_described is not None:
                    self._call_back(self._on_described, message)

    def _on_ended(self) -> None:
        """The guard has ended, and every process of the executor before it: what they said until then is all."""
        process = self._process
        while self._on_readable():
            pass
        for pipe in (process.stdout, process.stderr):
            while pipe.read() > 0:
                pass
        started = self._calls.popleft()[1] if self.started_at_s is not None else None
        end = Exit(process.guard.wait(), started, self.pending, self.output_so_far(), self._asked)
        self._ended = True
        self._calls.clear()
        self._loop.remove_writer(self._socket_fd)
        for fd in (process.pidfd, self._socket_fd, process.stdout.fd, process.stderr.fd):
            self._loop.remove_reader(fd)
        process.close()
        if not self._ready.done():
            self._ready.set_exception(_start_error(end, process.python))
        if self._handed_out:
            self._call_back(self._on_exit, end)
        self.exited.set_result(end)

    def _call_back(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001  # top of a loop: the answers after this one must still be heard
            self._loop.call_exception_handler({"message": "a callback of an executor raised", "exception": error})


def _start_error(end: Exit, python: str) -> ExecutorStartError:
    reason = end.output.stderr.decode(errors="replace").strip().rpartition("\n")[2][:500]
    remedy = f": run '{python} -m pip install msgspec'" if "No module named 'msgspec'" in reason else ""
    return ExecutorStartError(f"{python} ended with {end.returncode} before it was ready ({reason}){remedy}")
