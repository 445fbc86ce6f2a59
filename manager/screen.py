"""What ``rocyard up`` shows: progress while starting, then one page of what runs where and what to try next."""

import shutil
import sys
import time
from pathlib import Path
from typing import Self

import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from manager.settings import Settings
from manager.tls import Role, api_url, dashboard_url, tls_files


class Started(msgspec.Struct, frozen=True):
    """A cluster that runs. `admin_key` is empty unless this start made it; `processes` are (name, pid)."""

    settings: Settings
    store: str
    simulated: bool
    nodes: tuple[str, ...]
    processes: tuple[tuple[str, int], ...]
    admin_key: str
    seconds: float
    directory: str


class Screen:
    """The terminal, or a plain stream of lines where there is none."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._status: Status | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._status = self.console.status("starting Rocyard …", spinner="dots")
            self._status.start()
        else:
            self.console.print("starting Rocyard …")
        return self

    def __exit__(self, *_: object) -> None:
        self._end_status()

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def waiting(self, what: str, processes: list[str]) -> None:
        """Say what is being waited for."""
        if self._status is not None:
            self._status.update(f"starting Rocyard: waiting for the {what} ({', '.join(processes)})")

    def restarted(self, name: str, status: int) -> None:
        """A process has ended and was started again."""
        how = f"exit status {status}" if status >= 0 else f"signal {-status}"
        self.console.print(f"{time.strftime('%H:%M:%S')}  {name} ended ({how}); started again", style="yellow")

    def fleet_changed(self, what: str) -> None:
        """A node was added or removed while the cluster runs."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {what}", style="dim")

    def stopping(self) -> None:
        """The cluster ends."""
        self._end_status()
        self.console.print("stopping … (accepted tasks are kept)", style="dim")

    def started(self, started: Started) -> None:
        """The page that people read."""
        self._end_status()
        settings = started.settings
        api, dashboard = api_url(settings), dashboard_url(settings)
        devices = f"simulated fleet {settings.node.simulate}" if started.simulated else "this machine's devices"
        self.console.print()
        self.console.print(Text.assemble(("Rocyard is up", "bold green"), f"  in {started.seconds:.1f} s · {devices}"))
        self.console.print()
        self.console.print(
            _grid(
                [
                    ("API", api),
                    ("API docs", f"{api}/docs"),
                    ("Dask dashboard", f"{dashboard}/status"),
                    ("devices, queue", f"{dashboard}/rocyard"),
                    ("metrics", f"{api}/metrics  {dashboard}/metrics"),
                ]
            )
        )
        self.console.print()
        roles = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
        for title in ("process", "pid", "what it does"):
            roles.add_column(title)
        for name, pid in started.processes:
            roles.add_row(name, str(pid), _role(name, started))
        self.console.print(roles)
        self.console.print()
        if started.admin_key:
            body = Text.assemble((started.admin_key, "bold"), "\nshown once; this machine's CLI reads it from client.json")
            self.console.print(Panel.fit(body, title="admin key", title_align="left", border_style="yellow"))
            self.console.print()
        self.console.print("try next", style="bold")
        self.console.print(f"{_command()} submit --memory 24GiB --wait echo '{{\"x\": 1}}'")
        if started.admin_key:
            self.console.print(f"export ROCYARD_API_KEY={started.admin_key}")
        self.console.print(
            f"curl -s {_trusting(settings)}{api}/v1/tasks -H 'Content-Type: application/json' \\\n"
            '  -H "Authorization: Bearer $ROCYARD_API_KEY" \\\n'
            '  -d \'{"function": "echo", "args": {"x": 1}}\''
        )
        self.console.print()
        self.console.print(f"state and logs: {started.directory} · Ctrl-C stops everything", style="dim")


def _command() -> str:
    """How this machine's user calls ``rocyard``: by name where it is on PATH, else by the shortest path that works."""
    script = Path(sys.executable).with_name("rocyard")
    if shutil.which("rocyard") or not script.exists():
        return "rocyard"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def _trusting(settings: Settings) -> str:
    """What curl must be told to believe the API."""
    files = tls_files(settings.tls, Role.CLIENT)
    return "" if files is None else f"--cacert {files.ca} "


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    for name, value in rows:
        grid.add_row(Text(name, style="dim"), Text(value, style="cyan"))
    return grid


def _autoscaler(settings: Settings) -> str:
    bounds = ", ".join(f"{name} {group.workers_min} to {group.workers_max}" for name, group in settings.groups.items())
    mode = "" if settings.autoscaler.mode == "active" else f" ({settings.autoscaler.mode})"
    return f"adds and removes nodes{mode}: {bounds}" if bounds else f"idle{mode}: no groups in the settings"


def _role(name: str, started: Started) -> str:
    settings = started.settings
    match name:
        case "store":
            return f"tasks and slots on disk: {started.store}"
        case "scheduler":
            return f"Dask scheduler and placement, {settings.dask.host}:{settings.dask.port}"
        case "controller":
            return "decides how many slots of which shape"
        case "autoscaler":
            return _autoscaler(settings)
        case "api":
            return f"REST, {settings.api.host}:{settings.api.port}"
        case _:
            return "node agent, its Dask worker and executors"
