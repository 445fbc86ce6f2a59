"""Whose memory it is: what sessions of slots hold is theirs, everything else is foreign."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from manager.core.devices import ProcessUse, Reading
from manager.core.quantities import GIB
from plugins.node.attribution import attribute

SLOTS = {11: "s1", 12: "s1", 21: "s2"}


def reading(used, processes, *, known=True, **more):
    uses = tuple(ProcessUse(pid, size * GIB) for pid, size in processes.items())
    return Reading(uuid="d0", used_bytes=used * GIB, healthy=True, processes=uses, processes_known=known, **more)


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
    use = attribute(reading(used, processes, known=known), SLOTS.get, sizes)
    assert use.slots == {slot: size * GIB for slot, size in slots.items()}
    assert (use.used_bytes, use.foreign_bytes) == (used * GIB, foreign * GIB)


def test_what_the_device_says_of_itself_is_passed_on():
    said = reading(1, {}, utilisation_ratio=0.5, temperature_celsius=60.0, power_watts=300.0, problem="no fan")
    use = attribute(said, SLOTS.get, {})
    assert (use.utilisation_ratio, use.temperature_celsius, use.power_watts) == (0.5, 60.0, 300.0)
    assert (use.uuid, use.healthy, use.problem) == ("d0", True, "no fan")


def test_an_unhealthy_device_stays_so():
    assert not attribute(Reading(uuid="d0", used_bytes=0, healthy=False), SLOTS.get, {}).healthy


@given(
    st.integers(0, 50),
    st.dictionaries(st.sampled_from([11, 12, 21, 98, 99]), st.integers(0, 20)),
    st.booleans(),
    st.dictionaries(st.sampled_from(["s1", "s2"]), st.integers(0, 20)),
)
def test_all_that_is_used_is_somebodys(used, processes, known, leases):
    sizes = {slot: size * GIB for slot, size in leases.items()}
    use = attribute(reading(used, processes, known=known), SLOTS.get, sizes)
    promised = sum(use.slots.values()) if known else sum(sizes.values())
    assert promised + use.foreign_bytes >= used * GIB
    assert use.foreign_bytes >= 0
