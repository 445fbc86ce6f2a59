"""What would happen to requests that are not made."""

import msgspec
import pytest

from manager.core.ahead import Setup, ahead_of
from manager.core.foresee import Forecast, When, Wish, foresee
from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag
from manager.core.model import ClusterState, TenantRow
from manager.core.node_kinds import node_kind
from manager.core.packing import PackGroup
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from manager.core.shapes import Shape, shape_id
from manager.core.waiting import Why
from tests.unit import factories as make

GROUP = PackGroup("big", node_kind("2:192GiB"), 2)
SETUP = Setup(limits=make.LIMITS, policy=BEST_FIT, groups=(GROUP,), drain_target_s=1.0)
SMALL = make.shape(16)


def asked(state: ClusterState, *wishes: Wish | Shape, setup: Setup = SETUP) -> list[Forecast]:
    ready = [wish if isinstance(wish, Wish) else Wish(wish) for wish in wishes]
    return list(foresee(ready, ahead_of(state, index_of(state), setup), setup))


def with_slots(*slots, shape: Shape = SMALL, depth: int = 0, nodes=None) -> ClusterState:
    queue = make.queue(shape_id(shape), shape, depth, run_s=4.0)
    return make.state([queue], slots, nodes or {"a": [64]})


def test_an_idle_slot_of_its_shape_takes_it() -> None:
    (found,) = asked(with_slots(make.opened("s", shape_id(SMALL), "a", "d0", idle_s=3.0)), SMALL)
    assert (found.when, found.now, found.start_s) == (When.NOW, 1, 0.0)
    assert [(place.node, place.opens) for place in found.places] == [("a", False)]


def test_of_several_idle_slots_any_may_take_it() -> None:
    slots = [make.opened(f"s{node}", shape_id(SMALL), node, "d0", idle_s=3.0) for node in "ab"]
    (found,) = asked(with_slots(*slots, nodes={"a": [64], "b": [64]}), SMALL)
    assert {place.node for place in found.places} == {"a", "b"}
    assert found.now == 1


def test_room_is_taken_by_those_before_it() -> None:
    state = make.state([], nodes={"a": [64], "b": [64]})
    first, second = asked(state, make.shape(60), make.shape(50, tenant="u"))
    assert [place.node for place in first.places] == ["a"]
    assert [place.node for place in second.places] == ["b"]
    *_, third = asked(state, make.shape(60), make.shape(50, tenant="u"), make.shape(40, tenant="v"))
    assert (third.when, third.reason) == (When.LATER, Why.INSUFFICIENT_MEMORY)


def test_of_many_those_run_at_once_for_which_there_is_room() -> None:
    (found,) = asked(make.state([], nodes={"a": [64], "b": [64]}), Wish(make.shape(32), 10))
    assert (found.when, found.count) == (When.NOW, 10)
    assert found.now == sum(place.slots for place in found.places) == 4


def test_what_ends_for_it_is_told() -> None:
    idle = make.opened("s", shape_id(SMALL), "a", "d0", idle_s=9.0)
    state = with_slots(idle, make.requested("r", "big"))
    big = make.shape(60)
    queues = (*state.queues, make.queue(shape_id(big), big, 1))
    waiting = msgspec.structs.replace(make.requested("r", shape_id(big)))
    state = msgspec.structs.replace(state, queues=queues, slots=(idle, waiting))
    (found,) = asked(state, big)
    assert found.when is When.LATER
    assert [(ends.node, ends.slots, ends.memory_bytes, ends.seconds) for ends in found.ends] == [("a", 1, 16 * GIB, 0.0)]


def test_a_busy_slot_on_its_way_out_gives_the_time() -> None:
    busy = make.opened("s", shape_id(SMALL), "a", "d0", flag=SlotFlag.CLOSE)
    (found,) = asked(with_slots(busy), make.shape(60))
    assert (found.when, found.reason) == (When.LATER, Why.INSUFFICIENT_MEMORY)
    assert found.start_s is not None
    assert found.start_s >= 4.0, "a run of what is there, as it was learned"


@pytest.mark.parametrize(
    ("gib", "gpus", "when", "reason"),
    [
        (150, 1, When.AFTER_SCALE_UP, Why.WAITING_FOR_SCALE_UP),
        (150, 2, When.AFTER_SCALE_UP, Why.WAITING_FOR_SCALE_UP),
        (150, 3, When.NEVER, Why.TOO_FEW_DEVICES),
        (250, 1, When.NEVER, Why.EXCEEDS_LARGEST_DEVICE),
    ],
)
def test_what_no_node_could_hold(gib, gpus, when, reason) -> None:
    (found,) = asked(make.state([], nodes={"a": [64]}), make.shape(gib, gpus))
    assert (found.when, found.reason) == (when, reason)


def test_the_need_of_groups_with_and_without_it() -> None:
    (found,) = asked(make.state([], nodes={"a": [64]}), Wish(make.shape(150), 3))
    (change,) = found.groups
    assert (change.group, change.need_before, change.need_after, change.nodes_max) == ("big", 0, 2, 2)


def test_a_quota_is_said_although_there_is_room() -> None:
    state = msgspec.structs.replace(
        make.state([], nodes={"a": [64]}), tenants=(TenantRow(tenant="t", gpus=2, running=2, gpus_max=2),)
    )
    (found,) = asked(state, SMALL)
    assert (found.when, found.reason, found.now) == (When.LATER, Why.QUOTA_EXCEEDED, 0)


def test_nothing_is_changed() -> None:
    state = with_slots(make.opened("s", shape_id(SMALL), "a", "d0", idle_s=3.0), depth=2)
    ahead = ahead_of(state, index_of(state), SETUP)
    before = (ahead.index.grants.copy(), ahead.index.kept.copy())
    first = list(foresee([Wish(make.shape(40), 4)], ahead, SETUP))
    assert list(foresee([Wish(make.shape(40), 4)], ahead, SETUP)) == first
    assert (ahead.index.grants, ahead.index.kept) == before
    assert ahead.state is state
