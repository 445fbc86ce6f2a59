"""Every reason that a task can have to be where it is: golden answers, and what a golden answer cannot hold.

``python -m tests.unit.test_explain`` writes the golden file anew from what the code says now; the diff is to be read.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manager.core.ahead import Setup, ahead_for, ahead_of
from manager.core.devices import Device
from manager.core.explain import NOTHING_PENDING, Explanation, Parent, Pending, explain
from manager.core.index import index_of
from manager.core.lifecycle import AfterFailed, Cordon, SlotFlag, SlotStatus, TaskStatus
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
    TenantRow,
    priority_offset,
)
from manager.core.node_kinds import node_kind
from manager.core.packing import PackGroup
from manager.core.placement import Reason, devices_for, verdict
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from manager.core.shapes import Resources, shape_id, shape_of
from manager.core.verdicts import FITS, VERDICTS
from manager.core.waiting import Place, Why
from tests.unit.factories import LIMITS

GOLDEN = Path(__file__).parent / "golden" / "explain.json"
DOCS = Path(__file__).resolve().parents[2] / "docs"
NOW_MS = 1_000_000
GROUP = PackGroup("big", node_kind("2:192GiB"), 4)
SCORE = priority_offset(0) + 7
FIRST = Place(0)


def node(name: str = "n1", sizes: tuple[int, ...] = (64,), *, foreign: int = 0, healthy: bool = True, **row: Any) -> NodeRow:
    info = {k: row.pop(k) for k in ("cpus", "host_memory_bytes", "labels", "slots_max", "group") if k in row}
    devices = tuple(
        Device(f"{name}-{i}", i, "simulated", "AMD Instinct MI300X", "gfx942", size * GIB, f"{i}")
        for i, size in enumerate(sizes)
    )
    uses = tuple(
        DeviceUse(uuid=d.uuid, used_bytes=foreign * GIB, foreign_bytes=foreign * GIB, healthy=healthy) for d in devices
    )
    made = NodeInfo(hostname=name, pid=1, source="simulated", version="0", devices=devices, **info)
    return NodeRow(**({"node": name, "incarnation": "i", "beat": 1, "info": made, "uses": uses, "address": "tcp://a"} | row))


def record(memory: int = 16, gpus: int = 1, status: TaskStatus = TaskStatus.QUEUED, **fields: Any) -> TaskRecord:
    asked = {name: fields.pop(name) for name in Resources.__struct_fields__ if name in fields}
    resources = Resources(memory * GIB, gpus, **asked)
    more = {name: fields.pop(name) for name in TaskSpec.__struct_fields__ if name in fields}
    spec = TaskSpec("echo", msgspec.Raw(b"{}"), resources, max_attempts=3, **more)
    identity = shape_id(shape_of("t", "default", resources))
    base = {"attempt": 0, "created_ms": NOW_MS - 5000, "queued_ms": NOW_MS - 3000, "score": SCORE}
    return TaskRecord(
        task_id="0" * 26, status=status, tenant="t", function="echo", shape_id=identity, spec=spec, **(base | fields)
    )


def slot(task: TaskRecord, name: str = "s1", *, on: str = "n1", devices: tuple[int, ...] = (0,), **row: Any) -> SlotRow:
    if not on:
        return SlotRow(slot_id=name, shape_id=task.shape_id, status=SlotStatus.REQUESTED)
    base = {
        "slot_id": name,
        "shape_id": task.shape_id,
        "status": SlotStatus.OPEN,
        "node": on,
        "devices": tuple(f"{on}-{device}" for device in devices),
        "requested_ms": NOW_MS - 9000,
        "opened_ms": NOW_MS - 8900,
        "running": 1,
    }
    return SlotRow(**(base | row))


def queue(task: TaskRecord, depth: int = 1, **row: Any) -> QueueRow:
    assert task.spec is not None
    shape = shape_of("t", "default", task.spec.resources)
    return QueueRow(shape_id=task.shape_id, shape=shape, depth=depth, head=SCORE, **row)


def explained(
    task: TaskRecord,
    nodes: tuple[NodeRow, ...] = (),
    slots: tuple[SlotRow, ...] = (),
    *,
    place: Place = FIRST,
    silent: tuple[str, ...] = (),
    others: tuple[QueueRow, ...] = (),
    own: QueueRow | None = None,
    groups: tuple[PackGroup, ...] = (),
    tenants: tuple[TenantRow, ...] = (),
    dask: bool | None = True,
    leads: bool = True,
    pending: Pending = NOTHING_PENDING,
) -> Explanation:
    queues = {each.shape_id: each for each in (own or queue(task), *others)}
    state = ClusterState(NOW_MS, tuple(queues.values()), slots, nodes, dask=dask, tenants=tenants)
    setup = Setup(limits=LIMITS, policy=BEST_FIT, groups=groups)
    ahead = ahead_of(state, index_of(state), setup)
    return explain(task, ahead, setup, place, NOW_MS, frozenset(silent), pending, leads=leads)


small, large, pair, hog = record(), record(100), record(40, 2), record(60)
hogs = queue(hog, 0, run_s=12.0)
QUOTA = TenantRow(tenant="t", gpus=4, running=4, gpus_max=4, memory_bytes_max=100 * GIB)

CASES: dict[str, tuple[TaskRecord, tuple[NodeRow, ...], dict[str, Any]]] = {
    "Finished: it succeeded": (record(status=TaskStatus.SUCCEEDED, node="n1", attempt=2), (node(),), {}),
    "Finished: it failed": (
        record(status=TaskStatus.FAILED, node="n1", attempt=1, error=TaskError("ValueError", "no\nway")),
        (node(),),
        {},
    ),
    "Finished: it was cancelled": (record(status=TaskStatus.CANCELLED), (node(),), {}),
    "Running": (record(status=TaskStatus.RUNNING, node="n1", attempt=1, started_ms=NOW_MS - 2000), (node(),), {}),
    "Running: a slot has taken it": (record(status=TaskStatus.RUNNING, node="n1", attempt=1), (node(),), {}),
    "Cancelling": (record(status=TaskStatus.RUNNING, node="n1", cancel_requested=True), (node(),), {}),
    "NodeUnreachable: it was running there": (
        record(status=TaskStatus.RUNNING, node="n1", attempt=1),
        (node(),),
        {"silent": ("n1",)},
    ),
    "RetryWait": (
        record(status=TaskStatus.RETRY_WAIT, failures=1, error=TaskError("OSError", "busy")),
        (node(),),
        {},
    ),
    "RetryWait: it is known until when": (
        record(status=TaskStatus.RETRY_WAIT, attempt=1, failures=1, error=TaskError("OSError", "busy"), start_timeout_s=60.0),
        (node(),),
        {"pending": Pending(due_ms=NOW_MS + 12_300)},
    ),
    "RetryWait: its tenant has retried too often": (
        record(status=TaskStatus.RETRY_WAIT, attempt=1, failures=1, error=TaskError("OSError", "busy")),
        (node(),),
        {"pending": Pending(due_ms=NOW_MS + 960_000)},
    ),
    "WaitingForDependencies": (record(status=TaskStatus.BLOCKED, after=("a" * 26,)), (node(),), {}),
    "WaitingForDependencies: one": (
        record(status=TaskStatus.BLOCKED, after=("a" * 26,), start_timeout_s=600.0, total_timeout_s=3600.0),
        (node(),),
        {"pending": Pending((Parent("a" * 26, "RUNNING"),))},
    ),
    "WaitingForDependencies: some of many": (
        record(
            status=TaskStatus.BLOCKED,
            after=tuple(letter * 26 for letter in "abcdefgh"),
            after_failed=AfterFailed.RUN,
            deadline_ms=NOW_MS + 90_000,
            total_timeout_s=3600.0,
        ),
        (node(),),
        {"pending": Pending(tuple(Parent(letter * 26, "7 of its 9 tasks to go") for letter in "abcdefg"))},
    ),
    "Running: its time is up": (
        record(status=TaskStatus.RUNNING, node="n1", attempt=1, started_ms=NOW_MS - 2000, total_timeout_s=5.0),
        (node(),),
        {},
    ),
    "QuotaExceeded: devices": (small, (node(),), {"tenants": (QUOTA,)}),
    "QuotaExceeded: memory, for ever": (
        record(128),
        (node(sizes=(192,)),),
        {"tenants": (msgspec.structs.replace(QUOTA, gpus=0, running=0),)},
    ),
    "QuotaExceeded: running tasks": (
        small,
        (node(),),
        {"tenants": (TenantRow(tenant="t", gpus=2, running=2, running_max=2),)},
    ),
    "WaitingForTurn: next, an idle slot": (small, (node(),), {"slots": (slot(small, running=0, idle_ms=NOW_MS),)}),
    "WaitingForTurn: others before it": (
        small,
        (node(),),
        {"slots": (slot(small), slot(small, "s2")), "place": Place(9), "own": queue(small, 10, run_s=3.0)},
    ),
    "WaitingForTurn: nothing is learned": (small, (node(),), {"slots": (slot(small),), "place": Place(4, 2)}),
    "SlotOpening": (
        small,
        (node(), node("n2")),
        {"slots": (slot(small, on=""), slot(hog, "s2", on="n2")), "others": (hogs,)},
    ),
    "SlotOpening: nothing was opened before": (small, (node(),), {"slots": (slot(small, on=""),), "place": Place(2)}),
    "WaitingForSlot": (small, (node(),), {}),
    "WaitingForSlot: a slot on its way out serves nobody": (
        small,
        (node(),),
        {"slots": (slot(small, flag=SlotFlag.CLOSE),), "own": queue(small, 1, run_s=0.5)},
    ),
    "NoController": (small, (node(),), {"leads": False}),
    "SchedulerUnreachable": (small, (node(),), {"dask": False}),
    "InsufficientMemory: leased to others": (
        small,
        (node(), node("n2", (48,))),
        {"slots": (slot(hog), slot(record(40), "s2", on="n2")), "others": (hogs, queue(record(40), 0, run_s=40.0))},
    ),
    "InsufficientMemory: nothing is learned, a group may grow": (
        small,
        (node(group="big"),),
        {"slots": (slot(hog), slot(small, "s2", on="")), "others": (queue(hog, 3),), "groups": (GROUP,)},
    ),
    "InsufficientMemory: it turned out to need more": (
        small,
        (node(),),
        {"slots": (slot(record(32)),), "others": (queue(record(32), 0),), "own": queue(small, learned_bytes=33 * GIB)},
    ),
    "InsufficientMemory: two pieces on one node": (
        pair,
        (node(sizes=(64, 64)),),
        {"slots": (slot(hog), slot(hog, "s2", devices=(1,))), "others": (hogs,), "place": Place(1)},
    ),
    "ForeignMemory": (small, (node(foreign=50), node("n2", (24,), foreign=20)), {}),
    "ReservedForLarger": (
        small,
        (node(),),
        {
            "slots": (slot(record(24), flag=SlotFlag.CLOSE), slot(record(56), "s2", on="")),
            "others": (
                queue(record(24), 0, run_s=4.0),
                msgspec.structs.replace(queue(record(56)), head=priority_offset(5) + 1),
            ),
            "place": Place(0, 1),
        },
    ),
    "InsufficientShare": (
        record(8, share_milli=600),
        (node(),),
        {"slots": (slot(record(8, share_milli=500)),), "others": (queue(record(8, share_milli=500), 0, run_s=4.0),)},
    ),
    "DeviceInUse: by one that is alone": (
        small,
        (node(),),
        {"slots": (slot(record(8, exclusive=True)),), "others": (queue(record(8, exclusive=True), 0),)},
    ),
    "DeviceInUse: it would have to be alone": (
        record(8, exclusive=True),
        (node(),),
        {"slots": (slot(small),), "others": (queue(small, 0),)},
    ),
    "InsufficientCpu": (
        record(8, cpu_milli=6000),
        (node(cpus=8),),
        {"slots": (slot(record(8, cpu_milli=4000)),), "others": (queue(record(8, cpu_milli=4000), 0),)},
    ),
    "InsufficientHostMemory": (
        record(8, host_memory_bytes=48 * GIB),
        (node(host_memory_bytes=64 * GIB),),
        {"slots": (slot(record(8, host_memory_bytes=32 * GIB)),), "others": (queue(record(8, host_memory_bytes=32 * GIB), 0),)},
    ),
    "TooManySlots": (small, (node(slots_max=1),), {"slots": (slot(record(8)),), "others": (queue(record(8), 0),)}),
    "WorkersDraining": (
        small,
        (node(cordon=Cordon.DRAIN, cordon_by="operator", cordon_ms=NOW_MS - 60_000, deadline_ms=NOW_MS + 240_000),),
        {},
    ),
    "WorkersDraining: without a deadline": (
        small,
        (node(cordon=Cordon.DRAIN, cordon_by="autoscaler", cordon_ms=NOW_MS - 60_000),),
        {"groups": (GROUP,)},
    ),
    "Cordoned": (small, (node(cordon=Cordon.CORDON, cordon_by="operator", cordon_ms=NOW_MS - 60_000),), {}),
    "NodeUnreachable: no Dask worker": (small, (node(address=""), node("n2", (8,))), {}),
    "NodeUnreachable: declared lost": (small, (node(fenced=True),), {}),
    "NodeUnreachable: silent": (small, (node(),), {"silent": ("n1",)}),
    "NodeUnreachable: its slots are on a silent node": (
        small,
        (node(), node("n2")),
        {"slots": (slot(small),), "silent": ("n1",)},
    ),
    "UnhealthyDevice": (small, (node(healthy=False),), {}),
    "WaitingForScaleUp: no node is there": (large, (), {"groups": (GROUP,)}),
    "WaitingForScaleUp: those that are there are too small": (large, (node(), node("n2")), {"groups": (GROUP,)}),
    "ExceedsLargestDevice": (large, (node(), node("n2", (80, 80))), {}),
    "ExceedsLargestDevice: the group has all its nodes": (
        large,
        (node(group="big"),),
        {"groups": (PackGroup("big", node_kind("2:192GiB"), 1),)},
    ),
    "ExceedsHost": (record(8, cpu_milli=64_000), (node(cpus=8),), {}),
    "TooFewDevices": (pair, (node(),), {}),
    "NoMatchingArchitecture": (record(8, architectures=("sm_90",)), (node(),), {}),
    "NoMatchingDevice": (record(8, device_model="h100"), (node(),), {}),
    "NoMatchingLabels": (record(8, labels=(("zone", "a"),)), (node(labels=(("zone", "b"),)),), {}),
    "NoWorkers": (small, (), {}),
    "NoWorkers: the only one left": (small, (node(left=True),), {"groups": (PackGroup("tiny", node_kind("1:8GiB"), 9),)}),
}


def answer(case: str) -> dict[str, Any]:
    task, nodes, more = CASES[case]
    built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(explained(task, nodes, **more)))
    return built


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    golden = msgspec.json.decode(GOLDEN.read_bytes())
    assert answer(case) == golden[case]
    assert answer(case)["reason"] == case.partition(":")[0]


def test_every_reason_has_a_golden_case() -> None:
    assert {case.partition(":")[0] for case in CASES} == set(Why)
    assert msgspec.json.decode(GOLDEN.read_bytes()).keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_whole(case: str) -> None:
    """Sentences end, a wait is told, what waits can be unblocked, and a figure says what it was made of."""
    task, nodes, more = CASES[case]
    found = explained(task, nodes, **more)
    assert found.message.endswith((".", ")")), found.message
    assert (found.wait_s == 3.0) == (task.status in {TaskStatus.QUEUED, TaskStatus.RETRY_WAIT, TaskStatus.BLOCKED})
    assert (found.start_s is None) == (found.start_by == "")
    if task.status is TaskStatus.QUEUED:
        assert found.unblocks
        assert len(found.workers) == sum(group.count for group in found.groups) == sum(not row.left for row in nodes)
    else:
        assert (found.position, found.before, found.beside) == (None, None, None)


@pytest.mark.parametrize("case", [case for case, (task, *_) in CASES.items() if task.status is TaskStatus.QUEUED])
def test_verdicts_are_those_of_placement(case: str) -> None:
    """No node is said to fit, or not to, against what `devices_for` and `verdict` say of it."""
    task, nodes, more = CASES[case]
    found = explained(task, nodes, **more)
    own = more.get("own") or queue(task)
    queues = {each.shape_id: each for each in (own, *more.get("others", ()))}
    state = ClusterState(NOW_MS, tuple(queues.values()), more.get("slots", ()), nodes)
    setup = Setup(limits=LIMITS, policy=BEST_FIT)
    index = ahead_for(ahead_of(state, index_of(state), setup), own.shape_id).index
    for each in found.workers:
        view = index.nodes[each.node]
        if each.node in more.get("silent", ()):
            assert each.verdict == "NodeUnreachable"
        elif devices_for(own.resources, view) is not None:
            assert each.verdict == FITS
        else:
            said = verdict(own.resources, view)
            drains = said.reason is Reason.CORDONED and state.nodes[0].cordon is Cordon.DRAIN
            assert each.verdict == ("WorkersDraining" if drains else said.reason)
            assert each.short_by_bytes == said.short_bytes


def test_verdicts_stand_by_nearness_and_the_nearest_is_named() -> None:
    nodes = (node("a", (8,)), node("b"), node("c"), node("d", (128,)), node("e", address=""))
    fifty, most = record(50), record(127)
    slots = (slot(hog, "s1", on="b"), slot(fifty, "s2", on="c"), slot(most, "s3", on="d"))
    found = explained(small, nodes, slots=slots, others=(hogs, queue(fifty, 0), queue(most, 0)))
    assert [(v.node, v.verdict) for v in found.workers] == [
        ("c", "InsufficientMemory"),
        ("b", "InsufficientMemory"),
        ("d", "InsufficientMemory"),
        ("e", "NoWorker"),
        ("a", "ExceedsLargestDevice"),
    ]
    assert [v.short_by_bytes // GIB for v in found.workers] == [2, 12, 15, 0, 8]
    assert found.nearest == found.workers[0]
    assert [(g.verdict, g.count, g.nodes) for g in found.groups] == [
        ("InsufficientMemory", 3, ("c", "b", "d")),
        ("NoWorker", 1, ("e",)),
        ("ExceedsLargestDevice", 1, ("a",)),
    ]


def test_many_nodes_are_counted_and_the_nearest_are_shown() -> None:
    nodes = tuple(node(f"n{number:03}") for number in range(250))
    slots = tuple(slot(hog, f"s{row.node}", on=row.node) for row in nodes)
    found = explained(small, nodes, slots=slots, others=(hogs,))
    assert (len(found.workers), [(g.verdict, g.count) for g in found.groups]) == (200, [("InsufficientMemory", 250)])


def test_places_count_shapes_of_the_same_priority_beside_it() -> None:
    urgent = msgspec.structs.replace(queue(pair, 5), head=priority_offset(3) + 1)
    found = explained(small, (node(),), place=Place(2, 5), others=(queue(hog, 7), urgent))
    assert (found.position, found.before, found.beside) == (2, 7, 7)


def test_a_shape_that_the_look_does_not_have_is_made_from_the_record() -> None:
    state = ClusterState(NOW_MS, (), (), (node(),))
    setup = Setup(limits=LIMITS, policy=BEST_FIT)
    found = explain(small, ahead_of(state, index_of(state), setup), setup, Place(0), NOW_MS)
    assert (found.reason, found.memory_bytes) == (Why.WAITING_FOR_SLOT, 16 * GIB)


def test_the_index_is_not_changed() -> None:
    state = ClusterState(NOW_MS, (queue(small),), (slot(small, on=""),), (node(), node("n2")))
    index = index_of(state)
    ahead_of(state, index, Setup(limits=LIMITS, policy=BEST_FIT))
    assert sorted(index.nodes) == ["n1", "n2"]
    assert not index.grants
    assert not index.kept


def test_the_docs_have_every_reason_and_every_verdict() -> None:
    text = (DOCS / "explain.md").read_text(encoding="utf-8")
    reasons, verdicts = text.split("## Verdicts of nodes")
    documented = re.findall(r"^\| `(\w+)` \|", reasons.split("## Reasons")[1], re.MULTILINE)
    assert documented == [why.value for why in Why]
    assert set(re.findall(r"`(\w+)`", verdicts.split("\n## ")[0])) >= set(VERDICTS)


if __name__ == "__main__":
    GOLDEN.write_bytes(msgspec.json.format(msgspec.json.encode({case: answer(case) for case in CASES}), indent=1) + b"\n")
