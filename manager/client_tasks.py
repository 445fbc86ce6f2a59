"""Tasks and arrays as a client has them in hand, and what one asks for when a task is submitted.

Knows no wire: all that a handle does is a call of its client.
"""

import datetime as dt
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Unpack, overload

import msgspec

from manager.client_errors import WaitTimeout
from manager.core import answers_arrays, answers_tasks
from manager.core import requests as rest
from manager.core.explain import Explanation
from manager.core.ids import id_in_array
from manager.core.lifecycle import AfterFailed, TaskStatus

if TYPE_CHECKING:
    from manager.client import Client

WAIT_PATIENCE_S: Final = 60.0
"""How long a look at what is waited for is tried again: no restart can lose a task."""
ARRAY_PAUSE_S: Final = (0.1, 2.0)
"""Between two looks at an array that is waited for: the first, and the longest."""


class TaskOptions(rest.Needs, total=False):
    """What `task_request` takes beside function and arguments, as keyword arguments of `Client.submit`."""

    priority: int | str
    max_attempts: int
    retry_on: "Iterable[str | type[BaseException]]"
    start_timeout: float | str | None
    time_limit: float | str | None
    total_timeout: float | str | None
    deadline: dt.datetime | None
    name: str | None
    after: "Iterable[Parent]"
    after_failed: AfterFailed | Literal["fail", "run"]
    allow_infeasible: bool


class Task:
    """A submitted task: its id, and the client's calls about it."""

    __slots__ = ("_client", "task_id")

    def __init__(self, client: "Client", task_id: str) -> None:
        self._client = client
        self.task_id = task_id

    def __repr__(self) -> str:
        return f"Task({self.task_id!r})"

    def view(self) -> answers_tasks.TaskView:
        """The task as it stands now."""
        return self._client.get(self.task_id)

    def wait(self, timeout_s: float | None = None) -> answers_tasks.TaskView:
        """The task once it has ended; see `Client.wait`."""
        return self._client.wait(self.task_id, timeout_s)

    def result(self, timeout_s: float | None = None) -> Any:
        """What the function returned; see `Client.result`."""
        return self._client.result(self.task_id, timeout_s)

    def cancel(self) -> answers_tasks.Cancelled:
        """Ask for its end."""
        return self._client.cancel(self.task_id)

    def attempts(self) -> tuple[answers_tasks.AttemptView, ...]:
        """The attempts at it, oldest first."""
        return self._client.attempts(self.task_id)

    @overload
    def logs(self, *, follow: Literal[False] = False) -> answers_tasks.TaskLog: ...

    @overload
    def logs(self, *, follow: Literal[True]) -> Iterator[answers_tasks.TaskLog]: ...

    def logs(self, *, follow: bool = False) -> answers_tasks.TaskLog | Iterator[answers_tasks.TaskLog]:
        """What it has written, or with `follow` what it writes; see `Client.follow`."""
        return self._client.follow(self.task_id) if follow else self._client.logs(self.task_id)

    def explain(self) -> Explanation:
        """Why it is where it is."""
        return self._client.explain(self.task_id)


class Array:
    """An array of tasks: its id, and the client's calls about it."""

    __slots__ = ("_client", "array_id", "count")

    def __init__(self, client: "Client", array_id: str, count: int) -> None:
        self._client = client
        self.array_id = array_id
        self.count = count

    def __repr__(self) -> str:
        return f"Array({self.array_id!r}, {self.count})"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Task:
        """The task with this index; negative ones count from the end."""
        if not -self.count <= index < self.count:
            raise IndexError(f"the array has the indexes 0 to {self.count - 1}, not {index}")
        return Task(self._client, id_in_array(self.array_id, index % self.count))

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(self.count))

    def view(self) -> answers_arrays.ArrayView:
        """How many of its tasks have ended how."""
        return self._client.array_view(self.array_id)

    def wait(self, timeout_s: float | None = None) -> answers_arrays.ArrayView:
        """The array once all its tasks have ended, well or badly.

        Raises:
            WaitTimeout: some have not ended after `timeout_s` seconds (None: no limit).
        """
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        pause_s = ARRAY_PAUSE_S[0]
        while True:
            patience_s = min(WAIT_PATIENCE_S, max(end_s - time.monotonic(), 0.0))
            view = self._client.array_view(self.array_id, patience_s=patience_s)
            if not view.unfinished:
                return view
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                left = f"{view.unfinished} of the {view.count} tasks of array {self.array_id} have not ended"
                raise WaitTimeout(f"{left} after {timeout_s:g} s of waiting; they go on.")
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, ARRAY_PAUSE_S[1])

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """What each of its tasks returned, by index, once all have ended.

        Raises:
            TaskFailed, TaskCancelled: the first one that did not return.
            WaitTimeout: as `wait`.
        """
        self.wait(timeout_s)
        return [task.result() for task in self]

    def tasks(self, *, status: TaskStatus | str | None = None, limit: int | None = None) -> Iterator[answers_tasks.TaskSummary]:
        """Its tasks as they stand, the last one first; only those of a status, where one is given."""
        return self._client.tasks(array=self.array_id, status=status, limit=limit)

    def cancel(self) -> answers_arrays.ArrayCancelled:
        """Ask for the end of all that have not ended."""
        return self._client.cancel_array(self.array_id)


TaskLike = Task | str
Parent = Task | Array | str | int
"""What a task can come after. A number is the place of an earlier request in the same `Client.submit_many`."""


def task_request(
    function: str,
    args: Mapping[str, Any] | None = None,
    *,
    priority: int | str = 0,
    max_attempts: int = 1,
    retry_on: Iterable[str | type[BaseException]] = (),
    start_timeout: float | str | None = None,
    time_limit: float | str | None = None,
    total_timeout: float | str | None = None,
    deadline: dt.datetime | None = None,
    name: str | None = None,
    after: Iterable[Parent] = (),
    after_failed: AfterFailed | Literal["fail", "run"] = AfterFailed.FAIL,
    allow_infeasible: bool = False,
    **needs: Unpack[rest.Needs],
) -> rest.TaskRequest:
    """One task to submit.

    Args:
        function: a registered name.
        args: its keyword arguments; anything that JSON can say.
        priority: -10 to 10, higher first, or "low", "normal", "high" or "urgent".
        max_attempts: how often the function may run if it fails.
        retry_on: which errors are worth another attempt: exceptions or their names, of bases too; none: all are.
        start_timeout: from its submission until it first starts, seconds or a text such as "5m"; None: no limit.
        time_limit: of one attempt; None takes the function's default.
        total_timeout: from its submission to its end; None: no limit.
        deadline: when it must have ended; a time with its zone.
        name: your own for it, unique among your tasks: the same request again is the same task.
        after: what must have ended before.
        after_failed: "fail" or "run": what becomes of it when one of those does not succeed.
        allow_infeasible: accept it although nothing that is known could ever hold it; it waits.
        needs: `memory` and `share` of each device, `gpus`, `architecture`, `device_model`, `labels`, `cpus`, `host_memory`,
            `exclusive` and `model`, as in `ResourceRequest`; what is left out is the function's.
    """
    return rest.TaskRequest(
        function=function,
        args=msgspec.Raw(msgspec.json.encode(args or {})),
        resources=rest.ResourceRequest(**needs),
        priority=priority,
        max_attempts=max_attempts,
        retry_on=tuple(error if isinstance(error, str) else error.__name__ for error in retry_on),
        start_timeout=start_timeout,
        time_limit=time_limit,
        total_timeout=total_timeout,
        deadline=deadline,
        name=name,
        after=tuple(_parent(parent) for parent in after),
        after_failed=AfterFailed(after_failed),
        allow_infeasible=allow_infeasible,
    )


def _parent(parent: Parent) -> str | int:
    match parent:
        case Task():
            return parent.task_id
        case Array():
            return parent.array_id
        case _:
            return parent
