"""Faults to plant in the library, with the promises of which one must be seen to be broken.

python -m tests.sim.store_mutants          plants each, and says which seed saw what
"""

import sys
from typing import NamedTuple

from manager.store.schema import library_source


class Mutant(NamedTuple):
    """One change of the library's text, and what it may be caught by."""

    text: str
    replacement: str
    violations: frozenset[str]


def _mutant(text: str, replacement: str, *violations: str) -> Mutant:
    return Mutant(text, replacement, frozenset(violations))


MUTANTS = {
    "the attempt is not checked on an end": _mutant(
        "  if task.attempt ~= attempt then return '' end\n",
        "",
        "commit-by-current-attempt",
        "result-of-its-attempt",
    ),
    "the incarnation is not checked": _mutant(
        "if record[1] ~= 'OPEN' or record[2] ~= incarnation then return { 'FENCED', {}, {} } end",
        "if record[1] ~= 'OPEN' then return { 'FENCED', {}, {} } end",
        "zombie-refused",
        "stranger-refused",
    ),
    "the leader's token is not checked": _mutant(
        "return redis.call('HGET', p .. 'leader' .. (role and ':' .. role or ''), 'token') == token",
        "return true",
        "old-leader-refused",
    ),
    "an end is committed twice": _mutant(
        "if not task or task.state ~= 'RUNNING' or task.slot ~= slot then",
        "if not task or (task.state ~= 'SUCCEEDED' and (task.state ~= 'RUNNING' or task.slot ~= slot)) then",
        "one-commit",
        "counts",
        "quota",
    ),
    "a claim does not raise the attempt": _mutant(
        "local attempt = tonumber(task[3]) + 1",
        "local attempt = 1",
        "claim-raises-attempt",
    ),
    "a stale read is acted on": _mutant(
        "    if record[1] == 'REQUESTED' then close_slot(p, args[i], args[2], now) end",
        "    close_slot(p, args[i], args[2], now)",
        "claim-as-made",
        "claim-of-open-slot",
        "one-claim",
        "stranger-refused",
        "re-execution-explained",
        "drops-only-unopened",
    ),
    "queue index not updated with the record": _mutant(
        "  redis.call('ZADD', p .. 'q:' .. task.shape, task.score, id)\n",
        "",
        "one-place",
    ),
    "the quota's counter is not returned": _mutant(
        "  redis.call('HINCRBY', p .. 'tn:' .. task.tenant, 'active', -1)\n",
        "",
        "quota",
    ),
    "unstarted claims count": _mutant(
        "return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', why, now)",
        "return give_back(p, id, task, flag ~= 'preempt', why, now)",
        "blame-as-due",
    ),
    "retries have no cap": _mutant(
        "if outcome == 'N' or failures >= tonumber(task.max_attempts) then",
        "if outcome == 'N' then",
        "retries-have-a-cap",
    ),
    "the key is all that is looked at": _mutant(
        "  if body ~= digest then return { 'CONFLICT', 'key' } end\n",
        "",
        "one-key-one-request",
        "same-key-same-task",
    ),
    "a submission overwrites what exists": _mutant(
        "  if owner then\n    if owner ~= tenant",
        "  if owner and owner ~= tenant then\n    if owner ~= tenant",
        "attempt-as-claimed",
        "final-is-final",
        "one-place",
        "counts",
        "tenant-index",
        "quota",
    ),
}


def mutated(name: str) -> str:
    """The library with this fault.

    Raises:
        AssertionError: the text is not there exactly once: the library has changed, and this list must follow.
    """
    mutant = MUTANTS[name]
    source = library_source()
    assert source.count(mutant.text) == 1, f"the library has {source.count(mutant.text)} of: {mutant.text}"
    return source.replace(mutant.text, mutant.replacement)


def main() -> int:
    """Plant each in turn."""
    from tests.sim.store_server import simulated_store
    from tests.sim.store_world import find

    missed = 0
    with simulated_store() as store:
        for name in sys.argv[1:] or MUTANTS:
            outcome = find(store, mutated(name), range(40))
            seen = outcome is not None and outcome.violation in MUTANTS[name].violations
            missed += not seen
            said = "nobody noticed" if outcome is None else f"seed {outcome.seed}: {outcome.detail[:160]}"
            print(f"{'seen' if seen else 'MISSED'}  {name}: {said}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
