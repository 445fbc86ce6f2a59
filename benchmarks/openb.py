# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""Replays a trace of pods against a cluster, on the protocol of "Beware of Fragmentation" (USENIX ATC'23):
``python benchmarks/openb.py --nodes FILE --pods FILE --seeds 42-51 --policy NAME [--demand known|learned]``.

All pods in an order that the seed shuffles, then pods drawn with replacement, until they ask for 130 % of the cluster's GPUs.
None ever leaves, and one that fits nowhere is dropped. Each is placed by the same `find` over the same `Index` as in the
scheduler plugin, and only that is timed. Then books of the benchmark's own go through the same once more: no placement may be
more than what they say is free, and each pod that was dropped is tried on every node (`voluntary_rejections`: of those that
would have fit). One line of JSON per seed.

The files are those of the trace "openb" (Alibaba's cluster-trace-gpu-v2023), which comes with terms of its own: nodes with
sn, cpu_milli, memory_mib, gpu, model; pods with name, cpu_milli, memory_mib, num_gpu, gpu_milli and perhaps gpu_spec.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import csv
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from manager.core.devices import Device
from manager.core.index import Index
from manager.core.outlook import DemandCounter
from manager.core.placement import Demand, Policy, find
from manager.core.quantities import GIB, MIB
from manager.core.selectors import device_model_of
from manager.core.shapes import Grant, Resources
from manager.policies import policy_named

ARRIVED_MAX = 1.3
"""Of the cluster's GPUs: what all pods together ask for."""


class Node(msgspec.Struct, frozen=True):
    """One node of the trace."""

    name: str
    cpu_milli: int
    host_memory_bytes: int
    gpus: int
    model: str


class Result(msgspec.Struct, frozen=True):
    """What one seed gave."""

    policy: str
    demand: str
    seed: int
    allocated_at_100: float
    allocated_at_130: float
    voluntary_rejections: int
    placed: int
    dropped: int
    placed_per_cpu_s: float


def read_nodes(path: Path) -> list[Node]:
    """The nodes, in the file's order, which is that of their names."""
    with path.open(newline="") as file:
        return [
            Node(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]) * MIB, int(row["gpu"]), row["model"].lower())
            for row in csv.DictReader(file)
        ]


def read_pods(path: Path) -> list[Resources]:
    """What each pod asks for. The trace knows shares of a GPU and nothing of its memory."""
    with path.open(newline="") as file:
        return [
            Resources(
                memory_bytes=0,
                gpus=int(row["num_gpu"]),
                share_milli=int(row["gpu_milli"]) if int(row["num_gpu"]) else 0,
                device_model=device_model_of(row.get("gpu_spec") or ""),
                cpu_milli=int(row["cpu_milli"]),
                host_memory_bytes=int(row["memory_mib"]) * MIB,
            )
            for row in csv.DictReader(file)
        ]


def index_of_nodes(nodes: Iterable[Node]) -> Index:
    """The empty cluster."""
    index = Index()
    for node in nodes:
        devices = [Device(f"gpu-{at}", at, "simulated", node.model, node.model, 32 * GIB, str(at)) for at in range(node.gpus)]
        index.add_node(
            node.name, "i", devices, 0, sys.maxsize, cpu_milli=node.cpu_milli, host_memory_bytes=node.host_memory_bytes
        )
        index.mark(node.name, reachable=True)
    return index


def asked(pod: Resources) -> int:
    """Of GPUs, in thousandths."""
    return pod.gpus * pod.share_milli


def arrivals(pods: Sequence[Resources], capacity: int, seed: int) -> list[Resources]:
    """The pods in the order in which they come."""
    chance = random.Random(seed)
    order = list(pods)
    chance.shuffle(order)
    total = sum(map(asked, order))
    while total < ARRIVED_MAX * capacity:
        order.append(chance.choice(pods))
        total += asked(order[-1])
    return order


class Books:
    """What is free by the benchmark's own count, which shares nothing with the product's."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.models = {node.name: node.model for node in nodes}
        self.hosts = {node.name: [node.cpu_milli, node.host_memory_bytes] for node in nodes}
        self.gpus = {node.name: {f"gpu-{number}": 1000 for number in range(node.gpus)} for node in nodes}

    def enter(self, pod: Resources, grant: Grant) -> None:
        """It runs there. Asserts that there was room."""
        assert len(set(grant.devices)) == pod.gpus
        assert self.may(pod, grant.node)
        host, gpus = self.hosts[grant.node], self.gpus[grant.node]
        host[0] -= pod.cpu_milli
        host[1] -= pod.host_memory_bytes
        assert min(host) >= 0
        for device in grant.devices:
            gpus[device] -= pod.share_milli
            assert gpus[device] >= 0

    def may(self, pod: Resources, node: str) -> bool:
        """Whether the pod may be on this node at all."""
        return not pod.device_model or self.models[node] in pod.device_model.split("|")

    def fits(self, pod: Resources) -> bool:
        """Whether it would fit anywhere."""
        return any(
            cpu >= pod.cpu_milli
            and memory >= pod.host_memory_bytes
            and self.may(pod, node)
            and sum(free >= pod.share_milli for free in self.gpus[node].values()) >= pod.gpus
            for node, (cpu, memory) in self.hosts.items()
        )


def decisions(
    index: Index, pods: Sequence[Resources], policy: Policy, known: Demand | None
) -> tuple[list[Grant | None], float]:
    """What each pod is given, in the order in which they come, and the seconds of CPU that it took; None: learn the mix."""
    counter = DemandCounter()
    grants: list[Grant | None] = []
    began = time.process_time()
    for number, pod in enumerate(pods):
        if known is None:
            counter.note(pod)
        grant = find(pod, index, policy, known or counter.demand)
        if grant is not None:
            index.lease(str(number), grant)
        grants.append(grant)
    return grants, time.process_time() - began


def replay(nodes: Sequence[Node], pods: Sequence[Resources], seed: int, policy: Policy, demand: str = "known") -> Result:
    """One run, and then the same in the books."""
    known = Demand(Counter(pods).items()) if demand == "known" else None
    capacity = sum(node.gpus for node in nodes) * 1000
    coming = arrivals(pods, capacity, seed)
    grants, spent_s = decisions(index_of_nodes(nodes), coming, policy, known)
    books = Books(nodes)
    came = allocated = rejected = 0
    at_100: int | None = None
    for pod, grant in zip(coming, grants, strict=True):
        came += asked(pod)
        if grant is None:
            rejected += books.fits(pod)
        else:
            books.enter(pod, grant)
            allocated += asked(pod)
        if at_100 is None and came >= capacity:
            at_100 = allocated
    assert at_100 is not None
    placed = sum(grant is not None for grant in grants)
    return Result(
        policy.name,
        demand,
        seed,
        round(100 * at_100 / capacity, 3),
        round(100 * allocated / capacity, 3),
        rejected,
        placed,
        len(grants) - placed,
        round(placed / spent_s, 1),
    )


def seeds_of(text: str) -> range:
    """``FIRST-LAST``, or one."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=Path, required=True, help="CSV of the nodes")
    parser.add_argument("--pods", type=Path, required=True, help="CSV of the pods")
    parser.add_argument("--seeds", default="42-51", help="FIRST-LAST")
    parser.add_argument("--policy", default="fragmentation", help="as the setting placement.policy")
    parser.add_argument("--demand", choices=("known", "learned"), default="known", help="whether the mix of pods is known")
    options = parser.parse_args()
    nodes, pods, policy = read_nodes(options.nodes), read_pods(options.pods), policy_named(options.policy)
    for seed in seeds_of(options.seeds):
        print(json.dumps(msgspec.structs.asdict(replay(nodes, pods, seed, policy, options.demand))), flush=True)


if __name__ == "__main__":
    main()
