"""Records calls of the library as processes of its present version send them, and the digest of its text:
``python -m tests.contract.golden_calls``.

One run of a small cluster that uses every function. What is kept of each call are its function, its arguments, and the shape of
its answer: words and how lists are nested, not ids and times. Each later library must answer all of them alike. Run it while a
version is not released; with the release its files are final, and a change of the library needs a new version, with its own.
"""

import asyncio
import base64
import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from manager.core.errors import IdempotencyConflict
from manager.core.ids import array_id
from manager.core.keys import Keys
from manager.core.lifecycle import AfterFailed, Cordon, Outcome, SlotFlag
from manager.core.mix import Mix
from manager.core.model import IdempotencyKey, MemoryNote, ProgressNote, Submission, TenantRow
from manager.core.quantities import GIB
from manager.store import Store, StoreConnection
from manager.store.calls_leader import Retention
from manager.store.schema import LIBRARY_VERSION, own_library
from tests.contract.store_harness import RED, RED_SHAPE, Lab, StoreServer, connected, end, granted, submission

FOLDER: Final = Path(__file__).with_name("golden")
DIGESTS: Final = FOLDER / "libraries.json"


class GoldenCall(msgspec.Struct, frozen=True):
    """One call. Arguments are text, or base64 behind ``base64:`` where they are none."""

    function: str
    args: list[str]
    answer: Any


class Recorder(StoreConnection):
    """A connection that remembers the calls of functions."""

    def __init__(self, url: str) -> None:
        super().__init__(url, 5.0, "golden")
        self.calls: list[GoldenCall] = []

    async def call(self, *args: Any, deadline_s: float | None = None) -> Any:
        answer = await super().call(*args, deadline_s=deadline_s)
        if args[0] == "FCALL":
            assert args[2:4] == (1, Keys().prefix)
            self.calls.append(GoldenCall(args[1], [_text(each) for each in args[4:]], shape_of_answer(answer)))
        return answer


def _text(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"base64:{base64.b64encode(value).decode()}"


def argument(text: str) -> Any:
    """What `_text` was given, as the server reads it."""
    return base64.b64decode(text[7:]) if text.startswith("base64:") else text


def shape_of_answer(answer: Any) -> Any:
    """Words stay, other text and numbers become their kind; a list is that of its parts."""
    if isinstance(answer, list):
        parts = [shape_of_answer(each) for each in answer]
        # Rows of sets come in any order.
        return sorted(parts, key=repr) if parts and all(isinstance(each, list) for each in parts) else parts
    if isinstance(answer, bytes):
        return answer.decode() if re.fullmatch(rb"[A-Z_]{2,}", answer) else "text" if answer else ""
    return "number" if isinstance(answer, int) else answer


async def use_everything(lab: Lab) -> None:
    """Every function at least once, with answers of each kind that it has."""
    store = lab.store
    await lab.lead("leader")
    first = submission(max_attempts=2)
    named = _with(submission(), name="mine", start_timeout_s=60.0, total_timeout_s=600.0, deadline_ms=99_999_999_999_999)
    child = _with(submission(), after=(first.task_id,), after_failed=AfterFailed.RUN)
    key = IdempotencyKey("0" * 64, "1" * 64)
    for _ in range(2):
        await store.submit("red", 100, [first, msgspec.structs.replace(named, digest="2" * 64), child], key)
    await store.known("red", key, [("", "")])
    await store.known("red", None, [("mine", "2" * 64)])
    with contextlib.suppress(IdempotencyConflict):
        await store.known("red", IdempotencyKey(key.key, "2" * 64), [("", "")])
    await store.known("red", IdempotencyKey("3" * 64, key.digest), [("new", "2" * 64), ("", "")])
    array = msgspec.structs.replace(_with(submission(), count=3, index_as="x"), task_id=array_id())
    await store.submit("red", 100, [array])
    await store.expand()
    await store.submit("red", 100, [submission() for _ in range(8)])
    agent = await lab.agent("n1", "gpu-0")
    slot = await lab.open(agent)
    assert (await store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))).word == "ADOPTED"
    await store.open_direct("direct", agent.incarnation, granted("n1", "gpu-0"))
    claim = await lab.claim(agent, slot)
    await store.started(slot, agent.incarnation, [(claim.task_id, claim.attempt, 0.01)])
    await store.progress(slot, agent.incarnation, [ProgressNote(claim.task_id, claim.attempt, 0.5, "half", "/c")])
    await store.keep_log(claim.task_id, claim.attempt, b"out", b"\xff", 1, 2)
    await store.note_memory(agent.incarnation, [MemoryNote(slot, GIB, 0)])
    for outcome in Outcome:
        claim = await lab.claim(agent, slot, end(claim, outcome))
    await store.next(slot, agent.incarnation, 0, [end(claim)])
    await store.beat("n1", agent.incarnation, [(slot, False)])
    claim = await lab.claim(agent, slot)
    await store.cancel(claim.task_id, "red")
    await store.cancels(slot)
    await store.cancel_array(array.task_id, "red", 0)
    await store.position(RED, 0)
    await store.tasks("red", None, 2, None, "")
    await store.due()
    await store.age(lab.token, 0.0, [RED])
    await store.warm(RED, RED_SHAPE, 1, 60.0)
    await store.unload([RED])
    await store.planned(lab.token, 1, [(RED, 2)])
    await store.put_mix(lab.token, Mix())
    await store.share(lab.token, [TenantRow(tenant="red", running_max=5)], [(RED, 1.5)])
    await store.reached(lab.token, dask=True)
    await store.look(leader=True)
    await store.cordon("n1", Cordon.DRAIN, "operator", 60.0)
    await store.flag(lab.token, SlotFlag.DRAIN, [slot])
    await store.beat("n1", agent.incarnation, [(slot, True)])
    await store.close_slot(slot, agent.incarnation, "Done")
    await store.cordon("n1", Cordon.NONE, "operator")
    await store.drop(lab.token, "NotOpened", [await lab.request()])
    await store.fence(lab.token, "Gone", [await lab.request()])
    await store.refuse(lab.token, RED)
    other = await lab.agent("n2", "gpu-1")
    await store.lost(lab.token, "n2", other.incarnation)
    await store.leave("n1", agent.incarnation)
    _, token, beat, _ = await store.lead("", 0, 0, "read", "autoscaler")
    _, token, *_ = await store.lead("scaler", token, beat, "take", "autoscaler")
    await store.write_journal(token, b"{}", 10)
    await store.kept(lab.token, [first.task_id])
    await store.sweep(lab.token, 0, 100, 0, {"red": Retention(0, 100)})
    await store.lead("leader", lab.token, 0, "renew")
    await store.lead("leader", lab.token, 0, "resign")


def _with(wanted: Submission, **fields: Any) -> Submission:
    return msgspec.structs.replace(wanted, spec=msgspec.structs.replace(wanted.spec, **fields))


async def record(server: StoreServer) -> list[GoldenCall]:
    """The calls of one run."""
    async with connected(server.url):
        recorder = Recorder(server.url)
        try:
            await use_everything(Lab(Store(recorder), server.url))
        finally:
            await recorder.close()
    return recorder.calls


def digests() -> dict[int, str]:
    """Every version of the library that this tree has had, by its digest."""
    return msgspec.json.decode(DIGESTS.read_bytes(), type=dict[int, str])


def golden() -> list[GoldenCall]:
    """The calls of all versions."""
    files = sorted(FOLDER.glob("calls_*.json"))
    return [call for file in files for call in msgspec.json.decode(file.read_bytes(), type=list[GoldenCall])]


def main() -> None:
    """Write the files of the present version."""
    with tempfile.TemporaryDirectory() as folder:
        server = StoreServer(Path(folder), "redis").start()
        try:
            calls = asyncio.run(record(server))
        finally:
            server.kill()
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"calls_{LIBRARY_VERSION}.json"
    file.write_bytes(b"[\n" + b",\n".join(msgspec.json.encode(call) for call in calls) + b"\n]\n")
    known = {**(digests() if DIGESTS.exists() else {}), LIBRARY_VERSION: own_library().digest}
    DIGESTS.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n")


if __name__ == "__main__":
    main()
