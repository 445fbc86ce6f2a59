"""Leadership, and what controllers write. The leader's writes carry its token, and with a stale one they change nothing; what
time brings any controller may do.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from manager.core.lifecycle import SlotFlag, TaskStatus
from manager.core.mix import Mix, encode_mix
from manager.core.model import ClusterState, TenantRow
from manager.store import rows
from manager.store.calls import IDS_MAX, Calls, milliseconds


class DueReply(msgspec.Struct, frozen=True):
    """What time has brought: retries that went back to their queues, tasks whose time was up, tasks that were told of the end
    of one that they come after, and tasks of arrays that were given their records.
    """

    retried: int
    expired: int
    told: int
    made: int


class Retention(msgspec.Struct, frozen=True):
    """Which finished tasks of a tenant are forgotten: those that ended before, and those above so many."""

    ended_before_ms: int
    kept: int


class Swept(msgspec.Struct, frozen=True):
    """What was forgotten: how many tasks, how many slots; and where results lay that no record names any more."""

    tasks: int
    slots: int
    files: tuple[str, ...] = ()


class Kept(msgspec.Struct, frozen=True):
    """What a task's record says of files that may belong to it; status None: there is no such task."""

    status: TaskStatus | None
    attempt: int = 0
    file: str = ""


class LeaderCalls(Calls):
    """Calls for controllers."""

    async def lead(self, holder: str, token: int, beat: int, step: str, role: str = "") -> tuple[bool, int, int, str]:
        """One step of leadership: ``read take renew resign``. Returns (done, token, beat, holder).

        `role`: empty for controllers; others, such as ``autoscaler``, have a leader of their own.
        """
        word, now_token, now_beat, now_holder = await self._run("ry_lead", holder, token, beat, step, role)
        return word == b"OK", int(now_token), int(now_beat), now_holder.decode()

    async def look(self, *, leader: bool) -> ClusterState:
        """One consistent look. The leader's look also takes note of what had asked for it."""
        return rows.state(await self._run("ry_state", "1" if leader else "0"))

    async def request_slot(self, token: int, slot_id: str, shape_id: str, served_max: int) -> bool:
        """The leader asks for a slot. False: the token is stale."""
        return bool(await self._run("ry_request", token, slot_id, shape_id, served_max) != b"STALE")

    async def fence(self, token: int, reason: str, slots: Sequence[str]) -> bool:
        """The leader ends slots, opened or not. False: the token is stale."""
        return bool(await self._run("ry_fence", token, reason, *slots) != b"STALE")

    async def drop(self, token: int, reason: str, slots: Sequence[str]) -> list[str] | None:
        """The leader takes back slots that nobody has opened; those that it could, None: the token is stale."""
        reply = await self._run("ry_drop", token, reason, *slots)
        return [slot.decode() for slot in reply[1]] if reply[0] == b"OK" else None

    async def flag(self, token: int, flag: SlotFlag, slots: Sequence[str]) -> bool:
        """The leader asks open slots to end at their next task boundary, or now. False: the token is stale."""
        return bool(await self._run("ry_flag", token, flag.value, *slots) != b"STALE")

    async def lost(self, token: int, node: str, incarnation: str) -> tuple[bool, list[str]]:
        """The leader declares an incarnation dead. Returns (done, slots ended)."""
        reply = await self._run("ry_lost", token, node, incarnation)
        return reply[0] == b"OK", [slot.decode() for slot in reply[1]] if len(reply) > 1 else []

    async def planned(self, token: int, held: int, wake_at: Iterable[tuple[str, int]]) -> bool:
        """What the leader has planned: how many slots are held, and at which depth a shape asks for another round."""
        args = [value for pair in wake_at for value in pair]
        return bool(await self._run("ry_planned", token, held, *args) != b"STALE")

    async def put_mix(self, token: int, mix: Mix) -> bool:
        """The mix of requests that the scheduler has learned. False: the token is stale."""
        return bool(await self._run("ry_mix", token, encode_mix(mix)) != b"STALE")

    async def share(self, token: int, tenants: Sequence[TenantRow], vtimes: Iterable[tuple[str, float]]) -> bool:
        """What tenants may have at work and what they have had, and the same of shapes. False: the token is stale."""
        args: list[Any] = [len(tenants)]
        for row in tenants:
            args += (row.tenant, row.running_max or 0, row.gpus_max or 0, row.memory_bytes_max or 0, row.weight)
            args += (f"{row.vtime_s or 0.0:.3f}", row.retries_per_minute_max or 0)
        for shape_id, vtime_s in vtimes:
            args += (shape_id, f"{vtime_s:.3f}")
        return bool(await self._run("ry_shares", token, *args) != b"STALE")

    async def age(self, token: int, seconds: float, shape_ids: Sequence[str]) -> int | None:
        """Tasks that have waited for so long rise by one priority; how many have, None: the token is stale."""
        risen = int(await self._run("ry_age", token, int(milliseconds(seconds)), IDS_MAX, *shape_ids))
        return None if risen < 0 else risen

    async def reached(self, token: int, *, dask: bool) -> bool:
        """Whether the leader reaches the Dask scheduler, for people to see. False: the token is stale."""
        return bool(await self._run("ry_reached", token, "ok" if dask else "down") != b"STALE")

    async def due(self) -> tuple[DueReply, float | None]:
        """Do what time brings, a bounded part of it; what was done, and seconds until there is more (None: nothing waits)."""
        *counts, following_ms = await self._run("ry_due", IDS_MAX)
        return DueReply(*counts), None if following_ms < 0 else following_ms / 1000

    async def refuse(self, token: int, shape_id: str) -> int | None:
        """Fail what waits in a shape that nothing can ever hold, and is there since a smaller one ran out of device memory.

        Returns:
            How many tasks, at most `IDS_MAX`; None: the token is stale.
        """
        failed = int(await self._run("ry_refuse", token, shape_id, IDS_MAX))
        return None if failed < 0 else failed

    async def sweep(
        self,
        token: int,
        ended_before_ms: int,
        kept: int,
        closed_before_ms: int,
        tenants: Mapping[str, Retention] | None = None,
    ) -> Swept:
        """Forget old tasks and tombstones, a bounded number.

        Args:
            ended_before_ms, kept: of each tenant that `tenants` does not name.
        """
        args: list[Any] = [ended_before_ms, kept]
        for tenant, own in (tenants or {}).items():
            args += (tenant, own.ended_before_ms, own.kept)
        tasks, slots, files, *_ = await self._run("ry_sweep", token, closed_before_ms, IDS_MAX, *args)
        return Swept(tasks, slots, tuple(name.decode() for name in files))

    async def kept(self, token: int, task_ids: Sequence[str]) -> list[Kept] | None:
        """What the records say of files of these tasks, in their order; None: the token is stale, so nothing may be removed."""
        assert len(task_ids) <= IDS_MAX
        word, *said = await self._run("ry_kept", token, *task_ids)
        if word != b"OK":
            return None
        return [Kept(rows.status(said[i]), int(said[i + 1] or 0), said[i + 2].decode()) for i in range(0, len(said), 3)]
