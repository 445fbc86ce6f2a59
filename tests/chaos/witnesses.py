"""What is seen of a cluster from outside while it runs: ends as the store tells of them, who leads, which agent is whose.

Reads the store itself, past the proxy; a store that is away is waited for. It changes nothing.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from manager.core.errors import StoreUnavailable
from manager.core.keys import Keys
from manager.store import Store, StoreConnection
from manager.store.connection import StoreReplyError
from tests.chaos.history import Note, Row, TaskEnd, Writer
from tests.contract import store_harness

PERIOD_S: Final = 0.25
DEADLINE_S: Final = 2.0
DUMP_S: Final = 60.0
PAGE: Final = 1000
LIVE: Final = ("BLOCKED", "QUEUED", "RUNNING", "RETRY_WAIT")
TAIL_BYTES: Final = 65536

_decode_note = msgspec.json.Decoder(Note).decode


class Watch:
    """Looks again and again.

    Attributes:
        leader_pid: of the controller that leads, as the store has it.
        agents: node → pid of its agent.
        counts: tasks by state.
        ended: how many ends were told.
        looked: set after each look at everything.
    """

    def __init__(self, url: Callable[[], str], witness: Path, ends: Writer) -> None:
        self.leader_pid = 0
        self.agents: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.ended = 0
        self.looked = asyncio.Event()
        self._url = url
        self._witness = witness
        self._ends = ends
        self._after = "-"
        self._keys = Keys()

    async def run(self) -> None:
        """Until cancelled."""
        connection = StoreConnection(self._url(), DEADLINE_S, "chaos")
        try:
            while True:
                with contextlib.suppress(StoreUnavailable, StoreReplyError):
                    await self.look(connection)
                await asyncio.sleep(PERIOD_S)
        finally:
            await connection.close()

    async def look(self, connection: StoreConnection) -> None:
        """One look."""
        while await self._read_ends(connection) == PAGE:
            pass
        flat = await connection.call("HGETALL", self._keys.counts)
        self.counts = {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}
        holder = await connection.call("HGET", self._keys.leader, "holder")
        parts = (holder or b"").decode().split("/")
        self.leader_pid = int(parts[1]) if len(parts) == 3 else 0
        agents = {}
        for node in await connection.call("SMEMBERS", self._keys.nodes):
            name = node.decode()
            info = await connection.call("HGET", self._keys.node(name), "info")
            if info:
                agents[name] = json.loads(info)["pid"]
        self.agents = agents
        self.looked.set()

    async def _read_ends(self, connection: StoreConnection) -> int:
        entries = await connection.call("XRANGE", self._keys.events, self._after, "+", "COUNT", PAGE)
        for entry, flat in entries:
            fields = {flat[i].decode(): flat[i + 1].decode(errors="replace") for i in range(0, len(flat), 2)}
            self._ends.write(TaskEnd(entry.decode(), fields["i"], fields["s"], int(fields["a"])))
            self._after = f"({entry.decode()}"
            self.ended += 1
        return len(entries)

    @property
    def live(self) -> int:
        """Tasks that have not ended."""
        return sum(self.counts.get(state, 0) for state in LIVE)

    def busy(self) -> dict[int, int]:
        """Executors that are in a task now, each with its agent, by what the newest tasks have written."""
        try:
            with self._witness.open("rb") as file:
                file.seek(max(0, self._witness.stat().st_size - TAIL_BYTES))
                lines = file.read().split(b"\n")[1:-1]
        except FileNotFoundError:
            return {}
        newest = {note.pid: note for note in map(_decode_note, lines)}
        return {pid: note.agent for pid, note in newest.items() if note.event == "start" and Path(f"/proc/{pid}").exists()}


async def dump_store(url: str, rows: Writer, results: Path) -> str:
    """Write down every task as it lies in the store, with its result; what a recount of the store finds wrong, empty: nothing.

    Args:
        results: the folder of large results.
    """
    store = Store(StoreConnection(url, DUMP_S, "chaos-dump"))
    try:
        found = await store_harness.dump(store)
    finally:
        await store.connection.close()
    for task_id, task in found.tasks.items():
        rows.write(_row(task_id, task, found.hashes.get(f"a:{task.get('array', '')}", {}), results))
    return recount(found)


def recount(found: store_harness.Dump) -> str:
    """What does not add up; empty: all does. The events are left out: their stream forgets, and `Watch` has read them."""
    try:
        store_harness._check_tasks(found)
        store_harness._check_counters(found)
        store_harness._check_work(found)
        store_harness._check_slots(found)
        store_harness._check_devices(found)
    except store_harness.Violation as violation:
        return str(violation)
    return ""


def _row(task_id: str, task: dict[str, str], array: dict[str, str], results: Path) -> Row:
    spec = json.loads(task.get("spec") or array["spec"])
    key = spec["args"].get("key", "")
    result, damage = task.get("result", ""), ""
    if task.get("file"):
        result, damage = _from_file(json.loads(task["file"]), results)
    return Row(
        task=task_id,
        state=task["state"],
        key=f"{key}/{task['index']}" if array else key,
        attempt=int(task["attempt"]),
        failures=int(task.get("failures") or 0),
        crashes=int(task.get("crashes") or 0),
        losses=int(task.get("losses") or 0),
        error=json.loads(task["error"])["type"] if task.get("error") else "",
        result=result,
        damage=damage,
        after=tuple(spec.get("after", ())),
        whatever=spec.get("after_failed") == "run",
    )


def _from_file(reference: dict[str, Any], results: Path) -> tuple[str, str]:
    """A result that lies in a file, without what only made it large; and what is wrong with the file."""
    try:
        content = (results / reference["name"]).read_bytes()
    except OSError as error:
        return "", str(error)
    if len(content) != reference["bytes"] or hashlib.sha256(content).hexdigest() != reference["sha256"]:
        return "", f"{reference['name']} has {len(content)} bytes, and is not what was committed: {reference}"
    return json.dumps({**json.loads(content), "more": ""}), ""
