"""Which devices a slot gets. Pure: the same index and shape give the same answer.

`place` never raises: "cannot" is an answer, with a verdict for every node. What is free is `manager.core.index`'s.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from manager.core.index import Grant, Index, NodeView, Pool
from manager.core.quantities import MEMORY_BYTES_MAX
from manager.core.shapes import Shape


class Reason(enum.StrEnum):
    """Why a node cannot take a shape now."""

    INSUFFICIENT_MEMORY = "InsufficientMemory"  # leased to other slots
    FOREIGN_MEMORY = "ForeignMemory"  # would fit but for memory used by processes that are not ours
    EXCEEDS_LARGEST_DEVICE = "ExceedsLargestDevice"  # would not fit on the empty node
    TOO_FEW_DEVICES = "TooFewDevices"
    UNHEALTHY_DEVICE = "UnhealthyDevice"
    CORDONED = "Cordoned"
    TOO_MANY_SLOTS = "TooManySlots"  # memory would do, but the node has all the slots that it may have
    NO_WORKER = "NoWorker"  # the agent lives, its Dask worker does not (yet)
    NODE_LOST = "NodeLost"


class Verdict(msgspec.Struct, frozen=True):
    """What one node says to one shape. `short_bytes` is what is missing per device, 0 where memory is not the matter."""

    node: str
    reason: Reason
    short_bytes: int = 0


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """The shape fits there."""

    grant: Grant


class Unplaced(msgspec.Struct, frozen=True, tag="unplaced"):
    """The shape fits nowhere now; one verdict for each node, by name."""

    verdicts: tuple[Verdict, ...]


Demand = tuple[tuple[Shape, float], ...]
"""The known mix of shapes with their shares, for policies that look ahead."""
NO_DEMAND: Final[Demand] = ()


def place(shape: Shape, index: Index, demand: Demand = NO_DEMAND) -> Placed | Unplaced:  # noqa: ARG001
    """Best fit (see `find`), or why not.

    Args:
        shape: what is asked for.
        index: the ledger; not changed.
        demand: part of every policy's signature; this one does not look ahead.
    """
    grant = find(shape, index)
    if grant is not None:
        return Placed(grant)
    return Unplaced(tuple(verdict(shape, view) for _, view in sorted(index.nodes.items())))


def find(shape: Shape, index: Index) -> Grant | None:
    """Best fit: the node and devices with the least free memory that still hold the shape; ties by name. None: no room."""
    if shape.gpus == 1:
        return _find_one(shape.memory_bytes, index)
    memory_bytes, gpus = shape.memory_bytes, shape.gpus
    best: tuple[int, str, tuple[str, ...]] | None = None
    for name, view in index.nodes.items():
        if not view.placeable or len(view.pools) < gpus:
            continue
        pools = view.pools.values()
        fitting = [(pool.free_bytes, pool.uuid) for pool in pools if pool.free_bytes >= memory_bytes and pool.healthy]
        if len(fitting) >= gpus:
            chosen = sorted(fitting)[:gpus]
            candidate = (sum(free for free, _ in chosen), name, tuple(uuid for _, uuid in chosen))
            if best is None or candidate < best:
                best = candidate
    return None if best is None else Grant(best[1], best[2], memory_bytes)


def _find_one(memory_bytes: int, index: Index) -> Grant | None:
    """`find` for one device: nearly all requests, and a round over a large cluster makes thousands."""
    best_bytes, best = MEMORY_BYTES_MAX + 1, ("", "")
    for name, view in index.nodes.items():
        if view.placeable:
            for pool in view.pools.values():
                free_bytes = pool.free_bytes
                if (
                    memory_bytes <= free_bytes <= best_bytes
                    and pool.healthy
                    and (free_bytes < best_bytes or (name, pool.uuid) < best)
                ):
                    best_bytes, best = free_bytes, (name, pool.uuid)
    return None if best_bytes > MEMORY_BYTES_MAX else Grant(best[0], (best[1],), memory_bytes)


def verdict(shape: Shape, view: NodeView) -> Verdict:
    """Why the node cannot take the shape now; asked only where it cannot."""
    if view.lost:
        return Verdict(view.name, Reason.NODE_LOST)
    if len(view.pools) < shape.gpus:
        return Verdict(view.name, Reason.TOO_FEW_DEVICES)

    def short(sizes: Iterable[int]) -> int:
        """What the last device needed would still lack."""
        return shape.memory_bytes - sorted(sizes, reverse=True)[shape.gpus - 1]

    pools = list(view.pools.values())
    if (missing := short(pool.usable_bytes for pool in pools)) > 0:
        return Verdict(view.name, Reason.EXCEEDS_LARGEST_DEVICE, missing)
    if view.cordoned:
        return Verdict(view.name, Reason.CORDONED)
    if not view.reachable:
        return Verdict(view.name, Reason.NO_WORKER)
    healthy = [pool for pool in pools if pool.healthy]
    if len(healthy) < shape.gpus or short(pool.usable_bytes for pool in healthy) > 0:
        return Verdict(view.name, Reason.UNHEALTHY_DEVICE)
    missing = max(0, short(pool.free_bytes for pool in healthy))
    if missing == 0 and len(view.slots) >= view.slots_max:
        return Verdict(view.name, Reason.TOO_MANY_SLOTS)
    if short(pool.free_bytes + pool.foreign_bytes for pool in healthy) <= 0:
        return Verdict(view.name, Reason.FOREIGN_MEMORY, missing)
    return Verdict(view.name, Reason.INSUFFICIENT_MEMORY, missing)


def victims(shape: Shape, index: Index, costs: Mapping[str, float]) -> tuple[str, ...]:
    """Slots on one node whose end makes the shape fit there, cheapest first; empty where no such set exists.

    Args:
        shape: what must fit.
        index: the ledger.
        costs: what ending each slot costs; slots that are not in it stay.
    """
    best: tuple[float, int, str, tuple[str, ...]] | None = None
    for name, view in index.nodes.items():
        if not view.usable or len(view.pools) < shape.gpus:
            continue
        options: list[tuple[float, str, tuple[str, ...]]] = []
        for uuid, pool in view.pools.items():
            chosen = _clear(pool, shape.memory_bytes, costs) if pool.healthy else None
            if chosen is not None:
                options.append((sum(costs[slot] for slot in chosen), uuid, chosen))
        if len(options) < shape.gpus:
            continue
        chosen_slots = sorted({slot for _, _, slots in sorted(options)[: shape.gpus] for slot in slots})
        if not chosen_slots:
            if view.placeable:
                return ()  # it fits as it is
            chosen_slots = sorted((s for s in view.slots if s in costs), key=lambda s: (costs[s], s))[:1]
            if not chosen_slots:
                continue
        candidate = (sum(costs[s] for s in chosen_slots), len(chosen_slots), name, tuple(chosen_slots))
        if best is None or candidate < best:
            best = candidate
    return best[3] if best is not None else ()


def _clear(pool: Pool, memory_bytes: int, costs: Mapping[str, float]) -> tuple[str, ...] | None:
    """Slots whose end frees `memory_bytes` on the device, none of them needlessly; None where none do.

    The cheaper of: the cheapest slot that is enough alone, and cheap ones taken until it is enough, less those that were
    not needed in the end.
    """
    missing = memory_bytes - pool.free_bytes
    if missing <= 0:
        return ()
    used = pool.used
    sizes = {slot: max(lease, used.get(slot, 0)) for slot, lease in pool.leases.items() if slot in costs}
    if sum(sizes.values()) < missing:
        return None
    chosen: list[str] = []
    given = 0
    for slot in sorted(sizes, key=lambda s: (costs[s], -sizes[s], s)):
        if given >= missing:
            break
        given += sizes[slot]
        chosen.append(slot)
    for slot in sorted(chosen, key=lambda s: (-costs[s], sizes[s], s)):
        if given - sizes[slot] >= missing:
            given -= sizes[slot]
            chosen.remove(slot)
    alone = min((slot for slot in sizes if sizes[slot] >= missing), key=lambda s: (costs[s], sizes[s], s), default=None)
    if alone is not None and costs[alone] < sum(costs[slot] for slot in chosen):
        return (alone,)
    return tuple(chosen)
