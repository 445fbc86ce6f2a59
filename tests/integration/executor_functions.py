"""Functions that the executor's tests run as a user's: they must not import pytest or anything of ours."""
# ruff: noqa: T201, PTH104, PTH109, PTH110, PTH123, PTH208  # as users write

import asyncio
import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

calls = 0


def echo(**values):
    return values


def count():
    """How often this process has run it."""
    global calls  # noqa: PLW0603
    calls += 1
    return calls


def environment():
    return dict(os.environ)


def facts():
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "stdin": sys.stdin.read(),
        "path": sys.path,
        "argv": sys.argv,
        "python": sys.executable,
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    }


def say(out="", err=""):
    print(out, end="")
    sys.stderr.write(err)


def raise_error(message="no"):
    local = "a local variable"  # noqa: F841
    raise ValueError(message)


def leave(code=3):
    sys.exit(code)


def not_json():
    return object()


def big(size: int):
    return "x" * size


def nan():
    return {"x": float("nan"), "y": [float("inf")]}


async def coroutine(x: int):
    await asyncio.sleep(0)
    return x + 1


# --- output -------------------------------------------------------------------------------------------------------


def every_way():
    """Writes to stdout in every way there is, and flushes nothing."""
    print("print")
    os.write(1, b"os.write\n")
    subprocess.run(["echo", "subprocess"], check=True)
    libc = ctypes.CDLL(None)
    libc.printf(b"printf\n")
    sys.stdout.buffer.write(b"buffer\n")
    print("no newline", end="")


def half_marker(marker: str):
    os.write(1, bytes.fromhex(marker)[:-1])
    os.write(2, bytes.fromhex(marker)[:1])


def forge_marker(marker: str):
    os.write(1, b"forged" + bytes.fromhex(marker) + b"after")


def flood(size: int):
    block = (b"%063d\n" % 0) * 1024
    for _ in range(size // len(block)):
        os.write(1, block)
    os.write(1, b"the end")


def break_output():
    print("before")
    sys.stdout = io.StringIO()
    print("lost")
    os.set_blocking(1, False)
    os.close(1)
    os.close(2)


def change_directory():
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_later(gate: str):
    """Leaves a process behind that writes when the gate opens."""
    subprocess.Popen(["sh", "-c", f"read line < {gate}; echo late"])


# --- ends ---------------------------------------------------------------------------------------------------------


def segfault():
    print("last words")
    ctypes.string_at(0)


def exit_hard(code=7):
    os._exit(code)


def abort():
    os.abort()


def wait(started: str, ended: str):
    """Waits for ever; leaves a file when it starts and one when it is asked to end."""
    try:
        touch(started)
        print("waiting")
        while True:
            time.sleep(60)
    finally:
        print("cleaning up")
        touch(ended)


async def wait_async(started: str, ended: str):
    try:
        touch(started)
        await asyncio.sleep(3600)
    finally:
        touch(ended)


def stubborn(started: str):
    while True:
        with contextlib.suppress(BaseException):
            touch(started)
            time.sleep(60)


def hold_the_lock(started: str):
    """Holds the interpreter's lock for ever, as a hung driver call does: no signal handler of Python runs.

    The shell makes the file, so that it is there only once the lock is held.
    """
    ctypes.PyDLL(None).system(f"trap '' TERM; touch {started}; while :; do sleep 3600; done".encode())


def hang():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def with_children(started: str):
    """Starts a child in its group, one in a session of its own, and one whose parent is gone; then waits."""
    pids = [
        subprocess.Popen(["sleep", "3600"]).pid,
        subprocess.Popen(["sleep", "3600"], start_new_session=True).pid,
        int(subprocess.run(["sh", "-c", "setsid sleep 3600 >/dev/null & echo $!"], stdout=-1, check=True).stdout),
    ]
    touch(started, " ".join(map(str, [os.getpid(), *pids])))
    hang()


def leave_children(started: str):
    """Returns, leaving children behind."""
    pids = [
        subprocess.Popen(["sleep", "3600"]).pid,
        subprocess.Popen(["sleep", "3600"], start_new_session=True).pid,
    ]
    touch(started, " ".join(map(str, pids)))


def leave_thread():
    threading.Thread(target=time.sleep, args=(3600,)).start()


def wait_for_file(path: str):
    while not os.path.exists(path):
        time.sleep(0.002)
    return True


def touch(path: str, text: str = ""):
    with open(path + ".new", "w") as file:
        file.write(text)
    os.rename(path + ".new", path)


# --- processes ----------------------------------------------------------------------------------------------------


def square(x):
    return x * x


def pool(method: str):
    with multiprocessing.get_context(method).Pool(2) as workers:
        return workers.map(square, range(5))


def fork_and_return():
    """Both processes come back from it."""
    return {"child": os.fork() == 0}


def close_everything():
    os.closerange(3, 1000)


def write_to_every_descriptor():
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\xff" * 64)


# --- what a function says of itself -------------------------------------------------------------------------------


def reports():
    import rocyard

    asked = {
        "task": rocyard.task_id(),
        "attempt": rocyard.attempt(),
        "index": rocyard.array_index(),
        "environment": [os.environ.get("ROCYARD_ARRAY_INDEX"), os.environ.get("ROCYARD_ARRAY_COUNT")],
        "last": rocyard.last_checkpoint(),
        "folder": rocyard.checkpoint_folder(),
    }
    rocyard.progress(0.5, "half")
    rocyard.checkpoint("/shared/step-1")
    return asked | {"then": rocyard.last_checkpoint()}


def reports_often(times: int):
    import rocyard

    for number in range(times):
        rocyard.progress(number / times, str(number))
    rocyard.progress(1, "all")


def reports_from_a_thread_and_a_child():
    import rocyard

    thread = threading.Thread(target=rocyard.progress, args=(0.25, "thread"))
    thread.start()
    thread.join()
    child = os.fork()
    if child == 0:
        rocyard.progress(0.75, "child")
        os._exit(0)
    os.waitpid(child, 0)
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(asks_in_a_child)


def asks_in_a_child():
    import rocyard

    rocyard.progress(0.8)
    return rocyard.task_id()


def reports_and_dies():
    import rocyard

    rocyard.checkpoint("/shared/last")
    os.kill(os.getpid(), signal.SIGKILL)


def reports_when_asked_to_end(started: str):
    import rocyard

    try:
        touch(started)
        while True:
            rocyard.progress(0.1)
    finally:
        rocyard.checkpoint("/shared/in time")


class OutOfMemoryError(RuntimeError):
    """As torch has it."""

    __module__ = "torch"


def no_device_memory():
    raise OutOfMemoryError("Tried to allocate 2.00 GiB")


def fill_a_device():
    import torch

    held = []
    while True:
        held.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))


def free_device_memory():
    import torch

    return torch.cuda.mem_get_info()
