"""The simulated driver: what processes hold is what is read, and a device never holds more than it has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manager.core.devices import ProcessUse, parse_fleet
from manager.core.quantities import GIB
from plugins.node.devices.interface import DeviceError
from plugins.node.devices.simulated import DeviceFault, Faults, SimulatedSource, write_faults
from plugins.node.functions.device_memory import DeviceMemoryError, hold, holds_of, process_start

NODE = parse_fleet("1x2:w7900")[0]
TOTAL = 48 * GIB


@pytest.fixture
def source(tmp_path):
    made = SimulatedSource(NODE, tmp_path)
    made.discover()
    return made


@pytest.fixture
def visible(source, monkeypatch):
    """This process sees the first device, as an executor does."""
    for name, value in source.visibility(NODE.devices[:1]).items():
        monkeypatch.setenv(name, value)
    return source


def used(source):
    return [reading.used_bytes for reading in source.read()]


HOLDER = """
import sys
from plugins.node.functions.device_memory import hold
with hold(int(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(source, size, devices=NODE.devices[:1]):
    """Another process that holds `size` bytes until its input closes."""
    root = str(Path(__file__).parents[2])
    env = os.environ | source.visibility(devices) | {"PYTHONPATH": root}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(size)], env=env, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_an_idle_node_reads_as_empty(source):
    for reading in source.read():
        assert (reading.used_bytes, reading.healthy, reading.utilisation_ratio) == (0, True, 0.0)
        assert (reading.processes, reading.processes_known) == ((), True)


def test_held_memory_is_read_with_its_process_and_given_back(visible):
    with hold(3 * GIB) as devices, hold(GIB):
        assert devices == ("SIM-000-00",)
        first, second = visible.read()
        assert (first.used_bytes, second.used_bytes) == (4 * GIB, 0)
        assert first.processes == (ProcessUse(os.getpid(), 4 * GIB),)
        assert first.utilisation_ratio == 1.0
    assert used(visible) == [0, 0]


def test_memory_is_given_back_when_the_block_fails(visible):
    with pytest.raises(KeyError), hold(GIB):
        raise KeyError
    assert used(visible) == [0, 0]


def test_a_process_that_sees_two_devices_holds_on_both(source, monkeypatch):
    for name, value in source.visibility(NODE.devices).items():
        monkeypatch.setenv(name, value)
    with hold(GIB):
        assert used(source) == [GIB, GIB]


def test_a_device_holds_no_more_than_it_has_whoever_holds_it(visible):
    with start_holder(visible, 40 * GIB) as other:
        with pytest.raises(DeviceMemoryError, match="out of device memory on SIM-000-00"), hold(9 * GIB):
            pass
        with hold(8 * GIB):
            assert used(visible) == [TOTAL, 0]
        other.kill()
    with hold(TOTAL):
        assert used(visible) == [TOTAL, 0]


def test_a_hold_on_two_devices_is_all_or_nothing(source, monkeypatch):
    for name, value in source.visibility(NODE.devices).items():
        monkeypatch.setenv(name, value)
    with start_holder(source, TOTAL, NODE.devices[1:]) as other:
        with pytest.raises(DeviceMemoryError), hold(1):
            pass
        assert used(source) == [0, TOTAL]
        other.stdin.close()
    assert used(source) == [0, 0]


def test_a_killed_process_holds_nothing_even_before_it_is_waited_for(source):
    process = start_holder(source, GIB)
    assert used(source) == [GIB, 0]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert used(source) == [0, 0]
    process.communicate()


def test_a_process_id_that_is_used_again_does_not_inherit(source, tmp_path):
    record = {"start": "1", "bytes": {"SIM-000-00": GIB}}
    (tmp_path / "processes" / f"{os.getpid()}.json").write_text(json.dumps(record))
    assert process_start(os.getpid()) != "1"
    assert holds_of(tmp_path) == []
    assert used(source) == [0, 0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"start": "1"}', '{"start": "1", "bytes": 7}'])
def test_a_broken_record_of_a_process_is_passed_over(source, tmp_path, content):
    (tmp_path / "processes" / f"{os.getpid()}.json").write_text(content)
    assert used(source) == [0, 0]


def test_a_forked_child_does_not_give_back_what_its_parent_holds(visible):
    with hold(GIB):
        child = os.fork()
        if child == 0:
            try:
                with hold(GIB):
                    pass
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert used(visible) == [GIB, 0]


def test_foreign_memory_takes_room(visible, tmp_path):
    write_faults(tmp_path, Faults(devices={"SIM-000-00": DeviceFault(foreign_bytes=40 * GIB)}))
    with pytest.raises(DeviceMemoryError), hold(9 * GIB):
        pass
    with hold(8 * GIB):
        first = visible.read()[0]
        assert first.used_bytes == TOTAL
        assert sum(use.memory_bytes for use in first.processes) == 8 * GIB


def test_a_missing_device_is_unhealthy_then_not_discovered_and_cannot_be_held(visible, tmp_path):
    write_faults(tmp_path, Faults(devices={"0": DeviceFault(missing=True)}))
    assert [reading.healthy for reading in visible.read()] == [False, True]
    with pytest.raises(DeviceMemoryError, match="does not answer"), hold(1):
        pass
    assert [device.index for device in visible.discover()] == [1]


def test_a_driver_error_is_raised(source, tmp_path):
    write_faults(tmp_path, Faults(error="driver not loaded"))
    with pytest.raises(DeviceError, match="driver not loaded"):
        source.read()


@pytest.mark.parametrize("text", ['{"hnag": true}', '{"devices": {"0": {"foreign": 1}}}', "{", "7"])
def test_a_mistyped_fault_shows_as_an_error(source, tmp_path, text):
    (tmp_path / "faults.json").write_text(text)
    with pytest.raises(DeviceError, match=r"faults\.json cannot be understood"):
        source.read()


def test_a_wrong_figure_does_not_come_through(source, tmp_path):
    write_faults(tmp_path, Faults(devices={"1": DeviceFault(used_bytes=0xFFFFFFFF, temperature_celsius=61_000)}))
    first, second = source.read()
    assert first.healthy
    assert (second.healthy, second.used_bytes, second.temperature_celsius) == (False, TOTAL, None)


def test_a_closed_source_answers_nothing(source):
    source.close()
    with pytest.raises(DeviceError, match="shut down"):
        source.read()
    with pytest.raises(DeviceError, match="shut down"):
        source.discover()


def test_state_outlives_a_restart_of_the_source(visible, tmp_path):
    with hold(GIB):
        visible.close()
        again = SimulatedSource(NODE, tmp_path)
        again.discover()
        assert used(again) == [GIB, 0]


def test_holding_without_devices_says_so(monkeypatch):
    monkeypatch.delenv("ROCYARD_SIMULATED_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceMemoryError, match="needs torch"), hold(1):
        pass
    none = StubTorch()
    none.device_count = lambda: 0
    monkeypatch.setitem(sys.modules, "torch", none)
    with pytest.raises(DeviceMemoryError, match="sees no device"), hold(1):
        pass


def test_holding_where_the_folder_is_gone_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("ROCYARD_SIMULATED_DEVICES", "SIM-000-00")
    monkeypatch.setenv("ROCYARD_SIMULATED_DIR", str(tmp_path / "gone"))
    with pytest.raises(DeviceMemoryError, match="are gone"), hold(1):
        pass


def test_holding_where_the_folder_is_not_told_or_not_a_nodes_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("ROCYARD_SIMULATED_DEVICES", "SIM-000-00")
    monkeypatch.delenv("ROCYARD_SIMULATED_DIR", raising=False)
    with pytest.raises(DeviceMemoryError, match="ROCYARD_SIMULATED_DIR is not"), hold(1):
        pass
    monkeypatch.setenv("ROCYARD_SIMULATED_DIR", str(tmp_path))
    with pytest.raises(DeviceMemoryError, match=r"devices\.json cannot be read"), hold(1):
        pass


def test_a_negative_size_is_refused(visible):
    with pytest.raises(ValueError, match="-1"), hold(-1):
        pass


class StubTorch:
    """Just enough of torch to see what is asked of it: two devices of 10 bytes."""

    uint8 = "uint8"

    def __init__(self):
        self.log = []
        self.cuda = self
        self.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})

    def device_count(self):
        return 2

    def get_device_name(self, index):
        return f"stub {index}"

    def empty(self, size, dtype, device):
        if size > 10:
            raise self.OutOfMemoryError("HIP out of memory")
        self.log.append((size, dtype, device))
        return object()

    def empty_cache(self):
        self.log.append("given back")


def test_on_real_devices_torch_holds_the_memory_on_each(monkeypatch):
    torch = StubTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("ROCYARD_SIMULATED_DEVICES", raising=False)
    with hold(7) as devices:
        assert devices == ("stub 0", "stub 1")
        assert torch.log == [(7, "uint8", "cuda:0"), (7, "uint8", "cuda:1")]
    assert torch.log[-1] == "given back"
    with pytest.raises(DeviceMemoryError, match="HIP out of memory"), hold(11):
        pass
