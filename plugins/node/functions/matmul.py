"""Built-in function: multiply matrices with torch, to see that a device really computes."""

import time
from typing import Annotated, Any, Final, Literal

import msgspec

from plugins.node.functions.torch_device import torch_device

_BYTES: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def matmul(
    size: Annotated[int, msgspec.Meta(ge=1, le=131_072)] = 512,
    repeats: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1,
    dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Multiply two random square matrices on the task's device.

    Args:
        size: rows and columns.
        repeats: how often.
        dtype: type of the elements.
        seed: of the random numbers; the same seed on the same kind of device gives the same checksum.

    Returns:
        ``seconds`` of all repeats, ``gflops`` per second, ``device``, ``checksum`` (mean of the product's squares,
        about `size`, since the elements are normal), ``memory_bytes`` of the three matrices.
    """
    memory_bytes = 3 * size * size * _BYTES[dtype]
    with torch_device(memory_bytes) as (torch, device, label):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        kind = getattr(torch, dtype)
        left, right = (torch.randn(size, size, generator=generator).to(device, kind) for _ in range(2))
        product = torch.empty(size, size, dtype=kind, device=device)
        synchronise = torch.cuda.synchronize if device == "cuda" else _nothing
        torch.matmul(left, right, out=product)  # the first one loads kernels: not what is measured
        synchronise()
        began = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(left, right, out=product)
        synchronise()
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "gflops": 2 * size**3 * repeats / seconds / 1e9,
            "device": label,
            "checksum": product.to(torch.float32).square().mean().item(),
            "memory_bytes": memory_bytes,
        }


def _nothing() -> None:
    return None
