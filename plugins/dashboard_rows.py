"""What the page ``/rocyard`` shows, as values: every device as a bar of parts, and the queue. Pure: it knows no Bokeh.

Devices that share their memory are one bar. A bar goes from 0 to the memory's end. From the left: its slots, each as wide as
what it takes away from the free memory (the larger of lease and measured use), then room that is kept, then foreign use; the
reserve stands at the right end.
"""

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from manager.core.devices import Device
from manager.core.index import Index, NodeView, Pool
from manager.core.lifecycle import SlotKind
from manager.core.news import News, QueueNews, SlotNews
from manager.core.quantities import format_duration, format_memory
from manager.core.shapes import Grant, Shape
from plugins.ledger import DirectWaiting

DETAILED_MAX: Final = 40
"""With more devices than this each node is one row with its devices side by side: a screen holds no more rows."""
GAP: Final = 0.06
"""Between two devices of one row, as a share of the largest device."""
_MAKERS: Final = frozenset({"AMD", "Instinct", "Radeon", "NVIDIA", "(simulated)"})


class Part(enum.StrEnum):
    """What a piece of a bar is."""

    LEASED = "slot"
    DIRECT = "direct"
    USED = "used"
    OVER = "over"
    KEPT = "kept"
    FOREIGN = "foreign"
    ALONE = "alone"
    FREE = "free"
    RESERVE = "reserve"


class Piece(msgspec.Struct, frozen=True):
    """A piece of a device's bar, in bytes from its left end. `slot` is empty for what belongs to none."""

    part: Part
    left: int
    right: int
    slot: str = ""


class Bar(msgspec.Struct, frozen=True):
    """One device, or several that share their memory.

    Attributes:
        uuid: of the device, or the name of the memory that is shared.
        name: positions of the devices, such as ``0``, or ``2–3``; `devices` is how many.
        note: what is wrong with the device; empty where nothing is.
        pieces: from the left; those of measured use lie upon those of leases, the others side by side.
    """

    node: str
    uuid: str
    name: str
    devices: int
    model: str
    total_bytes: int
    free_bytes: int
    leased_bytes: int
    used_bytes: int
    foreign_bytes: int
    reserve_bytes: int
    note: str
    pieces: tuple[Piece, ...]


class NodeBars(msgspec.Struct, frozen=True):
    """One node. `note` says why nothing new is placed on it; empty where it takes work."""

    node: str
    note: str
    bars: tuple[Bar, ...]


class SlotText(msgspec.Struct, frozen=True):
    """What is said of a slot, to people."""

    slot: str
    kind: str
    needs: str
    tenant: str
    leased: str
    used: str
    running: str


class Place(msgspec.Struct, frozen=True):
    """Where a bar is drawn: its row, and how many bytes to the right."""

    row: int
    offset: int


class Layout(msgspec.Struct, frozen=True):
    """Where everything is drawn, rows from 0 at the top.

    Attributes:
        dense: one row for each node, else one for each device below a row with its node's name.
        width: of all, in bytes.
        labels: row → name at its left.
        heads: row → name of the node that begins there; only where not dense.
    """

    dense: bool
    rows: int
    width: int
    columns: int
    stride: int
    places: Mapping[tuple[str, str], Place]
    labels: Mapping[int, str]
    heads: Mapping[int, str]


def node_bars(index: Index, news: News, devices: Mapping[str, Sequence[Device]]) -> tuple[NodeBars, ...]:
    """All nodes, by name.

    Args:
        index: the ledger's.
        news: which slots are direct.
        devices: of each node, for names; a device that is not in it is called by its uuid.
    """
    direct = {slot.slot_id for slot in news.slots if slot.kind is SlotKind.DIRECT}
    found = []
    for name in sorted(index.nodes, key=natural):
        view = index.nodes[name]
        known = {device.uuid: device for device in devices.get(name, ())}
        numbers = {uuid: known[uuid].index if uuid in known else at for at, uuid in enumerate(view.devices)}
        bars = [_bar(view, pool, known.get(pool.devices[0]), numbers, direct) for pool in view.pools.values()]
        found.append(NodeBars(name, _node_note(view), tuple(bars)))
    return tuple(found)


def _node_note(view: NodeView) -> str:
    notes = [
        text
        for text, holds in (("lost", view.lost), ("no Dask worker", not view.reachable), ("cordoned", view.cordoned))
        if holds
    ]
    return ", ".join(notes)


def _bar(view: NodeView, pool: Pool, device: Device | None, numbers: Mapping[str, int], direct: set[str]) -> Bar:
    alone = all(view.devices[uuid].alone for uuid in pool.devices)
    return Bar(
        node=view.name,
        uuid=pool.key,
        name=spans([numbers[uuid] for uuid in pool.devices]),
        devices=len(pool.devices),
        model=pool.key if device is None else _model_text(device, len(pool.devices)),
        total_bytes=pool.total_bytes,
        free_bytes=pool.free_bytes,
        leased_bytes=sum(pool.leases.values()),
        used_bytes=sum(pool.used.values()),
        foreign_bytes=pool.foreign_bytes,
        reserve_bytes=pool.reserve_bytes,
        note="" if pool.healthy else "unhealthy",
        pieces=tuple(_clipped(_pieces(pool, direct, Part.ALONE if alone else Part.FREE), pool.total_bytes)),
    )


def _model_text(device: Device, sharing: int) -> str:
    """``MI300X``, or with how it is split ``MI300X DPX/NPS2``; ``2 × MI300X CPX/NPS4`` for two that share their memory."""
    modes = device.partition.rpartition("/")[0] or device.partition
    text = f"{short_model(device.model)} {modes}".strip()
    return text if sharing == 1 else f"{sharing} × {text}"


def spans(numbers: Sequence[int]) -> str:
    """``0–3, 7`` for 0, 1, 2, 3 and 7."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ", ".join("–".join(map(str, each)) for each in ranges)


def _pieces(pool: Pool, direct: set[str], left_over: Part) -> Iterator[Piece]:
    """From the left; `left_over` is what nobody has and nobody needs."""
    at = 0
    for slot, lease in sorted(pool.leases.items()):
        used = pool.used.get(slot, 0)
        yield Piece(Part.DIRECT if slot in direct else Part.LEASED, at, at + lease, slot)
        if used:
            yield Piece(Part.USED, at, at + min(used, lease), slot)
        if used > lease:
            yield Piece(Part.OVER, at + lease, at + used, slot)
        at += max(lease, used)
    if pool.foreign_bytes:
        yield Piece(Part.FOREIGN, at, at + pool.foreign_bytes)
        at += pool.foreign_bytes
    for slot, size in sorted(pool.kept.items()):
        yield Piece(Part.KEPT, at, at + size, slot)
        at += size
    if at < pool.usable_bytes:
        yield Piece(left_over, at, pool.usable_bytes)
    if pool.reserve_bytes:
        yield Piece(Part.RESERVE, pool.total_bytes - pool.reserve_bytes, pool.total_bytes)


def _clipped(pieces: Iterator[Piece], total: int) -> Iterator[Piece]:
    """What is promised and taken may be more than there is; a bar ends where the device does."""
    for piece in pieces:
        if piece.left < total:
            yield piece if piece.right <= total else msgspec.structs.replace(piece, right=total)


def layout_of(nodes: Sequence[NodeBars]) -> Layout:
    """Where the bars stand."""
    devices = sum(len(node.bars) for node in nodes)
    largest = max((bar.total_bytes for node in nodes for bar in node.bars), default=1)
    columns = max((len(node.bars) for node in nodes), default=1) or 1
    places: dict[tuple[str, str], Place] = {}
    labels: dict[int, str] = {}
    heads: dict[int, str] = {}
    stride = int(largest * (1 + GAP))
    row = 0
    if devices > DETAILED_MAX:
        for row, node in enumerate(nodes):
            labels[row] = f"▲ {node.node}" if node.note else node.node
            for column, bar in enumerate(node.bars):
                places[node.node, bar.uuid] = Place(row, column * stride)
        width = columns * stride - (stride - largest)
        return Layout(
            dense=True, rows=len(nodes), width=width, columns=columns, stride=stride, places=places, labels=labels, heads=heads
        )
    for node in nodes:
        heads[row] = node.node
        for bar in node.bars:
            row += 1
            places[node.node, bar.uuid] = Place(row, 0)
            labels[row] = f"{bar.name}  {bar.model}"
        row += 1
    return Layout(dense=False, rows=row, width=largest, columns=1, stride=stride, places=places, labels=labels, heads=heads)


def slot_texts(nodes: Sequence[NodeBars], index: Index, news: News, shapes: Mapping[str, Shape]) -> dict[str, SlotText]:
    """What is said of each slot that a bar shows.

    Args:
        nodes: the bars.
        index: the ledger's: what each slot uses.
        news: what the leader told of slots.
        shapes: of the slots, as far as they are known.
    """
    told = {slot.slot_id: slot for slot in news.slots}
    texts: dict[str, SlotText] = {}
    for slot in {piece.slot for node in nodes for bar in node.bars for piece in bar.pieces if piece.slot}:
        grant = index.grants.get(slot) or index.kept.get(slot)
        if grant is None:
            continue
        view = index.nodes.get(grant.node)
        pools = {view.devices[uuid].pool.key for uuid in grant.devices if uuid in view.devices} if view else set()
        used = sum(view.pools[pool].used.get(slot, 0) for pool in pools) if view else 0
        shape, row = shapes.get(slot), told.get(slot)
        texts[slot] = SlotText(
            slot=slot,
            kind=_kind_text(row, kept=slot not in index.grants),
            needs=_grant_text(grant),
            tenant=shape.tenant if shape is not None else "?",
            leased=format_memory(grant.memory_bytes * len(grant.devices)),
            used=format_memory(used),
            running=_running_text(row),
        )
    return texts


def _kind_text(row: SlotNews | None, *, kept: bool) -> str:
    if kept:
        return "room kept for a slot that waits"
    return "a Dask task" if row is not None and row.kind is SlotKind.DIRECT else "tasks of its shape"


def _running_text(row: SlotNews | None) -> str:
    if row is None:
        return "not told"
    return "its Dask task" if row.kind is SlotKind.DIRECT else str(row.running)


def _grant_text(grant: Grant) -> str:
    """``24 GiB``; ``2 × 24 GiB, for itself``; ``8 GiB, 25 % of the compute``."""
    words = [needs_text(grant.memory_bytes, len(grant.devices))]
    if grant.share_milli:
        words.append(f"{grant.share_milli / 10:g} % of the compute")
    if grant.exclusive:
        words.append("for itself")
    return ", ".join(words)


def needs_text(memory_bytes: int, gpus: int) -> str:
    """``24 GiB``, or ``2 × 24 GiB``."""
    size = format_memory(memory_bytes)
    return size if gpus == 1 else f"{gpus} × {size}"


def queue_columns(queues: Sequence[QueueNews]) -> dict[str, list[str]]:
    """The table of the queue, a row for each shape, the deepest first."""
    return {
        "needs": [needs_text(queue.memory_bytes, queue.gpus) for queue in queues],
        "tenant": [queue.tenant for queue in queues],
        "waiting": [f"{queue.depth:,}" for queue in queues],
        "oldest": ["–" if queue.oldest_wait_s is None else format_duration(queue.oldest_wait_s) for queue in queues],
        "open": [str(queue.slots_open) for queue in queues],
        "asked": [str(queue.slots_asked) for queue in queues],
        "running": [f"{queue.running:,}" for queue in queues],
    }


def direct_columns(waiting: Sequence[DirectWaiting]) -> dict[str, list[str]]:
    """The table of what Dask's own users wait for, a row for each size, the most first."""
    return {
        "needs": [needs_text(row.resources.memory_bytes, row.resources.gpus) for row in waiting],
        "waiting": [f"{row.count:,}" for row in waiting],
        "oldest": [format_duration(row.oldest_wait_s) for row in waiting],
    }


def summary_text(nodes: Sequence[NodeBars]) -> str:
    """The cluster in one line."""
    bars = [bar for node in nodes for bar in node.bars]
    devices = sum(bar.devices for bar in bars)
    total = sum(bar.total_bytes - bar.reserve_bytes for bar in bars)
    leased, used = sum(bar.leased_bytes for bar in bars), sum(bar.used_bytes for bar in bars)
    foreign = sum(bar.foreign_bytes for bar in bars)
    share = f" ({leased / total:.0%})" if total else ""
    text = (
        f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, {devices} {'device' if devices == 1 else 'devices'}, "
        f"{format_memory(total)}: leased {format_memory(leased)}{share}, slots use {format_memory(used)}"
    )
    if foreign:
        text += f", others use {format_memory(foreign)}"
    return text


def short_model(model: str) -> str:
    """A device's model without its maker's names: ``MI300X``."""
    return " ".join(word for word in model.split() if word not in _MAKERS) or model


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``node-2`` before ``node-10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
