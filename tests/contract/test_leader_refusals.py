"""What the leader does for tasks that ran out of device memory, and what it keeps of each tenant."""

import msgspec
import pytest

from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import NodeRow
from manager.core.quantities import GIB
from manager.leader_refusals import LeaderRefusals
from manager.leader_shares import LeaderShares, retention_of
from manager.settings import AutoscalerSettings, GroupSettings, NodeSettings, Settings, TaskSettings, TenantSettings
from manager.store.calls_leader import Retention
from tests.contract.store_harness import Agent, Lab, check_invariants, end, submission

NODE = NodeSettings(reserve_bytes=0)
LARGE_GROUP = {"large": GroupSettings(devices="1:192GiB", workload="", workers_max=1)}


async def out_of_memory(lab: Lab, agent: Agent, memory_gib: int) -> str:
    """A task that waits for so much since it ran out of what it had."""
    task_id = await lab.one()
    larger = submission(memory_gib=memory_gib)
    slot = await lab.open(agent)
    claim = await lab.claim(agent, slot)
    await lab.next(agent, slot, 0, end(claim, Outcome.OUT_OF_MEMORY, room=(larger.shape_id, larger.shape)))
    await lab.store.close_slot(slot, agent.incarnation, "Idle")
    return task_id


@pytest.mark.parametrize(
    ("memory_gib", "settings", "status"),
    [
        pytest.param(16, Settings(node=NODE), TaskStatus.QUEUED, id="a node that is there could"),
        pytest.param(100, Settings(node=NODE), TaskStatus.FAILED, id="nothing could"),
        pytest.param(100, Settings(node=NODE, groups=LARGE_GROUP), TaskStatus.QUEUED, id="a node that could be added could"),
        pytest.param(
            100,
            Settings(node=NODE, groups=LARGE_GROUP, autoscaler=AutoscalerSettings(mode="off")),
            TaskStatus.FAILED,
            id="nobody adds nodes",
        ),
    ],
)
async def test_what_nothing_could_ever_hold_fails_with_what_it_said(
    lab: Lab, memory_gib: int, settings: Settings, status: TaskStatus
):
    agent = await lab.agent("n1", "gpu-0")  # of 24 GiB
    task_id = await out_of_memory(lab, agent, memory_gib)
    await LeaderRefusals(settings, lab.store).refuse(lab.token, await lab.store.look(leader=True))
    record = await lab.record(task_id)
    assert record.status is status
    if status is TaskStatus.FAILED:
        assert record.error is not None
        assert (record.failures, record.error.message) == (1, "no")
    await check_invariants(lab.store)


async def test_without_nodes_nothing_is_known_and_nothing_fails(lab: Lab):
    agent = await lab.agent("n1", "gpu-0")
    task_id = await out_of_memory(lab, agent, 100)
    await lab.store.leave("n1", agent.incarnation)
    await LeaderRefusals(Settings(node=NODE), lab.store).refuse(lab.token, await lab.store.look(leader=True))
    assert await lab.status(task_id) is TaskStatus.QUEUED


async def test_a_node_that_restarts_is_no_reason_to_give_up_what_only_it_can_hold(lab: Lab):
    large = await lab.agent("n1", "gpu-0")
    await lab.agent("n2", "gpu-1")
    task_id = await out_of_memory(lab, large, 16)
    await lab.store.leave("n1", large.incarnation)
    state = await lab.store.look(leader=True)

    def shrunk(row: NodeRow) -> NodeRow:
        devices = tuple(msgspec.structs.replace(device, memory_bytes=8 * GIB) for device in row.info.devices)
        return msgspec.structs.replace(row, info=msgspec.structs.replace(row.info, devices=devices))

    small = tuple(shrunk(row) if row.node == "n2" else row for row in state.nodes)
    await LeaderRefusals(Settings(node=NODE), lab.store).refuse(lab.token, msgspec.structs.replace(state, nodes=small))
    assert await lab.status(task_id) is TaskStatus.QUEUED
    alone = msgspec.structs.replace(state, nodes=tuple(row for row in small if row.node == "n2"))
    await LeaderRefusals(Settings(node=NODE), lab.store).refuse(lab.token, alone)
    assert await lab.status(task_id) is TaskStatus.FAILED, "the test could not fail"


async def test_what_asked_for_so_much_itself_is_left_alone(lab: Lab):
    await lab.lead()
    await lab.agent("n1", "gpu-0")
    task_id = await lab.one(memory_gib=100)  # with allow_infeasible
    await LeaderRefusals(Settings(node=NODE), lab.store).refuse(lab.token, await lab.store.look(leader=True))
    assert await lab.status(task_id) is TaskStatus.QUEUED


async def test_each_tenants_budget_of_retries_is_told(lab: Lab):
    own = {"blue": TenantSettings(retries_per_minute_max=7), "green": TenantSettings(retries_per_minute_max=0)}
    shares = LeaderShares(Settings(tenants=own), lab.store)
    for tenant in ("red", "blue", "green"):
        await lab.one(tenant=tenant)
    await lab.lead()
    await shares.tell(lab.token, shares.account(await lab.store.look(leader=True), 0.0))
    told = {name: await lab.raw("HGET", lab.store.keys.tenant(name), "retries_max") for name in ("red", "blue", "green")}
    assert told == {"red": b"600", "blue": b"7", "green": b"0"}


def test_retention_is_the_tenants_own_where_it_is_set():
    settings = Settings(
        tasks=TaskSettings(retention_s=100, retained_max=1000),
        tenants={"a": TenantSettings(retention_s=10), "b": TenantSettings(retained_max=5)},
    )
    usual, tenants = retention_of(settings, 1_000_000)
    assert usual == Retention(900_000, 1000)
    assert tenants == {"a": Retention(990_000, 1000), "b": Retention(900_000, 5)}
    general = msgspec.structs.replace(settings, tenant=TenantSettings(retention_s=1, retained_max=2), tenants={})
    assert retention_of(general, 1_000_000) == (Retention(999_000, 2), {})
