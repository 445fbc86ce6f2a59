"""One seed: the whole cluster for a minute of bad luck on a virtual clock, then calm, until everything has ended.

    make sim SEED=17        replays one history
    make sim SEEDS=2000     lives through so many

Everything is the product's own that can be: library, store's face, controllers, agents. What is played: the network, Dask,
executors' processes, and people. What is judged: `store_model` each call, the recount every few seconds, and at the end
that all has come to an end.
"""

import asyncio
import functools
import logging
import random
import shutil
import tempfile
import traceback
from asyncio import events
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import structlog

from manager.core import wire
from manager.core.lifecycle import FINAL, Cordon, TaskStatus
from manager.store import Store
from plugins.node import slot_executor
from tests.contract.store_harness import Violation, check_invariants
from tests.sim.store_cluster import SimAgent, SimController, SimDask, settings_of
from tests.sim.store_executors import Act, Theatre
from tests.sim.store_loop import EPOCH_MS, Process, SimLoop, virtual
from tests.sim.store_model import Model, line_of
from tests.sim.store_net import CALM, FAIR, FOUL, Network
from tests.sim.store_people import NODES, Client, Meddler, Operator, Person
from tests.sim.store_server import SimStore, simulated_library

CHAOS_S = 40.0
CALM_S_MAX = 400.0
CHECK_S = 5.0
WITHOUT_DASK_S_MAX = 90.0
LEASE_S = 12.0
SETTLED_S = 5.0
"""Calm for so long, nobody waits for an answer any more that will never come, and every idle slot has been told to be so."""
PROBES = 3
PROBE_S = 0.5
IDLE_MS_MAX = 11_000
"""A slot that has been idle for longer may be about to close."""
JUMPS_MS = (3_600_000, -3_600_000, 86_400_000, -86_400_000)


@dataclass
class Outcome:
    """What one history came to."""

    seed: int
    violation: str = ""
    detail: str = ""
    figures: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[int, tuple[Any, ...], Any]] = field(default_factory=list)

    @property
    def history(self) -> list[str]:
        """Its calls, for people."""
        return [line_of(*call) for call in self.calls]


class World:
    """One history."""

    def __init__(self, store: SimStore, seed: int, loop: SimLoop, folder: Path, said: list[str]) -> None:
        self.loop = loop
        self.said = said  # by loops of the product that have failed
        self.rng = random.Random(seed)
        self.model = Model()
        self.jump_ms = self.jump_ms_max = 0
        self.raw = store
        self.net = Network(loop, self.rng, store, self.now_ms, lambda call, reply: self.model.saw(call, reply, self.now_ms()))
        self.net.welcome = self._welcome
        self.recount = Store(_Direct(store))  # type: ignore[arg-type]
        self.settings = settings_of(self.rng.choice((0, 2, 4)), self.rng.choice((25, 1000)))
        self.folder = folder
        self.calm = False
        self.theatre = Theatre(loop, self.rng, self.model.executes, self._act)
        self.agents: dict[str, SimAgent] = {}
        self.ghosts: list[SimAgent] = []
        self.dask = SimDask(loop, self.rng, lambda: list(self.agents.values()))
        self.controllers: list[SimController] = []
        self.clients = [Client(loop, self.net, self.rng, tenant) for tenant in ("red", "blue")]
        self.operator = Operator(loop, self.net, self.rng, "operator")
        self.meddler = Meddler(loop, self.net, self.rng, lambda: self.model.token)
        self.processes: list[Process] = [self.dask.process, self.operator.process, self.meddler.process]
        self.processes += [client.process for client in self.clients]
        self.nemesis = Person(loop, self.net, self.rng, "nemesis")
        self.processes.append(self.nemesis.process)
        self._numbers = 0
        self.figures: Counter[str] = Counter()

    def now_ms(self) -> int:
        """The store's clock."""
        return EPOCH_MS + int(self.loop.now_s * 1000) + self.jump_ms

    def _welcome(self, args: tuple[Any, ...]) -> bool:
        """What is repeated after its record was forgotten is new: that a repeat may come so late is beyond what is promised.

        Records are kept for hours; only a clock that jumps by a day forgets them sooner.
        """
        if args[:2] == ("FCALL", "ry_request"):
            return args[5] not in self.model.slots or bool(self.raw.call("EXISTS", f"{args[3]}s:{args[5]}"))
        if args[:2] != ("FCALL", "ry_submit"):
            return True
        ids = args[9 + 2 * int(args[8]) :: 7]
        known = [task_id for task_id in ids if task_id in self.model.tasks or task_id in self.model.arrays]
        return not known or bool(self.raw.call("EXISTS", *(f"{args[3]}{kind}:{i}" for i in known for kind in "ta")))

    # --- what tasks do --------------------------------------------------------------------------------------------

    def _act(self, call: wire.Call) -> Act:
        rng = self.rng
        if self.calm:
            return Act()
        word = rng.choices(("ok", "fail", "crash", "oom", "hang"), (70, 14, 6, 3, 7))[0]
        seconds = rng.choice((0.001, 0.001, 0.02, 0.3, 3.0))
        checkpoint = f"{call.task_id}/{call.attempt}" if rng.random() < 0.2 else ""
        return Act(word, seconds, checkpoint, rng.random() < 0.2)

    # --- processes ------------------------------------------------------------------------------------------------

    def start_agent(self, node: str) -> SimAgent:
        self._numbers += 1
        agent = SimAgent(self.loop, self.net, node, self._numbers, self.settings, self.folder)
        self.agents[node] = agent
        self.processes.append(agent.process)
        agent.start()
        return agent

    def start_controller(self, place: int) -> None:
        self._numbers += 1
        controller = SimController(self.loop, self.net, self._numbers, self.settings, self.dask)
        self.controllers[place : place + 1] = [controller]
        self.processes.append(controller.process)
        controller.start()

    def kill_agent(self, agent: SimAgent) -> None:
        agent.process.kill()
        self.net.forget(agent.process)
        self.theatre.die(agent.process)
        self.dask.worker_died(agent)
        if agent in self.ghosts:
            self.ghosts.remove(agent)

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP for so long; executors end when their agent has shown no pulse for a lease."""
        if process.frozen or process.dead:
            return
        process.freeze()
        if seconds > LEASE_S:
            self.net.at(LEASE_S, self._lapse, process)
        self.net.at(seconds, self._thaw, process)

    def _lapse(self, process: Process) -> None:
        if process.frozen:
            self.theatre.lapse(process)

    def _thaw(self, process: Process) -> None:
        if process.frozen and not process.dead:
            process.thaw()

    # --- bad luck -------------------------------------------------------------------------------------------------

    async def trouble(self, until_s: float) -> None:
        """One thing after the other goes wrong, and some at once."""
        troubles = {
            self._freeze_agent: 4, self._kill_agent: 3, self._twin: 2, self._freeze_controller: 3, self._kill_controller: 2,
            self._restart_store: 2, self._jump: 2, self._restart_dask: 2, self._change_weather: 4, self._cut: 2,
            self._cut_dask: 1, self._stop_agent: 1,
        }  # fmt: skip
        while self.loop.now_s < until_s:
            await asyncio.sleep(self.rng.expovariate(1 / 2.5))
            if self.calm:
                return
            trouble = self.rng.choices(list(troubles), list(troubles.values()))[0]
            self.figures[trouble.__name__.strip("_")] += 1
            trouble()

    def _some_agent(self) -> SimAgent:
        return self.agents[self.rng.choice(sorted(self.agents))]

    def _freeze_agent(self) -> None:
        self.freeze(self._some_agent().process, self.rng.choice((0.5, 5.0, 14.0, 25.0)))

    def _kill_agent(self) -> None:
        agent = self._some_agent()
        self.kill_agent(agent)
        self.net.at(self.rng.choice((0.2, 2.0, 15.0)), self._replace_agent, agent)

    def _replace_agent(self, agent: SimAgent) -> None:
        if self.agents.get(agent.node) is agent:
            self.start_agent(agent.node)

    def _twin(self) -> None:
        """An agent hangs, another one is started in its place, and the first one wakes up for a moment."""
        agent = self._some_agent()
        seconds = self.rng.choice((1.0, 4.0, 15.0))
        if agent.process.frozen or agent.process.dead:
            return
        self.freeze(agent.process, seconds)
        self.ghosts.append(agent)
        self.dask.worker_died(agent)
        self.start_agent(agent.node)
        self.net.at(seconds + self.rng.random(), self.kill_agent, agent)

    def _stop_agent(self) -> None:
        agent = self._some_agent()
        if agent.agent is not None:
            agent.process.post(agent.agent.stop)

    def supervise(self) -> None:
        """An agent that has ended, and whose node was not removed for good, is started again."""
        for agent in list(self.agents.values()):
            if agent.over and (not agent.removed or self.calm or self.rng.random() < 0.2):
                self.start_agent(agent.node)

    def _freeze_controller(self) -> None:
        self.freeze(self.rng.choice(self.controllers).process, self.rng.choice((1.0, 9.0, 14.0, 25.0)))

    def _kill_controller(self) -> None:
        place = self.rng.randrange(len(self.controllers))
        process = self.controllers[place].process
        process.kill()
        self.net.forget(process)
        self.start_controller(place)

    def _restart_store(self) -> None:
        self.net.restart(self.rng.choice((0.05, 0.5, 4.0)))

    def _jump(self) -> None:
        self.jump_ms += self.rng.choice(JUMPS_MS)
        self.jump_ms_max = max(self.jump_ms_max, self.jump_ms)

    def _restart_dask(self) -> None:
        self.dask.restart(self.rng.choice((0.1, 2.0, 6.0)))

    def _cut_dask(self) -> None:
        """A controller does not reach Dask for a while."""
        name = self.rng.choice(self.controllers).process.name
        self.dask.cut.add(name)
        self.net.at(self.rng.choice((1.0, 20.0, 60.0)), self.dask.cut.discard, name)

    def _change_weather(self) -> None:
        self.net.weather = self.rng.choice((CALM, FAIR, FAIR, FOUL))

    def _cut(self) -> None:
        """A process does not reach the store for a while."""
        name = self.rng.choice(sorted(process.name for process in self.processes if not process.dead))
        self.net.cut.add(name)
        self.net.at(self.rng.choice((1.0, 5.0, 20.0)), self.net.cut.discard, name)

    # --- the whole ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for place in range(2):
            self.start_controller(place)
        for node in NODES:
            self.start_agent(node)

    def run_with_a_leader_without_dask(self) -> None:
        """Nothing goes wrong, but that the leader never reaches Dask; another candidate does.

        Raises:
            Violation: what was accepted does not end.
        """
        self.calm = True
        self.net.weather = CALM
        self._start()
        if not self.loop.run_until(lambda: any(controller.leads for controller in self.controllers), CALM_S_MAX):
            raise Violation("one-leads", f"after {CALM_S_MAX} s")
        self.dask.cut |= {controller.process.name for controller in self.controllers if controller.leads}
        for client in self.clients:
            client.process.spawn(client.live(self.loop.now_s + CHECK_S))
        self._drain(WITHOUT_DASK_S_MAX)
        self.check(last=True)

    def run(self) -> None:
        """Live through it.

        Raises:
            Violation: a promise was broken.
        """
        self._start()
        self.net.weather = FAIR
        end_s = self.loop.now_s + CHAOS_S
        for person in (*self.clients, self.operator, self.meddler):
            person.process.spawn(person.live(end_s))
        self.nemesis.process.spawn(self.trouble(end_s))
        while self.loop.now_s < end_s:
            self._run_for(CHECK_S)
            self.check()
        self._calm_down()
        self._drain(CALM_S_MAX)
        self._run_for(SETTLED_S)
        for _ in range(PROBES):
            self._probe()
        self.check(last=True)

    def _drain(self, seconds: float) -> None:
        limit_s = self.loop.now_s + seconds
        while not self._ended():
            if self.loop.now_s >= limit_s:
                raise Violation("all-drains", f"after {seconds} s of calm: {self._left()}")
            self._run_for(1.0)

    def _probe(self) -> None:
        """A slot that is idle hears of work at once, not with the next beat of its agent."""
        state = _now(self.recount.look(leader=False))
        fresh_ms = self.now_ms() - IDLE_MS_MAX
        idle = [slot for slot in state.slots if slot.idle_ms and slot.idle_ms > fresh_ms and not slot.flag and not slot.running]
        shapes = {queue.shape_id: queue.shape for queue in state.queues}
        if not idle:
            return
        slot = self.rng.choice(idle)
        task_id = self.clients[0].probe(slot.shape_id, shapes[slot.shape_id])
        self._run_for(PROBE_S)
        if self.model.tasks[task_id].attempt == 0:
            raise Violation("woken-in-time", f"{task_id} was not claimed within {PROBE_S} s, and {slot} was idle")
        self._run_for(1.0)

    def _run_for(self, seconds: float) -> None:
        self.loop.run_until(lambda: False, seconds)
        self.supervise()

    def _calm_down(self) -> None:
        self.calm = True
        self.net.weather = CALM
        self.net.cut.clear()
        self.dask.cut.clear()
        self.net.down_until_s = self.dask.down_until_s = 0.0
        # What waits for a time waits for longer where the clock was set back meanwhile: by as much, and no more.
        self.jump_ms = self.jump_ms_max
        self.theatre.start_fails = 0.0
        for process in self.processes:
            self._thaw(process)
        for agent in [*self.ghosts, *(a for a in self.agents.values() if a.process.dead)]:
            self.kill_agent(agent)
        for node in NODES:
            if self.agents[node].process.dead or self.agents[node].over:
                self.start_agent(node)
        self.nemesis.process.spawn(self._lift())

    async def _lift(self) -> None:
        for node in NODES:
            await self.nemesis.again(functools.partial(self.nemesis.store.cordon, node, Cordon.NONE, "operator"))

    def _ended(self) -> bool:
        if any(client.busy for client in self.clients):
            return False
        counts = self.raw.call("HGETALL", self.recount.keys.counts)
        live = {counts[i].decode(): int(counts[i + 1]) for i in range(0, len(counts), 2)}
        more = self.raw.call("SCARD", f"{self.recount.keys.prefix}ao")
        return not more and all(count == 0 or TaskStatus(state) in FINAL for state, count in live.items())

    def _left(self) -> str:
        found = _now(check_invariants(self.recount))
        left = {task_id: row["state"] for task_id, row in found.tasks.items() if TaskStatus(row["state"]) not in FINAL}
        return f"{left}, arrays {sorted(found.set('ao'))}"

    def check(self, *, last: bool = False) -> None:
        """Recount everything."""
        self.figures["checks"] += 1
        if self.said:
            raise Violation("no-loop-fails", self.said[0])
        found = _now(check_invariants(self.recount))
        self.model.compare(found, (task_id for client in self.clients for task_id in client.accepted))
        if last:
            for name in ("due", "exp", "rel", "ao"):
                left = found.zset(name) or found.set(name)
                if left:
                    raise Violation("all-drains", f"{name}: {left}")
            left_keys = [key for key in (*found.sets, *found.zsets) if key.startswith(("run:", "x:", "ch:", "ta:", "q:"))]
            if left_keys:
                raise Violation("all-drains", str(left_keys))

    def tally(self) -> Counter[str]:
        """Figures for people."""
        model = self.model
        figures = self.figures + Counter(
            tasks=len(model.tasks),
            accepted=sum(len(client.accepted) for client in self.clients),
            calls=len(model.calls_seen),
            executions=sum(len(begun) for begun in model.executions.values()),
            executed_again=sum(len(begun) - 1 for begun in model.executions.values()),
            commits=sum(task.commits for task in model.tasks.values()),
            slots=len(model.slots),
            terms=model.token,
            refused_old_leaders=model.refused_old_leaders,
            refused_zombies=model.refused_zombies,
            late_ends=model.late_ends,
            seconds=int(self.loop.now_s - 1000),
            steps=self.loop.steps,
        )
        figures.update(task.final or "unknown" for task in model.tasks.values())
        return figures

    def close(self) -> None:
        """End all that still waits somewhere, so that nothing is left of it in this process."""
        self.net.closed = True
        self.loop.close(self.processes)


class _Direct:
    """A connection without a network, for the recount."""

    deadline_s = 30.0
    gate = None

    def __init__(self, store: SimStore) -> None:
        self.store = store

    async def call(self, *args: Any, deadline_s: float | None = None) -> Any:
        return self.store.call(*args)


_NO_LOOP = SimLoop()


def _now(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nobody."""
    events._set_running_loop(_NO_LOOP)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    finally:
        events._set_running_loop(None)
    raise AssertionError("it waits for something")


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What loops of the product say of errors that nobody expected; all else that is logged goes nowhere."""
    said: list[str] = []

    def hear(_logger: object, _name: str, event: structlog.typing.EventDict) -> str:
        if event["event"] == "loop_failed":
            said.append(f"{event}\n{traceback.format_exc()}")
        return ""

    before = structlog.get_config()
    structlog.configure(
        processors=[hear],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    try:
        yield said
    finally:
        structlog.configure(**before)


def live(store: SimStore, seed: int, library: str = "", plot: Callable[[World], None] = World.run) -> Outcome:
    """One history on an empty store with this text of the library (the product's if none is given)."""
    store.load(simulated_library(library))
    loop = SimLoop()
    folder = Path(tempfile.mkdtemp(prefix="rocyard-sim-"))
    outcome = Outcome(seed)
    try:
        with virtual(loop, seed), _listening() as said:
            world = World(store, seed, loop, folder, said)
            with mock.patch.object(slot_executor, "Executor", world.theatre):
                try:
                    plot(world)
                except Violation as error:
                    outcome.violation, outcome.detail = error.name, str(error)
                finally:
                    outcome.figures = world.tally()
                    outcome.calls = world.model.calls_seen
                    world.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def replay(seed: int) -> str:
    """The command that lives through this history again."""
    return f"make sim SEED={seed}"


def find(store: SimStore, library: str, seeds: Iterable[int]) -> Outcome | None:
    """The first of these histories that breaks a promise with this text of the library; None where none does."""
    for seed in seeds:
        outcome = live(store, seed, library)
        if outcome.violation:
            return outcome
    return None
