# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""Pods that come, wait, run for their own life spans and go, under each policy:
``python benchmarks/churn.py --nodes FILE --pods FILE [--loads 0.7,0.9,1.1] [--seeds 42-44] [--policies NAME,NAME]``.

The scheduler plugin's own ledger (`plugins.ledger`) holds, places and keeps room, in the trace's time. In full the trace fills
one hundredth of the cluster, so each seed draws nodes until the work offered is the given part of what they can hold. Memory
alone counts: a pod asks for its share of a card's, and all cards have the same, since the trace does not say what a pod would
ask of a larger one. Counted from when the first hundredth of the pods has come, until the trace ends; a pod that still waits
then has waited until then.

One line of JSON for each run, then a table of means over the seeds. The files are those of `benchmarks/openb.py`, the pods with
creation_time and deletion_time, in seconds.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import csv
import heapq
import json
import random
import statistics
from collections.abc import Sequence

import msgspec

from benchmarks.openb import Node, read_nodes, seeds_of
from manager.core.devices import Device
from manager.core.gpu_tasks import direct_shape
from manager.core.lifecycle import SlotKind
from manager.core.placement import Policy
from manager.core.policies import POLICIES
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from manager.policies import policy_named
from plugins.ledger import Ledger, SlotRequest
from plugins.node.link import Report

CARD_BYTES = 32 * GIB


class Pod(msgspec.Struct, frozen=True):
    """One pod: when it comes, for how long it runs, and what it asks for."""

    came_s: int
    life_s: int
    resources: Resources

    @property
    def bytes(self) -> int:
        return self.resources.memory_bytes * self.resources.gpus

    @property
    def is_large(self) -> bool:
        """Whether it asks for a whole card or more."""
        return self.resources.memory_bytes >= CARD_BYTES


class Result(msgspec.Struct, frozen=True):
    """What one run gave. Times in seconds; `allocated` is of the memory of all cards, on average over time."""

    policy: str
    load: float
    seed: int
    gpus: int
    pods: int
    delay_mean_s: float
    delay_p95_s: float
    large_mean_s: float
    large_worst_s: float
    waiting_at_end: int
    allocated: float


def read_pods(path: Path) -> list[Pod]:
    """Pods that ask for GPUs, in the order in which they come."""
    pods = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            gpus, came_s = int(row["num_gpu"]), int(row["creation_time"])
            if gpus:
                resources = Resources(int(row["gpu_milli"]) * CARD_BYTES // 1000, gpus)
                # As the plugin sees it: memory in classes.
                pods.append(Pod(came_s, max(1, int(row["deletion_time"]) - came_s), direct_shape(resources).resources))
    return sorted(pods, key=lambda pod: pod.came_s)


def drawn(nodes: Sequence[Node], pods: Sequence[Pod], load: float, seed: int) -> list[Node]:
    """Nodes at random until the pods ask for `load` of their memory on average; one that can hold the largest pod first."""
    since_s, until_s = window(pods)
    offered = sum(pod.bytes * max(0, min(until_s, pod.came_s + pod.life_s) - max(since_s, pod.came_s)) for pod in pods)
    wanted = offered / (until_s - since_s) / load
    order = list(nodes)
    random.Random(seed).shuffle(order)
    gpus = max(pod.resources.gpus for pod in pods)
    order.insert(0, order.pop(next(at for at, node in enumerate(order) if node.gpus >= gpus)))
    chosen: list[Node] = []
    for node in order:
        if not chosen or node.gpus * CARD_BYTES <= wanted:
            chosen.append(node)
            wanted -= node.gpus * CARD_BYTES
    return chosen


def window(pods: Sequence[Pod]) -> tuple[int, int]:
    """From when to when is counted."""
    return pods[len(pods) // 100].came_s, max(pod.came_s + pod.life_s for pod in pods)


def ledger_of(nodes: Sequence[Node], policy: Policy) -> Ledger:
    book = Ledger(policy)
    for node in nodes:
        devices = tuple(
            Device(f"gpu-{at}", at, "simulated", node.model, node.model, CARD_BYTES, str(at)) for at in range(node.gpus)
        )
        book.register(Report(node.name, "i", 1, devices, 0, (), slots_max=10_000), 0.0)
    return book


def simulate(nodes: Sequence[Node], pods: Sequence[Pod], policy: Policy, load: float, seed: int) -> Result:
    """One run over all pods."""
    chosen = drawn(nodes, pods, load, seed)
    book = ledger_of(chosen, policy)
    since_s, until_s = window(pods)
    capacity = sum(node.gpus * CARD_BYTES for node in chosen)
    ends: list[tuple[int, int]] = []
    waits: dict[int, int] = {}
    running_bytes = at = 0
    before_s, byte_s = since_s, 0
    while True:
        now_s = min(pods[at].came_s if at < len(pods) else until_s, ends[0][0] if ends else until_s, until_s)
        byte_s += running_bytes * max(0, now_s - before_s)
        before_s = max(since_s, now_s)
        if now_s >= until_s:
            break
        while ends and ends[0][0] <= now_s:
            _, number = heapq.heappop(ends)
            book.ended(str(number), float(now_s))
            running_bytes -= pods[number].bytes
        while at < len(pods) and pods[at].came_s <= now_s:
            shape = direct_shape(pods[at].resources)
            book.ask(SlotRequest(str(at), shape, "", (0, at), SlotKind.DIRECT), float(now_s))
            at += 1
        for assignment in book.decide(float(now_s)):
            number = int(assignment.slot_id)
            waits[number] = now_s - pods[number].came_s
            running_bytes += pods[number].bytes
            heapq.heappush(ends, (now_s + pods[number].life_s, number))
    waiting = [int(slot) for slot in book.requests if slot in book.held]
    waits |= {number: until_s - pods[number].came_s for number in waiting}
    counted = {number: wait for number, wait in waits.items() if pods[number].came_s >= since_s}
    delays = sorted(counted.values())
    large = [wait for number, wait in counted.items() if pods[number].is_large]
    return Result(
        policy.name,
        load,
        seed,
        sum(node.gpus for node in chosen),
        len(delays),
        round(statistics.fmean(delays), 1),
        float(delays[int(0.95 * len(delays))]),
        round(statistics.fmean(large or [0]), 1),
        float(max(large, default=0)),
        len(waiting),
        round(byte_s / (until_s - since_s) / capacity, 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=Path, required=True, help="CSV of the nodes")
    parser.add_argument("--pods", type=Path, required=True, help="CSV of the pods")
    parser.add_argument("--loads", default="0.7,0.9,1.1", help="work offered, of what the nodes can hold")
    parser.add_argument("--seeds", default="42-44", help="FIRST-LAST: which nodes are drawn")
    parser.add_argument("--policies", default=",".join(POLICIES), help="as the setting placement.policy")
    options = parser.parse_args()
    nodes, pods = read_nodes(options.nodes), read_pods(options.pods)
    table: list[list[Result]] = []
    for load in map(float, options.loads.split(",")):
        for policy in map(policy_named, options.policies.split(",")):
            table.append([])
            for seed in seeds_of(options.seeds):
                table[-1].append(simulate(nodes, pods, policy, load, seed))
                print(json.dumps(msgspec.structs.asdict(table[-1][-1])), flush=True)
    print("| load | policy | delay mean s | delay p95 s | large, mean s | large, worst s | allocated % |")
    print("|---|---|---|---|---|---|---|")
    for runs in table:
        mean = {
            name: statistics.fmean(getattr(run, name) for run in runs)
            for name in ("delay_mean_s", "delay_p95_s", "large_mean_s", "allocated")
        }
        print(
            f"| {runs[0].load} | {runs[0].policy} | {mean['delay_mean_s']:,.0f} | {mean['delay_p95_s']:,.0f} "
            f"| {mean['large_mean_s']:,.0f} | {max(run.large_worst_s for run in runs):,.0f} | {100 * mean['allocated']:.1f} |"
        )


if __name__ == "__main__":
    main()
