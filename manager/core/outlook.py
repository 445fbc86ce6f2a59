"""What free room is worth: how much of it the requests that are expected could use. Pure.

The room of a device is the smaller of its free memory and its free share, in thousandths. A class of requests can *use* it
where the node has the CPUs for one, the device matches and the room holds it; one that asks for several whole devices, where
the node has as many of them. `Outlook` has the answers for every amount of room and of CPUs ready in tables, so that the worth
of a node is a few look-ups. `DemandCounter` learns which requests come.
"""

from typing import Final

import msgspec
import numpy as np

from manager.core.mix import NO_MIX, Mix, mix_of
from manager.core.placement import NO_DEMAND, Demand, Floats
from manager.core.shapes import Resources
from manager.core.table import WHOLE, Ints, Table

CLASSES_MAX: Final = 256
"""Classes of requests that are looked at, the most frequent first: the rest weigh next to nothing."""
CPU_LEVELS_MAX: Final = 64
"""Amounts of CPUs that are told apart; what a class asks for counts as the next of these above it."""
COUNTED_MAX: Final = 20_000
"""Requests that are counted before all counts are halved: what has not come for long is forgotten."""
CHANGE_MIN: Final = 0.1
"""How much of the mix must have changed to be news, since news costs all scores that are remembered."""
_FIRST_LOOK: Final = 8
_EXACT: Final = WHOLE + 1


class DemandCounter:
    """Counts requests as they come, and says what the mix is.

    `demand` stays the same object until `CHANGE_MIN` of the mix has changed, because what is remembered of scores holds for
    one `Demand`. The counts are looked at whenever they have grown by half. `told` is the same as others are told it.
    """

    __slots__ = ("_counts", "_next_look", "_total", "demand", "told")

    def __init__(self) -> None:
        self.demand: Demand = NO_DEMAND
        self.told: Mix = NO_MIX
        self._counts: dict[Resources, int] = {}
        self._total = 0
        self._next_look = _FIRST_LOOK

    def note(self, resources: Resources) -> None:
        """Such a request has come."""
        self._counts[resources] = self._counts.get(resources, 0) + 1
        self._total += 1
        if self._total >= self._next_look:
            self._look()

    def resume(self, mix: Mix) -> None:
        """Go on from what was learned before this counter began, unless it has learned something itself by now."""
        if self.told.revision or not mix.revision:
            return
        for resources, share in mix.shares:
            self._counts[resources] = self._counts.get(resources, 0) + round(share * mix.counted)
        self._total = sum(self._counts.values())
        self.demand, self.told = Demand(mix.shares), mix
        self._next_look = self._total + max(_FIRST_LOOK, self._total // 2)

    def _look(self) -> None:
        shares = {resources: count / self._total for resources, count in self._counts.items()}
        told = dict(self.demand.shares)
        # Half of the sum of differences: the part of the requests that would have to be others.
        changed = sum(abs(share - told.get(resources, 0.0)) for resources, share in shares.items())
        changed += sum(share for resources, share in told.items() if resources not in shares)
        if changed / 2 >= CHANGE_MIN:
            self.demand = Demand(shares.items())
            self.told = mix_of(shares.items(), self._total)
        if self._total >= COUNTED_MAX:
            self._counts = {resources: count // 2 for resources, count in self._counts.items() if count > 1}
            self._total = sum(self._counts.values())
        self._next_look = self._total + max(_FIRST_LOOK, self._total // 2)


class Outlook:
    """The worth of room on the nodes of one table, for one mix of requests.

    Attributes:
        levels: amounts of CPUs that are told apart, ascending; a level is how many of them a node has enough for, (L).
        worth: in devices, of room of one device: by group of devices, level and room; flat.
        whole: in devices, of so many whole devices to those who ask for several: by group, level and number; flat.
        cpu_per_device: what the requests ask for beside each device, on average, in thousandths of a CPU.
    """

    __slots__ = ("_group_at", "_whole_at", "cpu_per_device", "levels", "whole", "worth")

    def __init__(self, demand: Demand, table: Table, *, scarcity: float, covered: float) -> None:
        classes = _frequent(demand, covered)
        self.levels = _levels([resources.cpu_milli for resources, _ in classes])
        rows, width = table.kind.shape
        # Devices that match the same classes and are of one size are of equal use.
        matches = np.zeros((len(table.kinds) + 1, len(classes)), np.bool_)  # the last row: where there is no device
        for number, kind in enumerate(table.kinds):
            matches[number] = [kind.matches(resources) for resources, _ in classes]
        patterns, pattern = np.unique(matches, axis=0, return_inverse=True)
        sizes, size = np.unique(table.total_bytes, return_inverse=True)
        keys = pattern.reshape(-1)[table.kind] * len(sizes) + size.reshape(rows, width)
        found, group = np.unique(keys, return_inverse=True)
        group = group.reshape(rows, width)
        present = table.total_bytes > 0
        devices = np.bincount(group[present], minlength=len(found))
        steps = len(self.levels) + 1
        worth = np.zeros((len(found), steps, _EXACT))
        whole = np.zeros((len(found), steps, width + 1))
        cpus = wanted = 0.0
        for at, (resources, weight) in enumerate(classes):
            level = int(np.searchsorted(self.levels, resources.cpu_milli)) + 1
            able = [
                (number, need)
                for number, key in enumerate(found.tolist())
                if patterns[key // len(sizes), at] and 0 < (need := room_of(resources, int(sizes[key % len(sizes)]))) <= WHOLE
            ]
            matching = sum(int(devices[number]) for number, _ in able)
            if not matching:
                continue
            cpus += weight * resources.cpu_milli
            wanted += weight * resources.gpus * sum(need * int(devices[number]) for number, need in able) / matching / WHOLE
            rare = weight * (int(devices.sum()) / matching) ** scarcity
            for number, need in able:
                if resources.gpus > 1 and need == WHOLE:
                    if resources.gpus <= width:
                        whole[number, level, resources.gpus] += rare
                else:
                    worth[number, level, need] += rare
        # Who needs less than there is can use it: so sums over CPUs and over room.
        worth = worth.cumsum(axis=1).cumsum(axis=2) * (np.arange(_EXACT) / WHOLE)
        whole = whole.cumsum(axis=1).cumsum(axis=2) * np.arange(width + 1)
        self.cpu_per_device = cpus / wanted if wanted else 0.0
        self.worth: Floats = worth.reshape(-1)
        self.whole: Floats = whole.reshape(-1)
        self._group_at: Ints = group * (steps * _EXACT)
        self._whole_at: Ints = group[:, 0] * (steps * (width + 1))

    def value(self, row: Ints, room_milli: Ints, cpu_milli: Ints, stranded: float = 0.0) -> Floats:
        """What nodes are worth, in devices.

        Args:
            row: of the table, (N).
            room_milli: of each of their devices, (N, D).
            cpu_milli: free, (N).
            stranded: what is taken off for room for which there would be no CPUs if all of it were used, of each device.
        """
        level = self.levels.searchsorted(cpu_milli, "right")
        at = self._group_at.take(row, axis=0)
        at += room_milli
        at += (level * _EXACT)[:, None]
        value: Floats = np.add.reduce(self.worth.take(at), axis=1)
        width = room_milli.shape[1]
        whole = np.add.reduce(room_milli == WHOLE, axis=1)
        value += self.whole.take(self._whole_at.take(row) + level * (width + 1) + whole)
        if stranded and self.cpu_per_device:
            short: Floats = np.add.reduce(room_milli, axis=1) * (stranded / WHOLE)
            short -= cpu_milli * (stranded / self.cpu_per_device)
            value -= np.maximum(short, 0.0, out=short)
        return value


def room_of(resources: Resources, total_bytes: int) -> int:
    """The room that a request takes of a device of that size, in thousandths; more than `WHOLE` where it never fits."""
    if resources.exclusive:
        return WHOLE if resources.memory_bytes <= total_bytes else WHOLE + 1
    by_memory = -(-resources.memory_bytes * WHOLE // total_bytes) if total_bytes else WHOLE + 1
    return max(1, resources.share_milli, by_memory)


def outlook_of(demand: Demand, table: Table, *, scarcity: float = 0.0, covered: float = 1.0) -> Outlook:
    """The outlook, worked out once for each table and demand.

    Args:
        demand: what is expected.
        table: where.
        scarcity: a class weighs as many times more as its devices are rarer than all devices, to this power.
        covered: the most frequent classes are looked at until they are so much of all requests.
    """
    return table.recall((demand, scarcity, covered), lambda: Outlook(demand, table, scarcity=scarcity, covered=covered))


def _frequent(demand: Demand, covered: float) -> list[tuple[Resources, float]]:
    """The most frequent classes that ask for devices, with their part of all requests."""
    total = sum(weight for _, weight in demand.shares)
    merged: dict[Resources, float] = {}
    for resources, weight in demand.shares:
        key = msgspec.structs.replace(resources, host_memory_bytes=0, model="")  # which no room tells apart
        merged[key] = merged.get(key, 0.0) + weight
    found: list[tuple[Resources, float]] = []
    seen = 0.0
    for resources, weight in sorted(merged.items(), key=lambda share: -share[1])[:CLASSES_MAX]:
        if seen >= covered * total:
            break
        seen += weight
        if resources.gpus:
            found.append((resources, weight / total))
    return found


def _levels(amounts: list[int]) -> Ints:
    """The amounts that are told apart, ascending: all, or so many of them as may be; the largest is always one."""
    distinct = np.unique(np.array(amounts, np.int64))
    if len(distinct) <= CPU_LEVELS_MAX:
        return distinct
    return distinct[np.linspace(0, len(distinct) - 1, CPU_LEVELS_MAX).round().astype(np.int64)]
