# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""Memory of each idle process, and time from `rocyard up` to the first finished task: ``python benchmarks/footprint.py``.

The cluster is started twice on the same folder: the second start must find its state and be as fast as the first. PSS
counts shared pages once, split among those who share them; where the kernel does not tell it, RSS stands alone.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import os
import tempfile
import time

import msgspec
import psutil

from manager.cli.own_cluster import own_cluster
from manager.client import Client
from manager.core.quantities import format_memory

IDLE_S = 6.0
"""Longer than any process needs to come to rest after its start."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """One process. `pss_bytes` is null where the kernel does not tell."""

    name: str
    pid: int
    rss_bytes: int
    pss_bytes: int | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    first_start_s: float
    second_start_s: float
    processes: list[Footprint]
    pss_bytes_total: int | None


def footprint_of(process: psutil.Process) -> Footprint:
    full = process.memory_full_info()
    return Footprint(name=name_of(process), pid=process.pid, rss_bytes=full.rss, pss_bytes=getattr(full, "pss", None))


def name_of(process: psutil.Process) -> str:
    """What the process is, from its command line."""
    words = [word for word in process.cmdline() if word]
    if "-m" in words:
        at = words.index("-m")
        if words[at + 1] == "manager.cli.process":
            return words[at + 2]
        if words[at + 1] == "manager.cli.main":
            return "supervisor"
        return words[at + 1]
    scripts = [Path(word).name for word in words[:4] if word.endswith(".py")]
    return scripts[0] if scripts else process.name()


def start(folder: Path, simulate: str) -> tuple[float, list[Footprint]]:
    """Seconds to the first finished task, and the processes once they idle."""
    began_s = time.monotonic()
    with own_cluster(os.environ, simulate=simulate, folder=folder) as cluster, Client(cluster.address) as client:
        client.submit("echo", {"x": 1}).result(60)
        first_s = time.monotonic() - began_s
        time.sleep(IDLE_S)
        root = psutil.Process(cluster.pid)
        return first_s, [footprint_of(process) for process in (root, *root.children(recursive=True))]


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--simulate", default="2x2:mi300x", help="the fleet")
    parser.add_argument("--json", action="store_true", help="one JSON object in the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rocyard-") as folder:
        first_s, processes = start(Path(folder), args.simulate)
        second_s, _ = start(Path(folder), args.simulate)
    known = [one.pss_bytes for one in processes if one.pss_bytes is not None]
    report = Report(
        first_start_s=first_s,
        second_start_s=second_s,
        processes=sorted(processes, key=lambda one: (one.name, one.pid)),
        pss_bytes_total=sum(known) if len(known) == len(processes) else None,
    )
    print(f"{'process':<28}{'RSS':>12}{'PSS':>12}")
    for one in report.processes:
        pss = "–" if one.pss_bytes is None else format_memory(one.pss_bytes)
        print(f"{one.name:<28}{format_memory(one.rss_bytes):>12}{pss:>12}")
    if report.pss_bytes_total is not None:
        print(f"{'all':<28}{'':>12}{format_memory(report.pss_bytes_total):>12}")
    print(f"\nfrom 'rocyard up' to the first finished task: {first_s:.1f} s; on a second start: {second_s:.1f} s")
    if args.json:
        print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
