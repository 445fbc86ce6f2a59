"""Torch on the device that a task has: the real one, or the CPU with memory held on a simulated one."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from plugins.node.functions.device_memory import hold

SIMULATED_DEVICES: Final = "ROCYARD_SIMULATED_DEVICES"


class MissingTorchError(ImportError):
    """The interpreter of this executor has no torch."""


class TorchDevice(NamedTuple):
    """Where tensors go: the module torch, torch's name of the device, and its name for people."""

    torch: Any
    device: str
    label: str


@contextlib.contextmanager
def torch_device(memory_bytes: int) -> Iterator[TorchDevice]:
    """The device of this task.

    Args:
        memory_bytes: what the task will use: held on simulated devices, allocated by torch itself on real ones.

    Raises:
        MissingTorchError: names the remedy.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingTorchError(
            "this function needs torch, which the interpreter of its executor does not have: "
            "pip install 'rocyard[torch]' there, and restart the node"
        ) from None
    simulated = os.environ.get(SIMULATED_DEVICES, "")
    if simulated:
        with hold(memory_bytes):
            yield TorchDevice(torch, "cpu", f"{simulated} (simulated, on the CPU)")
    elif torch.cuda.is_available():  # HIP devices too: ROCm's torch calls them cuda
        yield TorchDevice(torch, "cuda", torch.cuda.get_device_name())
    else:
        yield TorchDevice(torch, "cpu", "CPU")
