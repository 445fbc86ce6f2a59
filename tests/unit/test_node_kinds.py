"""What nodes could ever hold: what is refused and why, and that nothing is that an empty node could take."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.core.devices import MODELS, Device
from manager.core.index import index_of
from manager.core.model import ClusterState, NodeInfo, NodeRow
from manager.core.node_kinds import Capacity, kind_of, node_kind
from manager.core.placement import Reason, devices_for, find
from manager.core.policies import FirstFit
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from manager.core.verdicts import FITS, verdicts_of
from tests.unit import factories as make


def node(models: str, labels: dict[str, str] | None = None, cpus: int = 0, host_gib: int = 0) -> NodeInfo:
    devices = [
        Device(f"u{at}", at, "simulated", MODELS[name].model, MODELS[name].architecture, MODELS[name].memory_bytes, "")
        for at, name in enumerate(models.split())
    ]
    return NodeInfo(
        hostname="h", pid=1, source="simulated", version="v", devices=tuple(devices), reserve_bytes=GIB // 2, cpus=cpus,
        host_memory_bytes=host_gib * GIB, labels=tuple(sorted((labels or {}).items())),
    )  # fmt: skip


FLEET = {
    "amd": node("mi300x mi300x", {"zone": "a"}, cpus=16, host_gib=64),
    "desk": node("rx7900xtx", {"zone": "b"}, cpus=8),
    "green": node("h100"),
}
CAPACITY = Capacity.of(FLEET.items(), ())


@pytest.mark.parametrize(
    ("asked", "reason", "node", "says"),
    [
        (
            make.need(500),
            Reason.EXCEEDS_LARGEST_DEVICE,
            "amd",
            "MI300X on amd, can hold 191.5 GiB, in leases of at most 191 GiB.",
        ),
        (make.need(100, 2, architectures=("sm_90",)), Reason.NO_MATCHING_ARCHITECTURE, "amd", "2 devices that are sm_90"),
        (make.need(30, architectures=("rdna3",)), Reason.EXCEEDS_LARGEST_DEVICE, "desk", "any such device"),
        (make.need(1, architectures=("gfx950",)), Reason.NO_MATCHING_ARCHITECTURE, "amd", "gfx942 (AMD Instinct MI300X)"),
        (make.need(1, device_model="mi999|a100"), Reason.NO_MATCHING_DEVICE, "amd", "called 'mi999' or 'a100'"),
        (make.need(1, labels=(("zone", "c"),)), Reason.NO_MATCHING_LABELS, "amd", "Labels of nodes: zone=a, zone=b."),
        (
            make.need(1, labels=(("zone", "b"),), device_model="mi300x"),
            Reason.NO_MATCHING_DEVICE,
            "desk",
            "and all else that was named",
        ),
        (make.need(1, 3), Reason.TOO_FEW_DEVICES, "amd", "no node has more than 2."),
        (make.need(150, cpu_milli=17_000), Reason.EXCEEDS_HOST, "amd", "amd, has 16."),
        (make.need(150, host_memory_bytes=65 * GIB), Reason.EXCEEDS_HOST, "amd", "amd, has 64 GiB."),
        (make.need(1, labels=(("zone", "b"),), cpu_milli=9000), Reason.EXCEEDS_HOST, "desk", "desk, has 8."),
    ],
)
def test_what_could_never_run_is_refused_with_its_reason_and_the_nearest_node(asked, reason, node, says):
    refusal = CAPACITY.refusal(asked)
    assert refusal is not None
    assert (refusal.reason, refusal.node) == (reason, node)
    assert says in refusal.detail


@pytest.mark.parametrize(
    "asked",
    [
        make.need(191.5, 2),
        make.need(79, architectures=("hopper",), cpu_milli=10**6),  # its host does not say
        make.need(1, share_milli=1000, exclusive=True, device_model="rx 7900", labels=(("zone", "b"),), cpu_milli=8000),
        make.need(1, model="anything"),
    ],
)
def test_what_some_node_could_hold_is_not_refused(asked):
    assert CAPACITY.refusal(asked) is None


def test_with_no_node_known_nothing_is_refused():
    assert not Capacity({}).is_known
    assert Capacity({}).refusal(make.need(10_000)) is None


def test_a_group_counts_with_what_it_can_add_until_one_of_its_nodes_shows_what_it_is():
    wanted = make.need(1, architectures=("gfx950",), labels=(("zone", "z"),))
    group = ("big", node_kind("8:mi355x", labels=(("zone", "z"),)))
    assert Capacity.of(FLEET.items(), [group]).refusal(wanted) is None
    refusal = Capacity.of(FLEET.items(), [group]).refusal(make.need(289))
    assert refusal is not None
    assert refusal.node == "a node of group big"
    other = msgspec.structs.replace(node("mi300x"), group="big")
    assert Capacity.of([*FLEET.items(), ("big-0", other)], [group]).refusal(wanted) is not None


def test_a_size_without_a_model_matches_no_selector():
    capacity = Capacity.of([], [("g", node_kind("1:64GiB", labels=(("zone", "a"),)))])
    assert capacity.refusal(make.need(64, labels=(("zone", "a"),))) is None
    for selector in ({"architectures": ("gfx942",)}, {"device_model": "mi300x"}):
        assert capacity.refusal(make.need(1, **selector)) is not None


def pooled(per_pool: int, pools: int, gib: int) -> NodeInfo:
    devices = [
        Device(f"p{pool}d{at}", 0, "amd", "AMD Instinct MI300X", "gfx942", gib * GIB, "", partition="CPX", pool=f"p{pool}")
        for pool in range(pools)
        for at in range(per_pool)
    ]
    return NodeInfo(hostname="h", pid=1, source="amd", version="v", devices=tuple(devices))


def test_memory_that_devices_share_is_promised_once():
    info = pooled(2, 4, 48)
    assert kind_of(info).total_bytes == 4 * 48 * GIB
    capacity = Capacity.of([("n", info)], ())
    assert capacity.refusal(make.need(48, 4)) is None
    assert capacity.refusal(make.need(24, 8)) is None
    refusal = capacity.refusal(make.need(25, 8))
    assert refusal is not None
    assert (refusal.reason, refusal.usable_bytes) == (Reason.EXCEEDS_LARGEST_DEVICE, 24 * GIB)


REQUESTS = st.builds(
    Resources,
    memory_bytes=st.sampled_from([1, 24, 79, 80, 150, 191, 192, 300]).map(lambda gib: gib * GIB),
    gpus=st.integers(1, 3),
    share_milli=st.sampled_from([0, 500, 1000]),
    architectures=st.sampled_from([(), ("gfx942",), ("rdna3", "sm_9*"), ("gfx950",)]),
    device_model=st.sampled_from(["", "mi300x", "mi300x|h100", "mi999"]),
    labels=st.sampled_from([(), (("zone", "a"),), (("zone", "b"),), (("zone", "a"), ("x", "y"))]),
    cpu_milli=st.sampled_from([0, 8000, 16_000, 32_000]),
    host_memory_bytes=st.sampled_from([0, 64 * GIB, 65 * GIB]),
    exclusive=st.booleans(),
)


def empty(names: list[str]) -> ClusterState:
    rows = [NodeRow(node=name, incarnation="i", beat=1, info=FLEET[name], address="tcp://x") for name in names]
    return ClusterState(0, (), (), tuple(rows))


@given(asked=REQUESTS, names=st.lists(st.sampled_from(sorted(FLEET)), min_size=1, max_size=3, unique=True))
def test_a_request_is_refused_if_and_only_if_no_empty_node_takes_it(asked, names):
    """And where it is placed, its devices are what it named."""
    index = index_of(empty(names))
    refusal = Capacity.of([(name, FLEET[name]) for name in names], ()).refusal(asked)
    grant = find(asked, index, FirstFit())
    assert (refusal is None) == any(devices_for(asked, view) is not None for view in index.nodes.values())
    assert (refusal is None) == (grant is not None)
    if grant is not None:
        view = index.nodes[grant.node]
        assert len(set(grant.devices)) == asked.gpus
        assert all(view.devices[uuid].kind.matches(asked) for uuid in grant.devices)


@given(asked=REQUESTS, names=st.lists(st.sampled_from(sorted(FLEET)), min_size=1, max_size=3, unique=True))
def test_an_explanation_gives_the_reason_of_the_refusal(asked, names):
    refusal = Capacity.of([(name, FLEET[name]) for name in names], ()).refusal(asked)
    state = empty(names)
    nearest, *_ = verdicts_of(asked, index_of(state), {row.node: row for row in state.nodes}, 0)
    assert nearest.verdict == (FITS if refusal is None else refusal.reason)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            make.need(192),
            "512 MiB more than it could ever hold; its largest device holds 191.5 GiB, in leases of at most 191 GiB",
        ),
        (make.need(192, 2), "2 of its devices at once each hold 191.5 GiB, in leases of at most 191 GiB"),
        (make.need(192, device_model="mi300x"), "its largest such device holds 191.5 GiB"),
        (make.need(1, 3), "it has 2 of the 3 devices"),
    ],
)
def test_a_node_says_what_it_could_hold_at_most(asked, says):
    (found,) = verdicts_of(asked, index_of(empty(["amd"])), {}, 0)
    assert says in found.detail


def test_devices_that_share_memory_hold_less_at_once():
    row = NodeRow(node="n", incarnation="i", beat=1, info=pooled(2, 1, 47), address="tcp://x")
    (found,) = verdicts_of(make.need(24, 2), index_of(ClusterState(0, (), (), (row,))), {}, 0)
    assert found.detail == "2 of its devices at once each hold 23.5 GiB"


def test_of_nodes_with_too_few_devices_the_one_with_most_is_nearest():
    found = verdicts_of(make.need(1, 3), index_of(empty(["desk", "amd", "green"])), {}, 0)
    assert [each.node for each in found] == ["amd", "desk", "green"]
