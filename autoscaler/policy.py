"""How many nodes of which group, and which go: the autoscaler's decision. Pure: an `Observation` in, a `Decision` out.

A need above the size adds nodes, once it has lasted for the up window; one below it removes some, once it has been lower for
the whole down window. What is not known holds: without metrics nothing is removed, without a whole listing nothing is done.
A node goes in steps that each look at the world again: drained first, ended once it is empty. One that works is never chosen.
"""

import enum
from collections.abc import Sequence
from typing import Final

import msgspec


class Phase(enum.StrEnum):
    """How far an instance has come."""

    STARTING = "starting"  # asked for, not registered yet; or gone silent, and about to come back
    LIVE = "live"
    FAILED = "failed"  # has not registered, or not come back, within its time


class Holder(enum.StrEnum):
    """Who has cordoned a node."""

    NOBODY = ""
    OPERATOR = "operator"
    AUTOSCALER = "autoscaler"


class Reason(enum.StrEnum):
    """Why something is done, or nothing."""

    NEED_ABOVE_SIZE = "NeedAboveSize"
    BELOW_MINIMUM = "BelowMinimum"
    NEED_BELOW_SIZE = "NeedBelowSize"
    ABOVE_MAXIMUM = "AboveMaximum"
    WANTED_AGAIN = "WantedAgain"  # a drain is lifted
    DRAINED = "Drained"  # and empty, so it ends
    NOT_REGISTERED = "NotRegistered"  # did not register, or come back, in time
    # Nothing is done:
    SIZE_FITS = "SizeFits"
    WITHIN_TOLERANCE = "WithinTolerance"
    UP_WINDOW = "UpWindow"
    DOWN_WINDOW = "DownWindow"
    AT_MAXIMUM = "AtMaximum"
    ALL_BUSY = "AllBusy"
    OPERATOR_CORDON = "OperatorCordon"  # only the last node can go, and an operator has cordoned it
    BACKING_OFF = "BackingOff"  # nodes could not be started
    METRICS_UNKNOWN = "MetricsUnknown"
    PROVIDER_UNAVAILABLE = "ProviderUnavailable"


class Sample(msgspec.Struct, frozen=True):
    """A need as it was some seconds ago."""

    age_s: float
    nodes: int


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a group, there or asked for.

    Attributes:
        listed: its provider knows it; one that it does not know counts, and cannot be removed.
        age_s: seconds in its phase.
        busy: it holds work.
        empty: it holds no slot at all.
        idle_s: seconds since it held work.
        cordoned_s: seconds since it was cordoned.
        problem: what the provider says is wrong.
    """

    name: str
    listed: bool = True
    phase: Phase = Phase.LIVE
    age_s: float = 0.0
    busy: bool = False
    empty: bool = True
    idle_s: float = 0.0
    cordoned_by: Holder = Holder.NOBODY
    cordoned_s: float = 0.0
    problem: str = ""


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """One group as it is now.

    Attributes:
        workers_min, workers_max: its bounds.
        need: nodes that it should have, by the metrics; None: not known now.
        truth: the same from the queue itself, where it was looked up; it may raise and never lower.
        ups: what may raise it, the newest first: the greater of both.
        downs: what may lower it: needs by the metrics without a gap since the oldest.
        members: in the provider's order; None: the listing failed.
        ordered: only the last ones can be removed.
        new_names: of instances that could be added, in order.
        blocked_s: nodes cannot be added for so long, after a start that failed.
        since_up_s: seconds since nodes were last added or kept; None: not since this process leads.
    """

    name: str
    workers_min: int
    workers_max: int
    need: int | None
    truth: int | None = None
    ups: tuple[Sample, ...] = ()
    downs: tuple[Sample, ...] = ()
    members: tuple[Member, ...] | None
    ordered: bool = False
    new_names: tuple[str, ...] = ()
    blocked_s: float = 0.0
    since_up_s: float | None = None


class Observation(msgspec.Struct, frozen=True):
    """All groups as they are now."""

    groups: tuple[GroupView, ...]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator has set (see settings `autoscaler`). `settle_s`: what was placed before a drain shows within this."""

    up_window_s: float
    down_window_s: float
    tolerance: float
    step_up_max: int
    step_down_max: int
    workers_max: int
    settle_s: float


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Start these."""

    group: str
    names: tuple[str, ...]
    reason: Reason


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Place nothing more there; what is idle there ends."""

    group: str
    names: tuple[str, ...]
    reason: Reason


class Uncordon(msgspec.Struct, frozen=True, tag="uncordon"):
    """Use these again."""

    group: str
    names: tuple[str, ...]
    reason: Reason


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """End these. `unregistered` are those that have not registered: one that has by now must be spared."""

    group: str
    names: tuple[str, ...]
    reason: Reason
    unregistered: tuple[str, ...] = ()


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """Leave the group as it is."""

    group: str
    reason: Reason


Action = Add | Drain | Uncordon | Remove | Hold


class GroupResult(msgspec.Struct, frozen=True):
    """What was seen of a group: `size` is all instances, `kept` those that take work or will, `target` what they should be."""

    group: str
    need: int | None
    size: int
    kept: int
    target: int
    reason: Reason


class Decision(msgspec.Struct, frozen=True):
    """What to do, in this order, and what was seen."""

    actions: tuple[Action, ...]
    groups: tuple[GroupResult, ...]


_KEPT: Final = frozenset({Phase.STARTING, Phase.LIVE})
_QUIET: Final = frozenset({Reason.SIZE_FITS, Reason.WITHIN_TOLERANCE, Reason.UP_WINDOW, Reason.DOWN_WINDOW})


def decide(observation: Observation, limits: Limits) -> Decision:
    """What to do now. Groups come in order of their names, and share `workers_max`."""
    views = sorted(observation.groups, key=lambda view: view.name)
    room = limits.workers_max - sum(len(view.members or ()) for view in views)
    actions: list[Action] = []
    results: list[GroupResult] = []
    for view in views:
        plan = _Plan(view, limits, max(0, room))
        own = plan.decide()
        room -= sum(len(action.names) for action in own if isinstance(action, Add))
        actions += own or [Hold(view.name, plan.reason)]
        results.append(GroupResult(view.name, view.need, len(view.members or ()), len(plan.kept), plan.target, plan.reason))
    return Decision(tuple(actions), tuple(results))


def backoff_s(failures: int, first_s: float, most_s: float) -> float:
    """How long to wait after so many failed starts, one after the other."""
    return 0.0 if failures <= 0 else float(min(most_s, first_s * 2.0 ** min(failures - 1, 32)))


class _Plan:
    """The decision about one group."""

    def __init__(self, view: GroupView, limits: Limits, room: int) -> None:
        self.view = view
        self.limits = limits
        self.room = room
        self.members = view.members or ()
        self.kept = [m for m in self.members if m.phase in _KEPT and m.cordoned_by is Holder.NOBODY]
        self.drained = [m for m in self.members if m.listed and m.cordoned_by is Holder.AUTOSCALER]
        # A need that was computed a moment before an operator cordoned a node still counts on it.
        self.just_cordoned = sum(
            m.cordoned_by is Holder.OPERATOR and m.phase is Phase.LIVE and m.cordoned_s < limits.settle_s for m in self.members
        )
        self.target = len(self.kept)
        self.reason = Reason.SIZE_FITS

    def decide(self) -> list[Action]:
        if self.view.members is None:
            self.reason = Reason.PROVIDER_UNAVAILABLE
            return []
        actions: list[Action] = []
        now_wanted = self._within(max(self.view.need or 0, self.view.truth or 0))
        again = self._lifted(now_wanted - len(self.kept))
        if again:
            actions.append(Uncordon(self.view.name, tuple(m.name for m in again), Reason.WANTED_AGAIN))
            self.kept += again
        ended = self._ended([m for m in self.drained if m not in again])
        actions += ended
        replacing = any(action.reason is Reason.NOT_REGISTERED for action in ended)
        # What could not be started is started again after a pause; and an ordered provider takes one change at a time.
        if not replacing and not (ended and self.view.ordered):
            actions += self._resize(now_wanted)
        if replacing:
            self.reason = Reason.NOT_REGISTERED
        elif self.reason in _QUIET and (again or ended):
            self.reason = Reason.WANTED_AGAIN if again else Reason.DRAINED
        return actions

    def _ended(self, drained: Sequence[Member]) -> list[Remove]:
        """The last step: who has not started in time ends, and who was drained and is empty."""
        failed = [m for m in self.members if m.listed and m.phase is Phase.FAILED and m.cordoned_by is Holder.NOBODY]
        ripe = [m for m in drained if m.empty and not m.busy and m.cordoned_s >= self.limits.settle_s]
        if self.view.need is None:
            ripe = []  # perhaps it is wanted again: nobody knows
        gone = self._removable([*failed, *ripe])
        by_reason = {
            Reason.NOT_REGISTERED: tuple(m.name for m in gone if m.phase is Phase.FAILED),
            Reason.DRAINED: tuple(m.name for m in gone if m.phase is not Phase.FAILED),
        }
        if self.view.ordered and all(by_reason.values()):
            return [
                Remove(self.view.name, tuple(m.name for m in gone), Reason.NOT_REGISTERED, by_reason[Reason.NOT_REGISTERED])
            ]
        return [
            Remove(self.view.name, names, reason, names if reason is Reason.NOT_REGISTERED else ())
            for reason, names in by_reason.items()
            if names
        ]

    # --- which direction ----------------------------------------------------------------------------------------

    def _within(self, nodes: int) -> int:
        return max(self.view.workers_min, min(nodes, self.view.workers_max))

    def _lasting(self, samples: Sequence[Sample], window_s: float) -> list[int] | None:
        """Needs within the window; None while they do not reach back so far."""
        if not samples or samples[-1].age_s < window_s:
            return None
        return [sample.nodes for sample in samples if sample.age_s <= window_s]

    def _resize(self, now_wanted: int) -> list[Action]:
        size = self.target = len(self.kept)
        ups = self._lasting(self.view.ups, self.limits.up_window_s)
        raised = self._within(min(ups)) if ups else self.view.workers_min
        if raised - self.just_cordoned > size:
            return self._up(raised - self.just_cordoned)
        if now_wanted > size:
            self.reason = Reason.UP_WINDOW
            return []
        if self.view.need is None:
            self.reason = Reason.METRICS_UNKNOWN
            return []
        if size > self.view.workers_max:
            return self._down(self.view.workers_max, Reason.ABOVE_MAXIMUM)
        if now_wanted == size:
            at_most = size == self.view.workers_max and self.view.need >= size > 0
            self.reason = Reason.AT_MAXIMUM if at_most else Reason.SIZE_FITS
            return []
        if self._close(size - now_wanted):
            self.reason = Reason.WITHIN_TOLERANCE
            return []
        downs = self._lasting(self.view.downs, self.limits.down_window_s)
        recent = self.view.since_up_s is not None and self.view.since_up_s < self.limits.down_window_s
        lowered = size if downs is None or recent else self._within(max(downs))
        if lowered >= size:
            self.reason = Reason.DOWN_WINDOW
            return []
        return self._down(lowered, Reason.NEED_BELOW_SIZE)

    def _close(self, difference: int) -> bool:
        return difference <= self.limits.tolerance * len(self.kept)

    def _up(self, wanted: int) -> list[Action]:
        size = len(self.kept)
        if self._close(wanted - size) and size >= self.view.workers_min:
            self.reason = Reason.WITHIN_TOLERANCE
            return []
        self.target = wanted
        if self.view.blocked_s > 0:
            self.reason = Reason.BACKING_OFF
            return []
        step = max(self.limits.step_up_max, size)
        count = min(wanted - size, step, self.view.workers_max - len(self.members), self.room)
        names = self.view.new_names[: max(0, count)]
        if not names:
            self.reason = Reason.AT_MAXIMUM
            return []
        self.reason = Reason.BELOW_MINIMUM if size < self.view.workers_min else Reason.NEED_ABOVE_SIZE
        return [Add(self.view.name, names, self.reason)]

    # --- who goes, who stays ------------------------------------------------------------------------------------

    def _lifted(self, missing: int) -> list[Member]:
        """Drained nodes that are wanted again: those that hold work, and of the others the last that were drained."""
        able = [m for m in self.drained if m.phase is Phase.LIVE]
        if self.view.ordered:
            return able[: max(0, missing)]  # the lowest: what is removed later are the last ones again
        return sorted(able, key=lambda m: (not m.busy, m.cordoned_s, m.name))[: max(0, missing)]

    def _removable(self, members: Sequence[Member]) -> list[Member]:
        """Those of `members` that the provider can end now: all, or with an ordered one as far as they are its last."""
        if not self.view.ordered:
            return list(members)
        chosen = {m.name for m in members}
        tail: list[Member] = []
        for member in reversed([m for m in self.members if m.listed]):
            if member.name not in chosen:
                break
            tail.append(member)
        return tail[::-1]

    def _down(self, wanted: int, reason: Reason) -> list[Action]:
        self.target = wanted
        count = min(len(self.kept) - wanted, self.limits.step_down_max)
        victims = self._last(count) if self.view.ordered else self._idlest(count)
        if not victims:
            if self.reason is not Reason.OPERATOR_CORDON:
                self.reason = Reason.ALL_BUSY
            return []
        self.reason = reason
        starting = [m for m in victims if m.phase is Phase.STARTING]
        ended = tuple(m.name for m in self._removable(starting))
        drained = tuple(m.name for m in victims if m.phase is Phase.LIVE)
        actions: list[Action] = []
        if ended:
            actions.append(Remove(self.view.name, ended, reason, ended))
        if drained:
            actions.append(Drain(self.view.name, drained, reason))
        return actions

    def _idlest(self, count: int) -> list[Member]:
        """Those that start, the youngest first; then those that have been idle for longest. None that works."""
        candidates = [m for m in self.kept if m.listed and not m.busy]

        def order(m: Member) -> tuple[bool, float, str]:
            return (m.phase is not Phase.STARTING, m.age_s if m.phase is Phase.STARTING else -m.idle_s, m.name)

        return sorted(candidates, key=order)[:count]

    def _last(self, count: int) -> list[Member]:
        """The last ones. One that works is drained as well, and ends when it has done its work."""
        victims: list[Member] = []
        for member in reversed([m for m in self.members if m.listed]):
            if member.cordoned_by is Holder.OPERATOR:
                self.reason = Reason.OPERATOR_CORDON
                break
            if member.phase in _KEPT and member.cordoned_by is Holder.NOBODY:
                if len(victims) == count:
                    break
                victims.append(member)
        return victims
