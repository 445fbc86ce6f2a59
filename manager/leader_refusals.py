"""Tasks that ran out of device memory, and that nothing could ever hold with more: the leading controller fails them.

They asked for less, and were accepted; the shape with more room into which they were moved is one that nobody has asked for. So
it is looked at here as the API looks at what is submitted: against all nodes that are known or could be added.
"""

from manager.core.model import ClusterState, NodeInfo
from manager.core.node_kinds import Capacity
from manager.group_needs import pack_groups
from manager.log import get_logger
from manager.metrics import REFUSED_TASKS
from manager.settings import Settings
from manager.store import Store

log = get_logger("rocyard.controller")


class LeaderRefusals:
    """What could ever be held, as the leader sees it.

    Args:
        settings: with the groups that nodes can be added to.
        store: where tasks are refused.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._store = store
        groups = pack_groups(settings) if settings.autoscaler.mode == "active" else ()
        self._groups = [(group.name, group.kind) for group in groups if group.nodes_max]
        self._there: tuple[tuple[str, NodeInfo], ...] = ()
        self._capacity = Capacity({})

    async def refuse(self, token: int, state: ClusterState) -> None:
        """Fail what can never run."""
        for queue in state.queues:
            if not queue.out_of_memory or not queue.depth:
                continue
            refusal = self._capacity_of(state).refusal(queue.resources)
            if refusal is None:
                continue
            if failed := await self._store.refuse(token, queue.shape_id):
                REFUSED_TASKS.inc(failed)
                reason = refusal.reason.value
                log.warning("tasks_refused", shape=queue.shape_id, tasks=failed, reason=reason, nearest=refusal.node)

    def _capacity_of(self, state: ClusterState) -> Capacity:
        """That of the nodes that are known. One that has left counts: a restart is no reason to give up what only it can hold.
        With none there nothing can be said: some may be on their way.
        """
        any_there = any(not row.left for row in state.nodes)
        there = tuple((row.node, row.info) for row in state.nodes) if any_there else ()
        if there != self._there:
            self._there, self._capacity = there, Capacity.of(there, self._groups if there else ())
        return self._capacity
