# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""The cold path: from submission to result where no slot is open for the shape: ``python benchmarks/cold.py``.

Each task asks for another class of memory, so that each is the first of its shape: the controller asks for a slot, the
scheduler places it, an agent opens it, an executor starts and runs the task. A second task of the same shape, right after,
gives the warm path beside it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from manager.cli.own_cluster import own_cluster
from manager.client import Client
from manager.core.quantities import MIB

STEP_BYTES = 256 * MIB
"""Classes of memory are this far apart up to 8 GiB, which makes 32 of them."""
RESULT_S = 120.0


class Kind(msgspec.Struct, frozen=True):
    """A kind of task."""

    name: str
    function: str
    args: Mapping[str, Any]
    gpus: int
    runs: int


class Cold(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind took, in milliseconds."""

    name: str
    runs: int
    p50_ms: float
    p90_ms: float
    warm_p50_ms: float


KINDS = (
    Kind("no-op, 1 device", "echo", {"x": 1}, 1, 20),
    Kind("no-op, 2 devices of a node", "echo", {"x": 1}, 2, 20),
    Kind("import torch, 1 device", "matmul", {"size": 16}, 1, 5),
)


def timed_ms(client: Client, kind: Kind, memory_bytes: int) -> float:
    began_s = time.perf_counter()
    client.submit(kind.function, kind.args, memory=memory_bytes, gpus=kind.gpus).result(RESULT_S)
    return (time.perf_counter() - began_s) * 1000


def measure(client: Client, kind: Kind, first: int) -> Cold:
    """One kind; `first` is its first class of memory."""
    cold, warm = [], []
    for number in range(first, first + kind.runs):
        memory_bytes = number * STEP_BYTES
        cold.append(timed_ms(client, kind, memory_bytes))
        warm.append(timed_ms(client, kind, memory_bytes))
    deciles = statistics.quantiles(cold, n=10, method="inclusive")
    return Cold(name=kind.name, runs=kind.runs, p50_ms=deciles[4], p90_ms=deciles[8], warm_p50_ms=statistics.median(warm))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--simulate", default="2x2:mi300x", help="the fleet")
    parser.add_argument("--json", action="store_true", help="one JSON object in the last line")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if kind.function != "matmul" or importlib.util.find_spec("torch")]
    found: list[Cold] = []
    print(f"{'':<30}{'cold p50 ms':>12}{'p90 ms':>10}{'warm p50 ms':>14}")
    fixed = {"ROCYARD_AUTOSCALER__MODE": "off"}  # how fast nodes are added is not what is measured
    with own_cluster(os.environ, simulate=args.simulate, variables=fixed) as cluster, Client(cluster.address) as client:
        for kind in kinds:
            # The torch tasks' classes lie above those of the no-ops of as many devices.
            one = measure(client, kind, 25 if kind.function == "matmul" else 1)
            found.append(one)
            print(f"{one.name:<30}{one.p50_ms:>12.0f}{one.p90_ms:>10.0f}{one.warm_p50_ms:>14.1f}", flush=True)
    if args.json:
        print(msgspec.json.encode({"cold": found, "cpus": os.cpu_count()}).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
