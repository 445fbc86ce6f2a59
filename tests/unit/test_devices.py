"""The pure half of the device interface: readings to be believed, names, fleets, what stands in for a failed look."""

import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.core.devices import (
    CARRIED_S_MAX,
    MODELS,
    Device,
    Probe,
    ProcessUse,
    RawReading,
    carried,
    memory_total,
    parse_fleet,
    reading_of,
    unreadable,
    with_known,
)
from manager.core.errors import StartError
from manager.core.quantities import GIB
from plugins.node.devices.identity import Identity, keys_of, unique_id_text
from plugins.node.devices.interface import VISIBILITY_VARIABLES, visibility
from plugins.node.devices.pools import memory_of
from plugins.node.devices.probe import Rejection, chosen

TOTAL = 64 * GIB


def device(uuid="GPU-a", vendor="amd", **other):
    fields = {"index": 0, "model": "m", "architecture": "gfx942", "memory_bytes": TOTAL, "visible_id": uuid}
    return Device(uuid=uuid, vendor=vendor, **(fields | other))


def good(each):
    return reading_of(each, RawReading(used_bytes=0))


# --- readings ---------------------------------------------------------------------------------------------------------


def test_a_sound_reading_is_taken_as_it_is_in_base_units():
    raw = RawReading(4 * GIB, 37, 61, 250.5, ((9, GIB), (4, GIB), (9, 2 * GIB)))
    reading = reading_of(device(), raw)
    assert reading.healthy
    assert not reading.problem
    assert (reading.used_bytes, reading.utilisation_ratio) == (4 * GIB, 0.37)
    assert (reading.temperature_celsius, reading.power_watts) == (61, 250.5)
    assert reading.processes == (ProcessUse(4, GIB), ProcessUse(9, 3 * GIB))
    assert reading.processes_known


@pytest.mark.parametrize("used", [-1, TOTAL + 1, 0xFFFFFFFF, 2**64 - 1, math.nan, math.inf, "N/A", None, True, object()])
def test_memory_in_use_that_cannot_be_true_leaves_no_room_and_says_why(used):
    reading = reading_of(device(), RawReading(used))
    assert not reading.healthy
    assert reading.used_bytes == TOTAL
    assert "memory in use" in reading.problem
    assert not reading.processes_known


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("utilisation_percent", 101, True),
        ("utilisation_percent", -3, True),
        ("utilisation_percent", math.nan, True),
        ("utilisation_percent", 0xFFFF, False),
        ("utilisation_percent", 0xFFFFFFFF, False),
        ("utilisation_percent", "N/A", False),
        ("temperature_celsius", 61_000, True),
        ("temperature_celsius", None, False),
        ("power_watts", 750_000_000, True),
        ("power_watts", 0xFFFF, False),
    ],
)
def test_a_lesser_figure_that_cannot_be_true_is_dropped_alone(field, value, told):
    reading = reading_of(device(), RawReading(used_bytes=5, **{field: value}))
    assert reading.healthy
    assert reading.used_bytes == 5
    assert (reading.utilisation_ratio, reading.temperature_celsius, reading.power_watts) == (None, None, None)
    assert ("out of range" in reading.problem) is told


@pytest.mark.parametrize("entry", [(0, 1), (-4, 1), (2**23, 1), (7, -1), (7, TOTAL + 1), (7, None), ("x", 1)])
def test_one_process_that_cannot_be_true_makes_the_list_unknown(entry):
    reading = reading_of(device(), RawReading(used_bytes=5, processes=((3, 5), entry)))
    assert reading.healthy
    assert not reading.processes_known


def test_a_device_whose_total_is_not_told_holds_nothing():
    reading = reading_of(device(memory_bytes=memory_total(2**64 - 1)), RawReading(used_bytes=0))
    assert not reading.healthy
    assert "total memory" in reading.problem


def test_a_device_in_error_is_unhealthy_whatever_else_it_says():
    reading = reading_of(device(), RawReading(used_bytes=1, error="fell off the bus"))
    assert (reading.healthy, reading.used_bytes, reading.problem) == (False, TOTAL, "fell off the bus")


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(
    raw=st.builds(
        RawReading,
        used_bytes=anything,
        utilisation_percent=anything,
        temperature_celsius=anything,
        power_watts=anything,
        processes=st.none() | st.lists(st.tuples(anything, anything), max_size=3).map(tuple),
    ),
    total=anything,
)
def test_no_wrong_number_ever_comes_through(raw, total):
    each = device(memory_bytes=memory_total(total))
    reading = reading_of(each, raw)
    assert 0 <= reading.used_bytes <= each.memory_bytes
    assert reading.healthy or reading.used_bytes == each.memory_bytes
    assert reading.healthy or reading.problem
    assert reading.utilisation_ratio is None or 0 <= reading.utilisation_ratio <= 1
    assert reading.temperature_celsius is None or -50 <= reading.temperature_celsius <= 200
    assert reading.power_watts is None or 0 <= reading.power_watts <= 10_000
    assert all(use.pid > 0 and use.memory_bytes >= 0 for use in reading.processes)
    assert len({use.pid for use in reading.processes}) == len(reading.processes)


# --- looks ------------------------------------------------------------------------------------------------------------


def test_a_known_device_that_is_gone_stays_in_the_inventory_as_unhealthy():
    a, b = device("GPU-a"), device("GPU-b")
    probe = with_known((a, b), Probe((b,), (good(b),), "", complete=True))
    assert probe.devices == (b, a)
    assert [reading.healthy for reading in probe.readings] == [True, False]
    assert "no longer" in probe.readings[1].problem


NAMELESS, NAMED = device("BDF-0000:05:00.0", bdf="0000:05:00.0"), device("GPU-a", bdf="0000:05:00.0")


def test_a_device_that_gets_its_proper_name_late_is_not_counted_twice():
    assert with_known((NAMELESS,), Probe((NAMED,), (good(NAMED),), "", complete=True)).devices == (NAMED,)


def test_a_device_that_loses_its_name_keeps_the_one_it_had():
    probe = with_known((NAMED,), Probe((NAMELESS,), (good(NAMELESS),), "", complete=True))
    assert probe.devices == (NAMED,)
    assert probe.readings == (good(NAMED),)


@pytest.mark.parametrize("uuid", ["GPU-a", "BDF-0000:05:00.0"])
def test_a_device_that_no_longer_tells_its_total_keeps_the_one_it_had_and_has_no_room(uuid):
    sick = device(uuid, bdf="0000:05:00.0", memory_bytes=0)
    probe = with_known((NAMED,), Probe((sick,), (unreadable(sick, "no permission"),), "", complete=True))
    assert probe.devices == (NAMED,)
    assert probe.readings == (unreadable(NAMED, "no permission"),)
    assert probe.readings[0].used_bytes == TOTAL


@pytest.mark.parametrize(("age_s", "healthy"), [(0, True), (CARRIED_S_MAX, True), (CARRIED_S_MAX + 1, False)])
def test_the_last_good_look_stands_in_for_a_while_and_is_never_complete(age_s, healthy):
    a = device()
    probe = carried(Probe((a,), (good(a),), "", complete=True), age_s, "it hangs")
    assert (probe.devices, probe.complete, probe.error) == ((a,), False, "it hangs")
    assert probe.readings[0].healthy is healthy


def test_without_a_good_look_there_is_nothing_to_stand_in():
    assert carried(None, 0.0, "no driver") == Probe((), (), "no driver", complete=False)


def test_probes_survive_the_wire():
    a = device(bdf="0000:05:00.0", partition="DPX/NPS2/1")
    probe = Probe((a,), (reading_of(a, RawReading(5, 1, 2, 3, ((7, 5),))), unreadable(a, "x")), "", complete=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(probe), type=Probe) == probe


NONE, TWO = Probe((), (), "no library", complete=False), Probe((device(),), (good(device()),), "", complete=True)


@pytest.mark.parametrize(
    ("looks", "kind", "rejected"),
    [
        pytest.param([("amd", TWO, False), ("nvidia", TWO, False)], "amd", 0, id="AMD comes first"),
        pytest.param([("amd", NONE, False), ("nvidia", TWO, False)], "nvidia", 1, id="then NVIDIA"),
        pytest.param([("amd", NONE, False), ("nvidia", NONE, False)], "simulated", 2, id="then the simulation"),
        pytest.param([("amd", NONE, True), ("nvidia", TWO, False)], "amd", 0, id="a driver that hangs is a driver"),
    ],
)
def test_which_source_is_chosen(looks, kind, rejected):
    detection = chosen(looks, simulated=True)
    assert detection.kind == kind
    assert detection.rejected == tuple(Rejection(each[0], "no library") for each in looks[:rejected])


def test_no_devices_and_no_simulation_is_an_error_that_names_each_reason_and_the_remedy():
    empty = Probe((), (), "", complete=True)
    with pytest.raises(StartError, match=r"amd: no library; nvidia: its driver shows no devices.*node\.simulate"):
        chosen([("amd", NONE, False), ("nvidia", empty, False)], simulated=False)


# --- visibility -------------------------------------------------------------------------------------------------------


def test_each_vendor_has_its_one_variable():
    assert visibility([device("GPU-a"), device("GPU-b")]) == {"ROCR_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    assert visibility([device("GPU-a", "nvidia")]) == {"CUDA_VISIBLE_DEVICES": "GPU-a"}


def test_simulated_devices_hide_all_real_ones():
    assert visibility([device("SIM-000-01", "simulated")], "/d") == {
        "ROCYARD_SIMULATED_DEVICES": "SIM-000-01",
        "ROCYARD_SIMULATED_DIR": "/d",
        "ROCR_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.parametrize("vendor", ["amd", "nvidia", "simulated"])
def test_every_variable_that_is_set_is_among_those_to_clear(vendor):
    assert set(visibility([device(vendor=vendor)], "/d")) <= set(VISIBILITY_VARIABLES)


def test_devices_of_two_vendors_or_none_cannot_be_shown():
    with pytest.raises(ValueError, match="one vendor"):
        visibility([device("a"), device("b", "nvidia")])
    with pytest.raises(ValueError, match="one vendor"):
        visibility([])


# --- names of AMD's devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GPU-18ff74a1fc0fa5da", "GPU-18ff74a1fc0fa5da"),
        ("0x18FF74A1FC0FA5DA", "GPU-18ff74a1fc0fa5da"),
        ("GPU-8ff74a1fc0fa5da", "GPU-08ff74a1fc0fa5da"),
        ("GPU-XX", ""),
        ("GPU-0000000000000000", ""),
        ("0xFFFFFFFFFFFFFFFF", ""),
        ("", ""),
        ("GPU-6d37cae3-0000-4b2c-9f00-000000000000", ""),
    ],
)
def test_unique_ids_are_spelt_as_rocr_spells_them(text, expected):
    assert unique_id_text(text) == expected


def test_whole_devices_go_by_their_unique_id():
    keys = keys_of([Identity("GPU-18ff", bdf="0000:05:00.0", compute="SPX"), Identity("GPU-2aa", bdf="0000:06:00.0")])
    assert [(key.uuid, key.visible_id, key.partition, key.siblings) for key in keys] == [
        ("GPU-00000000000018ff", "GPU-00000000000018ff", "", 1),
        ("GPU-00000000000002aa", "GPU-00000000000002aa", "", 1),
    ]


def test_devices_without_a_unique_id_go_by_rocrs_index():
    keys = keys_of([Identity("GPU-XX", uuid="u", hip_id=1, bdf="0000:05:00.0"), Identity(bdf="0000:06:00.0", hip_id=0)])
    assert [(key.uuid, key.visible_id) for key in keys] == [("u", "1"), ("BDF-0000:06:00.0", "0")]


def test_partitions_are_devices():
    parts = [Identity("GPU-18ff", "", f"0000:05:00.{i}", i, i, "DPX", "NPS2") for i in range(2)]
    keys = keys_of(parts)
    assert [key.uuid for key in keys] == ["GPU-00000000000018ff.0", "GPU-00000000000018ff.1"]
    assert [key.visible_id for key in keys] == ["0", "1"]  # the id fits both: ROCR would show neither
    assert [key.partition for key in keys] == ["DPX/NPS2/0", "DPX/NPS2/1"]
    assert {(key.gpu, key.siblings) for key in keys} == {("0000:05:00", 2)}


def memories(compute, memory, told_gib, *, model="AMD Instinct MI300X", shown=8):
    """The memory of each logical device that is shown of one GPU, which tell so many GiB each."""
    parts = [Identity("GPU-18ff", "", f"0000:05:00.{i}", i, i, compute, memory) for i in range(shown)]
    return [memory_of(part, key, model, int(told_gib * GIB)) for part, key in zip(parts, keys_of(parts), strict=True)]


@pytest.mark.parametrize(
    ("compute", "memory", "shown", "told", "total", "pools"),
    [
        pytest.param("SPX", "NPS1", 1, 192, 192, [""], id="a whole device"),
        pytest.param("CPX", "NPS4", 8, 48, 48, ["0", "0", "1", "1", "2", "2", "3", "3"], id="two on each quadrant"),
        pytest.param("CPX", "NPS4", 8, 192, 48, ["0", "0", "1", "1", "2", "2", "3", "3"], id="each tells of the whole GPU"),
        pytest.param("CPX", "NPS4", 8, 23.9, 23.9, [""] * 8, id="each tells its own share"),
        pytest.param("CPX", "NPS4", 4, 47.9, 47.9, ["0", "0", "1", "1"], id="half of them are shown"),
        pytest.param("CPX", "NPS1", 8, 191.9, 191.9, ["0"] * 8, id="all on one pool"),
        pytest.param("CPX", "NPS1", 2, 192, 192, ["0"] * 2, id="two of those are shown"),
        pytest.param("QPX", "NPS4", 4, 48, 48, [""] * 4, id="as many parts as devices"),
        pytest.param("DPX", "NPS2", 2, 192, 96, [""] * 2, id="as many parts, and each tells of the whole GPU"),
        pytest.param("DPX", "NPS1", 2, 192, 192, ["0"] * 2, id="two on one pool"),
        pytest.param("CPX", "NPS4", 8, 0, 0, ["0", "0", "1", "1", "2", "2", "3", "3"], id="nothing is told"),
    ],
)
def test_the_memory_of_partitions(compute, memory, shown, told, total, pools):
    found = memories(compute, memory, told, shown=shown)
    assert {(each.total_bytes, each.problem) for each in found} == {(int(total * GIB), "")}
    assert [each.pool for each in found] == [f"0000:05:00/{memory}/{pool}" if pool else "" for pool in pools]
    distinct = {each.pool or str(i): each.total_bytes for i, each in enumerate(found)}
    assert sum(distinct.values()) <= 192 * GIB, "more is promised than there is"


@pytest.mark.parametrize(
    ("compute", "memory", "told", "model", "said"),
    [
        pytest.param("CPX", "NPS3", 48, "AMD Instinct MI300X", "is not known (CPX/NPS3)", id="a mode that cannot be"),
        pytest.param("CPX", "", 48, "AMD Instinct MI300X", "is not known (CPX/?)", id="half of the mode is not told"),
        pytest.param("CPX", "NPS4", 100, "AMD Instinct MI300X", "neither all of it, nor a part", id="no size of it"),
        pytest.param("CPX", "NPS4", 48, "AMD Instinct MI999", "is not known (CPX/NPS4)", id="a model that is not known"),
        pytest.param("QPX", "NPS2", 96, "AMD Instinct MI300X", "is not known (QPX/NPS2)", id="more of them than there can be"),
    ],
)
def test_partitions_of_which_the_memory_cannot_be_told_are_refused(compute, memory, told, model, said):
    assert all(said in each.problem for each in memories(compute, memory, told, model=model))


def test_how_much_memory_a_model_has_must_be_known_to_split_it():
    assert all("use NPS1" in each.problem for each in memories("DPX", "NPS2", 96, model="AMD Instinct MI999", shown=2))


def test_partitions_of_a_model_that_is_not_known_share_all_that_is_told():
    for compute, shown in (("DPX", 2), ("QPX", 4), ("CPX", 8)):
        found = memories(compute, "NPS1", 64, model="AMD Instinct MI999", shown=shown)
        assert {(each.pool, each.problem) for each in found} == {("0000:05:00/NPS1/0", "")}


@given(
    st.lists(
        st.builds(
            Identity,
            unique_id=st.sampled_from(["", "GPU-1", "GPU-2"]),
            uuid=st.sampled_from(["", "u"]),
            bdf=st.sampled_from(["", "0000:05:00.0", "0000:05:00.1"]),
            partition_id=st.integers(0, 2),
            compute=st.sampled_from(["", "SPX", "CPX"]),
        ),
        max_size=8,
    )
)
def test_no_two_devices_ever_share_a_name(identities):
    keys = keys_of(identities)
    assert len({key.uuid for key in keys}) == len(identities)


# --- fleets -----------------------------------------------------------------------------------------------------------


def test_a_fleet_of_two_groups():
    nodes = parse_fleet(" 1x8:MI300X, 4x1:rx7900xtx ")
    assert [node.number for node in nodes] == [0, 1, 2, 3, 4]
    assert [len(node.devices) for node in nodes] == [8, 1, 1, 1, 1]
    first, last = nodes[0].devices[0], nodes[4].devices[0]
    assert (first.memory_bytes, first.architecture, first.vendor) == (192 * GIB, "gfx942", "simulated")
    assert first.model == "AMD Instinct MI300X (simulated)"
    assert (last.uuid, last.memory_bytes, last.architecture) == ("SIM-004-00", 24 * GIB, "gfx1100")
    assert len({each.uuid for node in nodes for each in node.devices}) == 12


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_simulated_and_is_documented(name):
    model = MODELS[name]
    assert parse_fleet(f"1x1:{name}")[0].devices[0].memory_bytes == model.memory_bytes
    docs = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    row = next(line for line in docs.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"{model.memory_bytes // GIB} GiB" in row
    assert row.endswith(f"{model.architecture} |")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "NODESxDEVICES:MODEL"),
        ("2x2", "NODESxDEVICES:MODEL"),
        ("2x2:mi300x,", "NODESxDEVICES:MODEL"),
        ("-1x2:mi300x", "NODESxDEVICES:MODEL"),
        ("99999x1:mi300x", "NODESxDEVICES:MODEL"),
        ("2x2:mi300", "did you mean 'mi300"),
        ("2x2:voodoo", "known: .*mi300x"),
        ("0x2:mi300x", "from 1 to 256 nodes"),
        ("200x1:mi300x,57x1:h100", "from 1 to 256 nodes"),
        ("1x0:mi300x", "from 1 to 64 devices"),
        ("1x65:mi300x", "from 1 to 64 devices"),
        ("1x9:mi300x/cpx-nps4", "from 1 to 64 devices, and this makes 72"),
        ("1x8:mi300x/cpx", "NODESxDEVICES:MODEL"),
        ("1x8:mi300x/cpx-nps3", "known: spx-nps1, dpx-nps1, .*cpx-nps4"),
        ("1x8:mi300x/tpx-nps1", "cannot be split into tpx-nps1"),
        ("1x8:mi300a/cpx-nps4", "cannot be split into cpx-nps4"),
        ("1x8:h100/cpx-nps4", "'h100' cannot be split into cpx-nps4: leave that out"),
    ],
)
def test_a_wrong_fleet_says_what_would_be_right(text, told):
    with pytest.raises(ValueError, match=told):
        parse_fleet(text)
