"""Who is ended for taking more than its lease, what its shape learns by that, and what the store is told."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from manager.core.model import MemoryNote
from manager.core.quantities import GIB, MIB
from manager.core.shapes import memory_class, memory_class_within
from plugins.node.lease_watch import MEMORY_TOLERANCE_BYTES, NOTE_AGAIN_S, LeaseWatch, SlotUse


def use(used, lease=4.0, asked=4.0, most=190.0):
    return SlotUse(*(int(gib * GIB) for gib in (used, lease, asked, most)))


def note(slot, peak, learned=0.0):
    return MemoryNote(slot, int(peak * GIB), int(learned * GIB))


def test_a_slot_is_ended_when_two_readings_in_a_row_are_above_its_lease():
    watch = LeaseWatch()
    assert watch.look({"s": use(6), "t": use(4)}) == []
    assert watch.look({"s": use(6.1), "t": use(4)}) == [note("s", 6.1, 6.25)]
    assert watch.look({"s": use(7), "t": use(4)}) == [], "it was ended twice"


def test_a_single_reading_above_the_lease_ends_nothing_and_teaches_nothing():
    watch = LeaseWatch()
    for used in (3, 9, 3, 9, 3):
        assert watch.look({"s": use(used)}) == []
    assert watch.notes(0.0) == [note("s", 3)]


def test_what_is_within_the_tolerance_is_within_the_lease():
    watch = LeaseWatch()
    slight = SlotUse(4 * GIB + MEMORY_TOLERANCE_BYTES, 4 * GIB, 4 * GIB, 190 * GIB)
    for _ in range(3):
        assert watch.look({"s": slight}) == []
    assert [said.learned_bytes for said in watch.notes(0.0)] == [0]


@pytest.mark.parametrize(
    ("used", "lease", "asked", "most", "learned"),
    [
        pytest.param(5.1, 4, 4, 190, 5.25, id="the class that holds what was used"),
        pytest.param(60, 4, 4, 47, 47, id="no more than the device can lease"),
        pytest.param(60, 48, 48, 48, 0, id="nothing where it had all of it"),
        pytest.param(5.1, 6, 4, 190, 5.25, id="also within a lease that was learned"),
    ],
)
def test_what_a_shape_learns(used, lease, asked, most, learned):
    watch = LeaseWatch()
    for _ in range(2):
        watch.look({"s": use(used, lease, asked, most)})
    assert [said.learned_bytes for said in watch.notes(0.0)] == [learned * GIB]


def test_the_store_is_told_of_peaks_by_classes_and_of_what_holds_still_once_an_hour():
    watch = LeaseWatch()
    watch.look({"s": use(1), "t": use(5, lease=6)})
    first = watch.notes(0.0)
    assert first == [note("s", 1), note("t", 5, 5)]
    assert watch.notes(0.0) == first, "what the store was not told is to be told"
    watch.noted(first, 0.0)
    watch.look({"s": use(0.5), "t": use(4.9, lease=6)})
    assert watch.notes(NOTE_AGAIN_S - 1) == []
    assert watch.notes(NOTE_AGAIN_S) == [note("t", 5, 5)], "what was learned is kept alive"
    watch.look({"s": use(1.1), "t": use(5, lease=6)})
    assert watch.notes(1.0) == [note("s", 1.1)]


def test_a_slot_that_is_gone_is_forgotten():
    watch = LeaseWatch()
    watch.look({"s": use(6)})
    watch.look({})
    assert watch.notes(0.0) == []
    assert watch.look({"s": use(6)}) == [], "another slot of that name begins anew"


@given(st.integers(1, 400 * GIB))
def test_the_largest_class_within_a_size_is_the_class_below_it(size):
    within = memory_class_within(size)
    assert within <= size
    assert memory_class(within) == within
    assert within == size or memory_class(within + 1) > size


@pytest.mark.parametrize(("size", "expected"), [(100 * MIB, 0), (-GIB, 0), (8 * GIB, 8 * GIB), (191 * GIB + 7, 191 * GIB)])
def test_classes_within(size, expected):
    assert memory_class_within(size) == expected
