"""Whose end makes room for what waits: slots on one node, chosen by what ending them costs. Pure.

Who may end at all, and what that costs, is the caller's to say (`manager.core.closing`).
"""

from collections.abc import Mapping

import numpy as np

from manager.core.index import DeviceView, Index, NodeView
from manager.core.placement import devices_for, options_of
from manager.core.shapes import Grant, Resources


def victims(resources: Resources, index: Index, costs: Mapping[str, float]) -> tuple[str, ...]:
    """Slots on one node whose end makes the request fit there, cheapest first; empty where no such set exists.

    Args:
        resources: what must fit.
        index: the ledger.
        costs: what ending each slot costs; slots that are not in it stay.
    """
    table = index.table
    if len(options_of(resources, table, np.arange(len(table.names)), table.matching(resources)).row):
        return ()  # it fits as it is
    best: tuple[float, int, str, tuple[str, ...]] | None = None
    for name in {grant.node for slot in costs if (grant := index.grants.get(slot)) is not None}:
        view = index.nodes.get(name)
        if view is None or not view.usable or len(view.devices) < resources.gpus:
            continue
        # One slot at least must end here: where the cheapest is no better than what was found, nothing is.
        if best is not None and (min((costs[s] for s in view.slots if s in costs), default=np.inf), 1, name) >= best[:3]:
            continue
        chosen = _victims_on(resources, view, index.grants, costs)
        if not chosen:  # no set of them does, or what is missing is not theirs to give
            continue
        candidate = (sum(costs[slot] for slot in chosen), len(chosen), name, chosen)
        if best is None or candidate < best:
            best = candidate
    return best[3] if best is not None else ()


def _victims_on(
    resources: Resources, view: NodeView, grants: Mapping[str, Grant], costs: Mapping[str, float]
) -> tuple[str, ...] | None:
    """The cheapest slots of one node that will do; None: no set of them does."""
    options: list[tuple[float, str, tuple[str, ...]]] = []
    for uuid, device in view.devices.items():
        if device.pool.healthy and device.kind.matches(resources):
            cleared = _clear(resources, device, costs)
            if cleared is not None:
                options.append((sum(costs[slot] for slot in cleared), uuid, cleared))
    if len(options) < resources.gpus:
        return None
    chosen = {slot for _, _, slots in sorted(options)[: resources.gpus] for slot in slots}
    is_simple = len(view.pools) == len(view.devices) and not resources.cpu_milli and not resources.host_memory_bytes
    if is_simple and len(view.slots) + len(view.kept) - len(chosen) < view.slots_max:
        return tuple(sorted(chosen))
    # Devices that share memory, CPUs, memory of the host and the number of slots may need more of them than that.
    scratch = view.copy()
    for slot in chosen:
        scratch.remove(slot, grants[slot])
    others = sorted((slot for slot in view.slots if slot in costs and slot not in chosen), key=lambda s: (costs[s], s))
    while devices_for(resources, scratch) is None:
        if not others:
            return None
        scratch.remove(others[0], grants[others[0]])
        chosen.add(others.pop(0))
    for slot in sorted(chosen, key=lambda s: (-costs[s], s)):  # what came later may have been enough alone
        scratch.enter(slot, grants[slot])
        if devices_for(resources, scratch) is None:
            scratch.remove(slot, grants[slot])
        else:
            chosen.discard(slot)
    return tuple(sorted(chosen))


def _clear(resources: Resources, device: DeviceView, costs: Mapping[str, float]) -> tuple[str, ...] | None:
    """Slots whose end makes room for one part of the request on the device, none of them needlessly; None where none do."""
    if (resources.exclusive and device.kept) or device.alone & device.kept.keys():
        return None
    must = sorted(device.slots) if resources.exclusive else sorted(device.alone)
    if any(slot not in costs for slot in must):
        return None
    pool = device.pool
    sizes = {slot: max(lease, pool.used.get(slot, 0)) for slot, lease in pool.leases.items() if slot in costs}
    missing = resources.memory_bytes - pool.free_bytes - sum(sizes.pop(slot, 0) for slot in must)
    by_memory = _enough(missing, sizes, costs)
    if by_memory is None:
        return None
    going = (*must, *by_memory)
    shares = {slot: share for slot, share in device.slots.items() if slot in costs and slot not in going}
    missing = resources.share_milli - device.free_milli - sum(device.slots.get(slot, 0) for slot in going)
    by_share = _enough(missing if resources.share_milli else 0, shares, costs)
    return None if by_share is None else (*going, *by_share)


def _enough(missing: int, sizes: Mapping[str, int], costs: Mapping[str, float]) -> tuple[str, ...] | None:
    """Slots that together give `missing`, none of them needlessly; None where all of them do not.

    The cheaper of: the cheapest slot that is enough alone, and cheap ones taken until it is enough, less those that were
    not needed in the end.
    """
    if missing <= 0:
        return ()
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
