"""What a host has, and what a container of it may use."""

import os

import psutil
import pytest

from plugins.node.host import host_cpus, host_memory_bytes


def test_without_limits_it_is_the_machines(tmp_path):
    assert host_cpus(tmp_path) == len(os.sched_getaffinity(0))
    assert host_memory_bytes(tmp_path) == psutil.virtual_memory().total


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "limit"), [("1073741824\n", 2**30), ("max\n", None), ("9223372036854771712", None), ("", None)]
)
def test_a_containers_limit_on_memory_counts(tmp_path, name, text, limit):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert host_memory_bytes(tmp_path) == (limit or psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000\n", 1), ("50000 100000", 1), ("max 100000", None), ("nonsense", None)]
)
def test_a_containers_limit_on_cpus_counts(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert host_cpus(tmp_path) == (expected or len(os.sched_getaffinity(0)))
