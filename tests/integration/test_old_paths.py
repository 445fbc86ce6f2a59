"""The old paths answer as their new ones do, and the key that the settings fix opens what an admin's key opens."""

from pathlib import Path

import httpx
import msgspec
import pytest

from manager.api.old_paths import OLD_PATHS
from manager.settings import ApiSettings, Secret, Settings
from tests.integration.api_world import World, serving, until_answer
from tests.integration.cluster import clusters

pytestmark = pytest.mark.integration

KEY = "a+key/of.the~old=guide"
# What changes from one look at the cluster to the next.
PASSING = {"at", "instance", "beat_age_s", "oldest_wait_s", "last_seen_at", "task_id"}


@pytest.fixture
async def world(store_server):
    async with serving(store_server.url, Settings(api=ApiSettings(key=Secret(KEY)))) as world:
        yield world


def lasting(body: object) -> object:
    """`body` without what passes."""
    match body:
        case dict():
            return {name: lasting(value) for name, value in body.items() if name not in PASSING and not name.endswith("_s")}
        case list():
            return [lasting(value) for value in body]
        case _:
            return body


@pytest.mark.parametrize("path", sorted(OLD_PATHS))
@pytest.mark.parametrize("who", ["reader", "user", "nobody"])
async def test_an_old_path_answers_as_its_new_one(world: World, path: str, who: str):
    task_id = await world.submit()
    ask = world.client(who).get

    async def both():
        return await ask(OLD_PATHS[path].format(task_id=task_id)), await ask(path.format(task_id=task_id))

    # Again where the cluster has changed between the two: a node falls silent, say.
    old, new = await until_answer(both, lambda pair: lasting(pair[0].json()) == lasting(pair[1].json()))
    assert old.status_code == new.status_code
    assert new.status_code == (401 if who == "nobody" and path != "/livez" else 200)
    assert set(old.headers) == set(new.headers)


async def test_a_task_can_be_submitted_under_the_old_path(world: World):
    body = {"function": "echo", "args": {"x": 7}}
    reply = await world.client().post("/tasks", json=body)
    assert reply.status_code == 202
    task_id = reply.json()["task_id"]
    assert reply.headers["location"] == f"/v1/tasks/{task_id}"
    await world.agent.run_all()
    assert (await world.client().get(f"/tasks/{task_id}?wait=5s")).json()["result"] == {"x": 7}
    assert (await world.client("reader").post("/tasks", json=body)).status_code == 403
    assert (await world.client("nobody").post("/tasks", json=body)).status_code == 401
    assert (await world.client().post("/tasks", json={"function": "no"})).json()["code"] == "FunctionNotFound"


async def test_health_says_that_the_process_answers_and_nothing_else(world: World):
    reply = await world.client("nobody").get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_the_document_shows_the_new_paths_only(world: World):
    document = (await world.client("nobody").get("/openapi.json")).json()
    assert document["paths"].keys() & set(OLD_PATHS.values()) == set()
    assert document["paths"].keys() >= OLD_PATHS.keys()


async def test_the_key_of_the_settings_is_an_admins(world: World):
    headers = {"authorization": f"Bearer {KEY}"}
    ask = world.client("nobody")
    assert (await ask.get("/v1/keys", headers=headers)).status_code == 200
    reply = await ask.post("/v1/tasks", json={"function": "echo", "args": {"x": 1}}, headers=headers)
    assert reply.status_code == 202
    view = (await ask.get(f"/v1/tasks/{reply.json()['task_id']}", headers=headers)).json()
    assert view["tenant"] == "default"
    listed = (await ask.get("/v1/keys", headers=headers)).json()["keys"]
    assert "settings" not in {key["key_id"] for key in listed}, "it stands in no store"


@pytest.mark.parametrize("wrong", [KEY[:-1], KEY + "x", KEY.upper(), "x", " " + KEY, "sixteen-characters"])
async def test_nothing_like_the_key_of_the_settings_opens(world: World, wrong: str):
    reply = await world.client("nobody").get("/v1/tasks", headers={"authorization": f"Bearer {wrong}"})
    assert reply.status_code == 401


async def test_other_keys_work_beside_it(world: World):
    assert (await world.client("reader").get("/v1/tasks")).status_code == 200
    assert (await world.client("reader").get("/v1/keys")).status_code == 403


async def test_without_the_setting_no_short_or_empty_key_opens(store_server):
    async with serving(store_server.url) as world:
        for text in ("x", "settings", KEY):
            reply = await world.client("nobody").get("/v1/tasks", headers={"authorization": f"Bearer {text}"})
            assert reply.status_code == 401


async def test_the_key_of_the_settings_is_checked_without_the_store(world: World, store_server):
    """It is what is left where the store's keys cannot be read: the answer is about the store, not about the key."""
    store_server.freeze()
    try:
        reply = await world.client("nobody").get("/v1/keys", headers={"authorization": f"Bearer {KEY}"})
        assert reply.status_code == 503
        assert msgspec.json.decode(reply.content)["code"] == "StoreUnavailable"
    finally:
        store_server.thaw()


def test_a_cluster_started_by_old_names_alone(tmp_path: Path):
    """What somebody has who comes with the old guide: the old variables, the old key, the old curl lines."""
    old = {"ROCYARD_OLD_NAMES": "true", "API_KEY": KEY, "TASK_TIMEOUT": "77", "GPU_MEMORY_THRESHOLD": "0.5"}
    for cluster in clusters(tmp_path, old):
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=cluster.client.address.url, headers=headers, trust_env=False, timeout=40) as client:
            task_id = client.post("/tasks", json={"function": "echo", "args": {"x": 1}}).json()["task_id"]
            view = client.get(f"/tasks/{task_id}?wait=30s").json()
            assert (view["status"], view["time_limit_s"], view["tenant"]) == ("SUCCEEDED", 77, "default")
            assert len(client.get("/workers").json()["workers"]) == 2
            assert client.get("/cluster/status").json()["tasks"]["succeeded"] == 1
        assert "old names are in use: API_KEY, TASK_TIMEOUT, GPU_MEMORY_THRESHOLD;" in cluster.output.read_text()
        assert KEY not in cluster.output.read_text()
