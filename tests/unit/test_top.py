"""`rocyard top`: frames fit, say what is true, and keys do what they say."""

import datetime as dt
import threading

import msgspec
import pytest

from manager.cli import top
from manager.cli.screens_top import Look, Rates, Sample, Sort, frame, rates
from manager.client_errors import ClusterUnreachable
from manager.core import answers, answers_cluster, answers_nodes, answers_slots
from manager.core.quantities import GIB

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
EVIL = "[red]x\x1b]0;owned\x07\r[/red]"
URL = "http://127.0.0.1:8000"


def device(**changes):
    values = {
        "uuid": "GPU-1",
        "index": 0,
        "vendor": "amd",
        "model": "AMD Instinct MI300X (simulated)",
        "architecture": "gfx942",
        "memory_bytes": 100 * GIB,
        "usable_bytes": 100 * GIB,
        "leased_bytes": 50 * GIB,
        "foreign_bytes": 0,
        "free_bytes": 50 * GIB,
        "used_bytes": 25 * GIB,
        "utilisation_ratio": 0.5,
        "temperature_celsius": 60.0,
        "power_watts": 600.0,
    }
    return answers_nodes.DeviceView(**(values | changes))


def worker(node="node-0", devices=None, **changes):
    values = {
        "node": node,
        "state": answers_nodes.WorkerState.LIVE,
        "hostname": "h",
        "source": "amd",
        "version": "1",
        "slots": 2,
        "tasks_running": 1,
        "devices": devices if devices is not None else (device(), device(index=1)),
    }
    return answers_nodes.WorkerView(**(values | changes))


def queue(name, depth, **changes):
    values = {
        "shape_id": name,
        "tenant": "default",
        "memory_bytes": 24 * GIB,
        "gpus": 1,
        "depth": depth,
        "slots_open": 3,
        "slots_opening": 1,
        "oldest_wait_s": 61.0 if depth else None,
        "run_s": 0.004,
    }
    return answers_slots.QueueView(**(values | changes))


def slot(name, shape, running=1):
    return answers_slots.SlotView(
        slot_id=name,
        shape_id=shape,
        tenant="default",
        status="OPEN",
        node="node-0",
        devices=("GPU-1",),
        memory_bytes=24 * GIB,
        flag="",
        running=running,
        served=1,
    )


def cluster(**changes):
    values = {
        "at": NOW,
        "cluster_id": "c",
        "version": "0.1.0",
        "problems": (),
        "tasks": answers_cluster.TaskCounts(queued=1200, running=3),
        "queues": (queue("s", 1200), queue("t", 0)),
        "slots": (slot("1", "s"), slot("2", "s"), slot("3", "t", running=0)),
        "workers": (worker(),),
        "leader": answers_cluster.LeaderView("me", 1, True),
        "store": answers_cluster.StoreView(True, "always"),
        "services": (),
    }
    return answers_cluster.ClusterView(**(values | changes))


def shown(view, width=80, height=24, look=None, speed=None):
    lines = frame(view, speed or Rates(), look or Look(keys=True), URL, width, height)
    return [line.plain for line in lines]


LARGE = cluster(
    queues=tuple(queue(f"s{number}", 100 - number, tenant="a-tenant-with-a-very-long-name") for number in range(40)),
    workers=tuple(worker(f"node-{number}", tuple(device(index=i) for i in range(8))) for number in range(64)),
    problems=tuple(
        f"Something is wrong with part {number}, and this sentence is rather long for a terminal." for number in range(9)
    ),
)


@pytest.mark.parametrize("view", [cluster(), LARGE, cluster(workers=(), queues=())], ids=["small", "large", "empty"])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (60, 12), (300, 120)])
def test_a_frame_fills_its_terminal_exactly_and_never_more(view, width, height):
    lines = shown(view, width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("Rocyard 0.1.0")
    assert lines[-1].startswith("q quit")


def test_where_nothing_is_cut_everything_is_there():
    text = "\n".join(shown(LARGE, 160, None, Look()))
    assert "q quit" not in text
    assert text.count("MI300X") == 64 * 8
    assert text.count("a-tenant-with") == 40


def test_the_frame_says_what_waits_what_runs_and_how_fast():
    lines = shown(cluster(), speed=Rates(submitted=12.34, succeeded=0.0, failed=1.0))
    text = "\n".join(lines)
    assert "1,200 queued   3 running" in text
    assert "12.3/s submitted   0.0/s succeeded   1.0/s failed" in text
    assert "3 open   2 busy   100 GiB of 200 GiB leased" in text
    row = next(line for line in lines if line.startswith("24 GiB"))
    assert row.split() == ["24", "GiB", "default", "1,200", "2", "3", "1", "61.0", "s", "4", "ms"]


def test_what_else_is_asked_for_is_said_as_far_as_there_is_room():
    asked = answers.ResourcesView(24 * GIB, 1, share=0.5, exclusive=True)
    view = cluster(queues=(queue("s", 1, resources=asked),))
    for width, said in ((80, "24 GiB, 50 … default "), (160, "24 GiB, 50 % of the compute, alone on the devi… default ")):
        row = next(line for line in shown(view, width) if line.startswith("24 GiB"))
        assert row.startswith(said), row
        assert row.endswith("4 ms")


def test_memory_that_devices_share_is_drawn_once():
    parts = tuple(device(uuid=f"u{at}", index=at, pool="p") for at in range(2))
    lines = shown(cluster(workers=(worker(devices=parts),)))
    (second,) = [line for line in lines if line.strip().startswith("1 MI300X")]
    assert second.endswith("its memory is that of 0")
    assert "50 GiB of 100 GiB leased" in "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, "████▄▄▄▄········", id="a quarter used of the half that is leased"),
        pytest.param({"leased_bytes": 0, "used_bytes": 0}, "·" * 16, id="empty"),
        pytest.param({"used_bytes": 75 * GIB}, "████████▓▓▓▓····", id="used above the lease"),
        pytest.param({"used_bytes": 50 * GIB, "foreign_bytes": 25 * GIB}, "████▄▄▄▄▒▒▒▒····", id="others"),
        pytest.param({"used_bytes": None}, "▄▄▄▄▄▄▄▄········", id="no reading"),
    ],
)
def test_a_bar(changes, expected):
    from manager.cli import screens_top

    assert screens_top._bar(screens_top._bytes([device(**changes)]), 16).plain == expected


def test_memory_that_devices_share_is_summed_once_for_each_node():
    from manager.cli import screens_top

    shared = tuple(device(index=index, pool=f"p/{index // 2}") for index in range(4))
    assert screens_top._bytes(shared) == screens_top._bytes([device(), device()])


def test_an_unhealthy_device_and_a_lost_node_stand_out():
    sick = worker(devices=(device(healthy=False, problem="ring hang"),), state=answers_nodes.WorkerState.LOST)
    text = "\n".join(shown(cluster(workers=(sick,))))
    assert "node-0  lost" in text
    assert "unhealthy: ring hang" in text


def test_nodes_that_do_not_fit_become_one_line_each_and_are_scrolled():
    text = "\n".join(shown(LARGE, 80, 24))
    assert "8 × MI300X" in text
    assert "nodes 1 to " in text
    lower = "\n".join(shown(LARGE, 80, 24, Look(first=1000, keys=True)))
    assert "of 64" in lower
    assert " to 64 of 64" in lower


@pytest.mark.parametrize(
    ("sort", "first"),
    [(Sort.NAME, "node-0"), (Sort.FULL, "node-1"), (Sort.EMPTY, "node-2"), (Sort.BUSY, "node-0")],
)
def test_nodes_are_sorted(sort, first):
    workers = (
        worker("node-0", (device(),), tasks_running=9),
        worker("node-1", (device(leased_bytes=99 * GIB),)),
        worker("node-2", (device(leased_bytes=0, used_bytes=0),)),
    )
    lines = shown(cluster(workers=workers), look=Look(sort=sort, keys=True))
    assert next(line for line in lines if line.startswith("node-")).startswith(first)


def test_what_is_wrong_comes_first_and_loss_of_the_api_is_said():
    lines = shown(LARGE, look=Look(trouble="the cluster does not answer", keys=True))
    assert "the cluster does not answer" in lines[1]
    assert "Something is wrong with part 0" in lines[2]
    assert any("6 more problems" in line for line in lines)
    assert not any("all is well" in line for line in lines)


def test_a_pause_and_a_missing_leader_are_said():
    lines = shown(cluster(leader=answers_cluster.LeaderView("", 1, False)), look=Look(paused=True, keys=True))
    assert "no leader" in lines[0]
    assert "PAUSED" in lines[0]


def test_words_of_users_are_shown_and_do_nothing():
    view = cluster(
        workers=(worker(EVIL, (device(model=EVIL, healthy=False, problem=EVIL),)),),
        queues=(queue("s", 1, tenant=EVIL),),
        problems=(EVIL,),
    )
    text = "\n".join(shown(view, 160, 50, Look(trouble=EVIL)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]" in text


def test_groups_that_grow_and_shrink_are_shown():
    groups = (
        answers_cluster.GroupView(name="mi300x", workers=3, starting=1, draining=0, workers_min=0, workers_max=8),
        answers_cluster.GroupView(name="by-hand", workers=1, starting=0, draining=1),
    )
    down = answers_cluster.DependencyView(name="autoscaler", state=answers_cluster.DependencyState.DOWN, since_at=NOW)
    lines = shown(cluster(groups=groups, dependencies=(down,)))
    assert "Groups  mi300x 3 (0 to 8) 1 starting   by-hand 1 1 draining   autoscaler down" in lines
    assert not any(line.startswith("Groups") for line in shown(cluster()))


def sample(at_s, **tasks):
    return Sample(cluster(tasks=answers_cluster.TaskCounts(**tasks)), at_s)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        pytest.param([], Rates(), id="nothing known"),
        pytest.param([sample(1.0, queued=1)], Rates(), id="one look tells no rate"),
        pytest.param(
            [sample(10.0, queued=5, succeeded=1), sample(14.0, queued=8, succeeded=3, failed=2)],
            Rates(1.75, 0.5, 0.5),
            id="changes per second",
        ),
        pytest.param(
            [sample(10.0, succeeded=100), sample(12.0, succeeded=40)], Rates(0.0, 0.0, 0.0), id="forgotten tasks are no rate"
        ),
        pytest.param([sample(10.0), sample(10.0, succeeded=5)], Rates(), id="no time has passed"),
    ],
)
def test_rates(samples, expected):
    assert rates(samples) == expected


def test_keys():
    look = Look()
    assert top.pressed("p", look, 3).paused
    assert not top.pressed("p", top.pressed("p", look, 3), 3).paused
    assert top.pressed("s", msgspec.structs.replace(look, first=2), 3) == Look(sort=Sort.FULL)
    assert top.pressed("up", look, 3).first == 0
    down = look
    for _ in range(9):
        down = top.pressed("down", down, 3)
    assert down.first == 2
    assert top.pressed("x", look, 3) == look
    assert Sort.BUSY.next() is Sort.NAME


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"q", ["q"]),
        (b"Q", ["q"]),
        (b"\x1b[A\x1b[Bp", ["up", "down", "p"]),
        (b"\x03", ["q"]),
        (b"\x00\xff", []),
        (b"\x1b[Zs", ["[", "z", "s"]),
    ],
)
def test_what_a_terminal_sends(data, expected):
    assert top.split_keys(data) == expected


class PlayedClient:
    """Answers what the test gives it, one after the other; then it has nothing more to say."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = threading.Semaphore(0)

    def status(self):
        reply = self.replies.pop(0) if self.replies else ClusterUnreachable("nobody answers")
        self.asked.release()
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_the_poller_keeps_a_window_of_samples():
    client = PlayedClient(*(cluster() for _ in range(5)))
    poller = top.Poller(client, 2.0, window_s=0.0)
    for _ in range(5):
        poller.ask()
    samples, trouble = poller.news()
    assert len(samples) == 2
    assert trouble == ""


def test_an_api_that_goes_away_is_said_and_asked_again():
    client = PlayedClient(cluster(), ClusterUnreachable("nobody answers"), cluster())
    poller = top.Poller(client, 0.01, window_s=10.0)
    poller.ask()
    poller._interval_s = 0.0
    poller.start()
    try:
        for _ in range(6):
            assert client.asked.acquire(timeout=10)
        samples, trouble = poller.news()
    finally:
        poller.stop()
    assert len(samples) == 2, "it went on after the failure"
    assert trouble.startswith("nobody answers (as it was ")
