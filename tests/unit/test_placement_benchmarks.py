"""The benchmarks of placement count right: on traces of a few lines, written here."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are programs, and in no package that is installed

from benchmarks import churn, openb, placement  # noqa: E402
from manager.core.policies import POLICIES  # noqa: E402
from manager.core.quantities import GIB  # noqa: E402

NODES = "sn,cpu_milli,memory_mib,gpu,model\nn0,16000,65536,2,T4\nn1,16000,65536,2,G2\n"
PODS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
    "a,4000,1024,1,500,,LS,Running,0,100,0\n"
    "b,4000,1024,1,1000,G2|P100,LS,Running,10,60,10\n"
    "c,4000,1024,2,1000,,LS,Running,20,30,20\n"
    "d,1000,1024,0,0,,LS,Running,30,90,30\n"
)


@pytest.fixture
def trace(tmp_path):
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "pods.csv"
    nodes.write_text(NODES)
    pods.write_text(PODS)
    return nodes, pods


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("demand", ["known", "learned"])
def test_a_replay_books_what_it_places_and_rejects_nothing_that_fits(trace, policy, demand):
    nodes, pods = openb.read_nodes(trace[0]), openb.read_pods(trace[1])
    for seed in range(3):
        result = openb.replay(nodes, pods, seed, POLICIES[policy], demand)
        came = openb.arrivals(pods, 4000, seed)
        assert result.placed + result.dropped == len(came)
        assert sum(map(openb.asked, came)) >= 1.3 * 4000
        assert 0 < result.allocated_at_100 <= result.allocated_at_130 <= 100
        assert result.voluntary_rejections == 0


def test_a_voluntary_rejection_is_seen(trace):
    nodes, pods = openb.read_nodes(trace[0]), openb.read_pods(trace[1])

    class Refuses:
        name = "refuses"

        def scores(self, options, demand):
            return options.row * 0.0 + float("inf")

    result = openb.replay(nodes, pods, 1, Refuses())
    assert (result.placed, result.allocated_at_130) == (0, 0.0)
    assert result.voluntary_rejections == result.dropped > 0


def test_the_order_of_pods_is_the_seeds(trace):
    pods = openb.read_pods(trace[1])
    assert openb.arrivals(pods, 4000, 7) == openb.arrivals(pods, 4000, 7)
    assert len({tuple(openb.arrivals(pods, 4000, seed)) for seed in range(9)}) > 1
    assert sorted(openb.arrivals(pods, 4000, 7)[:4], key=str) == sorted(pods, key=str)


def test_one_line_of_json_for_each_seed(trace, monkeypatch, capsys):
    arguments = ["openb.py", "--nodes", str(trace[0]), "--pods", str(trace[1]), "--seeds", "3-4", "--policy", "best_fit"]
    monkeypatch.setattr(sys, "argv", arguments)
    openb.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["seed"], line["policy"]) for line in lines] == [(3, "best_fit"), (4, "best_fit")]
    assert {"allocated_at_100", "allocated_at_130", "voluntary_rejections", "placed_per_cpu_s"} <= lines[0].keys()


def test_churn_counts_waits_and_what_is_allocated(trace):
    nodes, pods = openb.read_nodes(trace[0])[:1], churn.read_pods(trace[1])
    assert [(pod.came_s, pod.life_s, pod.resources.gpus, pod.is_large) for pod in pods] == [
        (0, 100, 1, False),
        (10, 50, 1, True),
        (20, 10, 2, True),
    ]
    result = churn.simulate(nodes, pods, POLICIES["first_fit"], 1.0, 1)
    # Two cards: a takes half of one, b the other; c fits when both have ended, which is when the trace ends.
    assert (result.gpus, result.pods, result.waiting_at_end) == (2, 3, 1)
    assert (result.delay_mean_s, result.large_worst_s) == (pytest.approx(80 / 3, abs=0.1), 80.0)
    held = 100 * 16 * GIB + 50 * 32 * GIB
    assert result.allocated == pytest.approx(held / (100 * 2 * churn.CARD_BYTES), abs=1e-4)


def test_fewer_nodes_are_drawn_for_a_higher_load(trace):
    nodes = openb.read_nodes(trace[0]) * 20
    pods = churn.read_pods(trace[1])
    sizes = [sum(node.gpus for node in churn.drawn(nodes, pods, load, 1)) for load in (0.05, 0.1, 10.0)]
    assert sizes[0] > sizes[1] > sizes[2] == 2, "at least the node that holds the largest"


def test_the_speed_of_a_small_cluster():
    figures = placement.measure(nodes=4, devices=2, policy=POLICIES["fragmentation"], decisions=200)
    assert figures["decisions"] == 200
    assert 0 < figures["placed"] <= 200
    assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["longest_us"]
