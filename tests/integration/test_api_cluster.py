"""The routes about the cluster, health, metrics and the documents, over real HTTP and a real store."""

import asyncio
import json
import re
from pathlib import Path

import msgspec
import pytest

import manager.api
from manager.core.answers_cluster import ClusterView, Readiness
from manager.core.answers_functions import FunctionList
from manager.core.answers_nodes import WorkerList, WorkerState
from manager.core.model import DeviceUse
from manager.core.requests import KeyScope
from manager.settings import Settings
from tests.integration.api_world import GIB, NODE, Agent, World, serving, until_answer

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


async def test_functions_are_listed_with_schema_and_defaults(world: World):
    listed = msgspec.json.decode((await world.client().get("/v1/functions")).content, type=FunctionList).functions
    by_name = {function.name: function for function in listed}
    assert list(by_name) == ["any", "broken", "echo"]
    echo = by_name["echo"]
    assert (echo.memory_bytes, echo.gpus, echo.time_limit_s, echo.description) == (GIB, 1, 3600.0, "Does echo.")
    assert msgspec.json.decode(echo.schema)["required"] == ["x"]
    assert "torch" in by_name["broken"].problem


async def test_a_function_that_is_published_can_be_used_at_once(world: World):
    blob = await world.store.functions()
    await world.store.publish_function("late", blob["any"].replace(b'"any"', b'"late"'))
    await world.submit("late", args={})


async def test_workers_show_how_full_their_devices_are(world: World):
    await world.submit(resources={"memory": "24GiB"})
    await world.agent.open(await world.agent.shape_of_first_queue())
    uuid = world.agent.devices[0].uuid
    uses = [DeviceUse(uuid=uuid, used_bytes=5 * GIB, foreign_bytes=3 * GIB, utilisation_ratio=0.5)]
    await world.store.put_heartbeat(NODE, "tcp://127.0.0.1:1", uses)

    async def workers():
        return msgspec.json.decode((await world.client().get("/v1/workers")).content, type=WorkerList).workers

    (worker,) = await until_answer(workers, lambda found: found[0].devices[0].leased_bytes)
    assert (worker.node, worker.state, worker.source, worker.slots) == (NODE, WorkerState.LIVE, "simulated", 1)
    device = worker.devices[0]
    assert (device.memory_bytes, device.usable_bytes) == (192 * GIB, 191 * GIB)
    assert (device.leased_bytes, device.foreign_bytes, device.used_bytes) == (24 * GIB, 3 * GIB, 5 * GIB)
    assert device.free_bytes == (191 - 24 - 3) * GIB
    assert device.utilisation_ratio == 0.5
    assert worker.readings_age_s is not None


async def test_status_shows_the_cluster_and_what_is_wrong(world: World):
    await world.agent.lead()
    ids = [await world.submit() for _ in range(3)]
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    await world.agent.claim(slot)

    async def status() -> ClusterView:
        return msgspec.json.decode((await world.client().get("/v1/cluster/status")).content, type=ClusterView)

    view = await until_answer(status, lambda view: view.slots and view.slots[0].running)
    assert (view.tasks.queued, view.tasks.running) == (2, 1)
    (queue,) = view.queues
    assert (queue.depth, queue.slots_open, queue.memory_bytes, queue.tenant) == (2, 1, GIB, "alpha")
    assert queue.oldest_wait_s is not None
    (shown,) = view.slots
    assert (shown.slot_id, shown.status, shown.node, shown.running) == (slot, "OPEN", NODE, 1)
    assert (view.leader.holder, view.store.fsync) == ("leader", "always")
    assert view.problems == ()
    assert len(ids) == 3


async def test_status_names_silent_nodes_leaders_and_sick_devices(store_server):
    """What lives is known by watching: with a lease of half a second, silence is seen after that."""
    node = msgspec.structs.replace(Settings().node, beat_s=0.25, lease_beats=2)
    controller = msgspec.structs.replace(Settings().controller, term_s=0.5)
    async with serving(store_server.url, msgspec.structs.replace(Settings(), node=node, controller=controller)) as world:
        second = Agent(world.store, "node-2")
        await second.join()
        await world.agent.lead()
        sick = DeviceUse(uuid=second.devices[0].uuid, used_bytes=0, healthy=False, problem="it fell off the bus")
        await world.store.put_heartbeat("node-2", "tcp://127.0.0.1:2", [sick])
        beating = asyncio.create_task(_beat(second))

        async def problems() -> str:
            return "\n".join((await world.client().get("/v1/cluster/status")).json()["problems"])

        found = await until_answer(problems, lambda found: "silent" in found and "No controller leads" in found)
        assert f"The agent of {NODE} has been silent" in found
        assert "fell off the bus" in found
        assert "node-2 has been silent" not in found
        states = {w["node"]: w["state"] for w in (await world.client().get("/v1/workers")).json()["workers"]}
        assert states == {NODE: "silent", "node-2": "live"}
        task_id = await world.submit()
        verdicts = (await world.client().get(f"/v1/tasks/{task_id}/explain")).json()["workers"]
        assert {v["node"]: v["verdict"] for v in verdicts} == {NODE: "NodeUnreachable", "node-2": "Fits"}
        beating.cancel()


async def test_a_drain_needs_no_body_and_one_that_has_no_bytes_is_none(world: World):
    path = f"/v1/workers/{NODE}/drain"
    for headers in ({}, {"content-type": "application/json"}):
        reply = await world.client("admin").post(path, headers=headers)
        assert (reply.status_code, reply.json()["cordon"], reply.json()["deadline_at"]) == (200, "drain", None), reply.text
    body = await world.client("admin").post(path, json={"deadline": "5m"})
    assert body.json()["deadline_at"] is not None


async def test_health_says_ok_and_readiness_tells_the_rest(world: World):
    assert (await world.client("nobody").get("/livez")).json() == {"status": "ok"}
    reply = await until_answer(lambda: world.client("nobody").get("/readyz"), lambda reply: reply.json()["nodes_live"] == 1)
    ready = msgspec.json.decode(reply.content, type=Readiness)
    assert (reply.status_code, ready.ready) == (200, True)
    assert ready.leader_beating is not True, "nobody leads; tasks are accepted all the same"


async def test_metrics_count_by_route_and_never_by_path(world: World):
    task_id = await world.submit()
    await world.client().get(f"/v1/tasks/{task_id}")
    await world.client().get(f"/v1/no/{task_id}")
    reply = await world.client("nobody").get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert re.search(r'rocyard_api_requests_total\{method="POST",route="/v1/tasks",status="202"\} \d', reply.text)
    assert 'route="/v1/tasks/{task_id}",status="200"' in reply.text
    assert 'route="other",status="404"' in reply.text
    assert task_id not in reply.text
    assert "rocyard_api_request_duration_seconds_bucket" in reply.text


async def test_the_openapi_document_is_whole(world: World):
    document = (await world.client("nobody").get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    refs = set(re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert refs <= document["components"]["schemas"].keys()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    declared = {(o.method, o.path) for o in world.server.api.operations if o.listed}
    assert operations.keys() == declared
    for (method, path), operation in operations.items():
        assert operation["summary"]
        assert operation["responses"], (method, path)
        if path.startswith("/v1"):
            assert operation["security"] == [{"key": []}]
            assert {"401", "403", "503"} <= operation["responses"].keys()
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"]
    submit = operations["POST", "/v1/tasks"]
    assert submit["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/TaskRequest"}
    assert {"202", "400", "404", "413", "415", "422", "429"} <= submit["responses"].keys()


async def test_every_answer_of_success_fits_the_document(world: World):
    """What is documented is what comes: each answer is checked against the document's schema for it."""
    import jsonschema_rs

    task_id, array_id = await world.submit(), await world.submit("any", args={}, count=2)
    await world.agent.run_all()
    document = (await world.client("nobody").get("/openapi.json")).json()
    checked = 0
    for operation in world.server.api.operations:
        if operation.answer is None or operation.method != "GET" or not operation.listed:
            continue
        path = operation.path.format(task_id=task_id, array_id=array_id, node=NODE)
        reply = await world.client("admin" if operation.access is KeyScope.ADMIN else "user").get(path)
        schema = document["paths"][operation.path]["get"]["responses"][str(reply.status_code)]
        schema = schema["content"]["application/json"]["schema"]
        validator = jsonschema_rs.validator_for({**schema, "components": document["components"]})
        assert validator.is_valid(reply.json()), (path, next(validator.iter_errors(reply.json())).message)
        checked += 1
    assert checked == 20


async def test_the_docs_page_needs_nothing_from_elsewhere(world: World):
    page = await world.client("nobody").get("/docs")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in page.text
    assert "style=" not in page.text
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert link.startswith("/"), link
        assert (await world.client("nobody").get(link)).status_code == 200, link


def test_vendored_files_come_with_their_licence():
    static = Path(manager.api.__file__).parent / "static"
    assert {path.name for path in static.iterdir()} == {
        "LICENSE-swagger-ui.txt",
        "NOTICE-swagger-ui.txt",
        "icon.svg",
        "page.css",
        "start.js",
        "swagger-ui-bundle.js",
        "swagger-ui-bundle.js.LICENSE.txt",
        "swagger-ui.css",
    }


async def test_every_route_is_in_the_documentation(world: World):
    text = (ROOT / "docs" / "api.md").read_text()
    for operation in world.server.api.operations:
        assert f"`{operation.method} {operation.path}`" in text, f"docs/api.md lacks {operation.method} {operation.path}"
        for parameter in operation.query:
            assert f"`{parameter.name}`" in text, parameter.name
        for error in operation.all_errors():
            assert f"`{error.__name__}`" in text, f"docs/api.md lacks the error {error.__name__}"
    documented = set(re.findall(r"^#+ `([A-Z]+ /[^`]*)`$", text, re.MULTILINE))
    assert documented == {f"{o.method} {o.path}" for o in world.server.api.operations}


async def _beat(agent: Agent) -> None:
    while True:
        await agent.store.beat(agent.node, agent.incarnation, [])
        await asyncio.sleep(0.1)
