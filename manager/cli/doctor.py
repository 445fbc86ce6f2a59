"""`rocyard doctor`: asks all questions at once, each with a deadline, and shows what came of them."""

import functools
import logging
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from manager import doctor
from manager.cli.exits import Exit
from manager.cli.session import Session, command
from manager.core.errors import SettingsError
from manager.doctor import CLUSTER, DEVICES, MACHINE, STORE, Check, Report, Status

if TYPE_CHECKING:
    from rich.console import RenderableType

    from manager.cli.doctor_cluster import Target

QUICK_S: Final = 10.0
SLOW_S: Final = 60.0
"""For what loads torch or starts a driver in a process of its own."""

_SIGNS: Final[dict[Status, tuple[str, str]]] = {
    Status.OK: ("✓", "green"),
    Status.WARN: ("!", "yellow"),
    Status.FAIL: ("✗", "bold red"),
    Status.SKIP: ("–", "dim"),
}
assert _SIGNS.keys() == set(Status)


class Question(msgspec.Struct, frozen=True):
    """Something to look at. `ask` may block, raise, or never come back."""

    section: str
    name: str
    ask: Callable[[], Check | Iterable[Check]]
    deadline_s: float = QUICK_S


@command("doctor", client=True, settings=True)
def doctor_command(session: Session) -> int:
    """Look whether this machine and the cluster are as they must be, and say what to do where not.

    Looks at the cluster of this machine, or at the one that --url and the settings name. Changes nothing. Exits 8 if
    something fails.
    """
    from manager.log import configure_logging
    from manager.settings import LogSettings

    target = _target(session)
    configure_logging("doctor", LogSettings(level="error"))
    logging.disable(logging.CRITICAL)  # what goes wrong is told by the checks
    report = doctor.report_of(answers(questions(session, target)))
    session.emit(report, doctor_screen)
    return Exit.OK if report.healthy else Exit.UNHEALTHY


def _target(session: Session) -> "Target":
    """The cluster that is meant, as far as it is known."""
    from manager.cli.doctor_cluster import Target
    from manager.settings import Secret
    from manager.supervisor import running_pid

    settings = session.settings()
    folder = Path(settings.data_dir).expanduser().absolute()
    asked = session.options.url or session.environ.get("ROCYARD_URL") or ""
    try:
        address = session.address()
        url, key, ca = address.url, address.api_key, address.ca
    except SettingsError:
        url, key, ca = asked.rstrip("/"), Secret(), session.environ.get("ROCYARD_CA") or ""
    return Target(settings, running_pid(folder), folder, url, key, ca, asked=bool(asked))


def questions(session: Session, target: "Target") -> tuple[Question, ...]:
    """All that is looked at, in the order in which it is shown."""
    from manager.cli import doctor_cluster as cluster
    from manager.cli import doctor_machine as machine

    settings = target.settings
    local: tuple[Question, ...] = (
        Question(MACHINE, "packages", machine.packages),
        Question(MACHINE, "imports", machine.imports),
        Question(MACHINE, "store program", functools.partial(machine.store_program, settings)),
        Question(MACHINE, "ports", functools.partial(machine.listening, settings, target.supervisor)),
        Question(MACHINE, "data_dir", functools.partial(machine.data_dir, target.data_dir)),
        Question(MACHINE, "limits", machine.limits),
        Question(MACHINE, "certificates", functools.partial(machine.certificates, settings.tls.directory)),
    )
    devices: tuple[Question, ...] = (
        Question(DEVICES, "AMD driver", functools.partial(machine.amd_files, settings)),
        Question(DEVICES, "amdsmi", functools.partial(machine.amd_driver, session.environ), SLOW_S),
        Question(DEVICES, "NVIDIA driver", functools.partial(machine.nvidia_driver, session.environ), SLOW_S),
        Question(DEVICES, "torch", machine.torch, SLOW_S),
        Question(DEVICES, "visibility", functools.partial(machine.visibility, session.environ)),
        Question(DEVICES, "attribution", machine.attribution),
    )
    distant: tuple[Question, ...] = (
        Question(STORE, "reachable", functools.partial(cluster.store, target), SLOW_S),
        Question(CLUSTER, "API", functools.partial(cluster.api, target), SLOW_S),
        Question(CLUSTER, "scheduler", functools.partial(cluster.scheduler, target), SLOW_S),
    )
    return (*local, *devices, *distant)


def answers(asked: Sequence[Question]) -> list[Check]:
    """The answers to all questions, asked at once; what has none by its deadline says so.

    Each is asked in a thread that does not keep this process from ending: a disk or a driver may hold it for ever.
    """
    came: list[queue.SimpleQueue[tuple[Check, ...]]] = [queue.SimpleQueue() for _ in asked]
    began_s = time.monotonic()
    for question, box in zip(asked, came, strict=True):
        threading.Thread(target=_answer, args=(question, box), name=question.name, daemon=True).start()
    found: list[Check] = []
    for question, box in zip(asked, came, strict=True):
        left_s = question.deadline_s - (time.monotonic() - began_s)
        try:
            found += box.get(timeout=max(0.01, left_s))
        except queue.Empty:
            found.append(doctor.unanswered(question.section, question.name, question.deadline_s))
    return found


def _answer(question: Question, box: "queue.SimpleQueue[tuple[Check, ...]]") -> None:
    try:
        answer = question.ask()
        box.put((answer,) if isinstance(answer, Check) else tuple(answer))
    except subprocess.TimeoutExpired as error:
        box.put((doctor.unanswered(question.section, question.name, error.timeout),))
    except Exception as error:  # noqa: BLE001  the top of a thread: what was not foreseen is told, and the rest goes on
        told = f"could not be looked at: {type(error).__name__}: {error}"
        box.put((Check(question.section, question.name, Status.WARN, told[:300], "tell us: this is a fault of the doctor"),))


def doctor_screen(report: Report) -> "RenderableType":
    """The report as people read it: by section, and below each finding what to do about it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from manager.cli.text import plain

    parts: list[RenderableType] = []
    width = max(len(check.name) for check in report.checks)
    for section in dict.fromkeys(check.section for check in report.checks):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for check in (check for check in report.checks if check.section == section):
            sign, style = _SIGNS[check.status]
            quiet = "dim" if check.status is Status.SKIP else ""
            told = Text(plain(check.finding), quiet)
            if check.remedy:
                told.append(f"\n→ {plain(check.remedy)}", quiet or "cyan")
            table.add_row(Text(f"  {sign}", style), Text(check.name, quiet), told)
        parts += [Text(section, "bold"), table, Text()]
    parts.append(_verdict(report))
    return Group(*parts)


def _verdict(report: Report) -> "RenderableType":
    from rich.text import Text

    failed, warned = report.counts[Status.FAIL], report.counts[Status.WARN]
    if failed:
        return Text(f"{failed} failed, {warned} to be aware of", "bold red")
    if warned:
        return Text(f"nothing failed, {warned} to be aware of", "yellow")
    return Text(f"all is well: {report.counts[Status.OK]} checks", "green")
