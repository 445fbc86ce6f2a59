"""Devices that share their memory: a simulated fleet of partitioned GPUs, what can be placed on it, and its readings."""

import json
import os

import pytest

from manager.core.devices import parse_fleet
from manager.core.index import Index
from manager.core.model import NodeInfo
from manager.core.node_kinds import kind_of, node_kind
from manager.core.placement import Placed, place
from manager.core.policies import BEST_FIT
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from plugins.node.devices.simulated import DeviceFault, Faults, SimulatedSource, write_faults
from plugins.node.functions.device_memory import DeviceMemoryError, hold, process_start


def split(mode):
    return parse_fleet(f"1x8:mi300x/{mode}")[0].devices


@pytest.mark.parametrize(
    ("mode", "devices", "gib", "pools", "each"),
    [
        ("spx-nps1", 8, 192, 8, 1),
        ("dpx-nps2", 16, 96, 16, 1),
        ("qpx-nps4", 32, 48, 32, 1),
        ("dpx-nps1", 16, 192, 8, 2),
        ("cpx-nps4", 64, 48, 32, 2),
        ("cpx-nps2", 64, 96, 16, 4),
        ("cpx-nps1", 64, 192, 8, 8),
    ],
)
def test_a_partitioned_fleet(mode, devices, gib, pools, each):
    found = split(mode)
    assert len({device.uuid for device in found}) == devices
    assert [device.index for device in found] == list(range(devices))
    assert {device.memory_bytes for device in found} == {gib * GIB}
    keys = [device.pool_key for device in found]
    assert len(set(keys)) == pools
    assert {keys.count(key) for key in keys} == {each}
    totals = {device.pool_key: device.memory_bytes for device in found}
    assert sum(totals.values()) == 8 * 192 * GIB
    if each == 1:
        assert not any(device.pool for device in found)


def test_the_names_of_partitions():
    third = split("cpx-nps4")[2]
    assert (third.uuid, third.partition, third.pool) == ("SIM-000-00.2", "CPX/NPS4/2", "SIM-000-00/NPS4/1")
    whole = parse_fleet("1x1:mi300x/spx-nps1")
    assert whole == parse_fleet("1x1:mi300x")


def test_a_node_of_eight_mi300x_in_cpx_nps4_holds_64_slots_of_24_gib_two_on_each_pool_and_a_65th_waits():
    devices = split("cpx-nps4")
    index = Index()
    index.add_node("a", "i1", devices, 0, 100)
    need = Resources(24 * GIB)
    for number in range(64):
        placed = place(need, index, BEST_FIT)
        assert isinstance(placed, Placed), number
        index.lease(f"s{number}", placed.grant)
    assert not isinstance(place(need, index, BEST_FIT), Placed)
    pools = index.nodes["a"].pools
    assert [(len(pool.leases), pool.free_bytes) for pool in pools.values()] == [(2, 0)] * 32
    index.free("s7")
    assert isinstance(place(need, index, BEST_FIT), Placed)


# --- the simulated driver ---------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, monkeypatch):
    node = parse_fleet("1x1:mi300x/cpx-nps4")[0]
    made = SimulatedSource(node, tmp_path)
    for name, value in made.visibility(made.discover()[1:2]).items():
        monkeypatch.setenv(name, value)
    return made


def test_each_device_of_a_pool_reads_what_the_pool_holds(source, tmp_path):
    write_faults(tmp_path, Faults(devices={"0": DeviceFault(foreign_bytes=5 * GIB)}))
    with hold(10 * GIB):
        readings = source.read()
    assert [reading.used_bytes for reading in readings] == [15 * GIB, 15 * GIB] + [0] * 6
    assert [[use.pid for use in reading.processes] for reading in readings] == [[os.getpid()]] * 2 + [[]] * 6
    assert [reading.utilisation_ratio for reading in readings[:3]] == [0, 1, 0], "the other one does not compute"


def test_no_more_is_held_than_the_pool_has(source, tmp_path):
    record = {"start": process_start(os.getppid()), "bytes": {"SIM-000-00.0": 30 * GIB}}
    (tmp_path / "processes" / f"{os.getppid()}.json").write_text(json.dumps(record))
    refusal = "on SIM-000-00/NPS4/0: 20401094656 bytes asked, 19327352832 of 51539607552 free"
    with pytest.raises(DeviceMemoryError, match=refusal), hold(19 * GIB):
        pass
    with hold(18 * GIB):
        assert source.read()[0].used_bytes == 48 * GIB


def test_who_has_both_devices_of_a_pool_needs_room_for_both(source, monkeypatch):
    monkeypatch.setenv("ROCYARD_SIMULATED_DEVICES", "SIM-000-00.0,SIM-000-00.1")
    with pytest.raises(DeviceMemoryError, match="SIM-000-00/NPS4/0"), hold(25 * GIB):
        pass
    with hold(24 * GIB):
        assert source.read()[0].used_bytes == 48 * GIB


@pytest.mark.parametrize("mode", ["spx-nps1", "dpx-nps2", "qpx-nps4", "cpx-nps4", "cpx-nps1"])
def test_a_group_is_what_its_nodes_turn_out_to_be(mode):
    info = NodeInfo(hostname="h", pid=1, source="simulated", version="1", devices=split(mode), reserve_bytes=GIB)
    expected, found = kind_of(info).devices, node_kind(f"8:mi300x/{mode}", GIB).devices
    assert [(each.memory_bytes, each.pool, each.architecture) for each in found] == [
        (each.memory_bytes, each.pool, each.architecture) for each in expected
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("9:mi300x/cpx-nps4", "from 1 to 64 devices"),
        ("2:192gib/cpx-nps4", "'192gib' cannot be split into cpx-nps4: leave that out"),
        ("2:mi300x/cpx-nps3", "known: spx-nps1"),
        ("2:mi300x/cpx", "COUNT:MODEL"),
    ],
)
def test_a_group_that_cannot_be_says_what_would_be_right(text, told):
    with pytest.raises(ValueError, match=told):
        node_kind(text)
