"""The store goes away, hangs, comes back, is full: a clear answer in time, nothing lost, nothing to restart."""

import asyncio
import signal
import subprocess
import sys
import time

import httpx
import msgspec
import pytest

from manager.api import ends
from manager.api.serve import bind
from manager.core.errors import StartError
from manager.settings import Settings
from manager.store.store import connect
from tests.integration.api_world import RunningStore, World, running_store, serving, until, until_answer

pytestmark = pytest.mark.integration

ANSWER_S_MAX = 3.5


@pytest.fixture
def store_server():
    with running_store() as server:
        yield server


async def refusals(world: World) -> None:
    """Every route that needs the store says so in time."""
    task = {"function": "echo", "args": {"x": 1}}
    asked = [
        world.client().post("/v1/tasks", json=task),
        world.client().post("/v1/tasks/batch", json={"tasks": [task]}),
        world.client().get("/v1/tasks"),
        world.client().get("/v1/tasks/" + "0" * 26),
        world.client().get("/v1/tasks/" + "0" * 26 + "?wait=30"),
        world.client().get("/v1/cluster/status"),
        world.client().get("/v1/functions"),
        world.client("admin").post("/v1/keys", json={"tenant": "a"}),
        world.client("nobody").get("/readyz"),
    ]
    began = time.monotonic()
    for reply in await asyncio.gather(*asked):
        assert reply.status_code == 503, reply.text
        assert reply.headers["retry-after"] == "1"
        assert reply.json().get("code", "StoreUnavailable") == "StoreUnavailable"
    assert time.monotonic() - began < ANSWER_S_MAX
    assert (await world.client("nobody").get("/livez")).status_code == 200


async def recovered(world: World) -> None:
    body = {"function": "echo", "args": {"x": 1}}
    await until_answer(lambda: world.client().post("/v1/tasks", json=body), lambda reply: reply.status_code == 202)
    await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: reply.status_code == 200)


async def test_a_dead_store_is_503_in_time_and_all_is_there_when_it_is_back(world: World, store_server: RunningStore):
    kept = [await world.submit() for _ in range(5)]
    store_server.kill()
    await refusals(world)
    store_server.start()
    await recovered(world)
    assert [await world.status_of(task_id) for task_id in kept] == ["QUEUED"] * 5


async def test_a_store_that_hangs_is_503_in_time(world: World, store_server: RunningStore):
    await world.submit()
    store_server.freeze()
    try:
        await refusals(world)
    finally:
        store_server.thaw()
    await recovered(world)


async def test_who_waits_hears_of_an_end_over_a_restart_of_the_store(world: World, store_server: RunningStore):
    task_id = await world.submit()
    waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=30"))
    await until(lambda: task_id in world.server.api.ends._waiters)
    store_server.kill()
    store_server.start()
    assert await world.agent.run_all() == [task_id]
    assert (await waiting).json()["status"] == "SUCCEEDED"


async def test_an_end_whose_notice_was_lost_is_found_by_looking(store_server: RunningStore, monkeypatch):
    """The stream only notifies: with all of it gone, who waits still gets the answer."""
    monkeypatch.setattr(ends, "REREAD_S", 0.3)
    monkeypatch.setattr(ends.Ends, "_ended", lambda self, event: None)
    async with serving(store_server.url) as world:
        task_id = await world.submit()
        waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=30"))
        await until(lambda: task_id in world.server.api.ends._waiters)
        await world.agent.run_all()
        assert (await waiting).json()["status"] == "SUCCEEDED"


async def test_a_full_store_refuses_new_work_and_still_ends_what_runs(world: World):
    running, cancelled = await world.submit(), await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    await world.store.connection.call("CONFIG", "SET", "maxmemory", "1")
    try:
        reply = await world.client().post("/v1/tasks", json={"function": "echo", "args": {"x": 1}})
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "StoreFull", "1")
        reply = await world.client().post(f"/v1/tasks/{cancelled}/cancel")
        assert reply.json()["status"] == "CANCELLED"
        await world.agent.finish(slot, claim)
        assert (await world.client().get(f"/v1/tasks/{running}?wait=10")).json()["status"] == "SUCCEEDED"
    finally:
        await world.store.connection.call("CONFIG", "SET", "maxmemory", "0")
    await recovered(world)


async def test_readiness_is_that_of_the_store(world: World):
    ready = (await world.client("nobody").get("/readyz")).json()
    assert (ready["ready"], ready["store"]) == (True, {"reachable": True, "fsync": "always"})
    await world.store.connection.call("CONFIG", "SET", "appendfsync", "everysec")
    reply = await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: reply.json()["detail"] != "")
    assert reply.status_code == 200, "a second's loss is for people to decide on"
    assert "appendfsync always" in reply.json()["detail"]
    status = await until_answer(
        lambda: world.client().get("/v1/cluster/status"), lambda reply: reply.json()["store"]["fsync"] == "everysec"
    )
    assert any("power cut" in problem for problem in status.json()["problems"])
    await world.store.connection.call("CONFIG", "SET", "appendfsync", "no")
    reply = await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: reply.status_code == 503)
    assert "never syncs" in reply.json()["detail"]
    await world.store.connection.call("CONFIG", "SET", "appendfsync", "always", "maxmemory-policy", "allkeys-lru")
    await world.store.connection.call("CONFIG", "SET", "maxmemory", "1gb")
    reply = await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: "throw" in reply.json()["detail"])
    assert reply.status_code == 503


async def test_the_api_starts_while_the_store_is_down(store_server: RunningStore):
    async with serving(store_server.url) as world:
        keys = world.keys
    store_server.kill()
    async with serving_without_store(store_server, keys) as world:
        assert (await world.client("nobody").get("/livez")).status_code == 200
        assert (await world.client("nobody").get("/readyz")).status_code == 503
        store_server.start()
        reply = await until_answer(lambda: world.client().get("/v1/functions"), lambda reply: reply.status_code == 200)
        assert [function["name"] for function in reply.json()["functions"]] == ["any", "broken", "echo"]


async def test_sigterm_answers_who_waits_and_ends(store_server: RunningStore):
    async with serving(store_server.url) as world:
        task_id = await world.submit()
        waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=50"))
        await until(lambda: task_id in world.server.api.ends._waiters)
        began = time.monotonic()
        world.server.should_exit = True
        reply = await waiting
        assert (reply.status_code, reply.json()["status"]) == (200, "QUEUED")
    assert time.monotonic() - began < 5


_PROGRAM = """
import sys
from manager.api.serve import serve
from manager.settings import ApiSettings, Secret, Settings, StoreSettings
serve(Settings(store=StoreSettings(url=Secret(sys.stdin.readline().strip())), api=ApiSettings(port=int(sys.argv[1]))))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_cleanly_and_leaves_its_port(store_server: RunningStore, number: int):
    asyncio.run(identified(store_server.url))
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(port)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdin is not None
        process.stdin.write(store_server.url.encode() + b"\n")
        process.stdin.flush()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            eventually(lambda: is_ready(client))
        process.send_signal(number)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    bind("127.0.0.1", port).close()


async def identified(url: str) -> None:
    """The store is a cluster's, as the controller makes it."""
    store = connect(url, 3.0, "test")
    await store.identify("cluster")
    await store.connection.close()


def test_a_taken_port_is_named():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}.*api.port"):
            bind("127.0.0.1", port)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def eventually(check) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the period of looking, not a guess of when


async def test_one_reader_serves_any_number_of_waiters(world: World):
    """Two connections for the process, however many wait."""
    ids = [await world.submit() for _ in range(20)]
    waiting = [asyncio.create_task(world.client().get(f"/v1/tasks/{task_id}?wait=30")) for task_id in ids]
    await until(lambda: len(world.server.api.ends._waiters) == 20)
    clients = await world.store.connection.call("CLIENT", "LIST")
    assert clients.count(b"name=api") == 2
    await world.agent.run_all()
    assert {(await one).json()["status"] for one in waiting} == {"SUCCEEDED"}


def serving_without_store(server: RunningStore, keys: dict[str, str]):
    settings = msgspec.structs.replace(Settings(), store=msgspec.structs.replace(Settings().store, deadline_s=1.0))
    return serving(server.url, settings, keys=keys)
