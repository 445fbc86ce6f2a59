"""What would happen to a request that is not made: does it fit, where, when, who ends for it, which nodes come. Pure.

The request is entered into a copy of the state, and the same planner and placement decide on it as would if it were submitted
now. Nothing is changed, so the answer holds for this moment: what others submit in between may take the place.
"""

import enum
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from manager.core.ahead import Ahead, Setup, ahead_for, ends_of, is_serving, opening_s
from manager.core.index import Index
from manager.core.model import ClusterState, QueueRow, SlotRow, priority_offset
from manager.core.needs import priority_rank
from manager.core.packing import pack
from manager.core.placement import find
from manager.core.planner import Plan, plan
from manager.core.quantities import format_duration
from manager.core.shapes import Grant, Resources, Shape, shape_id
from manager.core.verdicts import VerdictClass, WorkerVerdict, classes_of, names_of, verdicts_of
from manager.core.waiting import IMPOSSIBLE, Answer, Place, Unblock, Why, answer_of
from manager.core.wanted import words_of


class When(enum.StrEnum):
    """When a request would run."""

    NOW = "Now"  # there is room, or a slot that waits for work
    LATER = "Later"  # once others have ended
    AFTER_SCALE_UP = "AfterScaleUp"  # once a node was added
    NEVER = "Never"  # not on what is there, or could be added


class Wish(msgspec.Struct, frozen=True):
    """What would be submitted: so many tasks of one shape and priority."""

    shape: Shape
    count: int = 1
    priority: int = 0


class Landing(msgspec.Struct, frozen=True):
    """Where slots would be. `opens`: whether they would be opened for it; else they are there and wait for work."""

    node: str
    devices: tuple[str, ...]
    slots: int
    opens: bool


class Ends(msgspec.Struct, frozen=True):
    """Slots of others that would be asked to end for it. `seconds`: until the last has; null: not known."""

    node: str
    slots: int
    memory_bytes: int
    seconds: float | None


class GroupChange(msgspec.Struct, frozen=True):
    """What the work would ask of a group of nodes.

    Attributes:
        nodes: that there are now and take work.
        need_before, need_after: nodes that it should have, without and with the request.
        nodes_max: that it may have.
    """

    group: str
    nodes: int
    need_before: int
    need_after: int
    nodes_max: int


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to a request.

    Attributes:
        when: when its first task would run.
        reason: why not now; null where it would.
        message: the answer in a sentence or two.
        memory_bytes: what a slot of it leases on each device.
        count: how many tasks were asked about.
        now: how many of them would run at once.
        places: where these would be; one of these, where more slots are idle than tasks were asked about.
        start_s: in how many seconds the first may start; null where too little is known to say.
        start_by: what `start_s` was made of.
        ends: what would be asked to end for it.
        groups: what the work asks of groups of nodes, with and without it.
        unblocks: what would let it run, where it does not fit.
        nearest: the node that lacks least memory.
        verdicts: what nodes say, those that say the same together.
    """

    when: When
    reason: Why | None
    message: str
    memory_bytes: int
    gpus: int
    count: int
    now: int
    places: tuple[Landing, ...] = ()
    start_s: float | None = None
    start_by: str = ""
    ends: tuple[Ends, ...] = ()
    groups: tuple[GroupChange, ...] = ()
    unblocks: tuple[Unblock, ...] = ()
    nearest: WorkerVerdict | None = None
    verdicts: tuple[VerdictClass, ...] = ()


class ScaleStep(msgspec.Struct, frozen=True):
    """What the autoscaler would do about one group, as far as it is known here: it alone knows what it has started already.

    Attributes:
        action: ``add``, ``uncordon``, or ``hold``: nothing.
        nodes: how many.
        reason: its own, such as NeedAboveSize or AtMaximum.
    """

    group: str
    action: str
    nodes: int
    reason: str


class PlanView(msgspec.Struct, frozen=True):
    """What would happen to a request of one or several tasks; nothing was done.

    Attributes:
        when: when the last of the requests would have begun to run.
        requests: each for itself, in order; tasks of a batch that are alike are one.
        scaling: what the autoscaler would do; empty where nothing would change, or where it may not act.
    """

    when: When
    requests: tuple[Forecast, ...]
    scaling: tuple[ScaleStep, ...] = ()


def foresee(
    wishes: Iterable[Wish], ahead: Ahead, setup: Setup, silent: frozenset[str] = frozenset(), *, leads: bool = True
) -> Iterator[Forecast]:
    """What would happen to each request, if they were submitted now in this order: one by one, since each is much work.

    Args:
        wishes: what would be submitted.
        ahead: one look at the cluster and what follows from it; not changed.
        setup: what decides besides it.
        silent: nodes that have not beaten for a lease.
        leads: whether a controller leads.
    """
    state = ahead.state
    for wish in wishes:
        forecast, state = _foresee(wish, state, ahead, setup, silent, leads=leads)
        yield forecast


def _foresee(
    wish: Wish, before: ClusterState, ahead: Ahead, setup: Setup, silent: frozenset[str], *, leads: bool
) -> tuple[Forecast, ClusterState]:
    """The forecast, and the state with the wish in it."""
    state, queue = _entered(wish, before)
    earlier = next((q for q in before.queues if q.shape_id == queue.shape_id), None)
    rank = priority_rank(msgspec.structs.replace(queue, head=priority_offset(wish.priority) + 1))
    place = Place(earlier.depth if earlier is not None and earlier.depth and priority_rank(earlier) <= rank else 0)
    decided = plan(state, ahead.base, ahead.held, setup.limits)
    scratch = ahead.index.copy()
    opened = _opened(queue, state, decided, scratch, setup)
    # What nodes say, with what would be placed before it in place.
    index = scratch.copy()
    for slot_id in [slot_id for slot_id in index.grants if slot_id in opened]:
        index.free(slot_id)
    now_ahead = ahead_for(msgspec.structs.replace(ahead, state=state, index=index), queue.shape_id)
    rows = {row.node: row for row in state.nodes}
    verdicts = verdicts_of(queue.resources, now_ahead.index, rows, state.now_ms, silent)
    answer = answer_of(queue, rank, place, now_ahead, setup, verdicts, silent, leads=leads)
    now, landings = 0, []
    if answer.reason in _ABLE:
        idle = _idle(queue, state, silent)
        serves = [*((slot.node, slot.devices, False) for slot in idle)]
        serves += [(grant.node, grant.devices, True) for grant in opened.values() if grant.node not in silent]
        mine = serves[place.own :]
        now = min(wish.count, len(mine))
        # Which of several idle slots takes a task is chance.
        landings = _merged(mine if len(idle) > place.own + wish.count else mine[:now])
    forecast = _forecast(wish, state, before, setup, answer, decided, now_ahead, queue, rank, now, landings, verdicts)
    return forecast, state


def _forecast(
    wish: Wish,
    state: ClusterState,
    before: ClusterState,
    setup: Setup,
    answer: Answer,
    decided: Plan,
    ahead: Ahead,
    queue: QueueRow,
    rank: int,
    now: int,
    landings: Sequence[Landing],
    verdicts: tuple[WorkerVerdict, ...],
) -> Forecast:
    resources = queue.resources
    if now:
        when, reason = When.NOW, None
        start_s = opening_s(state.slots) if landings[0].opens else 0.0
        how = "" if start_s is None else _how(start_s, landings[0])
        message = _lands(resources, wish, now, landings)
    else:
        when, reason, start_s, how, message = (
            _when(answer.reason),
            answer.reason,
            answer.start_s,
            answer.start_by,
            answer.message,
        )
    return Forecast(
        when=when,
        reason=reason,
        message=message,
        memory_bytes=resources.memory_bytes,
        gpus=resources.gpus,
        count=wish.count,
        now=now,
        places=tuple(landings),
        start_s=start_s,
        start_by=how,
        ends=_ends(queue, decided, ahead, rank, setup),
        groups=_groups(state, before, setup),
        unblocks=() if now else answer.unblocks,
        nearest=None if now else next((found for found in verdicts if found.short_by_bytes > 0), None),
        verdicts=classes_of(verdicts),
    )


_ABLE = frozenset({Why.WAITING_FOR_TURN, Why.SLOT_OPENING, Why.WAITING_FOR_SLOT})
"""What is said of a task that waits for nothing but its turn: the planner decides whether it has a slot at once."""


def _when(reason: Why) -> When:
    if reason is Why.WAITING_FOR_SCALE_UP:
        return When.AFTER_SCALE_UP
    return When.NEVER if reason in IMPOSSIBLE else When.LATER


def _entered(wish: Wish, state: ClusterState) -> tuple[ClusterState, QueueRow]:
    """The state with the wish in its queue, and that queue."""
    identity = shape_id(wish.shape)
    head = priority_offset(wish.priority) + 1
    for queue in state.queues:
        if queue.shape_id == identity:
            first = head if queue.head is None or not queue.depth else min(queue.head, head)
            since = queue.head_queued_ms if queue.depth else state.now_ms
            entered = msgspec.structs.replace(queue, depth=queue.depth + wish.count, head=first, head_queued_ms=since)
            queues = tuple(entered if q.shape_id == identity else q for q in state.queues)
            return msgspec.structs.replace(state, queues=queues), entered
    entered = QueueRow(shape_id=identity, shape=wish.shape, depth=wish.count, head=head, head_queued_ms=state.now_ms)
    queues = tuple(sorted((*state.queues, entered), key=lambda row: row.shape_id))
    return msgspec.structs.replace(state, queues=queues), entered


def _idle(queue: QueueRow, state: ClusterState, silent: frozenset[str]) -> list[SlotRow]:
    """Slots of its shape that wait for work, those first that have waited longest."""
    found = [
        (slot.idle_ms, slot.slot_id, slot)
        for slot in state.slots
        if slot.shape_id == queue.shape_id
        and is_serving(slot)
        and slot.running == 0
        and slot.idle_ms is not None
        and slot.node not in silent
    ]
    return [slot for _, _, slot in sorted(found, key=lambda each: each[:2])]


def _opened(queue: QueueRow, state: ClusterState, decided: Plan, scratch: Index, setup: Setup) -> dict[str, Grant]:
    """Where its slots go that the planner asks for; what is asked for before them takes its room in `scratch` too."""
    queues = {row.shape_id: row for row in state.queues}
    found: dict[str, Grant] = {}
    for item in decided.open:
        for number in range(item.count):
            grant = find(queues[item.shape_id].resources, scratch, setup.policy, setup.demand)
            if grant is None:
                break
            name = f"foreseen {item.shape_id}/{number}"
            scratch.lease(name, grant)
            if item.shape_id == queue.shape_id:
                found[name] = grant
        if item.shape_id == queue.shape_id:
            break
    return found


def _merged(places: Iterable[tuple[str, tuple[str, ...], bool]]) -> list[Landing]:
    counts: dict[tuple[str, tuple[str, ...], bool], int] = {}
    for place in places:
        counts[place] = counts.get(place, 0) + 1
    return [Landing(node, devices, slots, opens) for (node, devices, opens), slots in counts.items()]


def _how(start_s: float, landing: Landing) -> str:
    if not landing.opens:
        return "a slot of its shape is idle"
    return f"slots that are open took {format_duration(start_s)} to open"


def _lands(resources: Resources, wish: Wish, now: int, landings: Sequence[Landing]) -> str:
    where = names_of(landing.node for landing in landings)
    if wish.count == 1:
        one = "one of " if len({landing.node for landing in landings}) > 1 else ""
        return f"{words_of(resources)} fits now, on {one}{where}."
    rest = "" if now == wish.count else " The others follow as these end."
    return f"{now} of {wish.count} would run at once, each with {words_of(resources)}, on {where}.{rest}"


def _ends(queue: QueueRow, decided: Plan, ahead: Ahead, rank: int, setup: Setup) -> tuple[Ends, ...]:
    """What the planner would ask to end for it, by node."""
    slots = {slot.slot_id: slot for slot in ahead.state.slots}
    ends = ends_of(ahead.state, rank, setup.limits)
    nodes: dict[str, list[str]] = {}
    for close in decided.close:
        if close.reason == queue.shape_id:
            nodes.setdefault(slots[close.slot_id].node, []).append(close.slot_id)
    found = []
    for node, ids in sorted(nodes.items()):
        known = [seconds for slot_id in ids if (seconds := ends.get(slot_id)) is not None]
        grants = [ahead.base.grants[slot_id] for slot_id in ids if slot_id in ahead.base.grants]
        memory_bytes = sum(grant.memory_bytes * len(grant.devices) for grant in grants)
        found.append(Ends(node, len(ids), memory_bytes, max(known) if len(known) == len(ids) else None))
    return tuple(found)


def _groups(state: ClusterState, before: ClusterState, setup: Setup) -> tuple[GroupChange, ...]:
    """What the packed need of each group would be, without and with the wish."""
    if not setup.groups:
        return ()
    was = {need.group: need for need in pack(before, setup.groups, setup.drain_target_s).needs}
    most = {group.name: group.nodes_max for group in setup.groups}
    return tuple(
        GroupChange(need.group, need.live, was[need.group].nodes, need.nodes, most[need.group])
        for need in pack(state, setup.groups, setup.drain_target_s).needs
    )
