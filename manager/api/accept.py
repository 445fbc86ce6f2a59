"""Routes that accept tasks: one, an array, a batch. What they pass to the store is `manager.api.submissions`'.

A request that comes again, under the same key or the same name, is answered with what it was accepted as, even where it would
be refused by now. Handlers parse, call and encode.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from manager.api.body import batch_request, task_request
from manager.api.ends import Ends
from manager.api.exchange import Call, Reply
from manager.api.functions import Functions, FunctionUnavailable
from manager.api.operations import Header, Operation
from manager.api.query import parse_query
from manager.api.submissions import (
    digest_of,
    idempotency_key,
    parents_of,
    refuse_in_batch,
    refuse_infeasible,
    refuse_late,
    refuse_tangled,
    submission_of,
)
from manager.api.watch import ClusterWatch
from manager.core.answers_tasks import Accepted, BatchAccepted
from manager.core.errors import (
    BadRequest,
    DeadlinePassed,
    FunctionNotFound,
    IdempotencyConflict,
    Infeasible,
    InvalidArguments,
    NameTaken,
    QuotaExceeded,
    RocyardError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
    UnknownDependency,
    UnsupportedMediaType,
)
from manager.core.ids import array_id, new_id
from manager.core.model import IdempotencyKey, Submission, SubmitReply
from manager.core.requests import BatchRequest, KeyScope, TaskRequest
from manager.settings import Settings
from manager.store import Store
from manager.store.calls import IDS_MAX

IDEMPOTENCY_KEY: Final = Header(
    "Idempotency-Key",
    "1 to 255 printable ASCII characters. The same key with the same body, within a day, is the same submission again: nothing "
    "new is accepted, and the answer says `replayed`. With another body it is refused.",
)
REPLAYED: Final = (b"idempotency-replayed", b"true")
_NO_NAME: Final = ("", "")

_encode = msgspec.json.Encoder().encode


class _Asked(msgspec.Struct, frozen=True):
    """A task or an array that is asked for: with its arguments as plain values, and its digest where something names it."""

    request: TaskRequest
    args: dict[str, object]
    task_id: str
    digest: str


class SubmitRoutes:
    """What the routes of submission need.

    Args:
        store: the process's connection.
        settings: limits.
        functions, watch, ends: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, functions: Functions, watch: ClusterWatch, ends: Ends) -> None:
        self._store = store
        self._settings = settings
        self._functions = functions
        self._watch = watch
        self._ends = ends

    async def submit(self, call: Call) -> Reply:
        """Accept one task. This is half of the hot path: what can be known beforehand is."""
        body = await call.json_body(self._settings.api.body_bytes_max)
        parse_query(call.query, ())
        request, args = task_request(body)
        given = call.idempotency_key
        digest = digest_of(json.loads(body)) if given is not None or request.name is not None else ""
        task_id = new_id() if request.count is None else array_id()
        key = None if given is None else idempotency_key(given, digest)
        reply = await self._accept(call.key.tenant, [_Asked(request, args, task_id, digest)], key)
        if request.count is not None:
            return await self._array_accepted(reply, request.count)
        task_id, status = reply.tasks[0]
        where = (b"location", b"/v1/tasks/" + task_id.encode())
        if reply.replayed:
            return Reply(202, _encode(Accepted(task_id, status, replayed=True)), [where, REPLAYED])
        assert status is not None  # it is new
        return Reply(202, b'{"task_id":"%b","status":"%b"}' % (task_id.encode(), status.encode()), [where])

    async def _array_accepted(self, reply: SubmitReply, count: int) -> Reply:
        """The answer for an array, once its tasks have their records; what the store does not do now, the controller does."""
        task_id, status = reply.tasks[0]
        with contextlib.suppress(StoreUnavailable, StoreFull):
            for _ in range(0, count, IDS_MAX):
                if reply.replayed or not await self._store.expand():
                    break
        headers = [(b"location", b"/v1/arrays/" + task_id.encode()), *([REPLAYED] if reply.replayed else [])]
        return Reply(202, _encode(Accepted(task_id, status, count, reply.replayed)), headers)

    async def submit_batch(self, call: Call) -> Reply:
        """Accept tasks, all or none."""
        body = await call.json_body(self._settings.api.body_bytes_max)
        parse_query(call.query, ())
        given = call.idempotency_key
        found = batch_request(body)
        refuse_in_batch([request for request, _ in found])
        named = any(request.name is not None for request, _ in found)
        tree = json.loads(body) if named or given is not None else {}
        asked = [
            _Asked(request, args, new_id(), digest_of(tree["tasks"][number]) if request.name is not None else "")
            for number, (request, args) in enumerate(found)
        ]
        key = None if given is None else idempotency_key(given, digest_of(tree))
        reply = await self._accept(call.key.tenant, asked, key, batch=True)
        again = reply.replayed
        accepted = tuple(Accepted(task_id, status, replayed=again) for task_id, status in reply.tasks)
        return Reply(202, _encode(BatchAccepted(accepted, again)), [REPLAYED] if again else None)

    async def _accept(
        self, tenant: str, asked: Sequence[_Asked], key: IdempotencyKey | None, *, batch: bool = False
    ) -> SubmitReply:
        """Hand them to the store. What would be refused now may have been accepted before, under the same key or names."""
        try:
            submissions = await self._checked(tenant, asked, batch=batch)
            return await self._submit(tenant, submissions, key)
        except (StoreUnavailable, QuotaExceeded, IdempotencyConflict, NameTaken):
            raise  # the store cannot tell, or has told
        except RocyardError:
            named = [(one.request.name, one.digest) if one.request.name is not None else _NO_NAME for one in asked]
            if key is None and not any(name for name, _ in named):
                raise
            known = await self._store.known(tenant, key, named)
            if known is None:
                raise
            return known

    async def _checked(self, tenant: str, asked: Sequence[_Asked], *, batch: bool) -> list[Submission]:
        """What the store takes, if none of it would be refused.

        Raises:
            RocyardError: says what is wrong, and in which task.
        """
        made: list[Submission] = []
        links = 0
        for number, one in enumerate(asked):
            request = one.request
            within = f"tasks[{number}]." if batch else ""
            function = self._functions.known(request.function) or await self._functions.find(request.function)
            if request.count is None:
                function.check(one.args, f"{within}args")
            else:
                function.check_array(one.args, "args", request.index_as, request.count)
            after: tuple[str, ...] = ()
            if request.after:
                before = [one.task_id for one in asked[:number]] if batch else None
                after = parents_of(request, before, within)
                links += len(after) * (request.count or 1)
            submission = submission_of(
                request, function.published, tenant, one.task_id, self._settings, within, after, one.digest
            )
            self._refuse_hopeless(request, submission, within)
            made.append(submission)
        refuse_tangled(links, "tasks" if batch else "after")
        return made

    def _refuse_hopeless(self, request: TaskRequest, submission: Submission, within: str) -> None:
        """Refuse what no device could ever hold, and what should have ended already.

        Raises:
            Infeasible, DeadlinePassed, BadRequest: says where.
        """
        snapshot = self._watch.snapshot
        if snapshot is not None and not request.allow_infeasible:
            refuse_infeasible(submission.shape, submission.spec.resources, snapshot.capacity, within)
        if request.deadline is not None:
            now_ms = time.time_ns() // 1_000_000 if snapshot is None else snapshot.store_now_ms()
            refuse_late(submission.spec, now_ms, within)

    async def _submit(self, tenant: str, submissions: Sequence[Submission], key: IdempotencyKey | None) -> SubmitReply:
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

    def _forget(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            self._ends.forget(submission.task_id)

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        submit_errors = (
            *(BadRequest, FunctionNotFound, TooLarge, UnsupportedMediaType, InvalidArguments, Infeasible),
            *(FunctionUnavailable, QuotaExceeded, StoreFull),
            *(IdempotencyConflict, NameTaken, UnknownDependency, DeadlinePassed),
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
        )  # fmt: skip
