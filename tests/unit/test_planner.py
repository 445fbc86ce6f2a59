"""The plan: as many slots as drain the queue in time and fit, victims where they do not, and no change without a cause."""

import time

import msgspec
import pytest

from manager.core.closing import SEARCHES_MAX, Close, TooLarge
from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import TenantRow, priority_offset
from manager.core.needs import UNKNOWN_OPEN_MAX, slots_wanted, wake_depth
from manager.core.planner import AGAIN_S, NEVER, Open, plan
from manager.core.quantities import GIB
from manager.core.shapes import Grant
from manager.core.victims import victims
from tests.unit import factories as make

NODE = {"a": [24]}


def planned(state, held=(), vtimes=None, limits=make.LIMITS):
    """The plan, where each shape has had so many device-seconds of its tenant's."""
    had = vtimes or {}
    queues = tuple(msgspec.structs.replace(queue, vtime_s=had.get(queue.shape_id, 0.0)) for queue in state.queues)
    state = msgspec.structs.replace(state, queues=queues)
    return plan(state, index_of(state), frozenset(held), limits)


def busy(count, shape_id="x", **more):
    return [make.opened(f"{shape_id}{i}", shape_id, "a", "d0", **more) for i in range(count)]


# --- how many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "slots", "run_s", "waited_s", "served_max", "expected"),
    [
        pytest.param(0, 3, 1.0, 0, 0, 0, id="nothing queued: none, whatever runs"),
        pytest.param(1, 0, None, 0, 0, 1, id="one task: one slot"),
        pytest.param(100, 0, None, 0, 0, UNKNOWN_OPEN_MAX, id="unknown run time: a few at first"),
        pytest.param(100, 4, None, 0, 0, 8, id="unknown run time: twice as many when these have been at work for a while"),
        pytest.param(3, 0, None, 0, 0, 3, id="unknown run time: never more than tasks"),
        pytest.param(100, 0, 0.01, 0, 0, 1, id="short tasks: one slot drains them in time"),
        pytest.param(101, 0, 0.01, 0, 0, 2, id="one more than it can"),
        pytest.param(50, 0, 10.0, 0, 0, 50, id="long tasks: one slot for each"),
        pytest.param(500, 0, 10.0, 0, 0, 64, id="the operator's limit"),
        pytest.param(10, 2, 0.001, 5, 0, 4, id="a head that waits for too long doubles"),
        pytest.param(10, 0, 0.001, 5, 0, 1, id="a head that waits where there is no slot asks for one"),
        pytest.param(10, 3, 0.001, 0, 1, 13, id="a slot per task: those that are busy serve nobody else"),
        pytest.param(10, 0, 0.001, 0, 5, 2, id="five tasks per slot"),
        pytest.param(4, 1, 0.001, 0, 5, 1, id="what an open slot may still serve is counted"),
    ],
)
def test_slots_wanted(depth, slots, run_s, waited_s, served_max, expected):
    of = make.shape(1, max_tasks_per_slot=served_max)
    queue = make.queue("x", of, depth, run_s=run_s, waited_s=waited_s)
    assert slots_wanted(queue, busy(slots, served=1 if waited_s else 0), make.NOW_MS, make.LIMITS) == expected


def test_slots_that_load_what_they_need_are_waited_for():
    queue = make.queue("x", make.shape(1), 10, run_s=0.001, waited_s=5)
    loading = [*busy(2, served=3), make.opened("x9", "x", "a", "d0", served=0, age_s=5)]
    assert slots_wanted(queue, loading, make.NOW_MS, make.LIMITS) == 1


def test_slots_that_are_all_at_work_on_a_long_first_task_are_doubled():
    queue = make.queue("x", make.shape(1), 10, run_s=0.001, waited_s=5)
    assert slots_wanted(queue, busy(3, served=0, age_s=30), make.NOW_MS, make.LIMITS) == 6


@pytest.mark.parametrize(
    ("cpus", "starting", "expected"),
    [
        pytest.param((0, 0), 0, 20, id="not known: no limit"),
        pytest.param((8, 8), 0, 16, id="one per CPU of all hosts"),
        pytest.param((8, 8), 6, 10, id="less those that are starting"),
        pytest.param((1, 1), 0, UNKNOWN_OPEN_MAX, id="a few always"),
        pytest.param((2, 2), 9, 1, id="the first slot of a shape always"),
    ],
)
def test_hosts_start_no_more_executors_than_they_have_cpus(cpus, starting, expected):
    look = make.state(
        [make.queue("x", make.shape(1), 20, run_s=10.0), make.queue("y", make.shape(1), 0)],
        [make.opened(f"y{i}", "y", "a", "d0", age_s=1.0) for i in range(starting)],
        {"a": [192], "b": [192]},
    )
    rows = tuple(
        msgspec.structs.replace(row, info=msgspec.structs.replace(row.info, cpus=count))
        for row, count in zip(look.nodes, cpus, strict=True)
    )
    answer = planned(msgspec.structs.replace(look, nodes=rows))
    assert sum(o.count for o in answer.open) == expected
    assert answer.again_s is not None


@pytest.mark.parametrize(
    ("slots", "run_s", "expected"),
    [
        pytest.param(0, 0.01, 1, id="no slot: the first task"),
        pytest.param(2, 0.01, 200, id="what two slots drain in time"),
        pytest.param(2, 100.0, 1, id="long tasks: each one"),
        pytest.param(2, None, 2, id="unknown"),
        pytest.param(1, 0.0, 10000, id="tasks that need no time"),
    ],
)
def test_a_round_is_asked_for_at_the_depth_that_changes_something(slots, run_s, expected):
    assert wake_depth(make.queue("x", make.shape(1), 1, run_s=run_s), slots, make.LIMITS) == expected


# --- opening --------------------------------------------------------------------------------------------------------


def test_nothing_to_do():
    assert planned(make.state([], [], NODE)).open == ()
    answer = planned(make.state([make.queue("x", make.shape(8), 0)], busy(1), NODE))
    assert (answer.open, answer.close, answer.drop, answer.again_s) == ((), (), (), None)


def test_what_fits_is_opened_and_one_more_is_held():
    answer = planned(make.state([make.queue("x", make.shape(8), 100, run_s=5.0)], [], NODE))
    assert answer.open == (Open("x", 4, 0),)
    assert answer.again_s == AGAIN_S


def test_where_all_fits_none_is_held():
    assert planned(make.state([make.queue("x", make.shape(8), 2, run_s=5.0)], [], NODE)).open == (Open("x", 2, 0),)


def test_without_any_node_each_shape_asks_for_one():
    state = make.state([make.queue(name, make.shape(8), 9) for name in "xy"])
    assert planned(state).open == (Open("x", 1, 0), Open("y", 1, 0))


def test_max_tasks_per_slot_travels_with_the_request():
    of = make.shape(8, max_tasks_per_slot=1)
    assert planned(make.state([make.queue("x", of, 1)], [], NODE)).open == (Open("x", 1, 1),)


def test_slots_on_their_way_use_their_room_so_that_none_is_opened_past_it():
    """Met: a round before the first slots were open asked for as many again."""
    queues = [make.queue("x", make.shape(8), 100, run_s=5.0), make.queue("y", make.shape(8), 100, run_s=5.0)]
    on_their_way = [make.requested(f"x{i}", "x") for i in range(3)]
    answer = planned(make.state(queues, on_their_way, NODE))
    assert answer.open == (Open("y", 1, 0),)  # held: no room is left for it


def test_a_shape_with_a_held_slot_asks_for_no_more():
    state = make.state([make.queue("x", make.shape(8), 100, run_s=5.0)], [*busy(3), make.requested("h", "x")], NODE)
    answer = planned(state, held=["h"])
    assert (answer.open, answer.drop, answer.again_s) == ((), (), AGAIN_S)
    assert dict(answer.wake_at) == {"x": NEVER}, "more work changes nothing"


def test_room_is_shared_by_order_of_virtual_time():
    queues = [make.queue(name, make.shape(24), 5, run_s=5.0) for name in "xyz"]
    answer = planned(make.state(queues, [], {"a": [24, 24]}), vtimes={"x": 9.0, "y": 1.0, "z": 5.0})
    assert answer.open == (Open("y", 3, 0), Open("z", 1, 0), Open("x", 1, 0))


def test_priority_stands_before_virtual_time():
    queues = [make.queue("x", make.shape(24), 1), make.queue("y", make.shape(24), 1, priority=5)]
    answer = planned(make.state(queues, [], NODE), vtimes={"x": 0.0, "y": 100.0})
    assert [item.shape_id for item in answer.open] == ["y", "x"]


@pytest.mark.parametrize(
    ("depth", "slots", "held", "dropped"),
    [
        pytest.param(0, [make.requested("r", "x"), make.requested("h", "x")], ["h"], {"r", "h"}, id="nothing queued"),
        pytest.param(0, busy(1), [], set(), id="an open slot is never dropped"),
        pytest.param(9, [make.requested("r", "x")], [], set(), id="wanted"),
        pytest.param(1, [make.requested("h1", "x"), make.requested("h2", "x")], ["h1", "h2"], {"h2"}, id="one held too many"),
        pytest.param(1, [make.requested("r1", "x"), make.requested("r2", "x")], [], set(), id="on its way: let it come"),
    ],
)
def test_requests_that_nobody_needs_are_dropped(depth, slots, held, dropped):
    answer = planned(make.state([make.queue("x", make.shape(24), depth, run_s=0.01)], slots, NODE), held=held)
    assert set(answer.drop) == dropped


# --- victims --------------------------------------------------------------------------------------------------------

LARGE = make.shape(24)


def wanting(*, held="h", priority=0, gib=24.0):
    return make.queue("large", make.shape(gib), 1, priority=priority), make.requested(held, "large")


@pytest.mark.parametrize(
    ("slot", "vtimes", "closed"),
    [
        pytest.param({"idle_s": 0.1}, {"x": 0.0, "large": 9.0}, True, id="an idle slot may always go"),
        pytest.param({}, {"x": 2.1, "large": 1.0}, True, id="a busy one whose shape has had more"),
        pytest.param({}, {"x": 1.9, "large": 1.0}, False, id="not one whose shape has had about as much"),
        pytest.param({"age_s": 0.5}, {"x": 5.0}, False, id="not before the minimum residence"),
        pytest.param({"flag": SlotFlag.CLOSE}, {"x": 5.0}, False, id="not twice"),
    ],
)
def test_who_goes_for_a_shape_that_waits(slot, vtimes, closed):
    queue, held = wanting()
    others = make.queue("x", make.shape(24), 50, run_s=1.0)
    answer = planned(make.state([queue, others], [make.opened("v", "x", "a", "d0", **slot), held], NODE), ["h"], vtimes)
    assert answer.close == ((Close("v", "large"),) if closed else ())


@pytest.mark.parametrize(
    ("priority", "own", "own_depth", "closed"),
    [
        pytest.param(5, 0, 50, True, id="a higher priority goes first, whatever was had"),
        pytest.param(0, 5, 50, False, id="a lower one does not"),
        pytest.param(5, 0, 0, False, id="with nothing behind it the busy one is idle at its boundary"),
    ],
)
def test_priority_among_busy_slots(priority, own, own_depth, closed):
    queue, held = wanting(priority=priority)
    others = make.queue("x", make.shape(24), own_depth, priority=own)
    answer = planned(make.state([queue, others], [*busy(1), held], NODE), ["h"], {"x": 1.0, "large": 5.0})
    assert bool(answer.close) == closed


@pytest.mark.parametrize(("others", "closed"), [(1, 0), (2, 1)])
def test_a_shape_takes_no_busy_slot_from_one_that_has_no_more_devices_than_itself(others, closed):
    """Equal shapes settle at equal parts; what each had in the past does not make them change places for ever."""
    queues = [make.queue(name, make.shape(8), 50, run_s=5.0) for name in "xy"]
    slots = [make.opened(f"x{i}", "x", "a", f"d{i}") for i in range(others)]
    slots += [make.opened("y0", "y", "b", "d0"), make.requested("h", "y")]
    state = make.state(queues, slots, {"a": [8.0] * others, "b": [8]})
    assert len(planned(state, ["h"], {"x": 9.0, "y": 1.0}).close) == closed


def test_idle_goes_before_busy_and_the_longest_idle_first():
    queue, held = wanting(gib=8)
    slots = [
        make.opened("b", "x", "a", "d0"),
        make.opened("i", "x", "a", "d0", idle_s=1),
        make.opened("j", "x", "a", "d0", idle_s=9),
    ]
    answer = planned(make.state([queue, make.queue("x", make.shape(8), 0)], [*slots, held], NODE), ["h"], {"x": 5.0})
    assert answer.close == (Close("j", "large"),)


def test_short_tasks_are_asked_before_long_ones():
    queue, held = wanting()
    queues = [queue, make.queue("x", LARGE, 9, run_s=100.0), make.queue("y", LARGE, 9, run_s=0.1)]
    slots = [make.opened("long", "x", "a", "d0"), make.opened("short", "y", "a", "d1"), held]
    answer = planned(make.state(queues, slots, {"a": [24, 24]}), ["h"], {"x": 5.0, "y": 5.0})
    assert answer.close == (Close("short", "large"),)


def test_victims_are_slots_whose_end_makes_the_shape_fit_and_their_room_is_kept():
    queue, held = wanting()
    small = make.queue("x", make.shape(12), 50, run_s=1.0)
    slots = [
        make.opened("a0", "x", "a", "d0"),
        make.opened("b0", "x", "b", "d0"),
        make.opened("b1", "x", "b", "d0"),
        held,
    ]
    answer = planned(make.state([queue, small], slots, {"a": [24], "b": [24]}), ["h"], {"x": 5.0})
    assert answer.close == (Close("a0", "large"),)
    assert answer.keep == (("h", Grant("a", ("d0",), 24 * GIB)),)
    # There is room for one small slot beside a0: it is kept, so none is opened there; one is held to show the need.
    assert answer.open == (Open("x", 1, 0),)


def test_while_the_victims_end_no_others_are_chosen_and_the_room_stays_kept():
    queue, held = wanting()
    small = make.queue("x", make.shape(12), 50, run_s=1.0)
    slots = [
        make.opened("a0", "x", "a", "d0", flag=SlotFlag.CLOSE),
        make.opened("b0", "x", "b", "d0"),
        make.opened("b1", "x", "b", "d0"),
        make.requested("h2", "x"),
        held,
    ]
    answer = planned(make.state([queue, small], slots, {"a": [24], "b": [24]}), ["h", "h2"], {"x": 5.0})
    assert (answer.close, answer.open) == ((), ())
    assert answer.keep == (("h", Grant("a", ("d0",), 24 * GIB)),)


def test_what_was_given_back_is_not_given_to_small_shapes():
    queue, held = wanting()
    small = make.queue("x", make.shape(12), 50, run_s=1.0)
    slots = [make.opened("a0", "x", "a", "d0"), held]  # a1 has ended; a0 has not yet been chosen again
    answer = planned(make.state([queue, small], slots, NODE), ["h"], {"x": 5.0})
    assert answer.close == (Close("a0", "large"),)
    assert answer.open == (Open("x", 1, 0),)


def test_slots_in_their_first_second_are_waited_for_where_they_are_in_the_way():
    """Slots that end by themselves are always young: without this a large shape would never get a node of them."""
    queue, held = wanting()
    small = make.queue("x", make.shape(12, max_tasks_per_slot=1), 50, run_s=0.1)
    slots = [make.opened("young", "x", "a", "d0", age_s=0.1), make.opened("old", "x", "a", "d0"), held]
    answer = planned(make.state([queue, small], slots, NODE), ["h"], {"x": 5.0})
    assert answer.close == (Close("old", "large"),)
    assert [slot for slot, _ in answer.keep] == ["h"]


def test_two_shapes_that_wait_get_different_victims():
    queues = [make.queue("x", LARGE, 9), make.queue("p", LARGE, 1), make.queue("q", LARGE, 1)]
    slots = [make.opened("a0", "x", "a", "d0"), make.opened("a1", "x", "a", "d1")]
    slots += [make.requested("hp", "p"), make.requested("hq", "q")]
    answer = planned(make.state(queues, slots, {"a": [24, 24]}), ["hp", "hq"], {"x": 5.0})
    assert {close.slot_id for close in answer.close} == {"a0", "a1"}
    assert {slot: grant.devices for slot, grant in answer.keep} == {"hp": ("d0",), "hq": ("d1",)}


def test_a_shape_larger_than_any_device_ends_nobody():
    queue, held = wanting(gib=48)
    state = make.state([queue, make.queue("x", LARGE, 9)], [*busy(1), held], NODE)
    answer = planned(state, ["h"], {"x": 5.0})
    assert (answer.close, answer.keep) == ((), ())


def test_one_that_can_never_be_placed_does_not_stand_before_those_that_can():
    queue, held = wanting(gib=48)
    other = make.queue("small", make.shape(8), 1)
    state = make.state([queue, other, make.queue("x", LARGE, 9)], [*busy(1), held, make.requested("s", "small")], NODE)
    answer = planned(state, ["h", "s"], {"x": 5.0, "small": 1.0})
    assert [close.reason for close in answer.close] == ["small"]


def test_no_victims_for_a_shape_that_fits():
    queue, held = wanting()
    state = make.state([queue, make.queue("x", LARGE, 9)], [*busy(1), held], {"a": [24, 24]})
    answer = planned(state, ["h"], {"x": 5.0})
    assert (answer.close, answer.keep) == ((), (("h", Grant("a", ("d1",), 24 * GIB)),))


# --- idle slots and calm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idle_s", "depth", "flag", "closed"),
    [
        pytest.param(61, 0, SlotFlag.NONE, True, id="idle for too long"),
        pytest.param(59, 0, SlotFlag.NONE, False, id="not yet"),
        pytest.param(61, 1, SlotFlag.NONE, False, id="work has come"),
        pytest.param(61, 0, SlotFlag.DRAIN, False, id="ends already"),
    ],
)
def test_idle_slots_close(idle_s, depth, flag, closed):
    slot = make.opened("s", "x", "a", "d0", idle_s=idle_s, flag=flag)
    answer = planned(make.state([make.queue("x", make.shape(8), depth)], [slot], NODE))
    assert answer.close == ((Close("s", "Idle"),) if closed else ())


def test_a_slot_of_a_shape_that_is_gone_closes_when_idle():
    assert planned(make.state([], [make.opened("s", "x", "a", "d0", idle_s=61)], NODE)).close == (Close("s", "Idle"),)


def applied(state, answer):
    """The state after the plan: what was asked for is asked for, flags are set."""
    closed = {close.slot_id for close in answer.close}
    slots = [
        msgspec.structs.replace(slot, flag=SlotFlag.CLOSE) if slot.slot_id in closed else slot
        for slot in state.slots
        if slot.slot_id not in answer.drop
    ]
    asked = [make.requested(f"{o.shape_id}/new{i}", o.shape_id) for o in answer.open for i in range(o.count)]
    return msgspec.structs.replace(state, slots=tuple(slots + asked))


@pytest.mark.parametrize("held_is_known", [True, False])
def test_the_same_need_twice_is_not_answered_twice(held_is_known):
    queues = [make.queue("x", make.shape(8), 100, run_s=5.0), make.queue("large", LARGE, 1)]
    state = make.state(queues, [*busy(2), make.requested("h", "large")], NODE)
    first = planned(state, ["h"], {"x": 5.0})
    after = applied(state, first)
    held = {"h", *(slot.slot_id for slot in after.slots if "/new" in slot.slot_id and held_is_known)}
    second = planned(after, held, {"x": 5.0})
    assert (second.open, second.close, second.drop) == ((), (), ())
    assert second.keep == first.keep


def test_a_shape_is_not_opened_and_closed_in_turns():
    """Its queue runs empty and fills again: the slot stays until it has been idle for long."""
    slot = make.opened("s", "x", "a", "d0", idle_s=0.1)
    for depth in (0, 3, 0, 3):
        answer = planned(make.state([make.queue("x", make.shape(8), depth, run_s=0.1)], [slot], NODE))
        assert (answer.open, answer.close) == ((), ())


def test_the_same_look_gives_the_same_plan():
    queues = [make.queue(f"q{i}", make.shape(1 + i % 5), i, run_s=0.1 * i) for i in range(20)]
    state = make.state(queues, [*busy(5, "q1"), *(make.requested(f"h{i}", f"q{i}") for i in range(9, 14))], NODE)
    held = [f"h{i}" for i in range(9, 14)]
    assert planned(state, held) == planned(msgspec.structs.replace(state, queues=state.queues[::-1]), held)


# --- size -----------------------------------------------------------------------------------------------------------


def large_cluster(waiting):
    """200 shapes, 1,000 open slots, 100 nodes of 8 devices; some shapes wait with a held slot."""
    nodes = {f"n{i:03}": [192.0] * 8 for i in range(100)}
    queues = [make.queue(f"q{i:03}", make.shape(8 + 8 * (i % 24)), 10_000, run_s=0.1 + i % 7, waited_s=3.0) for i in range(200)]
    slots = [
        make.opened(f"s{i:04}", f"q{i % 100:03}", f"n{i % 100:03}", f"d{i // 100 % 8}", idle_s=5.0 if i % 10 == 0 else None)
        for i in range(1000)
    ]
    held = [f"h{i}" for i in range(waiting)]
    slots += [make.requested(f"h{i}", f"q{199 - i:03}") for i in range(waiting)]
    had = [msgspec.structs.replace(q, vtime_s=float(100 - i % 100) if i < 100 else 0.0) for i, q in enumerate(queues)]
    return make.state(had, slots, nodes), held


@pytest.mark.parametrize("waiting", [0, 100])
def test_a_round_over_a_large_cluster_takes_a_part_of_the_pause_between_rounds(waiting):
    state, held = large_cluster(waiting)
    ledger = index_of(state)
    began_s = time.process_time()
    answer = plan(state, ledger, frozenset(held), make.LIMITS)
    assert answer.open
    # About 0.05 s where nothing else runs; the bound says that no step is quadratic.
    assert time.process_time() - began_s < 5


def test_victims_of_one_round_are_bounded():
    state, held = large_cluster(100)
    full = [slot for slot in state.slots if slot.status is SlotStatus.OPEN]
    queues = [msgspec.structs.replace(queue, shape=make.shape(190)) for queue in state.queues]
    state = msgspec.structs.replace(state, queues=tuple(queues), slots=(*full[:800], *state.slots[1000:]))
    answer = plan(state, index_of(state), frozenset(held), make.LIMITS)
    assert len(answer.close) == SEARCHES_MAX
    ledger = index_of(state)
    assert victims(queues[0].shape, ledger, {close.slot_id: 1.0 for close in answer.close})


# --- tenants --------------------------------------------------------------------------------------------------------


def shared(queues, slots, nodes, held, limits=make.LIMITS, **rows):
    """The plan where tenants have these rows: fields of `TenantRow` by name."""
    tenants = tuple(TenantRow(tenant=name, **row) for name, row in rows.items())
    state = msgspec.structs.replace(make.state(queues, slots, nodes), tenants=tenants)
    return plan(state, index_of(state), frozenset(held), limits)


def test_the_tenant_stands_before_the_shape():
    queues = [make.queue(f"{t}{i}", make.shape(24, tenant=t), 1) for t in "ab" for i in range(2)]
    queues = [msgspec.structs.replace(q, vtime_s=9.0 if q.shape_id.endswith("0") else 1.0) for q in queues]
    answer = shared(queues, [], NODE, [], a={"vtime_s": 5.0}, b={"vtime_s": 2.0})
    assert [item.shape_id for item in answer.open] == ["b1", "b0", "a1", "a0"]


@pytest.mark.parametrize(
    ("a", "b", "closed"),
    [
        pytest.param({"vtime_s": 9.0}, {"vtime_s": 1.0}, True, id="it has more, and has had more"),
        pytest.param({"vtime_s": 9.0, "weight": 3.0}, {"vtime_s": 1.0}, True, id="by its weight it has more all the same"),
        pytest.param({"vtime_s": 9.0, "weight": 4.0}, {"vtime_s": 1.0}, False, id="by its weight it has no more"),
        pytest.param({"vtime_s": 1.5}, {"vtime_s": 1.0}, False, id="it has had about as much"),
    ],
)
def test_a_tenant_gives_up_what_is_over_its_weighted_share(a, b, closed):
    queues = [make.queue(t, make.shape(8, tenant=t), 50, run_s=5.0) for t in "ab"]
    slots = [make.opened(f"a{i}", "a", "n", f"d{i}") for i in range(4)]
    slots += [make.opened("b0", "b", "n", "d4"), make.requested("h", "b")]
    answer = shared(queues, slots, {"n": [8.0] * 5}, ["h"], a=a, b=b)
    assert len(answer.close) == closed


def test_a_small_part_of_a_large_device_is_not_a_device():
    """Sixteen small tasks on one large device are one device; whoever has two devices for himself has more."""
    small = [make.opened(f"s{i}", "small", "n", "d0") for i in range(16)]
    large = [make.opened(f"l{i}", "large", "n", f"d{i + 1}") for i in range(2)]
    queues = [
        make.queue("small", make.shape(12, tenant="s"), 50, run_s=5.0),
        make.queue("large", make.shape(192, tenant="l"), 50, run_s=5.0),
    ]
    wanting = [*small, *large, make.requested("h", "small")]
    answer = shared(queues, wanting, {"n": [192.0] * 3}, ["h"], s={"vtime_s": 1.0}, l={"vtime_s": 9.0})
    assert [close.slot_id[0] for close in answer.close] == ["l"]
    wanting = [*small, *large, make.requested("h", "large")]
    answer = shared(queues, wanting, {"n": [192.0] * 3}, ["h"], s={"vtime_s": 9.0}, l={"vtime_s": 1.0})
    assert answer.close == ()


# --- quotas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        pytest.param({}, 6, id="none"),
        pytest.param({"running_max": 2}, 2, id="tasks"),
        pytest.param({"gpus_max": 4}, 2, id="devices"),
        pytest.param({"memory_bytes_max": 50 * GIB}, 3, id="memory"),
        pytest.param({"gpus_max": 1}, 0, id="not even one"),
    ],
)
def test_no_more_slots_are_asked_for_than_the_quota_lets_work(quota, count):
    queue = make.queue("x", make.shape(8, gpus=2), 6, run_s=5.0)
    answer = shared([queue], [], {"a": [80.0, 80.0]}, [], t=quota)
    opened = sum(item.count for item in answer.open)
    assert opened == max(count, 1), "one is opened where there is room: it takes its turn"
    if quota:
        assert dict(answer.wake_at)["x"] == NEVER, "more work changes nothing"


def test_a_quota_goes_to_the_shapes_in_the_order_in_which_they_are_served():
    queues = [make.queue(name, make.shape(8), 9, run_s=5.0) for name in "xy"]
    queues[0] = msgspec.structs.replace(queues[0], vtime_s=5.0)
    answer = shared(queues, [], {"a": [192.0]}, [], t={"running_max": 3})
    assert answer.open == (Open("y", 3, 0), Open("x", 1, 0))


def test_a_slot_that_only_takes_turns_is_opened_last_of_all():
    queues = [make.queue("x", make.shape(24), 9, run_s=5.0), make.queue("y", make.shape(20), 9, run_s=5.0)]
    queues.append(make.queue("o", make.shape(24, tenant="o"), 1, run_s=5.0))
    rows = {"t": {"running_max": 1, "vtime_s": 0.0}, "o": {"vtime_s": 9.0}}
    answer = shared(queues, [], {"a": [24.0, 24.0]}, [], **rows)
    assert answer.open == (Open("x", 1, 0), Open("o", 1, 0)), "there is no room left for y, and none is asked for"
    answer = shared(queues, [], {"a": [24.0, 24.0, 24.0]}, [], **rows)
    assert answer.open == (Open("x", 1, 0), Open("o", 1, 0), Open("y", 1, 0))


def test_room_that_is_kept_for_a_later_one_makes_no_earlier_one_wait():
    """Of 23.5 GiB, 12 are on their way out. The urgent one fits now; each of the others only then."""

    def waiting(name, gib, priority):
        return msgspec.structs.replace(make.queue(name, make.shape(gib), 1), head=priority_offset(priority) + 1)

    queues = [waiting("urgent", 9, 10), waiting("high", 20, 5), waiting("c", 10, 0), make.queue("x", make.shape(12), 0)]
    ending = make.opened("x0", "x", "a", "d0", flag=SlotFlag.CLOSE)
    slots = [ending, *(make.requested(f"h{name}", name) for name in ("urgent", "high", "c"))]
    first = planned(make.state(queues, slots, {"a": [23.5]}), ["hurgent", "hhigh", "hc"])
    assert [(slot, grant.memory_bytes // GIB) for slot, grant in first.keep] == [("hurgent", 9)]
    after = [ending, make.opened("u", "urgent", "a", "d0"), *slots[2:]]
    second = planned(make.state(queues, after, {"a": [23.5]}), ["hhigh", "hc"])
    assert [slot for slot, _ in second.keep] == ["hhigh"], "it is placed: room is kept for the next in the line"


def test_what_the_quota_keeps_waiting_takes_no_room_from_others_and_asks_for_none():
    queues = [make.queue("x", make.shape(24), 9, run_s=5.0), make.queue("o", make.shape(24, tenant="o"), 9, run_s=5.0)]
    slots = [make.opened("o0", "o", "a", "d0"), make.requested("h", "x")]
    answer = shared(queues, slots, NODE, ["h"], t={"memory_bytes_max": 8 * GIB, "vtime_s": 0.0}, o={"vtime_s": 9.0})
    assert (answer.close, answer.keep, answer.drop) == ((), (), ("h",))


# --- the first in line ----------------------------------------------------------------------------------------------


def test_room_is_kept_for_the_first_in_line_where_nobody_may_be_asked_to_end():
    """Its victims have had no more than itself. What ends by itself is kept all the same, and not given to small ones."""
    queues = [
        make.queue("large", make.shape(24, gpus=2, tenant="l"), 1),
        make.queue("small", make.shape(12, tenant="s", max_tasks_per_slot=1), 50, run_s=1.0),
    ]
    slots = [make.opened("s0", "small", "a", "d0"), make.opened("s1", "small", "b", "d1"), make.requested("h", "large")]
    slots += [make.opened("s2", "small", "b", "d0"), make.opened("s3", "small", "b", "d1")]
    answer = shared(queues, slots, {"a": [24, 24], "b": [24, 24]}, ["h"], l={"vtime_s": 5.0}, s={"vtime_s": 5.0})
    assert answer.close == ()
    assert answer.keep == (("h", Grant("a", ("d1", "d0"), 24 * GIB)),), "where the least must still end"
    # Beside what is kept, small ones find room: one on b/d0.
    assert [item for item in answer.open if item.shape_id == "small"] == [Open("small", 2, 1)], "one is placed, one is held"


def test_room_is_kept_for_one_only():
    queues = [make.queue(name, make.shape(24, tenant=name), 1) for name in "xy"]
    queues.append(make.queue("s", make.shape(24, tenant="s"), 50, run_s=1.0))
    slots = [make.opened(f"s{i}", "s", "a", f"d{i}") for i in range(2)]
    slots += [make.requested("hx", "x"), make.requested("hy", "y")]
    answer = shared(queues, slots, {"a": [24, 24]}, ["hx", "hy"], x={"vtime_s": 5.0}, y={"vtime_s": 5.0}, s={"vtime_s": 5.0})
    assert [slot for slot, _ in answer.keep] == ["hx"]


# --- pre-emption ----------------------------------------------------------------------------------------------------

PREEMPTING = msgspec.structs.replace(make.LIMITS, preempt_s=10.0)


@pytest.mark.parametrize(
    ("priority", "waited_s", "running", "flag", "expected"),
    [
        pytest.param(5, 11, -5, SlotFlag.NONE, SlotFlag.PREEMPT, id="urgent, and has waited for long"),
        pytest.param(5, 9, -5, SlotFlag.NONE, SlotFlag.CLOSE, id="not yet: at the task boundary"),
        pytest.param(4, 11, -5, SlotFlag.NONE, SlotFlag.CLOSE, id="not urgent"),
        pytest.param(5, 11, -4, SlotFlag.NONE, SlotFlag.CLOSE, id="what runs is not low"),
        pytest.param(5, 11, -5, SlotFlag.CLOSE, SlotFlag.PREEMPT, id="asked before, it is still at work"),
        pytest.param(5, 11, -4, SlotFlag.CLOSE, None, id="asked before, and not low"),
    ],
)
def test_who_is_pre_empted(priority, waited_s, running, flag, expected):
    queues = [
        make.queue("urgent", make.shape(24), 1, priority=priority, waited_s=waited_s),
        make.queue("x", make.shape(24), 9, run_s=1.0, priority=-10),
    ]
    slot = msgspec.structs.replace(make.opened("v", "x", "a", "d0", flag=flag), score=priority_offset(running) + 7)
    answer = shared(queues, [slot, make.requested("h", "urgent")], NODE, ["h"], PREEMPTING)
    assert [close.flag for close in answer.close] == ([] if expected is None else [expected])


def test_nothing_is_pre_empted_that_need_not_end():
    queues = [
        make.queue("urgent", make.shape(24), 1, priority=9, waited_s=99),
        make.queue("x", make.shape(24), 9, run_s=1.0, priority=-10),
    ]
    low = msgspec.structs.replace(make.opened("v", "x", "a", "d0"), score=priority_offset(-10) + 7)
    idle = make.opened("i", "x", "a", "d1", idle_s=3.0)
    answer = shared(queues, [low, idle, make.requested("h", "urgent")], {"a": [24, 24]}, ["h"], PREEMPTING)
    assert answer.close == (Close("i", "urgent"),)


@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [
        pytest.param({}, {}, True, id="equal"),
        pytest.param({"gpus": 2, "cpu_milli": 9, "labels": (("zone", "a"),)}, {"cpu_milli": 9}, True, id="more of each"),
        pytest.param({"gpus": 2}, {"cpu_milli": 9}, False, id="less of one"),
        pytest.param({}, {"exclusive": True}, False, id="not for itself"),
        pytest.param({}, {"device_model": "mi300x"}, False, id="of any model"),
        pytest.param({"architectures": ("a", "b")}, {"architectures": ("a",)}, False, id="of more architectures"),
    ],
)
def test_what_needs_as_much_as_something_that_does_not_fit_is_not_tried(large, small, expected):
    tried = TooLarge()
    tried.add(make.need(8, **small))
    assert (make.need(8, **large) in tried) == expected
