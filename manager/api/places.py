"""How many requests of one key may take long at once, be it that they wait, stream, or ask for much work.

All requests in hand share a bound (`manager.api.app`): without these counts one key could take every place, and shut out
everybody else.
"""

from typing import Final

WAITS_MAX: Final = 64
"""Of one key, at once: an eighth of what the process takes in hand, and twice what one client's pool of connections sends."""
STREAMS_MAX: Final = 64
"""The same of large results that are being read: a slow reader holds its place for as long as it reads."""
PLANS_MAX: Final = 8
"""The same of questions about what would happen, which are worked out one after the other."""


class Places:
    """Counts, for each key, the requests of one sort that are in hand.

    Args:
        most: of one key.
    """

    __slots__ = ("_held", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, int] = {}

    def take(self, key_id: str) -> bool:
        """Take a place, to be left again; False: the key has as many as it may."""
        held = self._held.get(key_id, 0)
        if held >= self._most:
            return False
        self._held[key_id] = held + 1
        return True

    def leave(self, key_id: str) -> None:
        """Give back a place that was taken."""
        held = self._held[key_id] - 1
        if held:
            self._held[key_id] = held
        else:
            del self._held[key_id]
