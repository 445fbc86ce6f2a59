# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""What it costs that a 202 is on the disk: ``python benchmarks/durability.py``.

One cluster, one process of the API. Clients only POST single tasks, each over a connection of its own; all that wait at the
same moment share one sync of the disk (group commit: the store syncs once for all that it has read, before it answers any).
The store is told to sync always and every second in turns, `--rounds` times, so that a slow minute of the machine meets both.

Two loads: tasks that nothing can run, so that all of the time is the acceptance's; and tasks that run meanwhile, so that
acceptance shares the machine with execution, as it does in life. The load generator (benchmarks/load.py) is a process of
its own on the same cores.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import os
import statistics
from urllib.parse import urlsplit

import msgspec
import redis

from benchmarks import systems
from benchmarks.http import load, percentile_ms
from manager.cli.own_cluster import OwnCluster, own_cluster

WAITS = '{"function":"echo","args":{"x":1},"resources":{"memory":"100TiB"},"allow_infeasible":true}'
RUNS = '{"function":"echo","args":{"x":1}}'
LOADS = {"waits": WAITS, "runs": RUNS}
POLICIES = ("always", "everysec")
WARM_UP = 500


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `log_kb_per_task`: by how much the store's log has grown."""

    fsync: str
    load: str
    clients: int
    submits_per_s: float
    p50_ms: float
    p99_ms: float
    store_cpu_us: float
    api_cpu_us: float
    log_kb_per_task: float


def store_of(cluster: OwnCluster) -> redis.Redis:
    """The cluster's own store, by the passwords that lie in its folder."""
    kept = msgspec.json.decode((cluster.folder / "store.json").read_bytes())
    return redis.Redis(port=kept["port"], username="rocyard", password=kept["password"])


def system_of(cluster: OwnCluster) -> systems.System:
    url = urlsplit(cluster.address.url)
    assert url.hostname is not None
    assert url.port is not None
    headers = {"Authorization": f"Bearer {cluster.address.api_key.value}"}
    return systems.System(url.hostname, url.port, headers, (cluster.pid,))


def cpu_s(system: systems.System, role: str) -> float:
    """CPU time so far of the API's process, or of the store's."""
    for process in systems.processes_of(system):
        words = process.cmdline()
        if (role == "api" and words[-1:] == ["api"]) or (
            role == "store" and Path(words[0]).name.startswith(("redis", "valkey"))
        ):
            times = process.cpu_times()
            return float(times.user + times.system)
    raise LookupError(f"no process of the {role}")


def measure(store: redis.Redis, system: systems.System, fsync: str, name: str, clients: int, submits: int) -> Run:
    """One run."""
    store.config_set("appendfsync", fsync)
    body = LOADS[name]
    load(system, submits=min(WARM_UP, submits), concurrency=clients, body=body, drain=body is RUNS)
    before = (cpu_s(system, "store"), cpu_s(system, "api"), int(store.info("persistence")["aof_current_size"]))
    measured = load(system, submits=submits, concurrency=clients, body=body, drain=body is RUNS)
    after = (cpu_s(system, "store"), cpu_s(system, "api"), int(store.info("persistence")["aof_current_size"]))
    return Run(
        fsync=fsync,
        load=name,
        clients=clients,
        submits_per_s=submits / measured.submit_elapsed_s,
        p50_ms=percentile_ms(measured.posts_s, 50),
        p99_ms=percentile_ms(measured.posts_s, 99),
        store_cpu_us=(after[0] - before[0]) / submits * 1e6,
        api_cpu_us=(after[1] - before[1]) / submits * 1e6,
        log_kb_per_task=(after[2] - before[2]) / submits / 1024,
    )


def show(run: Run) -> None:
    print(
        f"{run.fsync:<10}{run.load:<7}{run.clients:>8}{run.submits_per_s:>12.0f}{run.p50_ms:>9.2f}{run.p99_ms:>9.2f}"
        f"{run.api_cpu_us:>9.0f}{run.store_cpu_us:>9.0f}{run.log_kb_per_task:>9.2f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--submits", type=int, default=5000, help="of each run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="connections that submit at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON array in the last line")
    args = parser.parse_args()
    variables = {"ROCYARD_AUTOSCALER__MODE": "off", "ROCYARD_TENANT__ACTIVE_TASKS_MAX": "10000000"}
    runs: list[Run] = []
    with own_cluster(os.environ, simulate="2x2:mi300x", variables=variables) as cluster:
        system, store = system_of(cluster), store_of(cluster)
        print(f"{'':<25}{'submits':>12}{'POST ms':>18}{'CPU µs per task':>18}{'log':>9}")
        print(
            f"{'fsync':<10}{'load':<7}{'clients':>8}{'/s':>12}{'p50':>9}{'p99':>9}{'API':>9}{'store':>9}{'KiB':>9}", flush=True
        )
        for _ in range(args.rounds):
            for name in LOADS:
                for clients in args.clients:
                    for fsync in POLICIES:
                        submits = args.submits if clients > 1 else max(1, args.submits // 5)
                        runs.append(measure(store, system, fsync, name, clients, submits))
                        show(runs[-1])
    print("\nmedians")
    for name in LOADS:
        for clients in args.clients:
            for fsync in POLICIES:
                same = [run for run in runs if (run.load, run.clients, run.fsync) == (name, clients, fsync)]
                middle = {
                    field: statistics.median(getattr(run, field) for run in same)
                    for field in Run.__struct_fields__
                    if field not in ("fsync", "load", "clients")
                }
                show(Run(fsync=fsync, load=name, clients=clients, **middle))
    if args.json:
        print(msgspec.json.encode(runs).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
