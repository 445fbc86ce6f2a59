"""Commands that say what nodes may take on, and which slots are open ahead of need. All go over the REST API."""

import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from manager.cli.exits import Exit
from manager.cli.needs import needs_of, with_needs
from manager.cli.session import Session, command

if TYPE_CHECKING:
    from manager.client import Client
    from manager.core.answers_nodes import WorkerView
    from manager.core.answers_slots import Unloaded, WarmView

POLL_S: Final = 0.5


def _change(session: Session, view: "WorkerView") -> int:
    from manager.cli.screens_cluster import worker_line

    session.emit(view, worker_line)
    return Exit.OK


@command("cordon", client=True)
@click.argument("node")
def cordon(session: Session, *, node: str) -> int:
    """Have nothing new placed on NODE; what is open there goes on."""
    with session.client() as client:
        return _change(session, client.cordon(node))


@command("uncordon", client=True)
@click.argument("node")
def uncordon(session: Session, *, node: str) -> int:
    """Have NODE take on work again, whether it was cordoned or drained."""
    with session.client() as client:
        return _change(session, client.uncordon(node))


@command("drain", client=True)
@click.argument("node")
@click.option("--deadline", metavar="DURATION", help="Such as 5m: what still runs then goes back to the queue.")
@click.option("--remove", is_flag=True, help="Once it is empty, end its agent for good.")
@click.option("--wait", is_flag=True, help="Return when it is empty (and gone, with --remove).")
def drain(session: Session, *, node: str, deadline: str | None, remove: bool, wait: bool) -> int:
    """Empty NODE: nothing new is placed there, and its slots end at their next task boundary.

    Without a deadline, running tasks take as long as they take. Nobody is blamed for what goes back to the queue.
    """
    from manager.core.answers_nodes import WorkerState

    with session.client() as client:
        view = client.drain(node, deadline, remove=remove)
        if wait:
            view = _wait_until_empty(client, node, view, remove=remove)
    if remove and view.state is WorkerState.LEFT and not session.wants_json:
        session.note(f"{node} is gone")
        return Exit.OK
    return _change(session, view)


def _wait_until_empty(client: "Client", node: str, view: "WorkerView", *, remove: bool) -> "WorkerView":
    """The node once it is drained, and has left if `remove`.

    Raises:
        RocyardError: somebody has lifted the drain.
    """
    from manager.core.answers_nodes import WorkerState
    from manager.core.errors import NotFound, RocyardError

    while True:
        if view.cordon != "drain":
            raise RocyardError(f"{node} is not being drained any more: somebody has changed that.")
        gone = view.state in {WorkerState.LEFT, WorkerState.LOST}
        if gone or (view.slots == 0 and not remove):
            return view
        time.sleep(POLL_S)
        try:
            view = client.worker(node)
        except NotFound:  # what has left for good is in no list any more, and nothing of it is in use
            return msgspec.structs.replace(
                view,
                state=WorkerState.LEFT,
                slots=0,
                tasks_running=0,
                readings_age_s=None,
                devices=(),
                cpus_leased=0.0,
                host_leased_bytes=0,
            )


@command("warm", client=True)
@click.argument("function", required=False)
@click.option(
    "--slots", type=click.IntRange(0, 10_000), default=1, help="How many; 1 if left out, 0: no more than work asks for."
)
@click.option("--for", "seconds", metavar="DURATION", required=True, help="For how long, such as 10m.")
@with_needs
def warm(session: Session, *, function: str | None, slots: int, seconds: str, **needs: Any) -> int:
    """Keep slots open for FUNCTION (or for a size) although nothing waits, so that its next tasks start at once.

    They end, the last of all idle ones, where other work waits for their memory.
    """
    wanted = needs_of(needs)
    if function is None and "memory" not in wanted:
        raise click.UsageError("name a function, or a size with --memory")

    def said(view: "WarmView") -> str:
        from manager.cli.text import clock, count, memory

        what = count(view.slots, "slot")
        return f"{what} of {memory(view.memory_bytes, view.gpus)} kept open until {clock(view.until_at)}"

    with session.client() as client:
        session.emit(client.warm(function, slots=slots, for_=seconds, **wanted), said)
    return Exit.OK


@command("unload", client=True)
@click.argument("function", required=False)
@click.option("--all", "everything", is_flag=True, help="Those of every function.")
@with_needs
def unload(session: Session, *, function: str | None, everything: bool, **needs: Any) -> int:
    """Close idle slots for FUNCTION now, and with them the models that they have loaded."""
    wanted = needs_of(needs)
    if everything == (function is not None or "memory" in wanted):
        raise click.UsageError("name a function, or a size with --memory, or say --all")

    def said(view: "Unloaded") -> str:
        from manager.cli.text import count

        return f"{count(view.slots, 'idle slot')} of {count(view.shapes, 'shape')} to be closed"

    with session.client() as client:
        session.emit(client.unload(function, all=everything, **wanted), said)
    return Exit.OK
