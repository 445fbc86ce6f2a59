"""Drains, slots that are kept warm or unloaded, idle ones that are too many, and how a node is said to be."""

import time

import msgspec
import pytest

from manager.api import views
from manager.api.watch import Snapshot
from manager.cli import screens_cluster
from manager.core.answers import utc
from manager.core.answers_cluster import DependencyState, DependencyView, GroupView, LeaderView
from manager.core.answers_nodes import WorkerState
from manager.core.closing import Close
from manager.core.devices import reserve_of
from manager.core.index import index_of
from manager.core.lifecycle import Cordon, SlotFlag, SlotKind
from manager.core.model import ClusterState, Refusal
from manager.core.node_kinds import Capacity
from manager.core.planner import NEVER, Open, plan
from manager.core.quantities import GIB
from manager.core.reconcile import Drains, drains
from manager.core.shapes import Grant
from manager.settings import GroupSettings
from tests.unit import factories as make
from tests.unit import test_cli_screens as screens

NODE = {"a": [24]}


def cordoned(state: ClusterState, node: str = "a", mode: Cordon = Cordon.DRAIN, **changes) -> ClusterState:
    rows = tuple(
        msgspec.structs.replace(row, cordon=mode, cordon_by="operator", cordon_ms=make.NOW_MS - 60_000, **changes)
        if row.node == node
        else row
        for row in state.nodes
    )
    return msgspec.structs.replace(state, nodes=rows)


def planned(state: ClusterState, held=(), limits=make.LIMITS):
    return plan(state, index_of(state), frozenset(held), limits)


# --- drains -------------------------------------------------------------------------------------------------------

LEFT_MS = make.NOW_MS + 4000


@pytest.mark.parametrize(
    ("flag", "kind", "deadline_ms", "expected"),
    [
        pytest.param(SlotFlag.NONE, SlotKind.TASKS, None, Drains(("s",), ()), id="at its task boundary"),
        pytest.param(SlotFlag.CLOSE, SlotKind.TASKS, None, Drains(("s",), ()), id="closing already: for the drain, then"),
        pytest.param(SlotFlag.DRAIN, SlotKind.TASKS, None, Drains((), ()), id="asked once"),
        pytest.param(SlotFlag.NONE, SlotKind.DIRECT, None, Drains((), ()), id="a Dask task ends by itself"),
        pytest.param(SlotFlag.NONE, SlotKind.TASKS, LEFT_MS, Drains(("s",), (), LEFT_MS), id="the deadline is ahead"),
        pytest.param(SlotFlag.DRAIN, SlotKind.TASKS, make.NOW_MS, Drains((), ("s",)), id="the deadline is over"),
        pytest.param(SlotFlag.NONE, SlotKind.TASKS, make.NOW_MS - 1, Drains((), ("s",)), id="over before it was asked"),
        pytest.param(SlotFlag.NONE, SlotKind.DIRECT, make.NOW_MS, Drains((), ("s",)), id="over for a Dask task, too"),
        pytest.param(SlotFlag.PREEMPT, SlotKind.TASKS, make.NOW_MS, Drains((), ()), id="told already"),
    ],
)
def test_what_a_drain_asks_of_a_slot(flag, kind, deadline_ms, expected):
    slot = msgspec.structs.replace(make.opened("s", "x", "a", "d0", flag=flag), kind=kind)
    state = make.state([make.queue("x", make.shape(8), 1)], [slot], {"a": [24], "b": [24]})
    assert drains(cordoned(state, deadline_ms=deadline_ms)) == expected


@pytest.mark.parametrize(
    ("node", "mode", "changes"),
    [
        pytest.param("b", Cordon.DRAIN, {}, id="another node"),
        pytest.param("a", Cordon.CORDON, {}, id="only cordoned"),
        pytest.param("a", Cordon.DRAIN, {"fenced": True}, id="lost: its slots are being ended anyhow"),
        pytest.param("a", Cordon.DRAIN, {"left": True}, id="it has left"),
    ],
)
def test_who_is_not_drained(node, mode, changes):
    state = make.state([make.queue("x", make.shape(8), 1)], [make.opened("s", "x", "a", "d0")], {"a": [24], "b": [24]})
    assert drains(cordoned(state, node, mode, **changes)) == Drains((), ())


def test_a_slot_that_was_asked_for_is_no_matter_of_the_drain():
    state = make.state([make.queue("x", make.shape(8), 1)], [make.requested("s", "x")], NODE)
    assert drains(cordoned(state)) == Drains((), ())


def test_slots_that_are_drained_are_replaced_elsewhere():
    slots = [make.opened(f"s{i}", "x", "a", "d0", flag=SlotFlag.DRAIN) for i in range(2)]
    state = cordoned(make.state([make.queue("x", make.shape(8), 2, run_s=10.0)], slots, {"a": [24], "b": [24]}))
    answer = planned(state)
    assert answer.open == (Open("x", 2, 0),)
    assert answer.close == ()


def test_slots_of_a_cordoned_node_serve_on_and_nothing_is_closed_to_place_there():
    slots = [make.opened(f"s{i}", "x", "a", "d0", age_s=600) for i in range(3)]
    had = msgspec.structs.replace(make.queue("x", make.shape(8), 3, run_s=10.0), vtime_s=900.0)
    queues = [had, make.queue("y", make.shape(24), 1, run_s=10.0)]
    there = make.state(queues, [*slots, make.requested("h", "y")], NODE)
    assert planned(there, held=["h"]).close, "or it would not be the cordon that keeps them"
    state = cordoned(there, mode=Cordon.CORDON)
    assert planned(state, held=["h"]).close == (), "a slot ended for one that cannot come there"


# --- warm ---------------------------------------------------------------------------------------------------------


def warm(name: str, gib: float, slots: int, depth: int = 0, **more):
    return msgspec.structs.replace(make.queue(name, make.shape(gib), depth, **more), warm=slots)


@pytest.mark.parametrize(
    ("slots", "depth", "open_", "expected"),
    [
        pytest.param(2, 0, 0, 2, id="opened although nothing waits"),
        pytest.param(2, 0, 2, 0, id="they are there"),
        pytest.param(2, 3, 0, 3, id="work wants more"),
        pytest.param(100, 0, 0, 3, id="as many as fit, and one held"),
    ],
)
def test_how_many_slots_are_opened_to_be_warm(slots, depth, open_, expected):
    there = [make.opened(f"s{i}", "x", "a", "d0", idle_s=1) for i in range(open_)]
    answer = planned(make.state([warm("x", 8, slots, depth, run_s=10.0)], there, {"a": [24 if depth else 16]}))
    assert sum(each.count for each in answer.open) == expected


def test_the_operators_limit_holds_for_warm_slots():
    limits = msgspec.structs.replace(make.LIMITS, slots_per_shape_max=2)
    answer = planned(make.state([warm("x", 1, 50)], [], {"a": [192]}), limits=limits)
    assert answer.open == (Open("x", 2, 0),)


def test_warm_slots_do_not_close_while_they_are_to_be_warm():
    there = [make.opened(f"s{i}", "x", "a", "d0", idle_s=100 + i) for i in range(3)]
    assert planned(make.state([warm("x", 8, 3)], there, NODE)).close == ()
    assert planned(make.state([warm("x", 8, 2)], there, NODE)).close == (Close("s2", "Idle"),)
    assert len(planned(make.state([warm("x", 8, 0)], there, NODE)).close) == 3


def test_work_that_waits_ends_warm_slots_after_other_idle_ones():
    warm_ones = [make.opened(f"w{i}", "x", "a", "d0", idle_s=50) for i in range(2)]
    idle = make.opened("i", "z", "a", "d0", idle_s=0)
    queues = [warm("x", 8, 2), make.queue("z", make.shape(8), 0), make.queue("y", make.shape(8), 1)]
    state = make.state(queues, [*warm_ones, idle, make.requested("h", "y")], NODE)
    assert planned(state, held=["h"]).close == (Close("i", "y"),)
    state = make.state(queues, [*warm_ones, make.opened("b", "z", "a", "d0", age_s=0), make.requested("h", "y")], NODE)
    assert [close.slot_id for close in planned(state, held=["h"]).close] == ["w0"], "warm slots stood in the way of work"


def test_nothing_ends_so_that_slots_can_be_kept_warm():
    idle = [make.opened(f"i{i}", "z", "a", "d0", idle_s=30) for i in range(3)]
    queues = [warm("x", 8, 1), make.queue("z", make.shape(8), 0)]
    answer = planned(make.state(queues, [*idle, make.requested("h", "x")], NODE), held=["h"])
    assert (answer.close, answer.keep, answer.drop) == ((), (), ())
    assert dict(answer.wake_at)["x"] != NEVER, "work of the shape would not be noticed"


def test_work_of_a_shape_whose_warm_slot_is_held_gets_victims_at_once():
    idle = [make.opened(f"i{i}", "z", "a", "d0", idle_s=30) for i in range(3)]
    queues = [warm("x", 8, 1, depth=1), make.queue("z", make.shape(8), 0)]
    answer = planned(make.state(queues, [*idle, make.requested("h", "x")], NODE), held=["h"])
    assert answer.close == (Close("i0", "x"),)
    assert answer.keep == (("h", Grant("a", ("d0",), 8 * GIB)),)


def test_a_held_warm_slot_is_given_up_when_its_time_is_over():
    answer = planned(make.state([warm("x", 48, 0)], [make.requested("h", "x")], NODE), held=["h"])
    assert answer.drop == ("h",)


# --- unloading, and too many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idle_s", "running", "asked_s", "closed"),
    [
        pytest.param(5.0, 0, 1.0, True, id="idle since before it was asked"),
        pytest.param(5.0, 0, 5.0, True, id="in the same millisecond"),
        pytest.param(1.0, 0, 5.0, False, id="has worked since"),
        pytest.param(None, 1, 5.0, False, id="works"),
    ],
)
def test_which_slots_an_unload_closes(idle_s, running, asked_s, closed):
    slot = make.opened("s", "x", "a", "d0", idle_s=idle_s, running=running)
    queue = msgspec.structs.replace(make.queue("x", make.shape(8), 0), unload_ms=make.NOW_MS - int(asked_s * 1000))
    assert planned(make.state([queue], [slot], NODE)).close == ((Close("s", "Unloaded"),) if closed else ())


def test_above_the_limit_of_a_node_the_longest_idle_close_first():
    limits = msgspec.structs.replace(make.LIMITS, idle_per_node_max=1)
    there = [make.opened(f"s{i}", "x", "a", "d0", idle_s=i) for i in range(3)]
    elsewhere = make.opened("t", "x", "b", "d0", idle_s=9)
    state = make.state([make.queue("x", make.shape(1), 0)], [*there, elsewhere], {"a": [24], "b": [24]})
    assert planned(state, limits=limits).close == (Close("s2", "TooManyIdle"), Close("s1", "TooManyIdle"))


def test_what_is_warm_counts_on_its_node_and_stays():
    limits = msgspec.structs.replace(make.LIMITS, idle_per_node_max=1)
    there = [make.opened("w", "x", "a", "d0", idle_s=9), make.opened("s", "z", "a", "d0", idle_s=1)]
    state = make.state([warm("x", 1, 1), make.queue("z", make.shape(1), 0)], there, NODE)
    assert planned(state, limits=limits).close == (Close("s", "TooManyIdle"),)


def test_a_dask_task_is_never_closed_by_the_plan():
    limits = msgspec.structs.replace(make.LIMITS, idle_per_node_max=1)
    direct = msgspec.structs.replace(
        make.opened("d", "", "a", "d0", idle_s=None, age_s=9999), kind=SlotKind.DIRECT, memory_bytes=24 * GIB, running=0
    )
    state = make.state([make.queue("y", make.shape(24), 1)], [direct, make.requested("h", "y")], NODE)
    answer = planned(state, held=["h"], limits=limits)
    assert answer.close == ()
    assert [slot for slot, _ in answer.keep] == ["h"], "its room is kept for who waits, for when it ends by itself"


# --- the reserve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "reserve_gib", "ratio", "expected_gib"),
    [
        pytest.param([64, 128], 1, 1.0, 1, id="all of it but the reserve"),
        pytest.param([64, 128], 1, 0.75, 32, id="a part of the largest"),
        pytest.param([64, 128], 40, 0.75, 40, id="whichever is more"),
        pytest.param([], 1, 0.5, 1, id="no device"),
    ],
)
def test_the_reserve_of_a_node(sizes, reserve_gib, ratio, expected_gib):
    assert reserve_of(make.devices(*sizes), reserve_gib * GIB, ratio) == expected_gib * GIB


# --- what people see ----------------------------------------------------------------------------------------------


def snapshot(state: ClusterState, silent=(), **parts: DependencyState) -> Snapshot:

    known = {"store": DependencyState.OK, "scheduler": DependencyState.OK, **parts}
    return Snapshot(
        state=state,
        silent=frozenset(silent),
        capacity=Capacity({}),
        leader=LeaderView("me", 1, True),
        fsync="always",
        at_s=time.monotonic(),
        registration_s=60.0,
        dependencies=tuple(DependencyView(name=name, state=is_, since_at=utc(make.NOW_MS)) for name, is_ in known.items()),
    )


def changed(state: ClusterState, **changes) -> ClusterState:
    return msgspec.structs.replace(state, nodes=tuple(msgspec.structs.replace(row, **changes) for row in state.nodes))


@pytest.mark.parametrize(
    ("changes", "slots", "expected", "problem"),
    [
        pytest.param({}, 0, WorkerState.LIVE, "", id="live"),
        pytest.param({"address": "", "registered_ms": make.NOW_MS - 59_000}, 0, WorkerState.REGISTERING, "", id="registering"),
        pytest.param(
            {"address": "", "registered_ms": make.NOW_MS - 61_000}, 0, WorkerState.NO_WORKER,
            "a has failed to register: its Dask worker has not reported within 60.0 s (node.registration_s).",
            id="registration failed",
        ),
        pytest.param({"cordon": Cordon.CORDON}, 1, WorkerState.CORDONED, "a has been cordoned for 1", id="cordoned"),
        pytest.param({"cordon": Cordon.DRAIN}, 1, WorkerState.DRAINING, "a has been draining for 1", id="draining"),
        pytest.param({"cordon": Cordon.DRAIN}, 0, WorkerState.DRAINED, "'rocyard uncordon a'", id="drained"),
        pytest.param({"cordon": Cordon.DRAIN, "cordon_by": "autoscaler"}, 1, WorkerState.DRAINING, "", id="autoscaler's drain"),
        pytest.param({"cordon": Cordon.DRAIN, "remove": True}, 1, WorkerState.DRAINING, "", id="to be removed"),
        pytest.param(
            {"cordon": Cordon.DRAIN, "deadline_ms": make.NOW_MS - 45_000}, 1, WorkerState.DRAINING,
            "a should have been drained 45.0 s ago, and has 1 slots", id="overdue",
        ),
        pytest.param({"cordon": Cordon.CORDON, "fenced": True}, 0, WorkerState.LOST, "a was declared lost", id="lost"),
        pytest.param({"cordon": Cordon.CORDON, "left": True}, 0, WorkerState.LEFT, "No node lives", id="left"),
    ],
)  # fmt: skip
def test_how_a_node_is_said_to_be_and_what_is_wrong_with_it(changes, slots, expected, problem):
    there = [make.opened("s", "x", "a", "d0")] * slots
    state = make.state([make.queue("x", make.shape(8), 0)], there, NODE)
    if "cordon" in changes:
        changes = {"cordon_by": "operator", "cordon_ms": make.NOW_MS - 100_000, **changes}
    found = snapshot(changed(state, **changes))
    assert views.worker_state(found.state.nodes[0], found) is expected
    problems = " ".join(views.problems(found, 0))
    assert problem in problems if problem else problems == ""


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"remove": True}, True),
        ({"remove": True, "left": True}, False),
        ({"remove": True, "fenced": True}, False),
        ({"left": True}, True),
    ],
)
def test_a_removed_node_is_in_no_list(changes, shown):
    found = snapshot(changed(make.state([], [], NODE), **changes))
    assert [view.node for view in views.workers(found)] == (["a"] if shown else [])
    assert (views.worker(found, "a") is not None) is shown


def test_a_dask_task_is_a_slot_that_only_admins_see():
    direct = msgspec.structs.replace(make.opened("d", "", "a", "d0", running=0), kind=SlotKind.DIRECT, memory_bytes=16 * GIB)
    found = snapshot(make.state([], [direct], NODE))
    (view,) = views.slots(found, None)
    assert (view.tenant, view.kind, view.memory_bytes, view.node, view.shape_id) == ("dask", "direct", 16 * GIB, "a", "")
    assert views.slots(found, "dask") == ()
    assert found.index.nodes["a"].pools["d0"].free_bytes == 8 * GIB


def test_groups_are_those_of_the_settings_and_of_the_nodes():
    state = make.state([], [], {"a": [24], "b": [24], "c": [24], "d": [24], "e": [24]})
    of = {"a": "gpu", "b": "gpu", "c": "other", "d": "gpu", "e": ""}
    rows = tuple(
        msgspec.structs.replace(row, info=msgspec.structs.replace(row.info, group=of[row.node]), left=row.node == "d")
        for row in state.nodes
    )
    state = cordoned(msgspec.structs.replace(state, nodes=rows), "b")
    known = {"gpu": GroupSettings(devices="2:mi300x", workers_max=4), "empty": GroupSettings(devices="1:mi300x")}
    found = {view.name: view for view in views.groups(snapshot(state), known)}
    assert found.keys() == {"gpu", "empty", "other"}
    gpu = found["gpu"]
    assert (gpu.workers, gpu.starting, gpu.draining, gpu.workers_min, gpu.workers_max) == (2, 0, 1, 0, 4)
    assert (found["other"].workers, found["other"].workers_max, found["empty"].workers) == (1, None, 0)


def test_a_refused_registration_is_a_problem_while_its_agent_asks():
    state = make.state([], [], NODE)
    told = Refusal("b", make.NOW_MS - 2000, "d0 of this machine is held by node a, and so on")
    old = Refusal("c", make.NOW_MS - 60_000, "whatever")
    found = views.problems(snapshot(msgspec.structs.replace(state, refused=(told, old))), 0)
    assert found == ("Node b may not join: d0 of this machine is held by node a, and so on.",)


@pytest.mark.parametrize(
    ("part", "words"), [("scheduler", "does not reach the Dask scheduler"), ("autoscaler", "No autoscaler runs")]
)
def test_a_part_that_is_down_is_a_problem(part, words):
    state = make.state([], [], NODE)
    assert words in " ".join(views.problems(snapshot(state, **{part: DependencyState.DOWN}), 3))
    assert views.problems(snapshot(state, **{part: DependencyState.UNKNOWN}), 3) == ()


# --- screens ------------------------------------------------------------------------------------------------------


def test_a_draining_node_and_the_parts_of_the_cluster_fit_eighty_columns():
    until = utc(make.NOW_MS)
    node = screens.worker(
        *(screens.device(), screens.device(index=1)),
        state=WorkerState.DRAINING,
        cordon="drain",
        cordoned_by="operator",
        deadline_at=until,
        remove=True,
        slots=12,
    )
    away = screens.worker(screens.device(), node="node-1", state=WorkerState.SILENT, cordon="cordon")
    parts = tuple(
        DependencyView(name=name, state=state, since_at=until, detail=detail)
        for name, state, detail in (
            ("store", DependencyState.OK, ""),
            ("controller", DependencyState.DOWN, "none leads"),
            ("scheduler", DependencyState.UNKNOWN, "only a controller that leads can tell"),
        )
    )
    group = GroupView(name="gpu", workers=3, starting=1, draining=1, workers_min=0, workers_max=4)
    view = screens.cluster(workers=(node, away), dependencies=parts, groups=(group,))
    text = screens.shown(screens_cluster.status_screen(view, "http://127.0.0.1:8000"))
    assert max(map(len, text.splitlines())) <= 80
    assert "draining · 12 slots left" in text
    assert "silent, cordoned · 1 running" in text
    assert "node-0: what still runs at 1970-01-01 00:16:40.000 UTC goes back to the queue" in text
    assert "node-0: its agent ends for good once it is empty" in text
    assert "● controller (none leads)" in text
    assert "gpu   3 nodes of 0 to 4 · 1 starting · 1 draining" in text


def test_a_device_of_a_pool_shows_the_pool_and_a_host_what_is_leased_of_it():
    device = make.device("d0", 48)
    parts = (
        msgspec.structs.replace(device, pool="q0", partition="CPX/NPS4/0"),
        msgspec.structs.replace(device, uuid="d1", pool="q0", partition="CPX/NPS4/1"),
    )
    row = make.state([], nodes=NODE).nodes[0]
    info = msgspec.structs.replace(row.info, devices=parts, cpus=8, host_memory_bytes=64 * GIB, labels=(("zone", "a"),))
    slot = msgspec.structs.replace(
        make.opened("s", "", "a", "d0"),
        memory_bytes=8 * GIB,
        share_milli=500,
        cpu_milli=1500,
        host_memory_bytes=GIB,
        exclusive=True,
    )
    state = msgspec.structs.replace(make.state([], [slot]), nodes=(msgspec.structs.replace(row, info=info),))
    (worker,) = views.workers(snapshot(state))
    first, second = worker.devices
    assert (first.leased_bytes, first.free_bytes, first.share_leased, first.exclusive) == (8 * GIB, 40 * GIB, 0.5, True)
    assert (second.leased_bytes, second.free_bytes, second.share_leased, second.exclusive) == (8 * GIB, 40 * GIB, 0.0, False)
    assert (second.pool, second.partition) == ("q0", "CPX/NPS4/1")
    assert (worker.cpus, worker.cpus_leased, worker.host_leased_bytes, worker.labels) == (8, 1.5, GIB, {"zone": "a"})
