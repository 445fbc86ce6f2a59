"""The client against a server that is a function: what it sends, what it tries again, and how answers come out."""

import datetime as dt
import json
from collections.abc import Callable

import httpx
import msgspec
import pytest

from manager import client, client_tasks, client_wire
from manager.client import Array, Client, Task, task_request
from manager.client_address import ClusterAddress, find_cluster
from manager.client_errors import (
    ClusterUnreachable,
    NotFinished,
    TaskCancelled,
    TaskFailed,
    UnexpectedAnswer,
    WaitTimeout,
    error_of,
)
from manager.core import errors
from manager.settings import Secret

Handler = Callable[[httpx.Request], httpx.Response]
ID = "01arz3ndektsv4rrffq69g5fav"
VIEW = {
    "task_id": ID,
    "status": "SUCCEEDED",
    "tenant": "default",
    "function": "echo",
    "created_at": "2026-01-02T03:04:05Z",
    "memory_bytes": 2**30,
    "gpus": 1,
    "priority": 0,
    "max_attempts": 1,
    "time_limit_s": 60.0,
    "result": {"x": 1},
}


def client_of(handler: Handler) -> Client:
    address = ClusterAddress("http://127.0.0.1:1", Secret("ry_secret"), "a test", "a test")
    return Client(address, transport=httpx.MockTransport(handler))


def answering(*answers: httpx.Response | Exception) -> tuple[Client, list[httpx.Request]]:
    """A client whose requests get these answers, one after the other; the last one for ever."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, content=answer.content)

    return client_of(handle), seen


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client_wire.random, "uniform", lambda low, high: 0.0)


def test_a_submission_is_what_the_api_takes_with_the_key_in_its_header():
    client, seen = answering(httpx.Response(202, json={"task_id": ID, "status": "QUEUED"}))
    task = client.submit("echo", {"x": 1}, memory="24GiB", gpus=2, priority=3, max_attempts=2, time_limit="5m")
    assert task.task_id == ID
    assert seen[0].headers["authorization"] == "Bearer ry_secret"
    assert json.loads(seen[0].content) == {
        "function": "echo",
        "args": {"x": 1},
        "resources": {"memory": "24GiB", "gpus": 2},
        "priority": 3,
        "max_attempts": 2,
        "time_limit": "5m",
    }


def test_what_is_left_out_of_a_submission_is_not_sent():
    client, seen = answering(httpx.Response(202, json={"task_id": ID, "status": "QUEUED"}))
    client.submit("echo")
    assert json.loads(seen[0].content) == {"function": "echo", "args": {}, "resources": {}}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        pytest.param(422, "Infeasible", errors.Infeasible, id="by code"),
        pytest.param(404, "FunctionNotFound", errors.FunctionNotFound, id="a code below another"),
        pytest.param(409, "LastAdminKey", errors.BadRequest, id="an unknown code: by status"),
        pytest.param(429, "", errors.QuotaExceeded, id="no code: by status"),
        pytest.param(418, "Teapot", errors.RocyardError, id="nothing known"),
    ],
)
def test_a_refusal_becomes_the_exception_of_its_code_with_the_servers_words(status, code, expected):
    body = {"detail": "too much", "code": code, "near": ["echo"], "status": status, "instance": "/v1/tasks"}
    error = error_of(status, json.dumps(body).encode())
    assert type(error) is expected
    assert str(error) == "too much"
    assert error.details == {"near": ["echo"]}


def test_a_proxys_error_page_is_shown_as_it_is():
    assert "nginx" in str(error_of(502, b"<html>nginx</html>"))
    assert isinstance(error_of(502, b"<html>nginx</html>"), ClusterUnreachable)


def test_a_refused_key_says_where_the_key_came_from():
    client, _ = answering(httpx.Response(401, json={"detail": "No such key.", "code": "Unauthorized"}))
    with pytest.raises(errors.Unauthorized, match="a test"):
        client.status()


def test_a_get_is_tried_again_while_the_api_restarts():
    refused = httpx.ConnectError("refused")
    answer = httpx.Response(200, json={"functions": []})
    client, seen = answering(answer, refused, httpx.Response(503, json={}), answer)
    client.functions()
    assert client.functions() == ()
    assert len(seen) == 4


def test_a_cluster_that_never_answered_is_reported_at_once_with_the_remedy():
    client, seen = answering(httpx.ConnectError("refused"))
    with pytest.raises(ClusterUnreachable, match="rocyard up"):
        client.functions()
    assert len(seen) == 1


QUEUED = {"task_id": ID, "status": "QUEUED"}


def test_a_submission_whose_answer_was_lost_is_sent_again_under_the_same_key():
    """Also where nothing has ever answered: it may have been accepted."""
    client, seen = answering(
        httpx.ReadError("reset"),
        httpx.ReadTimeout("slow"),
        httpx.Response(503, json={"code": "StoreUnavailable"}),
        httpx.ConnectError("refused"),
        httpx.Response(202, json=QUEUED | {"replayed": True}),
    )
    assert client.submit("echo").task_id == ID
    assert len(seen) == 5
    assert len({(request.content, request.headers["idempotency-key"]) for request in seen}) == 1


def test_a_submission_to_what_was_never_there_is_not_tried_again():
    client, seen = answering(httpx.ConnectError("refused"))
    with pytest.raises(ClusterUnreachable, match="rocyard up"):
        client.submit("echo")
    assert len(seen) == 1


def test_each_submission_has_a_key_of_its_own_or_the_callers():
    client, seen = answering(httpx.Response(202, json=QUEUED))
    for key in (None, None, "mine"):
        client.submit("echo", idempotency_key=key)
    keys = [request.headers["idempotency-key"] for request in seen]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_a_submission_that_got_no_answer_in_time_says_by_which_key_to_ask_again(monkeypatch):
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.0)
    client, seen = answering(httpx.Response(200, json={"functions": []}), httpx.ReadTimeout("slow"))
    client.functions()
    with pytest.raises(ClusterUnreachable) as lost:
        client.submit("echo")
    assert lost.value.details["idempotency_key"] == seen[-1].headers["idempotency-key"]


@pytest.mark.parametrize(
    ("answers", "expected", "told"),
    [
        pytest.param([httpx.Response(503, json={"code": "StoreUnavailable"})], errors.StoreUnavailable, True, id="503"),
        pytest.param([httpx.Response(502), httpx.ConnectError("refused")], ClusterUnreachable, True, id="502, then nobody"),
        pytest.param(
            [httpx.ReadError("reset"), httpx.Response(503, json={"code": "StoreFull"})],
            errors.StoreFull,
            True,
            id="lost, full",
        ),
        pytest.param([httpx.Response(503, json={"code": "StoreFull"})], errors.StoreFull, False, id="full"),
        pytest.param([httpx.Response(429, json={"code": "QuotaExceeded"})], errors.QuotaExceeded, False, id="a limit"),
        pytest.param([httpx.ConnectError("refused")], ClusterUnreachable, False, id="never there"),
    ],
)
def test_only_where_a_submission_may_have_been_accepted_is_its_key_told(monkeypatch, answers, expected, told):
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.05)
    client, _ = answering(*answers)
    with pytest.raises(expected) as refused:
        client.submit("echo", idempotency_key="mine")
    assert refused.value.details.get("idempotency_key") == ("mine" if told else None)


WRONG_KEYS = ["", " ", " a", "a ", "a\nb", "a\r", "a\tb", "ä", "\udcff", "\x00", "x" * 256]


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_a_key_that_cannot_be_sent_as_it_is_is_refused_and_nothing_sent(key):
    client, seen = answering(httpx.Response(202, json=QUEUED))
    calls = [
        lambda: client.submit("echo", idempotency_key=key),
        lambda: client.submit_array("echo", count=2, idempotency_key=key),
        lambda: client.submit_many([task_request("echo")], idempotency_key=key),
    ]
    for call in calls:
        with pytest.raises(errors.BadRequest, match="1 to 255 printable ASCII characters"):
            call()
    assert not seen


@pytest.mark.parametrize("key", ["a", "a b", "~!", "x" * 255])
def test_a_key_that_can_be_sent_is_sent_as_it_is(key):
    client, seen = answering(httpx.Response(202, json=QUEUED))
    client.submit("echo", idempotency_key=key)
    assert seen[0].headers["idempotency-key"] == key


def test_what_lasts_is_not_waited_for():
    full = httpx.Response(503, content=b'{"code":"StoreFull","detail":"full"}')
    client, seen = answering(full)
    with pytest.raises(errors.StoreFull):
        client.submit("echo")
    assert len(seen) == 1


def test_a_post_that_is_no_submission_is_sent_once():
    client, seen = answering(httpx.Response(200, json={"functions": []}), httpx.ReadTimeout("slow"))
    client.functions()
    with pytest.raises(ClusterUnreachable, match="not known"):
        client.cancel(ID)
    assert len(seen) == 2


def test_all_that_a_task_can_ask_for_is_sent_as_the_api_takes_it():
    client, seen = answering(httpx.Response(202, json=QUEUED))
    task = client.submit("echo")
    client.submit(
        "echo",
        retry_on=[ConnectionError, "GpuOutOfMemory"],
        start_timeout="5m",
        total_timeout=60,
        deadline=dt.datetime(2027, 1, 31, 18, tzinfo=dt.UTC),
        name="n",
        after=[task, "0" * 26, Array(client, ID, 3)],
        after_failed="run",
    )
    assert json.loads(seen[1].content) == {
        "function": "echo",
        "args": {},
        "resources": {},
        "retry_on": ["ConnectionError", "GpuOutOfMemory"],
        "start_timeout": "5m",
        "total_timeout": 60,
        "deadline": "2027-01-31T18:00:00Z",
        "name": "n",
        "after": [ID, "0" * 26, ID],
        "after_failed": "run",
    }


def test_numbers_of_earlier_requests_become_what_each_batch_needs(monkeypatch):
    monkeypatch.setattr(client.rest, "TASKS_PER_BATCH_MAX", 2)
    bodies = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content)["tasks"])
        first = 2 * (len(bodies) - 1)
        made = [{"task_id": f"{first + i:026}", "status": "BLOCKED"} for i in range(len(bodies[-1]))]
        return httpx.Response(202, json={"tasks": made})

    requests = [task_request("echo", after=range(number)) for number in range(5)]
    tasks = client_of(handle).submit_many(requests)
    assert [[task.get("after", []) for task in body] for body in bodies] == [
        [[], [0]],
        [[f"{0:026}", f"{1:026}"], [f"{0:026}", f"{1:026}", 0]],
        [[f"{0:026}", f"{1:026}", f"{2:026}", f"{3:026}"]],
    ]
    assert len(tasks) == 5


ARRAY = {"array_id": "0" * 26, "tenant": "t", "function": "echo", "count": 3, "made": 3, "created_at": VIEW["created_at"]}


def test_an_array_is_waited_for_and_gives_its_results_by_index(monkeypatch):
    monkeypatch.setattr(client_tasks, "ARRAY_PAUSE_S", (0.0, 0.0))
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.method == "POST":
            return httpx.Response(202, json={"task_id": "0" * 26, "status": "QUEUED", "count": 3})
        if "/arrays/" in request.url.path:
            done = min(3, len(seen) - 2)
            return httpx.Response(200, json=ARRAY | {"succeeded": done, "failed": 0, "cancelled": 0, "unfinished": 3 - done})
        task_id = request.url.path.rpartition("/")[2]
        return httpx.Response(200, json=VIEW | {"task_id": task_id, "result": task_id[-1]})

    array = client_of(handle).submit_array("echo", count=3, index_as="x")
    assert json.loads(seen[0].content) | {"count": 3, "index_as": "x"} == json.loads(seen[0].content)
    assert array.results() == ["1", "2", "3"]
    assert (len(array), array[-1].task_id, [task.task_id[-1] for task in array]) == (3, "0" * 25 + "3", ["1", "2", "3"])
    with pytest.raises(IndexError, match="0 to 2"):
        array[3]


@pytest.mark.parametrize(("timeout_s", "least_s", "most_s"), [(None, 60, 60), (30, 29, 30), (0, 0, 0)])
def test_an_array_is_looked_for_as_patiently_as_a_task(monkeypatch, timeout_s, least_s, most_s):
    asked = []

    def get(_wire, _path, _kind, _query, patience_s):
        asked.append(patience_s)
        raise ClusterUnreachable

    monkeypatch.setattr(client_wire.Wire, "get", get)
    found, _ = answering(httpx.ConnectError("refused"))
    with pytest.raises(ClusterUnreachable):
        Array(found, "0" * 26, 3).wait(timeout_s)
    assert least_s <= asked[0] <= most_s


def test_waiting_for_an_array_ends_with_its_time():
    left = httpx.Response(200, json=ARRAY | {"succeeded": 1, "failed": 0, "cancelled": 0, "unfinished": 2})
    found, _ = answering(left)
    with pytest.raises(WaitTimeout, match="2 of the 3 tasks"):
        Array(found, "0" * 26, 3).wait(0.01)


def test_a_log_is_followed_by_its_cursor_until_the_task_has_ended(monkeypatch):
    monkeypatch.setattr(client, "EARLY_PAUSE_S", 0.0)
    base = {"task_id": ID, "stderr": "", "attempt": 1}
    found, seen = answering(
        httpx.Response(200, json=base | {"stdout": "a", "cursor": "1.1.0", "ended": False}),
        httpx.Response(200, json=base | {"stdout": "", "cursor": "1.1.0", "ended": False}),
        httpx.Response(200, json=base | {"stdout": "b", "cursor": "1.2.0", "ended": True}),
    )
    assert [piece.stdout for piece in Task(found, ID).logs(follow=True)] == ["a", "b"]
    assert [request.url.params.get("cursor") for request in seen] == [None, "1.1.0", "1.1.0"]
    assert all(request.url.params["wait"] for request in seen)


def test_waiting_polls_until_the_task_is_final(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    running = httpx.Response(200, json=VIEW | {"status": "RUNNING"})
    waiting, seen = answering(running, running, httpx.Response(200, json=VIEW))
    assert waiting.result(ID) == {"x": 1}
    assert [request.url.params["wait"] for request in seen] == ["20.000"] * 3
    assert pauses == [client.EARLY_PAUSE_S] * 2, "who was not let wait must not ask again at once"


def test_waiting_ends_with_its_time():
    client, _ = answering(httpx.Response(200, json=VIEW | {"status": "RUNNING"}))
    with pytest.raises(WaitTimeout, match="RUNNING"):
        client.wait(ID, 0)


def test_a_failed_task_raises_what_it_died_of():
    failed = {"status": "FAILED", "result": None, "error": {"type": "ValueError", "message": "no", "traceback": "File x"}}
    client, _ = answering(httpx.Response(200, json=VIEW | failed))
    with pytest.raises(TaskFailed, match="ValueError: no") as caught:
        client.result(ID)
    assert (caught.value.type, caught.value.message, caught.value.traceback) == ("ValueError", "no", "File x")
    assert "File x" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("told", "expected", "words"),
    [
        pytest.param(
            {"code": "TaskFailed", "error": {"type": "ValueError", "message": "no", "traceback": "File x"}},
            TaskFailed,
            f"ValueError: no (task {ID})",
            id="failed",
        ),
        pytest.param({"code": "TaskFailed", "error": None}, TaskFailed, "the task failed and left no reason", id="no reason"),
        pytest.param({"code": "TaskCancelled"}, TaskCancelled, "was cancelled", id="cancelled"),
        pytest.param({"code": "NotFinished", "task_status": "RUNNING"}, NotFinished, "the server", id="not finished"),
        pytest.param({"code": "TaskFailed", "error": 7}, errors.BadRequest, "TaskFailed", id="of another version"),
    ],
)
def test_a_result_that_there_is_not_is_told_as_by_result(told, expected, words):
    found, _ = answering(httpx.Response(409, json={"detail": "the server says it", "task_id": ID} | told))
    with pytest.raises(expected) as caught:
        b"".join(found.read_result(ID))
    assert type(caught.value) is expected
    assert words in str(caught.value)
    assert caught.value.retryable == (expected is NotFinished)


def test_a_failed_task_whose_result_is_read_has_the_functions_own_error():
    error = {"type": "ValueError", "message": "no", "traceback": "File x"}
    found, _ = answering(httpx.Response(409, json={"code": "TaskFailed", "task_id": ID, "error": error}))
    with pytest.raises(TaskFailed) as caught:
        b"".join(found.read_result(ID))
    assert (caught.value.task_id, caught.value.type, caught.value.message, caught.value.traceback) == (ID, *error.values())
    assert "File x" in caught.value.__notes__[0]
    assert caught.value.details == {"task_id": ID, "error": error}


class BrokenOff(httpx.SyncByteStream):
    def __iter__(self):
        yield b"[1"
        raise httpx.RemoteProtocolError("peer closed connection (received 2 bytes, expected 7)")


def test_a_result_that_breaks_off_may_be_damaged_and_the_error_says_so():
    """The API ends the connection where the file is not what was kept; and where it is stopped."""
    found = client_of(lambda _: httpx.Response(200, stream=BrokenOff()))
    with pytest.raises(ClusterUnreachable, match=r"received 2 bytes, expected 7.*each time, its file is damaged"):
        b"".join(found.read_result(ID))


def test_a_result_for_which_nobody_answers_any_more_is_not_called_damaged():
    found, _ = answering(httpx.Response(200, json={"functions": []}), httpx.ConnectError("refused"))
    found.functions()
    with pytest.raises(ClusterUnreachable, match="No cluster answers"):
        b"".join(found.read_result(ID))


def test_a_cancelled_task_has_no_result():
    client, _ = answering(httpx.Response(200, json=VIEW | {"status": "CANCELLED", "result": None}))
    with pytest.raises(TaskCancelled):
        client.result(ID)


def _accepting(request: httpx.Request) -> httpx.Response:
    count = len(json.loads(request.content)["tasks"])
    return httpx.Response(202, json={"tasks": [{"task_id": ID, "status": "QUEUED"}] * count})


def test_many_tasks_go_in_batches_that_the_api_takes():
    sizes: list[tuple[int, int]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sizes.append((len(json.loads(request.content)["tasks"]), len(request.content)))
        return _accepting(request)

    small = [task_request("echo", {"n": n}) for n in range(1001)]
    large = [task_request("echo", {"text": "x" * 300_000}) for _ in range(7)]
    assert len(client_of(handle).submit_many(small + large)) == 1008
    assert sum(count for count, _ in sizes) == 1008
    assert all(count <= 500 and size <= 1024 * 1024 for count, size in sizes)
    assert client_of(handle).submit_many([]) == []


def test_a_refused_batch_tells_which_tasks_were_accepted_before_it():
    answers = iter([None, httpx.Response(429, json={"detail": "full", "code": "QuotaExceeded"})])
    client = client_of(lambda request: next(answers) or _accepting(request))
    with pytest.raises(errors.QuotaExceeded) as caught:
        client.submit_many(task_request("echo") for _ in range(501))
    assert caught.value.details["accepted"] == [ID] * 500


def test_many_tasks_are_submitted_once_though_the_call_is_made_again(monkeypatch):
    """The server knows batches by key and body, as the API does; the answer to the second one is lost."""
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.0)
    monkeypatch.setattr(client.rest, "TASKS_PER_BATCH_MAX", 2)
    known: dict[str, tuple[bytes, list[str]]] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        lost = len(known) == 1
        number = 2 * len(known)
        count = len(json.loads(request.content)["tasks"])
        made = [f"{number + place:026}" for place in range(count)]
        body, ids = known.setdefault(request.headers["idempotency-key"], (request.content, made))
        assert body == request.content
        if lost and len(known) == 2:
            raise httpx.ReadTimeout("slow")
        return httpx.Response(202, json={"tasks": [{"task_id": task_id, "status": "QUEUED"} for task_id in ids]})

    found, requests = client_of(handle), [task_request("echo", after=range(number)) for number in range(5)]
    with pytest.raises(ClusterUnreachable) as caught:
        found.submit_many(requests)
    assert caught.value.details["accepted"] == [f"{0:026}", f"{1:026}"]
    tasks = found.submit_many(requests, idempotency_key=caught.value.details["idempotency_key"])
    assert [task.task_id for task in tasks] == [f"{number:026}" for number in range(5)]
    assert len(known) == 3


def test_the_longest_key_has_room_for_the_number_of_a_batch(monkeypatch):
    monkeypatch.setattr(client.rest, "TASKS_PER_BATCH_MAX", 1)
    seen = []
    found = client_of(lambda request: seen.append(request) or _accepting(request))
    for key in ("x" * 255, "x" * 255, "x" * 254):
        found.submit_many([task_request("echo")] * 2, idempotency_key=key)
    keys = [request.headers["idempotency-key"] for request in seen]
    assert all(0 < len(key) <= 255 for key in keys)
    assert keys[:2] == keys[2:4]
    assert len(set(keys)) == 4


def test_a_list_goes_on_from_page_to_page_until_the_limit():
    summary = {name: VIEW[name] for name in ("task_id", "status", "tenant", "function", "created_at")}
    client, seen = answering(httpx.Response(200, json={"tasks": [summary] * 2, "next_cursor": "more"}))
    assert len(list(client.tasks(status="QUEUED", limit=3))) == 4  # this server gives more than was asked
    assert [dict(request.url.params) for request in seen] == [
        {"status": "QUEUED", "limit": "3"},
        {"status": "QUEUED", "limit": "1", "cursor": "more"},
    ]


@pytest.mark.parametrize("task", ["../keys", "a/b", "", "a?b", "ä"])
def test_an_id_from_outside_cannot_reach_another_route(task):
    client, seen = answering(httpx.Response(200, json=VIEW))
    with pytest.raises(errors.BadRequest):
        client.get(task)
    assert not seen


def test_an_answer_of_another_version_says_so():
    client, _ = answering(httpx.Response(200, json={"status": "up"}))
    with pytest.raises(UnexpectedAnswer, match="version"):
        client.get(ID)


def test_new_fields_in_answers_do_not_matter():
    client, _ = answering(httpx.Response(200, json=VIEW | {"colour": "green"}))
    assert client.get(ID).function == "echo"


# --- where the cluster is -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "client.json").write_text('{"url": "http://127.0.0.1:8000", "api_key": "ry_local"}')
    return str(tmp_path)


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        pytest.param(None, {}, ("http://127.0.0.1:8000", "ry_local"), id="the local cluster"),
        pytest.param("http://127.0.0.1:8000/", {}, ("http://127.0.0.1:8000", "ry_local"), id="the same, by its URL"),
        pytest.param(None, {"ROCYARD_API_KEY": "k"}, ("http://127.0.0.1:8000", "k"), id="another key"),
        pytest.param(None, {"ROCYARD_URL": "https://a", "ROCYARD_API_KEY": "k"}, ("https://a", "k"), id="variables"),
        pytest.param("https://b", {"ROCYARD_URL": "https://a", "ROCYARD_API_KEY": "k"}, ("https://b", "k"), id="arguments win"),
    ],
)
def test_where_the_cluster_is(folder, url, variables, expected):
    found = find_cluster(url, None, variables | {"ROCYARD_DATA_DIR": folder})
    assert (found.url, found.api_key.value) == expected
    assert "ry_" not in repr(found)


def test_the_local_key_is_never_sent_to_another_host(folder):
    with pytest.raises(errors.SettingsError, match="No API key for http://elsewhere"):
        find_cluster("http://elsewhere", None, {}, folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "rocyard up", id="no file"),
        pytest.param("{", "damaged", id="half a file"),
        pytest.param('{"url": "ftp://x", "api_key": "k"}', "no URL", id="no URL of ours"),
    ],
)
def test_what_is_wrong_with_the_local_file_is_said_with_the_remedy(tmp_path, content, words):
    if content is not None:
        (tmp_path / "client.json").write_text(content)
    with pytest.raises(errors.SettingsError, match=words):
        find_cluster(None, None, {}, str(tmp_path))


def test_the_public_face_has_what_it_says():
    import rocyard

    for name in rocyard.__all__:
        assert getattr(rocyard, name) is not None
    with pytest.raises(AttributeError):
        rocyard.no_such_name  # noqa: B018 -- that it is asked for is the test


def test_the_public_client_takes_the_cluster_of_the_environment(folder, monkeypatch):
    import rocyard

    for variable in ("ROCYARD_URL", "ROCYARD_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ROCYARD_DATA_DIR", folder)
    with rocyard.Client() as client:
        assert client.address.url == "http://127.0.0.1:8000"


def test_a_request_encodes_arguments_once():
    assert bytes(task_request("echo", {"x": [1, None]}).args) == msgspec.json.encode({"x": [1, None]})


@pytest.mark.parametrize(
    "url",
    [
        *("nonsense", "ftp://x", "http://", "http://[::", "http://h:99999", "http://h:x", "http://a b", "http://a\nb"),
        *("http://ü", "http://a..b", "http://h?x=1", "http://h#x", f"http://{'a' * 80}"),
    ],
)
def test_what_is_no_url_of_a_cluster_is_refused_in_words(url):
    with pytest.raises(errors.SettingsError, match="is no URL of a cluster"):
        find_cluster(url, "ry_key", {})
    with pytest.raises(errors.SettingsError, match="is no URL of a cluster"):
        Client.at(url, "ry_key")


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(errors.SettingsError, match="no user and no password") as refused:
        find_cluster("http://me:hidden@127.0.0.1:1", "ry_key", {})
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("key", ["ry_ümlaut", "ry_hidden\r", "ry_hidden\nX: y", "ry hidden", "ry_\udcff"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key):
    with pytest.raises(errors.SettingsError, match="The API key from ROCYARD_API_KEY") as refused:
        Client(find_cluster("http://127.0.0.1:1", None, {"ROCYARD_API_KEY": key}))
    assert "hidden" not in str(refused.value)


def test_a_cluster_without_tls_is_told_from_one_that_is_not_there():
    def plain(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")

    with pytest.raises(ClusterUnreachable, match="answers without TLS: write http://"):
        client_of(plain).status()
