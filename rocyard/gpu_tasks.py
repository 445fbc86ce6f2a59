"""For people who use Dask directly: say what a task needs of a GPU, and ask why it waits.

with rocyard.gpu(memory="16GiB"):
    future = client.submit(train, data)
print(rocyard.explain(future))
"""

from typing import TYPE_CHECKING, Any

import msgspec
from dask.base import annotate

from manager.core.gpu_tasks import GPU_ANNOTATION, GpuExplanation, gpu_resources

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distributed import Future


def gpu(
    memory: str | int,
    count: int = 1,
    *,
    share: float | str | None = None,
    architecture: str | tuple[str, ...] | list[str] | None = None,
    device_model: str | None = None,
    labels: dict[str, str] | None = None,
    cpus: float | None = None,
    host_memory: str | int | None = None,
    exclusive: bool = False,
    model: str | None = None,
) -> "AbstractContextManager[None]":
    """Dask tasks that are made in this block get GPU memory of their own: ``dask.annotate(gpu=…)``, checked at once.

    Args:
        memory: on each device, such as ``"16GiB"`` or a number of bytes.
        count: how many devices, all of one machine.
        share: of the compute of each device, such as 0.5 or ``"50%"``.
        architecture: what each device must be: ``"gfx942"``, ``"cdna3"``, ``"gfx94*"``, or several of these.
        device_model: what the device must be called, or a part of that, such as ``"MI300X"``.
        labels: what the node's labels must be.
        cpus, host_memory: of the node.
        exclusive: nobody else may have anything on these devices.
        model: what should be loaded already where the task is placed.

    Raises:
        rocyard.GpuAnnotationRefused: says what was wrong and what would be right.
    """
    named = {
        "share": share,
        "architecture": architecture,
        "device_model": device_model,
        "labels": labels,
        "cpus": cpus,
        "host_memory": host_memory,
        "exclusive": exclusive or None,
        "model": model,
    }
    wanted = {"memory": memory, "count": count, **{key: value for key, value in named.items() if value is not None}}
    gpu_resources(wanted)
    return annotate(**{GPU_ANNOTATION: wanted})


def explain(future: "Future[Any]") -> Any:
    """Where a GPU task is, and what each node says to it while it waits: print it.

    Returns:
        A `GpuExplanation`; with an asynchronous client one that must be awaited, as all that such a client returns.
    """
    client = future.client

    async def ask() -> GpuExplanation:
        answer = await client.scheduler.rocyard_explain_direct(key=future.key)
        return msgspec.convert(answer, GpuExplanation)

    return client.sync(ask)
