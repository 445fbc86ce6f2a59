"""A real device without memory left, as torch reports it. Skipped where torch has no device."""

import sys
from pathlib import Path

import pytest

from tests.integration.test_executor import Node

pytestmark = pytest.mark.integration

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch has no device here", allow_module_level=True)


async def test_a_device_without_memory_is_recognised_and_its_memory_given_back(tmp_path: Path):
    node = Node(tmp_path)
    try:
        env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        await node.start(python=sys.executable, env=env)
        for _ in range(2):  # the second one finds as much as the first one did
            failed = await node.one("fill_a_device")
            assert failed.failure.type == "GpuOutOfMemory"
            assert "OutOfMemoryError" in failed.failure.bases
        free, total = (await node.one("free_device_memory")).value
        assert free > total * 0.9
    finally:
        await node.close()
