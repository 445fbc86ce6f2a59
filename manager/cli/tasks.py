"""Commands about tasks and functions. Each parses, calls the client, and prints."""

from typing import TYPE_CHECKING, Any, Final

import click

from manager.cli.exits import Exit, exit_of
from manager.cli.needs import needs_of, with_needs
from manager.cli.session import Session, command, print_json, read_object
from manager.core.errors import RocyardError

if TYPE_CHECKING:
    from manager.client import Client

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
    allow_infeasible: bool,
    wait: bool,
    timeout: str | None,
    **needs: Any,
) -> int:
    """Submit a task that runs FUNCTION, and print its id.

    ARGS is a JSON object of the function's arguments: as text, @FILE, or - for stdin. 'rocyard functions' lists
    functions and what they take.
    """
    timeout_s = _timeout(timeout, wait=wait)
    number = priority_number(priority)
    wanted = needs_of(needs)
    values = read_object(args)
    with session.client() as client:
        task = client.submit(
            function,
            values,
            priority=number,
            max_attempts=max_attempts,
            time_limit=time_limit,
            allow_infeasible=allow_infeasible,
            **wanted,
        )
        if not wait:
            view = {"task_id": task.task_id}
            if session.wants_json:
                print_json(view)
            else:
                click.echo(task.task_id)
            return Exit.OK
        session.note(f"task {task.task_id}")
        return _wait_and_print(session, client, task.task_id, timeout_s)


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


def _wait_and_print(session: Session, client: "Client", task_id: str, timeout_s: float | None) -> int:
    """Wait for a task and print its result (as JSON output: the whole task); the exit code for how it ended."""
    try:
        view = client.wait(task_id, timeout_s)
    except KeyboardInterrupt:
        session.note(f"The task goes on: 'rocyard show {task_id}', 'rocyard cancel {task_id}'.")
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


@command("tasks", client=True)
@click.option("-s", "--status", metavar="STATUS", help="Only these: QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, …")
@click.option("-f", "--function", help="Only tasks of this function.")
@click.option("--tenant", help="Only this tenant's (admin keys).")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=LISTED, help=f"How many; {LISTED} if left out.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
def tasks(
    session: Session, *, status: str | None, function: str | None, tenant: str | None, limit: int, everything: bool
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
        found = list(client.tasks(status=wanted, function=function, tenant=tenant, limit=asked))
    shown = found if everything else found[:limit]
    session.emit(shown, task_table)
    if len(shown) < len(found):
        session.note(f"{len(shown)} newest shown; more with --limit or --all.")
    return Exit.OK


@command("show", client=True)
@click.argument("task")
@_tenant
@click.option("--args", "with_args", is_flag=True, help="With its arguments.")
def show(session: Session, *, task: str, tenant: str | None, with_args: bool) -> int:
    """Everything about TASK: where it is in its life, and its result or error."""
    from manager.cli.screens_tasks import task_screen

    with session.client() as client:
        session.emit(client.get(task, with_args=with_args, tenant=tenant), task_screen)
    return Exit.OK


@command("result", client=True)
@click.argument("task")
@_tenant
def result(session: Session, *, task: str, tenant: str | None) -> int:
    """What TASK has returned, as JSON on stdout; of any size, and checked: what is not whole is an error.

    Large results come piece by piece: 'rocyard result TASK > FILE'.
    """
    with session.client() as client:
        for piece in client.read_result(task, tenant=tenant):
            click.echo(piece, nl=False)
    return Exit.OK


@command("logs", client=True)
@click.argument("task")
@_tenant
def logs(session: Session, *, task: str, tenant: str | None) -> int:
    """What TASK has written: its stdout on stdout, its stderr on stderr."""
    import sys

    from manager.cli.text import coloured, count

    with session.client() as client:
        log = client.logs(task, tenant=tenant)
    if session.wants_json:
        print_json(log)
        return Exit.OK
    for text, stream in ((log.stdout, sys.stdout), (log.stderr, sys.stderr)):
        # A file gets what was written; a terminal must not be at a task's mercy.
        stream.write(coloured(text) if stream.isatty() else text)
        stream.flush()
    if log.dropped_bytes:
        session.note(f"({count(log.dropped_bytes, 'byte')} were not kept: setting tasks.log_bytes_max)")
    return Exit.OK


@command("explain", client=True)
@click.argument("task")
@_tenant
def explain(session: Session, *, task: str, tenant: str | None) -> int:
    """Why TASK is where it is, and what each node says to it."""
    from manager.cli.screens_foresight import explanation_screen

    with session.client() as client:
        session.emit(client.explain(task, tenant=tenant), explanation_screen)
    return Exit.OK


@command("cancel", client=True)
@click.argument("tasks", nargs=-1, required=True, metavar="TASK…")
@_tenant
def cancel(session: Session, *, tasks: tuple[str, ...], tenant: str | None) -> int:
    """End each TASK: at once where it waits, within seconds where it runs."""
    from manager.cli.screens_tasks import cancelled_line

    worst = Exit.OK
    with session.client() as client:
        answers = []
        for task in tasks:
            try:
                answers.append(client.cancel(task, tenant=tenant))
            except RocyardError as error:
                if len(tasks) == 1:
                    raise
                # The others are ended all the same.
                worst = max(worst, exit_of(error))
                click.echo(f"error: {task}: {error}", err=True)
    if session.wants_json:
        print_json(answers)
    else:
        for answer in answers:
            click.echo(cancelled_line(answer))
    return worst


@command("functions", client=True)
def functions(session: Session) -> int:
    """What tasks can run: name, what it takes, and what it needs if nothing is said."""
    from manager.cli.screens_tasks import functions_screen

    with session.client() as client:
        session.emit(client.functions(), functions_screen)
    return Exit.OK
