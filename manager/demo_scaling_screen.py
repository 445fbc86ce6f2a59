"""The demo's second act as people see it: need, size and queue over time, live on a terminal, as lines where nobody watches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from manager.demo_scaling import Sample, ScalingReport

COLUMNS: Final = 60
LINE_S: Final = 5.0
_BARS: Final = " ▁▂▃▄▅▆▇█"


@contextmanager
def scaling_view(console: Console | None) -> Iterator[Callable[[Sample], None]]:
    """Something to give each look to; nothing is shown without a console."""
    if console is None:
        yield lambda _: None
    elif console.is_terminal:
        samples: list[Sample] = []
        with Live(Text(), console=console, refresh_per_second=2, transient=True) as live:

            def draw(sample: Sample) -> None:
                samples.append(sample)
                live.update(chart(samples))

            yield draw
    else:
        yield _Lines(console).show


class _Lines:
    """Now and then a line, and one for each change of the number of nodes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: Sample | None = None

    def show(self, sample: Sample) -> None:
        last = self._last
        if last is None or sample.live != last.live or sample.at_s - last.at_s >= LINE_S:
            self._last = sample
            need = "?" if sample.need is None else str(sample.need)
            self._console.print(
                f"  {sample.at_s:5.0f} s  need {need}, nodes {sample.live}, queued {sample.queued}, running {sample.running}"
            )


def chart(samples: Sequence[Sample]) -> Table:
    """Each number over time, one row each, drawn to its own height."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, show_edge=False)
    for name, values, style in (
        ("need", [sample.need for sample in samples], "yellow"),
        ("nodes", [sample.live for sample in samples], "green"),
        ("queued", [sample.queued for sample in samples], "blue"),
        ("running", [sample.running for sample in samples], "magenta"),
    ):
        known = [value for value in values if value is not None]
        now = "?" if values[-1] is None else str(values[-1])
        table.add_row(Text(name, "bold"), Text(_drawn(values), style), Text(f"{now} now, {max(known, default=0)} at most"))
    return table


def _drawn(values: Sequence[int | None]) -> str:
    """The values as bars in at most `COLUMNS` columns: each shows the most of its share of the time."""
    width = min(COLUMNS, len(values))
    shares = [values[len(values) * n // width : len(values) * (n + 1) // width] for n in range(width)]
    peaks = [max((value for value in share if value is not None), default=None) for share in shares]
    top = max((peak for peak in peaks if peak), default=1)
    return "".join("?" if peak is None else _BARS[-(-peak * (len(_BARS) - 1) // top)] for peak in peaks)


def show_scaling(report: ScalingReport, console: Console) -> None:
    """Print the report."""
    console.print(chart(report.samples))
    seconds = report.samples[-1].at_s if report.samples else 0.0
    console.print(Text(f"over {seconds:.0f} s", "dim"))
    console.print()
    nodes = f"nodes {report.nodes_before} → {report.nodes_most} → {report.nodes_after}"
    harm = "no task failed or ran twice" if report.failed == report.reruns == 0 else "tasks failed or ran twice"
    verdict = (f"{nodes}; {harm}", "green" if report.held else "bold red")
    rate = report.teraflops * 1000 / max(report.work_s, 1e-9)
    work = f"{report.tasks} tasks in {report.work_s:.0f} s, {report.teraflops:,.1f} TFLOP ({rate:,.0f} GFLOP/s)"
    console.print(Text.assemble(work, "; ", verdict))
    if report.failed or report.reruns:
        console.print(Text(f"{report.failed} failed, {report.reruns} ran more than once", "red"))
    if report.added:
        console.print(Text(f"added: {', '.join(report.added)}; 'rocyard autoscaler history' says why", "dim"))
