"""Routes of tasks: read, wait, list, cancel, attempts, logs. `manager.api.accept` has those that submit, `manager.api.results`
results, and why one waits is `manager.api.foresight`'s.

Handlers parse, call and encode. Every read names its tenant, and what belongs to another one does not exist.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from manager.api.cursors import decode_cursor, encode_cursor
from manager.api.ends import Ends, Remembered
from manager.api.exchange import Call, Reply
from manager.api.logs import BEGINNING, Cursor, LogFollowers, extent_of, log_since, parse_cursor
from manager.api.operations import Operation, Parameter
from manager.api.places import WAITS_MAX, Places
from manager.api.query import one_of, parse_query, wait_s, whole_number, yes_or_no
from manager.core.answers_tasks import AttemptList, Cancelled, TaskLog, TaskPage, TaskView, attempts_of, summary_of, view_of
from manager.core.errors import BadRequest, Forbidden, NotFound
from manager.core.ids import is_array_id, is_id
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.model import ArrayRow, TaskRecord
from manager.core.requests import PAGE_MAX, KeyScope
from manager.keys import is_tenant
from manager.settings import Settings
from manager.store import Store

PAGE: Final = 100
"""Tasks of a page unless asked otherwise."""

_encode = msgspec.json.Encoder().encode
_STATUSES: Final = tuple(status.value for status in TaskStatus)
TENANT: Final = Parameter("tenant", "Another tenant's; only for admin keys.")
_GET: Final = ("wait", "args", "tenant")
_LIST: Final = ("status", "function", "name", "array", "limit", "cursor", "tenant")
_ONE: Final = ("tenant",)
_LOGS: Final = ("wait", "cursor", "tenant")
_NOT_THERE: Final = "There is no such task."


class TaskRoutes:
    """What the routes of tasks need.

    Args:
        store: the process's connection.
        settings: limits.
        ends: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, ends: Ends) -> None:
        self._store = store
        self._settings = settings
        self._ends = ends
        self._followers = LogFollowers(store, ends)
        self._waits = Places(WAITS_MAX)

    # --- one task -----------------------------------------------------------------------------------------------

    async def get(self, call: Call) -> Reply:
        """One task, at once or once it has ended: the other half of the hot path."""
        query = parse_query(call.query, _GET)
        task_id, tenant = addressed(call, query.get("tenant"))
        patience_s = wait_s(query["wait"], self._settings.api.wait_s_max) if "wait" in query else 0.0
        with_args = "args" in query and yes_or_no(query, "args")
        known = self._ends.known(task_id, tenant)
        body = None if known is None else known.final_body()
        if body is None and patience_s > 0 and self._waits.take(call.key.key_id):
            try:
                body = await self._until_ended(task_id, tenant, known, patience_s, call)
            finally:
                self._waits.leave(call.key.key_id)
        if with_args:  # what is remembered has none
            return Reply(200, _encode(view_of(await self._record(task_id, tenant), with_args=True)))
        return Reply(200, self._shown(await self._record(task_id, tenant)) if body is None else body)

    async def _until_ended(
        self, task_id: str, tenant: str, known: Remembered | None, patience_s: float, call: Call
    ) -> bytes | None:
        """The answer for a task that has ended, or ends in that time; None where it has to be read."""
        ends = self._ends
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
        return None if known is None else known.final_body()

    async def cancel(self, call: Call) -> Reply:
        """Ask for a task's end."""
        task_id, tenant = addressed(call, parse_query(call.query, _ONE).get("tenant"))
        status = await self._store.cancel(task_id, tenant)
        if status is None:
            raise await self._no_task(task_id, tenant)
        asked = status in {TaskStatus.RUNNING, TaskStatus.CANCELLED}
        return Reply(200, _encode(Cancelled(task_id, status, asked)))

    async def logs(self, call: Call) -> Reply:
        """What the newest attempt has written, or what is new of it since a cursor."""
        query = parse_query(call.query, _LOGS)
        task_id, tenant = addressed(call, query.get("tenant"))
        cursor = parse_cursor(query["cursor"]) if "cursor" in query else BEGINNING
        patience_s = wait_s(query["wait"], self._settings.api.wait_s_max) if "wait" in query else 0.0
        found, extent = await self._log(task_id, tenant, cursor)
        nothing = not (found.stdout or found.stderr or found.ended)
        if nothing and patience_s > 0 and self._waits.take(call.key.key_id):
            try:
                await self._followers.until_new(task_id, extent, patience_s, call.gone)
            finally:
                self._waits.leave(call.key.key_id)
            found, _ = await self._log(task_id, tenant, cursor)
        return Reply(200, _encode(found))

    async def _log(self, task_id: str, tenant: str, cursor: Cursor) -> tuple[TaskLog, Cursor]:
        """The log since `cursor`, and how far it goes. It is complete before its task has ended: the record is read first."""
        ended = (await self._record(task_id, tenant)).status in FINAL
        kept = await self._store.kept_log(task_id)
        return log_since(task_id, kept, cursor, ended=ended), extent_of(kept)

    async def page(self, call: Call) -> Reply:
        """Tasks of a tenant, newest first."""
        query = parse_query(call.query, _LIST)
        tenant = tenant_of(call, query.get("tenant"))
        limit = whole_number(query, "limit", PAGE, 1, PAGE_MAX)
        status = one_of(query, "status", _STATUSES)
        filters = (tenant, status, query.get("function", ""), query.get("name", ""), query.get("array", ""))
        before = decode_cursor(call.key, filters, query["cursor"]) if "cursor" in query else None
        wanted = _Wanted(tenant, before, limit, TaskStatus(status) if status else None, filters[2])
        if "array" in query or "name" in query:
            following, records = await self._named(wanted, query)
        else:
            following, records = await self._store.tasks(tenant, before, limit, wanted.status, wanted.function)
        cursor = None if following is None else encode_cursor(call.key, filters, following)
        return Reply(200, _encode(TaskPage(tuple(summary_of(record) for record in records), cursor)))

    async def _named(self, wanted: "_Wanted", query: Mapping[str, str]) -> tuple[int | None, list[TaskRecord]]:
        """The task, or the tasks of the array, that the name or the id is of."""
        found = query.get("array", "")
        if "name" in query:
            if "array" in query:
                raise BadRequest("array: name what is wanted by its name or by the array's id, not by both.", field="array")
            found = await self._store.task_named(wanted.tenant, query["name"]) or ""
        elif not is_id(found):
            raise BadRequest(f"array: {found[:80]!r} is no id of an array.", field="array")
        row = await self._store.array(found) if found else None
        if row is not None and row.tenant == wanted.tenant:
            return await self._page_of_array(wanted, row)
        record = await self._store.task(found) if found and "name" in query else None
        return None, [record] if record is not None and wanted.takes(record) else []

    async def _page_of_array(self, wanted: "_Wanted", row: ArrayRow) -> tuple[int | None, list[TaskRecord]]:
        """A page of the tenant's list, from the last task of the array to the first."""
        end = row.sequence + row.count
        before = end if wanted.before is None else min(wanted.before, end)
        following, records = await self._store.tasks(wanted.tenant, before, wanted.limit, wanted.status, wanted.function)
        own = [record for record in records if record.array_id == row.array_id]
        return None if following is None or following <= row.sequence else following, own

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

    def _shown(self, record: TaskRecord) -> bytes:
        body = _encode(view_of(record))
        self._ends.keep(record, body)
        return body

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        one = "/v1/tasks/{task_id}"
        wait = Parameter(
            "wait",
            "Answer when the task has ended, or after this long: seconds or '30s'. At most the setting api.wait_s_max.",
        )
        return (
            Operation(
                name="list_tasks", method="GET", path="/v1/tasks", access=KeyScope.READ, handler=self.page,
                summary="List tasks, newest first.", answer=TaskPage,
                query=(
                    Parameter("status", "Only tasks of this status.", choices=_STATUSES),
                    Parameter("function", "Only tasks of this function."),
                    Parameter("name", "Only the task of this name, or the tasks of the array of this name."),
                    Parameter("array", "Only the tasks of the array with this id, the last one first."),
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


class _Wanted(msgspec.Struct, frozen=True):
    """Which tasks a page is to have."""

    tenant: str
    before: int | None
    limit: int
    status: TaskStatus | None
    function: str

    def takes(self, record: TaskRecord) -> bool:
        """Whether this one is wanted."""
        return (
            self.before is None
            and record.tenant == self.tenant
            and self.status in {None, record.status}
            and self.function in {"", record.function}
        )


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
