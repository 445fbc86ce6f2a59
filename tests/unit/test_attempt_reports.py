"""What a function reports of its attempt, and what the end of an attempt means."""

import math
import os
import sys
import types
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rocyard
from manager.core.lifecycle import Outcome
from manager.core.model import Claim, ProgressNote, TaskSpec
from manager.core.quantities import GIB, MEMORY_BYTES_MAX, MIB
from manager.core.shapes import Grant, Resources, Shape, shape_id
from manager.core.wire import Call, Note
from plugins.node import attempt_notes, executor_attempt, executor_target
from plugins.node.attempt_ends import arguments_of, error_of, failed_as, room_for
from plugins.node.executor_attempt import AT_ONCE_MAX, PERIOD_S, RunningAttempt
from rocyard import task as face

CALL = Call("t", 2, "a:b", b"{}", 3, 10, "/step-1", "")


class Running:
    """An attempt with a clock of its own, and what it has sent."""

    def __init__(self, call: Call = CALL):
        self.now_s = 100.0
        self.sent = []
        self.attempt = RunningAttempt(lambda *what: self.sent.append(what), lambda: self.now_s)
        self.attempt.begin(call)


@pytest.fixture
def running(monkeypatch):
    running = Running()
    monkeypatch.setitem(sys.modules, executor_attempt.NAME, running.attempt)
    return running


class TestPace:
    def test_reports_come_at_once_and_are_thinned_out_when_there_are_many(self):
        running = Running()
        for number in range(1000):
            running.attempt.report(progress=number / 1000, message=str(number))
            running.now_s += 0.001
        # Those that may come together, and one in each period of the second that this took.
        assert len(running.sent) == AT_ONCE_MAX + int(1 / PERIOD_S) - 1
        assert running.sent[:2] == [(0.0, "0", None), (0.001, "1", None)]
        running.attempt.end()
        assert running.sent[-1] == (0.999, "999", None)

    def test_a_checkpoint_never_waits_and_takes_with_it_what_does(self):
        running = Running()
        for number in range(AT_ONCE_MAX + 1):
            running.attempt.report(progress=number / 100, message="")
        assert len(running.sent) == AT_ONCE_MAX
        running.attempt.report(checkpoint="/step-2")
        assert running.sent[-1] == (AT_ONCE_MAX / 100, "", "/step-2")
        running.attempt.end()
        assert len(running.sent) == AT_ONCE_MAX + 1, "nothing is told twice"

    def test_what_comes_after_the_end_is_not_sent(self):
        running = Running()
        running.attempt.end()
        running.attempt.report(progress=1.0, message="of a thread that was left behind", checkpoint="/late")
        assert running.sent == []

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    def test_the_last_progress_is_always_sent(self, steps):
        running = Running()
        for pause_s, fraction in steps:
            running.now_s += pause_s
            running.attempt.report(progress=fraction, message="")
        running.attempt.end()
        assert [sent[0] for sent in running.sent][-1:] == [fraction for _, fraction in steps][-1:]


class TestFace:
    def test_names_and_limits_are_the_same_on_both_sides(self):
        assert face.ATTEMPT == executor_attempt.NAME
        assert face.MESSAGE_CHARS_MAX == attempt_notes.MESSAGE_CHARS_MAX
        assert face.CHECKPOINT_CHARS_MAX == attempt_notes.CHECKPOINT_CHARS_MAX

    def test_outside_of_an_executor_it_does_nothing(self):
        rocyard.progress(0.5, "half")
        rocyard.checkpoint("/somewhere")
        assert rocyard.last_checkpoint() is rocyard.checkpoint_folder() is rocyard.array_index() is None
        assert rocyard.task_id() is rocyard.attempt() is None

    def test_inside_it_tells_what_was_given_and_reports(self, running):
        assert (rocyard.task_id(), rocyard.attempt(), rocyard.array_index()) == ("t", 2, 3)
        assert (rocyard.last_checkpoint(), rocyard.checkpoint_folder()) == ("/step-1", None)
        rocyard.progress(1 + 1e-9, "x" * 501)
        rocyard.checkpoint(Path("/step-2"))
        assert running.sent == [(1.0, "x" * 500, None), (None, None, "/step-2")]
        assert rocyard.last_checkpoint() == "/step-2"

    def test_the_folder_is_made_when_it_is_asked_for(self, running, tmp_path):
        folder = tmp_path / "checkpoints" / "t"
        running.attempt.begin(msgspec.structs.replace(CALL, folder=str(folder)))
        assert not folder.exists()
        assert rocyard.checkpoint_folder() == str(folder)
        assert folder.is_dir()

    def test_a_process_that_the_task_has_forked_is_not_the_attempt(self, running):
        running.attempt.pid = os.getpid() + 1
        rocyard.progress(0.5)
        assert rocyard.task_id() is None
        assert running.sent == []

    @pytest.mark.parametrize("fraction", [1.1, -0.1, math.nan, math.inf, "x", None, [1]])
    def test_what_is_no_fraction_is_refused_wherever_it_is_said(self, fraction):
        with pytest.raises(ValueError, match="from 0 to 1, such as done / total, not "):
            rocyard.progress(fraction)

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            pytest.param("", "1 to 1024 characters, this one has 0", id="empty"),
            pytest.param("x" * 1025, "1 to 1024 characters, this one has 1025", id="long"),
            pytest.param(b"/x", "os.fsdecode", id="bytes"),
            pytest.param(7, "not a int", id="a number"),
            pytest.param("\ud800", "UTF-8", id="no text"),
        ],
    )
    def test_what_is_no_path_is_refused(self, path, says):
        with pytest.raises(ValueError, match=says):
            rocyard.checkpoint(path)

    def test_a_message_is_text(self, running):
        with pytest.raises(ValueError, match="is a text, not a int"):
            rocyard.progress(0.5, 7)
        rocyard.progress(0.5, "\ud800")
        assert running.sent == [(0.5, "?", None)]


class TestNotes:
    @pytest.mark.parametrize(
        ("note", "expected"),
        [
            (Note("t", 1, 0.5, "m", "/c"), ProgressNote("t", 1, 0.5, "m", "/c")),
            (Note("t", 1, math.nan, "x" * 9999, "c" * 1025), ProgressNote("t", 1, None, "x" * 500, None)),
            (Note("t", 1, -1e300, None, ""), ProgressNote("t", 1, None, None, None)),
        ],
    )
    def test_what_no_function_can_have_reported_is_left_out(self, note, expected):
        assert attempt_notes.checked(note) == expected

    def test_the_newer_of_each_is_kept(self):
        old = ProgressNote("t", 1, 0.5, "half", "/1")
        assert attempt_notes.merged(old, ProgressNote("t", 1, 0.6)) == ProgressNote("t", 1, 0.6, "half", "/1")
        assert attempt_notes.merged(old, ProgressNote("t", 1, 0.6, "", "/2")) == ProgressNote("t", 1, 0.6, "", "/2")
        assert attempt_notes.merged(old, ProgressNote("t", 2, 0.1)) == ProgressNote("t", 2, 0.1)


def claim(index: int | None = None, args: bytes = b'{"x":1}', **spec) -> Claim:
    return Claim("t", 1, False, TaskSpec("f", msgspec.Raw(args), Resources(GIB), **spec), index)


@pytest.mark.parametrize(
    ("kind", "bases", "retry_on", "expected"),
    [
        pytest.param("KeyError", ("KeyError", "LookupError"), (), Outcome.FAILED, id="every failure"),
        pytest.param("KeyError", ("KeyError", "LookupError"), ("KeyError",), Outcome.FAILED, id="itself"),
        pytest.param("KeyError", ("KeyError", "LookupError"), ("X", "LookupError"), Outcome.FAILED, id="a base"),
        pytest.param("KeyError", ("KeyError", "LookupError"), ("ValueError",), Outcome.FAILED_FOR_GOOD, id="another"),
        pytest.param("TimeLimitExceeded", (), ("TimeLimitExceeded",), Outcome.FAILED, id="a reason"),
        pytest.param("TimeLimitExceeded", (), ("Exception",), Outcome.FAILED_FOR_GOOD, id="a reason is no exception"),
        pytest.param("GpuOutOfMemory", ("OutOfMemoryError", "RuntimeError"), ("RuntimeError",), Outcome.FAILED, id="memory"),
    ],
)
def test_only_failures_that_are_named_are_tried_again(kind, bases, retry_on, expected):
    assert failed_as(kind, bases, claim(retry_on=retry_on)) is expected


def test_a_task_of_an_array_finds_its_index_among_its_arguments():
    assert msgspec.json.decode(arguments_of(claim(7, index_as="n", count=10))) == {"x": 1, "n": 7}
    assert arguments_of(claim(7, count=10)) == b'{"x":1}'
    assert arguments_of(claim(None, index_as="n")) == b'{"x":1}'


def test_an_answer_that_cannot_be_read_is_a_failure_all_the_same():
    assert error_of(b"\xff").type == "Failed"


@pytest.mark.parametrize(
    ("asked_bytes", "leased_bytes", "expected_bytes"),
    [
        pytest.param(2 * GIB, 2 * GIB, 3 * GIB, id="half as much again"),
        pytest.param(3 * GIB, 3 * GIB, 4 * GIB + 512 * MIB, id="a class"),
        pytest.param(GIB, GIB, GIB + 512 * MIB, id="a small one"),
        pytest.param(256 * MIB, 256 * MIB, 512 * MIB, id="rounded up to its class"),
        pytest.param(2 * GIB, 4 * GIB, 6 * GIB, id="of the lease, where the shape has learned"),
    ],
)
def test_who_ran_out_of_memory_gets_half_as_much_again(asked_bytes, leased_bytes, expected_bytes):
    shape = Shape("tenant", "env", asked_bytes, gpus=2, max_tasks_per_slot=1, architectures=("gfx942",), exclusive=True)
    found = room_for(shape, Grant("n", ("d",), leased_bytes))
    assert found is not None
    name, larger = found
    assert larger == msgspec.structs.replace(shape, memory_bytes=expected_bytes)
    assert name == shape_id(larger)


def test_more_than_any_request_may_ask_for_is_not_asked_for():
    assert room_for(Shape("t", "e", MEMORY_BYTES_MAX), Grant("n", ("d",), MEMORY_BYTES_MAX)) is None


class TorchOutOfMemory(RuntimeError):
    __module__ = "torch"
    __qualname__ = "OutOfMemoryError"


TorchOutOfMemory.__name__ = "OutOfMemoryError"


class TorchChild(TorchOutOfMemory):
    pass


class Awkward(RuntimeError):
    def __str__(self):
        raise ValueError


def caused(by: BaseException, error: BaseException | None = None) -> BaseException:
    error = error or ValueError("outer")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "recognised"),
    [
        pytest.param(TorchOutOfMemory("Tried to allocate"), True, id="torch"),
        pytest.param(TorchChild("Tried to allocate"), True, id="a class below it"),
        pytest.param(RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"), True, id="HIP"),
        pytest.param(RuntimeError("CUDA out of memory."), True, id="CUDA"),
        pytest.param(RuntimeError("CUDA error: out of memory\nCompile with"), True, id="an error of the runtime"),
        pytest.param(RuntimeError("HIP error: hipErrorOutOfMemory"), True, id="its name"),
        pytest.param(RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True, id="of the driver"),
        pytest.param(RuntimeError("cudaErrorMemoryAllocation"), True, id="an older name"),
        pytest.param(caused(RuntimeError("HIP out of memory")), True, id="a cause"),
        pytest.param(caused(caused(TorchOutOfMemory("x"))), True, id="a cause of a cause"),
        pytest.param(MemoryError("out of memory"), False, id="the host"),
        pytest.param(RuntimeError("out of memory"), False, id="nobody knows whose"),
        pytest.param(ValueError("CUDA out of memory"), False, id="somebody's words"),
        pytest.param(RuntimeError("the cuda backend is not there"), False, id="another error"),
        pytest.param(caused(MemoryError()), False, id="the host's as a cause"),
        pytest.param(Awkward(), False, id="without a text"),
    ],
)
def test_a_device_without_memory_is_recognised(error, recognised):
    name, *_ = executor_target.failure_of(error, frames_skipped=0)
    assert (name == executor_target.GPU_OUT_OF_MEMORY) is recognised
    assert recognised or name == type(error).__name__


def test_a_circle_of_causes_has_an_end():
    error = ValueError("circle")
    error.__cause__ = error
    assert executor_target.failure_of(error, frames_skipped=0)[0] == "ValueError"


def test_a_failure_names_its_classes_and_not_those_of_its_cause():
    assert executor_target.failure_of(KeyError("x"), 0)[3] == ("KeyError", "LookupError", "Exception", "BaseException")
    assert executor_target.failure_of(SystemExit(1), 0)[3] == ("SystemExit", "BaseException")
    assert executor_target.failure_of(caused(KeyError("x")), 0)[3] == ("ValueError", "Exception", "BaseException")
    of_torch = ("OutOfMemoryError", "RuntimeError", "Exception", "BaseException")
    assert executor_target.failure_of(TorchOutOfMemory("x"), 0)[3] == of_torch


def test_what_torch_keeps_of_a_device_is_given_back(monkeypatch):
    emptied = []
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(empty_cache=lambda: emptied.append(True)))
    monkeypatch.setitem(sys.modules, "torch", torch)
    executor_target.empty_device_cache()
    assert emptied == [True]
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    executor_target.empty_device_cache()


def test_a_result_is_limited_by_where_it_can_lie():
    value = "x" * 198  # 200 bytes
    assert len(executor_target.encode_result(value, 100, 200, filed=True)) == 200
    with pytest.raises(executor_target.ResultTooLarge, match=r"limit is 199 \(tasks.result_bytes_max\): write it to a file"):
        executor_target.encode_result(value, 100, 199, filed=True)
    with pytest.raises(executor_target.ResultTooLarge, match=r"100 \(results.inline_bytes_max\).*results.url is not set"):
        executor_target.encode_result(value, 100, 200, filed=False)


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(executor_target.ResultNotStored, match=r"\(3 bytes of JSON\).*No space left on device"):
        executor_target.write_result(b"[1]", str(tmp_path / "result"))
    assert not list(tmp_path.iterdir())
