"""Whose memory it is: what sessions of slots hold is theirs, everything else is foreign."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from manager.core.devices import ProcessUse, Reading
from manager.core.quantities import GIB
from plugins.node.attribution import attribute

SLOTS = {11: "s1", 12: "s1", 21: "s2"}


def reading(used, processes, *, known=True, uuid="d0", healthy=True, **more):
    uses = tuple(ProcessUse(pid, size * GIB) for pid, size in processes.items())
    return Reading(uuid=uuid, used_bytes=used * GIB, healthy=healthy, processes=uses, processes_known=known, **more)


@pytest.mark.parametrize(
    ("used", "processes", "known", "leases", "slots", "foreign"),
    [
        pytest.param(0, {}, True, {}, {}, 0, id="empty"),
        pytest.param(7, {11: 3, 12: 4}, True, {"s1": 8}, {"s1": 7}, 0, id="all processes of a slot's session"),
        pytest.param(9, {11: 3, 21: 4, 99: 2}, True, {}, {"s1": 3, "s2": 4}, 2, id="a process of nobody's is foreign"),
        pytest.param(9, {11: 3}, True, {"s1": 8}, {"s1": 3}, 6, id="what no process is charged with is foreign"),
        pytest.param(2, {11: 3}, True, {"s1": 8}, {"s1": 3}, 0, id="processes may add up to more than the device says"),
        pytest.param(9, {}, False, {"s1": 4, "s2": 2}, {}, 3, id="pids unknown: what is above the leases is foreign"),
        pytest.param(4, {}, False, {"s1": 4, "s2": 2}, {}, 0, id="pids unknown, all within the leases"),
        pytest.param(4, {11: 4}, False, {}, {}, 4, id="pids of another namespace say nothing"),
    ],
)
def test_attribute(used, processes, known, leases, slots, foreign):
    sizes = {slot: size * GIB for slot, size in leases.items()}
    (use,) = attribute([reading(used, processes, known=known)], SLOTS.get, sizes)
    assert use.slots == {slot: size * GIB for slot, size in slots.items()}
    assert (use.used_bytes, use.foreign_bytes) == (used * GIB, foreign * GIB)


def test_what_the_device_says_of_itself_is_passed_on():
    said = reading(1, {}, utilisation_ratio=0.5, temperature_celsius=60.0, power_watts=300.0, problem="no fan")
    (use,) = attribute([said], SLOTS.get, {})
    assert (use.utilisation_ratio, use.temperature_celsius, use.power_watts) == (0.5, 60.0, 300.0)
    assert (use.uuid, use.healthy, use.problem) == ("d0", True, "no fan")


def test_an_unhealthy_device_stays_so():
    (use,) = attribute([Reading(uuid="d0", used_bytes=0, healthy=False)], SLOTS.get, {})
    assert not use.healthy


@given(
    st.integers(0, 50),
    st.dictionaries(st.sampled_from([11, 12, 21, 98, 99]), st.integers(0, 20)),
    st.booleans(),
    st.dictionaries(st.sampled_from(["s1", "s2"]), st.integers(0, 20)),
)
def test_all_that_is_used_is_somebodys(used, processes, known, leases):
    sizes = {slot: size * GIB for slot, size in leases.items()}
    (use,) = attribute([reading(used, processes, known=known)], SLOTS.get, sizes)
    promised = sum(use.slots.values()) if known else sum(sizes.values())
    assert promised + use.foreign_bytes >= used * GIB
    assert use.foreign_bytes >= 0


# --- devices that share their memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "leases", "slots", "foreign", "used"),
    [
        pytest.param((7, {11: 3, 21: 4}), (7, {11: 3, 21: 4}), {}, {"s1": 3, "s2": 4}, 0, 7, id="each tells of all"),
        pytest.param((7, {11: 3}), (7, {21: 4}), {}, {"s1": 3, "s2": 4}, 0, 7, id="each tells of its own processes"),
        pytest.param((7, {11: 3}), (7, {11: 2}), {}, {"s1": 3}, 4, 7, id="parts of one process are not added up"),
        pytest.param((3, {11: 3}), (9, {21: 4}), {}, {"s1": 3, "s2": 4}, 2, 9, id="the larger reading counts"),
        pytest.param((9, {11: 3, 99: 5}), (9, {99: 5}), {}, {"s1": 3}, 6, 9, id="nobody's process is foreign once"),
    ],
)
def test_what_a_pool_holds_is_counted_once_and_told_with_each_of_its_devices(one, other, leases, slots, foreign, used):
    uses = attribute([reading(*one), reading(*other, uuid="d1")], SLOTS.get, leases)
    assert [use.uuid for use in uses] == ["d0", "d1"]
    for use in uses:
        assert use.slots == {slot: size * GIB for slot, size in slots.items()}
        assert (use.used_bytes, use.foreign_bytes) == (used * GIB, foreign * GIB)


def test_where_one_device_of_a_pool_does_not_tell_its_processes_the_leases_count():
    uses = attribute([reading(9, {11: 3}), reading(9, {}, known=False, uuid="d1")], SLOTS.get, {"s1": 4 * GIB, "s2": 2 * GIB})
    assert [(use.slots, use.foreign_bytes) for use in uses] == [({}, 3 * GIB)] * 2


def test_what_a_sick_device_of_a_pool_reads_does_not_count():
    uses = attribute([reading(48, {}, known=False, healthy=False), reading(5, {11: 3}, uuid="d1")], SLOTS.get, {})
    assert [(use.healthy, use.used_bytes, use.foreign_bytes) for use in uses] == [
        (False, 48 * GIB, 2 * GIB),
        (True, 5 * GIB, 2 * GIB),
    ]
