"""The API's process: uvicorn with our limits, on one address, ended cleanly by SIGTERM or SIGINT."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import time
from collections.abc import Generator
from typing import Final

import msgspec
import uvicorn
import uvloop

from manager.api.app import Api, create_app
from manager.api.cluster import VERSION
from manager.api.protocol import LimitedProtocol
from manager.core.addresses import in_url, is_wildcard
from manager.core.errors import SettingsError, StartError, StoreFull, StoreUnavailable
from manager.log import configure_logging, get_logger
from manager.settings import Settings
from manager.store import Store
from manager.store.schema import Membership
from manager.store.store import connect
from manager.tls import Role, server_context, tls_files

GRACE_S: Final = 10
"""How long requests in hand may take after SIGTERM; those that wait for a task are answered at once."""
KEEP_ALIVE_S: Final = 5
BACKLOG: Final = 512
REGISTER_S: Final = 30.0
"""The record of this process is written again this often, so that a store that was replaced has it."""

log = get_logger("manager.api.serve")


class _Service(msgspec.Struct, frozen=True):
    """Where this process is."""

    pid: int
    host: str
    url: str
    metrics_url: str
    version: str
    at_ms: int


class Server(uvicorn.Server):
    """Uvicorn's server, which lets waiting requests go before it counts on them to end.

    Args:
        api: the application.
        listener: a bound socket.
        secure: for TLS, and then for nothing else.
    """

    def __init__(self, api: Api, listener: socket.socket, secure: ssl.SSLContext | None = None) -> None:
        self.api = api
        self.listener = listener
        config = uvicorn.Config(
            api,
            http=LimitedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            backlog=BACKLOG,
        )
        config.load()
        config.ssl = secure  # not by the names of files: uvicorn would take older versions of TLS too
        super().__init__(config)

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[self.listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: no new connections, then what is in hand."""
        self.api.ends.release()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are `serve`'s: uvicorn would raise them again afterwards, and a clean end would look like a kill."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        StartError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"api.host: {host!r} is no address of this machine: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # from here the port is ours; who comes early waits
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StartError(f"the API cannot listen on {host}:{port}: {error.strerror} (api.port)", host=host, port=port) from None
    return listener


def url_of(listener: socket.socket, *, secure: bool = False) -> str:
    """Where the API answers; every address goes by this machine's name."""
    host, port = listener.getsockname()[:2]
    named = socket.gethostname() if is_wildcard(host) else host
    return f"{'https' if secure else 'http'}://{in_url(named)}:{port}"


def build_server(settings: Settings, listener: socket.socket, membership: Membership | None = None) -> Server:
    """The server, not yet running; `membership` says which store is the right one.

    Raises:
        SettingsError: no store is set.
    """
    url = settings.store.url.value
    if not url:
        raise SettingsError("store.url is not set: 'rocyard up' starts a store and sets it for the parts that it starts")

    def connected(name: str) -> Store:
        # The reader of ends waits on its connection, and what it reads is only a reason to ask over the other one.
        return connect(url, settings.store.deadline_s, name, membership=membership if name == "api" else None)

    files = tls_files(settings.tls, Role.API)
    return Server(create_app(settings, connected), listener, None if files is None else server_context(files))


def keep_for_good() -> None:
    """What is there when serving starts stays: the collector, which each look makes work, need not go through it again."""
    gc.collect()
    gc.freeze()


async def run(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once."""
    membership = Membership(settings.store.cluster)
    server = build_server(settings, listener, membership)
    keep_for_good()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    membership.on_outdated = stop
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    url = url_of(listener, secure=server.config.ssl is not None)
    registering = asyncio.create_task(_keep_registered(server.api.store, url))
    try:
        await server.run_until_stopped()
    finally:
        registering.cancel()
    membership.raise_if_outdated()


def serve(settings: Settings) -> None:
    """Run the API in this process until it is asked to end.

    Raises:
        StartError: the address cannot be had.
        SettingsError: no store is set.
        StoreTooNew: the store's data are newer than this process can work with.
    """
    configure_logging("api", settings.log)
    listener = bind(settings.api.host, settings.api.port)
    log.info("the API starts", url=url_of(listener, secure=bool(settings.tls.directory)))
    with contextlib.closing(listener):
        uvloop.run(run(settings, listener))
    log.info("the API has ended")


async def _keep_registered(store: Store, url: str) -> None:
    host = socket.gethostname()
    while True:
        record = _Service(os.getpid(), host, url, f"{url}/metrics", VERSION, time.time_ns() // 1_000_000)
        with contextlib.suppress(StoreUnavailable, StoreFull):
            await store.put_service(f"api:{host}:{url.rpartition(':')[2]}", msgspec.json.encode(record))
        await asyncio.sleep(REGISTER_S)
