"""The process of the Dask scheduler, with the placement plugin preloaded and checked."""

import asyncio
import signal

import dask.config
from distributed import Security
from distributed.scheduler import Scheduler

from manager.core.errors import StartError
from manager.core.placement import Policy
from manager.log import configure_logging, get_logger
from manager.settings import Settings
from manager.tls import Role, TlsFiles, dask_security, tls_files
from plugins.dashboard import register_page
from plugins.scheduler import PlacementPlugin

log = get_logger("rocyard.scheduler")


async def serve(settings: Settings, policy: Policy, files: TlsFiles | None) -> None:
    """Run until SIGTERM.

    Raises:
        StartError: a port is taken, or the plugin is not there: without it GPU work would run anywhere.
    """
    register_page()  # before the dashboard starts, with the scheduler
    scheduler = Scheduler(
        host=settings.dask.host,
        port=settings.dask.port,
        dashboard_address=f"{settings.dask.host}:{settings.dask.dashboard_port}",
        dashboard=True,
        preload=["plugins.dashboard"],
        # With these it listens on tls:// alone, and takes nobody without a certificate of the cluster's CA.
        protocol="tcp://" if files is None else "tls://",
        security=None if files is None else Security(**dask_security(files, "scheduler")),
    )
    # Before it listens: no worker registers and no task comes unseen.
    scheduler.add_plugin(PlacementPlugin(scheduler, policy, settings.placement.reserve_after_s))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, lambda: loop.create_task(scheduler.close(reason="stopped")))
    async with scheduler:
        if PlacementPlugin.name not in scheduler.plugins:
            raise StartError("the scheduler has lost its plugin: see the log above; nothing is served without it")
        log.info("scheduler_ready", address=scheduler.address, policy=policy.name)
        await scheduler.finished()


def run(settings: Settings, policy: Policy) -> int:
    """The process's main function. `policy` is the one that ``placement.policy`` names."""
    configure_logging("scheduler", settings.log)
    files = tls_files(settings.tls, Role.SCHEDULER)
    if files is not None:
        # The dashboard, with /metrics: no certificate is asked for there, so that browsers can come.
        dask.config.set(
            {
                "distributed.scheduler.dashboard.tls.cert": files.certificate,
                "distributed.scheduler.dashboard.tls.key": files.key,
            }
        )
    dask.config.set(
        {
            "distributed.scheduler.no-workers-timeout": None,
            "distributed.scheduler.worker-ttl": None,  # the agent watches its own Dask worker
            # Dask looks at itself every few milliseconds by default; idle processes then cost several percent of a core.
            "distributed.admin.tick.interval": "500ms",
            "distributed.admin.system-monitor.interval": "2s",
            "distributed.diagnostics.nvml": False,
            "distributed.admin.max-error-length": 4000,
            "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin": _origins(settings),
        }
    )
    asyncio.run(serve(settings, policy, files))
    return 0


def _origins(settings: Settings) -> list[str]:
    port = settings.dask.dashboard_port
    return [f"{host}:{port}" for host in dict.fromkeys((settings.dask.host, "localhost", "127.0.0.1"))]
