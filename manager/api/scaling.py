"""What the autoscaler would do about a need that is not there yet: its own policy, on what the store knows of its nodes.

Instances that it has started and that have not registered are known to nobody else, so they are not counted here.
"""

from collections.abc import Mapping
from typing import Final

from autoscaler.policy import Add, GroupView, Hold, Holder, Limits, Member, Observation, Phase, Sample, Uncordon, decide
from manager.core.foresee import ScaleStep
from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState, NodeRow
from manager.core.packing import holds_work
from manager.settings import Settings

NEW: Final = "new"
"""Begins the names of nodes that do not exist: only how many would be added is told."""


def scaling_of(state: ClusterState, needs: Mapping[str, int], settings: Settings) -> tuple[ScaleStep, ...]:
    """What would be done if these were the needs of these groups, and they lasted.

    Args:
        state: one look at the store.
        needs: nodes that each group should have; of those alone something is said.
        settings: bounds of groups, and of the autoscaler.
    """
    own = settings.autoscaler
    limits = Limits(
        up_window_s=own.up_window_s,
        down_window_s=own.down_window_s,
        tolerance=own.tolerance,
        step_up_max=own.step_up_max,
        step_down_max=own.step_down_max,
        workers_max=own.workers_max,
        settle_s=settings.slots.open_deadline_s,
    )
    at_work = {slot.node for slot in state.slots if holds_work(slot)}
    views = tuple(
        GroupView(
            name=name,
            workers_min=group.workers_min,
            workers_max=group.workers_max,
            need=needs.get(name),
            ups=(Sample(own.up_window_s, needs[name]),) if name in needs else (),
            members=tuple(_member(row, at_work, state) for row in _rows(name, state)),
            new_names=tuple(f"{NEW}-{number}" for number in range(group.workers_max)),
        )
        for name, group in settings.groups.items()
    )
    decision = decide(Observation(views), limits)
    reasons = {result.group: result.reason for result in decision.groups}
    steps: list[ScaleStep] = []
    for action in decision.actions:
        match action:
            case Add(group, names, reason) | Uncordon(group, names, reason) if group in needs:
                word = "add" if isinstance(action, Add) else "uncordon"
                steps.append(ScaleStep(group, word, len(names), reason.value))
            case Hold(group, _) if group in needs:
                steps.append(ScaleStep(group, "hold", 0, reasons[group].value))
            case _:
                pass  # what it would remove is not because of the request
    return tuple(steps)


def _rows(group: str, state: ClusterState) -> list[NodeRow]:
    return [row for row in state.nodes if row.info.group == group and not row.left and not row.fenced]


def _member(row: NodeRow, at_work: set[str], state: ClusterState) -> Member:
    holder = Holder.NOBODY
    if row.cordon is not Cordon.NONE:
        holder = Holder.AUTOSCALER if row.cordon_by == Holder.AUTOSCALER else Holder.OPERATOR
    cordoned_s = 0.0 if row.cordon_ms is None else max(0, state.now_ms - row.cordon_ms) / 1000
    return Member(
        name=row.node,
        phase=Phase.LIVE,
        busy=row.node in at_work,
        empty=all(slot.node != row.node for slot in state.slots),
        cordoned_by=holder,
        cordoned_s=cordoned_s,
    )
