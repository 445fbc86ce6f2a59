"""The command that makes a cluster's certificates."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from manager.cli.exits import Exit
from manager.cli.session import Session, command

if TYPE_CHECKING:
    from rich.table import Table

    from manager.certs import Certificates

DAYS_MAX: Final = 825
"""Longest life of a certificate that clients of all kinds accept."""


@command("certs")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--host", "hosts", multiple=True, help="A name or address by which it is reached; may be given several times.")
@click.option("--days", type=click.IntRange(1, DAYS_MAX), default=90, help="How long the certificates hold; 90 if left out.")
@click.option("--node", metavar="NAME", default="", help="Make only those of one more node, in DIRECTORY/nodes/NAME.")
@click.option("--renew", is_flag=True, help="Make them anew, under the same authority.")
def certs(session: Session, *, directory: Path, hosts: tuple[str, ...], days: int, node: str, renew: bool) -> int:
    """Make the certificates for TLS in DIRECTORY: an authority, and one certificate with its key for each role.

    Those of a cluster are for localhost and this machine's name; name with --host what else it is reached by. Needs the
    package cryptography (pip install 'rocyard[tls]').
    """
    try:
        from manager.certs import make_certificates
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is not installed: pip install 'rocyard[tls]'") from None

    made = make_certificates(directory, hosts, days, node=node, renew=renew)
    session.emit(made, _table)
    session.note(_next_step(made, node, renew=renew))
    return Exit.OK


def _table(made: "Certificates") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for title in ("for", "certificate", "key", "until", "hosts"):
        table.add_column(title, overflow="fold")
    for one in made.certificates:
        new = one.certificate in made.made
        table.add_row(
            one.name or one.role,
            str(Path(one.certificate).relative_to(made.directory)),
            str(Path(one.key).relative_to(made.directory)),
            f"{one.expires_at:%Y-%m-%d}",
            " ".join(one.hosts),
            style="" if new or not made.made else "dim",
        )
    return table


def _next_step(made: "Certificates", node: str, *, renew: bool) -> str:
    folder = Path(made.directory)
    if node:
        return (
            f"Copy the folder {folder / 'nodes' / node} to that machine, keeping its modes; there: "
            "rocyard node --join https://HOST:PORT --certs FOLDER"
        )
    if renew:
        return "Processes that connect use them at their next connection; those that listen, after a restart (docs/tls.md)."
    return (
        f"They lie in {folder}. Turn TLS on with tls.directory: {folder} (or ROCYARD_TLS__DIRECTORY) and start the cluster. "
        f"Who has {folder / 'ca.key'} can make more of them: keep it safe. Clients on other machines need ca.pem (ROCYARD_CA)."
    )
