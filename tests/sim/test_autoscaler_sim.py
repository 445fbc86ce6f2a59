"""The autoscaler's exam: each scenario a deterministic world, each with what it must not do. S1 to S17 as they were set.

Ticks come every 5 s; the first one only learns that the metrics change, so a world's work begins at 20 s.
"""

import asyncio
import itertools
import random

import pytest

from autoscaler.policy import Add, Drain, Reason, Remove
from manager.core.model import ClusterState, QueueRow
from manager.core.node_kinds import node_kind
from manager.core.packing import PackGroup, pack
from manager.core.quantities import GIB
from manager.core.shapes import Shape
from manager.metrics import AUTOSCALER_METRICS_KNOWN
from tests.sim.autoscaler_world import World

PERIOD_S = 5.0
BEGIN_S = 20.0
WINDOW_S = 120.0
EIGHT = {"g": (8, 192.0, 0, 16)}
FOUR = {"g": (4, 192.0, 0, 16)}
ONE = {"g": (1, 192.0, 0, 16)}


def waits_s(world: World) -> list[float]:
    return sorted((t.started_s if t.started_s is not None else world.now_s) - t.arrived_s for t in world.tasks)


def p95(values: list[float]) -> float:
    return values[int(0.95 * (len(values) - 1))]


def test_s1_a_step_to_64_one_gpu_tasks_gets_the_packed_need_in_two_ticks_without_overshoot() -> None:
    world = World(EIGHT)
    world.submit("whole", [BEGIN_S] * 64, 300.0, 190.0)
    world.run(BEGIN_S + 200)
    assert world.size_at(BEGIN_S + 2 * PERIOD_S) == 8
    assert max(size for _, size in world.sizes) == 8
    assert all(task.started_s is not None for task in world.tasks)
    world.check()


def test_s2_a_ramp_of_an_hour_is_followed_without_waste() -> None:
    world = World({"g": (4, 192.0, 0, 40)})
    chance = random.Random(7)
    at_s, times = BEGIN_S, []
    while at_s < 3600:
        rate = 0.1 + 0.9 * (1 - abs(at_s - 1800) / 1800)
        at_s += chance.expovariate(rate)
        times.append(at_s)
    world.submit("r", times, 60.0, 190.0)
    world.run(3600)
    assert world.busy_s / world.paid_s >= 0.7
    assert p95(waits_s(world)) <= 30.0 + 2 * PERIOD_S
    world.check()


def test_s3_a_burst_is_met_in_two_ticks_and_released_after_the_window() -> None:
    world = World({"g": (8, 192.0, 1, 12)})
    world.submit("base", [BEGIN_S + 10.0 * n for n in range(40)], 30.0, 190.0)
    burst = [200.0 + n * 0.6 for n in range(100)]
    world.submit("burst", burst, 30.0, 190.0)
    world.run(900)
    full = max(size for _, size in world.sizes)
    assert full <= 12
    assert world.size_at(260) >= 4
    assert world.sizes[-1][1] == 1
    assert len(world.directions()) <= 3  # up to the base, up for the burst, down
    world.check()


def test_s3b_a_burst_at_once_reaches_its_cap_in_two_ticks() -> None:
    world = World({"g": (8, 192.0, 1, 8)})
    world.submit("burst", [200.0] * 200, 30.0, 190.0)
    world.run(900)
    assert world.size_at(200 + 2 * PERIOD_S) == 8
    assert world.sizes[-1][1] == 1
    assert len(world.directions()) <= 3
    world.check()


def test_s4_a_sawtooth_shorter_than_the_window_does_not_flap() -> None:
    world = World(FOUR)
    for beginning in range(int(BEGIN_S), 1200, 60):
        world.submit(f"w{beginning}", [float(beginning)] * 16, 20.0, 190.0)
    world.run(1200)
    assert len(world.added()) <= 1.2 * 4
    changes = [at_s for at_s, _ in world.directions()]
    assert all(later - earlier >= WINDOW_S for earlier, later in itertools.pairwise(changes))
    world.check()


def test_s5_a_start_that_takes_longer_than_any_window_is_waited_for() -> None:
    world = World(FOUR, start_s=600.0, registration_s=900.0)
    world.submit("a", [BEGIN_S] * 8, 60.0, 190.0)
    world.run(700)
    assert len(world.added()) == 2
    assert world.removed() == []
    assert all(task.started_s is not None for task in world.tasks)
    world.check()


def test_s6_stale_metrics_do_not_count_work_twice() -> None:
    world = World(FOUR, start_s=10.0)
    world.source.lag_s = 15.0
    world.submit("a", [BEGIN_S] * 8, 200.0, 190.0)
    world.run(200)
    assert len(world.added()) == 2
    world.check()


@pytest.mark.parametrize("fault", ["error", "empty", "stale"])
def test_s7_without_metrics_capacity_is_held_and_the_queue_may_raise_it(fault: str) -> None:
    world = World(FOUR)
    world.submit("before", [BEGIN_S] * 8, 60.0, 190.0)
    known = AUTOSCALER_METRICS_KNOWN.collect()[0].samples[0]

    def fail() -> None:
        world.source.fault = fault

    def mend() -> None:
        world.source.fault = ""

    world.at(100.0, fail)
    world.at(1900.0, mend)
    world.submit("during", [1000.0] * 16, 60.0, 190.0)
    world.run(1890)
    assert world.removed() == []
    assert world.size() == 4, "the work that came meanwhile was seen in the queue"
    assert all(task.ended_s is not None for task in world.tasks)
    assert "MetricsUnknown" in world.reasons()
    assert AUTOSCALER_METRICS_KNOWN.collect()[0].samples[0].value == 0 != known
    world.run(1900 + WINDOW_S)
    assert world.removed() == [], "the window begins anew"
    world.run(2200)
    assert world.size() == 0
    world.check()


def test_s8_a_listing_that_fails_ends_nothing_and_starts_nothing_twice() -> None:
    world = World(FOUR)
    world.submit("a", [BEGIN_S] * 8, 400.0, 190.0)
    provider = world.providers["g"]

    def fail() -> None:
        provider.unavailable = True

    def mend() -> None:
        provider.unavailable = False

    world.at(26.0, fail)
    world.at(300.0, mend)
    world.run(320)
    assert len(world.added()) == 2
    assert world.removed() == []
    assert "ProviderUnavailable" in world.reasons()
    world.check()


def test_s9_a_quota_makes_it_pause_and_try_the_other_group() -> None:
    world = World({"a": (4, 192.0, 0, 8), "b": (4, 192.0, 0, 8)})
    world.providers["a"].quota = 0
    world.submit("x", [BEGIN_S] * 8, 60.0, 190.0)
    world.run(200)
    assert [name for _, name in world.added()] == ["b-0", "b-1"]
    assert all(task.ended_s is not None for task in world.tasks)
    blocked = [g.blocked_reason for _, note in world.journal for g in note.groups if g.group == "a" and g.blocked_s > 0]
    assert blocked
    assert "QuotaExceeded" in blocked[0]
    tries = [a for _, d in world.decisions for a in d.actions if isinstance(a, Add) and a.group == "a"]
    assert len(tries) <= 4
    world.check()


def test_s9b_who_never_registers_is_ended_after_its_time_and_none_is_leaked() -> None:
    world = World({"a": (4, 192.0, 0, 8), "b": (4, 192.0, 0, 8)})
    world.providers["a"].start_s = None
    world.submit("x", [BEGIN_S] * 8, 60.0, 190.0)
    world.run(700)
    ended = world.providers["a"].removed
    began = {name: at_s for at_s, name in world.providers["a"].added}
    assert ended
    assert all(60.0 <= at_s - began[name] <= 60.0 + 2 * PERIOD_S for at_s, name in ended)
    assert [name for _, name in world.providers["b"].added] == ["b-0", "b-1"]
    assert all(task.ended_s is not None for task in world.tasks)
    assert "NotRegistered" in world.reasons()
    assert world.size() == 0
    world.check()


def test_s9c_pauses_grow_while_nothing_starts() -> None:
    world = World({"a": (4, 192.0, 0, 8)}, backoff_s=10.0, backoff_s_max=300.0)
    world.providers["a"].quota = 0
    world.submit("x", [BEGIN_S] * 4, 60.0, 190.0)
    world.run(1200)
    tries = [at_s for at_s, d in world.decisions for a in d.actions if isinstance(a, Add)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps[0] <= 15.0
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 300.0
    assert world.size() == 0


KINDS = {"small": (4, 24), "middle": (4, 64), "large": (2, 192)}


def _cheapest(demand: dict[int, int]) -> int:
    """The least memory of nodes that holds it, by trying all: one device holds any number of slots that fit."""
    best = 10**9
    for counts in itertools.product(range(4), repeat=3):
        cost = sum(n * c * gib for n, (c, gib) in zip(counts, KINDS.values(), strict=True))
        if cost >= best:
            continue
        devices = [gib for n, (c, gib) in zip(counts, KINDS.values(), strict=True) for _ in range(n * c)]
        if _fits(sorted((size for size, n in demand.items() for _ in range(n)), reverse=True), devices):
            best = cost
    return best


def _fits(items: list[int], devices: list[int]) -> bool:
    if not items:
        return True
    tried = set()
    for at, free in enumerate(devices):
        if free >= items[0] and free not in tried:
            tried.add(free)
            devices[at] -= items[0]
            if _fits(items[1:], devices):
                devices[at] += items[0]
                return True
            devices[at] += items[0]
    return False


def test_s10_mixed_shapes_get_the_right_pool_at_nearly_the_least_cost() -> None:
    chance = random.Random(3)
    groups = [PackGroup(name, node_kind(f"{count}:{gib}GiB"), 50) for name, (count, gib) in KINDS.items()]
    paid = least = 0
    for _ in range(40):
        demand = {16: chance.randrange(7), 64: chance.randrange(4), 192: chance.randrange(3)}
        queues = tuple(
            QueueRow(shape_id=str(gib), shape=Shape("t", "d", gib * GIB), depth=count) for gib, count in demand.items() if count
        )
        packing = pack(ClusterState(0, queues, (), ()), groups, 30.0)
        paid += sum(need.nodes * KINDS[need.group][0] * KINDS[need.group][1] for need in packing.needs)
        least += _cheapest(demand)
        if demand[192]:
            assert next(need.nodes for need in packing.needs if need.group == "large") >= 1
    assert paid <= 1.1 * least


@pytest.mark.parametrize("tasks", [1, 200])
@pytest.mark.parametrize("devices", [1, 8])
def test_s11_what_nothing_could_hold_starts_nothing(tasks: int, devices: int) -> None:
    world = World({"g": (devices, 192.0, 0, 16)})
    world.submit("huge", [BEGIN_S] * tasks, 60.0, 500.0)
    world.run(300)
    assert world.added() == []
    assert world.journal[-1][1].infeasible == {"ExceedsLargestDevice": tasks}


def test_s12_down_to_zero_and_back_with_a_trickle() -> None:
    world = World(ONE)
    world.submit("drip", [BEGIN_S + 60.0 * n for n in range(20)], 10.0, 190.0)
    world.submit("late", [2400.0], 10.0, 190.0)
    world.run(2600)
    assert [name for _, name in world.added()] == ["g-0", "g-1"], "no coming and going between two drops"
    assert world.size_at(1180 + 2 * WINDOW_S) == 0
    assert all(task.ended_s is not None for task in world.tasks)
    world.check()


@pytest.mark.parametrize("ordered", [False, True])
def test_s13_a_long_task_survives_a_shrink_and_who_starts_goes_first(ordered: bool) -> None:
    world = World(ONE, ordered=ordered, registration_s=10_000.0)
    world.submit("short", [BEGIN_S] * 3, 100.0, 190.0)
    long = world.submit("long", [BEGIN_S + 60.0], 2000.0, 190.0)
    world.at(200.0, lambda: setattr(world.providers["g"], "start_s", 5000.0))
    world.submit("vain", [205.0] * 6, 30.0, 190.0)
    world.at(230.0, lambda: world.cancel_waiting("vain"))
    world.run(900)
    late = {name for at_s, name in world.added() if at_s >= 200.0}
    gone = [name for _, name in world.removed()]
    assert late
    assert set(gone[: len(late)]) == late
    assert long[0].node in world.providers["g"].instances
    world.run(2600)
    assert long[0].ended_s is not None
    assert world.size() == 0
    world.check()


def test_s13c_one_that_registers_between_look_and_removal_is_drained_instead() -> None:
    world = World(ONE, start_s=1000.0, registration_s=10_000.0, down_window_s=30.0)
    world.submit("a", [BEGIN_S] * 2, 20.0, 190.0)
    world.at(40.0, lambda: world.cancel_waiting("a"))
    ask = world.autoscaler.store.cordon

    async def it_has_just_registered(node: str, *args: object, **more: object) -> str:
        if node == "g-0" and not world.nodes[node].cordons:
            world.nodes[node].ready_s = world.now_s
        return await ask(node, *args, **more)  # type: ignore[arg-type]

    world.autoscaler.store.cordon = it_has_just_registered  # type: ignore[method-assign]
    world.run(120)
    chosen = [a for _, d in world.decisions for a in d.actions if isinstance(a, Remove) and a.unregistered]
    assert {name for action in chosen for name in action.names} >= {"g-0", "g-1"}
    removed = {name: at_s for at_s, name in world.removed()}
    assert world.nodes["g-0"].cordons == 1
    assert removed["g-1"] < removed["g-0"], "it was drained first, and ended when it was empty"


@pytest.mark.parametrize("every", [1, 2, 3])
def test_s14_killed_in_the_middle_of_a_scale_up_it_converges_without_orphans(every: int) -> None:
    world = World({"g": (4, 192.0, 0, 16)}, step_up_max=2)
    for n in range(1, 12):
        world.at(BEGIN_S + n * every * PERIOD_S - 1, world.restart)
    world.submit("a", [BEGIN_S] * 32, 300.0, 190.0)
    world.run(BEGIN_S + 200)
    assert len(world.added()) == 8
    assert world.removed() == []
    assert set(world.nodes) == set(world.providers["g"].instances)
    world.check()


def test_s15_a_cold_start_asks_for_the_need_and_not_for_more_each_tick() -> None:
    world = World(EIGHT, start_s=120.0, registration_s=300.0)
    world.submit("a", [BEGIN_S] * 16, 600.0, 190.0)
    world.run(300)
    assert len(world.added()) == 2
    world.check()


def test_s16_two_autoscalers_a_clock_that_jumps_and_a_tick_twice() -> None:
    world = World(FOUR)
    rival = world.new_autoscaler()

    def jump() -> None:
        world.clock_jump_s += 86_400.0

    def twice() -> None:
        asyncio.get_running_loop().create_task(world.tick())

    async def other() -> None:
        assert await rival.tick() is None, "one acts"

    def rivals() -> None:
        asyncio.get_running_loop().create_task(other())

    for at_s in range(int(BEGIN_S), 200, 7):
        world.at(float(at_s), twice)
        world.at(float(at_s) + 1, rivals)
    world.at(100.0, jump)
    world.submit("a", [BEGIN_S] * 8, 400.0, 190.0)
    world.run(300)
    assert len(world.added()) == 2
    assert world.removed() == []
    world.check()


def test_s16b_a_decision_of_one_that_was_replaced_is_refused() -> None:
    world = World(FOUR)
    old = world.autoscaler
    world.run(15)
    world.restart()
    world.submit("a", [15.0] * 8, 400.0, 190.0)
    world.run(40)
    assert len(world.added()) == 2

    async def late() -> str:
        provider = world.providers["g"]
        listing = await provider.list("g")
        action = Drain("g", ("g-0",), Reason.NEED_BELOW_SIZE)
        return await old._do(action, listing)  # what was decided before the other took over

    assert "STALE" in asyncio.run(late())
    assert world.nodes["g-0"].cordons == 0


def test_in_shadow_it_decides_and_changes_nothing() -> None:
    world = World(FOUR, mode="shadow")
    world.start_with("g", 1)
    world.submit("a", [BEGIN_S] * 8, 60.0, 190.0)
    world.run(500)
    assert world.added() == world.removed() == []
    assert all(node.cordons == 0 for node in world.nodes.values())
    done = [action for _, note in world.journal for action in note.actions]
    assert {action.action for action in done} == {"add", "drain"}
    assert {action.result for action in done} == {"shadow"}
    assert len(world.journal) < 12, "what is decided again and again is counted, not written"


def test_s17_half_of_the_nodes_are_evicted() -> None:
    world = World(FOUR)
    world.submit("a", [BEGIN_S] * 32, 300.0, 190.0)

    def storm() -> None:
        for name in list(world.providers["g"].instances)[:4]:
            world.evict(name)

    world.at(150.0, storm)
    world.run(800)
    replaced = [at_s for at_s, _ in world.added() if at_s >= 150.0]
    assert len(replaced) == 4
    assert max(replaced) <= 150.0 + 2 * PERIOD_S + 2.0
    assert all(task.ended_s is not None for task in world.tasks)
    assert max(size for _, size in world.sizes) <= 8
    assert world.busy_kills == []


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ordered", [False, True])
def test_no_running_task_is_ever_ended(seed: int, ordered: bool) -> None:
    """Whatever comes: mixed shapes, restarts, failing metrics and listings."""
    world = World({"a": (4, 64.0, 0, 6), "b": (2, 192.0, 0, 6)}, seed=seed, ordered=ordered, down_window_s=30.0)
    chance = world.chance
    for n in range(12):
        at_s = chance.uniform(BEGIN_S, 900)
        world.submit(f"q{n}", [at_s] * chance.randrange(1, 20), chance.choice([5.0, 40.0, 200.0]), chance.choice([16, 60, 180]))
    for _ in range(4):
        world.at(chance.uniform(BEGIN_S, 900), world.restart)
        fault, at_s = chance.choice(["error", "empty", "stale"]), chance.uniform(BEGIN_S, 900)
        world.at(at_s, lambda fault=fault: setattr(world.source, "fault", fault))
        world.at(at_s + 60, lambda: setattr(world.source, "fault", ""))
        provider, at_s = world.providers[chance.choice("ab")], chance.uniform(BEGIN_S, 900)
        world.at(at_s, lambda provider=provider: setattr(provider, "unavailable", True))
        world.at(at_s + 30, lambda provider=provider: setattr(provider, "unavailable", False))
    world.run(1800)
    world.check()
    assert all(task.ended_s is not None for task in world.tasks)
    assert world.size() == 0
