"""What agent and executor say to each other. This module imports only msgspec: an executor may run in an interpreter
that has nothing else.

A socket pair carries frames: four bytes of length (big endian), then msgpack of a tagged struct. Down go batches of
tasks; up comes one `Done` per task, in order. Standard output is the user's and is never used: after each task the
executor writes the agent's `marker` to stdout and stderr, so that the agent can tell whose output it is.

Calls are numbered from 1 as they are sent (a `Describe` counts as one). For each the agent puts a `TOKEN` into a pipe,
and the executor takes the token before it begins the call. The agent can take tokens out again: who has the token has
the call, so a call that was taken back has surely not begun. End of that pipe ends the executor. Which call has started
stands in a shared page (`STARTED`), so that it is known even of an executor that was killed.
"""

import struct
from typing import Any, Final

import msgspec

FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""A frame is refused above this: far over the largest arguments or result, far under what would hurt."""

_LENGTH: Final = struct.Struct(">I")

TOKEN: Final = struct.Struct("=Q")
"""The right to begin the call of that number."""

STARTED: Final = struct.Struct("=Qd")
"""The shared page of one executor: the number of the last call that has started, and when on the monotonic clock."""


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """Run one task.

    Attributes:
        task_id: the task.
        attempt: the fence; comes back in `Done`.
        target: ``module:callable``.
        args: JSON object of keyword arguments.
        index, count: its place in its array, and how many that has; -1 and 0: it is in none.
        checkpoint: what an earlier attempt has reported last; empty: nothing.
        folder: where checkpoints of this task can be kept, on storage that the next attempt sees too; empty: nowhere.
        result_path: where a result is written that is too large for an answer; empty: such a one fails the task.
    """

    task_id: str
    attempt: int
    target: str
    args: bytes
    index: int = -1
    count: int = 0
    checkpoint: str = ""
    folder: str = ""
    result_path: str = ""


class Batch(msgspec.Struct, frozen=True, array_like=True, tag="batch"):
    """Calls to run one after the other."""

    calls: tuple[Call, ...]


class Describe(msgspec.Struct, frozen=True, array_like=True, tag="describe"):
    """Import callables and derive the schemas of their arguments."""

    targets: tuple[str, ...]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The executor is up."""

    pid: int
    python: str


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """One task has ended.

    Attributes:
        task_id, attempt: of the `Call`.
        ok: whether it returned.
        result: JSON of the returned value if `ok`, else JSON of a `Failure`.
        duration_s: seconds in the function.
        memory_bytes_peak: peak memory that torch allocated on one device, the fullest; 0 where torch was not used.
        load_s: seconds of importing the function's module before it could run; 0 once it is imported.
        terminated: it was ended by the agent's SIGTERM; not a failure of its own.
        file_bytes, file_sha256: of the result that was written to `Call.result_path`, and synced, instead of `result`.
    """

    task_id: str
    attempt: int
    ok: bool
    result: bytes
    duration_s: float
    memory_bytes_peak: int = 0
    load_s: float = 0.0
    terminated: bool = False
    file_bytes: int = 0
    file_sha256: str = ""


class Note(msgspec.Struct, frozen=True, array_like=True, tag="note"):
    """What a running task has reported. Nothing of it is told twice; None: nothing new of that.

    Attributes:
        task_id, attempt: of the `Call`.
        progress: 0 to 1.
        message: beside it.
        checkpoint: what the next attempt is to be given.
    """

    task_id: str
    attempt: int
    progress: float | None = None
    message: str | None = None
    checkpoint: str | None = None


class Failure(msgspec.Struct, frozen=True):
    """Why a task failed, as JSON in `Done.result`.

    Attributes:
        type: name of the exception's class, or one of ours: InvalidArguments, ResultNotSerialisable, ResultTooLarge,
            GpuOutOfMemory, TaskTerminated.
        message: its text, cut to 2,000 characters.
        traceback: its last 8,000 characters, without local variables; empty where it would only show the executor.
        bases: names of the exception's classes, its own first.
    """

    type: str
    message: str
    traceback: str = ""
    bases: tuple[str, ...] = ()


class Description(msgspec.Struct, frozen=True, array_like=True):
    """What one callable takes.

    Attributes:
        target: ``module:callable``.
        schema: JSON Schema of its arguments as one object; empty where `error` is set.
        doc: first paragraph of its docstring.
        error: why it cannot be used, else empty.
    """

    target: str
    schema: bytes = b""
    doc: str = ""
    error: str = ""


class Described(msgspec.Struct, frozen=True, array_like=True, tag="described"):
    """Answer to `Describe`: one for each target, in order, so that a target whose import ends the process is known."""

    descriptions: tuple[Description, ...]


ToExecutor = Batch | Describe
FromExecutor = Ready | Done | Described | Note

_encoder = msgspec.msgpack.Encoder()
encode_failure = msgspec.json.Encoder().encode
decode_failure = msgspec.json.Decoder(Failure).decode
decode_to_executor = msgspec.msgpack.Decoder(ToExecutor).decode
decode_from_executor = msgspec.msgpack.Decoder(FromExecutor).decode


def pack(message: Any) -> bytes:
    """One frame holding `message`."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of all frames that are complete with `data`.

        Raises:
            ValueError: a frame says that it is longer than `FRAME_BYTES_MAX`.
        """
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"a frame of {length} bytes is over the limit of {FRAME_BYTES_MAX}")
            if len(buffer) - start - 4 < length:
                break
            frames.append(bytes(buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        del buffer[:start]
        return frames
