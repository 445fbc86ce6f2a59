"""Executors, as the rest of the node sees them: the handle, its pulse, its environment, and `describe`.

Owns only `describe`: what callables take, learned in a process that is thrown away, since importing user code may do
anything.
"""

import asyncio
import signal
import tempfile
from collections.abc import Mapping, Sequence
from typing import Final

from manager.core import wire
from plugins.node.executor_environment import scrubbed_environment
from plugins.node.executor_handle import Executor, Exit, Output
from plugins.node.executor_process import ExecutorStartError
from plugins.node.pulse import Pulse

__all__ = ["Executor", "ExecutorStartError", "Exit", "Output", "Pulse", "describe", "scrubbed_environment"]

_NO_DEVICES: Final = {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": ""}
"""Describing holds no lease, so a module that opens a device on import must not find one."""


async def describe(
    python: str, targets: Sequence[str], path: Sequence[str], deadline_s: float, environ: Mapping[str, str]
) -> tuple[wire.Description, ...]:
    """What each of `targets` takes, in order. One that cannot be imported, hangs or ends the process has an `error`.

    Args:
        python: the interpreter; empty is the agent's own.
        targets: ``module:callable``.
        path: directories at the front of the import path.
        deadline_s: for each target.
        environ: the agent's environment, of which the executor sees a little (`scrubbed_environment`).
    """
    described: list[wire.Description] = []
    with tempfile.TemporaryDirectory(prefix="rocyard-describe-") as home:
        env = scrubbed_environment(environ, {"HOME": home, **_NO_DEVICES})
        while len(described) < len(targets):
            waiting = targets[len(described) :]
            try:
                answers, error = await _describe_until_error(python, env, waiting, path, deadline_s)
            except ExecutorStartError as failed:
                answers, error = [wire.Description(target, error=str(failed)) for target in waiting], ""
            described += answers
            if error:
                described.append(wire.Description(targets[len(described)], error=error))
    return tuple(described)


async def _describe_until_error(
    python: str, env: Mapping[str, str], targets: Sequence[str], path: Sequence[str], deadline_s: float
) -> tuple[list[wire.Description], str]:
    """Answers from one executor, and what went wrong with the target after them, if anything did."""
    queue: asyncio.Queue[wire.Description | Exit] = asyncio.Queue()
    pulse = Pulse()
    try:
        executor = await Executor.start(
            python=python,
            env=env,
            pulse=pulse,
            lease_s=deadline_s * (len(targets) + 1),  # nobody beats: the deadline below ends it long before
            path=path,
            on_done=lambda *_: None,
            on_exit=queue.put_nowait,
            on_described=lambda message: queue.put_nowait(message.descriptions[0]),
        )
        executor.describe(targets)
        answers: list[wire.Description] = []
        error = ""
        while len(answers) < len(targets) and not error:
            try:
                async with asyncio.timeout(deadline_s):
                    answer = await queue.get()
            except TimeoutError:
                error = f"importing it took longer than {deadline_s:g} s"
            else:
                if isinstance(answer, Exit):
                    error = f"importing it ended the process {_ending(answer.returncode)}"
                else:
                    answers.append(answer)
        executor.kill()
        await executor.exited
    finally:
        pulse.close()
    return answers, error


def _ending(returncode: int) -> str:
    return f"by {signal.Signals(-returncode).name}" if returncode < 0 else f"with exit status {returncode}"
