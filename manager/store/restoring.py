"""How the data of a backup come into a store: a server of its own reads the copy, and they are made safe before they go on.

Safe means that nobody from before can write: terms are over, incarnations fenced, slots closed, what ran is back in its queue.
Into an embedded store they go as files, which the next start finds; into another one key by key, its identity last, so that a
process sees all or nothing, and a restoration that was broken off is taken up again.
"""

import asyncio
import contextlib
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final

from manager.children import tied
from manager.core.errors import RocyardError, StoreFull, StoreUnavailable
from manager.core.keys import Keys
from manager.durability import info_lines
from manager.store.connection import StoreConnection, StoreReplyError
from manager.store.schema import deploy, read_facts
from manager.store.server import programs_like
from manager.store.store import Store

COPY: Final = "copy.rdb"
LOAD_S: Final = 3600.0
"""A copy of a hundred GiB takes less than this to read."""
POLL_S: Final = 0.05
DEADLINE_S: Final = 60.0
BATCH: Final = 100
"""Keys that are on their way at once; each holds up to a megabyte."""
DATABASES: Final = 1024


class NotRestored(RocyardError):
    """The backup cannot be restored there."""


@contextlib.asynccontextmanager
async def loaded(folder: Path, server: str, database: int) -> AsyncIterator[Store]:
    """A server that has read the copy in `folder`, reached by a socket of its own; it ends with the block. `server` made it.

    Raises:
        StartError: there is no server program.
        NotRestored: none of them can read the copy.
    """
    refused = []
    for program in programs_like(server):
        async with contextlib.AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(_running(program, folder))
            except NotRestored as error:
                refused.append(str(error))
                continue
            await _keep_only_ours(connection, database)
            yield Store(connection)
            return
    raise NotRestored(f"the copy was made by {server}, and no server program here can read it: {'; '.join(refused)}")


@contextlib.asynccontextmanager
async def _running(program: str, folder: Path) -> AsyncIterator[StoreConnection]:
    """A server of that program that has read the copy in `folder`.

    Raises:
        NotRestored: it cannot.
    """
    with tempfile.TemporaryDirectory(prefix="rocyard-") as short:  # the path of a socket must be
        socket, said = Path(short) / "s", Path(short) / "log"
        with said.open("wb") as output:
            process = subprocess.Popen(  # noqa: ASYNC220 -- it returns at once
                tied((program, "-")), stdin=subprocess.PIPE, stdout=output, stderr=output
            )
        connection = StoreConnection(f"unix://{socket}", DEADLINE_S, "restore")
        try:
            assert process.stdin is not None
            process.stdin.write(_configuration(folder, socket).encode())
            process.stdin.close()
            await _until_loaded(connection, process, program, said)
            yield connection
        finally:
            await connection.close()
            process.kill()
            await asyncio.to_thread(process.wait)


def _configuration(folder: Path, socket: Path) -> str:
    return "\n".join(
        (
            "port 0",
            f'unixsocket "{socket}"',
            "unixsocketperm 700",
            f'dir "{folder}"',
            f"dbfilename {COPY}",
            "appendonly no",
            "appendfsync always",
            "aof-use-rdb-preamble yes",
            'save ""',
            f"databases {DATABASES}",
            "daemonize no",
            "loglevel warning",
        )
    )


async def _until_loaded(connection: StoreConnection, process: "subprocess.Popen[bytes]", program: str, said: Path) -> None:
    deadline_s = time.monotonic() + LOAD_S
    while True:
        if process.poll() is not None:
            raise NotRestored(f"{program} says: {_end_of(said)}")
        with contextlib.suppress(StoreUnavailable):
            await connection.call("PING")
            return
        if time.monotonic() > deadline_s:
            raise NotRestored(f"{program} did not read the copy in an hour")
        await asyncio.sleep(POLL_S)


def _end_of(said: Path) -> str:
    return " / ".join(said.read_text(errors="replace").strip().splitlines()[-3:])


async def _keep_only_ours(connection: StoreConnection, database: int) -> None:
    """A store may hold what is others': of a backup only our keys are restored, and in the first database."""
    call = connection.call
    if database:
        await call("SWAPDB", 0, database)
    held = info_lines((await call("INFO", "keyspace")).decode())
    for number in (int(name.removeprefix("db")) for name in held):
        if number:
            await connection.apart(lambda ask, number=number: _flush(ask, number))  # type: ignore[misc]
    async for keys in _scan(call):
        if strange := [key for key in keys if not key.startswith(Keys().prefix.encode())]:
            await call("DEL", *strange)


async def _flush(ask: Any, number: int) -> None:
    await ask("SELECT", number)
    await ask("FLUSHDB")


async def make_safe(store: Store, restoration: str) -> int:
    """See that nobody from before can write; how many slots were closed.

    Raises:
        NotRestored: no cluster's data are in it.
    """
    keys = store.keys
    if not (await read_facts(store.connection.call, keys)).cluster:
        raise NotRestored("the backup has no cluster in it")
    # Whichever version comes first loads its functions: those of the backup's time are no measure.
    await store.connection.call("HDEL", keys.meta, "library", "library_version")
    await store.connection.apart(lambda ask: deploy(ask, keys))
    await store.migrate()
    return await store.restored(restoration)


async def write_log(store: Store, folder: Path) -> Path:
    """Have the server write what it holds as an embedded store keeps it; the folder of that, whole and on disk."""
    call = store.connection.call
    await call("CONFIG", "SET", "appendonly", "yes")
    while True:
        info = info_lines((await call("INFO", "persistence")).decode())
        if info["aof_rewrite_in_progress"] == "0" and info["aof_rewrite_scheduled"] == "0":
            break
        await asyncio.sleep(POLL_S)
    if info["aof_last_bgrewrite_status"] != "ok" or info["aof_last_write_status"] != "ok":
        raise NotRestored("the data could not be written: is there room on the disk of data_dir?")
    return folder / "appendonlydir"


async def check_target(target: StoreConnection, restoration: str) -> None:
    """Whether a store may be given the data: it is empty, or has a part of them since this restoration was broken off.

    Raises:
        NotRestored: it holds something.
    """
    keys = Keys()
    begun = await target.call("HGET", keys.meta, "restoring")
    if begun is not None and begun.decode() == restoration:
        return
    async for found in _scan(target.call):
        # Dask workers of a cluster that waits for its data go on to write their heartbeats.
        strange = [key for key in found if not key.startswith(keys.heartbeat("").encode())]
        if strange:
            raise NotRestored(
                f"the store is not empty: it has {strange[0].decode(errors='replace')!r} and more. Give an empty one, or empty "
                "this one (redis-cli flushdb) if nothing in it is needed"
            )


async def copy_into(source: Store, target: StoreConnection, restoration: str, tell: Callable[[int, int], None]) -> int:
    """Copy all keys, the identity last; how many.

    Raises:
        NotRestored: the target does not take them.
    """
    keys, call = source.keys, source.connection.call
    total, done = int(await call("DBSIZE")), 0
    await target.call("HSET", keys.meta, "restoring", restoration)
    async for found in _scan(call):
        wanted = [key for key in found if key != keys.meta.encode() and not key.startswith(keys.heartbeat("").encode())]
        await _copy(call, target, wanted)
        done += len(found)
        tell(min(done, total), total)
    await call("HDEL", keys.meta, "library", "library_version")  # its functions are not copied: a process loads its own
    await _copy(call, target, [keys.meta.encode()])
    return total


async def _copy(call: Any, target: StoreConnection, keys: list[bytes]) -> None:
    for at in range(0, len(keys), BATCH):
        batch = keys[at : at + BATCH]
        values = await asyncio.gather(*(call("DUMP", key) for key in batch))
        lives = await asyncio.gather(*(call("PTTL", key) for key in batch))
        rows = zip(batch, values, lives, strict=True)
        try:
            await _all(
                target.call("RESTORE", key, max(0, life), value, "REPLACE") for key, value, life in rows if value is not None
            )
        except StoreReplyError as error:
            raise NotRestored(
                f"the store does not take the data ({error}): if it is of an older version than the server program on this "
                "machine, install one of the store's version here"
            ) from error
        except StoreFull as error:
            raise NotRestored("the store has not enough memory for the data: raise maxmemory and run this again") from error


async def _all(calls: Iterable[Any]) -> None:
    """Await all, and raise the first error only when none is under way any more."""
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer


async def _scan(call: Any) -> AsyncIterator[list[bytes]]:
    """All keys, in pieces."""
    cursor = b"0"
    while True:
        cursor, found = await call("SCAN", cursor, "COUNT", 500)
        if found:
            yield found
        if cursor == b"0":
            return
