"""What the leader tells the scheduler plugin each round: facts that the store has and Dask has not."""

from typing import Final

import msgspec

from manager.core.lifecycle import Cordon, SlotKind, SlotStatus
from manager.core.mix import NO_MIX, Mix
from manager.core.model import ClusterState

QUEUES_MAX: Final = 100
"""Shapes that are told: the deepest queues; the dashboard shows no more."""
SLOTS_MAX: Final = 512
"""Slots that are told: some 40 KiB a round at most. Of more the dashboard shows the leases, which it has of its own."""


class QueueNews(msgspec.Struct, frozen=True):
    """One shape that has work or slots. `oldest_wait_s` is None where none waits."""

    shape_id: str
    tenant: str
    memory_bytes: int
    gpus: int
    depth: int
    slots_open: int
    slots_asked: int
    running: int
    oldest_wait_s: float | None = None


class SlotNews(msgspec.Struct, frozen=True, array_like=True):
    """An open slot: what the ledger does not know of it."""

    slot_id: str
    kind: SlotKind
    running: int


class News(msgspec.Struct, frozen=True):
    """All of it; the next news replaces these.

    Attributes:
        cordoned: nodes on which nothing new is placed.
        queues: the deepest first.
        slots: open ones, as many as are told.
        left: nodes whose agents have stopped cleanly.
        mix_known: revision of the mix of requests in the store: the scheduler tells its own where that is another.
        mix: that mix, for a scheduler that has learned none yet.
    """

    cordoned: tuple[str, ...] = ()
    queues: tuple[QueueNews, ...] = ()
    slots: tuple[SlotNews, ...] = ()
    left: tuple[str, ...] = ()
    mix_known: str = ""
    mix: Mix = NO_MIX


def news_of(state: ClusterState, *, with_mix: bool = False) -> News:
    """What one look at the store says; the mix itself where the scheduler lacks it."""
    by_shape: dict[str, list[int]] = {queue.shape_id: [0, 0, 0] for queue in state.queues}
    for slot in state.slots:
        if slot.kind is SlotKind.TASKS and (counts := by_shape.get(slot.shape_id)) is not None:
            counts[0 if slot.status is SlotStatus.OPEN else 1] += 1
            counts[2] += slot.running
    queues = [
        QueueNews(
            shape_id=queue.shape_id,
            tenant=queue.shape.tenant,
            memory_bytes=queue.shape.memory_bytes,
            gpus=queue.shape.gpus,
            depth=queue.depth,
            slots_open=by_shape[queue.shape_id][0],
            slots_asked=by_shape[queue.shape_id][1],
            running=by_shape[queue.shape_id][2],
            oldest_wait_s=None if queue.head_queued_ms is None else max(0, state.now_ms - queue.head_queued_ms) / 1000,
        )
        for queue in sorted(state.queues, key=lambda queue: (-queue.depth, queue.shape_id))[:QUEUES_MAX]
    ]
    opened = [slot for slot in state.slots if slot.status is SlotStatus.OPEN]
    # Direct ones first: nothing else tells the dashboard which slots these are.
    opened.sort(key=lambda slot: (slot.kind is not SlotKind.DIRECT, slot.slot_id))
    return News(
        cordoned=tuple(row.node for row in state.nodes if row.cordon is not Cordon.NONE),
        queues=tuple(queues),
        slots=tuple(SlotNews(slot.slot_id, slot.kind, slot.running) for slot in opened[:SLOTS_MAX]),
        left=tuple(row.node for row in state.nodes if row.left),
        mix_known=state.mix.revision,
        mix=state.mix if with_mix else NO_MIX,
    )


encode_news = msgspec.json.Encoder().encode
decode_news = msgspec.json.Decoder(News).decode
