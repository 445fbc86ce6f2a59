"""The autoscaler: its process, alone, and what it has decided."""

import os

import click

from manager.cli.exits import Exit
from manager.cli.session import Session, command, common_options, options_of


@click.group("autoscaler", invoke_without_command=True, params=common_options(client=False, settings=True))
@click.pass_context
def autoscaler(context: click.Context, /, **_common: object) -> int | None:
    """Run the autoscaler, which adds and removes nodes of the groups in the settings; 'rocyard up' runs one.

    Several may run: one acts, the others wait to take over.
    """
    if context.invoked_subcommand is not None:
        return None
    from manager.cli.process import run_role

    return run_role("autoscaler", Session(options_of(context), os.environ).settings())


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
