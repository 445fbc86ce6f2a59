"""What agents and Dask workers say of their nodes, slots and tasks. An agent says for which incarnation it speaks: what a
fenced one says changes nothing.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from manager.core.errors import RegistrationRefused, StoreFull
from manager.core.model import BeatReply, DeviceUse, End, MemoryNote, NextReply, NodeInfo, OpenReply, ProgressNote
from manager.core.shapes import Grant, encode_shape
from manager.store import rows
from manager.store.calls import Calls, milliseconds

_encode = msgspec.json.Encoder().encode


class AgentCalls(Calls):
    """Calls for agents: their node, its slots, and the tasks there."""

    async def register(self, node: str, incarnation: str, info: NodeInfo) -> bool:
        """Register an agent; all that earlier incarnations of the node held ends. False: this incarnation is fenced.

        Raises:
            RegistrationRefused: its inventory cannot be right, or another living node has one of its devices.
        """
        args: list[Any] = [info.machine or info.hostname]
        for device in info.devices:
            args += (device.uuid, device.memory_bytes)
        reply = await self._run("ry_register", node, incarnation, msgspec.json.encode(info), *args)
        if reply[0] == b"REFUSED":
            raise RegistrationRefused(f"node {node} is refused: {reply[1].decode()}")
        return bool(reply[0] == b"OK")

    async def beat(self, node: str, incarnation: str, slots: Iterable[tuple[str, bool]]) -> BeatReply:
        """One heartbeat of an agent with its slots (id, idle)."""
        args: list[Any] = []
        for slot_id, idle in slots:
            args += (slot_id, "i" if idle else "b")
        reply = [part.decode() for part in await self._run("ry_beat", node, incarnation, *args)]
        words = [(reply[i], reply[i + 1]) for i in range(1, len(reply), 2)]
        return BeatReply(
            reply[0] == "OK", ("", "cordoned") in words, ("", "leave") in words, tuple(word for word in words if word[0])
        )

    async def leave(self, node: str, incarnation: str) -> None:
        """An agent stops cleanly: its slots end, their tasks go back."""
        await self._run("ry_leave", node, incarnation)

    async def open_slot(self, slot_id: str, incarnation: str, grant: Grant) -> OpenReply:
        """Open a slot on the node of its grant; asking the same incarnation again is adoption."""
        return rows.opened(await self._run("ry_open", slot_id, grant.node, incarnation, *rows.grant_fields(grant)))

    async def open_direct(self, slot_id: str, incarnation: str, grant: Grant) -> str:
        """Note a slot that runs a Dask task of somebody's: OK, ADOPTED, FENCED, REFUSED (a known id) or CORDONED."""
        reply = await self._run("ry_open_direct", slot_id, grant.node, incarnation, *rows.grant_fields(grant))
        return str(reply.decode())

    async def close_slot(self, slot_id: str, incarnation: str, reason: str) -> None:
        """End a slot; what it still had claimed goes back."""
        await self._run("ry_close", slot_id, incarnation, reason)

    async def next(self, slot_id: str, incarnation: str, n: int, ends: Iterable[End]) -> NextReply:
        """Commit `ends`, then claim up to `n` tasks (0: only commit)."""
        args: list[Any] = [slot_id, incarnation, n]
        for end in ends:
            args += (
                *(end.task_id, end.attempt, end.outcome.value, end.payload),
                "" if end.age_s is None else int(milliseconds(end.age_s)),
                "" if end.duration_s is None else f"{milliseconds(end.duration_s):.3f}",
                f"{end.chance:.6f}",
                _end_more(end),
            )
        word, commits, flat = await self._run("ry_next", *args)
        return NextReply(word.decode(), tuple(map(rows.status, commits)), rows.claims(flat))

    async def started(self, slot_id: str, incarnation: str, tasks: Iterable[tuple[str, int, float]]) -> None:
        """Executors have taken these (task, attempt, seconds ago)."""
        args: list[Any] = []
        for task_id, attempt, age_s in tasks:
            args += (task_id, attempt, int(milliseconds(age_s)))
        await self._run("ry_started", slot_id, incarnation, *args)

    async def progress(self, slot_id: str, incarnation: str, notes: Iterable[ProgressNote]) -> int:
        """What running attempts have reported; how many of them are still the newest, on this slot."""
        args: list[Any] = []
        for note in notes:
            args += (
                *(note.task_id, note.attempt, "" if note.progress is None else f"{note.progress:.6g}"),
                "" if note.message is None else note.message or " ",
                note.checkpoint or "",
            )
        return int(await self._run("ry_progress", slot_id, incarnation, *args)) if args else 0

    async def cancels(self, slot_id: str) -> set[str]:
        """Tasks of the slot whose cancellation was asked."""
        return {task_id.decode() for task_id in await self._run("ry_cancels", slot_id)}

    async def keep_log(
        self, task_id: str, attempt: int, stdout: bytes, stderr: bytes, stdout_dropped: int, stderr_dropped: int = 0
    ) -> None:
        """Keep what an attempt has written so far. A full store keeps no logs: ends must pass, and they come behind."""
        with contextlib.suppress(StoreFull):
            await self._run("ry_log", task_id, attempt, stdout, stderr, stdout_dropped + stderr_dropped, stderr_dropped)

    async def note_memory(self, incarnation: str, notes: Iterable[MemoryNote]) -> None:
        """What slots of this incarnation were seen to use. Where more is learned, slots that lease less take no more tasks."""
        args: list[Any] = []
        for note in notes:
            args += (note.slot_id, note.peak_bytes, note.learned_bytes)
        if args:
            await self._run("ry_memory", incarnation, *args)

    async def put_heartbeat(self, node: str, address: str, uses: Sequence[DeviceUse]) -> None:
        """A Dask worker's heartbeat: the one key that it may write."""
        seen = time.time_ns() // 1_000_000  # for people only: its rights do not reach to the store's clock
        await self._raw("HSET", self.keys.heartbeat(node), "address", address, "uses", _encode(uses), "seen", seen)


def _end_more(end: End) -> bytes:
    """Of a success the file of its result, of one that ran out of device memory the shape with more room."""
    if end.file is not None:
        return _encode(end.file)
    return b"" if end.room is None else _encode((end.room[0], encode_shape(end.room[1]).decode()))
