"""The process of the Dask scheduler, with the placement plugin preloaded and checked."""

import asyncio
import signal

import dask.config
from distributed.scheduler import Scheduler

from manager.core.errors import StartError
from manager.log import configure_logging, get_logger
from manager.settings import Settings
from plugins.scheduler import PlacementPlugin

log = get_logger("rocyard.scheduler")


async def serve(settings: Settings) -> None:
    """Run until SIGTERM.

    Raises:
        StartError: a port is taken, or the plugin did not load: without it GPU work would run anywhere.
    """
    scheduler = Scheduler(
        host=settings.dask.host,
        port=settings.dask.port,
        dashboard_address=f"{settings.dask.host}:{settings.dask.dashboard_port}",
        dashboard=True,
        preload=["plugins.scheduler"],
    )
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, lambda: loop.create_task(scheduler.close(reason="stopped")))
    async with scheduler:
        if PlacementPlugin.name not in scheduler.plugins:
            raise StartError("the scheduler plugin did not load: see the log above; nothing is served without it")
        log.info("scheduler_ready", address=scheduler.address)
        await scheduler.finished()


def run(settings: Settings) -> int:
    """The process's main function."""
    configure_logging("scheduler", settings.log)
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
    asyncio.run(serve(settings))
    return 0


def _origins(settings: Settings) -> list[str]:
    port = settings.dask.dashboard_port
    return [f"{host}:{port}" for host in dict.fromkeys((settings.dask.host, "localhost", "127.0.0.1"))]
