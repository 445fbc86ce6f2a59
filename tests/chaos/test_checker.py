"""The checker on histories that were made up: each broken promise is told by its name, and nothing is told of a good run."""

import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.chaos import history
from tests.chaos.checker import Verdict, check
from tests.chaos.history import Call, Due, Fault, Note, Outcome, Row, Run, TaskEnd, Writer
from tests.chaos.plan import AT_ONCE_MAX, GAP_S, plan
from tests.chaos.report import page, table


class Past:
    """A run in which one task was accepted, ran in executor 10 of agent 1, and succeeded."""

    def __init__(self) -> None:
        self.calls = [
            Call(number=1, outcome=Outcome.INVOKE, op="submit", at=0, keys={"k": Due.SUCCEEDED}),
            Call(number=1, outcome=Outcome.OK, op="submit", at=1, keys={"k": Due.SUCCEEDED}, ids=("t",), status=202),
        ]
        self.notes = [note("start", 1, at=2.0), note("end", 1, at=3.0)]
        self.faults: list[Fault] = []
        self.ends = [TaskEnd("1-0", "t", "SUCCEEDED", 1)]
        self.rows = [Row(task="t", state="SUCCEEDED", key="k", attempt=1, result='{"key":"k","attempt":1}')]
        self.recount = ""
        self.died: tuple[str, ...] = ()

    def again(self) -> None:
        """The task ran a second time."""
        self.notes = [note("start", 1, at=2.0), note("start", 2, at=6.0), note("end", 2, at=7.0)]
        self.ends = [TaskEnd("1-0", "t", "SUCCEEDED", 2)]
        self.rows = [Row(task="t", state="SUCCEEDED", key="k", attempt=2, result='{"key":"k","attempt":2}')]

    def check(self, folder: Path) -> Verdict:
        folder.mkdir(exist_ok=True)
        for name, lines in (
            (history.CALLS, self.calls),
            (history.TASKS, self.notes),
            (history.FAULTS, self.faults),
            (history.ENDS, self.ends),
            (history.STORE, self.rows),
        ):
            writer = Writer(folder / name)
            for line in lines:
                writer.write(line)
            writer.close()
        run = Run(seed=1, seconds=60, heal_s=15, began=0, ended=9, program="p", cpus=2, recount=self.recount, died=self.died)
        (folder / history.RUN).write_bytes(msgspec.json.encode(run))
        verdict = check(folder)
        table(verdict)
        page(run, verdict, self.faults)
        return verdict


def note(event: str, attempt: int, at: float, pid: int = 10, agent: int = 1) -> Note:
    return Note(event, "t", attempt, "k", at, pid, agent)


def fault(what: str, whom: str, *pids: int, at: float = 4.0, until: float = 4.0) -> Fault:
    return Fault(number=1, what=what, whom=whom, pids=pids, at=at, until=until)


def test_a_good_run_breaks_nothing(tmp_path: Path) -> None:
    verdict = Past().check(tmp_path)
    assert verdict.problems == {}
    assert (verdict.attempted, verdict.acknowledged, verdict.starts, verdict.reruns) == (1, 1, 1, 0)


def _lost(past: Past) -> None:
    past.rows = []


def _unfinished(past: Past) -> None:
    past.rows = [Row(task="t", state="RUNNING", key="k", attempt=1)]
    past.ends = []


def _ended_twice(past: Past) -> None:
    past.ends.append(TaskEnd("2-0", "t", "SUCCEEDED", 1))


def _accepted_twice(past: Past) -> None:
    past.rows.append(msgspec.structs.replace(past.rows[0], task="u"))
    past.ends.append(TaskEnd("2-0", "u", "SUCCEEDED", 1))
    past.notes += [msgspec.structs.replace(one, task="u") for one in past.notes]


def _replaced_attempt(past: Past) -> None:
    past.again()
    past.faults = [fault("kill", "agent", 1)]
    past.rows = [msgspec.structs.replace(past.rows[0], result='{"key":"k","attempt":1}')]


def _end_not_told(past: Past) -> None:
    past.ends = []


def _left_a_final_state(past: Past) -> None:
    past.calls.append(Call(number=2, outcome=Outcome.OK, op="get", at=4, task="t", status=200, state="FAILED"))


def _cancelled_by_nobody(past: Past) -> None:
    past.rows = [Row(task="t", state="CANCELLED", key="k", attempt=1)]
    past.ends = [TaskEnd("1-0", "t", "CANCELLED", 1)]


def _innocent_failed(past: Past) -> None:
    past.rows = [Row(task="t", state="FAILED", key="k", attempt=1, error="InfrastructureLost")]
    past.ends = [TaskEnd("1-0", "t", "FAILED", 1)]


def _damaged(past: Past) -> None:
    past.rows = [msgspec.structs.replace(past.rows[0], result="", damage="no such file")]


def _after(past: Past, state: str, error: str = "", began: float = 4.0) -> None:
    """A second task, that waits for the first one."""
    past.calls += [
        Call(number=2, outcome=Outcome.INVOKE, op="submit", at=0, keys={"l": Due.SUCCEEDED}),
        Call(number=2, outcome=Outcome.OK, op="submit", at=1, keys={"l": Due.SUCCEEDED}, ids=("u",), status=202),
    ]
    result = '{"key":"l","attempt":1}' if state == "SUCCEEDED" else ""
    past.rows.append(Row(task="u", state=state, key="l", attempt=1, error=error, result=result, after=("t",)))
    past.ends.append(TaskEnd("2-0", "u", state, 1))
    if state == "SUCCEEDED":
        past.notes += [Note("start", "u", 1, "l", began, 10, 1), Note("end", "u", 1, "l", began + 1, 10, 1)]


def _parent_fails(past: Past) -> None:
    past.calls = [msgspec.structs.replace(call, keys={"k": Due.FAILED}) for call in past.calls]
    past.rows = [Row(task="t", state="FAILED", key="k", attempt=1, error="RuntimeError")]
    past.ends = [TaskEnd("1-0", "t", "FAILED", 1)]


def _child_of_a_failed_parent_ran(past: Past) -> None:
    _parent_fails(past)
    _after(past, "SUCCEEDED")


def _child_before_its_parent(past: Past) -> None:
    _after(past, "SUCCEEDED", began=2.5)


def _child_failed_for_nothing(past: Past) -> None:
    _after(past, "FAILED", "DependencyFailed")


def _never_ran(past: Past) -> None:
    past.notes = []


def _submitted_by_nobody(past: Past) -> None:
    past.calls = []


def _does_not_add_up(past: Past) -> None:
    past.recount = "counts: 1, not 2"


def _crashed(past: Past) -> None:
    past.died = ("api ended with exit status 1",)


def _ran_again(past: Past) -> None:
    past.again()


def _fault_elsewhere(past: Past) -> None:
    past.again()
    past.faults = [fault("kill", "agent", 2), fault("kill", "executor", 11), fault("kill", "scheduler", 10, 1)]


def _fault_before_the_start(past: Past) -> None:
    past.again()
    past.faults = [fault("kill", "agent", 1, at=1.0, until=1.0)]


def _fault_after_the_rerun(past: Past) -> None:
    past.again()
    past.faults = [fault("kill", "store", 3, at=6.5, until=6.5)]


@pytest.mark.parametrize(
    ("break_it", "name"),
    [
        (_lost, "lost"),
        (_unfinished, "unfinished"),
        (_ended_twice, "duplicated"),
        (_accepted_twice, "duplicated"),
        (_replaced_attempt, "duplicated"),
        (_end_not_told, "duplicated"),
        (_left_a_final_state, "wrong"),
        (_cancelled_by_nobody, "wrong"),
        (_innocent_failed, "wrong"),
        (_never_ran, "wrong"),
        (_damaged, "wrong"),
        (_child_of_a_failed_parent_ran, "wrong"),
        (_child_before_its_parent, "wrong"),
        (_child_failed_for_nothing, "wrong"),
        (_submitted_by_nobody, "unexpected"),
        (_does_not_add_up, "inconsistent"),
        (_crashed, "died"),
        (_ran_again, "unexplained"),
        (_fault_elsewhere, "unexplained"),
        (_fault_before_the_start, "unexplained"),
        (_fault_after_the_rerun, "unexplained"),
    ],
)
def test_a_broken_promise_is_told_by_its_name(tmp_path: Path, break_it: Callable[[Past], None], name: str) -> None:
    past = Past()
    break_it(past)
    assert list(past.check(tmp_path).problems) == [name]


@pytest.mark.parametrize(
    ("met", "kind"),
    [
        (fault("kill", "agent", 1), "agent-kill"),
        (fault("freeze", "node", 1, 10, at=1.0, until=9.0), "node-freeze"),
        (fault("kill", "executor", 10), "executor-kill"),
        (fault("cut", "agent", 1, at=1.0, until=3.0), "agent-cut"),
        (fault("kill", "store", 99), "store-kill"),
        (fault("power", "machine", 99), "machine-power"),
        (fault("stall", "all", 99), "all-stall"),
    ],
)
def test_a_fault_of_its_own_explains_that_a_task_ran_again(tmp_path: Path, met: Fault, kind: str) -> None:
    past = Past()
    past.again()
    past.faults = [met]
    verdict = past.check(tmp_path)
    assert verdict.problems == {}
    assert verdict.explained == {kind: 1}
    assert verdict.recovery.keys() <= {kind}


@pytest.mark.parametrize(("at", "problems"), [(2.5, []), (5.5, ["wrong"])])
def test_a_result_may_be_lost_to_a_full_disk_and_to_nothing_else(tmp_path: Path, at: float, problems: list[str]) -> None:
    past = Past()
    past.rows = [Row(task="t", state="FAILED", key="k", attempt=1, error="ResultNotStored")]
    past.ends = [TaskEnd("1-0", "t", "FAILED", 1)]
    past.faults = [fault("full", "results", at=at, until=at + 2)]
    assert list(past.check(tmp_path).problems) == problems


def test_a_child_follows_its_parent_into_failure(tmp_path: Path) -> None:
    past = Past()
    _parent_fails(past)
    _after(past, "FAILED", "DependencyFailed")
    assert past.check(tmp_path).problems == {}


def test_the_time_to_recover_is_from_the_fault_to_the_next_start(tmp_path: Path) -> None:
    past = Past()
    past.again()
    past.faults = [fault("kill", "agent", 1, at=4.5, until=4.5), fault("kill", "store", 3, at=3.0, until=3.0)]
    assert past.check(tmp_path).recovery["agent-kill"].max_s == 1.5


def test_a_start_of_one_that_was_replaced_is_explained_by_the_fault_that_it_slept_through(tmp_path: Path) -> None:
    past = Past()
    past.again()
    past.notes = [note("start", 2, at=6.0, pid=20, agent=2), note("end", 2, at=7.0, pid=20, agent=2), note("start", 1, at=8.0)]
    assert list(past.check(tmp_path / "1").problems) == ["unexplained"]
    past.faults = [fault("freeze", "node", 1, 10, at=3.0, until=7.9)]
    verdict = past.check(tmp_path / "2")
    assert verdict.problems == {}
    assert verdict.recovery["node-freeze"].max_s == 3.0


def test_a_failure_that_is_tried_again_needs_no_fault(tmp_path: Path) -> None:
    past = Past()
    past.again()
    past.notes.insert(1, note("raise", 1, at=2.5))
    verdict = past.check(tmp_path)
    assert (verdict.problems, verdict.explained) == ({}, {"own failure": 1})


def test_an_answer_that_did_not_come_is_unknown_and_no_failure(tmp_path: Path) -> None:
    past = Past()
    past.calls[1] = Call(number=1, outcome=Outcome.UNKNOWN, op="submit", at=1, keys={"k": Due.SUCCEEDED})
    verdict = past.check(tmp_path)
    assert verdict.problems == {}
    assert (verdict.acknowledged, verdict.unknown, verdict.recovered, verdict.refused) == (0, 1, 1, 0)


def test_the_same_seed_plans_the_same_faults_within_the_rules() -> None:
    for seed in range(50):
        planned = plan(seed, 300, 30)
        assert planned == plan(seed, 300, 30)
        assert planned != plan(seed + 1, 300, 30)
        assert {one.whom for one in plan(seed, 60, 15)}.isdisjoint({"machine"})
        assert all(one.at_s + one.for_s <= 270.01 for one in planned)
        gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(planned)]
        assert min(gaps) >= GAP_S[0] - 0.01
        for one in planned:
            others = [
                other for other in planned if other.at_s <= one.at_s < other.at_s + other.for_s - 0.01 and other is not one
            ]
            assert len(others) < (1 if one.whom == "machine" else AT_ONCE_MAX)
            assert all(other.whom != "machine" for other in others)
