"""Screens of explain, plan and replay; and what the commands say of bad files and names, which takes no cluster."""

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from manager.cli.exits import Exit
from manager.cli.main import main
from manager.cli.screens_foresight import explanation_screen, plan_screen, replay_screen
from manager.core.ahead import Setup, ahead_of
from manager.core.foresee import PlanView, ScaleStep, When, Wish, foresee
from manager.core.index import index_of
from manager.core.lifecycle import SlotFlag
from manager.core.model import ClusterState, NodeRow, TenantRow
from manager.core.node_kinds import node_kind
from manager.core.packing import PackGroup
from manager.core.planner import plan
from manager.core.policies import BEST_FIT, POLICIES
from manager.core.quantities import GIB
from manager.core.snapshot import REACHED, Snapshot, decode_snapshot, encode_snapshot, replay, replays, snapshot_of
from manager.core.waiting import Place
from tests.unit import factories as make
from tests.unit.test_explain import explained, hog, hogs, node, queue, record, slot, small

GROUP = PackGroup("big", node_kind("2:192GiB"), 4)
SETUP = Setup(limits=make.LIMITS, policy=BEST_FIT, groups=(GROUP,), drain_target_s=30.0)
EVIL = "n\x1b]0;owned\x07[red]"


def shown(renderable: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_few_nodes_have_a_line_each_and_what_unblocks_is_said() -> None:
    nodes = (node(), node("n2", (8,)))
    text = shown(explanation_screen(explained(small, nodes, slots=(slot(hog),), others=(hogs,), place=Place(0, 3))))
    for words in (
        "QUEUED  InsufficientMemory",
        "the first of its shape, 3 of a higher priority before it",
        "• 1 slot of 60 GiB on n1 ends (about 12.0 s)",
        "n1    InsufficientMemory    12 GiB short",
        "n2    ExceedsLargestDevice",
    ):
        assert words in text, text
    assert max(map(len, text.splitlines())) <= 80


def test_many_nodes_are_a_line_for_each_verdict() -> None:
    nodes = tuple(node(f"n{number:03}") for number in range(200))
    slots = tuple(slot(hog, f"s{row.node}", on=row.node) for row in nodes[:199])
    text = shown(explanation_screen(explained(record(32), nodes, slots=slots, others=(hogs,))))
    rows = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    assert [row[:3] for row in rows] == [["1", "Fits", "n199"], ["199", "InsufficientMemory", "n000"]]
    assert len(text.splitlines()) < 20


def test_what_was_learned_and_what_strangers_wrote() -> None:
    found = explained(small, (node(EVIL),), own=queue(small, learned_bytes=33 * GIB))
    text = shown(explanation_screen(found))
    assert "learned: tasks like it used more" in text
    assert "\x1b" not in text


def test_a_plan_says_where_what_ends_and_what_is_added() -> None:
    state = make.state([], nodes={"a": [64], "b": [64]})
    ahead = ahead_of(state, index_of(state), SETUP)
    found = tuple(foresee([Wish(make.shape(48), 3), Wish(make.shape(100))], ahead, SETUP))
    text = shown(plan_screen(PlanView(When.AFTER_SCALE_UP, found, (ScaleStep("big", "add", 1, "NeedAboveSize"),))), 100)
    for words in (
        "2 of 3 would run at once",
        "Now",
        "AfterScaleUp  WaitingForScaleUp",
        "add 1: NeedAboveSize",
        "Nothing was submitted.",
    ):
        assert words in text, text


# --- snapshots ----------------------------------------------------------------------------------------------------------


def state() -> ClusterState:
    """Two nodes; one full of a shape that ends, one half empty; a large one is held, small ones wait."""
    queues = [make.queue("big", make.shape(60), 1), make.queue("mid", make.shape(24, tenant="u"), 5, run_s=2.0)]
    slots = [
        make.opened("s1", "mid", "a", "d0", idle_s=1.0),
        make.opened("s2", "mid", "a", "d0", flag=SlotFlag.CLOSE),
        make.opened("s3", "mid", "b", "d0"),
        make.requested("r1", "big"),
    ]
    return make.state(queues, slots, {"a": [64], "b": [64, 64]})


def test_a_snapshot_is_whole_and_replays_alike() -> None:
    made = snapshot_of(state(), SETUP, ("b",), "1.2.3")
    again = decode_snapshot(encode_snapshot(made))
    assert again == made
    assert replay(again, BEST_FIT) == replay(made, BEST_FIT)
    held = frozenset({"r1"})
    assert plan(again.state, index_of(again.state), held, again.limits) == plan(state(), index_of(state()), held, make.LIMITS)


def test_a_snapshot_says_nothing_that_decides_nothing() -> None:
    rows = tuple(
        msgspec.structs.replace(row, info=msgspec.structs.replace(row.info, pid=4711, metrics_url="http://10.0.0.9:1"))
        for row in state().nodes
    )
    before = msgspec.structs.replace(state(), nodes=rows)
    made = snapshot_of(before, SETUP)
    raw = encode_snapshot(made)
    for word in (b"4711", b"10.0.0.9", b"tcp://"):
        assert word not in raw
    assert {row.address for row in made.state.nodes} == {REACHED}
    gone: NodeRow = msgspec.structs.replace(rows[0], address="")
    assert snapshot_of(msgspec.structs.replace(before, nodes=(gone,)), SETUP).state.nodes[0].address == ""


def test_each_policy_replays_it_and_steps_say_where() -> None:
    made = snapshot_of(state(), SETUP)
    found = replays(made, list(POLICIES.values()))
    assert [each.policy for each in found] == list(POLICIES)
    for each in found:
        assert 0 < each.allocated_ratio <= 1
        assert 0 <= each.stranded_ratio <= 1
        assert sum(step.count for step in each.steps if step.what == "open") == each.opened > 0
        assert all(step.node for step in each.steps if step.what == "open")
    text = shown(replay_screen(made, found), 120)
    assert all(policy in text for policy in POLICIES)
    assert "…" not in shown(replay_screen(made, found))
    one = shown(replay_screen(made, found[:1]), 120)
    assert "open" in one


def test_figures_are_those_of_the_devices() -> None:
    queues = [make.queue("q", make.shape(40), 0)]
    slots = [make.opened("s1", "q", "a", "d0"), make.opened("s2", "q", "a", "d1")]
    found = replay(snapshot_of(make.state(queues, slots, {"a": [64, 64, 32]}), SETUP), BEST_FIT)
    assert (found.opened, found.largest_bytes, found.largest_gpus) == (0, 32 * GIB, 1)
    assert found.allocated_ratio == round(80 / 160, 4)
    assert found.stranded_ratio == 1.0, "24, 24 and 32 GiB are free, and what comes wants 40"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"{}", Exit.USAGE, "'format'"),
        (b"not json", Exit.USAGE, "is no snapshot"),
        (b"\xff\xfe", Exit.USAGE, "is no snapshot"),
        (b"[1]", Exit.USAGE, "is no snapshot"),
        (b'{"format": "rocyard-snapshot", "version": 99}', Exit.USAGE, "version 99"),
        (b'{"format": "rocyard-snapshot", "version": 1}', Exit.USAGE, "damaged"),
        (None, Exit.USAGE, "cannot be read"),
    ],
)
def test_what_is_no_snapshot_is_told(tmp_path: Path, capsys, content, code, words) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["replay", str(path)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("drain_target_s", 1e308, "1e+308 is not a number from 0.001 to 31622400 - at `$.drain_target_s`"),
        ("limits.drain_target_s", 0, "$.limits.drain_target_s"),
        ("limits.slots_per_shape_max", 2**62, "$.limits.slots_per_shape_max"),
        ("state.queues.0.shape.gpus", -1, "$.state.queues[0].shape.gpus"),
        ("state.queues.0.shape.memory_bytes", 2**63, "$.state.queues[0].shape.memory_bytes"),
        ("state.queues.1.run_s", 1e308, "$.state.queues[1].run_s"),
        ("state.queues.1.depth", 2**64, "-9007199254740992 to 9007199254740992 - at `$.state.queues[1].depth`"),
        ("state.nodes.1.info.devices.0.memory_bytes", 2**64, "$.state.nodes[1].info.devices[0].memory_bytes"),
        ("state.nodes.0.info.cpus", 2**62, "$.state.nodes[0].info.cpus"),
        ("state.slots.0.memory_bytes", -1, "$.state.slots[0].memory_bytes"),
        ("state.tenants.0.weight", 0, "$.state.tenants[0].weight"),
    ],
)
def test_a_number_that_nothing_can_be_decided_on_is_told(tmp_path: Path, capsys, path, value, says) -> None:
    whole = msgspec.structs.replace(state(), tenants=(TenantRow(tenant="u"),))
    found = json.loads(encode_snapshot(snapshot_of(whole, SETUP)))
    *way, name = (int(part) if part.isdigit() else part for part in path.split("."))
    inner = found
    for part in way:
        inner = inner[part]
    inner[name] = value
    file = tmp_path / "s.json"
    file.write_text(json.dumps(found))
    assert main(["replay", str(file)]) == Exit.USAGE
    err = capsys.readouterr().err
    assert "is a damaged snapshot" in err
    assert says in err


def test_replay_by_the_command(tmp_path: Path, capsys) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(encode_snapshot(snapshot_of(state(), SETUP)))
    assert main(["replay", str(path), "--policy", "worst_fit"]) == Exit.USAGE
    assert "first_fit" in capsys.readouterr().err
    assert main(["replay", str(path), "--policy", "all", "-o", "json"]) == Exit.OK
    assert [each["policy"] for each in json.loads(capsys.readouterr().out)] == list(POLICIES)
    assert main(["replay", str(path)]) == Exit.OK
    assert "made under policy best_fit" in capsys.readouterr().out
    damaged = msgspec.structs.replace(snapshot_of(state(), SETUP), policy="gone")
    assert isinstance(damaged, Snapshot)
    path.write_bytes(encode_snapshot(damaged))
    assert main(["replay", str(path)]) == Exit.USAGE
    assert "'gone'" in capsys.readouterr().err
