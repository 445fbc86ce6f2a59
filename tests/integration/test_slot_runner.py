"""One slot with a store, an executor and a results store that are played: what it tells, in which order, and how it ends."""

import asyncio
from collections import deque
from pathlib import Path

import msgspec
import pytest

from manager.core.errors import ResultNotStored, StoreUnavailable
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import Claim, NextReply, ResultFile, TaskRecord, TaskSpec
from manager.core.quantities import GIB, KIB
from manager.core.shapes import Grant, Resources, Shape
from manager.core.wire import Done, Failure, Note, encode_failure
from manager.settings import SlotSettings, TaskSettings
from plugins.node import slot_executor
from plugins.node.executor_handle import Exit, Output
from plugins.node.registry import FunctionSpec
from plugins.node.runner import SlotRunner
from plugins.node.slot_executor import STOP_GRACE_S_MAX, Ending, SlotContext

pytestmark = pytest.mark.integration

SHAPE = Shape("tenant", "env", 2 * GIB)
GRANT = Grant("n", ("d",), 2 * GIB)
DEADLINE_S = 10.0


def claim(name: str, *, more_memory: bool = False, **spec) -> Claim:
    return Claim(name, 1, False, TaskSpec("f", msgspec.Raw(b"{}"), Resources(GIB), **spec), more_memory=more_memory)


class PlayedStore:
    """It has one batch of claims, and then none. What it is told is kept in order."""

    def __init__(self, *claims: Claim):
        self.claims = claims
        self.told = []
        self.ends = []
        self.away = False
        self.late = False
        self.refused = 0
        self.records = {}

    async def next(self, _slot, _incarnation, n, ends):
        if self.away:
            raise StoreUnavailable
        self.told += [("end", end.task_id) for end in ends]
        self.ends += ends
        claims, self.claims = (self.claims, ()) if n else ((), self.claims)
        statuses = tuple(None if self.late else TaskStatus.SUCCEEDED for _ in ends)
        return NextReply("WORK" if claims else "IDLE" if n else "OK", statuses, claims)

    async def progress(self, _slot, _incarnation, notes):
        if self.away:
            self.refused += 1
            raise StoreUnavailable
        self.told += [("note", note.task_id, note.progress, note.checkpoint) for note in notes]

    async def started(self, *_): ...

    async def close_slot(self, *_): ...

    async def keep_log(self, *_): ...

    async def task(self, task_id):
        return self.records.get(task_id)


class PlayedResults:
    """Keeps nothing, and may be told to take its time or to fail."""

    def __init__(self):
        self.discarded = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.problem = None

    def place(self, task_id, attempt, slot_id):
        return Path(f"/results/writing/{task_id}-{attempt}-{slot_id}")

    def folder(self, _task_id):
        return ""

    async def keep(self, _path, task_id, attempt, slot_id, size, sha256):
        await self.gate.wait()
        if self.problem is not None:
            raise self.problem
        return ResultFile(f"files/{task_id}-{attempt}-{slot_id}", size, sha256)

    async def discard(self, file):
        self.discarded.append(file.name)


class PlayedExecutor:
    """It runs what it is sent when the test says so."""

    def __init__(self, on_done, on_exit, on_note):
        self.on_done, self.on_exit, self.on_note = on_done, on_exit, on_note
        self.calls = deque()
        self.signals = []
        self.guard_pid = 1
        self.exited = asyncio.get_running_loop().create_future()
        self.started_at_s = None

    @property
    def current(self):
        return self.calls[0] if self.calls else None

    def send(self, batch):
        self.calls.extend(batch.calls)
        self.started_at_s = asyncio.get_running_loop().time()

    def recall(self):
        taken = tuple(self.calls)[1:]
        self.calls = deque(tuple(self.calls)[:1])
        return taken

    def output_so_far(self):
        return Output(b"", b"")

    def terminate(self, grace_s):
        self.signals.append(grace_s)

    def kill(self):
        self.signals.append("kill")
        asyncio.get_running_loop().call_soon(self.end)

    def answer(self, **what):
        call = self.calls.popleft()
        if not self.calls:
            self.started_at_s = None
        self.on_done(
            Done(call.task_id, call.attempt, **({"ok": True, "result": b"1", "duration_s": 0.1} | what)), Output(b"", b"")
        )

    def report(self, **what):
        self.on_note(Note(self.current.task_id, self.current.attempt, **what))

    def end(self):
        if self.exited.done():
            return
        started, unstarted = (self.calls[0], tuple(self.calls)[1:]) if self.calls else (None, ())
        self.calls.clear()
        self.started_at_s = None
        self.on_exit(Exit(-9, started, unstarted, Output(b"", b""), True))
        self.exited.set_result(None)


class World:
    """A slot that runs, and everything around it."""

    def __init__(self, monkeypatch, tmp_path, *claims: Claim):
        self.store, self.results = PlayedStore(*claims), PlayedResults()
        self.executors = []
        self.starts, self.starting = asyncio.Event(), False
        self.starts.set()

        async def start(*, on_done, on_exit, on_note, **_):
            self.starting = True
            await self.starts.wait()
            self.executors.append(PlayedExecutor(on_done, on_exit, on_note))
            return self.executors[-1]

        monkeypatch.setattr(slot_executor.Executor, "start", start)
        context = SlotContext(
            store=self.store,
            incarnation="i",
            functions={"f": FunctionSpec("f", "module:f", Resources(GIB))},
            interpreter=lambda _: ("", ()),
            environment=lambda _devices, _home: {},
            pulse=None,
            lease_s=10.0,
            scratch=tmp_path,
            slots=SlotSettings(),
            tasks=TaskSettings(grace_s=60.0),
            results=self.results,
            inline_bytes_max=KIB,
        )
        self.runner = SlotRunner("s", GRANT, context)
        self.running = asyncio.create_task(self.runner.run(SHAPE))

    async def until(self, condition):
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 -- what is waited for cannot be told to set an event
                await asyncio.sleep(0.005)

    async def executor(self) -> PlayedExecutor:
        """Once it has work."""
        await self.until(lambda: self.executors and self.executors[-1].calls)
        return self.executors[-1]

    async def ended(self, count: int = 1):
        await self.until(lambda: len(self.store.ends) >= count)
        return self.store.ends


@pytest.fixture
async def worlds(monkeypatch, tmp_path):
    made = []

    def make(*claims: Claim) -> World:
        made.append(World(monkeypatch, tmp_path, *claims))
        return made[-1]

    yield make
    for world in made:
        world.store.away = False
        world.results.gate.set()
        world.runner.end(Ending.FENCED)
        async with asyncio.timeout(DEADLINE_S):
            await world.running


async def test_what_was_reported_is_told_before_the_end_and_survives_a_store_that_is_away(worlds):
    world = worlds(claim("t"))
    executor = await world.executor()
    world.store.away = True
    executor.report(progress=0.1, message="")
    executor.report(checkpoint="/step-1")
    await world.until(lambda: world.store.refused)
    executor.report(progress=0.9, message="")
    executor.answer()
    world.store.away = False
    await world.ended()
    assert world.store.told == [("note", "t", 0.9, "/step-1"), ("end", "t")]


async def test_what_a_store_that_was_away_did_not_hear_is_told_again(worlds):
    world = worlds(claim("t"))
    executor = await world.executor()
    world.store.away = True
    executor.report(checkpoint="/step-1")
    await world.until(lambda: world.store.refused)
    world.store.away = False
    await world.until(lambda: world.store.told)
    assert world.store.told == [("note", "t", None, "/step-1")]


async def test_a_slot_that_is_to_end_while_its_executor_starts_ends_what_it_begins(worlds):
    world = worlds(claim("t"))
    world.starts.clear()
    await world.until(lambda: world.starting)
    world.runner.end(Ending.PREEMPTED)
    world.starts.set()
    executor = await world.executor()
    await world.until(lambda: executor.signals)
    assert executor.signals == [60.0]
    executor.end()


async def test_reports_are_told_while_the_task_runs_and_coalesced(worlds):
    world = worlds(claim("t"))
    executor = await world.executor()
    executor.report(progress=0.1, message="")
    await world.until(lambda: world.store.told)
    for number in range(100):
        executor.report(progress=number / 100, message="")
    await world.until(lambda: len(world.store.told) > 1)
    assert world.store.told == [("note", "t", 0.1, None), ("note", "t", 0.99, None)]


@pytest.mark.parametrize(
    ("why", "signals"), [(Ending.PREEMPTED, [60.0]), (Ending.STOPPED, [STOP_GRACE_S_MAX]), (Ending.FENCED, ["kill"])]
)
async def test_who_may_end_later_is_asked_first(worlds, why, signals):
    world = worlds(claim("t"), claim("behind"))
    executor = await world.executor()
    world.runner.end(why)
    world.runner.end(why)  # each beat says it again
    assert executor.signals[:1] == signals
    if why is Ending.PREEMPTED:
        assert executor.signals == signals
    if why is not Ending.FENCED:
        executor.answer()  # it finishes in time
        assert {(end.task_id, end.outcome) for end in await world.ended(2)} == {
            ("t", Outcome.SUCCEEDED),
            ("behind", Outcome.RETURNED),
        }


async def test_a_slot_that_is_fenced_while_it_ends_is_killed_at_once(worlds):
    world = worlds(claim("t"))
    executor = await world.executor()
    world.runner.end(Ending.PREEMPTED)
    world.runner.end(Ending.FENCED)
    assert executor.signals == [60.0, "kill"]


async def test_a_task_that_does_not_end_in_its_grace_is_lost_and_not_to_blame(worlds):
    world = worlds(claim("t"))
    executor = await world.executor()
    world.runner.end(Ending.PREEMPTED)
    executor.end()
    assert [end.outcome for end in await world.ended()] == [Outcome.LOST]


FILE = {"ok": True, "result": b"", "duration_s": 0.1, "file_bytes": 3, "file_sha256": "ab"}


async def test_others_do_not_wait_for_a_result_that_is_being_kept(worlds):
    world = worlds(claim("large"), claim("small"))
    world.results.gate.clear()
    executor = await world.executor()
    executor.answer(**FILE)
    executor.answer()
    assert [end.task_id for end in await world.ended()] == ["small"]
    world.results.gate.set()
    large = (await world.ended(2))[1]
    assert (large.outcome, large.payload, large.file) == (Outcome.SUCCEEDED, b"", ResultFile("files/large-1-s", 3, "ab"))


async def test_a_result_that_cannot_be_kept_fails_its_task_as_it_asked(worlds):
    world = worlds(claim("t", retry_on=("ValueError",)))
    world.results.problem = ResultNotStored("no space")
    (await world.executor()).answer(**FILE)
    (end,) = await world.ended()
    assert end.outcome is Outcome.FAILED_FOR_GOOD
    assert msgspec.json.decode(end.payload) == {"type": "ResultNotStored", "message": "no space"}


@pytest.mark.parametrize("named", [True, False], ids=["only its answer came too late", "it came too late"])
async def test_a_result_is_discarded_where_no_record_names_it(worlds, named):
    world = worlds(claim("t"))
    world.store.late = True
    file = ResultFile("files/t-1-s" if named else "files/t-1-other", 3, "ab")
    world.store.records["t"] = TaskRecord(
        task_id="t",
        status=TaskStatus.SUCCEEDED,
        tenant="x",
        function="f",
        shape_id="s",
        attempt=1,
        result_file=file,
    )
    (await world.executor()).answer(**FILE)
    await world.until(lambda: world.runner.idle)
    assert world.results.discarded == ([] if named else ["files/t-1-s"])


@pytest.mark.parametrize(
    ("more_memory", "retry_on", "outcome"),
    [
        pytest.param(False, (), Outcome.OUT_OF_MEMORY, id="first"),
        pytest.param(False, ("ValueError",), Outcome.OUT_OF_MEMORY, id="first, whatever is worth a retry"),
        pytest.param(True, (), Outcome.FAILED, id="second"),
        pytest.param(True, ("ValueError",), Outcome.FAILED_FOR_GOOD, id="second, and no retry is worth it"),
    ],
)
async def test_a_device_without_memory_is_worth_one_more_attempt(worlds, more_memory, retry_on, outcome):
    world = worlds(claim("t", more_memory=more_memory, retry_on=retry_on))
    failure = encode_failure(Failure("GpuOutOfMemory", "no", bases=("OutOfMemoryError", "RuntimeError")))
    (await world.executor()).answer(ok=False, result=failure)
    (end,) = await world.ended()
    assert end.outcome is outcome
    assert (end.room is not None) is (outcome is Outcome.OUT_OF_MEMORY)
    assert end.room is None or end.room[1].memory_bytes == 3 * GIB


async def test_an_executor_that_finds_no_room_on_disk_gives_its_claims_back(worlds):
    world = worlds(claim("t"))
    (world.runner.context.scratch / "s").write_text("where its folder should be")
    assert [(end.task_id, end.outcome) for end in await world.ended()] == [("t", Outcome.RETURNED)]
    assert not world.executors
