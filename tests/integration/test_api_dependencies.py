"""Tasks that come after others, the attempts at a task, and its log while it is written, over real HTTP."""

import asyncio

import msgspec
import pytest

from manager.core.answers_tasks import AttemptList, TaskLog
from manager.core.lifecycle import Outcome, TaskStatus
from manager.core.model import ProgressNote
from manager.core.requests import LINKS_MAX
from tests.integration.api_world import NODE, World, serving, until

pytestmark = pytest.mark.integration
ECHO = {"function": "echo", "args": {"x": 1}}


async def show(world: World, task_id: str, more: str = "") -> dict[str, object]:
    reply = await world.client().get(f"/v1/tasks/{task_id}{more}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_a_task_waits_for_those_it_comes_after_and_explain_names_them(world: World):
    first, second = await world.submit(), await world.submit()
    reply = await world.client().post("/v1/tasks", json=ECHO | {"after": [first, second, first]})
    child = reply.json()["task_id"]
    assert reply.json()["status"] == "BLOCKED"
    task = await show(world, child)
    assert (task["status"], task["after"], task["waits"], task["queued_at"]) == ("BLOCKED", [first, second], 2, None)
    await world.store.cancel(second, "alpha")
    said = await show(world, child, "?wait=10s")
    assert (said["status"], said["error"]["type"]) == ("FAILED", "DependencyFailed")  # type: ignore[index]
    assert second in said["error"]["message"]  # type: ignore[index]

    patient = await world.submit(after=[first, second], after_failed="run")
    said = await show(world, patient, "/explain")
    assert said["reason"] == "WaitingForDependencies"
    assert f"1 of the 2 that it comes after: {first} (QUEUED)" in str(said["message"])
    assert said["unblocks"] == [{"what": f"{first} ends"}]
    waiting = asyncio.create_task(world.client().get(f"/v1/tasks/{patient}?wait=20s"))
    await world.agent.run_all()
    assert (await waiting).json()["status"] == "SUCCEEDED"
    assert (await show(world, patient))["waits"] == 0


async def test_in_a_batch_a_number_is_the_task_before(world: World):
    body = {"tasks": [ECHO, ECHO | {"after": [0]}, ECHO | {"after": [1, 0]}]}
    ids = [one["task_id"] for one in (await world.client().post("/v1/tasks/batch", json=body)).json()["tasks"]]
    assert (await show(world, ids[2]))["after"] == [ids[1], ids[0]]
    assert [(await show(world, task_id))["status"] for task_id in ids] == ["QUEUED", "BLOCKED", "BLOCKED"]
    assert await world.agent.run_all() == ids


async def test_what_names_no_earlier_task_is_refused_with_its_place(world: World):
    other = await world.submit(who="other")
    unknown = "0" * 25 + "7"
    for after, status, code, words in (
        ([unknown], 422, "UnknownDependency", unknown),
        ([other], 422, "UnknownDependency", other),
        (["x"], 422, "UnknownDependency", "after[0]"),
        ([0], 400, "BadRequest", "after[0]: a number names a task of the same batch"),
        ([True], 400, "BadRequest", "after[0]"),
        ([unknown] * 101, 400, "BadRequest", "100"),
    ):
        refused = await world.client().post("/v1/tasks", json=ECHO | {"after": after})
        assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
        assert words in refused.json()["detail"]
    for number, words in ((1, "0 to 0"), (2, "0 to 0"), (-1, "0 to 0")):
        body = {"tasks": [ECHO, ECHO | {"after": [number]}]}
        refused = await world.client().post("/v1/tasks/batch", json=body)
        assert (refused.status_code, refused.json()["field"]) == (400, "tasks[1].after[0]"), refused.text
        assert words in refused.json()["detail"]
    assert (await world.client().get("/v1/tasks")).json()["tasks"] == []


async def test_a_request_has_a_bounded_number_of_links(world: World):
    """The store writes each of them: 10,000 tasks after 100 others would be a million."""
    parents = [(await world.client().post("/v1/tasks", json=ECHO)).json()["task_id"] for _ in range(3)]
    most = LINKS_MAX // len(parents)
    for body, path, field in (
        (ECHO | {"count": most + 1, "after": parents}, "", "after"),
        ({"tasks": [ECHO] * 101 + [ECHO | {"after": list(range(100))}] * 201}, "/batch", "tasks"),
    ):
        refused = await world.client().post(f"/v1/tasks{path}", json=body)
        assert (refused.status_code, refused.json()["field"]) == (400, field), refused.text
        for words in (f"at most {LINKS_MAX:,}", "one task that comes after those others"):
            assert words in refused.json()["detail"]
    # The same parent twice is one link.
    taken = await world.client().post("/v1/tasks", json=ECHO | {"count": most, "after": parents * 2})
    assert (taken.status_code, taken.json()["count"]) == (202, most), taken.text
    assert (await world.client().post(f"/v1/arrays/{taken.json()['task_id']}/cancel")).json()["cancelled"] == most


async def test_each_attempt_says_where_it_was_and_why_it_ended(world: World):
    task_id = await world.submit(max_attempts=3)
    path = f"/v1/tasks/{task_id}/attempts"
    assert (await world.client().get(path)).json() == {"task_id": task_id, "attempts": []}
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    (running,) = msgspec.json.decode((await world.client().get(path)).content, type=AttemptList).attempts
    assert (running.number, running.node, running.slot, running.why, running.ended_at) == (1, NODE, slot, "", None)
    assert running.claimed_at is not None
    await world.agent.finish(slot, claim, b'{"type":"OSError","message":"busy"}', Outcome.FAILED)
    said = (await world.client().get(f"/v1/tasks/{task_id}/explain")).json()
    assert (said["reason"], said["message"].split(".")[0]) == (
        "RetryWait",
        "Failure 1 of the 3 that it may have: OSError: busy",
    )
    assert said["unblocks"][0]["in_s"] >= 0
    async with asyncio.timeout(15):
        while not (claims := await world.agent.claim(slot)):
            await world.store.due()
            await asyncio.sleep(0.02)
    await world.agent.finish(slot, claims[0])
    found = msgspec.json.decode((await world.client().get(path)).content, type=AttemptList).attempts
    assert [(one.number, one.node, one.why, one.message) for one in found] == [
        (1, NODE, "OSError", "busy"),
        (2, NODE, "Succeeded", ""),
    ]
    assert all(one.started_at and one.ended_at and one.started_at <= one.ended_at for one in found)
    assert (await world.client("other").get(path)).status_code == 404


async def test_progress_is_shown_until_the_task_has_succeeded(world: World):
    task_id = await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    note = ProgressNote(task_id, claim.attempt, 0.25, "epoch 1", "/data/one")
    assert await world.store.progress(slot, world.agent.incarnation, [note]) == 1
    task = await show(world, task_id)
    assert (task["progress"], task["progress_message"], task["checkpoint"]) == (0.25, "epoch 1", "/data/one")
    assert (await world.client().get("/v1/tasks")).json()["tasks"][0]["progress"] == 0.25
    await world.agent.finish(slot, claim)
    remembered = await show(world, task_id, "?wait=5")
    async with serving(world.server.api.settings.store.url.value, keys=world.keys) as other:
        read = await show(other, task_id)
    about = dict.fromkeys(("created_at", "queued_at"))  # a clock of the API's own, within milliseconds
    assert read | about == remembered | about
    assert (remembered["progress"], remembered["checkpoint"]) == (None, "")


async def follow(world: World, task_id: str, more: str = "", wait: str = "20s") -> TaskLog:
    reply = await world.client().get(f"/v1/tasks/{task_id}/logs?wait={wait}{more}")
    assert reply.status_code == 200, reply.text
    return msgspec.json.decode(reply.content, type=TaskLog)


async def test_a_log_is_followed_from_where_it_was_read(world: World):
    task_id = await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    waiting = asyncio.create_task(follow(world, task_id))
    (claim,) = await world.agent.claim(slot)
    keep = world.store.keep_log
    await keep(task_id, claim.attempt, b"one\n", b"", 0)
    first = await waiting
    assert (first.stdout, first.stderr, first.attempt, first.ended) == ("one\n", "", 1, False)
    waiting = asyncio.create_task(follow(world, task_id, f"&cursor={first.cursor}"))
    await keep(task_id, claim.attempt, b"one\ntwo " + "é".encode()[:1], b"!", 0)  # half of a character stays for later
    second = await waiting
    assert (second.stdout, second.stderr) == ("two ", "!")
    # The kept end has moved on over what nobody had read: that is said.
    await keep(task_id, claim.attempt, b"end\n", b"!", 20, 0)
    third = await follow(world, task_id, f"&cursor={second.cursor}")
    assert (third.stdout, third.stderr, third.dropped_bytes) == ("end\n", "", 12)
    quiet = await follow(world, task_id, f"&cursor={third.cursor}", "0.05")
    assert (quiet.stdout, quiet.stderr, quiet.ended, quiet.cursor) == ("", "", False, third.cursor)
    waiting = asyncio.create_task(follow(world, task_id, f"&cursor={third.cursor}"))
    await world.agent.finish(slot, claim)
    last = await waiting
    assert (last.stdout, last.ended) == ("", True)
    for wrong in ("x", "1.2", "-1.0.0", "1.2.3.4"):
        refused = await world.client().get(f"/v1/tasks/{task_id}/logs?cursor={wrong}")
        assert (refused.status_code, refused.json()["field"]) == (400, "cursor")


async def test_many_followers_of_one_log_ask_the_store_together(world: World, monkeypatch):
    task_id = await world.submit()
    slot = await world.agent.open(await world.agent.shape_of_first_queue())
    (claim,) = await world.agent.claim(slot)
    store, asked = world.server.api.store, 0
    really = store.log_extent

    async def counted(task: str) -> tuple[int, int, int]:
        nonlocal asked
        asked += 1
        return await really(task)

    monkeypatch.setattr(store, "log_extent", counted)
    waiting = [asyncio.create_task(follow(world, task_id)) for _ in range(50)]
    await until(lambda: asked >= 3)
    assert asked <= 5
    await world.store.keep_log(task_id, claim.attempt, b"x", b"", 0)
    assert {(one.stdout, one.ended) for one in await asyncio.gather(*waiting)} == {("x", False)}
    seen = asked
    assert (await follow(world, task_id, "&cursor=1.1.0", "0.01")).stdout == ""
    assert asked <= seen + 2
    assert await world.status_of(task_id) is TaskStatus.RUNNING
