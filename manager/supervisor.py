"""``rocyard up``: a whole cluster on this machine, from one process that starts the others, restarts them and ends them.

It owns the order of starting and stopping and the files by which this machine's CLI finds the cluster. It makes no decision
about tasks. When it is killed, the kernel kills everything that it started; its next start recovers from the store.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import httpx
import msgspec

from manager import ports
from manager.children import Child, Command
from manager.core.errors import RocyardError, StartError, StoreFull, StoreReplaced, StoreTooNew, StoreUnavailable
from manager.core.lifecycle import REMOVED_EXIT
from manager.core.requests import KeyScope
from manager.fleet import Fleet, base_nodes, with_simulated_group
from manager.keys import create_key, parse_key, read_key, verify
from manager.log import configure_logging, get_logger
from manager.metrics import serve_metrics
from manager.results import open_results, with_default_folder
from manager.screen import Screen, Started
from manager.settings import Settings
from manager.store import Store
from manager.store.schema import Membership
from manager.store.server import EmbeddedStore, ServerSpec, damage_in
from manager.store.store import connect
from manager.tls import Role, api_url, client_context, dashboard_url, metrics_context, metrics_url, settings_for, tls_files

START_S: Final = 60.0
POLL_S: Final = 0.1
DRIVER_FILES: Final = ("/dev/kfd", "/dev/nvidiactl")
"""Where one of these is, there is a driver, and its devices are used."""
ADMIN_TENANT: Final = "default"
CLUSTER_FILE: Final = "cluster.json"

log = get_logger("rocyard.supervisor")


class Stopped(Exception):
    """The cluster was asked to stop while it was starting."""


class Supervisor:
    """One cluster on one machine.

    Args:
        settings: as read; ports of 0 are chosen here.
        screen: what people see.
    """

    def __init__(self, settings: Settings, screen: Screen) -> None:
        self.directory = Path(settings.data_dir).expanduser().absolute()
        self.settings = settings
        self.screen = screen
        self.children: list[Child] = []
        self.stopping = asyncio.Event()
        self.fleet: Fleet | None = None
        self._stop_metrics: Callable[[], None] = lambda: None
        self._silence = ""  # why the store has not answered

    async def run(self) -> int:
        """Start everything, supervise it until stopped, end everything."""
        began_s = time.monotonic()
        try:
            await self._start(began_s)
            await self.stopping.wait()
        except Stopped:
            pass
        finally:
            self.screen.stopping()
            await self._stop()
            self._stop_metrics()
        return 0

    async def _start(self, began_s: float) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for role in Role:
            if role is not Role.STORE:  # which may be another's; ours is looked at where it is started
                tls_files(self.settings.tls, role)
        self.settings = with_default_folder(self._with_groups(_with_ports(self.settings)))
        open_results(self.settings)  # what cannot work is said now, not by each agent in its log
        embedded = await self._start_store()
        url = settings_for(self.settings, Role.CONTROLLER).store.url.value
        known = known_cluster(self.directory)
        membership = Membership(self.settings.store.cluster or known, founder=True)
        store = connect(url, self.settings.store.deadline_s, "supervisor", membership=membership)
        try:
            await self._until(lambda: self._answers(store), "store")
            if membership.cluster != known:
                _write_private(self.directory / CLUSTER_FILE, {"cluster": membership.cluster, "embedded": embedded is not None})
            # A process that is started again beside a store that came back empty must not take it for its own.
            given = msgspec.structs.replace(self.settings.store, cluster=membership.cluster)
            self.settings = msgspec.structs.replace(self.settings, store=given)
            await store.migrate()
            await store.forget_functions()
            key = await self._first_key(store)
            await self._announce(store)
            nodes = self._nodes()
            self.fleet = Fleet(self.directory, self.settings, self._start_node, self.screen.fleet_changed)
            await self.fleet.serve()
            await asyncio.gather(
                *(self._launch(command) for command in self._commands()), *(self.fleet.begin_with(node) for node in nodes)
            )
            async with httpx.AsyncClient(timeout=2.0, verify=self._trusted(), trust_env=False) as client:
                await self._until(lambda: self._serves(len(nodes), store, client), "cluster")
        finally:
            await store.connection.close()
        self.screen.started(
            Started(
                settings=self.settings,
                store=f"{Path(embedded.program).name} {embedded.version}, port {embedded.port}" if embedded else "given",
                simulated=self._simulates(),
                nodes=tuple(settings.node.name for settings in nodes),
                processes=tuple((child.command.name, child.pid or 0) for child in self._everybody),
                admin_key=key,
                seconds=time.monotonic() - began_s,
                directory=str(self.directory),
            )
        )

    async def _start_store(self) -> ServerSpec | None:
        if self.settings.store.url.value:
            return None
        files = tls_files(self.settings.tls, Role.STORE)
        given = self.settings.store
        spec = EmbeddedStore(self.directory, given.port, host=given.host, tls=files).prepare()
        store = msgspec.structs.replace(self.settings.store, url=spec.url, worker_url=spec.worker_url)
        self.settings = msgspec.structs.replace(self.settings, store=store)
        await self._launch(Command("store", spec.argv, spec.stdin_text.value.encode(), stop_s=20.0))
        return spec

    async def _launch(self, command: Command) -> None:
        child = Child(command, self.directory / "logs", self.screen.restarted)
        self.children.append(child)
        await child.start()

    async def _start_node(self, settings: Settings, on_final: Callable[[str], None]) -> Child:
        role = self._role("node", settings.node.name, settings)
        # It may drain first: it is given that time, and then as long as any other process.
        command = msgspec.structs.replace(role, final=REMOVED_EXIT, stop_s=role.stop_s + settings.node.stop_drain_s)
        child = Child(command, self.directory / "logs", self.screen.restarted, on_final)
        await child.start()
        return child

    @property
    def _everybody(self) -> list[Child]:
        """All processes: the fleet has its own."""
        return [*self.children, *(self.fleet.children if self.fleet is not None else ())]

    async def _announce(self, store: Store) -> None:
        """Serve our metrics, and say where."""
        host = self.settings.controller.metrics_host
        secure = metrics_context(self.settings, Role.CONTROLLER, host)
        port, self._stop_metrics = serve_metrics(host, 0, secure)
        record = {"pid": os.getpid(), "metrics_url": metrics_url(host, port, secure)}
        with contextlib.suppress(StoreFull):  # work goes on, and only who leads it makes room
            await store.put_service("supervisor", msgspec.json.encode(record))

    def _trusted(self) -> ssl.SSLContext | bool:
        """What httpx is to believe the API."""
        files = tls_files(self.settings.tls, Role.CONTROLLER)
        return True if files is None else client_context(files.ca)

    async def _first_key(self, store: Store) -> str:
        """The admin key where this start made it, else empty. The machine's CLI keeps it in a file of its owner's."""
        path = self.directory / "client.json"
        key, shown = "", ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            key = json.loads(path.read_text())["api_key"]
        if not await _opens(store, key):
            key, _ = await create_key(store, ADMIN_TENANT, KeyScope.ADMIN)
            shown = key
        files = tls_files(self.settings.tls, Role.CLIENT)
        _write_private(path, {"url": api_url(self.settings), "api_key": key, "ca": "" if files is None else files.ca})
        return shown

    # --- which processes ----------------------------------------------------------------------------------------

    def _simulates(self) -> bool:
        node = self.settings.node
        driver = any(Path(file).exists() for file in DRIVER_FILES)
        return node.devices == "simulated" or (node.devices == "auto" and not driver)

    def _with_groups(self, settings: Settings) -> Settings:
        """`settings` with what the autoscaler may change on this machine: simulated nodes, never real ones."""
        if self._simulates():
            return with_simulated_group(settings)
        local = [name for name, group in settings.groups.items() if group.provider == "local"]
        if local:
            raise StartError(
                f"groups.{local[0]}: provider local adds simulated nodes, but this machine's own devices are used; set "
                "node.devices to simulated, or remove the group"
            )
        return settings

    def _nodes(self) -> list[Settings]:
        """The settings of each node agent: one per simulated node, or one for this machine's devices."""
        node = self.settings.node
        if not self._simulates():
            return [self._node_settings(node.name or socket.gethostname(), node.devices, 0)]
        return base_nodes(self.settings)

    def _node_settings(self, name: str, devices: str, number: int) -> Settings:
        node = msgspec.structs.replace(self.settings.node, name=name, devices=devices, simulated_node=number)
        return msgspec.structs.replace(self.settings, node=node)

    def _commands(self) -> list[Command]:
        """Everything but store and nodes. Each process is told its settings on stdin, so that no secret is in its arguments."""
        return [
            self._role("scheduler", "scheduler", self.settings),
            self._role("api", "api", self.settings),
            self._role("controller", "controller", self.settings),
            self._role("autoscaler", "autoscaler", self.settings),
        ]

    def _role(self, role: str, name: str, settings: Settings) -> Command:
        argv = (sys.executable, "-m", "manager.cli.process", role)
        return Command(name, argv, msgspec.json.encode(settings))

    # --- waiting ------------------------------------------------------------------------------------------------

    async def _until(self, ready: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for `ready`; says what went wrong with which process where it does not come.

        Raises:
            StartError: it did not become ready, with the end of the failing process's log.
            Stopped: the cluster was asked to stop.
        """
        deadline_s = time.monotonic() + START_S
        while True:
            if self.stopping.is_set():
                raise Stopped
            if await ready():
                return
            self._refuse_damage()
            failing = next((child for child in self._everybody if child.restarts >= 3), None)
            if failing is not None or time.monotonic() > deadline_s:
                child = failing or next(reversed(self.children), None)
                if child is None:  # the store is the first that is waited for, and it is not ours
                    raise StartError(f"the store of store.url did not answer in {START_S:.0f} s: {self._silence}")
                raise StartError(
                    f"the {what} did not start; {child.command.name} says (log: {child.log_path}):\n{child.tail()}"
                )
            self.screen.waiting(what, [child.command.name for child in self._everybody])
            await asyncio.sleep(POLL_S)

    def _refuse_damage(self) -> None:
        """Data that are damaged are so at each start.

        Raises:
            StartError: the store refuses its data.
        """
        for child in self.children:
            if child.command.name != "store" or not child.restarts:
                continue
            damage = damage_in(child.tail(lines=100))
            if damage is not None:
                folder = self.directory / "store"
                raise StartError(
                    f"the store's data are damaged, and it refuses to start with them: {damage}\n"
                    "Nothing is repaired by itself: what was accepted after the damaged place would be gone without a word. "
                    f"First copy {folder} to a safe place. Then either bring back the newest backup (move that folder away, "
                    "'rocyard restore FILE'), or give up what comes after the damage (redis-check-aof --fix on the .manifest "
                    "in its appendonlydir); see 'A damaged log' in docs/operations.md"
                )

    async def _answers(self, store: Store) -> bool:
        """Whether the store answers, and is ours.

        Raises:
            StartError: it is empty, or another cluster's.
            StoreTooNew: its data are newer than this code.
        """
        try:
            await store.ping()
        except StoreReplaced as error:
            found = error.details["found"]
            state = f"belongs to another cluster ({found})" if found else "is empty"
            raise StartError(
                f"the store {state}, but this folder belongs to cluster {error.details['cluster']}: restore the store from a "
                f"backup, or remove {self.directory / CLUSTER_FILE} to start afresh and give up what was in it"
            ) from error
        except StoreTooNew:
            raise
        except RocyardError as error:
            self._silence = str(error)
            return False
        return True

    async def _serves(self, nodes: int, store: Store, client: httpx.AsyncClient) -> bool:
        """Whether a task could run: API, leader, and every node with its Dask worker."""
        try:
            # The Dask scheduler too: a Dask worker beats before it has registered there.
            for url in (f"{api_url(self.settings)}/livez", f"{dashboard_url(self.settings)}/health"):
                if (await client.get(url)).status_code != 200:
                    return False
            state = await store.look(leader=False)
            _, _, _, leader = await store.lead("", 0, 0, "read")
        except (httpx.HTTPError, StoreUnavailable):
            return False
        names = {row.node for row in state.nodes if row.address and not row.fenced and not row.left}
        return bool(leader) and len(names) >= nodes and bool(await store.functions())

    async def _stop(self) -> None:
        """In an order in which nobody waits for somebody who is gone: work first, the store last."""
        self.stopping.set()
        if self.fleet is not None:
            await self.fleet.close()
        groups: list[list[Child]] = [[], [], [], []]
        order = {"controller": 1, "api": 1, "scheduler": 2, "store": 3}
        for child in self._everybody:
            groups[order.get(child.command.name, 0)].append(child)
        for group in groups:
            await asyncio.gather(*(child.stop() for child in group))


def _with_ports(settings: Settings) -> Settings:
    """Settings with every port known and free.

    Raises:
        StartError: a port is taken, naming its holder.
    """
    api, dask = settings.api, settings.dask
    chosen = {}
    for name, host, port in (
        ("api.port", api.host, api.port),
        ("dask.port", dask.host, dask.port),
        ("dask.dashboard_port", dask.host, dask.dashboard_port),
    ):
        if port and not ports.is_free(host, port):
            raise StartError(
                f"port {port} ({name}) is taken by {ports.holder(port)}: stop it, or set {name} to another port "
                f"(ROCYARD_{name.upper().replace('.', '__')}=0 takes any free one)"
            )
        chosen[name] = port or ports.free_port(host)
    return msgspec.structs.replace(
        settings,
        api=msgspec.structs.replace(api, port=chosen["api.port"]),
        dask=msgspec.structs.replace(dask, port=chosen["dask.port"], dashboard_port=chosen["dask.dashboard_port"]),
    )


async def _opens(store: Store, key: str) -> bool:
    """Whether the store has this key, unrevoked."""
    parts = parse_key(key)
    return parts is not None and verify(await read_key(store, parts[0]), parts[1])


def known_cluster(directory: Path) -> str:
    """The cluster that this folder belongs to, empty where it belongs to none yet."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((directory / CLUSTER_FILE).read_text())["cluster"])
    return ""


def _write_private(path: Path, content: dict[str, object]) -> None:
    """Replace a file that only its owner may read."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def running_pid(directory: Path) -> int | None:
    """The process id of the supervisor that runs on `directory`."""
    try:
        record = json.loads((directory / "rocyard.pid").read_text())
        started = _started(record["pid"])
    except (OSError, ValueError, KeyError):
        return None
    return int(record["pid"]) if started == record["started"] else None


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks: with it, a pid names a process for ever."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def _write_pid(directory: Path) -> Path:
    """Say that this process runs the cluster in `directory`.

    Raises:
        StartError: another one does.
    """
    pid = running_pid(directory)
    if pid is not None:
        raise StartError(f"a cluster runs on {directory} already (pid {pid}): use it, or stop it with 'rocyard down'")
    started = _started(os.getpid())
    path = directory / "rocyard.pid"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_private(path, {"pid": os.getpid(), "started": started})
    return path


async def _run(settings: Settings, screen: Screen) -> int:
    supervisor = Supervisor(settings, screen)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(name, supervisor.stopping.set)
    return await supervisor.run()


def run_up(settings: Settings, *, simulate: str | None) -> int:
    """``rocyard up``; `simulate` overrides the fleet, and asks for simulated devices.

    Raises:
        StartError: something cannot start, with the remedy.
    """
    if simulate is not None:
        node = msgspec.structs.replace(settings.node, simulate=simulate, devices="simulated")
        settings = msgspec.structs.replace(settings, node=node)
    directory = Path(settings.data_dir).expanduser().absolute()
    pid_path = _write_pid(directory)
    try:
        configure_logging("supervisor", msgspec.structs.replace(settings.log, level="error"))
        with Screen() as screen:
            return asyncio.run(_run(settings, screen))
    finally:
        pid_path.unlink(missing_ok=True)
