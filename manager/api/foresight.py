"""Routes that say why something waits and what would happen: explain, plan, snapshot. They change nothing.

Handlers parse, call and encode; what is said is `manager.core`'s. What follows from a look is worked out once for each look.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from manager.api.body import batch_request, checked_json, plan_request
from manager.api.cluster import VERSION
from manager.api.exchange import Call, Disconnected, Reply
from manager.api.functions import Functions, FunctionUnavailable
from manager.api.operations import Operation
from manager.api.places import PLANS_MAX, Places
from manager.api.problems import Overloaded
from manager.api.query import parse_query
from manager.api.scaling import scaling_of
from manager.api.submissions import submission_of
from manager.api.tasks import TENANT, addressed, tenant_of
from manager.api.watch import FRESH_S, ClusterWatch
from manager.api.watch import Snapshot as Look
from manager.core.ahead import Ahead, Kept, Setup, ahead_of, kept_of, with_mix
from manager.core.errors import (
    BadRequest,
    Forbidden,
    FunctionNotFound,
    InvalidArguments,
    NotFound,
    TooLarge,
    UnsupportedMediaType,
)
from manager.core.explain import NOTHING_PENDING, Explanation, Parent, Pending, explain
from manager.core.foresee import Forecast, PlanView, When, Wish, foresee
from manager.core.ids import is_array_id
from manager.core.lifecycle import FINAL, TaskStatus
from manager.core.mix import NO_MIX, Mix
from manager.core.model import ClusterState, TaskRecord, priority_of, priority_offset
from manager.core.requests import PLAN_KINDS_MAX, KeyScope, PlanRequest
from manager.core.snapshot import Snapshot, encode_snapshot, snapshot_of
from manager.core.waiting import Place
from manager.foresight import setup_of
from manager.settings import Settings
from manager.store import Store

SHAPES_ASKED_MAX: Final = 256
"""Shapes whose tasks of a higher priority are counted one by one in the store; of others all that wait are."""
KEPT_S: Final = 5.0
KEPT_S_MAX: Final = 30.0
"""What is held and kept is worked out anew once it is older than the first, and waited for once it is older than the second."""
TURN_S: Final = 10.0
"""A plan waits this long for others to be worked out: in time for its answer, or a refusal, to reach our own client."""
_ORDER: Final = (When.NOW, When.LATER, When.AFTER_SCALE_UP, When.NEVER)
assert set(_ORDER) == set(When)

_encode = msgspec.json.Encoder().encode


class ForesightRoutes:
    """What these routes need.

    Args:
        store: the process's connection.
        settings: what decides.
        functions, watch: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, functions: Functions, watch: ClusterWatch) -> None:
        self._store = store
        self._settings = settings
        self._functions = functions
        self._watch = watch
        self._setup = setup_of(settings)
        self._mix: Mix = NO_MIX  # that is in it
        self._known: tuple[Look, Kept, Ahead] | None = None
        self._kept = Kept()
        self._kept_s = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._places = Places(PLANS_MAX)
        self._planning = asyncio.Lock()

    async def explain(self, call: Call) -> Reply:
        """Why the task is where it is."""
        task_id, tenant = addressed(call, parse_query(call.query, ("tenant",)).get("tenant"))
        record = await self._store.task(task_id)
        if record is None or record.tenant != tenant:
            raise NotFound("There is no such task.")
        look, ahead = await self._ahead()
        place = await self._place(record, look.state) if record.status is TaskStatus.QUEUED else None
        pending = await self._pending(record)
        leads = look.leader.beating is not False
        found = explain(record, ahead, self._setup_for(look), place, look.store_now_ms(), look.silent, pending, leads=leads)
        return Reply(200, _encode(found))

    async def plan(self, call: Call) -> Reply:
        """What would happen to tasks that are not submitted."""
        if not self._places.take(call.key.key_id):
            raise Overloaded("This key has as many plans at work or waiting as it may; ask again once one is answered.")
        try:
            body = await call.json_body(self._settings.api.body_bytes_max)
            tenant = tenant_of(call, parse_query(call.query, ("tenant",)).get("tenant"))
            wishes = await self._wishes(body, tenant)
            look, found = await self._foreseen(wishes, call)
        finally:
            self._places.leave(call.key.key_id)
        before = {change.group: change.need_before for change in found[0].groups}
        grown = {change.group: change.need_after for change in found[-1].groups if change.need_after > before[change.group]}
        scaling = scaling_of(look.state, grown, self._settings) if grown else ()
        when = max((forecast.when for forecast in found), key=_ORDER.index)
        return Reply(200, _encode(PlanView(when, tuple(found), scaling)))

    async def _foreseen(self, wishes: Sequence[Wish], call: Call) -> tuple[Look, list[Forecast]]:
        """The forecasts, worked out in threads, one plan at a time: they share the interpreter with all other requests.

        Raises:
            Overloaded: its turn did not come in time.
            Disconnected: nobody waits for the answer any more.
        """
        gone = asyncio.create_task(call.gone())
        try:
            async with self._turn():
                look, ahead = await self._ahead(FRESH_S)
                leads = look.leader.beating is not False
                steps = foresee(wishes, ahead, self._setup_for(look), look.silent, leads=leads)
                found: list[Forecast] = []
                while not gone.done():
                    forecast = await asyncio.to_thread(next, steps, None)
                    if forecast is None:
                        return look, found
                    found.append(forecast)
                raise Disconnected
        finally:
            gone.cancel()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TURN_S):
                await self._planning.acquire()
        except TimeoutError:
            raise Overloaded("Other plans are being worked out; ask again.") from None
        try:
            yield
        finally:
            self._planning.release()

    async def snapshot(self, call: Call) -> Reply:
        """All that a decision needs, to be replayed elsewhere."""
        parse_query(call.query, ())
        look = await self._watch.fresh()
        return Reply(200, encode_snapshot(snapshot_of(look.state, self._setup_for(look), look.silent, VERSION)))

    async def _ahead(self, age_s_max: float = KEPT_S_MAX) -> tuple[Look, Ahead]:
        """A fresh look and what follows from it.

        What is held and kept changes with the leader's rounds only, and is most of the work: for an explanation it will do as
        it was a moment ago, and is brought up to date behind the answer. In a thread, since tasks must not wait for it.
        """
        look = await self._watch.fresh()
        age_s = time.monotonic() - self._kept_s
        if age_s > age_s_max:
            await self._look_again(look)
        elif age_s > KEPT_S and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._look_again(look))
        kept, known = self._kept, self._known
        if known is None or known[0] is not look or known[1] is not kept:
            known = self._known = (look, kept, ahead_of(look.state, look.index, self._setup_for(look), kept))
        return look, known[2]

    async def _look_again(self, look: Look) -> None:
        self._kept = await asyncio.to_thread(kept_of, look.state, look.index, self._setup_for(look))
        self._kept_s = time.monotonic()

    def _setup_for(self, look: Look) -> Setup:
        """What decides, with what the scheduler has learned of requests; one `Demand` for as long as that is the same."""
        mix = look.state.mix
        if mix.revision != self._mix.revision:
            self._mix, self._setup = mix, with_mix(self._setup, mix)
        return self._setup

    async def _pending(self, record: TaskRecord) -> Pending:
        """What the task waits for where that is no queue."""
        if record.status is TaskStatus.RETRY_WAIT:
            return Pending(due_ms=await self._store.due_ms(record.task_id))
        if record.status is not TaskStatus.BLOCKED or record.spec is None:
            return NOTHING_PENDING
        found = await asyncio.gather(*map(self._parent, record.spec.after))
        return Pending(tuple(parent for parent in found if parent is not None))

    async def _parent(self, task_id: str) -> Parent | None:
        """A task or an array that has not ended."""
        row = await self._store.array(task_id) if is_array_id(task_id) else None
        if row is not None:
            left = row.count - row.succeeded - row.failed - row.cancelled
            return Parent(task_id, f"{left} of its {row.count} tasks to go") if left else None
        status = await self._store.status(task_id)
        return None if status is None or status in FINAL else Parent(task_id, status.value)

    async def _place(self, record: TaskRecord, state: ClusterState) -> Place:
        """Where the task stands: before it are those of its shape, and those of others that have a higher priority."""
        floor = priority_offset(priority_of(record.score))
        above = [q for q in state.queues if q.depth and q.head is not None and q.head < floor]
        others = [queue for queue in above if queue.shape_id != record.shape_id]
        asked, rest = others[:SHAPES_ASKED_MAX], others[SHAPES_ASKED_MAX:]
        own, *higher = await asyncio.gather(
            self._store.position(record.shape_id, record.score),
            *(self._store.position(queue.shape_id, floor) for queue in asked),
        )
        return Place(own, sum(higher) + sum(queue.depth for queue in rest))

    async def _wishes(self, body: bytes, tenant: str) -> list[Wish]:
        """What is asked about; tasks of a batch that are alike are one wish.

        Raises:
            BadRequest, FunctionNotFound, InvalidArguments, TooLarge: as a submission would.
        """
        tree = checked_json(body)
        if "tasks" in tree:
            asked = [
                (request, args, request.count or 1, f"tasks[{number}].")
                for number, (request, args) in enumerate(batch_request(body))
            ]
        else:
            one, args = plan_request(body)
            asked = [(one, args, one.count, "")]
        counts: Counter[Wish] = Counter()
        for request, args, count, within in asked:
            function = self._functions.known(request.function) or await self._functions.find(request.function)
            if args:  # a question about room need not name them
                function.check(args, f"{within}args")
            made = submission_of(request, function.published, tenant, "", self._settings, within)
            counts[Wish(made.shape, 1, made.spec.priority)] += count
        if len(counts) > PLAN_KINDS_MAX:
            raise BadRequest(
                f"tasks: they are of {len(counts)} kinds, by what they need and their priority, and one plan is of at most "
                f"{PLAN_KINDS_MAX}. Ask in several.",
                field="tasks",
            )
        return [Wish(wish.shape, count, wish.priority) for wish, count in counts.items()]

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="explain_task", method="GET", path="/v1/tasks/{task_id}/explain", access=KeyScope.READ,
                handler=self.explain, summary="Explain why a task is where it is, and what would let it run.",
                answer=Explanation, errors=(NotFound,), query=(TENANT,),
            ),
            Operation(
                name="plan", method="POST", path="/v1/plan", access=KeyScope.READ, handler=self.plan,
                summary="Tell what would happen to tasks that are not submitted: whether they fit, where, and when.",
                answer=PlanView, body=PlanRequest, query=(TENANT,),
                errors=(
                    *(BadRequest, FunctionNotFound, TooLarge, UnsupportedMediaType, InvalidArguments, FunctionUnavailable),
                    Forbidden,
                ),
            ),
            Operation(
                name="snapshot", method="GET", path="/v1/snapshot", access=KeyScope.ADMIN, handler=self.snapshot,
                summary="Get all that decides about placement at this moment, for rocyard replay.", answer=Snapshot,
            ),
        )  # fmt: skip
