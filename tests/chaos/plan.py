"""Which faults come when: a pure function of the seed.

One fault each 3 to 8 seconds, at most two under way at once, none in the last part of a run, which heals. Kinds are dealt
like cards: none comes again before all others have come. The power of the whole machine is cut in long runs only, and alone:
its supervisor takes some seconds to start, and may refuse to where a disk is full.
"""

import random
from typing import Final

import msgspec

GAP_S: Final = (3.0, 8.0)
AT_ONCE_MAX: Final = 2
KINDS: Final[dict[str, tuple[float, float]]] = {
    # What is done to whom, and for how long: a kill is over at once, and what follows is the supervisor's.
    "kill store": (0, 0),
    "kill scheduler": (0, 0),
    "kill worker": (0, 0),
    "kill agent": (0, 0),
    "kill executor": (0, 0),
    "kill leader": (0, 0),
    "kill api": (0, 0),
    "kill autoscaler": (0, 0),
    "power store": (0, 0),
    "freeze store": (1, 6),
    "freeze scheduler": (2, 9),
    "freeze worker": (2, 9),
    "freeze agent": (2, 14),
    "freeze node": (7, 14),
    "freeze executor": (1, 6),
    "freeze leader": (2, 12),
    "freeze api": (1, 6),
    "freeze autoscaler": (2, 9),
    "cut agent": (1, 12),
    "cut leader": (1, 9),
    "cut all": (0.5, 4),
    "slow all": (3, 9),
    "stall api": (1, 6),
    "stall all": (1, 6),
    "full store": (2, 6),
    "full results": (2, 6),
}
LONG: Final = {"power machine": (15, 15)}
LONG_S: Final = 100.0
"""A run of so many seconds is long."""


class Planned(msgspec.Struct, frozen=True):
    """One fault to come.

    Attributes:
        at_s: after the start of the load.
        for_s: how long it stays.
        choice: in [0, 1): which of those that it could be done to.
    """

    number: int
    at_s: float
    what: str
    whom: str
    for_s: float
    choice: float


def plan(seed: int, seconds: float, heal_s: float) -> tuple[Planned, ...]:
    """All faults of a run of so many seconds, of which the last `heal_s` have none."""
    chance = random.Random(f"plan {seed}")
    until_s = seconds - heal_s
    kinds = KINDS | (LONG if seconds >= LONG_S else {})
    deck: list[str] = []
    planned: list[Planned] = []
    at_s = chance.uniform(*GAP_S)
    while at_s < until_s:
        if not deck:
            deck = chance.sample(sorted(kinds), len(kinds))
        kind = deck.pop()
        what, whom = kind.split()
        under_way = sorted(one.at_s + one.for_s for one in planned if one.at_s + one.for_s > at_s)
        others_max = 0 if kind in LONG else AT_ONCE_MAX - 1
        if len(under_way) > others_max:
            at_s = under_way[-1 - others_max]
            if at_s >= until_s:
                break
        for_s = min(chance.uniform(*kinds[kind]), until_s - at_s)
        planned.append(Planned(len(planned) + 1, round(at_s, 3), what, whom, round(for_s, 3), chance.random()))
        at_s += max(chance.uniform(*GAP_S), for_s if kind in LONG else 0)
    return tuple(planned)
