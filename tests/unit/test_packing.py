"""The packed need: what waits onto what is free, then onto what is idle, then onto nodes that do not exist yet."""

import itertools
import time
from collections.abc import Iterable, Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.core.index import SLOTS_MAX
from manager.core.lifecycle import Cordon, SlotKind
from manager.core.model import ClusterState, QueueRow, SlotRow, TenantRow
from manager.core.node_kinds import node_kind
from manager.core.packing import DirectDemand, PackGroup, Packing, pack
from manager.core.placement import Reason
from manager.core.quantities import GIB
from tests.unit import factories as make

EIGHT = PackGroup("g", node_kind("8:192GiB"), 100)
PAIR = PackGroup("g", node_kind("2:100GiB"), 100)


def state(
    queues: Iterable[QueueRow] = (),
    slots: Iterable[SlotRow] = (),
    nodes: Mapping[str, Iterable[float]] | None = None,
    groups: Mapping[str, str] | None = None,
    **changes: object,
) -> ClusterState:
    """Nodes are of group g, unless `groups` says otherwise; `changes` are those of the node n1."""
    made = make.state(queues, slots, nodes)
    rows = []
    for row in made.nodes:
        info = msgspec.structs.replace(row.info, group=(groups or {}).get(row.node, "g"))
        rows.append(msgspec.structs.replace(row, info=info, **(changes if row.node == "n1" else {})))
    return msgspec.structs.replace(made, nodes=tuple(rows))


def needs(packing: Packing) -> dict[str, int]:
    return {need.group: need.nodes for need in packing.needs}


def need(made: ClusterState, group: PackGroup = EIGHT, **more: object) -> int:
    return pack(made, [group], 30.0, **more).needs[0].nodes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count", "gib"),
    [("8:mi300x", 8, 192), ("1:24GiB", 1, 24), (" 2:H100 ", 2, 80), ("64:512MiB", 64, 0.5)],
)
def test_the_devices_of_a_node_are_read(text: str, count: int, gib: float) -> None:
    kind = node_kind(text)
    assert [device.memory_bytes for device in kind.devices] == [int(gib * GIB)] * count
    assert kind.total_bytes == int(gib * GIB) * count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mi300x", "COUNT:MODEL"),
        ("0:mi300x", "from 1 to 64"),
        ("65:1GiB", "from 1 to 64"),
        ("2:mi999", "neither a size"),
        ("", "COUNT"),
    ],
)
def test_what_is_no_node_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        node_kind(text)


def test_what_may_not_be_leased_is_taken_off() -> None:
    assert node_kind("1:100GiB", reserve_bytes=GIB).total_bytes == 99 * GIB
    assert node_kind("1:100GiB", reserve_bytes=GIB, memory_ratio_max=0.5).total_bytes == 50 * GIB


def test_sixty_four_whole_devices_need_eight_nodes_of_eight() -> None:
    assert need(state([make.queue("q", make.shape(190), 64)])) == 8


@pytest.mark.parametrize(
    ("depth", "run_s", "expected"),
    [
        pytest.param(10_000, 0.001, 1, id="short tasks share a slot"),
        pytest.param(60, 10.0, 3, id="sixty of ten seconds in thirty: twenty slots"),
        pytest.param(16, None, 2, id="not known: one slot for each"),
        pytest.param(16, 3600.0, 2, id="long ones: one slot for each, and no more"),
        pytest.param(1, 0.001, 1, id="at least one"),
        pytest.param(0, 5.0, 0, id="nothing waits"),
    ],
)
def test_how_many_slots_a_queue_asks_for(depth: int, run_s: float | None, expected: int) -> None:
    assert need(state([make.queue("q", make.shape(190), depth, run_s=run_s)])) == expected


def test_a_node_that_works_is_needed_and_its_free_room_is_used_first() -> None:
    busy = make.opened("s", "q", "n1", "d0")
    made = state([make.queue("q", make.shape(100), 1)], [busy], {"n1": [100, 100], "n2": [100, 100]})
    assert need(made, PAIR) == 1


def test_an_idle_slot_holds_no_work_and_its_room_counts_as_free() -> None:
    idle = [make.opened("a", "old", "n1", "d0", idle_s=5), make.opened("b", "old", "n1", "d1", idle_s=5)]
    queues = [make.queue("old", make.shape(100), 0), make.queue("new", make.shape(100), 2)]
    assert need(state(queues, idle, {"n1": [100, 100]}), PAIR) == 1
    assert need(state([], idle, {"n1": [100, 100]}), PAIR) == 0


def test_a_slot_that_has_just_opened_takes_one_of_those_that_wait() -> None:
    opened = make.opened("a", "q", "n1", "d0", running=0)
    assert need(state([make.queue("q", make.shape(100), 4)], [opened], {"n1": [100, 100]}), PAIR) == 2
    taken = make.opened("a", "q", "n1", "d0", running=1)
    assert need(state([make.queue("q", make.shape(100), 4)], [taken], {"n1": [100, 100]}), PAIR) == 3


@pytest.mark.parametrize(("waited_s", "expected"), [(10.0, 1), (31.0, 2)])
def test_who_waits_for_longer_than_the_target_is_not_believed_to_be_done_soon(waited_s: float, expected: int) -> None:
    """Tasks that take longer than was learned would else hold up all behind them."""
    busy = [make.opened(f"s{n}", "q", "n1", f"d{n}") for n in range(2)]
    queue = make.queue("q", make.shape(100), 8, run_s=0.5, waited_s=waited_s)
    assert need(state([queue], busy, {"n1": [100, 100]}), PAIR) == expected


def test_an_idle_slot_that_is_to_be_kept_warm_is_needed() -> None:
    idle = make.opened("a", "w", "n1", "d0", idle_s=5)
    warm = msgspec.structs.replace(make.queue("w", make.shape(100), 0), warm=3)
    assert need(state([warm], [idle], {"n1": [100, 100]}), PAIR) == 2


def test_a_direct_slot_is_work_and_held_direct_requests_ask_for_room() -> None:
    direct = msgspec.structs.replace(make.opened("a", "", "n1", "d0", idle_s=5), kind=SlotKind.DIRECT, memory_bytes=100 * GIB)
    made = state([], [direct], {"n1": [100, 100]})
    assert need(made, PAIR) == 1
    assert need(made, PAIR, direct=[DirectDemand(100 * GIB, 1, 4)]) == 3


@pytest.mark.parametrize(
    "changes",
    [{"cordon": Cordon.CORDON}, {"cordon": Cordon.DRAIN}, {"fenced": True}, {"left": True}],
    ids=["cordoned", "draining", "lost", "left"],
)
def test_a_node_that_takes_nothing_is_no_room_and_not_counted(changes: dict[str, object]) -> None:
    made = state([make.queue("q", make.shape(100), 2)], [], {"n1": [100, 100]}, **changes)
    assert need(made, PAIR) == 1
    busy = state([], [make.opened("s", "q", "n1", "d0")], {"n1": [100, 100]}, **changes)
    assert need(busy, PAIR) == 0


def test_nodes_of_no_group_are_room_and_never_counted() -> None:
    made = state([make.queue("q", make.shape(100), 3)], [], {"own": [100, 100]}, groups={"own": ""})
    assert need(made, PAIR) == 1


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((500, 1), Reason.EXCEEDS_LARGEST_DEVICE), ((10, 9), Reason.TOO_FEW_DEVICES)],
)
def test_what_nothing_could_hold_is_counted_and_asks_for_nothing(shape: tuple[int, int], reason: Reason) -> None:
    packing = pack(state([make.queue("q", make.shape(*shape), 200)], [], {"n1": [192] * 8}), [EIGHT], 30.0)
    assert needs(packing) == {"g": 0}
    assert [(each.reason, each.tasks) for each in packing.infeasible] == [(reason, 200)]


def test_what_a_cordoned_node_could_hold_is_not_infeasible() -> None:
    made = state([make.queue("q", make.shape(190), 1)], [], {"n1": [192]}, cordon=Cordon.CORDON)
    packing = pack(made, [PackGroup("small", node_kind("1:24GiB"), 5)], 30.0)
    assert packing.infeasible == ()
    assert packing.unplaced == 1


def test_a_group_that_may_have_no_nodes_makes_nothing_feasible() -> None:
    packing = pack(state([make.queue("q", make.shape(190), 1)]), [PackGroup("g", node_kind("8:192GiB"), 0)], 30.0)
    assert [each.reason for each in packing.infeasible] == [Reason.TOO_FEW_DEVICES]


def test_a_full_group_leaves_the_rest_to_another() -> None:
    groups = [PackGroup("a", node_kind("1:24GiB"), 2), PackGroup("b", node_kind("1:32GiB"), 10)]
    made = state([make.queue("q", make.shape(20), 5)])
    assert needs(pack(made, groups, 30.0)) == {"a": 2, "b": 3}
    assert needs(pack(made, groups, 30.0, blocked={"a"})) == {"a": 0, "b": 5}


def test_the_group_that_is_filled_best_is_chosen() -> None:
    groups = [PackGroup("large", node_kind("1:192GiB"), 10), PackGroup("small", node_kind("1:24GiB"), 10)]
    assert needs(pack(state([make.queue("q", make.shape(20), 1)]), groups, 30.0)) == {"large": 0, "small": 1}
    assert needs(pack(state([make.queue("q", make.shape(20), 9)]), groups, 30.0)) == {"large": 1, "small": 0}


def test_what_a_node_turned_out_to_be_counts_more_than_the_settings() -> None:
    made = state([make.queue("q", make.shape(150), 2)], [], {"n1": [100, 100]})
    packing = pack(made, [PackGroup("g", node_kind("2:192GiB"), 10)], 30.0)
    assert needs(packing) == {"g": 0}
    assert packing.infeasible


def test_several_devices_of_one_node_at_once() -> None:
    made = state([make.queue("q", make.shape(60, gpus=2), 3)])
    assert need(made, PackGroup("g", node_kind("3:64GiB"), 10)) == 3
    assert need(made, PackGroup("g", node_kind("3:128GiB"), 10)) == 1


def test_ten_thousand_tasks_on_a_thousand_nodes_take_well_under_a_second() -> None:
    queues = [make.queue(f"q{i}", make.shape(1 + i * 1.9, gpus=1 + i % 3), 100) for i in range(100)]
    made = state(queues, [], {f"n{i:04d}": [192.0] * 8 for i in range(1000)})
    began_s = time.process_time()
    packing = pack(made, [PackGroup("g", node_kind("8:192GiB"), 2000)], 30.0)
    assert time.process_time() - began_s < 1.0  # about 0.1 s where nothing else runs
    assert packing.needs[0].nodes > 100


SIZES = st.sampled_from([10, 20, 30, 50, 60, 90, 100])
ITEMS = st.lists(st.tuples(SIZES, st.integers(1, 2)), max_size=7)


def of(items: Iterable[tuple[int, int]]) -> ClusterState:
    return state([make.queue(f"q{n}", make.shape(gib, gpus=gpus), 1) for n, (gib, gpus) in enumerate(items)])


@settings(max_examples=150, deadline=None)
@given(ITEMS)
def test_it_is_within_one_node_of_the_best_there_is(items: list[tuple[int, int]]) -> None:
    found = need(of(items), PAIR)
    best = next(
        n for n in itertools.count() if _fits(sorted(items, key=lambda i: -i[0] * i[1]), [[100, 100] for _ in range(n)])
    )
    assert best <= found <= best + 1


def _fits(items: list[tuple[int, int]], nodes: list[list[int]]) -> bool:
    """Whether the items fit, by trying all."""
    if not items:
        return True
    (size, gpus), rest = items[0], items[1:]
    for node in nodes:
        for chosen in itertools.combinations(range(2), gpus):
            if all(node[i] >= size for i in chosen):
                for i in chosen:
                    node[i] -= size
                fits = _fits(rest, nodes)
                for i in chosen:
                    node[i] += size
                if fits:
                    return True
    return False


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 2), st.integers(0, 200), st.integers(1, 50))
def test_more_of_the_same_never_needs_less(gib: int, gpus: int, depth: int, more: int) -> None:
    shape = make.shape(gib, gpus=gpus)
    assert need(state([make.queue("q", shape, depth)]), PAIR) <= need(state([make.queue("q", shape, depth + more)]), PAIR)


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3"]), SIZES), max_size=6))
def test_it_is_never_below_what_is_used_and_counts_every_slot_once(
    items: list[tuple[int, int]], work: list[tuple[str, int]]
) -> None:
    queues = [make.queue(f"w{n}", make.shape(gib), 0) for n, (_, gib) in enumerate(work)]
    queues += [make.queue(f"q{n}", make.shape(gib, gpus=gpus), 1) for n, (gib, gpus) in enumerate(items)]
    slots = [make.opened(f"s{n}", f"w{n}", node, "d0") for n, (node, _) in enumerate(work)]
    made = state(queues, slots, {name: [600, 600] for name in ("n1", "n2", "n3")})
    (group,) = pack(made, [PackGroup("g", node_kind("2:600GiB"), 100)], 30.0).needs
    assert group.used == len({node for node, _ in work})
    assert group.used <= group.nodes <= group.used + len(items)
    assert group.live == 3


def test_a_node_has_no_more_slots_than_it_may() -> None:
    assert need(state([make.queue("q", make.shape(0.25), SLOTS_MAX + 1)])) == 2


@pytest.mark.parametrize(
    ("quota", "nodes"),
    [
        pytest.param({}, 3, id="none"),
        pytest.param({"gpus_max": 8}, 1, id="devices for one node"),
        pytest.param({"running_max": 9}, 2, id="tasks for two"),
    ],
)
def test_no_node_is_added_for_what_the_tenants_quota_would_not_let_work(quota: dict[str, int], nodes: int):
    waiting = state([make.queue("x", make.shape(190), 24, run_s=100.0)])
    waiting = msgspec.structs.replace(waiting, tenants=(TenantRow(tenant="t", **quota),))
    (need,) = pack(waiting, [EIGHT], 1.0).needs
    assert need.nodes == nodes


def test_what_works_already_is_of_the_same_quota():
    running = [make.opened(f"s{i}", "x", "n1", f"d{i}") for i in range(8)]
    busy = state([make.queue("x", make.shape(190), 24, run_s=100.0)], running, {"n1": [192.0] * 8})
    busy = msgspec.structs.replace(busy, tenants=(TenantRow(tenant="t", gpus=8, gpus_max=10),))
    (need,) = pack(busy, [EIGHT], 1.0).needs
    assert need.nodes == 2
