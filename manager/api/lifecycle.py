"""Routes for who runs the cluster: what a node may take on, and which slots are kept open or closed ahead of need.

Every action is one call of the store's functions and one line in the log that names the key. What follows (flags, victims,
the end of an agent) is the leader's and the agents'.
"""

from typing import Final

import msgspec

from manager.api import views
from manager.api.body import near, plain_request
from manager.api.exchange import Call, Reply
from manager.api.functions import Functions
from manager.api.operations import Operation, Parameter
from manager.api.query import parse_query
from manager.api.submissions import refuse_infeasible, shape_for
from manager.api.tasks import tenant_of
from manager.api.watch import ClusterWatch
from manager.core.answers import utc
from manager.core.answers_nodes import WorkerView
from manager.core.answers_slots import Unloaded, WarmView
from manager.core.errors import (
    BadRequest,
    FunctionNotFound,
    Infeasible,
    NotFound,
    QuotaExceeded,
    TooLarge,
    UnsupportedMediaType,
)
from manager.core.lifecycle import Cordon, SlotKind, SlotStatus
from manager.core.quantities import format_duration, parse_duration
from manager.core.requests import DrainRequest, KeyScope, UnloadRequest, WarmRequest
from manager.log import get_logger
from manager.settings import Settings
from manager.store import Store

DEADLINE_S_MAX: Final = 30 * 86_400.0
"""A drain that may take longer has no deadline."""
WARM_S_MAX: Final = 7 * 86_400.0
"""Who wants slots for longer asks again: they hold memory, and somebody should still want that."""
BY: Final = "operator"

_TENANT: Final = Parameter("tenant", "Another tenant's; only for admin keys.")
_DEADLINE: Final = Parameter(
    "deadline", "What still runs after this goes back to the queue, such as 5m; left out: it is waited for."
)
_encode = msgspec.json.Encoder().encode

log = get_logger("manager.api")


class LifecycleRoutes:
    """What these routes need.

    Args:
        store: the process's connection.
        settings: limits.
        functions, watch: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, functions: Functions, watch: ClusterWatch) -> None:
        self._store = store
        self._settings = settings
        self._functions = functions
        self._watch = watch

    # --- nodes --------------------------------------------------------------------------------------------------

    async def worker(self, call: Call) -> Reply:
        """One node."""
        parse_query(call.query, ())
        return Reply(200, _encode(await self._view(call.params["node"])))

    async def cordon(self, call: Call) -> Reply:
        """Nothing new on this node."""
        parse_query(call.query, ())
        return await self._change(call, "cordon", Cordon.CORDON)

    async def uncordon(self, call: Call) -> Reply:
        """It takes on work again."""
        parse_query(call.query, ())
        return await self._change(call, "uncordon", Cordon.NONE)

    async def drain(self, call: Call) -> Reply:
        """Nothing new, and what is open ends."""
        parse_query(call.query, ())
        wanted = DrainRequest()
        if call.has_body:
            wanted = plain_request(await call.json_body(self._settings.api.body_bytes_max), DrainRequest)
        return await self._change(call, "drain", Cordon.DRAIN, _deadline_s(wanted.deadline), remove=wanted.remove)

    async def remove(self, call: Call) -> Reply:
        """Drained, and then gone for good."""
        deadline = parse_query(call.query, ("deadline",)).get("deadline")
        return await self._change(call, "remove", Cordon.DRAIN, _deadline_s(deadline), remove=True)

    async def _change(
        self, call: Call, action: str, mode: Cordon, deadline_s: float | None = None, *, remove: bool = False
    ) -> Reply:
        node = call.params["node"]
        before = await self._view(node)
        if await self._store.cordon(node, mode, BY, deadline_s, remove=remove) == "NONE":
            raise NotFound(f"Node {node[:80]!r} is gone.")
        _audit(call, action, node=node, deadline_s=deadline_s, remove=remove)
        await self._watch.look()  # may be one that had begun before
        after = views.worker(await self._watch.look(), node)
        return Reply(202 if remove else 200, _encode(after or before))

    async def _view(self, node: str) -> WorkerView:
        snapshot = await self._watch.fresh()
        found = views.worker(snapshot, node)
        if found is None:
            known = [view.node for view in views.workers(snapshot)]
            hint = near(node, known) or (f" Known: {', '.join(known[:50])}." if known else " None has registered yet.")
            raise NotFound(f"There is no node {node[:80]!r}.{hint}")
        return found

    # --- slots --------------------------------------------------------------------------------------------------

    async def warm(self, call: Call) -> Reply:
        """Open slots ahead of need."""
        tenant = tenant_of(call, parse_query(call.query, ("tenant",)).get("tenant"))
        wanted = plain_request(await call.json_body(self._settings.api.body_bytes_max), WarmRequest)
        function = None if wanted.function is None else (await self._functions.find(wanted.function)).published
        shape, identity, resources = shape_for(wanted.resources, function, tenant)
        seconds = _seconds("for", wanted.for_, WARM_S_MAX)
        if wanted.slots and not seconds:
            raise BadRequest("for: must be more than 0, such as '10m'; to end it early, ask for 0 slots.", field="for")
        snapshot = await self._watch.fresh()
        refuse_infeasible(shape, resources, snapshot.capacity)
        most = min(
            self._settings.slots.slots_per_shape_max,
            self._settings.tenants.get(tenant, self._settings.tenant).active_tasks_max,
        )
        if wanted.slots > most:
            raise QuotaExceeded(
                f"slots: {wanted.slots} are more than {tenant} could use: at most {most} (slots.slots_per_shape_max, "
                "tenant.active_tasks_max).",
                slots_max=most,
            )
        await self._store.warm(identity, shape, wanted.slots, seconds)
        _audit(call, "warm", of=tenant, shape=identity, slots=wanted.slots, seconds=seconds)
        until = utc(snapshot.store_now_ms() + int(seconds * 1000))
        return Reply(200, _encode(WarmView(identity, shape.memory_bytes, shape.gpus, wanted.slots, until)))

    async def unload(self, call: Call) -> Reply:
        """Close idle slots."""
        tenant = tenant_of(call, parse_query(call.query, ("tenant",)).get("tenant"))
        wanted = plain_request(await call.json_body(self._settings.api.body_bytes_max), UnloadRequest)
        named = wanted.function is not None or wanted.resources.memory is not None
        if wanted.all == named:
            raise BadRequest("Name a function, or resources.memory, or say '\"all\": true', and not both.", field="all")
        state = (await self._watch.fresh()).state
        if wanted.all:
            shapes = [queue.shape_id for queue in state.queues if queue.shape.tenant == tenant]
        else:
            function = None if wanted.function is None else (await self._functions.find(wanted.function)).published
            shapes = [shape_for(wanted.resources, function, tenant)[1]]
        idle = [
            slot
            for slot in state.slots
            if slot.kind is SlotKind.TASKS
            and slot.status is SlotStatus.OPEN
            and slot.idle_ms is not None
            and slot.shape_id in shapes
        ]
        if shapes:
            await self._store.unload(shapes)
        _audit(call, "unload", of=tenant, shapes=shapes, slots=len(idle))
        return Reply(200, _encode(Unloaded(len(shapes), len(idle))))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        one = "/v1/workers/{node}"
        body_errors = (BadRequest, TooLarge, UnsupportedMediaType)
        return (
            Operation(
                name="get_worker", method="GET", path=one, access=KeyScope.READ, handler=self.worker,
                summary="Get one node with its devices.", answer=WorkerView, errors=(NotFound,),
            ),
            Operation(
                name="cordon_worker", method="POST", path=f"{one}/cordon", access=KeyScope.ADMIN, handler=self.cordon,
                summary="Have nothing new placed on a node; what is open there goes on.", answer=WorkerView,
                errors=(NotFound,),
            ),
            Operation(
                name="uncordon_worker", method="POST", path=f"{one}/uncordon", access=KeyScope.ADMIN,
                handler=self.uncordon, summary="Have a node take on work again.", answer=WorkerView, errors=(NotFound,),
            ),
            Operation(
                name="drain_worker", method="POST", path=f"{one}/drain", access=KeyScope.ADMIN, handler=self.drain,
                summary="Empty a node: nothing new, and its slots end at their next task boundary.", answer=WorkerView,
                body=DrainRequest, errors=(NotFound, *body_errors),
            ),
            Operation(
                name="remove_worker", method="DELETE", path=one, access=KeyScope.ADMIN, handler=self.remove, status=202,
                summary="Drain a node and have its agent end, for good.", answer=WorkerView, query=(_DEADLINE,),
                errors=(NotFound,),
            ),
            Operation(
                name="warm_slots", method="POST", path="/v1/slots/warm", access=KeyScope.USER, handler=self.warm,
                summary="Keep slots open for a while although nothing waits for them.", answer=WarmView, body=WarmRequest,
                query=(_TENANT,), errors=(FunctionNotFound, Infeasible, QuotaExceeded, *body_errors),
            ),
            Operation(
                name="unload_slots", method="POST", path="/v1/slots/unload", access=KeyScope.USER, handler=self.unload,
                summary="Close idle slots now, and with them what they have loaded.", answer=Unloaded, body=UnloadRequest,
                query=(_TENANT,), errors=(FunctionNotFound, *body_errors),
            ),
        )  # fmt: skip


def _audit(call: Call, action: str, **what: object) -> None:
    """Who did what to the cluster."""
    key = call.key
    log.info("audit", action=action, key=key.key_id, tenant=key.tenant, request_id=call.request_id.decode(), **what)


def _deadline_s(asked: float | str | None) -> float | None:
    return None if asked is None else _seconds("deadline", asked, DEADLINE_S_MAX)


def _seconds(field: str, asked: float | str, most_s: float) -> float:
    """A duration.

    Raises:
        BadRequest: none, or too long.
    """
    try:
        seconds = parse_duration(asked)
    except ValueError as error:
        raise BadRequest(f"{field}: {error}.", field=field) from None
    if seconds > most_s:
        raise BadRequest(f"{field}: {format_duration(seconds)} is over the limit of {format_duration(most_s)}.", field=field)
    return seconds
