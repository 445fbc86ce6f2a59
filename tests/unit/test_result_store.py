"""The results store: what is kept survives, is found again as it was, and nothing else is ever touched."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager.core.errors import ResultMissing, ResultNotStored, SettingsError, StartError
from manager.core.ids import new_id
from manager.core.lifecycle import TaskStatus
from manager.core.model import ResultFile
from manager.leader_results import is_left_over
from manager.results import Leftover, NoResults, ResultStore, open_results, shared_url, with_default_folder
from manager.results.folder import FolderResults
from manager.results.objects import ObjectResults, moment_of
from manager.results.store import CHUNK_BYTES, GUEST_S, Kind, leftover_of
from manager.settings import ResultSettings, Settings
from manager.store.calls_leader import Kept

TASK = "01k9ez0000000000000000007k"
SLOT = "01k9ez000000000000000000s1"
OURS, THEIRS = "01k9ez00000000000000000001", "01k9ez00000000000000000002"
HOUR_S = 3600.0


@pytest.fixture(params=["folder", "memory", "objects on disk"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    if request.param == "folder":
        store: FolderResults | ObjectResults = FolderResults(tmp_path / "results")
    else:
        root = f"memory://{uuid.uuid4().hex}/results" if request.param == "memory" else f"local://{tmp_path}/results"
        store = ObjectResults(root, tmp_path / "scratch")
    store.prepare()
    return store


def write(results: ResultStore, data: bytes, task_id: str = TASK, attempt: int = 1, slot: str = SLOT) -> Path:
    """As an executor does it."""
    path = results.place(task_id, attempt, slot)
    assert path is not None
    path.write_bytes(data)
    return path


def keep(results: ResultStore, data: bytes, task_id: str = TASK, attempt: int = 1, slot: str = SLOT) -> ResultFile:
    path = write(results, data, task_id, attempt, slot)
    return asyncio.run(results.keep(path, task_id, attempt, slot, len(data), hashlib.sha256(data).hexdigest()))


def read(results: ResultStore, file: ResultFile) -> list[bytes]:
    async def run() -> list[bytes]:
        return [piece async for piece in await results.open(file)]

    return asyncio.run(run())


def scanned(results: ResultStore) -> list[Leftover]:
    async def run() -> list[Leftover]:
        return [found async for batch in results.scan() for found in batch]

    return sorted(asyncio.run(run()), key=lambda found: found.name)


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES * 2 + 7])
def test_what_is_kept_is_read_again(results: ResultStore, size: int):
    data = os.urandom(size)
    file = keep(results, data)
    assert file == ResultFile(f"files/7k/{TASK}-1-{SLOT}.json", size, hashlib.sha256(data).hexdigest())
    assert b"".join(read(results, file)) == data


def test_a_call_that_is_made_twice_keeps_once(results: ResultStore):
    path = write(results, b"[1]")
    digest = hashlib.sha256(b"[1]").hexdigest()
    first = asyncio.run(results.keep(path, TASK, 1, SLOT, 3, digest))
    assert not path.exists()
    assert asyncio.run(results.keep(path, TASK, 1, SLOT, 3, digest)) == first
    assert read(results, first) == [b"[1]"]


def test_attempts_do_not_write_over_each_other(results: ResultStore):
    first, second = keep(results, b"[1]"), keep(results, b"[2]", attempt=2)
    assert first.name != second.name
    assert (read(results, first), read(results, second)) == ([b"[1]"], [b"[2]"])


def test_an_attempt_whose_number_is_given_again_has_a_file_of_its_own(results: ResultStore):
    """A store that is back from a backup counts attempts from where it was then; it makes new slots."""
    again = "01k9ez000000000000000000s2"
    old = write(results, b"[1]")
    new = write(results, b"[22]", slot=again)
    assert old != new
    first = asyncio.run(results.keep(old, TASK, 1, SLOT, 3, hashlib.sha256(b"[1]").hexdigest()))
    second = asyncio.run(results.keep(new, TASK, 1, again, 4, hashlib.sha256(b"[22]").hexdigest()))
    asyncio.run(results.discard(first))  # its agent hears that it came too late
    assert read(results, second) == [b"[22]"]


def test_a_result_whose_name_has_no_slot_is_read_and_removed_as_ever(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    old = ResultFile(f"files/7k/{TASK}-1.json", 3, hashlib.sha256(b"[1]").hexdigest())
    path_of(results, keep(results, b"[1]")).rename(results.root / old.name)
    assert read(results, old) == [b"[1]"]
    assert [(found.name, found.attempt) for found in scanned(results)] == [(old.name, 1)]
    asyncio.run(results.discard(old))
    assert scanned(results) == []


def test_what_is_not_as_long_as_was_said_is_not_kept(results: ResultStore):
    path = write(results, b"[1]")
    with pytest.raises(ResultNotStored, match=r"the result \(4 bytes\) could not be stored in .*3 bytes"):
        asyncio.run(results.keep(path, TASK, 1, SLOT, 4, ""))
    with pytest.raises(ResultMissing):
        read(results, ResultFile(f"files/7k/{TASK}-1-{SLOT}.json", 4, ""))


def test_what_was_never_written_is_not_kept(results: ResultStore):
    path = results.place(TASK, 1, SLOT)
    assert path is not None
    with pytest.raises(ResultNotStored):
        asyncio.run(results.keep(path, TASK, 1, SLOT, 4, ""))


@pytest.mark.parametrize("how", ["symlink", "hardlink", "fifo"])
def test_what_user_code_has_put_in_its_place_is_not_kept(results: ResultStore, how: str, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"{}")
    path = results.place(TASK, 1, SLOT)
    assert path is not None
    match how:
        case "symlink":
            path.symlink_to(secret)
        case "hardlink":
            path.hardlink_to(secret)
        case _:
            os.mkfifo(path)
    with pytest.raises(ResultNotStored):
        asyncio.run(results.keep(path, TASK, 1, SLOT, 2, hashlib.sha256(b"{}").hexdigest()))


# --- what is damaged or gone ----------------------------------------------------------------------------------------


def path_of(results: ResultStore, file: ResultFile) -> Path:
    if isinstance(results, FolderResults):
        return results.root / file.name
    assert isinstance(results, ObjectResults)
    if "memory" in results.url:
        pytest.skip("is no file")
    return Path(results.root) / file.name


def test_a_result_that_is_gone_is_said_to_be_missing(results: ResultStore):
    file = keep(results, b"[1]")
    asyncio.run(results.discard(file))
    asyncio.run(results.discard(file))  # twice is well
    with pytest.raises(ResultMissing, match="Rocyard has not removed it") as caught:
        read(results, file)
    assert caught.value.status == 410


def test_a_result_of_another_size_is_refused_before_anything_is_read(results: ResultStore):
    file = keep(results, b"[1]")
    path_of(results, file).write_bytes(b"[12]")
    with pytest.raises(ResultMissing, match="4 bytes"):
        asyncio.run(results.open(file))


def test_the_last_piece_of_a_damaged_result_never_comes(results: ResultStore):
    file = keep(results, b"a" * (CHUNK_BYTES + 5))
    path_of(results, file).write_bytes(b"a" * (CHUNK_BYTES + 4) + b"b")
    seen = []

    async def run() -> None:
        async for piece in await results.open(file):
            seen.append(len(piece))  # noqa: PERF401 -- what came before the error is what is looked at

    with pytest.raises(ResultMissing, match="SHA-256"):
        asyncio.run(run())
    assert seen == [CHUNK_BYTES]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "files/7k/../../secret", "clock", f"writing/{TASK}-1.json"])
def test_a_name_that_is_none_of_ours_leads_nowhere(results: ResultStore, name: str, tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"x")
    with pytest.raises(ResultMissing, match="names no result of ours"):
        asyncio.run(results.open(ResultFile(name, 1, "")))
    assert asyncio.run(results.remove(["../secret"])) == 0
    assert (tmp_path / "secret").exists()


def test_a_reader_who_leaves_early_leaves_no_file_open(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    file = keep(results, b"a" * (3 * CHUNK_BYTES))
    before = len(list(Path("/proc/self/fd").iterdir()))

    async def run() -> None:
        pieces = await results.open(file)
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]  # a generator, which the interface need not say
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(run())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- scans ----------------------------------------------------------------------------------------------------------


def test_a_scan_finds_what_lies_there_and_nothing_else(results: ResultStore):
    other = new_id()
    names = sorted([keep(results, b"[1]").name, keep(results, b"[2]", other, 3).name])
    found = scanned(results)
    assert [one.name for one in found] == names
    assert {(one.kind, one.task_id, one.attempt) for one in found} == {(Kind.RESULT, TASK, 1), (Kind.RESULT, other, 3)}
    assert all(0 <= one.age_s < HOUR_S for one in found)
    assert asyncio.run(results.remove(names)) == 2
    assert asyncio.run(results.remove(names)) == 0
    assert scanned(results) == []


def test_a_folder_is_scanned_with_its_checkpoints_and_what_is_being_written(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    write(results, b"half of", attempt=2)
    checkpoints = Path(results.folder(TASK))
    (checkpoints / "deep").mkdir(parents=True)
    (checkpoints / "deep" / "model.pt").write_bytes(b"x")
    (results.root / "lost+found").mkdir()
    (results.root / "checkpoints" / "somebody's").mkdir()
    (results.root / "files" / "note.txt").write_text("not a folder")
    os.utime(checkpoints, (0, 0))
    found = scanned(results)
    assert [(one.kind, one.attempt) for one in found] == [(Kind.CHECKPOINTS, 0), (Kind.WRITING, 2)]
    assert found[0].age_s > HOUR_S > found[1].age_s
    assert asyncio.run(results.remove([one.name for one in found])) == 2
    assert scanned(results) == []
    assert (results.root / "lost+found").is_dir()
    assert (results.root / "checkpoints" / "somebody's").is_dir()


def test_ages_are_by_the_clock_of_the_place(results: ResultStore, monkeypatch: pytest.MonkeyPatch):
    keep(results, b"[1]")
    monkeypatch.setattr("time.time", lambda: 9e9)  # ours is wrong by centuries
    assert all(one.age_s < HOUR_S for one in scanned(results))


def test_a_folder_of_checkpoints_is_the_same_for_each_attempt(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    folder = Path(results.folder(TASK))
    assert results.folder(TASK) == str(folder)
    assert not folder.exists()  # until a function asks for it
    assert folder.parent.is_dir()


def test_a_place_that_is_away_is_an_error_of_the_system_whatever_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = ObjectResults(f"memory://{uuid.uuid4().hex}", tmp_path)

    def refuse(*_: object) -> None:
        raise RuntimeError("no route to the bucket")  # as a client library of a cloud may

    monkeypatch.setattr(results.system, "pipe_file", refuse)
    with pytest.raises(OSError, match="no route to the bucket"):
        scanned(results)
    with pytest.raises(StartError, match="no route to the bucket"):
        results.prepare()


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"LastModified": "2026-11-24T01:00:00+00:00"}, 1795482000.0),
        ({"created": 12.5}, 12.5),
        ({"mtime": 12}, 12.0),
        ({"updated": "yesterday"}, None),
        ({}, None),
    ],
)
def test_when_an_object_was_changed(info: dict[str, object], seconds: float | None):
    assert moment_of(info) == seconds


@pytest.mark.parametrize(
    "name", ["", "files/7k", f"files/7k/{TASK}-0.json", f"files/7k/{TASK}-1.json/x", f"checkpoints/{TASK}/a"]
)
def test_other_names_are_nobodys(name: str):
    assert leftover_of(name, 1e9) is None


def test_files_are_nobody_elses(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    path = write(results, b"[1]")
    path.chmod(0o666)
    file = asyncio.run(results.keep(path, TASK, 1, SLOT, 3, ""))
    assert stat.S_IMODE((results.root / file.name).stat().st_mode) == 0o600
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in results.root.rglob("*") if folder.is_dir())
    assert stat.S_IMODE(results.root.stat().st_mode) == 0o700


# --- whose it is ----------------------------------------------------------------------------------------------------


def test_who_claims_first_has_it(results: ResultStore):
    keep(results, b"[1]")
    assert asyncio.run(results.owner()) == ""
    assert asyncio.run(results.claim(OURS)) == OURS
    assert asyncio.run(results.claim(THEIRS)) == OURS
    assert asyncio.run(results.claim(OURS)) == OURS
    assert asyncio.run(results.owner()) == OURS
    assert [found.kind for found in scanned(results)] == [Kind.RESULT], "the mark is taken for a result"
    assert asyncio.run(results.remove([f"cluster/{OURS}"])) == 0


def test_of_many_that_claim_at_once_one_at_most_has_it(results: ResultStore):
    clusters = [new_id() for _ in range(8)]

    async def claim_all() -> list[str]:
        return await asyncio.gather(*(results.claim(cluster) for cluster in clusters))

    told = asyncio.run(claim_all())
    believers = [cluster for cluster, owner in zip(clusters, told, strict=True) if owner == cluster]
    assert len(believers) <= 1, "two believe that it is theirs"
    if isinstance(results, FolderResults):
        assert set(told) == set(believers), "somebody was told something else"
    if not believers:  # all have stepped back, and try again later
        assert asyncio.run(results.claim(clusters[0])) == clusters[0]
        believers = clusters[:1]
    assert asyncio.run(results.owner()) == believers[0]


def test_who_sees_another_one_after_it_has_written_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = ObjectResults(f"memory://{uuid.uuid4().hex}", tmp_path)
    write_object, mark = results.system.pipe_file, results._full(f"cluster/{THEIRS}")

    def meanwhile(name: str, data: bytes) -> None:
        write_object(name, data)
        write_object(mark, data)

    monkeypatch.setattr(results.system, "pipe_file", meanwhile)
    assert asyncio.run(results.claim(OURS)) == THEIRS
    assert asyncio.run(results.owner()) == THEIRS


def test_a_mark_of_two_clusters_is_nobodys(results: ResultStore):
    keep(results, b"[1]")
    asyncio.run(results.claim(OURS))
    second = results.marker(THEIRS)
    assert second.endswith(f"/cluster/{THEIRS}")
    if isinstance(results, ObjectResults):
        results.system.pipe_file(results._full(f"cluster/{THEIRS}"), b".")
    else:
        Path(second).touch()
    assert asyncio.run(results.owner()) == f"{OURS}, {THEIRS}"
    assert asyncio.run(results.claim(OURS)) == f"{OURS}, {THEIRS}"


def test_a_guest_is_one_for_as_long_as_it_says_so(results: ResultStore):
    keep(results, b"[1]")
    assert asyncio.run(results.guests()) == []
    asyncio.run(results.claim(OURS))
    asyncio.run(results.visit(THEIRS))
    asyncio.run(results.visit(THEIRS))
    assert asyncio.run(results.guests()) == [THEIRS]
    assert asyncio.run(results.owner()) == OURS
    assert [found.kind for found in scanned(results)] == [Kind.RESULT]
    note = path_of(results, ResultFile(f"guests/{THEIRS}", 0, ""))
    moment = note.stat().st_mtime
    for age_s, guests in ((GUEST_S - HOUR_S, [THEIRS]), (GUEST_S + 60, [])):
        os.utime(note, (moment - age_s, moment - age_s))
        assert asyncio.run(results.guests()) == guests
    asyncio.run(results.visit(THEIRS))
    assert asyncio.run(results.guests()) == [THEIRS]


def test_a_folder_that_is_not_mounted_is_not_claimed(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.root.mkdir()
    assert asyncio.run(results.claim(OURS)) == ""
    assert list(results.root.iterdir()) == []


def test_a_claim_that_was_cut_off_holds_up_nobody(tmp_path: Path):
    results = FolderResults(tmp_path / "results")
    results.prepare()
    (results.root / f".cluster-{OURS}").mkdir()  # killed here
    (results.root / "cluster").mkdir()  # somebody has removed the mark in it
    assert asyncio.run(results.claim(OURS)) == OURS
    assert Path(results.marker(OURS)).is_file()
    assert [path.name for path in results.root.glob(".*")] == []


# --- settings -------------------------------------------------------------------------------------------------------


def settings_with(url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=str(tmp_path / "data"), results=ResultSettings(url=url))


def test_without_a_url_there_is_no_store(tmp_path: Path):
    results = open_results(settings_with("", tmp_path))
    assert isinstance(results, NoResults)
    assert results.place(TASK, 1, SLOT) is None
    assert results.folder(TASK) == ""
    assert scanned(results) == []
    with pytest.raises(ResultMissing, match=r"no results store \(results.url\)"):
        asyncio.run(results.open(ResultFile(f"files/7k/{TASK}-1.json", 1, "")))


def test_one_machine_has_a_folder_of_its_own_that_no_other_is_told(tmp_path: Path):
    settings = with_default_folder(settings_with("", tmp_path))
    assert settings.results.url == str(tmp_path / "data" / "results")
    assert shared_url(settings) == ""
    assert isinstance(open_results(settings), FolderResults)
    told = settings_with("/srv/results", tmp_path)
    assert with_default_folder(told) == told
    assert shared_url(told) == "/srv/results"


def test_a_file_url_is_a_folder(tmp_path: Path):
    results = open_results(settings_with(f"file://{tmp_path}/with%20space", tmp_path))
    assert isinstance(results, FolderResults)
    assert results.root == tmp_path / "with space"
    assert results.root.is_dir()


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("results", SettingsError, "is a relative path"),
        ("./results", SettingsError, "is a relative path"),
        ("file://nas/results", SettingsError, "three slashes"),
        ("nonsense://bucket/folder", StartError, "Protocol not known: nonsense"),
        ("s3://bucket/folder", StartError, "s3fs"),
        ("/proc/results", StartError, "cannot be written"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_reason(url: str, kind: type[Exception], words: str, tmp_path: Path):
    if url.startswith("s3"):
        with contextlib.suppress(ImportError):
            import s3fs  # noqa: F401 -- whether it is there

            pytest.skip("s3fs is installed")
    with pytest.raises(kind, match=words) as caught:
        open_results(settings_with(url, tmp_path), tmp_path / "scratch")
    assert "results.url" in str(caught.value)


def test_an_agent_that_starts_has_an_empty_scratch_folder(tmp_path: Path):
    settings = settings_with(f"memory://{uuid.uuid4().hex}", tmp_path)
    scratch = tmp_path / "scratch"
    left = open_results(settings, scratch).place(TASK, 1, SLOT)
    assert left is not None
    left.write_bytes(b"of an agent that was killed")
    open_results(settings, scratch)
    assert list(scratch.iterdir()) == []
    assert open_results(settings).place(TASK, 1, SLOT) is None  # who is no agent has none


# --- what is left over ----------------------------------------------------------------------------------------------

NAME = f"files/7k/{TASK}-2.json"


@pytest.mark.parametrize(
    ("kind", "status", "attempt", "file", "goes"),
    [
        pytest.param(Kind.RESULT, None, 0, "", True, id="its task was forgotten"),
        pytest.param(Kind.RESULT, "SUCCEEDED", 2, NAME, False, id="its record names it"),
        pytest.param(Kind.RESULT, "SUCCEEDED", 3, NAME.replace("-2", "-3"), True, id="another attempt's counts"),
        pytest.param(Kind.RESULT, "SUCCEEDED", 2, "", True, id="the result is in the record"),
        pytest.param(Kind.RESULT, "FAILED", 2, "", True, id="nothing counts"),
        pytest.param(Kind.RESULT, "RUNNING", 2, "", False, id="its agent may still tell of it"),
        pytest.param(Kind.RESULT, "RUNNING", 3, "", True, id="its attempt was replaced"),
        pytest.param(Kind.RESULT, "QUEUED", 2, "", True, id="its attempt has gone back"),
        pytest.param(Kind.RESULT, "RETRY_WAIT", 2, "", True, id="its attempt has failed"),
        pytest.param(Kind.RESULT, "QUEUED", 1, "", False, id="the store is older than it"),
        pytest.param(Kind.WRITING, "RUNNING", 2, "", False, id="it is being written"),
        pytest.param(Kind.WRITING, "QUEUED", 2, "", True, id="nobody writes any more"),
        pytest.param(Kind.WRITING, "SUCCEEDED", 2, NAME, True, id="what was written is kept elsewhere"),
        pytest.param(Kind.CHECKPOINTS, "RUNNING", 2, "", False, id="checkpoints of what runs"),
        pytest.param(Kind.CHECKPOINTS, "BLOCKED", 0, "", False, id="checkpoints of what waits"),
        pytest.param(Kind.CHECKPOINTS, "SUCCEEDED", 2, NAME, True, id="checkpoints of what has ended"),
        pytest.param(Kind.CHECKPOINTS, None, 0, "", True, id="checkpoints of nobody"),
    ],
)
def test_what_is_left_over(kind: Kind, status: str | None, attempt: int, file: str, goes: bool):
    name = {Kind.RESULT: NAME, Kind.WRITING: f"writing/{TASK}-2.json", Kind.CHECKPOINTS: f"checkpoints/{TASK}"}[kind]
    found = Leftover(name, kind, TASK, 0 if kind is Kind.CHECKPOINTS else 2, 2 * HOUR_S)
    assert is_left_over(found, Kept(TaskStatus(status) if status else None, attempt, file)) is goes


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_nothing_new_and_loses_nothing_old(small_disk: Path, tmp_path: Path):
    results = ObjectResults(f"local://{small_disk}", tmp_path / "scratch")
    results.prepare()
    first = keep(results, b"a" * 150_000)
    path = write(results, b"b" * 150_000, attempt=2)
    with pytest.raises(ResultNotStored, match="No space left on device"):
        asyncio.run(results.keep(path, TASK, 2, SLOT, 150_000, ""))
    assert b"".join(read(results, first)) == b"a" * 150_000
    asyncio.run(results.discard(first))
    asyncio.run(results.keep(path, TASK, 2, SLOT, 150_000, ""))  # once there is room again
