"""A verdict in words: the table for a terminal, and a page for people with the same figures."""

from pathlib import Path
from typing import Final

import msgspec

from tests.chaos.checker import SHOWN_MAX, Verdict
from tests.chaos.history import Fault, Run

_WORDS: Final = {
    "attempted": "tasks that clients tried to submit",
    "acknowledged": "accepted, to a client's knowledge",
    "refused": "refused",
    "unknown": "no client knows what became of them",
    "recovered": "of those, accepted after all",
    "lost": "acknowledged, and not in the store",
    "unfinished": "not ended when everything had healed",
    "duplicated": "accepted or ended twice, or with the result of a replaced attempt",
    "wrong": "ended otherwise than they must, or than somebody was told",
    "unexplained": "ran again without a fault of their own agent, executor or store",
    "unexpected": "in the store, and submitted by nobody",
    "inconsistent": "counters and indexes of the store that do not add up",
    "died": "processes that ended by themselves, and not because their disk was full",
}


_HOW_COUNTED: Final = (
    "Tasks that ran again count under the fault that explains them: the one on their own agent or executor, else on the store. "
    "Seconds are from the fault until the interrupted task ran again, often with another fault under way and no free slot; the "
    "lease is 5 s here, so that a run heals within itself. With default settings and one fault at a time: "
    "`benchmarks/recovery.py`."
)


def _figure(value: object) -> int:
    return value if isinstance(value, int) else len(value)  # type: ignore[arg-type]  # else it is a tuple


def table(verdict: Verdict) -> str:
    """For a terminal."""
    lines = [f"{name:<13}{_figure(getattr(verdict, name)):>8}  {words}" for name, words in _WORDS.items()]
    reruns = ", ".join(f"{kind} {count}" for kind, count in verdict.explained.items()) or "none"
    faults = ", ".join(f"{kind} {count}" for kind, count in verdict.faults.items()) or "none"
    lines += [
        f"ends          {', '.join(f'{state} {count}' for state, count in verdict.ends.items())}",
        f"starts        {verdict.starts}, of which {verdict.reruns} again: {reruns}",
        f"faults        {sum(verdict.faults.values())}: {faults}",
        f"calls         {verdict.calls}, of which {verdict.unknown_calls} without a useful answer; {verdict.replays} replays",
    ]
    if verdict.recovery:
        lines.append("recovery      from the fault until the interrupted task ran again: n, p50, p95, max in s")
        lines += [
            f"  {kind:<20}{found.count:>4}{found.p50_s:>8}{found.p95_s:>8}{found.max_s:>8}"
            for kind, found in verdict.recovery.items()
        ]
    for name, found in verdict.problems.items():
        lines += [f"{name}:", *(f"  {one}" for one in found[:SHOWN_MAX])]
        if len(found) > SHOWN_MAX:
            lines.append(f"  … and {len(found) - SHOWN_MAX} more")
    lines.append("verdict       " + ("FAILED: " + ", ".join(verdict.problems) if verdict.problems else "the promise holds"))
    return "\n".join(lines)


def page(run: Run, verdict: Verdict, faults: list[Fault]) -> str:
    """For people who read it later."""
    how = (
        f"`make chaos SEED={run.seed} SECONDS={run.seconds:g}`, on {run.cpus} CPUs, with {run.program} as the store. "
        f"{run.ended - run.began:.0f} s from the start of the load until the last task had ended; no fault in the last "
        f"{run.heal_s:g} s of the load."
    )
    lines = [
        "# Chaos report",
        "",
        how,
        "",
        "**" + ("FAILED: " + ", ".join(verdict.problems) if verdict.problems else "The promise holds.") + "**",
        "",
        "| | tasks | |",
        "|---|---|---|",
        *(f"| {name} | {_figure(getattr(verdict, name)):,} | {words} |" for name, words in _WORDS.items()),
        "",
        f"{verdict.calls:,} calls of clients, of which {verdict.unknown_calls:,} had no answer that says what was done; "
        f"{verdict.replays:,} answers were replays of an earlier one. "
        f"Tasks started {verdict.starts:,} times, {verdict.reruns:,} of them again. Ends: "
        + ", ".join(f"{state} {count:,}" for state, count in verdict.ends.items())
        + ".",
        "",
        "## Faults",
        "",
        _HOW_COUNTED,
        "",
        "| fault | injected | tasks run again | p50 s | p95 s | max s |",
        "|---|---|---|---|---|---|",
        *(_row(kind, count, verdict) for kind, count in verdict.faults.items()),
        f"| own failure | | {verdict.explained.get('own failure', 0):,} | | | |",
        "",
    ]
    if run.skipped:
        lines += [
            "Not possible on this machine: " + "; ".join(f"{kind} ({why})" for kind, why in run.skipped.items()) + ".",
            "",
        ]
    for name, found in verdict.problems.items():
        lines += [f"## {name}", "", *(f"- {one}" for one in found), ""]
    lines += ["## All faults", "", "| s | fault | |", "|---|---|---|"]
    lines += [f"| {fault.at - run.began:.1f} | {fault.kind} | {fault.detail} |" for fault in sorted(faults, key=lambda f: f.at)]
    return "\n".join(lines) + "\n"


def _row(kind: str, count: int, verdict: Verdict) -> str:
    found = verdict.recovery.get(kind)
    seconds = f"{found.p50_s} | {found.p95_s} | {found.max_s}" if found else "| |"
    return f"| {kind} | {count} | {verdict.explained.get(kind, 0):,} | {seconds} |"


def write(folder: Path, run: Run, verdict: Verdict, faults: list[Fault]) -> None:
    """Both reports into `folder`."""
    both = {"run": run, "verdict": verdict, "faults": faults}
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(both), indent=1))
    (folder / "report.md").write_text(page(run, verdict, faults))
