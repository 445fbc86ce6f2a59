"""What every source of devices keeps to, through the prober and its child process: the simulated one, and AMD's and
NVIDIA's over fake drivers under the real Python packages.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fake_amdsmi"))

from fake_drivers import RIGS, TOTAL, AmdRig, NvidiaRig, SimulatedRig, build  # noqa: E402

from manager.core.devices import ProcessUse  # noqa: E402
from manager.core.quantities import GIB  # noqa: E402
from plugins.node.devices import probe as probe_module  # noqa: E402
from plugins.node.devices.probe import Prober, Simulated, detect  # noqa: E402
from plugins.node.functions.device_memory import process_start  # noqa: E402

OWN = os.getpid()


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake_drivers"))


@pytest.fixture(params=list(RIGS))
def rig(request, tmp_path):
    libraries = None if request.param == "simulated" else request.getfixturevalue("libraries")
    return RIGS[request.param](tmp_path, libraries)


@pytest.fixture
def amd(tmp_path, libraries):
    return AmdRig(tmp_path, libraries)


@pytest.fixture
def nvidia(tmp_path, libraries):
    return NvidiaRig(tmp_path, libraries)


@contextlib.asynccontextmanager
async def probing(rig, **options):
    prober = rig.prober(**options)
    try:
        yield prober
    finally:
        child = prober._child
        await prober.close()
        assert child is None or not alive(child.pid)


@pytest.fixture
async def prober(rig):
    async with probing(rig) as made:
        yield made


def alive(pid):
    return process_start(pid) is not None


async def until(condition, what, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def complete(prober, seconds=20):
    """The next complete look: with a short deadline, a child that starts on a busy machine needs several."""
    deadline = time.monotonic() + seconds
    while not (probe := await prober.probe()).complete:
        assert time.monotonic() < deadline, probe.error
        await asyncio.sleep(0.01)
    return probe


async def read(prober):
    """The two readings of a look that must be complete."""
    probe = await prober.probe()
    assert probe.complete, probe.error
    assert not probe.error
    assert [each.uuid for each in probe.readings] == [each.uuid for each in probe.devices]
    return probe.readings


# --- all sources ------------------------------------------------------------------------------------------------------


async def test_devices_have_distinct_names_and_all_their_memory(prober):
    probe = await prober.probe()
    assert probe.complete, probe.error
    first, second = probe.devices
    assert (first.index, second.index) == (0, 1)
    assert (first.memory_bytes, second.memory_bytes) == (TOTAL, TOTAL)
    assert first.vendor == second.vendor == prober.kind
    assert first.uuid != second.uuid
    assert first.visible_id != second.visible_id
    assert first.model
    assert first.architecture
    assert first.partition == ""
    assert [(reading.used_bytes, reading.healthy) for reading in probe.readings] == [(0, True), (0, True)]


async def test_names_are_the_same_after_a_restart(rig):
    names = []
    for _ in range(2):
        async with probing(rig) as prober:
            names.append([each.uuid for each in (await prober.probe()).devices])
    assert names[0] == names[1]


async def test_memory_and_processes_are_read_live(rig, prober):
    assert [each.used_bytes for each in await read(prober)] == [0, 0]
    rig.set(1, processes=[(OWN, 5 * GIB)])
    first, second = await read(prober)
    assert (first.used_bytes, first.processes, first.processes_known) == (0, (), True)
    assert (second.used_bytes, second.processes, second.processes_known) == (5 * GIB, (ProcessUse(OWN, 5 * GIB),), True)
    rig.set(0, processes=[(OWN, GIB)])
    assert [each.used_bytes for each in await read(prober)] == [GIB, 5 * GIB]


async def test_figures_come_in_base_units(rig, prober):
    rig.set(0, activity=37, temperature=61, power=412)
    first, _ = await read(prober)
    assert first.utilisation_ratio == pytest.approx(0.37)
    assert first.temperature_celsius == pytest.approx(61)
    assert first.power_watts == pytest.approx(412)


@pytest.mark.parametrize("used", [TOTAL + 4096, 0xFFFFFFFF])
async def test_memory_that_cannot_be_true_makes_the_device_unhealthy_and_leaves_no_room(rig, prober, used):
    rig.set(0, used=used)
    first, second = await read(prober)
    assert (first.healthy, first.used_bytes) == (False, TOTAL)
    assert "cannot be true" in first.problem
    assert second.healthy


async def test_another_figure_that_cannot_be_true_is_dropped_alone(rig, prober):
    rig.set(0, activity=250, temperature=61_000)
    first, _ = await read(prober)
    assert first.healthy
    assert (first.utilisation_ratio, first.temperature_celsius) == (None, None)


async def test_a_device_whose_memory_may_not_be_read_is_unhealthy_alone(rig, prober):
    rig.set(0, **{"error.used": getattr(rig, "no_permission", 0)})
    first, second = await read(prober)
    assert not first.healthy
    assert "permission" in first.problem.lower()
    assert second.healthy


async def test_processes_that_may_not_be_seen_are_unknown_not_none(rig, prober):
    rig.set(0, processes=[(OWN, GIB)], hidden=True)
    first, _ = await read(prober)
    assert (first.used_bytes, first.healthy) == (GIB, True)
    assert (first.processes, first.processes_known) == ((), False)


async def test_a_device_that_vanishes_stays_in_the_inventory_and_comes_back(rig):
    async with probing(rig, rediscover_s=0.0) as prober:
        before = (await prober.probe()).devices
        rig.set(0, missing=True)
        for _ in range(3):  # the reading fails, then the driver is opened anew and does not show it, or shows it sick
            probe = await prober.probe()
            by_uuid = dict(zip([each.uuid for each in probe.devices], probe.readings, strict=True))
            assert set(by_uuid) == {each.uuid for each in before}
            assert [by_uuid[each.uuid].healthy for each in before] == [False, True]
        rig.set(0, missing=False)
        await prober.probe()
        probe = await prober.probe()
        assert all(each.healthy for each in probe.readings)
        assert {each.uuid for each in probe.devices} == {each.uuid for each in before}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


async def test_a_driver_that_hangs_costs_one_child_and_the_last_reading_stands_in(rig):
    clock = Clock()
    async with probing(rig, deadline_s=0.4, clock=clock) as prober:
        good = await complete(prober)
        first_child = prober._child.pid
        rig.set(hang=True)
        began = time.monotonic()
        probe = await prober.probe()
        assert time.monotonic() - began < 10
        assert prober.hung
        assert "did not answer within 0.4 s" in probe.error
        assert (probe.complete, probe.devices, probe.readings) == (False, good.devices, good.readings)
        assert not alive(first_child)
        for _ in range(5):  # within the back-off nothing is started
            assert not (await prober.probe()).complete
            assert prober._child is None
        clock.now += 31
        assert [each.healthy for each in (await prober.probe()).readings] == [False, False]
        assert prober._child is not None  # the one that is tried after the pause
        rig.set(hang=False)
        assert (await complete(prober)).readings == good.readings
        assert not prober.hung
        assert prober.failures == 0


async def test_a_driver_that_hangs_from_the_start_is_not_complete(rig, monkeypatch):
    monkeypatch.setattr(probe_module, "START_S", 0.6)
    rig.set(hang=True)
    async with probing(rig, deadline_s=0.4) as prober:
        probe = await prober.probe()
        child = prober._child.pid
        assert (probe.devices, probe.complete, probe.error) == ((), False, f"the {rig.kind} driver is still starting")
        assert prober.starting
        probe = await prober.probe()
        assert (probe.devices, probe.complete, prober.hung, prober.starting) == ((), False, True, False)
        assert "did not answer within 0.6 s" in probe.error
        assert not alive(child)


async def test_a_driver_that_starts_slowly_is_waited_for_over_several_looks(rig):
    rig.set(hang=True)
    async with probing(rig, deadline_s=0.4) as prober:
        for _ in range(2):
            assert "still starting" in (await prober.probe()).error
            child = prober._child.pid
        rig.set(hang=False)
        assert (await complete(prober)).devices
        assert prober._child.pid == child


async def test_a_driver_that_fails_is_told_and_the_child_lives_on(rig):
    clock = Clock()
    async with probing(rig, clock=clock) as prober:
        rig.set(error=True)
        probe = await prober.probe()
        assert (probe.devices, probe.complete) == ((), False)
        assert "driver" in probe.error.lower() or "nvml" in probe.error.lower()
        child = prober._child.pid
        rig.all.pop("error")
        rig.write()
        assert (await prober.probe()).complete
        assert prober._child.pid == child


async def test_a_killed_child_is_replaced_after_a_pause(rig):
    clock = Clock()
    async with probing(rig, clock=clock) as prober:
        good = await prober.probe()
        os.kill(prober._child.pid, signal.SIGKILL)
        probe = await prober.probe()
        assert (probe.complete, probe.readings) == (False, good.readings)
        assert "ended with -9" in probe.error
        assert not prober.hung
        clock.now += 1
        assert (await prober.probe()).complete


@pytest.mark.parametrize("rig", ["amd", "nvidia"], indirect=True)
async def test_pids_that_mean_other_processes_here_are_not_attributed(rig):
    rig.set(0, processes=[(OWN, GIB)])
    async with probing(rig, match_pids=False) as prober:
        first, _ = await read(prober)
    assert (first.used_bytes, first.healthy) == (GIB, True)
    assert (first.processes, first.processes_known) == ((), False)


async def test_visibility_names_devices_as_the_driver_does(rig, prober):
    devices = (await prober.probe()).devices
    variables = prober.visibility(devices[1:])
    assert devices[1].visible_id in variables.values()
    assert devices[0].visible_id not in " ".join(variables.values())


# --- the prober -------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(tmp_path):
    return SimulatedRig(tmp_path, None)


async def test_while_a_child_cannot_be_killed_no_other_one_is_started(simulated, monkeypatch):
    clock = Clock()
    async with probing(simulated, deadline_s=0.3, clock=clock) as prober:
        good = await complete(prober)
        child = prober._child
        simulated.set(hang=True)
        kill = child.kill

        async def cannot(self, wait_s=0):
            return False

        monkeypatch.setattr(type(child), "kill", cannot)
        for _ in range(3):
            clock.now += 5
            probe = await prober.probe()
            assert (probe.complete, probe.readings) == (False, good.readings)
            assert f"process {child.pid} cannot be killed" in probe.error
            assert prober._child is None
        monkeypatch.undo()
        assert await kill()
        simulated.set(hang=False)
        clock.now += 31
        assert (await complete(prober)).devices


async def test_the_answer_of_a_cancelled_look_is_not_taken_for_that_of_the_next(simulated):
    async with probing(simulated) as prober:
        await prober.probe()
        simulated.set(hang=True)
        task = asyncio.create_task(prober.probe())
        await until(lambda: prober._question is not None, "the look does not start")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        simulated.set(hang=False)
        await until(prober._question.done, "the child does not answer")
        simulated.set(0, processes=[(OWN, GIB)])
        assert (await read(prober))[0].used_bytes == GIB


async def test_looks_take_turns(simulated):
    async with probing(simulated) as prober:
        probes = await asyncio.gather(*(prober.probe() for _ in range(10)))
        assert all(probe == probes[0] for probe in probes)


async def test_a_child_that_cannot_start_says_why(simulated, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho ModuleNotFoundError: plugins >&2\nexit 3\n")
    broken.chmod(0o700)
    for executable, told in (
        (broken, "ended with 3: ModuleNotFoundError"),
        (tmp_path / "nothing", "cannot be started"),
    ):
        monkeypatch.setattr(sys, "executable", str(executable))
        async with probing(simulated) as prober:
            assert told in (await prober.probe()).error


async def test_a_node_that_the_fleet_lacks_is_an_error(tmp_path):
    prober = Prober("simulated", simulated=Simulated("2x2:mi300x", 2, tmp_path))
    probe = await prober.probe()
    await prober.close()
    assert "has no node 2: it has 2" in probe.error


async def test_the_child_sees_none_of_our_settings(simulated):
    prober = Prober(
        "simulated",
        simulated=Simulated("1x2:mi300x", 0, simulated.folder),
        env=dict(os.environ) | {"ROCYARD_STORE__URL": "redis://:secret@127.0.0.1"},
    )
    assert (await prober.probe()).complete
    environ = await asyncio.to_thread(Path(f"/proc/{prober._child.pid}/environ").read_bytes)
    assert b"PATH=" in environ
    assert b"secret" not in environ
    await prober.close()


AGENT = """
import asyncio, sys
from pathlib import Path
from plugins.node.devices.probe import Prober, Simulated

async def main():
    prober = Prober("simulated", simulated=Simulated("1x1:mi300x", 0, Path(sys.argv[1])))
    await prober.probe()
    print(prober._child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("hanging", [False, True])
async def test_the_child_ends_with_its_agent_even_while_the_driver_hangs(simulated, hanging):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", AGENT, str(simulated.folder)]
    agent = await asyncio.create_subprocess_exec(*arguments, env=env, stdout=subprocess.PIPE)
    child = int(await agent.stdout.readline())
    if hanging:
        os.kill(child, signal.SIGSTOP)  # it will not see the end of its input
    assert alive(child)
    agent.kill()
    await agent.wait()
    await until(lambda: not alive(child), "the child outlived its agent")


# --- detection --------------------------------------------------------------------------------------------------------


async def test_detection_prefers_amd_then_nvidia_then_the_simulation(amd, nvidia, tmp_path):
    simulation = Simulated("1x1:mi300x", 0, tmp_path / "sim")
    nowhere = {name: value for name, value in amd.env().items() if name != "LD_LIBRARY_PATH"}
    only_nvidia = tmp_path / "lib"
    only_nvidia.mkdir()
    (only_nvidia / "libnvidia-ml.so.1").symlink_to(nvidia.libraries / "libnvidia-ml.so.1")
    assert (await detect("auto", simulation, amd.env() | nvidia.env())).kind == "amd"
    detection = await detect("auto", simulation, nvidia.env() | {"LD_LIBRARY_PATH": str(only_nvidia)})
    assert detection.kind == "nvidia"
    assert [each.kind for each in detection.rejected] == ["amd"]
    assert "libamd_smi.so" in detection.rejected[0].reason
    detection = await detect("auto", simulation, nowhere)
    assert detection.kind == "simulated"
    assert [each.kind for each in detection.rejected] == ["amd", "nvidia"]
    assert all(each.reason for each in detection.rejected)
    assert (await detect("nvidia", None)).kind == "nvidia"  # what was asked for is not second-guessed


async def test_a_node_whose_amd_driver_hangs_is_an_amd_node(amd, monkeypatch):
    monkeypatch.setattr(probe_module, "START_S", 0.6)
    amd.set(hang=True)
    assert (await detect("auto", None, amd.env(), deadline_s=0.6)).kind == "amd"


# --- AMD --------------------------------------------------------------------------------------------------------------


async def test_amd_devices_are_described_as_amdsmi_describes_them(amd):
    async with probing(amd) as prober:
        first, second = (await prober.probe()).devices
    assert (first.uuid, first.visible_id) == ("GPU-18ff74a1fc0fa5d0", "GPU-18ff74a1fc0fa5d0")
    assert (first.model, first.architecture, first.bdf) == ("AMD Instinct MI300X", "gfx942", "0000:05:00.0")
    assert (second.uuid, second.bdf) == ("GPU-18ff74a1fc0fa5d1", "0000:06:00.0")
    assert prober.visibility([second, first]) == {"ROCR_VISIBLE_DEVICES": "GPU-18ff74a1fc0fa5d1,GPU-18ff74a1fc0fa5d0"}


async def test_amd_figures_fall_back_to_what_the_card_has(amd):
    amd.set(0, sensor=0, temperature=47, power=0xFFFF, socket_power=300)  # an older card: EDGE only
    amd.set(1, power=0xFFFF, activity=0xFFFF)
    async with probing(amd) as prober:
        first, second = await read(prober)
    assert (first.temperature_celsius, first.power_watts) == (47, 300)
    assert (second.utilisation_ratio, second.power_watts, second.healthy, second.problem) == (None, None, True, "")


async def test_amd_partitions_are_devices_and_only_the_first_tells_its_activity(amd):
    for index in range(2):
        amd.set(index, bus=5, function=index, partition=index, compute="DPX", memory="NPS2", activity=50,
                hip_uuid="GPU-18ff74a1fc0fa5da")  # fmt: skip
    async with probing(amd) as prober:
        probe = await prober.probe()
    assert [each.uuid for each in probe.devices] == ["GPU-18ff74a1fc0fa5da.0", "GPU-18ff74a1fc0fa5da.1"]
    assert [each.partition for each in probe.devices] == ["DPX/NPS2/0", "DPX/NPS2/1"]
    assert [each.visible_id for each in probe.devices] == ["0", "1"]
    assert [each.utilisation_ratio for each in probe.readings] == [0.5, None]
    assert all(each.healthy for each in probe.readings)
    # Each tells of the whole GPU's memory, of which it has half.
    assert [(each.memory_bytes, each.pool) for each in probe.devices] == [(TOTAL // 2, "")] * 2


async def test_amd_partitions_that_share_memory_are_of_one_pool(amd):
    for index in range(2):
        amd.set(index, bus=5, function=index, partition=index, compute="DPX", memory="NPS1")
    async with probing(amd) as prober:
        probe = await prober.probe()
    assert [each.healthy for each in probe.readings] == [True, True]
    assert [(each.memory_bytes, each.pool) for each in probe.devices] == [(TOTAL, "0000:05:00/NPS1/0")] * 2


async def test_amd_partitions_of_which_the_memory_cannot_be_told_are_refused(amd):
    for index in range(2):
        amd.set(index, bus=5, function=index, partition=index, compute="DPX", memory="NPS4")
    async with probing(amd) as prober:
        readings = await read(prober)
    assert [each.healthy for each in readings] == [False, False]
    assert "DPX/NPS4" in readings[0].problem


async def test_amd_memory_that_is_not_told_at_first_is_known_once_it_is(amd):
    amd.set(0, **{"error.total": 10})
    async with probing(amd, rediscover_s=0.0) as prober:
        probe = await prober.probe()
        assert (probe.devices[0].memory_bytes, probe.readings[0].healthy) == (0, False)
        assert "code 10" in probe.readings[0].problem
        amd.devices[0].pop("error.total")
        amd.write()
        await prober.probe()
        probe = await prober.probe()
        assert (probe.devices[0].memory_bytes, probe.readings[0].healthy) == (TOTAL, True)


@pytest.fixture
def other_version(libraries, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    subprocess.run(["gcc", "-shared", "-o", folder / "libamd_smi.so", "-x", "c", os.devnull], check=True, timeout=30)
    return folder


async def test_a_library_of_another_version_is_told(amd, other_version):
    async with probing(amd, env=amd.env() | {"LD_LIBRARY_PATH": str(other_version)}) as prober:
        probe = await prober.probe()
    assert "AttributeError" in probe.error
    assert "undefined symbol" in probe.error


def run_on(rig, script, *arguments):
    """What a script prints that runs on a rig's driver."""
    env = rig.env() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True,
                          timeout=30, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


SHIPPED = """
import sys
from pathlib import Path
from plugins.node.devices.amd import load_amdsmi
print(load_amdsmi(Path(sys.argv[1])).__file__, str(sys.argv[1]) in " ".join(sys.path))
"""


@pytest.mark.parametrize(("content", "ours"), [("pass", True), ("raise KeyError('libamd_smi.so')", False)])
def test_the_package_that_rocm_ships_is_preferred_if_it_loads(amd, tmp_path, content, ours):
    package = tmp_path / "rocm" / "share" / "amd_smi" / "amdsmi"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    (line,) = run_on(amd, SHIPPED, str(tmp_path / "rocm"))
    file, left_on_path = line.split()
    assert (file == str(package / "__init__.py")) is ours
    assert left_on_path == "False"


AFTER_CLOSE = """
from pathlib import Path
from plugins.node.devices.amd import AmdSource
from plugins.node.devices.nvidia import NvidiaSource
from plugins.node.devices.interface import DeviceError
import sys
source = AmdSource(Path("/nowhere")) if sys.argv[1] == "amd" else NvidiaSource()
devices = source.discover()
assert len(devices) == len(source.read()) == 2
source.close()
source.close()
for call in (source.discover, source.read):
    try:
        call()
        print("no error")
    except DeviceError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["amd", "nvidia"])
def test_a_closed_source_answers_nothing(request, kind):
    lines = run_on(request.getfixturevalue(kind), AFTER_CLOSE, kind)
    assert len(lines) == 2
    assert all("is shut down" in line for line in lines)


AFTER_SHUTDOWN = """
import amdsmi
amdsmi.amdsmi_init()
handle = amdsmi.amdsmi_get_processor_handles()[0]
print(amdsmi.amdsmi_get_gpu_memory_total(handle, amdsmi.AmdSmiMemoryType.VRAM))
amdsmi.amdsmi_shut_down()
try:
    amdsmi.amdsmi_get_gpu_memory_total(handle, amdsmi.AmdSmiMemoryType.VRAM)
except amdsmi.AmdSmiLibraryException as error:
    print(error.get_error_code())
"""


def test_amdsmi_itself_says_not_initialised_after_its_shutdown(amd):
    assert run_on(amd, AFTER_SHUTDOWN) == [str(TOTAL), "32"]


SIZES = """
import ctypes, sys
if sys.argv[1] == "amd":
    from amdsmi import amdsmi_wrapper as types
    library = types._libraries["libamd_smi.so"]
    names = {"asic_info_t": "amdsmi_asic_info_t", "power_info_t": "amdsmi_power_info_t", "bdf_t": "amdsmi_bdf_t",
             "engine_usage_t": "amdsmi_engine_usage_t", "enumeration_info_t": "amdsmi_enumeration_info_t",
             "kfd_info_t": "amdsmi_kfd_info_t", "proc_info_t": "amdsmi_proc_info_t"}
else:
    import pynvml as types
    library = ctypes.CDLL("libnvidia-ml.so.1")
    names = {"memory_t": "c_nvmlMemory_t", "utilization_t": "c_nvmlUtilization_t", "pci_t": "nvmlPciInfo_t",
             "process_t": "c_nvmlProcessInfo_v3_t", "temperature_t": "c_nvmlTemperature_v1_t"}
for name, their_name in names.items():
    print(name, ctypes.sizeof(getattr(types, their_name)), getattr(library, "fake_sizeof_" + name)())
"""


@pytest.mark.parametrize(("kind", "count"), [("amd", 7), ("nvidia", 5)])
def test_the_fakes_structures_are_as_large_as_the_packages(request, kind, count):
    lines = [line.split() for line in run_on(request.getfixturevalue(kind), SIZES, kind)]
    assert len(lines) == count
    assert [line[1] for line in lines] == [line[2] for line in lines], lines


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


async def test_nvidia_devices_are_described_as_nvml_describes_them(nvidia):
    async with probing(nvidia) as prober:
        first, second = (await prober.probe()).devices
    assert (first.uuid, first.visible_id) == ("GPU-6d37cae3-0000-4b2c-9f00-000000000000",) * 2
    assert (first.model, first.architecture, first.bdf) == ("NVIDIA H200", "sm_90", "0000:05:00.0")
    assert prober.visibility([second]) == {"CUDA_VISIBLE_DEVICES": "GPU-6d37cae3-0000-4b2c-9f00-000000000001"}


async def test_nvidia_newer_drivers_tell_temperature_by_another_call(nvidia):
    nvidia.set(0, temperature=55, **{"error.temperature": 13})
    async with probing(nvidia) as prober:
        assert (await read(prober))[0].temperature_celsius == 55


async def test_nvidia_a_process_that_computes_and_draws_counts_once(nvidia):
    nvidia.set(0, processes=[(OWN, GIB)], drawing=f"{OWN} {GIB}")
    async with probing(nvidia) as prober:
        assert (await read(prober))[0].processes == (ProcessUse(OWN, GIB),)


async def test_nvidia_memory_of_a_process_that_is_not_told_is_unknown(nvidia):
    nvidia.set(0, used=GIB, processes=[(OWN, 2**64 - 1)])
    async with probing(nvidia) as prober:
        first, _ = await read(prober)
    assert (first.used_bytes, first.processes_known) == (GIB, False)


async def test_nvidia_instances_of_a_split_card_are_the_devices(nvidia):
    nvidia.set(0, mig=1)
    nvidia.write()
    with (nvidia.folder / "state").open("a") as state:
        for position in range(2):
            instance = 32 + position
            state.write(f"{instance} name NVIDIA H200 MIG 3g.71gb\n{instance} uuid MIG-{position}\n")
            state.write(f"{instance} total {71 * GIB}\n{instance} used {position * GIB}\n")
    async with probing(nvidia) as prober:
        probe = await prober.probe()
    assert [each.uuid for each in probe.devices[:2]] == ["MIG-0", "MIG-1"]
    assert [each.partition for each in probe.devices] == ["mig", "mig", ""]
    assert [each.memory_bytes for each in probe.devices] == [71 * GIB, 71 * GIB, TOTAL]
    assert [each.used_bytes for each in probe.readings] == [0, GIB, 0]
    assert [each.utilisation_ratio for each in probe.readings] == [None, None, 0.0]
