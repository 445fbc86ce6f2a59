"""A small world on a clock of its own: the real planner, placement and ledger; tasks, executors and time are played.

It plays what the store and the agents do to slots: a request is placed by the ledger, opens after a moment, claims one task
after the other, and ends at a task boundary when it is flagged. A failure prints the seed; `World(seed)` replays it.
"""

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable

import msgspec
import pytest

from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import ClusterState, SlotRow, TenantRow
from manager.core.needs import Limits
from manager.core.planner import plan
from manager.core.quantities import GIB
from manager.core.shapes import Grant, Shape
from manager.core.shares import accounted
from plugins.ledger import Ledger, SlotRequest
from tests.unit import factories as make

OPEN_S = 0.07
PERIOD_S = 2.0
ROUND_PAUSE_S = 0.02
LIMITS = Limits(drain_target_s=1.0, idle_s=20.0, residence_s=1.0, slots_per_shape_max=64, idle_per_node_max=64)


class Task(msgspec.Struct):
    arrived_s: float
    run_s: float
    started_s: float | None = None


class World:
    """Nodes, shapes with their queues, slots, and events in order of time."""

    def __init__(self, seed: int, nodes: dict[str, list[float]]) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.nodes = nodes
        self.incarnations: Counter[str] = Counter()
        self.shapes: dict[str, Shape] = {}
        self.priorities: dict[str, int] = {}
        self.queues: dict[str, deque[Task]] = {}
        self.tasks: dict[str, list[Task]] = {}
        self.learned_s: dict[str, float] = {}
        self.slots: dict[str, SlotRow] = {}
        self.running: dict[str, Task] = {}
        self.ledger = Ledger()
        self.weights: dict[str, float] = {}
        self.vtimes: tuple[dict[str, float], dict[str, float]] = ({}, {})  # of tenants, of shapes
        self.opened: Counter[str] = Counter()
        self.held_max = 0
        self.round_at_s = 0.0
        self.looked_s = 0.0
        for node in nodes:
            self.register(node)

    # --- the clock ----------------------------------------------------------------------------------------------

    def at(self, at_s: float, deed: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at_s, next(self.numbers), deed))

    def run(self, until_s: float) -> None:
        self.ask_round(self.now_s)
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, deed = heapq.heappop(self.events)
            deed()
            assert make.over_committed(self.ledger.index) == []
            assert self.truly_over_committed() == []
        self.now_s = until_s

    def truly_over_committed(self) -> list[tuple[str, str]]:
        """By what executors really have, not by the ledger."""
        used: Counter[tuple[str, str]] = Counter()
        for slot in self.slots.values():
            if slot.status is SlotStatus.OPEN:
                used.update({(slot.node, uuid): self.shapes[slot.shape_id].memory_bytes for uuid in slot.devices})
        return [(node, uuid) for (node, uuid), size in used.items() if size > self.nodes[node][int(uuid[1:])] * GIB]

    # --- tasks --------------------------------------------------------------------------------------------------

    def shape(self, name: str, shape: Shape, priority: int = 0) -> None:
        self.shapes[name], self.priorities[name] = shape, priority
        self.queues[name], self.tasks[name] = deque(), []

    def arrivals(self, name: str, times_s: Iterable[float], run_s: float) -> None:
        for time_s in times_s:
            task = Task(time_s, run_s * self.chance.uniform(0.8, 1.2))
            self.tasks[name].append(task)
            self.at(time_s, lambda task=task: self.submit(name, task))

    def submit(self, name: str, task: Task) -> None:
        self.queues[name].append(task)
        idle = next((s for s in self.of(name) if s.idle_ms is not None and s.flag is SlotFlag.NONE), None)
        if idle is not None:
            self.claim(idle.slot_id)
        else:
            self.ask_round(self.now_s + ROUND_PAUSE_S)

    def unfinished(self) -> int:
        return sum(len(queue) for queue in self.queues.values()) + len(self.running)

    def waits_s(self, name: str) -> list[float]:
        return [(self.now_s if t.started_s is None else t.started_s) - t.arrived_s for t in self.tasks[name]]

    # --- slots, as agents and the store play them ---------------------------------------------------------------

    def of(self, name: str) -> list[SlotRow]:
        return [slot for slot in self.slots.values() if slot.shape_id == name and slot.status is SlotStatus.OPEN]

    def change(self, slot_id: str, **values: object) -> SlotRow:
        self.slots[slot_id] = msgspec.structs.replace(self.slots[slot_id], **values)
        return self.slots[slot_id]

    def open(self, slot_id: str, grant: Grant) -> None:
        slot = self.slots.get(slot_id)
        if slot is None or slot.status is not SlotStatus.REQUESTED or self.ledger.index.grants.get(slot_id) != grant:
            return  # dropped, or its node has died on the way
        self.change(slot_id, status=SlotStatus.OPEN, node=grant.node, devices=grant.devices, opened_ms=self.ms)
        self.opened[slot.shape_id] += 1
        self.claim(slot_id)

    def claim(self, slot_id: str) -> None:
        slot = self.slots[slot_id]
        limit = self.shapes[slot.shape_id].max_tasks_per_slot
        if slot.flag is not SlotFlag.NONE or (limit and slot.served >= limit):
            self.close(slot_id)
        elif self.queues[slot.shape_id]:
            task = self.running[slot_id] = self.queues[slot.shape_id].popleft()
            task.started_s = self.now_s
            self.change(slot_id, idle_ms=None, running=1)
            self.at(self.now_s + task.run_s, lambda: self.finish(slot_id, task))
        else:
            self.change(slot_id, idle_ms=self.ms)
            if self.ledger.held:
                self.ask_round(self.now_s + ROUND_PAUSE_S)

    def finish(self, slot_id: str, task: Task) -> None:
        if self.running.get(slot_id) is not task:
            return  # its node has died
        slot = self.slots[slot_id]
        del self.running[slot_id]
        self.learned_s[slot.shape_id] = 0.8 * self.learned_s.get(slot.shape_id, task.run_s) + 0.2 * task.run_s
        self.change(slot_id, running=0, served=slot.served + 1)
        self.claim(slot_id)

    def close(self, slot_id: str) -> None:
        del self.slots[slot_id]
        self.ledger.ended(slot_id, self.now_s)
        self.pump()
        self.ask_round(self.now_s + ROUND_PAUSE_S)

    def register(self, node: str) -> None:
        self.incarnations[node] += 1
        incarnation = f"i{self.incarnations[node]}"
        self.ledger.register(make.report(node, self.nodes[node], incarnation=incarnation), self.now_s)

    def kill(self, node: str) -> None:
        """The node's agent dies and starts anew: its slots are gone, what they ran goes back."""
        for slot in [s for s in self.slots.values() if s.node == node]:
            if (task := self.running.pop(slot.slot_id, None)) is not None:
                self.queues[slot.shape_id].appendleft(task)
            del self.slots[slot.slot_id]
            self.ledger.forget(slot.slot_id)
        on_their_way = self.ledger.index.slots_on(node)
        self.register(node)
        for slot_id in on_their_way:
            self.ledger.hold(slot_id, self.now_s)  # Dask lost its worker before the slot was open
        self.pump()

    # --- scheduler and controller -------------------------------------------------------------------------------

    def pump(self) -> None:
        for assignment in self.ledger.decide(self.now_s):
            slot_id, grant = assignment.slot_id, assignment.grant
            self.at(self.now_s + OPEN_S, lambda s=slot_id, g=grant: self.open(s, g))

    @property
    def ms(self) -> int:
        return int(self.now_s * 1000)

    def look(self) -> ClusterState:
        queues = [
            make.queue(
                name,
                shape,
                len(waiting),
                run_s=self.learned_s.get(name),
                priority=self.priorities[name],
                waited_s=self.now_s - waiting[0].arrived_s if waiting else 0.0,
                now_ms=self.ms,
            )
            for name, shape in self.shapes.items()
            if (waiting := self.queues[name]) or any(slot.shape_id == name for slot in self.slots.values())
        ]
        return make.state(queues, self.slots.values(), self.nodes, self.ms)

    def ask_round(self, at_s: float) -> None:
        if not self.round_at_s > at_s and self.round_at_s > self.now_s:
            return
        self.round_at_s = at_s
        self.at(at_s, lambda: self.round(at_s))

    def round(self, due_s: float) -> None:
        if due_s != self.round_at_s:
            return  # another one was asked for in between
        state = self.look()
        rows = {shape.tenant: TenantRow(tenant=shape.tenant, weight=self.weights.get(shape.tenant, 1.0))
                for shape in self.shapes.values()}  # fmt: skip
        state = msgspec.structs.replace(state, tenants=tuple(rows.values()))
        state = accounted(state, *self.vtimes, self.now_s - self.looked_s)
        self.vtimes = (
            {row.tenant: row.vtime_s or 0.0 for row in state.tenants},
            {queue.shape_id: queue.vtime_s or 0.0 for queue in state.queues},
        )
        self.looked_s = self.now_s
        held = frozenset(slot_id for slot_id in self.slots if slot_id in self.ledger.held)
        self.held_max = max(self.held_max, *Counter(self.slots[slot_id].shape_id for slot_id in held).values(), 0)
        answer = plan(state, index_of(state), held, LIMITS)
        self.ledger.keep(dict(answer.keep), self.now_s)
        for slot_id in answer.drop:
            del self.slots[slot_id]
            self.ledger.ended(slot_id, self.now_s)
        for item in answer.open:
            for _ in range(item.count):
                slot_id = f"s{next(self.numbers):06}"
                self.slots[slot_id] = make.requested(slot_id, item.shape_id)
                self.ledger.ask(SlotRequest(slot_id, self.shapes[item.shape_id]), self.now_s)
        for close in answer.close:
            if close.flag is SlotFlag.PREEMPT and (task := self.running.pop(close.slot_id, None)) is not None:
                self.queues[self.slots[close.slot_id].shape_id].appendleft(task)
                self.close(close.slot_id)
            elif self.change(close.slot_id, flag=SlotFlag.CLOSE).idle_ms is not None:
                self.close(close.slot_id)
        self.pump()
        self.round_at_s = 0.0
        self.ask_round(self.now_s + min(PERIOD_S, answer.again_s or PERIOD_S))


def poisson(chance: random.Random, per_s: float, until_s: float) -> list[float]:
    times, now_s = [], chance.expovariate(per_s)
    while now_s < until_s:
        times.append(now_s)
        now_s += chance.expovariate(per_s)
    return times


@pytest.mark.parametrize("seed", range(6))
def test_mixed_arrivals_all_run_and_nothing_is_promised_twice(seed):
    chance = random.Random(seed)
    world = World(seed, {"a": [24, 24], "b": [48, 48], "c": [80]})
    for number in range(8):
        gpus = chance.choice([1, 1, 1, 2])
        limit = chance.choice([0, 0, 0, 1, 5])
        priority = chance.choice([0, 0, 0, 5])
        world.shape(f"q{number}", make.shape(chance.choice([2, 6, 12, 24, 40]), gpus, f"t{number}", limit), priority)
        run_s = chance.choice([0.02, 0.2, 1.0, 4.0])
        world.arrivals(f"q{number}", poisson(chance, 0.4 / run_s, 60.0), run_s)
    for time_s in poisson(chance, 0.05, 60.0):
        world.at(time_s, lambda: world.kill(chance.choice("abc")))
    world.run(120.0)
    assert world.unfinished() == 0, f"seed {seed}"
    assert all(task.started_s is not None for tasks in world.tasks.values() for task in tasks)
    assert world.held_max <= 2, "one held slot per shape, and one more where a node has just died"
    assert sum(world.opened.values()) <= sum(map(len, world.tasks.values())), "slots serve more than one task each"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("small_run_s", "limit", "bound_s"),
    [
        pytest.param(0.2, 0, 3.0, id="slots that stay"),
        pytest.param(2.0, 0, 6.0, id="long tasks"),
        pytest.param(0.3, 1, 3.0, id="a slot for each task"),
    ],
)
def test_a_large_shape_is_served_under_a_flood_of_small_ones(seed, small_run_s, limit, bound_s):
    """Small ones take each piece of memory as it comes free, unless it is kept for the one that needs it all."""
    world = World(seed, {"a": [24, 24], "b": [24, 24]})
    for number in range(4):
        name = f"small{number}"
        world.shape(name, make.shape(6, tenant=name, max_tasks_per_slot=limit))
        world.arrivals(name, poisson(world.chance, 6.0 / small_run_s, 24.0), small_run_s)
    world.shape("large", make.shape(24, gpus=2))
    world.arrivals("large", [5.0, 11.0, 19.0], 1.0)
    world.run(24.0)
    assert max(world.waits_s("large")) < bound_s, f"seed {seed}: {world.waits_s('large')}"
    if not limit:
        assert sum(world.opened.values()) < 4 * 24, f"seed {seed}: sixteen slots, {world.opened}"


@pytest.mark.parametrize("seed", range(3))
def test_six_equal_shapes_on_two_devices_get_equal_shares(seed):
    world = World(seed, {"a": [24, 24]})
    for number in range(6):
        world.shape(f"q{number}", make.shape(20, tenant=f"t{number}"))
        world.arrivals(f"q{number}", [0.0] * 600, 0.2)
    world.run(60.0)
    served = {name: sum(task.started_s is not None for task in tasks) for name, tasks in world.tasks.items()}
    assert min(served.values()) > 0.7 * max(served.values()), f"seed {seed}: {served}"
    assert sum(served.values()) > 0.75 * 2 * 60.0 / 0.2, "the devices were busy"
    # Each device serves one shape for its residence and for what it must have had more than those that wait.
    assert sum(world.opened.values()) <= 0.7 * 2 * 60.0 / LIMITS.residence_s


def test_a_steady_load_opens_its_slots_once():
    world = World(1, {"a": [24, 24], "b": [24, 24]})
    for number in range(3):
        world.shape(f"q{number}", make.shape(8, tenant=f"t{number}"))
        world.arrivals(f"q{number}", poisson(world.chance, 10.0, 60.0), 0.1)
    world.run(60.0)
    assert max(max(world.waits_s(name)) for name in world.tasks) < 3.0
    assert sum(world.opened.values()) <= 12, f"there is room for twelve: {world.opened}"


def test_higher_priority_waits_for_task_boundaries_only():
    world = World(1, {"a": [24]})
    world.shape("batch", make.shape(24))
    world.arrivals("batch", [0.0] * 300, 0.5)
    world.shape("urgent", make.shape(20), priority=5)
    world.arrivals("urgent", [5.0, 15.0, 25.0], 0.2)
    world.run(40.0)
    assert max(world.waits_s("urgent")) < 2.0


def test_idle_slots_end_and_their_memory_comes_back():
    world = World(1, {"a": [24]})
    world.shape("q", make.shape(8))
    world.arrivals("q", [0.0, 0.0, 0.0], 0.1)
    world.run(LIMITS.idle_s + 5.0)
    assert (world.slots, world.ledger.index.grants) == ({}, {})


def served(world: World) -> Counter[str]:
    """Tasks of each tenant that have started."""
    counts: Counter[str] = Counter()
    for name, tasks in world.tasks.items():
        counts[world.shapes[name].tenant] += sum(task.started_s is not None for task in tasks)
    return counts


@pytest.mark.parametrize("seed", range(2))
def test_weights_of_three_to_one_give_three_times_as_much(seed):
    world = World(seed, {"a": [24, 24]})
    world.weights = {"heavy": 3.0, "light": 1.0}
    for name in world.weights:
        world.shape(name, make.shape(20, tenant=name))
        world.arrivals(name, [0.0] * 900, 0.2)
    world.run(60.0)
    counts = served(world)
    assert 2.3 < counts["heavy"] / counts["light"] < 3.9, f"seed {seed}: {counts}"


def test_a_tenant_with_many_shapes_gets_no_more_than_one_with_one():
    world = World(3, {"a": [24, 24]})
    for number in range(5):
        world.shape(f"many{number}", make.shape(20, tenant="many"))
        world.arrivals(f"many{number}", [0.0] * 600, 0.2)
    world.shape("one", make.shape(20, tenant="one"))
    world.arrivals("one", [0.0] * 600, 0.2)
    world.run(60.0)
    counts = served(world)
    assert 0.7 < counts["many"] / counts["one"] < 1.4, counts
    own = {name: sum(task.started_s is not None for task in tasks) for name, tasks in world.tasks.items() if name != "one"}
    assert min(own.values()) > 0.4 * max(own.values()), f"its shapes share what it gets: {own}"


def test_who_comes_back_has_saved_nothing():
    world = World(4, {"a": [24]})
    world.shape("steady", make.shape(20, tenant="steady"))
    world.arrivals("steady", [0.0] * 900, 0.2)
    world.shape("back", make.shape(20, tenant="back"))
    world.arrivals("back", [0.0, *[40.0] * 400], 0.2)
    world.run(60.0)
    since = [task for task in world.tasks["steady"] if task.started_s is not None and task.started_s > 40.0]
    back = [task for task in world.tasks["back"] if task.started_s is not None]
    assert 0.6 < len(since) / len(back) < 1.7, f"{len(since)} against {len(back)} in its first twenty seconds"
