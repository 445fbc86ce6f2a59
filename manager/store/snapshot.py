"""A consistent copy of a store that runs: asked for as a replica asks, so that the server makes it in a process of its own.

Knows the protocol of that and nothing of files: who asks says where the bytes go.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import hiredis

from manager.core.errors import RocyardError, StoreUnavailable
from manager.store.connection import StoreConnection

SILENCE_S: Final = 60.0
"""While the server prepares the copy it says so every few seconds."""
CHUNK_BYTES: Final = 256 * 1024
MARK_BYTES: Final = 40
"""Behind a copy whose length the server does not know when it begins stands a mark of so many bytes."""


class NoCopy(RocyardError):
    """The store gives no copy of itself."""


async def copy_of(connection: StoreConnection, write: Callable[[bytes], object], tell: Callable[[int, int], None]) -> int:
    """Give the copy to `write` piece by piece; its length. `tell` hears how much has come, of how much (0: not known).

    Raises:
        NoCopy: the server does not give one.
        StoreUnavailable: it could not be reached, or the copy broke off.
    """
    reader, writer = await connection.stream()
    try:
        writer.write(hiredis.pack_command(("SYNC",)))
        head = await _head(reader)
        if head.startswith(b"EOF:"):
            return await _until_mark(reader, head[4:], write, tell)
        return await _of_length(reader, int(head), write, tell)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise StoreUnavailable(f"the copy broke off: {str(error) or 'the store fell silent'}; try again") from None
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    """What stands behind ``$`` before the copy; until then the server sends empty lines."""
    while True:
        async with asyncio.timeout(SILENCE_S):
            line = await reader.readline()
        if not line:
            raise StoreUnavailable("the copy broke off before it began: the store's own log says why, mostly its disk is full")
        if line.startswith(b"-"):
            raise NoCopy(
                f"The store gives no copy of itself ({line[1:].strip().decode(errors='replace')}): managed services keep the "
                "command SYNC to themselves. Use the service's own backups and restore them there; "
                "or allow SYNC to the user in store.url (ACL SETUSER … +sync)."
            )
        if line.startswith(b"$"):
            return line[1:].strip()


async def _of_length(
    reader: asyncio.StreamReader, length: int, write: Callable[[bytes], object], tell: Callable[[int, int], None]
) -> int:
    come = 0
    while come < length:
        piece = await _piece(reader, min(CHUNK_BYTES, length - come))
        write(piece)
        come += len(piece)
        tell(come, length)
    return come


async def _until_mark(
    reader: asyncio.StreamReader, mark: bytes, write: Callable[[bytes], object], tell: Callable[[int, int], None]
) -> int:
    assert len(mark) == MARK_BYTES
    come, held = 0, b""
    while True:
        held += await _piece(reader, CHUNK_BYTES)
        end = held.find(mark)
        ready, held = (held[:end], b"") if end >= 0 else (held[:-MARK_BYTES], held[-MARK_BYTES:])
        write(ready)
        come += len(ready)
        tell(come, 0)
        if end >= 0:
            return come


async def _piece(reader: asyncio.StreamReader, most: int) -> bytes:
    async with asyncio.timeout(SILENCE_S):
        piece = await reader.read(most)
    if not piece:
        raise OSError("the store closed the connection")
    return piece
