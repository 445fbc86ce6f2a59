"""The program of one executor: it runs the tasks of one slot, one after the other, in the user's interpreter.

It imports the standard library, and by file path ``wire.py`` and ``executor_target.py``, which need msgspec, and
``executor_attempt.py``; so any Python from 3.10 on that has msgspec can run it. It must never import anything else of ours,
and it knows no store, no network and no credential.

Two processes. The *guard* is the agent's child: a small init that ends everything below it when the agent dies, or is
silent for one lease, or asks for it, even if the user's code holds the interpreter lock for ever; it takes in every
orphan, and it ends last, by the executor's exit status. So when the agent sees the guard end, no process of the slot is
left. The *executor* is the guard's child, leads a process group of its own, and dies with the guard.

Signals to the guard: SIGUSR1 passes SIGTERM on to the executor's group, where it raises `TaskTerminated` in the running
task; SIGTERM kills everything at once.
"""

import contextlib
import ctypes
import faulthandler
import importlib.util
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from _thread import get_ident
from collections import deque
from types import CoroutineType, FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:  # at run time they are loaded by file path, in the executor process alone
    from manager.core import wire  # noqa: TC004
    from plugins.node import executor_attempt, executor_target  # noqa: TC004

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PULSE: Final = struct.Struct("=Q")
_OOM_SCORE: Final = 500  # under memory pressure the kernel ends an executor rather than its agent
_SIGNALS: Final = {signal.SIGUSR1, signal.SIGTERM}
_IDLE, _BUSY, _RUNNING = range(3)
_ENDED: Final = "ended by its node agent"


class TaskTerminated(BaseException):
    """The agent ends this task: cancelled, over its time limit, or its slot is wanted elsewhere."""


class Options:
    """What the agent says on the command line. A plain class: nothing but the standard library is there yet."""

    def __init__(self, argv: list[str]) -> None:
        self.wire_path, self.target_path, self.attempt_path, marker, numbers, lease_s, path, path_last = argv
        self.marker = bytes.fromhex(marker)
        self.socket_fd, self.tokens_fd, self.pulse_fd, self.page_fd, self.agent_pid, *limits = map(int, numbers.split(","))
        self.inline_bytes_max, self.result_bytes_max = limits
        self.lease_s = float(lease_s)
        self.path = [entry for entry in path.split(os.pathsep) if entry]
        self.path_last = [entry for entry in path_last.split(os.pathsep) if entry]


def main(argv: list[str]) -> None:
    """Become guard and executor."""
    options = Options(argv)
    libc = ctypes.CDLL(None)
    agent = os.pidfd_open(options.agent_pid)
    if os.getppid() != options.agent_pid:  # the agent died before it could be watched
        os._exit(1)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of a GPU process takes minutes to write
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    guard_pid = os.getpid()
    child = os.fork()
    if child:
        _guard(options, agent, child)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard_pid:
        os._exit(1)
    os.setpgid(0, 0)
    # pathlib would cost 5 ms of every start, so this program does without.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(str(_OOM_SCORE))
    os.close(agent)
    os.close(options.pulse_fd)
    sys.argv[1:] = []
    Executor(options, libc).serve()


def _guard(options: Options, agent: int, child: int) -> NoReturn:
    """Wait for the executor's end, or bring it about; then end whatever it left behind, and end as it did."""
    with contextlib.suppress(OSError):  # the child does the same: whoever comes first
        os.setpgid(child, child)
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(child, signal.SIGTERM))
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for stream in (1, 2):
        os.dup2(0, stream)
    for fd in (options.socket_fd, options.tokens_fd, options.page_fd):
        os.close(fd)
    pulse = mmap.mmap(options.pulse_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
    executor = os.pidfd_open(child)
    poll = select.poll()
    poll.register(executor, select.POLLIN)
    poll.register(agent, select.POLLIN)
    seen, changed_at, killed = _PULSE.unpack_from(pulse), time.monotonic(), False
    while True:
        ready = {fd for fd, _ in poll.poll(options.lease_s * 1000 / 8)}
        if executor in ready:
            break
        now, beat = time.monotonic(), _PULSE.unpack_from(pulse)
        if beat != seen:
            seen, changed_at = beat, now
        silent = now - changed_at >= options.lease_s * 7 / 8  # with the poll's period: within one lease
        if not killed and (silent or agent in ready):
            os.killpg(child, signal.SIGKILL)
            poll.unregister(agent)
            killed = True
        _reap(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not reaped yet: its pid must go on naming its group
    os.killpg(child, signal.SIGKILL)
    while orphans := _children(but=child):
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)
    for asked in _SIGNALS:
        signal.signal(asked, signal.SIG_IGN)  # from here on the executor's pid may name another process
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _reap(child: int) -> None:
    """Reap orphans that have ended, but not the executor itself."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_ALL, 0, flags)) is not None and ended.si_pid != child:
        os.waitpid(ended.si_pid, 0)


def _children(but: int) -> list[int]:
    """Children of this process: what the executor's processes left behind comes here, even from other sessions."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:  # noqa: PTH123
            return [child for child in map(int, file.read().split()) if child != but]
    except OSError:  # a kernel without that file: the process group was ended, and that must do
        return []


class Executor:
    """The loop: read calls, run them, answer in order."""

    def __init__(self, options: Options, libc: ctypes.CDLL) -> None:
        for fd in (options.socket_fd, options.tokens_fd, options.page_fd):
            os.set_inheritable(fd, False)
        self._pid = os.getpid()
        self._main_thread = get_ident()
        self._options = options
        self._flush_c = libc.fflush
        self._c_stdout = ctypes.c_void_p.in_dll(libc, "stdout")
        self._outputs = ((os.dup(1), 1), (os.dup(2), 2))  # whatever a task does to 1 and 2, the marker finds its way
        self._streams = (sys.stdout, sys.stderr)
        self._home = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        faulthandler.enable(file=self._outputs[1][0])
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a crashed task printed is kept
        self._phase = _BUSY
        self._stopping = False
        self._ran_out = False  # a device had no memory left for the task
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, self._on_terminate)
        os.register_at_fork(after_in_child=_default_signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        globals().update(
            wire=_load("rocyard_wire", options.wire_path),
            executor_target=_load("rocyard_executor_target", options.target_path),
            executor_attempt=_load("rocyard_executor_attempt", options.attempt_path),
        )
        script_dir = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
        sys.path[:] = options.path + [entry for entry in sys.path if entry != script_dir]
        sys.path += [entry for entry in options.path_last if entry not in sys.path]
        self._attempt = sys.modules[executor_attempt.NAME] = executor_attempt.RunningAttempt(self._note)
        self._socket = socket.socket(fileno=options.socket_fd)
        self._page = mmap.mmap(options.page_fd, mmap.PAGESIZE)
        os.close(options.page_fd)  # mmap keeps one of its own
        self._reader = wire.FrameReader()
        self._messages: deque[Any] = deque()  # calls and describes that have come and not begun
        self._received = 0
        self._targets: dict[str, Any] = {}

    def serve(self) -> None:
        """Begin the messages that tokens name until the agent is gone."""
        self._socket.sendall(wire.pack(wire.Ready(self._pid, sys.version.split()[0])))
        while True:
            self._phase = _IDLE
            if self._stopping:
                sys.exit(128 + signal.SIGTERM)
            token = os.read(self._options.tokens_fd, wire.TOKEN.size)
            self._phase = _BUSY
            if len(token) < wire.TOKEN.size:
                sys.exit(0)
            (number,) = wire.TOKEN.unpack(token)
            message = self._take(number)
            if type(message) is wire.Call:
                self._answer(number, message)
            else:
                for name in message.targets:
                    self._socket.sendall(wire.pack(wire.Described((self._describe(name),))))

    def _take(self, number: int) -> Any:
        """The message of that number; those before it were taken back by the agent."""
        while self._received < number:
            data = self._socket.recv(65536)
            if not data:
                sys.exit(0)
            for frame in self._reader.feed(data):
                message = wire.decode_to_executor(frame)
                came = message.calls if type(message) is wire.Batch else (message,)
                self._messages.extend(came)
                self._received += len(came)
        for _ in range(len(self._messages) - 1 - (self._received - number)):
            self._messages.popleft()
        return self._messages.popleft()

    def _answer(self, number: int, call: "wire.Call") -> None:
        """Run one call and send its `Done`; the marker follows its output, and precedes its answer."""
        if self._stopping:
            sys.exit(128 + signal.SIGTERM)
        wire.STARTED.pack_into(self._page, 0, number, time.monotonic())
        os.environ["ROCYARD_TASK_ID"] = call.task_id
        os.environ["ROCYARD_ATTEMPT"] = str(call.attempt)
        for name, number_of in (("ROCYARD_ARRAY_INDEX", call.index), ("ROCYARD_ARRAY_COUNT", call.count)):
            os.environ.pop(name, None)
            if call.index >= 0:
                os.environ[name] = str(number_of)
        self._attempt.begin(call)
        try:
            done = self._run(call)
        except TaskTerminated as error:  # it came while another exception of the task was being reported
            done = self._failed(call, error, 0.0, 0.0)
        if os.getpid() != self._pid:  # the task forked, and its child came back from the function: it is not us
            os._exit(0)
        self._attempt.end()
        if self._ran_out:  # only now nothing of the function holds its memory any more
            self._ran_out = False
            executor_target.empty_device_cache()
        self._tidy()
        for fd, _ in self._outputs:
            _write(fd, self._options.marker)
        self._socket.sendall(wire.pack(done))

    def _run(self, call: "wire.Call") -> "wire.Done":
        load_s = duration_s = 0.0
        began = None
        try:
            self._phase = _RUNNING
            target = self._targets.get(call.target)
            if target is None:
                target, load_s = executor_target.resolve(call.target)
                self._targets[call.target] = target
            arguments = target.arguments(call.args)
            torch = _torch()
            if torch is not None:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            value = target.function(**arguments)
            if type(value) is CoroutineType:
                import asyncio  # 20 ms that only coroutine functions need

                value = asyncio.run(value)
            duration_s = time.perf_counter() - began
            options = self._options
            result = executor_target.encode_result(
                value, options.inline_bytes_max, options.result_bytes_max, filed=bool(call.result_path)
            )
            file_bytes, file_sha256 = 0, ""
            if len(result) > options.inline_bytes_max:
                file_sha256 = executor_target.write_result(result, call.result_path)
                file_bytes, result = len(result), b""
            self._phase = _BUSY
        except BaseException as error:  # noqa: BLE001  # whatever a task raises is the task's failure, sys.exit too
            self._phase = _BUSY
            if began is not None and not duration_s:
                duration_s = time.perf_counter() - began
            return self._failed(call, error, duration_s, load_s)
        return wire.Done(
            *(call.task_id, call.attempt, True, result, duration_s, _memory_bytes_peak(), load_s),
            file_bytes=file_bytes,
            file_sha256=file_sha256,
        )

    def _failed(self, call: "wire.Call", error: BaseException, duration_s: float, load_s: float) -> "wire.Done":
        name, message, trace, bases = executor_target.failure_of(error, frames_skipped=1)
        self._ran_out = self._ran_out or name == executor_target.GPU_OUT_OF_MEMORY
        failure = wire.encode_failure(wire.Failure(name, message, trace, bases))
        terminated = isinstance(error, TaskTerminated) or self._stopping
        peak = _memory_bytes_peak()
        return wire.Done(call.task_id, call.attempt, False, failure, duration_s, peak, load_s, terminated)

    def _note(self, progress: float | None, message: str | None, checkpoint: str | None) -> None:
        """Send what the running function reports: whole, even where the agent ends the task in the midst of it."""
        attempt = self._attempt
        frame = wire.pack(wire.Note(attempt.task_id, attempt.attempt, progress, message, checkpoint))
        held = self._phase == _RUNNING and get_ident() == self._main_thread  # signals are handled in that thread alone
        if held:
            self._phase = _BUSY
        self._socket.sendall(frame)
        if held:
            self._phase = _RUNNING
            if self._stopping:
                self._phase = _BUSY
                raise TaskTerminated(_ENDED)

    def _describe(self, name: str) -> "wire.Description":
        try:
            schema, doc = executor_target.describe(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything on import
            kind, message, *_ = executor_target.failure_of(error, frames_skipped=0)
            return wire.Description(name, error=f"{kind}: {message}")
        return wire.Description(name, schema, doc)

    def _tidy(self) -> None:
        """Undo what a task may have left that the next one would trip over, and flush what it wrote."""
        for stream in (sys.stdout, sys.stderr, *self._streams):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # replaced or closed by the task
                continue
        sys.stdout, sys.stderr = self._streams
        self._flush_c(self._c_stdout)  # printf of C libraries, and of GPU kernels
        for fd, original in self._outputs:
            os.dup2(fd, original)
        os.fchdir(self._home)
        if signal.getsignal(signal.SIGTERM) != self._on_terminate:
            signal.signal(signal.SIGTERM, self._on_terminate)

    def _on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._phase == _RUNNING:
            self._phase = _BUSY  # raised once: its `finally` blocks must not be interrupted by a second signal
            raise TaskTerminated(_ENDED)
        if self._phase == _IDLE:
            sys.exit(128 + signal.SIGTERM)


def _write(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except BlockingIOError:  # the task made the pipe non-blocking, as asyncio does, and it is full
        os.set_blocking(fd, True)
        os.write(fd, data)


def _torch() -> Any | None:
    """torch, if the task uses it and it has opened a device."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    try:
        return torch if cuda is not None and cuda.is_initialized() else None
    except AttributeError:  # half imported, or something else by that name
        return None


def _memory_bytes_peak() -> int:
    torch = _torch()
    if torch is None:
        return 0
    try:
        return max(int(torch.cuda.max_memory_allocated(device)) for device in range(torch.cuda.device_count()))
    except (RuntimeError, ValueError):  # the device has failed; the task's own error says more
        return 0


def _default_signals() -> None:
    """Children of a task, such as data loaders, end by SIGTERM as any process does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _load(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # msgspec looks up the annotations of its structs there
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
