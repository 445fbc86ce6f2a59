"""The slot's Dask task: it asks the agent of its node to open the slot, and waits until the slot has ended.

What Dask places is this task; the slot itself lives in the agent and outlives it. The task holds no thread of the worker.
"""

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from distributed import get_worker
from distributed.worker_state_machine import SecedeEvent

from manager.core.keys import SLOT_TASK_PREFIX
from manager.core.shapes import Grant
from plugins.node.link import AgentLink

LINK_EXTENSION: Final = "rocyard"


class GpuWorkNotPlaced(RuntimeError):
    """GPU work reached a worker without having been placed: is the scheduler running its Rocyard plugin?"""


class Assigned(msgspec.Struct, frozen=True):
    """What the scheduler plugin has granted to a task, as it travels in the task's annotations."""

    slot_id: str
    grant: Grant


ASSIGNED: Final = "gpu_assigned"
"""Name of the annotation."""
END_DIRECT_OP: Final = "rocyard-end-direct"
"""What the scheduler says to a Dask worker about a slot that nobody wants any more."""


def assigned_of(annotations: Mapping[str, Any] | None) -> Assigned | None:
    """What the scheduler plugin has granted; None where it has not."""
    granted = (annotations or {}).get(ASSIGNED)
    if not isinstance(granted, dict):
        return None
    return Assigned(granted["slot"], msgspec.convert(granted, Grant))


def assignment_of(assigned: Assigned) -> dict[str, Any]:
    """The annotation's value: the grant's fields and the slot; plain, since it travels inside Dask's own messages."""
    return {"slot": assigned.slot_id, **msgspec.to_builtins(assigned.grant)}


async def run_slot(slot_id: str) -> str:
    """Have the slot opened here and wait for its end.

    Returns:
        Why it ended, as the agent says. Returning is what ends the lease, so nothing else may return normally.

    Raises:
        GpuWorkNotPlaced: the task bears no grant.
        LinkBroken: the agent went away; the slot's fate is in the store.
    """
    worker = get_worker()
    key = SLOT_TASK_PREFIX + slot_id
    worker.handle_stimulus(SecedeEvent(key=key, compute_duration=0.0, stimulus_id=f"rocyard-{time.time()}"))
    assigned = assigned_of(worker.state.tasks[key].annotations)
    if assigned is None:
        raise GpuWorkNotPlaced
    link: AgentLink = worker.extensions[LINK_EXTENSION].link
    return await link.open(slot_id, assigned.grant)
