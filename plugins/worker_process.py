"""The process of one Dask worker, as its agent starts it: ``python -m plugins.worker_process``, settings on stdin.

It is told everything, so it reads no settings and no environment; it holds no GPU: visible devices are set to none.
"""

import asyncio
import signal
import sys

import dask.config
import msgspec
from distributed import Security
from distributed.worker import Worker

from manager.lifeline import die_with_parent
from manager.log import configure_logging
from manager.store.store import connect
from manager.tls import dask_security
from plugins.node.link import AgentLink
from plugins.node.worker_config import WorkerConfig
from plugins.worker import RocyardWorkerPlugin, attach


async def run(config: WorkerConfig) -> None:
    """Run until the worker closes, for whatever reason; the agent starts the next one."""
    link = AgentLink(config.socket, config.generation)
    store = connect(config.store_url, 1.0, f"worker-{config.node}") if config.store_url else None
    plugin = RocyardWorkerPlugin(link, store, config.node, config.period_s)
    worker = Worker(
        config.scheduler,
        name=config.name,
        nthreads=config.threads,
        host=config.host,
        local_directory=config.directory,
        memory_limit=0,
        dashboard_address=f"{config.host}:0",
        dashboard=False,  # its /metrics is served all the same; bokeh would double the start and the memory
        plugins=(plugin,),
        protocol="tcp://" if config.tls is None else "tls://",
        security=None if config.tls is None else Security(**dask_security(config.tls, "worker")),
    )
    attach(worker, plugin)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: loop.create_task(worker.close(reason="agent-stops")))
    async with worker:
        await worker.finished()
    if store is not None:
        await store.connection.close()


def main() -> int:
    """Read the configuration and run."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerConfig)
    die_with_parent(config.parent_pid)
    configure_logging("worker", config.log)
    if config.tls is not None:
        # Dask has one setting for the HTTP servers of all its processes.
        dask.config.set(
            {
                "distributed.scheduler.dashboard.tls.cert": config.tls.certificate,
                "distributed.scheduler.dashboard.tls.key": config.tls.key,
            }
        )
    dask.config.set(
        {
            # Back-off of Dask's connect grows with the outage; a short timeout makes it start afresh each second.
            "distributed.comm.timeouts.connect": "1s",
            # Dask looks at itself every few milliseconds by default; idle processes then cost several percent of a core.
            "distributed.worker.profile.enabled": False,
            "distributed.admin.tick.interval": "500ms",
            "distributed.admin.system-monitor.interval": "2s",
            "distributed.diagnostics.nvml": False,
        }
    )
    asyncio.run(run(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
