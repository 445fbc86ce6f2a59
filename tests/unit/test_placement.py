"""Placement: what fits goes to the tightest place, what does not gets a reason, and nothing is promised twice."""

from functools import partial
from typing import assert_never

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from manager.core import placement
from manager.core.index import Index, index_of
from manager.core.placement import Placed, Reason, Unplaced, Verdict
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from manager.core.shapes import Grant, grant_of
from manager.core.victims import victims
from tests.unit import factories as make

place = partial(placement.place, policy=BEST_FIT)
find = partial(placement.find, policy=BEST_FIT)


def chosen(answer):
    match answer:
        case Placed(grant):
            return grant.node, " ".join(grant.devices)
        case Unplaced(verdicts):
            return {verdict.node: verdict.reason for verdict in verdicts}
        case _:
            assert_never(answer)


@pytest.mark.parametrize(
    ("nodes", "need", "gpus", "expected"),
    [
        pytest.param({"a": [80], "b": [24]}, 20, 1, ("b", "d0"), id="the tightest fit wins"),
        pytest.param({"b": [24], "a": [24]}, 20, 1, ("a", "d0"), id="a tie between nodes goes to the lower name"),
        pytest.param({"a": [24, 24, 24]}, 20, 1, ("a", "d0"), id="a tie between devices goes to the lower name"),
        pytest.param({"a": [80, 24, 40]}, 30, 1, ("a", "d2"), id="the tightest device of a node wins"),
        pytest.param({"a": [80, 80], "b": [40, 30, 24]}, 20, 2, ("b", "d2 d1"), id="several devices: the least free memory"),
        pytest.param({"a": [24], "b": [24, 24]}, 24, 2, ("b", "d0 d1"), id="several devices lie on one node"),
        pytest.param({}, 1, 1, {}, id="an empty cluster has no verdicts"),
        pytest.param({"a": [24]}, 25, 1, {"a": Reason.EXCEEDS_LARGEST_DEVICE}, id="too large"),
        pytest.param({"a": [80, 24]}, 25, 2, {"a": Reason.EXCEEDS_LARGEST_DEVICE}, id="too large for the second device"),
        pytest.param({"a": [24], "b": []}, 8, 2, {"a": Reason.TOO_FEW_DEVICES, "b": Reason.TOO_FEW_DEVICES}, id="too few"),
        pytest.param({"a": [0]}, 1, 1, {"a": Reason.EXCEEDS_LARGEST_DEVICE}, id="a device of unknown size holds nothing"),
    ],
)
def test_place_on_an_empty_fleet(nodes, need, gpus, expected):
    assert chosen(place(make.need(need, gpus), make.index(nodes))) == expected


def leased(ledger):
    ledger.lease("s", make.grant("a", "d0", 20))


def foreign(ledger):
    ledger.observe("a", make.use("d0", foreign=10), 0.0)


def unhealthy(ledger):
    ledger.observe("a", make.use("d0", healthy=False), 0.0)


def above_lease(ledger):
    ledger.lease("s", make.grant("a", "d0", 1))
    ledger.observe("a", make.use("d0", s=20), 1.0)


def kept(ledger):
    ledger.keep("waits", make.grant("a", "d0", 20))


def cordoned(ledger):
    ledger.mark("a", cordoned=True)


def unreachable(ledger):
    ledger.mark("a", reachable=False)


def lost(ledger):
    ledger.mark("a", lost=True)


def full_of_slots(ledger):
    ledger.nodes["a"].slots_max = 2
    for number in range(2):
        ledger.lease(f"s{number}", make.grant("a", "d0", 1))


@pytest.mark.parametrize(
    ("deed", "verdict"),
    [
        pytest.param(leased, Verdict("a", Reason.INSUFFICIENT_MEMORY, 12 * GIB), id="leased to others"),
        pytest.param(above_lease, Verdict("a", Reason.INSUFFICIENT_MEMORY, 12 * GIB), id="a slot above its lease counts"),
        pytest.param(kept, Verdict("a", Reason.RESERVED_FOR_LARGER, 12 * GIB), id="kept for another"),
        pytest.param(foreign, Verdict("a", Reason.FOREIGN_MEMORY, 2 * GIB), id="used by strangers"),
        pytest.param(unhealthy, Verdict("a", Reason.UNHEALTHY_DEVICE), id="broken"),
        pytest.param(cordoned, Verdict("a", Reason.CORDONED), id="cordoned"),
        pytest.param(unreachable, Verdict("a", Reason.NO_WORKER), id="its Dask worker is away"),
        pytest.param(lost, Verdict("a", Reason.NODE_LOST), id="lost"),
        pytest.param(full_of_slots, Verdict("a", Reason.TOO_MANY_SLOTS), id="memory would do, slots are used up"),
    ],
)
def test_a_verdict_says_why_and_how_much_is_missing(deed, verdict):
    ledger = make.index({"a": [24]})
    deed(ledger)
    assert place(make.need(16), ledger) == Unplaced((verdict,))


SELECTORS = {
    Reason.NO_MATCHING_ARCHITECTURE: make.need(1, architectures=("sm_90",)),
    Reason.NO_MATCHING_DEVICE: make.need(1, device_model="mi300x"),
    Reason.NO_MATCHING_LABELS: make.need(1, labels=(("zone", "b"),)),
    Reason.EXCEEDS_HOST: make.need(1, cpu_milli=9000),
    Reason.INSUFFICIENT_SHARE: make.need(1, share_milli=600),
    Reason.DEVICE_IN_USE: make.need(1, exclusive=True),
    Reason.INSUFFICIENT_CPU: make.need(1, cpu_milli=5000),
    Reason.INSUFFICIENT_HOST_MEMORY: make.need(1, host_memory_bytes=10 * GIB),
}


@pytest.mark.parametrize(("reason", "need"), SELECTORS.items())
def test_a_verdict_names_what_else_does_not_match_or_is_used_up(reason, need):
    ledger = Index()
    ledger.add_node("a", "i1", make.devices(24), 0, cpu_milli=8000, host_memory_bytes=16 * GIB, labels=(("zone", "a"),))
    used = make.need(1, share_milli=500, cpu_milli=4000, host_memory_bytes=8 * GIB)
    ledger.lease("s", grant_of(used, "a", ("d0",)))
    assert place(need, ledger) == Unplaced((Verdict("a", reason),))


def test_every_reason_has_a_test():
    told = {Reason.INSUFFICIENT_MEMORY, Reason.FOREIGN_MEMORY, Reason.RESERVED_FOR_LARGER, Reason.UNHEALTHY_DEVICE}
    told |= {Reason.CORDONED, Reason.NO_WORKER, Reason.TOO_MANY_SLOTS, Reason.NODE_LOST}
    assert told | {Reason.EXCEEDS_LARGEST_DEVICE, Reason.TOO_FEW_DEVICES} | SELECTORS.keys() == set(Reason)


def test_the_nearest_miss_counts_the_last_device_that_is_needed():
    ledger = make.index({"a": [24, 24, 24]})
    for uuid, gib in (("d0", 4), ("d1", 10), ("d2", 14)):
        ledger.lease(uuid, make.grant("a", uuid, gib))
    answer = place(make.need(16, gpus=2), ledger)
    assert answer == Unplaced((Verdict("a", Reason.INSUFFICIENT_MEMORY, 2 * GIB),))


def test_a_device_too_small_when_empty_says_so_even_on_a_cordoned_node():
    ledger = make.index({"a": [8]})
    ledger.mark("a", cordoned=True)
    assert chosen(place(make.need(16), ledger)) == {"a": Reason.EXCEEDS_LARGEST_DEVICE}


def test_reserve_is_promised_to_nobody():
    ledger = make.index({"a": [24]}, reserve_gib=1)
    assert chosen(place(make.need(23), ledger)) == ("a", "d0")
    assert place(make.need(23.5), ledger) == Unplaced((Verdict("a", Reason.EXCEEDS_LARGEST_DEVICE, GIB // 2),))


def test_an_unhealthy_device_leaves_the_others_usable():
    ledger = make.index({"a": [24, 24]})
    ledger.observe("a", make.use("d0", healthy=False), 0.0)
    assert chosen(place(make.need(16), ledger)) == ("a", "d1")


def test_room_is_kept_for_one_slot_and_free_for_it_alone():
    ledger = make.index({"a": [24]})
    ledger.lease("s", make.grant("a", "d0", 20))
    ledger.keep("waits", make.grant("a", "d0", 24))
    ledger.free("s")
    assert find(make.need(1), ledger) is None
    assert ledger.unkeep("waits") == make.grant("a", "d0", 24)
    assert find(make.need(24), ledger) == make.grant("a", "d0", 24)


# --- the ledger: leases, incarnations, readings ---------------------------------------------------------------------


def test_a_second_lease_of_a_slot_changes_nothing():
    ledger = make.index({"a": [24], "b": [24]})
    ledger.lease("s", make.grant("a", "d0", 8))
    ledger.lease("s", make.grant("b", "d0", 16))
    assert ledger.grants == {"s": make.grant("a", "d0", 8)}
    assert ledger.nodes["b"].pools["d0"].free_bytes == 24 * GIB


def test_the_same_incarnation_keeps_its_leases_and_marks_another_one_ends_them():
    ledger = make.index({"a": [24]})
    ledger.lease("s", make.grant("a", "d0", 8))
    ledger.observe("a", make.use("d0", foreign=2, s=9), 1.0)
    ledger.mark("a", lost=True)
    ledger.add_node("a", "i1", make.devices(24), 0)
    assert ledger.nodes["a"].pools["d0"].free_bytes == 13 * GIB
    assert ledger.nodes["a"].lost
    ledger.add_node("a", "i2", make.devices(24), 0)
    assert (ledger.grants, ledger.nodes["a"].pools["d0"].free_bytes, ledger.nodes["a"].lost) == ({}, 24 * GIB, False)


def test_a_device_that_comes_back_still_bears_its_leases():
    ledger = make.index({"a": [24, 24]})
    ledger.lease("s", make.grant("a", "d1", 20))
    ledger.add_node("a", "i1", make.devices(24), 0)
    ledger.add_node("a", "i1", make.devices(24, 24), 0)
    assert ledger.nodes["a"].pools["d1"].free_bytes == 4 * GIB


def test_a_device_that_was_unhealthy_is_so_after_a_registration_until_it_is_read_again():
    ledger = make.index({"a": [24]})
    ledger.observe("a", make.use("d0", healthy=False), 0.0)
    ledger.add_node("a", "i1", make.devices(24), 0)
    assert chosen(place(make.need(1), ledger)) == {"a": Reason.UNHEALTHY_DEVICE}
    ledger.observe("a", make.use("d0"), 1.0)
    assert chosen(place(make.need(1), ledger)) == ("a", "d0")


@pytest.mark.parametrize(
    ("read_s", "foreign_gib", "free_gib"),
    [
        pytest.param(9.0, 2, 11, id="stale and lower: may not raise"),
        pytest.param(9.0, 9, 7, id="stale and higher: lowers"),
        pytest.param(11.0, 2, 14, id="fresh and lower: raises"),
        pytest.param(11.0, 9, 7, id="fresh and higher: lowers"),
    ],
)
def test_a_stale_reading_may_only_lower_free_memory(read_s, foreign_gib, free_gib):
    ledger = make.index({"a": [24]})
    ledger.observe("a", make.use("d0", foreign=5), 5.0)
    ledger.lease("s", make.grant("a", "d0", 8), 10.0)
    ledger.observe("a", make.use("d0", foreign=foreign_gib), read_s)
    assert ledger.nodes["a"].pools["d0"].free_bytes == free_gib * GIB


def test_a_change_never_makes_an_older_reading_look_fresh():
    ledger = make.index({"a": [24]})
    ledger.observe("a", make.use("d0", foreign=5), 5.0)
    ledger.lease("s", make.grant("a", "d0", 8), 10.0)
    ledger.free("s")  # by somebody who gives no time
    ledger.observe("a", make.use("d0", foreign=0), 9.0)
    assert ledger.nodes["a"].pools["d0"].free_bytes == 19 * GIB


def test_readings_of_unknown_nodes_devices_and_slots_are_ignored():
    ledger = make.index({"a": [24]})
    ledger.observe("b", make.use("d0", foreign=5), 0.0)
    ledger.observe("a", make.use("d9", foreign=5), 0.0)
    ledger.observe("a", make.use("d0", stranger=5), 0.0)
    assert ledger.nodes["a"].pools["d0"].free_bytes == 24 * GIB


def test_a_removed_node_takes_its_leases_along():
    ledger = make.index({"a": [24], "b": [24]})
    ledger.lease("s", make.grant("a", "d0", 8))
    ledger.lease("t", make.grant("b", "d0", 8))
    ledger.remove_node("a")
    assert (set(ledger.nodes), set(ledger.grants)) == ({"b"}, {"t"})


def test_the_store_gives_the_same_ledger():
    state = make.state(
        [make.queue("x", make.shape(8), 1)],
        [make.opened("s", "x", "a", "d0"), make.requested("r", "x")],
        {"a": [24], "b": [24], "c": [24]},
    )
    rows = tuple(
        msgspec.structs.replace(
            row, fenced=row.node == "b", left=row.node == "c", uses=(make.use("d0", foreign=1),) if row.node == "a" else ()
        )
        for row in state.nodes
    )
    ledger = index_of(msgspec.structs.replace(state, nodes=rows))
    assert ledger.grants == {"s": make.grant("a", "d0", 8)}
    assert ledger.nodes["a"].pools["d0"].free_bytes == 15 * GIB
    assert chosen(place(make.need(16), ledger)) == {"a": Reason.FOREIGN_MEMORY, "b": Reason.NODE_LOST}


# --- properties -----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 12)
fleets = st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(4, 24), max_size=3), max_size=3)
wants = st.builds(make.need, sizes, st.integers(1, 3))
nodes_ = st.sampled_from("abc")
uuids = st.sampled_from(["d0", "d1", "d2"])
slots = st.sampled_from(["s0", "s1", "s2", "s3", "s4"])
deltas = st.one_of(
    st.tuples(st.just("add"), nodes_, st.sampled_from(["i1", "i2"]), st.lists(st.integers(4, 24), max_size=3)),
    st.tuples(st.just("remove"), nodes_),
    st.tuples(st.just("place"), slots, wants),
    st.tuples(st.just("lease"), slots, nodes_, uuids, sizes),
    st.tuples(st.just("free"), slots),
    st.tuples(st.just("keep"), slots, nodes_, uuids, sizes),
    st.tuples(st.just("unkeep"), slots),
    st.tuples(st.just("observe"), nodes_, uuids, sizes, slots, sizes, st.booleans()),
    st.tuples(st.just("mark"), nodes_, st.sampled_from(["cordoned", "lost", "reachable"]), st.booleans()),
)


def apply(ledger, delta, now_s):
    match delta:
        case "add", node, incarnation, gib:
            ledger.add_node(node, incarnation, make.devices(*gib), GIB)
        case "remove", node:
            ledger.remove_node(node)
        case "place", slot, shape:
            if slot not in ledger.grants and (granted := find(shape, ledger)) is not None:
                ledger.lease(slot, granted, now_s)
        case "lease", slot, node, uuid, gib:
            ledger.lease(slot, make.grant(node, uuid, gib), now_s)
        case "free", slot:
            ledger.free(slot, now_s)
        case "keep", slot, node, uuid, gib:
            ledger.keep(slot, make.grant(node, uuid, gib))
        case "unkeep", slot:
            ledger.unkeep(slot)
        case "observe", node, uuid, gib, slot, slot_gib, healthy:
            ledger.observe(node, make.use(uuid, foreign=gib, healthy=healthy, **{slot: slot_gib}), now_s)
        case "mark", node, name, value:
            ledger.mark(node, **{name: value})


def rebuilt(ledger):
    """The same ledger, from the truth alone: nodes, leases, what is kept, and the last readings."""
    fresh = Index()
    for name, view in ledger.nodes.items():
        gib = {uuid: pool.total_bytes / GIB for uuid, pool in view.pools.items()}
        fresh.add_node(name, view.incarnation, [make.device(uuid, size) for uuid, size in gib.items()], GIB)
        fresh.mark(name, **{mark: getattr(view, mark) for mark in ("cordoned", "lost", "reachable")})
    for slot, granted in ledger.grants.items():
        fresh.lease(slot, granted)
    for slot, granted in ledger.kept.items():
        fresh.keep(slot, granted)
    for name, view in ledger.nodes.items():
        for uuid, pool in view.pools.items():
            used = {slot: size / GIB for slot, size in pool.used.items()}
            fresh.observe(name, make.use(uuid, foreign=pool.foreign_bytes / GIB, **used), 0.0)
            fresh.observe(name, make.use(uuid, healthy=pool.healthy, foreign=pool.foreign_bytes / GIB, **used), 0.0)
    return fresh


def picture(ledger):
    return ledger.grants, {
        (name, uuid): (pool.free_bytes, pool.promised_bytes, pool.leases, pool.kept, pool.healthy, view.placeable)
        for name, view in ledger.nodes.items()
        for uuid, pool in view.pools.items()
    }


@given(st.lists(deltas, max_size=30))
def test_deltas_give_the_index_that_is_built_afresh(history):
    ledger = Index()
    for now_s, delta in enumerate(history):
        apply(ledger, delta, float(now_s))
        assert picture(ledger) == picture(rebuilt(ledger)) == picture(ledger.copy())


@given(st.lists(deltas, max_size=15), st.lists(st.tuples(st.integers(0, 3), st.just(("copy",)) | deltas), max_size=30))
def test_no_copy_changes_with_another(history, after):
    """Copies, and copies of copies, with changes of their own in between: each is what those alone make of it."""
    ledger = Index()
    for now_s, delta in enumerate(history):
        apply(ledger, delta, float(now_s))
    ledgers, alone = [ledger], [list(history)]
    for number, delta in after:
        which = number % len(ledgers)
        if delta[0] == "copy":
            ledgers.append(ledgers[which].copy())
            alone.append(list(alone[which]))
        else:
            apply(ledgers[which], delta, float(len(alone[which])))
            alone[which].append(delta)
    for each, made in zip(ledgers, map(played, alone), strict=True):
        assert picture(each) == picture(made)
        assert each.kept == made.kept
        assert each.table.is_equal(made.table)
        assert all(view is each.nodes[view.name] for view in each.table.views), "the columns stand for its own nodes"


def played(history):
    ledger = Index()
    for now_s, delta in enumerate(history):
        apply(ledger, delta, float(now_s))
    return ledger


@given(fleets, st.lists(st.one_of(st.tuples(st.just("place"), slots, wants), st.tuples(st.just("free"), slots)), max_size=30))
def test_place_is_total_and_never_promises_more_than_there_is(fleet, history):
    ledger = make.index(fleet, reserve_gib=1)
    for delta in history:
        before = picture(ledger)
        if delta[0] == "place":
            match place(delta[2], ledger):
                case Placed(granted):
                    assert len(set(granted.devices)) == delta[2].gpus
                    for uuid in granted.devices:
                        assert ledger.nodes[granted.node].pools[uuid].free_bytes >= delta[2].memory_bytes
                case Unplaced(verdicts):
                    assert [verdict.node for verdict in verdicts] == sorted(ledger.nodes)
        assert picture(ledger) == before, "place changes nothing"
        apply(ledger, delta, 0.0)
        assert make.over_committed(ledger) == []


@given(st.lists(deltas, max_size=20), wants)
def test_find_misses_no_room(history, shape):
    ledger = Index()
    for delta in history:
        apply(ledger, delta, 0.0)
    room = [
        name
        for name, view in ledger.nodes.items()
        if view.placeable
        and sum(pool.healthy and pool.free_bytes >= shape.memory_bytes for pool in view.pools.values()) >= shape.gpus
    ]
    granted = find(shape, ledger)
    assert (granted.node in room) if granted is not None else not room


@given(st.lists(deltas, max_size=20), nodes_, uuids, sizes, slots, sizes)
def test_no_stale_reading_raises_free_memory(history, node, uuid, gib, slot, slot_gib):
    ledger = Index()
    for now_s, delta in enumerate(history, start=1):
        apply(ledger, delta, float(now_s))
    pool = ledger.nodes[node].pools.get(uuid) if node in ledger.nodes else None
    if pool is not None and pool.changed_s > 0:
        before = pool.free_bytes
        ledger.observe(node, make.use(uuid, foreign=gib, **{slot: slot_gib}), pool.changed_s - 0.5)
        assert pool.free_bytes <= before


# --- victims --------------------------------------------------------------------------------------------------------


def full(layout):
    """A ledger of 24 GiB devices: node → device → slot → GiB."""
    ledger = make.index({node: [24] * len(pools) for node, pools in layout.items()})
    for node, pools in layout.items():
        for uuid, held in pools.items():
            for slot, gib in held.items():
                ledger.lease(slot, make.grant(node, uuid, gib))
    return ledger


@pytest.mark.parametrize(
    ("layout", "costs", "need", "gpus", "expected"),
    [
        pytest.param(
            {"a": {"d0": {"p": 12, "q": 12}}, "b": {"d0": {"r": 24}}}, {"p": 1, "q": 1, "r": 1}, 20, 1, ("r",), id="fewer"
        ),
        pytest.param(
            {"a": {"d0": {"p": 12, "q": 12}}, "b": {"d0": {"r": 24}}}, {"p": 1, "q": 1, "r": 9}, 20, 1, ("p", "q"), id="cheaper"
        ),
        pytest.param(
            {"a": {"d0": {"p": 12, "q": 12}}, "b": {"d0": {"r": 12, "s": 12}}},
            {"p": 1, "q": 9, "r": 5, "s": 4},
            20,
            1,
            ("r", "s"),
            id="from one device, not the two cheapest of all",
        ),
        pytest.param({"a": {"d0": {"p": 2, "q": 20}}}, {"p": 1, "q": 2}, 20, 1, ("q",), id="none needlessly"),
        pytest.param({"a": {"d0": {"p": 12, "q": 12}}}, {"p": 1}, 20, 1, (), id="who has no cost stays"),
        pytest.param({"a": {"d0": {"p": 12}}}, {"p": 1}, 8, 1, (), id="nobody where it fits"),
        pytest.param(
            {"a": {"d0": {"p": 24}, "d1": {"q": 24}}, "b": {"d0": {"r": 24}}},
            {"p": 5, "q": 5, "r": 1},
            20,
            2,
            ("p", "q"),
            id="several devices of one node",
        ),
        pytest.param({}, {}, 1, 1, (), id="an empty cluster"),
    ],
)
def test_victims(layout, costs, need, gpus, expected):
    assert victims(make.need(need, gpus), full(layout), costs) == expected


@pytest.mark.parametrize("mark", ["cordoned", "lost"])
def test_no_victims_where_nothing_may_be_placed(mark):
    ledger = full({"a": {"d0": {"p": 24}}})
    setattr(ledger.nodes["a"], mark, True)
    assert victims(make.need(20), ledger, {"p": 1}) == ()


def test_a_slot_on_two_devices_is_ended_once():
    ledger = make.index({"a": [24, 24]})
    ledger.lease("wide", make.grant("a", "d0 d1", 24))
    assert victims(make.need(20, gpus=2), ledger, {"wide": 1.0}) == ("wide",)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), uuids, sizes, st.none() | st.integers(1, 9)), max_size=12),
    st.integers(1, 24),
    st.integers(1, 2),
)
def test_ending_the_victims_makes_room_on_one_node_and_ending_less_does_not(layout, need, gpus):
    ledger = make.index({"a": [24, 24, 24], "b": [24, 24]})
    costs = {}
    for number, (node, uuid, gib, cost) in enumerate(layout):
        pool = ledger.nodes[node].pools.get(uuid)
        if pool is not None and pool.free_bytes >= gib * GIB:
            ledger.lease(f"s{number}", make.grant(node, uuid, gib))
            if cost is not None:
                costs[f"s{number}"] = float(cost)
    shape = make.need(need, gpus)
    answer = victims(shape, ledger, costs)
    if answer:
        assert set(answer) <= costs.keys()
        assert len({ledger.grants[slot].node for slot in answer}) == 1
        assert find(shape, ledger) is None
        for spared in (None, *answer):
            after = ledger.copy()
            for slot in answer:
                if slot != spared:
                    after.free(slot)
            assert (find(shape, after) is not None) == (spared is None)
    elif find(shape, ledger) is None:
        for slot in costs:
            ledger.free(slot)
        assert find(shape, ledger) is None, "victims were to be had"


IDLE, BUSY = 0.5, 1e6


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from([IDLE, BUSY])), min_size=1, max_size=6), st.integers(1, 24))
def test_no_busy_slot_ends_where_idle_ones_would_do(layout, need):
    ledger = make.index({"a": [sum(gib for gib, _ in layout)]})
    costs = {}
    for number, (gib, cost) in enumerate(layout):
        ledger.lease(f"s{number}", make.grant("a", "d0", gib))
        costs[f"s{number}"] = cost
    idle_bytes = sum(ledger.grants[slot].memory_bytes for slot, cost in costs.items() if cost == IDLE)
    answer = victims(make.need(need), ledger, costs)
    assert bool(answer) == (need <= sum(gib for gib, _ in layout))
    if idle_bytes >= need * GIB:
        assert all(costs[slot] == IDLE for slot in answer)


def test_a_grant_names_devices_in_order_of_free_memory():
    assert find(make.need(8, 2), make.index({"a": [24, 16]})) == Grant("a", ("d1", "d0"), 8 * GIB)


def test_a_node_with_all_its_slots_gives_up_the_cheapest():
    ledger = make.index({"a": [24]})
    full_of_slots(ledger)
    assert victims(make.need(1), ledger, {"s0": 2.0, "s1": 1.0}) == ("s1",)
    assert victims(make.need(1), ledger, {}) == ()
    ledger.free("s1")
    assert isinstance(place(make.need(1), ledger), Placed)
    assert victims(make.need(1), ledger, {"s0": 2.0}) == ()


def test_nobody_ends_for_what_would_not_fit_all_the_same():
    ledger = make.index({"a": [24]})
    ledger.lease("s", make.grant("a", "d0", 4))
    assert victims(make.need(47, exclusive=True), ledger, {"s": 1.0}) == ()
    ledger.observe("a", make.use("d0", foreign=10, s=4), 0.0)
    assert victims(make.need(20, exclusive=True), ledger, {"s": 1.0}) == ()
    assert victims(make.need(14, exclusive=True), ledger, {"s": 1.0}) == ("s",)


def test_nobody_ends_beside_a_slot_that_has_the_device_for_itself_and_stays():
    ledger = make.index({"a": [24]})
    ledger.lease("s", msgspec.structs.replace(make.grant("a", "d0", 4), exclusive=True))
    assert victims(make.need(47), ledger, {"s": 1.0}) == ()
    assert victims(make.need(10), ledger, {}) == ()
    assert victims(make.need(10), ledger, {"s": 1.0}) == ("s",)


def test_slots_that_are_kept_count_when_slots_are_used_up():
    ledger = Index()
    ledger.add_node("a", "i1", make.devices(24, 24), 0, 2)
    ledger.lease("s", make.grant("a", "d0", 8))
    ledger.keep("waits", make.grant("a", "d1", 8))
    assert victims(make.need(4), ledger, {"s": 1.0}) == ("s",)
