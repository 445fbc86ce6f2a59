"""A small agent, for tests that kill or freeze one: starts an executor, runs one function, beats.

Arguments: target, JSON of its arguments, lease in seconds. Prints the executor's pids, and how it ended.
"""
# ruff: noqa: T201  # what it prints is what the test reads

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from manager.core.wire import Batch, Call
from plugins.node.executors import Executor, Pulse, scrubbed_environment


async def main(target: str, args: str, lease_s: float) -> None:
    pulse = Pulse()
    beating = asyncio.create_task(beat(pulse, lease_s / 20))
    with tempfile.TemporaryDirectory() as home:
        executor = await Executor.start(
            python="",
            env=scrubbed_environment(os.environ, {"HOME": home}),
            pulse=pulse,
            lease_s=lease_s,
            path=[str(Path(__file__).parent)],
            on_done=lambda *_: None,
            on_exit=lambda _: None,
        )
        executor.send(Batch((Call("task", 1, target, args.encode()),)))
        print(executor.guard_pid, executor.pid, flush=True)
        print("ended", (await executor.exited).returncode, flush=True)
    beating.cancel()


async def beat(pulse: Pulse, period_s: float) -> None:
    while True:
        pulse.beat()
        await asyncio.sleep(period_s)


asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
