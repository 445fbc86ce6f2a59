"""What the API is sent by mistake or on purpose: refused at the right status, with the remedy, and never above 499 but 503."""

import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio

from manager.api import problems
from manager.core.answers import Problem
from tests.integration.api_world import NODE, World, running_store, serving, until

# One server for all of these: what is refused leaves nothing behind, and that is part of what is tested.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

GOOD = {"function": "echo", "args": {"x": 1}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world():
    with running_store() as store_server:
        async with serving(store_server.url) as world:
            watch = world.server.api.watch
            await until(lambda: watch.snapshot is not None and watch.snapshot.capacity.is_known)
            yield world


def refused(reply: httpx.Response, status: int, code: str, *words: str) -> Problem:
    """The answer is a problem of that kind, in the one form that all have, and says `words`."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem = msgspec.json.decode(reply.content, type=Problem)
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:rocyard:{code}")
    assert problem.title == problems.title_of(code)
    for word in words:
        assert word in problem.detail, problem.detail
    for forbidden in ("Traceback", str(Path(__file__).parents[2]), "site-packages", "redis://", "ry_0", 'File "'):
        assert forbidden not in reply.text
    return problem


async def post(world: World, body: bytes | dict, path: str = "/v1/tasks", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await world.client().post(path, content=content, headers=sent)


async def newest_task(world: World) -> str:
    tasks = (await world.client().get("/v1/tasks?limit=1")).json()["tasks"]
    return tasks[0]["task_id"] if tasks else ""


@pytest.mark.parametrize(
    ("body", "word"),
    [
        pytest.param(b"[" * 100_000, "nested deeper", id="A1 100,000 deep"),
        pytest.param(b'{"function":"echo","args":' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "nested deeper", id="A1 5,000 deep"),
        pytest.param(b'{"function":"any","args":' + b'{"a":' * 33 + b"1" + b"}" * 34, "nested deeper", id="A1 34 deep"),
        pytest.param(b'{"function":"ec\xff\xfeho"}', "UTF-8", id="A2 invalid UTF-8"),
        pytest.param(b'\xef\xbb\xbf{"function":"echo"}', "JSON", id="a byte order mark"),
        pytest.param(b'{"function":"any","args":{"x":NaN}}', "NaN", id="A3 NaN"),
        pytest.param(b'{"function":"any","args":{"x":-Infinity}}', "Infinity", id="A3 infinity"),
        pytest.param(b'{"function":"any","args":{"x":1e999}}', "too large", id="A3 a number that overflows"),
        pytest.param(b'{"function":"any","args":{"x":' + b"9" * 5000 + b"}}", "digits", id="A4 5,000 digits"),
        pytest.param(b'{"function":"any","args":{"x":"\\ud800"}}', "surrogate", id="A5 a lone surrogate"),
        pytest.param(b'{"function":"echo","function":"any"}', "'function' stands twice", id="A6 a duplicate key"),
        pytest.param(b'{"function":"any","args":{"a":{"b":1,"b":2}}}', "'b' stands twice", id="A6 a duplicate deep inside"),
        pytest.param(b'{"function":"echo"', "not JSON", id="cut off"),
        pytest.param(b'{"function":"echo"} x', "not JSON", id="something behind it"),
        pytest.param(b"'{}'", "not JSON", id="no JSON"),
        pytest.param(b"[]", "must be a JSON object", id="a list"),
        pytest.param(b"null", "must be a JSON object", id="null"),
        pytest.param(b"", "no body", id="nothing"),
        pytest.param(b'{"function":5}', "function: Expected `str`", id="A9 a wrong type"),
        pytest.param(b'{"function":""}', "function:", id="an empty name"),
        pytest.param(b'{"function":"any","args":[1]}', "args: Expected `object`", id="arguments that are a list"),
        pytest.param(b'{"function":"any","args":null}', "args: Expected `object`", id="arguments that are null"),
        pytest.param(b'{"function":"any","priority":1e308}', "priority:", id="A9 priority 1e308"),
        pytest.param(b'{"function":"any","priority":11}', "priority: Expected `int` <= 10", id="A9 priority 11"),
        pytest.param(b'{"function":"any","priority":true}', "priority:", id="A9 priority true"),
        pytest.param(b'{"function":"any","max_attempts":0}', "max_attempts:", id="no attempt"),
        pytest.param(b'{"function":"any","time_limit":true}', "time_limit:", id="A9 time limit true"),
        pytest.param(b'{"function":"any","time_limit":"soon"}', "'90s'", id="A9 time limit soon"),
        pytest.param(b'{"function":"any","time_limit":0}', "above 0", id="no time"),
        pytest.param(b'{"function":"any","time_limit":-5}', "time_limit:", id="negative time"),
        pytest.param(b'{"function":"any","time_limit":"30d"}', "tasks.time_limit_s_max", id="a time limit over the limit"),
        pytest.param(b'{"function":"any","resources":{"memory":0}}', "resources.memory:", id="A9 no memory"),
        pytest.param(b'{"function":"any","resources":{"memory":-1}}', "resources.memory:", id="A9 negative memory"),
        pytest.param(b'{"function":"any","resources":{"memory":1.5}}', "resources.memory:", id="A9 half a byte"),
        pytest.param(b'{"function":"any","resources":{"memory":"24 potatoes"}}', "'24GiB'", id="A9 a unit nobody has"),
        pytest.param(b'{"function":"any","resources":{"memory":"9999TiB"}}', "out of range", id="A9 absurd memory"),
        pytest.param(b'{"function":"any","resources":{"memory":' + b"9" * 4000 + b"}}", "out of range", id="A9 4,000 digits"),
        pytest.param(b'{"function":"any","resources":{"gpus":0}}', "resources.gpus:", id="no device"),
        pytest.param(b'{"function":"any","resources":{"gpus":65}}', "resources.gpus:", id="too many devices"),
        pytest.param(b'{"function":"any","resources":{"share":1.5}}', "'50%'", id="more than all of the compute"),
        pytest.param(b'{"function":"any","resources":{"share":true}}', "resources.share:", id="a share that is yes"),
        pytest.param(b'{"function":"any","resources":{"architecture":"gfx"}}', "'gfx942'", id="no architecture"),
        pytest.param(b'{"function":"any","resources":{"architecture":["sm_90",1]}}', "resources.architecture", id="a number"),
        pytest.param(b'{"function":"any","resources":{"architecture":[' + b'"a",' * 16 + b'"a"]}}', "<= 16", id="too many"),
        pytest.param(b'{"function":"any","resources":{"device_model":"a\\u202eb"}}', "resources.device_model:", id="bidi"),
        pytest.param(b'{"function":"any","resources":{"labels":{"__proto__":"x"}}}', "resources.labels:", id="A12 __proto__"),
        pytest.param(b'{"function":"any","resources":{"labels":["zone=a"]}}', "resources.labels:", id="labels that are a list"),
        pytest.param(b'{"function":"any","resources":{"cpus":1e308}}', "resources.cpus:", id="absurd CPUs"),
        pytest.param(b'{"function":"any","resources":{"cpus":' + b"9" * 4000 + b"}}", "resources.cpus:", id="4,000 CPU digits"),
        pytest.param(b'{"function":"any","resources":{"host_memory":-1}}', "resources.host_memory:", id="negative host memory"),
        pytest.param(b'{"function":"any","resources":{"exclusive":1}}', "resources.exclusive:", id="half exclusive"),
        pytest.param(b'{"function":"any","resources":{"model":"../a\\u0000"}}', "resources.model:", id="A20 model's path"),
        pytest.param(b'{"function":"any","priority":"highest"}', "low, normal, high, urgent", id="unknown priority"),
        pytest.param(b'{"function":"any","allow_infeasible":"yes"}', "allow_infeasible:", id="allowed by text"),
        pytest.param(b'{"function":"any","resources":null}', "resources:", id="resources that are null"),
        pytest.param(b'{"function":"any","priorty":1}', "Did you mean 'priority'?", id="A10 a mistyped field"),
        pytest.param(b'{"function":"any","resources":{"memry":1}}', "resources.memry: there is no such field. Did you mean 'me",
                     id="A10 a mistyped field inside"),
        *(pytest.param(b'{"function":"any","%s":1}' % name, name.decode(), id=f"A10 {name.decode()}")
          for name in (b"state", b"attempt", b"tenant", b"scopes", b"priority_class", b"__class__", b"py/object", b"task_id")),
    ],
)  # fmt: skip
async def test_a_body_that_cannot_be_read_is_400_and_says_what_would_be_right(world: World, body, word):
    before = await newest_task(world)
    refused(await post(world, body), 400, "BadRequest", word)
    assert await newest_task(world) == before


async def test_words_of_other_serialisers_are_plain_arguments(world: World):
    """A12, A15: what would be code elsewhere is text here."""
    args = {
        "__proto__": {"x": 1},
        "__class__": "x",
        "py/object": "os.system",
        "p": "gASVIAAAAAAAAACMBXBvc2l4",
        "y": "!!python/x",
    }
    reply = await post(world, {"function": "any", "args": args})
    assert reply.status_code == 202
    view = await world.client().get(f"/v1/tasks/{reply.json()['task_id']}?args=true")
    assert view.json()["args"] == args


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "a.b:c", "ech\u043e", "echo ", "ECHO", "../echo", "x" * 200, "ec\u0000ho", "\u202eohce"],
)
async def test_only_registered_names_are_functions(world: World, name):
    """A13: the table is matched exactly, whatever a name looks like."""
    refused(await post(world, {"function": name}), 404, "FunctionNotFound", "There is no function")


async def test_an_unknown_function_names_those_that_are_near(world: World):
    problem = await post(world, {"function": "ehco"})
    refused(problem, 404, "FunctionNotFound", "Did you mean 'echo'?")
    assert problem.json()["known"] == ["any", "broken", "echo"]


async def test_a_function_that_cannot_run_says_why(world: World):
    refused(await post(world, {"function": "broken"}), 422, "FunctionUnavailable", "No module named 'torch'", "pip install")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param({"x": "one"}, ["args.x:", "integer", "It takes: x, text"], id="A14 a wrong type"),
        pytest.param({"x": -1}, ["args.x:", "minimum"], id="out of range"),
        pytest.param({}, ['"x" is a required property'], id="one is missing"),
        pytest.param({"x": 1, "txet": "a"}, ["'txet'", "Did you mean 'text'?"], id="one is unknown"),
        pytest.param({"x": True}, ["args.x:"], id="true is no number"),
    ],
)
async def test_arguments_that_do_not_fit_are_named_by_path(world: World, args, words):
    reply = await post(world, {"function": "echo", "args": args})
    refused(reply, 422, "InvalidArguments", *words)
    assert reply.json()["errors"][0]["path"].startswith("args")


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        pytest.param({"memory": "500GiB"}, ["500 GiB", "MI300X", "node-1", "191 GiB"], id="memory"),
        pytest.param({"memory": "192GiB"}, ["192 GiB", "191 GiB"], id="all of a device, where a part is reserved"),
        pytest.param({"memory": "190.6GiB", "gpus": 2}, [], id="what fits once rounded up"),
        pytest.param({"memory": "1GiB", "gpus": 3}, ["3 devices", "more than 2"], id="devices"),
        pytest.param({"memory": "191.4GiB", "gpus": 2}, ["a lease of 192 GiB", "On 2 devices"], id="what rounding takes over"),
    ],
)
async def test_what_no_device_could_hold_is_refused_with_the_largest_named(world: World, resources, words):
    reply = await post(world, GOOD | {"resources": resources})
    if words:
        refused(reply, 422, "Infeasible", *words)
    else:
        assert reply.status_code == 202


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "multipart/form-data"],
)
async def test_another_content_type_is_415(world: World, content_type):
    """A7: it also keeps a web page from posting with somebody's browser."""
    refused(await post(world, GOOD, content_type=content_type), 415, "UnsupportedMediaType", "application/json")


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}], ids=["no type", "another type"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
async def test_a_body_that_may_be_left_out_is_not_ignored_where_it_is_not_read(world: World, headers, chunked):
    """A drain without the deadline that somebody gave would wait for ever."""
    body = b'{"deadline":"5m"}'

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    path = f"/v1/workers/{NODE}/drain"
    reply = await world.client("admin").post(path, content=pieces() if chunked else body, headers=headers)
    refused(reply, 415, "UnsupportedMediaType", "application/json")
    assert (await world.client().get(f"/v1/workers/{NODE}")).json()["cordon"] == ""


async def test_json_in_utf8_is_taken_however_the_type_is_written(world: World):
    assert (await post(world, GOOD, content_type='Application/JSON; charset="UTF-8"')).status_code == 202


async def test_a_compressed_body_is_415(world: World):
    """A8: nothing is unpacked, so nothing can explode."""
    bomb = gzip.compress(b"0" * 10_000_000)
    refused(await post(world, bomb, content_encoding="gzip"), 415, "UnsupportedMediaType", "compressed")


@pytest.mark.parametrize("size", [1024 * 1024 + 1, 20 * 1024 * 1024])
async def test_a_body_over_the_limit_is_413_and_the_api_goes_on(world: World, size):
    body = b'{"function":"any","args":{"x":"' + b"x" * size + b'"}}'
    if size < 16 * 1024 * 1024:
        refused(await post(world, body), 413, "TooLarge", "api.body_bytes_max")
    else:
        with contextlib.suppress(httpx.TransportError):  # so large that the connection ends while it is still being sent
            refused(await post(world, body), 413, "TooLarge")
    assert (await post(world, GOOD)).status_code == 202


async def test_arguments_over_their_limit_are_413(world: World):
    reply = await post(world, {"function": "any", "args": {"x": "y" * 256 * 1024}})
    refused(reply, 413, "TooLarge", "api.args_bytes_max")


@pytest.mark.parametrize("count", [0, 501, 100_000])
async def test_a_batch_has_from_1_to_500_tasks(world: World, count):
    body = b'{"tasks":[' + b",".join([b"{}"] * count) + b"]}"
    refused(await post(world, body, "/v1/tasks/batch"), 400, "BadRequest", "from 1 to 500", str(count))


async def test_errors_in_a_batch_name_the_task(world: World):
    tasks = [GOOD, GOOD | {"priorty": 1}]
    refused(await post(world, {"tasks": tasks}, "/v1/tasks/batch"), 400, "BadRequest", "tasks[1].priorty", "'priority'")
    tasks = [GOOD, GOOD | {"args": {"x": "a"}}]
    refused(await post(world, {"tasks": tasks}, "/v1/tasks/batch"), 422, "InvalidArguments", "tasks[1].args.x")
    refused(await post(world, {"task": []}, "/v1/tasks/batch"), 400, "BadRequest", "Did you mean 'tasks'?")
    refused(await post(world, {"tasks": [5]}, "/v1/tasks/batch"), 400, "BadRequest", "tasks[0]")


@pytest.mark.parametrize(
    "task_id",
    [
        "x",
        "0" * 25,
        "0" * 27,
        "A" * 26,
        "0" * 10_000,
        "%00" * 26,
        "{ry}:t:1",
        "*" * 26,
        "0" * 25 + "%0a",
        "t:" + "0" * 24,
    ],
)
@pytest.mark.parametrize("suffix", ["", "/result", "/logs", "/explain"])
async def test_ids_that_cannot_be_ours_are_404(world: World, task_id, suffix):
    """A17, A18: an id never becomes part of a key before it is known to be one."""
    reply = await world.client().get(f"/v1/tasks/{task_id}{suffix}")
    refused(reply, 404, "NotFound")


@pytest.mark.parametrize("path", ["/v1/tasks/..%2f..%2fkeys", "/v1/tasks/%2e%2e/keys", "/v1/nothing", "/", "/v2/tasks",
                                  "/docs/../app.py", "/docs/app.py", "/docs/..%2fapp.py", "/docs/%2fetc%2fpasswd"])  # fmt: skip
async def test_paths_that_are_not_there_are_404(world: World, path):
    refused(await world.client().get(path), 404, "NotFound")


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("statu=QUEUED", "Did you mean 'status'?"),
        ("status=WAITING", "none of"),
        ("limit=0", "from 1 to 500"),
        ("limit=501", "from 1 to 500"),
        ("limit=-1", "from 1 to 500"),
        ("limit=1e3", "from 1 to 500"),
        ("limit=%d9%a1", "from 1 to 500"),
        ("limit=1&limit=2", "stands twice"),
        ("cursor=abc", "cursor"),
        ("cursor=", "cursor"),
        ("cursor=%ff", "UTF-8"),
        ("key=ry_secret", "never taken from a URL"),
        ("api_key=x", "never taken from a URL"),
        ("&".join(f"a{n}=1" for n in range(50)), "cannot be read"),
        ("function=" + "x" * 5000, "over 4096 bytes"),
    ],
)
async def test_a_query_that_cannot_be_meant_is_400(world: World, query, word):
    """A28 among them: a key in a URL ends in logs."""
    refused(await world.client().get(f"/v1/tasks?{query}"), 400, "BadRequest", word)


@pytest.mark.parametrize("wait", ["-1", "soon", "nan", "inf", "1e400", "", "5parsecs"])
async def test_a_wait_that_is_no_duration_is_400(world: World, wait):
    task_id = await world.submit()
    refused(await world.client().get(f"/v1/tasks/{task_id}", params={"wait": wait}), 400, "BadRequest", "wait:")


async def test_routes_without_parameters_take_none(world: World):
    for path in ("/v1/functions", "/v1/workers", "/v1/cluster/status"):
        refused(await world.client().get(f"{path}?x=1"), 400, "BadRequest", "takes none")
    refused(await post(world, GOOD, "/v1/tasks?priority=1"), 400, "BadRequest", "takes none")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "DELETE", "FOO"])
async def test_other_methods_are_405(world: World, method):
    """A24, and what a proxy or a browser might try."""
    reply = await world.client().request(method, "/v1/tasks", headers={"x-http-method-override": "GET"})
    if method == "FOO":
        assert reply.status_code in {400, 405}
    else:
        assert reply.status_code == 405
        if method == "DELETE":
            assert reply.headers["allow"] == "GET, POST"


async def test_a_method_cannot_be_overridden(world: World):
    reply = await world.client("reader").post(
        "/v1/tasks", headers={"x-http-method-override": "GET", "content-type": "application/json"}
    )
    assert reply.status_code == 403


@pytest.mark.parametrize(
    "sent", ["a b", "x" * 65, 'a"b', "a/b", "<script>", "a,b", "é"],
)  # fmt: skip
async def test_a_strange_request_id_is_replaced(world: World, sent):
    """A41."""
    reply = await world.client("nobody").get("/livez", headers={"x-request-id": sent.encode()})
    assert reply.headers["x-request-id"] not in {sent, ""}


async def test_a_request_id_comes_back_and_each_request_has_one(world: World):
    client = world.client("nobody")
    assert (await client.get("/livez", headers={"x-request-id": "abc-123"})).headers["x-request-id"] == "abc-123"
    assert (await client.get("/nothing", headers={"x-request-id": "abc-123"})).headers["x-request-id"] == "abc-123"
    ids = [(await client.get("/livez")).headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3


async def test_every_answer_bears_the_security_headers(world: World):
    for path in ("/livez", "/v1/tasks", "/nothing", "/metrics"):
        for who in ("user", "nobody"):
            headers = (await world.client(who).get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
            assert "server" not in headers


async def test_a_key_request_is_checked_like_any_body(world: World):
    async def make(body: dict) -> httpx.Response:
        return await world.client("admin").post("/v1/keys", json=body)

    refused(await make({"tenant": "Team A"}), 400, "BadRequest", "tenant:")
    refused(await make({"tenant": "a:b"}), 400, "BadRequest", "tenant:")
    refused(await make({"tenant": "a\n"}), 400, "BadRequest")
    refused(await make({"tenant": "a", "scope": "root"}), 400, "BadRequest", "scope:")
    refused(await make({"tennant": "a"}), 400, "BadRequest", "Did you mean 'tenant'?")
