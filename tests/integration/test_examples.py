"""The examples for Dask users, each run as people run it, on a real cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def run(cluster: Cluster, name: str) -> list[str]:
    """What it prints; it must end well, and leave no slot behind."""
    eventually(lambda: all(row.address for row in cluster.state().nodes), 30, "all nodes have Dask workers")
    environ = {**os.environ, "DASK_SCHEDULER_ADDRESS": cluster.dask_address()}
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], env=environ, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    eventually(lambda: cluster.state().slots == (), 20, "no slot is left")
    return ended.stdout.splitlines()


def test_basics(cluster: Cluster) -> None:
    lines = run(cluster, "dask_basics.py")
    found = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines}
    assert found["one device"].count("'") == 2
    assert found["two devices"].count("'") == 4
    assert found["sum of squares"] == str(sum(x * x for x in range(12)))
    assert found["urgent"] == "2"
    assert found["waits for room (1 × 900 GiB), 0 of its size before it"] == ""
    assert sum("ExceedsLargestDevice" in line for line in lines) == 2
    assert "ZeroDivisionError - division by zero" in lines
    assert any(line.startswith("GpuTaskCrashed - the process of the task was killed by SIGABRT") for line in lines)
    assert any(line.startswith("GpuAnnotationRefused - ") for line in lines)


@pytest.mark.torch
def test_pipeline(cluster: Cluster) -> None:
    pytest.importorskip("torch")
    lines = run(cluster, "dask_pipeline.py")
    best = next(line for line in lines if line.startswith("the best has"))
    assert float(best.partition("(")[2].partition("%")[0]) > 90
    assert sum(" hidden units: " in line for line in lines) == 3
    assert sum("hidden units on cpu: loss" in line for line in lines) == 3, "what the tasks wrote"
