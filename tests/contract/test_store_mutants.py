"""Whether the tests would notice: faults are planted in the library one by one, and each must be caught by name.

A mutant is a text of the library and what replaces it, with the test that must fail. A catch is a failed assertion of
that test, or a `Violation` of the recount; an error of the store or of the test itself is none.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from _pytest.outcomes import Failed

from manager.core.lifecycle import Cordon, Outcome, SlotFlag
from manager.core.quantities import GIB
from manager.store.schema import library_source
from tests.contract import test_store_leader as leader
from tests.contract import test_store_lifecycle as lifecycle
from tests.contract import test_store_memory as memory
from tests.contract import test_store_quotas as quotas
from tests.contract import test_store_reads as reads
from tests.contract import test_store_slots as slots
from tests.contract import test_store_tasks as tasks
from tests.contract.store_harness import (
    FAST,
    PROGRAMS,
    Lab,
    StoreServer,
    check_invariants,
    connected,
    program,
)
from tests.contract.test_store_walk import walk_on

Test = Callable[[Lab], Awaitable[None]]


def outcome(which: Outcome, asked: bool) -> Test:
    """One row of the table of ends."""
    row = next(row for row in tasks.ENDS if row[:2] == (which, asked))
    return lambda lab: tasks.test_each_outcome_has_its_status(lab, *row)


def old_leader(name: str) -> Test:
    return lambda lab: leader.test_no_write_of_an_old_leader_has_an_effect(lab, name)


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


async def walks(lab: Lab) -> None:
    """Some random histories."""
    for seed in range(40):
        await lab.raw("FLUSHALL")
        await walk_on(lab, seed, lab.url)


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
        "if not leads(p, args[1]) then return { 0, 0 } end",
        "",
        old_leader("sweep"),
    ),
    "a submission overwrites": (
        "if owner then return { owner == tenant and 'OK' or 'EXISTS' } end",
        "",
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
        "local attempt = redis.call('HINCRBY', key, 'attempt', 1)",
        "local attempt = redis.call('HINCRBY', key, 'attempt', 0)",
        tasks.test_a_claim_raises_the_attempt_and_nothing_lowers_it,
    ),
    "a requeued task starts at attempt 0": (
        "'state', 'QUEUED', 'queued', now, 'slot', ''",
        "'state', 'QUEUED', 'attempt', 0, 'queued', now, 'slot', ''",
        tasks.test_a_claim_raises_the_attempt_and_nothing_lowers_it,
    ),
    "unstarted claims count": (
        "return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', now)",
        "return give_back(p, id, task, flag ~= 'preempt', now)",
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
        "if outcome == 'S' then return finalise(p, id, task, 'SUCCEEDED', payload, '', now) end\n  if task.cancel == '1'",
        (
            "if outcome == 'S' and task.cancel ~= '1' then return finalise(p, id, task, 'SUCCEEDED', payload, '', now) end"
            "\n  if task.cancel == '1'"
        ),
        tasks.test_cancel_and_success_in_both_orders,
    ),
    "a final task is cancelled": (
        "if not LIVE[task.state] then return task.state end",
        "",
        tasks.test_cancel_and_success_in_both_orders,
    ),
    "retry without a cap": (
        "if failures >= tonumber(task.max_attempts) then return finalise(p, id, task, 'FAILED', '', payload, now) end",
        "",
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
        "    if task and task.state == 'RUNNING' and task.slot == slot then\n      give_back",
        "    if false then\n      give_back",
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
        "'cancel', '', 'error', err }",
        "'cancel', '' }",
        tasks.test_a_success_leaves_no_error_of_an_earlier_attempt,
    ),
    "an opened slot is dropped": (
        "if record[1] == 'REQUESTED' then close_slot",
        "if record[1] ~= 'CLOSED' then close_slot",
        leader.test_only_slots_that_nobody_opened_are_dropped,
    ),
    "a sweep takes what is not final": (
        "if task[1] and not LIVE[task[2]] then",
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
        "give_back(p, id, task, record[7] ~= 'preempt', now)",
        "give_back(p, id, task, true, now)",
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
        "if not leads(p, args[1]) then return -1 end",
        "",
        old_leader("age"),
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
BY_WALK = (
    *("attempt not checked on finish", "incarnation not checked on next", "token not checked", "a submission overwrites"),
    *("finish not idempotent", "a claim does not raise the attempt", "queue not filled with the record"),
    *("a closed slot keeps its claims", "a fenced incarnation goes on", "a repeat forgets a claim", "quota not given back"),
    *("a replaced incarnation registers", "an id opens again", "a requeued task starts at attempt 0"),
    *("a cordoned node opens slots", "an autoscaler's token is not checked", "an operator's cordon is overwritten"),
    "a device in two ledgers",
)
"""Those that the walk must catch as well, without being told what to look for."""


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


@asynccontextmanager
async def mutated(server: StoreServer, text: str, replacement: str) -> AsyncIterator[Lab]:
    """A lab whose server has the library with one change."""
    source = library_source()
    assert source.count(text) == 1, f"the library has {source.count(text)} of: {text}"
    async with connected(server.url) as lab:
        await lab.raw("FUNCTION", "LOAD", "REPLACE", source.replace(text, replacement))
        yield lab


async def caught(lab: Lab, test: Test) -> str:
    """How the test or the recount after it noticed; empty where neither did."""
    try:
        await test(lab)
        await check_invariants(lab.store)
    except (AssertionError, Failed) as error:  # Failed: pytest.raises did not see its exception
        return str(error) or "assertion"
    return ""


@pytest.mark.parametrize("name", MUTANTS)
async def test_a_planted_fault_is_caught(mutant_server: StoreServer, name: str):
    text, replacement, test = MUTANTS[name]
    async with mutated(mutant_server, text, replacement) as lab:
        assert await caught(lab, test), f"nobody noticed: {name}"


@pytest.mark.parametrize("name", BY_WALK)
async def test_the_walk_catches_a_planted_fault(mutant_server: StoreServer, name: str):
    text, replacement, _ = MUTANTS[name]
    async with mutated(mutant_server, text, replacement) as lab:
        assert await caught(lab, walks), f"the walk did not notice: {name}"


@pytest.mark.parametrize("name", BY_QUOTA_WALK)
async def test_the_quota_walk_catches_a_planted_fault(mutant_server: StoreServer, name: str):
    text, replacement, _ = MUTANTS[name]
    async with mutated(mutant_server, text, replacement) as lab:
        assert await caught(lab, quota_walks), f"the walk did not notice: {name}"


@pytest.mark.parametrize("test", list(dict.fromkeys(test for _, _, test in MUTANTS.values())), ids=lambda test: test.__name__)
async def test_without_a_fault_nothing_is_caught(mutant_server: StoreServer, test: Test):
    async with connected(mutant_server.url) as lab:
        assert await caught(lab, test) == ""
