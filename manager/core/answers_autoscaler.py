"""What the REST API gives of the autoscaler: its groups, and what it decided with what it knew. See `answers`."""

import msgspec

from manager.core.answers import Time


class ScalingGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One group in a decision of the autoscaler.

    Attributes:
        need: nodes that it should have, by the metrics; null where they are not known.
        truth: the same from the queue itself, where that was looked up.
        size: nodes that there are, those that start included.
        starting, busy, draining: how many of them.
        target: how many it is brought to.
        reason: why something is done, or nothing.
        blocked_s: no nodes are added for so long, for `blocked_reason`.
    """

    group: str
    need: int | None
    truth: int | None = None
    size: int
    starting: int = 0
    busy: int = 0
    draining: int = 0
    target: int
    reason: str
    blocked_s: float = 0.0
    blocked_reason: str = ""


class ScalingAction(msgspec.Struct, frozen=True):
    """What was done: `action` is add, drain, uncordon or remove; `result` is done, shadow, or what went wrong."""

    action: str
    group: str
    names: tuple[str, ...]
    reason: str
    result: str


class DecisionNote(msgspec.Struct, frozen=True, kw_only=True):
    """A decision of the autoscaler with what it knew, as it lies in its journal.

    Attributes:
        metrics: why the metrics were not believed; empty where they were.
        infeasible: waiting tasks that no node could ever hold, by reason.
        repeats: how many decisions before this one were like the one before it, and were not written.
    """

    mode: str
    metrics: str
    groups: tuple[ScalingGroup, ...]
    actions: tuple[ScalingAction, ...]
    infeasible: dict[str, int] = {}
    repeats: int = 0


class DecisionView(DecisionNote, frozen=True, kw_only=True):
    """A decision of the autoscaler, as the API shows it."""

    id: str
    at: Time


class DecisionList(msgspec.Struct, frozen=True):
    """Decisions, newest first. `next_cursor` leads on to older ones; null: there are none."""

    decisions: tuple[DecisionView, ...]
    next_cursor: str | None


class GroupBounds(msgspec.Struct, frozen=True, kw_only=True):
    """A group as the settings have it."""

    name: str
    provider: str
    devices: str
    workers_min: int
    workers_max: int


class AutoscalerView(msgspec.Struct, frozen=True):
    """The autoscaler: what it may do, and what it decided last."""

    mode: str
    groups: tuple[GroupBounds, ...]
    last: DecisionView | None
