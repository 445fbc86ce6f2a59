"""Who may do what: every route with every key, keys that end, cursors of others."""

import asyncio
import re

import httpx
import pytest

from manager.api.app import refuse_undeclared
from manager.api.operations import Operation, Public
from manager.core.errors import RocyardError
from manager.core.requests import KeyScope
from manager.keys import LastAdminKey, create_key, list_keys, revoke_key
from tests.integration.api_world import NODE, WHO, World, serving, until_answer

pytestmark = pytest.mark.integration

_MAY = {
    KeyScope.ADMIN: {"admin", "other_admin"},
    KeyScope.USER: {"admin", "user", "other", "other_admin"},
    KeyScope.READ: set(WHO),
}


async def ask(world: World, operation: Operation, who: str, task_id: str, array_id: str, key_id: str) -> httpx.Response:
    path = operation.path.format(task_id=task_id, array_id=array_id, key_id=key_id, node=NODE, file="page.css")
    body = b'{"function":"echo","args":{"x":1}}' if operation.body is not None else None
    headers = {"content-type": "application/json"} if body else {}
    return await world.client(who).request(operation.method, path, content=body, headers=headers)


async def test_every_route_with_every_key(world: World):
    """A21, A22, A24: the matrix is made from the routes themselves, so a new one is in it."""
    own, array = await world.submit(), await world.submit(count=2)
    for operation in world.server.api.operations:
        for who in (*WHO, "nobody"):
            spare = (await create_key(world.store, "spare", KeyScope.READ))[1].key_id
            reply = await ask(world, operation, who, own, array, spare)
            place = f"{operation.name} as {who}: {reply.status_code} {reply.text[:200]}"
            if isinstance(operation.access, Public):
                assert reply.status_code in {200, 404}, place
            elif who == "nobody":
                assert reply.status_code == 401, place
                assert reply.headers["www-authenticate"] == "Bearer"
            elif who not in _MAY[operation.access]:
                assert reply.status_code == 403, place
            elif {"{task_id}", "{array_id}"} & set(operation.path.split("/")) and WHO[who][0] != "alpha":
                assert reply.status_code == 404, place
            else:
                assert reply.status_code in {200, 201, 202, 400, 409}, place


async def test_another_tenants_task_looks_like_none(world: World):
    """A21: same status, same body but for the path; and it is not touched."""
    task, array = await world.submit(), await world.submit(count=2)
    of_tasks = [(o, task) for o in world.server.api.operations if "{task_id}" in o.path]
    of_arrays = [(o, array) for o in world.server.api.operations if "{array_id}" in o.path]
    assert (len(of_tasks), len(of_arrays)) == (7, 2)  # get under its old path too
    for operation, own in (*of_tasks, *of_arrays):
        none = ("1" if own[0] == "0" else "0") + own[1:]
        for query in ("", "?wait=0.1") if operation.name == "get_task" else ("",):
            replies = [
                await world.client("other").request(operation.method, operation.path.format(task_id=one, array_id=one) + query)
                for one in (own, none)
            ]
            bodies = [reply.text.replace(one, "ID") for reply, one in zip(replies, (own, none), strict=True)]
            assert [reply.status_code for reply in replies] == [404, 404], operation.name
            assert bodies[0] == bodies[1]
            assert set(replies[0].headers) == set(replies[1].headers)
    assert await world.status_of(task) == "QUEUED"
    assert (await world.client().get(f"/v1/arrays/{array}")).json()["unfinished"] == 2
    assert (await world.client("other").get("/v1/tasks")).json()["tasks"] == []


async def test_an_ended_task_of_another_tenant_is_not_answered_from_memory(world: World):
    own = await world.submit()
    await world.agent.run_all()
    assert (await world.client().get(f"/v1/tasks/{own}?wait=5")).status_code == 200
    assert (await world.client("other").get(f"/v1/tasks/{own}?wait=5")).status_code == 404


async def test_an_admin_may_name_a_tenant_and_nobody_else(world: World):
    own = await world.submit()
    for path in (f"/v1/tasks/{own}", f"/v1/tasks/{own}/explain", f"/v1/tasks/{own}/logs", "/v1/tasks"):
        assert (await world.client("admin").get(path, params={"tenant": "alpha"})).status_code == 200
        reply = await world.client("other").get(path, params={"tenant": "alpha"})
        assert (reply.status_code, reply.json()["code"]) == (403, "Forbidden")
        assert (await world.client("user").get(path, params={"tenant": "alpha"})).status_code == 200
    assert (await world.client("admin").get(f"/v1/tasks/{own}?tenant=beta")).status_code == 404
    assert (await world.client("admin").get("/v1/tasks?tenant=A:B")).status_code == 400
    listed = (await world.client("admin").get("/v1/tasks?tenant=alpha")).json()["tasks"]
    assert [task["task_id"] for task in listed] == [own]
    reply = await world.client("admin").post(f"/v1/tasks/{own}/cancel?tenant=alpha")
    assert reply.json()["status"] == "CANCELLED"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="empty"),
        pytest.param("Bearer x", id="no key of ours"),
        pytest.param("Basic {key}", id="another scheme"),
        pytest.param("{key}", id="no scheme"),
        pytest.param("Bearer {key}x", id="longer"),
        pytest.param("Bearer  {key}", id="two blanks"),
        pytest.param("Bearer {other_id}", id="the secret of one with the id of another"),
        pytest.param("Bearer ry_zzzzzzzz_" + "A" * 43, id="unknown"),
        pytest.param("Bearer " + "x" * 8192, id="8 kB"),
        pytest.param("Bearer ry_ÿÿÿÿÿÿÿÿ_" + "é" * 43, id="no ASCII"),
        pytest.param("Bearer {key},Bearer {key}", id="two in one"),
    ],
)
async def test_a_header_without_a_valid_key_is_401(world: World, header):
    """A25."""
    key, other = world.keys["user"], world.keys["other"]
    mixed = other[:12] + key[12:]
    headers = {} if header is None else {"authorization": header.format(key=key, other_id=mixed).encode("latin-1")}
    reply = await world.client("nobody").get("/v1/tasks", headers=headers)
    assert reply.status_code == 401, reply.text


async def test_two_authorization_headers_are_401(world: World):
    key = f"Bearer {world.keys['user']}"
    reply = await world.client("nobody").get("/v1/tasks", headers=[("authorization", key), ("authorization", key)])
    assert reply.status_code == 401


async def test_a_revoked_key_is_refused_within_seconds_everywhere(world: World, store_server):
    """A26: in the process that was told, and in another one that had the key in its memory."""
    async with serving(store_server.url, flush=False) as second:
        second.client("nobody").headers["authorization"] = f"Bearer {world.keys['reader']}"
        assert (await world.client("reader").get("/v1/tasks")).status_code == 200
        assert (await second.client("nobody").get("/v1/tasks")).status_code == 200
        key_id = world.keys["reader"][3:11]
        reply = await world.client("admin").delete(f"/v1/keys/{key_id}")
        assert reply.status_code == 200
        assert reply.json()["revoked_at"] is not None
        began = asyncio.get_running_loop().time()
        for client in (world.client("reader"), second.client("nobody")):
            await until_answer(lambda client=client: client.get("/v1/tasks"), lambda reply: reply.status_code == 401)
        assert asyncio.get_running_loop().time() - began < 5


async def test_a_key_made_over_rest_works_and_its_secret_is_nowhere(world: World):
    reply = await world.client("admin").post("/v1/keys", json={"tenant": "vision", "scope": "user"})
    assert reply.status_code == 201
    made = reply.json()
    assert re.fullmatch(r"ry_[0-9a-z]{8}_[A-Za-z0-9_-]{43}", made["key"])
    headers = {"authorization": f"Bearer {made['key']}"}
    assert (await world.client("nobody").get("/v1/tasks", headers=headers)).status_code == 200
    listed = await world.client("admin").get("/v1/keys")
    assert made["key_id"] in listed.text
    assert made["key"][12:] not in listed.text
    blob = await world.store.api_key(made["key_id"])
    assert blob is not None
    assert made["key"][12:].encode() not in blob


async def test_the_last_admin_key_stays(world: World):
    """A30."""
    admins = [world.keys[who][3:11] for who in ("admin", "other_admin")]
    assert (await world.client("admin").delete(f"/v1/keys/{admins[1]}")).status_code == 200
    reply = await world.client("admin").delete(f"/v1/keys/{admins[0]}")
    assert (reply.status_code, reply.json()["code"]) == (409, "LastAdminKey")
    assert (await world.client("admin").delete("/v1/keys/zzzzzzzz")).status_code == 404
    with pytest.raises(LastAdminKey):
        await revoke_key(world.store, admins[0])
    assert {key.key_id for key in await list_keys(world.store) if key.revoked_ms is None} >= {admins[0]}


async def test_a_cursor_of_another_key_or_other_filters_is_400(world: World):
    """A23."""
    for _ in range(3):
        await world.submit()
    cursor = (await world.client().get("/v1/tasks?limit=1")).json()["next_cursor"]
    assert (await world.client().get("/v1/tasks", params={"cursor": cursor})).status_code == 200
    tampered = [cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1 :] for at in range(len(cursor))]
    asked = [
        *(("user", {"cursor": text}) for text in tampered),
        ("other", {"cursor": cursor}),
        ("reader", {"cursor": cursor}),
        ("admin", {"cursor": cursor, "tenant": "alpha"}),
        ("user", {"cursor": cursor, "status": "QUEUED"}),
        ("user", {"cursor": cursor, "function": "echo"}),
        ("user", {"cursor": cursor + "AAAA"}),
    ]
    for who, query in asked:
        reply = await world.client(who).get("/v1/tasks", params=query)
        assert (reply.status_code, reply.json()["code"]) == (400, "BadRequest"), query


async def test_status_shows_a_tenant_its_own_queues_only(world: World):
    await world.submit()
    await world.submit(who="other")

    async def tenants(who: str) -> set[str]:
        return {queue["tenant"] for queue in (await world.client(who).get("/v1/cluster/status")).json()["queues"]}

    await until_answer(lambda: tenants("admin"), lambda found: found == {"alpha", "beta"})
    assert await tenants("user") == {"alpha"}
    assert await tenants("other") == {"beta"}


async def test_a_route_without_a_declared_access_stops_the_start(world: World):
    from litestar import Litestar, get

    @get("/hole")
    async def hole() -> str:
        return ""

    with pytest.raises(AssertionError, match="/hole declares no access"):
        refuse_undeclared(Litestar([hole], openapi_config=None))
    assert issubclass(LastAdminKey, RocyardError)
