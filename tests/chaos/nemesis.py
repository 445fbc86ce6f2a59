"""Does the planned faults to a cluster, writes each down with whom it met, and takes them back."""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Final

import psutil

from tests.chaos.cluster import ChaosCluster, Processes
from tests.chaos.history import Fault, Writer, now
from tests.chaos.plan import Planned
from tests.chaos.store_program import CUT
from tests.chaos.witnesses import Watch

SLOW_S: Final = 0.15
FILLER: Final = "filler"


class Nemesis:
    """The faults of one run.

    Attributes:
        under_way: what is going on now, for people.
        done: how many were injected.
    """

    def __init__(self, cluster: ChaosCluster, watch: Watch, faults: Writer) -> None:
        self.cluster = cluster
        self.watch = watch
        self.faults = faults
        self.under_way: dict[int, str] = {}
        self.done = 0

    async def run(self, planned: tuple[Planned, ...], began: float) -> None:
        """All of them, each at its time."""
        async with asyncio.TaskGroup() as group:
            for one in planned:
                await asyncio.sleep(max(0.0, began + one.at_s - now()))
                if f"{one.what} {one.whom}" not in self.cluster.skipped:
                    group.create_task(self._do(one))

    async def _do(self, one: Planned) -> None:
        processes = await asyncio.to_thread(self.cluster.look)
        self.under_way[one.number] = f"{one.what} {one.whom}"
        try:
            match one.what:
                case "kill" | "freeze":
                    await self._signal(one, processes)
                case "power" if one.whom == "machine":
                    await self._crash(one, processes)
                case "power":
                    await self._cut_power(one, processes)
                case "full":
                    await self._fill(one, processes)
                case _:
                    await self._disturb(one, processes)
        finally:
            del self.under_way[one.number]

    def _tell(self, one: Planned, at: float, pids: tuple[int, ...], detail: str = "") -> None:
        self.done += 1
        self.faults.write(Fault(number=one.number, what=one.what, whom=one.whom, pids=pids, at=at, until=now(), detail=detail))

    # --- processes ----------------------------------------------------------------------------------------------

    async def _signal(self, one: Planned, processes: Processes) -> None:
        victims = self._victims(one, processes)
        if not victims:
            return  # it is just being started again, after another fault
        at = now()
        if one.what == "kill":
            for victim in victims:
                _send(victim, signal.SIGKILL)
            self._tell(one, at, _pids(victims))
            return
        async with self._frozen(victims):
            await asyncio.sleep(one.for_s)
        self._tell(one, at, _pids(victims), f"{one.for_s:.1f} s")

    @contextlib.asynccontextmanager
    async def _frozen(self, victims: list[psutil.Process]) -> AsyncIterator[None]:
        for victim in victims:
            _send(victim, signal.SIGSTOP)
        try:
            yield
        finally:
            for victim in victims:
                _send(victim, signal.SIGCONT)

    def _victims(self, one: Planned, processes: Processes) -> list[psutil.Process]:
        """Whom it is done to: of a node its agent first, then all below it."""
        part = {"leader": "controller", "node": "agent"}.get(one.whom, one.whom)
        there = processes.of(part)
        if one.whom == "leader":
            there = [process for process in there if process.pid == self.watch.leader_pid]
        if part in {"executor", "agent"}:
            # Rather one that has something to lose.
            busy = self.watch.busy()
            there = [process for process in there if process.pid in busy or process.pid in busy.values()] or there
        if not there:
            return []
        victim = there[int(one.choice * len(there))]
        if one.whom != "node":
            return [victim]
        with contextlib.suppress(psutil.Error):
            return [victim, *victim.children(recursive=True)]
        return []

    # --- the store ----------------------------------------------------------------------------------------------

    async def _cut_power(self, one: Planned, processes: Processes) -> None:
        """What was not synced goes with the process, before the next one starts (`store_program`)."""
        at = now()
        (self.cluster.directory / CUT).touch()
        for victim in processes.of("store"):
            _send(victim, signal.SIGKILL)
        self._tell(one, at, _pids(processes.of("store")))

    async def _crash(self, one: Planned, processes: Processes) -> None:
        at = now()
        await self.cluster.crash()
        self._tell(one, at, _pids(processes.everybody))
        await self.cluster.start_again()

    async def _fill(self, one: Planned, processes: Processes) -> None:
        at = now()
        filler = self.cluster.disks[one.whom] / FILLER
        pids = _pids(processes.of(one.whom))
        try:
            await asyncio.to_thread(_write_until_full, str(filler))
            await asyncio.sleep(one.for_s)
        finally:
            filler.unlink(missing_ok=True)
        self._tell(one, at, pids, f"{one.for_s:.1f} s")

    # --- links --------------------------------------------------------------------------------------------------

    async def _disturb(self, one: Planned, processes: Processes) -> None:
        proxy = self.cluster.proxy
        matches, pids, whose = self._links(one, processes)
        if matches is None:
            return
        at = now()
        with {
            "cut": lambda: proxy.cut(matches),
            "stall": lambda: proxy.still(matches),
            "slow": lambda: proxy.slow(matches, SLOW_S),
        }[one.what]():
            await asyncio.sleep(one.for_s)
        self._tell(one, at, pids, f"{whose}, {one.for_s:.1f} s")

    def _links(self, one: Planned, processes: Processes) -> tuple[Callable[[str], bool] | None, tuple[int, ...], str]:
        """Which links, of which processes, and whose they are in words."""
        match one.whom:
            case "all":
                return lambda _name: True, _pids(processes.of("agent")), "all links"
            case "agent":
                busy = self.watch.busy().values()
                nodes = sorted(node for node, pid in self.watch.agents.items() if pid in busy) or sorted(self.watch.agents)
                if not nodes:
                    return None, (), ""
                node = nodes[int(one.choice * len(nodes))]
                names = {f"agent-{node}", f"agent-{node}-wake"}
                return lambda name: name in names, (self.watch.agents[node],), node
            case "leader":
                # Both controllers call their links alike: the other one cannot reach the store either.
                return lambda name: name.startswith("controller"), _pids(processes.of("controller")), "controllers"
            case _:
                return lambda name: name.startswith(one.whom), _pids(processes.of(one.whom)), one.whom


def _write_until_full(path: str) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=1M"], check=False, capture_output=True)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    """Only to the process that was looked at, never to another one that has its pid by now."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _pids(processes: list[psutil.Process]) -> tuple[int, ...]:
    return tuple(process.pid for process in processes)
