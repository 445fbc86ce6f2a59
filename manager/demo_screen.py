"""The demo's report, and how it is shown: a progress bar or plain lines, then the tables."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from manager.core.quantities import format_memory
from manager.demo_scaling import ScalingReport

IMAGES: Final = 1797
"""In scikit-learn's set of digits."""
BAR_WIDTH: Final = 24


class DevicePeak(msgspec.Struct, frozen=True):
    """The most that was seen of one device during the run."""

    node: str
    index: int
    model: str
    usable_bytes: int
    leased_bytes: int
    used_bytes: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo found.

    Attributes:
        accuracy: on images that the network did not learn.
        correct: right predictions among all images.
        equal: predictions that are the same as in one process.
        elapsed_s: from the first submission of a classifying task to the last result.
        places: (node, device, tasks).
        scaling: of the second act, where there was one.
    """

    tasks: int
    images: int
    accuracy: float
    correct: int
    equal: int
    train_s: float
    elapsed_s: float
    tasks_per_s: float
    places: tuple[tuple[str, str, int], ...]
    peaks: tuple[DevicePeak, ...]
    scaling: ScalingReport | None = None


class _LiveBar:
    """A bar on a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("  "), BarColumn(40), MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class _Lines:
    """Now and then a line, where nobody watches."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._lock = threading.Lock()

    def __enter__(self) -> Callable[[], None]:
        return self._advance

    def __exit__(self, *_: object) -> None:
        pass

    def _advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._done % max(1, self._total // 4) == 0:
                self._console.print(f"  {self._done} of {self._total} tasks")


def progress_bar(console: Console | None, total: int) -> AbstractContextManager[Callable[[], None]]:
    """Something to enter and to call for each task that has ended; nothing is shown without a console."""
    if console is None:
        return nullcontext(lambda: None)
    return _LiveBar(console, total) if console.is_terminal else _Lines(console, total)


def show(report: Report, console: Console, *, held: bool) -> None:
    """Print the report."""
    console.print()
    verdict = (f"all {report.equal:,} predictions equal those of one process", "green")
    if not held:
        verdict = (f"only {report.equal:,} of {IMAGES:,} predictions equal those of one process", "bold red")
    right = f"{report.correct:,} of {report.images:,} digits read rightly ({report.correct / max(report.images, 1):.1%})"
    console.print(Text.assemble(right, "; ", verdict))
    rate = f"{report.tasks} tasks in {report.elapsed_s:.1f} s: {report.tasks_per_s:.1f} tasks per second"
    console.print(Text.assemble(rate, (", the opening of slots and import of torch included", "dim")))
    console.print()
    where = _table("WHERE THEY RAN", "DEVICE", "TASKS")
    for node, device, number in report.places:
        where.add_row(Text(node), Text(device), Text(str(number)))
    console.print(where)
    console.print()
    full = _table("HOW FULL", "", "LEASED", "USED", "OF")
    for peak in report.peaks:
        share = min(peak.leased_bytes / max(peak.usable_bytes, 1), 1.0)
        filled = round(share * BAR_WIDTH)
        full.add_row(
            Text(f"{peak.node}, device {peak.index}"),
            Text.assemble(("█" * filled, "blue"), ("·" * (BAR_WIDTH - filled), "dim")),
            *(Text(format_memory(size)) for size in (peak.leased_bytes, peak.used_bytes, peak.usable_bytes)),
        )
    console.print(full)
    console.print(Text("peaks seen while the tasks ran; used is read every few seconds", "dim"))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table
