"""The executor ``gpu`` of a Dask worker: hands each GPU task to the agent, which runs it in a process pinned to its devices.

The scheduler plugin names it in the annotations of the tasks that it places. The worker never touches a device: it writes
the call to a file, asks the agent over the link, and reads what came of it. A task waits here without a thread.
"""

import asyncio
import concurrent.futures
import functools
import itertools
import logging
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, assert_never

import cloudpickle  # type: ignore[import-untyped]
from dask._task_spec import DataNode, GraphNode, NestedContainer, Task, TaskRef
from distributed.exceptions import Reschedule
from distributed.worker import Worker
from distributed.worker_state_machine import SecedeEvent

from manager.core.gpu_tasks import GpuResultUnreadable, GpuTaskCrashed, MemoryExceeded
from plugins.node.functions.direct import PART
from plugins.node.link import AgentLink, DirectEnded, DirectOutcome, LinkBroken
from plugins.slot import GpuWorkNotPlaced, assigned_of

GPU_EXECUTOR: Final = "gpu"
"""Its name among the worker's executors."""
CLOSED_TOPIC: Final = "rocyard-closed"
"""Events with ids of slots of which the agent says that nothing is left."""
AGAIN_PAUSE_S: Final = 0.5
"""A node that has refused a task is about to tell the scheduler why: not before that it is asked again."""
PICKLERS: Final = 2

# Below a logger of Dask's, so that people see what their tasks write with `client.get_worker_logs()`.
output_log = logging.getLogger("distributed.worker.gpu")


class Outcome:
    """What a task returned or raised, in the place of the task: calling it does the same."""

    def __init__(self, key: Any, value: Any = None, error: BaseException | None = None) -> None:
        self.key = key
        self.value = value
        self.error = error

    def __call__(self, _: Mapping[Any, Any]) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class GpuExecutor(concurrent.futures.Executor):
    """One per Dask worker. Dask calls `submit` in the worker's event loop with its own function and what that takes.

    Args:
        worker: whose tasks they are.
        link: to the agent.
    """

    def __init__(self, worker: Worker, link: AgentLink) -> None:
        self.worker = worker
        self.link = link
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._picklers = concurrent.futures.ThreadPoolExecutor(PICKLERS, "rocyard-gpu")
        self._numbers = itertools.count()
        self._directory: Path | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Run a task: `fn` makes what Dask wants of (task, its data, the scheduler's delay)."""
        task, data, delay_s = args
        self._loop = asyncio.get_running_loop()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        running = self._loop.create_task(self._run(future, fn, task, data, delay_s))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The worker closes: give up waiting, which ends what runs. Dask calls this in a thread."""
        if self._loop is not None and not self._loop.is_closed():
            for running in list(self._running):
                self._loop.call_soon_threadsafe(running.cancel)
        self._picklers.shutdown(wait=False)

    async def _run(
        self, future: concurrent.futures.Future[Any], fn: Callable[..., Any], task: Any, data: Mapping[Any, Any], delay_s: float
    ) -> None:
        began_s = time.time()
        outcome = Outcome(task.key, error=Reschedule())
        try:
            self.worker.handle_stimulus(
                SecedeEvent(key=task.key, compute_duration=0.0, stimulus_id=f"rocyard-secede-{began_s}")
            )
            outcome = await self._outcome(task, data)
        except Exception as error:  # noqa: BLE001  # the arguments are the user's: pickling them may raise anything
            outcome = Outcome(task.key, error=error)
        finally:
            future.set_result(self._as_dask(fn, outcome, began_s, delay_s))

    def _as_dask(self, fn: Callable[..., Any], outcome: Outcome, began_s: float, delay_s: float) -> Any:
        """What Dask's own function makes of the outcome, with the times of the real run."""
        message = fn(outcome, {}, delay_s)
        message["start"], message["stop"] = began_s + delay_s, time.time() + delay_s
        return message

    async def _outcome(self, task: Any, data: Mapping[Any, Any]) -> Outcome:
        """Run it. Nothing is left of its slot when this returns."""
        assigned = assigned_of(self.worker.state.tasks[task.key].annotations)
        if assigned is None:
            raise GpuWorkNotPlaced(GpuWorkNotPlaced.__doc__)
        # Two runs of one slot are never; but the number keeps even the files of such apart.
        base = self._folder() / f"{assigned.slot_id}-{next(self._numbers)}"
        call, result = base.with_suffix(".call"), base.with_suffix(".result")
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._picklers, _write_call, call, task, data)
            end = await self.link.run_direct(assigned.grant, assigned.slot_id, str(call), str(result))
            _show_output(task.key, end)
            outcome = await self._come_of(task.key, end, result)
            if outcome.error is not None:  # the lease of a task that has a result ends with Dask's word of that
                self.worker.log_event(CLOSED_TOPIC, {"slots": [assigned.slot_id]})
            return outcome
        except LinkBroken as error:  # the agent is gone, and so will this worker be
            output_log.warning("%s is to run again: %s", task.key, error)
            await asyncio.sleep(AGAIN_PAUSE_S)
            return Outcome(task.key, error=Reschedule())
        finally:
            for path in (call, result, base.with_suffix(f".result{PART}")):
                path.unlink(missing_ok=True)

    async def _come_of(self, key: Any, end: DirectEnded, result: Path) -> Outcome:
        match end.outcome:
            case DirectOutcome.DONE:
                return await asyncio.get_running_loop().run_in_executor(self._picklers, _read_result, result, key)
            case DirectOutcome.CRASHED:
                return Outcome(key, error=GpuTaskCrashed(end.detail))
            case DirectOutcome.MEMORY:
                return Outcome(key, error=MemoryExceeded(end.detail))
            case DirectOutcome.AGAIN:
                output_log.info("%s is to run again: %s", key, end.detail)
                if not end.opened:
                    await asyncio.sleep(AGAIN_PAUSE_S)
                return Outcome(key, error=Reschedule())
            case _:
                assert_never(end.outcome)

    def _folder(self) -> Path:
        """Ours alone, below the worker's own, which Dask removes some time after a worker that was killed."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="gpu-", dir=self.worker.local_directory))
        return self._directory


def _write_call(path: Path, task: GraphNode, data: Mapping[Any, Any]) -> None:
    """Two pickles: our import path, so that what was uploaded to the worker is found; and the call."""
    with path.open("wb") as file:
        pickle.dump(sys.path, file)
        cloudpickle.dump(_call_of(task, data), file, protocol=5)


def _call_of(task: GraphNode, data: Mapping[Any, Any]) -> Callable[[], Any]:
    """A callable without arguments. Plain calls are made such that running them need not import Dask, which takes 0.2 s."""
    if type(task) is not Task or not all(map(_is_plain, itertools.chain(task.args, task.kwargs.values()))):
        return functools.partial(task, dict(data))
    args = [_value_of(argument, data) for argument in task.args]
    return functools.partial(task.func, *args, **{name: _value_of(value, data) for name, value in task.kwargs.items()})


def _is_plain(argument: Any) -> bool:
    """Whether it is data, or a container or reference of such, and has no function of the user's in it."""
    if isinstance(argument, NestedContainer):
        return all(map(_is_plain, argument.args))
    return isinstance(argument, DataNode) or not isinstance(argument, GraphNode)


def _value_of(argument: Any, data: Mapping[Any, Any]) -> Any:
    if isinstance(argument, TaskRef):
        return data[argument.key]
    if isinstance(argument, GraphNode):
        return argument({key: data[key] for key in argument.dependencies})
    return argument


def _read_result(path: Path, key: Any) -> Outcome:
    try:
        with path.open("rb") as file:
            good, value = pickle.load(file)  # noqa: S301  # who may use Dask may run code here anyway
    except Exception as error:  # noqa: BLE001  # reading may run code of the user's
        text = (
            "what the task returned cannot be read in the Dask worker, which sees no device "
            f"({type(error).__name__}: {error}): return plain data, such as tensors that were moved to the CPU"
        )
        return Outcome(key, error=GpuResultUnreadable(text))
    return Outcome(key, value=value) if good else Outcome(key, error=value)


def _show_output(key: Any, end: DirectEnded) -> None:
    for name, written in (("stdout", end.stdout), ("stderr", end.stderr)):
        if text := written.decode(errors="replace").rstrip():
            output_log.info("%s of %s:\n%s", name, key, text)
