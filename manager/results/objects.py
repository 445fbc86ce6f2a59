"""Results in any place that fsspec reaches, such as an S3-like store. The one module that imports fsspec.

Executors write to a folder of their machine, and the agent sends what they wrote: it alone has the right to. There are no
folders for checkpoints: what a function writes elsewhere it reports by itself.
"""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import fsspec

from manager.core.errors import StartError
from manager.core.model import ResultFile
from manager.results.folder import BATCH, FOLDER_MODE, GONE, checked_pieces, not_stored, remove_each, sync_written, words_of
from manager.results.store import (
    CLOCK,
    FILES,
    GUEST_S,
    GUESTS,
    OWNER,
    Leftover,
    checked_name,
    file_name,
    leftover_of,
    missing,
    owner_of,
)

MOMENTS: Final = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""What file systems call the time of the last change."""

T = TypeVar("T")


class ObjectResults:
    """A place with a URL.

    Args:
        url: as people have set it.
        scratch: the agent's own folder for what executors write; None for who keeps nothing.

    Raises:
        StartError: the URL cannot be used.
    """

    def __init__(self, url: str, scratch: Path | None) -> None:
        self.url = url
        self.scratch = scratch
        try:
            found, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise StartError(f"results.url: {url} cannot be used: {error}") from error
        self.system: Any = found
        self.root = str(root).rstrip("/")

    def prepare(self) -> None:
        """See that it can be written, and empty the scratch folder: whose results lay there is gone.

        Raises:
            StartError: it cannot.
        """
        try:
            self._clock_s()
            if self.scratch is not None:
                self.scratch.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
                for path in self.scratch.iterdir():
                    path.unlink()
        except Exception as error:
            raise StartError(f"results.url: {self.url} cannot be written: {str(error) or type(error).__name__}") from error

    # --- for agents ---------------------------------------------------------------------------------------------

    def place(self, task_id: str, attempt: int, slot_id: str) -> Path | None:
        """On this machine."""
        return None if self.scratch is None else self.scratch / f"{task_id}-{attempt}-{slot_id}.json"

    async def keep(self, path: Path, task_id: str, attempt: int, slot_id: str, size: int, sha256: str) -> ResultFile:
        """Send it. See `ResultStore`."""
        name = file_name(task_id, attempt, slot_id)
        try:
            await _told(self._keep, path, name, size)
        except OSError as error:
            raise not_stored(size, self.url, words_of(error)) from error
        return ResultFile(name, size, sha256)

    def _keep(self, path: Path, name: str, size: int) -> None:
        target = self._full(name)
        if path.exists():
            sync_written(path, size)
            self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(path), target)
        self.system.invalidate_cache()
        found = self.system.info(target)["size"]
        if found != size:
            raise OSError(f"{found} bytes have arrived")
        path.unlink(missing_ok=True)

    async def discard(self, file: ResultFile) -> None:
        """Remove it. See `ResultStore`."""
        await self.remove([checked_name(file)])

    def folder(self, task_id: str) -> str:  # noqa: ARG002 -- as `ResultStore` has it
        """None: not everybody who runs tasks can write there."""
        return ""

    # --- for the API --------------------------------------------------------------------------------------------

    async def open(self, file: ResultFile) -> AsyncIterator[bytes]:
        """Read it in pieces. See `ResultStore`."""
        name = self._full(checked_name(file))
        try:
            size, opened = await asyncio.to_thread(self._opened, name)
        except FileNotFoundError:
            raise missing(file, GONE) from None
        except Exception as error:  # each file system has errors of its own
            raise missing(file, str(error) or type(error).__name__) from error
        if size != file.bytes:
            opened.close()
            raise missing(file, f"the file has {size} bytes")
        return checked_pieces(file, opened)

    def _opened(self, name: str) -> tuple[int, Any]:
        self.system.invalidate_cache()
        return self.system.info(name)["size"], self.system.open(name, "rb")

    # --- for the leader -----------------------------------------------------------------------------------------

    async def owner(self) -> str:
        """By the one object below a name. See `ResultStore`."""
        return await _told(self._owner)

    def _owner(self) -> str:
        return owner_of(self._notes(OWNER))

    def _notes(self, folder: str) -> dict[str, float | None]:
        """Names of clusters, and when each was written there; None: its file system does not say."""
        self.system.invalidate_cache()
        try:
            found = self.system.ls(self._full(folder), detail=True)
        except FileNotFoundError:
            return {}
        notes = {str(info["name"]).rstrip("/").rpartition("/")[2]: moment_of(info) for info in found}
        notes.pop(folder, None)  # some systems list the folder itself
        return notes

    async def guests(self) -> list[str]:
        """By objects that were written of late. See `ResultStore`."""
        return await _told(self._guests)

    def _guests(self) -> list[str]:
        notes = self._notes(GUESTS)
        if not notes:
            return []
        since_s = self._clock_s() - GUEST_S
        return sorted(name for name, moment_s in notes.items() if moment_s is None or moment_s > since_s)

    async def visit(self, cluster: str) -> None:
        """Write such an object. See `ResultStore`."""
        await _told(self._note, GUESTS, cluster)

    def _note(self, folder: str, cluster: str) -> None:
        self.system.makedirs(self._full(folder), exist_ok=True)
        self.system.pipe_file(self._full(f"{folder}/{cluster}"), b".")

    async def claim(self, cluster: str) -> str:
        """Write that object. See `ResultStore`."""
        return await _told(self._claim, cluster)

    def _claim(self, cluster: str) -> str:
        """Not every system can refuse to write what is there already. But who writes first and looks then sees each other one
        that believes to have it: two would both have to have looked before the other one wrote.
        """
        if owner := self._owner():
            return owner
        self._note(OWNER, cluster)
        owner = self._owner()
        if owner == cluster:
            return owner
        self.system.rm_file(self._full(f"{OWNER}/{cluster}"))
        return self._owner()

    def marker(self, cluster: str) -> str:
        """The URL of that object. See `ResultStore`."""
        return f"{self.url.rstrip('/')}/{OWNER}/{cluster}"

    async def scan(self) -> AsyncIterator[list[Leftover]]:
        """All files, by the parts that their names spread over. See `ResultStore`."""
        now_s = await _told(self._clock_s)
        for folder in await _told(self._folders):
            found = await _told(self._listed, folder, now_s)
            for first in range(0, len(found), BATCH):
                yield found[first : first + BATCH]

    def _folders(self) -> list[str]:
        self.system.invalidate_cache()
        try:
            return [str(name) for name in self.system.ls(self._full(FILES), detail=False)]
        except FileNotFoundError:
            return []

    def _listed(self, folder: str, now_s: float) -> list[Leftover]:
        found = []
        for name, info in self.system.find(folder, detail=True).items():
            changed_s = moment_of(info)
            age_s = 0.0 if changed_s is None else max(0.0, now_s - changed_s)  # of unknown age: never old enough
            below = str(name)[len(self.root) :].lstrip("/")
            if (leftover := leftover_of(below, age_s)) is not None:
                found.append(leftover)
        return found

    async def remove(self, names: Sequence[str]) -> int:
        """Remove files. See `ResultStore`."""
        return await asyncio.to_thread(remove_each, names, self._remove)

    def _remove(self, name: str) -> None:
        _asked(self.system.rm_file, self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _clock_s(self) -> float:
        """What time it is there, by a file that is written now."""
        name = self._full(CLOCK)
        self.system.makedirs(self.root, exist_ok=True)
        self.system.pipe_file(name, b".")
        self.system.invalidate_cache()
        return moment_of(self.system.info(name)) or 0.0


async def _told(ask: Callable[..., T], *args: Any) -> T:
    """As `_asked`, in a thread."""
    return await asyncio.to_thread(_asked, ask, *args)


def _asked(ask: Callable[..., T], *args: Any) -> T:
    """The answer of a file system, each of which has errors of its own.

    Raises:
        OSError: it has none.
    """
    try:
        return ask(*args)
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


def moment_of(info: dict[str, Any]) -> float | None:
    """When a file was changed, in seconds; None where its file system does not say so in a way that is known."""
    for key in MOMENTS:
        match info.get(key):
            case dt.datetime() as moment:
                return moment.timestamp()
            case float() | int() as seconds:
                return float(seconds)
            case str() as text:
                try:
                    return dt.datetime.fromisoformat(text).timestamp()
                except ValueError:
                    continue
            case _:
                continue
    return None
