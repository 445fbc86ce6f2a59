"""Why a task waits and what would happen, as people read it. Pure: from answers of the API to renderables."""

from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from manager.cli.screens_tasks import STYLES, fields, indented, plain_table
from manager.cli.text import count, memory, one_line, plain, seconds
from manager.core.explain import Explanation
from manager.core.foresee import Forecast, GroupChange, PlanView, ScaleStep, When
from manager.core.quantities import format_memory
from manager.core.snapshot import Replayed, Snapshot, Step
from manager.core.verdicts import FITS, VerdictClass, WorkerVerdict, classes_of
from manager.core.waiting import Unblock

NODES_SHOWN: Final = 8
"""Nodes with a line of their own; more are told in groups."""
STEPS_SHOWN: Final = 40
_WHEN_STYLES: Final = {When.NOW: "green", When.LATER: "yellow", When.AFTER_SCALE_UP: "yellow", When.NEVER: "red"}


def explanation_screen(found: Explanation) -> RenderableType:
    """Why a task is where it is: the reason, what would change it, and what the nodes say."""
    head = Text.assemble((found.status, STYLES[found.status]), "  ", (found.reason, "bold"))
    pairs: list[tuple[str, RenderableType]] = [("needs", _needs(found))]
    if found.wait_s is not None:
        pairs.append(("waits", Text(seconds(found.wait_s))))
    if found.position is not None:
        pairs.append(("place", Text(_place(found))))
    if found.slots_open or found.slots_opening:
        opening = f", {found.slots_opening} asked for" if found.slots_opening else ""
        pairs.append(("slots", Text(f"{found.slots_open} open{opening}")))
    if found.start_s is not None:
        pairs.append(("starts", Text(f"in about {seconds(found.start_s)}  ({plain(found.start_by)})")))
    parts: list[RenderableType] = [head, Text(plain(found.message)), Text(), fields(pairs)]
    parts += _unblocks(found.unblocks)
    parts += _nodes(found.workers, found.groups)
    return Group(*parts)


def _needs(found: Explanation) -> Text:
    text = Text(memory(found.memory_bytes, found.gpus))
    if found.learned_bytes:
        text.append(f"  (learned: tasks like it used more than was asked for, {format_memory(found.learned_bytes)})", "yellow")
    return text


def _place(found: Explanation) -> str:
    higher = (found.before or 0) - (found.position or 0)
    own = "the first of its shape" if not found.position else f"{found.position} of its shape before it"
    parts = [own]
    if higher:
        parts.append(f"{higher} of a higher priority before it")
    if found.beside:
        parts.append(f"{found.beside} of other shapes take turns with it")
    return ", ".join(parts)


def _unblocks(unblocks: Sequence[Unblock]) -> list[RenderableType]:
    if not unblocks:
        return []
    lines: list[RenderableType] = [Text(), Text("any of this would let it run", "bold")]
    lines += [indented(Text.assemble(("• ", "dim"), plain(each.what))) for each in unblocks]
    return lines


def _nodes(workers: Sequence[WorkerVerdict], groups: Sequence[VerdictClass]) -> list[RenderableType]:
    """A line for each node where they are few, else one for all that say the same."""
    groups = groups or classes_of(workers)
    if not groups:
        return []
    if sum(group.count for group in groups) <= NODES_SHOWN and workers:
        table = plain_table("NODE", "VERDICT", "")
        for worker in workers:
            table.add_row(Text(one_line(worker.node, 24)), _verdict(worker.verdict), Text(plain(worker.detail)))
        table.columns[2].no_wrap = False
        return [Text(), table]
    table = plain_table("NODES", "VERDICT", "NEAREST", "")
    table.columns[3].no_wrap = False
    for group in groups:
        nearest = one_line(group.nodes[0], 24) if group.nodes else ""
        table.add_row(
            Text(str(group.count), justify="right"), _verdict(group.verdict), Text(nearest), Text(plain(group.detail))
        )
    return [Text(), table]


def _verdict(word: str) -> Text:
    return Text(word, "green" if word == FITS else "yellow")


def plan_screen(view: PlanView) -> RenderableType:
    """What would happen to tasks that were not submitted."""
    parts: list[RenderableType] = []
    for number, forecast in enumerate(view.requests):
        parts += [*([Text()] if number else []), *_forecast(forecast)]
    first = {change.group: change.need_before for change in view.requests[0].groups}
    whole = [msgspec.structs.replace(change, need_before=first[change.group]) for change in view.requests[-1].groups]
    changes = [change for change in whole if change.need_after != change.need_before]
    if changes:
        parts += [Text(), Text("groups of nodes", "bold"), *_scaling(changes, view.scaling)]
    parts += [Text(), Text("Nothing was submitted.", "dim")]
    return Group(*parts)


def _forecast(found: Forecast) -> list[RenderableType]:
    head = Text.assemble((found.when, _WHEN_STYLES[found.when]), "  ", (found.reason or "", "bold"))
    pairs: list[tuple[str, RenderableType]] = [("needs", Text(memory(found.memory_bytes, found.gpus)))]
    if found.count > 1:
        pairs.append(("tasks", Text(f"{found.now} of {found.count} at once")))
    if found.start_s is not None:
        pairs.append(("starts", Text(f"in about {seconds(found.start_s)}  ({plain(found.start_by)})")))
    for place in found.places[:NODES_SHOWN]:
        how = "opened for it" if place.opens else "open already"
        devices = ", ".join(one_line(uuid, 40) for uuid in place.devices)
        pairs.append(("on", Text(f"{one_line(place.node, 40)}  {devices}  ({count(place.slots, 'slot')}, {how})")))
    if len(found.places) > NODES_SHOWN:
        pairs.append(("", Text(f"and {len(found.places) - NODES_SHOWN} more places")))
    for ends in found.ends:
        when = "" if ends.seconds is None else f", in about {seconds(ends.seconds)}"
        what = f"{count(ends.slots, 'slot')} on {one_line(ends.node, 40)} ({format_memory(ends.memory_bytes)}){when}"
        pairs.append(("ends", Text(what)))
    parts: list[RenderableType] = [head, Text(plain(found.message)), Text(), fields(pairs)]
    parts += _unblocks(found.unblocks)
    return parts if found.now else [*parts, *_nodes((), found.verdicts)]


def _scaling(changes: Sequence[GroupChange], steps: Sequence[ScaleStep]) -> list[RenderableType]:
    table = plain_table("GROUP", "NODES", "NEED", "WITH IT", "MOST", "THE AUTOSCALER")
    done = {step.group: step for step in steps}
    for change in changes:
        step = done.get(change.group)
        acts = "" if step is None else f"{step.action}{f' {step.nodes}' if step.nodes else ''}: {step.reason}"
        numbers = (change.nodes, change.need_before, change.need_after, change.nodes_max)
        table.add_row(Text(one_line(change.group, 30)), *(Text(str(number)) for number in numbers), Text(acts))
    return [table]


def replay_screen(snapshot: Snapshot, answers: Sequence[Replayed]) -> RenderableType:
    """What policies make of a snapshot: a line for each, and the steps of one."""
    state = snapshot.state
    waits = sum(queue.depth for queue in state.queues)
    shapes, open_slots = len(state.queues), len(state.slots)
    head = (
        f"{count(len(state.nodes), 'node')}, {count(open_slots, 'slot')}, {count(waits, 'waiting task')} of "
        f"{count(shapes, 'shape')}; made under policy {snapshot.policy}"
    )
    table = plain_table("POLICY", "OPENS", "HOLDS", "CLOSES", "ALLOCATED", "LARGEST", "GPUS", "STRANDED")
    for answer in answers:
        table.add_row(
            Text(one_line(answer.policy, 30)),
            *(Text(str(number)) for number in (answer.opened, answer.held, answer.closed)),
            Text(f"{answer.allocated_ratio:.1%}"),
            Text(format_memory(answer.largest_bytes)),
            Text(str(answer.largest_gpus)),
            Text(f"{answer.stranded_ratio:.1%}"),
        )
    parts: list[RenderableType] = [Text(plain(head)), Text(), table]
    if len(answers) == 1:
        parts += _steps(answers[0].steps)
    return Group(*parts)


def _steps(steps: Sequence[Step]) -> list[RenderableType]:
    if not steps:
        return [Text(), Text("Nothing is opened and nothing is closed.", "dim")]
    table = plain_table("WHAT", "SLOTS", "SHAPE", "NEEDS", "NODE", "DEVICES", "WHY")
    for step in steps[:STEPS_SHOWN]:
        style = {"open": "green", "hold": "yellow"}.get(step.what, "")
        table.add_row(
            Text(step.what, style),
            Text(str(step.count)),
            Text(step.shape_id),
            Text(memory(step.memory_bytes, step.gpus)),
            Text(one_line(step.node, 24)),
            Text(one_line(", ".join(step.devices), 40)),
            Text(one_line(step.reason, 30)),
        )
    more = [Text(f"and {len(steps) - STEPS_SHOWN} more: --output json", "dim")] if len(steps) > STEPS_SHOWN else []
    return [Text(), table, *more]
