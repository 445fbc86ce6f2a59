"""Executors as real processes: what they run, what they write, and every way in which they, or their agent, can end."""

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import uvloop

from manager.core.wire import Batch, Call, Done, Note, decode_failure
from manager.settings import FunctionSettings
from plugins.node.executors import Executor, ExecutorStartError, Exit, Output, Pulse, describe, scrubbed_environment
from plugins.node.registry import described, load_functions

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 30.0
MARKER = b"\x00marker-of-the-tests\xff"


async def until(condition, what: str = "the condition") -> None:
    """Wait for a condition outside of this process's event loop."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {DEADLINE_S} s"
        await asyncio.sleep(0.005)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def touch(path: Path) -> None:
    path.touch()


def call(function: str, number: int = 0, **args) -> Call:
    return Call(f"task-{number}", 1, f"executor_functions:{function}", msgspec.json.encode(args))


class Answer(msgspec.Struct):
    done: Done
    output: Output

    @property
    def stdout(self):
        return self.output.stdout

    @property
    def stderr(self):
        return self.output.stderr

    @property
    def value(self):
        assert self.done.ok, self.done
        return msgspec.json.decode(self.done.result)

    @property
    def failure(self):
        assert not self.done.ok
        return decode_failure(self.done.result)


class Node:
    """Starts executors and keeps what they say."""

    def __init__(self, home: Path):
        self.home = home
        self.pulse = Pulse()
        self.answers: list[Answer] = []
        self.notes: list[Note] = []
        self.exits: list[Exit] = []
        self.news = asyncio.Event()
        self.started: list[Executor] = []

    async def start(self, **changes) -> Executor:
        env = changes.pop("env", None) or scrubbed_environment(os.environ, {"HOME": str(self.home)})
        options = {
            "python": "",
            "lease_s": 600.0,
            "path": [str(HERE)],
            "marker": MARKER,
            "on_note": self.notes.append,
        } | changes
        executor = await Executor.start(env=env, pulse=self.pulse, on_done=self.on_done, on_exit=self.on_exit, **options)
        self.started.append(executor)
        return executor

    def on_done(self, *what) -> None:
        self.answers.append(Answer(*what))
        self.news.set()

    def on_exit(self, end) -> None:
        self.exits.append(end)
        self.news.set()

    async def wait(self, *, answers: int = 0, exits: int = 0) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.answers) < answers or len(self.exits) < exits:
                self.news.clear()
                await self.news.wait()

    async def run(self, executor: Executor, *calls: Call) -> list[Answer]:
        before = len(self.answers)
        executor.send(Batch(calls))
        await self.wait(answers=before + len(calls))
        return self.answers[before:]

    async def one(self, function: str, **args) -> Answer:
        """Run one function in the executor, started if there is none."""
        executor = self.started[-1] if self.started else await self.start()
        return (await self.run(executor, call(function, len(self.answers), **args)))[0]

    async def exit(self) -> Exit:
        await self.wait(exits=1)
        return self.exits[0]

    async def close(self) -> None:
        for executor in self.started:
            executor.kill()
            async with asyncio.timeout(DEADLINE_S):
                await executor.exited
            assert not running(executor.pid)
            assert not running(executor.guard_pid)
        self.pulse.close()


@pytest_asyncio.fixture
async def node(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    node = Node(home)
    yield node
    await node.close()


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> str:
    """An interpreter that has msgspec and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(Path(msgspec.__file__).parent, site / "msgspec")
    return str(folder / "bin" / "python")


class TestCalls:
    async def test_echo(self, node):
        answer = await node.one("echo", x=[1, {"y": None}], text="é")
        assert answer.value == {"x": [1, {"y": None}], "text": "é"}
        assert answer.output == Output(b"", b"")
        assert answer.done.duration_s < 1
        assert answer.done.load_s > 0
        assert (await node.one("echo")).done.load_s == 0

    async def test_a_batch_is_answered_in_order_each_with_its_own_output(self, node):
        executor = await node.start()
        calls = [call("say", number, out=f"out {number}", err=f"err {number}") for number in range(16)]
        answers = await node.run(executor, *calls)
        assert [answer.done.task_id for answer in answers] == [f"task-{number}" for number in range(16)]
        assert [answer.stdout for answer in answers] == [b"out %d" % number for number in range(16)]
        assert [answer.stderr for answer in answers] == [b"err %d" % number for number in range(16)]
        assert executor.current is None

    async def test_the_process_stays_from_task_to_task(self, node):
        assert [(await node.one("count")).value for _ in range(3)] == [1, 2, 3]

    async def test_a_coroutine_function(self, node):
        assert (await node.one("coroutine", x=1)).value == 2

    async def test_large_arguments_and_results_pass(self, node):
        executor = await node.start(inline_bytes_max=2_000_000)
        answers = await node.run(executor, *(call("echo", number, x="x" * 300_000) for number in range(16)))
        assert all(len(answer.value["x"]) == 300_000 for answer in answers)

    @pytest.mark.parametrize(
        ("function", "args", "kind", "says"),
        [
            ("raise_error", {"message": "so"}, "ValueError", "so"),
            ("leave", {"code": 5}, "SystemExit", "the function called sys.exit(5)"),
            ("coroutine", {"x": "1"}, "InvalidArguments", "Expected `int`, got `str` - at `$.x`"),
            ("coroutine", {}, "InvalidArguments", "missing required field `x`"),
            ("big", {"size": 300_000}, "ResultTooLarge", "the limit is 262144 (results.inline_bytes_max)"),
            ("no_device_memory", {}, "GpuOutOfMemory", "Tried to allocate"),
            ("not_json", {}, "ResultNotSerialisable", "no JSON form"),
            ("no_such", {}, "AttributeError", "no_such"),
        ],
    )
    async def test_a_failure_is_the_tasks_alone(self, node, function, args, kind, says):
        failure = (await node.one(function, **args)).failure
        assert failure.type == kind
        assert says in failure.message
        assert (await node.one("echo", x=1)).value == {"x": 1}

    async def test_a_traceback_shows_the_users_frames_and_no_variables(self, node):
        trace = (await node.one("raise_error")).failure.traceback
        assert "executor_functions.py" in trace
        assert "in raise_error" in trace
        assert "plugins/node/executor.py" not in trace
        assert "a local variable" not in trace.replace('local = "a local variable"', "")

    async def test_nan_is_null(self, node):
        assert (await node.one("nan")).done.result == b'{"x":null,"y":[null]}'

    async def test_it_runs_under_uvloop(self, tmp_path):
        async def scenario():
            node = Node(tmp_path)
            answers = await node.run(await node.start(), *(call("say", number, out="x") for number in range(50)))
            assert [answer.stdout for answer in answers] == [b"x"] * 50
            node.started[0].send(Batch((call("segfault"),)))
            end = await node.exit()
            await node.close()
            return end

        end = await asyncio.to_thread(uvloop.run, scenario())
        assert end.returncode == -signal.SIGSEGV

    async def test_descriptors_are_given_back(self, node):
        before = descriptors()
        for _ in range(3):
            executor = await node.start()
            executor.kill()
            await executor.exited
        with pytest.raises(ExecutorStartError):
            await node.start(python="/no/such/python")
        assert descriptors() == before


class TestSurroundings:
    async def test_none_of_the_agents_secrets(self, node, tmp_path):
        names = ("ROCYARD_STORE__URL", "REDIS_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PYTHONPATH", "LD_PRELOAD")
        names += ("KUBERNETES_SERVICE_HOST", "SSH_AUTH_SOCK", "HTTPS_PROXY", "CUDA_VISIBLE_DEVICES", "DASK_TLS_KEY")
        canaries = dict.fromkeys(names, "canary")
        base = {"PATH": os.environ["PATH"], "ROCM_PATH": "/opt/rocm", "LD_LIBRARY_PATH": "/opt/rocm/lib", **canaries}
        env = scrubbed_environment(base, {"HOME": str(tmp_path), "ROCYARD_DEVICES": "a,b", "ROCR_VISIBLE_DEVICES": "0"})
        executor = await node.start(env=env)
        (answer,) = await node.run(executor, call("environment", 7))
        seen = answer.value
        assert "canary" not in seen.values()
        assert seen["ROCM_PATH"] == "/opt/rocm"
        assert (seen["HOME"], seen["TMPDIR"]) == (str(tmp_path), str(tmp_path))
        assert (seen["ROCYARD_TASK_ID"], seen["ROCYARD_ATTEMPT"]) == ("task-7", "1")
        assert (seen["ROCYARD_DEVICES"], seen["ROCR_VISIBLE_DEVICES"]) == ("a,b", "0")
        assert seen["PYTHONSAFEPATH"] == "1"
        assert set(seen) - {"LC_CTYPE"} == set(env) | {"ROCYARD_TASK_ID", "ROCYARD_ATTEMPT"}

    async def test_it_starts_in_its_home_with_nothing_to_read_and_few_descriptors(self, node):
        facts = (await node.one("facts")).value
        assert facts["cwd"] == str(node.home)
        assert facts["stdin"] == ""
        assert facts["path"][0] == str(HERE)
        assert str(ROOT / "plugins" / "node") not in facts["path"]
        assert len(facts["argv"]) == 1
        assert facts["pid"] == node.started[0].pid
        assert len(facts["descriptors"]) <= 10

    async def test_another_interpreter_needs_only_msgspec(self, node, bare_python):
        executor = await node.start(python=bare_python)
        (facts,) = await node.run(executor, call("facts"))
        assert facts.value["python"] == bare_python
        assert executor.python == ".".join(map(str, sys.version_info[:3]))
        calls = [call("say", 1, out="x"), call("raise_error", 2), call("pool", 3, method="fork")]
        said, failed, pooled = await node.run(executor, *calls)
        assert said.stdout == b"x"
        assert failed.failure.type == "ValueError"
        assert pooled.value == [0, 1, 4, 9, 16]
        executor.terminate(10)
        assert (await node.exit()).returncode == 128 + signal.SIGTERM

    async def test_an_interpreter_without_msgspec_is_named_with_the_remedy(self, node, tmp_path):
        venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
        with pytest.raises(ExecutorStartError, match=r"No module named 'msgspec'.*-m pip install msgspec"):
            await node.start(python=str(tmp_path / "empty" / "bin" / "python"))

    async def test_an_interpreter_that_is_missing_or_slow_is_an_error(self, node, tmp_path):
        with pytest.raises(ExecutorStartError, match=r"/no/such/python cannot be started"):
            await node.start(python="/no/such/python")
        slow = tmp_path / "python"
        slow.write_text("#!/bin/sh\nexec sleep 3600\n")
        slow.chmod(0o755)
        with pytest.raises(ExecutorStartError, match="not ready after"):
            await node.start(python=str(slow), ready_s_max=0.05)


class TestOutput:
    async def test_every_way_of_writing_belongs_to_the_task(self, node):
        executor = await node.start()
        answers = await node.run(executor, call("every_way", 1), call("echo", 2), call("every_way", 3), call("echo", 4))
        for answer in answers[::2]:
            words = [b"print\n", b"os.write\n", b"subprocess\n", b"printf\n", b"buffer\n", b"no newline"]
            assert all(word in answer.stdout for word in words)
            assert len(answer.stdout) == sum(map(len, words))
        assert [answer.stdout for answer in answers[1::2]] == [b"", b""]

    async def test_half_a_marker_is_output(self, node):
        executor = await node.start()
        half, after = await node.run(executor, call("half_marker", 1, marker=MARKER.hex()), call("say", 2, out="x"))
        assert (half.stdout, half.stderr) == (MARKER[:-1], MARKER[:1])
        assert (after.stdout, after.stderr) == (b"x", b"")

    async def test_a_forged_marker_harms_nobody_for_long(self, node):
        executor = await node.start()
        await node.run(executor, call("forge_marker", 1, marker=MARKER.hex()), call("say", 2, out="x"))
        assert (await node.one("echo", x=1)).value == {"x": 1}

    async def test_a_flood_keeps_its_end_and_holds_up_nobody(self, node):
        executor = await node.start(log_bytes_max=1000)
        size = 64 * 1024 * 400
        flood, after = await node.run(executor, call("flood", 1, size=size), call("say", 2, out="next"))
        assert flood.stdout.endswith(b"0\nthe end")
        assert len(flood.stdout) == 1000
        assert flood.output.stdout_dropped == size + 7 - 1000
        assert after.output == Output(b"next", b"")

    async def test_what_a_running_task_has_written_can_be_seen(self, node, tmp_path):
        executor = await node.start()
        executor.send(Batch((call("wait", started=str(tmp_path / "s"), ended=str(tmp_path / "e")),)))
        await until(lambda: executor.output_so_far().stdout == b"waiting\n", "the output")
        assert executor.started_at_s is not None
        assert 0 <= time.monotonic() - executor.started_at_s < DEADLINE_S

    async def test_a_task_that_breaks_its_output_breaks_only_that(self, node):
        executor = await node.start()
        broken, after = await node.run(executor, call("break_output", 1), call("every_way", 2))
        assert broken.done.ok
        assert broken.stdout == b"before\n"
        assert b"printf\n" in after.stdout
        assert b"print\n" in after.stdout

    async def test_a_task_that_changes_its_process_leaves_the_next_one_as_it_was(self, node, tmp_path):
        await node.one("change_directory")
        assert (await node.one("facts")).value["cwd"] == str(node.home)
        executor = node.started[0]
        executor.send(Batch((call("wait", started=str(tmp_path / "s"), ended=str(tmp_path / "e")),)))
        await until((tmp_path / "s").exists)
        executor.terminate(DEADLINE_S)
        await node.exit()
        assert (tmp_path / "e").exists()


class TestEnds:
    @pytest.mark.parametrize(
        ("function", "returncode"),
        [("segfault", -signal.SIGSEGV), ("abort", -signal.SIGABRT), ("exit_hard", 7), ("close_everything", None)],
    )
    async def test_a_crash_names_the_call_that_had_started_and_no_other(self, node, function, returncode):
        executor = await node.start()
        calls = [call("say", 0, out="fine"), call(function, 1), call("echo", 2), call("echo", 3)]
        executor.send(Batch(tuple(calls)))
        end = await node.exit()
        assert [answer.done.task_id for answer in node.answers] == ["task-0"]
        assert end.started == calls[1]
        assert end.unstarted == tuple(calls[2:])
        assert end.asked is False
        assert returncode in {None, end.returncode}
        with pytest.raises(RuntimeError, match="has ended"):
            executor.send(Batch((calls[0],)))

    async def test_what_a_crashed_task_had_written_is_kept_with_its_stack(self, node):
        executor = await node.start()
        executor.send(Batch((call("segfault"),)))
        end = await node.exit()
        assert end.output.stdout == b"last words\n"
        assert b"Segmentation fault" in end.output.stderr
        assert b"executor_functions.py" in end.output.stderr

    async def test_an_idle_executor_that_is_killed_blames_nobody(self, node):
        executor = await node.start()
        os.kill(executor.pid, signal.SIGKILL)
        end = await node.exit()
        assert (end.returncode, end.started, end.unstarted) == (-signal.SIGKILL, None, ())

    async def test_a_machine_without_memory_ends_an_executor_before_its_agent(self, node):
        executor = await node.start()
        ours, its = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (os.getpid(), executor.pid))  # noqa: ASYNC240
        assert its > ours, "the kernel may choose the agent"

    @pytest.mark.parametrize("function", ["wait", "wait_async"])
    async def test_a_task_is_asked_to_end_and_cleans_up(self, node, tmp_path, function):
        executor = await node.start()
        calls = (call(function, 1, started=str(tmp_path / "s"), ended=str(tmp_path / "e")), call("echo", 2))
        executor.send(Batch(calls))
        await until((tmp_path / "s").exists)
        executor.terminate(DEADLINE_S)
        end = await node.exit()
        assert (tmp_path / "e").exists()
        (answer,) = node.answers
        assert answer.done.terminated
        assert answer.failure.type == "TaskTerminated"
        if function == "wait":
            assert "executor_functions.py" in answer.failure.traceback
            assert answer.stdout == b"waiting\ncleaning up\n"
        assert (end.returncode, end.started, end.unstarted, end.asked) == (143, None, calls[1:], True)

    @pytest.mark.parametrize("function", ["stubborn", "hold_the_lock"])
    async def test_a_task_that_will_not_end_is_killed_after_its_grace(self, node, tmp_path, function):
        executor = await node.start()
        calls = (call(function, 1, started=str(tmp_path / "s")), call("echo", 2))
        executor.send(Batch(calls))
        await until((tmp_path / "s").exists)
        executor.terminate(0.05)
        end = await node.exit()
        assert (end.returncode, end.started, end.unstarted) == (-signal.SIGKILL, calls[0], calls[1:])
        assert not node.answers

    async def test_an_idle_executor_ends_when_asked(self, node):
        executor = await node.start()
        await node.one("leave_children", started=str(node.home / "pids"))
        pids = [int(pid) for pid in (node.home / "pids").read_text().split()]
        assert all(running(pid) for pid in pids)
        executor.terminate(DEADLINE_S)
        assert (await node.exit()).returncode == 128 + signal.SIGTERM
        assert not any(running(pid) for pid in pids)

    async def test_no_process_is_left_when_the_end_is_told(self, node):
        executor = await node.start()
        executor.send(Batch((call("with_children", started=str(node.home / "pids")),)))
        await until((node.home / "pids").exists)
        pids = [int(pid) for pid in (node.home / "pids").read_text().split()]
        assert all(running(pid) for pid in pids)
        executor.kill()
        await node.exit()
        assert not any(running(pid) for pid in pids)

    async def test_a_thread_that_never_ends_does_not_keep_the_executor(self, node):
        await node.one("leave_thread")
        node.started[0].terminate(0.05)
        assert (await node.exit()).returncode == -signal.SIGKILL

    async def test_who_writes_into_our_descriptors_ends_and_is_not_believed(self, node):
        executor = await node.start()
        executor.send(Batch((call("write_to_every_descriptor", 1), call("wait_for_file", 2, path="/no/such"))))
        await node.exit()
        assert not any(answer.done.task_id == "task-2" for answer in node.answers)


class TestReports:
    async def test_what_a_function_reports_comes_before_its_answer(self, node, tmp_path):
        executor = await node.start()
        folder = tmp_path / "checkpoints" / "task"
        given = Call("t", 3, "executor_functions:reports", b"{}", 7, 10, "/shared/step-0", str(folder))
        (first,) = await node.run(executor, given)
        assert first.value == {
            "task": "t",
            "attempt": 3,
            "index": 7,
            "environment": ["7", "10"],
            "last": "/shared/step-0",
            "folder": str(folder),
            "then": "/shared/step-1",
        }
        assert folder.is_dir()
        assert node.notes == [Note("t", 3, 0.5, "half", None), Note("t", 3, None, None, "/shared/step-1")]
        second = await node.one("reports")
        assert second.value["environment"] == [None, None]
        assert (second.value["index"], second.value["last"], second.value["folder"]) == (None, None, None)

    async def test_a_flood_of_reports_is_thinned_out_and_the_last_one_comes(self, node):
        await node.one("reports_often", times=20_000)
        assert 2 <= len(node.notes) < 500
        assert (node.notes[-1].progress, node.notes[-1].message) == (1, "all")

    async def test_threads_report_and_other_processes_do_not(self, node, bare_python):
        executor = await node.start(python=bare_python)
        (answer,) = await node.run(executor, call("reports_from_a_thread_and_a_child"))
        assert answer.done.ok, answer.failure
        assert answer.value is None
        assert [(note.progress, note.message) for note in node.notes] == [(0.25, "thread")]

    async def test_an_interpreter_that_has_nothing_of_ours_reports_too(self, node, bare_python):
        executor = await node.start(python=bare_python)
        (answer,) = await node.run(executor, call("reports"))
        assert answer.value["then"] == "/shared/step-1"
        assert len(node.notes) == 2

    async def test_a_checkpoint_survives_the_executor(self, node):
        executor = await node.start()
        executor.send(Batch((call("reports_and_dies"),)))
        assert (await node.exit()).returncode == -signal.SIGKILL
        assert [note.checkpoint for note in node.notes] == ["/shared/last"]

    async def test_a_function_that_reports_all_the_time_is_ended_and_its_last_words_are_heard(self, node, tmp_path):
        executor = await node.start()
        executor.send(Batch((call("reports_when_asked_to_end", started=str(tmp_path / "started")),)))
        await until((tmp_path / "started").exists, "the start")
        executor.terminate(DEADLINE_S)
        await node.exit()
        assert node.answers[0].done.terminated
        assert node.answers[0].failure.type == "TaskTerminated"
        assert node.notes[-1].checkpoint == "/shared/in time"

    async def test_a_large_result_is_written_to_its_file(self, node, tmp_path):
        executor = await node.start(result_bytes_max=2_000_000)
        path = tmp_path / "result.json"
        asked = Call("t", 1, "executor_functions:big", b'{"size": 300000}', result_path=str(path))
        done = (await node.run(executor, asked))[0].done
        assert (done.ok, done.result, done.file_bytes) == (True, b"", 300_002)
        assert done.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert msgspec.json.decode(path.read_bytes()) == "x" * 300_000
        too_large = msgspec.structs.replace(asked, args=b'{"size": 3000000}')
        failure = (await node.run(executor, too_large))[0].failure
        assert failure.type == "ResultTooLarge"
        assert "2000000 (tasks.result_bytes_max)" in failure.message
        nowhere = msgspec.structs.replace(asked, result_path=str(tmp_path / "gone" / "result.json"))
        failure = (await node.run(executor, nowhere))[0].failure
        assert (failure.type, failure.traceback) == ("ResultNotStored", "")
        assert "No such file or directory" in failure.message


class TestRecall:
    async def test_calls_that_have_not_begun_are_taken_back_and_never_run(self, node, tmp_path):
        executor = await node.start()
        gate, trace = tmp_path / "gate", tmp_path / "trace"
        first = call("wait_for_file", 0, path=str(gate))
        executor.send(Batch((first, *(call("touch", number, path=f"{trace}{number}") for number in range(1, 16)))))
        await until(lambda: executor.started_at_s is not None)
        assert [each.task_id for each in executor.recall()] == [f"task-{number}" for number in range(1, 16)]
        assert executor.pending == (first,)
        assert executor.recall() == ()
        executor.send(Batch((call("echo", 99, x=1),)))
        touch(gate)
        await node.wait(answers=2)
        assert [answer.done.task_id for answer in node.answers] == ["task-0", "task-99"]
        assert not list(tmp_path.glob("trace*"))

    async def test_each_call_is_either_answered_or_taken_back(self, node):
        executor = await node.start()
        chance = random.Random(7)
        recalled: list[str] = []
        for round_ in range(150):
            executor.send(Batch(tuple(call("echo", round_ * 8 + number) for number in range(8))))
            await node.wait(answers=round_ * 8 + chance.randrange(8) - len(recalled))
            recalled += [each.task_id for each in executor.recall()]
        await node.wait(answers=150 * 8 - len(recalled))
        answered = [answer.done.task_id for answer in node.answers]
        assert sorted(answered + recalled) == sorted(f"task-{number}" for number in range(150 * 8))
        assert executor.pending == ()


class TestProcesses:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    async def test_multiprocessing_works_inside(self, node, method):
        assert (await node.one("pool", method=method)).value == [0, 1, 4, 9, 16]

    async def test_a_child_that_comes_back_from_a_function_is_not_the_executor(self, node):
        assert (await node.one("fork_and_return")).value == {"child": False}
        assert (await node.one("facts")).value["pid"] == node.started[0].pid

    async def test_processes_that_a_task_leaves_do_not_hold_up_the_next(self, node):
        os.mkfifo(node.home / "gate")
        await node.one("write_later", gate=str(node.home / "gate"))
        assert (await node.one("echo", x=1)).value == {"x": 1}

    async def test_a_beating_pulse_keeps_it_alive(self, node):
        async def beat() -> None:
            while True:
                node.pulse.beat()
                await asyncio.sleep(0.02)

        beating = asyncio.create_task(beat())
        executor = await node.start(lease_s=2.0)
        await asyncio.wait([executor.exited], timeout=3.0)
        assert not executor.exited.done()
        beating.cancel()

    async def test_a_silent_pulse_ends_it_even_if_its_task_holds_the_lock(self, node):
        executor = await node.start(lease_s=2.0)
        executor.send(Batch((call("hold_the_lock", started=str(node.home / "s")),)))
        await until((node.home / "s").exists)
        node.pulse.beat()
        began = time.monotonic()
        end = await node.exit()
        assert (end.returncode, end.asked) == (-signal.SIGKILL, False)
        assert 1.0 < time.monotonic() - began < 2.0 + 10.0


class TestAgent:
    """A second process as the agent, since these tests end it."""

    @contextlib.contextmanager
    def agent(self, started: Path, lease_s: float):
        args = msgspec.json.encode({"started": str(started)}).decode()
        command = [sys.executable, HERE / "executor_agent.py", "executor_functions:with_children", args, str(lease_s)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def test_a_killed_agent_takes_everything_with_it(self, tmp_path):
        with self.agent(tmp_path / "pids", 600) as process:
            pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
            await until((tmp_path / "pids").exists)
            pids += [int(pid) for pid in (tmp_path / "pids").read_text().split()]
            assert len(pids) == 6
            assert all(running(pid) for pid in pids)
            process.kill()
            await until(lambda: not any(running(pid) for pid in pids), "the end of all processes")

    async def test_a_frozen_agent_loses_its_executor_within_a_lease_and_learns_it_later(self, tmp_path):
        with self.agent(tmp_path / "pids", 3.0) as process:
            pids = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
            await until((tmp_path / "pids").exists)
            pids += [int(pid) for pid in (tmp_path / "pids").read_text().split()]
            process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            await until(lambda: not any(running(pid) for pid in pids), "the end of all processes")
            assert time.monotonic() - began < 3.0 + 10.0
            process.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(process.stdout.readline) == "ended -9\n"

    async def test_a_killed_guard_takes_the_executor_with_it(self, node):
        executor = await node.start()
        os.kill(executor.guard_pid, signal.SIGKILL)
        await node.exit()
        await until(lambda: not running(executor.pid))


class TestDescribe:
    async def test_a_target_that_cannot_be_imported_harms_no_other(self):
        targets = [
            "executor_functions:coroutine",
            "executor_functions:no_such",
            "executor_broken:f",
            "executor_hanging:f",
            "no_such_module:f",
            "executor_functions:leave",
        ]
        found = await describe("", targets, [str(HERE)], 1.0, os.environ)
        assert [each.target for each in found] == targets
        good, no_name, broken, hanging, no_module, last = found
        assert msgspec.json.decode(good.schema)["properties"] == {"x": {"type": "integer"}}
        assert good.error == last.error == ""
        assert no_name.error.startswith("AttributeError: ")
        assert broken.error == "importing it ended the process by SIGSEGV"
        assert hanging.error == "importing it took longer than 1 s"
        assert no_module.error == "ModuleNotFoundError: No module named 'no_such_module'"

    async def test_an_interpreter_that_cannot_start_is_the_error_of_all_its_targets(self):
        found = await describe("/no/such/python", ["a:b", "c:d"], [], 5.0, os.environ)
        assert [each.target for each in found] == ["a:b", "c:d"]
        assert all("cannot be started" in each.error for each in found)

    async def test_functions_of_several_interpreters_are_described_together(self, bare_python):
        configured = {
            "mine": FunctionSettings(target="executor_functions:coroutine", path=str(HERE)),
            "bare": FunctionSettings(target="executor_functions:echo", path=str(HERE), python=bare_python),
            "gone": FunctionSettings(target="executor_functions:gone", path=str(HERE)),
        }
        specs = await described(load_functions(configured, installed=[]), 20.0, os.environ)
        assert {name for name, spec in specs.items() if spec.error} == {"gone"}
        assert msgspec.json.decode(specs["bare"].schema)["additionalProperties"] is True
        assert specs["echo"].doc == "Return the arguments as they are."
        assert {"size", "repeats"} <= msgspec.json.decode(specs["matmul"].schema)["properties"].keys()


class TestBuiltins:
    async def run(self, node, name: str, **args) -> Answer:
        executor = node.started[-1] if node.started else await node.start(path=[str(ROOT)])
        target = load_functions({}, installed=[])[name].target
        number = len(node.answers)
        return (await node.run(executor, Call(f"task-{number}", 1, target, msgspec.json.encode(args))))[0]

    async def test_echo_sleep_and_fail(self, node):
        assert (await self.run(node, "echo", x=1)).value == {"x": 1}
        assert (await self.run(node, "sleep", seconds=0.01)).value["slept_s"] >= 0.01
        assert (await self.run(node, "sleep", seconds=-1)).failure.type == "InvalidArguments"
        assert (await self.run(node, "fail", message="so")).failure.message == "so"
        assert (await self.run(node, "fail", kind="exit")).failure.type == "SystemExit"

    async def test_a_missing_torch_is_named_with_the_remedy(self, node, bare_python):
        await node.start(python=bare_python, path=[str(ROOT)])
        failure = (await self.run(node, "matmul")).failure
        assert failure.type == "MissingTorchError"
        assert "pip install 'rocyard[torch]'" in failure.message

    @pytest.mark.torch
    async def test_matmul_computes(self, node):
        pytest.importorskip("torch")
        value = (await self.run(node, "matmul", size=64, repeats=2)).value
        assert value["gflops"] > 0
        assert value["checksum"] == pytest.approx(64, rel=0.2)

    @pytest.mark.torch
    async def test_digits_read_in_slices_equal_those_read_at_once(self, node):
        pytest.importorskip("torch")
        pytest.importorskip("sklearn")
        trained = (await self.run(node, "digits_train", epochs=100)).value
        assert trained["accuracy"] > 0.9
        assert len(trained["weights"]) < 20_000
        whole = (await self.run(node, "digits_classify", weights=trained["weights"])).value
        slices: list[int] = []
        for start in range(0, 1797, 300):
            answer = await self.run(
                node, "digits_classify", weights=trained["weights"], start=start, stop=min(start + 300, 1797)
            )
            slices += answer.value["predictions"]
        assert slices == whole["predictions"]
        assert len(slices) == 1797
        assert whole["correct"] > 1700
        again = (await self.run(node, "digits_train", epochs=100)).value
        assert again["weights"] == trained["weights"]
