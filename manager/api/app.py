"""The application: puts the parts together, and is the one place that every request passes.

`Api` is Litestar with a short way in front: the two operations that every task passes (submit; get and wait) go from path
to handler directly, all others through Litestar's router. Both ways end in `Api.answer`, so access, errors, headers and
metrics are the same. The short way saves 0.1 ms of CPU per task (docs/api.md, "What it costs").
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from prometheus_client import Counter, Histogram

from manager import metrics
from manager.api import problems
from manager.api.accept import SubmitRoutes
from manager.api.arrays import ArrayRoutes
from manager.api.auth import Authenticator
from manager.api.autoscaler import AutoscalerRoutes
from manager.api.cluster import VERSION, ClusterRoutes
from manager.api.docs_page import DocsRoutes
from manager.api.ends import Ends
from manager.api.exchange import Call, Disconnected, Receive, Reply, Scope, Send, problem_reply
from manager.api.foresight import ForesightRoutes
from manager.api.functions import REFRESH_S, Functions
from manager.api.health import HealthRoutes
from manager.api.join import JoinRoutes
from manager.api.lifecycle import LifecycleRoutes
from manager.api.old_paths import old_operations
from manager.api.openapi import document
from manager.api.operations import Operation, Public
from manager.api.results import ResultRoutes
from manager.api.targets import TargetRoutes
from manager.api.tasks import TaskRoutes
from manager.api.tenants import TenantRoutes
from manager.api.watch import LOOK_S, ClusterWatch
from manager.core.errors import BadRequest, NotFound, RocyardError, StoreUnavailable
from manager.core.ids import is_id
from manager.group_needs import pack_groups
from manager.log import get_logger
from manager.results import open_results
from manager.settings import Settings
from manager.store import Store
from manager.store.connection import StoreReplyError

IN_HAND_MAX: Final = 512
"""Requests at once, those that wait included; above, a caller is asked to come again. Probes are answered all the same: who
watches them would restart the process for being busy."""
SLOW_S: Final = 2.0
"""A request that took longer, and did not ask to wait, is logged."""
METHODS: Final = frozenset({"GET", "POST", "DELETE"})
LOOP_PAUSE_S: Final = 0.5

log = get_logger("manager.api")


class _Meter:
    """The metrics of one operation, with their labels bound."""

    __slots__ = ("_counters", "_name", "duration", "method")

    def __init__(self, operation: Operation) -> None:
        self._name = operation.path
        self.method = operation.method
        self.duration: Histogram = metrics.API_REQUEST_DURATION.labels(operation.path)
        self._counters: dict[int, Counter] = {}

    def count(self, status: int) -> None:
        counter = self._counters.get(status)
        if counter is None:
            counter = metrics.API_REQUESTS.labels(self.method, self._name, str(status))
            self._counters[status] = counter
        counter.inc()


class Api(Litestar):
    """The application, with what its routes share.

    Args:
        settings: the whole tree.
        connect: makes a store over a connection of its own, given a name for it.
    """

    def __init__(self, settings: Settings, connect: Callable[[str], Store]) -> None:
        self.settings = settings
        self.store = connect("api")
        self._events = connect("api-events")
        self.functions = Functions(self.store)
        self.watch = ClusterWatch(
            self.store,
            settings.node,
            settings.controller,
            settings.autoscaler,
            pack_groups(settings) if settings.autoscaler.mode == "active" else (),
        )
        self.ends = Ends(self.store.task, self._events)
        self.auth = Authenticator(self.store, settings.api.key_cache_s, settings.api.key)
        docs = DocsRoutes()
        health = HealthRoutes(self.store, self.watch).operations()
        current = (
            *SubmitRoutes(self.store, settings, self.functions, self.watch, self.ends).operations(),
            *TaskRoutes(self.store, settings, self.ends).operations(),
            *ResultRoutes(self.store, open_results(settings, prepare=False)).operations(),
            *ArrayRoutes(self.store).operations(),
            *ForesightRoutes(self.store, settings, self.functions, self.watch).operations(),
            *ClusterRoutes(self.store, settings, self.functions, self.watch).operations(),
            *TenantRoutes(settings, self.watch).operations(),
            *JoinRoutes(settings).operations(),
            *AutoscalerRoutes(self.store, settings).operations(),
            *LifecycleRoutes(self.store, settings, self.functions, self.watch).operations(),
            *health,
            *TargetRoutes(self.store).operations(),
            *docs.operations(),
        )
        self.operations = (*current, *old_operations(current))
        docs.document = document(self.operations, VERSION)
        self._meters = {operation.name: _Meter(operation) for operation in self.operations}
        by_name = {operation.name: operation for operation in self.operations}
        self._submit, self._get = by_name["submit_task"], by_name["get_task"]
        self._probed = frozenset(operation.path for operation in (*health, *old_operations(health)))
        self._in_hand = 0
        super().__init__(
            route_handlers=[self._route(operation) for operation in self.operations],
            lifespan=[_lifespan],
            exception_handlers={HTTPException: _unrouted, Disconnected: _gone, Exception: _unexpected},
            openapi_config=None,
            logging_config=None,
            debug=False,
        )
        refuse_undeclared(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Every event of the server comes in here."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        self._in_hand += 1
        try:
            await self._pass(scope, receive, send)
        except Disconnected:
            pass  # nobody reads an answer
        finally:
            self._in_hand -= 1

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if self._in_hand > IN_HAND_MAX and path not in self._probed:
            await refusal(problems.Overloaded(), scope, receive)(scope, receive, send)
        elif method == "POST" and path == "/v1/tasks":
            await (await self.answer(self._submit, Call(scope, receive)))(scope, receive, send)
        elif method == "GET" and path.startswith("/v1/tasks/") and is_id(path[10:]):
            call = Call(scope, receive, {"task_id": path[10:]})
            await (await self.answer(self._get, call))(scope, receive, send)
        else:
            if method == "OPTIONS":
                scope["method"] = "NONE"  # Litestar would answer it without asking for a key: no route has this method
            await super().__call__(scope, receive, send)

    async def answer(self, operation: Operation, call: Call) -> Reply:
        """The answer of `operation`, whatever happens.

        Raises:
            Disconnected: nobody waits for it any more.
        """
        began = time.perf_counter()
        try:
            if not isinstance(operation.access, Public):
                call.key = await self.auth.key(call.authorization, operation.access)
            reply = await operation.handler(call)
        except RocyardError as error:
            reply = problem_reply(error, call.path)
        except StoreReplyError as error:
            log.error("the store refused a call", operation=operation.name, error=str(error))
            reply = problem_reply(StoreUnavailable("The store refused the call; the API's log says why."), call.path)
        except Disconnected:
            raise
        except Exception:  # the top of every request
            log.exception("a request failed", operation=operation.name, request_id=call.request_id.decode())
            reply = problem_reply(problems.InternalError(), call.path)
        reply.request_id = call.request_id
        took_s = time.perf_counter() - began
        meter = self._meters[operation.name]
        meter.count(reply.status)
        meter.duration.observe(took_s)
        if reply.status >= 500 or (took_s > SLOW_S and b"wait=" not in call.query):
            log.warning(
                "request",
                operation=operation.name,
                status=reply.status,
                duration_s=round(took_s, 4),
                request_id=call.request_id.decode(),
            )
        return reply

    def _route(self, operation: Operation) -> HTTPRouteHandler:
        async def handle(request: Request[Any, Any, Any]) -> Reply:
            params: Mapping[str, str] = request.scope["path_params"]
            return await self.answer(operation, Call(request.scope, request.receive, params))

        path = operation.path.replace("}", ":str}")
        return HTTPRouteHandler(
            path, http_method=operation.method, name=operation.name, opt={"operation": operation}, status_code=200
        )(handle)

    async def run_loops(self) -> None:
        """What goes on beside requests, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_forever("functions", self.functions.refresh, REFRESH_S))
            group.create_task(_forever("watch", self.watch.look, LOOK_S))
            group.create_task(_forever("events", self.ends.follow, LOOP_PAUSE_S))
            group.create_task(_forever("waiters", self.ends.sweep, LOOP_PAUSE_S))

    async def close(self) -> None:
        """Close the connections."""
        await self.store.connection.close()
        await self._events.connection.close()


def create_app(settings: Settings, connect: Callable[[str], Store]) -> Api:
    """The application.

    Args:
        settings: the whole tree.
        connect: makes a store over a connection of its own, given a name for it. Nothing is connected yet.
    """
    return Api(settings, connect)


def refuse_undeclared(app: Litestar) -> None:
    """Fail the start if any handler was not made from an operation: such a one would check no key."""
    for route in app.routes:
        for handler in getattr(route, "route_handlers", [getattr(route, "route_handler", None)]):
            automatic = getattr(handler, "http_methods", set()) == {"OPTIONS"}  # never reached: see METHODS
            assert automatic or isinstance(handler.opt.get("operation"), Operation), f"{route.path} declares no access"


@asynccontextmanager
async def _lifespan(app: Litestar) -> AsyncIterator[None]:
    assert isinstance(app, Api)
    loops = asyncio.create_task(app.run_loops())
    try:
        yield
    finally:
        loops.cancel()
        await asyncio.gather(loops, return_exceptions=True)
        await app.close()


async def _forever(name: str, step: Callable[[], Awaitable[object]], pause_s: float) -> None:
    """Call `step` again and again; what goes wrong is logged once, counted, and tried again."""
    failing = False
    while True:
        try:
            await step()
            if failing:
                log.info("a loop works again", loop=name)
            failing = False
        except Exception as error:  # the top of a loop
            metrics.LOOP_ERRORS.labels(name).inc()
            if not failing:
                log.warning("a loop fails", loop=name, error=str(error), exc_info=not isinstance(error, StoreUnavailable))
            failing = True
        await asyncio.sleep(pause_s)


def refusal(error: RocyardError, scope: Scope, receive: Receive) -> Reply:
    """The answer to a request that reaches no operation."""
    reply = problem_reply(error, scope["path"])
    reply.request_id = Call(scope, receive).request_id
    metrics.API_REQUESTS.labels(metrics.one_of(scope["method"], METHODS), metrics.OTHER, str(error.status)).inc()
    return reply


def _problem_response(error: RocyardError, request: Request[Any, Any, Any]) -> Response[bytes]:
    reply = refusal(error, request.scope, request.receive)
    response = Response(content=reply.body, status_code=reply.status, media_type=problems.PROBLEM_JSON.decode())
    for name, value in reply.all_headers():
        response.headers[name.decode()] = value.decode()
    return response


def _unrouted(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """What Litestar's router refuses."""
    match error.status_code:
        case 404:
            found: RocyardError = NotFound("There is no such path; see /docs.")
        case 405:
            found = problems.MethodNotAllowed()
        case _:
            found = BadRequest(str(error.detail)[:200])
    response = _problem_response(found, request)
    if allow := (error.headers or {}).get("allow"):
        response.headers["allow"] = ", ".join(sorted(set(allow.split(", ")) & METHODS))
    return response


def _gone(_request: Request[Any, Any, Any], _error: Disconnected) -> Response[bytes]:
    """Nobody reads this; Litestar wants an answer."""
    return Response(content=b"", status_code=400, media_type="text/plain")


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """What nobody foresaw, outside of `Api.answer`."""
    log.error("a request failed before its operation", path=request.scope["path"][:200], exc_info=error)
    return _problem_response(problems.InternalError(), request)
