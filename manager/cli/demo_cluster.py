"""Which cluster the demo runs on, and the model's answers in one process to compare with."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from manager.cli.own_cluster import own_cluster
from manager.cli.session import Session
from manager.client import Client
from manager.client_address import ClusterAddress
from manager.core.errors import RocyardError

HASTE: Final = {
    "ROCYARD_AUTOSCALER__PERIOD_S": "2",
    "ROCYARD_AUTOSCALER__DOWN_WINDOW_S": "15",
    "ROCYARD_SLOTS__OPEN_DEADLINE_S": "10",
}
"""A demo does not wait for as long as a cluster does before it takes nodes away."""


@contextlib.contextmanager
def cluster_for_demo(session: Session, *, own: bool) -> Iterator[ClusterAddress]:
    """The cluster that runs, where it answers and takes our key; else one that lives as long as the block."""
    found = None if own else _running(session)
    if found is not None:
        session.note(f"using the cluster at {found.url}")
        yield found
        return
    session.note("starting a cluster for this demo …")
    with own_cluster(session.environ, variables=HASTE) as cluster:
        session.note(f"it is up after {cluster.started_s:.1f} s, at {cluster.address.url}")
        try:
            yield cluster.address
        finally:
            session.note("stopping it …")


def _running(session: Session) -> ClusterAddress | None:
    try:
        address = session.address()
        with Client(address) as client:
            client.status()
    except RocyardError as error:
        session.note(f"no cluster to use: {error}")
        return None
    return address


def classify_here(weights: str) -> list[int]:
    """All predictions of the model with `weights`, computed in this process, on the CPU."""
    # The cluster's devices are the cluster's: what this process took of them would count as foreign.
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ[variable] = "-1"
    from plugins.node.functions.digits import digits_classify

    predictions: list[int] = digits_classify(weights, memory_bytes=0)["predictions"]
    return predictions
