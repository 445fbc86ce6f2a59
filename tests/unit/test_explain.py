"""Every reason that a task can have to be where it is."""

import msgspec
import pytest

from manager.core.devices import Device
from manager.core.explain import Why, explain
from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag, SlotStatus, TaskStatus
from manager.core.model import (
    ClusterState,
    DeviceUse,
    NodeInfo,
    NodeRow,
    QueueRow,
    SlotRow,
    TaskError,
    TaskRecord,
    TaskSpec,
)
from manager.core.placement import Reason
from manager.core.quantities import GIB
from manager.core.shapes import Resources, shape_id, shape_of

NOW_MS = 1_000_000


def node(name="n1", sizes=(64,), *, address="tcp://a", foreign=0, healthy=True, fenced=False, left=False) -> NodeRow:
    devices = tuple(Device(f"{name}-{i}", i, "simulated", "M", "gfx", size * GIB, f"{i}") for i, size in enumerate(sizes))
    uses = tuple(
        DeviceUse(uuid=d.uuid, used_bytes=foreign * GIB, foreign_bytes=foreign * GIB, healthy=healthy) for d in devices
    )
    info = NodeInfo(hostname=name, pid=1, source="simulated", version="0", devices=devices)
    return NodeRow(node=name, incarnation="i", beat=1, info=info, fenced=fenced, left=left, uses=uses, address=address)


def record(memory=16, gpus=1, status=TaskStatus.QUEUED, **fields) -> TaskRecord:
    resources = Resources(memory * GIB, gpus)
    spec = TaskSpec("echo", msgspec.Raw(b"{}"), resources, max_attempts=3)
    identity = shape_id(shape_of("t", "default", resources))
    base = {"attempt": 0, "created_ms": NOW_MS - 5000, "queued_ms": NOW_MS - 3000}
    return TaskRecord(
        task_id="0" * 26, status=status, tenant="t", function="echo", shape_id=identity, spec=spec, **(base | fields)
    )


def slot(task: TaskRecord, name="s1", *, opened="n1", device=0, flag=SlotFlag.NONE) -> SlotRow:
    if not opened:
        return SlotRow(slot_id=name, shape_id=task.shape_id, status=SlotStatus.REQUESTED)
    return SlotRow(
        slot_id=name, shape_id=task.shape_id, status=SlotStatus.OPEN, node=opened, devices=(f"{opened}-{device}",), flag=flag
    )


def queue(task: TaskRecord, depth=1) -> QueueRow:
    assert task.spec is not None
    return QueueRow(shape_id=task.shape_id, shape=shape_of("t", "default", task.spec.resources), depth=depth)


def explained(task: TaskRecord, nodes=(), slots=(), position=0, silent=(), others=()):
    queues = tuple({q.shape_id: q for q in (queue(task), *map(queue, others))}.values())
    state = ClusterState(NOW_MS, queues, tuple(slots), tuple(nodes))
    return explain(task, state, index_of(state), position, NOW_MS, frozenset(silent))


big, small, pair = record(100), record(16), record(40, gpus=2)
hog = record(60)

WAITING = [
    pytest.param(small, [], {}, Why.NO_WORKERS, "No node is registered", id="no node"),
    pytest.param(small, [node(left=True)], {}, Why.NO_WORKERS, "rocyard node", id="the only node left"),
    pytest.param(small, [node()], {}, Why.WAITING_FOR_SLOT, "room for 16 GiB on n1", id="room, no slot yet"),
    pytest.param(small, [node()], {"slots": [slot(small, opened="")]}, Why.SLOT_OPENING, "is opening", id="a slot is opening"),
    pytest.param(
        small, [node()], {"slots": [slot(small)], "position": 4}, Why.WAITING_FOR_TURN, "4 of its shape", id="others first"
    ),
    pytest.param(small, [node()], {"slots": [slot(small)]}, Why.WAITING_FOR_TURN, "it is next", id="next in line"),
    pytest.param(
        small,
        [node()],
        {"slots": [slot(small, flag=SlotFlag.CLOSE)]},
        Why.WAITING_FOR_SLOT,
        "room for",
        id="a slot that is on its way out serves nobody",
    ),
    pytest.param(
        small,
        [node(), node("n2")],
        {"slots": [slot(small)], "silent": ["n1"]},
        Why.NODE_UNREACHABLE,
        "silent (n1)",
        id="its slots are on a silent node",
    ),
    pytest.param(
        small,
        [node(), node("n2", (48,))],
        {"slots": [slot(hog), slot(hog, "s2", opened="n2")], "others": [hog]},
        Why.INSUFFICIENT_MEMORY,
        "n1 is nearest: 12 GiB short",
        id="leased to others",
    ),
    pytest.param(
        small,
        [node(foreign=50)],
        {},
        Why.FOREIGN_MEMORY,
        "none of ours",
        id="used by others",
    ),
    pytest.param(
        small,
        [node()],
        {"slots": [slot(hog), slot(small, "s2", opened="")], "others": [hog]},
        Why.INSUFFICIENT_MEMORY,
        "12 GiB short",
        id="a held slot is no opening one",
    ),
    pytest.param(big, [node()], {}, Why.EXCEEDS_LARGEST_DEVICE, "36 GiB more than it could ever hold", id="too large for all"),
    pytest.param(pair, [node()], {}, Why.TOO_FEW_DEVICES, "No node has 2 devices", id="too few devices"),
    pytest.param(small, [node(healthy=False)], {}, Why.UNHEALTHY_DEVICE, "healthy", id="sick devices"),
    pytest.param(small, [node(address="")], {}, Why.NODE_UNREACHABLE, "Dask worker", id="no Dask worker"),
    pytest.param(small, [node(fenced=True)], {}, Why.NODE_UNREACHABLE, "declared lost", id="a lost node"),
    pytest.param(small, [node()], {"silent": ["n1"]}, Why.NODE_UNREACHABLE, "silent for a lease", id="a silent node"),
    pytest.param(
        small,
        [node("n1", (8,)), node("n2", address="")],
        {},
        Why.NODE_UNREACHABLE,
        "n2: its Dask worker",
        id="the hopeful one is named, not the hopeless",
    ),
]


@pytest.mark.parametrize(("task", "nodes", "more", "why", "words"), WAITING)
def test_a_waiting_task_has_its_reason(task, nodes, more, why, words):
    found = explained(task, nodes, **more)
    assert (found.reason, words in found.message) == (why, True), found.message
    assert found.message.endswith((".", ")"))
    assert found.wait_s == 3.0
    assert len(found.workers) == sum(1 for row in nodes if not row.left)


@pytest.mark.parametrize(
    ("task", "why", "words"),
    [
        (record(status=TaskStatus.SUCCEEDED, node="n1", attempt=2), Why.FINISHED, "succeeded on n1 in attempt 2"),
        (
            record(status=TaskStatus.FAILED, node="n1", attempt=1, error=TaskError("ValueError", "no\nway")),
            Why.FINISHED,
            "failed on n1 in attempt 1: ValueError: no way.",
        ),
        (record(status=TaskStatus.CANCELLED), Why.FINISHED, "cancelled before it ran"),
        (record(status=TaskStatus.RUNNING, node="n1", attempt=1, started_ms=NOW_MS - 2000), Why.RUNNING, "on n1 for 2.0 s"),
        (record(status=TaskStatus.RUNNING, node="n1", attempt=1), Why.RUNNING, "has taken it"),
        (record(status=TaskStatus.RUNNING, node="n1", cancel_requested=True), Why.CANCELLING, "n1 is ending it"),
        (record(status=TaskStatus.RUNNING, node="n2", attempt=1), Why.NODE_UNREACHABLE, "nobody is blamed"),
        (
            record(status=TaskStatus.RETRY_WAIT, failures=1, error=TaskError("OSError", "busy")),
            Why.RETRY_WAIT,
            "Failure 1 of the 3 that it may have: OSError: busy.",
        ),
        (record(status=TaskStatus.BLOCKED), Why.BLOCKED, "other tasks"),
    ],
)
def test_a_task_that_does_not_queue_has_its_reason(task, why, words):
    found = explained(task, [node(), node("n2")], silent=["n2"])
    assert (found.reason, words in found.message) == (why, True), found.message
    assert found.position is None


def test_verdicts_stand_by_nearness_and_the_nearest_is_named():
    nodes = [node("a", (8,)), node("b"), node("c"), node("d", (128,)), node("e", address="")]
    slots = [slot(hog, "s1", opened="b"), slot(record(50), "s2", opened="c"), slot(record(127), "s3", opened="d")]
    found = explained(small, nodes, slots=slots, others=[hog, record(50), record(127)])
    assert [(v.node, v.verdict) for v in found.workers] == [
        ("c", "InsufficientMemory"),
        ("b", "InsufficientMemory"),
        ("d", "InsufficientMemory"),
        ("e", "NoWorker"),
        ("a", "ExceedsLargestDevice"),
    ]
    assert [v.short_by_bytes // GIB for v in found.workers] == [2, 12, 15, 0, 8]
    assert found.nearest == found.workers[0]


def test_what_fits_is_said_first():
    found = explained(small, [node("a", (8,)), node("b")])
    assert [(v.node, v.verdict) for v in found.workers] == [("b", "Fits"), ("a", "ExceedsLargestDevice")]


def test_a_shape_that_the_look_does_not_have_is_made_from_the_record():
    state = ClusterState(NOW_MS, (), (), (node(),))
    found = explain(small, state, index_of(state), 0, NOW_MS)
    assert (found.reason, found.memory_bytes) == (Why.WAITING_FOR_SLOT, 16 * GIB)


def test_the_index_is_not_changed():
    state = ClusterState(NOW_MS, (queue(small),), (), (node(), node("n2")))
    index = index_of(state)
    explain(small, state, index, 0, NOW_MS)
    assert sorted(index.nodes) == ["n1", "n2"]
    assert not index.grants


def test_every_verdict_of_placement_has_words():
    for reason in Reason:
        assert reason.value in {why.value for why in Why} | {"NoWorker", "NodeLost"}
