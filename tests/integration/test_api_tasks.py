"""The routes of tasks over real HTTP and a real store."""

import asyncio
import datetime as dt

import msgspec
import pytest

from manager.core.answers_tasks import Accepted, TaskPage, TaskView
from manager.core.ids import is_id
from manager.core.lifecycle import Outcome, TaskStatus
from manager.settings import Settings, TenantSettings
from tests.integration.api_world import GIB, NODE, World, serving, until, until_answer

pytestmark = pytest.mark.integration


async def test_a_submitted_task_is_on_disk_and_says_where_to_look(world: World):
    reply = await world.client().post("/v1/tasks", json={"function": "echo", "args": {"x": 1}})
    assert reply.status_code == 202
    accepted = msgspec.json.decode(reply.content, type=Accepted)
    assert is_id(accepted.task_id)
    assert accepted.status is TaskStatus.QUEUED
    assert reply.headers["location"] == f"/v1/tasks/{accepted.task_id}"
    record = await world.store.task(accepted.task_id)
    assert record is not None
    assert record.spec is not None
    assert (record.tenant, record.function, bytes(record.spec.args)) == ("alpha", "echo", b'{"x":1}')
    assert record.spec.resources.memory_bytes == GIB


async def test_what_is_asked_for_stands_in_the_record(world: World):
    task_id = await world.submit(
        resources={"memory": "24GiB", "gpus": 2}, priority=3, max_attempts=4, time_limit="5m", args={"x": 7}
    )
    view = msgspec.json.decode((await world.client().get(f"/v1/tasks/{task_id}?args=true")).content, type=TaskView)
    assert (view.memory_bytes, view.gpus, view.priority, view.max_attempts) == (24 * GIB, 2, 3, 4)
    assert (view.time_limit_s, view.args) == (300.0, msgspec.Raw(b'{"x":7}'))
    assert view.created_at.tzinfo is not None
    assert abs((dt.datetime.now(dt.UTC) - view.created_at).total_seconds()) < 60


async def test_memory_may_be_a_number_of_bytes(world: World):
    task_id = await world.submit(resources={"memory": 123456789})
    record = await world.store.task(task_id)
    assert record is not None
    assert record.spec is not None
    assert record.spec.resources.memory_bytes == 123456789


async def test_get_with_wait_answers_when_the_task_ends(world: World):
    task_id = await world.submit(args={"x": 5})
    waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=30s"))
    assert await world.agent.run_all() == [task_id]
    reply = await waiting
    view = msgspec.json.decode(reply.content, type=TaskView)
    assert reply.status_code == 200
    assert (view.status, view.result, view.node, view.attempt) == (TaskStatus.SUCCEEDED, msgspec.Raw(b'{"x":5}'), NODE, 1)
    assert view.started_at is not None
    assert view.finished_at is not None
    assert view.created_at <= view.started_at <= view.finished_at


async def test_a_wait_is_obeyed_also_where_arguments_are_wanted(world: World):
    task_id = await world.submit(args={"x": 5})
    path = f"/v1/tasks/{task_id}?args=true&wait="
    waiting = asyncio.create_task(world.client().get(f"{path}30s"))
    await until(lambda: world.server.api.ends._waiters.get(task_id))
    await world.agent.run_all()
    for reply in (await waiting, await world.client().get(f"{path}30s")):
        view = msgspec.json.decode(reply.content, type=TaskView)
        assert (view.status, view.args) == (TaskStatus.SUCCEEDED, msgspec.Raw(b'{"x":5}'))
    refused = await world.client().get(f"{path}soon")
    assert (refused.status_code, refused.json()["field"]) == (400, "wait")


async def test_what_is_remembered_equals_what_is_read(world: World):
    """The answer made from the event must be that which the record would give."""
    task_id = await world.submit()
    await world.agent.run_all()
    remembered = (await world.client().get(f"/v1/tasks/{task_id}?wait=5")).json()
    world.server.api.ends.forget(task_id)
    read = (await world.client().get(f"/v1/tasks/{task_id}?wait=5")).json()
    for name in ("created_at", "queued_at"):  # the one time that this process reckons: to the millisecond or two
        near = dt.datetime.fromisoformat(remembered.pop(name)) - dt.datetime.fromisoformat(read.pop(name))
        assert abs(near.total_seconds()) < 0.05
    assert remembered == read


async def test_wait_ends_with_its_time_and_shows_the_task_as_it_is(world: World):
    task_id = await world.submit()
    began = asyncio.get_running_loop().time()
    reply = await world.client().get(f"/v1/tasks/{task_id}?wait=0.3")
    assert 0.25 < asyncio.get_running_loop().time() - began < 2
    assert reply.json()["status"] == "QUEUED"


async def test_a_wait_above_the_limit_is_cut(store_server):
    settings = msgspec.structs.replace(Settings(), api=msgspec.structs.replace(Settings().api, wait_s_max=0.2))
    async with serving(store_server.url, settings) as world:
        task_id = await world.submit()
        began = asyncio.get_running_loop().time()
        await world.client().get(f"/v1/tasks/{task_id}?wait=1h")
        assert asyncio.get_running_loop().time() - began < 2


@pytest.mark.parametrize(
    ("outcome", "payload", "status"),
    [
        pytest.param(
            Outcome.SUCCEEDED, b'"' + b"x" * 10_000 + b'"', TaskStatus.SUCCEEDED, id="a result too large for an event"
        ),
        pytest.param(
            Outcome.FAILED, b'{"type":"ValueError","message":"no","traceback":"t"}', TaskStatus.FAILED, id="a failure"
        ),
    ],
)
async def test_waiters_get_what_an_event_does_not_hold(world: World, outcome, payload, status):
    task_id = await world.submit()
    waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=30"))
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    await world.agent.finish(slot, claim, payload, outcome)
    view = msgspec.json.decode((await waiting).content, type=TaskView)
    assert view.status is status
    if status is TaskStatus.FAILED:
        assert view.error is not None
        assert (view.error.type, view.failures) == ("ValueError", 1)
    else:
        assert bytes(view.result or b"") == payload


@pytest.mark.parametrize(
    ("payload", "outcome"),
    [(b'{"type":"ValueError","message":"no"}', Outcome.FAILED), (b'"' + b"x" * 10_000 + b'"', Outcome.SUCCEEDED)],
    ids=["a failure", "a large result"],
)
async def test_a_wait_that_comes_after_the_end_is_answered_at_once(world: World, payload, outcome):
    """Also where the event did not say enough to answer from it."""
    task_id = await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    await world.agent.finish(slot, claim, payload, outcome)
    remembered = world.server.api.ends.known(task_id, "alpha")
    assert remembered is not None
    await until(lambda: remembered.event is not None)
    for _ in range(2):
        began = asyncio.get_running_loop().time()
        reply = await world.client().get(f"/v1/tasks/{task_id}?wait=30")
        assert reply.json()["finished_at"] is not None
        assert asyncio.get_running_loop().time() - began < 2


async def test_many_waiters_of_one_task_and_of_other_processes_tasks_are_all_answered(world: World, store_server):
    """A second API process that submitted nothing hears of the ends as well."""
    async with serving(store_server.url, flush=False) as second:
        task_id = await world.submit()
        client = second.client()
        client.headers["authorization"] = f"Bearer {world.keys['user']}"
        waiting = [asyncio.create_task(client.get(f"/v1/tasks/{task_id}?wait=20")) for _ in range(10)]
        await asyncio.gather(*(second.client("nobody").get("/livez") for _ in range(3)))
        await world.agent.run_all()
        assert {(await one).json()["status"] for one in waiting} == {"SUCCEEDED"}
        assert not second.server.api.ends._waiters


async def test_a_peer_that_goes_away_leaves_no_waiter(world: World):
    task_id = await world.submit()
    host, port = world.base_url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"GET /v1/tasks/{task_id}?wait=60 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.keys['user']}\r\n\r\n"
    writer.write(head.encode())
    await until(lambda: task_id in world.server.api.ends._waiters)
    writer.close()
    await until(lambda: task_id not in world.server.api.ends._waiters)


async def test_batch_is_accepted_whole(world: World):
    body = {"tasks": [{"function": "echo", "args": {"x": number}} for number in range(500)]}
    reply = await world.client().post("/v1/tasks/batch", json=body)
    assert reply.status_code == 202
    ids = [task["task_id"] for task in reply.json()["tasks"]]
    assert len(set(ids)) == 500
    records = await asyncio.gather(*(world.store.task(task_id) for task_id in ids))
    assert [bytes(record.spec.args) for record in records] == [b'{"x":%d}' % number for number in range(500)]


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        pytest.param({"function": "nope"}, 404, id="unknown function"),
        pytest.param({"function": "echo", "args": {"x": "one"}}, 422, id="wrong argument"),
        pytest.param({"function": "echo", "args": {"x": 1}, "resources": {"memory": "9TiB"}}, 422, id="too large"),
        pytest.param({"function": "echo", "args": {"x": 1}, "priority": 1.5}, 400, id="wrong type"),
        pytest.param({"function": "echo", "args": {"x": 1}, "priority": "hihg"}, 400, id="unknown name"),
    ],
)
async def test_batch_with_one_wrong_task_accepts_none_and_names_it(world: World, bad, status):
    tasks = [{"function": "echo", "args": {"x": 1}}] * 3
    reply = await world.client().post("/v1/tasks/batch", json={"tasks": [*tasks, bad]})
    assert reply.status_code == status
    if status != 404:
        assert "tasks[3]" in reply.json()["detail"]
    assert (await world.client().get("/v1/tasks")).json()["tasks"] == []


async def test_a_tenant_over_its_limit_is_told_to_come_again(store_server):
    settings = msgspec.structs.replace(Settings(), tenants={"alpha": TenantSettings(active_tasks_max=3)})
    async with serving(store_server.url, settings) as world:
        for _ in range(2):
            await world.submit()
        body = {"tasks": [{"function": "echo", "args": {"x": 1}}] * 2}
        reply = await world.client().post("/v1/tasks/batch", json=body)
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (429, "QuotaExceeded", "1")
        await world.submit()
        assert (await world.client().post("/v1/tasks", json=body["tasks"][0])).status_code == 429
        other = await world.client("other").post("/v1/tasks", json=body["tasks"][0])
        assert other.status_code == 202, "a limit of one tenant is none of another"
        await world.agent.run_all()
        await world.submit()


async def test_list_is_newest_first_and_goes_on_by_cursor(world: World):
    ids = [await world.submit() for _ in range(7)]
    seen: list[str] = []
    query = {"limit": "3"}
    for _ in range(3):
        page = msgspec.json.decode((await world.client().get("/v1/tasks", params=query)).content, type=TaskPage)
        seen += [task.task_id for task in page.tasks]
        if page.next_cursor is None:
            break
        query["cursor"] = page.next_cursor
    assert seen == ids[::-1]


async def test_list_filters_by_status_and_function(world: World):
    first = await world.submit()
    await world.agent.run_all()
    second = await world.submit("any", args={})

    async def ids(query: str) -> list[str]:
        return [task["task_id"] for task in (await world.client().get(f"/v1/tasks?{query}")).json()["tasks"]]

    assert await ids("status=SUCCEEDED") == [first]
    assert await ids("status=QUEUED") == [second]
    assert await ids("function=any") == [second]
    assert await ids("function=any&status=SUCCEEDED") == []
    assert await ids("function=unheard") == []


async def test_cancel_of_a_waiting_task_ends_it_and_wakes_who_waits(world: World):
    task_id = await world.submit()
    waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=20"))
    reply = await world.client().post(f"/v1/tasks/{task_id}/cancel")
    assert reply.json() == {"task_id": task_id, "status": "CANCELLED", "cancel_requested": True}
    assert (await waiting).json()["status"] == "CANCELLED"
    assert (await world.client().post(f"/v1/tasks/{task_id}/cancel")).json()["status"] == "CANCELLED"


async def test_cancel_of_a_running_task_asks_its_agent(world: World):
    task_id = await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    await world.agent.claim(slot)
    reply = await world.client().post(f"/v1/tasks/{task_id}/cancel")
    assert reply.json() == {"task_id": task_id, "status": "RUNNING", "cancel_requested": True}
    assert await world.store.cancels(slot) == {task_id}
    assert (await world.client().get(f"/v1/tasks/{task_id}")).json()["cancel_requested"] is True


async def test_cancel_of_an_ended_task_changes_nothing(world: World):
    task_id = await world.submit()
    await world.agent.run_all()
    reply = await world.client().post(f"/v1/tasks/{task_id}/cancel")
    assert reply.json() == {"task_id": task_id, "status": "SUCCEEDED", "cancel_requested": False}


async def test_result_is_the_returned_json_and_nothing_else(world: World):
    task_id = await world.submit(args={"x": 9})
    reply = await world.client().get(f"/v1/tasks/{task_id}/result")
    assert (reply.status_code, reply.json()["code"], reply.json()["retryable"]) == (409, "NotFinished", True)
    await world.agent.run_all()
    reply = await world.client().get(f"/v1/tasks/{task_id}/result")
    assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b'{"x":9}', "application/json")


async def test_result_of_what_has_none_says_why(world: World):
    failed, cancelled = await world.submit(), await world.submit()
    await world.client().post(f"/v1/tasks/{cancelled}/cancel")
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    await world.agent.finish(slot, claim, b'{"type":"KeyError","message":"missing"}', Outcome.FAILED)
    reply = await world.client().get(f"/v1/tasks/{failed}/result")
    assert (reply.status_code, reply.json()["code"]) == (409, "TaskFailed")
    assert reply.json()["error"]["type"] == "KeyError"
    reply = await world.client().get(f"/v1/tasks/{cancelled}/result")
    assert (reply.status_code, reply.json()["code"]) == (409, "TaskCancelled")


async def test_logs_are_text_whatever_was_written(world: World):
    task_id = await world.submit()
    assert (await world.client().get(f"/v1/tasks/{task_id}/logs")).json()["stdout"] == ""
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    await world.store.keep_log(task_id, claim.attempt, b"out \xff\n", b"err", 12)
    reply = (await world.client().get(f"/v1/tasks/{task_id}/logs")).json()
    assert reply | {"task_id": task_id, "stdout": "out �\n", "stderr": "err", "dropped_bytes": 12} == reply


async def test_explain_goes_through_a_tasks_life(world: World):
    async def explained(task_id: str) -> dict:
        return (await world.client().get(f"/v1/tasks/{task_id}/explain")).json()

    first = await world.submit(resources={"memory": "100GiB"})
    await until_answer(lambda: explained(first), lambda found: found["reason"] == "NoController")
    await world.agent.lead()
    await until_answer(lambda: explained(first), lambda found: found["reason"] == "WaitingForSlot")
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    second = await world.submit(resources={"memory": "100GiB"})
    found = await until_answer(lambda: explained(second), lambda found: found["reason"] == "WaitingForTurn")
    assert (found["position"], found["slots_open"], found["workers"][0]["verdict"]) == (1, 1, "Fits")
    await world.agent.claim(slot)
    assert (await explained(first))["reason"] == "Running"
    third = await world.submit(resources={"memory": "150GiB", "gpus": 2})
    found = await until_answer(lambda: explained(third), lambda found: found["reason"] == "InsufficientMemory")
    assert found["nearest"] == found["workers"][0]
    # 192 GiB and the reserve of 1, less the lease of 100: 91 are free on one of the two.
    assert found["nearest"]["short_by_bytes"] == 59 * GIB
    await world.client().post(f"/v1/tasks/{second}/cancel")
    assert (await explained(second))["reason"] == "Finished"


async def test_explain_says_that_no_node_is_there(store_server):
    async with serving(store_server.url) as world:
        await world.store.leave(NODE, world.agent.incarnation)
        await world.server.api.watch.look()
        task_id = await world.submit(resources={"memory": "500TiB"})
        found = (await world.client().get(f"/v1/tasks/{task_id}/explain")).json()
        assert found["reason"] == "NoWorkers"
        assert "kept" in found["message"]
        assert found["workers"] == []
