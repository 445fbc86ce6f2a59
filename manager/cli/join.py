"""The command that runs a node's agent; with ``--join``, on a machine that knows of the cluster only where its API is."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import click
import msgspec

from manager.cli.session import Session, command
from manager.core.addresses import in_url, is_loopback, is_wildcard
from manager.core.errors import StartError

if TYPE_CHECKING:
    from manager.core.answers_join import JoinView
    from manager.settings import Settings


@command("node", settings=True)
@click.option("--join", "join_url", metavar="URL", help="Join the cluster of the API there, with the key in $ROCYARD_API_KEY.")
@click.option(
    "--certs",
    "certs",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --join: the folder that 'rocyard certs DIRECTORY --node NAME' has made for this machine.",
)
@click.option("--name", help="Name of the node; the setting node.name, else this machine's if left out.")
def node(session: Session, *, join_url: str | None, certs: Path | None, name: str | None) -> int:
    """Run the agent of this machine: its devices, its Dask worker and its executors.

    With --join it asks the cluster for all that it must know; that takes an admin key.
    """
    from manager.cli.process import run_role

    if name:
        overrides = (*session.options.overrides, ("node.name", name))
        session = Session(msgspec.structs.replace(session.options, overrides=overrides), session.environ)
    settings = session.settings()
    if join_url is not None:
        settings = _joined(session, settings, join_url, certs)
    elif certs is not None:
        raise click.UsageError("--certs goes with --join; without it, tls.directory says where certificates are")
    return run_role("node", settings)


def _joined(session: Session, settings: "Settings", url: str, certs: Path | None) -> "Settings":
    """The settings with what the cluster says.

    Raises:
        StartError: the folder and the URL do not go together, or the cluster is not reached from here.
    """
    from manager.client import Client
    from manager.tls import CA_NAME, Role, tls_files

    if url.startswith("https://") != (certs is not None):
        raise StartError(
            f"--certs is missing: {url} has TLS, and this node needs a certificate of its authority" if certs is None
            else f"{url} has no TLS: write https://, or leave out --certs for a cluster on this machine without"
        )  # fmt: skip
    directory = "" if certs is None else str(certs.expanduser().absolute())
    settings = msgspec.structs.replace(settings, tls=msgspec.structs.replace(settings.tls, directory=directory))
    tls_files(settings.tls, Role.NODE)  # a folder that will not do is told before the cluster is asked
    address = session.address(url, str(Path(directory) / CA_NAME) if directory else "")
    with Client(address) as client:
        view = client.join()
    return joined_settings(settings, view, urlsplit(url).hostname or "")


def joined_settings(settings: "Settings", view: "JoinView", called: str) -> "Settings":
    """`settings` with what the cluster said.

    Args:
        settings: of this machine.
        view: the cluster's answer.
        called: the host at which the API answered; it stands for hosts that mean every address.

    Raises:
        StartError: the store or the scheduler listens on loopback alone, and this is another machine.
    """
    from manager.settings import Secret

    store_url, dask_host = _at(view.store.url, called), called if is_wildcard(view.dask.host) else view.dask.host
    loopback = [
        setting
        for setting, host in (("store.host", urlsplit(store_url).hostname or ""), ("dask.host", dask_host))
        if is_loopback(host)
    ]
    if loopback and not is_loopback(called):
        raise StartError(
            f"{called} cannot be joined from another machine: {' and '.join(loopback)} there is loopback. Set "
            f"{' and '.join(loopback)} to an address of that machine, or to 0.0.0.0, and start the cluster again"
        )
    replace = msgspec.structs.replace
    limits = view.limits
    return replace(
        settings,
        store=replace(
            settings.store,
            url=Secret(store_url),
            worker_url=Secret(_at(view.store.worker_url, called)),
            deadline_s=view.store.deadline_s,
        ),
        dask=replace(settings.dask, host=dask_host, port=view.dask.port, worker_threads=view.dask.worker_threads),
        node=replace(settings.node, beat_s=limits.beat_s, lease_beats=limits.lease_beats),
        slots=replace(settings.slots, executor_crashes_max=limits.executor_crashes_max),
        tasks=replace(
            settings.tasks,
            grace_s=limits.grace_s,
            result_bytes_max=limits.result_bytes_max,
            log_bytes_max=limits.log_bytes_max,
        ),
        results=replace(
            settings.results,
            url=limits.results_url or settings.results.url,
            inline_bytes_max=limits.inline_bytes_max,
        ),
    )


def _at(url: str, called: str) -> str:
    """`url` with `called` in place of a host that means every address."""
    parts = urlsplit(url)
    if not url or not is_wildcard(parts.hostname or ""):
        return url
    user = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{in_url(called)}:{parts.port}"))
