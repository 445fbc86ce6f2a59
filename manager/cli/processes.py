"""The processes of a cluster, each alone, as a service manager or a container starts them. `rocyard up` starts all."""

import os
import sys
from pathlib import Path

from manager.cli.session import Command, Session, command


def _role(name: str, doc: str) -> Command:
    def run(session: Session) -> int:
        from manager.cli.process import run_role

        return run_role(name, session.settings())

    run.__doc__ = doc
    return command(name, settings=True)(run)


scheduler = _role("scheduler", "Run the Dask scheduler with the placement plugin.")
controller = _role("controller", "Run the controller. Several may run: one leads, the others wait to take over.")
api = _role("api", "Run the REST API.")


@command("store", settings=True)
def store(session: Session) -> int:
    """Run the embedded store: for one machine. A cluster of several uses a Redis or Valkey of its own."""
    from manager.store.server import EmbeddedStore
    from manager.tls import Role, tls_files

    settings = session.settings()
    files = tls_files(settings.tls, Role.STORE)
    spec = EmbeddedStore(Path(settings.data_dir), settings.store.port, host=settings.store.host, tls=files).prepare()
    session.note(f"{spec.program} {spec.version} on port {spec.port}; passwords are in {settings.data_dir}/store.json")
    # The server takes this process's place, so that signals reach it. Its configuration fits into a pipe's 64 KiB.
    reader, writer = os.pipe()
    os.write(writer, spec.stdin_text.value.encode())
    os.close(writer)
    os.dup2(reader, sys.stdin.fileno())
    os.execv(spec.argv[0], spec.argv)  # noqa: S606 -- our own program, by an argument list
