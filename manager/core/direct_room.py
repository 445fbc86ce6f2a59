"""Room for Dask tasks that wait for it: which idle slots of the leader's end for them. Pure, a part of the plan.

Dask places these tasks, and the leader opens no slots for them; but a slot that is idle holds memory for nobody. Slots that
work never end for them: who uses Dask directly has no say about what was promised to others.
"""

from collections.abc import Container, Iterable
from typing import Final

from manager.core.closing import WARM_COST, Close
from manager.core.index import Index
from manager.core.lifecycle import SlotFlag, SlotKind, SlotStatus
from manager.core.model import ClusterState
from manager.core.packing import DirectDemand
from manager.core.placement import find
from manager.core.policies import BEST_FIT
from manager.core.victims import victims

SEARCHES_MAX: Final = 16
"""Tasks that get room in one round; the others follow a moment later. Bounds a round's time."""
REASON: Final = "DaskTasksWait"


def closes_for_direct(
    state: ClusterState, index: Index, waiting: Iterable[DirectDemand], ending: Container[str]
) -> list[Close]:
    """Idle slots that are to end so that what waits finds room, the longest idle first, those that are kept warm last.

    Args:
        state: one look at the store.
        index: the ledger that goes with it; not changed.
        waiting: what waits, by size.
        ending: slots that end anyway.
    """
    scratch = index.copy()
    costs: dict[str, float] = {}
    warm = {queue.shape_id for queue in state.queues if queue.warm}
    for slot in state.slots:
        if slot.flag is not SlotFlag.NONE or slot.slot_id in ending:
            scratch.free(slot.slot_id)  # on its way out: nobody else need go for what this will give back
        elif slot.kind is SlotKind.TASKS and slot.status is SlotStatus.OPEN and slot.idle_ms is not None and not slot.running:
            idle_s = max(0.0, (state.now_ms - slot.idle_ms) / 1000)
            costs[slot.slot_id] = 1.0 / (1.0 + idle_s) + (WARM_COST if slot.shape_id in warm else 0.0)
    closes: list[Close] = []
    searches = 0
    for kind, request in enumerate(waiting):
        resources = request.needs
        for number in range(request.count):
            fit = find(resources, scratch, BEST_FIT)
            if fit is None:
                chosen = victims(resources, scratch, costs) if costs and searches < SEARCHES_MAX else ()
                searches += 1
                for slot_id in chosen:
                    scratch.free(slot_id)
                    del costs[slot_id]
                    closes.append(Close(slot_id, REASON))
                fit = find(resources, scratch, BEST_FIT) if chosen else None
            if fit is None:
                break
            scratch.lease(f"direct {kind} {number}", fit)
    return closes
