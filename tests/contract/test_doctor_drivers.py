"""The doctor's look at drivers: the real Python packages over the fake libraries, in the prober's child."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_amdsmi"))

from fake_drivers import RIGS, build

from manager.cli import doctor_machine
from manager.doctor import Status


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake_drivers"))


@pytest.fixture(params=["amd", "nvidia"])
def rig(request, tmp_path, libraries):
    return RIGS[request.param](tmp_path, libraries)


@pytest.fixture
def look(rig, tmp_path, monkeypatch):
    """Looks at the driver of `rig`, on a machine that has its file."""
    file = tmp_path / "driver"
    file.touch()
    monkeypatch.setattr(doctor_machine, "KFD" if rig.kind == "amd" else "NVIDIA", file)

    def run():
        if rig.kind == "nvidia":
            return doctor_machine.nvidia_driver(rig.env())
        first, _version = doctor_machine.amd_driver(rig.env())
        return first

    return run


def test_the_devices_of_a_driver_are_named(look, rig):
    check = look()
    assert check.status is Status.OK
    assert check.finding.startswith("shows 2 devices: ")
    assert ("MI300X" if rig.kind == "amd" else "H200") in check.finding


def test_an_unwell_device_is_named_as_such(look, rig):
    rig.set(1, **{"error.used": rig.no_permission})
    check = look()
    assert check.status is Status.WARN
    first, _, rest = check.finding.partition("; ")
    assert ("(" in first, rest.endswith(")")) == (False, True), check


def test_a_driver_that_is_not_loaded_fails_with_its_words(look, rig):
    rig.set(error=True)
    check = look()
    assert check.status is Status.FAIL
    assert check.finding
    assert check.remedy


def test_a_driver_that_hangs_fails_within_the_deadline(look, rig, monkeypatch):
    monkeypatch.setattr(doctor_machine, "DRIVER_S", 1.0)
    rig.set(hang=True)
    began = time.monotonic()
    assert look().status is Status.FAIL
    assert time.monotonic() - began < 15


def test_the_version_of_amdsmi_is_held_to_that_of_rocm(tmp_path, monkeypatch):
    (tmp_path / ".info").mkdir()
    (tmp_path / ".info" / "version").write_text("7.1.0-99\n")
    (tmp_path / "share" / "amd_smi" / "amdsmi").mkdir(parents=True)
    assert doctor_machine._rocm_version(tmp_path) == "7.1.0"
    assert doctor_machine._amdsmi_version(tmp_path) == "7.1.0", "the copy of ROCm is used, and fits"
    assert doctor_machine._rocm_version(tmp_path / "nowhere") == ""


def test_torch_is_looked_at_in_a_process_of_its_own():
    before = set(sys.modules)
    check = doctor_machine.torch()
    assert check.status in {Status.OK, Status.SKIP}, check
    assert "torch" not in set(sys.modules) - before
