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


def gpu(memory: str | int, count: int = 1) -> "AbstractContextManager[None]":
    """Dask tasks that are made in this block get GPU memory of their own: ``dask.annotate(gpu=…)``, checked at once.

    Args:
        memory: on each device, such as ``"16GiB"`` or a number of bytes.
        count: how many devices, all of one machine.

    Raises:
        rocyard.GpuAnnotationRefused: says what was wrong and what would be right.
    """
    wanted = {"memory": memory, "count": count}
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
