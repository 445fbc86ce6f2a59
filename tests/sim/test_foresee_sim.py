"""What `plan` says of a request is what then happens to it, in the simulated world of `test_plan_sim`.

Each world runs by itself, with arrivals and ends; every second or so somebody asks what would happen to a request, and then
submits exactly that. A failure prints the seed and each case that differed; `cases_of(seed)` replays one world.
"""

import random
from collections import Counter

import msgspec

from manager.core.ahead import Setup, ahead_of, with_mix
from manager.core.foresee import Forecast, When, Wish, foresee
from manager.core.index import index_of
from manager.core.mix import decode_mix, encode_mix
from manager.core.model import TenantRow
from manager.core.policies import DEFAULT_POLICY
from manager.core.shapes import Shape, shape_id
from manager.core.shares import accounted
from tests.sim.test_plan_sim import LIMITS, OPEN_S, ROUND_PAUSE_S, Task, World, poisson
from tests.unit import factories as make

CASES_MIN = 1000
WORLDS = 18
UNTIL_S = 30.0
TAIL_S = 240.0
"""Long enough for all that can ever start to have started."""
AT_ONCE_S = ROUND_PAUSE_S + OPEN_S + 0.05
"""What is placed at once starts within this: a round, and the opening of its slot."""
SETUP = Setup(limits=LIMITS, policy=DEFAULT_POLICY)


class Case(msgspec.Struct):
    """A request, what was said of it, and what became of it: where it started, and whether anything ended before that."""

    seed: int
    at_s: float
    shape: Shape
    said: Forecast
    task: Task
    ended_before: int
    node: str | None = None
    waited: bool = False

    @property
    def became(self) -> When:
        if self.task.started_s is None:
            return When.NEVER
        return When.NOW if self.task.started_s - self.at_s <= AT_ONCE_S else When.LATER

    def agrees(self) -> bool:
        match self.said.when:
            case When.NOW:
                return self.became is When.NOW and self.node in {place.node for place in self.said.places}
            case When.LATER:  # once others have ended: that may be soon
                return self.became is When.LATER or (self.became is When.NOW and self.waited)
            case said:
                return self.became is said


class Asking(World):
    """A world in which requests are asked about before they are made."""

    def __init__(self, seed: int, nodes: dict[str, list[float]]) -> None:
        super().__init__(seed, nodes)
        self.seed = seed
        self.cases: list[Case] = []
        self.ended = 0  # tasks and slots, so far
        self.stored = b""  # the mix of requests in the store

    def ask(self, shape: Shape, run_s: float) -> None:
        name = shape_id(shape)
        if name not in self.shapes:
            self.shape(name, shape)
        rows = tuple(TenantRow(tenant=shape.tenant) for shape in self.shapes.values())
        looked = msgspec.structs.replace(self.look(), tenants=rows, mix=decode_mix(self.stored))
        state = accounted(looked, *self.vtimes, 0.0)
        setup = with_mix(SETUP, state.mix)
        (said,) = foresee([Wish(shape)], ahead_of(state, index_of(state), setup), setup)
        task = Task(self.now_s, run_s)
        self.tasks[name].append(task)
        self.cases.append(Case(self.seed, self.now_s, shape, said, task, self.ended))
        self.submit(name, task)

    def round(self, due_s: float) -> None:
        if due_s == self.round_at_s:
            self.stored = encode_mix(self.ledger.mix.told)  # as it was before what this round asks for
        super().round(due_s)

    def claim(self, slot_id: str) -> None:
        super().claim(slot_id)
        task = self.running.get(slot_id)
        for case in self.cases:
            if case.task is task and case.node is None:
                case.node = self.slots[slot_id].node
                case.waited = self.ended > case.ended_before

    def finish(self, slot_id: str, task: Task) -> None:
        self.ended += 1
        super().finish(slot_id, task)

    def close(self, slot_id: str) -> None:
        self.ended += 1
        super().close(slot_id)


def cases_of(seed: int) -> Asking:
    """A random world that was run, with its cases."""
    chance = random.Random(seed)
    nodes = {name: [chance.choice([24.0, 48.0, 80.0])] * chance.choice([1, 2, 4]) for name in "abcd"[: chance.randint(2, 4)]}
    world = Asking(seed, nodes)
    load = chance.choice([0.3, 0.8, 1.5])
    for number in range(chance.randint(2, 6)):
        shape = make.shape(chance.choice([2, 6, 12, 24, 40]), chance.choice([1, 1, 1, 2]), f"t{number}")
        run_s = chance.choice([1.0, 5.0, 20.0])
        name = shape_id(shape)
        world.shape(name, shape)
        world.arrivals(name, poisson(chance, load / run_s, UNTIL_S), run_s)
    known = list(world.shapes.values())
    for number, at_s in enumerate(poisson(chance, 2.0, UNTIL_S)):
        size, gpus = chance.choice([2, 6, 12, 24, 40, 79, 100]), chance.choice([1, 1, 2, 4])
        wanted = chance.choice(known) if chance.random() < 0.3 else make.shape(size, gpus, f"asker{number}")
        run_s = chance.choice([0.5, 2.0, 5.0])
        world.at(at_s, lambda wanted=wanted, run_s=run_s: world.ask(wanted, run_s))
    world.run(UNTIL_S)
    while world.now_s < UNTIL_S + TAIL_S and any(
        c.task.started_s is None and c.said.when is not When.NEVER for c in world.cases
    ):
        world.run(world.now_s + 10.0)
    return world


def test_what_plan_says_is_what_happens() -> None:
    cases = [case for seed in range(WORLDS) for case in cases_of(seed).cases]
    wrong = [case for case in cases if not case.agrees()]
    said = Counter(case.said.when for case in cases)
    shown = [
        f"seed {c.seed} at {c.at_s:.2f} s, {c.shape.gpus} × {c.shape.memory_bytes >> 30} GiB of {c.shape.tenant}: "
        f"said {c.said.when} {[p.node for p in c.said.places]} {c.said.reason}, became {c.became} {c.node}"
        for c in wrong
    ]
    assert len(cases) >= CASES_MIN
    assert min(said[when] for when in (When.NOW, When.LATER, When.NEVER)) >= CASES_MIN / 20, said
    assert len(wrong) <= 0.01 * len(cases), "\n".join([f"{len(wrong)} of {len(cases)}, {said}", *shown])
