"""A small world on a clock of its own for the autoscaler: the real loop, policy and packing; nodes, tasks and time are played.

Each task runs in a slot of its own on the node that has least room for it. A provider starts nodes after a while, or fails as
it is told; the metrics are what a controller would show. A failure prints what happened; the same seed gives it again.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from autoscaler.loop import Autoscaler
from autoscaler.metrics_source import NoData, Reading, reading_of
from autoscaler.policy import Decision
from autoscaler.providers.interface import Instance, Listing, ProviderRefused, ProviderUnavailable
from manager.core.answers_autoscaler import DecisionNote
from manager.core.devices import Device
from manager.core.lifecycle import Cordon, SlotStatus
from manager.core.model import ClusterState, NodeInfo, NodeRow, QueueRow, SlotRow
from manager.core.packing import pack
from manager.core.quantities import GIB
from manager.core.shapes import Shape
from manager.group_needs import pack_groups
from manager.settings import AutoscalerSettings, GroupSettings, NodeSettings, Settings, SlotSettings

STEP_S = 1.0


class Task(msgspec.Struct):
    number: int
    shape: str
    arrived_s: float
    run_s: float
    node: str = ""
    started_s: float | None = None
    ended_s: float | None = None
    starts: int = 0


class Node(msgspec.Struct):
    name: str
    group: str
    sizes: tuple[int, ...]
    asked_s: float
    ready_s: float | None
    evicted_s: float | None = None
    removed: bool = False
    fenced: bool = False
    cordon: Cordon = Cordon.NONE
    cordon_by: str = ""
    cordoned_s: float = 0.0
    cordons: int = 0


class Provider:
    """Instances by name; can be told to fail."""

    def __init__(self, world: "World", group: str, *, ordered: bool = False, start_s: float | None = 30.0) -> None:
        self.world = world
        self.group = group
        self.ordered = ordered
        self.start_s = start_s
        self.instances: list[str] = []
        self.following = 0
        self.unavailable = False
        self.quota = 10**6
        self.token = 0
        self.added: list[tuple[float, str]] = []
        self.removed: list[tuple[float, str]] = []

    async def list(self, group: str) -> Listing:
        assert group == self.group
        if self.unavailable:
            raise ProviderUnavailable("no answer")
        instances = tuple(
            Instance(name=name, age_s=self.world.now_s - self.world.nodes[name].asked_s) for name in self.instances
        )
        return Listing(group=group, instances=instances, ordered=self.ordered, version=str(self.following))

    def new_names(self, listing: Listing, count: int) -> tuple[str, ...]:
        first = len(listing.instances) if self.ordered else int(listing.version)
        return tuple(f"{listing.group}-{n}" for n in range(first, first + count))

    async def add(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        self._check(listing, token)
        for name in names:
            if name in self.instances:
                continue
            if len(self.instances) >= self.quota:
                raise ProviderRefused("QuotaExceeded: no more of these")
            self.following += 1
            self.instances.append(name)
            self.added.append((self.world.now_s, name))
            ready_s = None if self.start_s is None else self.world.now_s + self.start_s
            sizes = self.world.kinds[self.group]
            self.world.nodes[name] = Node(name, self.group, sizes, self.world.now_s, ready_s)

    async def remove(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        self._check(listing, token)
        if self.ordered and names and set(names) != set(self.instances[-len(names) :]):
            raise ProviderRefused("only the last ones go")
        for name in names:
            if name in self.instances:
                self.instances.remove(name)
                self.removed.append((self.world.now_s, name))
                self.world.end_node(name)

    def _check(self, listing: Listing, token: int) -> None:
        if self.unavailable:
            raise ProviderUnavailable("no answer")
        if token < self.token:
            raise ProviderRefused("the token was replaced")
        if self.ordered and listing.version != str(self.following):
            raise ProviderUnavailable("changed since it was listed")
        self.token = token

    async def close(self) -> None:
        pass


class Source:
    """What the leading controller shows: computed each `period_s`, read `lag_s` later."""

    def __init__(self, world: "World", period_s: float = 2.0) -> None:
        self.world = world
        self.period_s = period_s
        self.lag_s = 0.0
        self.fault = ""
        self.shown: list[tuple[float, Reading]] = []
        self.round = 0
        self.computed_s = float("-inf")

    def step(self) -> None:
        now_s = self.world.now_s
        if now_s - self.computed_s < self.period_s or self.fault == "stale":
            return
        self.computed_s = now_s
        packing = pack(self.world.state(), pack_groups(self.world.settings), self.world.settings.autoscaler.drain_target_s)
        self.round += 1
        needs = {need.group: need.nodes for need in packing.needs}
        infeasible = {each.reason.value: each.tasks for each in packing.infeasible}
        self.shown.append((now_s, Reading(needs, {group: float(self.round) for group in needs}, infeasible)))

    async def read(self, groups: Sequence[str]) -> Reading:
        if self.fault == "error":
            raise NoData("connection refused")
        if self.fault == "empty":
            return reading_of([], groups)
        seen = [reading for at_s, reading in self.shown if at_s + self.lag_s <= self.world.now_s]
        if not seen:
            raise NoData("nothing yet")
        return seen[-1]

    async def close(self) -> None:
        pass


class Term:
    """Leadership over one term: a token that only grows."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.token = 0

    @property
    def leads(self) -> bool:
        return self.token > 0 and self.world.leader is self

    async def step(self) -> bool:
        if self.world.leader is None:
            self.world.token += 1
            self.token, self.world.leader = self.world.token, self
        return self.leads

    async def resign(self) -> None:
        if self.world.leader is self:
            self.world.leader = None


class Store:
    """As much of the store as the loop uses."""

    def __init__(self, world: "World") -> None:
        self.world = world

    async def look(self, *, leader: bool) -> ClusterState:
        assert not leader
        return self.world.state()

    async def cordon(
        self, node: str, mode: Cordon, by: str, deadline_s: float | None = None, *, remove: bool = False, token: int = 0
    ) -> str:
        assert deadline_s is None, "the autoscaler never gives a drain a deadline"
        assert not remove
        if by == "autoscaler" and token != self.world.token:
            return "STALE"
        found = self.world.nodes.get(node)
        if found is None or not self.world.registered(found):
            return "NONE"
        if by == "autoscaler" and found.cordon is not Cordon.NONE and found.cordon_by != by:
            return "KEPT"
        found.cordon, found.cordon_by, found.cordoned_s = mode, by if mode is not Cordon.NONE else "", self.world.now_s
        found.cordons += mode is not Cordon.NONE
        return "OK"

    async def write_journal(self, token: int, decision: bytes, kept: int) -> bool:
        if token != self.world.token:
            return False
        self.world.journal.append((self.world.now_s, msgspec.json.decode(decision, type=DecisionNote)))
        return True


class World:
    """Groups are (devices, GiB of each, min, max)."""

    def __init__(
        self,
        groups: dict[str, tuple[int, float, int, int]],
        *,
        seed: int = 1,
        start_s: float | None = 30.0,
        ordered: bool = False,
        registration_s: float = 60.0,
        **autoscaler: object,
    ) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.clock_jump_s = 0.0
        self.settings = Settings(
            node=NodeSettings(reserve_bytes=0, registration_s=registration_s),
            slots=SlotSettings(open_deadline_s=5.0),
            autoscaler=AutoscalerSettings(**autoscaler),  # type: ignore[arg-type]
            groups={
                name: GroupSettings(devices=f"{count}:{gib}GiB", workers_min=low, workers_max=high)
                for name, (count, gib, low, high) in groups.items()
            },
        )
        self.kinds = {name: (int(gib * GIB),) * count for name, (count, gib, _, _) in groups.items()}
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {}
        self.queues: dict[str, list[Task]] = {}
        self.learned_s: dict[str, float] = {}
        self.tasks: list[Task] = []
        self.arriving: list[Task] = []
        self.running: list[Task] = []
        self._devices: dict[int, tuple[int, ...]] = {}
        self.busy_kills: list[str] = []
        self.journal: list[tuple[float, DecisionNote]] = []
        self.decisions: list[tuple[float, Decision]] = []
        self.sizes: list[tuple[float, int]] = []
        self.busy_s = self.paid_s = 0.0
        self.token = 0
        self.leader: Term | None = None
        self.providers = {name: Provider(self, name, ordered=ordered, start_s=start_s) for name in groups}
        self.source = Source(self)
        self.hooks: list[tuple[float, Callable[[], None]]] = []
        self.tick_at_s = 0.0
        self.autoscaler = self.new_autoscaler()

    def new_autoscaler(self) -> Autoscaler:
        """A process that has just started."""
        return Autoscaler(
            self.settings,
            Store(self),  # type: ignore[arg-type]
            Term(self),  # type: ignore[arg-type]
            self.providers,
            self.source,
            pack_groups(self.settings),
            clock=lambda: self.now_s,
        )

    def restart(self) -> None:
        """The autoscaler is killed; another takes over when its term has passed: at once, in this world."""
        self.leader = None
        self.autoscaler = self.new_autoscaler()

    # --- what happens -------------------------------------------------------------------------------------------

    def at(self, at_s: float, deed: Callable[[], None]) -> None:
        self.hooks.append((at_s, deed))

    def submit(self, shape: str, times_s: Iterable[float], run_s: float, gib: float, gpus: int = 1) -> list[Task]:
        self.shapes.setdefault(shape, Shape("t", "default", int(gib * GIB), gpus))
        self.queues.setdefault(shape, [])
        made = [Task(len(self.tasks) + n, shape, time_s, run_s) for n, time_s in enumerate(times_s)]
        self.tasks += made
        self.arriving += made
        return made

    def start_with(self, group: str, count: int) -> None:
        """Nodes that are there from the start."""
        provider = self.providers[group]
        for _ in range(count):
            name = f"{group}-{provider.following}"
            provider.following += 1
            provider.instances.append(name)
            self.nodes[name] = Node(name, group, self.kinds[group], self.now_s, self.now_s)

    def registered(self, node: Node) -> bool:
        return node.ready_s is not None and self.now_s >= node.ready_s and not node.removed and not node.fenced

    def end_node(self, name: str) -> None:
        node = self.nodes[name]
        for task in [task for task in self.running if task.node == name]:
            self.busy_kills.append(f"{task.number} on {name} at {self.now_s}")
            self.requeue(task)
        node.removed = True

    def evict(self, name: str) -> None:
        """The machine goes away: its instance at once, what the store knows after a lease."""
        node = self.nodes[name]
        self.providers[node.group].instances.remove(name)
        node.evicted_s = self.now_s

    def requeue(self, task: Task) -> None:
        self.running.remove(task)
        task.node, task.started_s = "", None
        self.queues[task.shape].insert(0, task)

    def cancel_waiting(self, shape: str) -> None:
        """Who submitted them wants them no more."""
        for task in self.queues[shape]:
            self.tasks.remove(task)
        self.queues[shape].clear()

    def run(self, until_s: float) -> None:
        asyncio.run(self._run(until_s))

    async def _run(self, until_s: float) -> None:
        while self.now_s < until_s:
            for at_s, deed in [hook for hook in self.hooks if hook[0] <= self.now_s]:
                self.hooks.remove((at_s, deed))
                deed()
            self._step()
            self.source.step()
            if self.now_s >= self.tick_at_s:
                self.tick_at_s += self.settings.autoscaler.period_s
                await self.tick()
            self.sizes.append((self.now_s, self.size()))
            self.now_s += STEP_S

    async def tick(self) -> None:
        decision = await self.autoscaler.tick()
        if decision is not None:
            self.decisions.append((self.now_s, decision))

    def _step(self) -> None:
        for node in self.nodes.values():
            if node.evicted_s is not None and not node.fenced and self.now_s - node.evicted_s >= 12.0:
                node.fenced = True
                for task in [task for task in self.running if task.node == node.name]:
                    self.requeue(task)
        for task in [task for task in self.arriving if task.arrived_s <= self.now_s]:
            self.arriving.remove(task)
            self.queues[task.shape].append(task)
        for task in list(self.running):
            node = self.nodes[task.node]
            if node.evicted_s is None and task.started_s is not None and self.now_s - task.started_s >= task.run_s:
                task.ended_s = self.now_s
                self.running.remove(task)
                before = self.learned_s.get(task.shape, task.run_s)
                self.learned_s[task.shape] = 0.8 * before + 0.2 * task.run_s
        for shape_name in sorted(self.queues, key=lambda name: -self.shapes[name].memory_bytes * self.shapes[name].gpus):
            queue = self.queues[shape_name]
            while queue and self._place(queue[0]):
                queue.pop(0)
        self.busy_s += STEP_S * sum(self.shapes[task.shape].gpus for task in self.running)
        self.paid_s += STEP_S * sum(len(n.sizes) for n in self.nodes.values() if not n.removed and n.evicted_s is None)

    def _free(self, node: Node) -> list[int]:
        free = list(node.sizes)
        for task in self.running:
            if task.node == node.name:
                for index in self._devices[task.number]:
                    free[index] -= self.shapes[task.shape].memory_bytes
        return free

    def _place(self, task: Task) -> bool:
        shape = self.shapes[task.shape]
        best: tuple[int, str, tuple[int, ...]] | None = None
        for node in self.nodes.values():
            if not self.registered(node) or node.evicted_s is not None or node.cordon is not Cordon.NONE:
                continue
            free = self._free(node)
            fitting = sorted((size, index) for index, size in enumerate(free) if size >= shape.memory_bytes)[: shape.gpus]
            if len(fitting) == shape.gpus:
                candidate = (sum(free), node.name, tuple(index for _, index in fitting))
                best = candidate if best is None else min(best, candidate)
        if best is None:
            return False
        task.node, task.started_s, task.starts = best[1], self.now_s, task.starts + 1
        self._devices[task.number] = best[2]
        self.running.append(task)
        return True

    # --- what is seen -------------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        now_ms = int((self.now_s + self.clock_jump_s) * 1000) + 10**9
        slots = tuple(
            SlotRow(
                slot_id=f"s{task.number}.{task.starts}",
                shape_id=task.shape,
                status=SlotStatus.OPEN,
                node=task.node,
                incarnation="i",
                devices=tuple(f"d{index}" for index in self._devices[task.number]),
                opened_ms=now_ms,
                running=1,
            )
            for task in self.running
        )
        by_shape: dict[str, int] = defaultdict(int)
        for task in self.running:
            by_shape[task.shape] += 1
        queues = tuple(
            QueueRow(
                shape_id=name,
                shape=self.shapes[name],
                depth=len(queue),
                head=1 if queue else None,
                head_queued_ms=now_ms if queue else None,
                run_s=self.learned_s.get(name),
            )
            for name, queue in self.queues.items()
            if queue or by_shape[name]
        )
        return ClusterState(
            now_ms=now_ms,
            queues=queues,
            slots=slots,
            nodes=tuple(self._row(node, now_ms) for node in self.nodes.values() if self._known(node)),
        )

    def _known(self, node: Node) -> bool:
        return node.ready_s is not None and self.now_s >= node.ready_s

    def _row(self, node: Node, now_ms: int) -> NodeRow:
        devices = tuple(Device(f"d{n}", n, "simulated", "m", "", size, f"d{n}") for n, size in enumerate(node.sizes))
        info = NodeInfo(hostname=node.name, pid=1, source="simulated", version="", devices=devices, group=node.group)
        beat = int(self.now_s if node.evicted_s is None else node.evicted_s)
        return NodeRow(
            node=node.name,
            incarnation="i",
            beat=beat,
            info=info,
            fenced=node.fenced,
            left=node.removed,
            address="tcp://a",
            registered_ms=now_ms - int((self.now_s - (node.ready_s or 0.0)) * 1000),
            cordon=node.cordon,
            cordon_by=node.cordon_by,
            cordon_ms=now_ms - int((self.now_s - node.cordoned_s) * 1000),
        )

    def size(self) -> int:
        return sum(len(provider.instances) for provider in self.providers.values())

    def added(self) -> list[tuple[float, str]]:
        return sorted(each for provider in self.providers.values() for each in provider.added)

    def removed(self) -> list[tuple[float, str]]:
        return sorted(each for provider in self.providers.values() for each in provider.removed)

    def size_at(self, at_s: float) -> int:
        return [size for when_s, size in self.sizes if when_s <= at_s][-1]

    def directions(self) -> list[tuple[float, int]]:
        """Moments at which the size began to move the other way."""
        changes: list[tuple[float, int]] = []
        for (_, before), (at_s, after) in zip(self.sizes, self.sizes[1:], strict=False):
            sign = (after > before) - (after < before)
            if sign and (not changes or changes[-1][1] != sign):
                changes.append((at_s, sign))
        return changes

    def reasons(self) -> set[str]:
        return {group.reason for _, note in self.journal for group in note.groups}

    def check(self) -> None:
        """What must hold in every world."""
        assert self.busy_kills == []
        for task in self.tasks:
            assert task.starts <= 1 or any(node.evicted_s is not None for node in self.nodes.values()), task
