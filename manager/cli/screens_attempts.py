"""The attempts at a task, and arrays, as people read them. Pure: from answers of the API to renderables."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from manager.cli.screens_tasks import BAR_COLUMNS, fields, plain_table
from manager.cli.text import NONE, bar, clock, count, one_line, span
from manager.core.answers_arrays import ArrayCancelled, ArrayView
from manager.core.answers_tasks import CANCELLED, SUCCEEDED, AttemptView


def attempt_table(attempts: Sequence[AttemptView]) -> RenderableType:
    """Each attempt, the last one at the end, with what its error said below."""
    if not attempts:
        return Text("No attempts: no slot has taken it yet.")
    table = plain_table("ATTEMPT", "NODE", "CLAIMED", "WAITED", "TOOK", "WHY IT ENDED")
    table.columns[5].no_wrap = False
    for one in attempts:
        table.add_row(
            Text(str(one.number)),
            Text(one_line(one.node or NONE, 16)),
            Text(clock(one.claimed_at)[:19]),
            Text(span(one.claimed_at, one.started_at)),
            Text(span(one.started_at, one.ended_at)),
            _why(one),
        )
    return table


def _why(attempt: AttemptView) -> Text:
    if not attempt.why:
        return Text("it goes on", "bold blue")
    if attempt.why == SUCCEEDED:
        return Text(attempt.why, "green")
    if attempt.why == CANCELLED:
        return Text(attempt.why, "magenta")
    said = f": {one_line(attempt.message, 120)}" if attempt.message else ""
    return Text.assemble((one_line(attempt.why), "red" if attempt.message else "yellow"), said)


def array_screen(array: ArrayView) -> RenderableType:
    """How far an array is."""
    parts = [
        (array.succeeded, "█", "green", "succeeded"),
        (array.failed, "▓", "red", "failed"),
        (array.cancelled, "▒", "magenta", "cancelled"),
    ]
    line = Text()
    colours = {character: colour for _, character, colour, _ in parts}
    for character, run in bar([(number / array.count, character) for number, character, _, _ in parts], BAR_COLUMNS):
        line.append(run, colours.get(character, "dim"))
    words = Text("  ")
    for number, _, colour, word in parts:
        if number:
            words.append(f"{number} {word}", colour).append(", ")
    words.append(f"{array.unfinished} to go" if array.unfinished else "all have ended")
    pairs: list[tuple[str, RenderableType]] = [
        ("array", Text(array.array_id)),
        ("function", Text(one_line(array.function) + (f", index as {one_line(array.index_as)}" if array.index_as else ""))),
        ("tenant", Text(one_line(array.tenant))),
        ("tasks", Text(str(array.count) if array.made == array.count else f"{array.count} ({array.made} recorded yet)")),
        ("submitted", Text(clock(array.created_at))),
        ("done", line + words),
    ]
    if array.name is not None:
        pairs.insert(1, ("name", Text(array.name)))
    screen: list[RenderableType] = [fields(pairs)]
    if array.failed:
        screen.append(Text(f"\nWhich failed: rocyard tasks --status FAILED --array {array.array_id}", "dim"))
    return Group(*screen)


def array_cancelled_line(answer: ArrayCancelled) -> str:
    """What the cancellation of an array did."""
    if not answer.cancelled and not answer.ending:
        return f"all tasks of {answer.array_id} had ended already"
    ending = f", and {count(answer.ending, 'running one')} {'is' if answer.ending == 1 else 'are'} being ended"
    return f"{count(answer.cancelled, 'task')} of {answer.array_id} cancelled{ending if answer.ending else ''}"
