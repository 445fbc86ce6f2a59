"""The columns say what the views say, follow their changes, and know which rows have changed."""

import numpy as np
import pytest

from manager.core.index import Index
from manager.core.quantities import GIB
from manager.core.shapes import Resources, grant_of
from manager.core.table import ABSENT, MEMO_MAX, WHOLE, Table
from tests.unit import factories as make


def ledger():
    made = Index()
    made.add_node("b", "i1", make.devices(24, 24, 48), GIB, cpu_milli=8000, host_memory_bytes=16 * GIB)
    made.add_node("a", "i1", make.devices(24, 24), GIB)
    return made


def test_rows_are_in_the_order_of_names_and_absent_devices_hold_nothing():
    table = ledger().table
    assert table.names == ["a", "b"]
    assert table.memory_bytes.tolist() == [[23 * GIB, 23 * GIB, ABSENT], [23 * GIB, 23 * GIB, 47 * GIB]]
    assert table.room_milli.tolist() == [[WHOLE, WHOLE, 0], [WHOLE, WHOLE, WHOLE]]
    assert table.kind.tolist()[0][2] == -1
    assert table.cpu_largest_milli == 8000, "a host that does not say what it has is not the largest"


def test_a_device_stands_for_those_like_it_where_all_of_a_node_are_alike():
    made = ledger()
    assert made.table.repeated.tolist() == [[0, 1, 0], [0, 0, 0]]
    made.lease("s", make.grant("a", "d0", 1))
    assert made.table.repeated.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("lease", "room", "untouched"),
    [
        pytest.param(Resources(6 * GIB), 739, 0, id="memory"),
        pytest.param(Resources(6 * GIB, share_milli=400), 600, 0, id="the smaller of both"),
        pytest.param(Resources(GIB, exclusive=True), 0, 0, id="somebody's alone"),
        pytest.param(Resources(30 * GIB), 0, 0, id="never below nothing"),
    ],
)
def test_room_is_what_is_left_of_the_device(lease, room, untouched):
    made = ledger()
    made.lease("s", grant_of(lease, "a", ("d0",)))
    assert (made.table.room_milli[0, 0], made.table.untouched[0, 0]) == (room, untouched)
    assert made.table.room_milli[0, 1] == WHOLE
    made.free("s")
    assert made.table.is_equal(ledger().table)


@pytest.mark.parametrize("mark", ["cordoned", "lost", "reachable"])
def test_a_node_that_takes_nothing_has_no_cpus_for_anybody(mark):
    made = ledger()
    value = getattr(made.nodes["b"], mark)
    table = made.table
    made.mark("b", **{mark: not value})
    assert made.table is table
    assert table.hosts(make.need(0), np.arange(2)).tolist() == [0]
    made.mark("b", **{mark: value})
    assert made.table.hosts(make.need(0), np.arange(2)).tolist() == [0, 1]


def test_only_what_has_changed_since_a_mark_is_named():
    made = ledger()
    table = made.table
    assert table.changed_since(-1).tolist() == [0, 1]
    mark = table.now
    assert table.changed_since(mark).tolist() == []
    made.lease("s", make.grant("b", "d0", 1))
    made.lease("t", make.grant("b", "d1", 1))
    assert made.table.changed_since(mark).tolist() == [1]
    later = table.now
    made.observe("a", make.use("d0", foreign=1), 0.0)
    assert made.table.changed_since(later).tolist() == [0]
    assert table.changed_since(mark).tolist() == [0, 1]


def test_a_device_that_is_not_there_matches_no_selector():
    made = ledger()
    table = made.table
    need = make.need(0, architectures=("gfx942",))
    assert table.matching(make.need(0)) is None
    fits = table.fitting(need, np.arange(2), table.matching(need))
    assert fits.tolist() == [[True, False, False], [True, True, True]], "d1 of a is like d0"
    assert not table.fitting(make.need(0, architectures=("sm_90",)), np.arange(2), np.array([False, False])).any()


def test_what_is_remembered_is_bounded():
    table = ledger().table
    assert table.recall("x", lambda: 1) == 1
    assert table.recall("x", lambda: 2) == 1
    for number in range(MEMO_MAX):
        table.recall(number, lambda: 0)
    assert table.recall("x", lambda: 2) == 2


def test_an_empty_cluster_has_an_empty_table():
    assert Table([]).names == []
    made = Index()
    made.add_node("a", "i1", (), 0)
    assert made.table.room_milli.tolist() == [[0]]
