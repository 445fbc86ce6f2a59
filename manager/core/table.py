"""What is free, in columns: one row per node in the order of names, so that ties fall to the first name.

It follows the ledger's changes row by row (`refresh`), and says which rows have changed since a reader looked last
(`changed_since`): a policy scores only those again. It holds no truth of its own; `manager.core.index` does.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from manager.core.selectors import has_architecture, has_labels, has_model
from manager.core.shapes import Labels, Resources

if TYPE_CHECKING:
    from manager.core.index import NodeView

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ABSENT: Final = -(2**62)
"""In place of what a device has free where there is none, or a sick one, or one that somebody has for himself."""
LOG_ROWS: Final = 4
"""Changes that are remembered, in rows of the table: who has missed more looks at all rows."""


class DeviceKind(msgspec.Struct, frozen=True):
    """What selectors look at: devices of one kind match alike."""

    architecture: str
    model: str
    labels: Labels

    def matches(self, resources: Resources) -> bool:
        """Whether such a device may be given for `resources`."""
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
        open: whether the node takes anything new, (R).
        cpu_milli, host_bytes: free, (R).
        memory_bytes, share_milli: free of each device, (R, D); `ABSENT` where the device cannot be given at all.
        untouched: whether nobody is on the device, (R, D).
        kind: number of the device's kind (see `kinds`), -1 where there is none, (R, D).
        total_bytes: what the device's pool could promise empty, 0 where there is none, (R, D).
        shared: whether devices of the node share memory, (R).
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
        self._log: list[int] = []
        self._log_starts = 0
        self.open: Bools = np.zeros(rows, np.bool_)
        self.cpu_milli: Ints = np.zeros(rows, np.int64)
        self.host_bytes: Ints = np.zeros(rows, np.int64)
        self.memory_bytes: Ints = np.full((rows, width), ABSENT, np.int64)
        self.share_milli: Ints = np.full((rows, width), ABSENT, np.int64)
        self.untouched: Bools = np.zeros((rows, width), np.bool_)
        self.kind: Ints = np.full((rows, width), -1, np.int64)
        self.total_bytes: Ints = np.zeros((rows, width), np.int64)
        self.shared: Bools = np.zeros(rows, np.bool_)
        for row, view in enumerate(nodes):
            self._write_fixed(row, view)
            self._write(row, view)

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

    def _write(self, row: int, view: "NodeView") -> None:
        self.open[row] = view.placeable
        self.cpu_milli[row] = view.cpu_free_milli
        self.host_bytes[row] = view.host_free_bytes
        for at, device in enumerate(view.devices.values()):
            pool = device.pool
            given = bool(pool.sick or device.alone)
            self.memory_bytes[row, at] = ABSENT if given else pool.free_bytes
            self.share_milli[row, at] = ABSENT if given else device.free_milli
            self.untouched[row, at] = not device.slots and not device.kept

    def refresh(self, views: Iterable["NodeView"]) -> None:
        """These nodes have changed, in the order of names."""
        for view in views:
            row = self.row_of[view.name]
            self._write(row, view)
            self._log.append(row)
        excess = len(self._log) - 2 * LOG_ROWS * max(16, len(self.names))
        if excess > 0:
            cut = len(self._log) - LOG_ROWS * max(16, len(self.names))
            del self._log[:cut]
            self._log_starts += cut

    @property
    def at(self) -> int:
        """A mark of this moment, for `changed_since`."""
        return self._log_starts + len(self._log)

    def changed_since(self, mark: int) -> Ints | None:
        """Rows that have changed since `at` was `mark`, each once, in order; None: too many to tell."""
        if mark < self._log_starts:
            return None
        return np.unique(np.array(self._log[mark - self._log_starts :], np.int64))

    def matching(self, resources: Resources) -> Bools | None:
        """By number of kind, whether such devices may be given for `resources`; None where all may."""
        if not (resources.architectures or resources.device_model or resources.labels):
            return None
        return np.array([kind.matches(resources) for kind in self.kinds], np.bool_)

    def fitting(self, resources: Resources, rows: Ints, matching: Bools | None) -> Bools:
        """Which devices of `rows` could each take one part of `resources` now, (len(rows), D).

        Whether a row has as many of them as are asked for is the caller's to see; and that devices which share memory have
        enough of it for all that are taken.
        """
        fits: Bools = (self.memory_bytes[rows] >= resources.memory_bytes) & (self.share_milli[rows] >= resources.share_milli)
        if matching is not None:
            kind = self.kind[rows]
            fits &= matching[kind] & (kind >= 0)
        if resources.exclusive:
            fits &= self.untouched[rows]
        fits &= self.hosts(resources, rows)[:, None]
        return fits

    def hosts(self, resources: Resources, rows: Ints) -> Bools:
        """Which of `rows` take anything new and have the CPUs and memory, (len(rows))."""
        ok: Bools = self.open[rows] & (self.cpu_milli[rows] >= resources.cpu_milli)
        if resources.host_memory_bytes:
            ok &= self.host_bytes[rows] >= resources.host_memory_bytes
        return ok

    def is_equal(self, other: "Table") -> bool:
        """Whether both say the same of every node."""
        if self.names != other.names or self.kind.shape != other.kind.shape:
            return False
        mine, theirs = self.kind_names(), other.kind_names()
        columns = ("open", "cpu_milli", "host_bytes", "memory_bytes", "share_milli", "untouched", "total_bytes", "shared")
        return mine == theirs and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)

    def kind_names(self) -> list[list[DeviceKind | None]]:
        """The kind of each device, (R, D); None where there is none."""
        return [[self.kinds[kind] if kind >= 0 else None for kind in row] for row in self.kind.tolist()]
