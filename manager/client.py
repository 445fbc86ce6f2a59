"""The synchronous client of the REST API: what the CLI, the demo and `rocyard.Client` share.

Owns paths and what an answer means to the caller; `manager.client_tasks` has what it hands out. It reads no environment
(`manager.client_address` says where the cluster is) and prints nothing. One client may be used from several threads.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, Unpack
from urllib.parse import quote

import httpx
import msgspec

from manager.client_address import GIVEN, ClusterAddress, checked_url
from manager.client_errors import ClusterUnreachable, TaskCancelled, WaitTimeout, failure_of
from manager.client_tasks import WAIT_PATIENCE_S, Array, Task, TaskLike, TaskOptions, task_request
from manager.client_wire import PATIENCE_S, Wire, checked_idempotency_key, segment
from manager.core import (
    answers_arrays,
    answers_autoscaler,
    answers_cluster,
    answers_functions,
    answers_join,
    answers_nodes,
    answers_slots,
    answers_tasks,
    answers_tenants,
)
from manager.core import requests as rest
from manager.core.errors import BadRequest, RocyardError, StoreUnavailable
from manager.core.explain import Explanation
from manager.core.foresee import PlanView
from manager.core.ids import new_id
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.snapshot import Snapshot
from manager.settings import Secret

__all__ = ["Array", "Client", "Task", "TaskLike", "TaskOptions", "result_of", "task_request"]

WAIT_STEP_S: Final = 20.0
EARLY_PAUSE_S: Final = 1.0
"""One long poll: short enough for proxies that cut silent connections."""
RESULT_TRIES: Final = 3
"""Of a large result that breaks off."""
BATCH_BYTES_MAX: Final = 900 * 1024
"""Under the API's default limit of a body, 1 MiB."""


class Client:
    """Talks to one cluster with one key.

    Args:
        address: which cluster, with which key.
        transport: stands in for the network in tests.
    """

    def __init__(self, address: ClusterAddress, *, transport: httpx.BaseTransport | None = None) -> None:
        self.address = address
        self._wire = Wire(address, transport)

    @classmethod
    def at(cls, url: str, api_key: str, ca: str = "") -> Self:
        """A client of the cluster at `url`; `ca` as in `ClusterAddress`."""
        return cls(ClusterAddress(checked_url(url), Secret(api_key), GIVEN, GIVEN, ca))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._wire.close()

    # --- tasks --------------------------------------------------------------------------------------------------

    def submit(
        self,
        function: str,
        args: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Submit one task; on return it is on disk, once, however often it had to be sent.

        Args:
            function, args, options: as for `task_request`.
            idempotency_key: of your own: the same one with the same task, within a day, also from another program, is the same
                submission. None: one that is made for this call.

        Raises:
            InvalidArguments, Infeasible, FunctionNotFound, QuotaExceeded …: the server's words.
            ClusterUnreachable, StoreUnavailable: no answer came. Where nobody knows whether the task was accepted, the same
                call with ``idempotency_key=error.details["idempotency_key"]`` finds out.
            BadRequest: `idempotency_key` is none that can be sent, or something else cannot be read.
        """
        return Task(self, self._submit(task_request(function, args, **options), idempotency_key).task_id)

    def submit_array(
        self,
        function: str,
        args: Mapping[str, Any] | None = None,
        *,
        count: int,
        index_as: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Array:
        """Submit many tasks of the same kind as one array; else as `submit`.

        Args:
            function, args, idempotency_key, options: as for `submit`.
            count: how many, up to 10,000.
            index_as: the argument that gives each task its index, from 0; `rocyard.array_index()` tells it too.
        """
        request = msgspec.structs.replace(task_request(function, args, **options), count=count, index_as=index_as)
        accepted = self._submit(request, idempotency_key)
        return Array(self, accepted.task_id, accepted.count)

    def _submit(self, request: rest.TaskRequest, key: str | None) -> answers_tasks.Accepted:
        return self._wire.submit("/v1/tasks", msgspec.json.encode(request), answers_tasks.Accepted, _key(key))

    def submit_many(self, requests: Iterable[rest.TaskRequest], *, idempotency_key: str | None = None) -> list[Task]:
        """Submit tasks in as few batches as their number and size allow. Each batch is accepted whole or not at all.

        Args:
            requests: a number in `after` is the place of an earlier request among these.
            idempotency_key: as for `submit`; each batch has one that is made of it.

        Raises:
            RocyardError: a batch was refused, or got no answer; `details["accepted"]` holds the ids of the batches before it.
                The same call with ``idempotency_key=error.details["idempotency_key"]`` goes on from there: what was accepted is
                not submitted again.
        """
        key = _key(idempotency_key)
        tasks: list[Task] = []
        for number, body in enumerate(_batches(requests, tasks)):
            try:
                accepted = self._wire.submit("/v1/tasks/batch", body, answers_tasks.BatchAccepted, _batch_key(key, number))
            except RocyardError as error:
                error.details |= {"accepted": [task.task_id for task in tasks], "idempotency_key": key}
                raise
            tasks += [Task(self, one.task_id) for one in accepted.tasks]
        return tasks

    def get(self, task: TaskLike, *, with_args: bool = False, tenant: str | None = None) -> answers_tasks.TaskView:
        """The task as it stands now, with its result where it has one.

        Args:
            task: it or its id.
            with_args: with its arguments too.
            tenant: whose it is, where it is another one's; for admins. So for the calls below.
        """
        query = {"args": "true"} if with_args else {}
        return self._wire.get(_path(task), answers_tasks.TaskView, query | _of(tenant))

    def wait(self, task: TaskLike, timeout_s: float | None = None, *, tenant: str | None = None) -> answers_tasks.TaskView:
        """The task once it has ended, well or badly. Goes on over restarts of the API.

        Raises:
            WaitTimeout: it has not ended after `timeout_s` seconds (None: no limit).
        """
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = max(end_s - time.monotonic(), 0.0)
            step_s = min(WAIT_STEP_S, left_s)
            query = {"wait": f"{step_s:.3f}"} | _of(tenant)
            asked_s = time.monotonic()
            view = self._wire.get(_path(task), answers_tasks.TaskView, query, step_s, min(WAIT_PATIENCE_S, left_s))
            if view.status in FINAL:
                return view
            _pause_if_early(asked_s, step_s)
            if time.monotonic() >= end_s:
                raise WaitTimeout(f"Task {view.task_id} is {view.status} after {timeout_s:g} s of waiting; it goes on.")

    def result(self, task: TaskLike, timeout_s: float | None = None) -> Any:
        """What the function returned, once it has.

        Raises:
            TaskFailed, TaskCancelled: it did not return.
            WaitTimeout: it has not ended in time.
        """
        return self.result_of(self.wait(task, timeout_s))

    def result_of(self, view: answers_tasks.TaskView, *, tenant: str | None = None) -> Any:
        """The result of a task that has ended, read from its file where it is large.

        Raises:
            TaskFailed, TaskCancelled: it has none.
            ResultMissing: it had one, and the file is gone.
        """
        if view.result_file is None:
            return result_of(view)
        for attempt in range(RESULT_TRIES - 1):
            try:
                return msgspec.json.decode(b"".join(self.read_result(view.task_id, tenant=tenant)))
            except (ClusterUnreachable, StoreUnavailable):
                time.sleep(0.5 * 2**attempt)  # the API is being restarted
        return msgspec.json.decode(b"".join(self.read_result(view.task_id, tenant=tenant)))

    def read_result(self, task: TaskLike, *, tenant: str | None = None) -> Iterator[bytes]:
        """What the function returned as JSON, piece by piece: a large result need not fit into memory.

        The last piece comes only if all of them are what was kept.

        Raises:
            TaskFailed, TaskCancelled, NotFinished: there is none, or none yet.
            ResultMissing: there was one, and its file is gone.
            ClusterUnreachable: it broke off.
        """
        return self._wire.stream(f"{_path(task)}/result", _of(tenant))

    def cancel(self, task: TaskLike, *, tenant: str | None = None) -> answers_tasks.Cancelled:
        """Ask for the task's end: at once where it waits, within seconds where it runs."""
        return self._wire.post(f"{_path(task)}/cancel", b"", answers_tasks.Cancelled, _of(tenant))

    def logs(self, task: TaskLike, *, tenant: str | None = None) -> answers_tasks.TaskLog:
        """What the newest attempt has written."""
        return self._wire.get(f"{_path(task)}/logs", answers_tasks.TaskLog, _of(tenant))

    def follow(self, task: TaskLike, *, tenant: str | None = None) -> Iterator[answers_tasks.TaskLog]:
        """What the task writes, piece by piece as it comes, until it has ended. Goes on over restarts of the API.

        Where `attempt` is another one than before, a new attempt has begun to write.
        """
        query = {"wait": f"{WAIT_STEP_S:g}"} | _of(tenant)
        while True:
            asked_s = time.monotonic()
            piece = self._wire.get(f"{_path(task)}/logs", answers_tasks.TaskLog, query, WAIT_STEP_S, WAIT_PATIENCE_S)
            news = piece.stdout or piece.stderr or piece.dropped_bytes
            if news:
                yield piece
            if piece.ended:
                return
            if not news:
                _pause_if_early(asked_s, WAIT_STEP_S)
            query["cursor"] = piece.cursor

    def attempts(self, task: TaskLike, *, tenant: str | None = None) -> tuple[answers_tasks.AttemptView, ...]:
        """The attempts at a task, oldest first: where, when, and why each ended."""
        return self._wire.get(f"{_path(task)}/attempts", answers_tasks.AttemptList, _of(tenant)).attempts

    def explain(self, task: TaskLike, *, tenant: str | None = None) -> Explanation:
        """Why the task is where it is, with a verdict for each worker."""
        return self._wire.get(f"{_path(task)}/explain", Explanation, _of(tenant))

    def tasks(
        self,
        *,
        status: TaskStatus | str | None = None,
        function: str | None = None,
        name: str | None = None,
        array: Array | str | None = None,
        tenant: str | None = None,
        limit: int | None = None,
    ) -> Iterator[answers_tasks.TaskSummary]:
        """Tasks, newest first, page by page as they are asked for.

        Args:
            status: only tasks with it.
            function: only tasks of it.
            name: only the task, or the tasks of the array, of that name.
            array: only the tasks of this array, the last one first.
            tenant: whose; for admins.
            limit: at most so many; None is all.
        """
        array_id = array.array_id if isinstance(array, Array) else array
        asked = {"status": status, "function": function, "name": name, "array": array_id, "tenant": tenant}
        query = {name: str(value) for name, value in asked.items() if value is not None}
        left = limit
        while left is None or left > 0:
            query["limit"] = str(rest.PAGE_MAX if left is None else min(left, rest.PAGE_MAX))
            page = self._wire.get("/v1/tasks", answers_tasks.TaskPage, query)
            yield from page.tasks
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor
            left = None if left is None else left - len(page.tasks)

    # --- arrays -------------------------------------------------------------------------------------------------

    def array(self, array_id: str) -> Array:
        """An array that was submitted before.

        Raises:
            NotFound: there is none of that id.
        """
        return Array(self, array_id, self.array_view(array_id).count)

    def array_view(
        self, array: Array | str, *, tenant: str | None = None, patience_s: float = PATIENCE_S
    ) -> answers_arrays.ArrayView:
        """How many tasks of an array have ended how; it is tried again for `patience_s` where nothing answers."""
        return self._wire.get(_array_path(array), answers_arrays.ArrayView, _of(tenant), patience_s=patience_s)

    def cancel_array(self, array: Array | str, *, tenant: str | None = None) -> answers_arrays.ArrayCancelled:
        """Ask for the end of all tasks of an array that have not ended."""
        return self._wire.post(f"{_array_path(array)}/cancel", b"", answers_arrays.ArrayCancelled, _of(tenant))

    # --- what would happen --------------------------------------------------------------------------------------

    def plan(
        self, requests: rest.TaskRequest | Iterable[rest.TaskRequest], *, count: int = 1, tenant: str | None = None
    ) -> PlanView:
        """What would happen to tasks that are not submitted: whether they fit, where, when, and what that would change.

        Args:
            requests: one, as `task_request` makes it, or several.
            count: so many of the one.
            tenant: whose they would be, where they are another one's; for admins.
        """
        if isinstance(requests, rest.TaskRequest):
            body = msgspec.json.encode({**msgspec.structs.asdict(requests), "count": requests.count or count})
        else:
            body = msgspec.json.encode(rest.BatchRequest(tuple(requests)))
        return self._wire.post("/v1/plan", body, PlanView, _of(tenant))

    def snapshot(self) -> Snapshot:
        """All that decides about placement at this moment; for admins. `rocyard replay` reads it as JSON."""
        return self._wire.get("/v1/snapshot", Snapshot)

    # --- the cluster --------------------------------------------------------------------------------------------

    def functions(self) -> tuple[answers_functions.FunctionView, ...]:
        """What tasks may name."""
        return self._wire.get("/v1/functions", answers_functions.FunctionList).functions

    def workers(self) -> tuple[answers_nodes.WorkerView, ...]:
        """Nodes with their devices."""
        return self._wire.get("/v1/workers", answers_nodes.WorkerList).workers

    def status(self) -> answers_cluster.ClusterView:
        """The cluster at this moment."""
        return self._wire.get("/v1/cluster/status", answers_cluster.ClusterView)

    def autoscaler(self) -> answers_autoscaler.AutoscalerView:
        """What the autoscaler may do, and what it decided last."""
        return self._wire.get("/v1/autoscaler", answers_autoscaler.AutoscalerView)

    def decisions(self, limit: int | None = None) -> Iterator[answers_autoscaler.DecisionView]:
        """Decisions of the autoscaler, newest first, page by page as they are asked for.

        Args:
            limit: at most so many; None is all that are kept.
        """
        query: dict[str, str] = {}
        left = limit
        while left is None or left > 0:
            query["limit"] = str(rest.PAGE_MAX if left is None else min(left, rest.PAGE_MAX))
            page = self._wire.get("/v1/autoscaler/decisions", answers_autoscaler.DecisionList, query)
            yield from page.decisions
            if page.next_cursor is None:
                return
            query["before"] = page.next_cursor
            left = None if left is None else left - len(page.decisions)

    # --- nodes and slots, for who runs the cluster ---------------------------------------------------------------

    def worker(self, node: str) -> answers_nodes.WorkerView:
        """One node.

        Raises:
            NotFound: there is none of that name; its message names near ones.
        """
        return self._wire.get(_node(node), answers_nodes.WorkerView)

    def cordon(self, node: str) -> answers_nodes.WorkerView:
        """Have nothing new placed on a node; what is open there goes on. For admins, as the next three."""
        return self._wire.post(f"{_node(node)}/cordon", b"", answers_nodes.WorkerView)

    def uncordon(self, node: str) -> answers_nodes.WorkerView:
        """Have a node take on work again."""
        return self._wire.post(f"{_node(node)}/uncordon", b"", answers_nodes.WorkerView)

    def drain(self, node: str, deadline: float | str | None = None, *, remove: bool = False) -> answers_nodes.WorkerView:
        """Empty a node: nothing new is placed there, and its slots end at their next task boundary. Returns at once.

        Args:
            node: its name.
            deadline: seconds or a text such as "5m"; what still runs then goes back to the queue. None: it is waited for.
            remove: whether its agent ends for good once it is empty.
        """
        body = msgspec.json.encode(rest.DrainRequest(deadline, remove))
        return self._wire.post(f"{_node(node)}/drain", body, answers_nodes.WorkerView)

    def remove_worker(self, node: str, deadline: float | str | None = None) -> answers_nodes.WorkerView:
        """Drain a node and have its agent end for good; it then is in no list any more."""
        query = {} if deadline is None else {"deadline": str(deadline)}
        return self._wire.delete(_node(node), answers_nodes.WorkerView, query)

    def warm(
        self,
        function: str | None = None,
        *,
        slots: int = 1,
        for_: float | str,
        tenant: str | None = None,
        **needs: Unpack[rest.Needs],
    ) -> answers_slots.WarmView:
        """Keep slots open although nothing waits for them, so that the next tasks find them started and loaded.

        Args:
            function: for whose tasks.
            slots: how many; 0: no more than work asks for.
            for_: for how long, seconds or a text such as "10m".
            tenant: whose, where they are another one's; for admins.
            needs: `memory`, `gpus` and so on of each slot, as for `task_request`; what is left out is the function's.
        """
        resources = rest.ResourceRequest(**needs)
        request = rest.WarmRequest(for_=for_, function=function, resources=resources, slots=slots)
        return self._wire.post("/v1/slots/warm", msgspec.json.encode(request), answers_slots.WarmView, _of(tenant))

    def unload(
        self,
        function: str | None = None,
        *,
        all: bool = False,  # noqa: A002 -- as the API calls it
        tenant: str | None = None,
        **needs: Unpack[rest.Needs],
    ) -> answers_slots.Unloaded:
        """Close idle slots now: those for a function, those of a size, or all of the tenant."""
        request = rest.UnloadRequest(function, rest.ResourceRequest(**needs), all)
        return self._wire.post("/v1/slots/unload", msgspec.json.encode(request), answers_slots.Unloaded, _of(tenant))

    # --- tenants ------------------------------------------------------------------------------------------------

    def tenants(self) -> tuple[answers_tenants.TenantView, ...]:
        """What each tenant has at work, and what it may have. For admins."""
        return self._wire.get("/v1/tenants", answers_tenants.TenantList).tenants

    # --- keys ---------------------------------------------------------------------------------------------------

    def create_key(self, tenant: str, scope: rest.KeyScope = rest.KeyScope.USER) -> answers_tenants.KeyCreated:
        """Make an API key; its text is in the answer and nowhere else. For admins."""
        body = msgspec.json.encode(rest.KeyRequest(tenant=tenant, scope=scope))
        return self._wire.post("/v1/keys", body, answers_tenants.KeyCreated)

    def keys(self) -> tuple[answers_tenants.KeyView, ...]:
        """All API keys, without their secrets. For admins."""
        return self._wire.get("/v1/keys", answers_tenants.KeyList).keys

    def revoke_key(self, key_id: str) -> answers_tenants.KeyView:
        """End a key. For admins."""
        return self._wire.delete(f"/v1/keys/{segment(key_id)}", answers_tenants.KeyView)

    def join(self) -> answers_join.JoinView:
        """What a node agent on another machine needs, the store's passwords among it. For admins."""
        return self._wire.get("/v1/join", answers_join.JoinView)


def result_of(view: answers_tasks.TaskView) -> Any:
    """The result of a task that has ended, where it is in the view; see `Client.result_of`.

    Raises:
        TaskFailed, TaskCancelled: it has none.
    """
    match view.status:
        case TaskStatus.SUCCEEDED:
            return msgspec.json.decode(view.result)
        case TaskStatus.CANCELLED:
            raise TaskCancelled(view.task_id)
        case _:
            raise failure_of(view.task_id, view.error)


def _pause_if_early(asked_s: float, step_s: float) -> None:
    """An answer without news long before its time: the key has as many waits as it may, and this one was not let wait."""
    if time.monotonic() - asked_s < step_s / 2:
        time.sleep(min(EARLY_PAUSE_S, step_s))


def _key(given: str | None) -> str:
    return new_id() if given is None else checked_idempotency_key(given)


def _batch_key(key: str, number: int) -> str:
    """Of one batch of a call, the same whenever the call is made again; a digest, which has room for any key."""
    return hashlib.sha256(f"{number} {key}".encode()).hexdigest()


def _batches(requests: Iterable[rest.TaskRequest], accepted: Sequence[Task]) -> Iterator[bytes]:
    """Bodies of batch submissions, each within the limits of number and size.

    Args:
        requests: a number among what one comes after is the place of another here.
        accepted: tasks of the bodies before the one that is asked for; these are named by their ids.
    """
    parts: list[bytes] = []
    size = 0
    for request in requests:
        part = msgspec.json.encode(_placed(request, accepted))
        if parts and (len(parts) == rest.TASKS_PER_BATCH_MAX or size + len(part) > BATCH_BYTES_MAX):
            yield b'{"tasks":[' + b",".join(parts) + b"]}"
            parts, size = [], 0
            part = msgspec.json.encode(_placed(request, accepted))  # by now more of them have ids
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield b'{"tasks":[' + b",".join(parts) + b"]}"


def _placed(request: rest.TaskRequest, accepted: Sequence[Task]) -> rest.TaskRequest:
    """`request` with its numbers as the next batch has to have them."""
    if not any(isinstance(parent, int) for parent in request.after):
        return request
    first = len(accepted)
    after = tuple(
        parent if isinstance(parent, str) else parent - first if not 0 <= parent < first else accepted[parent].task_id
        for parent in request.after
    )
    return msgspec.structs.replace(request, after=after)


def _array_path(array: Array | str) -> str:
    return f"/v1/arrays/{segment(array if isinstance(array, str) else array.array_id)}"


def _path(task: TaskLike) -> str:
    return f"/v1/tasks/{segment(task if isinstance(task, str) else task.task_id)}"


def _node(node: str) -> str:
    if not node or "/" in node or not node.strip("."):
        raise BadRequest(f"{node[:80]!r} names no node.")
    return f"/v1/workers/{quote(node, safe='')}"


def _of(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}
