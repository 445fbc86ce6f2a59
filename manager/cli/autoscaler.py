"""The autoscaler: its process, alone, and what it has decided."""

import os
from typing import Any

import click

from manager.cli.exits import Exit
from manager.cli.session import Options, Output, Session, command, common_options


@click.group("autoscaler", invoke_without_command=True, params=common_options(client=False, settings=True))
@click.pass_context
def autoscaler(context: click.Context, /, **given: Any) -> int | None:
    """Run the autoscaler, which adds and removes nodes of the groups in the settings; 'rocyard up' runs one.

    Several may run: one acts, the others wait to take over.
    """
    if context.invoked_subcommand is not None:
        return None
    from manager.cli.process import run_role

    root = context.find_root().params
    options = Options(
        output=Output(given["output"] or root.get("output") or Output.TABLE),
        config=given["config"] or root.get("config"),
        overrides=(*root.get("overrides", ()), *given["overrides"]),
    )
    return run_role("autoscaler", Session(options, os.environ).settings())


@command("history", client=True)
@click.option("-n", "--limit", type=click.IntRange(1, 5000), default=20, help="How many decisions; 20.")
def history(session: Session, *, limit: int) -> int:
    """What the autoscaler decided, newest first: what it saw, what it did, and why.

    Decisions that did nothing and were like the one before are counted, not listed.
    """
    from manager.cli.screens_autoscaler import history_screen

    with session.client() as client:
        session.emit(tuple(client.decisions(limit)), history_screen)
    return Exit.OK


autoscaler.add_command(history)
