"""What the leading controller keeps of tenants: their virtual times, their quotas in the store, and the ageing of what waits.

How shares are measured is `manager.core.shares`'; where quotas are checked, the store's functions. A leader that follows takes
the virtual times over from the store, as they were a moment ago.
"""

import time
from typing import Final

import msgspec

from manager.core.model import ClusterState, TenantRow
from manager.core.shares import accounted
from manager.settings import Settings, TenantSettings
from manager.store import Store
from manager.store.calls_leader import Retention

WRITE_S: Final = 1.0
"""Virtual times are written so often at most: what was had within this time is forgotten when the leader changes."""
AGE_PAUSE_S: Final = 1.0
AGE_STEPS: Final = 20
"""Looks for what is old enough, in the time in which something gets so old."""


class LeaderShares:
    """Tenants, as the leader sees them.

    Args:
        settings: with their limits and weights.
        store: to which these and the virtual times are written.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._tenants: dict[str, float] = {}
        self._shapes: dict[str, float] = {}
        self._told: dict[str, TenantRow] = {}
        self._wrote_s = float("-inf")
        self._aged_s = float("-inf")

    def forget(self) -> None:
        """Another one leads, or none: what is known here is of the past."""
        self._tenants, self._shapes, self._told = {}, {}, {}
        self._wrote_s = float("-inf")

    def account(self, state: ClusterState, elapsed_s: float) -> ClusterState:
        """`state` with each tenant's limits as they are set, and the virtual times after so many seconds more."""
        rows = {row.tenant: row for row in state.tenants}
        for queue in state.queues:
            rows.setdefault(queue.shape.tenant, TenantRow(tenant=queue.shape.tenant))
        limited = tuple(self._limited(row) for row in rows.values())
        state = accounted(msgspec.structs.replace(state, tenants=limited), self._tenants, self._shapes, elapsed_s)
        self._tenants = {row.tenant: row.vtime_s or 0.0 for row in state.tenants}
        self._shapes = {queue.shape_id: queue.vtime_s or 0.0 for queue in state.queues}
        return state

    def _limited(self, row: TenantRow) -> TenantRow:
        limits = tenant_settings(self._settings, row.tenant)
        return msgspec.structs.replace(
            row,
            gpus_max=limits.gpus_max or None,
            memory_bytes_max=limits.memory_bytes_max or None,
            running_max=limits.running_tasks_max or None,
            weight=limits.weight,
            retries_per_minute_max=limits.retries_per_minute_max or None,
        )

    async def tell(self, token: int, state: ClusterState) -> None:
        """Write down limits that the store does not have yet, at once, and virtual times every now and then."""
        limits = {row.tenant: _limits_of(row) for row in state.tenants}
        now_s = time.monotonic()
        if now_s - self._wrote_s < WRITE_S and limits.items() <= self._told.items():
            return
        if await self._store.share(token, state.tenants, [(queue.shape_id, queue.vtime_s or 0.0) for queue in state.queues]):
            self._told, self._wrote_s = limits, now_s

    async def age(self, token: int, state: ClusterState) -> int:
        """Have tasks rise that have waited for long; how many have."""
        seconds = self._settings.tasks.ageing_s
        now_s = time.monotonic()
        waiting = [queue.shape_id for queue in state.queues if queue.depth]
        if not seconds or not waiting or now_s - self._aged_s < max(AGE_PAUSE_S, seconds / AGE_STEPS):
            return 0
        self._aged_s = now_s
        return await self._store.age(token, seconds, waiting) or 0


def tenant_settings(settings: Settings, tenant: str) -> TenantSettings:
    """What is set for a tenant."""
    return settings.tenants.get(tenant, settings.tenant)


def retention_of(settings: Settings, now_ms: int) -> tuple[Retention, dict[str, Retention]]:
    """Which finished tasks are forgotten: of tenants in general, and of those that have limits of their own."""
    tasks = settings.tasks

    def of(limits: TenantSettings) -> Retention:
        seconds = limits.retention_s or tasks.retention_s
        return Retention(now_ms - int(seconds * 1000), limits.retained_max or tasks.retained_max)

    return of(settings.tenant), {name: of(limits) for name, limits in settings.tenants.items()}


def _limits_of(row: TenantRow) -> TenantRow:
    """The part of a row that people set."""
    return TenantRow(
        tenant=row.tenant,
        gpus_max=row.gpus_max,
        memory_bytes_max=row.memory_bytes_max,
        running_max=row.running_max,
        weight=row.weight,
        retries_per_minute_max=row.retries_per_minute_max,
    )
