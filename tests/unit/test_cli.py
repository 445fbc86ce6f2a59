"""Commands against a server that is a function: what they print where, and how they exit."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from manager import client_wire
from manager.cli import main as cli
from manager.cli import workers
from manager.cli.exits import Exit
from manager.cli.session import Session
from manager.client import Client
from manager.client_address import ClusterAddress
from manager.settings import Secret

ID = "01arz3ndektsv4rrffq69g5fav"
VIEW = {
    "task_id": ID,
    "status": "SUCCEEDED",
    "tenant": "default",
    "function": "echo",
    "attempt": 1,
    "node": "node-1",
    "created_at": "2026-01-02T03:04:05Z",
    "started_at": "2026-01-02T03:04:06Z",
    "finished_at": "2026-01-02T03:04:07.5Z",
    "memory_bytes": 24 * 2**30,
    "gpus": 1,
    "priority": 0,
    "max_attempts": 1,
    "time_limit_s": 60.0,
    "result": {"x": 1},
}
FAILED = VIEW | {
    "status": "FAILED",
    "result": None,
    "error": {"type": "ValueError", "message": "no\x1b[2Jway", "traceback": "  File x"},
}
SUMMARY = {name: value for name, value in VIEW.items() if name not in {"result", "memory_bytes", "gpus", "priority"}}
EXPLANATION = {
    "task_id": ID,
    "status": "QUEUED",
    "reason": "InsufficientMemory",
    "message": "No node has room.",
    "memory_bytes": 2**30,
    "gpus": 1,
    "position": 0,
    "wait_s": 3.0,
    "workers": [{"node": "node-1", "verdict": "InsufficientMemory", "short_by_bytes": 1, "detail": "1 B short"}],
}


class Server:
    """Answers by method and path; anything else is a 404."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, object]] = {}
        self.seen: list[httpx.Request] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        status, body = self.answers.get(
            f"{request.method} {request.url.path}", (404, {"detail": "There is no such task.", "code": "NotFound"})
        )
        if isinstance(body, BaseException):
            raise body
        return httpx.Response(status, json=body)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    address = ClusterAddress("http://127.0.0.1:1", Secret("ry_secret"), "a test", "a test")
    monkeypatch.setattr(Session, "client", lambda _: Client(address, transport=httpx.MockTransport(server.handle)))
    return server


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from manager.cli.main import main, COMMANDS\n"
        "assert main(['--help']) == 0\n"
        "print(sorted({'httpx', 'rich', 'dask', 'yaml', 'redis', 'numpy', 'asyncio'} & set(sys.modules)), len(COMMANDS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines()[-1] == f"[] {len(cli.COMMANDS)}"
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_page(name, capsys):
    assert cli.main([name, "--help"]) == Exit.OK
    assert f"Usage: rocyard {name}" in capsys.readouterr().out


def test_submit_prints_the_id_and_nothing_else(server, capsys):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    assert cli.main(["submit", "--memory", "24GiB", "--gpus", "2", "echo", '{"x": 1}']) == Exit.OK
    assert capsys.readouterr().out == f"{ID}\n"
    assert json.loads(server.seen[0].content) == {
        "function": "echo",
        "args": {"x": 1},
        "resources": {"memory": "24GiB", "gpus": 2},
    }


def test_submit_and_wait_prints_the_result(server, capsys):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    server.answers[f"GET /v1/tasks/{ID}"] = (200, VIEW)
    assert cli.main(["submit", "--wait", "echo", '{"x": 1}']) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"x": 1}


@pytest.mark.parametrize("options", [["--output", "json"], ["-o", "json"], ["-ojson"], ["--output=json"]])
def test_as_json_a_waited_task_comes_whole_and_a_failed_one_too(server, capsys, options):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    server.answers[f"GET /v1/tasks/{ID}"] = (200, FAILED)
    assert cli.main(["submit", "--wait", "echo", *options]) == Exit.FAILED
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["type"] == "ValueError"
    assert printed.err == ""


def test_a_failed_task_tells_why_and_cannot_write_to_the_terminal(server, capsys):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    server.answers[f"GET /v1/tasks/{ID}"] = (200, FAILED)
    assert cli.main(["submit", "--wait", "echo"]) == Exit.FAILED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "ValueError: no�[2Jway" in printed.err
    assert "File x" in printed.err


def test_a_wait_that_is_over_has_an_exit_code_of_its_own(server):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    server.answers[f"GET /v1/tasks/{ID}"] = (200, VIEW | {"status": "RUNNING"})
    assert cli.main(["submit", "--wait", "--timeout", "0", "echo"]) == Exit.TIMED_OUT


@pytest.mark.parametrize(
    ("told", "expected", "words"),
    [
        pytest.param({"code": "TaskFailed", "error": FAILED["error"]}, Exit.FAILED, "ValueError: no", id="failed"),
        pytest.param({"code": "TaskCancelled"}, Exit.FAILED, f"Task {ID} was cancelled", id="cancelled"),
        pytest.param({"code": "NotFinished", "retryable": True}, Exit.TIMED_OUT, "the task is RUNNING", id="not finished"),
    ],
)
def test_a_result_that_there_is_not_is_told_like_the_end_of_a_waited_task(server, capsys, told, expected, words):
    server.answers[f"GET /v1/tasks/{ID}/result"] = (409, {"detail": "the task is RUNNING", "task_id": ID} | told)
    assert cli.main(["result", ID]) == expected
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert ("File x" in printed.err) == (told["code"] == "TaskFailed")
    assert cli.main(["result", ID, "-o", "json"]) == expected
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["code"], error["exit"], error["task_id"]) == (told["code"], expected, ID)
    assert error.get("error") == told.get("error")


@pytest.mark.parametrize("key", [None, "today 1"])
def test_a_submission_of_which_nobody_knows_tells_its_key(server, capsys, monkeypatch, key):
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.0)
    server.answers["POST /v1/tasks"] = (0, httpx.ReadTimeout("slow"))
    given = [] if key is None else ["--idempotency-key", key]
    assert cli.main(["submit", "echo", *given]) == Exit.UNREACHABLE
    sent = server.seen[0].headers["idempotency-key"]
    assert f"again with --idempotency-key {shlex.quote(sent)} " in capsys.readouterr().err
    assert key in {None, sent}
    assert cli.main(["submit", "echo", *given, "-o", "json"]) == Exit.UNREACHABLE
    told = json.loads(capsys.readouterr().err)["error"]
    assert told["idempotency_key"] == server.seen[-1].headers["idempotency-key"]


def test_a_submission_that_is_broken_off_tells_its_key(server, capsys):
    server.answers["POST /v1/tasks"] = (0, KeyboardInterrupt())
    assert cli.main(["submit", "echo", "--count", "3"]) == Exit.INTERRUPTED
    assert f"--idempotency-key {server.seen[0].headers['idempotency-key']} " in capsys.readouterr().err


@pytest.mark.parametrize("answer", [(0, httpx.ConnectError("refused")), (429, {"detail": "full", "code": "QuotaExceeded"})])
def test_a_submission_that_was_refused_has_no_key_to_tell(server, capsys, answer):
    server.answers["POST /v1/tasks"] = answer
    assert cli.main(["submit", "echo"]) in {Exit.UNREACHABLE, Exit.REFUSED}
    assert "idempotency" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "a ", "a\nb", "ä"])
def test_a_key_that_cannot_be_sent_is_wrong_input(server, capsys, key):
    assert cli.main(["submit", "echo", "--idempotency-key", key]) == Exit.USAGE
    assert "1 to 255 printable ASCII characters" in capsys.readouterr().err
    assert not server.seen


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param(["submit", "echo", "{"], "not JSON", id="half an object"),
        pytest.param(["submit", "echo", "[1]"], "JSON object", id="a list"),
        pytest.param(["submit", "echo", "[" * 100_000], "not JSON", id="far too deep"),
        pytest.param(["submit", "echo", "@/no/such/file"], "cannot be read", id="no file"),
        pytest.param(["submit", "--timeout", "5s", "echo"], "needs --wait", id="timeout without wait"),
        pytest.param(["submit", "--priority", "99", "echo"], "-10", id="priority out of range"),
        pytest.param(["tasks", "--status", "WAITING"], "QUEUED", id="no status"),
        pytest.param(["show", "../keys"], "no id", id="no id"),
        pytest.param(["submit", "--index-as", "x", "echo"], "needs --count", id="index without count"),
        pytest.param(["submit", "--deadline", "2027-01-31", "echo"], "2027-01-31T18:00Z", id="deadline without zone"),
        pytest.param(["sumbit"], "submit", id="a mistyped command"),
        pytest.param(["status", "--set", "api.port"], "SECTION.KEY=VALUE", id="half a setting"),
    ],
)
def test_wrong_input_is_refused_with_what_would_be_right(server, capsys, args, words):
    assert cli.main(args) == Exit.USAGE
    assert words in capsys.readouterr().err
    assert not server.seen


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NotFound", Exit.NOT_FOUND),
        (404, "FunctionNotFound", Exit.NOT_FOUND),
        (401, "Unauthorized", Exit.NOT_AUTHORISED),
        (403, "Forbidden", Exit.NOT_AUTHORISED),
        (422, "Infeasible", Exit.REFUSED),
        (429, "QuotaExceeded", Exit.REFUSED),
        (503, "StoreFull", Exit.REFUSED),
        (422, "InvalidArguments", Exit.USAGE),
        (400, "BadRequest", Exit.USAGE),
        (413, "TooLarge", Exit.USAGE),
        (503, "StoreUnavailable", Exit.UNREACHABLE),
        (500, "InternalError", Exit.FAILED),
    ],
)
def test_each_refusal_has_its_exit_code(server, capsys, monkeypatch, status, code, expected):
    monkeypatch.setattr(client_wire, "SUBMIT_PATIENCE_S", 0.1)  # what may pass is tried again for so long
    server.answers["POST /v1/tasks"] = (status, {"detail": "so it is", "code": code, "near": ["echo"]})
    assert cli.main(["submit", "echo"]) == expected
    assert "so it is" in capsys.readouterr().err
    assert cli.main(["submit", "echo", "-o", "json"]) == expected
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["exit"], error["near"]) == (expected, ["echo"])


def test_a_cluster_that_does_not_answer(server, capsys):
    server.answers["GET /v1/workers"] = (0, httpx.ConnectError("refused"))
    assert cli.main(["workers"]) == Exit.UNREACHABLE
    assert "rocyard up" in capsys.readouterr().err


def test_no_cluster_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for variable in ("ROCYARD_URL", "ROCYARD_API_KEY", "ROCYARD_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ROCYARD_DATA_DIR", str(tmp_path))
    assert cli.main(["status"]) == Exit.USAGE
    assert "rocyard up" in capsys.readouterr().err


def test_down_where_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROCYARD_DATA_DIR", str(tmp_path))
    assert cli.main(["down"]) == Exit.OK
    assert "no cluster runs" in capsys.readouterr().out


def test_a_list_says_when_there_is_more(server, capsys):
    server.answers["GET /v1/tasks"] = (200, {"tasks": [SUMMARY] * 3, "next_cursor": None})
    assert cli.main(["tasks", "--limit", "2"]) == Exit.OK
    printed = capsys.readouterr()
    assert printed.out.count(ID) == 2
    assert "2 newest shown" in printed.err
    assert server.seen[0].url.params["limit"] == "3"


def test_a_list_as_json_is_an_array(server, capsys):
    server.answers["GET /v1/tasks"] = (200, {"tasks": [SUMMARY], "next_cursor": None})
    assert cli.main(["--output", "json", "tasks"]) == Exit.OK
    assert [task["task_id"] for task in json.loads(capsys.readouterr().out)] == [ID]


def test_show_tells_all_about_a_task(server, capsys):
    server.answers[f"GET /v1/tasks/{ID}"] = (200, VIEW)
    assert cli.main(["show", ID]) == Exit.OK
    out = capsys.readouterr().out
    for words in ("SUCCEEDED", "24 GiB", "node-1", "took 1.5 s", '{"x":1}'):
        assert words in out


def test_explain_shows_a_verdict_for_each_node(server, capsys):
    server.answers[f"GET /v1/tasks/{ID}/explain"] = (200, EXPLANATION)
    assert cli.main(["explain", ID]) == Exit.OK
    out = capsys.readouterr().out
    assert "No node has room." in out
    assert "node-1" in out


def test_logs_keep_the_two_streams_apart(server, capsys):
    server.answers[f"GET /v1/tasks/{ID}/logs"] = (
        200,
        {"task_id": ID, "stdout": "out\n", "stderr": "err\n", "dropped_bytes": 7},
    )
    assert cli.main(["logs", ID]) == Exit.OK
    printed = capsys.readouterr()
    assert printed.out == "out\n"
    assert printed.err.endswith("err\n")
    assert "7 bytes before this" in printed.err


def test_following_a_log_goes_on_to_the_tasks_end_and_marks_a_new_attempt(server, capsys, monkeypatch):
    pieces = [
        {"stdout": "a\n", "stderr": "", "attempt": 1, "cursor": "1.2.0"},
        {"stdout": "b\n", "stderr": "", "attempt": 2, "cursor": "2.2.0", "ended": True},
    ]
    left = iter(pieces * 2)
    monkeypatch.setattr(server, "handle", lambda _: httpx.Response(200, json={"task_id": ID} | next(left)))
    assert cli.main(["logs", "-f", ID]) == Exit.OK
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a\nb\n", "(attempt 2)\n")
    assert cli.main(["logs", "-f", ID, "-o", "json"]) == Exit.OK
    assert [json.loads(line)["stdout"] for line in capsys.readouterr().out.splitlines()] == ["a\n", "b\n"]


ARRAY_ID = "01arz3ndektsv4rrffq69g0000"
ARRAY = {
    "array_id": ARRAY_ID,
    "tenant": "t",
    "function": "echo",
    "name": "sweep",
    "count": 4,
    "made": 4,
    "succeeded": 2,
    "failed": 1,
    "cancelled": 0,
    "unfinished": 1,
    "created_at": "2026-01-02T03:04:05Z",
}


def test_all_that_can_be_asked_of_a_task_reaches_the_api(server, capsys):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ARRAY_ID, "status": "BLOCKED", "count": 4})
    server.answers["GET /v1/tasks"] = (200, {"tasks": [SUMMARY], "next_cursor": None})
    options = [
        *("--max-attempts", "3", "--retry-on", "OSError", "--retry-on", "GpuOutOfMemory", "--start-timeout", "5m"),
        *("--total-timeout", "1h", "--deadline", "2027-01-31T18:00Z", "--name", "sweep", "--after", ID, "--after", "prepare"),
        *("--after-failed", "run", "--count", "4", "--index-as", "x", "--idempotency-key", "mine"),
    ]
    assert cli.main(["submit", *options, "echo"]) == Exit.OK
    assert capsys.readouterr().out == f"{ARRAY_ID}\n"
    assert server.seen[0].url.params["name"] == "prepare"
    assert server.seen[-1].headers["idempotency-key"] == "mine"
    assert json.loads(server.seen[-1].content) == {
        "function": "echo",
        "args": {},
        "resources": {},
        "max_attempts": 3,
        "retry_on": ["OSError", "GpuOutOfMemory"],
        "start_timeout": "5m",
        "total_timeout": "1h",
        "deadline": "2027-01-31T18:00:00Z",
        "name": "sweep",
        "after": [ID, ID],
        "after_failed": "run",
        "count": 4,
        "index_as": "x",
    }


def test_an_array_is_shown_cancelled_and_waited_for_like_a_task(server, capsys):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ARRAY_ID, "status": "QUEUED", "count": 4})
    server.answers[f"GET /v1/arrays/{ARRAY_ID}"] = (200, ARRAY)
    server.answers[f"POST /v1/arrays/{ARRAY_ID}/cancel"] = (200, {"array_id": ARRAY_ID, "cancelled": 1, "ending": 2})
    server.answers["GET /v1/tasks"] = (200, {"tasks": [SUMMARY | {"array_id": ARRAY_ID, "index": 3}], "next_cursor": None})
    for which in (ARRAY_ID, "sweep"):
        assert cli.main(["show", which]) == Exit.OK
        out = capsys.readouterr().out
        assert "2 succeeded, 1 failed, 1 to go" in out
        assert f"--status FAILED --array {ARRAY_ID}" in out
    assert cli.main(["cancel", "sweep"]) == Exit.OK
    assert capsys.readouterr().out == f"1 task of {ARRAY_ID} cancelled, and 2 running ones are being ended\n"
    assert cli.main(["logs", ARRAY_ID]) == Exit.USAGE
    assert f"rocyard tasks --array {ARRAY_ID}" in capsys.readouterr().err
    server.answers[f"GET /v1/arrays/{ARRAY_ID}"] = (200, ARRAY | {"unfinished": 0, "succeeded": 3})
    assert cli.main(["submit", "--count", "4", "--wait", "echo"]) == Exit.FAILED
    assert "all have ended" in capsys.readouterr().out


def test_a_name_that_nothing_has_is_not_found(server, capsys):
    server.answers["GET /v1/tasks"] = (200, {"tasks": [], "next_cursor": None})
    assert cli.main(["show", "no-such"]) == Exit.NOT_FOUND
    assert "no-such" in capsys.readouterr().err


def test_attempts_are_a_table_and_stand_below_a_task_that_had_several(server, capsys):
    began = "2026-01-02T03:04:05Z"
    tries = [
        {
            "number": 1,
            "node": "n1",
            "claimed_at": began,
            "started_at": began,
            "ended_at": began,
            "why": "OSError",
            "message": "x",
        },
        {"number": 2, "node": "n2", "claimed_at": began, "started_at": None, "ended_at": None, "why": ""},
    ]
    server.answers[f"GET /v1/tasks/{ID}/attempts"] = (200, {"task_id": ID, "attempts": tries})
    server.answers[f"GET /v1/tasks/{ID}"] = (200, VIEW | {"attempt": 2, "status": "RUNNING", "progress": 0.4})
    assert cli.main(["attempts", ID]) == Exit.OK
    table = capsys.readouterr().out
    assert "OSError: x" in table
    assert "it goes on" in table
    assert cli.main(["show", ID]) == Exit.OK
    out = capsys.readouterr().out
    assert out.endswith(table)
    assert "40%" in out


def test_cancelling_several_ends_the_others_though_one_is_unknown(server, capsys):
    other = "01arz3ndektsv4rrffq69g5faw"
    server.answers[f"POST /v1/tasks/{ID}/cancel"] = (
        200,
        {"task_id": ID, "status": "RUNNING", "cancel_requested": True},
    )
    assert cli.main(["cancel", other, ID]) == Exit.NOT_FOUND
    printed = capsys.readouterr()
    assert printed.out == f"{ID} is being ended\n"
    assert printed.err == f"error: {other}: There is no such task.\n"
    assert cli.main(["cancel", other, ID, "-o", "json"]) == Exit.NOT_FOUND
    printed = capsys.readouterr()
    assert [answer["task_id"] for answer in json.loads(printed.out)] == [ID]
    told = {"code": "NotFound", "message": "There is no such task.", "exit": Exit.NOT_FOUND, "task": other}
    assert [json.loads(line) for line in printed.err.splitlines()] == [{"error": told}]


def test_a_new_key_is_all_that_goes_to_stdout(server, capsys):
    made = {"key_id": "abcd1234", "tenant": "vision", "scope": "user", "created_at": VIEW["created_at"], "key": "ry_x"}
    server.answers["POST /v1/keys"] = (201, made)
    assert cli.main(["keys", "create", "--tenant", "vision"]) == Exit.OK
    printed = capsys.readouterr()
    assert printed.out == "ry_x\n"
    assert "shown this once" in printed.err


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


def test_arguments_come_from_stdin_and_files(server, capsys, monkeypatch, tmp_path):
    server.answers["POST /v1/tasks"] = (202, {"task_id": ID, "status": "QUEUED"})
    monkeypatch.setattr(sys, "stdin", stdin_of(b'{"x": 2}'))
    (tmp_path / "args.json").write_text('{"x": 3}')
    assert cli.main(["submit", "echo", "-"]) == Exit.OK
    assert cli.main(["submit", "echo", f"@{tmp_path}/args.json"]) == Exit.OK
    assert [json.loads(request.content)["args"] for request in server.seen] == [{"x": 2}, {"x": 3}]


@pytest.mark.parametrize("command", ["submit", "plan"])
@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        pytest.param(b"\xff", "stdin cannot be read: 'utf-8' codec", id="no UTF-8"),
        pytest.param(None, "stdin cannot be read: it is closed", id="closed"),
        pytest.param(b"[", "stdin: not JSON", id="no JSON"),
    ],
)
def test_what_stdin_cannot_give_is_refused_in_words(server, capsys, monkeypatch, command, stdin, words):
    monkeypatch.setattr(sys, "stdin", None if stdin is None else stdin_of(stdin))
    assert cli.main([command, "echo", "-"]) == Exit.USAGE
    assert words in capsys.readouterr().err
    assert not server.seen


DRAINING = {
    "node": "node-1",
    "state": "draining",
    "hostname": "h",
    "source": "simulated",
    "version": "1",
    "slots": 1,
    "tasks_running": 1,
    "cordon": "drain",
    "remove": True,
    "cpus_leased": 2.0,
    "host_leased_bytes": 2**30,
    "readings_age_s": 0.1,
}


def test_a_node_that_is_gone_once_it_was_drained_is_told(server, capsys, monkeypatch):
    monkeypatch.setattr(workers, "POLL_S", 0.0)
    server.answers["POST /v1/workers/node-1/drain"] = (200, DRAINING)
    assert cli.main(["drain", "node-1", "--remove", "--wait", "-o", "json"]) == Exit.OK
    nothing = {"slots": 0, "tasks_running": 0, "devices": [], "cpus_leased": 0, "host_leased_bytes": 0, "readings_age_s": None}
    view = json.loads(capsys.readouterr().out)
    assert view == view | DRAINING | {"state": "left"} | nothing
    assert cli.main(["drain", "node-1", "--remove", "--wait"]) == Exit.OK
    assert capsys.readouterr() == ("", "node-1 is gone\n")


DECISIONS = {"decisions": [], "next_cursor": None}


@pytest.mark.parametrize(
    "args",
    [
        ["-o", "json", "autoscaler", "history"],
        ["autoscaler", "-o", "json", "history"],
        ["autoscaler", "history", "-o", "json"],
        ["-o", "table", "autoscaler", "-o", "json", "history"],
        ["autoscaler", "-o", "table", "history", "-o", "json"],
    ],
)
def test_a_common_option_may_stand_before_or_after_each_word_of_a_command(server, capsys, args):
    server.answers["GET /v1/autoscaler/decisions"] = (200, DECISIONS)
    assert cli.main(args) == Exit.OK
    assert json.loads(capsys.readouterr().out) == []


def test_of_a_setting_that_is_given_twice_the_later_one_counts(monkeypatch):
    seen = []

    def client(session):
        seen.append(session.options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "client", client)
    words = ["autoscaler", "history"]
    for place in range(3):
        args = [*words[:place], "--set", f"data_dir=/{place}", "--config", f"/{place}.yaml", *words[place:]]
        assert cli.main(args) == Exit.INTERRUPTED
        assert (dict(seen[-1].overrides), seen[-1].config) == ({"data_dir": f"/{place}"}, Path(f"/{place}.yaml"))
    cli.main(
        ["--set", "data_dir=/a", "autoscaler", "--set", "data_dir=/b", "--set", "api.port=1", "history", "--set", "api.port=2"]
    )
    assert dict(seen[-1].overrides) == {"data_dir": "/b", "api.port": "2"}


def test_ctrl_c_is_no_error(server, capsys, monkeypatch):
    def interrupted(_session):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "client", interrupted)
    assert cli.main(["workers"]) == Exit.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_the_settings_of_a_process_come_from_its_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["api", "--set", "api.prot=1"]) == Exit.USAGE
    assert "api.port" in capsys.readouterr().err


def test_a_usage_error_is_json_where_json_was_asked_for(capsys):
    assert cli.main(["-o", "json", "drain"]) == Exit.USAGE
    told = json.loads(capsys.readouterr().err)
    assert told == {"error": {"code": "Usage", "message": "Missing argument 'NODE'.", "exit": 2}}


def test_an_argument_that_is_no_text_is_refused(capsys):
    assert cli.main(["drain", "\udcff"]) == Exit.USAGE
    assert "is not UTF-8" in capsys.readouterr().err


def test_an_interval_that_is_no_number_is_refused(capsys):
    assert cli.main(["top", "--interval", "nan"]) == Exit.USAGE
    assert "nan is no number of seconds" in capsys.readouterr().err


def test_a_terminal_without_our_signs_gets_question_marks(tmp_path):
    """Such as one of a Latin-1 locale: no command may fail for a dot."""
    code = "import sys; from manager.cli import main; main._stand_any_terminal(); print('a · b')"
    environ = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "a ? b\n"


@pytest.mark.parametrize("name", ["../x", "a/b", "ü", "a b", "-x", "x" * 64, "."])
def test_a_node_cannot_be_called_a_path(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["node", "--name", name]) == Exit.USAGE
    assert "node.name: must be letters, digits" in capsys.readouterr().err
