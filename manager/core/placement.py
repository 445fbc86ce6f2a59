"""Which devices a slot gets. Pure: the same index, request, demand and policy give the same answer.

`place` never raises: "cannot" is an answer, with a verdict for every node. Of all that fits, a policy says what is best; what a
policy said of a node is remembered until that node changes, so that a request looks only at what is new to its kind of request.
What is free is `manager.core.index`'s; the policies are `manager.core.policies`'.
"""

import enum
from collections.abc import Iterable
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from manager.core.index import DeviceView, Index, NodeView, Pool
from manager.core.selectors import has_labels, has_model
from manager.core.shapes import Grant, Resources, grant_of
from manager.core.table import Bools, Ints, Table

Floats = NDArray[np.float64]

CLASSES_MAX: Final = 4096
"""Kinds of request that a policy's scores are remembered for; more than that and all are forgotten."""
FEW_ROWS: Final = 2
"""So many nodes are looked at one by one before any arithmetic over columns: one that was just filled mostly takes no more."""


class Reason(enum.StrEnum):
    """Why a node cannot take a request now."""

    INSUFFICIENT_MEMORY = "InsufficientMemory"  # leased to other slots
    FOREIGN_MEMORY = "ForeignMemory"  # would fit but for memory used by processes that are not ours
    RESERVED_FOR_LARGER = "ReservedForLarger"  # would fit but for room that is kept for what has waited longer
    INSUFFICIENT_SHARE = "InsufficientShare"  # the compute of its devices is promised to others
    DEVICE_IN_USE = "DeviceInUse"  # one of the two wants the device for itself
    INSUFFICIENT_CPU = "InsufficientCpu"
    INSUFFICIENT_HOST_MEMORY = "InsufficientHostMemory"
    TOO_MANY_SLOTS = "TooManySlots"  # memory would do, but the node has all the slots that it may have
    NO_WORKER = "NoWorker"  # the agent lives, its Dask worker does not (yet)
    NODE_LOST = "NodeLost"
    CORDONED = "Cordoned"
    UNHEALTHY_DEVICE = "UnhealthyDevice"
    EXCEEDS_LARGEST_DEVICE = "ExceedsLargestDevice"  # would not fit on the empty node
    EXCEEDS_HOST = "ExceedsHost"  # more CPUs or memory than the host has
    TOO_FEW_DEVICES = "TooFewDevices"
    NO_MATCHING_ARCHITECTURE = "NoMatchingArchitecture"
    NO_MATCHING_DEVICE = "NoMatchingDevice"  # of the model that was asked for
    NO_MATCHING_LABELS = "NoMatchingLabels"


NEVER: Final = frozenset(
    {
        Reason.EXCEEDS_LARGEST_DEVICE,
        Reason.EXCEEDS_HOST,
        Reason.TOO_FEW_DEVICES,
        Reason.NO_MATCHING_ARCHITECTURE,
        Reason.NO_MATCHING_DEVICE,
        Reason.NO_MATCHING_LABELS,
    }
)
"""What no waiting changes: the node could not take it empty either."""


class Verdict(msgspec.Struct, frozen=True):
    """What one node says to one request. `short_bytes` is what is missing per device, 0 where memory is not the matter."""

    node: str
    reason: Reason
    short_bytes: int = 0


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """It fits there."""

    grant: Grant


class Unplaced(msgspec.Struct, frozen=True, tag="unplaced"):
    """It fits nowhere now; one verdict for each node, by name."""

    verdicts: tuple[Verdict, ...]


class Demand:
    """The known mix of requests with how often each comes, for policies that look ahead. Equal only to itself."""

    __slots__ = ("shares",)

    def __init__(self, shares: Iterable[tuple[Resources, float]] = ()) -> None:
        self.shares = tuple(shares)


NO_DEMAND: Final = Demand()


class Options(msgspec.Struct, frozen=True):
    """Where a request fits: N alternatives, each a row of the table and devices of it.

    Attributes:
        resources: what is asked for.
        table: what is free, before.
        row: of each alternative, ascending, (N).
        devices: columns of the devices that it would take, (N, gpus).
    """

    resources: Resources
    table: Table
    row: Ints
    devices: Ints


class Policy(Protocol):
    """What is best of all that fits. Its answer may depend on nothing but its arguments."""

    @property
    def name(self) -> str:
        """As settings call it."""

    def scores(self, options: Options, demand: Demand) -> Floats:
        """The score of each alternative, (N). The lowest is taken, of equal ones the first. Each must be a number.

        An alternative's score may depend on its own node only: it is remembered until that node changes.
        """


def place(resources: Resources, index: Index, policy: Policy, demand: Demand = NO_DEMAND) -> Placed | Unplaced:
    """The best place, or why there is none.

    Args:
        resources: what is asked for.
        index: the ledger; not changed.
        policy: says which of all that fit is best.
        demand: what is expected to be asked for, for policies that look ahead.
    """
    grant = find(resources, index, policy, demand)
    if grant is not None:
        return Placed(grant)
    return Unplaced(tuple(verdict(resources, view) for _, view in sorted(index.nodes.items())))


def find(
    resources: Resources, index: Index, policy: Policy, demand: Demand = NO_DEMAND, only: Ints | None = None
) -> Grant | None:
    """`place` without the verdicts. None: no room. `only`: rows of the index's table to which it may go; None: all."""
    table = index.table
    if not table.names or (only is not None and not len(only)):
        return None
    # Demand is in the key by identity, and held by the entry, so that no later one can be taken for it.
    known: dict[Resources, _Scored] = table.recall((policy.name, demand), dict)
    scored = known.get(resources)
    if scored is None:
        if len(known) >= CLASSES_MAX:
            known.clear()
        scored = known[resources] = _Scored(resources, table)
    scored.update(table, policy, demand)
    row = int(scored.best.argmin()) if only is None else int(only[scored.best[only].argmin()])
    if scored.best[row] == np.inf:
        return None
    uuids = table.uuids[row]
    return grant_of(resources, table.names[row], tuple([uuids[at] for at in scored.devices[row].tolist()]))


class _Scored:
    """What a policy said of each row for one kind of request: its best alternative there."""

    __slots__ = ("best", "devices", "mark", "matching", "resources")

    def __init__(self, resources: Resources, table: Table) -> None:
        self.resources = resources
        self.matching = table.matching(resources)
        self.best: Floats = np.full(len(table.names), np.inf)
        self.devices: Ints = np.zeros((len(table.names), resources.gpus), np.int64)
        self.mark = -1

    def update(self, table: Table, policy: Policy, demand: Demand) -> None:
        """Score the rows again that have changed."""
        if self.mark == table.now:
            return
        rows = table.changed_since(self.mark)
        self.mark = table.now
        self.best[rows] = np.inf
        if len(rows) <= FEW_ROWS:
            rows = np.array([row for row in rows.tolist() if _could_take(self.resources, table.views[row])], np.int64)
            if not len(rows):
                return
        options = options_of(self.resources, table, rows, self.matching)
        row = options.row
        if not len(row):
            return
        scores = policy.scores(options, demand)
        # From the worst to the best, of equal ones the last first: so the row keeps the first of its best.
        order = scores.argsort(kind="stable")[::-1]
        self.best[row[order]] = scores[order]
        self.devices[row[order]] = options.devices[order]


def options_of(resources: Resources, table: Table, rows: Ints, matching: Bools | None) -> Options:
    """All alternatives on `rows`: each device where one is asked for, else the tightest that there are on each node."""
    gpus = resources.gpus
    rows = table.hosts(resources, rows)
    if gpus == 0 or not len(rows):
        return Options(resources, table, rows, np.zeros((len(rows), gpus), np.int64))
    fits = table.fitting(resources, rows, matching)
    if gpus == 1:
        at, device = fits.nonzero()
        return Options(resources, table, rows[at], device[:, None])
    enough = np.flatnonzero(fits.sum(axis=1) >= gpus)
    rows, fits = rows[enough], fits[enough]
    memory = np.where(fits, table.memory_bytes[rows], np.iinfo(np.int64).max)
    chosen = np.lexsort((table.share_milli[rows], memory), axis=1)[:, :gpus]
    shared = np.flatnonzero(table.shared[rows])
    if len(shared):
        able = np.ones(len(rows), np.bool_)
        for place_at in shared.tolist():
            row = int(rows[place_at])
            uuids = devices_for(resources, table.views[row])
            able[place_at] = uuids is not None
            if uuids is not None:
                columns = {uuid: column for column, uuid in enumerate(table.uuids[row])}
                chosen[place_at] = [columns[uuid] for uuid in uuids]
        rows, chosen = rows[able], chosen[able]
    return Options(resources, table, rows, chosen)


def devices_for(resources: Resources, view: NodeView) -> tuple[str, ...] | None:
    """The tightest devices of one node that would do now; None where they would not."""
    if not view.placeable or not _has_cpus(resources, view) or not _has_host_memory(resources, view):
        return None
    fitting = [device for device in view.devices.values() if _fits(resources, device)]
    fitting.sort(key=lambda device: (device.pool.free_bytes, device.free_milli))
    chosen: list[str] = []
    taken: dict[str, int] = {}
    for device in fitting:
        pool, promised = device.pool, taken.get(device.pool.key, 0)
        if len(chosen) < resources.gpus and pool.free_bytes - promised >= resources.memory_bytes:
            chosen.append(device.uuid)
            taken[pool.key] = promised + resources.memory_bytes
    return tuple(chosen) if len(chosen) == resources.gpus else None


def _could_take(resources: Resources, view: NodeView) -> bool:
    """False where the node takes nothing of the kind now; devices that share memory are counted as if they did not."""
    if not view.placeable or not _has_cpus(resources, view):
        return False
    memory_bytes, gpus = resources.memory_bytes, resources.gpus
    for device in view.devices.values():
        if device.pool.free_bytes >= memory_bytes and gpus:
            gpus -= _fits(resources, device)
    return gpus == 0


# Of what is not asked for none is counted, however much less than nothing of it is free: room may be kept that is not free yet.


def _has_share(resources: Resources, device: DeviceView) -> bool:
    return not resources.share_milli or device.free_milli >= resources.share_milli


def _has_cpus(resources: Resources, view: NodeView) -> bool:
    return not resources.cpu_milli or view.cpu_free_milli >= resources.cpu_milli


def _has_host_memory(resources: Resources, view: NodeView) -> bool:
    return not resources.host_memory_bytes or view.host_free_bytes >= resources.host_memory_bytes


def _fits(resources: Resources, device: DeviceView) -> bool:
    return (
        device.pool.healthy
        and not device.alone
        and device.pool.free_bytes >= resources.memory_bytes
        and _has_share(resources, device)
        and device.kind.matches(resources)
        and not (resources.exclusive and (device.slots or device.kept))
    )


def copies_of(resources: Resources, grant: Grant, index: Index) -> int:
    """How many grants like this one fit on these very devices, one after the other."""
    view = index.nodes[grant.node]
    if grant.exclusive or not grant.devices:
        return 1
    devices = [view.devices[uuid] for uuid in grant.devices]
    in_pool = {device.pool.key: 0 for device in devices}
    for device in devices:
        in_pool[device.pool.key] += 1
    rooms = [device.pool.free_bytes // max(1, in_pool[device.pool.key] * resources.memory_bytes) for device in devices]
    if resources.share_milli:
        rooms += [device.free_milli // resources.share_milli for device in devices]
    if resources.cpu_milli:
        rooms.append(view.cpu_free_milli // resources.cpu_milli)
    if resources.host_memory_bytes:
        rooms.append(view.host_free_bytes // resources.host_memory_bytes)
    return max(1, min(rooms))


def several_of(grant: Grant, count: int) -> Grant:
    """So many grants like this one, as if they were one."""
    return msgspec.structs.replace(
        grant,
        memory_bytes=grant.memory_bytes * count,
        share_milli=grant.share_milli * count,
        cpu_milli=grant.cpu_milli * count,
        host_memory_bytes=grant.host_memory_bytes * count,
    )


def verdict(resources: Resources, view: NodeView) -> Verdict:
    """Why the node cannot take the request now; asked only where it cannot."""

    def says(reason: Reason, short_bytes: int = 0) -> Verdict:
        return Verdict(view.name, reason, short_bytes)

    gpus = resources.gpus
    if view.lost:
        return says(Reason.NODE_LOST)
    if len(view.devices) < gpus:
        return says(Reason.TOO_FEW_DEVICES)
    devices = [device for device in view.devices.values() if device.kind.matches(resources)]
    if len(devices) < gpus:
        return says(_mismatch(resources, view))
    if (missing := _short(resources, devices, _usable)) > 0:
        return says(Reason.EXCEEDS_LARGEST_DEVICE, missing)
    if view.cpu_milli < resources.cpu_milli or view.host_memory_bytes < resources.host_memory_bytes:
        return says(Reason.EXCEEDS_HOST)
    if view.cordoned:
        return says(Reason.CORDONED)
    if not view.reachable:
        return says(Reason.NO_WORKER)
    devices = [device for device in devices if device.pool.healthy]
    if len(devices) < gpus or _short(resources, devices, _usable) > 0:
        return says(Reason.UNHEALTHY_DEVICE)
    free = [device for device in devices if not device.alone and not (resources.exclusive and (device.slots or device.kept))]
    if len(free) < gpus:
        return says(Reason.DEVICE_IN_USE)
    share = [device for device in free if _has_share(resources, device)]
    if len(share) < gpus:
        return says(Reason.INSUFFICIENT_SHARE)
    if (missing := _short(resources, share, _free)) > 0:
        if _short(resources, share, lambda pool: pool.free_bytes + pool.foreign_bytes) <= 0:
            return says(Reason.FOREIGN_MEMORY, missing)
        if _short(resources, share, lambda pool: pool.free_bytes + sum(pool.kept.values())) <= 0:
            return says(Reason.RESERVED_FOR_LARGER, missing)
        return says(Reason.INSUFFICIENT_MEMORY, missing)
    if not _has_cpus(resources, view):
        return says(Reason.INSUFFICIENT_CPU)
    if not _has_host_memory(resources, view):
        return says(Reason.INSUFFICIENT_HOST_MEMORY)
    return says(Reason.TOO_MANY_SLOTS)


def _mismatch(resources: Resources, view: NodeView) -> Reason:
    """Which selector leaves too few devices of the node."""
    if not has_labels(resources, view.labels):
        return Reason.NO_MATCHING_LABELS
    if sum(has_model(resources, device.kind.model) for device in view.devices.values()) < resources.gpus:
        return Reason.NO_MATCHING_DEVICE
    return Reason.NO_MATCHING_ARCHITECTURE


def _usable(pool: Pool) -> int:
    return pool.usable_bytes


def _free(pool: Pool) -> int:
    return pool.free_bytes


class _Room(Protocol):
    def __call__(self, pool: Pool) -> int: ...


def _short(resources: Resources, devices: Iterable[DeviceView], room: _Room) -> int:
    """What the last device needed would still lack, of memory; negative or 0 where nothing is missing."""
    memory_bytes = resources.memory_bytes
    if resources.gpus == 1:
        return memory_bytes - max(room(device.pool) for device in devices)
    wanted: dict[str, int] = {}
    shorts = []
    for device in devices:
        key = device.pool.key
        wanted[key] = wanted.get(key, 0) + memory_bytes  # each further one of a pool finds so much less
        shorts.append(wanted[key] - room(device.pool))
    return sorted(shorts)[resources.gpus - 1] if resources.gpus else 0
