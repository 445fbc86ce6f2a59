"""A real Dask scheduler with the placement plugin, real Dask workers, and agents that are played over their real socket."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Scheduler, Worker

from manager.core.quantities import GIB
from manager.core.shapes import Grant, Shape
from manager.dask_side import DaskSide
from manager.metrics import HOOK_ERRORS
from plugins.ledger import Ledger
from plugins.node.functions.direct import run_call
from plugins.node.link import (
    AgentLink,
    Answer,
    AskBeat,
    AskReport,
    Beat,
    DirectEnded,
    DirectOutcome,
    EndDirect,
    Ended,
    LiveSlot,
    OpenDirect,
    OpenSlot,
    Refused,
    Report,
    Request,
    serve_link,
)
from plugins.scheduler import PlacementPlugin
from plugins.slot import run_slot
from plugins.worker import RocyardWorkerPlugin, attach
from tests.unit import factories as make

CONFIG = {
    "distributed.scheduler.validate": True,
    "distributed.worker.validate": True,
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.work-stealing-interval": "20ms",
    "distributed.comm.timeouts.connect": "1s",
}


async def eventually(check: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
    """The first true answer of `check`."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := check()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)  # the period of looking, not a guess of when
    return answer


class PlayedAgent:
    """One node's agent: opens what it is asked to, checks that it fits, and ends it when the test says so."""

    def __init__(self, world: "World", node: str, gib: tuple[float, ...]) -> None:
        self.world = world
        self.node = node
        self.gib = gib
        self.path = str(world.directory / f"{node}.sock")
        self.incarnation = "i1"
        self.generation = 0
        self.live: dict[str, Grant] = {}
        self.endings: dict[str, asyncio.Future[str]] = {}
        self.direct: dict[str, OpenDirect] = {}  # of those that live, the ones that run a Dask task
        self.ended: list[str] = []  # every request to end such a one
        self.ending = asyncio.Event()  # set: what it is asked to end ends at once
        self.ending.set()
        self.cordoned = False  # as the store would have it, before anybody has told the scheduler
        self.closed: list[str] = []
        self.asked: list[str] = []  # every request to open, adoptions too
        self.frozen = asyncio.Event()  # set: it answers
        self.frozen.set()
        self.worker: Worker | None = None
        self.server: asyncio.Server | None = None

    async def answer(self, request: Request) -> Answer:
        await self.frozen.wait()
        if request.generation != self.generation and not isinstance(request, EndDirect):
            return Refused("an older worker")
        match request:
            case AskReport():
                live = tuple(LiveSlot(slot_id, granted) for slot_id, granted in self.live.items())
                return Report(self.node, self.incarnation, self.generation, make.devices(*self.gib), 0, live)
            case AskBeat():
                return Beat(self.node, tuple(self.closed), (), 0.0)
            case OpenSlot(slot_id=slot_id):
                self.asked.append(slot_id)
                if slot_id not in self.live:
                    if slot_id in self.closed or slot_id in self.world.tombstones or not request.grant.devices:
                        return Ended("Gone")
                    self.open(slot_id, request.grant)
                return Ended(await asyncio.shield(self.endings[slot_id]))
            case OpenDirect(slot_id=slot_id):
                self.asked.append(slot_id)
                if slot_id in self.closed or self.cordoned:
                    self.closed.append(slot_id)
                    return DirectEnded(DirectOutcome.AGAIN, "Cordoned", opened=False)
                self.open(slot_id, request.grant)
                self.direct[slot_id] = request
                return DirectEnded(DirectOutcome(await asyncio.shield(self.endings[slot_id])), "as played")
            case EndDirect(slot_id=slot_id):
                self.ended.append(slot_id)
                await self.ending.wait()
                if slot_id in self.live:
                    self.close(slot_id, DirectOutcome.AGAIN)
                elif slot_id not in self.closed:
                    self.closed.append(slot_id)
                return Ended("again")

    def finish(self, slot_id: str) -> None:
        """Run its call, as its executor would, and close it."""
        self.call(slot_id)
        self.close(slot_id, DirectOutcome.DONE)

    def call(self, slot_id: str) -> None:
        """Run its call, as its executor would."""
        request = self.direct[slot_id]
        run_call(request.call_path, request.result_path)

    def open(self, slot_id: str, granted: Grant) -> None:
        self.live[slot_id] = granted
        self.endings[slot_id] = asyncio.get_running_loop().create_future()
        for uuid, gib in zip((f"d{i}" for i in range(len(self.gib))), self.gib, strict=True):
            leased = sum(held.memory_bytes for held in self.live.values() if uuid in held.devices)
            if leased > gib * GIB:
                self.world.problems.append(f"{self.node}/{uuid} bears {leased} bytes with {slot_id}")

    def close(self, slot_id: str, reason: str = "Closed") -> None:
        del self.live[slot_id]
        self.direct.pop(slot_id, None)
        self.closed.append(slot_id)
        self.endings.pop(slot_id).set_result(reason)

    async def start_worker(self) -> None:
        """What its supervisor does: the next generation of its Dask worker."""
        if self.server is None:
            self.server = await serve_link(self.path, self.answer)
        self.generation += 1
        plugin = RocyardWorkerPlugin(AgentLink(self.path, self.generation), None, self.node, 0.05)
        self.worker = Worker(
            self.world.address,
            name=f"{self.node}-{self.incarnation}-{self.generation}",
            nthreads=1,
            host="127.0.0.1",
            memory_limit=0,
            dashboard=False,
            local_directory=str(self.world.directory),
            plugins=[plugin],
        )
        attach(self.worker, plugin)
        await self.worker

    async def kill_worker(self) -> None:
        """Its connection breaks without a word, as when the process was killed."""
        assert self.worker is not None
        address = self.worker.address
        self.worker.batched_stream.abort()
        await eventually(lambda: address not in self.world.scheduler.workers, f"the loss of {self.node}'s worker is seen")
        await self.worker.close(timeout=1, executor_wait=False, nanny=False)

    async def stop(self) -> None:
        self.frozen.set()
        if self.worker is not None:
            await self.worker.close(timeout=1, executor_wait=False, nanny=False)
        for slot_id, ending in self.endings.items():
            ending.set_result(DirectOutcome.AGAIN if slot_id in self.direct else "Stopped")
        if self.server is not None:
            self.server.close()


class World:
    """Scheduler, agents, and the controller's side of Dask."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agents: list[PlayedAgent] = []
        self.plain: list[Worker] = []
        self.problems: list[str] = []
        self.tombstones: set[str] = set()  # what the leader has taken back in the store
        self.hook_errors_expected = 0

    async def start(self, *, port: int = 0, preload: bool = True) -> None:
        self.scheduler = Scheduler(
            host="127.0.0.1", port=port, dashboard=False, validate=True, preload=["plugins.scheduler"] if preload else []
        )
        await self.scheduler
        self.address = self.scheduler.address
        self.dask = DaskSide(self.address, run_slot)
        self.client = await Client(self.address, asynchronous=True, set_as_default=False)

    async def stop(self) -> None:
        await self.client.close()
        await self.dask.close()
        for agent in self.agents:
            await agent.stop()
        for worker in self.plain:
            await worker.close(timeout=1, nanny=False)
        await self.scheduler.close()

    @property
    def plugin(self) -> PlacementPlugin:
        return self.scheduler.plugins[PlacementPlugin.name]

    @property
    def ledger(self) -> Ledger:
        return self.plugin.ledger

    async def agent(self, node: str, *gib: float) -> PlayedAgent:
        agent = PlayedAgent(self, node, gib)
        self.agents.append(agent)
        await agent.start_worker()
        return agent

    async def plain_worker(self) -> Worker:
        """A Dask worker of somebody who knows nothing of Rocyard."""
        worker = await Worker(
            self.address, nthreads=1, host="127.0.0.1", memory_limit=0, dashboard=False, local_directory=str(self.directory)
        )
        self.plain.append(worker)
        return worker

    async def submit(self, slot_id: str, gib: float = 16.0, gpus: int = 1, node: str = "") -> None:
        await self.dask.submit(slot_id, self.shape(gib, gpus), node)

    async def drop(self, slot_id: str) -> None:
        self.tombstones.add(slot_id)
        await self.dask.dropped([slot_id])

    @staticmethod
    def shape(gib: float, gpus: int = 1) -> Shape:
        return make.shape(gib, gpus)

    async def where(self, *slots: str) -> list[str]:
        known, _ = await self.dask.slots()
        return [known[slot].state.replace("placing", "placed") if slot in known else "" for slot in slots]

    async def held(self, *slots: str) -> None:
        """Wait until Dask holds these."""
        await eventually(lambda: set(slots) <= set(self.ledger.held), f"{slots} are held")


def hook_errors() -> float:
    return sum(sample.value for metric in HOOK_ERRORS.collect() for sample in metric.samples if sample.name.endswith("_total"))


def configured() -> Any:
    return dask.config.set(CONFIG)


async def worlds(directory: Path) -> AsyncIterator[World]:
    """A world that is checked when its test ends."""
    with configured():
        world = World(directory)
        before = hook_errors()
        await world.start()
        yield world
        ledger = world.ledger.index
        await world.stop()
        assert world.problems == []
        assert hook_errors() - before == world.hook_errors_expected
        assert make.over_committed(ledger) == []
