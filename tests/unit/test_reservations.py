"""Where room is kept: where the least must still end, and never where the request would not fit on the empty node."""

import msgspec
import pytest

from manager.core.quantities import GIB
from manager.core.reservations import best_room, grant_in, is_ready, room_on
from manager.core.shapes import grant_of
from tests.unit import factories as make


def leased(index, **grants):
    for slot, (node, uuids, needs) in grants.items():
        index.lease(slot, grant_of(needs, node, tuple(uuids.split())))
    return index


def test_the_least_to_wait_for_is_the_best():
    index = leased(make.index({"a": [24], "b": [24]}), s=("a", "d0", make.need(20)), t=("b", "d0", make.need(10)))
    room = best_room(make.need(24), index)
    assert (room.node, room.memory_bytes) == ("b", 10 * GIB)
    assert best_room(make.need(24), index, frozenset("a")).node == "a", "the only one that it may go to"
    assert grant_in(room, make.need(24)) == make.grant("b", "d0", 24)


def test_of_equal_ones_the_first_by_name():
    index = leased(make.index({"b": [24], "a": [24]}), s=("a", "d0", make.need(4)), t=("b", "d0", make.need(4)))
    assert best_room(make.need(24), index).node == "a"


@pytest.mark.parametrize(
    "needs",
    [
        make.need(25),
        make.need(8, 2),
        make.need(8, labels=(("zone", "x"),)),
        make.need(8, architectures=("gfx90a",)),
        make.need(8, cpu_milli=9000),
        make.need(8, host_memory_bytes=65 * GIB),
    ],
)
def test_no_room_where_it_would_not_fit_on_the_empty_node(needs):
    index = make.index({})
    index.add_node("a", "i1", make.devices(24), 0, cpu_milli=8000, host_memory_bytes=64 * GIB)
    assert best_room(needs, index) is None
    assert best_room(make.need(8), index) is not None


@pytest.mark.parametrize("trouble", ["cordoned", "lost", "unreachable", "sick", "foreign", "kept", "kept alone", "kept slots"])
def test_no_room_where_nothing_new_may_go_or_others_have_it(trouble):
    index = make.index({"a": [24]})
    view = index.nodes["a"]
    match trouble:
        case "cordoned":
            index.mark("a", cordoned=True)
        case "lost":
            index.mark("a", lost=True)
        case "unreachable":
            index.mark("a", reachable=False)
        case "sick":
            index.observe("a", make.use("d0", healthy=False), 0.0)
        case "foreign":
            index.observe("a", make.use("d0", foreign=4), 0.0)
        case "kept":
            index.keep("x", make.grant("a", "d0", 4))
        case "kept alone":
            index.keep("x", msgspec.structs.replace(make.grant("a", "d0", 1), exclusive=True))
        case "kept slots":
            view.slots_max = 1
            index.keep("x", make.grant("a", "d0", 1))
    assert best_room(make.need(22), index) is None


def test_devices_that_share_memory_must_have_enough_of_it_for_both():
    index = make.index({})
    pair = [msgspec.structs.replace(device, pool="q0") for device in make.devices(48, 48)]
    index.add_node("a", "i1", pair, 0)
    leased(index, s=("a", "d0", make.need(10)))
    assert best_room(make.need(25, 2), index) is None
    room = best_room(make.need(24, 2), index)
    assert (room.devices, room.memory_bytes) == (("d0", "d1"), 10 * GIB)


def test_who_wants_a_device_alone_waits_for_all_that_is_on_it():
    index = leased(make.index({"a": [24, 24]}), s=("a", "d0", make.need(2)), t=("a", "d1", make.need(4)))
    room = best_room(make.need(1, exclusive=True), index)
    assert (room.devices, room.memory_bytes) == (("d0",), 2 * GIB)


def test_what_is_short_beside_memory_counts_too():
    index = make.index({})
    for node, taken in (("a", 7000), ("b", 5000)):
        index.add_node(node, "i1", make.devices(24), 0, cpu_milli=8000)
        leased(index, **{node: (node, "d0", make.need(1, cpu_milli=taken, share_milli=800))})
    room = best_room(make.need(8, cpu_milli=4000, share_milli=500), index)
    assert (room.node, room.memory_bytes, room.share_milli, room.cpu_milli) == ("b", 0, 300, 1000)


@pytest.mark.parametrize(
    "others",
    [
        make.need(4),
        make.need(1, share_milli=600),
        make.need(1, cpu_milli=5000),
        make.need(1, host_memory_bytes=40 * GIB),
        make.need(1, exclusive=True),
    ],
)
def test_room_is_ready_when_all_of_it_is_free(others):
    """With what it asks for kept, the room that somebody else still has of it is missing."""
    index = make.index({})
    index.add_node("a", "i1", make.devices(24), 0, 3, cpu_milli=8000, host_memory_bytes=64 * GIB)
    needs = make.need(22, share_milli=500, cpu_milli=4000, host_memory_bytes=32 * GIB)
    leased(index, s=("a", "d0", others))
    kept = grant_in(room_on(needs, index.nodes["a"], index), needs)
    index.keep("large", kept)
    assert not is_ready("large", kept, index.nodes["a"])
    index.free("s")
    assert is_ready("large", kept, index.nodes["a"])
    index.nodes["a"].slots_max = 0
    assert not is_ready("large", kept, index.nodes["a"])


def test_room_for_who_wants_a_device_alone_is_ready_when_nobody_is_there():
    index = leased(make.index({"a": [24]}), s=("a", "d0", make.need(1)))
    needs = make.need(2, exclusive=True)
    index.keep("x", grant_of(needs, "a", ("d0",)))
    assert not is_ready("x", index.kept["x"], index.nodes["a"])
    index.free("s")
    assert is_ready("x", index.kept["x"], index.nodes["a"])


@pytest.mark.parametrize("more", [{"cpu_milli": 8000}, {"host_memory_bytes": 64 * GIB}, {"share_milli": 1000}])
def test_room_is_ready_whatever_others_wait_for_that_it_does_not_ask_for(more):
    """What another has kept and is not free yet is in the way only of who asks for the same."""
    index = make.index({})
    index.add_node("a", "i1", make.devices(24), 0, cpu_milli=8000, host_memory_bytes=64 * GIB)
    leased(index, s=("a", "d0", make.need(2, **more)))
    index.keep("other", grant_of(make.need(4, **more), "a", ("d0",)))
    index.keep("large", grant_of(make.need(18), "a", ("d0",)))
    assert is_ready("large", index.kept["large"], index.nodes["a"])
    assert not is_ready("other", index.kept["other"], index.nodes["a"])
