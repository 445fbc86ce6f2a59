"""What an agent tells its Dask worker, on stdin. The worker gets its own store URL and no other secret.

Apart from the worker's own module, so that an agent need not import Dask.
"""

import os
import socket
from pathlib import Path

import msgspec

from manager.core.addresses import is_loopback, is_wildcard
from manager.settings import LogSettings, Settings
from manager.tls import Role, TlsFiles, dask_address, tls_files


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
    tls: TlsFiles | None = None


def worker_config(
    settings: Settings, node: str, incarnation: str, generation: int, socket_path: str, directory: Path
) -> WorkerConfig:
    """The configuration of one Dask worker. Its name is new each time: Dask refuses one that is still registered."""
    return WorkerConfig(
        parent_pid=os.getpid(),
        node=node,
        name=f"{node}-{incarnation[-6:]}-{generation}",
        generation=generation,
        scheduler=dask_address(settings),
        host=node_host(settings),
        socket=socket_path,
        store_url=settings.store.worker_url.value,
        threads=settings.dask.worker_threads,
        period_s=min(1.0, settings.node.beat_s),
        directory=str(directory / "dask"),
        log=settings.log,
        tls=tls_files(settings.tls, Role.NODE),
    )


def node_host(settings: Settings) -> str:
    """The address at which this node is reached: its own setting, else what leads to the scheduler.

    On the scheduler's own machine that is what the scheduler listens on; of every address, Dask names one to others itself.
    """
    if settings.node.host:
        return settings.node.host
    scheduler = settings.dask.host
    if is_loopback(scheduler) or is_wildcard(scheduler):
        return scheduler
    # A datagram socket is connected without a packet: the system only chooses the way, and with it our address.
    found = socket.getaddrinfo(scheduler, settings.dask.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
        probe.connect(found[4])
        return str(probe.getsockname()[0])
