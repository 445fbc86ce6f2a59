"""Backups of the store as files: a head of fixed length that says what is in it, then the server's own copy of its data.

Owns the form of the file and the order of steps; how a running store is copied, and how data come into one, is the store's.
A file that bears its name is whole: it is written under another one, which no other run has, synced, and then given its name.
"""

import datetime as dt
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from manager.core.errors import RocyardError
from manager.core.keys import SCHEMA_VERSION, Keys
from manager.store import Store, StoreConnection, restoring
from manager.store.schema import read_facts
from manager.store.server import server_in
from manager.store.snapshot import copy_of
from manager.supervisor import CLUSTER_FILE, known_cluster

FORMAT: Final = 1
MAGIC: Final = b"ROCYARD BACKUP\n"
HEAD_BYTES: Final = 4096
CHUNK_BYTES: Final = 1024 * 1024
NO_HARD_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems answer that know of none: those of USB sticks, some shares and object stores that are mounted."""
DEADLINE_S: Final = 30.0
"""For single questions: a store that makes a copy of much memory may stand still for seconds."""


class BackupError(RocyardError):
    """The backup cannot be made or used."""


class Head(msgspec.Struct, frozen=True):
    """What a backup says of itself.

    Attributes:
        made_at: when the copy was begun, UTC.
        cluster, schema, schema_min: of the data.
        database: the number of the store's database in which they lie.
        server: the program and version that made the copy: an older one may be unable to read it.
        tasks: by status, a moment before the copy was begun.
        bytes: of the copy behind the head.
        sha256: of that copy.
    """

    format: int
    made_at: dt.datetime
    cluster: str
    schema: int
    schema_min: int
    database: int
    server: str
    tasks: dict[str, int]
    bytes: int
    sha256: str


async def make_backup(url: str, path: Path, tell: Callable[[int, int], None]) -> Head:
    """Copy the store at `url`, which goes on working, into a new file.

    Raises:
        BackupError: there is such a file, it cannot be written, or nothing of ours is in the store.
        NoCopy: the server gives no copy of itself.
        StoreUnavailable: it could not be reached, or the copy broke off.
    """
    _refuse_to_replace(path)
    connection = StoreConnection(url, DEADLINE_S, "backup")
    draft: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        draft = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            head = await _write(file, connection, tell)
            os.fsync(file.fileno())
        _give_name(draft, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        raise BackupError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
        await connection.close()
    return head


def _refuse_to_replace(path: Path) -> None:
    if path.exists():  # before the work is done; that nobody takes the name meanwhile is seen to when it is given
        raise _taken(path)


def _taken(path: Path) -> BackupError:
    return BackupError(f"{path} exists, and a backup replaces nothing: choose another name")


def _give_name(draft: Path, path: Path) -> None:
    """Give a file its name, and replace none that has it: of two that are given the same one at once, one gets it.

    Raises:
        FileExistsError: another one has it.
        OSError: it cannot be given.
    """
    try:
        path.hardlink_to(draft)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # An empty file takes the name, so that no other run gets it, and is replaced: between the two the file is not whole.
        _private(path).close()
        try:
            draft.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _private(path: Path) -> BinaryIO:
    """A new file that only its owner may read: results and keys' hashes are in it."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


async def _write(file: BinaryIO, connection: StoreConnection, tell: Callable[[int, int], None]) -> Head:
    store = Store(connection)
    facts = await read_facts(connection.call, Keys())
    if not facts.cluster:
        raise BackupError("there is no cluster in this store: nothing to back up")
    made_at = dt.datetime.now(dt.UTC)
    tasks = await store.counts()
    server = await store.server()
    file.write(bytes(HEAD_BYTES))
    digest = hashlib.sha256()

    def write(piece: bytes) -> None:
        digest.update(piece)
        file.write(piece)

    length = await copy_of(connection, write, tell)
    head = Head(
        format=FORMAT,
        made_at=made_at,
        cluster=facts.cluster,
        schema=facts.schema,
        schema_min=facts.schema_min,
        database=connection.database,
        server=server,
        tasks=tasks,
        bytes=length,
        sha256=digest.hexdigest(),
    )
    text = MAGIC + msgspec.json.encode(head) + b"\n"
    assert len(text) <= HEAD_BYTES
    file.seek(0)
    file.write(text)
    file.flush()
    return head


def read_head(path: Path) -> Head:
    """What a backup says of itself.

    Raises:
        BackupError: it is none, or of a form that this version does not know.
    """
    try:
        with path.open("rb") as file:
            text = file.read(HEAD_BYTES)
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}") from error
    if not text.startswith(MAGIC) or len(text) < HEAD_BYTES:
        raise BackupError(f"{path} is no backup of Rocyard's, or was cut off")
    try:
        head = msgspec.json.decode(text[len(MAGIC) :].split(b"\n", 1)[0], type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BackupError(f"{path} is damaged: its head cannot be read ({error})") from error
    if head.format != FORMAT:
        raise BackupError(f"{path} has format {head.format}, and this version of Rocyard knows {FORMAT}: use a newer version")
    return head


def checked_head(path: Path, tell: Callable[[int, int], None]) -> Head:
    """As `read_head`, after every byte of the copy was read and found to be as it was written.

    Raises:
        BackupError: it is damaged, or its data are newer than this version knows.
    """
    head = read_head(path)
    with path.open("rb") as file:
        file.seek(HEAD_BYTES)
        digest, length = hashlib.sha256(), 0
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            length += len(piece)
            tell(length, head.bytes)
    if length != head.bytes:
        raise BackupError(f"{path} is damaged: it has {length} bytes of data, and was written with {head.bytes}")
    if digest.hexdigest() != head.sha256:
        raise BackupError(f"{path} is damaged: its bytes are not those that were written (SHA-256)")
    if head.schema > SCHEMA_VERSION:
        raise BackupError(
            f"{path} has data of schema {head.schema}, and this version of Rocyard knows {SCHEMA_VERSION}: "
            "use the one that made it"
        )
    return head


async def inspected(path: Path) -> dict[str, int]:
    """Tasks by status, as a server of its own reads them from a backup whose bytes are as they were written.

    Raises:
        StartError: there is no server program.
        NotRestored: it cannot read the copy, or does not find in it what the head says.
    """
    head = read_head(path)
    with tempfile.TemporaryDirectory(prefix="rocyard-") as folder:
        _copy_out(path, Path(folder) / restoring.COPY)
        async with restoring.loaded(Path(folder), head.server, head.database) as store:
            found = await store.identity()
            if found != head.cluster:
                raise restoring.NotRestored(f"{path} says that it is of cluster {head.cluster}, and is of {found or 'none'}")
            return await store.counts()


async def restore_embedded(path: Path, data_dir: Path, tell: Callable[[int, int], None]) -> int:
    """Give a checked backup to the embedded store of `data_dir`, on which nothing runs; how many slots were closed.

    Raises:
        BackupError: the folder has data already, or is another cluster's.
        NotRestored: the copy cannot be read or written.
        StartError: there is no server program.
    """
    head = read_head(path)
    home = data_dir / "store"
    _refuse_used(data_dir, home, head.cluster)
    work = data_dir / ".restoring"
    try:
        shutil.rmtree(work, ignore_errors=True)
        for folder in (data_dir, work, home):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _copy_out(path, work / restoring.COPY)
        async with restoring.loaded(work, head.server, head.database) as store:
            closed = await restoring.make_safe(store, head.sha256)
            written = await restoring.write_log(store, work)
        written.rename(home / written.name)
        _sync_folder(home)
    except OSError as error:
        raise BackupError(f"{data_dir} cannot hold the store: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tell(1, 1)
    return closed


def _refuse_used(data_dir: Path, home: Path, cluster: str) -> None:
    pid = server_in(home)
    if pid is not None:
        raise BackupError(f"a store runs on {data_dir} (pid {pid}): stop that cluster first (rocyard down)")
    held = sorted(each.name for each in home.iterdir()) if home.is_dir() else []
    if held:
        raise BackupError(f"{home} has data already ({held[0]}): move them away, or name another data_dir")
    known = known_cluster(data_dir)
    if known and known != cluster:
        raise BackupError(
            f"{data_dir} belongs to cluster {known}, and the backup is of {cluster}: name another data_dir, or remove "
            f"{data_dir / CLUSTER_FILE}"
        )


async def restore_into(path: Path, url: str, tell: Callable[[int, int], None]) -> int:
    """Give a checked backup to the empty store at `url`; how many slots were closed.

    Raises:
        NotRestored: that store is not empty or does not take the data, or the copy cannot be read.
        StartError: there is no server program to read it.
        StoreUnavailable: the store does not answer.
    """
    head = read_head(path)
    target = StoreConnection(url, DEADLINE_S, "restore")
    try:
        await restoring.check_target(target, head.sha256)
        with tempfile.TemporaryDirectory(prefix="rocyard-") as folder:
            _copy_out(path, Path(folder) / restoring.COPY)
            async with restoring.loaded(Path(folder), head.server, head.database) as store:
                closed = await restoring.make_safe(store, head.sha256)
                await restoring.copy_into(store, target, head.sha256, tell)
    finally:
        await target.close()
    return closed


def _copy_out(path: Path, target: Path) -> None:
    """Write the server's copy of its data, without the head, to `target`."""
    with path.open("rb") as file, _private(target) as out:
        file.seek(HEAD_BYTES)
        while piece := file.read(CHUNK_BYTES):
            out.write(piece)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
