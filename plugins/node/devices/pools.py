"""Which memory a logical device of AMD's has, and with which others it shares it. Pure.

A GPU is split twice: its compute dies into logical devices (SPX 1, DPX 2, TPX 3, QPX 4, CPX one for each die), and its memory
into parts (NPS1, NPS2, NPS4). Devices are given to parts in order, as the driver does it. What a driver tells as the total of
a logical device was not tried on hardware: it may be the whole GPU's, its part's or its own share. What cannot be told apart
is refused rather than guessed.
"""

import math
from typing import Final

import msgspec

from manager.core.devices import MODELS, Model, Partitioning, partitioning_of
from manager.core.quantities import format_memory
from plugins.node.devices.identity import Identity, Key

_SAME_RATIO: Final = 1.15
"""A driver tells a little less than the nominal size. The sizes to be told apart differ by a factor of 1.5 at least."""
_ANY_DIES: Final = 12
"""Of a model that is not known: every mode but CPX can be had with so many."""


class Memory(msgspec.Struct, frozen=True):
    """The memory of a logical device.

    Attributes:
        total_bytes: all of it, with what others share; 0: not known.
        pool: names it where others share it, as in `manager.core.devices.Device`; empty: it is the device's own.
        problem: why the device must not be used; empty if it may.
    """

    total_bytes: int
    pool: str = ""
    problem: str = ""


def memory_of(identity: Identity, key: Key, model_name: str, told_bytes: int) -> Memory:
    """The memory of one logical device.

    Args:
        identity, key: of the device.
        model_name: as the driver has it.
        told_bytes: what the driver tells as its total; 0: nothing that can be believed.
    """
    if not key.partition:
        return Memory(told_bytes)
    model = next((each for each in MODELS.values() if each.dies > 1 and each.model.lower() in model_name.lower()), None)
    split = _split(identity, key, model)
    modes = f"{identity.compute or '?'}/{identity.memory or '?'}"
    if split is None:
        return Memory(told_bytes, problem=f"which memory the partitions of this GPU share is not known ({modes}): use SPX/NPS1")
    shared = f"{key.gpu}/NPS{split.memory_parts}/{split.part_of(identity.partition_id)}" if split.sharing > 1 else ""
    if not told_bytes:
        return Memory(0, shared)
    if model is None:
        if split.memory_parts == 1:
            return Memory(told_bytes, shared)
        problem = (
            f"whether {format_memory(told_bytes)} is all of the GPU's memory is not known of its model ({modes}): use NPS1"
        )
        return Memory(told_bytes, shared, problem)
    if _same(told_bytes, model.memory_bytes):
        return Memory(told_bytes // split.memory_parts, shared)
    if _same(told_bytes, model.memory_bytes // split.memory_parts):
        return Memory(told_bytes, shared)
    if _same(told_bytes, model.memory_bytes // split.devices):
        return Memory(told_bytes)  # its own share: all of them together are no more than there is
    problem = (
        f"the driver tells {format_memory(told_bytes)} for one of {split.devices} logical devices ({modes}) of a GPU with "
        f"{format_memory(model.memory_bytes)}: that is neither all of it, nor a part, nor a share"
    )
    return Memory(told_bytes, shared, problem)


def _split(identity: Identity, key: Key, model: Model | None) -> Partitioning | None:
    """How its GPU is split; None where what the driver tells of that does not go together."""
    compute, memory = identity.compute.upper(), identity.memory.upper()
    shown = max(key.siblings, identity.partition_id + 1)
    if model is None and compute == "CPX":
        # How many there are is not known, where not all of them need be shown; that all share the one part is.
        return Partitioning(compute, max(2, shown), 1) if memory == "NPS1" else None
    split = partitioning_of(compute, memory, _ANY_DIES if model is None else model.dies)
    return split if split is not None and shown <= split.devices else None


def _same(one: int, other: int) -> bool:
    return abs(math.log(one / other)) < math.log(_SAME_RATIO)
