"""explain, plan and snapshot over real HTTP and a real store; and replay, which needs neither."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from manager.cli.exits import Exit
from manager.cli.main import main
from manager.core.explain import Explanation
from manager.core.foresee import Forecast, PlanView, When, foresee
from manager.core.index import index_of
from manager.core.planner import plan
from manager.core.quantities import GIB
from manager.core.requests import PLAN_KINDS_MAX
from manager.core.snapshot import decode_snapshot
from manager.settings import AutoscalerSettings, GroupSettings, Settings
from tests.integration.api_world import NODE, World, serving, until, until_answer

pytestmark = pytest.mark.integration
GROUPS = Settings(
    groups={"big": GroupSettings(devices="2:mi355x", workers_max=3)},
    autoscaler=AutoscalerSettings(step_up_max=2),
)


@pytest.fixture
async def world(store_server):
    async with serving(store_server.url, GROUPS) as world:
        await world.agent.lead()
        await until_answer(lambda: planned(world), lambda view: view.when is When.NOW)
        yield world


async def planned(world: World, **fields: object) -> PlanView:
    body = {"function": "echo"} | fields
    reply = await world.client().post("/v1/plan", json=body)
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=PlanView)


async def dump(world: World) -> dict[str, bytes]:
    """Everything that is in the store."""
    keys = await world.store.connection.call("KEYS", "*")
    return {key.decode(): await world.store.connection.call("DUMP", key) for key in keys}


async def test_a_plan_says_where_and_changes_nothing(world: World):
    before = await dump(world)
    found = await planned(world, resources={"memory": "100GiB"}, count=3)
    (forecast,) = found.requests
    assert (found.when, forecast.when, forecast.count) == (When.NOW, When.NOW, 3)
    assert {place.node for place in forecast.places} == {NODE}
    assert 1 <= forecast.now <= 2, "there are two devices of 191 GiB"
    assert (await planned(world, resources={"memory": "250GiB"})).when is When.AFTER_SCALE_UP
    assert (await planned(world, resources={"memory": "400GiB"})).when is When.NEVER
    assert await dump(world) == before


async def test_a_plan_says_what_the_autoscaler_would_do(world: World):
    found = await planned(world, resources={"memory": "250GiB"}, count=5)
    (forecast,) = found.requests
    assert forecast.reason == "WaitingForScaleUp"
    (change,) = forecast.groups
    assert (change.group, change.nodes, change.need_before, change.need_after) == ("big", 0, 0, 3)
    (step,) = found.scaling
    assert (step.group, step.action, step.nodes, step.reason) == ("big", "add", 2, "NeedAboveSize")


async def test_the_body_is_that_of_a_submission_or_of_a_batch(world: World):
    task = {"function": "echo", "args": {"x": 1}, "resources": {"memory": "24GiB"}}
    reply = await world.client("reader").post("/v1/plan", json={"tasks": [task, task, task | {"priority": 5}]})
    found = msgspec.json.decode(reply.content, type=PlanView)
    assert [forecast.count for forecast in found.requests] == [2, 1]
    for body, words in (
        ({"function": "echo", "resources": {"memory": "lots"}}, "resources.memory"),
        ({"function": "echo", "args": {"x": -1}}, "args"),
        ({"function": "echo", "countt": 2}, "Did you mean 'count'?"),
        ({"function": "echo", "count": 0}, "count"),
        ({"tasks": [task, {"functon": "echo"}]}, "tasks[1]"),
    ):
        reply = await world.client().post("/v1/plan", json=body)
        assert reply.status_code in {400, 422}, reply.text
        assert words in reply.json()["detail"], reply.text


async def test_a_plan_is_of_a_bounded_number_of_kinds(world: World):
    def tasks(kinds: int) -> dict[str, object]:
        different = [{"function": "echo", "resources": {"memory": f"{1 + number}GiB"}} for number in range(kinds)]
        return {"tasks": different * 2}

    found = await world.client().post("/v1/plan", json=tasks(PLAN_KINDS_MAX))
    assert (found.status_code, len(found.json()["requests"])) == (200, PLAN_KINDS_MAX)
    refused = await world.client().post("/v1/plan", json=tasks(PLAN_KINDS_MAX + 1))
    assert (refused.status_code, refused.json()["field"]) == (400, "tasks"), refused.text
    for words in (f"of {PLAN_KINDS_MAX + 1} kinds", f"at most {PLAN_KINDS_MAX}"):
        assert words in refused.json()["detail"]


class Gate:
    """Holds plans at work, each before its kinds, until it is opened; counts the kinds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.kinds = 0
        monkeypatch.setattr("manager.api.foresight.foresee", self._foresee)

    def _foresee(self, *args: Any, **more: Any) -> Iterator[Forecast]:
        for forecast in foresee(*args, **more):
            self.kinds += 1
            assert self.open.wait(20)
            yield forecast


async def test_plans_are_worked_out_one_after_the_other(world: World, monkeypatch):
    gate = Gate(monkeypatch)
    first = asyncio.create_task(planned(world))
    await until(lambda: gate.kinds)
    with monkeypatch.context() as patched:
        patched.setattr("manager.api.foresight.TURN_S", 0.05)
        late = await world.client("reader").post("/v1/plan", json={"function": "echo"})
    assert (late.status_code, late.json()["code"], late.headers["retry-after"]) == (503, "Overloaded", "1")
    assert gate.kinds == 1, "two plans were worked out at once"
    second = asyncio.create_task(planned(world))
    assert (await world.client().get("/v1/tasks")).status_code == 200, "others wait for a plan"
    gate.open.set()
    assert (await first) == (await second)
    assert gate.kinds == 2


async def test_a_plan_ends_once_nobody_waits_for_it(world: World, monkeypatch):
    gate = Gate(monkeypatch)
    connections = world.server.server_state.connections
    tasks = [{"function": "echo", "priority": priority} for priority in range(5)]
    async with httpx.AsyncClient(base_url=world.base_url, headers=world.client().headers) as leaving:
        before = set(connections)
        asking = asyncio.create_task(leaving.post("/v1/plan", json={"tasks": tasks}))
        await until(lambda: gate.kinds)
        (its_own,) = connections - before
        asking.cancel()
    await until(lambda: its_own not in connections)
    for _ in range(10):  # turns of the loop until the plan has heard of it
        await asyncio.sleep(0)
    gate.open.set()
    assert (await planned(world)).when is When.NOW, "the place was not left"
    assert gate.kinds == 2, "a plan went on for nobody"


async def test_a_key_has_a_bounded_number_of_plans(store_server, monkeypatch):
    monkeypatch.setattr("manager.api.foresight.PLANS_MAX", 1)
    async with serving(store_server.url) as world:
        gate = Gate(monkeypatch)
        first = asyncio.create_task(planned(world))
        await until(lambda: gate.kinds)
        more = await world.client().post("/v1/plan", json={"function": "echo"})
        assert (more.status_code, more.json()["code"]) == (503, "Overloaded")
        gate.open.set()
        assert (await first) == await planned(world)


async def test_a_plan_agrees_with_the_explanation_once_it_is_submitted(world: World):
    await world.submit(resources={"memory": "150GiB"})
    await world.submit(resources={"memory": "150GiB"}, who="other")
    shapes = [queue.shape_id for queue in (await world.store.look(leader=False)).queues]
    for shape, device in zip(shapes, world.agent.devices, strict=True):
        slot = await world.agent.open(shape)
        if device is not world.agent.devices[0]:
            await world.store.close_slot(slot, world.agent.incarnation, "test")
        else:
            await world.agent.claim(slot)
    wanted = {"resources": {"memory": "180GiB", "gpus": 2}}
    forecast = (await until_answer(lambda: planned(world, **wanted), lambda view: view.when is When.LATER)).requests[0]
    task = await world.submit(**wanted)
    found = await until_answer(lambda: explained(world, task), lambda found: found.memory_bytes == 180 * GIB)
    assert (found.reason, found.nearest) == (forecast.reason, forecast.nearest)
    assert found.reason == "InsufficientMemory"
    assert found.nearest is not None
    assert found.nearest.short_by_bytes == (150 + 180 - 191) * GIB
    assert [each.node for each in found.unblocks][:1] == [NODE]


async def test_tasks_of_a_higher_priority_stand_before_it(world: World):
    for memory in ("16GiB", "17GiB"):
        for _ in range(3):
            await world.submit(resources={"memory": memory}, priority=5)
    await world.submit(resources={"memory": "18GiB"})
    await world.submit(resources={"memory": "19GiB"})
    task = await world.submit(resources={"memory": "19GiB"})
    found = await until_answer(lambda: explained(world, task), lambda found: found.before == 7)
    assert (found.position, found.before, found.beside) == (1, 7, 1)


async def test_a_snapshot_has_no_secrets_and_is_replayed_without_a_cluster(world: World, tmp_path: Path, capsys):
    await world.submit(args={"x": 1, "text": "sesame-open"}, resources={"memory": "24GiB"})
    await world.submit("any", args={"password": "hunter2"}, resources={"memory": "48GiB"})
    await world.agent.run_all()
    for _ in range(3):
        await world.submit("any", args={"password": "hunter2"}, resources={"memory": "48GiB"}, who="other")
    assert (await world.client().get("/v1/snapshot")).status_code == 403
    raw = await until_answer(
        lambda: fetched(world), lambda raw: any(queue.depth == 3 for queue in decode_snapshot(raw).state.queues)
    )
    for word in (b"hunter2", b"sesame", b"password", b"127.0.0.1", world.keys["admin"].encode()):
        assert word not in raw
    snapshot = decode_snapshot(raw)
    state = await world.store.look(leader=False)
    held = frozenset[str]()
    assert plan(snapshot.state, index_of(snapshot.state), held, snapshot.limits) == plan(
        state, index_of(state), held, snapshot.limits
    ), "what the leader decides for that state"
    path = tmp_path / "s.json"
    path.write_bytes(raw)
    answers = []
    for _ in range(2):
        assert main(["replay", str(path), "--policy", "all", "--output", "json"]) == Exit.OK
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    opened = [step for step in answers[0][0]["steps"] if step["what"] == "open"]
    assert sum(step["count"] for step in opened) == 3
    assert {step["node"] for step in opened} == {NODE}


async def explained(world: World, task: str) -> Explanation:
    reply = await world.client().get(f"/v1/tasks/{task}/explain")
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=Explanation)


async def fetched(world: World) -> bytes:
    reply = await world.client("admin").get("/v1/snapshot")
    assert reply.status_code == 200, reply.text
    return reply.content
