"""The processes of a cluster, each alone: what a service manager or a container starts. `rocyard up` starts them all."""

from manager.cli.session import Session, command


@command("store", settings=True)
def store(session: Session) -> int:
    """Run the embedded store: for one machine. A cluster of several uses a Redis or Valkey of its own."""
    from manager.store.embedded import serve

    return serve(session.settings())


@command("scheduler", settings=True)
def scheduler(session: Session) -> int:
    """Run the Dask scheduler with the placement plugin."""
    from plugins.scheduler_process import run

    return run(session.settings())


@command("controller", settings=True)
def controller(session: Session) -> int:
    """Run the controller. Several may run: one leads, the others wait to take over."""
    from manager.controller import run

    return run(session.settings())


@command("node", settings=True)
def node(session: Session) -> int:
    """Run the agent of this machine: its devices, its Dask worker and its executors."""
    from plugins.node.agent import run

    return run(session.settings())


@command("api", settings=True)
def api(session: Session) -> int:
    """Run the REST API."""
    from manager.api.serve import serve

    return serve(session.settings())
