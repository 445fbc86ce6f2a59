"""`rocyard top`: the cluster, live. A thread asks the API; this one draws and reads keys, so that neither has to wait."""

import contextlib
import math
import os
import select
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TextIO

import click
import msgspec

from manager.cli.exits import Exit
from manager.cli.session import Session, command

if TYPE_CHECKING:
    from manager.cli.screens_top import Look, Sample
    from manager.client import Client

KEY_WAIT_S: Final = 0.25
"""How long a key is waited for between two looks at whether there is something new to draw."""
LATE_S: Final = 3.0
"""An answer that is so much overdue is said to be missing."""
KEYS: Final = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x03": "q"}
"""What terminals send for keys that are no letters."""


class Poller:
    """Asks for the status again and again, in a thread of its own.

    Args:
        client: of the API.
        interval_s: between two questions.
        window_s: how long samples are kept.
    """

    def __init__(self, client: "Client", interval_s: float, window_s: float) -> None:
        self._client = client
        self._interval_s = interval_s
        self._window_s = window_s
        self._samples: deque[Sample] = deque()
        self._error = ""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="top", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the question that is being asked."""
        self._stop.set()

    def ask(self) -> None:
        """Ask once.

        Raises:
            RocyardError: no answer, or a refusal.
        """
        from manager.cli.screens_top import Sample

        sample = Sample(self._client.status(), time.monotonic())
        with self._lock:
            self._samples.append(sample)
            while len(self._samples) > 2 and sample.at_s - self._samples[1].at_s >= self._window_s:
                self._samples.popleft()
            self._error = ""

    def news(self) -> "tuple[tuple[Sample, ...], str]":
        """The samples, and why there is no newer one; empty where there is nothing to say."""
        with self._lock:
            samples, error = tuple(self._samples), self._error
        late_s = time.monotonic() - samples[-1].at_s - self._interval_s if samples else 0.0
        if error:
            return samples, f"{error} (as it was {late_s + self._interval_s:.0f} s ago)"
        return samples, f"no answer for {late_s:.0f} s" if late_s > LATE_S else ""

    def _run(self) -> None:
        from manager.core.errors import RocyardError

        while not self._stop.wait(self._interval_s):
            try:
                self.ask()
            except RocyardError as error:
                with self._lock:
                    self._error = str(error)


@command("top", client=True)
@click.option("--once", is_flag=True, help="Print one frame and end; so it is where the output is no terminal.")
@click.option("--interval", type=click.FloatRange(0.5, 60.0), default=2.0, help="Seconds between two looks; 2 if left out.")
def top(session: Session, *, once: bool, interval: float) -> int:
    """The cluster, live: tasks and rates, what waits, and how full every device is.

    Keys: q ends it, p pauses, s changes the order of nodes, the arrows scroll where not all fit.
    """
    from manager.cli.screens_top import RATE_WINDOW_S

    if math.isnan(interval):  # click's range lets it pass
        raise click.BadParameter("nan is no number of seconds, such as 2", param_hint="--interval")
    drawable = sys.stdout.isatty() and sys.stdin.isatty() and not session.console.is_dumb_terminal
    with session.client() as client:
        poller = Poller(client, interval, RATE_WINDOW_S)
        poller.ask()
        if once or session.wants_json or not drawable:
            _once(session, poller, client.address.url)
            return Exit.OK
        poller.start()
        try:
            _live(session, poller, client.address.url)
        finally:
            poller.stop()
    return Exit.OK


def _once(session: Session, poller: Poller, url: str) -> None:
    from rich.console import Group

    from manager.cli.screens_top import Look, frame, rates

    samples, _ = poller.news()
    # On a terminal the prompt needs a line; elsewhere nothing is cut.
    height = shutil.get_terminal_size().lines - 1 if sys.stdout.isatty() else None
    speed = rates(samples)
    session.emit(samples[-1].view, lambda view: Group(*frame(view, speed, Look(), url, session.console.width, height)))


def _live(session: Session, poller: Poller, url: str) -> None:
    from rich.console import Group
    from rich.live import Live

    from manager.cli.screens_top import Look, frame, rates

    look = Look(keys=True)
    frozen = poller.news()
    drawn: object = None
    with _raw(sys.stdin), Live(console=session.console, screen=True, auto_refresh=False) as live:
        while True:
            samples, trouble = frozen if look.paused else poller.news()
            if not look.paused:
                frozen = samples, trouble
            size = os.get_terminal_size(sys.stdout.fileno())
            shown = msgspec.structs.replace(look, trouble=trouble)
            now = (samples[-1].at_s, shown, size)
            if now != drawn:
                lines = frame(samples[-1].view, rates(samples), shown, url, size.columns, size.lines)
                live.update(Group(*lines), refresh=True)
                drawn = now
            for key in _keys(sys.stdin):
                if key == "q":
                    return
                look = pressed(key, look, len(samples[-1].view.workers))


def pressed(key: str, look: "Look", nodes: int) -> "Look":
    """What a key changes."""
    match key:
        case "p":
            return msgspec.structs.replace(look, paused=not look.paused)
        case "s":
            return msgspec.structs.replace(look, sort=look.sort.next(), first=0)
        case "up":
            return msgspec.structs.replace(look, first=max(0, look.first - 1))
        case "down":
            return msgspec.structs.replace(look, first=min(max(0, nodes - 1), look.first + 1))
        case _:
            return look


@contextlib.contextmanager
def _raw(stdin: TextIO) -> Iterator[None]:
    """Keys come one by one and are not shown; as it was before at the end."""
    import termios
    import tty

    before = termios.tcgetattr(stdin.fileno())
    tty.setcbreak(stdin.fileno())
    try:
        yield
    finally:
        termios.tcsetattr(stdin.fileno(), termios.TCSADRAIN, before)


def _keys(stdin: TextIO) -> list[str]:
    """The keys that were pressed, after a short wait for some. A terminal that has gone presses q."""
    ready, _, _ = select.select([stdin.fileno()], [], [], KEY_WAIT_S)
    if not ready:
        return []
    data = os.read(stdin.fileno(), 64)
    if not data:
        return ["q"]
    return split_keys(data)


def split_keys(data: bytes) -> list[str]:
    """Names of the keys in what a terminal has sent; what is unknown is left out."""
    keys: list[str] = []
    while data:
        code = next((code for code in KEYS if data.startswith(code)), None)
        if code is not None:
            keys.append(KEYS[code])
            data = data[len(code) :]
        else:
            if 0x20 <= data[0] < 0x7F:
                keys.append(chr(data[0]).lower())
            data = data[1:]
    return keys
