"""Each policy by what it prefers; none takes what does not fit; and what is remembered is what would be said afresh."""

from importlib.metadata import EntryPoint

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import manager.policies
from manager.core.errors import SettingsError
from manager.core.index import Index
from manager.core.outlook import CHANGE_MIN, COUNTED_MAX, CPU_LEVELS_MAX, DemandCounter, outlook_of, room_of
from manager.core.placement import NO_DEMAND, Demand, find
from manager.core.policies import POLICIES
from manager.core.quantities import GIB
from manager.core.shapes import Resources, grant_of
from manager.core.table import WHOLE
from manager.policies import policy_named
from manager.settings import PlacementSettings
from tests.unit import factories as make


def fleet(**nodes):
    """Node → its CPUs, then the GiB of each device."""
    made = Index()
    for name, (cpus, *sizes) in nodes.items():
        made.add_node(name, "i1", make.devices(*sizes), 0, cpu_milli=cpus * 1000, host_memory_bytes=64 * GIB)
    return made


def share(milli, cpus=0, gpus=1, **more):
    return Resources(0, gpus, share_milli=milli, cpu_milli=cpus * 1000, **more)


def chosen(policy, need, ledger, demand=NO_DEMAND):
    grant = find(need, ledger, POLICIES[policy], demand)
    return grant and f"{grant.node} {' '.join(grant.devices)}".strip()


WHOLES = Demand([(share(1000, 8), 3.0), (share(1000, 8, gpus=2), 1.0)])
HALVES = Demand([(share(500, 1), 1.0)])


@pytest.mark.parametrize(
    ("policy", "leases", "need", "demand", "expected"),
    [
        pytest.param("first_fit", ["a d0 24"], make.need(8), NO_DEMAND, "a d1", id="first fit: the first name, and device"),
        pytest.param("best_fit", ["b d0 10"], make.need(8), NO_DEMAND, "b d0", id="best fit: the least memory that remains"),
        pytest.param("best_fit", ["b d0 0 300"], share(500, 4), NO_DEMAND, "b d0", id="best fit: the least shares and CPUs"),
        pytest.param("round_robin", ["a d0 1"], make.need(8), NO_DEMAND, "b d0", id="round robin: the fewest slots"),
        pytest.param("round_robin", ["a d0 8", "b d0 1"], make.need(8), NO_DEMAND, "a d1", id="round robin: then the emptiest"),
        pytest.param(
            "least_loaded", ["a d0 9", "b d0 4", "b d1 4"], make.need(8), NO_DEMAND, "b d0", id="least loaded: the whole node"
        ),
        pytest.param("least_loaded", ["a d0 9", "b d0 24"], make.need(8), NO_DEMAND, "a d1", id="least loaded: its emptiest"),
        pytest.param("spread", ["a d0 9", "b d0 4", "b d1 4"], make.need(8), NO_DEMAND, "a d1", id="spread: a device alone"),
        pytest.param("fgd", ["b d1 0 500"], share(500, 1), WHOLES, "b d1", id="fgd: breaks no whole device"),
        pytest.param("fgd", ["b d1 0 500"], share(500, 1), HALVES, "a d0", id="fgd: whole ones are nothing special"),
        pytest.param("fragmentation", ["b d1 0 500"], share(500, 1), WHOLES, "b d1", id="fragmentation: breaks none either"),
        pytest.param("fragmentation", [], share(500, 1), NO_DEMAND, "a d0", id="fragmentation: knows nothing, takes the first"),
        pytest.param(
            "fragmentation", ["b d0 1 0 llama"], make.need(8, model="llama"), NO_DEMAND, "b d0", id="fragmentation: warm first"
        ),
        pytest.param("first_fit", ["b d0 1 0 llama"], make.need(8, model="llama"), NO_DEMAND, "a d0", id="others do not care"),
    ],
)
def test_what_a_policy_prefers(policy, leases, need, demand, expected):
    ledger = fleet(a=(16, 24, 24), b=(16, 24, 24))
    for number, lease in enumerate(leases):
        node, uuid, gib, *more = lease.split()
        milli, model = int(more[0]) if more else 0, more[1] if len(more) > 1 else ""
        ledger.lease(f"s{number}", grant_of(Resources(int(gib) * GIB, share_milli=milli, model=model), node, (uuid,)))
    assert chosen(policy, need, ledger, demand) == expected


def test_fragmentation_leaves_cpus_for_devices():
    """A task of CPUs alone goes where there are more than the devices will ever need."""
    ledger = fleet(a=(16, 24, 24), b=(64, 24, 24))
    assert chosen("fgd", share(0, 4, gpus=0), ledger, WHOLES) == "a", "no single request is kept out by it"
    assert chosen("fragmentation", share(0, 4, gpus=0), ledger, WHOLES) == "b"


def test_fragmentation_leaves_rare_devices_to_who_must_have_them():
    ledger = Index()
    for name, model in {"a": "rare", **dict.fromkeys("bcdefgh", "plain")}.items():
        device = make.device("d0", 24)
        ledger.add_node(name, "i1", [type(device)(**{**_fields(device), "model": model})], 0)
    demand = Demand([(make.need(24), 9.0), (make.need(24, device_model="rare"), 1.0)])
    assert chosen("first_fit", make.need(24), ledger) == "a d0"
    assert chosen("fragmentation", make.need(24), ledger, demand) == "b d0"
    assert chosen("fragmentation", make.need(24, device_model="rare"), ledger, demand) == "a d0"


def _fields(device):
    return {name: getattr(device, name) for name in device.__struct_fields__}


def test_the_default_of_the_settings_is_a_policy():
    assert policy_named(PlacementSettings().policy) is POLICIES["fragmentation"]


# --- policies of others ---------------------------------------------------------------------------------------------


class LastFit:
    """What somebody's package brings: the last node that fits."""

    name = "last_fit"

    def scores(self, options, demand):
        return -options.row.astype(float)


LAST_FIT = LastFit()
NO_POLICY = object()


def point(name, value):
    return EntryPoint(name, value, manager.policies.ENTRY_POINT_GROUP)


def test_a_policy_comes_by_an_entry_point(monkeypatch):
    asked = []

    def installed(*, group):
        asked.append(group)
        return [point("last_fit", f"{__name__}:LAST_FIT"), point("broken", "no_such_module:POLICY")]

    monkeypatch.setattr(manager.policies, "entry_points", installed)
    policy = policy_named("last_fit")
    grant = find(make.need(8), fleet(a=(8, 24), b=(8, 24)), policy)
    assert (grant.node, asked) == ("b", ["rocyard.policies"])


@pytest.mark.parametrize(
    ("name", "points", "says"),
    [
        pytest.param("best-fit", [], r"'best-fit', did you mean 'best_fit'\?; there are round_robin, .*, fgd", id="typing"),
        pytest.param("x", [("mine", "m:P")], r"no policy 'x'; there are .*, mine$", id="lists those of packages"),
        pytest.param("mine", [("mine", "no_such_module:P")], "cannot be loaded: ModuleNotFoundError", id="does not load"),
        pytest.param("mine", [("mine", f"{__name__}:NO_POLICY")], "is no policy: an object with name='mine'", id="no policy"),
        pytest.param("last_fit", [("last_fit", f"{__name__}:LastFit")], "is no policy", id="a class and no object"),
        pytest.param("mine", [("mine", f"{__name__}:LAST_FIT")], "is no policy", id="another name"),
        pytest.param("mine", [("mine", "a:P"), ("mine", "b:P")], "have one name", id="two of one name"),
    ],
)
def test_what_is_no_policy_is_told(name, points, says):
    with pytest.raises(SettingsError, match=says):
        policy_named(name, [point(*pair) for pair in points])


# --- the outlook ----------------------------------------------------------------------------------------------------


def usable(need, room, cpus, devices):
    """How much of a node's room one class can use, counted one by one; in devices."""
    able = [milli for milli in room if milli >= need.share_milli]
    if cpus < need.cpu_milli or (need.gpus > 1 and need.share_milli == WHOLE and len(able) < need.gpus):
        return 0.0
    return sum(able) / WHOLE


shares_ = st.builds(share, st.sampled_from([100, 250, 500, 1000]), st.integers(0, 12), st.just(1)) | st.builds(
    share, st.just(1000), st.integers(0, 12), st.integers(2, 4)
)


@given(
    st.dictionaries(shares_, st.integers(1, 9), max_size=6),
    st.lists(st.integers(0, WHOLE), min_size=3, max_size=3),
    st.integers(0, 16_000),
)
def test_the_outlook_is_what_one_counts_class_by_class(mix, room, cpus):
    table = fleet(a=(16, 24, 24, 24)).table
    demand = Demand(mix.items())
    value = outlook_of(demand, table).value(np.array([0]), np.array([room]), np.array([cpus]))
    expected = sum(count * usable(need, room, cpus, 3) for need, count in mix.items()) / max(1, sum(mix.values()))
    assert value[0] == pytest.approx(expected)
    assert outlook_of(demand, table) is outlook_of(demand, table)


def test_many_amounts_of_cpus_are_told_apart_only_so_far():
    table = fleet(a=(1000, 24)).table
    demand = Demand([(share(1000, cpus), 1.0) for cpus in range(200)])
    outlook = outlook_of(demand, table)
    assert len(outlook.levels) == CPU_LEVELS_MAX
    for cpus, least in ((0, 0.0), (100, 0.45), (199, 1.0)):
        value = outlook.value(np.array([0]), np.array([[WHOLE]]), np.array([cpus * 1000]))[0]
        assert least <= value <= (cpus + 1) / 200 + 0.02


@pytest.mark.parametrize(
    ("need", "milli"),
    [
        (make.need(6), 250),
        (make.need(6.01), 251),
        (make.need(25), 1042),
        (make.need(6, share_milli=400), 400),
        (make.need(6, exclusive=True), WHOLE),
        (make.need(25, exclusive=True), WHOLE + 1),
        (share(0), 1),
    ],
)
def test_the_room_that_a_request_takes(need, milli):
    assert room_of(need, 24 * GIB) == milli
    assert room_of(make.need(1), 0) > WHOLE


def test_the_counter_learns_the_mix_and_says_so_rarely():
    counter = DemandCounter()
    seen = [counter.demand]
    for number in range(4000):
        counter.note(make.need(8) if number % 4 else make.need(16))
        if counter.demand is not seen[-1]:
            seen.append(counter.demand)
    assert 2 <= len(seen) <= 4
    mix = dict(seen[-1].shares)
    assert abs(mix[make.need(16)] - 0.25) < CHANGE_MIN
    for _ in range(2 * COUNTED_MAX):
        counter.note(make.need(24))
    assert dict(counter.demand.shares)[make.need(24)] > 0.8, "what has not come for long is forgotten"


# --- properties -----------------------------------------------------------------------------------------------------

needs = st.builds(
    Resources,
    st.sampled_from([0, 1, 4, 9, 20]).map(lambda gib: gib * GIB),
    st.integers(0, 3),
    share_milli=st.sampled_from([0, 200, 500, 1000]),
    cpu_milli=st.sampled_from([0, 1000, 6000]),
    exclusive=st.booleans(),
    model=st.sampled_from(["", "llama"]),
)
fleets = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.sampled_from([0, 4, 16]), *[st.sampled_from([8, 24])] * 3), min_size=1, max_size=4
)
histories = st.lists(
    st.one_of(
        st.tuples(st.just("place"), needs),
        st.tuples(st.just("free"), st.integers(0, 9)),
        st.tuples(st.just("foreign"), st.sampled_from("abcd"), st.sampled_from(["d0", "d1"]), st.integers(0, 9)),
        st.tuples(st.just("cordon"), st.sampled_from("abcd"), st.booleans()),
    ),
    max_size=12,
)


def afresh(ledger, nodes):
    fresh = fleet(**nodes)
    for slot, granted in ledger.grants.items():
        fresh.lease(slot, granted)
    for name, view in ledger.nodes.items():
        fresh.mark(name, cordoned=view.cordoned)
        for uuid, pool in view.pools.items():
            fresh.observe(name, make.use(uuid, foreign=pool.foreign_bytes / GIB), 0.0)
    return fresh


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@given(fleets, histories, st.lists(st.tuples(needs, st.integers(1, 5)), max_size=4), needs)
def test_what_is_remembered_is_what_would_be_said_afresh_and_it_fits(policy, nodes, history, mix, probe):
    ledger, demand = fleet(**nodes), Demand(mix)
    for number, delta in enumerate(history):
        match delta:
            case "place", need:
                if (grant := find(need, ledger, policy, demand)) is not None:
                    ledger.lease(f"s{number}", grant)
                    view = ledger.nodes[grant.node]
                    assert len(set(grant.devices)) == need.gpus
                    assert not view.cordoned
                    assert view.cpu_free_milli >= 0
                    for device in (view.devices[uuid] for uuid in grant.devices):
                        assert device.pool.free_bytes >= 0
                        assert device.free_milli >= 0
                        assert not device.alone or len(device.slots) == 1
            case "free", which:
                ledger.free(f"s{which}")
            case "foreign", node, uuid, gib:
                ledger.observe(node, make.use(uuid, foreign=gib), 0.0)
            case "cordon", node, value:
                ledger.mark(node, cordoned=value)
        fresh = afresh(ledger, nodes)
        assert find(probe, ledger, policy, demand) == find(probe, fresh, policy, demand)
        assert ledger.table.is_equal(fresh.table)
