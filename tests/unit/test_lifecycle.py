"""The tables of a task's and a slot's life: every way leads to an end, and no way leads out of one."""

import pytest

from manager.core.lifecycle import ACTIVE, FINAL, NEXT, SLOT_NEXT, SlotStatus, TaskStatus

S = TaskStatus


def reachable(start, table):
    seen, new = {start}, {start}
    while new:
        new = {following for status in new for following in table[status]} - seen
        seen |= new
    return seen


def test_final_states_are_these_three():
    assert frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED}) == FINAL
    assert set(TaskStatus) == ACTIVE | FINAL
    assert not ACTIVE & FINAL


@pytest.mark.parametrize("status", sorted(FINAL))
def test_nothing_leaves_a_final_state(status):
    assert NEXT[status] == frozenset()


@pytest.mark.parametrize("status", sorted(ACTIVE))
def test_every_active_task_can_end_and_be_cancelled(status):
    assert S.CANCELLED in NEXT[status]
    assert reachable(status, NEXT) >= FINAL


def test_only_a_claim_starts_a_task_and_only_a_run_succeeds():
    assert [status for status in S if S.RUNNING in NEXT[status]] == [S.QUEUED]
    assert [status for status in S if S.SUCCEEDED in NEXT[status]] == [S.RUNNING]


def test_no_task_is_blocked_again_and_no_status_follows_itself():
    assert all(S.BLOCKED not in following for following in NEXT.values())
    assert all(status not in following for status, following in NEXT.items())


def test_a_slot_opens_once():
    assert reachable(SlotStatus.REQUESTED, SLOT_NEXT) == set(SlotStatus)
    assert [status for status in SlotStatus if SlotStatus.OPEN in SLOT_NEXT[status]] == [SlotStatus.REQUESTED]
    assert SLOT_NEXT[SlotStatus.CLOSED] == frozenset()
