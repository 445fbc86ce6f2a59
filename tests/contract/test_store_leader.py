"""The leader's term and its writes: one token at a time, and nothing from an old one."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from manager.core.lifecycle import SlotFlag, SlotStatus, TaskStatus
from manager.core.mix import NO_MIX, mix_of
from manager.core.model import TenantRow
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from manager.store.calls_leader import Swept
from tests.contract.store_harness import RED, Lab, check_invariants, dump, end, granted, submission


async def test_a_term_is_taken_only_from_what_was_seen(lab: Lab):
    assert await lab.store.lead("a", 0, 0, "read") == (False, 0, 0, "")
    assert await lab.store.lead("a", 0, 0, "take") == (True, 1, 0, "a")
    assert (await lab.store.lead("b", 0, 0, "take"))[0] is False, "a term was taken from a view that is old"
    assert await lab.store.lead("a", 1, 0, "renew") == (True, 1, 1, "a")
    assert (await lab.store.lead("b", 1, 0, "take"))[0] is False, "a term was taken from a leader that beats"
    assert await lab.store.lead("b", 1, 1, "take") == (True, 2, 0, "b")
    assert (await lab.store.lead("a", 1, 0, "renew"))[0] is False, "a replaced leader renewed its term"
    assert (await lab.store.lead("a", 2, 0, "renew"))[0] is False, "a term was renewed by somebody else"


async def test_a_take_that_is_sent_again_is_told_that_it_worked(lab: Lab):
    assert await lab.store.lead("a", 0, 0, "take") == (True, 1, 0, "a")
    assert await lab.store.lead("a", 0, 0, "take") == (True, 1, 0, "a")
    assert await lab.store.lead("b", 0, 0, "take") == (False, 1, 0, "a")


async def test_a_resigned_term_is_free_at_once(lab: Lab):
    await lab.store.lead("a", 0, 0, "take")
    await lab.store.lead("a", 1, 0, "renew")
    assert (await lab.store.lead("b", 1, 0, "resign"))[0] is False
    assert await lab.store.lead("a", 1, 0, "resign") == (True, 1, 1, "")
    assert (await lab.store.lead("a", 1, 0, "renew"))[0] is False, "a resigned leader renewed its term"
    assert await lab.store.lead("b", 1, 99, "take") == (True, 2, 0, "b")


HIGH = submission(memory_gib=9).shape_id
MIX = mix_of([(Resources(GIB, architectures=("cdna3",)), 0.75), (Resources(2 * GIB, 2), 0.25)], 8)
Write = Callable[[Lab, int, dict[str, Any]], Awaitable[object]]
WRITES: dict[str, tuple[Write, object]] = {
    # name: the call with a token, its answer to an old one
    "request": (lambda lab, token, w: lab.store.request_slot(token, "new", RED, 0), False),
    "fence": (lambda lab, token, w: lab.store.fence(token, "Test", [w["open"], w["requested"]]), False),
    "drop": (lambda lab, token, w: lab.store.drop(token, "Test", [w["requested"]]), None),
    "flag": (lambda lab, token, w: lab.store.flag(token, SlotFlag.CLOSE, [w["open"]]), False),
    "lost": (lambda lab, token, w: lab.store.lost(token, "n1", w["incarnation"]), (False, [])),
    "planned": (lambda lab, token, w: lab.store.planned(token, 3, [(RED, 7)]), False),
    "mix": (lambda lab, token, w: lab.store.put_mix(token, MIX), False),
    "share": (lambda lab, token, w: lab.store.share(token, [TenantRow(tenant="red", gpus_max=1)], [(RED, 7.0)]), False),
    "age": (lambda lab, token, w: lab.store.age(token, 0.0, [RED, HIGH]), None),
    "reached": (lambda lab, token, w: lab.store.reached(token, dask=True), False),
    "sweep": (lambda lab, token, w: lab.store.sweep(token, 10**15, 0, 10**15), Swept(0, 0)),
}


@pytest.mark.parametrize("name", WRITES)
async def test_no_write_of_an_old_leader_has_an_effect(lab: Lab, name: str):
    write, refusal = WRITES[name]
    agent = await lab.agent()
    await lab.submit(2)
    await lab.one(memory_gib=9, priority=10)
    world = {"open": await lab.open(agent), "requested": await lab.request(), "incarnation": agent.incarnation}
    closed = await lab.open(agent)
    await lab.store.close_slot(closed, agent.incarnation, "Idle")
    claim = await lab.claim(agent, world["open"])
    await lab.next(agent, world["open"], 0, end(claim))
    old = lab.token
    await lab.lead()
    before = await dump(lab.store)
    for token in (old, 0, lab.token + 1):
        assert await write(lab, token, world) == refusal, "an old leader's write was not refused"
        assert await dump(lab.store) == before, "an old leader's write had an effect"
    assert await write(lab, lab.token, world) != refusal
    assert await dump(lab.store) != before


async def test_the_mix_of_requests_is_in_the_look_as_it_was_told(lab: Lab):
    await lab.lead()
    assert (await lab.store.look(leader=False)).mix == NO_MIX
    assert await lab.store.put_mix(lab.token, MIX)
    assert (await lab.store.look(leader=False)).mix == MIX
    await lab.raw("SET", lab.store.keys.prefix + "mix", b'{"revision":"r","shares":"of a later version"}')
    assert (await lab.store.look(leader=False)).mix == NO_MIX, "a mix that cannot be read broke the look, or was believed"


async def test_only_slots_that_nobody_opened_are_dropped(lab: Lab):
    agent = await lab.agent()
    opened, requested, closed = await lab.open(agent), await lab.request(), await lab.open(agent)
    await lab.store.close_slot(closed, agent.incarnation, "Idle")
    slots = [opened, requested, closed, "unheard-of"]
    assert await lab.store.drop(lab.token, "NotOpened", slots) == [requested]
    # The answer may have been lost: Dask must hear of it all the same.
    assert await lab.store.drop(lab.token, "NotOpened", slots) == [requested]
    left = (await lab.store.look(leader=False)).slots
    assert [(row.slot_id, row.status) for row in left] == [(opened, SlotStatus.OPEN)]
    assert (await lab.store.open_slot(requested, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED"


async def test_a_slot_is_requested_once(lab: Lab):
    slot = await lab.request(served_max=5)
    before = await dump(lab.store)
    assert await lab.store.request_slot(lab.token, slot, "another-shape", 9)
    assert await dump(lab.store) == before


async def test_fencing_ends_open_and_unopened_slots(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    opened, requested = await lab.open(agent), await lab.request()
    await lab.claim(agent, opened)
    assert await lab.store.fence(lab.token, "Test", [opened, requested, "unheard-of"])
    assert (await lab.store.look(leader=False)).slots == ()
    assert await lab.status(task) is TaskStatus.QUEUED


# --- forgetting ---------------------------------------------------------------------------------------------------


async def finished(lab: Lab, count: int) -> list[str]:
    agent = await lab.agent("sweeper")
    tasks = await lab.submit(count)
    slot = await lab.open(agent)
    for _ in range(count):
        await lab.next(agent, slot, 0, end(await lab.claim(agent, slot)))
    return tasks


async def test_a_sweep_forgets_what_has_ended_before(lab: Lab):
    old = await finished(lab, 3)
    waiting = await lab.one()
    await lab.store.keep_log(old[0], 1, b"out", b"", 0)
    assert await lab.store.sweep(lab.token, 0, 1000, 0) == Swept(0, 0)
    now_ms = (await lab.store.look(leader=False)).now_ms
    assert (await lab.store.sweep(lab.token, now_ms + 10_000, 1000, 0)).tasks == 3
    found = await check_invariants(lab.store)
    assert set(found.tasks) == {waiting}, "a sweep took a task that is not final, or left an old one"
    assert await lab.store.log(old[0]) == (b"", b"", 0)
    assert await lab.store.counts() == {"QUEUED": 1, "RUNNING": 0, "SUCCEEDED": 0}


async def test_a_sweep_keeps_the_newest(lab: Lab):
    tasks = await finished(lab, 5)
    for place, task in enumerate(tasks):
        await lab.raw("ZADD", "{ry}:dn:red", place + 1, task)
    assert (await lab.store.sweep(lab.token, 0, 2, 0)).tasks == 3
    assert set((await dump(lab.store)).tasks) == set(tasks[3:])


async def test_a_sweep_never_takes_a_task_that_is_not_final(lab: Lab):
    task = await lab.one()
    await lab.raw("ZADD", "{ry}:dn:red", 1, task)  # whatever may have put it there
    await lab.raw("SADD", "{ry}:dt", "red")
    await lab.lead()
    await lab.store.sweep(lab.token, 10**15, 0, 10**15)
    assert await lab.status(task) is TaskStatus.QUEUED


async def test_a_sweep_forgets_tombstones_and_nodes_that_are_gone(lab: Lab):
    await lab.agent("stays")
    leaver, lost, back = [await lab.agent(name) for name in ("leaver", "lost", "back")]
    slot = await lab.open(leaver)
    await lab.store.put_heartbeat("lost", "tcp://1", [])
    await lab.store.leave("leaver", leaver.incarnation)
    await lab.store.lost(lab.token, "lost", lost.incarnation)
    await lab.store.lost(lab.token, "back", back.incarnation)
    await lab.agent("back")
    assert await lab.store.sweep(lab.token, 0, 1000, 1) == Swept(0, 0)
    assert len((await lab.store.look(leader=False)).nodes) == 4
    assert await lab.store.sweep(lab.token, 0, 1000, 10**15) == Swept(0, 1)
    assert [row.node for row in (await lab.store.look(leader=False)).nodes] == ["back", "stays"]
    found = await check_invariants(lab.store)
    assert f"s:{slot}" not in found.hashes
    assert "hb:lost" not in found.hashes
    # Who wakes up after all that time is a stranger, and says so to itself.
    assert (await lab.store.beat("lost", lost.incarnation, [])).holds is False


async def test_a_sweep_is_bounded(lab: Lab):
    agent = await lab.agent()
    await lab.submit(300)
    slot = await lab.open(agent)
    for _ in range(300 // 100):
        claims = (await lab.next(agent, slot, 100)).claims
        await lab.next(agent, slot, 0, *(end(claim) for claim in claims))
    await lab.submit(250)
    for _ in range(5):
        claims = (await lab.next(agent, slot, 50)).claims
        await lab.next(agent, slot, 0, *(end(claim) for claim in claims))
    assert [(await lab.store.sweep(lab.token, 10**15, 0, 0)).tasks for _ in range(3)] == [500, 50, 0]
