"""The route about tenants, over real HTTP and a real store."""

import msgspec
import pytest

from manager.core.answers_tenants import TenantList, TenantView
from manager.settings import Settings, TenantSettings
from tests.integration.api_world import GIB, World, running_store, serving, until_answer

pytestmark = pytest.mark.integration

LIMITED = TenantSettings(gpus_max=4, running_tasks_max=2, memory_bytes_max=9 * GIB, weight=2.5)


@pytest.fixture
async def world():
    with running_store() as server:
        settings = msgspec.structs.replace(Settings(), tenants={"alpha": LIMITED, "silent": LIMITED})
        async with serving(server.url, settings) as world:
            yield world


async def test_admins_see_use_and_limits_and_nobody_else_does(world: World):
    await world.submit(resources={"memory": "3GiB"})
    await world.submit(resources={"memory": "3GiB"})
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    assert (await world.store.next(slot, world.agent.incarnation, 1, ())).claims

    async def listed() -> dict[str, TenantView]:
        reply = await world.client("admin").get("/v1/tenants")
        return {row.tenant: row for row in msgspec.json.decode(reply.content, type=TenantList).tenants}

    rows = await until_answer(listed, lambda found: found["alpha"].tasks_running == 1)
    limits = {
        "active_tasks_max": 100_000,
        "running_tasks_max": 2,
        "gpus_max": 4,
        "memory_bytes_max": 9 * GIB,
        "weight": 2.5,
        "device_seconds": None,
    }
    used = {"tasks_active": 2, "tasks_waiting": 1, "tasks_running": 1, "gpus": 1, "memory_bytes": 3 * GIB}
    nothing = dict.fromkeys(used, 0)
    assert rows["alpha"] == TenantView(tenant="alpha", **used, **limits)
    assert rows["silent"] == TenantView(tenant="silent", **nothing, **limits), "the settings name it"
    assert (await world.client("user").get("/v1/tenants")).status_code == 403
    assert (await world.client("admin").get("/v1/tenants?x=1")).status_code == 400
