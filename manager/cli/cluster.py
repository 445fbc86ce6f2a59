"""Commands about the cluster as a whole: up, down, demo, status, workers, version."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import click

from manager.cli.exits import Exit
from manager.cli.session import Session, command, print_json

STOP_S: Final = 60.0
"""A clean stop lets running tasks be handed back and the store write its log; more means that something hangs."""
POLL_S: Final = 0.05


@command("up", settings=True)
@click.option("--simulate", metavar="FLEET", help="Simulate devices: NODESxDEVICES:MODEL, such as 2x2:mi300x.")
def up(session: Session, *, simulate: str | None) -> int:
    """Start a whole cluster on this machine; Ctrl-C stops it, and the next start finds its tasks again."""
    from manager.supervisor import run_up

    return run_up(session.settings(), simulate=simulate)


@command("down", settings=True)
def down(session: Session) -> int:
    """Stop the cluster that 'rocyard up' runs on this machine; accepted tasks are kept."""
    from manager.supervisor import running_pid

    folder = session.data_dir()
    pid = running_pid(folder)
    stopped = pid is not None
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        _wait_for_end(folder, pid)
    if session.wants_json:
        print_json({"stopped": stopped, "pid": pid})
    else:
        click.echo(f"stopped (pid {pid}); its tasks are kept in {folder}" if stopped else f"no cluster runs on {folder}")
    return Exit.OK


def _wait_for_end(folder: Path, pid: int) -> None:
    from manager.core.errors import RocyardError
    from manager.supervisor import running_pid

    end_s = time.monotonic() + STOP_S
    while running_pid(folder) == pid:
        if time.monotonic() > end_s:
            raise RocyardError(f"The cluster (pid {pid}) has not stopped in {STOP_S:g} s; its logs are in {folder}/logs.")
        time.sleep(POLL_S)


@command("status", client=True)
def status(session: Session) -> int:
    """Problems, tasks by status, what waits, and how full every device is."""
    from manager.cli.screens_cluster import status_screen

    with session.client() as client:
        session.emit(client.status(), lambda cluster: status_screen(cluster, client.address.url))
    return Exit.OK


@command("workers", client=True)
def workers(session: Session) -> int:
    """Nodes, and how full each of their devices is."""
    from manager.cli.screens_cluster import workers_screen

    with session.client() as client:
        session.emit(client.workers(), workers_screen)
    return Exit.OK


@command("version")
def version(session: Session) -> int:
    """Versions of Rocyard and of what it runs on."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = {"python": platform.python_version()}
    for name in ("rocyard", "distributed", "litestar", "redis", "torch", "amdsmi"):
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if session.wants_json:
        print_json(found)
    else:
        click.echo(f"rocyard {found.pop('rocyard')}")
        for name, text in found.items():
            click.echo(f"  {name:<12} {text}")
    return Exit.OK


@command("demo", client=True)
@click.option("--tasks", type=click.IntRange(60, 500), default=72, help="How many tasks classify; 72 if left out.")
@click.option("--own", is_flag=True, help="On a cluster of its own, even where one runs.")
@click.option("--quick", is_flag=True, help="Only the digits: leave out the second act, which takes some minutes.")
def demo(session: Session, *, tasks: int, own: bool, quick: bool) -> int:
    """Train a small network on handwritten digits, then classify all 1,797 images in many tasks.

    In a second act a minute of matrix multiplications makes the autoscaler add nodes, which it takes away afterwards.

    Uses the running cluster, else starts one of its own and stops it at the end. Needs torch and scikit-learn
    (pip install 'rocyard[torch,demo]').
    """
    from manager.cli.demo_cluster import classify_here, cluster_for_demo
    from manager.client import Client
    from manager.demo import missing_packages, run_demo

    missing = missing_packages()
    if missing:
        raise click.UsageError(f"the demo needs {' and '.join(missing)}: pip install 'rocyard[torch,demo]'")
    with cluster_for_demo(session, own=own) as address, Client(address) as client:
        return run_demo(client, session.console, tasks, classify_here, as_json=session.wants_json, scaling=not quick)
