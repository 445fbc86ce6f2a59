"""Names for AMD's devices: unique on the node, stable over restarts, also where one GPU is split into several.

Pure. What a driver tells of identity differs by version and mode: the unique id may be missing, unpadded or shared by
all partitions of a GPU. Which memory they have is `plugins.node.devices.pools`'.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from manager.core.devices import NAMELESS

_UNIQUE_ID: Final = re.compile(r"(?:GPU-)?(?:0x)?0*([0-9a-f]{1,16})", re.IGNORECASE)


class Identity(msgspec.Struct, frozen=True):
    """What the driver tells about who one logical device is; empty where it does not.

    Attributes:
        unique_id: ``hip_uuid`` or the serial number of the ASIC.
        uuid: the driver library's own uuid.
        bdf: PCI address; partitions of one GPU differ in its function only.
        hip_id: position among the GPUs as ROCR counts them, None if not told.
        partition_id: which partition of its GPU.
        compute: compute partitioning, such as "SPX" (one device) or "CPX".
        memory: memory partitioning, such as "NPS1".
    """

    unique_id: str = ""
    uuid: str = ""
    bdf: str = ""
    hip_id: int | None = None
    partition_id: int = 0
    compute: str = ""
    memory: str = ""

    @property
    def told(self) -> bool:
        """Whether there is anything to tell the device by."""
        return bool(unique_id_text(self.unique_id) or self.uuid or self.bdf)


class Key(msgspec.Struct, frozen=True):
    """The names that follow.

    Attributes:
        uuid, visible_id, partition: as in `manager.core.devices.Device`.
        gpu: names the physical device, as do all its partitions.
        siblings: how many logical devices of it are shown.
    """

    uuid: str
    visible_id: str
    partition: str
    gpu: str
    siblings: int


def unique_id_text(text: str) -> str:
    """``GPU-`` and 16 digits, as ROCR spells it, from any spelling of a unique id; empty if `text` is none."""
    match = _UNIQUE_ID.fullmatch(text.strip())
    if match is None or int(match.group(1), 16) in {0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}:
        return ""
    return f"GPU-{int(match.group(1), 16):016x}"


def keys_of(identities: Sequence[Identity]) -> tuple[Key, ...]:
    """One key for each identity, in order; no two share a uuid."""
    bases = [unique_id_text(each.unique_id) or each.uuid or f"{NAMELESS}{each.bdf}" for each in identities]
    gpus = [each.bdf.rpartition(".")[0] or base for each, base in zip(identities, bases, strict=True)]
    siblings, same_base = Counter(gpus), Counter(bases)
    keys: list[Key] = []
    taken: set[str] = set()
    for position, (each, base, gpu) in enumerate(zip(identities, bases, gpus, strict=True)):
        split = siblings[gpu] > 1 or each.compute.upper() not in {"", "SPX", "N/A"}
        names = [f"{base}.{each.partition_id}" if split else base, f"{base}@{each.bdf}", f"{base}#{position}"]
        name = next(name for name in names if name not in taken)
        taken.add(name)
        by_id = bool(unique_id_text(each.unique_id)) and same_base[base] == 1 and not split
        keys.append(
            Key(
                uuid=name,
                visible_id=base if by_id else str(position if each.hip_id is None else each.hip_id),
                partition=f"{each.compute or '?'}/{each.memory or '?'}/{each.partition_id}" if split else "",
                gpu=gpu,
                siblings=siblings[gpu],
            )
        )
    return tuple(keys)
