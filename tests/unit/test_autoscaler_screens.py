"""What people see of the autoscaler: its history, and the demo's second act."""

import datetime as dt
import io

import msgspec
import pytest
from rich.console import Console, RenderableType

from manager.cli.screens_autoscaler import history_screen
from manager.core.answers_autoscaler import DecisionView, ScalingAction, ScalingGroup
from manager.demo_scaling import Sample, ScalingReport
from manager.demo_scaling_screen import COLUMNS, chart, scaling_view, show_scaling

NOW = dt.datetime(2026, 1, 1, 12, 0, 30, tzinfo=dt.UTC)
GROUP = ScalingGroup(group="big", need=4, size=2, target=4, reason="NeedAboveSize")
DECISION = DecisionView(
    id="1-0",
    at=NOW - dt.timedelta(seconds=30),
    mode="active",
    metrics="",
    groups=(GROUP,),
    actions=(ScalingAction("add", "big", ("big-2", "big-3"), "NeedAboveSize", "done"),),
)


def text(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_decision_says_what_was_seen_done_and_why() -> None:
    line = text(history_screen([DECISION], NOW)).splitlines()[1]
    for part in ("30s ago", "big", "NeedAboveSize", "add big-2, big-3"):
        assert part in line


def test_what_is_not_known_and_what_went_wrong_are_told() -> None:
    group = msgspec.structs.replace(GROUP, need=None, reason="MetricsUnknown")
    failed = ScalingAction("add", "big", tuple(f"big-{n}" for n in range(9)), "NeedAboveSize", "ProviderRefused: quota")
    decision = msgspec.structs.replace(
        DECISION, groups=(group,), metrics="no controller leads", actions=(failed,), infeasible={"TooFewDevices": 3}
    )
    shown = text(history_screen([decision], NOW))
    for part in ("–", "no controller leads", "3 infeasible: TooFewDevices", "big-3 …", "ProviderRefused: quota"):
        assert part in shown


def test_in_eighty_columns_words_are_broken_and_nothing_is_lost() -> None:
    decision = msgspec.structs.replace(DECISION, infeasible={"ExceedsLargestDevice": 3, "TooFewDevices": 12})
    console = Console(file=io.StringIO(), width=80)
    console.print(history_screen([decision], NOW))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for word in "30s ago NeedAboveSize; 12 infeasible: TooFewDevices add big-2, big-3".split():  # noqa: SIM905
        assert word in shown


def test_without_decisions_it_says_why() -> None:
    assert "no decisions yet" in text(history_screen([]))


SAMPLES = tuple(Sample(float(n), None if n == 3 else n % 5, 2, 2 + n // 100, n, 4) for n in range(200))
REPORT = ScalingReport(
    group="simulated",
    tasks=40,
    failed=0,
    work_s=80.0,
    teraflops=8.0,
    nodes_before=2,
    nodes_most=4,
    nodes_after=2,
    added=("simulated-0",),
    removed=("simulated-0",),
    reruns=0,
    samples=SAMPLES,
)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"failed": 1}, False),
        ({"reruns": 1}, False),
        ({"nodes_most": 2}, False),
        ({"nodes_after": 3}, False),
    ],
)
def test_the_second_act_holds_if_nodes_came_and_went_without_harm(changes: dict[str, int], held: bool) -> None:
    assert msgspec.structs.replace(REPORT, **changes).held is held


def test_numbers_over_time_are_drawn_within_their_columns() -> None:
    lines = text(chart(SAMPLES)).splitlines()
    assert [line.split()[0] for line in lines] == ["need", "nodes", "queued", "running"]
    assert "199 now, 199 at most" in lines[2]
    assert all(sum(mark in "▁▂▃▄▅▆▇█?" for mark in line.split(" now")[0]) <= COLUMNS for line in lines)
    assert text(chart(SAMPLES[3:4])).splitlines()[0].split()[1] == "?"


def test_where_nobody_watches_changes_are_told_as_lines() -> None:
    console = Console(file=io.StringIO(), width=200)
    with scaling_view(console) as look:
        for sample in (
            Sample(0.0, 1, 2, 2, 5, 4),
            Sample(1.0, 1, 2, 2, 5, 4),
            Sample(2.0, 4, 4, 3, 5, 4),
            Sample(9.0, 4, 4, 3, 0, 0),
        ):
            look(sample)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(shown) == 3
    assert "need 4, nodes 3" in shown[1]


def test_the_report_names_nodes_and_work() -> None:
    console = Console(file=io.StringIO(), width=200)
    show_scaling(REPORT, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("40 tasks in 80 s", "8.0 TFLOP", "nodes 2 → 4 → 2", "simulated-0"):
        assert part in shown
