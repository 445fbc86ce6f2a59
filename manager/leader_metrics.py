"""What the leading controller alone can say about the whole cluster, as metrics. Who stops leading says nothing any more."""

from collections.abc import Callable
from typing import Final

from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState, NodeRow, TenantRow
from manager.metrics import NODES, QUEUE_OLDEST_WAIT, STORE_UNSYNCED, TENANT_GPUS, TENANT_MEMORY, TENANT_TASKS

NODE_STATES: Final = ("live", "cordoned", "draining", "no_worker", "silent", "lost")
"""Each node counts under the last of these that holds for it."""


def node_state(row: NodeRow, *, silent: bool) -> str:
    """How a node that has not left is doing, as the label of `rocyard_nodes` says it."""
    if row.fenced:
        return "lost"
    if silent:
        return "silent"
    if not row.address:
        return "no_worker"
    match row.cordon:
        case Cordon.NONE:
            return "live"
        case Cordon.CORDON:
            return "cordoned"
        case Cordon.DRAIN:
            return "draining"


TENANTS_SHOWN_MAX: Final = 100
"""Tenants with a label of their own, the busiest; the others are summed. Bounds what a monitoring system has to keep."""


class LeaderMetrics:
    """Shows the state that a round has looked at.

    Args:
        lease_s: a node is called silent once it has not beaten for half of this.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._tenants: set[str] = set()

    def show(self, state: ClusterState, silent_s: Callable[[NodeRow], float]) -> None:
        """Set every gauge to what is.

        Args:
            state: as the store has it.
            silent_s: for how long a node's beat has not changed.
        """
        counts = dict.fromkeys(NODE_STATES, 0)
        for row in state.nodes:
            if not row.left:
                counts[node_state(row, silent=silent_s(row) >= self.lease_s / 2)] += 1
        for name, count in counts.items():
            NODES.labels(state=name).set(count)
        heads = [queue.head_queued_ms for queue in state.queues if queue.head_queued_ms is not None]
        QUEUE_OLDEST_WAIT.set(max(0, state.now_ms - min(heads)) / 1000 if heads else 0)
        self._show_tenants(state)

    def _show_tenants(self, state: ClusterState) -> None:
        busiest = sorted(state.tenants, key=lambda row: (-row.running, -row.active, row.tenant))
        shown = {row.tenant: row for row in busiest[:TENANTS_SHOWN_MAX]}
        if others := busiest[TENANTS_SHOWN_MAX:]:
            shown[""] = TenantRow(
                tenant="",
                gpus=sum(row.gpus for row in others),
                memory_bytes=sum(row.memory_bytes for row in others),
                running=sum(row.running for row in others),
                active=sum(row.active for row in others),
            )
        for name, row in shown.items():
            TENANT_TASKS.labels(tenant=name, state="running").set(row.running)
            TENANT_TASKS.labels(tenant=name, state="unfinished").set(row.active)
            TENANT_GPUS.labels(tenant=name).set(row.gpus)
            TENANT_MEMORY.labels(tenant=name).set(row.memory_bytes)
        self._forget_tenants(self._tenants - shown.keys())
        self._tenants = set(shown)

    @staticmethod
    def _forget_tenants(tenants: set[str]) -> None:
        for name in tenants:
            for state in ("running", "unfinished"):
                TENANT_TASKS.remove(name, state)
            TENANT_GPUS.remove(name)
            TENANT_MEMORY.remove(name)

    def show_fsync(self, policy: str) -> None:
        """Tell whether the store is known not to sync each write."""
        STORE_UNSYNCED.set(policy not in {"always", "unknown"})

    def hide(self) -> None:
        """Another one leads."""
        NODES.clear()
        self._forget_tenants(self._tenants)
        self._tenants = set()
        QUEUE_OLDEST_WAIT.set(0)
        STORE_UNSYNCED.set(0)
