"""The process of the autoscaler. With no groups, or switched off, it waits and does nothing."""

import asyncio
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import httpx
import msgspec

from autoscaler.loop import Autoscaler
from autoscaler.metrics_source import DEADLINE_S, MetricsSource, PrometheusSource, ScrapeSource
from autoscaler.providers.interface import Provider
from autoscaler.providers.local import LocalProvider
from manager.core.errors import RocyardError
from manager.core.ids import new_id
from manager.group_needs import pack_groups
from manager.leader import Leadership
from manager.log import configure_logging, get_logger
from manager.metrics import serve_metrics
from manager.settings import GroupSettings, Settings
from manager.store import Store
from manager.store.schema import Membership
from manager.store.store import connect
from manager.tls import Role, client_context, metrics_context, metrics_url, tls_files

ROLE = "autoscaler"

log = get_logger("rocyard.autoscaler")


def providers_of(settings: Settings) -> dict[str, Provider]:
    """The provider of each group; each kind is only loaded where a group names it.

    Raises:
        RocyardError: one cannot be used, with the remedy.
    """
    found: dict[str, Provider] = {}
    local = LocalProvider(Path(settings.data_dir).expanduser().absolute())
    pods: dict[str, GroupSettings] = {}
    for name, group in settings.groups.items():
        match group.provider:
            case "local":
                found[name] = local
            case "kubernetes":
                pods[name] = group
    if pods:
        from autoscaler.providers.kubernetes import KubernetesProvider, access_in_cluster

        found |= dict.fromkeys(pods, KubernetesProvider(pods, access_in_cluster(os.environ)))
    return found


def source_of(settings: Settings, store: Store) -> MetricsSource:
    """Where the metrics are read."""
    files = tls_files(settings.tls, Role.AUTOSCALER)
    url = settings.autoscaler.prometheus_url
    # A Prometheus is not of our cluster's authority, but of one that this machine trusts.
    verify = True if files is None or url else client_context(files.ca)
    client = httpx.AsyncClient(timeout=DEADLINE_S, verify=verify, trust_env=False)
    return PrometheusSource(url, client) if url else ScrapeSource(store, client)


async def serve(settings: Settings) -> None:
    """Run one autoscaler until SIGTERM."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    own = settings.autoscaler
    membership = Membership(settings.store.cluster, on_outdated=stopping.set)
    store = connect(settings.store.url.value, settings.store.deadline_s, ROLE, membership=membership)
    secure = metrics_context(settings, Role.AUTOSCALER, own.metrics_host)
    port, stop_metrics = serve_metrics(own.metrics_host, own.metrics_port, secure)
    announcing = asyncio.create_task(_announce(store, metrics_url(own.metrics_host, port, secure)))
    try:
        if own.mode == "off" or not settings.groups:
            log.info("idle", mode=own.mode, groups=len(settings.groups))
            await stopping.wait()
        else:
            await _decide(settings, store, providers_of(settings), stopping)
    finally:
        announcing.cancel()
        stop_metrics()
        await store.connection.close()
    membership.raise_if_outdated()


async def _decide(settings: Settings, store: Store, providers: Mapping[str, Provider], stopping: asyncio.Event) -> None:
    holder = f"{socket.gethostname()}/{os.getpid()}/{new_id()}"
    source = source_of(settings, store)
    autoscaler = Autoscaler(
        settings,
        store,
        Leadership(store, holder, settings.autoscaler.term_s, ROLE),
        providers,
        source,
        pack_groups(settings),
    )
    watching = asyncio.create_task(stopping.wait())
    watching.add_done_callback(lambda _: autoscaler.stop())
    try:
        await autoscaler.run()
    finally:
        watching.cancel()
        await source.close()
        for provider in set(providers.values()):
            await provider.close()


async def _announce(store: Store, url: str) -> None:
    """Say where the metrics are, as soon as the store answers."""
    while True:
        try:
            await store.put_service(ROLE, msgspec.json.encode({"pid": os.getpid(), "metrics_url": url}))
        except RocyardError:
            await asyncio.sleep(0.5)
        else:
            return


def run(settings: Settings) -> int:
    """The process's main function."""
    configure_logging(ROLE, settings.log)
    asyncio.run(serve(settings))
    return 0
