"""Results in a folder: of this machine, or one that all machines share."""

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO, Final

from manager.core.errors import ResultNotStored, StartError
from manager.core.model import ResultFile
from manager.log import get_logger
from manager.results.store import (
    CHECKPOINTS,
    CHUNK_BYTES,
    CLOCK,
    FILES,
    GUEST_S,
    GUESTS,
    OWNER,
    WRITING,
    Leftover,
    checked_name,
    file_name,
    leftover_of,
    missing,
    owner_of,
    writing_name,
)

FOLDER_MODE: Final = 0o700
FILE_MODE: Final = 0o600
BATCH: Final = 500
"""Of one list of a scan: as many as one call of the store takes."""

GONE: Final = "it is not in the results store any more, and Rocyard has not removed it"

log = get_logger("rocyard.results")


class FolderResults:
    """A folder that holds results, those that are being written, and checkpoints.

    Args:
        root: absolute. Whoever may write there is trusted with every result in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make what is not there yet, and see that it can be written.

        Raises:
            StartError: it cannot.
        """
        try:
            self.root.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            for name in (FILES, WRITING, CHECKPOINTS):
                (self.root / name).mkdir(mode=FOLDER_MODE, exist_ok=True)
            self._clock_s()
        except OSError as error:
            raise StartError(
                f"results.url: {self.root} cannot be written ({words_of(error)}): make it a folder that all agents, the "
                "API and the controller of the cluster may write, or name another one"
            ) from error

    # --- for agents ---------------------------------------------------------------------------------------------

    def place(self, task_id: str, attempt: int, slot_id: str) -> Path | None:
        """Beside the results, so that a rename brings it to its name."""
        return self.root / writing_name(task_id, attempt, slot_id)

    async def keep(self, path: Path, task_id: str, attempt: int, slot_id: str, size: int, sha256: str) -> ResultFile:
        """Check, sync, move, sync the folder. See `ResultStore`."""
        name = file_name(task_id, attempt, slot_id)
        try:
            await asyncio.to_thread(self._keep, path, self.root / name, size)
        except OSError as error:
            raise not_stored(size, str(self.root), words_of(error)) from error
        return ResultFile(name, size, sha256)

    def _keep(self, path: Path, target: Path, size: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            sync_written(path, size)
            try:
                path.replace(target)
            except FileNotFoundError:
                target.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
                _sync_folder(target.parent.parent)
                path.replace(target)
        # Moved by an earlier call, of which only the sync of the folder may be missing; or never written.
        if target.stat().st_size != size:
            raise OSError(errno.EIO, f"the file has {target.stat().st_size} bytes")
        _sync_folder(target.parent)

    async def discard(self, file: ResultFile) -> None:
        """Remove it. See `ResultStore`."""
        await self.remove([checked_name(file)])

    def folder(self, task_id: str) -> str:
        """Made by the function that first asks for it (``rocyard.checkpoint_folder``): most tasks keep none."""
        return str(self.root / CHECKPOINTS / task_id)

    # --- for the API --------------------------------------------------------------------------------------------

    async def open(self, file: ResultFile) -> AsyncIterator[bytes]:
        """Read it in pieces. See `ResultStore`."""
        path = self.root / checked_name(file)
        try:
            descriptor = await asyncio.to_thread(_opened, path, file.bytes)
        except FileNotFoundError:
            raise missing(file, GONE) from None
        except OSError as error:
            raise missing(file, words_of(error)) from error
        return checked_pieces(file, os.fdopen(descriptor, "rb", buffering=0))

    # --- for the leader -----------------------------------------------------------------------------------------

    async def owner(self) -> str:
        """By the one file of a folder. See `ResultStore`."""
        return await asyncio.to_thread(self._owner)

    def _owner(self) -> str:
        try:
            return owner_of(_names(self.root / OWNER))
        except FileNotFoundError:
            return ""

    async def guests(self) -> list[str]:
        """By files that were written of late. See `ResultStore`."""
        return await asyncio.to_thread(self._guests)

    def _guests(self) -> list[str]:
        try:
            names = _names(self.root / GUESTS)
        except FileNotFoundError:
            return []
        since_s = self._clock_s() - GUEST_S
        return [name for name in names if (self.root / GUESTS / name).stat().st_mtime > since_s]

    async def visit(self, cluster: str) -> None:
        """Write such a file. See `ResultStore`."""
        await asyncio.to_thread(self._visit, cluster)

    def _visit(self, cluster: str) -> None:
        (self.root / GUESTS).mkdir(mode=FOLDER_MODE, exist_ok=True)
        (self.root / GUESTS / cluster).touch(mode=FILE_MODE)

    async def claim(self, cluster: str) -> str:
        """Make that folder. See `ResultStore`."""
        return await asyncio.to_thread(self._claim, cluster)

    def _claim(self, cluster: str) -> str:
        if not (self.root / FILES).is_dir():
            return ""  # no agent has been here yet, or it is not mounted
        draft = self.root / f".{OWNER}-{cluster}"
        try:
            draft.mkdir(mode=FOLDER_MODE, exist_ok=True)
            (draft / cluster).touch(mode=FILE_MODE)
            _sync_folder(draft)
            # Refused where there is one with a file in it: so of two that do this at once one has it, on any file system, and
            # one that is killed here leaves nothing half done.
            draft.rename(self.root / OWNER)
            _sync_folder(self.root)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not self._owner():
                raise
        return self._owner()

    def marker(self, cluster: str) -> str:
        """The path of that file. See `ResultStore`."""
        return str(self.root / OWNER / cluster)

    async def scan(self) -> AsyncIterator[list[Leftover]]:
        """All files, folder by folder. See `ResultStore`."""
        if not await asyncio.to_thread((self.root / FILES).is_dir):
            return  # no agent has been here yet
        now_s = await asyncio.to_thread(self._clock_s)
        folders = [WRITING, CHECKPOINTS, *(f"{FILES}/{name}" for name in await asyncio.to_thread(_names, self.root / FILES))]
        for folder in folders:
            found = await asyncio.to_thread(self._listed, folder, now_s)
            for first in range(0, len(found), BATCH):
                yield found[first : first + BATCH]

    def _listed(self, folder: str, now_s: float) -> list[Leftover]:
        found: list[Leftover] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # it was moved or removed meanwhile
                    age_s = max(0.0, now_s - entry.stat(follow_symlinks=False).st_mtime)
                    if (leftover := leftover_of(f"{folder}/{entry.name}", age_s)) is not None:
                        found.append(leftover)
        return found

    async def remove(self, names: Sequence[str]) -> int:
        """Remove files and folders. See `ResultStore`."""
        return await asyncio.to_thread(remove_each, names, self._remove)

    def _remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _clock_s(self) -> float:
        """What time it is where the files lie: a server of files has a clock of its own."""
        descriptor = os.open(self.root / CLOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            os.write(descriptor, b"%d\n" % time.time_ns())
            os.fsync(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)


def remove_each(names: Sequence[str], remove: Callable[[str], None]) -> int:
    """Remove what is ours of these; how much of it was there. What cannot be removed is left to the next scan."""
    removed = 0
    for name in names:
        if leftover_of(name, 0.0) is None:
            continue
        try:
            remove(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("result_not_removed", name=name, error=words_of(error))
            continue
        removed += 1
    return removed


def not_stored(size: int, where: str, why: str) -> ResultNotStored:
    """The error for a result that could not be kept."""
    return ResultNotStored(f"the result ({size} bytes) could not be stored in {where}: {why}")


def sync_written(path: Path, size: int) -> None:
    """See that what an executor has written is on disk, is a plain file, and as long as it said; user code runs there.

    Raises:
        OSError: it is not.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise OSError(errno.EINVAL, "it is no plain file of its own")
        if status.st_size != size:
            raise OSError(errno.EIO, f"the file has {status.st_size} bytes")
        os.fchmod(descriptor, FILE_MODE)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Reader:
    """A file that is read in threads. It may be closed while a read that nobody waits for any more goes on."""

    def __init__(self, opened: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._opened = opened
        self._lock = threading.Lock()

    def next_piece(self) -> bytes:
        with self._lock:
            piece = b"" if self._opened.closed else self._opened.read(CHUNK_BYTES)
            self.digest.update(piece)
            self.size += len(piece)
            return piece

    def close(self) -> None:
        with self._lock:
            self._opened.close()


async def checked_pieces(file: ResultFile, opened: IO[bytes]) -> AsyncIterator[bytes]:
    """Pieces of a file, of which the last one is given only once all are known to be what was kept.

    Raises:
        ResultMissing: it is shorter, longer or another.
    """
    reader, held = _Reader(opened), b""
    try:
        while piece := await asyncio.to_thread(reader.next_piece):
            if held:
                yield held
            held = piece
        if reader.size != file.bytes:
            raise missing(file, f"the file has {reader.size} bytes")
        if reader.digest.hexdigest() != file.sha256:
            raise missing(file, f"its SHA-256 is {reader.digest.hexdigest()}, and it was {file.sha256} when it was kept")
        if held:
            yield held
    except OSError as error:
        raise missing(file, words_of(error)) from error
    finally:
        asyncio.get_running_loop().run_in_executor(None, reader.close)  # it may have to wait for a read


def _opened(path: Path, size: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor).st_size
    if found != size:
        os.close(descriptor)
        raise OSError(errno.EIO, f"the file has {found} bytes")
    return descriptor


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def words_of(error: OSError) -> str:
    """What the system says of it, without the path, which is said beside it."""
    return error.strerror or str(error) or type(error).__name__
