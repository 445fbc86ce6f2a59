"""A small agent, for tests that kill or freeze one: starts an executor, runs one function, beats.

Arguments: target, JSON of its arguments, lease in seconds. Prints the executor's pids, and how it ended.
"""

import asyncio
import os
import sys
import tempfile

from manager.core.wire import Batch, Call
from plugins.node.executors import Executor, Pulse, scrubbed_environment


async def main(target: str, args: str, lease_s: float) -> None:
    pulse = Pulse()
    with tempfile.TemporaryDirectory() as home:
        executor = await Executor.start(
            python="",
            env=scrubbed_environment(os.environ, {"HOME": home}),
            pulse=pulse,
            lease_s=lease_s,
            path=[os.path.dirname(__file__)],
            on_done=lambda *_: None,
            on_exit=lambda _: None,
        )
        executor.send(Batch((Call("task", 1, target, args.encode()),)))
        print(executor.guard_pid, executor.pid, flush=True)
        while not executor.exited.done():
            pulse.beat()
            await asyncio.wait([executor.exited], timeout=lease_s / 10)
        print("ended", executor.exited.result().returncode, flush=True)


asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
