"""Which faults of the library the simulation must see, and as what: which promise is then said to be broken.

The faults themselves are those of `tests/contract/test_store_mutants.py`, by the same names.

    python -m tests.sim.store_mutants [NAME …]     plants each, and says which seed saw what
"""

import sys

from manager.store.schema import library_source
from tests.contract.test_store_mutants import MUTANTS
from tests.sim.store_server import simulated_store
from tests.sim.store_world import find

SEEDS_MAX = 40

SEEN: dict[str, frozenset[str]] = {
    "attempt not checked on finish": frozenset({"commit-by-current-attempt"}),
    "incarnation not checked on next": frozenset({"stranger-refused", "zombie-refused"}),
    "token not checked": frozenset({"old-leader-refused"}),
    "a submission overwrites": frozenset(
        {"one-claim", "claim-raises-attempt", "attempt-as-claimed", "final-is-final", "one-place", "counts"}
    ),
    "idempotency ignores the body": frozenset({"one-key-one-request", "same-key-same-task"}),
    "finish not idempotent": frozenset({"one-commit", "commit-by-current-attempt"}),
    "a claim does not raise the attempt": frozenset({"claim-raises-attempt"}),
    "unstarted claims count": frozenset({"blame-as-due", "retries-have-a-cap", "nobody-blamed"}),
    "crash blamed on infrastructure loss": frozenset({"blame-as-due", "no-attempt-withheld"}),
    "queue not filled with the record": frozenset({"one-place"}),
    "retry without a cap": frozenset({"retries-have-a-cap"}),
    "quota not given back": frozenset({"quota"}),
    "not marked idle with the empty claim": frozenset({"woken-in-time"}),
    "an opened slot is dropped": frozenset({"open-slot-kept", "blame-as-due", "claim-as-made", "stranger-refused"}),
}


def mutated(name: str) -> str:
    """The library with this fault.

    Raises:
        AssertionError: its text is not there exactly once.
    """
    text, replacement = MUTANTS[name][:2]
    source = library_source()
    assert source.count(text) == 1, f"the library has {source.count(text)} of: {text}"
    return source.replace(text, replacement)


def main(names: list[str]) -> int:
    """Plant each in turn; how many were not seen as what they are."""
    missed = 0
    with simulated_store() as store:
        for name in names or SEEN:
            outcome = find(store, mutated(name), range(SEEDS_MAX))
            seen = outcome is not None and outcome.violation in SEEN.get(name, (outcome.violation,))
            missed += not seen
            said = "nobody noticed" if outcome is None else f"seed {outcome.seed}: {outcome.detail[:200]}"
            print(f"{'seen  ' if seen else 'MISSED'}  {name}: {said}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
