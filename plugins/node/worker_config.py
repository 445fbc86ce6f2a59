"""What an agent tells its Dask worker, on stdin. The worker gets its own store URL and no other secret.

Apart from the worker's own module, so that an agent need not import Dask.
"""

import os
from pathlib import Path

import msgspec

from manager.settings import LogSettings, Settings


class WorkerConfig(msgspec.Struct, frozen=True):
    """What the agent tells its Dask worker."""

    parent_pid: int
    node: str
    name: str
    generation: int
    scheduler: str
    host: str
    socket: str
    store_url: str
    threads: int
    period_s: float
    directory: str
    log: LogSettings


def worker_config(
    settings: Settings, node: str, incarnation: str, generation: int, socket_path: str, directory: Path
) -> WorkerConfig:
    """The configuration of one Dask worker. Its name is new each time: Dask refuses one that is still registered."""
    return WorkerConfig(
        parent_pid=os.getpid(),
        node=node,
        name=f"{node}-{incarnation[-6:]}-{generation}",
        generation=generation,
        scheduler=f"tcp://{settings.dask.host}:{settings.dask.port}",
        host=settings.dask.host,
        socket=socket_path,
        store_url=settings.store.worker_url.value,
        threads=settings.dask.worker_threads,
        period_s=min(1.0, settings.node.beat_s),
        directory=str(directory / "dask"),
        log=settings.log,
    )
