"""What operators and the autoscaler ask of nodes and slots, and the journal of what the autoscaler decided."""

from collections.abc import Sequence

from manager.core.lifecycle import Cordon
from manager.core.shapes import Shape, encode_shape
from manager.store.calls import Calls


class OperatorCalls(Calls):
    """Calls for operators and the autoscaler."""

    async def cordon(
        self,
        node: str,
        mode: Cordon,
        by: str,
        deadline_s: float | None = None,
        *,
        remove: bool = False,
        token: int = 0,
        incarnation: str = "",
    ) -> str:
        """Say what a node may still take on.

        Args:
            mode: NONE lifts it.
            by: ``operator``, ``autoscaler``, which must lead with `token`, or ``agent``, the node's own of that `incarnation`.
            deadline_s: a drain gives running tasks back after this; None: it waits for them.
            remove: once it is empty the agent ends for good.

        Returns:
            OK, NONE (no such node), STALE (token or incarnation), KEPT (somebody else has cordoned it, and only an operator
            may change that).
        """
        deadline = "" if deadline_s is None else deadline_s
        proof = incarnation or token or ""
        reply = await self._run("ry_cordon", node, mode.value, by, deadline, "1" if remove else "", proof)
        return str(reply.decode())

    async def warm(self, shape_id: str, shape: Shape, slots: int, seconds: float) -> None:
        """Have so many slots of the shape open for so long, although nothing waits; 0: no more than work asks for."""
        await self._run("ry_warm", shape_id, encode_shape(shape), slots, seconds)

    async def unload(self, shape_ids: Sequence[str]) -> None:
        """Have the idle slots of these shapes closed, and none kept warm."""
        await self._run("ry_unload", *shape_ids)

    async def write_journal(self, token: int, decision: bytes, kept: int) -> bool:
        """Append to the autoscaler's journal, which holds about `kept`. False: the token is stale."""
        return bool(await self._run("ry_journal", token, decision, kept) != b"STALE")

    async def journal(self, limit: int, before: str = "+") -> list[tuple[str, bytes]]:
        """Decisions of the autoscaler (id, JSON), newest first, from before the stream id `before`."""
        top = before if before == "+" else f"({before}"
        rows = await self._raw("XREVRANGE", self.keys.journal, top, "-", "COUNT", limit)
        return [(entry_id.decode(), fields[1]) for entry_id, fields in rows]
