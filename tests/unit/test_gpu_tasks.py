"""What Dask's own users ask for, and whose idle slots end so that they find room."""

import pickle

import msgspec
import pytest

from manager.core.closing import Close
from manager.core.direct_room import REASON, closes_for_direct
from manager.core.gpu_tasks import (
    GpuAnnotationRefused,
    GpuExplanation,
    GpuTaskCrashed,
    direct_shape,
    gpu_resources,
)
from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag, SlotKind, SlotStatus
from manager.core.model import SlotRow
from manager.core.packing import DirectDemand
from manager.core.placement import Reason, Verdict
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from tests.unit import factories as make


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"memory": "16GiB"}, Resources(16 * GIB, 1)),
        ({"memory": 5, "count": 64}, Resources(5, 64)),
        ({"memory": "1.5 GiB", "count": 2}, Resources(3 * GIB // 2, 2)),
        (
            {"memory": 5, "share": "50%", "architecture": ["sm_90", "CDNA3"], "device_model": "H100", "labels": {"zone": "a"}},
            Resources(5, 1, 500, ("cdna3", "sm_90"), "h100", (("zone", "a"),)),
        ),
        (
            {"memory": 5, "cpus": 0.5, "host_memory": "1GiB", "exclusive": True, "model": "m"},
            Resources(5, cpu_milli=500, host_memory_bytes=GIB, exclusive=True, model="m"),
        ),
    ],
)
def test_an_annotation_is_read(wanted, found):
    assert gpu_resources(wanted) == found


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        (None, "write gpu="),
        ({}, "write gpu="),
        ({"memory": None}, "write gpu="),
        ({1: 2}, "write gpu="),
        ({"memory": "1GiB", "count": 1.0}, "a number from 1 to 64"),
        ({"memory": "x"}, "such as '24GiB'"),
        ({"memory": 5, "share": 2}, "the share of the gpu annotation: 2.0 is not a share"),
        ({"memory": 5, "architecture": "cdna33"}, "did you mean 'cdna3'"),
        ({"memory": 5, "labels": ["zone"]}, "write gpu="),
        ({"memory": 5, "exclusive": "yes"}, "write gpu="),
        ({"memory": 5, "gpus": 2}, "there are memory, count, share"),
    ],
)
def test_what_cannot_be_read_is_refused_and_what_would_be_right_is_said(wanted, right):
    with pytest.raises(GpuAnnotationRefused, match=right):
        gpu_resources(wanted)


def test_memory_is_rounded_to_its_class_and_a_slot_serves_one_task():
    shape = direct_shape(Resources(100))
    assert (shape.memory_bytes, shape.max_tasks_per_slot, shape.tenant) == (GIB // 4, 1, "dask")


def test_errors_travel():
    error = pickle.loads(pickle.dumps(GpuTaskCrashed("it was killed")))
    assert (type(error), str(error)) == (GpuTaskCrashed, "it was killed")


def test_an_explanation_says_it_in_words():
    held = GpuExplanation("held", 2 * GIB, 1, before=3, verdicts=(Verdict("a", Reason.INSUFFICIENT_MEMORY, GIB),))
    assert str(held) == "waits for room (1 × 2 GiB), 3 of its size before it\n  a: InsufficientMemory, 1 GiB short"
    assert "CPU" in str(GpuExplanation("plain"))
    assert "no such task" in str(GpuExplanation("unknown"))
    assert str(GpuExplanation("waiting", 2 * GIB, 1)) == "waiting (1 × 2 GiB)"


# --- room ------------------------------------------------------------------------------------------------------------


def world(*slots, gib=24.0):
    return make.state([make.queue("q", make.shape(12), 0)], slots, {"a": [gib]})


def asked(gib, count=1):
    return DirectDemand(int(gib * GIB), 1, count)


def ends(state, *waiting, ending=()):
    return [close.slot_id for close in closes_for_direct(state, index_of(state), waiting, ending)]


def open_slot(name, idle_s=None, shape_id="q", **more):
    idle_ms = None if idle_s is None else make.NOW_MS - int(idle_s * 1000)
    return SlotRow(
        slot_id=name,
        shape_id=shape_id,
        status=SlotStatus.OPEN,
        node="a",
        incarnation="i1",
        devices=("d0",),
        opened_ms=1,
        idle_ms=idle_ms,
        **more,
    )


def test_the_longest_idle_slot_ends_for_a_dask_task_that_waits():
    state = world(open_slot("young", 1.0), open_slot("old", 50.0))
    assert closes_for_direct(state, index_of(state), [asked(8)], ()) == [Close("old", REASON)]
    assert ends(state, asked(20)) == ["old", "young"]
    assert ends(state, asked(12, count=9)) == ["old", "young"]


def test_a_slot_that_is_kept_warm_ends_after_the_other_idle_ones():
    queues = [msgspec.structs.replace(make.queue("q", make.shape(12), 0), warm=1), make.queue("r", make.shape(12), 0)]
    state = make.state(queues, (open_slot("warm", 50.0), open_slot("idle", 1.0, shape_id="r")), {"a": [24]})
    assert ends(state, asked(8)) == ["idle"]
    assert ends(state, asked(20)) == ["idle", "warm"]


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        (open_slot("s", None), "it works"),
        (open_slot("s", 5.0, running=1), "it has a task"),
        (open_slot("s", 5.0, flag=SlotFlag.CLOSE), "it ends already"),
        (open_slot("s", 5.0, kind=SlotKind.DIRECT, memory_bytes=12 * GIB), "it is somebody's own"),
    ],
)
def test_nothing_else_ends(slot, why):
    assert ends(world(slot), asked(20)) == [], why


def test_nothing_ends_where_there_is_room_or_never_will_be_or_room_is_coming():
    idle = open_slot("s", 5.0)
    assert ends(world(idle), asked(12)) == []
    assert ends(world(idle), asked(40)) == []
    assert ends(world(idle, open_slot("t", 9.0)), asked(12), ending={"s"}) == []
