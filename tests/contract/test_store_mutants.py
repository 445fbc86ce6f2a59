"""Whether the tests would notice: faults are planted in the library one by one, and each must be caught by name.

A mutant is a text of the library and what replaces it, with the test that must fail. A catch is a failed assertion of
that test, or a `Violation` of the recount; an error of the store or of the test itself is none. Which of them the simulation
sees as well, without being told what to look for, `tests/sim/store_mutants.py` says.
"""

import asyncio
import functools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from _pytest.outcomes import Failed

from manager.core.lifecycle import AfterFailed, Cordon, Outcome, SlotFlag
from manager.core.quantities import GIB
from manager.results.folder import FolderResults
from manager.store.schema import library_source
from tests.contract import test_store_arrays as arrays
from tests.contract import test_store_attempts as attempts
from tests.contract import test_store_leader as leader
from tests.contract import test_store_lifecycle as lifecycle
from tests.contract import test_store_memory as memory
from tests.contract import test_store_quotas as quotas
from tests.contract import test_store_reads as reads
from tests.contract import test_store_results as results
from tests.contract import test_store_slots as slots
from tests.contract import test_store_submission as submissions
from tests.contract import test_store_tasks as tasks
from tests.contract import test_store_time_limits as limits
from tests.contract import test_store_waiting as waiting
from tests.contract.store_harness import (
    FAST,
    PROGRAMS,
    Lab,
    StoreServer,
    check_invariants,
    connected,
    program,
)

Test = Callable[[Lab], Awaitable[None]]
CAUGHT_S = 60.0
"""A fault by which a test never ends is not caught: the test is to say what is wrong."""


def outcome(which: Outcome, asked: bool) -> Test:
    """One row of the table of ends."""
    row = next(row for row in tasks.ENDS if row[:2] == (which, asked))
    return lambda lab: tasks.test_each_outcome_has_its_status(lab, *row)


def old_leader(name: str) -> Test:
    return lambda lab: leader.test_no_write_of_an_old_leader_has_an_effect(lab, name)


def with_files(test: Callable[[Lab, FolderResults], Awaitable[None]]) -> Test:
    """A test that has a results store."""

    @functools.wraps(test)
    async def run(lab: Lab) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = FolderResults(Path(folder))
            files.prepare()
            await test(lab, files)

    return run


left_over = with_files(results.test_what_died_at_any_point_leaves_nothing)
forgotten_files = with_files(results.test_a_sweep_tells_where_the_results_lay_that_it_forgot)
another_store = with_files(results.test_nothing_is_removed_on_the_word_of_another_store)
named_file = with_files(results.test_a_result_in_a_file_is_named_by_its_record_and_stays)


async def full_store(lab: Lab) -> None:
    """What a full store must still take, asked so that a refusal is a failed assertion."""
    from manager.core.errors import StoreFull

    async def fill() -> None:
        await lab.raw("CONFIG", "SET", "maxmemory", 1)

    try:
        await memory.test_a_full_store_refuses_submissions_and_nothing_else(lab, fill)
    except StoreFull as error:
        raise AssertionError("a full store refused an end") from error
    finally:
        await lab.raw("CONFIG", "SET", "maxmemory", 0)


async def full_of_new(lab: Lab) -> None:
    """The same of what tells of attempts, and of what ends many."""
    from manager.core.errors import StoreFull

    try:
        await attempts.test_a_full_store_lets_all_of_that_go_on(lab)
    except StoreFull as error:
        raise AssertionError("a full store refused an end") from error


async def quota_walks(lab: Lab) -> None:
    """Some random histories of a tenant under limits."""
    for seed in range(8):
        await lab.raw("FLUSHALL")
        lab.token = 0
        await quotas.walk_quotas(lab, seed)


def returned(how: str) -> Test:
    return lambda lab: quotas.test_whatever_ends_a_slot_returns_what_it_had_and_wakes_another(lab, how)


def limited(**limits: int) -> Test:
    return lambda lab: quotas.test_a_claim_over_the_quota_waits_and_is_woken_by_the_next_end(lab, limits)


def preempted(through: str) -> Test:
    return lambda lab: quotas.test_pre_emption_counts_against_nothing(lab, SlotFlag.PREEMPT, 0, through)


def unused(how: str) -> Test:
    return lambda lab: quotas.test_a_turn_that_is_not_used_goes_to_the_next(lab, how)


def removed(how: str) -> Test:
    return lambda lab: lifecycle.test_a_node_that_was_removed_may_come_again(lab, how)


def released(how: str) -> Test:
    return lambda lab: lifecycle.test_a_device_is_free_again_when_its_node_has_it_no_longer(lab, how)


def outlives(by: str, after: Cordon) -> Test:
    return lambda lab: lifecycle.test_which_cordons_outlive_a_restart_of_the_agent(lab, by, after)


def repeat(which: Outcome) -> Test:
    return lambda lab: tasks.test_a_repeat_does_not_forget_what_its_first_send_claimed_anew(lab, which)


def taken_name(digest: str) -> Test:
    return lambda lab: submissions.test_a_batch_with_one_name_taken_is_refused_as_a_whole(lab, digest)


def fallen(how: Outcome | str) -> Test:
    return lambda lab: waiting.test_a_parent_that_does_not_succeed_fails_its_children_or_not_as_they_asked(lab, how)


def overdue(which: Outcome) -> Test:
    return lambda lab: limits.test_however_the_last_attempt_ends_it_is_not_tried_again_after_its_time(lab, which)


def started_once(told_by: str, total_timeout_s: float = 0.0) -> Test:
    return lambda lab: limits.test_a_task_that_has_started_once_has_all_the_time_that_is_left(lab, told_by, total_timeout_s)


def too_late(field: str) -> Test:
    return lambda lab: limits.test_nothing_is_claimed_whose_time_is_up(lab, field)


def noted(which: Outcome) -> Test:
    row = next(row for row in attempts.HISTORY if row[0] is which)
    return lambda lab: attempts.test_an_attempt_that_does_not_end_its_task_is_kept(lab, *row)


def took(how: str) -> Test:
    return lambda lab: attempts.test_an_attempt_that_ends_with_its_slot_says_what_took_that(lab, how)


def poison(payload: bytes) -> Test:
    return lambda lab: tasks.test_a_task_that_crashes_its_executor_alone_fails_at_the_third_time(lab, payload)


def believed(who: str) -> Test:
    return lambda lab: attempts.test_what_others_report_of_a_task_is_not_taken(lab, who)


def resumed(which: Outcome) -> Test:
    return lambda lab: attempts.test_the_next_attempt_has_the_checkpoint_and_begins_with_no_progress(lab, which)


PROGRESS = "\n      count = count + 1\n      if args[i + 2]"
"""What follows the guard of a report of progress, which others have as well."""
# name: (text, replacement, test)
MUTANTS: dict[str, tuple[str, str, Test]] = {
    "attempt not checked on finish": (
        "if task.attempt ~= attempt then return '' end",
        "",
        tasks.test_an_end_of_an_attempt_that_was_replaced_is_refused,
    ),
    "slot not checked on finish": (
        "if not task or task.state ~= 'RUNNING' or task.slot ~= slot then",
        "if not task or task.state ~= 'RUNNING' then",
        tasks.test_an_end_from_another_slot_is_refused,
    ),
    "incarnation not checked on next": (
        "if record[1] ~= 'OPEN' or record[2] ~= incarnation then return { 'FENCED', {}, {} } end",
        "if record[1] ~= 'OPEN' then return { 'FENCED', {}, {} } end",
        tasks.test_an_end_from_another_incarnation_is_refused,
    ),
    "token not checked": (
        "return redis.call('HGET', p .. 'leader' .. (role and ':' .. role or ''), 'token') == token",
        "return true",
        old_leader("request"),
    ),
    "token not checked on fence": (
        "if not leads(p, args[1]) then return 'STALE' end\n  local now = now_ms()\n  for i = 3",
        "local now = now_ms()\n  for i = 3",
        old_leader("fence"),
    ),
    "token not checked on drop": (
        "if not leads(p, args[1]) then return { 'STALE' } end\n  local now, dropped",
        "local now, dropped",
        old_leader("drop"),
    ),
    "token not checked on flag": (
        "if not leads(p, args[1]) then return 'STALE' end\n  for i = 3, #args do\n    local key",
        "for i = 3, #args do\n    local key",
        old_leader("flag"),
    ),
    "token not checked on lost": (
        "if not leads(p, args[1]) then return { 'STALE' } end\n  if redis.call('HGET', p .. 'n:'",
        "if redis.call('HGET', p .. 'n:'",
        old_leader("lost"),
    ),
    "token not checked on planned": (
        "if not leads(p, args[1]) then return 'STALE' end\n  redis.call('HSET', p .. 'leader', 'held'",
        "redis.call('HSET', p .. 'leader', 'held'",
        old_leader("planned"),
    ),
    "token not checked on mix": (
        "if not leads(p, args[1]) then return 'STALE' end\n  redis.call('SET', p .. 'mix'",
        "redis.call('SET', p .. 'mix'",
        old_leader("mix"),
    ),
    "token not checked on sweep": (
        "if not leads(p, args[1]) then return { 0, 0, {} } end",
        "",
        old_leader("sweep"),
    ),
    "what files are needed is told to who does not lead": (
        "if not leads(p, args[1]) then return { 'STALE' } end\n  for i = 2, #args do\n    local task",
        "for i = 2, #args do\n    local task",
        another_store,
    ),
    "a success forgets its file": (
        "if file and file ~= '' then values[#values + 1] = 'file'; values[#values + 1] = file end",
        "",
        named_file,
    ),
    "the newest attempt is not told with the files": (
        "reply[#reply + 1] = task[2] or ''",
        "reply[#reply + 1] = '0'",
        left_over,
    ),
    "a sweep does not tell of files": (
        "if task[4] then files[#files + 1] = cjson.decode(task[4]).name end",
        "",
        forgotten_files,
    ),
    "a sweep takes all tenants alike": (
        "local rule = rules[tenant] or { args[4], args[5] }",
        "local rule = { args[4], args[5] }",
        results.test_each_tenant_is_kept_for_as_long_as_is_set_for_it,
    ),
    "what ran out of memory comes back unmarked": (
        "if task.oom == '1' then redis.call('HSET', p .. 'sh:' .. task.shape, 'oom', '1') end",
        "",
        results.test_the_look_says_where_tasks_wait_that_ran_out_of_memory,
    ),
    "a submission overwrites": (
        "  local owner = owner_of_any(p, args, first)\n",
        "  local owner = nil\n",
        tasks.test_a_submission_that_is_sent_again_changes_nothing,
    ),
    "a submission looks at its first id only": (
        "if redis.call('EXISTS', unpack(names)) == 0 then return nil end",
        "if redis.call('EXISTS', names[1]) == 0 then return nil end",
        tasks.test_a_task_that_exists_is_never_written_again,
    ),
    "finish not idempotent": (
        "if not task or task.state ~= 'RUNNING' or task.slot ~= slot then",
        "if not task then",
        tasks.test_an_end_is_committed_once,
    ),
    "a claim does not raise the attempt": (
        "local attempt = tonumber(task[3]) + 1",
        "local attempt = tonumber(task[3])",
        tasks.test_a_claim_raises_the_attempt_and_nothing_lowers_it,
    ),
    "a requeued task starts at attempt 0": (
        "'state', 'QUEUED', 'queued', now, 'slot', ''",
        "'state', 'QUEUED', 'attempt', 0, 'queued', now, 'slot', ''",
        tasks.test_a_claim_raises_the_attempt_and_nothing_lowers_it,
    ),
    "unstarted claims count": (
        "return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', why, now)",
        "return give_back(p, id, task, flag ~= 'preempt', why, now)",
        tasks.test_a_batch_is_claimed_in_one_call_and_what_is_returned_counts_against_nothing,
    ),
    "queue not changed with the record": (
        "  redis.call('ZREM', p .. 'q:' .. task.shape, id)\n",
        "",
        tasks.test_cancelling_what_waits_ends_it_at_once,
    ),
    "queue not filled with the record": (
        "  redis.call('ZADD', p .. 'q:' .. task.shape, task.score, id)\n",
        "",
        outcome(Outcome.LOST, False),
    ),
    "cancelled after it has succeeded": (
        "if outcome == 'S' then return finalise(",
        "if outcome == 'S' and task.cancel == '' then return finalise(",
        tasks.test_cancel_and_success_in_both_orders,
    ),
    "a final task is cancelled": (
        "if not LIVE[task.state] then return task.state end",
        "",
        tasks.test_cancel_and_success_in_both_orders,
    ),
    "retry without a cap": (
        "if outcome == 'N' or failures >= tonumber(task.max_attempts) then",
        "if outcome == 'N' then",
        tasks.test_a_failure_is_tried_again_after_a_while_and_not_beyond_its_limit,
    ),
    "losses without a cap": (
        "if losses >= LOSSES_MAX then",
        "if false then",
        tasks.test_losses_blame_nobody_but_have_a_cap,
    ),
    "quota not given back": (
        "  redis.call('HINCRBY', p .. 'tn:' .. task.tenant, 'active', -1)\n",
        "",
        outcome(Outcome.SUCCEEDED, False),
    ),
    "next refused by a full store": (
        "{ function_name = 'ry_next', callback = next_, flags = { 'allow-oom' } }",
        "{ function_name = 'ry_next', callback = next_ }",
        full_store,
    ),
    "close refused by a full store": (
        "{ function_name = 'ry_close', callback = close, flags = { 'allow-oom' } }",
        "{ function_name = 'ry_close', callback = close }",
        full_store,
    ),
    **{
        f"{function} refused by a full store": (
            f"function_name = 'ry_{function}', callback = {function}, flags = {{ 'allow-oom' }}",
            f"function_name = 'ry_{function}', callback = {function}",
            full_of_new,
        )
        for function in ("progress", "cancel", "due", "expand", "cancel_array", "refuse", "sweep")
    },
    "submission taken by a full store": (
        "redis.register_function('ry_submit', submit)",
        "redis.register_function { function_name = 'ry_submit', callback = submit, flags = { 'allow-oom' } }",
        full_store,
    ),
    "not marked idle with the empty claim": (
        "    redis.call(allowed > 0 and 'SADD' or 'SREM', p .. 'idle:' .. shape, slot)\n",
        "",
        tasks.test_no_wake_up_is_lost_between_an_empty_queue_and_the_idle_mark,
    ),
    "a slot that closes wakes nobody": (
        "  if redis.call('ZCARD', p .. 'q:' .. shape) > 0 then work_arrived(p, shape, math.max(returned, 1)) end\n",
        "",
        tasks.test_a_slot_that_closes_with_work_queued_wakes_another,
    ),
    "a closed slot keeps its claims": (
        "    if task and task.state == 'RUNNING' and task.slot == slot then\n      -- The leader",
        "    if false then\n      -- The leader",
        slots.test_closing_gives_back_all_claims,
    ),
    "an id opens again": (
        "if record[1] ~= 'REQUESTED' then return { 'REFUSED' } end",
        "",
        slots.test_a_closed_slot_is_refused_for_ever,
    ),
    "a fenced incarnation goes on": (
        "record[1] == incarnation and record[2] ~= incarnation and record[3] ~= '1'",
        "record[1] == incarnation and record[3] ~= '1'",
        slots.test_a_lost_incarnation_can_do_nothing_any_more,
    ),
    "a node that left opens slots": (
        "record[1] == incarnation and record[2] ~= incarnation and record[3] ~= '1'",
        "record[1] == incarnation and record[2] ~= incarnation",
        slots.test_a_node_that_leaves_gives_all_back_and_opens_nothing_more,
    ),
    "a replaced incarnation registers": (
        "  if record[1] ~= incarnation and string.find(past, incarnation .. ' ', 1, true) then return { 'FENCED' } end\n",
        "",
        slots.test_a_late_registration_of_a_replaced_incarnation_ends_nothing,
    ),
    "a new incarnation ends nothing": (
        "    close_all_of(p, node, 'AgentRestarted', now)\n",
        "",
        slots.test_a_new_incarnation_ends_all_that_the_node_held,
    ),
    "a repeat forgets a claim": (
        "  if task.attempt ~= attempt then return '' end\n  redis.call('SREM', p .. 'run:' .. slot, id)\n",
        "  redis.call('SREM', p .. 'run:' .. slot, id)\n  if task.attempt ~= attempt then return '' end\n",
        repeat(Outcome.RETURNED),
    ),
    "a repeat is served": (
        "if status ~= '' and args[i + 5] ~= ''",
        "if args[i + 5] ~= ''",
        tasks.test_a_repeat_is_served_and_learned_from_once,
    ),
    "what comes back wakes nobody": (
        "    if left > 0 then work_arrived(p, shape, left) end\n",
        "",
        tasks.test_what_a_slot_gives_back_and_does_not_take_again_wakes_another,
    ),
    "lost claims are not told again": (
        "  if #lost > 0 then return reply('WORK', lost, 'again') end\n",
        "",
        tasks.test_claims_whose_answer_was_lost_are_told_again,
    ),
    "an old error stays with a success": (
        "'started', task.started, 'error', err }",
        "'started', task.started }",
        tasks.test_a_success_leaves_no_error_of_an_earlier_attempt,
    ),
    "an opened slot is dropped": (
        "if record[1] == 'REQUESTED' then close_slot",
        "if record[1] ~= 'CLOSED' then close_slot",
        leader.test_only_slots_that_nobody_opened_are_dropped,
    ),
    "a sweep takes what is not final": (
        "if task[1] and not LIVE[task[1]] then",
        "if task[1] then",
        leader.test_a_sweep_never_takes_a_task_that_is_not_final,
    ),
    "a term is taken from one that beats": (
        "current.token == token and (current.beat == seen or current.holder == '')",
        "current.token == token",
        leader.test_a_term_is_taken_only_from_what_was_seen,
    ),
    "a sent-again take is not told": (
        "    word = 'OK' -- taken by the first send of this call\n",
        "",
        leader.test_a_take_that_is_sent_again_is_told_that_it_worked,
    ),
    "a cordoned node opens slots": (
        "  if is_cordoned(p, node) then\n    close_slot(p, slot, 'Cordoned', now_ms())\n    return { 'REFUSED' }\n  end\n",
        "",
        lifecycle.test_a_cordoned_node_opens_nothing_new_and_what_is_open_goes_on,
    ),
    "a cordoned node opens direct slots": (
        "  if is_cordoned(p, node) then return 'CORDONED' end\n",
        "",
        lifecycle.test_a_cordoned_node_opens_nothing_new_and_what_is_open_goes_on,
    ),
    "a slot refused by a cordon stays asked for": (
        "    close_slot(p, slot, 'Cordoned', now_ms())\n",
        "",
        lifecycle.test_work_that_waits_for_a_slot_refused_by_a_cordon_asks_for_another,
    ),
    "a slot that leases less than its shape has learned opens": (
        "    close_slot(p, slot, 'TooSmall', now)\n    return { 'REFUSED' }\n",
        "",
        slots.test_what_one_slot_needed_all_later_ones_of_its_shape_lease,
    ),
    "slots that lease less than their shape has learned go on": (
        "            redis.call('HSET', p .. 's:' .. slot, 'flag', 'drain')\n",
        "",
        slots.test_a_task_that_is_tried_again_goes_to_a_slot_with_the_larger_lease,
    ),
    "what was learned shrinks": (
        "math.max(known, learned)",
        "learned",
        slots.test_what_one_slot_needed_all_later_ones_of_its_shape_lease,
    ),
    "what was learned is never forgotten": (
        "now - tonumber(said[2]) > LEARNED_MS",
        "false",
        slots.test_what_was_learned_is_forgotten_after_a_day_and_when_it_is_unloaded,
    ),
    "a shape learns from slots of others": (
        "record[1] == 'OPEN' and record[2] == args[1] and record[4] ~= 'direct'",
        "record[1] == 'OPEN'",
        slots.test_nothing_is_learned_from_slots_of_others_and_of_nobody,
    ),
    "an operator's cordon is overwritten": (
        "  if by ~= 'operator' and cordoned and record[4] ~= by then return 'KEPT' end\n",
        "",
        lifecycle.test_an_operators_cordon_is_touched_by_operators_only,
    ),
    "an autoscaler's token is not checked": (
        "  if by == 'autoscaler' and not leads(p, args[6], 'autoscaler') then return 'STALE' end\n",
        "",
        lifecycle.test_an_autoscaler_that_does_not_lead_cordons_nothing,
    ),
    "a controller's token is an autoscaler's": (
        "leads(p, args[6], 'autoscaler')",
        "leads(p, args[6])",
        lifecycle.test_an_autoscaler_that_does_not_lead_cordons_nothing,
    ),
    "an agent's incarnation is not checked": (
        "  if by == 'agent' and not node_holds(p, node, args[6]) then return 'STALE' end\n",
        "",
        lifecycle.test_an_agent_that_was_replaced_cordons_nothing,
    ),
    "an operator's cordon ends with the agent": (
        "if record[4] ~= 'operator' or removed then uncordon(key) end",
        "uncordon(key)",
        outlives("operator", Cordon.DRAIN),
    ),
    "an autoscaler's cordon outlives the agent": (
        "if record[4] ~= 'operator' or removed then uncordon(key) end",
        "if removed then uncordon(key) end",
        outlives("autoscaler", Cordon.NONE),
    ),
    "a removal takes place again": (
        "if record[4] ~= 'operator' or removed then uncordon(key) end",
        "if record[4] ~= 'operator' then uncordon(key) end",
        removed("left"),
    ),
    "a node leaves with open slots": (
        "if state[2] == '1' and redis.call('SCARD', p .. 'ns:' .. node) == 0 then",
        "if state[2] == '1' then",
        lifecycle.test_a_removed_node_leaves_when_its_last_slot_has_ended,
    ),
    "a device in two ledgers": (
        "      if incarnation and node_holds(p, owner, incarnation) then\n",
        "      if false then\n",
        lifecycle.test_one_device_is_in_the_inventory_of_one_living_node,
    ),
    "a device of a node that left is held": (
        "      if incarnation and node_holds(p, owner, incarnation) then\n",
        "      if incarnation then\n",
        released("lost"),
    ),
    "a device that a node has no longer is held": (
        "  release_devices(p, node)\n  for i",
        "  for i",
        released("changed"),
    ),
    "a direct slot opens again": (
        "  if record[1] then return 'REFUSED' end\n",
        "",
        lifecycle.test_a_direct_slot_opens_once_and_claims_nothing,
    ),
    "unloading makes shapes": (
        "    if redis.call('SISMEMBER', p .. 'active', shape) == 1 then\n",
        "    if true then\n",
        lifecycle.test_unloading_marks_the_shape_and_keeps_none_warm,
    ),
    "warm for ever": (
        "local warm = (tonumber(said[4] or '0') or 0) > now and tonumber(said[3]) or 0",
        "local warm = tonumber(said[3] or '0') or 0",
        lifecycle.test_a_warm_shape_is_known_without_work_until_its_time_is_over,
    ),
    "anybody writes the journal": (
        "  if not leads(p, args[1], 'autoscaler') then return 'STALE' end\n",
        "",
        lifecycle.test_only_the_leading_autoscaler_writes_the_journal,
    ),
    "an address outlives its agent": (
        "    redis.call('HDEL', p .. 'hb:' .. node, 'address') -- until a Dask worker of this incarnation reports\n",
        "",
        lifecycle.test_a_new_incarnation_has_no_dask_worker_until_one_reports,
    ),
    "a quota of tasks is not looked at": (
        "within(quota.running_max, quota.running + 1) and within(quota.gpus_max, quota.gpus + size.gpus)",
        "within(quota.gpus_max, quota.gpus + size.gpus)",
        limited(running_max=2),
    ),
    "a quota of devices is not looked at": (
        "within(quota.running_max, quota.running + 1) and within(quota.gpus_max, quota.gpus + size.gpus)",
        "within(quota.running_max, quota.running + 1)",
        limited(gpus_max=2),
    ),
    "a quota of memory is not looked at": (
        "\n    and within(quota.memory_max, quota.memory + size.memory)\n",
        "\n",
        limited(memory_bytes_max=2 * GIB),
    ),
    "work is not counted": (
        "    if working and not record[9] then count_work(p, tenant, slot, size_of(p, slot, shape), now) end\n",
        "",
        limited(gpus_max=2),
    ),
    "work is not returned at an end": (
        "    if record[9] and not working then count_work(p, tenant, slot, nil, now) end\n",
        "",
        limited(gpus_max=2),
    ),
    "tasks are not returned at an end": (
        "'running', taken - ended)",
        "'running', taken)",
        limited(running_max=2),
    ),
    "work is not returned with its slot": (
        "    if record[6] then count_work(p, record[5], slot, nil, now) end\n",
        "",
        returned("lost"),
    ),
    "tasks are not returned with their slot": (
        "    redis.call('HINCRBY', p .. 'tn:' .. record[5], 'running', 0 - returned)\n",
        "",
        returned("restart"),
    ),
    "an end gives nobody a turn": (
        "    if taken < ended or (n > 0 and not working) then give_turns(p, tenant) end\n",
        "",
        limited(running_max=2),
    ),
    "a turn that is not used is lost": (
        "if taken < ended or (n > 0 and not working) then give_turns(p, tenant) end",
        "if taken < ended then give_turns(p, tenant) end",
        unused("finds nothing"),
    ),
    "the end of a slot gives nobody a turn": (
        "    give_turns(p, record[5])\n",
        "",
        unused("is closed"),
    ),
    "a higher limit gives nobody a turn": (
        "    give_turns(p, args[i])\n",
        "",
        quotas.test_a_higher_quota_wakes_who_waits_and_a_lower_one_ends_nothing,
    ),
    "a slot that the quota refused is forgotten": (
        "  redis.call('ZADD', key, 'LT', string.format('%.0f', rank * TURN_STEP + now), slot)\n",
        "",
        quotas.test_a_slot_gives_way_at_a_task_boundary_once_its_turn_is_over,
    ),
    "smaller ones pass the first in line": (
        "within(quota.memory_max, size.memory) then\n        return\n",
        "within(quota.memory_max, size.memory) then\n",
        quotas.test_the_first_in_line_is_not_passed_by_smaller_ones,
    ),
    "what never fits stands in the way": (
        "        redis.call('ZADD', key, NO_TURN * TURN_STEP + tonumber(waiting[i + 1]) % TURN_STEP, slot)\n",
        "",
        quotas.test_what_the_quota_never_allows_is_passed_at_once,
    ),
    "a turn never ends": (
        "now - work.since >= TURN_MS",
        "false",
        quotas.test_a_slot_gives_way_at_a_task_boundary_once_its_turn_is_over,
    ),
    "turns do not go by priority": (
        "rank * TURN_STEP + now",
        "7 * TURN_STEP + now",
        quotas.test_turns_go_by_priority_and_then_by_how_long_a_slot_has_waited,
    ),
    "a slot whose queue ran dry is forgotten": (
        "      redis.call('SADD', p .. 'idle:' .. record[3], slot)\n    else",
        "    else",
        quotas.test_a_slot_whose_queue_ran_dry_while_it_waited_hears_of_new_work,
    ),
    "pre-emption is a loss": (
        "give_back(p, id, task, record[7] ~= 'preempt', record",
        "give_back(p, id, task, true, record",
        preempted("the slot's end"),
    ),
    "an end by pre-emption is a loss": (
        "outcome ~= 'R' and flag ~= 'preempt'",
        "outcome ~= 'R'",
        preempted("an end"),
    ),
    "token not checked on shares": (
        "if not leads(p, args[1]) then return 'STALE' end\n  local first",
        "local first",
        old_leader("share"),
    ),
    "token not checked on ageing": (
        "if not leads(p, args[1]) then return -1 end\n  local now, risen",
        "local now, risen",
        old_leader("age"),
    ),
    "token not checked on refusal": (
        "if not leads(p, args[1]) then return -1 end\n  local now, most",
        "local now, most",
        attempts.test_what_nothing_can_hold_fails_with_what_it_said,
    ),
    "queue not changed with the age": (
        "        redis.call('ZADD', queue, score, id)\n",
        "",
        quotas.test_what_has_waited_for_long_rises_by_one_priority_at_a_time,
    ),
    "what has risen rises at once again": (
        "'score', score, 'rose', now)",
        "'score', score)",
        quotas.test_what_has_waited_for_long_rises_by_one_priority_at_a_time,
    ),
    # --- submission ---
    "idempotency ignores the body": (
        "  if body ~= digest then return { 'CONFLICT', 'key' } end\n",
        "",
        submissions.test_a_key_with_another_body_is_a_conflict,
    ),
    "a key is not kept": (
        "    redis.call('HSET', p .. 'ik:' .. tenant, key, now",
        "    redis.call('HSET', p .. 'ik:' .. tenant, key .. '-', now",
        submissions.test_of_50_clients_with_one_key_one_makes_the_task,
    ),
    "a key is every tenant's": (
        "local said = key ~= '' and redis.call('HGET', p .. 'ik:' .. tenant, key)",
        "local said = key ~= '' and redis.call('HGET', p .. 'ik:red', key)",
        submissions.test_a_key_is_its_tenants,
    ),
    "a key holds for ever": (
        "  if now - tonumber(created) > KEPT_MS then return nil end\n",
        "",
        submissions.test_a_key_holds_for_a_day,
    ),
    "keys become more and more": (
        "    forget_keys(p, now - KEPT_MS, 2) -- two go for each that comes: they never become more, whatever the pace\n",
        "",
        submissions.test_old_keys_go_with_new_ones_and_with_sweeps,
    ),
    "a sweep forgets no keys": (
        "  forget_keys(p, now_ms() - KEPT_MS, limit)\n",
        "",
        submissions.test_old_keys_go_with_new_ones_and_with_sweeps,
    ),
    "a key of a call whose tasks are forgotten makes them again": (
        "  if known then return known end\n  local tasks, count",
        "  if known and known[3] ~= '' then return known end\n  local tasks, count",
        submissions.test_the_first_send_of_a_call_is_no_earlier_submission,
    ),
    "a name is not checked": (
        "local said = name and redis.call('HGET', p .. 'nm:' .. tenant, name)",
        "local said = false",
        submissions.test_of_parallel_submissions_of_a_name_one_gets_it,
    ),
    "a name ignores the body": (
        "      if digest == task.more.digest then ids",
        "      if true then ids",
        submissions.test_a_name_asked_for_again_is_the_same_task,
    ),
    "a key that came with a known name is not kept": (
        "    if same then keep_key(p, tenant, key, digest, same, now) end",
        "   ",
        submissions.test_a_key_that_came_with_a_name_that_was_known_holds_beyond_the_name,
    ),
    "what is known is asked without the key": (
        "  return known_by_key(p, tenant, args[2], args[3], now_ms()) or known_by_names",
        "  return known_by_names",
        submissions.test_what_a_key_stands_for_is_told_without_a_submission,
    ),
    "what is known is asked without the names": (
        " or known_by_names(p, tenant, tasks) or { 'NONE' }",
        " or { 'NONE' }",
        submissions.test_whose_names_are_is_told_without_a_submission,
    ),
    "a batch takes what names are left": (
        "  if #ids < #tasks then return { 'CONFLICT', 'name', taken } end\n",
        "  if #ids < #tasks then return nil end\n",
        taken_name("1"),
    ),
    "a batch gives a name twice": (
        "    if name and here[name] then return { 'CONFLICT', 'name', name } end\n",
        "",
        submissions.test_a_batch_gives_a_name_once,
    ),
    "the name of a forgotten task is not freed": (
        "        if task[2] then redis.call('HDEL', p .. 'nm:' .. tenant, task[2]) end -- it may be given again\n",
        "",
        submissions.test_a_name_is_free_again_once_its_task_is_forgotten,
    ),
    "the name of a forgotten array is not freed": (
        "  if name then redis.call('HDEL', p .. 'nm:' .. tenant, name) end\n",
        "",
        submissions.test_an_array_has_a_name_like_a_task,
    ),
    "anybody's task is a parent": (
        "      if not here[parent] and redis.call('HGET', p .. 't:' .. parent, 'tenant') ~= tenant\n",
        "      if not here[parent] and not redis.call('HGET', p .. 't:' .. parent, 'tenant')\n",
        submissions.test_what_comes_after_nothing_that_is_known_is_refused,
    ),
    "a parent may stand behind": (
        "  local here = {}\n",
        "  local here = {}\n  for _, any in ipairs(tasks) do here[any.id] = true end\n",
        submissions.test_what_comes_after_nothing_that_is_known_is_refused,
    ),
    "an array takes the quota of one task": (
        "    count = count + (more.count or 1)\n",
        "    count = count + 1\n",
        submissions.test_an_array_takes_the_quota_of_all_its_tasks_at_once,
    ),
    "an array is written again": (
        "    if args[i + 6] ~= '' then names[#names + 1] = p .. 'a:' .. args[i] end\n",
        "",
        arrays.test_an_array_that_is_sent_again_changes_nothing,
    ),
    # --- waiting ---
    "a parent tells nobody": (
        "  if redis.call('EXISTS', p .. 'ch:' .. id) == 1 then\n",
        "  if false then\n",
        waiting.test_a_task_waits_until_all_that_it_comes_after_have_ended,
    ),
    "a parent tells twice": (
        "    local child = redis.call('SPOP', p .. 'ch:' .. parent)\n",
        "    local child = redis.call('SRANDMEMBER', p .. 'ch:' .. parent)\n",
        waiting.test_a_parent_tells_once,
    ),
    "what it waits for is not counted down": (
        "redis.call('HINCRBY', p .. 't:' .. child, 'waits', -1) <= 0",
        "tonumber(redis.call('HGET', p .. 't:' .. child, 'waits')) <= 0",
        waiting.test_a_task_waits_until_all_that_it_comes_after_have_ended,
    ),
    "it waits for one of many": (
        "redis.call('HINCRBY', p .. 't:' .. child, 'waits', -1) <= 0",
        "true",
        waiting.test_a_task_waits_until_all_that_it_comes_after_have_ended,
    ),
    "a parent named twice is waited for twice": (
        "if not state and redis.call('SADD', p .. 'ch:' .. parent, id) == 1 then waits = waits + 1 end",
        "if not state then redis.call('SADD', p .. 'ch:' .. parent, id); waits = waits + 1 end",
        waiting.test_a_task_waits_until_all_that_it_comes_after_have_ended,
    ),
    "a failed parent is ignored": (
        "        if state ~= 'SUCCEEDED' and task.run ~= '1' then\n",
        "        if false then\n",
        fallen(Outcome.FAILED),
    ),
    "a parent that had failed is ignored": (
        "    if state and state ~= 'SUCCEEDED' and not more.run then return 'FAILED', parent_error(parent, state) end\n",
        "",
        waiting.test_what_comes_after_what_has_ended_runs_at_once,
    ),
    "a failed parent fails those that were to run": (
        "        if state ~= 'SUCCEEDED' and task.run ~= '1' then\n",
        "        if state ~= 'SUCCEEDED' then\n",
        fallen("cancel"),
    ),
    "a child that has ended is told": (
        "      if task and task.state == 'BLOCKED' then\n",
        "      if task then\n",
        waiting.test_a_child_that_has_ended_before_is_left_alone,
    ),
    "a child that may run wakes nobody": (
        "          enqueue(p, child, task, now)\n          work_arrived(p, task.shape, 1)\n",
        "          enqueue(p, child, task, now)\n",
        waiting.test_a_child_that_may_run_wakes_an_idle_slot,
    ),
    "a chain ends in one call": (
        "  while told < most do\n",
        "  while true do\n",
        waiting.test_many_that_wait_for_one_are_told_in_bounded_calls,
    ),
    "a rest of children is told to nobody": (
        "  if told == most then redis.call('PUBLISH', p .. 'ctl', 'plan') end -- the controller does the rest\n",
        "",
        lambda lab: waiting.test_a_chain_of_2000_ends_in_bounded_calls(lab, AfterFailed.FAIL),
    ),
    "a parent is forgotten before it has told": (
        "  if redis.call('EXISTS', p .. 'ch:' .. id) == 1 then return true end\n",
        "",
        waiting.test_a_parent_is_not_forgotten_before_its_children_are_told,
    ),
    "an array is forgotten before it has told": (
        "  return array and redis.call('EXISTS', p .. 'ch:' .. array) == 1 and redis.call('HGET'",
        "  return array and false and redis.call('HGET'",
        waiting.test_an_array_is_not_forgotten_before_its_children_are_told,
    ),
    "an array tells with its first end": (
        "  if redis.call('HINCRBY', key, 'left', -1) == 0 and redis.call",
        "  if redis.call('HINCRBY', key, 'left', -1) >= 0 and redis.call",
        waiting.test_a_task_comes_after_an_array,
    ),
    "an array of which one failed has succeeded": (
        "  if tonumber(array[2] or '0') > 0 then return 'FAILED' end\n",
        "",
        waiting.test_what_comes_after_two_arrays_of_which_one_failed_fails,
    ),
    # --- time ---
    "expiry fails a running task at once": (
        "          if task.cancel == '' then end_early(p, id, task, DEADLINE, now) end\n",
        "          finalise(p, id, task, 'FAILED', '', deadline_error('it'), now)\n",
        limits.test_a_running_task_is_told_and_then_fails,
    ),
    "expiry takes a user's cancellation away": (
        "          if task.cancel == '' then end_early(p, id, task, DEADLINE, now) end\n",
        "          end_early(p, id, task, DEADLINE, now)\n",
        lambda lab: limits.test_a_users_cancellation_wins_over_time(lab, "user"),
    ),
    "what ended for its time is cancelled": (
        "  if task.cancel == DEADLINE then\n",
        "  if false then\n",
        limits.test_a_running_task_is_told_and_then_fails,
    ),
    "what was to end is tried again": (
        "  if task.cancel ~= '' then return end_as_asked(p, id, task, now) end\n  if outcome",
        "  if outcome",
        overdue(Outcome.FAILED),
    ),
    "what was to end is given back": (
        "  if task.cancel ~= '' then return end_as_asked(p, id, task, now) end\n  if counted",
        "  if counted",
        limits.test_a_task_that_was_to_end_fails_with_its_slot,
    ),
    "start_by is not cleared by a start": (
        "        if task[5] then in_time(p, args[i], task[6]) end\n",
        "",
        started_once("started"),
    ),
    "start_by is not cleared by an end": (
        "    if task.start_by ~= '' then in_time(p, id, task.end_by ~= '') end\n",
        "",
        started_once("end"),
    ),
    "an end is watched no more after a start": (
        "  if not has_end then redis.call('ZREM', p .. 'exp', id) end\n",
        "  redis.call('ZREM', p .. 'exp', id)\n",
        started_once("end", 3600.0),
    ),
    "a start that is late on its way fails the task": (
        "elseif start_by and start_by <= now and task.state ~= 'RUNNING' then",
        "elseif start_by and start_by <= now then",
        limits.test_whether_a_claimed_task_has_started_is_waited_for,
    ),
    "whether a claimed task has started is asked once": (
        "        redis.call('ZADD', p .. 'exp', string.format('%.0f', math.min(now + SECOND, end_by or math.huge)), id)\n",
        "",
        limits.test_whether_a_claimed_task_has_started_is_waited_for,
    ),
    "only the start is watched": (
        "math.min(start_by or end_by, end_by or start_by)",
        "(end_by or start_by)",
        limits.test_when_time_is_up_is_counted_from_the_submission,
    ),
    "the later of two ends counts": (
        "math.min(more.end_by or more.deadline_ms, more.deadline_ms)",
        "math.max(more.end_by or 0, more.deadline_ms)",
        lambda lab: limits.test_of_a_deadline_and_a_total_timeout_the_earlier_one_counts(lab, 30, 60.0),
    ),
    "what is too late is claimed": (
        "elseif task[1] == 'QUEUED' and not too_late(p, id, task[9], task[10], now) then",
        "elseif task[1] == 'QUEUED' then",
        too_late("end_by"),
    ),
    "a claim stops at what is too late": (
        "  until enough or taken == n or #popped < 2 * wanted or looked >= LATE_MAX\n",
        "  until true\n",
        too_late("start_by"),
    ),
    "what has ended is watched": (
        "  if task.start_by ~= '' or task.end_by ~= '' then redis.call('ZREM', p .. 'exp', id) end\n",
        "",
        limits.test_success_before_the_end_wins,
    ),
    # --- arrays ---
    "an array does not count its ends": (
        "  redis.call('HINCRBY', key, ENDED_AS[state], 1)\n",
        "",
        arrays.test_an_array_counts_how_its_tasks_have_ended,
    ),
    "an array does not count what is left": (
        "  if redis.call('HINCRBY', key, 'left', -1) == 0 and redis.call",
        "  if redis.call('HINCRBY', key, 'left', 0) == 0 and redis.call",
        arrays.test_an_array_counts_how_its_tasks_have_ended,
    ),
    "an array is made in one step": (
        "  local last = math.min(count, made + most)\n",
        "  local last = count\n",
        arrays.test_a_large_array_is_made_in_bounded_steps_by_whoever_comes,
    ),
    "many arrays are made in one step": (
        "      if room > 0 then room = room - expand_array(p, task.id, room, now) end\n",
        "      expand_array(p, task.id, room, now)\n",
        arrays.test_many_arrays_in_one_call_make_no_more_than_one,
    ),
    "what was made is not remembered": (
        "  redis.call('HSET', key, 'made', last)\n",
        "",
        arrays.test_what_a_dying_process_has_not_made_the_controller_makes,
    ),
    "what an array has to come is forgotten": (
        "  redis.call('SADD', p .. 'ao', task.id)\n",
        "",
        arrays.test_what_a_dying_process_has_not_made_the_controller_makes,
    ),
    "indexes begin with one": (
        "  local number, digits = index + 1, ''\n",
        "  local number, digits = index + 2, ''\n",
        arrays.test_an_array_is_accepted_with_one_record_per_task,
    ),
    "a claim names no index": (
        "cjson.encode({ index = tonumber(said[6] or ''), checkpoint",
        "cjson.encode({ checkpoint",
        arrays.test_a_claim_of_a_task_of_an_array_names_its_index,
    ),
    "only what is made of an array is cancelled": (
        "  if made < last then last = math.min(last, made + expand_array(p, array, math.min(last - made, most), now)) end\n",
        "  last = math.min(last, made)\n",
        arrays.test_an_array_is_cancelled_while_it_is_being_made,
    ),
    "anybody cancels an array": (
        "  if not said[1] or (args[2] ~= '' and said[1] ~= args[2]) then return nil end\n  local now, ended",
        "  if not said[1] then return nil end\n  local now, ended",
        arrays.test_cancelling_an_array_ends_each_of_its_tasks,
    ),
    "an array goes with the first of its tasks": (
        "  if redis.call('HINCRBY', key, 'kept', -1) > 0 then return end\n",
        "  redis.call('HINCRBY', key, 'kept', -1)\n",
        arrays.test_an_array_goes_with_the_last_of_its_tasks,
    ),
    "all tenants keep alike": (
        "    local rule = rules[tenant] or { args[4], args[5] }\n",
        "    local rule = { args[4], args[5] }\n",
        arrays.test_each_tenant_keeps_as_many_as_it_may,
    ),
    # --- attempts ---
    "an attempt is not noted": (
        "  note_try(p, id, task, why, '', now)\n  return enqueue",
        "  return enqueue",
        noted(Outcome.LOST),
    ),
    "a failed attempt is not noted": (
        "    note_failure(p, id, task, payload, now)\n    redis.call('HSET', key, 'state', 'RETRY_WAIT'",
        "    redis.call('HSET', key, 'state', 'RETRY_WAIT'",
        noted(Outcome.FAILED),
    ),
    "the last attempt is noted as well": (
        "  if counted then\n    local losses",
        "  note_try(p, id, task, why, '', now)\n  if counted then\n    local losses",
        attempts.test_the_last_attempt_is_the_record_whatever_ended_it,
    ),
    "a history is unbounded": (
        "  if attempt > TRIES_MAX then redis.call('HDEL', key, 'try:' .. (attempt - TRIES_MAX)) end\n",
        "",
        attempts.test_a_record_tells_of_its_newest_attempts_only,
    ),
    "a message is cut within a character": (
        "  return (string.gsub(string.sub(text, 1, bytes), '[\\192-\\255][\\128-\\191]*$', ''))\n",
        "  return string.sub(text, 1, bytes - 1)\n",
        lambda lab: attempts.test_a_long_message_of_an_attempt_is_cut_between_characters(lab, "é" * 600),
    ),
    "what is not worth it is tried again": (
        "if outcome == 'N' or failures >= tonumber(task.max_attempts) then",
        "if failures >= tonumber(task.max_attempts) then",
        attempts.test_what_is_not_worth_another_attempt_is_not_tried_again,
    ),
    "crash blamed on infrastructure loss": (
        "  return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', why, now)\n",
        (
            "  if outcome == 'L' then redis.call('HINCRBY', key, 'crashes', 1) end\n"
            "  return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', why, now)\n"
        ),
        outcome(Outcome.LOST, False),
    ),
    "a lost slot is its task's crash": (
        "    local losses = redis.call('HINCRBY', p .. 't:' .. id, 'losses', 1)\n",
        "    local losses = redis.call('HINCRBY', p .. 't:' .. id, 'crashes', 1)\n",
        took("lost"),
    ),
    "crashes without a cap": (
        "    if crashes >= CRASHES_MAX then",
        "    if false then",
        poison(b""),
    ),
    "a budget of retries is not counted": (
        "  redis.call('HSET', key, 'retry_dry', string.format('%.0f', dry))\n",
        "",
        attempts.test_a_budget_of_retries_is_its_tenants_and_fills_up_again,
    ),
    "a budget of retries never fills up again": (
        "math.max(tonumber(said[2] or '0'), now) + MINUTE_MS / most",
        "(said[2] and tonumber(said[2]) + 1e6 or now) + MINUTE_MS / most",
        attempts.test_a_budget_of_retries_is_its_tenants_and_fills_up_again,
    ),
    "a cancelled retry has used the budget": (
        "  if redis.call('ZREM', p .. 'due', id) == 1 then spare_retry(p, task.tenant, now) end\n",
        "  redis.call('ZREM', p .. 'due', id)\n",
        attempts.test_retries_that_are_cancelled_leave_the_budget_to_others,
    ),
    "a budget of retries hurries": (
        "  return math.max(pause, math.floor(dry - now - MINUTE_MS))\n",
        "  return math.max(0, math.floor(dry - now - MINUTE_MS))\n",
        attempts.test_a_retry_that_waits_for_longer_by_itself_is_not_hurried,
    ),
    "more room again and again": (
        "  if outcome == 'O' and task.oom ~= '1' and extra ~= '' then\n",
        "  if outcome == 'O' and extra ~= '' then\n",
        attempts.test_a_task_that_ran_out_of_memory_is_tried_once_where_there_is_more,
    ),
    "more room wakes nobody": (
        "  work_arrived(p, task.shape, 1)\n  return 'QUEUED', true\n",
        "  return 'QUEUED', true\n",
        attempts.test_a_task_that_ran_out_of_memory_is_tried_once_where_there_is_more,
    ),
    "who asked for as much is refused as well": (
        "    local task = redis.call('HGET', p .. 't:' .. id, 'oom') == '1' and load_task(p, id)\n",
        "    local task = load_task(p, id)\n",
        attempts.test_what_nothing_can_hold_fails_with_what_it_said,
    ),
    "progress of an old attempt is taken": (
        f"task[1] == 'RUNNING' and task[2] == slot and task[3] == args[i + 1] then{PROGRESS}",
        f"task[1] == 'RUNNING' and task[2] == slot then{PROGRESS}",
        believed("an old attempt"),
    ),
    "progress of another slot is taken": (
        f"task[1] == 'RUNNING' and task[2] == slot and task[3] == args[i + 1] then{PROGRESS}",
        f"task[1] == 'RUNNING' and task[3] == args[i + 1] then{PROGRESS}",
        believed("another slot"),
    ),
    "progress of another incarnation is taken": (
        "  if record[1] ~= 'OPEN' or record[2] ~= args[2] then return 0 end\n  for i = 3, #args, 5",
        "  for i = 3, #args, 5",
        believed("another incarnation"),
    ),
    "progress outlives its attempt": (
        "  if task.state == 'RUNNING' then redis.call('HDEL', p .. 't:' .. id, 'progress', 'message') end\n",
        "",
        resumed(Outcome.LOST),
    ),
    "a claim has no checkpoint": (
        "checkpoint = said[7] or nil",
        "checkpoint = nil",
        resumed(Outcome.LOST),
    ),
    "a cursor as the server writes it": (
        "  return string.format('%.0f', tonumber(score))",
        "  return string.gsub(tostring(score), '00000000$', 'e+8')",
        reads.test_a_round_sequence_number_is_a_cursor_as_well,
    ),
}
BY_QUOTA_WALK = (
    *("a quota of tasks is not looked at", "a quota of devices is not looked at", "a quota of memory is not looked at"),
    *("work is not counted", "work is not returned at an end", "work is not returned with its slot"),
    *("tasks are not returned at an end", "tasks are not returned with their slot", "an end gives nobody a turn"),
    "a slot that the quota refused is forgotten",
)
"""Those that the walk of one tenant must catch without being told."""


@pytest.fixture(scope="module")
def mutant_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Whichever server there is: what is tested here are the tests."""
    name = next((name for name in PROGRAMS if _there(name)), PROGRAMS[0])
    server = StoreServer(tmp_path_factory.mktemp("mutants"), name, *FAST).start()
    yield server
    server.kill()


def _there(name: str) -> bool:
    try:
        return bool(program(name))
    except (pytest.skip.Exception, Failed):
        return False


def planted(name: str) -> str:
    """The library with this fault."""
    text, replacement, _ = MUTANTS[name]
    source = library_source()
    assert source.count(text) == 1, f"the library has {source.count(text)} of: {text}"
    return source.replace(text, replacement)


@asynccontextmanager
async def mutated(server: StoreServer, name: str) -> AsyncIterator[Lab]:
    """A lab whose server has the library with this fault."""
    async with connected(server.url) as lab:
        await lab.raw("FUNCTION", "LOAD", "REPLACE", planted(name))
        yield lab


async def caught(lab: Lab, test: Test) -> str:
    """How the test or the recount after it noticed; empty where neither did."""
    try:
        async with asyncio.timeout(CAUGHT_S):
            await test(lab)
            await check_invariants(lab.store)
    except (AssertionError, Failed) as error:  # Failed: pytest.raises did not see its exception
        return str(error) or "assertion"
    return ""


@pytest.mark.parametrize("name", MUTANTS)
async def test_a_planted_fault_is_caught(mutant_server: StoreServer, name: str):
    async with mutated(mutant_server, name) as lab:
        assert await caught(lab, MUTANTS[name][2]), f"nobody noticed: {name}"


@pytest.mark.parametrize("name", BY_QUOTA_WALK)
async def test_the_quota_walk_catches_a_planted_fault(mutant_server: StoreServer, name: str):
    async with mutated(mutant_server, name) as lab:
        assert await caught(lab, quota_walks), f"the walk did not notice: {name}"


@pytest.mark.parametrize("test", [tasks.test_an_end_is_committed_once, full_store, full_of_new, left_over, quota_walks])
async def test_without_a_fault_nothing_is_caught(mutant_server: StoreServer, test: Test):
    """What the tests of the other files say of the library as it is, they say there."""
    async with connected(mutant_server.url) as lab:
        assert await caught(lab, test) == ""


def test_the_faults_that_the_docs_name_are_planted():
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    table = page.partition("| fault | mutant |\n|---|---|\n")[2].partition("\n\n")[0]
    named = [row.strip("| ").split(" | ")[1] for row in table.splitlines()]
    assert len(named) == 16
    assert [name for name in named if name not in MUTANTS] == []
