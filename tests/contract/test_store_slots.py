"""Slots and nodes in the store: opened once, fenced by incarnation, ended with what they had claimed."""

import pytest

from manager.core.lifecycle import Outcome, SlotFlag, SlotStatus, TaskStatus
from manager.core.model import BeatReply, DeviceUse, MemoryNote
from manager.core.quantities import GIB
from tests.contract.store_harness import INFO, RED, RED_SHAPE, Agent, Lab, check_invariants, dump, end, granted


async def slot_row(lab: Lab, slot_id: str):
    return next((slot for slot in (await lab.store.look(leader=False)).slots if slot.slot_id == slot_id), None)


# --- opening ------------------------------------------------------------------------------------------------------


async def test_a_slot_opens_once_and_is_adopted_by_the_same_incarnation(lab: Lab):
    agent = await lab.agent()
    slot = await lab.request()
    for word in ("OK", "ADOPTED", "ADOPTED"):
        reply = await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0", "gpu-1"))
        assert (reply.word, reply.shape_id) == (word, RED)
        assert reply.shape is not None
    row = await slot_row(lab, slot)
    assert (row.status, row.node, row.devices) == (SlotStatus.OPEN, "n1", ("gpu-0", "gpu-1"))


async def test_another_node_is_refused_an_open_slot(lab: Lab):
    agent, other = await lab.agent(), await lab.agent("n2")
    slot = await lab.open(agent)
    assert (await lab.store.open_slot(slot, other.incarnation, granted("n2", "gpu-0"))).word == "REFUSED"
    assert (await slot_row(lab, slot)).node == "n1", "a slot was opened twice"


async def test_a_slot_that_nobody_asked_for_is_refused(lab: Lab):
    agent = await lab.agent()
    assert (await lab.store.open_slot("unheard-of", agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED"


async def test_a_closed_slot_is_refused_for_ever(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    assert (await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED"
    assert await lab.store.request_slot(lab.token, slot, RED, 0)  # a repeat of the leader's call
    assert (await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED", "it was opened again"
    assert (await lab.next(agent, slot)).word == "FENCED"


async def test_a_stranger_opens_nothing(lab: Lab):
    slot = await lab.request()
    assert (await lab.store.open_slot(slot, "never-registered", granted("n9", "gpu-0"))).word == "FENCED"


async def test_only_its_own_incarnation_closes_a_slot(lab: Lab):
    agent = await lab.agent()
    opened, requested = await lab.open(agent), await lab.request()
    await lab.store.close_slot(opened, "somebody-else", "Failed")
    await lab.store.close_slot(requested, agent.incarnation, "Failed")
    assert (await slot_row(lab, opened)).status is SlotStatus.OPEN, "a stranger closed a slot"
    assert (await slot_row(lab, requested)).status is SlotStatus.REQUESTED, "a slot was closed that was never opened"


async def test_closing_gives_back_all_claims(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(4)
    slot = await lab.open(agent)
    await lab.next(agent, slot, 3)
    await lab.store.close_slot(slot, agent.incarnation, "Failed")
    records = [await lab.record(task) for task in tasks]
    assert [record.status for record in records] == [TaskStatus.QUEUED] * 4
    assert [record.losses for record in records] == [1, 1, 1, 0]
    found = await check_invariants(lab.store)
    assert found.hashes[f"s:{slot}"]["reason"] == "Failed"


# --- nodes --------------------------------------------------------------------------------------------------------


async def test_a_new_incarnation_ends_all_that_the_node_held(lab: Lab):
    old = await lab.agent()
    task = await lab.one()
    slot, spare = await lab.open(old), await lab.open(old)
    other = await lab.open(await lab.agent("n2"))
    claim = await lab.claim(old, slot)
    new = await lab.agent()
    assert await lab.status(task) is TaskStatus.QUEUED
    assert [await slot_row(lab, s) for s in (slot, spare)] == [None, None]
    assert await slot_row(lab, other) is not None
    assert (await lab.next(old, slot, 1, end(claim))).word == "FENCED"
    assert (await lab.store.beat("n1", old.incarnation, [])).holds is False, "a replaced incarnation beats"
    assert (await lab.store.beat("n1", new.incarnation, [])).holds is True


async def test_registering_again_is_harmless(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    assert await lab.store.register("n1", agent.incarnation, INFO)
    assert (await slot_row(lab, slot)).status is SlotStatus.OPEN


async def test_a_late_registration_of_a_replaced_incarnation_ends_nothing(lab: Lab):
    old = await lab.agent()
    new = await lab.agent()
    slot = await lab.open(new)
    assert not await lab.store.register("n1", old.incarnation, INFO), "a replaced incarnation came back"
    assert (await slot_row(lab, slot)).status is SlotStatus.OPEN
    assert (await lab.store.beat("n1", new.incarnation, [])).holds is True
    for _ in range(20):
        new = await lab.agent()
    assert (await lab.store.beat("n1", new.incarnation, [])).holds is True


async def test_a_lost_incarnation_can_do_nothing_any_more(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot, requested = await lab.open(agent), await lab.request()
    claim = await lab.claim(agent, slot)
    assert await lab.store.lost(lab.token, "n1", agent.incarnation) == (True, [slot])
    assert await lab.store.lost(lab.token, "n1", agent.incarnation) == (True, [])
    assert await lab.status(task) is TaskStatus.QUEUED
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, False)])).holds is False, "a fenced incarnation beats"
    assert not await lab.store.register("n1", agent.incarnation, INFO), "a fenced incarnation registers"
    assert (await lab.store.open_slot(requested, agent.incarnation, granted("n1", "gpu-0"))).word == "FENCED"
    assert (await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))).word == "FENCED"
    assert (await lab.next(agent, slot, 1, end(claim))).word == "FENCED"
    (row,) = (await lab.store.look(leader=False)).nodes
    assert row.fenced
    fresh = await lab.agent()
    assert (await lab.store.beat("n1", fresh.incarnation, [])).holds is True
    (row,) = (await lab.store.look(leader=False)).nodes
    assert not row.fenced


async def test_losing_an_incarnation_that_was_replaced_does_nothing(lab: Lab):
    old = await lab.agent()
    new = await lab.agent()
    slot = await lab.open(new)
    assert await lab.store.lost(lab.token, "n1", old.incarnation) == (False, [])
    assert (await slot_row(lab, slot)).status is SlotStatus.OPEN


async def test_a_node_that_leaves_gives_all_back_and_opens_nothing_more(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot, requested = await lab.open(agent), await lab.request()
    await lab.claim(agent, slot)
    await lab.store.leave("n1", "somebody-else")
    assert await lab.status(task) is TaskStatus.RUNNING
    await lab.store.leave("n1", agent.incarnation)
    await lab.store.leave("n1", agent.incarnation)
    assert await lab.status(task) is TaskStatus.QUEUED
    (row,) = (await lab.store.look(leader=False)).nodes
    assert row.left
    # A late send of a call from before: nobody would watch over a slot there.
    assert (await lab.store.open_slot(requested, agent.incarnation, granted("n1", "gpu-0"))).word == "FENCED"
    await lab.store.register("n1", agent.incarnation, INFO)
    (row,) = (await lab.store.look(leader=False)).nodes
    assert not row.left


async def test_each_beat_differs_from_the_one_before(lab: Lab):
    agent = await lab.agent()
    seen = set()
    for _ in range(3):
        await lab.store.beat("n1", agent.incarnation, [])
        seen.add((await lab.store.look(leader=False)).nodes[0].beat)
    assert len(seen) == 3


async def test_a_beat_tells_what_must_be_known_of_each_slot(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    running, flagged, idle, closed = [await lab.open(agent) for _ in range(4)]
    await lab.claim(agent, running)
    await lab.store.cancel(task, "red")
    await lab.next(agent, idle)
    await lab.store.flag(lab.token, SlotFlag.PREEMPT, [flagged])
    await lab.store.fence(lab.token, "Test", [closed])
    slots = [(running, False), (flagged, True), (idle, True), (closed, True), ("unheard-of", True)]
    beaten = await lab.store.beat("n1", agent.incarnation, slots)
    assert beaten.holds
    assert set(beaten.words) == {
        (running, f"cancel:{task}"),
        (flagged, "preempt"),
        (closed, "fenced"),
        ("unheard-of", "fenced"),
    }
    await lab.submit()
    assert (idle, "work") in (await lab.store.beat("n1", agent.incarnation, slots)).words


async def test_a_beat_marks_a_slot_idle_again_whose_wake_up_was_lost(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.next(agent, slot)
    task = await lab.one()  # wakes the slot, and nobody hears it
    await lab.store.cancel(task, "red")
    assert await lab.idle() == set()
    await lab.store.beat("n1", agent.incarnation, [(slot, True)])
    assert await lab.idle() == {slot}


async def test_a_beat_tells_an_idle_slot_of_claims_whose_answer_was_lost(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.submit()
    await lab.next(agent, slot)
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, True)])).words == ((slot, "work"),)
    assert await lab.idle() == set()


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [SlotFlag.CLOSE, SlotFlag.DRAIN, SlotFlag.PREEMPT])
async def test_a_flagged_slot_takes_nothing_more_and_is_woken(lab: Lab, flag: SlotFlag):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.next(agent, slot)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        assert await lab.store.flag(lab.token, flag, [slot])
        await lab.submit()
        assert await heard.all(lab) == [f"flag {slot}"], "a slot that takes nothing was woken for work"
    reply = await lab.next(agent, slot)
    assert (reply.word, reply.claims) == (flag.value.upper(), ())
    assert (await lab.store.beat("n1", agent.incarnation, [(slot, True)])).words[0] == (slot, flag.value)


async def test_flags_are_for_open_slots(lab: Lab):
    agent = await lab.agent()
    requested, closed = await lab.request(), await lab.open(agent)
    await lab.store.close_slot(closed, agent.incarnation, "Idle")
    before = await dump(lab.store)
    assert await lab.store.flag(lab.token, SlotFlag.CLOSE, [requested, closed, "unheard-of"])
    assert await dump(lab.store) == before


async def test_a_fenced_slots_agent_is_told(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.store.fence(lab.token, "Test", [slot])
        await lab.store.fence(lab.token, "Test", [slot])
        assert await heard.all(lab) == [f"flag {slot}"]


# --- what a slot has, and what its shape learns ---------------------------------------------------------------------


ALL = {"share_milli": 250, "cpu_milli": 1500, "host_memory_bytes": 5 * GIB, "exclusive": True, "model": "llama"}


async def the_queue(lab: Lab):
    (queue,) = (await lab.store.look(leader=False)).queues
    return queue


async def test_a_slot_keeps_all_of_its_grant(lab: Lab):
    agent = await lab.agent()
    grant = granted("n1", "gpu-0", "gpu-1", memory_bytes=3 * GIB, **ALL)
    slot = await lab.request()
    assert (await lab.store.open_slot(slot, agent.incarnation, grant)).word == "OK"
    other = granted("n1", "gpu-1", memory_bytes=2**53 // GIB * GIB)
    assert await lab.store.open_direct("d", agent.incarnation, other) == "OK"
    grants = {row.slot_id: row.grant(None) for row in (await lab.store.look(leader=False)).slots}
    assert grants == {slot: grant, "d": other}
    smaller = granted("n1", "gpu-0")
    assert (await lab.store.open_slot(slot, agent.incarnation, smaller)).word == "ADOPTED"
    assert await lab.store.open_direct("d", agent.incarnation, smaller) == "ADOPTED"
    assert {row.slot_id: row.grant(None) for row in (await lab.store.look(leader=False)).slots} == grants


async def test_a_slot_that_an_older_agent_opens_has_what_its_shape_asks_for(lab: Lab):
    agent = await lab.agent()
    slot = await lab.request()
    assert (await lab.store._run("ry_open", slot, "n1", agent.incarnation, "gpu-0"))[0] == b"OK"
    assert await lab.store._run("ry_open_direct", "d", "n1", agent.incarnation, "gpu-0", GIB) == b"OK"
    rows = {row.slot_id: row for row in (await lab.store.look(leader=False)).slots}
    assert rows[slot].grant(RED_SHAPE) == granted("n1", "gpu-0", memory_bytes=RED_SHAPE.memory_bytes)
    assert rows["d"].grant(None) == granted("n1", "gpu-0")


async def test_the_peak_of_a_shape_is_the_most_that_was_seen(lab: Lab):
    agent = await lab.agent()
    one, other = await lab.open(agent), await lab.open(agent)
    for slot, peak in ((one, 5), (other, 7), (one, 6), (other, 7)):
        await lab.store.note_memory(agent.incarnation, [MemoryNote(slot, peak)])
    queue = await the_queue(lab)
    assert (queue.peak_bytes, queue.learned_bytes, queue.resources) == (7, 0, RED_SHAPE.resources)


async def test_what_one_slot_needed_all_later_ones_of_its_shape_lease(lab: Lab):
    agent = await lab.agent()
    slot, late = await lab.open(agent), await lab.request()
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.note_memory(agent.incarnation, [MemoryNote(slot, 3 * GIB, 3 * GIB)])
        assert await heard.all(lab) == ["plan"]
    queue = await the_queue(lab)
    assert (queue.learned_bytes, queue.resources.memory_bytes) == (3 * GIB, 3 * GIB)
    assert (await lab.store.open_slot(late, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED", "it was on its way"
    later = await lab.request()
    assert (await lab.store.open_slot(later, agent.incarnation, granted("n1", "gpu-0", memory_bytes=3 * GIB))).word == "OK"
    await lab.store.note_memory(agent.incarnation, [MemoryNote(later, 2 * GIB, 2 * GIB)])
    assert (await the_queue(lab)).learned_bytes == 3 * GIB, "less than was learned is nothing new"


async def test_a_task_that_is_tried_again_goes_to_a_slot_with_the_larger_lease(lab: Lab):
    agent = await lab.agent()
    (task,) = await lab.submit(1, max_attempts=2)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    idle = await lab.open(agent)
    assert (await lab.next(agent, idle)).word == "IDLE"
    async with lab.listening(lab.store.keys.wake("n1")) as heard:
        await lab.store.note_memory(agent.incarnation, [MemoryNote(slot, 3 * GIB, 3 * GIB)])
        assert sorted(await heard.all(lab)) == sorted([f"flag {slot}", f"flag {idle}"])
    await lab.next(agent, slot, 0, end(claim, Outcome.FAILED))
    await lab.raw("ZADD", f"{lab.store.keys.prefix}due", 0, task)
    await lab.store.due()
    assert [(await lab.next(agent, each)).word for each in (slot, idle)] == ["DRAIN", "DRAIN"]
    large = await lab.request()
    assert (await lab.store.open_slot(large, agent.incarnation, granted("n1", "gpu-0", memory_bytes=3 * GIB))).word == "OK"
    assert (await lab.claim(agent, large)).task_id == task


async def test_what_was_learned_is_forgotten_after_a_day_and_when_it_is_unloaded(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    note = [MemoryNote(slot, 3 * GIB, 3 * GIB)]
    key = f"{lab.store.keys.prefix}sh:{RED}"
    await lab.store.note_memory(agent.incarnation, note)
    told = int(await lab.raw("HGET", key, "learned_at"))
    await lab.raw("HSET", key, "learned_at", told - 86_400_001)
    assert (await the_queue(lab)).learned_bytes == 0
    late = await lab.request()
    assert (await lab.store.open_slot(late, agent.incarnation, granted("n1", "gpu-0"))).word == "OK"
    await lab.store.note_memory(agent.incarnation, note)
    assert (await the_queue(lab)).learned_bytes == 3 * GIB, "it was seen again"
    await lab.store.unload([RED])
    queue = await the_queue(lab)
    assert (queue.learned_bytes, queue.peak_bytes) == (0, 0)


async def test_nothing_is_learned_from_slots_of_others_and_of_nobody(lab: Lab):
    agent = await lab.agent()
    slot, closed = await lab.open(agent), await lab.open(agent)
    await lab.store.close_slot(closed, agent.incarnation, "Idle")
    assert await lab.store.open_direct("d", agent.incarnation, granted("n1", "gpu-0")) == "OK"
    notes = [MemoryNote(name, 3 * GIB, 3 * GIB) for name in (closed, "d", "unheard-of")]
    await lab.store.note_memory(agent.incarnation, notes)
    await lab.store.note_memory("a-stranger", [MemoryNote(slot, 3 * GIB, 3 * GIB)])
    queue = await the_queue(lab)
    assert (queue.learned_bytes, queue.peak_bytes) == (0, 0)
    assert (await lab.next(agent, slot)).word == "IDLE"


# --- one look -----------------------------------------------------------------------------------------------------


async def test_a_look_shows_queues_slots_and_nodes(lab: Lab):
    agent = await lab.agent()
    tasks = await lab.submit(3)
    await lab.submit(1, memory_gib=2)
    slot = await lab.open(agent)
    await lab.claim(agent, slot)
    await lab.store.put_heartbeat("n1", "tcp://1", [DeviceUse(uuid="gpu-0", used_bytes=7)])
    state = await lab.store.look(leader=False)
    assert sorted(queue.depth for queue in state.queues) == [1, 2]
    red = next(queue for queue in state.queues if queue.shape_id == RED)
    assert red.head == (await lab.record(tasks[1])).score
    assert [(row.slot_id, row.running, row.token) for row in state.slots] == [(slot, 1, lab.token)]
    assert [(row.node, row.address, row.uses[0].used_bytes) for row in state.nodes] == [("n1", "tcp://1", 7)]


@pytest.mark.parametrize("fields", [("uses", b"\xff"), ("uses", b'[{"uuid":1}]'), ("seen", b"soon"), ("address", b"\xff")])
async def test_nonsense_in_a_heartbeat_spoils_its_own_node_only(lab: Lab, fields: tuple[str, bytes]):
    """A Dask worker may write there what it likes."""
    await lab.agent()
    await lab.agent("n2")
    await lab.store.put_heartbeat("n2", "tcp://2", [DeviceUse(uuid="gpu-0", used_bytes=7)])
    await lab.raw("HSET", lab.store.keys.heartbeat("n1"), *fields)
    first, second = (await lab.store.look(leader=True)).nodes
    assert (first.uses, second.uses[0].used_bytes) == ((), 7)


async def test_a_shape_without_tasks_and_slots_is_no_longer_looked_at(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot = await lab.open(agent)
    await lab.store.cancel(task, "red")
    assert len((await lab.store.look(leader=True)).queues) == 1
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    assert len((await lab.store.look(leader=False)).queues) == 1
    assert (await lab.store.look(leader=True)).queues == ()
    await lab.submit()
    assert len((await lab.store.look(leader=True)).queues) == 1


async def test_the_controller_is_asked_once_between_two_looks(lab: Lab):
    async with lab.listening(lab.store.keys.ctl) as heard:
        for _ in range(5):
            await lab.submit()
        assert await heard.all(lab) == ["plan"]
        await lab.store.look(leader=True)
        await lab.submit()
        assert await heard.all(lab) == ["plan"]


async def test_the_controller_is_not_asked_below_the_depth_that_it_planned_for(lab: Lab):
    await lab.submit()
    await lab.lead()
    await lab.store.look(leader=True)
    await lab.store.planned(lab.token, 0, [(RED, 4)])
    async with lab.listening(lab.store.keys.ctl) as heard:
        for _ in range(2):
            await lab.submit()
        assert await heard.all(lab) == []
        await lab.submit()
        assert await heard.all(lab) == ["plan"]


async def test_a_slot_that_falls_idle_asks_the_controller_while_slots_are_held(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.next(agent, slot)
        assert await heard.all(lab) == []
        await lab.store.planned(lab.token, 2, [])
        await lab.next(agent, slot)
        assert await heard.all(lab) == ["plan"]


async def test_a_task_that_runs_much_longer_than_its_shape_asks_the_controller(lab: Lab):
    agent = await lab.agent()
    await lab.submit(3)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot, end(await lab.claim(agent, slot)))
    await lab.store.look(leader=True)
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.started(slot, agent.incarnation, [(claim.task_id, claim.attempt, 0.02)])
        assert await heard.all(lab) == []
        await lab.store.started(slot, agent.incarnation, [(claim.task_id, claim.attempt, 2.0)])
        assert await heard.all(lab) == ["plan"]
    assert (await lab.store.look(leader=False)).queues[0].run_s is None


async def test_an_unregistered_agent_is_fenced(lab: Lab):
    stranger = Agent("n1")
    assert await lab.store.beat("n1", stranger.incarnation, []) == BeatReply(holds=False)
