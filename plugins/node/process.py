"""The process of a node agent."""

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvloop

from manager.core.addresses import is_wildcard
from manager.core.errors import StartError, StoreFull, StoreUnavailable
from manager.core.lifecycle import REMOVED_EXIT
from manager.log import configure_logging, get_logger
from manager.metrics import serve_metrics
from manager.results import ResultStore, open_results
from manager.settings import Settings
from manager.store import Store, StoreConnection
from manager.store.schema import Membership
from manager.store.store import connect
from manager.tls import Role, metrics_context, metrics_url
from plugins.node.agent import Agent, install_signals, service_record
from plugins.node.devices.probe import Prober, Simulated, detect
from plugins.node.worker_config import node_host

SOCKET_PATH_BYTES_MAX: Final = 90
"""The kernel allows 107 bytes in all."""

log = get_logger("rocyard.agent")


async def serve(settings: Settings) -> bool:
    """Run one agent until SIGTERM, or until its node was removed, which is True.

    Raises:
        StartError: no devices, or an address that cannot be bound.
        StoreTooNew: the store's data are newer than this agent can work with.
    """
    node = settings.node.name or socket.gethostname()
    directory = _node_directory(settings, node)
    simulated = Simulated(settings.node.simulate, settings.node.simulated_node, directory / "devices")
    found = await detect(settings.node.devices, simulated if settings.node.simulate else None)
    for rejection in found.rejected:
        log.info("device_source_not_used", source=rejection.kind, reason=rejection.reason)
    prober = Prober(
        found.kind,
        simulated=simulated if found.kind == "simulated" else None,
        deadline_s=settings.node.probe_deadline_s,
    )
    url, deadline_s = settings.store.url.value, settings.store.deadline_s
    membership = Membership(settings.store.cluster)
    store = connect(url, deadline_s, f"agent-{node}", membership=membership)
    listener = StoreConnection(url, deadline_s, f"agent-{node}-wake")
    with _socket_directory(directory) as sockets:
        results = _results(settings, directory / "results")
        agent = Agent(settings, node, store, listener, prober, directory, sockets / "agent.sock", results)
        membership.on_outdated = agent.stop
        install_signals(agent)
        host = settings.node.metrics_host
        secure = metrics_context(settings, Role.NODE, host)
        port, stop_metrics = serve_metrics(host, settings.node.metrics_port, secure)
        url = metrics_url(node_host(settings) if is_wildcard(host) else host, port, secure)
        announcing = asyncio.create_task(_announce(store, f"node/{node}", url))
        try:
            removed = await agent.run(url)
        finally:
            announcing.cancel()
            stop_metrics()
            await listener.close()
            await store.connection.close()
        membership.raise_if_outdated()
        return removed


def _node_directory(settings: Settings, node: str) -> Path:
    """The node's own directory, without the socket of an agent that was killed."""
    directory = Path(settings.data_dir).expanduser().absolute() / "nodes" / node
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "agent.sock").unlink(missing_ok=True)
    return directory


def _results(settings: Settings, scratch: Path) -> ResultStore:
    """The results store. One that is away must not keep the node from tasks with small results."""
    try:
        return open_results(settings, scratch)
    except StartError as error:
        log.error("results_store_unusable", error=str(error))
        return open_results(settings, scratch, prepare=False)


@contextlib.contextmanager
def _socket_directory(directory: Path) -> Iterator[Path]:
    """Where the agent's socket lies: its own directory, or a temporary one where that path is too long for a socket."""
    if len(os.fsencode(directory)) < SOCKET_PATH_BYTES_MAX:
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="rocyard-") as short:
            yield Path(short)


async def _announce(store: Store, name: str, metrics_url: str) -> None:
    while True:
        with contextlib.suppress(StoreUnavailable, StoreFull):
            await store.put_service(name, service_record(metrics_url))
            return
        await asyncio.sleep(0.5)


def run(settings: Settings) -> int:
    """The process's main function; REMOVED_EXIT asks who supervises it not to start it again."""
    configure_logging("node", settings.log)
    return REMOVED_EXIT if uvloop.run(serve(settings)) else 0
