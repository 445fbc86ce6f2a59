"""What is known of a group's nodes: the provider's listing and the store's look, put together as the policy's values.

Remembers only what can be known by watching: since when a node has been idle or away, on this process's clock. A new process
starts that afresh, which makes it slower to remove and never faster.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from autoscaler.policy import Holder, Member, Phase, Sample
from autoscaler.providers.interface import Instance, Listing
from manager.core.leadership import BeatWatch
from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState, NodeRow, SlotRow
from manager.core.packing import holds_work

SILENT_BEATS: Final = 2.0
"""A node that its provider does not know counts while it beats: one that was taken away is missed soon."""


class Watcher:
    """Looks at nodes, tick after tick.

    Args:
        registration_s: how long a node may take to register, to get its Dask worker, or to come back.
        beat_s: how often nodes beat.
    """

    def __init__(self, registration_s: float, beat_s: float) -> None:
        self._registration_s = registration_s
        self._beat_s = beat_s
        self._beats = BeatWatch()
        self._idle_since: dict[str, float] = {}
        self._away_since: dict[str, float] = {}

    def members(self, listing: Listing, state: ClusterState, now_s: float) -> tuple[Member, ...]:
        """The nodes of a group, in the provider's order; then those that only the store knows."""
        rows = {row.node: row for row in state.nodes}
        slots: dict[str, list[SlotRow]] = defaultdict(list)
        for slot in state.slots:
            slots[slot.node].append(slot)
        found = [self._listed(each, rows.get(each.name), slots[each.name], state, now_s) for each in listing.instances]
        names = {each.name for each in listing.instances}
        for row in state.nodes:
            if row.info.group == listing.group and row.node not in names and not row.left and not row.fenced:
                silent_s = self._beats.silent_s(row.node, (row.incarnation, row.beat), now_s, now_s)
                if silent_s <= SILENT_BEATS * self._beat_s:
                    found.append(self._registered(row, slots[row.node], state.now_ms, now_s, listed=False))
        return tuple(found)

    def _listed(
        self, instance: Instance, row: NodeRow | None, slots: Sequence[SlotRow], state: ClusterState, now_s: float
    ) -> Member:
        if row is not None:
            self._beats.silent_s(row.node, (row.incarnation, row.beat), now_s, now_s)
        away = row is None or row.left or row.fenced
        if row is not None and row.cordon is not Cordon.NONE and not row.left:
            self._away_since.pop(row.node, None)
            return self._registered(row, slots, state.now_ms, now_s, problem=instance.problem)
        if away:
            age_s = instance.age_s
            if row is not None:  # it was there: its time counts from when it was first missed
                age_s = min(age_s, now_s - self._away_since.setdefault(instance.name, now_s))
            self._idle_since.pop(instance.name, None)
            return self._starting(instance, age_s)
        assert row is not None
        self._away_since.pop(row.node, None)
        if not row.address:
            registered_s = 0.0 if row.registered_ms is None else max(0, state.now_ms - row.registered_ms) / 1000
            return self._starting(instance, registered_s)
        return self._registered(row, slots, state.now_ms, now_s, problem=instance.problem)

    def _starting(self, instance: Instance, age_s: float) -> Member:
        phase = Phase.FAILED if age_s > self._registration_s else Phase.STARTING
        return Member(name=instance.name, phase=phase, age_s=age_s, problem=instance.problem)

    def _registered(
        self,
        row: NodeRow,
        slots: Sequence[SlotRow],
        now_ms: int,
        now_s: float,
        *,
        listed: bool = True,
        problem: str = "",
    ) -> Member:
        busy = any(holds_work(slot) for slot in slots)
        idle_s = 0.0
        if busy:
            self._idle_since.pop(row.node, None)
        else:
            idle_s = now_s - self._idle_since.setdefault(row.node, now_s)
            ages = [max(0, now_ms - slot.idle_ms) / 1000 for slot in slots if slot.idle_ms is not None]
            idle_s = max(idle_s, min(ages, default=0.0))
        holder = Holder.NOBODY
        if row.cordon is not Cordon.NONE:
            holder = Holder.AUTOSCALER if row.cordon_by == Holder.AUTOSCALER.value else Holder.OPERATOR
        return Member(
            name=row.node,
            listed=listed,
            phase=Phase.LIVE,
            age_s=0.0 if row.registered_ms is None else max(0, now_ms - row.registered_ms) / 1000,
            busy=busy,
            empty=not slots,
            idle_s=idle_s,
            cordoned_by=holder,
            cordoned_s=0.0 if row.cordon_ms is None else max(0, now_ms - row.cordon_ms) / 1000,
            problem=problem,
        )

    def keep(self, names: set[str]) -> None:
        """Forget all nodes but these."""
        self._beats.keep(names)
        for memory in (self._idle_since, self._away_since):
            for name in memory.keys() - names:
                del memory[name]


class History:
    """The needs of one group, as far back as its windows reach. A gap begins it anew."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: list[tuple[float, int]] = []

    def add(self, nodes: int | None, now_s: float) -> tuple[Sample, ...]:
        """Take note of a need, None where it is not known; the newest first."""
        if nodes is None:
            self._seen.clear()
            return ()
        self._seen.append((now_s, nodes))
        # One that is older than the window stays: it shows that the window is filled.
        while len(self._seen) > 1 and now_s - self._seen[1][0] >= self._window_s:
            del self._seen[0]
        return tuple(Sample(now_s - at_s, needed) for at_s, needed in reversed(self._seen))

    def clear(self) -> None:
        """Begin anew."""
        self._seen.clear()
