"""Packing everything that can be asked for: rooms hold as many slots as placement would find room for."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.core.devices import Device
from manager.core.index import Index
from manager.core.model import ClusterState, NodeRow, QueueRow
from manager.core.node_kinds import node_kind
from manager.core.packing import DirectDemand, PackGroup, pack
from manager.core.placement import Reason, devices_for, find
from manager.core.policies import FirstFit
from manager.core.quantities import GIB
from manager.core.rooms import Part, Room
from manager.core.shapes import Resources, grant_of, shape_of
from manager.core.victims import victims
from tests.unit import factories as make


def ledger(pools: list[tuple[int, int]], slots_max: int, cpus: int, host_gib: int) -> Index:
    """One node: of each pool, how many devices share it and its GiB."""
    index = Index()
    devices = [
        Device(f"p{pool}d{at}", 0, "simulated", "M", "gfx942" if pool % 2 else "sm_90", gib * GIB, "", pool=f"p{pool}")
        for pool, (count, gib) in enumerate(pools)
        for at in range(count)
    ]
    index.add_node(
        "n", "i", devices, 0, slots_max, cpu_milli=cpus * 1000, host_memory_bytes=host_gib * GIB, labels=(("zone", "a"),)
    )
    return index


def placed(index: Index, asked: Resources, count: int) -> int:
    """How many of these are placed one after the other."""
    for number in range(count):
        grant = find(asked, index, FirstFit())
        if grant is None:
            return number
        index.lease(f"s{len(index.grants)}", grant)
    return count


ASKED = st.builds(
    Resources,
    memory_bytes=st.sampled_from([1, 3, 7, 16]).map(lambda gib: gib * GIB),
    gpus=st.sampled_from([1, 1, 1, 2, 3]),
    share_milli=st.sampled_from([0, 0, 300, 500, 1000]),
    architectures=st.sampled_from([(), (), ("gfx942",), ("sm_90", "gfx950")]),
    labels=st.sampled_from([(), (("zone", "a"),), (("zone", "b"),)]),
    cpu_milli=st.sampled_from([0, 500, 2000]),
    host_memory_bytes=st.sampled_from([0, 5 * GIB]),
    exclusive=st.sampled_from([False, False, True]),
)


@settings(max_examples=200, deadline=None)
@given(
    pools=st.lists(st.tuples(st.integers(1, 3), st.sampled_from([4, 16, 24])), min_size=1, max_size=4),
    slots_max=st.sampled_from([2, 64]),
    host=st.sampled_from([(0, 0), (4, 32)]),
    before=st.lists(ASKED, max_size=2),
    asked=ASKED,
    count=st.integers(1, 12),
)
def test_as_many_slots_fit_as_placement_finds_room_for(pools, slots_max, host, before, asked, count):
    """Of one device each exactly so many; of several never fewer: placement takes the tightest and looks no further."""
    index = ledger(pools, slots_max, *host)
    for other in before:
        placed(index, other, 1)
    taken = Room(index.nodes["n"], "g").take(Part(asked), count)
    found = placed(index, asked, count)
    assert taken >= found
    if asked.gpus == 1:
        assert taken == found


def queue(name: str, depth: int, **asked: object) -> QueueRow:
    return make.queue(name, shape_of("t", "default", make.need(**asked)), depth)  # type: ignore[arg-type]


def needs(groups: list[PackGroup], *queues: QueueRow, nodes: tuple[NodeRow, ...] = (), **more: object) -> dict[str, int]:
    packing = pack(ClusterState(make.NOW_MS, queues, (), nodes), groups, 30.0, **more)  # type: ignore[arg-type]
    return {need.group: need.nodes for need in packing.needs}


AMD = PackGroup("amd", node_kind("2:mi300x", labels=(("zone", "a"),)), 10)
GREEN = PackGroup("green", node_kind("2:h100"), 10)
SIZE = PackGroup("size", node_kind("2:192GiB"), 10)


@pytest.mark.parametrize(
    ("asked", "slots", "expected"),
    [
        pytest.param({"gib": 1}, 4, 1, id="memory alone"),
        pytest.param({"gib": 1, "share_milli": 500}, 5, 2, id="shares of compute"),
        pytest.param({"gib": 1, "exclusive": True}, 3, 2, id="alone on a device"),
        pytest.param({"gib": 1, "gpus": 2, "share_milli": 600}, 2, 2, id="shares of both devices"),
    ],
)
def test_what_else_is_asked_for_takes_room_too(asked, slots, expected):
    assert needs([AMD], queue("q", slots, **asked)) == {"amd": expected}


@pytest.mark.parametrize(
    ("asked", "group"),
    [
        ({"architectures": ("cdna3",)}, "amd"),
        ({"architectures": ("sm_9*",)}, "green"),
        ({"device_model": "h100|h200"}, "green"),
        ({"labels": (("zone", "a"),)}, "amd"),
    ],
)
def test_a_node_is_added_of_the_group_that_matches(asked, group):
    found = needs([AMD, GREEN, SIZE], queue("q", 1, gib=20, **asked))
    assert found == {"amd": 0, "green": 0, "size": 0} | {group: 1}


def test_what_no_group_matches_asks_for_no_node_and_says_why():
    queues = (queue("a", 3, gib=1, architectures=("gfx950",)), queue("b", 2, gib=1, labels=(("zone", "b"),)))
    packing = pack(ClusterState(make.NOW_MS, queues, (), ()), [AMD, GREEN], 30.0)
    assert all(need.nodes == 0 for need in packing.needs)
    found = {each.reason: each.tasks for each in packing.infeasible}
    assert found == {Reason.NO_MATCHING_ARCHITECTURE: 3, Reason.NO_MATCHING_LABELS: 2}


def test_the_cpus_and_memory_of_a_host_are_known_once_a_node_has_registered():
    row = make.node_row("n1", [192, 192])
    info = msgspec.structs.replace(row.info, group="g", cpus=8, host_memory_bytes=64 * GIB)
    there = (msgspec.structs.replace(row, info=info),)
    group = PackGroup("g", node_kind("2:192GiB"), 10)
    assert needs([group], queue("q", 4, gib=1, cpu_milli=4000)) == {"g": 1}
    assert needs([group], queue("q", 4, gib=1, cpu_milli=4000), nodes=there) == {"g": 2}
    assert needs([group], queue("q", 3, gib=1, host_memory_bytes=40 * GIB), nodes=there) == {"g": 3}
    assert pack(ClusterState(0, (queue("q", 1, gib=1, cpu_milli=9000),), (), there), [group], 30.0).infeasible


def test_who_wants_devices_for_himself_gets_empty_ones_and_the_others_share_the_rest():
    alone, plain = queue("a", 1, gib=1, exclusive=True), queue("p", 4, gib=90)
    assert needs([AMD], alone, plain) == {"amd": 2}
    assert needs([AMD], alone, queue("p", 2, gib=90)) == {"amd": 1}


def test_a_wish_for_a_model_makes_no_request_another_kind():
    packing = pack(ClusterState(0, (queue("a", 1, gib=100, model="x"), queue("b", 1, gib=90)), (), ()), [AMD], 30.0)
    assert packing.needs[0].nodes == 1


def test_what_a_shape_was_seen_to_need_counts():
    learned = msgspec.structs.replace(queue("q", 2, gib=1), learned_bytes=150 * GIB)
    assert needs([PackGroup("g", node_kind("1:192GiB"), 10)], learned) == {"g": 2}


def test_what_dask_users_ask_for_counts_in_full():
    demand = DirectDemand(GIB, 1, 2, make.need(1, architectures=("hopper",), exclusive=True))
    assert needs([AMD, GREEN], direct=[demand]) == {"amd": 0, "green": 1}
    assert needs([AMD, GREEN], direct=[DirectDemand(100 * GIB, 1, 2)]) == {"amd": 1, "green": 0}


@pytest.mark.parametrize("asked", [{"share_milli": 100}, {"cpu_milli": 500}, {"host_memory_bytes": GIB}])
def test_who_asks_for_none_of_it_is_not_held_up_by_room_that_is_kept_for_others(asked):
    """What is kept may not be free yet, and then less than nothing is free."""
    index = ledger([(1, 24)], 64, 1, 1)
    whole = make.need(1, share_milli=1000, cpu_milli=1000, host_memory_bytes=GIB)
    index.lease("running", grant_of(whole, "n", ("p0d0",)))
    index.keep("waiting", grant_of(make.need(1, **asked), "n", ("p0d0",)))
    plain = make.need(4)
    assert devices_for(plain, index.nodes["n"]) == ("p0d0",)
    assert find(plain, index, FirstFit()) is not None
    assert find(make.need(4, **asked), index, FirstFit()) is None
    assert victims(plain, index, {"running": 1.0}) == ()
