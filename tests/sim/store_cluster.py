"""The processes of the simulated cluster: the product's own controllers and agents, and what stands in for Dask.

A controller here is a `manager.controller.Controller`, an agent a `plugins.node.agent.Agent` with its slot table, runners and
executors' logic; only their connections, their executors' processes and Dask are played.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manager.controller import Controller
from manager.core.devices import Device
from manager.core.model import DeviceUse
from manager.core.quantities import GIB, MIB
from manager.core.shapes import Grant, Resources, Shape, grant_of
from manager.dask_side import DaskUnavailable, SlotOnDask
from manager.leader import Leadership
from manager.results import NoResults
from manager.settings import (
    ControllerSettings,
    FunctionSettings,
    NodeSettings,
    Settings,
    SlotSettings,
    TaskSettings,
    TenantSettings,
)
from manager.store import Store
from plugins.node.agent import Agent
from plugins.node.link import OpenSlot
from tests.sim.store_loop import CURRENT, Process, SimLoop
from tests.sim.store_net import Network, SimConnection

FUNCTION = "work"
DEVICES = 2
DEVICE_BYTES = 4 * GIB + 512 * MIB
RETRY_S = 0.3


def settings_of(quota: int, retained: int) -> Settings:
    """What is set in one history."""
    return Settings(
        controller=ControllerSettings(period_s=2.0, term_s=10.0),
        node=NodeSettings(beat_s=3.0, lease_beats=4, slots_max=16, devices="simulated"),
        slots=SlotSettings(idle_s=15.0, open_deadline_s=5.0, residence_s=1.0),
        tasks=TaskSettings(grace_s=1.0, retained_max=retained, ageing_s=20.0, preempt_s=10.0),
        tenants={"red": TenantSettings(running_tasks_max=quota, retries_per_minute_max=60), "blue": TenantSettings(weight=2.0)},
        functions={FUNCTION: FunctionSettings(target="nowhere:nothing")},
    )


def devices_of(node: str) -> tuple[Device, ...]:
    """What the node has."""
    return tuple(
        Device(
            uuid=f"gpu-{node}-{i}",
            index=i,
            vendor="amd",
            model="test",
            architecture="gfx942",
            memory_bytes=DEVICE_BYTES,
            visible_id=str(i),
        )
        for i in range(DEVICES)
    )


# --- agents -------------------------------------------------------------------------------------------------------


class _Prober:
    kind = "simulated"

    def visibility(self, _devices: object) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        """Nothing is held."""


class _Watch:
    """Devices that are always well."""

    def __init__(self, node: str) -> None:
        self.devices = devices_of(node)
        self.uses: tuple[DeviceUse, ...] = ()


class _Worker:
    """The Dask worker's supervisor, of which nothing is played."""

    generation = 1

    def restart(self) -> None:
        """A new incarnation: the plugin hears of it at once here."""

    def forgive(self, _seconds: float) -> None:
        """It was not at fault."""

    async def stop(self) -> None:
        """Nothing to stop."""


class SimAgent:
    """One agent's process."""

    def __init__(self, loop: SimLoop, network: Network, node: str, number: int, settings: Settings, folder: Path) -> None:
        self.node = node
        self.settings = settings
        self.process = Process(loop, f"agent-{node}-{number}")
        self.network = network
        self.folder = folder
        self.agent: Agent | None = None
        self.removed = False
        self.over = False

    def start(self) -> None:
        self.process.spawn(self._live())

    async def _live(self) -> None:
        store = Store(SimConnection(self.network))  # type: ignore[arg-type]
        listener: Any = SimConnection(self.network)
        prober: Any = _Prober()
        link = self.folder / "link"
        self.agent = agent = Agent(self.settings, self.node, store, listener, prober, self.folder, link, NoResults())
        fakes: Any = agent
        fakes.watch, fakes.worker = _Watch(self.node), _Worker()
        loops: list[asyncio.Task[None]] = []
        try:
            await fakes._register()
            loops = [
                asyncio.create_task(fakes._forever("beat", fakes._beat)),
                asyncio.create_task(fakes._forever("listen", fakes._listen)),
                asyncio.create_task(fakes._forever("reach", self._reach)),
            ]
            await fakes._stopped.wait()
            await fakes._finish()
        finally:
            for task in loops:
                task.cancel()
            agent.pulse.close()
        await fakes._leave()
        self.removed = fakes._removed
        self.over = True

    async def _reach(self) -> None:
        """Its Dask worker's heartbeat, without which nothing is placed here."""
        assert self.agent is not None
        await self.agent.store.put_heartbeat(self.node, "tcp://sim", ())
        await asyncio.sleep(5.0)

    @property
    def placeable(self) -> bool:
        agent = self.agent
        return not self.over and agent is not None and agent._registered.is_set() and not agent.cordoned

    def grant_for(self, needs: Resources) -> Grant | None:
        """Where a slot of it fits by what lives here; None where nowhere."""
        assert self.agent is not None
        used = dict.fromkeys((device.uuid for device in devices_of(self.node)), 512 * MIB)
        for runner in self.agent.slots.live.values():
            for uuid in runner.grant.devices:
                used[uuid] += runner.grant.memory_bytes
        fits = sorted((used[uuid], uuid) for uuid in used if used[uuid] + needs.memory_bytes <= DEVICE_BYTES)
        if len(fits) < needs.gpus or len(self.agent.slots.live) >= self.settings.node.slots_max:
            return None
        return grant_of(needs, self.node, tuple(uuid for _, uuid in fits[: needs.gpus]))


# --- Dask ---------------------------------------------------------------------------------------------------------


class SimDask:
    """The scheduler with its placement plugin, as the controller sees it. It places at random, and forgets when it restarts."""

    def __init__(self, loop: SimLoop, rng: random.Random, agents: Callable[[], list[SimAgent]]) -> None:
        self.process = Process(loop, "dask")
        self.loop = loop
        self.rng = rng
        self.agents = agents
        self.down_until_s = 0.0
        self.cut: set[str] = set()  # processes that do not reach it
        self.direct: tuple[Any, ...] = ()
        self.mix = None
        self._known: dict[str, SlotOnDask] = {}
        self._at: dict[str, SimAgent] = {}
        self._needs: dict[str, Resources] = {}

    async def _answers(self) -> None:
        await asyncio.sleep(0.002)
        asking = CURRENT.get()
        if self.loop.now_s < self.down_until_s or (asking is not None and asking.name in self.cut):
            raise DaskUnavailable("down")

    async def submit(self, slot_id: str, shape: Shape, node: str, resources: Resources | None = None) -> None:
        await self._answers()
        if slot_id not in self._known or self._known[slot_id].state == "leased":
            self._known[slot_id] = SlotOnDask("placing", node)
            self._needs[slot_id] = resources or shape.resources
            self.process.spawn(self._place(slot_id, node))

    async def _place(self, slot_id: str, node: str) -> None:
        needs = self._needs[slot_id]
        while slot_id in self._known:
            there = [agent for agent in self.agents() if agent.placeable and (not node or agent.node == node)]
            fits = [(agent, grant) for agent in there if (grant := self._fit(agent, slot_id, needs)) is not None]
            if fits and self.rng.random() < 0.9:
                agent, grant = self.rng.choice(fits)
                self._known[slot_id] = SlotOnDask("placed", agent.node)
                self._at[slot_id] = agent
                agent.process.post(self._ask, agent, slot_id, grant)
                return
            self._known[slot_id] = SlotOnDask("held", "")
            await asyncio.sleep(RETRY_S)

    def _fit(self, agent: SimAgent, slot_id: str, needs: Resources) -> Grant | None:
        assert agent.agent is not None
        if (runner := agent.agent.slots.live.get(slot_id)) is not None:
            return runner.grant
        return agent.grant_for(needs)

    def _ask(self, agent: SimAgent, slot_id: str, grant: Grant) -> None:
        agent.process.spawn(self._run(agent, slot_id, grant))

    async def _run(self, agent: SimAgent, slot_id: str, grant: Grant) -> None:
        assert agent.agent is not None
        await agent.agent.slots.open(OpenSlot(1, slot_id, grant))
        if self._at.get(slot_id) is agent:
            self._at.pop(slot_id)
            self._known.pop(slot_id, None)

    async def slots(self) -> tuple[dict[str, SlotOnDask], dict[str, str]]:
        await self._answers()
        for agent in self.agents():
            if agent.placeable and agent.agent is not None:
                for slot_id in agent.agent.slots.live:
                    self._known.setdefault(slot_id, SlotOnDask("leased", agent.node))
        return dict(self._known), {}

    async def lost(self, node: str, incarnation: str) -> None:
        await self._answers()
        await self.dropped([slot_id for slot_id, known in self._known.items() if known.node == node])

    async def dropped(self, slots: list[str]) -> None:
        await self._answers()
        for slot_id in slots:
            self._known.pop(slot_id, None)
            self._at.pop(slot_id, None)

    async def tell(self, news: object) -> None:
        await self._answers()

    async def keep(self, room: Mapping[str, Grant]) -> None:
        await self._answers()

    async def metrics_places(self, workers: Mapping[str, str]) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        """There is no connection."""

    def restart(self, seconds: float) -> None:
        """It forgets everything, and is back after so long."""
        self.down_until_s = self.loop.now_s + seconds
        self._known.clear()
        self._at.clear()

    def worker_died(self, agent: SimAgent) -> None:
        """Dask runs the tasks of a lost worker again, elsewhere, under the same names."""
        for slot_id, at in list(self._at.items()):
            if at is agent:
                del self._at[slot_id]
                self._known[slot_id] = SlotOnDask("placing", "")
                self.process.spawn(self._place(slot_id, ""))


# --- controllers --------------------------------------------------------------------------------------------------


class SimController:
    """One controller's process."""

    def __init__(self, loop: SimLoop, network: Network, number: int, settings: Settings, dask: SimDask) -> None:
        self.process = Process(loop, f"controller-{number}")
        self.network = network
        self.settings = settings
        self.dask = dask
        self.controller: Controller | None = None

    def start(self) -> None:
        self.process.spawn(self._live())

    async def _live(self) -> None:
        store = Store(SimConnection(self.network))  # type: ignore[arg-type]
        listener: Any = SimConnection(self.network)
        dask: Any = self.dask
        self.controller = Controller(self.settings, store, listener, dask)
        holder = f"{self.process.name}/{self.controller.leadership.holder.rpartition('/')[2]}"
        clock = self.process.loop.time
        self.controller.leadership = Leadership(store, holder, self.settings.controller.term_s, clock=clock)
        await self.controller.run()

    @property
    def leads(self) -> bool:
        return self.controller is not None and self.controller.leadership.leads
