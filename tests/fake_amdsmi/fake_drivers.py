"""Builds the fake libamd_smi.so and libnvidia-ml.so.1, and rigs that let one test run on every source of devices.

The Python packages on top are the real ones. So this proves our calls, types, units and error paths; it does not prove
AMD's and NVIDIA's values, nor hardware.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from manager.core.quantities import GIB
from plugins.node.devices.probe import Prober, Simulated
from plugins.node.devices.simulated import DeviceFault, Faults, write_faults

HERE = Path(__file__).parent
TOTAL = 192 * GIB


def need(program_or_package, present):
    """Skip with the reason; on CI, where everything must be there, fail."""
    if present:
        return
    reason = f"{program_or_package} is not there: the fake drivers cannot be built or used"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def wrapper_path():
    """The installed amdsmi's ctypes half, found without importing it."""
    spec = importlib.util.find_spec("amdsmi")
    return Path(spec.origin).with_name("amdsmi_wrapper.py") if spec and spec.origin else None


def symbols_of(wrapper):
    """Every symbol that the wrapper looks up when it is imported."""
    return set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper.read_text(encoding="utf-8")))


def implemented(source):
    """The API functions that a fake's source implements."""
    return set(re.findall(r"^API [\w ]+?\*?(amdsmi_\w+|nvml\w+)\(", source.read_text(encoding="ascii"), re.MULTILINE))


def build(folder):
    """Both libraries in `folder`."""
    need("gcc", shutil.which("gcc"))
    wrapper = wrapper_path()
    need("amdsmi", wrapper)
    need("nvidia-ml-py", importlib.util.find_spec("pynvml"))
    ours, theirs = implemented(HERE / "fake_amdsmi.c"), symbols_of(wrapper)
    assert ours <= theirs, f"amdsmi no longer has {sorted(ours - theirs)}"
    rest = "".join(f"API int {name}(void) {{ return 2; }}\n" for name in sorted(theirs - ours))
    defaults = folder / "defaults.c"
    defaults.write_text('#define API __attribute__((visibility("default")))\n' + rest, encoding="ascii")
    flags = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{HERE}"]
    sources = {"libamd_smi.so": [HERE / "fake_amdsmi.c", defaults], "libnvidia-ml.so.1": [HERE / "fake_nvml.c"]}
    for name, files in sources.items():
        subprocess.run([*flags, "-o", folder / name, *files], check=True, timeout=60)
    return folder


class Rig:
    """One source of two devices of `TOTAL` bytes whose state a test sets; `processes` is [(pid, bytes)]."""

    kind = ""
    memory_unit = 1

    def __init__(self, folder, libraries):
        self.folder = folder
        self.libraries = libraries
        self.devices = {0: {}, 1: {}}
        self.all = {}
        self.set()

    def set(self, device=None, **figures):
        """Change figures of a device, or with `device` None the whole driver's, and have them read from now on."""
        (self.all if device is None else self.devices[device]).update(figures)
        self.write()

    def prober(self, **options):
        return Prober(self.kind, **({"match_pids": True, "env": self.env()} | options))


class DriverRig(Rig):
    """A fake library below a real Python package."""

    variable = ""
    no_permission = 0
    gone = 0

    def env(self):
        kept = {name: value for name, value in os.environ.items() if name not in {"ROCM_PATH", "ROCM_HOME"}}
        state = str(self.folder / "state")
        return kept | {"LD_LIBRARY_PATH": str(self.libraries), self.variable: state, "ROCM_PATH": str(self.folder)}

    def identity(self, device):
        raise NotImplementedError

    def write(self):
        lines = {"count": len(self.devices), "hang": int(self.all.get("hang", False))}
        if "error" in self.all:
            lines["error.init"] = lines["error.handles"] = lines["error.count"] = 34
        text = "".join(f"-1 {key} {value}\n" for key, value in lines.items())
        for index, figures in self.devices.items():
            processes = figures.get("processes", [])
            lines = self.identity(index) | {"total": TOTAL, "used": sum(size for _, size in processes)}
            lines |= {key: value for key, value in figures.items() if key not in {"processes", "missing", "hidden"}}
            if figures.get("missing"):
                lines["error"] = self.gone
            if figures.get("hidden"):
                lines["error.processes"] = self.no_permission
            text += "".join(f"{index} {key} {value}\n" for key, value in lines.items())
            text += "".join(f"{index} process {pid} {size}\n" for pid, size in processes)
        fresh = self.folder / "state.new"
        fresh.write_text(text, encoding="ascii")
        fresh.replace(self.folder / "state")


class AmdRig(DriverRig):
    kind = "amd"
    variable = "FAKE_AMDSMI_STATE"
    no_permission = 10
    gone = 31

    def identity(self, device):
        return {"name": "AMD Instinct MI300X", "hip_uuid": f"GPU-18ff74a1fc0fa5d{device}", "compute": "SPX",
                "memory": "NPS1", "serial": f"0x18FF74A1FC0FA5D{device}"}  # fmt: skip


class NvidiaRig(DriverRig):
    kind = "nvidia"
    variable = "FAKE_NVML_STATE"
    no_permission = 4
    gone = 15

    def identity(self, device):
        return {"name": "NVIDIA H200", "uuid": f"GPU-6d37cae3-0000-4b2c-9f00-00000000000{device}"}


class SimulatedRig(Rig):
    kind = "simulated"

    def env(self):
        return dict(os.environ)

    def prober(self, **options):
        return super().prober(simulated=Simulated("1x2:mi300x", 0, self.folder), **options)

    def write(self):
        faults = {}
        for index, figures in self.devices.items():
            processes = figures.get("processes", [])
            # Other processes than live ones cannot hold simulated memory, so a live one is written as it would itself.
            for pid, size in processes:
                self.hold(pid, index, size)
            faults[str(index)] = DeviceFault(
                missing=figures.get("missing", False),
                error="no permission" if "error.used" in figures else "",
                used_bytes=figures.get("used"),
                utilisation_percent=figures.get("activity"),
                temperature_celsius=figures.get("temperature"),
                power_watts=figures.get("power"),
                processes_hidden=figures.get("hidden", False),
            )
        error = "the driver is not loaded" if "error" in self.all else ""
        write_faults(self.folder, Faults(error=error, hang=self.all.get("hang", False), devices=faults))

    def hold(self, pid, index, size):
        started = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
        path = self.folder / "processes" / f"{pid}.json"
        path.parent.mkdir(exist_ok=True)
        held = json.loads(path.read_bytes())["bytes"] if path.exists() else {}
        held[f"SIM-000-{index:02d}"] = size
        path.write_text(json.dumps({"start": started, "bytes": held}), encoding="ascii")


RIGS = {rig.kind: rig for rig in (SimulatedRig, AmdRig, NvidiaRig)}
