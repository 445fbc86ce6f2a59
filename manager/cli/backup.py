"""The commands that copy the store into a file and back."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from manager.cli.exits import Exit
from manager.cli.session import Session, command
from manager.core.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from manager.backup import Head

TELL_S: Final = 0.2


class BackupView(msgspec.Struct, frozen=True):
    """What is said of a backup.

    Attributes:
        loaded: whether a server has read the whole of it; None: nobody was asked to.
    """

    path: str
    cluster: str
    schema: int
    made_at: str
    server: str
    bytes: int
    sha256: str
    tasks: dict[str, int]
    loaded: bool | None = None


class RestoredView(msgspec.Struct, frozen=True):
    """What was restored, and where."""

    path: str
    cluster: str
    made_at: str
    store: str
    tasks: dict[str, int]
    slots_closed: int


@command("backup", settings=True)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--check", is_flag=True, help="Make none: look whether FILE is whole and can be read.")
def backup(session: Session, *, file: Path, check: bool) -> int:
    """Copy the store into FILE while the cluster runs: all tasks, keys and what was learned, as they are at one moment.

    The store is the one that `rocyard up` runs on data_dir, or that store.url names. Files of large results are not in it:
    copy their folder as well, afterwards (docs/operations.md).
    """
    _be_quiet("backup")
    view = asyncio.run(_checked(session, file)) if check else _made(session, file)
    session.emit(view, _backup_screen)
    return Exit.OK


def _made(session: Session, file: Path) -> BackupView:
    from manager.backup import make_backup

    return _view(file, asyncio.run(make_backup(_store_url(session), file, _progress(session, "copied"))))


async def _checked(session: Session, file: Path) -> BackupView:
    from manager.backup import checked_head, inspected
    from manager.core.errors import StartError

    head = checked_head(file, _progress(session, "read"))
    try:
        tasks = await inspected(file)
    except StartError as error:
        session.note(f"note: its bytes are as they were written, but no server here could be asked to read them: {error}")
        return _view(file, head, loaded=False)
    return msgspec.structs.replace(_view(file, head, loaded=True), tasks=tasks)


@command("restore", settings=True)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def restore(session: Session, *, file: Path) -> int:
    """Bring the data of a backup back: into data_dir, on which no cluster runs, or into the empty store of store.url.

    What ran when the backup was made goes back to its queue, and nobody from before can write. What was accepted after the
    backup is not in it.
    """
    from manager.backup import checked_head, restore_embedded, restore_into

    _be_quiet("restore")
    settings = session.settings()
    head = checked_head(file, _progress(session, "checked"))
    if settings.store.url.value:
        url = _with_files(session)
        closed = asyncio.run(restore_into(file, url, _progress(session, "copied")))
        place = "the store of store.url"
    else:
        data_dir = Path(settings.data_dir).expanduser().absolute()
        closed = asyncio.run(restore_embedded(file, data_dir, _progress(session, "written")))
        place = str(data_dir)
    view = RestoredView(str(file), head.cluster, head.made_at.isoformat(timespec="seconds"), place, head.tasks, closed)
    session.emit(view, _restored_screen)
    session.note("Now start the cluster; processes that waited for these data go on by themselves.")
    return Exit.OK


def _be_quiet(name: str) -> None:
    """What the store's parts log is no part of the answer."""
    from manager.log import configure_logging
    from manager.settings import LogSettings

    configure_logging(name, LogSettings(level="error"))


def _store_url(session: Session) -> str:
    """The store that runs: the one that the settings name, or that of the cluster on this machine.

    Raises:
        SettingsError: there is none.
    """
    from manager.cli.doctor_cluster import with_embedded_store
    from manager.supervisor import running_pid

    settings = session.settings()
    if settings.store.url.value:
        return _with_files(session)
    data_dir = Path(settings.data_dir).expanduser().absolute()
    if running_pid(data_dir) is None:
        raise SettingsError(
            f"no cluster runs on {data_dir}, and store.url names no store: start it (rocyard up), or set data_dir or store.url"
        )
    from manager.cli.doctor_cluster import role_at_hand
    from manager.tls import settings_for

    try:
        settings = with_embedded_store(settings, data_dir)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{data_dir / 'store.json'} cannot be read: {error}") from error
    return settings_for(settings, role_at_hand(settings)).store.url.value


def _with_files(session: Session) -> str:
    """store.url, with the certificates that this machine has for it."""
    from manager.cli.doctor_cluster import role_at_hand
    from manager.tls import settings_for

    settings = session.settings()
    return settings_for(settings, role_at_hand(settings)).store.url.value


def _progress(session: Session, word: str) -> Callable[[int, int], None]:
    """A line on a terminal that says how far it is; nothing elsewhere."""
    if session.wants_json or not sys.stderr.isatty():
        return lambda _done, _total: None
    said_s = float("-inf")

    def tell(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s >= TELL_S or done == total:
            said_s = now_s
            part = f"{100 * done // max(total, 1)} %" if total else f"{done / 1e6:.0f} MB"
            click.echo(f"\r{part} {word} ", nl=done == total and total > 0, err=True)

    return tell


def _view(file: Path, head: "Head", *, loaded: bool | None = None) -> BackupView:
    made_at = head.made_at.isoformat(timespec="seconds")
    return BackupView(
        str(file), head.cluster, head.schema, made_at, head.server, head.bytes, head.sha256, head.tasks, loaded
    )  # fmt: skip


def _backup_screen(view: BackupView) -> "RenderableType":
    from rich.text import Text

    from manager.core.quantities import format_memory

    lines = [
        f"{view.path}: {format_memory(view.bytes)}, of {view.made_at}, from {view.server}",
        f"cluster {view.cluster}, schema {view.schema}; {_tasks(view.tasks)}",
        f"SHA-256 {view.sha256}",
    ]
    if view.loaded is not None:
        lines.append("whole, and a server has read it" if view.loaded else "whole")
    return Text("\n".join(lines))


def _restored_screen(view: RestoredView) -> "RenderableType":
    from rich.text import Text

    told = f"cluster {view.cluster} is back in {view.store}, as of {view.made_at}: {_tasks(view.tasks)}"
    return Text(f"{told}\nslots closed: {view.slots_closed}; what they ran is queued again")


def _tasks(counts: dict[str, int]) -> str:
    held = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"tasks: {held or 'none'}"
