"""What is free, in columns: one row per node in the order of names, so that ties fall to the first name.

It follows the ledger's changes row by row (`refresh`), and says which rows have changed since a reader looked last
(`changed_since`): a policy scores only those again. It holds no truth of its own; `manager.core.index` does.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from manager.core.selectors import has_architecture, has_labels, has_model
from manager.core.shapes import SHARE_MILLI_MAX, Labels, Resources

if TYPE_CHECKING:
    from manager.core.index import NodeView

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
T = TypeVar("T")

ABSENT: Final = -(2**62)
"""In place of what a device has free where there is none, or a sick one, or one that somebody has for himself."""
UNKNOWN: Final = 2**62
"""CPUs and memory of a host that does not say what it has: there is always enough."""
MEMO_MAX: Final = 16
"""Things that are remembered at once: a few policies, each with what it expects; more than that and all are forgotten."""
WHOLE: Final = SHARE_MILLI_MAX
"""The room of a device that nobody has anything of."""


class DeviceKind(msgspec.Struct, frozen=True):
    """What selectors look at: devices of one kind match alike."""

    architecture: str
    model: str
    labels: Labels

    def matches(self, resources: Resources) -> bool:
        """Whether such a device may be given for `resources`."""
        if not (resources.architectures or resources.device_model or resources.labels):
            return True
        return (
            has_architecture(resources, self.architecture)
            and has_model(resources, self.model)
            and has_labels(resources, self.labels)
        )


class Table:
    """Columns over R nodes with at most D devices each.

    Attributes:
        names, views: of the rows, (R).
        uuids: of the devices, in the order of columns, (R).
        slots: how many slots the node has, (R).
        cpu_milli, host_bytes: free; `ABSENT` where the node takes nothing new, (R).
        cpu_largest_milli: what the largest host has, of those that say what they have.
        memory_bytes, share_milli: free of each device, (R, D); `ABSENT` where the device cannot be given at all.
        room_milli: the smaller of both in thousandths of the device, 0 where it cannot be given, (R, D).
        untouched: 1 where nobody is on the device, (R, D).
        repeated: 1 where the device is whole and so is one like it before it in the row, (R, D).
        kind: number of the device's kind (see `kinds`), -1 where there is none, (R, D).
        total_bytes: what the device's pool could promise empty, 0 where there is none, (R, D).
        shared: whether devices of the node share memory, (R).
        now: a mark of this moment, for `changed_since`.
    """

    def __init__(self, views: Iterable["NodeView"]) -> None:
        nodes = sorted(views, key=lambda view: view.name)
        self.names = [view.name for view in nodes]
        self.views = nodes
        self.uuids = [tuple(view.devices) for view in nodes]
        self.row_of = {name: row for row, name in enumerate(self.names)}
        rows, width = len(nodes), max((len(view.devices) for view in nodes), default=1) or 1
        self.kinds: list[DeviceKind] = []
        self._kind_of: dict[DeviceKind, int] = {}
        self._alike: list[bool] = []
        self._memo: dict[Any, Any] = {}
        self.now = 0
        self._changed_at: Ints = np.zeros(rows, np.int64)
        # Side by side, so that a row is written at one stroke, and rows are read so.
        self._take(np.zeros((rows, 3), np.int64), np.zeros((rows, 5, width), np.int64))
        self._devices[:, :2] = ABSENT
        self.cpu_largest_milli = max((view.cpu_milli for view in nodes if view.cpu_milli < UNKNOWN), default=1)
        self.kind: Ints = np.full((rows, width), -1, np.int64)
        self.total_bytes: Ints = np.zeros((rows, width), np.int64)
        self.shared: Bools = np.zeros(rows, np.bool_)
        for row, view in enumerate(nodes):
            self._write_fixed(row, view)
            self._write(row, view)

    def _take(self, hosts: Ints, devices: Ints) -> None:
        """Columns of these, which change as nodes do."""
        self._hosts, self._devices = hosts, devices
        self.slots: Ints = hosts[:, 0]
        self.cpu_milli: Ints = hosts[:, 1]
        self.host_bytes: Ints = hosts[:, 2]
        self.memory_bytes: Ints = devices[:, 0]
        self.share_milli: Ints = devices[:, 1]
        self.room_milli: Ints = devices[:, 2]
        self.untouched: Ints = devices[:, 3]
        self.repeated: Ints = devices[:, 4]

    def _write_fixed(self, row: int, view: "NodeView") -> None:
        """What does not change while a node is registered."""
        for at, device in enumerate(view.devices.values()):
            number = self._kind_of.get(device.kind)
            if number is None:
                number = self._kind_of[device.kind] = len(self.kinds)
                self.kinds.append(device.kind)
            self.kind[row, at] = number
            self.total_bytes[row, at] = device.pool.usable_bytes
        self.shared[row] = len(view.pools) < len(view.devices)
        alike = {(device.kind, device.pool.usable_bytes) for device in view.devices.values()}
        self._alike.append(len(alike) == 1 and len(view.pools) == len(view.devices))

    def _write(self, row: int, view: "NodeView") -> None:
        if view.placeable:
            self._hosts[row] = (len(view.slots), view.cpu_free_milli, view.host_free_bytes)
        else:
            self._hosts[row] = (len(view.slots), ABSENT, ABSENT)
        memory, share, room, untouched, repeated = [], [], [], [], []
        is_again = False
        for device in view.devices.values():
            pool = device.pool
            free, milli, least = pool.free_bytes, device.free_milli, 0
            if pool.sick or device.alone:
                free = milli = ABSENT
            elif free > 0 and milli > 0:
                least = free * WHOLE // (pool.total_bytes - pool.reserve_bytes)
                least = min(least, milli)
            memory.append(free)
            share.append(milli)
            room.append(least)
            is_untouched = not device.slots and not device.kept
            is_whole = is_untouched and least == WHOLE
            untouched.append(is_untouched)
            repeated.append(is_whole and is_again)
            is_again = is_again or (is_whole and self._alike[row])
        self._devices[row, :, : len(room)] = (memory, share, room, untouched, repeated)

    def refresh(self, views: Iterable["NodeView"]) -> None:
        """These nodes have changed."""
        self.now += 1
        for view in views:
            row = self.row_of[view.name]
            self.views[row] = view  # its ledger may have had to copy it
            self._write(row, view)
            self._changed_at[row] = self.now

    def copy(self) -> "Table":
        """The same, to follow the copy of its ledger. What does not change while nodes stay the same is shared."""
        twin = object.__new__(Table)
        twin.__dict__.update(self.__dict__)
        twin.views = self.views.copy()
        twin._memo = {}
        twin._changed_at = self._changed_at.copy()
        twin._take(self._hosts.copy(), self._devices.copy())
        return twin

    def recall(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gave for `key` before, or gives now: it changes no answer, only how fast it comes."""
        found: T | None = self._memo.get(key)
        if found is None:
            if len(self._memo) >= MEMO_MAX:
                self._memo.clear()
            found = self._memo[key] = make()
        return found

    def changed_since(self, mark: int) -> Ints:
        """Rows that have changed since `now` was `mark`, in order."""
        return (self._changed_at > mark).nonzero()[0]

    def matching(self, resources: Resources) -> Bools | None:
        """By number of kind, whether such devices may be given for `resources`; None where all may."""
        if not (resources.architectures or resources.device_model or resources.labels):
            return None
        return np.array([*(kind.matches(resources) for kind in self.kinds), False], np.bool_)  # the last: no device, -1

    def fitting(self, resources: Resources, rows: Ints, matching: Bools | None) -> Bools:
        """Which devices of `rows` could each take one part of `resources` now, (len(rows), D); of hosts see `hosts`.

        Whether a row has as many of them as are asked for is the caller's to see; and that devices which share memory have
        enough of it for all that are taken. Where one device is asked for, of several that are whole and alike the first is.
        """
        devices = self._devices[rows]
        fits: Bools = devices[:, 0] >= resources.memory_bytes
        if resources.share_milli:  # else none is counted, and what is free may be below 0
            fits &= devices[:, 1] >= resources.share_milli
        if matching is not None:
            fits &= matching[self.kind[rows]]
        if resources.exclusive:
            fits &= devices[:, 3] > 0
        if resources.gpus == 1:
            fits &= devices[:, 4] == 0
        return fits

    def hosts(self, resources: Resources, rows: Ints) -> Ints:
        """Those of `rows` that take anything new and have the CPUs and memory."""
        enough: Bools = self.cpu_milli[rows] >= (resources.cpu_milli or ABSENT + 1)
        if resources.host_memory_bytes:
            enough &= self.host_bytes[rows] >= resources.host_memory_bytes
        return rows[enough]

    def is_equal(self, other: "Table") -> bool:
        """Whether both say the same of every node."""
        if self.names != other.names or self.kind.shape != other.kind.shape:
            return False
        mine, theirs = self.kind_names(), other.kind_names()
        columns = ("_hosts", "_devices", "total_bytes", "shared")
        return mine == theirs and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)

    def kind_names(self) -> list[list[DeviceKind | None]]:
        """The kind of each device, (R, D); None where there is none."""
        return [[self.kinds[kind] if kind >= 0 else None for kind in row] for row in self.kind.tolist()]
