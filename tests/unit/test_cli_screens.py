"""Screens: they fit 80 columns, and what users wrote cannot act on the reader's terminal."""

import datetime as dt
import io

import msgspec
import pytest
from rich.console import Console

from manager.cli import screens_cluster, screens_tasks, text
from manager.core import answers, answers_cluster, answers_nodes, answers_slots, answers_tasks
from manager.core.lifecycle import TaskStatus
from manager.core.model import TaskError
from manager.core.quantities import GIB

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
EVIL = "[red]x\x1b]0;owned\x07\r[/red]"


def shown(renderable, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def summary(**changes):
    values = {
        "task_id": "01arz3ndektsv4rrffq69g5fav",
        "status": TaskStatus.RUNNING,
        "tenant": "default",
        "function": "digits_classify",
        "node": "node-0",
        "created_at": NOW - dt.timedelta(minutes=3),
    }
    return answers_tasks.TaskSummary(**(values | changes))


def view(**changes):
    values = msgspec.structs.asdict(summary()) | {
        "memory_bytes": 24 * GIB,
        "gpus": 2,
        "priority": 5,
        "max_attempts": 1,
        "time_limit_s": 3600.0,
    }
    return answers_tasks.TaskView(**(values | changes))


def device(**changes):
    values = {
        "uuid": "GPU-1",
        "index": 0,
        "vendor": "amd",
        "model": "AMD Instinct MI300X (simulated)",
        "architecture": "gfx942",
        "memory_bytes": 192 * GIB,
        "usable_bytes": 191 * GIB,
        "leased_bytes": 48 * GIB,
        "foreign_bytes": 0,
        "free_bytes": 143 * GIB,
        "used_bytes": 20 * GIB,
        "utilisation_ratio": 0.5,
    }
    return answers_nodes.DeviceView(**(values | changes))


def worker(*devices, **changes):
    values = {
        "node": "node-0",
        "state": answers_nodes.WorkerState.LIVE,
        "hostname": "h",
        "source": "amd",
        "version": "1",
        "slots": 2,
        "tasks_running": 1,
        "devices": devices,
    }
    return answers_nodes.WorkerView(**(values | changes))


def cluster(**changes):
    values = {
        "at": NOW,
        "cluster_id": "c",
        "version": "0.1.0",
        "problems": (),
        "tasks": answers_cluster.TaskCounts(queued=1200, running=3),
        "queues": (
            answers_slots.QueueView(
                shape_id="s",
                tenant="default",
                memory_bytes=24 * GIB,
                gpus=1,
                depth=1200,
                slots_open=3,
                slots_opening=1,
                oldest_wait_s=61.0,
                run_s=0.004,
            ),
        ),
        "slots": (),
        "workers": (worker(device(), device(index=1, healthy=False, problem="ring hang")),),
        "leader": answers_cluster.LeaderView("me", 1, True),
        "store": answers_cluster.StoreView(True, "always"),
        "services": (),
    }
    return answers_cluster.ClusterView(**(values | changes))


SCREENS = {
    "task list": lambda: screens_tasks.task_table([summary(), summary(status=TaskStatus.SUCCEEDED)], NOW),
    "no tasks": lambda: screens_tasks.task_table([], NOW),
    "task": lambda: screens_tasks.task_screen(view(result=msgspec.Raw(b'{"a":[1,2,3]}'))),
    "workers": lambda: screens_cluster.workers_screen([worker(device(), device(foreign_bytes=GIB))]),
    "workers in use": lambda: screens_cluster.workers_screen(
        [worker(device(exclusive=True), device(index=1, share_leased=0.5), labels={"zone": "a", "tier": "spot"})]
    ),
    "no workers": lambda: screens_cluster.workers_screen([]),
    "status": lambda: screens_cluster.status_screen(cluster(), "http://127.0.0.1:8000"),
    "status with problems": lambda: screens_cluster.status_screen(cluster(problems=("No controller leads.",)), "u"),
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_fits_eighty_columns(name):
    lines = shown(SCREENS[name]()).splitlines()
    assert lines
    assert max(map(len, lines)) <= 80


def test_everything_that_was_asked_for_is_shown():
    asked = answers.ResourcesView(
        24 * GIB, 2, share=0.5, architecture=("gfx942",), labels={"zone": "a"}, cpus=0.5, exclusive=True
    )
    text = " ".join(shown(screens_tasks.task_screen(view(resources=asked))).split())
    assert "2 × 24 GiB, gfx942, 50 % of the compute, alone on the devices, 0.5 CPUs, zone=a, at most 60m 00s" in text
    assert "2 × 24 GiB, at most" in " ".join(shown(screens_tasks.task_screen(view())).split())


def test_memory_that_devices_share_is_shown_once():
    devices = [device(uuid=f"u{at}", index=at, pool="p" if at < 2 else "q") for at in range(3)]
    lines = shown(screens_cluster.workers_screen([worker(*devices, device(uuid="own", index=3))])).splitlines()
    assert ["191 GiB" in line for line in lines if line.startswith("  ")] == [True, False, True, True]
    assert lines[3].split()[:6] == ["1", "MI300X", "is", "that", "of", "0"]


def test_nodes_with_the_same_labels_are_told_together():
    nodes = [worker(device(), node=f"n{at}", labels={"zone": "a" if at else "b"}) for at in range(6)]
    lines = [line.strip() for line in shown(screens_cluster.workers_screen(nodes)).splitlines() if "labels" in line]
    assert lines == ["n0: labels zone=b", "n1, n2, n3 and 2 more: labels zone=a"]


def test_who_has_a_device_and_the_labels_of_nodes_are_shown():
    text = shown(SCREENS["workers in use"]())
    assert "node-0/0: a slot has it for itself" in text
    assert "node-0/1: 50% of its compute is leased" in text
    assert "node-0: labels tier=spot, zone=a" in text


def test_ids_and_sizes_are_never_cut():
    assert "01arz3ndektsv4rrffq69g5fav" in shown(SCREENS["task list"]())
    assert "…" not in shown(SCREENS["workers"]())


@pytest.mark.parametrize(
    "renderable",
    [
        screens_tasks.task_table([summary(function=EVIL, node=EVIL)], NOW),
        screens_tasks.task_screen(view(function=EVIL, error=TaskError(EVIL, EVIL, EVIL), status=TaskStatus.FAILED)),
        screens_cluster.workers_screen([worker(device(model=EVIL, problem=EVIL, healthy=False), node=EVIL)]),
        screens_cluster.status_screen(cluster(problems=(EVIL,)), EVIL),
    ],
    ids=["list", "task", "workers", "status"],
)
def test_words_of_users_are_shown_and_do_nothing(renderable):
    out = shown(renderable, width=160)
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]" in out


def test_a_devices_bar_shows_what_is_leased_and_what_is_foreign():
    out = shown(screens_cluster.workers_screen([worker(device(leased_bytes=95 * GIB, foreign_bytes=50 * GIB))]), 120)
    assert "████████▒▒▒▒····" in out
    assert "node-0/0: 50 GiB are used by processes" in out


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param(((0.0, "█"),), "·" * 10, id="empty"),
        pytest.param(((0.001, "█"),), "█" + "·" * 9, id="a little shows"),
        pytest.param(((1.0, "█"), (0.5, "▒")), "█" * 10, id="never longer than it is wide"),
        pytest.param(((0.5, "█"), (0.2, "▒")), "█████▒▒···", id="side by side"),
    ],
)
def test_bar(parts, expected):
    assert "".join(run for _, run in text.bar(parts, 10)) == expected


@pytest.mark.parametrize(
    ("age_s", "expected"), [(0, "0s ago"), (59, "59s ago"), (61, "1m ago"), (7200, "2h ago"), (-5, "0s ago")]
)
def test_ago(age_s, expected):
    assert text.ago(NOW - dt.timedelta(seconds=age_s), NOW) == expected


def test_logs_keep_colours_and_lose_what_moves_the_cursor():
    assert text.coloured("a\x1b[31mb\x1b[0m\x1b[2J\r\nc") == "a\x1b[31mb\x1b[0m�[2J\nc"


def test_arguments_of_a_schema():
    schema = {
        "$ref": "#/$defs/sleep",
        "$defs": {
            "sleep": {
                "type": "object",
                "required": ["seconds"],
                "properties": {
                    "seconds": {"type": "number"},
                    "memory_bytes": {"type": "integer", "default": 0},
                    "kind": {"enum": ["a", "b"]},
                    "stop": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                },
                "additionalProperties": False,
            }
        },
    }
    assert text.arguments_of(schema) == [
        "seconds: number",
        "memory_bytes: integer = 0",
        "kind: 'a' or 'b' (optional)",
        "stop: integer or null = None",
    ]
