"""Room on nodes, there or not yet, that many slots of one request are packed into at once. Pure; the packed need uses it.

Coarser than `manager.core.placement`, which places one slot and places it well: here it only counts how many would fit.
"""

from manager.core.index import NodeView
from manager.core.shapes import Resources
from manager.core.table import DeviceKind


class Part:
    """A request while it is packed, with what is known of it beforehand."""

    __slots__ = (
        "_matching",
        "cpu_milli",
        "exclusive",
        "gpus",
        "host_memory_bytes",
        "is_plain",
        "is_selective",
        "memory_bytes",
        "order",
        "resources",
        "share_milli",
    )

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.memory_bytes = resources.memory_bytes
        self.gpus = resources.gpus
        self.share_milli = resources.share_milli
        self.cpu_milli = resources.cpu_milli
        self.host_memory_bytes = resources.host_memory_bytes
        self.exclusive = resources.exclusive
        self.is_selective = bool(resources.architectures or resources.device_model or resources.labels)
        self.is_plain = not (self.is_selective or self.share_milli or self.exclusive)
        self._matching: dict[DeviceKind, bool] = {}
        # Who wants devices for himself comes while there are empty ones; then large ones, and of two that are alike the
        # choosier one.
        self.order = (not self.exclusive, -self.memory_bytes * self.gpus, -self.memory_bytes, not self.is_selective)

    def matches(self, kind: DeviceKind) -> bool:
        """Whether such a device may be given."""
        found = self._matching.get(kind)
        if found is None:
            found = self._matching[kind] = kind.matches(self.resources)
        return found


class Room:
    """What is free on one node. Mutable.

    Attributes:
        free: bytes of each pool; negative where nothing can be given of it.
        largest: the most of them.
        left: how many slots more the node may have.
        used: whether it holds work already; `touched`: whether any was packed onto it.
    """

    __slots__ = (
        "alone",
        "cpu_milli",
        "free",
        "group",
        "host_bytes",
        "kinds",
        "largest",
        "left",
        "name",
        "pool_of",
        "share_milli",
        "shared",
        "touched",
        "untaken",
        "used",
    )

    def __init__(self, view: NodeView, group: str, *, used: bool = False) -> None:
        self.name = view.name
        self.group = group
        self.used = used
        self.touched = False
        self.left = view.slots_max - len(view.slots)
        self.cpu_milli = view.cpu_free_milli
        self.host_bytes = view.host_free_bytes
        number = {key: at for at, key in enumerate(view.pools)}
        self.free = [pool.free_bytes if pool.healthy else -1 for pool in view.pools.values()]
        devices = view.devices.values()
        self.pool_of = [number[device.pool.key] for device in devices]
        self.shared = len(self.free) < len(self.pool_of)
        self.share_milli = [device.free_milli for device in devices]
        self.alone = [bool(device.alone) for device in devices]
        self.untaken = [not device.slots and not device.kept for device in devices]
        self.kinds = [device.kind for device in devices]
        self.largest = max(self.free, default=-1)

    def copy(self) -> "Room":
        """The same, to be filled."""
        twin = object.__new__(Room)
        twin.name, twin.group, twin.used, twin.touched, twin.left = self.name, self.group, self.used, self.touched, self.left
        twin.cpu_milli, twin.host_bytes, twin.largest = self.cpu_milli, self.host_bytes, self.largest
        twin.pool_of, twin.kinds, twin.shared = self.pool_of, self.kinds, self.shared
        twin.free, twin.share_milli = self.free.copy(), self.share_milli.copy()
        twin.alone, twin.untaken = self.alone.copy(), self.untaken.copy()
        return twin

    def take(self, part: Part, count: int) -> int:
        """Place up to `count` slots of a request at once; how many found room. Devices with least free memory go first."""
        most = min(count, self.left)
        if part.cpu_milli:
            most = min(most, self.cpu_milli // part.cpu_milli)
        if part.host_memory_bytes:
            most = min(most, self.host_bytes // part.host_memory_bytes)
        memory_bytes, gpus, free, pool_of = part.memory_bytes, part.gpus, self.free, self.pool_of
        if most <= 0 or memory_bytes > self.largest:
            return 0
        each = self._each(part)
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            # So many slots of several devices each find room as no device takes part in one slot twice.
            if self._parts(each, middle, memory_bytes) >= gpus * middle:
                low = middle
            else:
                high = middle - 1
        shares = low * gpus
        for at in sorted(each, key=lambda at: (free[pool_of[at]], at)) if low else ():
            pool = pool_of[at]
            share = min(each[at], low, shares, free[pool] // memory_bytes)
            if share:
                free[pool] -= share * memory_bytes
                self.share_milli[at] -= share * part.share_milli
                self.untaken[at] = False
                self.alone[at] = part.exclusive
                shares -= share
        if low:
            self.left -= low
            self.cpu_milli -= low * part.cpu_milli
            self.host_bytes -= low * part.host_memory_bytes
            self.touched = True
            self.largest = max(free)
        return low

    def _each(self, part: Part) -> dict[int, int]:
        """How many slots could each have a device, for all that could have one; as if none shared its memory."""
        memory_bytes, free = part.memory_bytes, self.free
        if part.is_plain:
            return {
                at: free[pool] // memory_bytes
                for at, pool in enumerate(self.pool_of)
                if free[pool] >= memory_bytes and not self.alone[at]
            }
        found: dict[int, int] = {}
        for at, pool in enumerate(self.pool_of):
            if free[pool] < memory_bytes or self.alone[at] or not part.matches(self.kinds[at]):
                continue
            number = free[pool] // memory_bytes
            if part.share_milli:
                number = min(number, self.share_milli[at] // part.share_milli)
            if part.exclusive:
                number = min(number, 1) if self.untaken[at] else 0
            if number > 0:
                found[at] = number
        return found

    def _parts(self, each: dict[int, int], slots: int, memory_bytes: int) -> int:
        """How many parts of `slots` slots find room."""
        if not self.shared:
            return sum([min(slots, number) for number in each.values()])
        in_pool: dict[int, int] = {}
        for at, number in each.items():
            pool = self.pool_of[at]
            in_pool[pool] = in_pool.get(pool, 0) + min(number, slots)
        return sum(min(number, self.free[pool] // memory_bytes) for pool, number in in_pool.items())
