"""What the REST API gives a node agent on another machine, so that it can join. See `answers`."""

import msgspec

from manager.core.quantities import KIB


class JoinStore(msgspec.Struct, frozen=True):
    """Where the store listens, with passwords. `worker_url` is empty where Dask workers have no user of their own."""

    url: str
    worker_url: str
    deadline_s: float


class JoinDask(msgspec.Struct, frozen=True):
    """Where the Dask scheduler listens."""

    host: str
    port: int
    worker_threads: int


class JoinLimits(msgspec.Struct, frozen=True):
    """Settings that are the same on all nodes of a cluster.

    Attributes:
        results_url: where larger results go; empty: the cluster keeps them on its own machine.
    """

    beat_s: float
    lease_beats: int
    executor_crashes_max: int
    grace_s: float
    result_bytes_max: int
    log_bytes_max: int
    inline_bytes_max: int = 256 * KIB
    results_url: str = ""


class JoinView(msgspec.Struct, frozen=True):
    """What a node agent on another machine needs. A host that means every address stands for the one that was called."""

    version: str
    store: JoinStore
    dask: JoinDask
    limits: JoinLimits
