# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""End-to-end rate over HTTP, side by side with FastAPI + Celery + Redis: ``python benchmarks/http.py``.

Each system is started afresh for each of its runs, alone, and the runs are interleaved. A run has four parts, all with the
same load generator (benchmarks/load.py), which is a process of its own and not counted:

1. warm-up: a few hundred tasks;
2. loaded: `--concurrency` clients, each POSTs one no-op task and GETs it with `wait`, round after round; gives the rate,
   the round trip under load, and CPU time of all processes of the system per task;
3. quiet: one client does the same; gives the round trip (`p50_ms`, `p99_ms`);
4. submit: the clients only POST; gives submissions per second.

Rocyard runs with authentication and fsync always. Celery runs with Redis' default fsync (every second) and with fsync
always, each with two ways of waiting for a result; its best run counts. Of Rocyard's runs the median one counts.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import msgspec

from benchmarks import systems
from benchmarks.load import Measured, Plan

WARM_UP = 300
QUIET = 1000
BODY = '{"function":"echo","args":{"x":1}}'

System = systems.System
Start = Callable[[], AbstractContextManager[System]]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one system. Round trips in milliseconds; `loaded_` under load, else with one client."""

    name: str
    end_to_end_per_s: float
    submits_per_s: float
    p50_ms: float
    p99_ms: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    cpu_us_per_task: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints."""

    end_to_end_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_task: float
    celery_end_to_end_per_s: float | None
    ratio: float | None
    submits_per_s: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    tasks: int
    concurrency: int
    cpus: int | None
    python: str
    runs: list[Run]


def load(
    system: System, *, tasks: int = 0, submits: int = 0, concurrency: int = 1, body: str = BODY, drain: bool = True
) -> Measured:
    """Run the load generator against `system`."""
    plan = Plan(
        host=system.host,
        port=system.port,
        path="/v1/tasks",
        headers=system.headers,
        body=body,
        tasks=tasks,
        submits=submits,
        concurrency=concurrency,
        drain=drain,
    )
    program = [sys.executable, "-P", str(Path(__file__).with_name("load.py"))]
    done = subprocess.run(program, input=msgspec.json.encode(plan), stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=Measured)


def measure(name: str, start: Start, tasks: int, concurrency: int) -> Run:
    """One run."""
    with start() as system:
        load(system, tasks=WARM_UP, concurrency=concurrency)
        before_s = systems.cpu_s(system)
        loaded = load(system, tasks=tasks, concurrency=concurrency)
        cpu_s = systems.cpu_s(system) - before_s
        quiet = load(system, tasks=min(QUIET, tasks))
        submitted = load(system, submits=tasks, concurrency=concurrency)
    return Run(
        name=name,
        end_to_end_per_s=tasks / loaded.elapsed_s,
        submits_per_s=tasks / submitted.submit_elapsed_s,
        p50_ms=percentile_ms(quiet.round_trips_s, 50),
        p99_ms=percentile_ms(quiet.round_trips_s, 99),
        loaded_p50_ms=percentile_ms(loaded.round_trips_s, 50),
        loaded_p99_ms=percentile_ms(loaded.round_trips_s, 99),
        cpu_us_per_task=cpu_s / tasks * 1e6,
    )


def percentile_ms(seconds: list[float], percent: int) -> float:
    """That percentile, in milliseconds."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000


def show(run: Run) -> None:
    print(
        f"{run.name:<30}{run.end_to_end_per_s:>9.0f}{run.submits_per_s:>10.0f}{run.p50_ms:>9.2f}{run.p99_ms:>8.2f}"
        f"{run.loaded_p50_ms:>10.2f}{run.loaded_p99_ms:>8.2f}{run.cpu_us_per_task:>9.0f}",
        flush=True,
    )


def report_of(ours: list[Run], theirs: list[Run], tasks: int, concurrency: int) -> Report:
    """Our median run against their best one."""
    run = sorted(ours, key=lambda one: one.end_to_end_per_s)[(len(ours) - 1) // 2]
    best = max((one.end_to_end_per_s for one in theirs), default=None)
    return Report(
        end_to_end_per_s=run.end_to_end_per_s,
        p50_ms=run.p50_ms,
        p99_ms=run.p99_ms,
        cpu_us_per_task=run.cpu_us_per_task,
        celery_end_to_end_per_s=best,
        ratio=None if best is None else run.end_to_end_per_s / best,
        submits_per_s=run.submits_per_s,
        loaded_p50_ms=run.loaded_p50_ms,
        loaded_p99_ms=run.loaded_p99_ms,
        tasks=tasks,
        concurrency=concurrency,
        cpus=os.cpu_count(),
        python=platform.python_version(),
        runs=[*ours, *theirs],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5000, help="tasks of each of Rocyard's runs")
    parser.add_argument("--celery-tasks", type=int, default=2000, help="of each of Celery's, which is slower")
    parser.add_argument("--concurrency", type=int, default=16, help="clients, each with one task at a time")
    parser.add_argument("--rounds", type=int, default=3, help="how often Rocyard runs, with Celery in between")
    parser.add_argument("--simulate", default="2x2:mi300x", help="Rocyard's fleet")
    parser.add_argument("--only", choices=("rocyard", "celery"), help="leave the other out")
    parser.add_argument("--json", action="store_true", help="one JSON object in the last line")
    return parser.parse_args()


def main() -> int:
    args = parse()
    missing = systems.missing_for_celery()
    if missing and args.only != "rocyard":
        print(f"for the peer, {', '.join(missing)} must be installed (make bench); or: --only rocyard", file=sys.stderr)
        return 2
    ours: list[tuple[str, Start]] = [("Rocyard, fsync always", partial(systems.rocyard, args.simulate))] * args.rounds
    theirs: list[tuple[str, Start]] = [
        (f"Celery, fsync {fsync}, {wait}", partial(systems.celery, fsync, wait))
        for fsync in ("everysec", "always")
        for wait in ("result", "listener")
    ]
    if args.only == "rocyard":
        theirs = []
    if args.only == "celery":
        ours = []
    print(f"{'':<30}{'end to':>9}{'submits':>10}{'round trip ms':>17}{'under load ms':>18}{'CPU µs':>9}")
    print(f"{'':<30}{'end /s':>9}{'/s':>10}{'p50':>9}{'p99':>8}{'p50':>10}{'p99':>8}{'/task':>9}", flush=True)
    runs: dict[str, list[Run]] = {"ours": [], "theirs": []}
    # Interleaved, so that a machine that slows down or speeds up does so for both.
    share = -(-len(theirs) // max(len(ours), 1))
    while ours or theirs:
        for kind, waiting, count, tasks in (("ours", ours, 1, args.tasks), ("theirs", theirs, share, args.celery_tasks)):
            for _ in range(min(count, len(waiting))):
                name, start = waiting.pop(0)
                runs[kind].append(measure(name, start, tasks, args.concurrency))
                show(runs[kind][-1])
    if not runs["ours"]:
        return 0
    report = report_of(runs["ours"], runs["theirs"], args.tasks, args.concurrency)
    if report.ratio is not None:
        print(f"\nRocyard's median run has {report.ratio:.1f} times the rate of Celery's best one")
    if args.json:
        print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
