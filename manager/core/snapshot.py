"""One look at a cluster as a file, and what each policy would do with it: a decision is replayed with no cluster at hand. Pure.

A snapshot holds what the planner and placement read, and nothing else: shapes, counts, devices and leases; no task, no
argument, no result, no address. The same snapshot gives the same answer, which is the leader's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from manager.core.ahead import Setup, ahead_of
from manager.core.errors import BadRequest
from manager.core.index import Index, index_of
from manager.core.mix import NO_MIX
from manager.core.model import ClusterState, NodeRow
from manager.core.needs import Limits
from manager.core.packing import PackGroup
from manager.core.placement import Demand, Policy, find
from manager.core.planner import Plan, plan
from manager.core.shapes import Grant, Resources
from manager.core.snapshot_check import wrong_number

FORMAT: Final = "rocyard-snapshot"
VERSION: Final = 1
"""Raised when older programs could not replay it any more; they then say so."""
REACHED: Final = "reached"
"""In place of a Dask worker's address: whether there is one is all that decides."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a decision needs.

    Attributes:
        format, version: what the file is.
        made_by: version of the product that made it.
        policy: by which places are chosen there.
        limits: the operator's, of slots.
        drain_target_s, groups: of the autoscaler.
        demand: requests that are expected, with their shares of all: what the scheduler has learned.
        silent: nodes that have not beaten for a lease.
        state: queues, slots, nodes and tenants. The mix of requests is not there: it is `demand`.
    """

    format: str = FORMAT
    version: int = VERSION
    made_by: str = ""
    policy: str
    limits: Limits
    drain_target_s: float
    groups: tuple[PackGroup, ...] = ()
    demand: tuple[tuple[Resources, float], ...] = ()
    silent: tuple[str, ...] = ()
    state: ClusterState


class _Head(msgspec.Struct, frozen=True):
    """What says whether the rest can be read."""

    format: str = ""
    version: int = 0


def snapshot_of(state: ClusterState, setup: Setup, silent: Iterable[str] = (), made_by: str = "") -> Snapshot:
    """The look as a snapshot, without what decides nothing: addresses, process ids, words of refusals."""
    nodes = tuple(_bare(row) for row in state.nodes)
    return Snapshot(
        made_by=made_by,
        policy=setup.policy.name,
        limits=setup.limits,
        drain_target_s=setup.drain_target_s,
        groups=setup.groups,
        demand=setup.demand.shares,
        silent=tuple(sorted(silent)),
        state=msgspec.structs.replace(state, nodes=nodes, refused=(), mix=NO_MIX),
    )


def _bare(row: NodeRow) -> NodeRow:
    info = msgspec.structs.replace(row.info, pid=0, metrics_url="", machine="")
    return msgspec.structs.replace(row, info=info, address=REACHED if row.address else "")


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The snapshot as JSON."""
    return msgspec.json.encode(snapshot)


def decode_snapshot(raw: bytes, name: str = "the snapshot") -> Snapshot:
    """The snapshot in a file.

    Raises:
        BadRequest: it is none, or one that this version cannot read; says what is wrong with it.
    """
    try:
        head = msgspec.json.decode(raw, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{name} is no snapshot: {error}. Make one with: rocyard snapshot") from None
    if head.format != FORMAT:
        raise BadRequest(f"{name} is no snapshot: its field 'format' is not {FORMAT!r}. Make one with: rocyard snapshot")
    if head.version != VERSION:
        raise BadRequest(
            f"{name} has version {head.version} of the format, this program reads version {VERSION}: "
            f"use the program that made it, or make it anew."
        )
    try:
        found = msgspec.json.decode(raw, type=Snapshot)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{name} is a damaged snapshot: {error}.") from None
    if (wrong := wrong_number(msgspec.json.decode(raw))) is not None:
        raise BadRequest(f"{name} is a damaged snapshot: {wrong}.")
    return found


class Step(msgspec.Struct, frozen=True):
    """One thing that is done: ``open``, ``hold`` (asked for, no room), ``close`` or ``drop``.

    Attributes:
        shape_id, memory_bytes, gpus: of the slot.
        node, devices: where; empty for what is held or dropped.
        count: of slots that are alike.
        reason: of a close: why; a shape's id: that shape wants its memory.
    """

    what: str
    shape_id: str
    memory_bytes: int
    gpus: int
    node: str = ""
    devices: tuple[str, ...] = ()
    count: int = 1
    reason: str = ""


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy makes of a snapshot.

    Attributes:
        steps: what is done, in order.
        allocated_ratio: of all device memory that can be promised, what is promised afterwards.
        largest_bytes: the most memory on one device that a request could still be given.
        largest_gpus: the most devices on one node that could still be given whole.
        stranded_ratio: of all free memory, what the expected request cannot use: it lies on devices or hosts that are too
            small for it, weighted by how often each kind of request is there.
    """

    policy: str
    steps: tuple[Step, ...]
    opened: int
    held: int
    closed: int
    allocated_ratio: float
    largest_bytes: int
    largest_gpus: int
    stranded_ratio: float


def replay(snapshot: Snapshot, policy: Policy) -> Replayed:
    """What planner and placement do with the snapshot under a policy; the same each time."""
    state = snapshot.state
    setup = Setup(
        limits=snapshot.limits,
        policy=policy,
        demand=Demand(snapshot.demand),
        groups=snapshot.groups,
        drain_target_s=snapshot.drain_target_s,
    )
    ahead = ahead_of(state, index_of(state), setup)
    scratch = ahead.index.copy()
    chosen = plan(state, ahead.base, ahead.held, setup.limits)
    steps = _steps(state, chosen, ahead.held, ahead.coming, scratch, setup)
    for close in chosen.close:
        scratch.free(close.slot_id)
    return Replayed(
        policy=policy.name,
        steps=steps,
        opened=sum(step.count for step in steps if step.what == "open"),
        held=sum(step.count for step in steps if step.what == "hold"),
        closed=len(chosen.close),
        allocated_ratio=_allocated(scratch),
        largest_bytes=max((room for room in _rooms(scratch)), default=0),
        largest_gpus=_whole(scratch),
        stranded_ratio=_stranded(state, scratch),
    )


def _steps(
    state: ClusterState,
    chosen: Plan,
    held: frozenset[str],
    coming: Mapping[str, Grant],
    scratch: Index,
    setup: Setup,
) -> tuple[Step, ...]:
    """What is on its way, what is asked for and where that goes, what is ended; `scratch` gets the leases."""
    queues = {queue.shape_id: queue for queue in state.queues}
    slots = {slot.slot_id: slot for slot in state.slots}
    found: dict[tuple[Any, ...], int] = {}

    def add(what: str, shape_id: str, resources: Resources | None, grant: Grant | None, reason: str = "") -> None:
        memory_bytes = resources.memory_bytes if resources is not None else 0
        place = ("", ()) if grant is None else (grant.node, grant.devices)
        if resources is None and grant is not None:
            memory_bytes = grant.memory_bytes
        gpus = resources.gpus if resources is not None else len(place[1])
        key = (what, shape_id, memory_bytes, gpus, *place, reason)
        found[key] = found.get(key, 0) + 1

    for close in chosen.close:
        slot = slots[close.slot_id]
        queue = queues.get(slot.shape_id)
        add("close", slot.shape_id, None if queue is None else queue.resources, scratch.grants.get(close.slot_id), close.reason)
    for slot_id in chosen.drop:
        add("drop", slots[slot_id].shape_id, queues[slots[slot_id].shape_id].resources, None)
    for slot_id, grant in coming.items():
        if slot_id not in chosen.drop:
            add("open", slots[slot_id].shape_id, queues[slots[slot_id].shape_id].resources, grant)
    for slot_id in sorted(held - set(chosen.drop)):
        add("hold", slots[slot_id].shape_id, queues[slots[slot_id].shape_id].resources, None)
    for item in chosen.open:
        resources = queues[item.shape_id].resources
        for number in range(item.count):
            place = find(resources, scratch, setup.policy, setup.demand)
            if place is not None:
                scratch.lease(f"new {item.shape_id}/{number}", place)
            add("open" if place is not None else "hold", item.shape_id, resources, place)
    return tuple(
        Step(what, shape_id, memory_bytes, gpus, node, devices, count, reason)
        for (what, shape_id, memory_bytes, gpus, node, devices, reason), count in found.items()
    )


def _rooms(index: Index) -> list[int]:
    return [
        max(0, pool.free_bytes)
        for view in index.nodes.values()
        if view.placeable
        for pool in view.pools.values()
        if pool.healthy
    ]


def _allocated(index: Index) -> float:
    usable = sum(pool.usable_bytes for view in index.nodes.values() for pool in view.pools.values())
    leased = sum(sum(pool.leases.values()) for view in index.nodes.values() for pool in view.pools.values())
    return round(leased / usable, 4) if usable else 0.0


def _whole(index: Index) -> int:
    return max(
        (
            sum(d.pool.healthy and not d.slots and not d.kept and not d.pool.foreign_bytes for d in view.devices.values())
            for view in index.nodes.values()
            if view.placeable
        ),
        default=0,
    )


def _stranded(state: ClusterState, index: Index) -> float:
    """The mix of requests is that of what waits and what is open, by how many there are."""
    weights: dict[Resources, int] = {}
    for queue in state.queues:
        count = queue.depth + sum(slot.shape_id == queue.shape_id for slot in state.slots)
        weights[queue.resources] = weights.get(queue.resources, 0) + count
    free = sum(_rooms(index))
    total = sum(weights.values())
    if not free or not total:
        return 0.0
    lost = sum(weight * (free - _usable_by(resources, index)) for resources, weight in weights.items())
    return round(lost / (total * free), 4)


def _usable_by(resources: Resources, index: Index) -> int:
    """Free memory that could be part of such a request's place now."""
    table = index.table
    fits = table.fitting(resources, np.arange(len(table.names)), table.matching(resources))
    found = 0
    for row in np.flatnonzero(fits.sum(axis=1) >= resources.gpus).tolist():
        devices = list(table.views[row].devices.values())
        pools = {devices[at].pool.key: devices[at].pool.free_bytes for at in np.flatnonzero(fits[row]).tolist()}
        found += sum(pools.values())
    return found


def replays(snapshot: Snapshot, policies: Sequence[Policy]) -> tuple[Replayed, ...]:
    """The snapshot under each policy."""
    return tuple(replay(snapshot, policy) for policy in policies)
