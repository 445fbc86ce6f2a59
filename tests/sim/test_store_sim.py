"""The simulation of the store and of all who use it: forty histories of bad luck, and whether they would show a fault.

A failure prints the command that lives through its history again.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager import controller
from manager.store.schema import library_source
from tests.sim.store_mutants import SEEN, mutated
from tests.sim.store_server import SimStore, simulated_library, simulated_store
from tests.sim.store_world import Outcome, World, find, live, replay

SEEDS = 40
KNOWN = Path(__file__).with_name("seeds.txt")
SLOW = ("attempt not checked on finish", "crash blamed on infrastructure loss", "not marked idle with the empty claim")
"""Faults that show late; `python -m tests.sim.store_mutants` looks for these as well."""
QUICK = tuple(name for name in SEEN if name not in SLOW)


def known_seeds() -> list[int]:
    """Seeds that have failed before."""
    lines = (line.partition("#")[0].strip() for line in KNOWN.read_text().splitlines())
    return [int(line) for line in lines if line]


def wanted_seeds() -> list[int]:
    """Those that are asked for (SEED=17, SEEDS=2000), else the known ones and the first forty."""
    if one := os.environ.get("SEED"):
        return [int(one)]
    return list(dict.fromkeys([*known_seeds(), *range(int(os.environ.get("SEEDS") or SEEDS))]))


@pytest.fixture(scope="module")
def store() -> Iterator[SimStore]:
    with simulated_store() as made:
        yield made


def told(outcome: Outcome) -> str:
    """What a person needs who has not seen it."""
    return f"{outcome.detail}\n  again: {replay(outcome.seed)}\n  the last calls:\n    " + "\n    ".join(outcome.history[-12:])


def test_every_history_keeps_the_promises_and_comes_to_its_end(store: SimStore) -> None:
    figures = None
    for seed in wanted_seeds():
        outcome = live(store, seed)
        assert not outcome.violation, told(outcome)
        figures = outcome.figures if figures is None else figures + outcome.figures
    assert figures is not None
    print("\n" + " ".join(f"{name}={count}" for name, count in sorted(figures.items())))


def test_one_seed_is_one_history(store: SimStore) -> None:
    first = live(store, 4)
    random.seed()
    assert live(store, 4).history == first.history


def test_the_clock_of_the_library_is_the_simulations(store: SimStore) -> None:
    store.load(simulated_library(library_source()))
    reply, _ = store.run(1_234_567_890_123, ("FCALL", "ry_state", 1, "{ry}:", "0"))
    assert reply[0] == 1_234_567_890_123


def test_a_leader_that_does_not_reach_dask_gives_way(store: SimStore) -> None:
    outcome = live(store, 1, plot=World.run_with_a_leader_without_dask)
    assert not outcome.violation, told(outcome)
    assert outcome.figures["accepted"] > 0
    assert outcome.figures["terms"] > 1


def test_it_would_be_seen_if_it_did_not(store: SimStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "GIVE_WAY_S", 1e9)
    outcome = live(store, 1, plot=World.run_with_a_leader_without_dask)
    assert outcome.violation == "all-drains", told(outcome)


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_fault_is_seen_and_named(store: SimStore, name: str) -> None:
    outcome = find(store, mutated(name), range(8))
    assert outcome is not None, f"nobody noticed: {name}"
    assert outcome.violation in SEEN[name], told(outcome)
