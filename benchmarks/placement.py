# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""How long one decision takes at scale: ``python benchmarks/placement.py [--nodes 1000] [--devices 8] [--policy NAME]``.

A cluster is filled to 90 % with a mix of requests of memory, and then tasks come and go in turns, at random, for so many
decisions. One decision is all that it takes to place one item: the request is noted (`DemandCounter`), the columns are brought
up to date with what has changed, a place is found and leased. The end of a slot is timed apart. Prints one line of JSON:
microseconds of CPU time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import json
import random
import time

from manager.core.devices import Device
from manager.core.index import Index
from manager.core.outlook import DemandCounter
from manager.core.placement import Policy, find
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from manager.policies import policy_named

DEVICE_GIB = 192
FILLED = 0.9
MIX = (
    *((Resources(gib * GIB, cpu_milli=4000), 8) for gib in (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)),
    *((Resources(gib * GIB, cpu_milli=8000, exclusive=True), 2) for gib in (100, 150)),
    *((Resources(180 * GIB, gpus, cpu_milli=8000 * gpus), 1) for gpus in (1, 2, 4, 8)),
)
"""Requests, and how often each comes."""


def fleet(nodes: int, devices: int) -> Index:
    """An empty cluster of like nodes."""
    index = Index()
    for number in range(nodes):
        name = f"n{number:05d}"
        cards = [Device(f"d{at}", at, "simulated", "mi300x", "gfx942", DEVICE_GIB * GIB, str(at)) for at in range(devices)]
        index.add_node(name, "i", cards, GIB, 4096, cpu_milli=96_000)
    return index


def percentile(sorted_us: list[float], part: float) -> float:
    """The value that so many are at most."""
    return round(sorted_us[min(len(sorted_us) - 1, int(part * len(sorted_us)))], 1)


def measure(nodes: int, devices: int, policy: Policy, decisions: int, seed: int = 1) -> dict[str, float]:
    """Microseconds of one decision, and of one end."""
    chance = random.Random(seed)
    index, counter = fleet(nodes, devices), DemandCounter()
    needs, weights = [need for need, _ in MIX], [weight for _, weight in MIX]
    capacity, taken = nodes * devices * DEVICE_GIB * GIB, 0
    running: list[str] = []
    placed_us: list[float] = []
    ended_us: list[float] = []
    decided_us: list[float] = []
    number = 0
    while len(decided_us) < decisions:
        number += 1
        need = chance.choices(needs, weights)[0]
        began = time.process_time_ns()
        counter.note(need)
        grant = find(need, index, policy, counter.demand)
        if grant is not None:
            index.lease(f"s{number}", grant)
        spent_us = (time.process_time_ns() - began) / 1000
        if grant is not None:
            running.append(f"s{number}")
            taken += need.memory_bytes * need.gpus
        is_full = taken >= FILLED * capacity or grant is None
        if is_full or decided_us:
            decided_us.append(spent_us)
            if grant is not None:
                placed_us.append(spent_us)
        while taken >= FILLED * capacity or (grant is None and running):
            at = chance.randrange(len(running))
            running[at], running[-1] = running[-1], running[at]
            began = time.process_time_ns()
            freed = index.free(running.pop())
            ended_us.append((time.process_time_ns() - began) / 1000)
            assert freed is not None
            taken -= freed.memory_bytes * len(freed.devices)
            grant = freed  # one end is enough for one that did not fit
    decided_us.sort()
    return {
        "decisions": len(decided_us),
        "placed": len(placed_us),
        "slots": len(running),
        "placed_per_cpu_s": round(len(placed_us) / (sum(decided_us) / 1e6), 1),
        "p50_us": percentile(decided_us, 0.5),
        "p99_us": percentile(decided_us, 0.99),
        "p999_us": percentile(decided_us, 0.999),
        "longest_us": round(decided_us[-1], 1),
        "end_us": round(sum(ended_us) / max(1, len(ended_us)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=8, help="of each node")
    parser.add_argument("--decisions", type=int, default=20_000)
    parser.add_argument("--policy", default="fragmentation", help="as the setting placement.policy")
    options = parser.parse_args()
    figures = measure(options.nodes, options.devices, policy_named(options.policy), options.decisions)
    print(json.dumps({"policy": options.policy, "nodes": options.nodes, "devices": options.devices, **figures}))


if __name__ == "__main__":
    main()
