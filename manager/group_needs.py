"""The packed need of each group, from the leading controller to its metrics. A controller that does not lead shows none."""

from collections.abc import Iterable
from typing import Final

from manager.core.model import ClusterState
from manager.core.node_kinds import node_kind
from manager.core.packing import DirectDemand, PackGroup, Packing, pack
from manager.core.selectors import labels_of
from manager.metrics import GROUP_NEED, GROUP_NEED_ROUND, GROUP_NODES, INFEASIBLE_TASKS
from manager.settings import Settings

PAUSE_S: Final = 0.5
"""Rounds may follow one another faster; the need is not looked at so often."""
ROUNDS_PER_TERM: Final = 2**20
"""A leader's rounds are told from those of the one before it by its token; both fit a double."""


def pack_groups(settings: Settings) -> tuple[PackGroup, ...]:
    """The groups of the settings, which were checked when they were read."""
    node = settings.node
    return tuple(
        PackGroup(
            name,
            node_kind(
                group.devices, node.reserve_bytes, node.memory_ratio_max, node.slots_max, labels_of(group.labels.items())
            ),
            group.workers_max,
        )
        for name, group in sorted(settings.groups.items())
    )


class GroupNeeds:
    """Computes and shows the need.

    Args:
        settings: with the groups.
    """

    def __init__(self, settings: Settings) -> None:
        self._groups = pack_groups(settings)
        self._drain_target_s = settings.autoscaler.drain_target_s
        self._round = 0
        self._shown_s = float("-inf")

    def show(self, state: ClusterState, direct: Iterable[DirectDemand], token: int, now_s: float) -> None:
        """Show the need that follows from `state`, unless that was done a moment ago."""
        if now_s - self._shown_s < PAUSE_S:
            return
        self._shown_s = now_s
        packing = pack(state, self._groups, self._drain_target_s, direct)
        self._round = (self._round + 1) % ROUNDS_PER_TERM
        self._set(packing, token * ROUNDS_PER_TERM + self._round)

    def _set(self, packing: Packing, mark: int) -> None:
        for need in packing.needs:
            GROUP_NEED.labels(group=need.group).set(need.nodes)
            for name, count in (("live", need.live), ("cordoned", need.cordoned), ("lost", need.lost)):
                GROUP_NODES.labels(group=need.group, state=name).set(count)
        INFEASIBLE_TASKS.clear()
        for each in packing.infeasible:
            INFEASIBLE_TASKS.labels(reason=each.reason.value).set(each.tasks)
        for need in packing.needs:  # last: who reads the mark of this round reads its needs, or newer ones
            GROUP_NEED_ROUND.labels(group=need.group).set(mark)

    def hide(self) -> None:
        """Show nothing: another controller leads, or none."""
        if self._shown_s == float("-inf"):
            return
        self._shown_s = float("-inf")
        for metric in (GROUP_NEED_ROUND, GROUP_NEED, GROUP_NODES, INFEASIBLE_TASKS):
            metric.clear()
