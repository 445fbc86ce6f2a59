"""Commands about tasks and functions. Each parses, calls the client, and prints."""

import contextlib
import shlex
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import msgspec

from manager.cli.exits import Exit, exit_of
from manager.cli.needs import needs_of, with_needs
from manager.cli.report import report
from manager.cli.session import Session, command, print_json, read_object
from manager.core.errors import RocyardError
from manager.core.ids import ARRAY_MAX, new_id

if TYPE_CHECKING:
    import datetime as dt

    from manager.client import Array, Client, Task, TaskOptions
    from manager.core.answers_arrays import ArrayView
    from manager.core.answers_tasks import TaskLog

LISTED: Final = 20
"""Tasks that `rocyard tasks` shows: a screenful."""

_tenant = click.option("--tenant", help="Whose it is, where it is another tenant's (admin keys).")


@command("submit", client=True)
@click.argument("function")
@click.argument("args", default="{}")
@with_needs
@click.option("-p", "--priority", default="0", metavar="PRIORITY", help="-10 to 10, or low, normal, high, urgent; 0.")
@click.option("--max-attempts", type=click.IntRange(1, 100), default=1, help="Runs it may have if it fails; 1.")
@click.option("--time-limit", metavar="TIME", help="Longest that one run may take, such as 5m.")
@click.option("--retry-on", multiple=True, metavar="ERROR", help="Only such errors are worth another run, such as OSError.")
@click.option("--start-timeout", metavar="TIME", help="Longest from now until it first starts.")
@click.option("--total-timeout", metavar="TIME", help="Longest from now until its end, with all runs and pauses.")
@click.option("--deadline", metavar="WHEN", help="When it must have ended, such as 2027-01-31T18:00Z.")
@click.option("--name", help="Your own for it, unique among your tasks; submitted again, it is the same task.")
@click.option("--after", multiple=True, metavar="TASK", help="Runs when this task or array has succeeded; by id or name.")
@click.option("--after-failed", type=click.Choice(["fail", "run"]), default="fail", help="If one of --after fails; fail.")
@click.option("--count", type=click.IntRange(1, ARRAY_MAX), help="Makes it an array of so many tasks of the same kind.")
@click.option("--index-as", metavar="ARG", help="With --count: the argument that gives each task its index, from 0.")
@click.option("--idempotency-key", metavar="KEY", help="The same key with the same task, within a day: submitted once.")
@click.option("--allow-infeasible", is_flag=True, help="Take it although no known node could ever hold it; it waits.")
@click.option("-w", "--wait", is_flag=True, help="Wait for its end and print its result.")
@click.option("--timeout", metavar="TIME", help="With --wait: how long at most.")
def submit(
    session: Session,
    *,
    function: str,
    args: str,
    priority: str,
    max_attempts: int,
    time_limit: str | None,
    retry_on: tuple[str, ...],
    start_timeout: str | None,
    total_timeout: str | None,
    deadline: str | None,
    name: str | None,
    after: tuple[str, ...],
    after_failed: Literal["fail", "run"],
    count: int | None,
    index_as: str | None,
    idempotency_key: str | None,
    allow_infeasible: bool,
    wait: bool,
    timeout: str | None,
    **needs: Any,
) -> int:
    """Submit a task that runs FUNCTION, or an array of them, and print its id.

    ARGS is a JSON object of the function's arguments: as text, @FILE, or - for stdin. 'rocyard functions' lists
    functions and what they take.
    """
    timeout_s = _timeout(timeout, wait=wait)
    number = priority_number(priority)
    if index_as is not None and count is None:
        raise click.UsageError("--index-as needs --count.")
    due = _moment(deadline)
    wanted = needs_of(needs)
    values = read_object(args)
    with session.client() as client:
        options: TaskOptions = {
            "priority": number,
            "max_attempts": max_attempts,
            "retry_on": retry_on,
            "start_timeout": start_timeout,
            "time_limit": time_limit,
            "total_timeout": total_timeout,
            "deadline": due,
            "name": name,
            "after": [found(client, text) for text in after],
            "after_failed": after_failed,
            "allow_infeasible": allow_infeasible,
            **wanted,
        }
        made: Task | Array
        key = new_id() if idempotency_key is None else idempotency_key
        again = f"It may have been accepted: again with --idempotency-key {shlex.quote(key)} it is submitted once at most."
        try:
            if count is None:
                made = client.submit(function, values, idempotency_key=key, **options)
            else:
                made = client.submit_array(function, values, count=count, index_as=index_as, idempotency_key=key, **options)
        except RocyardError as error:
            if "idempotency_key" in error.details:
                error.add_note(again)
            raise
        except KeyboardInterrupt:
            session.note(again)
            raise
        if wait:
            return _wait_and_print(session, client, made, timeout_s)
        if session.wants_json:
            print_json(id_of(made))
        else:
            click.echo(next(iter(id_of(made).values())))
        return Exit.OK


def found(client: "Client", text: str, tenant: str | None = None) -> "Task | Array":
    """The task or the array that `text` is the id or the name of.

    Raises:
        NotFound: a name that no task has. Whether there is a task of an id shows when it is asked for.
        BadRequest: it can be neither.
    """
    import re

    from manager.client import Array, Task
    from manager.core.errors import BadRequest, NotFound
    from manager.core.ids import is_array_id, is_id
    from manager.core.requests import TASK_NAME_PATTERN

    if is_array_id(text):
        with contextlib.suppress(NotFound):
            return Array(client, text, client.array_view(text, tenant=tenant).count)
    if is_id(text):
        return Task(client, text)
    if not re.search(TASK_NAME_PATTERN, text):
        raise BadRequest(f"{text[:80]!r} is no id and no name of a task.")
    for one in client.tasks(name=text, limit=1, tenant=tenant):
        if one.array_id is None:
            return Task(client, one.task_id)
        return Array(client, one.array_id, client.array_view(one.array_id, tenant=tenant).count)
    raise NotFound(f"There is no task and no array of the name {text[:80]!r}.")


def id_of(made: "Task | Array") -> dict[str, str]:
    """Its id, under the name that says what it is of."""
    from manager.client import Task

    return {"task_id": made.task_id} if isinstance(made, Task) else {"array_id": made.array_id}


def the_task(client: "Client", text: str, tenant: str | None) -> "Task":
    """As `found`, of a task.

    Raises:
        UsageError: it is an array.
    """
    from manager.client import Task

    made = found(client, text, tenant)
    if not isinstance(made, Task):
        raise click.UsageError(f"{text} is an array; name one of its tasks: 'rocyard tasks --array {made.array_id}'.")
    return made


def _moment(text: str | None) -> "dt.datetime | None":
    import datetime as dt

    if text is None:
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise click.UsageError(f"--deadline: {text!r} is no time with its zone; write such as 2027-01-31T18:00Z")
    return moment


def priority_number(text: str) -> int:
    """The number of a priority that may be given by its name."""
    from manager.core.model import PRIORITY_MAX
    from manager.core.requests import priority_of

    try:
        number = int(text) if text.lstrip("+-").isdecimal() else priority_of(text)
    except ValueError as error:
        raise click.UsageError(f"--priority: {error}") from error
    if not -PRIORITY_MAX <= number <= PRIORITY_MAX:
        raise click.UsageError(f"--priority: {number} is not from -{PRIORITY_MAX} to {PRIORITY_MAX}")
    return number


def _timeout(text: str | None, *, wait: bool) -> float | None:
    from manager.core.quantities import parse_duration

    if text is None:
        return None
    if not wait:
        raise click.UsageError("--timeout needs --wait.")
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.UsageError(f"--timeout: {error}") from error


def _wait_and_print(session: Session, client: "Client", made: "Task | Array", timeout_s: float | None) -> int:
    """Wait for what was submitted and print its result (as JSON output: all of it); the exit code for how it ended."""
    from manager.client import Array

    ((kind, own),) = id_of(made).items()
    session.note(f"{kind.removesuffix('_id')} {own}")
    try:
        if isinstance(made, Array):
            return _array_end(session, made.wait(timeout_s))
        view = made.wait(timeout_s)
    except KeyboardInterrupt:
        session.note(f"It goes on: 'rocyard show {own}', 'rocyard cancel {own}'.")
        raise
    if session.wants_json:
        print_json(view)
    try:
        result = None if session.wants_json and view.result_file is not None else client.result_of(view)
    except RocyardError as error:
        if session.wants_json:
            return exit_of(error)
        raise
    if not session.wants_json:
        print_json(result)
    return Exit.OK


def _array_end(session: Session, view: "ArrayView") -> int:
    from manager.cli.screens_attempts import array_screen

    session.emit(view, array_screen)
    return Exit.OK if view.succeeded == view.count else Exit.FAILED


@command("tasks", client=True)
@click.option("-s", "--status", metavar="STATUS", help="Only these: QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, …")
@click.option("-f", "--function", help="Only tasks of this function.")
@click.option("--name", help="Only the task, or the tasks of the array, of this name.")
@click.option("--array", metavar="ARRAY", help="Only the tasks of this array, by its id.")
@click.option("--tenant", help="Only this tenant's (admin keys).")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=LISTED, help=f"How many; {LISTED} if left out.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
def tasks(
    session: Session,
    *,
    status: str | None,
    function: str | None,
    name: str | None,
    array: str | None,
    tenant: str | None,
    limit: int,
    everything: bool,
) -> int:
    """List tasks, newest first."""
    from manager.cli.screens_tasks import task_table
    from manager.core.lifecycle import TaskStatus

    if status is not None and status.upper() not in set(TaskStatus):
        raise click.UsageError(f"--status: {status!r} is none of {', '.join(TaskStatus)}.")
    # One more than is shown tells whether there are more.
    asked = None if everything else limit + 1
    with session.client() as client:
        wanted = status.upper() if status else None
        listed = list(client.tasks(status=wanted, function=function, name=name, array=array, tenant=tenant, limit=asked))
    shown = listed if everything else listed[:limit]
    session.emit(shown, task_table)
    if len(shown) < len(listed):
        session.note(f"{len(shown)} newest shown; more with --limit or --all.")
    return Exit.OK


@command("show", client=True)
@click.argument("task")
@_tenant
@click.option("--args", "with_args", is_flag=True, help="With its arguments.")
def show(session: Session, *, task: str, tenant: str | None, with_args: bool) -> int:
    """Everything about TASK: where it is in its life, and its result or error.

    TASK is the id or the name of a task, or of an array.
    """
    from manager.cli.screens_attempts import array_screen, attempt_table
    from manager.cli.screens_tasks import task_screen
    from manager.client import Array

    with session.client() as client:
        made = found(client, task, tenant)
        if isinstance(made, Array):
            session.emit(client.array_view(made, tenant=tenant), array_screen)
            return Exit.OK
        view = client.get(made, with_args=with_args, tenant=tenant)
        session.emit(view, task_screen)
        if view.attempt > 1 and not session.wants_json:
            session.console.print()
            session.console.print(attempt_table(client.attempts(made, tenant=tenant)))
    return Exit.OK


@command("attempts", client=True)
@click.argument("task")
@_tenant
def attempts(session: Session, *, task: str, tenant: str | None) -> int:
    """Each attempt at TASK: where, when, and why it ended."""
    from manager.cli.screens_attempts import attempt_table

    with session.client() as client:
        session.emit(client.attempts(the_task(client, task, tenant), tenant=tenant), attempt_table)
    return Exit.OK


@command("result", client=True)
@click.argument("task")
@_tenant
def result(session: Session, *, task: str, tenant: str | None) -> int:
    """What TASK has returned, as JSON on stdout; of any size, and checked: what is not whole is an error.

    Large results come piece by piece: 'rocyard result TASK > FILE'.
    """
    with session.client() as client:
        for piece in client.read_result(the_task(client, task, tenant), tenant=tenant):
            click.echo(piece, nl=False)
    return Exit.OK


@command("logs", client=True)
@click.argument("task")
@_tenant
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes until it has ended; as JSON, a line a piece.")
def logs(session: Session, *, task: str, tenant: str | None, follow: bool) -> int:
    """What TASK has written: its stdout on stdout, its stderr on stderr."""
    with session.client() as client:
        one = the_task(client, task, tenant)
        if not follow:
            _print_log(session, client.logs(one, tenant=tenant))
            return Exit.OK
        attempt = 0
        for piece in client.follow(one, tenant=tenant):
            if session.wants_json:
                click.echo(msgspec.json.encode(piece).decode())
                continue
            if attempt and piece.attempt != attempt:
                session.note(f"(attempt {piece.attempt})")
            attempt = piece.attempt
            _print_log(session, piece)
    return Exit.OK


def _print_log(session: Session, log: "TaskLog") -> None:
    import sys

    from manager.cli.text import coloured, count

    if session.wants_json:
        print_json(log)
        return
    if log.dropped_bytes:
        session.note(f"({count(log.dropped_bytes, 'byte')} before this were not kept: setting tasks.log_bytes_max)")
    for text, stream in ((log.stdout, sys.stdout), (log.stderr, sys.stderr)):
        # A file gets what was written; a terminal must not be at a task's mercy.
        stream.write(coloured(text) if stream.isatty() else text)
        stream.flush()


@command("explain", client=True)
@click.argument("task")
@_tenant
def explain(session: Session, *, task: str, tenant: str | None) -> int:
    """Why TASK is where it is, and what each node says to it."""
    from manager.cli.screens_foresight import explanation_screen

    with session.client() as client:
        session.emit(client.explain(the_task(client, task, tenant), tenant=tenant), explanation_screen)
    return Exit.OK


@command("cancel", client=True)
@click.argument("tasks", nargs=-1, required=True, metavar="TASK…")
@_tenant
def cancel(session: Session, *, tasks: tuple[str, ...], tenant: str | None) -> int:
    """End each TASK: at once where it waits, within seconds where it runs. An array ends with all its tasks."""
    from manager.cli.screens_attempts import array_cancelled_line
    from manager.cli.screens_tasks import cancelled_line
    from manager.client import Task
    from manager.core.answers_arrays import ArrayCancelled
    from manager.core.answers_tasks import Cancelled

    worst: int = Exit.OK
    answers: list[Cancelled | ArrayCancelled] = []
    with session.client() as client:
        for task in tasks:
            try:
                made = found(client, task, tenant)
                if isinstance(made, Task):
                    answers.append(client.cancel(made, tenant=tenant))
                else:
                    answers.append(client.cancel_array(made, tenant=tenant))
            except RocyardError as error:
                if len(tasks) == 1:
                    raise
                # The others are ended all the same.
                worst = max(worst, report(error, as_json=session.wants_json, task=task))
    if session.wants_json:
        print_json(answers)
    else:
        for answer in answers:
            click.echo(cancelled_line(answer) if isinstance(answer, Cancelled) else array_cancelled_line(answer))
    return worst


@command("functions", client=True)
def functions(session: Session) -> int:
    """What tasks can run: name, what it takes, and what it needs if nothing is said."""
    from manager.cli.screens_tasks import functions_screen

    with session.client() as client:
        session.emit(client.functions(), functions_screen)
    return Exit.OK
