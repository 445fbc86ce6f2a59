"""Which room is kept for a request that smaller ones pass, and when it is there. Pure.

A large request under a flood of small ones finds no node with enough room at any one moment, although enough is given back
over time. So one node is chosen where it could fit first, and its room is kept: what ends there is not given to others until
the large one fits. Nobody is ended for it, and what does not touch this room is placed as before.
"""

import msgspec

from manager.core.index import DeviceView, Index, NodeView
from manager.core.shapes import SHARE_MILLI_MAX, Grant, Resources, grant_of


class Room(msgspec.Struct, frozen=True, order=True):
    """A node's best devices for a request, and what must still be given back there before it fits; the least is the best.

    Attributes:
        memory_bytes: of the devices.
        share_milli: of their compute.
        cpu_milli, host_memory_bytes: of the host.
        node, devices: where.
    """

    memory_bytes: int
    share_milli: int
    cpu_milli: int
    host_memory_bytes: int
    node: str
    devices: tuple[str, ...]


def best_room(resources: Resources, index: Index, nodes: frozenset[str] | None = None) -> Room | None:
    """Where the request could fit first; None where it could on no node, however empty.

    Args:
        resources: what is asked for.
        index: the ledger; not changed. Room that is kept for others counts as taken, and as never given back.
        nodes: the only ones that it may go to; None: all.
    """
    views = index.nodes.values() if nodes is None else [index.nodes[name] for name in nodes if name in index.nodes]
    rooms = [room for view in views if (room := room_on(resources, view, index)) is not None]
    return min(rooms, default=None)


def room_on(resources: Resources, view: NodeView, index: Index) -> Room | None:
    """The devices of one node that would be free first; None where they would not do even when all slots have ended."""
    kept = [grant for grant in index.kept.values() if grant.node == view.name] if index.kept else []
    if not view.usable or len(view.kept) >= view.slots_max:
        return None
    if view.cpu_milli - sum(grant.cpu_milli for grant in kept) < resources.cpu_milli:
        return None
    if view.host_memory_bytes - sum(grant.host_memory_bytes for grant in kept) < resources.host_memory_bytes:
        return None
    able = [device for device in view.devices.values() if _could(resources, device)]
    able.sort(key=lambda device: (_missing_bytes(resources, device, 1), _missing_milli(resources, device), device.uuid))
    chosen: list[str] = []
    parts: dict[str, int] = {}  # of each pool, how many of the devices chosen lie over it
    memory = share = 0
    for device in able:
        if len(chosen) == resources.gpus:
            break
        pool = device.pool
        part = parts.get(pool.key, 0) + 1
        if pool.usable_bytes - pool.foreign_bytes - sum(pool.kept.values()) < part * resources.memory_bytes:
            continue
        memory += _missing_bytes(resources, device, part) - (_missing_bytes(resources, device, part - 1) if part > 1 else 0)
        share += _missing_milli(resources, device)
        parts[pool.key] = part
        chosen.append(device.uuid)
    if len(chosen) < resources.gpus:
        return None
    cpu_milli = max(0, resources.cpu_milli - view.cpu_free_milli)
    host_bytes = max(0, resources.host_memory_bytes - view.host_free_bytes)
    return Room(memory, share, cpu_milli, host_bytes, view.name, tuple(chosen))


def _could(resources: Resources, device: DeviceView) -> bool:
    """Whether the device would do if all slots on it had ended."""
    pool = device.pool
    return (
        pool.healthy
        and pool.usable_bytes - pool.foreign_bytes - sum(pool.kept.values()) >= resources.memory_bytes
        and SHARE_MILLI_MAX - sum(device.kept.values()) >= resources.share_milli
        and not (device.kept and (resources.exclusive or not device.alone.isdisjoint(device.kept)))
        and device.kind.matches(resources)
    )


def _missing_bytes(resources: Resources, device: DeviceView, parts: int) -> int:
    """What must end on the device's pool before so many parts of the request fit there."""
    missing = max(0, parts * resources.memory_bytes - device.pool.free_bytes)
    if resources.exclusive or device.alone:
        return max(missing, sum(device.pool.leases[slot] for slot in device.slots if slot in device.pool.leases))
    return missing


def _missing_milli(resources: Resources, device: DeviceView) -> int:
    return max(0, resources.share_milli - device.free_milli)


def grant_in(room: Room, resources: Resources) -> Grant:
    """What the request is given there."""
    return grant_of(resources, room.node, room.devices)


def is_ready(slot: str, kept: Grant, view: NodeView) -> bool:
    """Whether all of the room that is kept for `slot` on the node is free. What is kept counts as taken there."""
    if not view.usable or len(view.slots) + len(view.kept) > view.slots_max:
        return False
    # Of what it does not ask for, less than nothing may be free: others have room kept that is not free yet.
    if (kept.cpu_milli and view.cpu_free_milli < 0) or (kept.host_memory_bytes and view.host_free_bytes < 0):
        return False
    devices = [view.devices.get(uuid) for uuid in kept.devices]
    return all(
        device is not None
        and device.pool.healthy
        and device.pool.free_bytes >= 0
        and (not kept.share_milli or device.free_milli >= 0)
        and device.alone <= {slot}
        and not (kept.exclusive and (device.slots or len(device.kept) > 1))
        for device in devices
    )
