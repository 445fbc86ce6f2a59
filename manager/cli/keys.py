"""Commands about API keys. They go over the REST API and need an admin key."""

import click

from manager.cli.exits import Exit
from manager.cli.session import Session, command, print_json


@click.group("keys")
def keys() -> None:
    """Make, list and revoke API keys (with an admin key)."""


@command("create", client=True)
@click.option("-t", "--tenant", required=True, help="Whose tasks the key is for: small letters, digits and dashes.")
@click.option("--scope", type=click.Choice(["user", "read", "admin"]), default="user", help="What it may do; user.")
def create(session: Session, *, tenant: str, scope: str) -> int:
    """Make a key and print it: this once, since only its hash is kept.

    A 'read' key may look, a 'user' key may submit and cancel too, an 'admin' key may do everything for every tenant.
    """
    from manager.core.requests import KeyScope

    with session.client() as client:
        made = client.create_key(tenant, KeyScope(scope))
    if session.wants_json:
        print_json(made)
        return Exit.OK
    session.note(f"Key {made.key_id} for {made.tenant} ({made.scope}). Keep it now: it is shown this once.")
    click.echo(made.key)
    return Exit.OK


@command("list", client=True)
def list_keys(session: Session) -> int:
    """All keys, without their secrets."""
    from manager.cli.screens_cluster import keys_table

    with session.client() as client:
        session.emit(client.keys(), keys_table)
    return Exit.OK


@command("revoke", client=True)
@click.argument("key_id")
def revoke(session: Session, *, key_id: str) -> int:
    """End the key KEY_ID (the eight characters that 'rocyard keys list' shows), within seconds."""
    with session.client() as client:
        revoked = client.revoke_key(key_id)
    if session.wants_json:
        print_json(revoked)
    else:
        click.echo(f"{revoked.key_id} of {revoked.tenant} is revoked")
    return Exit.OK


keys.add_command(create)
keys.add_command(list_keys)
keys.add_command(revoke)
