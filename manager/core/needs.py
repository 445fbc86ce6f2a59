"""How many slots each shape should have, in the order in which shapes are served. Pure, a part of the plan."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import PRIORITY_MAX, ClusterState, QueueRow, SlotRow, TenantRow, priority_of
from manager.core.shares import QuotaLeft

UNKNOWN_RUN_S: Final = 1.0
"""A shape whose run time is not known is taken to need this, so that long tasks start side by side at once."""
UNKNOWN_OPEN_MAX: Final = 4
"""But so many slots at first: a burst of tiny tasks must not start a process for each."""
NO_RANK: Final = 2**9
"""In place of the rank of a priority where nothing waits."""
LOADING_S: Final = 20.0
"""A slot that has ended nothing for so long is not loading: it is at work on something longer than was learned."""


class Limits(msgspec.Struct, frozen=True):
    """What the operator has set (see settings `slots` and `tasks`). `preempt_s` 0: nothing that runs is ended for others."""

    drain_target_s: float
    idle_s: float
    residence_s: float
    slots_per_shape_max: int
    idle_per_node_max: int
    preempt_s: float = 0.0


class Need(msgspec.Struct, frozen=True):
    """One shape in this round: its slots, and how many it should have.

    Attributes:
        wanted: for its work, to be kept warm, or to get its turn within the tenant's quota, whichever is most.
        firm: for its work or to be kept warm: so many are asked for although there is no room yet.
        needed: for its work alone, as far as the tenant's quota lets it work. Others' slots end for these, never for slots
            that are only to be warm.
        capped: more work of it changes nothing: the quota is in the way.
    """

    queue: QueueRow
    serving: int
    requested: int
    held: tuple[str, ...]
    wanted: int
    firm: int
    needed: int
    capped: bool = False

    @property
    def asked(self) -> int:
        """Slots that were asked for and are on their way, with room or not."""
        return self.requested + len(self.held)

    @property
    def waits(self) -> bool:
        """Whether a slot is held that work still needs."""
        return bool(self.held) and self.needed > self.serving


def slots_wanted(queue: QueueRow, slots: Sequence[SlotRow], now_ms: int, limits: Limits) -> int:
    """How many slots drain the queue within the target, from what was learned of its run time.

    Where that is not known, or the head has waited for longer than the target although all slots have been at work for as
    long, they are doubled in each such time: a start of many processes costs more than it gives where tasks are short.
    """
    if queue.depth == 0:
        return 0
    busy = sum(1 for slot in slots if slot.running)
    run_s = UNKNOWN_RUN_S if queue.run_s is None else queue.run_s
    needed = math.ceil((queue.depth + busy) * run_s / limits.drain_target_s)
    target_ms = limits.drain_target_s * 1000
    settled = all(slot.opened_ms is not None and now_ms - slot.opened_ms > target_ms for slot in slots)
    if queue.run_s is None:
        needed = min(needed, max(UNKNOWN_OPEN_MAX, 2 * len(slots) if settled else len(slots)))
    elif (
        settled
        # Else some are loading what they need, and will help when they have; or so it is taken for a while.
        and all(slot.served or now_ms - (slot.opened_ms or now_ms) > LOADING_S * 1000 for slot in slots)
        and queue.head_queued_ms is not None
        and now_ms - queue.head_queued_ms > target_ms
    ):
        needed = max(needed, 2 * len(slots))
    if limit := queue.shape.max_tasks_per_slot:
        # Each slot ends by itself: what those that are open will not serve needs new ones.
        left = sum(max(0, limit - slot.served - slot.running) for slot in slots)
        needed = max(needed, len(slots) + math.ceil((queue.depth - left) / limit))
    return max(1, min(needed, queue.depth + busy, limits.slots_per_shape_max))


def wake_depth(queue: QueueRow, slots: int, limits: Limits) -> int:
    """The depth at which `slots` slots would no longer be enough."""
    if slots == 0:
        return 1
    run_s = UNKNOWN_RUN_S if queue.run_s is None else queue.run_s
    return max(1, int(slots * limits.drain_target_s / max(run_s, 1e-4)))


def needs_of(state: ClusterState, held: frozenset[str], limits: Limits) -> list[Need]:
    """Each shape's slots and need, in the order in which they are served."""
    by_shape: dict[str, list[SlotRow]] = {queue.shape_id: [] for queue in state.queues}
    for slot in state.slots:
        by_shape.setdefault(slot.shape_id, []).append(slot)
    tenants = {row.tenant: row for row in state.tenants}
    quotas = {name: QuotaLeft(row) for name, row in tenants.items()}
    needs = []
    for queue in sorted(state.queues, key=lambda q: service_order(q, tenants)):
        slots = by_shape[queue.shape_id]
        serving = [s for s in slots if s.status is SlotStatus.OPEN and s.flag is SlotFlag.NONE]
        requested = [s.slot_id for s in slots if s.status is SlotStatus.REQUESTED]
        waiting = tuple(sorted(slot_id for slot_id in requested if slot_id in held))
        for_work = needed = slots_wanted(queue, serving, state.now_ms, limits)
        if (quota := quotas.get(queue.shape.tenant)) is not None:
            resources = queue.resources
            needed = quota.take(resources.gpus, resources.gpus * resources.memory_bytes, for_work)
        firm = max(needed, min(queue.warm, limits.slots_per_shape_max))
        # Where the quota is used up by others of the tenant's shapes, one slot is opened if there is room: they take turns.
        wanted = max(firm, min(for_work, 1))
        on_their_way = len(requested) - len(waiting)
        needs.append(Need(queue, len(serving), on_their_way, waiting, wanted, firm, needed, capped=needed < for_work))
    return needs


def service_order(queue: QueueRow, tenants: Mapping[str, TenantRow]) -> tuple[int, float, str, float, str]:
    """Priority first, then the tenant that has had least by its weight, then that of its shapes that has had least."""
    row = tenants.get(queue.shape.tenant)
    had_s = 0.0 if row is None else row.vtime_s or 0.0
    return priority_rank(queue), had_s, queue.shape.tenant, queue.vtime_s or 0.0, queue.shape_id


def priority_rank(queue: QueueRow) -> int:
    """Rank of the head's priority, which grows with its age: lower is served first."""
    return NO_RANK if queue.head is None else PRIORITY_MAX - priority_of(queue.head)
