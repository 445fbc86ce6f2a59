"""What waits for room, in the order in which it is to be placed. It knows neither devices nor Dask.

Requests stand in classes: what is alike for placement. If the first of a class does not fit, none of it does, so a round of
placement looks at one request of each class that is blocked, and not at all that wait. Across classes priority decides.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

import msgspec

Kind = TypeVar("Kind", bound=Hashable)
Priority = tuple[float, ...]
"""Lower is earlier, as Dask has it."""
STALE_MAX: Final = 64
"""Entries that a heap may hold for requests that are gone, beyond as many as it holds of living ones."""


class _Entry(msgspec.Struct, Generic[Kind], frozen=True):
    """Where a request stands. `order` breaks ties: who came first."""

    priority: Priority
    order: int
    kind: Kind


class _Class:
    """The requests of one class. `since_s` is ordered: who has waited for longest comes first."""

    __slots__ = ("heap", "since_s")

    def __init__(self) -> None:
        self.heap: list[tuple[Priority, int, str]] = []
        self.since_s: dict[str, float] = {}


class Waiting(msgspec.Struct, Generic[Kind], frozen=True):
    """How many of a class wait, and since when the first of them."""

    kind: Kind
    count: int
    since_s: float


class Held(Generic[Kind]):
    """All requests that wait. Iteration is in the order of placement."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry[Kind]] = {}
        self._classes: dict[Kind, _Class] = {}
        self._orders = itertools.count()

    def push(self, name: str, priority: Priority, kind: Kind, now_s: float) -> None:
        """Hold `name` in the class `kind`. One that is held already keeps its place in time, in whatever class."""
        known = self._entries.get(name)
        if known is not None and (known.priority, known.kind) == (priority, kind):
            return
        since_s, order = now_s, next(self._orders)
        if known is not None:
            since_s, order = self._classes[known.kind].since_s[name], known.order
            self.discard(name)
        self._entries[name] = _Entry(priority, order, kind)
        place = self._classes.setdefault(kind, _Class())
        place.since_s[name] = since_s
        heapq.heappush(place.heap, (priority, order, name))

    def discard(self, name: str) -> None:
        """Hold `name` no longer."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        place = self._classes[entry.kind]
        del place.since_s[name]
        if not place.since_s:
            del self._classes[entry.kind]
        elif len(place.heap) > 2 * len(place.since_s) + STALE_MAX:
            place.heap = [item for item in place.heap if self._is_valid(item, entry.kind)]
            heapq.heapify(place.heap)

    def waiting(self) -> Iterator[Waiting[Kind]]:
        """How many of each class wait."""
        for kind, place in self._classes.items():
            yield Waiting(kind, len(place.since_s), next(iter(place.since_s.values())))

    def since_s(self, name: str) -> float:
        """Since when `name` has waited."""
        return self._classes[self._entries[name].kind].since_s[name]

    def place(self, name: str) -> tuple[Priority, int]:
        """What `name` is to be placed by: the lowest goes first."""
        entry = self._entries[name]
        return entry.priority, entry.order

    def before(self, name: str) -> int:
        """How many of its own class are to be placed before `name`."""
        entry = self._entries[name]
        first = (entry.priority, entry.order)
        others = map(self._entries.__getitem__, self._classes[entry.kind].since_s)
        return sum((other.priority, other.order) < first for other in others)

    def round(self) -> "Round[Kind]":
        """One round of placement over what is held now."""
        return Round(self)

    def first(self, kind: Kind) -> tuple[Priority, int, str] | None:
        """The first of a class; None where none of it is held."""
        place = self._classes.get(kind)
        if place is None:
            return None
        while not self._is_valid(place.heap[0], kind):
            heapq.heappop(place.heap)
        return place.heap[0]

    def kinds(self) -> list[Kind]:
        """All classes of which something is held."""
        return list(self._classes)

    def _is_valid(self, item: tuple[Priority, int, str], kind: Kind) -> bool:
        priority, order, name = item
        entry = self._entries.get(name)
        return entry is not None and (entry.priority, entry.order, entry.kind) == (priority, order, kind)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries, key=lambda name: (self._entries[name].priority, self._entries[name].order)))


class Round(Generic[Kind]):
    """Who is to be tried next. What was not placed blocks its class for the rest of the round."""

    def __init__(self, held: Held[Kind]) -> None:
        self._held = held
        self._heads: list[tuple[tuple[Priority, int, str], Kind]] = []
        self._blocked: list[Kind] = []
        for kind in held.kinds():
            self._enter(kind)
        heapq.heapify(self._heads)

    def next(self) -> str | None:
        """The first of all that are held and not blocked; None at the end."""
        if not self._heads:
            return None
        (_, _, name), kind = heapq.heappop(self._heads)
        self._blocked.append(kind)
        return name

    def placed(self) -> None:
        """The last one was placed and is not held any more: the next of its class is to be tried."""
        self._enter(self._blocked.pop())

    def again(self) -> None:
        """There is more room than there was: whatever was blocked is to be tried again."""
        blocked, self._blocked = self._blocked, []
        for kind in blocked:
            self._enter(kind)

    def _enter(self, kind: Kind) -> None:
        if (first := self._held.first(kind)) is not None:
            heapq.heappush(self._heads, (first, kind))
