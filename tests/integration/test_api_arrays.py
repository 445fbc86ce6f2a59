"""Arrays of tasks over real HTTP: one request, a record for each task, one place to see and to end them."""

import asyncio

import pytest

from manager.core.ids import id_in_array, is_array_id
from manager.core.lifecycle import Outcome
from manager.settings import Settings, TenantSettings
from tests.integration.api_world import World, serving

pytestmark = pytest.mark.integration
ECHO = {"function": "echo", "args": {}, "index_as": "x"}


async def make(world: World, **fields: object) -> str:
    reply = await world.client().post("/v1/tasks", json=ECHO | fields)
    assert reply.status_code == 202, reply.text
    assert reply.json() == {"task_id": reply.json()["task_id"], "status": "QUEUED", "count": fields["count"]}
    assert reply.headers["location"] == f"/v1/arrays/{reply.json()['task_id']}"
    return str(reply.json()["task_id"])


async def test_an_array_has_a_record_for_each_task_when_it_is_answered(world: World):
    array_id = await make(world, count=1201)
    assert is_array_id(array_id)
    array = (await world.client().get(f"/v1/arrays/{array_id}")).json()
    counts = {name: array[name] for name in ("count", "made", "succeeded", "failed", "cancelled", "unfinished")}
    assert counts == {"count": 1201, "made": 1201, "succeeded": 0, "failed": 0, "cancelled": 0, "unfinished": 1201}
    assert (array["function"], array["index_as"], array["name"]) == ("echo", "x", None)
    last = (await world.client().get(f"/v1/tasks/{id_in_array(array_id, 1200)}")).json()
    assert (last["status"], last["array_id"], last["index"]) == ("QUEUED", array_id, 1200)


async def test_its_tasks_are_listed_page_by_page_and_by_name(world: World):
    await world.submit()
    array_id = await make(world, count=5, name="sweep")
    await world.submit()
    for which in (f"array={array_id}", "name=sweep"):
        found, cursor = [], ""
        while True:
            page = (await world.client().get(f"/v1/tasks?{which}&limit=2{cursor}")).json()
            found += [(one["index"], one["task_id"]) for one in page["tasks"]]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert found == [(index, id_in_array(array_id, index)) for index in (4, 3, 2, 1, 0)]
    await world.store.cancel(id_in_array(array_id, 3), "alpha")
    ended = (await world.client().get(f"/v1/tasks?array={array_id}&status=CANCELLED")).json()["tasks"]
    assert [one["index"] for one in ended] == [3]
    assert (await world.client("other").get(f"/v1/tasks?array={array_id}")).json()["tasks"] == []
    assert (await world.client().get("/v1/tasks?array=x")).status_code == 400
    assert (await world.client().get(f"/v1/tasks?array={array_id}&name=sweep")).status_code == 400


async def test_its_counts_follow_its_tasks_and_a_task_can_come_after_it(world: World):
    array_id = await make(world, count=3)
    child = await world.submit(after=[array_id], after_failed="run")
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    claims = {claim.index: claim for claim in await world.agent.claim(slot, 3)}
    assert claims.keys() == {0, 1, 2}
    await world.agent.finish(slot, claims[0])
    await world.agent.finish(slot, claims[1], b'{"type":"OSError","message":"x"}', Outcome.FAILED)
    said = (await world.client().get(f"/v1/tasks/{child}/explain")).json()
    assert f"{array_id} (1 of its 3 tasks to go)" in said["message"]
    await world.agent.finish(slot, claims[2])
    array = (await world.client().get(f"/v1/arrays/{array_id}")).json()
    assert (array["succeeded"], array["failed"], array["unfinished"]) == (2, 1, 0)
    assert await world.agent.claim(slot) or (await world.store.due() and await world.agent.claim(slot))
    shown = (await world.client().get(f"/v1/tasks/{id_in_array(array_id, 0)}?wait=5s")).json()
    assert (shown["status"], shown["index"]) == ("SUCCEEDED", 0)


async def test_all_of_it_is_cancelled_at_once(world: World):
    array_id = await make(world, count=600)
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    assert claim.index == 0
    path = f"/v1/arrays/{array_id}/cancel"
    assert (await world.client("other").post(path)).status_code == 404
    assert (await world.client("reader").post(path)).status_code == 403
    assert (await world.client().post(path)).json() == {"array_id": array_id, "cancelled": 599, "ending": 1}
    await world.agent.finish(slot, claim, b"", Outcome.CANCELLED)
    array = (await world.client().get(f"/v1/arrays/{array_id}")).json()
    assert (array["cancelled"], array["unfinished"]) == (600, 0)
    assert (await world.client().post(path)).json() == {"array_id": array_id, "cancelled": 0, "ending": 0}


async def test_an_array_is_no_task_and_says_so(world: World):
    array_id = await make(world, count=2)
    for ask in (
        world.client().get(f"/v1/tasks/{array_id}"),
        world.client().post(f"/v1/tasks/{array_id}/cancel"),
        world.client().get(f"/v1/tasks/{array_id}/logs"),
    ):
        refused = await ask
        assert (refused.status_code, refused.json()["array_id"]) == (404, array_id)
        assert f"/v1/arrays/{array_id}" in refused.json()["detail"]
    for nothing in (await world.submit(), "0" * 26, "x"):
        assert (await world.client().get(f"/v1/arrays/{nothing}")).status_code == 404
    assert "array_id" not in (await world.client("other").get(f"/v1/tasks/{array_id}")).json()


async def test_the_same_request_again_is_the_same_array(world: World):
    body = ECHO | {"count": 700}
    first, again = [await world.client().post("/v1/tasks", json=body, headers={"Idempotency-Key": "a"}) for _ in range(2)]
    assert again.json() == first.json() | {"replayed": True}
    assert again.headers["location"] == first.headers["location"]
    refused = await world.client().post("/v1/tasks", json=body | {"count": 701}, headers={"Idempotency-Key": "a"})
    assert refused.json()["code"] == "IdempotencyConflict"


async def test_what_can_be_no_array_is_refused(store_server):
    settings = Settings(tenant=TenantSettings(active_tasks_max=10))
    async with serving(store_server.url, settings) as world:
        for fields, status, words in (
            ({"count": 0}, 400, "count"),
            ({"count": 10_001}, 400, "10000"),
            ({"count": 3, "index_as": "y"}, 422, "echo has no argument 'y'. It takes: x, text"),
            ({"count": 3, "index_as": "text"}, 422, "args"),
            ({"count": 3, "args": {"x": 1}}, 400, "args too"),
            ({"count": 11}, 429, "active_tasks_max"),
        ):
            refused = await world.client().post("/v1/tasks", json=ECHO | fields)
            assert refused.status_code == status, refused.text
            assert words in refused.json()["detail"]
        refused = await world.client().post("/v1/tasks/batch", json={"tasks": [ECHO | {"count": 3}]})
        assert (refused.status_code, refused.json()["field"]) == (400, "tasks[0].count")
        plain = {"function": "echo", "args": {"x": 1}}
        replies = await asyncio.gather(*(world.client().post("/v1/tasks", json=plain | {"count": 5}) for _ in range(4)))
        assert sorted(reply.status_code for reply in replies) == [202, 202, 429, 429]
