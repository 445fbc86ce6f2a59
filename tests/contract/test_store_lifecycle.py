"""Cordons, removals, registrations, direct slots, and what is kept warm or unloaded: who may say so, and what follows."""

import msgspec
import pytest

from manager.core.errors import RegistrationRefused
from manager.core.lifecycle import Cordon, SlotFlag, SlotKind, SlotStatus, TaskStatus
from manager.core.model import NodeInfo, NodeRow
from manager.core.quantities import GIB
from tests.contract.store_harness import INFO, RED, RED_SHAPE, Agent, Lab, dump, granted, info


async def node(lab: Lab, name: str = "n1") -> NodeRow:
    return next(row for row in (await lab.store.look(leader=False)).nodes if row.node == name)


async def cordon(lab: Lab, mode: Cordon = Cordon.CORDON, by: str = "operator", **more) -> str:
    return await lab.store.cordon("n1", mode, by, **more)


async def autoscale(lab: Lab) -> int:
    """The token of a new leader among autoscalers."""
    _, token, beat, _ = await lab.store.lead("", 0, 0, "read", "autoscaler")
    done, token, *_ = await lab.store.lead(f"scaler-{token}", token, beat, "take", "autoscaler")
    assert done
    return token


async def registers(lab: Lab, agent: Agent, said: NodeInfo) -> bool:
    try:
        return await lab.store.register(agent.node, agent.incarnation, said)
    except RegistrationRefused:
        return False


# --- cordons ------------------------------------------------------------------------------------------------------


async def test_a_cordoned_node_opens_nothing_new_and_what_is_open_goes_on(lab: Lab):
    agent = await lab.agent()
    task = await lab.one()
    slot, on_its_way = await lab.open(agent), await lab.request()
    await lab.claim(agent, slot)
    assert await cordon(lab) == "OK"
    assert (await lab.store.open_slot(on_its_way, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED"
    assert (await lab.store.open_slot(on_its_way, agent.incarnation, granted("n1", "gpu-0"))).word == "REFUSED"
    assert await lab.store.open_direct("d", agent.incarnation, granted("n1", "gpu-0")) == "CORDONED"
    (row,) = (await lab.store.look(leader=False)).slots
    assert (row.slot_id, row.status, row.flag) == (slot, SlotStatus.OPEN, SlotFlag.NONE)
    assert (await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))).word == "ADOPTED"
    assert await lab.status(task) is TaskStatus.RUNNING


async def test_work_that_waits_for_a_slot_refused_by_a_cordon_asks_for_another(lab: Lab):
    agent = await lab.agent()
    slot = await lab.request()
    await lab.submit()
    await lab.store.look(leader=True)  # takes note of what has asked for a plan so far
    await cordon(lab)
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.open_slot(slot, agent.incarnation, granted("n1", "gpu-0"))
        assert await heard.all(lab) == ["plan"], "nobody asks for a slot elsewhere"


async def test_a_lifted_cordon_lets_slots_open_at_once(lab: Lab):
    agent = await lab.agent()
    await cordon(lab, Cordon.DRAIN, deadline_s=60, remove=True)
    assert await cordon(lab, Cordon.NONE) == "OK"
    row = await node(lab)
    assert (row.cordon, row.cordon_by, row.cordon_ms, row.deadline_ms, row.remove) == (Cordon.NONE, "", None, None, False)
    assert await lab.open(agent)
    assert (await lab.store.beat("n1", agent.incarnation, [])).cordoned is False


async def test_who_cordoned_when_and_until_when_is_told(lab: Lab):
    await lab.agent()
    before = (await lab.store.look(leader=False)).now_ms
    await cordon(lab, Cordon.DRAIN, deadline_s=60, remove=True)
    row = await node(lab)
    assert (row.cordon, row.cordon_by, row.remove) == (Cordon.DRAIN, "operator", True)
    assert before <= row.cordon_ms <= before + 5000
    assert row.deadline_ms == row.cordon_ms + 60_000
    await cordon(lab, Cordon.DRAIN)
    assert ((await node(lab)).deadline_ms, (await node(lab)).remove) == (None, False)


async def test_the_agent_and_the_leader_hear_of_a_cordon_at_once(lab: Lab):
    await lab.agent()
    async with lab.listening(lab.store.keys.ctl, lab.store.keys.wake("n1")) as heard:
        await cordon(lab)
        assert sorted(await heard.all(lab)) == ["node", "plan"]


async def test_only_a_node_that_is_there_is_cordoned(lab: Lab):
    agent, token = await lab.agent(), await autoscale(lab)
    await lab.store.leave("n1", agent.incarnation)
    before = await dump(lab.store)
    assert await lab.store.cordon("nobody", Cordon.CORDON, "operator") == "NONE"
    assert await cordon(lab, by="autoscaler", token=token) == "NONE"
    assert await dump(lab.store) == before


async def test_an_operator_may_lift_the_cordon_of_a_node_that_is_stopped(lab: Lab):
    agent = await lab.agent()
    await cordon(lab)
    await lab.store.leave("n1", agent.incarnation)
    assert await cordon(lab, Cordon.NONE) == "OK"
    new = await lab.agent()
    assert (await lab.store.beat("n1", new.incarnation, [])).cordoned is False


async def test_an_operators_cordon_is_touched_by_operators_only(lab: Lab):
    agent, token = await lab.agent(), await autoscale(lab)
    await cordon(lab, Cordon.CORDON)
    for mode in (Cordon.DRAIN, Cordon.NONE):
        assert await cordon(lab, mode, "autoscaler", token=token) == "KEPT", "the autoscaler changed an operator's cordon"
        assert await cordon(lab, mode, "agent", incarnation=agent.incarnation) == "KEPT"
    assert ((await node(lab)).cordon, (await node(lab)).cordon_by) == (Cordon.CORDON, "operator")


async def test_the_autoscaler_lifts_its_own_and_an_operator_lifts_anybodys(lab: Lab):
    agent, token = await lab.agent(), await autoscale(lab)
    assert await cordon(lab, Cordon.DRAIN, "autoscaler", token=token, remove=True) == "OK"
    assert await cordon(lab, Cordon.DRAIN, "agent", incarnation=agent.incarnation) == "KEPT", "two who drain one node"
    assert await cordon(lab, Cordon.NONE, "autoscaler", token=token) == "OK"
    assert await cordon(lab, Cordon.DRAIN, "agent", incarnation=agent.incarnation) == "OK"
    assert await cordon(lab, Cordon.NONE, "autoscaler", token=token) == "KEPT"
    assert await cordon(lab, Cordon.NONE) == "OK"
    assert (await node(lab)).cordon is Cordon.NONE


async def test_an_autoscaler_that_does_not_lead_cordons_nothing(lab: Lab):
    await lab.agent()
    old = await autoscale(lab)
    await autoscale(lab)
    await lab.lead()
    before = await dump(lab.store)
    for token in (old, 0, old + 7):
        assert await cordon(lab, Cordon.DRAIN, "autoscaler", token=token) == "STALE", "an old autoscaler cordoned a node"
    assert await dump(lab.store) == before


async def test_an_agent_that_was_replaced_cordons_nothing(lab: Lab):
    old = await lab.agent()
    await lab.agent()
    assert await cordon(lab, Cordon.DRAIN, "agent", incarnation=old.incarnation) == "STALE"
    assert (await node(lab)).cordon is Cordon.NONE, "an agent of before cordoned its successor"


@pytest.mark.parametrize(
    ("by", "after"),
    [
        pytest.param("operator", Cordon.DRAIN, id="an operator's is about the node"),
        pytest.param("autoscaler", Cordon.NONE, id="the autoscaler's was about a removal: it decides anew"),
        pytest.param("agent", Cordon.NONE, id="an agent's was about itself"),
    ],
)
async def test_which_cordons_outlive_a_restart_of_the_agent(lab: Lab, by: str, after: Cordon):
    agent, token = await lab.agent(), await autoscale(lab)
    proof = {"autoscaler": {"token": token}, "agent": {"incarnation": agent.incarnation}}.get(by, {})
    assert await cordon(lab, Cordon.DRAIN, by, **proof) == "OK"
    assert await lab.store.register("n1", agent.incarnation, INFO)
    assert (await node(lab)).cordon is Cordon.DRAIN, "the same incarnation registered again, and its cordon is gone"
    new = await lab.agent()
    assert (await node(lab)).cordon is after
    assert (await lab.store.beat("n1", new.incarnation, [])).cordoned is (after is not Cordon.NONE)


@pytest.mark.parametrize("how", ["left", "lost"])
async def test_a_node_that_was_removed_may_come_again(lab: Lab, how: str):
    agent = await lab.agent()
    await lab.lead()
    await cordon(lab, Cordon.DRAIN, remove=True)
    if how == "left":
        await lab.store.leave("n1", agent.incarnation)
    else:
        await lab.store.lost(lab.token, "n1", agent.incarnation)
    new = await lab.agent()
    reply = await lab.store.beat("n1", new.incarnation, [])
    assert (reply.holds, reply.cordoned, reply.leave) == (True, False, False), "a removal took place twice"


async def test_a_removed_node_leaves_when_its_last_slot_has_ended(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await cordon(lab, Cordon.DRAIN, remove=True)
    reply = await lab.store.beat("n1", agent.incarnation, [(slot, False)])
    assert (reply.cordoned, reply.leave, reply.words) == (True, False, ()), "it is to leave before its slots have ended"
    await lab.store.flag(lab.token, SlotFlag.DRAIN, [slot])
    assert (await lab.next(agent, slot)).word == "DRAIN"
    await lab.store.close_slot(slot, agent.incarnation, "Drain")
    reply = await lab.store.beat("n1", agent.incarnation, [])
    assert (reply.cordoned, reply.leave) == (True, True)


async def test_a_drained_node_that_is_not_to_be_removed_stays(lab: Lab):
    agent = await lab.agent()
    await cordon(lab, Cordon.DRAIN)
    reply = await lab.store.beat("n1", agent.incarnation, [])
    assert (reply.cordoned, reply.leave) == (True, False)


# --- registrations ------------------------------------------------------------------------------------------------


async def test_one_device_is_in_the_inventory_of_one_living_node(lab: Lab):
    first = await lab.agent("n1", "gpu-a", "gpu-b", machine="m")
    second = Agent("n2")
    before = await dump(lab.store)
    with pytest.raises(RegistrationRefused, match="gpu-b of this machine is held by node n1"):
        await lab.store.register("n2", second.incarnation, info("gpu-b", "gpu-c", machine="m"))
    after = await dump(lab.store)
    refused = after.hashes.pop("refused")
    assert after == before, "a refused registration had an effect"
    assert list(refused) == ["n2"]
    (refusal,) = (await lab.store.look(leader=False)).refused
    assert (refusal.node, "gpu-b" in refusal.problem) == ("n2", True)
    assert (await lab.store.beat("n1", first.incarnation, [])).holds
    assert not (await lab.store.beat("n2", second.incarnation, [])).holds, "a refused agent beats"


@pytest.mark.parametrize("end", ["left", "lost"])
async def test_one_name_lives_on_one_machine(lab: Lab, end: str):
    first = await lab.agent("n1", "gpu-a", machine="m")
    await lab.lead()
    other = Agent("n1")
    with pytest.raises(RegistrationRefused, match="a node of this name lives on another machine"):
        await lab.store.register("n1", other.incarnation, info("gpu-b", machine="another"))
    assert (await lab.store.beat("n1", first.incarnation, [])).holds, "an agent was replaced from another machine"
    again = await lab.agent("n1", "gpu-a", machine="m")
    assert not (await lab.store.beat("n1", first.incarnation, [])).holds, "on its own machine an agent may start anew"
    if end == "left":
        await lab.store.leave("n1", again.incarnation)
    else:
        await lab.store.lost(lab.token, "n1", again.incarnation)
    assert await registers(lab, other, info("gpu-b", machine="another"))


@pytest.mark.parametrize("how", ["left", "lost", "changed", "moved"])
async def test_a_device_is_free_again_when_its_node_has_it_no_longer(lab: Lab, how: str):
    first = await lab.agent("n1", "gpu-a", machine="m")
    await lab.lead()
    second = Agent("n2")
    with pytest.raises(RegistrationRefused):
        await lab.store.register("n2", second.incarnation, info("gpu-a", machine="m"))
    match how:
        case "left":
            await lab.store.leave("n1", first.incarnation)
        case "lost":
            await lab.store.lost(lab.token, "n1", first.incarnation)
        case "changed":
            assert await lab.store.register("n1", first.incarnation, info("gpu-b", machine="m"))
        case "moved":
            assert (await lab.store.lost(lab.token, "n1", first.incarnation))[0]
            await lab.agent("n1", "gpu-a", machine="another")
    assert await registers(lab, second, info("gpu-a", machine="m")), "a device stays held by a node that has it no longer"
    assert (await lab.store.look(leader=False)).refused == (), "a problem that is solved is still told"


async def test_the_same_name_on_another_machine_is_another_device(lab: Lab):
    await lab.agent("n1", "gpu-a", machine="m")
    await lab.agent("n2", "gpu-a", machine="other")
    await lab.agent("n1", "gpu-a", machine="m")  # its agent is started anew


async def test_without_a_machine_the_hostname_stands_for_it(lab: Lab):
    await lab.agent("n1", "gpu-a")
    with pytest.raises(RegistrationRefused):
        await lab.agent("n2", "gpu-a")
    elsewhere = msgspec.structs.replace(info("gpu-a"), hostname="elsewhere")
    assert await lab.store.register("n2", Agent("n2").incarnation, elsewhere)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        pytest.param(info("gpu-a", "gpu-a"), "two devices are called gpu-a", id="twice"),
        pytest.param(info("gpu-a", ""), "a device has no uuid", id="nameless"),
        pytest.param(info("gpu-a", memory_bytes=0), "gpu-a has 0 bytes of memory", id="no memory"),
        pytest.param(info("gpu-a", memory_bytes=-5), "gpu-a has -5 bytes of memory", id="less than none"),
    ],
)
async def test_an_inventory_that_cannot_be_right_is_refused(lab: Lab, said, problem: str):
    with pytest.raises(RegistrationRefused, match=problem):
        await lab.store.register("n1", Agent("n1").incarnation, said)
    assert (await lab.store.look(leader=False)).nodes == ()


async def test_a_sweep_forgets_refusals_and_the_devices_of_nodes_that_are_gone(lab: Lab):
    agent = await lab.agent("n1", "gpu-a", machine="m")
    await lab.lead()
    with pytest.raises(RegistrationRefused):
        await lab.agent("n2", "gpu-a", machine="m")
    await lab.store.leave("n1", agent.incarnation)
    await lab.store.sweep(lab.token, 0, 10, 0)
    found = await dump(lab.store)
    assert (set(found.hashes["refused"]), set(found.hashes["dv:m"])) == ({"n2"}, {"gpu-a"}), "too early"
    later = (await lab.store.look(leader=False)).now_ms + 1
    await lab.store.sweep(lab.token, 0, 10, later)
    found = await dump(lab.store)
    assert not {key for key in found.hashes if key.startswith(("refused", "dv:", "n:"))}


async def test_a_new_incarnation_has_no_dask_worker_until_one_reports(lab: Lab):
    await lab.agent()
    await lab.store.put_heartbeat("n1", "tcp://1", ())
    assert (await node(lab)).address == "tcp://1"
    await lab.agent()
    row = await node(lab)
    assert row.address == ""
    assert row.registered_ms is not None
    await lab.store.put_heartbeat("n1", "tcp://2", ())
    assert (await node(lab)).address == "tcp://2"


# --- direct slots -------------------------------------------------------------------------------------------------


async def test_a_direct_slot_opens_once_and_claims_nothing(lab: Lab):
    agent, other = await lab.agent(), await lab.agent("n2")
    await lab.submit()
    both = granted("n1", "gpu-0", "gpu-1", memory_bytes=3 * GIB)
    for word in ("OK", "ADOPTED"):
        assert await lab.store.open_direct("d", agent.incarnation, both) == word
    assert await lab.store.open_direct("d", other.incarnation, granted("n2", "gpu-0")) == "REFUSED", "it was opened twice"
    assert await lab.store.open_direct("e", "a-stranger", granted("n1", "gpu-0")) == "FENCED"
    (row,) = (await lab.store.look(leader=False)).slots
    assert (row.kind, row.status, row.node, row.shape_id) == (SlotKind.DIRECT, SlotStatus.OPEN, "n1", "")
    assert (row.devices, row.memory_bytes, row.running) == (("gpu-0", "gpu-1"), 3 * GIB, 0)
    reply = await lab.store.beat("n1", agent.incarnation, [("d", False)])
    assert reply.words == ()
    await lab.store.close_slot("d", agent.incarnation, "done")
    assert await lab.store.open_direct("d", agent.incarnation, granted("n1", "gpu-0")) == "REFUSED", "an id was opened again"
    assert (await lab.store.look(leader=False)).slots == ()


async def test_a_direct_slot_ends_with_its_agent_and_by_the_leaders_word(lab: Lab):
    agent = await lab.agent()
    await lab.lead()
    for slot in ("d1", "d2", "d3"):
        assert await lab.store.open_direct(slot, agent.incarnation, granted("n1", "gpu-0")) == "OK"
    await lab.store.flag(lab.token, SlotFlag.PREEMPT, ["d1"])
    await lab.store.fence(lab.token, "Test", ["d2"])
    words = (await lab.store.beat("n1", agent.incarnation, [(d, False) for d in ("d1", "d2", "d3")])).words
    assert set(words) == {("d1", "preempt"), ("d2", "fenced")}
    await lab.agent()
    assert (await lab.store.look(leader=False)).slots == ()


# --- warm and unload ----------------------------------------------------------------------------------------------


async def test_a_warm_shape_is_known_without_work_until_its_time_is_over(lab: Lab):
    await lab.lead()
    await lab.store.warm(RED, RED_SHAPE, 3, 60)
    (queue,) = (await lab.store.look(leader=True)).queues
    assert (queue.shape_id, queue.shape, queue.depth, queue.warm, queue.head) == (RED, RED_SHAPE, 0, 3, None)
    await lab.store.warm(RED, RED_SHAPE, 1, 60)
    assert (await lab.store.look(leader=True)).queues[0].warm == 1
    await lab.store.warm(RED, RED_SHAPE, 3, 0)
    (queue,) = (await lab.store.look(leader=False)).queues
    assert queue.warm == 0, "it is kept warm for longer than was asked"
    assert (await lab.store.look(leader=True)).queues == (), "a shape without anything is still planned with"


async def test_warming_asks_for_a_plan(lab: Lab):
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.warm(RED, RED_SHAPE, 1, 60)
        assert await heard.all(lab) == ["plan"]


async def test_unloading_marks_the_shape_and_keeps_none_warm(lab: Lab):
    agent = await lab.agent()
    slot = await lab.open(agent)
    await lab.store.warm(RED, RED_SHAPE, 3, 60)
    await lab.next(agent, slot)
    before = (await lab.store.look(leader=False)).slots[0].idle_ms
    async with lab.listening(lab.store.keys.ctl) as heard:
        await lab.store.unload([RED, "unheard-of"])
        assert await heard.all(lab) == ["plan"]
    (queue,) = (await lab.store.look(leader=True)).queues
    assert queue.warm == 0
    assert queue.unload_ms >= before
    assert "sh:unheard-of" not in (await dump(lab.store)).hashes, "a shape that nobody knows was made"
    await lab.store.close_slot(slot, agent.incarnation, "Unloaded")
    assert (await lab.store.look(leader=True)).queues == ()
    await lab.open(agent)
    assert (await lab.store.look(leader=False)).queues[0].unload_ms is None, "the next slots are unloaded as well"


# --- the autoscaler's own ---------------------------------------------------------------------------------------------


async def test_each_role_has_a_leader_of_its_own(lab: Lab):
    controller = await lab.lead()
    assert await lab.store.lead("s", 0, 0, "take", "autoscaler") == (True, 1, 0, "s")
    assert await lab.store.lead("s", 1, 0, "renew", "autoscaler") == (True, 1, 1, "s")
    assert await lab.store.lead("", 0, 0, "read") == (False, controller, 0, "holder-1")
    assert await lab.store.lead("s", 1, 0, "resign", "autoscaler") == (True, 1, 1, "")
    await lab.lead()
    assert (await lab.store.lead("", 0, 0, "read", "autoscaler"))[1] == 1


async def test_only_the_leading_autoscaler_writes_the_journal(lab: Lab):
    old = await autoscale(lab)
    token = await autoscale(lab)
    await lab.lead()
    assert not await lab.store.write_journal(old, b"{}", 10), "an old autoscaler wrote into the journal"
    assert await lab.store.journal(10) == []
    for number in range(3):
        assert await lab.store.write_journal(token, b"%d" % number, 10)
    first = await lab.store.journal(2)
    assert [blob for _, blob in first] == [b"2", b"1"]
    assert [blob for _, blob in await lab.store.journal(5, before=first[-1][0])] == [b"0"]


async def test_the_journal_is_bounded(lab: Lab):
    token = await autoscale(lab)
    for _ in range(450):
        await lab.store.write_journal(token, b"{}", 50)
    assert 50 <= len(await lab.store.journal(1000)) <= 200  # streams are cut by whole pages of a hundred


async def test_a_new_leader_has_not_reached_dask_until_it_says_so(lab: Lab):
    await lab.lead()
    assert (await lab.store.look(leader=False)).dask is None
    await lab.store.reached(lab.token, dask=True)
    first = await lab.store.look(leader=False)
    await lab.store.reached(lab.token, dask=True)
    again = await lab.store.look(leader=False)
    assert (first.dask, again.dask_ms) == (True, first.dask_ms), "since when it is so was forgotten"
    await lab.store.reached(lab.token, dask=False)
    assert (await lab.store.look(leader=False)).dask is False
    await lab.lead()
    assert (await lab.store.look(leader=False)).dask is None
