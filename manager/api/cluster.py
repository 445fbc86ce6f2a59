"""Routes about the cluster: functions, workers, status, keys."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

import msgspec

from manager import keys
from manager.api import views
from manager.api.body import key_request
from manager.api.exchange import Call, Reply
from manager.api.functions import Functions
from manager.api.operations import Operation
from manager.api.query import parse_query
from manager.api.watch import ClusterWatch
from manager.core.answers import resources_view, utc, utc_or_none
from manager.core.answers_cluster import ClusterView, StoreView
from manager.core.answers_functions import FunctionList, FunctionView
from manager.core.answers_nodes import WorkerList
from manager.core.answers_tenants import KeyCreated, KeyList, KeyView
from manager.core.errors import BadRequest, NotFound, TooLarge, UnsupportedMediaType
from manager.core.functions import PublishedFunction
from manager.core.requests import KeyRequest, KeyScope
from manager.settings import Settings
from manager.store import Store

_encode = msgspec.json.Encoder().encode


def product_version() -> str:
    """The version of the installed distribution; empty where it runs from a tree that is not installed."""
    try:
        return version("rocyard")
    except PackageNotFoundError:
        return ""


VERSION: Final = product_version()


class ClusterRoutes:
    """What these routes need.

    Args:
        store: the process's connection.
        settings: defaults of functions.
        functions, watch: what the process knows.
    """

    def __init__(self, store: Store, settings: Settings, functions: Functions, watch: ClusterWatch) -> None:
        self._store = store
        self._settings = settings
        self._functions = functions
        self._watch = watch

    async def functions(self, call: Call) -> Reply:
        """What tasks may name."""
        parse_query(call.query, ())
        await self._functions.refresh()
        return Reply(200, _encode(FunctionList(tuple(self._function(f) for f in self._functions.all()))))

    def _function(self, found: PublishedFunction) -> FunctionView:
        default_s = self._settings.tasks.time_limit_s
        return FunctionView(
            name=found.name,
            description=found.doc,
            memory_bytes=found.memory_bytes,
            gpus=found.gpus,
            resources=resources_view(found.needs),
            time_limit_s=default_s if found.time_limit_s is None else found.time_limit_s,
            schema=msgspec.Raw(b"null") if found.error else found.schema,
            problem=found.error,
        )

    async def workers(self, call: Call) -> Reply:
        """Nodes with their devices."""
        parse_query(call.query, ())
        return Reply(200, _encode(WorkerList(views.workers(await self._watch.fresh()))))

    async def status(self, call: Call) -> Reply:
        """The cluster at one moment."""
        parse_query(call.query, ())
        snapshot = await self._watch.fresh()
        tenant = None if call.key.may(KeyScope.ADMIN) else call.key.tenant
        depth = sum(queue.depth for queue in snapshot.state.queues)
        view = ClusterView(
            at=utc(snapshot.store_now_ms()),
            cluster_id=await self._store.identity(),
            version=VERSION,
            problems=views.problems(snapshot, depth),
            tasks=views.task_counts(await self._store.counts()),
            queues=views.queues(snapshot, tenant),
            slots=views.slots(snapshot, tenant),
            workers=views.workers(snapshot),
            leader=snapshot.leader,
            store=StoreView(True, snapshot.fsync),
            services=views.services(await self._store.services()),
            dependencies=snapshot.dependencies,
            groups=views.groups(snapshot, self._settings.groups),
        )
        return Reply(200, _encode(view))

    async def create_key(self, call: Call) -> Reply:
        """Make a key; its text is in this answer and nowhere else."""
        parse_query(call.query, ())
        request = key_request(await call.json_body(self._settings.api.body_bytes_max))
        text, record = await keys.create_key(self._store, request.tenant, request.scope)
        created = KeyCreated(
            key_id=record.key_id,
            tenant=record.tenant,
            scope=record.scope,
            created_at=utc(record.created_ms),
            revoked_at=utc_or_none(record.revoked_ms),
            key=text,
        )
        return Reply(201, _encode(created))

    async def list_keys(self, call: Call) -> Reply:
        """All keys, without their secrets."""
        parse_query(call.query, ())
        return Reply(200, _encode(KeyList(tuple(keys.view_of(record) for record in await keys.list_keys(self._store)))))

    async def revoke_key(self, call: Call) -> Reply:
        """Revoke a key."""
        parse_query(call.query, ())
        return Reply(200, _encode(keys.view_of(await keys.revoke_key(self._store, call.params["key_id"]))))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="list_functions", method="GET", path="/v1/functions", access=KeyScope.READ,
                handler=self.functions, summary="List what tasks may name, with the schemas of arguments.",
                answer=FunctionList,
            ),
            Operation(
                name="list_workers", method="GET", path="/v1/workers", access=KeyScope.READ, handler=self.workers,
                summary="List nodes with their devices and how full these are.", answer=WorkerList,
            ),
            Operation(
                name="cluster_status", method="GET", path="/v1/cluster/status", access=KeyScope.READ,
                handler=self.status, summary="Show the cluster at one moment, and what is wrong.", answer=ClusterView,
            ),
            Operation(
                name="create_key", method="POST", path="/v1/keys", access=KeyScope.ADMIN, handler=self.create_key,
                summary="Make an API key. Its text is shown this once.", status=201, answer=KeyCreated,
                body=KeyRequest, errors=(BadRequest, TooLarge, UnsupportedMediaType),
            ),
            Operation(
                name="list_keys", method="GET", path="/v1/keys", access=KeyScope.ADMIN, handler=self.list_keys,
                summary="List API keys, without their secrets.", answer=KeyList,
            ),
            Operation(
                name="revoke_key", method="DELETE", path="/v1/keys/{key_id}", access=KeyScope.ADMIN,
                handler=self.revoke_key, summary="Revoke an API key: it is refused everywhere within seconds.",
                answer=KeyView, errors=(NotFound, keys.LastAdminKey),
            ),
        )  # fmt: skip
