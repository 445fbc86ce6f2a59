"""Leases and terms without clocks: something that beats is dead when its beat has not changed for long enough on the
observer's own monotonic clock. No clock is compared with another, so a jump of any of them does nothing.
"""

from collections.abc import Hashable, Iterable
from typing import Final

GIVE_WAY_S_MAX: Final = 300.0


class BeatWatch:
    """Remembers when each beat was last seen to change, on the observer's monotonic clock.

    A look takes time, and an observer may stand still in the middle of one: a beat that it finds may have come until the answer
    was there, and the silence that it finds had lasted only until it asked.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Hashable, float]] = {}

    def silent_s(self, name: str, beat: Hashable, asked_s: float, answered_s: float) -> float:
        """Seconds for which `beat` of `name` is known to have been the same; 0 when it is seen for the first time."""
        known = self._seen.get(name)
        if known is None or known[0] != beat:
            self._seen[name] = (beat, answered_s)
            return 0.0
        return max(0.0, asked_s - known[1])

    def keep(self, names: Iterable[str]) -> None:
        """Forget everybody else."""
        wanted = set(names)
        self._seen = {name: seen for name, seen in self._seen.items() if name in wanted}

    def forgive(self, seconds: float) -> None:
        """The observer stood still for so long, and with it perhaps all whom it watches: nobody is to blame for that time."""
        self._seen = {name: (beat, at + seconds) for name, (beat, at) in self._seen.items()}


class GivingWay:
    """When a leader that cannot do its work lets another candidate try.

    Nobody knows whether another could do better; so it gives way once it has failed for `after_s`, and, where it leads again
    and still fails, after twice that time, and so on: candidates who all fail do not pass the term around all the time.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._wait_s = after_s
        self._failing_since_s: float | None = None

    def works(self) -> None:
        """It does its work."""
        self._failing_since_s, self._wait_s = None, self._after_s

    def stopped(self) -> None:
        """It does not lead any more: what it cannot do holds up nobody."""
        self._failing_since_s = None

    def fails(self, now_s: float) -> bool:
        """It cannot do its work now. Whether it gives way."""
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if now_s - self._failing_since_s < self._wait_s:
            return False
        self._failing_since_s = None
        self._wait_s = min(2 * self._wait_s, max(GIVE_WAY_S_MAX, self._after_s))
        return True
