"""The route about tenants: what each has at work, may have and has had. For admins."""

import msgspec

from manager.api.exchange import Call, Reply
from manager.api.operations import Operation
from manager.api.query import parse_query
from manager.api.watch import ClusterWatch
from manager.core.answers_tenants import TenantList, TenantView
from manager.core.model import TenantRow
from manager.core.requests import KeyScope
from manager.leader_shares import tenant_settings
from manager.settings import Settings

_encode = msgspec.json.Encoder().encode


class TenantRoutes:
    """What the route needs.

    Args:
        settings: the limits of tenants.
        watch: what the process knows of the cluster.
    """

    def __init__(self, settings: Settings, watch: ClusterWatch) -> None:
        self._settings = settings
        self._watch = watch

    async def tenants(self, call: Call) -> Reply:
        """Tenants with unfinished tasks, and those that the settings name."""
        parse_query(call.query, ())
        state = (await self._watch.fresh()).state
        rows = {name: TenantRow(tenant=name) for name in self._settings.tenants}
        rows |= {row.tenant: row for row in state.tenants}
        waiting: dict[str, int] = {}
        for queue in state.queues:
            waiting[queue.shape.tenant] = waiting.get(queue.shape.tenant, 0) + queue.depth
        views = [self._view(row, waiting.get(name, 0)) for name, row in sorted(rows.items())]
        return Reply(200, _encode(TenantList(tuple(views))))

    def _view(self, row: TenantRow, waiting: int) -> TenantView:
        limits = tenant_settings(self._settings, row.tenant)
        return TenantView(
            tenant=row.tenant,
            tasks_active=row.active,
            tasks_waiting=waiting,
            tasks_running=row.running,
            gpus=row.gpus,
            memory_bytes=row.memory_bytes,
            active_tasks_max=limits.active_tasks_max,
            running_tasks_max=limits.running_tasks_max or None,
            gpus_max=limits.gpus_max or None,
            memory_bytes_max=limits.memory_bytes_max or None,
            weight=limits.weight,
            device_seconds=row.vtime_s,
        )

    def operations(self) -> tuple[Operation, ...]:
        """The route."""
        return (
            Operation(
                name="list_tenants", method="GET", path="/v1/tenants", access=KeyScope.ADMIN, handler=self.tenants,
                summary="List what tenants have at work, may have and have had.", answer=TenantList,
            ),
        )  # fmt: skip
