"""The command line against a real cluster: each command as people type it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from manager.cli.exits import Exit
from tests.integration.cluster import Cluster, eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[2]


def rocyard(cluster: Cluster, *args: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**cluster.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "manager.cli.main", *args]
    return subprocess.run(
        command, env=environ, cwd=cluster.directory, input=stdin, capture_output=True, text=True, timeout=150, check=False
    )


def answer(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == Exit.OK, done.stderr
    return json.loads(done.stdout)


def test_submit_and_wait_prints_the_result(cluster):
    done = rocyard(cluster, "submit", "--memory", "24GiB", "--gpus", "1", "--wait", "echo", '{"x": 1}')
    assert answer(done) == {"x": 1}


def test_a_task_is_listed_shown_explained_and_cancelled(cluster):
    task = rocyard(cluster, "submit", "sleep", "-", stdin='{"seconds": 60}').stdout.strip()
    listed = answer(rocyard(cluster, "tasks", "--function", "sleep", "--output", "json"))
    assert task in [one["task_id"] for one in listed]
    eventually(lambda: answer(rocyard(cluster, "show", task, "-o", "json"))["status"] == "RUNNING", 30, "it runs")
    assert "It has been running on node-" in rocyard(cluster, "explain", task).stdout
    assert rocyard(cluster, "cancel", task).stdout == f"{task} is being ended\n"
    shown = eventually(
        lambda: (found := answer(rocyard(cluster, "show", task, "-o", "json")))["status"] != "RUNNING" and found, 15, "ended"
    )
    assert shown["status"] == "CANCELLED"


def test_a_failed_task_gives_exit_code_one_with_its_reason(cluster):
    done = rocyard(cluster, "submit", "--wait", "fail", '{"message": "on purpose"}')
    assert done.returncode == Exit.FAILED
    assert "RuntimeError: on purpose" in done.stderr
    assert done.stdout == ""


def test_a_wait_that_is_too_short(cluster):
    done = rocyard(cluster, "submit", "--wait", "--timeout", "100ms", "sleep", '{"seconds": 5}')
    assert done.returncode == Exit.TIMED_OUT


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["submit", "--memory", "900TiB", "echo"], Exit.REFUSED, "largest device"),
        (["submit", "--memory", "-5GiB", "echo"], Exit.USAGE, "not a size"),
        (["submit", "ehco"], Exit.NOT_FOUND, "echo"),
        (["submit", "sleep", '{"seconds": "long"}'], Exit.USAGE, "seconds"),
        (["show", "01arz3ndektsv4rrffq69g5fav"], Exit.NOT_FOUND, "no such task"),
        (["keys", "revoke", "zzzzzzzz"], Exit.NOT_FOUND, "key"),
    ],
)
def test_what_is_refused_says_why_with_its_exit_code(cluster, args, code, words):
    done = rocyard(cluster, *args)
    assert done.returncode == code
    assert words in done.stderr


def test_a_new_key_works_for_its_tenant_only_and_ends_when_it_is_revoked(cluster):
    task = rocyard(cluster, "submit", "echo").stdout.strip()
    made = answer(rocyard(cluster, "keys", "create", "--tenant", "vision", "-o", "json"))
    key = made["key"]
    assert rocyard(cluster, "show", task, ROCYARD_API_KEY=key).returncode == Exit.NOT_FOUND
    assert rocyard(cluster, "keys", "list", ROCYARD_API_KEY=key).returncode == Exit.NOT_AUTHORISED
    own = rocyard(cluster, "submit", "--wait", "echo", '{"y": 2}', ROCYARD_API_KEY=key)
    assert answer(own) == {"y": 2}
    theirs = answer(rocyard(cluster, "tasks", "--tenant", "vision", "-o", "json"))
    assert len(theirs) == 1
    assert rocyard(cluster, "show", theirs[0]["task_id"], "--tenant", "vision").returncode == Exit.OK
    assert rocyard(cluster, "keys", "revoke", made["key_id"]).returncode == Exit.OK
    eventually(lambda: rocyard(cluster, "status", ROCYARD_API_KEY=key).returncode == Exit.NOT_AUTHORISED, 10, "it is refused")
    assert key not in rocyard(cluster, "keys", "list").stdout


def test_what_people_look_at_has_something_to_look_at(cluster):
    status = rocyard(cluster, "status").stdout
    assert "node-0" in status
    assert "MI300X" in status
    assert "sleep" in rocyard(cluster, "functions").stdout
    assert len(answer(rocyard(cluster, "workers", "-o", "json"))) == 2


def test_logs(cluster):
    done = rocyard(cluster, "submit", "fail", '{"kind": "crash", "message": "last words"}')
    task = done.stdout.strip()
    eventually(lambda: answer(rocyard(cluster, "show", task, "-o", "json"))["status"] == "FAILED", 60, "it has crashed")
    assert "last words" in rocyard(cluster, "logs", task).stderr


def test_the_examples_run(cluster):
    environ = {**cluster.environ, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "examples" / "first_tasks.py")
    done = subprocess.run(
        [sys.executable, script], env=environ, cwd=cluster.directory, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "many: 2470" in done.stdout
    assert "a failure: RuntimeError on purpose" in done.stdout


@pytest.mark.torch
def test_the_demo_does_its_main_job(cluster):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    done = rocyard(cluster, "demo", "--tasks", "60", "--output", "json")
    report = answer(done)
    assert (report["tasks"], report["images"], report["equal"]) == (60, 1797, 1797)
    assert report["accuracy"] > 0.9
    assert sum(number for _, _, number in report["places"]) == 60
    assert any(peak["leased_bytes"] for peak in report["peaks"])


@pytest.fixture
def own(tmp_path):
    cluster = Cluster(tmp_path, simulate="1x1:mi300x")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


def test_down_stops_everything_and_status_says_so(own):
    assert own.process is not None
    family = [psutil.Process(own.process.pid)]
    family += family[0].children(recursive=True)
    done = rocyard(own, "down")
    assert done.returncode == Exit.OK
    assert str(own.process.pid) in done.stdout
    own.process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert rocyard(own, "status").returncode == Exit.UNREACHABLE
    assert "no cluster runs" in rocyard(own, "down").stdout
