"""Tasks, explanations and functions as people read them. Pure: from answers of the API to renderables.

Made for 80 columns. Words that came from users are made safe first (`manager.cli.text.plain`).
"""

import datetime as dt
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from manager.cli.text import NONE, ago, arguments_of, bar, clock, count, memory, one_line, plain, span
from manager.core.answers import resources_in
from manager.core.answers_functions import FunctionView
from manager.core.answers_slots import QueueView
from manager.core.answers_tasks import Cancelled, TaskSummary, TaskView
from manager.core.lifecycle import AfterFailed, TaskStatus
from manager.core.model import TaskError
from manager.core.quantities import format_duration, format_memory
from manager.core.wanted import more_words_of

BAR_COLUMNS: Final = 24
RESULT_CHARS_MAX: Final = 4000
"""A screen or two; `--output json` has all of it."""

STYLES: Final[dict[TaskStatus, str]] = {
    TaskStatus.BLOCKED: "dim",
    TaskStatus.QUEUED: "cyan",
    TaskStatus.RUNNING: "bold blue",
    TaskStatus.RETRY_WAIT: "yellow",
    TaskStatus.SUCCEEDED: "green",
    TaskStatus.FAILED: "bold red",
    TaskStatus.CANCELLED: "magenta",
}
assert STYLES.keys() == set(TaskStatus)


def plain_table(*columns: str) -> Table:
    """An empty table without lines between its cells."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def indented(text: Text) -> RenderableType:
    """`text`, its broken lines too, two columns to the right."""
    return Padding(text, (0, 0, 0, 2))


def fields(pairs: Sequence[tuple[str, RenderableType]]) -> Table:
    """Names on the left, values on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, show_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    return table


def task_table(tasks: Sequence[TaskSummary], now: dt.datetime | None = None) -> RenderableType:
    """A list of tasks."""
    if not tasks:
        return Text("No tasks. Submit one: rocyard submit --memory 1GiB --wait echo '{\"x\": 1}'")
    now = now or dt.datetime.now(dt.UTC)
    table = plain_table("TASK", "STATUS", "FUNCTION", "NODE", "AGE", "TOOK")
    table.columns[0].min_width = 26
    for task in tasks:
        cells = [
            Text(task.task_id),
            Text(task.status + _percent(task), STYLES[task.status]),
            Text(one_line(task.function, 24) + ("" if task.index is None else f"[{task.index}]")),
            Text(one_line(task.node or NONE, 20)),
            Text(ago(task.created_at, now).removesuffix(" ago")),
            Text(span(task.started_at, task.finished_at)),
        ]
        table.add_row(*cells)
    return table


def task_screen(task: TaskView) -> RenderableType:
    """All about one task."""
    counted = [(task.failures, "failure"), (task.crashes, "crash"), (task.losses, "loss")]
    blame = ", ".join(
        count(number, noun).replace("crashs", "crashes").replace("losss", "losses") for number, noun in counted if number
    )
    pairs: list[tuple[str, RenderableType]] = [
        ("task", Text(task.task_id)),
        ("status", Text(task.status + (" (cancelling)" if _cancelling(task) else ""), STYLES[task.status])),
        ("function", Text(one_line(task.function))),
        ("tenant", Text(one_line(task.tenant))),
        ("needs", Text(f"{needs(task)}, at most {format_duration(task.time_limit_s)}")),
        ("node", Text(one_line(task.node or NONE))),
        ("attempt", Text(f"{task.attempt}" + (f" ({blame})" if blame else ""))),
        ("submitted", Text(clock(task.created_at))),
        ("started", Text(clock(task.started_at) + _waited(task))),
        ("finished", Text(clock(task.finished_at) + _took(task))),
    ]
    if task.priority:
        pairs.insert(5, ("priority", Text(str(task.priority))))
    pairs[2:2] = _belongings(task)
    pairs += _conditions(task)
    if task.progress is not None:
        pairs.append(("progress", progress_bar(task.progress, task.progress_message)))
    if task.checkpoint:
        pairs.append(("checkpoint", Text(one_line(task.checkpoint))))
    if not isinstance(task.args, msgspec.UnsetType):
        pairs.append(("arguments", json_text(bytes(task.args))))
    if task.status is TaskStatus.SUCCEEDED:
        pairs.append(("result", _result(task)))
    parts: list[RenderableType] = [fields(pairs)]
    if task.error is not None:
        parts.append(error_text(task.error))
    return Group(*parts)


def progress_bar(progress: float, message: str) -> Text:
    """How far it is, as it says itself."""
    text = Text()
    for character, run in bar([(progress, "█")], BAR_COLUMNS):
        text.append(run, "blue" if character == "█" else "dim")
    return text.append(f" {progress:.0%}" + (f"  {one_line(message, 120)}" if message else ""))


def _percent(task: TaskSummary) -> str:
    return f" {task.progress:.0%}" if task.progress is not None and task.status is TaskStatus.RUNNING else ""


def _belongings(task: TaskView) -> list[tuple[str, RenderableType]]:
    """Its name, and the array that it is one of."""
    found: list[tuple[str, RenderableType]] = []
    if task.name is not None:
        found.append(("name", Text(task.name)))
    if task.array_id is not None:
        found.append(("array", Text(f"{task.array_id}, index {task.index}")))
    return found


def _conditions(task: TaskView) -> list[tuple[str, RenderableType]]:
    """When it may begin, when it must have ended, and what it is tried again for."""
    found: list[tuple[str, RenderableType]] = []
    if task.after:
        left = f"{task.waits} of {len(task.after)} to go" if task.waits else "all have ended"
        then = ", then it runs however they end" if task.after_failed is AfterFailed.RUN else ""
        found.append(("after", Text("\n".join([left + then, *task.after]))))
    if task.max_attempts > 1:
        which = ", ".join(task.retry_on) if task.retry_on else "any error"
        found.append(("tried again", Text(f"on {which}, up to {task.max_attempts} runs")))
    limits = [
        f"{what} within {format_duration(value)}"
        for what, value in (("started", task.start_timeout_s), ("ended", task.total_timeout_s))
        if value is not None
    ]
    if task.deadline_at is not None:
        limits.append(f"ended by {clock(task.deadline_at)}")
    if limits:
        found.append(("must be", Text(", ".join(limits))))
    if task.more_memory:
        found.append(("memory", Text("it ran out of device memory once, and has more room now", "yellow")))
    return found


def needs(view: TaskView | FunctionView | QueueView) -> str:
    """What is asked for; words that came from users are made safe."""
    text = memory(view.memory_bytes, view.gpus)
    more = "" if view.resources is None else more_words_of(resources_in(view.resources))
    return f"{text}, {one_line(more)}" if more else text


def _cancelling(task: TaskView) -> bool:
    return task.cancel_requested and task.finished_at is None


def _waited(task: TaskView) -> str:
    return f"  (after {span(task.created_at, task.started_at)})" if task.started_at is not None else ""


def _result(task: TaskView) -> Text:
    if task.result_file is None:
        return json_text(bytes(task.result))
    return Text(f"{format_memory(task.result_file.bytes)} in a file: rocyard result {task.task_id} > FILE")


def _took(task: TaskView) -> str:
    return f"  (took {span(task.started_at, task.finished_at)})" if task.started_at and task.finished_at else ""


def json_text(raw: bytes) -> Text:
    """JSON, indented where it is long, cut where it is very long."""
    text = raw.decode()
    if len(text) > 60:
        text = msgspec.json.format(text, indent=2)
    if len(text) > RESULT_CHARS_MAX:
        text = f"{text[:RESULT_CHARS_MAX]}\n… {len(text) - RESULT_CHARS_MAX} more characters: --output json"
    return Text(plain(text))


def error_text(error: TaskError) -> RenderableType:
    """Why a task failed."""
    head = Text.assemble((f"\n{plain(error.type)}: ", "bold red"), plain(error.message))
    return Group(head, indented(Text(plain(error.traceback.rstrip()), "dim"))) if error.traceback else head


def cancelled_line(answer: Cancelled) -> str:
    """What a cancellation did."""
    if answer.status is TaskStatus.CANCELLED:
        return f"{answer.task_id} is cancelled"
    if answer.cancel_requested:
        return f"{answer.task_id} is being ended"
    return f"{answer.task_id} had ended already ({answer.status})"


def functions_screen(functions: Sequence[FunctionView]) -> RenderableType:
    """Every function with its arguments and defaults."""
    if not functions:
        return Text("No functions yet: a node's agent publishes them when it has started.")
    parts: list[RenderableType] = []
    for function in functions:
        wants = f"{needs(function)}, at most {format_duration(function.time_limit_s)}"
        schema = msgspec.json.decode(function.schema)
        lines: list[RenderableType] = [Text.assemble((plain(function.name), "bold"), (f"  {wants}", "dim"))]
        if function.description:
            lines.append(indented(Text(one_line(function.description))))
        arguments = ", ".join(arguments_of(schema if isinstance(schema, dict) else None))
        if arguments:
            lines.append(indented(Text(arguments, "cyan")))
        if function.problem:
            lines.append(indented(Text(f"cannot be used: {one_line(function.problem)}", "red")))
        parts += [*lines, Text()]
    return Group(*parts[:-1])
