"""What is submitted twice is accepted once: by a key of the request, or by the task's own name."""

import asyncio
import datetime as dt

import httpx
import msgspec
import pytest

from manager.core.functions import decode_published, encode_published
from manager.core.lifecycle import TaskStatus
from manager.settings import Settings, TenantSettings
from tests.integration.api_world import World, serving, until_answer

pytestmark = pytest.mark.integration
PLAIN = {"function": "echo", "args": {"x": 1, "text": "é"}}


async def post(world: World, body: object, key: str | None = None, *, who: str = "user", path: str = "") -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await world.client(who).post(f"/v1/tasks{path}", json=body, headers=headers)


async def count(world: World, who: str = "user") -> int:
    return len((await world.client(who).get("/v1/tasks")).json()["tasks"])


async def test_the_same_key_and_body_are_the_same_task_however_they_are_written(world: World):
    first = await post(world, PLAIN, "k 1/~")
    again = await world.client().post(
        "/v1/tasks",
        content=b'{ "args": {"text": "\\u00e9",\n "x": 1}, "function": "echo" }',
        headers={"Idempotency-Key": "k 1/~", "content-type": "application/json"},
    )
    assert (first.status_code, again.status_code) == (202, 202)
    assert "replayed" not in first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.json() == first.json() | {"replayed": True}
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert await count(world) == 1


async def test_a_replay_tells_how_the_task_is_now(world: World):
    task_id = (await post(world, PLAIN, "k")).json()["task_id"]
    assert await world.agent.run_all() == [task_id]
    assert (await post(world, PLAIN, "k")).json() == {"task_id": task_id, "status": "SUCCEEDED", "replayed": True}


async def test_another_body_under_the_same_key_is_refused(world: World):
    await post(world, PLAIN, "k")
    for other in ({**PLAIN, "args": {"x": 2}}, {**PLAIN, "priority": 1}):
        refused = await post(world, other, "k")
        assert (refused.status_code, refused.json()["code"]) == (422, "IdempotencyConflict")
    assert (await post(world, {"tasks": [PLAIN]}, "k", path="/batch")).json()["code"] == "IdempotencyConflict"
    assert await count(world) == 1


async def test_a_key_is_the_tenants_own(world: World):
    mine, theirs = await post(world, PLAIN, "k"), await post(world, {**PLAIN, "args": {"x": 9}}, "k", who="other")
    assert (mine.status_code, theirs.status_code) == (202, 202)
    assert mine.json()["task_id"] != theirs.json()["task_id"]
    assert "replayed" not in theirs.json()


async def test_a_hundred_at_once_with_one_key_are_one_task(world: World):
    replies = await asyncio.gather(*(post(world, PLAIN, "race") for _ in range(100)))
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["task_id"] for reply in replies}) == 1
    assert sum("replayed" not in reply.json() for reply in replies) == 1
    assert await count(world) == 1


async def test_a_batch_is_replayed_whole(world: World):
    body = {"tasks": [PLAIN, {**PLAIN, "after": [0]}]}
    first = (await post(world, body, "b", path="/batch")).json()
    again = await post(world, body, "b", path="/batch")
    assert [task["task_id"] for task in again.json()["tasks"]] == [task["task_id"] for task in first["tasks"]]
    assert again.json()["replayed"] is True
    assert all(task["replayed"] for task in again.json()["tasks"])
    assert again.headers["idempotency-replayed"] == "true"
    assert await count(world) == 2


async def test_what_is_no_key_is_refused(world: World):
    for key in ("", "é", "x" * 256, "a\tb"):
        headers = [(b"idempotency-key", key.encode())]
        reply = await world.client().post("/v1/tasks", json=PLAIN, headers=headers)
        assert (reply.status_code, reply.json()["field"]) == (400, "Idempotency-Key")
        assert "255" in reply.json()["detail"]


async def test_a_refused_submission_leaves_its_key_free(world: World):
    assert (await post(world, {**PLAIN, "args": {}}, "k")).status_code == 422
    assert (await post(world, PLAIN, "k")).status_code == 202


async def test_what_was_accepted_is_answered_though_it_would_be_refused_by_now(store_server):
    """The deadline has passed, or the tenant is at its limit: the task is there all the same."""
    settings = Settings(tenant=TenantSettings(active_tasks_max=1))
    async with serving(store_server.url, settings) as world:
        soon = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.7)).isoformat()
        body = {**PLAIN, "deadline": soon}
        task_id = (await post(world, body, "k")).json()["task_id"]
        assert (await post(world, PLAIN)).json()["code"] == "QuotaExceeded"
        assert (await post(world, body, "k")).json()["task_id"] == task_id
        refused = await until_answer(lambda: post(world, body), lambda reply: reply.json()["code"] == "DeadlinePassed")
        assert refused.status_code == 422
        assert "ago" in refused.json()["detail"]
        assert (await post(world, body, "k")).json()["task_id"] == task_id
        assert (await post(world, body, "another")).json()["code"] == "DeadlinePassed"


NOW_REFUSED = ["gone", "another schema", "broken"]


async def change_functions(world: World, how: str) -> None:
    """Every function is not what it was, and the API knows."""
    published = {name: decode_published(blob) for name, blob in (await world.store.functions()).items()}
    await world.store.forget_functions()
    for name, function in published.items() if how != "gone" else ():
        strict = msgspec.Raw(b'{"type":"object","required":["new"]}')
        changed = {"schema": strict} if how == "another schema" else {"error": "No module named 'torch'"}
        await world.store.publish_function(name, encode_published(msgspec.structs.replace(function, **changed)))
    await world.server.api.functions.refresh()


@pytest.mark.parametrize("how", NOW_REFUSED)
async def test_a_replay_is_told_though_its_function_is_not_what_it_was(world: World, how: str):
    """Answers are lost when something restarts, and then nodes have yet to publish what they have: nothing may run twice."""
    asked = [
        (PLAIN, "one", ""),
        (PLAIN | {"name": "n"}, None, ""),
        (PLAIN | {"count": 3, "name": "array"}, None, ""),
        (PLAIN | {"count": 2}, "array", ""),
        ({"tasks": [PLAIN, PLAIN | {"after": [0]}]}, "batch", "/batch"),
        ({"tasks": [PLAIN | {"name": "a"}, PLAIN | {"name": "b"}]}, None, "/batch"),
    ]
    first = [await post(world, body, key, path=path) for body, key, path in asked]
    assert {reply.status_code for reply in first} == {202}
    before = await count(world)
    await change_functions(world, how)
    for (body, key, path), reply in zip(asked, first, strict=True):
        again = await post(world, body, key, path=path)
        assert again.status_code == 202, again.text
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers.get("location") == reply.headers.get("location")
        accepted = [[task["task_id"] for task in said.json().get("tasks", [said.json()])] for said in (reply, again)]
        assert accepted[0] == accepted[1]
    assert (await post(world, PLAIN | {"priority": 1}, "one")).json()["code"] == "IdempotencyConflict"
    assert (await post(world, PLAIN | {"name": "n", "priority": 1})).json()["code"] == "NameTaken"
    assert (await post(world, {"tasks": [PLAIN, PLAIN | {"name": "n"}]}, path="/batch")).json()["code"] == "NameTaken"
    code = {"gone": "FunctionNotFound", "another schema": "InvalidArguments", "broken": "FunctionUnavailable"}[how]
    for key, who in ((None, "user"), ("new", "user"), ("one", "other")):
        assert (await post(world, PLAIN, key, who=who)).json()["code"] == code
    assert (await post(world, PLAIN | {"name": "new"})).json()["code"] == code
    assert await count(world) == before


async def test_a_replay_is_told_though_limits_are_lower_by_now(store_server):
    body = {"function": "any", "args": {"text": "x" * 2000}, "time_limit": "2h", "name": "n"}
    async with serving(store_server.url) as world:
        first = [await post(world, body), await post(world, body | {"name": "m"}, "k")]
        lower = Settings(
            api=msgspec.structs.replace(Settings().api, args_bytes_max=1000),
            tasks=msgspec.structs.replace(Settings().tasks, time_limit_s_max=3600.0),
        )
        async with serving(store_server.url, lower, keys=world.keys) as later:
            again = [await post(later, body), await post(later, body | {"name": "m"}, "k")]
            assert [reply.json() for reply in again] == [reply.json() | {"replayed": True} for reply in first]
            assert (await post(later, body | {"name": "o"})).json()["code"] == "TooLarge"
            short = body | {"name": "o", "args": {}}
            assert (await post(later, short)).json()["field"] == "time_limit"


async def test_a_replay_is_told_by_a_store_that_is_full(world: World):
    first = await post(world, PLAIN, "k")
    await world.store.connection.call("CONFIG", "SET", "maxmemory", 1)
    try:
        assert (await post(world, PLAIN, "k")).json() == first.json() | {"replayed": True}
        assert (await post(world, PLAIN, "new")).json()["code"] == "StoreFull"
    finally:
        await world.store.connection.call("CONFIG", "SET", "maxmemory", 0)


async def test_a_key_that_came_with_a_known_name_is_that_task_for_its_day(world: World):
    body = PLAIN | {"name": "n"}
    first = await post(world, body)
    assert (await post(world, body, "k")).json() == first.json() | {"replayed": True}
    refused = await post(world, body | {"name": "other"}, "k")
    assert refused.json()["code"] == "IdempotencyConflict"


async def test_a_name_is_one_task_and_its_second_request_a_replay(world: World):
    body = {**PLAIN, "name": "train/7"}
    first, again = await post(world, body), await post(world, body)
    assert again.json() == first.json() | {"replayed": True}
    assert again.headers["idempotency-replayed"] == "true"
    refused = await post(world, {**body, "priority": 1})
    assert (refused.status_code, refused.json()["code"], refused.json()["name"]) == (422, "NameTaken", "train/7")
    assert (await post(world, body, who="other")).json()["task_id"] != first.json()["task_id"]
    task = (await world.client().get(f"/v1/tasks/{first.json()['task_id']}")).json()
    assert task["name"] == "train/7"
    found = (await world.client().get("/v1/tasks?name=train/7")).json()["tasks"]
    assert [one["task_id"] for one in found] == [task["task_id"]]
    assert (await world.client().get("/v1/tasks?name=train/7&status=FAILED")).json()["tasks"] == []
    assert (await world.client().get("/v1/tasks?name=none")).json() == {"tasks": [], "next_cursor": None}


async def test_a_name_twice_in_a_batch_is_refused(world: World):
    named = {**PLAIN, "name": "n"}
    refused = await post(world, {"tasks": [named, PLAIN, named]}, path="/batch")
    assert (refused.status_code, refused.json()["field"]) == (400, "tasks[2].name")
    assert "tasks[0]" in refused.json()["detail"]
    assert await count(world) == 0


async def test_a_named_task_that_has_ended_is_shown_as_the_record_has_it(world: World):
    """What the process remembers of its own submissions must not forget a name, nor keep what a replay has thrown away."""
    body = {**PLAIN, "name": "n", "total_timeout": "1h"}
    task_id = (await post(world, body)).json()["task_id"]
    await post(world, body)
    await world.agent.run_all()
    shown = (await world.client().get(f"/v1/tasks/{task_id}?wait=10s")).json()
    assert (shown["status"], shown["name"], shown["total_timeout_s"]) == ("SUCCEEDED", "n", 3600.0)
    async with serving(store_server_url(world), keys=world.keys) as other:
        read = (await other.client().get(f"/v1/tasks/{task_id}")).json()
    about = dict.fromkeys(("created_at", "queued_at"))  # a clock of the API's own, within milliseconds
    assert read | about == shown | about


def store_server_url(world: World) -> str:
    return world.server.api.settings.store.url.value


WRONG = [
    ({"name": "-x"}, "name", "letters"),
    ({"name": "x" * 129}, "name", "128"),
    ({"name": "train-7\n"}, "name", "letters"),
    ({"deadline": "tomorrow"}, "deadline", "2027-01-31T18:00:00Z"),
    ({"deadline": "2030-01-01T00:00:00"}, "deadline", "offset"),
    ({"deadline": "2999-01-01T00:00:00Z"}, "deadline", "366 days"),
    ({"start_timeout": 0}, "start_timeout", "above 0"),
    ({"total_timeout": "soon"}, "total_timeout", "not a duration"),
    ({"start_timeout": "10m", "total_timeout": "5m"}, "start_timeout", "total_timeout of 5m 00s"),
    ({"retry_on": ["a b"]}, "retry_on[0]", "ConnectionError"),
    ({"retry_on": ["OSError\n"], "max_attempts": 2}, "retry_on[0]", "ConnectionError"),
    ({"retry_on": ["OSError"]}, "retry_on", "'max_attempts' of 2 or more"),
    ({"index_as": "x"}, "index_as", "count"),
]


async def test_what_cannot_be_asked_for_is_said_with_what_would_be_right(world: World):
    for fields, where, words in WRONG:
        refused = await post(world, PLAIN | fields)
        assert (refused.status_code, refused.json()["field"]) == (400, where), refused.text
        assert words in refused.json()["detail"]


async def test_time_limits_and_retries_stand_in_the_task(world: World):
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).replace(microsecond=0)
    body = {
        **PLAIN,
        "max_attempts": 3,
        "retry_on": ["OSError", "GpuOutOfMemory"],
        "start_timeout": "5m",
        "total_timeout": 7200,
        "deadline": soon.isoformat(),
    }
    task_id = (await post(world, body)).json()["task_id"]
    task = (await world.client().get(f"/v1/tasks/{task_id}")).json()
    assert task["retry_on"] == ["OSError", "GpuOutOfMemory"]
    assert (task["start_timeout_s"], task["total_timeout_s"]) == (300.0, 7200.0)
    assert dt.datetime.fromisoformat(task["deadline_at"]) == soon
    said = (await world.client().get(f"/v1/tasks/{task['task_id']}/explain")).json()
    assert 290 < said["left_s"] <= 300
    assert "StartTimeout" in said["message"]
    assert await world.status_of(task["task_id"]) is TaskStatus.QUEUED
