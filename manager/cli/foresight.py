"""Commands that ask what would happen: a plan of tasks, a snapshot of what decides, and its replay without a cluster."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from manager.cli.exits import Exit
from manager.cli.needs import needs_of, with_needs
from manager.cli.session import Session, command, print_json, read_object
from manager.core.errors import BadRequest

if TYPE_CHECKING:
    from manager.core.placement import Policy

SNAPSHOT_BYTES_MAX: Final = 256 * 1024 * 1024
"""A file over this is no snapshot: a thousand nodes of eight devices are a few megabytes."""
ALL: Final = "all"


@command("plan", client=True)
@click.argument("function")
@click.argument("args", default="{}")
@with_needs
@click.option("-p", "--priority", default="0", metavar="PRIORITY", help="-10 to 10, or low, normal, high, urgent; 0.")
@click.option("-n", "--count", type=click.IntRange(1), default=1, help="How many tasks; 1.")
@click.option("--tenant", help="Whose they would be, where they are another tenant's (admin keys).")
def plan(session: Session, *, function: str, args: str, priority: str, count: int, tenant: str | None, **needs: Any) -> int:
    """Tell what would happen to a task that runs FUNCTION, without submitting it.

    Whether it would fit, on which node, when, what would end for it, and what the autoscaler would do. ARGS is as for
    'rocyard submit'. Exits 0 wherever it would run now or later, 7 where no node could ever hold it.
    """
    from manager.cli.screens_foresight import plan_screen
    from manager.cli.tasks import priority_number
    from manager.client import task_request
    from manager.core.foresee import When

    request = task_request(function, read_object(args), priority=priority_number(priority), **needs_of(needs))
    with session.client() as client:
        view = client.plan(request, count=count, tenant=tenant)
    session.emit(view, plan_screen)
    return Exit.REFUSED if view.when is When.NEVER else Exit.OK


@command("snapshot", client=True)
def snapshot(session: Session) -> int:
    """Print all that decides about placement at this moment, as JSON for 'rocyard replay'. Needs an admin key.

    It holds shapes, counts, devices and leases; no task, argument, result or address.
    """
    with session.client() as client:
        print_json(client.snapshot())
    return Exit.OK


@command("replay")
@click.argument("file")
@click.option(
    "--policy", "names", multiple=True, metavar="NAME", help=f"Under this policy ({ALL}: each); else the snapshot's own."
)
def replay(session: Session, *, file: str, names: tuple[str, ...]) -> int:
    """Decide again on the snapshot in FILE (- for stdin): what is opened, placed and ended. Needs no cluster.

    Given several policies, their outcomes are compared.
    """
    from manager.cli.screens_foresight import replay_screen
    from manager.core.snapshot import decode_snapshot, replays

    found = decode_snapshot(_read(file), "stdin" if file == "-" else file)
    answers = replays(found, _policies(names or (found.policy,)))
    session.emit(answers, lambda value: replay_screen(found, value))
    return Exit.OK


def _read(file: str) -> bytes:
    try:
        raw = sys.stdin.buffer.read(SNAPSHOT_BYTES_MAX + 1) if file == "-" else _read_file(Path(file))
    except OSError as error:
        raise BadRequest(f"{file} cannot be read: {error.strerror or error}") from error
    if len(raw) > SNAPSHOT_BYTES_MAX:
        raise BadRequest(f"{file} is over {SNAPSHOT_BYTES_MAX // 2**20} MiB: that is no snapshot.")
    return raw


def _read_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(SNAPSHOT_BYTES_MAX + 1)


def _policies(names: tuple[str, ...]) -> "list[Policy]":
    """The policies of these names, each once.

    Raises:
        SettingsError: there is none of such a name.
    """
    from manager.policies import policy_named, policy_names

    wanted = [each for name in names for each in (policy_names() if name == ALL else (name,))]
    return [policy_named(name) for name in dict.fromkeys(wanted)]
