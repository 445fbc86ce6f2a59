"""Leases and terms without clocks: something that beats is dead when its beat has not changed for long enough on the
observer's own monotonic clock. No clock is compared with another, so a jump of any of them does nothing.
"""

from collections.abc import Hashable, Iterable


class BeatWatch:
    """Remembers when each beat was last seen to change. `now_s` is the observer's monotonic time."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Hashable, float]] = {}

    def unchanged_s(self, name: str, beat: Hashable, now_s: float) -> float:
        """Seconds for which `beat` of `name` has been the same; 0 when it is seen for the first time."""
        known = self._seen.get(name)
        if known is None or known[0] != beat:
            self._seen[name] = (beat, now_s)
            return 0.0
        return now_s - known[1]

    def keep(self, names: Iterable[str]) -> None:
        """Forget everybody else."""
        wanted = set(names)
        self._seen = {name: seen for name, seen in self._seen.items() if name in wanted}

    def forgive(self, seconds: float) -> None:
        """The observer itself stood still for so long: nobody is to blame for that time."""
        self._seen = {name: (beat, at + seconds) for name, (beat, at) in self._seen.items()}
