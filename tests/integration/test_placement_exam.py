"""The exam of placement on real processes: 500 tasks of both kinds, an agent killed, a late node, and an independent witness.

The witness is the tasks themselves (`witness/device_accounts.py`): each enters what it was promised on each device that it was
given, and takes it out when it ends. Nothing of what it says comes from a ledger, so a ledger that is wrong cannot agree with
it by being wrong twice.
"""

import asyncio
import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributed import Client, as_completed

import rocyard
from autoscaler.providers.local import LocalProvider
from manager.client import task_request
from manager.core.index import Pool
from manager.core.lifecycle import TaskStatus
from manager.core.placement import find
from manager.core.policies import DEFAULT_POLICY
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from tests.integration.cluster import WITNESS, Cluster, eventually
from tests.integration.witness import device_accounts
from tests.unit import factories as make

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

TASKS = 500
RESERVE_GIB = 2
GROUP = "simulated"
LATE = f"{GROUP}-0"
FLEET = "2x2:mi300x,1x1:rx7900xtx,1x1:mi300x/cpx-nps4"
"""The last one is eight devices, of which two share each part of the memory: 48 GiB."""
NODES = 4
ARCHITECTURES = {"cdna3": {"gfx942"}, "gfx11*": {"gfx1100"}}
LATE_S = 1.0
"""From the registration of a late node to the first task that is placed there."""
ENVIRON = {
    # Dask checks its own books after each transition.
    "DASK_DISTRIBUTED__SCHEDULER__VALIDATE": "True",
    "DASK_DISTRIBUTED__WORKER__VALIDATE": "True",
    "ROCYARD_NODE__RESERVE_BYTES": str(RESERVE_GIB * GIB),
    "ROCYARD_LOG__FORMAT": "json",
}


class Examined(msgspec.Struct, frozen=True):
    """One task: what it asks for, which is what it then has by its own books."""

    name: str
    resources: Resources
    seconds: float
    direct: bool


def promised(need: Resources) -> dict[str, Any]:
    """What a task has of each device, by its own books."""
    return {"memory_bytes": need.memory_bytes, "share_milli": need.share_milli, "exclusive": need.exclusive}


def drawn(chance: random.Random, number: int) -> Examined:
    """Sizes are classes of memory, so that leases are what was asked for; two of 96 GiB do not fit a device, two of 95 do."""
    gpus = chance.choice([1, 1, 1, 1, 1, 2])
    gib = chance.choice(
        [4, 8, 11, 22, 23, 45, 60, 95, 96] if gpus == 2 else [4, 4, 8, 8, 11, 11, 22, 22, 23, 45, 60, 95, 96, 190]
    )
    more: dict[str, Any] = {}
    kind = chance.random()
    if kind < 0.04:
        more = {"exclusive": True}
    elif kind < 0.2:
        more = {"share_milli": chance.choice([250, 500, 1000])}
    elif kind < 0.3:
        more = {"architectures": ("cdna3",)}
    elif kind < 0.35 and gpus == 1 and gib <= 22:
        more = {"architectures": ("gfx11*",)}
    seconds = 1.5 if chance.random() < 0.08 else chance.uniform(0.02, 0.2)
    return Examined(f"t{number}", Resources(gib * GIB, gpus, **more), seconds, direct=number % 2 == 0)


# --- what the witness saw -------------------------------------------------------------------------------------------


class Witness:
    """Reads what the tasks have written."""

    def __init__(self, directory: Path, pools: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        (directory / device_accounts.POOLS).write_text(json.dumps(pools or {}))

    def accounts(self) -> dict[str, dict[str, Any]]:
        suffix = device_accounts.ACCOUNT
        return {path.name.removesuffix(suffix): json.loads(path.read_text()) for path in self.directory.glob(f"*{suffix}")}

    def notes(self, event: str = "start") -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            whole, _, _ = (self.directory / "notes.jsonl").read_text().rpartition("\n")  # a reader may see half a write
            return [note for note in map(json.loads, whole.splitlines()) if note["event"] == event]
        return []

    def problems(self, usable_bytes: Mapping[str, int]) -> list[str]:
        """Moments at which more was had of a device than it has, or by more than may share it."""
        problems = []
        for device, account in sorted(self.accounts().items()):
            for what, most in (("memory_bytes", usable_bytes[device]), ("share_milli", 1000)):
                peak = account["peaks"][what]
                if peak["total"] > most:
                    problems.append(f"{device}: {what} {peak['total']} of {most} was had by {_who(peak['held'], what)}")
            problems += [f"{device}: alone, and yet shared by {_who(held, 'exclusive')}" for held in account["shared"]]
        return problems

    def left(self) -> list[str]:
        """Entries of those that have not taken themselves out, and live."""
        entries = (entry for account in self.accounts().values() for entry in account["now"].values())
        return [entry["task"] for entry in entries if device_accounts._began(entry["pid"]) == entry["began"]]

    def vanished(self) -> list[tuple[str, dict[str, Any]]]:
        """Device, and entry of a process that has ended in the middle."""
        gone = []
        for device, account in self.accounts().items():
            dead = [each for each in account["now"].values() if device_accounts._began(each["pid"]) != each["began"]]
            gone += [(device, entry) for entry in (*account["vanished"], *dead)]
        return gone

    def __str__(self) -> str:
        lines = []
        for device, account in sorted(self.accounts().items()):
            peaks = {what: peak["total"] for what, peak in account["peaks"].items()}
            by = _who(account["peaks"].get("memory_bytes", {"held": []})["held"], "memory_bytes")
            gone = [entry["task"] for entry in account["vanished"]]
            lines.append(
                f"{device}: {account['entries']} entries, at most {peaks}, the memory by {by}; "
                f"{len(account['shared'])} intrusions; ended in the middle: {gone}"
            )
        return "\n".join(lines)


def _who(held: list[dict[str, Any]], what: str) -> str:
    return ", ".join(f"{entry['task']} ({entry[what]}, pid {entry['pid']})" for entry in held)


# --- the exam -------------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct):
    """What the exam has left, for the tests below.

    Attributes:
        usable_bytes: by device, and by account of shared memory.
        homes: account → node.
        victim: the node whose agent was killed.
        killed_s, revived_s: when, by the clock of the logs.
        finished: tasks of which somebody outside knew before the kill that they were done.
        results: name → what came of it.
        took_s: from the first submission to the last result.
    """

    cluster: Any
    witness: Any
    tasks: dict[str, Examined]
    usable_bytes: dict[str, int]
    homes: dict[str, str]
    victim: str
    killed_s: float
    revived_s: float
    finished: set[str]
    results: dict[str, str]
    took_s: float


def by_value() -> Callable[..., str]:
    """The task for Dask clients: a function that travels by value, as one of a notebook does."""
    path = str(WITNESS)

    def task(**arguments: Any) -> str:
        import sys

        sys.path.insert(0, path)
        import device_accounts

        return device_accounts.run(**arguments)

    return task


def taking(need: Resources, more_bytes: int) -> Resources:
    """`need`, and more than that."""
    return msgspec.structs.replace(need, memory_bytes=need.memory_bytes + more_bytes)


class Submitted:
    """Tasks of both kinds on their way, and those that somebody outside knows to be done."""

    def __init__(self, cluster: Cluster, client: Client, witness: Witness, tasks: list[Examined], more_bytes: int = 0) -> None:
        self.cluster = cluster
        self._client = client
        self._keys: dict[str, str] = {}
        self.results: dict[str, str] = {}
        self.problem: BaseException | None = None
        slots = [each for each in tasks if not each.direct]
        arguments = {
            each.name: {
                "directory": str(witness.directory),
                "task": each.name,
                "seconds": each.seconds,
                "promised": promised(taking(each.resources, more_bytes)),
            }
            for each in tasks
        }
        requests = [
            task_request("account", arguments[each.name], gpus=each.resources.gpus, **asked(each.resources)) for each in slots
        ]
        task = by_value()
        futures = {}
        for each in tasks:
            if each.direct:
                with rocyard.gpu(count=each.resources.gpus, **asked(each.resources)):
                    future = client.submit(task, **arguments[each.name], pure=False)
                futures[future.key] = future
                self._keys[each.name] = future.key
        self.tasks = dict(zip((each.name for each in slots), cluster.client.submit_many(requests), strict=True))
        self._collector = threading.Thread(target=self._collect, args=(futures,), daemon=True)
        self._collector.start()

    def _collect(self, futures: dict[str, Any]) -> None:
        """Take each result as it comes and hold no future of it: what is lost with a worker is not ours any more."""
        try:
            waiting = as_completed(list(futures.values()), loop=self._client.loop, with_results=True)
            for future, result in waiting:
                self.results[result] = result
                del futures[future.key], future
        except BaseException as error:  # noqa: BLE001  # told by `finish`, in the thread of the test
            self.problem = error

    def finished(self) -> set[str]:
        """Who is done for good. Dask has it from the client, after all that the client said before, whose results are taken."""
        done = {view.task_id for view in self.cluster.client.tasks(status=TaskStatus.SUCCEEDED)}
        known = set(self._client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks)))
        taken = {name for name, key in self._keys.items() if name in self.results and key not in known}
        return taken | {name for name, task in self.tasks.items() if task.task_id in done}

    def finish(self, timeout_s: float) -> dict[str, str]:
        """Every task's result."""
        deadline_s = time.monotonic() + timeout_s
        views = self.cluster.wait_all(list(self.tasks.values()), timeout_s)
        self._collector.join(max(0.0, deadline_s - time.monotonic()))
        if self.problem is not None:
            raise self.problem
        assert not self._collector.is_alive(), f"Dask tasks are not done after {timeout_s} s"
        kept = dict(self.results)
        for name, view in zip(self.tasks, views, strict=True):
            assert view.status is TaskStatus.SUCCEEDED, f"{name} is {view}"
            assert view.result is not None
            kept[name] = json.loads(bytes(view.result))
        return kept


def asked(need: Resources) -> dict[str, Any]:
    """As the REST API and `rocyard.gpu` call it, but for how many."""
    named = {"memory": need.memory_bytes, "share": need.share_milli / 1000, "exclusive": need.exclusive}
    return named | ({"architecture": need.architectures} if need.architectures else {})


def logged(cluster: Cluster, process: str) -> list[dict[str, Any]]:
    lines = (cluster.directory / "data" / "logs" / f"{process}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def seconds_of(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def pools(cluster: Cluster) -> dict[str, str]:
    """Device → the memory that it shares with others, by a name that no other node's has, and that a file may have."""
    devices = [(row.node, device) for row in cluster.state().nodes for device in row.info.devices]
    return {device.uuid: f"{node}-{device.pool}".replace("/", ".") for node, device in devices if device.pool}


def usable(cluster: Cluster) -> dict[str, int]:
    """What tasks may have of each device's memory, and of all that is shared."""
    rows = cluster.state().nodes
    alone = {device.uuid: device.memory_bytes - row.info.reserve_bytes for row in rows for device in row.info.devices}
    return alone | {f"pool-{pool}": alone[device] for device, pool in pools(cluster).items()}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Client]]:
    cluster = Cluster(tmp_path_factory.mktemp("exam"), ENVIRON, simulate=FLEET)
    config = Path(cluster.environ["ROCYARD_CONFIG"])
    functions = {"account": {"target": "device_accounts:run", "path": str(WITNESS), "memory": "1GiB"}}
    config.write_text(json.dumps({"functions": functions}))  # JSON is YAML
    try:
        cluster.start()
        with Client(cluster.dask_address(), timeout=10, set_as_default=False) as client:
            eventually(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == NODES, 30, "all workers")
            yield cluster, client
    finally:
        cluster.destroy()


@pytest.fixture(scope="module")
def exam(running: tuple[Cluster, Client], request: pytest.FixtureRequest) -> Outcome:
    cluster, client = running
    seed = int(request.config.getoption("--soak-seed"))
    chance = random.Random(seed)
    witness = Witness(cluster.directory / "exam", pools(cluster))
    tasks = {each.name: each for each in (drawn(chance, number) for number in range(TASKS))}
    began_s = time.monotonic()
    submitted = Submitted(cluster, client, witness, list(tasks.values()))
    try:
        eventually(lambda: len(witness.notes()) >= TASKS // 8, 60, "an eighth of the tasks has started")
        homes = homes_of(cluster)
        victim = eventually(lambda: busy(witness, tasks, homes), 20, "a node with a task that has long to go")
        before = incarnations(cluster)
        agent = cluster.agent(victim)
        finished = submitted.finished()
        killed_s = time.time()
        agent.send_signal(signal.SIGKILL)
        asyncio.run(add_node(cluster))
        eventually(lambda: incarnations(cluster)[victim] != before[victim], 30, f"the next agent of {victim}")
        results = submitted.finish(90)
    except BaseException as error:
        error.add_note(f"pytest {__file__} --soak-seed {seed}; the witness saw:\n{witness}")
        raise
    took_s = time.monotonic() - began_s
    return Outcome(
        cluster=cluster,
        witness=witness,
        tasks=tasks,
        usable_bytes=usable(cluster),
        homes=homes_of(cluster),
        victim=victim,
        killed_s=killed_s,
        revived_s=seconds_of([each for each in logged(cluster, victim) if each["event"] == "agent_registered"][1]),
        finished=finished,
        results=results,
        took_s=took_s,
    )


def homes_of(cluster: Cluster) -> dict[str, str]:
    """Account → node."""
    homes = {device.uuid: row.node for row in cluster.state().nodes for device in row.info.devices}
    return homes | {f"pool-{pool}": homes[device] for device, pool in pools(cluster).items()}


def busy(witness: Witness, tasks: dict[str, Examined], homes: dict[str, str]) -> str:
    """A node of several on which a task runs that has half a second to go; empty where there is none now."""
    ended = {note["task"] for note in witness.notes("end")}
    for note in witness.notes():
        node = homes[note["devices"][0]]
        left_s = tasks[note["task"]].seconds - (time.monotonic() - note["at"])
        if note["task"] not in ended and left_s > 0.5 and list(homes.values()).count(node) > 1:
            return node
    return ""


def incarnations(cluster: Cluster) -> dict[str, str]:
    return {row.node: row.incarnation for row in cluster.state().nodes}


async def add_node(cluster: Cluster) -> None:
    """What the autoscaler does, which is off."""
    provider = LocalProvider(cluster.directory / "data")
    listing = await provider.list(GROUP)
    assert provider.new_names(listing, 1) == (LATE,)
    await provider.add(listing, (LATE,), 1)


def test_no_device_bears_more_than_it_has(exam: Outcome) -> None:
    assert exam.witness.problems(exam.usable_bytes) == [], f"the witness saw:\n{exam.witness}"
    assert exam.witness.left() == []
    accounts = exam.witness.accounts()
    full = [
        name for name, account in accounts.items() if account["peaks"]["memory_bytes"]["total"] > 0.9 * exam.usable_bytes[name]
    ]
    assert full, f"no device was ever nearly full, so nothing was shown:\n{exam.witness}"
    crowds = [name for name, account in accounts.items() if len(account["peaks"]["memory_bytes"]["held"]) > 1]
    assert crowds, f"no device was ever shared:\n{exam.witness}"


def test_every_task_runs_and_none_twice_but_those_that_the_kill_interrupted(exam: Outcome) -> None:
    assert exam.results == {name: name for name in exam.tasks}
    starts: dict[str, list[dict[str, Any]]] = {}
    for note in exam.witness.notes():
        starts.setdefault(note["task"], []).append(note)
    assert starts.keys() == exam.tasks.keys()
    again = {name: found for name, found in starts.items() if len(found) > 1}
    for name, found in again.items():
        assert name not in exam.finished, f"{name} was done before the kill: {found}"
        assert len(found) == 2, found
        assert exam.homes[found[0]["devices"][0]] == exam.victim, f"{name} was not interrupted: {found}"
        assert found[0]["time"] < exam.revived_s, found
    ended = Counter(note["task"] for note in exam.witness.notes("end"))
    unended = {name for name, found in starts.items() if ended[name] < len(found)}
    assert unended, "the kill has interrupted nothing"
    assert unended <= again.keys()
    for device, entry in exam.witness.vanished():
        assert exam.homes[device] == exam.victim, f"a process ended that nobody had killed: {entry}"
        assert entry["task"] in unended, entry


def test_tasks_of_both_kinds_are_given_what_they_asked_for(exam: Outcome) -> None:
    rows = exam.cluster.state().nodes
    architectures = {device.uuid: device.architecture for row in rows for device in row.info.devices}
    for note in exam.witness.notes():
        need = exam.tasks[note["task"]].resources
        assert len(set(note["devices"])) == need.gpus, note
        assert len({exam.homes[device] for device in note["devices"]}) == 1, note
        for wanted in need.architectures:
            assert {architectures[device] for device in note["devices"]} <= ARCHITECTURES[wanted], note


def test_a_late_node_gets_work_at_once(exam: Outcome) -> None:
    events = [each for each in logged(exam.cluster, "scheduler") if each.get("node") == LATE]
    registered_s = seconds_of(next(each for each in events if each["event"] == "worker_registered"))
    placed_s = seconds_of(next(each for each in events if each["event"] == "slot_placed"))
    told = {each["event"]: seconds_of(each) for each in reversed(logged(exam.cluster, LATE)) if "timestamp" in each}
    there = [note for note in exam.witness.notes() if exam.homes[note["devices"][0]] == LATE]
    waiting = sum(note["time"] > registered_s for note in exam.witness.notes())
    first_s = min(note["time"] for note in there)
    after = {name: at_s - registered_s for name, at_s in {**told, "placed": placed_s, "runs": first_s}.items()}
    print(  # noqa: T201  # figures, for those who run it with -s
        f"{len(exam.tasks)} tasks in {exam.took_s:.1f} s; late node, with {waiting} tasks to start: "
        f"placed on {after['placed']:.3f} s after its Dask worker had registered, and "
        f"{after['placed'] - after['agent_registered']:.3f} s after its agent had; slot open after "
        f"{after['slot_opened']:.3f} s, task runs after {after['runs']:.3f} s; {len(there)} ran there"
    )
    assert waiting > TASKS // 10
    assert placed_s - registered_s < LATE_S


def test_the_scheduler_had_its_books_checked_and_found_right(exam: Outcome, running: tuple[Cluster, Client]) -> None:
    def check(dask_scheduler: Any) -> tuple[bool, list[str]]:
        dask_scheduler.validate_state()
        plugin = dask_scheduler.plugins["rocyard-placement"]
        return dask_scheduler.validate, [*plugin.direct.keys]

    _, client = running
    eventually(lambda: client.run_on_scheduler(check) == (True, []), 20, "validate=True, and no Dask task has a lease")
    for process in ("scheduler", "controller", "api", *sorted(set(exam.homes.values()))):
        events = [event for event in logged(exam.cluster, process) if event["level"] in {"error", "critical"}]
        # Dask says as an error, without an exception, that it could not reach the node that was killed.
        bad = [event for event in events if event["logger"].startswith("rocyard") or "exception" in event]
        assert bad == [], f"{process} says:\n{bad}"


# --- that the exam can be failed ------------------------------------------------------------------------------------


def test_tasks_that_take_more_than_they_were_promised_are_seen(
    running: tuple[Cluster, Client], exam: Outcome, tmp_path: Path
) -> None:
    """Three tasks of 60 GiB fit a device, and say that they have 70: two kinds, real processes, the same witness."""
    cluster, client = running
    witness = Witness(tmp_path / "greedy", pools(cluster))
    need = Resources(60 * GIB)
    greedy = [Examined(f"g{number}", need, 1.0, direct=number % 2 == 0) for number in range(16)]
    submitted = Submitted(cluster, client, witness, greedy, more_bytes=10 * GIB)
    submitted.finish(60)
    problems = witness.problems(usable(cluster))
    assert problems, f"the witness saw nothing:\n{witness}"
    assert all(f"memory_bytes {210 * GIB} of {190 * GIB}" in problem for problem in problems)


def as_it_is(need: Resources) -> Resources:
    return need


def half_the_memory(need: Resources) -> Resources:
    return msgspec.structs.replace(need, memory_bytes=need.memory_bytes // 2)


def no_share(need: Resources) -> Resources:
    return msgspec.structs.replace(need, share_milli=0)


def not_exclusive(need: Resources) -> Resources:
    return msgspec.structs.replace(need, exclusive=False)


def ignoring_leases(pool: Pool) -> None:
    pool.free_bytes = pool.usable_bytes


@pytest.mark.parametrize(
    ("told", "settle", "pool", "lag", "expected"),
    [
        pytest.param(as_it_is, None, "p", 0, set(), id="right"),
        pytest.param(half_the_memory, None, "p", 0, {"memory_bytes"}, id="leases-too-small"),
        pytest.param(no_share, None, "p", 0, {"share_milli"}, id="shares-not-counted"),
        pytest.param(not_exclusive, None, "p", 0, {"alone,"}, id="exclusive-use-not-kept"),
        pytest.param(as_it_is, ignoring_leases, "p", 0, {"memory_bytes"}, id="leases-not-counted"),
        pytest.param(as_it_is, None, "", 0, {"memory_bytes"}, id="shared-memory-counted-for-each-device"),
        pytest.param(as_it_is, None, "p", 3, {"memory_bytes", "share_milli", "alone,"}, id="freed-while-it-runs"),
    ],
)
def test_a_ledger_that_is_wrong_is_found_out(
    told: Callable[[Resources], Resources],
    settle: Callable[[Pool], None] | None,
    pool: str,
    lag: int,
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same witness and the real placement, without processes: each fault that is planted shows as what it is."""
    if settle is not None:
        monkeypatch.setattr(Pool, "settle", settle)
    chance = random.Random(5)
    index = make.index({"a": (24, 24), "b": (48, 48), "c": (24,)}, reserve_gib=1)
    index.add_node("d", "i1", [msgspec.structs.replace(device, pool=pool) for device in make.devices(24, 24)], GIB)
    witness = Witness(tmp_path / "ledger", {"d-d0": "d", "d-d1": "d"})
    live: list[tuple[str, contextlib.ExitStack]] = []
    ending: deque[contextlib.ExitStack] = deque()  # freed in the ledger
    with contextlib.ExitStack() as all_of_them:
        for number in range(200):
            need = Resources(
                chance.choice([4, 8, 12, 20]) * GIB,
                chance.choice([1, 1, 2]),
                share_milli=chance.choice([0, 300, 500]),
                exclusive=chance.random() < 0.1,
            )
            name = f"s{number}"
            if (grant := find(told(need), index, DEFAULT_POLICY)) is not None:
                index.lease(name, grant)
                devices = [f"{grant.node}-{uuid}" for uuid in grant.devices]
                had = all_of_them.enter_context(contextlib.ExitStack())
                had.enter_context(device_accounts.having(witness.directory, name, devices, **promised(need)))
                live.append((name, had))
            if live and (grant is None or chance.random() < 0.3):
                slot, had = live.pop(chance.randrange(len(live)))
                index.free(slot)
                ending.append(had)
            while len(ending) > lag:
                ending.popleft().close()
    views = index.nodes.values()
    usable_bytes = {f"{view.name}-{uuid}": device.pool.usable_bytes for view in views for uuid, device in view.devices.items()}
    problems = witness.problems(usable_bytes | {"pool-d": 23 * GIB})
    assert {problem.split()[1] for problem in problems} == expected, problems
