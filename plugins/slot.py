"""The slot's Dask task: it asks the agent of its node to open the slot, and waits until the slot has ended.

What Dask places is this task; the slot itself lives in the agent and outlives it. The task holds no thread of the worker.
"""

import time
from typing import Any

from distributed import get_worker
from distributed.worker_state_machine import SecedeEvent

from manager.core.keys import SLOT_TASK_PREFIX
from plugins.node.link import AgentLink

LINK_EXTENSION = "rocyard"


class GpuWorkNotPlaced(RuntimeError):
    """GPU work reached a worker without having been placed: is the scheduler running its Rocyard plugin?"""


def assigned_of(annotations: dict[str, Any] | None) -> tuple[tuple[str, ...], int] | None:
    """Devices and bytes that the scheduler plugin has granted; None where it has not."""
    granted = (annotations or {}).get("gpu_assigned")
    if not isinstance(granted, dict):
        return None
    return tuple(granted["devices"]), int(granted["memory_bytes"])


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
    granted = assigned_of(worker.state.tasks[key].annotations)
    if granted is None:
        raise GpuWorkNotPlaced
    link: AgentLink = worker.extensions[LINK_EXTENSION].link
    devices, memory_bytes = granted
    return await link.open(slot_id, devices, memory_bytes)
