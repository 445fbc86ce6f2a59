"""The need as metrics: shown by the leader alone, with a round that changes each time."""

from collections.abc import Iterator

import msgspec
import pytest

from manager.core.packing import DirectDemand
from manager.core.quantities import GIB
from manager.group_needs import PAUSE_S, GroupNeeds, pack_groups
from manager.metrics import GROUP_NEED, GROUP_NEED_ROUND, GROUP_NODES, INFEASIBLE_TASKS
from manager.settings import GroupSettings, NodeSettings, Settings
from tests.unit import factories as make

SETTINGS = Settings(groups={"g": GroupSettings(devices="2:100GiB"), "h": GroupSettings(devices="1:10GiB", workers_max=0)})


@pytest.fixture
def needs() -> Iterator[GroupNeeds]:
    made = GroupNeeds(SETTINGS)
    yield made
    made.show(make.state([]), (), 1, 10**9)
    made.hide()


def samples(metric: object) -> dict[tuple[str, ...], float]:
    (family,) = metric.collect()  # type: ignore[attr-defined]
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def of_group(state: object) -> object:
    rows = tuple(
        msgspec.structs.replace(row, info=msgspec.structs.replace(row.info, group="g"))
        for row in state.nodes  # type: ignore[attr-defined]
    )
    return msgspec.structs.replace(state, nodes=rows)


def test_the_groups_of_the_settings_are_packed_without_what_is_never_leased() -> None:
    node = NodeSettings(reserve_bytes=GIB, memory_ratio_max=0.5, slots_max=7)
    (first, second) = pack_groups(msgspec.structs.replace(SETTINGS, node=node))
    assert (first.name, first.kind.total_bytes, first.kind.slots_max) == ("g", 100 * GIB, 7)
    assert (second.name, second.nodes_max) == ("h", 0)


def test_need_nodes_and_what_is_infeasible_are_shown(needs: GroupNeeds) -> None:
    queues = [make.queue("q", make.shape(90), 5), make.queue("huge", make.shape(500), 3)]
    state = of_group(make.state(queues, [], {"n1": [99.5, 99.5]}))
    needs.show(state, [DirectDemand(90 * GIB, 1, 2)], 7, 100.0)  # type: ignore[arg-type]
    assert samples(GROUP_NEED) == {("g",): 4, ("h",): 0}
    assert samples(GROUP_NODES)[("g", "live")] == 1
    assert samples(INFEASIBLE_TASKS) == {("ExceedsLargestDevice",): 3}
    needs.show(of_group(make.state([])), (), 7, 100.0 + PAUSE_S)  # type: ignore[arg-type]
    assert samples(GROUP_NEED)[("g",)] == 0
    assert samples(INFEASIBLE_TASKS) == {}


def test_a_round_is_new_each_time_and_with_each_leader(needs: GroupNeeds) -> None:
    rounds = []
    for token, at_s in ((1, 10.0), (1, 10.1), (1, 20.0), (2, 30.0)):
        needs.show(make.state([]), (), token, at_s)
        rounds.append(samples(GROUP_NEED_ROUND)[("g",)])
    assert rounds[0] == rounds[1], "no two within a moment"
    assert len(set(rounds)) == 3


def test_who_does_not_lead_shows_nothing(needs: GroupNeeds) -> None:
    needs.show(make.state([]), (), 1, 10.0)
    assert samples(GROUP_NEED)
    needs.hide()
    assert [samples(metric) for metric in (GROUP_NEED, GROUP_NEED_ROUND, GROUP_NODES, INFEASIBLE_TASKS)] == [{}] * 4
