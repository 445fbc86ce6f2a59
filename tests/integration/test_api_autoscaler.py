"""What the API shows of the autoscaler: its groups, and its journal page by page."""

import msgspec
import pytest

from manager.core.answers_autoscaler import DecisionNote, ScalingGroup
from manager.settings import AutoscalerSettings, GroupSettings, Settings
from tests.integration.api_world import World, serving

pytestmark = pytest.mark.integration


@pytest.fixture
async def world(store_server):
    groups = {"g": GroupSettings(devices="8:mi300x", workers_max=3)}
    settings = Settings(groups=groups, autoscaler=AutoscalerSettings(mode="active"))
    async with serving(store_server.url, settings) as world:
        yield world


async def decide(world: World, *needs: int) -> None:
    _, token, beat, _ = await world.store.lead("", 0, 0, "read", "autoscaler")
    _, token, _, _ = await world.store.lead("me", token, beat, "take", "autoscaler")
    for need in needs:
        group = ScalingGroup(group="g", need=need, size=0, target=need, reason="NeedAboveSize")
        note = DecisionNote(mode="active", metrics="", groups=(group,), actions=())
        assert await world.store.write_journal(token, msgspec.json.encode(note), 100)


async def test_before_any_decision_there_is_none(world: World) -> None:
    shown = (await world.client("reader").get("/v1/autoscaler")).json()
    assert shown["mode"] == "active"
    assert [(group["name"], group["workers_max"]) for group in shown["groups"]] == [("g", 3)]
    assert shown["last"] is None
    assert (await world.client("reader").get("/v1/autoscaler/decisions")).json() == {"decisions": [], "next_cursor": None}


async def test_decisions_come_newest_first_and_page_by_page(world: World) -> None:
    await decide(world, 1, 2, 3, 4, 5)
    client = world.client("reader")
    needs, query = [], "?limit=2"
    for _ in range(3):
        page = (await client.get(f"/v1/autoscaler/decisions{query}")).json()
        needs.append([decision["groups"][0]["need"] for decision in page["decisions"]])
        query = f"?limit=2&before={page['next_cursor']}"
    assert needs == [[5, 4], [3, 2], [1]]
    assert page["next_cursor"] is None
    assert (await client.get("/v1/autoscaler")).json()["last"]["groups"][0]["need"] == 5


@pytest.mark.parametrize("query", ["before=x", "before=%2B", "before=1-2-3", "limit=0", "limit=501", "cursor=1-1"])
async def test_what_is_no_page_is_refused(world: World, query: str) -> None:
    answer = await world.client("reader").get(f"/v1/autoscaler/decisions?{query}")
    assert answer.status_code == 400


async def test_what_only_a_groups_node_could_hold_is_accepted(world: World) -> None:
    client = world.client("user")
    body = {"function": "echo", "args": {"x": 1}, "resources": {"memory": "190GiB", "gpus": 8}}
    assert (await client.post("/v1/tasks", json=body)).status_code == 202
    answer = await client.post("/v1/tasks", json={**body, "resources": {"memory": "200GiB"}})
    assert answer.json()["code"] == "Infeasible"
    assert "a node of group g" in answer.json()["detail"]
