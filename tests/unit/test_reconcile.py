"""Between the store and Dask: what one has and the other has not is put right, and nothing that is well is touched."""

import msgspec
import pytest

from manager.core.reconcile import Repairs, Resubmit, repairs
from tests.unit import factories as make

DEADLINE_S = 20.0
OPEN = make.opened("s", "x", "a", "d0")
ASKED = make.requested("s", "x", age_s=1)
LATE = make.requested("s", "x", age_s=21)
NOTHING = Repairs((), (), (), ())


def todo(slots, on_dask, fenced=()):
    state = make.state([make.queue("x", make.shape(8), 1)], slots, {"a": [24], "b": [24]})
    rows = tuple(msgspec.structs.replace(row, fenced=row.node in fenced) for row in state.nodes)
    return repairs(msgspec.structs.replace(state, nodes=rows), on_dask, DEADLINE_S)


@pytest.mark.parametrize(
    ("slot", "known", "expected"),
    [
        pytest.param(ASKED, ("held", ""), NOTHING, id="asked for, held: it waits"),
        pytest.param(LATE, ("held", ""), NOTHING, id="held for however long"),
        pytest.param(ASKED, ("placed", "a"), NOTHING, id="placed: on its way"),
        pytest.param(LATE, ("placing", "a"), NOTHING, id="held for long and placed just now: on its way"),
        pytest.param(LATE, ("placed", "a"), Repairs((), ("s",), (), ()), id="placed and not opened in time"),
        pytest.param(LATE, ("leased", "a"), Repairs((), ("s",), (), ()), id="its task is gone and it was never opened"),
        pytest.param(ASKED, ("leased", "a"), NOTHING, id="its task is gone, its agent may be opening it"),
        pytest.param(ASKED, None, Repairs((Resubmit(ASKED, ""),), (), (), ()), id="asked for, Dask knows nothing: anywhere"),
        pytest.param(LATE, None, Repairs((Resubmit(LATE, ""),), (), (), ()), id="late, but never submitted"),
        pytest.param(OPEN, ("placed", "a"), NOTHING, id="open: well"),
        pytest.param(OPEN, ("placing", "a"), NOTHING, id="open and adopted just now"),
        pytest.param(OPEN, ("held", "a"), NOTHING, id="open, waits for its node's worker"),
        pytest.param(OPEN, ("leased", "a"), Repairs((Resubmit(OPEN, "a"),), (), (), ()), id="open without a task: its node"),
        pytest.param(OPEN, None, Repairs((Resubmit(OPEN, "a"),), (), (), ()), id="open, Dask knows nothing: its node"),
        pytest.param(None, ("held", ""), Repairs((), (), ("s",), ()), id="ended in the store, held in Dask"),
        pytest.param(None, ("placed", "a"), NOTHING, id="ended in the store: its agent is about to say so"),
        pytest.param(None, ("leased", "a"), NOTHING, id="ended in the store: its lease is the agent's to end"),
    ],
)
def test_one_slot(slot, known, expected):
    assert todo([slot] if slot else [], {"s": known} if known else {}) == expected


@pytest.mark.parametrize("where", ["placing", "placed", "leased"])
def test_what_was_placed_on_a_lost_node_is_taken_back_before_the_plugin_is_told(where):
    assert todo([ASKED], {"s": (where, "a")}, fenced={"a"}) == Repairs((), ("s",), (), (("a", "i1"),))


def test_a_lost_node_is_told_only_while_dask_has_something_there():
    assert todo([], {}, fenced={"a"}) == NOTHING
    assert todo([], {"s": ("leased", "b")}, fenced={"a"}) == NOTHING
    assert todo([], {"s": ("leased", "a")}, fenced={"a", "b"}).tell_lost == (("a", "i1"),)


def test_repairs_are_idempotent_on_what_they_have_repaired():
    first = todo([OPEN, make.requested("t", "x")], {})
    on_dask = {item.slot.slot_id: ("held", item.node) for item in first.resubmit}
    assert todo([OPEN, make.requested("t", "x")], on_dask) == NOTHING
