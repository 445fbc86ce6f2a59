"""Who takes more than its lease, and the most that each slot was seen to use. Pure: readings in, decisions out."""

from collections.abc import Mapping
from typing import Final

import msgspec

from manager.core.model import MemoryNote
from manager.core.quantities import MIB
from manager.core.shapes import memory_class

READINGS_ABOVE_LEASE: Final = 2
"""A slot must be seen above its lease so often in a row before it is ended."""
MEMORY_TOLERANCE_BYTES: Final = 64 * MIB
"""What drivers account to a process beyond its own allocations differs by so much from call to call."""
NOTE_AGAIN_S: Final = 3600.0
"""What a shape has learned is said again so often while it is so; the store forgets it after a day."""


class SlotUse(msgspec.Struct, frozen=True):
    """What one slot uses now, of that device of its own on which it uses most.

    Attributes:
        used_bytes: by its processes.
        lease_bytes: what it has of each device.
        asked_bytes: what its shape asks for, which may be less than the lease.
        lease_bytes_max: the most that could be leased on each, a class.
    """

    used_bytes: int
    lease_bytes: int
    asked_bytes: int
    lease_bytes_max: int


class LeaseWatch:
    """Remembers the last readings of one node's slots."""

    def __init__(self) -> None:
        self._above: dict[str, int] = {}
        self._seen: dict[str, MemoryNote] = {}
        self._noted: dict[str, tuple[MemoryNote, float]] = {}

    def look(self, uses: Mapping[str, SlotUse]) -> list[MemoryNote]:
        """Take in one reading of all slots; those that are to be ended now, with what they have used."""
        above, ended = {}, []
        for slot_id, use in uses.items():
            if use.used_bytes > use.lease_bytes + MEMORY_TOLERANCE_BYTES:
                above[slot_id] = self._above.get(slot_id, 0) + 1
                if above[slot_id] < READINGS_ABOVE_LEASE:
                    continue  # a single reading proves nothing, and teaches nothing
            peak_bytes = max(use.used_bytes, self._seen[slot_id].peak_bytes if slot_id in self._seen else 0)
            self._seen[slot_id] = MemoryNote(slot_id, peak_bytes, learned_of(peak_bytes, use))
            if above.get(slot_id) == READINGS_ABOVE_LEASE:
                ended.append(self._seen[slot_id])
        self._above = above
        for gone in self._seen.keys() - uses.keys():
            del self._seen[gone]
            self._noted.pop(gone, None)
        return ended

    def notes(self, now_s: float) -> list[MemoryNote]:
        """What the store does not know yet, by classes of memory, or is to hear again."""
        return [note for note in self._seen.values() if self._is_news(note, now_s)]

    def noted(self, notes: list[MemoryNote], now_s: float) -> None:
        """The store knows these."""
        self._noted.update({note.slot_id: (note, now_s) for note in notes})

    def _is_news(self, note: MemoryNote, now_s: float) -> bool:
        last, last_s = self._noted.get(note.slot_id, (MemoryNote(note.slot_id, 0), now_s))
        if note.learned_bytes != last.learned_bytes or memory_class(note.peak_bytes) > memory_class(last.peak_bytes):
            return True
        return note.learned_bytes > 0 and now_s - last_s >= NOTE_AGAIN_S


def learned_of(peak_bytes: int, use: SlotUse) -> int:
    """What slots of its shape are to lease by that; 0: what was asked for will do, or there is no more to lease."""
    if peak_bytes <= use.asked_bytes + MEMORY_TOLERANCE_BYTES:
        return 0
    learned_bytes = min(memory_class(peak_bytes), use.lease_bytes_max)
    return learned_bytes if learned_bytes > use.asked_bytes else 0
