"""explain, plan and snapshot over real HTTP and a real store; and replay, which needs neither."""

import json
from pathlib import Path

import msgspec
import pytest

from manager.cli.exits import Exit
from manager.cli.main import main
from manager.core.explain import Explanation
from manager.core.foresee import PlanView, When
from manager.core.index import index_of
from manager.core.planner import plan
from manager.core.quantities import GIB
from manager.core.snapshot import decode_snapshot
from manager.settings import AutoscalerSettings, GroupSettings, Settings
from tests.integration.api_world import NODE, World, serving, until_answer

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
