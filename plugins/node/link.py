"""How the Dask worker asks its agent: a unix socket with framed msgpack, one request per connection.

The worker holds no right to tasks. It asks the agent to open a slot (and waits on that connection until the slot has
ended), for the report that it registers with, and for the devices' last readings. The agent numbers its Dask workers:
a request of another generation than the newest is refused.

A slot outlives the worker that asked for it. Only a direct slot, which runs one Dask task of somebody's, does not: it ends
when the connection that asked for it does.
"""

import asyncio
import enum
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from manager.core.devices import Device
from manager.core.index import SLOTS_MAX
from manager.core.model import DeviceUse
from manager.core.shapes import Grant, Labels
from manager.core.wire import FrameReader, pack

READ_BYTES: Final = 65536
BACKLOG: Final = 4096
"""Connections that wait while the agent is busy: one for each slot that is opened or ended at once. More would be refused."""


class OpenSlot(msgspec.Struct, frozen=True, tag="open"):
    """Open this slot, or adopt it where it is open; the answer comes when it has ended."""

    generation: int
    slot_id: str
    grant: Grant


class OpenDirect(msgspec.Struct, frozen=True, tag="open-direct"):
    """Run one Dask task in a slot of its own; the answer comes when nothing is left of the slot.

    Attributes:
        generation: of the worker.
        slot_id: fresh for each request.
        grant: what it has.
        call_path: file with the pickled call.
        result_path: where its outcome is to be written.
    """

    generation: int
    slot_id: str
    grant: Grant
    call_path: str
    result_path: str


class EndDirect(msgspec.Struct, frozen=True, tag="end-direct"):
    """Nobody wants this Dask task any more; the answer comes when nothing is left of its slot, or never will be.

    Attributes:
        generation: of the worker; an older one may ask too, since what it ends was its own.
        slot_id: of an `OpenDirect`, be it on its way, or never sent.
        gently: the task is told, and gets a moment for its ``finally`` blocks.
    """

    generation: int
    slot_id: str
    gently: bool = True


class AskReport(msgspec.Struct, frozen=True, tag="report"):
    """What lives on this node? Asked once, while the worker registers."""

    generation: int


class AskBeat(msgspec.Struct, frozen=True, tag="beat"):
    """The worker lives; what is new?"""

    generation: int
    address: str


class LiveSlot(msgspec.Struct, frozen=True):
    """A slot that the agent holds."""

    slot_id: str
    grant: Grant


class Report(msgspec.Struct, frozen=True, tag="reported"):
    """The whole truth about one node at the moment that its worker registers: what is not in it is not there.

    `cpu_milli` and `host_memory_bytes` are its host's; 0: not known. `labels` are the operator's.
    """

    node: str
    incarnation: str
    generation: int
    devices: tuple[Device, ...]
    reserve_bytes: int
    slots: tuple[LiveSlot, ...]
    cordoned: bool = False
    slots_max: int = SLOTS_MAX
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    labels: Labels = ()


class Beat(msgspec.Struct, frozen=True, tag="beaten"):
    """News since the registration. Only `closed` says that something is gone; absence says nothing.

    Attributes:
        closed: slot ids that ended, the newest hundreds.
        uses: devices at the last reading, made `age_s` ago.
        cordoned: place nothing new here.
    """

    node: str
    closed: tuple[str, ...]
    uses: tuple[DeviceUse, ...]
    age_s: float
    cordoned: bool = False


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The slot has ended, or was never opened here: `reason` says which."""

    reason: str


class DirectOutcome(enum.StrEnum):
    """How a direct slot ended."""

    DONE = "done"  # the result file has what the task returned or raised
    CRASHED = "crashed"  # its process ended before it did
    MEMORY = "memory"  # it took more device memory than it had asked for
    AGAIN = "again"  # it is not at fault and may run again: cancelled, pre-empted, refused


class DirectEnded(msgspec.Struct, frozen=True, tag="direct-ended"):
    """A direct slot has ended, or was never opened.

    Attributes:
        outcome: how.
        detail: in words.
        opened: whether it had been opened.
        stdout, stderr: the last of what the task wrote.
    """

    outcome: DirectOutcome
    detail: str = ""
    opened: bool = True
    stdout: bytes = b""
    stderr: bytes = b""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request came from a Dask worker that was replaced."""

    reason: str


Request = OpenSlot | OpenDirect | EndDirect | AskReport | AskBeat
Answer = Report | Beat | Ended | DirectEnded | Refused

_decode_request = msgspec.msgpack.Decoder(Request).decode
_decode_answer: Final[Callable[[bytes], Answer]] = msgspec.msgpack.Decoder(Answer).decode


class LinkBroken(Exception):
    """The agent did not answer."""


class AgentLink:
    """The Dask worker's side."""

    def __init__(self, path: str, generation: int) -> None:
        self.path = path
        self.generation = generation

    async def report(self, deadline_s: float) -> Report:
        """The report to register with.

        Raises:
            LinkBroken: no answer, or this worker was replaced.
        """
        answer = await self._ask(AskReport(self.generation), deadline_s)
        if not isinstance(answer, Report):
            raise LinkBroken(f"the agent answered {answer!r}")
        return answer

    async def beat(self, address: str, deadline_s: float) -> Beat:
        """News for the scheduler.

        Raises:
            LinkBroken: no answer, or this worker was replaced.
        """
        answer = await self._ask(AskBeat(self.generation, address), deadline_s)
        if not isinstance(answer, Beat):
            raise LinkBroken(f"the agent answered {answer!r}")
        return answer

    async def open(self, slot_id: str, grant: Grant) -> str:
        """Have the slot opened and wait until it has ended; why it ended.

        Raises:
            LinkBroken: the agent went away.
        """
        answer = await self._ask(OpenSlot(self.generation, slot_id, grant), None)
        match answer:
            case Ended(reason):
                return reason
            case Refused(reason):
                raise LinkBroken(reason)
            case _:
                raise LinkBroken(f"the agent answered {answer!r}")

    async def run_direct(self, grant: Grant, slot_id: str, call_path: str, result_path: str) -> DirectEnded:
        """Have a Dask task run in a slot of its own, and wait until nothing is left of it. Giving up the wait ends it.

        Raises:
            LinkBroken: the agent went away, and the task with it; or this worker was replaced.
        """
        answer = await self._ask(OpenDirect(self.generation, slot_id, grant, call_path, result_path), None)
        if not isinstance(answer, DirectEnded):
            raise LinkBroken(f"the agent answered {answer!r}")
        return answer

    async def end_direct(self, slot_id: str) -> None:
        """Have a direct slot ended; returns when nothing is left of it, and it will never be opened.

        Raises:
            LinkBroken: the agent went away.
        """
        answer = await self._ask(EndDirect(self.generation, slot_id), None)
        if not isinstance(answer, Ended):
            raise LinkBroken(f"the agent answered {answer!r}")

    async def _ask(self, request: Request, deadline_s: float | None) -> Answer:
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await asyncio.open_unix_connection(self.path)
                try:
                    writer.write(pack(request))
                    frames = FrameReader()
                    while True:
                        data = await reader.read(READ_BYTES)
                        if not data:
                            raise LinkBroken("the agent closed the connection")
                        for body in frames.feed(data):
                            return _decode_answer(body)
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise LinkBroken(f"the agent does not answer: {str(error) or type(error).__name__}") from None


async def serve_link(path: str, answer: Callable[[Request], Awaitable[Answer]]) -> asyncio.Server:
    """The agent's side: `answer` is awaited for each request. Who hangs up on a direct slot has it ended; nothing else is."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        try:
            while data := await reader.read(READ_BYTES):
                for body in frames.feed(data):
                    request = _decode_request(body)
                    if isinstance(request, OpenDirect):
                        writer.write(pack(await _while_connected(request, reader, answer)))
                    else:
                        writer.write(pack(await answer(request)))
                    await writer.drain()
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # a broken peer ends its own connection and nothing else
        finally:
            writer.close()

    return await asyncio.start_unix_server(handle, path, backlog=BACKLOG)


async def _while_connected(
    request: OpenDirect, reader: asyncio.StreamReader, answer: Callable[[Request], Awaitable[Answer]]
) -> Answer:
    """The answer; the slot is ended as soon as its Dask worker is gone, since nobody would hear how it ended."""
    answering = asyncio.ensure_future(answer(request))
    hanging_up = asyncio.ensure_future(reader.read(1))  # a worker sends nothing more on this connection
    await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
    if not answering.done():
        await answer(EndDirect(request.generation, request.slot_id, gently=False))
    hanging_up.cancel()
    await asyncio.wait({hanging_up})  # the stream has one reader at a time
    return await answering


def encode_report(report: Report | Beat) -> bytes:
    """As it travels inside Dask's own messages: one JSON text, since Dask turns lists into tuples on the way."""
    return msgspec.json.encode(report)


def decode_report(data: Any) -> Report | None:
    """A report out of Dask's registration; None where there is none that can be read."""
    if not isinstance(data, bytes | str):
        return None
    try:
        return msgspec.json.decode(data, type=Report)
    except msgspec.MsgspecError:
        return None


def decode_beat(data: Any) -> Beat | None:
    """News out of a Dask heartbeat; None where there is none that can be read."""
    if not isinstance(data, bytes | str):
        return None
    try:
        return msgspec.json.decode(data, type=Beat)
    except msgspec.MsgspecError:
        return None
