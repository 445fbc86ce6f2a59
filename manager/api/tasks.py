"""Routes of tasks: submit, read, wait, list, cancel, result, logs. Why one waits is `manager.api.foresight`'s.

Handlers parse, call and encode. Every read names its tenant, and what belongs to another one does not exist.
"""

from typing import Final

import msgspec

from manager.api.body import batch_request, task_request
from manager.api.cursors import decode_cursor, encode_cursor
from manager.api.ends import Ends
from manager.api.exchange import Call, Reply
from manager.api.functions import Functions, FunctionUnavailable
from manager.api.operations import Operation, Parameter
from manager.api.problems import NotFinished, TaskCancelled, TaskFailed
from manager.api.query import one_of, parse_query, wait_s, whole_number, yes_or_no
from manager.api.submissions import refuse_infeasible, submission_of
from manager.api.watch import ClusterWatch
from manager.core.answers import Accepted, BatchAccepted, Cancelled, TaskLog, TaskPage, TaskView, summary_of, view_of
from manager.core.errors import (
    BadRequest,
    Forbidden,
    FunctionNotFound,
    Infeasible,
    InvalidArguments,
    NotFound,
    QuotaExceeded,
    StoreFull,
    TooLarge,
    UnsupportedMediaType,
)
from manager.core.ids import is_id, new_id
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.model import Submission, TaskRecord
from manager.core.requests import PAGE_MAX, BatchRequest, KeyScope, TaskRequest
from manager.keys import is_tenant
from manager.settings import Settings
from manager.store import Store

PAGE: Final = 100
"""Tasks of a page unless asked otherwise."""

_encode = msgspec.json.Encoder().encode
_STATUSES: Final = tuple(status.value for status in TaskStatus)
TENANT: Final = Parameter("tenant", "Another tenant's; only for admin keys.")
_GET: Final = ("wait", "args", "tenant")
_LIST: Final = ("status", "function", "limit", "cursor", "tenant")
_ONE: Final = ("tenant",)
_LOGS: Final = ("wait", "cursor", "tenant")
_REPLAYED: Final = (b"idempotency-replayed", b"true")
_NOT_THERE: Final = "There is no such task."


class TaskRoutes:
    """What the routes of tasks need.

    Args:
        store: the process's connection.
        settings: limits.
        functions, watch, ends: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, functions: Functions, watch: ClusterWatch, ends: Ends) -> None:
        self._store = store
        self._followers = LogFollowers(store, ends)
        self._settings = settings
        self._functions = functions
        self._watch = watch
        self._ends = ends

    # --- submission ---------------------------------------------------------------------------------------------

    async def submit(self, call: Call) -> Reply:
        """Accept one task. This is half of the hot path: what can be known beforehand is."""
        body = await call.json_body(self._settings.api.body_bytes_max)
        parse_query(call.query, ())
        request, args = task_request(body)
        given = call.idempotency_key
        digest = digest_of(json.loads(body)) if given is not None or request.name is not None else ""
        made = await self._checked(request, args, call.key.tenant, new_id() if request.count is None else array_id(), digest)
        key = None if given is None else idempotency_key(given, digest)
        reply = await self._accept(call.key.tenant, [(request, made)], key)
        if request.count is not None:
            return await self._array_accepted(reply, request.count)
        task_id, status = reply.tasks[0]
        where = (b"location", b"/v1/tasks/" + task_id.encode())
        if reply.replayed:
            return Reply(202, _encode(Accepted(task_id, status, replayed=True)), [where, _REPLAYED])
        assert status is not None  # it is new
        return Reply(202, b'{"task_id":"%b","status":"%b"}' % (task_id.encode(), status.encode()), [where])

    async def _array_accepted(self, reply: SubmitReply, count: int) -> Reply:
        """The answer for an array, once its tasks have their records; what the store does not do now, the controller does."""
        task_id, status = reply.tasks[0]
        with contextlib.suppress(StoreUnavailable, StoreFull):
            for _ in range(0, count, IDS_MAX):
                if reply.replayed or not await self._store.expand():
                    break
        headers = [(b"location", b"/v1/arrays/" + task_id.encode()), *([_REPLAYED] if reply.replayed else [])]
        return Reply(202, _encode(Accepted(task_id, status, count, reply.replayed)), headers)

    async def submit_batch(self, call: Call) -> Reply:
        """Accept tasks, all or none."""
        body = await call.json_body(self._settings.api.body_bytes_max)
        parse_query(call.query, ())
        tenant, given = call.key.tenant, call.idempotency_key
        asked = batch_request(body)
        refuse_in_batch([request for request, _ in asked])
        named = any(request.name is not None for request, _ in asked)
        tree = json.loads(body) if named or given is not None else {}
        ids = [new_id() for _ in asked]
        made: list[tuple[TaskRequest, Submission]] = []
        for number, (request, args) in enumerate(asked):
            digest = digest_of(tree["tasks"][number]) if request.name is not None else ""
            within = f"tasks[{number}]."
            made.append((request, await self._checked(request, args, tenant, ids[number], digest, within, ids[:number])))
        reply = await self._accept(tenant, made, None if given is None else idempotency_key(given, digest_of(tree)), batch=True)
        again = reply.replayed
        accepted = tuple(Accepted(task_id, status, replayed=again) for task_id, status in reply.tasks)
        return Reply(202, _encode(BatchAccepted(accepted, again)), [_REPLAYED] if again else None)

    async def _checked(
        self,
        request: TaskRequest,
        args: dict[str, object],
        tenant: str,
        task_id: str,
        digest: str,
        within: str = "",
        before: Sequence[str] | None = None,
    ) -> Submission:
        function = self._functions.known(request.function) or await self._functions.find(request.function)
        if request.count is None:
            function.check(args, f"{within}args")
        else:
            function.check_array(args, "args", request.index_as, request.count)
        after = parents_of(request, before, within) if request.after else ()
        return submission_of(request, function.published, tenant, task_id, self._settings, within, after, digest)

    async def _accept(
        self, tenant: str, made: Sequence[tuple[TaskRequest, Submission]], key: IdempotencyKey | None, *, batch: bool = False
    ) -> SubmitReply:
        """Hand them to the store. What would be refused now may have been accepted before, under the same key or names."""
        submissions = [submission for _, submission in made]
        try:
            self._refuse_hopeless(made, batch=batch)
        except RocyardError as refusal:
            if key is None and not any(submission.spec.name for submission in submissions):
                raise
            return await self._known_before(tenant, submissions, key, refusal)
        limits = self._settings.tenants.get(tenant, self._settings.tenant)
        snapshot = self._watch.snapshot
        if snapshot is not None:
            now_ms = snapshot.store_now_ms()
            for submission in submissions:
                self._ends.submitting(submission.task_id, tenant, submission.spec, now_ms)
        try:
            reply = await self._store.submit(tenant, limits.active_tasks_max, submissions, key)
        except BaseException:
            self._forget(submissions)
            raise
        if reply.replayed:
            self._forget(submissions)
        return reply

    def _refuse_hopeless(self, made: Sequence[tuple[TaskRequest, Submission]], *, batch: bool) -> None:
        """Refuse what no device could ever hold, and what should have ended already.

        Raises:
            Infeasible, DeadlinePassed, BadRequest: says in which task.
        """
        snapshot = self._watch.snapshot
        for number, (request, submission) in enumerate(made):
            within = f"tasks[{number}]." if batch else ""
            if snapshot is not None and not request.allow_infeasible:
                refuse_infeasible(submission.shape, submission.spec.resources, snapshot.capacity, within)
            if request.deadline is not None:
                now_ms = time.time_ns() // 1_000_000 if snapshot is None else snapshot.store_now_ms()
                refuse_late(submission.spec, now_ms, within)

    async def _known_before(
        self, tenant: str, submissions: list[Submission], key: IdempotencyKey | None, refusal: RocyardError
    ) -> SubmitReply:
        """What the same request was answered before; with no room for any task, the store accepts nothing new.

        Raises:
            RocyardError: `refusal`, where there was no such request.
        """
        try:
            return await self._store.submit(tenant, 0, submissions, key)
        except (QuotaExceeded, UnknownDependency):
            raise refusal from None

    def _forget(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            self._ends.forget(submission.task_id)

    # --- one task -----------------------------------------------------------------------------------------------

    async def get(self, call: Call) -> Reply:
        """One task, at once or once it has ended: the other half of the hot path."""
        query = parse_query(call.query, _GET)
        task_id, tenant = addressed(call, query.get("tenant"))
        if "args" in query and yes_or_no(query, "args"):
            return Reply(200, _encode(view_of(await self._record(task_id, tenant), with_args=True)))
        ends = self._ends
        known = ends.known(task_id, tenant)
        if known is not None and (body := known.final_body()) is not None:
            return Reply(200, body)
        patience_s = wait_s(query["wait"], self._settings.api.wait_s_max) if "wait" in query else 0.0
        if patience_s > 0:
            waiter = ends.register(task_id)
            try:
                if known is None or not ends.goes_on(known):
                    record = await self._record(task_id, tenant)
                    if record.status in FINAL:
                        return self._shown(record)
                await ends.wait(waiter, patience_s, call.gone)
            finally:
                ends.unregister(task_id, waiter)
            known = ends.known(task_id, tenant)
            if known is not None and (body := known.final_body()) is not None:
                return Reply(200, body)
        return self._shown(await self._record(task_id, tenant))

    async def cancel(self, call: Call) -> Reply:
        """Ask for a task's end."""
        task_id, tenant = addressed(call, parse_query(call.query, _ONE).get("tenant"))
        status = await self._store.cancel(task_id, tenant)
        if status is None:
            raise await self._no_task(task_id, tenant)
        asked = status in {TaskStatus.RUNNING, TaskStatus.CANCELLED}
        return Reply(200, _encode(Cancelled(task_id, status, asked)))

    async def result(self, call: Call) -> Reply:
        """What the function returned, as it is."""
        task_id, tenant = addressed(call, parse_query(call.query, _ONE).get("tenant"))
        record = await self._record(task_id, tenant)
        match record.status:
            case TaskStatus.SUCCEEDED:
                return Reply(200, record.result or b"null")
            case TaskStatus.FAILED:
                error = record.error
                why = f"{error.type}: {error.message[:500]}" if error is not None else "no reason was left"
                raise TaskFailed(f"The task failed, so it has no result: {why}", task_id=task_id, error=error)
            case TaskStatus.CANCELLED:
                raise TaskCancelled(task_id=task_id)
            case status:
                raise NotFinished(
                    f"The task is {status}: ask for it with '?wait=30s', or again later.",
                    task_id=task_id,
                    task_status=status,
                )

    async def logs(self, call: Call) -> Reply:
        """What the newest attempt has written, or what is new of it since a cursor."""
        query = parse_query(call.query, _LOGS)
        task_id, tenant = addressed(call, query.get("tenant"))
        cursor = parse_cursor(query["cursor"]) if "cursor" in query else BEGINNING
        patience_s = wait_s(query["wait"], self._settings.api.wait_s_max) if "wait" in query else 0.0
        found = await self._log(task_id, tenant, cursor)
        if patience_s > 0 and not (found.stdout or found.stderr or found.ended):
            await self._followers.until_new(task_id, cursor, patience_s, call.gone)
            found = await self._log(task_id, tenant, cursor)
        return Reply(200, _encode(found))

    async def _log(self, task_id: str, tenant: str, cursor: Cursor) -> TaskLog:
        """The log since `cursor`. It is complete before a task has ended, so it is read after the record."""
        ended = (await self._record(task_id, tenant)).status in FINAL
        return log_since(task_id, await self._store.kept_log(task_id), cursor, ended=ended)

    async def page(self, call: Call) -> Reply:
        """Tasks of a tenant, newest first."""
        query = parse_query(call.query, _LIST)
        tenant = tenant_of(call, query.get("tenant"))
        limit = whole_number(query, "limit", PAGE, 1, PAGE_MAX)
        status = one_of(query, "status", _STATUSES)
        filters = (tenant, status, query.get("function", ""))
        before = decode_cursor(call.key, filters, query["cursor"]) if "cursor" in query else None
        following, records = await self._store.tasks(tenant, before, limit, TaskStatus(status) if status else None, filters[2])
        cursor = None if following is None else encode_cursor(call.key, filters, following)
        return Reply(200, _encode(TaskPage(tuple(summary_of(record) for record in records), cursor)))

    async def _record(self, task_id: str, tenant: str) -> TaskRecord:
        record = await self._store.task(task_id)
        if record is None or record.tenant != tenant:
            raise await self._no_task(task_id, tenant)
        return record

    async def _no_task(self, task_id: str, tenant: str) -> NotFound:
        row = await self._store.array(task_id) if is_array_id(task_id) else None
        if row is None or row.tenant != tenant:
            return NotFound(_NOT_THERE)
        return NotFound(f"That is an array of tasks: GET /v1/arrays/{task_id}.", array_id=task_id)

    async def attempts(self, call: Call) -> Reply:
        """All attempts at a task."""
        task_id, tenant = addressed(call, parse_query(call.query, _ONE).get("tenant"))
        record = await self._record(task_id, tenant)
        return Reply(200, _encode(attempts_of(record, await self._store.attempts(task_id))))

    def _shown(self, record: TaskRecord) -> Reply:
        body = _encode(view_of(record))
        self._ends.keep(record, body)
        return Reply(200, body)

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        submit_errors = (
            *(BadRequest, FunctionNotFound, TooLarge, UnsupportedMediaType, InvalidArguments, Infeasible),
            *(FunctionUnavailable, QuotaExceeded, StoreFull),
            *(IdempotencyConflict, NameTaken, UnknownDependency, DeadlinePassed),
        )
        one = "/v1/tasks/{task_id}"
        wait = Parameter(
            "wait",
            "Answer when the task has ended, or after this long: seconds or '30s'. At most the setting api.wait_s_max.",
        )
        return (
            Operation(
                name="submit_task", method="POST", path="/v1/tasks", access=KeyScope.USER, handler=self.submit,
                summary="Submit a task. The answer means that it is on disk.",
                status=202, answer=Accepted, body=TaskRequest, errors=submit_errors, headers=(IDEMPOTENCY_KEY,),
            ),
            Operation(
                name="submit_batch", method="POST", path="/v1/tasks/batch", access=KeyScope.USER,
                handler=self.submit_batch, summary="Submit 1 to 500 tasks, all or none.",
                status=202, answer=BatchAccepted, body=BatchRequest, errors=submit_errors, headers=(IDEMPOTENCY_KEY,),
            ),
            Operation(
                name="list_tasks", method="GET", path="/v1/tasks", access=KeyScope.READ, handler=self.page,
                summary="List tasks, newest first.", answer=TaskPage,
                query=(
                    Parameter("status", "Only tasks of this status.", choices=_STATUSES),
                    Parameter("function", "Only tasks of this function."),
                    Parameter("limit", f"Tasks of one page, 1 to {PAGE_MAX}; {PAGE} unless given.", "integer", most=PAGE_MAX),
                    Parameter("cursor", "Where to go on: `next_cursor` of the page before, with the same filters and key."),
                    TENANT,
                ),
            ),
            Operation(
                name="get_task", method="GET", path=one, access=KeyScope.READ, handler=self.get,
                summary="Get a task, at once or once it has ended.", answer=TaskView, errors=(NotFound,),
                query=(wait, Parameter("args", "Whether to show its arguments.", "boolean"), TENANT),
            ),
            Operation(
                name="cancel_task", method="POST", path=f"{one}/cancel", access=KeyScope.USER, handler=self.cancel,
                summary="Cancel a task: at once if it waits; a running one is ended within seconds.",
                answer=Cancelled, errors=(NotFound,), query=(TENANT,),
            ),
            Operation(
                name="get_result", method="GET", path=f"{one}/result", access=KeyScope.READ, handler=self.result,
                summary="Get what the function returned, as it is.", answer=msgspec.Raw,
                errors=(NotFound, NotFinished, TaskFailed, TaskCancelled), query=(TENANT,),
            ),
            Operation(
                name="get_logs", method="GET", path=f"{one}/logs", access=KeyScope.READ, handler=self.logs,
                summary="Get what the newest attempt wrote to stdout and stderr, or follow it.", answer=TaskLog,
                errors=(NotFound,),
                query=(
                    Parameter("cursor", "Only what is new since then: `cursor` of the answer before."),
                    Parameter(
                        "wait", "Answer when there is something new, when the task has ended, or after this long: seconds or "
                        "'30s'. At most the setting api.wait_s_max.",
                    ),
                    TENANT,
                ),
            ),
            Operation(
                name="get_attempts", method="GET", path=f"{one}/attempts", access=KeyScope.READ, handler=self.attempts,
                summary="Get the attempts at a task: where, when, and why each ended.", answer=AttemptList,
                errors=(NotFound,), query=(TENANT,),
            ),
        )  # fmt: skip


def tenant_of(call: Call, asked: str | None) -> str:
    """Whose tasks are meant.

    Raises:
        Forbidden: another tenant's, and the key is no admin's.
    """
    own = call.key.tenant
    if asked is None or asked == own:
        return own
    if not call.key.may(KeyScope.ADMIN):
        raise Forbidden("Only an admin key may name another tenant.")
    if not is_tenant(asked):
        raise BadRequest(f"tenant: {asked[:80]!r} cannot name one.", field="tenant")
    return asked


def addressed(call: Call, asked_tenant: str | None) -> tuple[str, str]:
    """The task and the tenant that are meant.

    Raises:
        NotFound: the id cannot be one of ours.
    """
    task_id = call.params["task_id"]
    if not is_id(task_id):
        raise NotFound(_NOT_THERE)
    return task_id, call.key.tenant if asked_tenant is None else tenant_of(call, asked_tenant)
