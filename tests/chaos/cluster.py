"""The cluster of a chaos run: ``rocyard up`` with its own store, a proxy before that, and a second controller.

Says which processes there are; does nothing to them.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec
import psutil

from manager.children import Child, Command, tied
from manager.fleet import with_simulated_group
from manager.results import with_default_folder
from manager.settings import Secret
from manager.settings_load import load_settings
from manager.store.server import HOST, find_program
from manager.store.server import _free_port as free_server_port
from tests.chaos.proxy import Proxy
from tests.chaos.store_program import CUT, STARTS
from tests.integration.cluster import Cluster

WITNESS: Final = Path(__file__).parent / "witness"
FUNCTIONS: Final = ("work", "fail", "crash")
FLEET: Final = "3x2:mi300x"
DISK_BYTES: Final = 640 * 1024 * 1024
"""Of a small disk: more than half an hour's log of the store, or its large results."""
_ENDED: Final = re.compile(r"(\S+) ended \((exit status \d+)\); started again")
SETTINGS: Final = {
    # A run is a minute long: what production does in 12 s is done in 5. Not sooner, since the machine may be busy with others.
    "ROCYARD_NODE__BEAT_S": "1",
    "ROCYARD_NODE__LEASE_BEATS": "5",
    "ROCYARD_NODE__PROBE_S": "2",
    "ROCYARD_CONTROLLER__PERIOD_S": "1",
    "ROCYARD_CONTROLLER__TERM_S": "5",
    "ROCYARD_SLOTS__OPEN_DEADLINE_S": "8",
    "ROCYARD_AUTOSCALER__MODE": "active",
    "ROCYARD_AUTOSCALER__PERIOD_S": "2",
    "ROCYARD_AUTOSCALER__TERM_S": "6",
    "ROCYARD_AUTOSCALER__DOWN_WINDOW_S": "10",
}


class Unavailable(Exception):
    """This machine does not allow something; the message says what it needs."""


def build_synced(folder: Path) -> Path:
    """Compile the library that notes what the store has synced.

    Raises:
        Unavailable: there is no C compiler.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise Unavailable("needs gcc (on Debian: apt-get install gcc libc6-dev)")
    library = folder / "synced.so"
    source = Path(__file__).with_name("synced.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source), "-ldl", "-lpthread"], check=True
    )
    (folder / "synced").mkdir(exist_ok=True)
    return library


def install_program(folder: Path, port: int) -> Path:
    """A folder for PATH, with a ``redis-server`` that is `store_program`."""
    real = find_program().path
    binaries = folder / "bin"
    binaries.mkdir()
    script = binaries / "redis-server"
    words = (sys.executable, "-S", "-E", str(Path(__file__).with_name("store_program.py")), str(folder), real, str(port))
    script.write_text(f'#!/bin/sh\nexec {" ".join(f"{word!r}" for word in words)} "$@"\n')
    script.chmod(0o700)
    return binaries


def _version() -> str:
    """What the store's program is."""
    found = find_program()
    return f"{Path(found.path).name} {'.'.join(map(str, found.version))}"


class ChaosCluster(Cluster):
    """One cluster in `directory`, and what is around it.

    Attributes:
        program: of the store, with its version.
        skipped: faults that this machine does not allow, and why.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.skipped: dict[str, str] = {}
        self.program = _version()
        self.store_port = free_server_port(HOST)
        self.proxy_port = free_server_port(HOST)
        # Below those that the system gives to clients: one that calls a dead server would be given its port in the end.
        dask_port, dashboard_port, api_port = (free_server_port(HOST) for _ in range(3))
        binaries = install_program(directory, self.store_port)
        try:
            build_synced(directory)
        except Unavailable as error:
            self.skipped["power store"] = self.skipped["power machine"] = str(error)
        environ = {
            **SETTINGS,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "ROCYARD_STORE__PORT": str(self.proxy_port),
            "ROCYARD_DASK__PORT": str(dask_port),
            "ROCYARD_DASK__DASHBOARD_PORT": str(dashboard_port),
            "ROCYARD_API__PORT": str(api_port),
        }
        super().__init__(directory, environ, FLEET)
        self.tie = tied(())
        functions = {
            f"chaos-{name}": {"target": f"chaos_functions:{name}", "path": str(WITNESS), "memory": "1GiB"} for name in FUNCTIONS
        }
        (directory / "rocyard.yaml").write_text(json.dumps({"functions": functions}))
        self.proxy = Proxy(HOST, self.store_port)
        self.results = directory / "data" / "results"
        self.disks = {"store": directory / "data" / "store", "results": self.results}
        self._died: list[str] = []
        self._mounted: list[Path] = []
        self._second: Child | None = None

    @property
    def url(self) -> str:
        """Of the API."""
        return self.client.address.url

    @property
    def direct_store_url(self) -> str:
        """Past the proxy."""
        kept = json.loads((self.directory / "data" / "store.json").read_text())
        return f"redis://rocyard:{kept['password']}@{HOST}:{self.store_port}/0"

    async def begin(self) -> None:
        """Start everything."""
        for name, folder in self.disks.items():
            self._mount(name, folder)
        await self._up()
        self._second = Child(self._controller(), self.directory / "data" / "logs", self._note_second)
        await self._second.start()

    async def _up(self) -> None:
        """Start ``rocyard up``, and wait until tasks can run."""
        before = self._store_starts()
        starting = asyncio.create_task(asyncio.to_thread(self.start))
        # Not before the supervisor has looked whether the port is free; the store's start says that it has.
        while self._store_starts() == before and not starting.done():  # noqa: ASYNC110 -- a file tells nobody
            await asyncio.sleep(0.02)
        if not starting.done():
            await self.proxy.listen(self.proxy_port)
        await starting

    def _store_starts(self) -> int:
        starts = self.directory / STARTS
        return len(starts.read_bytes().splitlines()) if starts.exists() else 0

    async def crash(self) -> None:
        """Cut the power of the machine: all that ``rocyard up`` has started ends with it, and the store's log as it would."""
        assert self.process is not None
        (self.directory / CUT).touch()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def start_again(self) -> None:
        """Start what ended in a crash."""
        self._died += self._died_by_log()
        await self.proxy.deafen()
        await self._up()

    def _note_second(self, name: str, status: int) -> None:
        with self.output.open("a") as output:
            output.write(f"{name} ended ({f'exit status {status}' if status >= 0 else f'signal {-status}'}); started again\n")

    @property
    def died(self) -> tuple[str, ...]:
        """Processes that ended by themselves and were started again, as the supervisor says: those that no signal ended."""
        return (*self._died, *self._died_by_log())

    def _died_by_log(self) -> list[str]:
        return [f"{name} ended with {how}" for name, how in _ENDED.findall(self.output.read_text(errors="replace"))]

    async def end(self) -> None:
        """End everything."""
        if self._second is not None:
            await self._second.stop()
        if self.process is not None:
            family = self.family() if self.process.poll() is None else []
            # Its death ends everything below it; what came after all to be left behind is ended here.
            self.process.kill()
            self.process.wait()
            for survivor in (await asyncio.to_thread(psutil.wait_procs, family, 5))[1]:
                survivor.kill()
        await self.proxy.close()
        for folder in self._mounted:
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(folder)], check=False)

    def _mount(self, name: str, folder: Path) -> None:
        """A small disk of its own for a folder, where root may mount one."""
        folder.mkdir(mode=0o700, parents=True)
        argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
        try:
            done = subprocess.run(argv, check=False, capture_output=True).returncode == 0
        except OSError:
            done = False
        if done:
            self._mounted.append(folder)
        else:
            self.skipped[f"full {name}"] = "needs the right to mount a tmpfs (root)"

    def _controller(self) -> Command:
        """A second candidate for leader, as ``rocyard up`` would start it."""
        environ = {**self.environ, "ROCYARD_NODE__SIMULATE": FLEET, "ROCYARD_NODE__DEVICES": "simulated"}
        settings = with_simulated_group(with_default_folder(load_settings(None, environ, {})))
        store = msgspec.structs.replace(settings.store, url=Secret(self.store_url()))
        settings = msgspec.structs.replace(settings, store=store)
        argv = (sys.executable, "-m", "manager.cli.process", "controller")
        return Command("controller-2", argv, msgspec.json.encode(settings))

    # --- processes, by one look at the machine -------------------------------------------------------------------

    def look(self) -> "Processes":
        """All processes that there are now. Takes some milliseconds: not in an event loop."""
        assert self.process is not None
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        if self._second is not None and self._second.pid is not None:
            with contextlib.suppress(psutil.Error):
                family.append(psutil.Process(self._second.pid))
        found = Processes(family)
        for process in family:
            with contextlib.suppress(psutil.Error):
                found.add(process)
        return found


class Processes:
    """Processes by part. An agent comes with its node's name only where it is asked from its settings: so by its pid."""

    def __init__(self, everybody: list[psutil.Process]) -> None:
        self.everybody = everybody
        self.parts: dict[str, list[psutil.Process]] = {}

    def add(self, process: psutil.Process) -> None:
        line = process.cmdline()
        part = ""
        if process.name().startswith(("redis", "valkey")):
            part = "store"
        elif "manager.lifeline" in line:
            return  # is about to become another
        elif "manager.cli.process" in line:
            part = {"node": "agent"}.get(line[-1], line[-1])
        elif "plugins.worker_process" in line:
            part = "worker"
        elif any(word.endswith("executor.py") for word in line):
            parent = process.parent()
            # The guard is the agent's child, and the executor its: only that one runs tasks.
            if parent is not None and any(word.endswith("executor.py") for word in parent.cmdline()):
                part = "executor"
        if part:
            self.parts.setdefault(part, []).append(process)

    def of(self, part: str) -> list[psutil.Process]:
        return sorted(self.parts.get(part, []), key=lambda process: process.pid)
