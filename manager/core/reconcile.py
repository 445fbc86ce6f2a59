"""What the leader must put right between the store, which knows slots, and Dask, which runs their tasks. Pure."""

from collections.abc import Mapping

import msgspec

from manager.core.lifecycle import Cordon, SlotFlag, SlotKind, SlotStatus
from manager.core.model import ClusterState, SlotRow


class Resubmit(msgspec.Struct, frozen=True):
    """This slot has no Dask task; `node` is where it lives, empty where it was never opened."""

    slot: SlotRow
    node: str


class Repairs(msgspec.Struct, frozen=True):
    """What to put right.

    Attributes:
        resubmit: slots without a Dask task.
        drop: slots that were placed but not opened in time, or whose node is lost: each gets a new id if still wanted.
        forget: slots that wait on Dask but have ended in the store.
        tell_lost: fenced (node, incarnation) on which Dask still has something.
    """

    resubmit: tuple[Resubmit, ...]
    drop: tuple[str, ...]
    forget: tuple[str, ...]
    tell_lost: tuple[tuple[str, str], ...]


def repairs(state: ClusterState, on_dask: Mapping[str, tuple[str, str]], open_deadline_s: float) -> Repairs:
    """Compare one look at the store with what Dask has.

    Args:
        state: the store's slots and nodes.
        on_dask: slot → (held | placing | placed | leased, node); ``placing`` is ``placed`` just now.
        open_deadline_s: a slot that Dask has placed must be open within this time of having been requested.
    """
    resubmit: list[Resubmit] = []
    drop: list[str] = []
    fenced = {row.node for row in state.nodes if row.fenced}
    living = {slot.slot_id for slot in state.slots}
    for slot in state.slots:
        if slot.kind is SlotKind.DIRECT:
            continue  # its Dask task is its client's, and its end is the agent's
        where, node = on_dask.get(slot.slot_id, ("", ""))
        if slot.status is SlotStatus.REQUESTED:
            late = not 0 <= state.now_ms - slot.requested_ms <= open_deadline_s * 1000  # below: the clock was set back
            # One that was held for longer than the deadline, and is placed at last, is not late.
            if where in ("placing", "placed", "leased") and (node in fenced or (late and where != "placing")):
                drop.append(slot.slot_id)
            elif not where:
                resubmit.append(Resubmit(slot, ""))
        elif slot.status is SlotStatus.OPEN and where in ("", "leased"):
            resubmit.append(Resubmit(slot, slot.node))
    forget = [slot_id for slot_id, (where, _) in on_dask.items() if where == "held" and slot_id not in living]
    haunted = {node for where, node in on_dask.values() if node in fenced}
    return Repairs(
        resubmit=tuple(resubmit),
        drop=tuple(drop),
        forget=tuple(sorted(forget)),
        tell_lost=tuple((row.node, row.incarnation) for row in state.nodes if row.fenced and row.node in haunted),
    )


class Drains(msgspec.Struct, frozen=True):
    """Slots on nodes that are being drained, and what to ask of each. `next_ms`: when the next deadline is over."""

    drain: tuple[str, ...]
    preempt: tuple[str, ...]
    next_ms: int | None = None


def drains(state: ClusterState) -> Drains:
    """What is still open on nodes that are being drained: to end at its task boundary, and past the deadline now."""
    draining = {
        row.node: row.deadline_ms for row in state.nodes if row.cordon is Cordon.DRAIN and not row.fenced and not row.left
    }
    drain: list[str] = []
    preempt: list[str] = []
    for slot in state.slots:
        if slot.status is not SlotStatus.OPEN or slot.node not in draining:
            continue
        deadline_ms = draining[slot.node]
        if deadline_ms is not None and state.now_ms >= deadline_ms:
            if slot.flag is not SlotFlag.PREEMPT:
                preempt.append(slot.slot_id)
        elif slot.kind is SlotKind.TASKS and slot.flag not in (SlotFlag.DRAIN, SlotFlag.PREEMPT):
            drain.append(slot.slot_id)
    ahead = [deadline_ms for deadline_ms in draining.values() if deadline_ms is not None and deadline_ms > state.now_ms]
    return Drains(tuple(drain), tuple(preempt), min(ahead, default=None))
