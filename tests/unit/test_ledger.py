"""The scheduler's book: held until it fits, bound to its node while it has a lease, and never promised twice."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from manager.core.lifecycle import SlotKind
from manager.core.placement import Reason, find
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from manager.core.shapes import asks_for_all_of, grant_of, shape_of
from plugins.ledger import (
    GONE_S,
    KEPT_S,
    PLACING_S,
    RESERVE_AFTER_S,
    RESERVED_MAX,
    Assignment,
    DirectWaiting,
    Ledger,
    SlotRequest,
)
from tests.unit import factories as make

D0 = make.grant("a", "d0", 16)


def book(*reports):
    ledger = Ledger()
    for each in reports or (make.report("a", [24]),):
        ledger.register(each, 0.0)
    return ledger


def ask(ledger, slot_id, gib=16.0, gpus=1, node=""):
    ledger.ask(SlotRequest(slot_id, make.shape(gib, gpus), node), 0.0)


def request(slot_id, needs):
    return SlotRequest(slot_id, shape_of("t", "", needs))


def decided(ledger, now_s=1.0):
    return {assignment.slot_id: assignment.grant for assignment in ledger.decide(now_s)}


def test_a_slot_is_held_until_it_fits():
    ledger = Ledger()
    ask(ledger, "s")
    assert ledger.decide(1.0) == []
    ledger.register(make.report("a", [8]), 2.0)
    assert ledger.decide(2.0) == []
    ledger.register(make.report("b", [24]), 3.0)
    assert ledger.decide(3.0) == [Assignment("s", make.grant("b", "d0", 16), fresh=True)]
    assert list(ledger.held) == []


def test_the_oldest_is_placed_first_and_smaller_ones_are_not_held_up():
    ledger = book()
    for slot_id, gib in (("large", 32), ("first", 16), ("second", 16), ("small", 8)):
        ask(ledger, slot_id, gib)
    assert set(decided(ledger)) == {"first", "small"}
    assert list(ledger.held) == ["large", "second"]


def test_the_end_of_a_slot_makes_room():
    ledger = book()
    ask(ledger, "s")
    ask(ledger, "t")
    assert set(decided(ledger)) == {"s"}
    ledger.ended("s", 2.0)
    assert decided(ledger) == {"t": D0}
    assert set(ledger.index.grants) == {"t"}


def test_a_lost_dask_task_frees_nothing_and_comes_back_to_its_node():
    ledger = book(make.report("a", [24]), make.report("b", [24]))
    ask(ledger, "s")
    decided(ledger)
    ledger.unreachable("a", 0.0)
    ledger.hold("s", 1.0)
    assert ledger.decide(2.0) == [], "b has room, but the slot lives on a"
    ask(ledger, "t", 24)
    assert decided(ledger) == {"t": make.grant("b", "d0", 24)}
    ledger.register(make.report("a", [24], s=D0), 3.0)
    assert ledger.decide(3.0) == [Assignment("s", D0, fresh=False)]


def test_a_forgotten_dask_task_frees_nothing():
    ledger = book()
    ask(ledger, "s")
    decided(ledger)
    ledger.forget("s")
    ask(ledger, "t")
    assert decided(ledger) == {}
    assert ledger.where("s", 1.0) == "leased"


def test_a_slot_that_dask_does_not_ask_for_is_not_held():
    ledger = book()
    ledger.hold("stranger", 1.0)
    assert ledger.decide(1.0) == []


def test_the_report_of_a_registration_is_the_whole_truth():
    ledger = book(make.report("a", [24, 24], s=D0, t=make.grant("a", "d1", 8)))
    ledger.register(make.report("a", [24, 24], t=make.grant("a", "d0", 4), u=make.grant("a", "d1", 20)), 1.0)
    assert ledger.index.grants == {"t": make.grant("a", "d0", 4), "u": make.grant("a", "d1", 20)}


def test_a_new_incarnation_has_nothing_of_the_old_one():
    ledger = book(make.report("a", [24], s=D0))
    ledger.register(make.report("a", [24], incarnation="i2"), 1.0)
    assert ledger.index.grants == {}


def test_leases_are_rebuilt_from_reports_before_anything_is_placed():
    ledger = Ledger()
    ask(ledger, "s", node="a")
    ask(ledger, "new")
    assert ledger.decide(0.0) == []
    ledger.register(make.report("a", [24], s=D0), 1.0)
    assert decided(ledger) == {"s": D0}
    assert list(ledger.held) == ["new"]


def test_a_slot_that_its_node_no_longer_has_is_asked_for_there_all_the_same():
    """The agent answers that it is gone; nobody else may open it."""
    ledger = book(make.report("a", [24]), make.report("b", [24]))
    ask(ledger, "s", node="a")
    (assignment,) = ledger.decide(1.0)
    assert (assignment.grant.node, assignment.grant.devices, assignment.grant.memory_bytes) == ("a", (), 0)


@pytest.mark.parametrize("known", [True, False])
def test_a_slot_of_a_node_that_is_away_waits_for_it(known):
    ledger = book(make.report("b", [24]))
    if known:
        ledger.register(make.report("a", [24], s=D0), 0.0)
        ledger.unreachable("a", 0.0)
    ask(ledger, "s", node="a")
    assert ledger.decide(1.0) == []


def test_a_lost_node_loses_its_leases_and_gets_nothing_until_another_incarnation_registers():
    ledger = book(make.report("a", [24], s=D0))
    ledger.lost("a", "i0", 1.0)
    assert "s" in ledger.index.grants, "that was its predecessor"
    ledger.lost("a", "i1", 1.0)
    ask(ledger, "t")
    assert (ledger.index.grants, ledger.decide(1.0)) == ({}, [])
    ledger.register(make.report("a", [24], s=D0), 2.0)  # its Dask worker is back before its agent knows that it is fenced
    assert ledger.decide(2.0) == []
    ledger.register(make.report("a", [24], incarnation="i2"), 3.0)
    assert set(decided(ledger)) == {"t"}


def test_the_report_of_a_worker_that_was_replaced_is_outdated():
    newer = make.report("a", [24])
    ledger = book(newer)
    older = msgspec.structs.replace(newer, generation=newer.generation - 1)
    assert ledger.is_outdated(older)
    assert not ledger.is_outdated(newer), "a new scheduler's connection"
    assert not ledger.is_outdated(msgspec.structs.replace(older, incarnation="i2")), "another agent counts anew"


@pytest.mark.parametrize(
    ("away_s", "more", "nodes"),
    [
        (GONE_S + 1, {}, {"b"}),
        (GONE_S - 1, {}, {"a", "b"}),
        (GONE_S + 1, {"s": D0}, {"a", "b"}),
    ],
    ids=["gone for long", "not for long", "has a lease"],
)
def test_a_node_that_is_gone_is_forgotten_after_a_while(away_s, more, nodes):
    ledger = book(make.report("a", [24], **more))
    ledger.unreachable("a", 10.0)
    ledger.register(make.report("b", [24]), 10.0 + away_s)
    assert set(ledger.index.nodes) == set(ledger.names) == nodes
    ledger.register(make.report("a", [24], **more), 11.0 + away_s)
    ledger.register(make.report("c", [24]), 20.0 + 3 * GONE_S)
    assert "a" in ledger.index.nodes, "it is back"


def test_a_node_that_left_is_forgotten_at_once_unless_its_worker_is_still_there():
    ledger = book(make.report("a", [24]), make.report("b", [24]))
    ledger.unreachable("a", 10.0)
    ledger.left(["a", "b", "unheard-of"], 11.0)
    assert set(ledger.index.nodes) == {"b"}


# --- news between registrations -------------------------------------------------------------------------------------


def hear(ledger, *uses, now_s=10.0, heard_s=0.0, silent=False, **more):
    ledger.hear(make.beat("a", *uses, **more), now_s, heard_s=heard_s, silent=silent)


def test_only_closed_ids_end_leases_absence_says_nothing():
    ledger = book(make.report("a", [24], s=D0))
    hear(ledger)
    assert "s" in ledger.index.grants
    hear(ledger, closed=("s", "never-heard-of"))
    assert ledger.index.grants == {}


@pytest.mark.parametrize(("cordoned", "silent", "placed"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_nothing_new_goes_to_a_node_that_is_cordoned_or_whose_agent_is_silent(cordoned, silent, placed):
    ledger = book()
    hear(ledger, cordoned=cordoned, silent=silent)
    ask(ledger, "s")
    assert len(ledger.decide(11.0)) == placed


def test_an_agent_that_speaks_again_gets_work_again():
    ledger = book()
    hear(ledger, silent=True)
    hear(ledger)
    ask(ledger, "s")
    assert len(ledger.decide(11.0)) == 1


def test_an_agent_that_has_never_spoken_gets_nothing_until_it_does():
    ledger = book()
    ledger.silent("a")
    ask(ledger, "s")
    assert ledger.decide(11.0) == []
    hear(ledger)
    assert len(ledger.decide(12.0)) == 1


def test_a_cordoned_node_still_gets_its_own_slots_back():
    ledger = book(make.report("a", [24], cordoned=True, s=D0))
    ask(ledger, "s", node="a")
    ask(ledger, "t", 1)
    assert decided(ledger) == {"s": D0}


@pytest.mark.parametrize(
    ("age_s", "heard_s", "fits"),
    [
        pytest.param(1.0, 0.0, True, id="read after the lease changed"),
        pytest.param(3.0, 0.0, False, id="read before: it may not raise free memory"),
        pytest.param(1.0, 2.0, False, id="told late: as old as the reading and the way together"),
    ],
)
def test_the_age_of_a_reading_counts_from_the_look_at_the_device(age_s, heard_s, fits):
    ledger = book()
    hear(ledger, make.use("d0", foreign=20), now_s=5.0)
    ask(ledger, "s", 2)
    assert len(ledger.decide(8.0)) == 1
    hear(ledger, make.use("d0"), now_s=10.0, age_s=age_s, heard_s=heard_s)
    ask(ledger, "t")
    assert bool(ledger.decide(10.0)) == fits


# --- room that is kept ----------------------------------------------------------------------------------------------


def contested():
    """Two small slots fill the device; a large one and a third small one wait; the leader clears it for the large one."""
    ledger = book()
    for slot_id, gib in (("s", 12), ("t", 12), ("u", 12), ("large", 24)):
        ask(ledger, slot_id, gib)
    assert set(decided(ledger)) == {"s", "t"}
    return ledger


def test_without_keeping_a_small_slot_takes_what_a_victim_gives_back():
    ledger = contested()
    ledger.ended("s", 2.0)
    assert set(decided(ledger)) == {"u"}


def test_what_victims_give_back_is_kept_for_whom_they_ended():
    ledger = contested()
    ledger.keep({"large": make.grant("a", "d0", 24)}, 1.0)
    ledger.ended("s", 2.0)
    assert decided(ledger, 2.0) == {}
    ledger.ended("t", 3.0)
    assert decided(ledger, 3.0) == {"large": make.grant("a", "d0", 24)}
    assert ledger.index.kept == {}


def test_room_is_no_longer_kept_when_the_leader_says_so_or_says_nothing_for_long():
    for undo in (lambda ledger: ledger.keep({}, 3.0), lambda ledger: None):
        ledger = contested()
        ledger.keep({"large": make.grant("a", "d0", 24)}, 1.0)
        ledger.ended("s", 2.0)
        undo(ledger)
        assert set(decided(ledger, 1.1 + KEPT_S)) == {"u"}


def test_room_is_not_kept_for_who_does_not_wait():
    ledger = contested()
    ledger.keep({"gone": make.grant("a", "d0", 24)}, 1.0)
    assert ledger.index.kept == {}
    ledger.keep({"large": make.grant("a", "d0", 24)}, 1.0)
    ledger.forget("large")
    assert ledger.index.kept == {}


def test_who_fits_elsewhere_goes_there_and_leaves_the_room_that_was_kept():
    ledger = book()
    for slot_id, gib in (("s", 12), ("large", 24), ("u", 12)):
        ask(ledger, slot_id, gib)
    assert set(decided(ledger)) == {"s", "u"}
    ask(ledger, "v", 12)
    ledger.keep({"large": make.grant("a", "d0", 24)}, 1.0)
    ledger.ended("s", 2.0)
    ledger.register(make.report("b", [24]), 2.0)
    assert decided(ledger, 2.0) == {"large": make.grant("b", "d0", 24), "v": make.grant("a", "d0", 12)}


# --- Dask tasks of people's own -------------------------------------------------------------------------------------


def want(ledger, slot_id, gib=16.0, priority=0, places=(), now_s=0.0):
    ledger.ask(SlotRequest(slot_id, make.shape(gib), "", (priority,), SlotKind.DIRECT, frozenset(places)), now_s)


def test_priority_decides_among_slots_and_dask_tasks():
    ledger = book()
    want(ledger, "low", 20, priority=5)
    ledger.ask(SlotRequest("leader", make.shape(20), priority=(0,)), 0.0)
    want(ledger, "high", 20, priority=-5)
    order = []
    for now_s in (1.0, 2.0, 3.0):
        (slot_id,) = decided(ledger, now_s)
        order.append(slot_id)
        ledger.ended(slot_id, now_s)
    assert order == ["high", "leader", "low"]


@pytest.mark.parametrize("place", ["b", "tcp://b", "host-b"])
def test_a_place_is_a_node_its_worker_or_its_host(place):
    ledger = Ledger()
    for node, gib in (("a", 24), ("b", 48)):
        ledger.register(make.report(node, [gib]), 0.0, names=(f"tcp://{node}", f"host-{node}"))
    want(ledger, "there", 16, places={place})
    want(ledger, "nowhere", 16, places={"tcp://gone"})
    want(ledger, "anywhere", 16)
    assert {slot: grant.node for slot, grant in decided(ledger).items()} == {"there": "b", "anywhere": "a"}
    assert list(ledger.held) == ["nowhere"]


def test_what_is_too_large_for_its_place_blocks_nobody_elsewhere():
    ledger = book(make.report("a", [8]), make.report("b", [48]))
    want(ledger, "large", 16, priority=-1, places={"a"})
    want(ledger, "same", 16)
    assert decided(ledger) == {"same": make.grant("b", "d0", 16)}


def test_how_many_wait_is_told_by_size_whatever_their_places():
    ledger = book()
    want(ledger, "one", 30, now_s=1.0)
    want(ledger, "two", 30, places={"a"}, now_s=2.0)
    want(ledger, "three", 40, now_s=3.0)
    ask(ledger, "leader", 30)
    assert ledger.direct_waiting(5.0) == [
        DirectWaiting(make.need(30), 2, 4.0),
        DirectWaiting(make.need(40), 1, 2.0),
    ]


def test_the_lease_of_a_task_that_was_let_go_ends_with_the_agents_word():
    ledger = book()
    want(ledger, "s", 20)
    decided(ledger)
    ledger.forget("s")
    want(ledger, "t", 20)
    assert decided(ledger) == {}
    ledger.closed(["s", "never-heard-of"], 2.0)
    assert set(decided(ledger)) == {"t"}


# --- all that placement reads ---------------------------------------------------------------------------------------


def test_a_node_is_what_its_report_says():
    ledger = Ledger()
    known = msgspec.structs.replace(
        make.report("a", [24]), cpu_milli=8000, host_memory_bytes=64 * GIB, labels=(("zone", "x"),), slots_max=3
    )
    ledger.register(known, 0.0)
    view = ledger.index.nodes["a"]
    assert (view.cpu_milli, view.host_memory_bytes, view.labels, view.slots_max) == (8000, 64 * GIB, (("zone", "x"),), 3)


def test_a_grant_has_all_that_was_asked_for():
    ledger = book()
    needs = make.need(8, share_milli=500, cpu_milli=1000, host_memory_bytes=GIB, exclusive=True, model="m")
    ledger.ask(request("s", needs), 0.0)
    assert decided(ledger) == {"s": grant_of(needs, "a", ("d0",))}


def test_a_slot_is_placed_with_what_its_shape_turned_out_to_need():
    ledger = book(make.report("a", [8]), make.report("b", [24]))
    ledger.ask(SlotRequest("s", make.shape(8), learned=make.need(20)), 0.0)
    assert decided(ledger) == {"s": make.grant("b", "d0", 20)}


LARGE = make.need(30, 2, share_milli=500, cpu_milli=2000, host_memory_bytes=2 * GIB)


@pytest.mark.parametrize(
    "other",
    [
        make.need(29, 2, share_milli=500, cpu_milli=2000, host_memory_bytes=2 * GIB),
        make.need(30, 1, share_milli=500, cpu_milli=2000, host_memory_bytes=2 * GIB),
        make.need(30, 2, share_milli=499, cpu_milli=2000, host_memory_bytes=2 * GIB),
        make.need(30, 2, share_milli=500, cpu_milli=1999, host_memory_bytes=2 * GIB),
        make.need(30, 2, share_milli=500, cpu_milli=2000, host_memory_bytes=GIB),
    ],
)
@pytest.mark.parametrize(
    "stricter", [{}, {"exclusive": True}, {"architectures": ("gfx942",)}, {"device_model": "mi"}, {"labels": (("a", "b"),)}]
)
def test_what_failed_is_in_the_way_only_of_what_asks_for_as_much_of_everything(other, stricter):
    """Of two that fit nowhere the second is not tried; one that asks for less of anything, or less strictly, is."""
    more, less = (msgspec.structs.replace(needs, **stricter) for needs in (LARGE, other))
    assert asks_for_all_of(more, less)
    assert asks_for_all_of(more, other)
    assert not asks_for_all_of(less, more)
    assert not asks_for_all_of(other, more)
    assert asks_for_all_of(other, more if not stricter else less) is False


@given(st.lists(st.sampled_from(["leased", "foreign", "cordoned", "sick", "kept", "alone"]), max_size=4), st.data())
def test_what_is_not_tried_would_not_have_fitted(troubles, data):
    ledger = book(make.report("a", [24, 24]), make.report("b", [48]))
    for at, trouble in enumerate(troubles):
        node = data.draw(st.sampled_from("ab"))
        match trouble:
            case "leased":
                ledger.index.lease(f"x{at}", make.grant(node, "d0", 10))
            case "alone":
                ledger.index.lease(f"x{at}", msgspec.structs.replace(make.grant(node, "d0", 1), exclusive=True))
            case "kept":
                ledger.index.keep(f"x{at}", make.grant(node, "d0", 10))
            case "foreign":
                ledger.index.observe(node, make.use("d0", foreign=12), 1.0)
            case "sick":
                ledger.index.observe(node, make.use("d0", healthy=False), 1.0)
            case "cordoned":
                ledger.index.mark(node, cordoned=True)
    needs = st.builds(
        make.need,
        st.sampled_from([2, 12, 20, 40]),
        st.sampled_from([1, 2]),
        exclusive=st.booleans(),
        architectures=st.sampled_from([(), ("gfx942",), ("gfx90a",), ("gfx90a", "gfx942")]),
        device_model=st.sampled_from(["", "te", "test", "other"]),
    )
    failed, asked = data.draw(needs), data.draw(needs)
    if find(failed, ledger.index, BEST_FIT) is None and asks_for_all_of(asked, failed):
        assert find(asked, ledger.index, BEST_FIT) is None


# --- room for Dask tasks that others pass ---------------------------------------------------------------------------


def passed(*reports, large=24.0):
    """A large Dask task waits, and a small one has gone before it."""
    ledger = book(*(reports or (make.report("a", [24]), make.report("b", [24]))))
    for number in range(4):
        want(ledger, f"s{number}", 12)
    assert len(decided(ledger)) == 4
    want(ledger, "large", large, priority=-1, now_s=1.0)
    want(ledger, "t0", 12, now_s=1.0)
    ledger.ended("s0", 1.0)
    assert set(decided(ledger, 1.0)) == {"t0"}
    return ledger


def test_a_task_that_others_pass_for_long_has_room_kept_where_the_least_must_end():
    ledger = passed()
    where = ledger.index.grants["s1"].node
    ledger.ended("s1", 2.0)
    want(ledger, "t1", 4)
    assert set(decided(ledger, 2.0)) == {"t1"}, "it has not waited for long"
    assert ledger.reserved == {}
    assert decided(ledger, 1.0 + RESERVE_AFTER_S) == {}
    assert ledger.reserved == {"large": make.grant(where, "d0", 24)}
    want(ledger, "t2", 4, now_s=7.0)
    assert decided(ledger, 7.0) == {}, "there is room, and it is kept"
    assert Reason.RESERVED_FOR_LARGER in {verdict.reason for verdict in ledger.verdicts("t2")}
    assert {verdict.reason for verdict in ledger.verdicts("large")} == {Reason.INSUFFICIENT_MEMORY}, "not for itself"
    for slot in ("t0", "t1"):
        ledger.ended(slot, 8.0)
    assert decided(ledger, 8.0) == {"large": make.grant(where, "d0", 24)}
    assert (ledger.reserved, ledger.index.kept) == ({}, {})
    ledger.ended("s2", 9.0)
    assert set(decided(ledger, 9.0)) == {"t2"}, "elsewhere it passes as before"


def test_nobody_has_room_kept_whom_nobody_passes():
    ledger = book()
    want(ledger, "s", 20)
    decided(ledger)
    for number in range(3):
        want(ledger, f"t{number}", 20)
    for now_s in range(2, 60, 2):
        assert decided(ledger, now_s) == {}
        assert ledger.index.kept == {}


def test_a_task_that_fits_elsewhere_takes_that_and_the_room_is_given_to_others():
    ledger = passed()
    decided(ledger, 7.0)
    want(ledger, "t1", 12, now_s=7.0)
    ledger.ended("t0", 7.0)
    assert decided(ledger, 7.0) == {}
    ledger.register(make.report("c", [24]), 8.0)
    assert decided(ledger, 8.0) == {"large": make.grant("c", "d0", 24), "t1": make.grant("a", "d0", 12)}
    assert (ledger.reserved, ledger.index.kept) == ({}, {})


@pytest.mark.parametrize("event", ["cancelled", "node lost", "node gone", "cordoned", "foreign"])
def test_room_is_given_up_when_the_task_goes_or_the_node_will_not_do(event):
    ledger = passed(make.report("a", [24]), make.report("b", [24]))
    decided(ledger, 7.0)
    (kept,) = ledger.reserved.values()
    match event:
        case "cancelled":
            ledger.forget("large")
        case "node lost":
            ledger.lost(kept.node, "i1", 8.0)
        case "node gone":
            ledger.unreachable(kept.node, 8.0)
        case "cordoned":
            ledger.hear(make.beat(kept.node, cordoned=True), 8.0, heard_s=0.0, silent=False)
        case "foreign":
            ledger.hear(make.beat(kept.node, make.use("d0", foreign=2)), 8.0, heard_s=0.0, silent=False)
    decided(ledger, 9.0)
    assert kept not in ledger.index.kept.values()
    elsewhere = {grant.node for grant in ledger.reserved.values()}
    assert elsewhere == (set() if event == "cancelled" else {"a", "b"} - {kept.node}), "the other one will do"


def test_who_fits_nowhere_however_empty_is_in_nobodys_way():
    ledger = passed()
    want(ledger, "huge", 48, priority=-2, now_s=1.0)
    ledger.ended("s1", 2.0)
    want(ledger, "t1", 4, now_s=2.0)
    decided(ledger, 2.0)
    for now_s in (10.0, 11.5):
        decided(ledger, now_s)
    assert set(ledger.reserved) == {"large"}


def test_room_is_kept_for_so_many_tasks_and_no_more():
    ledger = book(*(make.report(f"n{number:02}", [24]) for number in range(2 * RESERVED_MAX)))
    for number in range(4 * RESERVED_MAX):
        want(ledger, f"s{number}", 12)
    assert len(decided(ledger)) == 4 * RESERVED_MAX
    for number in range(2 * RESERVED_MAX):
        want(ledger, f"large{number:02}", 22 + number / 16, priority=-1)
    want(ledger, "small", 12)
    ledger.ended("s0", 2.0)
    assert set(decided(ledger, 2.0)) == {"small"}
    for now_s in range(10, 60, 2):
        decided(ledger, now_s)
        assert len(ledger.reserved) <= RESERVED_MAX
    assert len(ledger.reserved) == RESERVED_MAX
    assert len({grant.node for grant in ledger.reserved.values()}) == RESERVED_MAX, "each has a device of its own"


def test_what_the_leader_keeps_goes_first_and_never_blocks_both():
    ledger = passed()
    decided(ledger, 7.0)
    (kept,) = ledger.reserved.values()
    ask(ledger, "leaders", 24)
    ledger.keep({"leaders": make.grant(kept.node, "d0", 24)}, 8.0)
    decided(ledger, 8.0)
    decided(ledger, 9.5)
    assert ledger.index.kept["leaders"].node == kept.node
    assert {grant.node for grant in ledger.reserved.values()} == {"a", "b"} - {kept.node}
    for slot in [slot for slot, grant in ledger.index.grants.items() if grant.node == kept.node]:
        ledger.ended(slot, 10.0)
    assert set(decided(ledger, 10.0)) == {"leaders"}


# --- what Dask does not take ------------------------------------------------------------------------------------------


def test_undoing_a_new_placement_ends_its_lease_and_holds_it_again():
    ledger = book()
    ask(ledger, "s")
    (assignment,) = ledger.decide(1.0)
    ledger.undo(assignment, 1.0)
    assert (ledger.index.grants, list(ledger.held)) == ({}, ["s"])


def test_undoing_an_adoption_keeps_the_lease_since_the_slot_is_open():
    ledger = book(make.report("a", [24], s=D0))
    ask(ledger, "s", node="a")
    (assignment,) = ledger.decide(1.0)
    ledger.undo(assignment, 1.0)
    assert (ledger.index.grants, list(ledger.held)) == ({"s": D0}, ["s"])


def test_where_a_slot_is():
    ledger = book(make.report("a", [24], lives=make.grant("a", "d0", 4)))
    ask(ledger, "s")
    ask(ledger, "t")
    ledger.decide(1.0)
    where = {slot: ledger.where(slot, 1.0) for slot in ("s", "t", "lives")}
    assert where == {"s": "placing", "t": "held", "lives": "leased"}
    assert ledger.where("s", 1.0 + PLACING_S) == "placed"


# --- property ---------------------------------------------------------------------------------------------------------

names = st.sampled_from(["s0", "s1", "s2", "s3", "s4", "s5"])
nodes = st.sampled_from("ab")
gibs = st.integers(1, 24)
events = st.one_of(
    st.tuples(st.just("ask"), names, gibs, st.integers(1, 2)),
    st.tuples(st.just("want"), names, gibs, st.integers(-1, 1), st.sampled_from(["", "a", "b"])),
    st.tuples(st.just("hold"), names),
    st.tuples(st.just("forget"), names),
    st.tuples(st.just("closed"), names),
    st.tuples(st.just("register"), nodes),
    st.tuples(st.just("restart"), nodes),
    st.tuples(st.just("unreachable"), nodes),
    st.tuples(st.just("lost"), nodes),
    st.tuples(st.just("keep"), names, nodes, gibs),
    st.tuples(st.just("hear"), nodes, st.integers(0, 8)),
)


@given(st.lists(events, max_size=60))
def test_whatever_comes_nothing_is_promised_twice_and_nobody_is_forgotten(history):
    """Agents are played truly: what was assigned is open there until they say that it is closed."""
    ledger = Ledger()
    agents = {"a": {}, "b": {}}
    incarnations = dict.fromkeys("ab", 1)
    for now_s, event in enumerate(history, start=1):
        match event:
            case "ask", slot, gib, gpus:
                if slot not in ledger.requests and slot not in ledger.index.grants:
                    ask(ledger, slot, gib, gpus)
            case "want", slot, gib, priority, place:
                if slot not in ledger.requests and slot not in ledger.index.grants:
                    want(ledger, slot, gib, priority, [place] if place else [])
            case "hold", slot:
                ledger.hold(slot, now_s)
            case "forget", slot:
                ledger.forget(slot)
            case "closed", slot:
                if any(agents[node].pop(slot, None) for node in "ab"):
                    ledger.ended(slot, now_s)
            case "register", node:
                incarnation = f"i{incarnations[node]}"
                ledger.register(make.report(node, [24, 24], incarnation=incarnation, **agents[node]), now_s)
            case "restart", node:
                agents[node].clear()
                incarnations[node] += 1
            case "unreachable", node:
                ledger.unreachable(node, now_s)
            case "lost", node:
                ledger.lost(node, f"i{incarnations[node]}", now_s)
                agents[node].clear()  # its slots have their tombstones: an agent that wakes up ends them
            case "keep", slot, node, gib:
                ledger.keep({slot: make.grant(node, "d0", gib)}, now_s)
            case "hear", node, foreign:
                ledger.hear(make.beat(node, make.use("d0", foreign=foreign)), now_s, heard_s=0.0, silent=False)
        for assignment in ledger.decide(now_s):
            agents[assignment.grant.node].setdefault(assignment.slot_id, assignment.grant)
        assert make.over_committed(ledger.index) == []
        assert set(ledger.held) <= set(ledger.requests)
        for agent in agents.values():
            for uuid in ("d0", "d1"):
                assert sum(held.memory_bytes for held in agent.values() if uuid in held.devices) <= 24 * GIB


def test_room_is_not_taken_on_a_node_that_is_called_otherwise_by_now():
    """The next worker of the node has another address or host: a task that must go to the last one waits."""
    ledger = Ledger(reserve_after_s=1.0)
    ledger.register(make.report("a", [24]), 0.0, names=("h1",))
    ask(ledger, "s", 16.0)
    decided(ledger)
    large = make.shape(20)
    ledger.ask(SlotRequest("large", large, kind=SlotKind.DIRECT, places=frozenset({"h1"})), 1.0)
    ask(ledger, "passes", 2.0)
    decided(ledger, 2.0)
    decided(ledger, 4.0)
    assert set(ledger.reserved) == {"large"}
    ledger.register(make.report("a", [24]), 5.0, names=("h2",))
    assert (ledger.reserved, ledger.index.kept) == ({}, {})
    assert "large" not in decided(ledger, 5.0)
    ledger.register(make.report("a", [24]), 6.0, names=("h1",))
    assert decided(ledger, 6.0) == {"large": make.grant("a", "d0", 20)}
