"""What the end of an attempt means: which failures are worth another attempt, what room one needs that ran out of memory,
and a result that lies in a file made safe. It commits nothing.
"""

import asyncio
from typing import Final

import msgspec

from manager.core.errors import RocyardError
from manager.core.lifecycle import ROOM_AFTER_OUT_OF_MEMORY, Outcome
from manager.core.model import Claim, ResultFile, TaskError
from manager.core.quantities import MEMORY_BYTES_MAX
from manager.core.shapes import Grant, Shape, memory_class, shape_id
from manager.core.wire import Done, Failure, decode_failure
from manager.log import get_logger
from manager.results import ResultStore

GPU_OUT_OF_MEMORY: Final = "GpuOutOfMemory"
"""As an executor calls it."""
KEEP_S_MAX: Final = 60.0
"""A results store that takes longer than this for one result is as good as gone, and its slot has other work."""

_decode_args: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode: Final = msgspec.json.Encoder().encode

log = get_logger("rocyard.slot")


def arguments_of(claim: Claim) -> bytes:
    """JSON of the keyword arguments; a task of an array finds its index in the one that was asked for."""
    args, name = bytes(claim.spec.args), claim.spec.index_as
    if not name or claim.index is None:
        return args
    return _encode({**_decode_args(args), name: claim.index})


def failed_as(kind: str, bases: tuple[str, ...], claim: Claim) -> Outcome:
    """How an attempt ended that failed with an error of that type: what `retry_on` does not name is not tried again."""
    wanted = claim.spec.retry_on
    return Outcome.FAILED if not wanted or not {kind, *bases}.isdisjoint(wanted) else Outcome.FAILED_FOR_GOOD


def error_of(data: bytes) -> Failure:
    """The failure that an executor has told."""
    try:
        return decode_failure(data)
    except msgspec.MsgspecError:  # user code has written into the executor's socket
        return Failure("Failed", "the executor's answer cannot be read")


def room_for(shape: Shape, grant: Grant) -> tuple[str, Shape] | None:
    """The shape (id, and itself) in which a task of `shape` is tried again whose device had no memory left with `grant`.

    None where no request could ask for so much.
    """
    needed = int(max(shape.memory_bytes, grant.memory_bytes) * ROOM_AFTER_OUT_OF_MEMORY)
    if needed > MEMORY_BYTES_MAX:
        return None
    larger = msgspec.structs.replace(shape, memory_bytes=memory_class(needed))
    return shape_id(larger), larger


async def kept_result(results: ResultStore, done: Done, slot_id: str) -> ResultFile | TaskError:
    """Where the result of `done` lies safely, or why it does not."""
    place = results.place(done.task_id, done.attempt, slot_id)
    assert place is not None, "the executor was given a place"
    try:
        async with asyncio.timeout(KEEP_S_MAX):
            return await results.keep(place, done.task_id, done.attempt, slot_id, done.file_bytes, done.file_sha256)
    except (RocyardError, TimeoutError) as error:
        why = str(error) or f"storing it took longer than {KEEP_S_MAX:g} s"
        log.error("result_not_stored", task=done.task_id, bytes=done.file_bytes, error=why)
        return TaskError("ResultNotStored", why)


async def discard_result(results: ResultStore, file: ResultFile) -> None:
    """Remove a result that no record names. What goes wrong there is left to the leader's scan."""
    try:
        async with asyncio.timeout(KEEP_S_MAX):
            await results.discard(file)
    except (RocyardError, TimeoutError, OSError) as error:
        log.warning("result_not_discarded", name=file.name, error=str(error))
