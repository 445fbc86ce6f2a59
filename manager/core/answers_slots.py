"""What the REST API gives of slots, and of the queues that they serve. See `answers`."""

import msgspec

from manager.core.answers import ResourcesView, Time


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks of one shape that wait, and the slots that serve them.

    Attributes:
        memory_bytes: what a slot leases on each device: what was asked for, rounded up.
        resources: all that a slot leases.
        oldest_wait_s: since its first task was queued; null where none waits.
        run_s: learned run time of its tasks; null where none has ended.
        slots_warm: how many are to be open although nothing waits.
    """

    shape_id: str
    tenant: str
    memory_bytes: int
    gpus: int
    resources: ResourcesView | None = None
    depth: int
    slots_open: int
    slots_opening: int
    oldest_wait_s: float | None = None
    run_s: float | None = None
    slots_warm: int = 0


class SlotView(msgspec.Struct, frozen=True, kw_only=True):
    """A slot: devices and bytes on one node, leased to one shape.

    Attributes:
        flag: what it was asked to do next: close, drain, preempt, or nothing.
        served: tasks that have ended in it.
        kind: ``direct`` for one that runs a Dask task of somebody who uses Dask directly: it has no shape, and its tenant is
            called ``dask``. Empty for all others.
    """

    slot_id: str
    shape_id: str
    tenant: str
    status: str
    node: str | None
    devices: tuple[str, ...]
    memory_bytes: int
    flag: str
    running: int
    served: int
    open_s: float | None = None
    idle_s: float | None = None
    kind: str = ""


class WarmView(msgspec.Struct, frozen=True):
    """Slots that are kept open although nothing waits for them, until then."""

    shape_id: str
    memory_bytes: int
    gpus: int
    slots: int
    until_at: Time


class Unloaded(msgspec.Struct, frozen=True):
    """Idle slots that close now. One that is busy stays until it has been idle for long enough by itself."""

    shapes: int
    slots: int
