"""The policies that come with the product: which of all places that fit is best. Pure, in columns.

What a policy must be is `manager.core.placement.Policy`; one of somebody else's comes by an entry point (`manager.policies`).
"""

from typing import Final

import numpy as np

from manager.core.outlook import Outlook, outlook_of
from manager.core.placement import Demand, Floats, Options, Policy
from manager.core.table import WHOLE, Ints

POINTS_MAX: Final = 100
"""Of the paper's score, which is a whole number from 0 to this."""
TYPICAL: Final = 0.95
"""The paper looks at the most frequent classes that together are so much of the requests."""
STEP: Final = 0.06
"""Differences in worth that are too small to prefer a node for, in devices: within it the first node is taken, so that the
last ones stay empty for what needs all of one."""
SCARCITY: Final = 0.3
"""How much more the wish for a rare kind of device weighs: how many times as rare it is, to this power."""
STRANDED: Final = 1.5
"""What a device's worth of room costs that has no CPUs, in devices."""
WARM: Final = 1.0
"""What it is worth that a node has the model loaded already, in devices."""


class FirstFit:
    """The first node that fits, in the order of names."""

    name: Final = "first_fit"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """All are equally good."""
        return np.zeros(len(options.row))


class BestFit:
    """Where the least remains: of the memory of the devices that it takes, or for a request that asks for none, of the room of
    all the node's devices; and of the node's CPUs, if it asks for any.
    """

    name: Final = "best_fit"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """What remains, each against the largest that there is."""
        resources, table, row = options.resources, options.table, options.row
        at = row[:, None], options.devices
        if resources.memory_bytes and resources.gpus:
            remains: Floats = table.memory_bytes[at].sum(axis=1) / int(table.total_bytes.max())
        else:
            remains = table.room_milli[row].sum(axis=1) / (WHOLE * table.room_milli.shape[1])
            remains += table.room_milli[at].sum(axis=1) / 2**40  # devices of one node are told apart by their room
        if resources.cpu_milli:
            remains += np.minimum(1.0, table.cpu_milli[row] / table.cpu_largest_milli)
        return remains


class RoundRobin:
    """The node with the fewest slots; on it, the devices with the most room."""

    name: Final = "round_robin"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """Slots, and a part of one for what is not free of the devices."""
        score: Floats = options.table.slots[options.row] + _taken(options) / 2
        return score


class LeastLoaded:
    """The node whose devices have the most room, all together and as a share of them; on it, the devices with the most."""

    name: Final = "least_loaded"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """The part of the node that is taken."""
        table, row = options.table, options.row
        devices = np.count_nonzero(table.total_bytes[row], axis=1)
        taken = 1 - table.room_milli[row].sum(axis=1) / (WHOLE * np.maximum(1, devices))
        # A step of the node's load is a thousandth of one device, so this can only tell its devices apart.
        score: Floats = taken + _taken(options) / (4 * WHOLE * table.room_milli.shape[1])
        return score


class Spread:
    """The devices with the most room, wherever they are."""

    name: Final = "spread"

    def scores(self, options: Options, demand: Demand) -> Floats:  # noqa: ARG002
        """The part of the devices that is taken."""
        return _taken(options)


class Fgd:
    """Fragmentation gradient descent, as published: least room is made useless to the requests that are expected.

    Weng et al., "Beware of Fragmentation" (USENIX ATC'23).
    """

    name: Final = "fgd"

    def scores(self, options: Options, demand: Demand) -> Floats:
        """Minus the points of the paper: in whole numbers, so that nodes that are nearly as good count as equal."""
        outlook = outlook_of(demand, options.table, covered=TYPICAL)
        lost, was = _lost(options, outlook)
        taken = (was - _left(options, was)).sum(axis=1) / WHOLE
        points: Floats = np.floor(POINTS_MAX / (1 + np.exp(lost - taken)))
        return -points


class Fragmentation:
    """Least is lost for the requests that are expected, device by device and of CPUs for all of them; warm nodes first.

    To what a node is worth (`Outlook`, in which the wish for rare devices weighs more) comes what of its room is stranded:
    more than its CPUs would do for. A node that has the requested model is worth `WARM` more.
    """

    name: Final = "fragmentation"

    def scores(self, options: Options, demand: Demand) -> Floats:
        """Devices lost, in steps of `STEP`."""
        resources, table, row = options.resources, options.table, options.row
        lost, _ = _lost(options, outlook_of(demand, table, scarcity=SCARCITY), STRANDED)
        if resources.model:
            warm = {node: resources.model in table.views[node].models for node in set(row.tolist())}
            lost -= WARM * np.array([warm[node] for node in row.tolist()], np.float64)
        steps: Floats = np.floor(lost / STEP)
        return steps


def _lost(options: Options, outlook: Outlook, stranded: float = 0.0) -> tuple[Floats, Ints]:
    """What each alternative's node is worth less after it, in devices; and the room of its devices before."""
    resources, table, row = options.resources, options.table, options.row
    count = len(row)
    both = np.concatenate((row, row))  # before and after it
    room, cpu = table.room_milli[both], table.cpu_milli[both]
    cpu[count:] -= resources.cpu_milli
    at = np.arange(count)[:, None], options.devices
    after = room[count:]
    was = after[at]
    after[at] = _left(options, was)
    value = outlook.value(both, room, cpu, stranded)
    return value[:count] - value[count:], was


def _taken(options: Options) -> Floats:
    """The part of the devices that is not free, before it."""
    if not options.resources.gpus:
        return np.zeros(len(options.row))
    taken: Floats = 1 - options.table.room_milli[options.row[:, None], options.devices].mean(axis=1) / WHOLE
    return taken


def _left(options: Options, was: Ints) -> Ints:
    """The room of the devices of each alternative after it, in thousandths, where it was so much before, (N, gpus)."""
    resources, table = options.resources, options.table
    if resources.exclusive:
        return np.zeros(was.shape, np.int64)
    at = options.row[:, None], options.devices
    left = was  # of what is not asked for as much is free as before, and that is no less than the room was
    if resources.share_milli:
        left = np.minimum(left, table.share_milli[at] - resources.share_milli)
    if resources.memory_bytes:
        left = np.minimum(left, (table.memory_bytes[at] - resources.memory_bytes) * WHOLE // table.total_bytes[at])
    return left


BEST_FIT: Final[Policy] = BestFit()
DEFAULT_POLICY: Final[Policy] = Fragmentation()
"""What decides where nothing else was set."""
POLICIES: Final[dict[str, Policy]] = {
    policy.name: policy for policy in (RoundRobin(), LeastLoaded(), FirstFit(), BEST_FIT, Spread(), Fgd(), DEFAULT_POLICY)
}
