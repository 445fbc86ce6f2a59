"""Why a task that waits does not run yet, and what would let it: reasons, sentences, times. Pure.

Owns the words that people read when a task waits. It must not decide anything: it is told what `placement` and the planner
say, so that the words cannot differ from what happens. docs/explain.md has a row for each reason.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from manager.core.ahead import Ahead, Ending, Setup, ending_for, is_serving, opening_s, turn_s
from manager.core.model import ClusterState, QueueRow, SlotRow, TenantRow
from manager.core.node_kinds import empty_node
from manager.core.packing import PackGroup
from manager.core.placement import NEVER, Reason, devices_for
from manager.core.quantities import format_duration, format_memory
from manager.core.shapes import Resources
from manager.core.verdicts import DRAINING, FITS, SILENT, WorkerVerdict, could_ever, names_of
from manager.core.wanted import words_of


class Why(enum.StrEnum):
    """Why a task is where it is."""

    FINISHED = "Finished"
    RUNNING = "Running"
    CANCELLING = "Cancelling"
    RETRY_WAIT = "RetryWait"
    WAITING_FOR_DEPENDENCIES = "WaitingForDependencies"
    QUOTA_EXCEEDED = "QuotaExceeded"
    WAITING_FOR_TURN = "WaitingForTurn"  # slots of its shape are open; others are before it
    SLOT_OPENING = "SlotOpening"  # one was asked for, and there is room
    WAITING_FOR_SLOT = "WaitingForSlot"  # there is room; the controller has not asked for one yet
    NO_CONTROLLER = "NoController"  # there is room, and nobody who would ask for a slot
    SCHEDULER_UNREACHABLE = "SchedulerUnreachable"  # there is room, and nobody who would place a slot
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    FOREIGN_MEMORY = "ForeignMemory"
    RESERVED_FOR_LARGER = "ReservedForLarger"
    INSUFFICIENT_SHARE = "InsufficientShare"
    DEVICE_IN_USE = "DeviceInUse"
    INSUFFICIENT_CPU = "InsufficientCpu"
    INSUFFICIENT_HOST_MEMORY = "InsufficientHostMemory"
    TOO_MANY_SLOTS = "TooManySlots"
    WORKERS_DRAINING = "WorkersDraining"
    CORDONED = "Cordoned"
    NODE_UNREACHABLE = "NodeUnreachable"
    UNHEALTHY_DEVICE = "UnhealthyDevice"
    WAITING_FOR_SCALE_UP = "WaitingForScaleUp"
    EXCEEDS_LARGEST_DEVICE = "ExceedsLargestDevice"
    EXCEEDS_HOST = "ExceedsHost"
    TOO_FEW_DEVICES = "TooFewDevices"
    NO_MATCHING_ARCHITECTURE = "NoMatchingArchitecture"
    NO_MATCHING_DEVICE = "NoMatchingDevice"
    NO_MATCHING_LABELS = "NoMatchingLabels"
    NO_WORKERS = "NoWorkers"


IMPOSSIBLE: Final = frozenset({Why(reason.value) for reason in NEVER} | {Why.NO_WORKERS})
"""What is said where no node could ever hold it, and none that could be added."""
_OF_VERDICT: Final[dict[str, Why]] = {
    **{reason.value: Why(reason.value) for reason in Reason if reason.value in set(Why)},
    Reason.NO_WORKER.value: Why.NODE_UNREACHABLE,
    Reason.NODE_LOST.value: Why.NODE_UNREACHABLE,
    SILENT: Why.NODE_UNREACHABLE,
    DRAINING: Why.WORKERS_DRAINING,
}
assert _OF_VERDICT.keys() >= {reason.value for reason in Reason}


class Unblock(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that would let the task run.

    Attributes:
        what: in words.
        in_s: when it happens by itself, as far as that was learned; null: not known, or never by itself.
        node: where.
    """

    what: str
    in_s: float | None = None
    node: str = ""


class Place(msgspec.Struct, frozen=True):
    """Where a task stands.

    Attributes:
        own: how many tasks of its shape stand before it.
        higher: how many tasks of other shapes have a higher priority.
    """

    own: int
    higher: int = 0


class Answer(msgspec.Struct, frozen=True):
    """Why a request does not run at once: what `explain` and `foresee` have in common."""

    reason: Why
    message: str
    unblocks: tuple[Unblock, ...] = ()
    start_s: float | None = None
    start_by: str = ""


def answer_of(
    queue: QueueRow,
    rank: int,
    place: Place,
    ahead: Ahead,
    setup: Setup,
    verdicts: tuple[WorkerVerdict, ...],
    silent: frozenset[str] = frozenset(),
    *,
    leads: bool = True,
) -> Answer:
    """Why a task that waits in this queue does not run yet.

    Args:
        queue: its own.
        rank: of its priority.
        place: where it stands.
        ahead, setup: what is about to happen, and what decides it.
        verdicts: of all nodes, as `verdicts_of` gives them.
        silent: nodes that have not beaten for a lease.
        leads: whether a controller leads.
    """
    state, resources = ahead.state, queue.resources
    need = words_of(resources)
    before = _before(place)
    if (over := over_quota(resources, queue.shape.tenant, state.tenants)) is not None:
        return over
    slots = [slot for slot in state.slots if slot.shape_id == queue.shape_id]
    serving = [slot for slot in slots if is_serving(slot)]
    reachable = [slot for slot in serving if slot.node not in silent]
    if reachable:
        return _turn(queue, place, reachable)
    if serving:
        nodes = names_of(slot.node for slot in serving)
        return Answer(
            Why.NODE_UNREACHABLE,
            f"What serves its shape is on nodes that are silent ({nodes}); others are opened when these are declared lost.",
            tuple(Unblock(f"the agent on {node} speaks again", node=node) for node in sorted({s.node for s in serving})[:3]),
        )
    fits = [found.node for found in verdicts if found.verdict == FITS]
    coming = sorted({ahead.coming[slot.slot_id].node for slot in slots if slot.slot_id in ahead.coming})
    if fits or coming:
        return _room(queue, place, coming, fits, ahead, leads=leads)
    growing = growing_groups(resources, state, setup.groups)
    if not any(could_ever(found) for found in verdicts):
        return _never(resources, verdicts, growing, need)
    return _unplaced(queue, rank, ahead, setup, verdicts, growing, need, before)


def over_quota(resources: Resources, tenant: str, tenants: Iterable[TenantRow]) -> Answer | None:
    """The quota that keeps the tenant's tasks from being taken now; None where none does."""
    row = next((row for row in tenants if row.tenant == tenant), None)
    if row is None:
        return None
    memory_bytes = resources.memory_bytes * resources.gpus
    for name, used, more, most, words in (
        ("gpus_max", row.gpus, resources.gpus, row.gpus_max, str),
        ("memory_bytes_max", row.memory_bytes, memory_bytes, row.memory_bytes_max, format_memory),
        ("running_tasks_max", row.running, 1, row.running_max, str),
    ):
        if most is not None and used + more > most:
            what = _QUOTAS[name]
            never = " That is more than it may ever have." if more > most else ""
            return Answer(
                Why.QUOTA_EXCEEDED,
                f"Tenant {tenant} has {words(used)} of the {words(most)} {what} that it may have at once, "
                f"and this would be {words(more)} more ({name}).{never}",
                (
                    *(() if more > most else (Unblock(f"tasks of {tenant} that run now end"),)),
                    Unblock(f"its quota {name} is raised to {words(used + more)}: setting tenants.{tenant}.{name}"),
                ),
            )
    return None


_QUOTAS: Final = {"gpus_max": "devices", "memory_bytes_max": "of device memory", "running_tasks_max": "running tasks"}


def _turn(queue: QueueRow, place: Place, serving: Sequence[SlotRow]) -> Answer:
    """Slots serve its shape: it waits for those before it."""
    ahead = "it is next" if not place.own else f"{place.own} of its shape {_stand(place.own)} before it"
    idle = sum(slot.running == 0 and slot.idle_ms is not None for slot in serving)
    message = f"{_slots(len(serving))} its shape; {ahead}."
    if idle > place.own:
        return Answer(
            Why.WAITING_FOR_TURN, message, (Unblock("an idle slot takes it", 0.0),), 0.0, "a slot of its shape is idle"
        )
    seconds = turn_s(queue, place.own, len(serving))
    how = "" if seconds is None else f"{_times(place.own + 1, 'turn')} of {format_duration(queue.run_s or 0)} (learned), "
    how += f"{len(serving)} at a time" if how else ""
    return Answer(
        Why.WAITING_FOR_TURN,
        message,
        (Unblock(f"{_times(place.own + 1, 'task')} of its shape {_ends(place.own + 1)}", seconds),),
        seconds,
        how,
    )


def _room(queue: QueueRow, place: Place, coming: Sequence[str], fits: Sequence[str], ahead: Ahead, *, leads: bool) -> Answer:
    """There is room for it, and no slot yet."""
    need, before = words_of(queue.resources), _before(place)
    where = names_of(coming or fits)
    if not leads:
        return Answer(
            Why.NO_CONTROLLER,
            f"There is room for {need} on {where}, but no controller leads, and nobody else asks for slots.",
            (Unblock("a controller is started, or becomes leader (rocyard status says what runs)"),),
        )
    if ahead.state.dask is False:
        return Answer(
            Why.SCHEDULER_UNREACHABLE,
            f"There is room for {need} on {where}, but the controller does not reach the Dask scheduler, which places slots.",
            (Unblock("the Dask scheduler is reachable again (rocyard status says what runs)"),),
        )
    took_s = opening_s(ahead.state.slots)
    after_s = queue.run_s * place.own / max(1, len(coming)) if place.own and queue.run_s is not None else None
    start_s = None if took_s is None or (place.own and after_s is None) else took_s + (after_s or 0.0)
    how = "" if start_s is None else f"slots that are open took {format_duration(took_s or 0)} to open"
    if how and place.own:
        how += f", then {_times(place.own, 'turn')} of {format_duration(queue.run_s or 0)} (learned)"
    if coming:
        message = f"A slot is opening for {need} on {where}.{before}"
        return Answer(Why.SLOT_OPENING, message, (Unblock("its slot is open", took_s),), start_s, how)
    return Answer(
        Why.WAITING_FOR_SLOT,
        f"There is room for {need} on {where}; the controller has not asked for a slot yet "
        f"(it looks every few seconds).{before}",
        (Unblock("the controller asks for a slot, and it opens", took_s),),
        start_s,
        how,
    )


def _never(resources: Resources, verdicts: tuple[WorkerVerdict, ...], growing: Sequence["GrowingGroup"], need: str) -> Answer:
    """No node could hold it, however long it waits."""
    adding = next((group for group in growing if group.more), None)
    if adding is not None:
        nobody = "no node is registered" if not verdicts else "no node that is there could ever hold it"
        return Answer(
            Why.WAITING_FOR_SCALE_UP,
            f"It waits for a node of group {adding.name}, which can hold {need}; {nobody}. "
            f"The group has {adding.there} of at most {adding.nodes_max}.",
            _scale_ups(growing),
        )
    full = "".join(f" Group {group.name} could, but has all {group.nodes_max} nodes that it may have." for group in growing)
    if not verdicts:
        return Answer(
            Why.NO_WORKERS,
            f"No node is registered. The task is kept, and runs when a node comes that has {need} "
            f"(start one there with: rocyard node).{full}",
            (Unblock(f"a node joins that has {need} (rocyard node)"),),
        )
    reason = _OF_VERDICT[verdicts[0].verdict]
    nearest = verdicts[0]
    match reason:
        case Why.EXCEEDS_LARGEST_DEVICE:
            said = f"No node could ever hold {need}; {nearest.node} is nearest: {nearest.detail}."
        case Why.TOO_FEW_DEVICES:
            said = f"No node has {resources.gpus} devices; {nearest.node} is nearest: {nearest.detail}."
        case _:
            said = f"No node could ever take {need}; {nearest.node}: {nearest.detail}."
    return Answer(reason, said + full, (Unblock(f"a node joins that has {need}"), *_raise_groups(growing)))


def _unplaced(
    queue: QueueRow,
    rank: int,
    ahead: Ahead,
    setup: Setup,
    verdicts: tuple[WorkerVerdict, ...],
    growing: Sequence["GrowingGroup"],
    need: str,
    before: str,
) -> Answer:
    """No node can take it now: what the most hopeful one says, and what would change it."""
    nearest = verdicts[0]
    reason = _OF_VERDICT[nearest.verdict]
    ending = ending_for(queue.resources, ahead, rank, setup.limits)
    unblocks: list[Unblock] = []
    if ending is not None:
        unblocks.append(Unblock(_ending_words(ending, ahead), ending.seconds, ending.node))
    unblocks += _others(reason, verdicts)
    unblocks += _scale_ups(growing)
    start_s, how = None, ""
    if ending is not None and ending.seconds is not None and not before:
        took_s = opening_s(ahead.state.slots)
        start_s = ending.seconds + (took_s or 0.0)
        how = f"when {_times(len(ending.slots), 'slot')} on {ending.node} {_ends(len(ending.slots))}, by learned run times"
    match reason:
        case Why.FOREIGN_MEMORY:
            said = (
                f"{need} would fit but for ForeignMemory {format_memory(nearest.foreign_bytes)} on {nearest.device}: "
                f"memory of processes that are none of ours. It lacks {format_memory(nearest.short_by_bytes)}."
            )
        case Why.INSUFFICIENT_MEMORY | Why.RESERVED_FOR_LARGER:
            said = f"No node has room for {need} now; {nearest.node} is nearest: {nearest.detail}."
        case _:
            said = f"No node can take {need} now; {nearest.node}: {nearest.detail}."
    return Answer(reason, said + before, tuple(unblocks), start_s, how)


def _others(reason: Why, verdicts: tuple[WorkerVerdict, ...]) -> list[Unblock]:
    """What people can do about what nodes say, the nearest node of each kind first."""
    found: dict[str, Unblock] = {}
    for each in verdicts:
        if each.verdict in found or each.verdict in NEVER:
            continue
        match _OF_VERDICT[each.verdict]:
            case Why.FOREIGN_MEMORY:
                what = f"free {format_memory(each.short_by_bytes)} of foreign memory on {each.device}"
            case Why.WORKERS_DRAINING | Why.CORDONED:
                what = f"let {each.node} take on work again: rocyard uncordon {each.node}"
            case Why.NODE_UNREACHABLE:
                what = f"{each.node} is reachable again: {each.detail}"
            case Why.UNHEALTHY_DEVICE:
                what = f"the devices of {each.node} are healthy again (rocyard doctor there says what is wrong)"
            case Why.RESERVED_FOR_LARGER:
                what = f"what the room on {each.node} is kept for has run"
            case Why.TOO_MANY_SLOTS:
                what = f"the setting node.slots_max of {each.node} is raised"
            case _:
                continue
        found[each.verdict] = Unblock(what, node=each.node)
    own = [found.pop(word) for word in list(found) if _OF_VERDICT[word] is reason]
    return [*own, *found.values()]


def _ending_words(ending: Ending, ahead: Ahead) -> str:
    sizes = {ahead.index.grants[slot_id].memory_bytes for slot_id in ending.slots}
    of = f" of {format_memory(min(sizes))}" if len(sizes) == 1 else ""
    about = "" if ending.seconds is None else f" (about {format_duration(ending.seconds)})"
    return f"{_times(len(ending.slots), 'slot')}{of} on {ending.node} {_ends(len(ending.slots))}{about}"


class GrowingGroup(msgspec.Struct, frozen=True):
    """A group of nodes that could hold a request, with how many of them there are and may be."""

    name: str
    there: int
    nodes_max: int

    @property
    def more(self) -> bool:
        """Whether it may have another node."""
        return self.there < self.nodes_max


def growing_groups(resources: Resources, state: ClusterState, groups: Iterable[PackGroup]) -> tuple[GrowingGroup, ...]:
    """Groups whose empty node could hold the request."""
    return tuple(
        GrowingGroup(
            group.name,
            sum(row.info.group == group.name and not row.left and not row.fenced for row in state.nodes),
            group.nodes_max,
        )
        for group in groups
        if could_hold(resources, group)
    )


def could_hold(resources: Resources, group: PackGroup) -> bool:
    """Whether an empty node of the group could hold the request."""
    return devices_for(resources, empty_node(group.name, group.kind)) is not None


def _scale_ups(growing: Iterable[GrowingGroup]) -> tuple[Unblock, ...]:
    return tuple(
        Unblock(f"the autoscaler adds a node of group {group.name} ({group.there} of {group.nodes_max} are there)")
        for group in growing
        if group.more
    )


def _raise_groups(growing: Iterable[GrowingGroup]) -> tuple[Unblock, ...]:
    return tuple(
        Unblock(f"group {group.name} may have more nodes: setting groups.{group.name}.workers_max ({group.nodes_max})")
        for group in growing
    )


def _before(place: Place) -> str:
    parts = [f"{place.own} of its shape"] if place.own else []
    if place.higher:
        parts.append(f"{place.higher} of a higher priority")
    return f" {' and '.join(parts)} {_stand(place.own + place.higher)} before it." if parts else ""


def _slots(count: int) -> str:
    return "1 slot serves" if count == 1 else f"{count} slots serve"


def _stand(count: int) -> str:
    return "stands" if count == 1 else "stand"


def _ends(count: int) -> str:
    return "ends" if count == 1 else "end"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
