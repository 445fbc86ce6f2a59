"""The autoscaler's journal: every decision with what it knew, why, and what came of it, in a bounded stream of the store.

A decision that changes nothing (in shadow mode, any) and is like the one before it is only counted: it is written once, and
again with the count when something changes, at the latest after five minutes. So the journal shows that somebody watched, and
what mattered is found.
"""

from typing import Final

import msgspec

from manager.core.answers_autoscaler import DecisionNote
from manager.store import Store

KEPT: Final = 5000
"""Decisions that the stream keeps, about: a week of changes every two minutes."""
REPEAT_S: Final = 300.0
SHADOW: Final = "shadow"
"""The result of what was decided and not done."""

_encode = msgspec.json.Encoder().encode


class Journal:
    """Writes decisions.

    Args:
        store: where the stream lies.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: DecisionNote | None = None
        self._last_s = 0.0
        self._repeats = 0

    async def write(self, token: int, note: DecisionNote, now_s: float) -> bool:
        """Take note of a decision; whether it was written."""
        idle = all(action.result == SHADOW for action in note.actions)
        if idle and self._last == _bare(note) and now_s - self._last_s < REPEAT_S:
            self._repeats += 1
            return False
        await self._store.write_journal(token, _encode(msgspec.structs.replace(note, repeats=self._repeats)), KEPT)
        self._last, self._last_s, self._repeats = _bare(note), now_s, 0
        return True


def _bare(note: DecisionNote) -> DecisionNote:
    """What a decision says without what passes by itself: two that differ only there are alike."""
    groups = tuple(msgspec.structs.replace(group, blocked_s=0.0) for group in note.groups)
    return msgspec.structs.replace(note, groups=groups, repeats=0)
