"""The route by which a second machine learns what its node agent needs: where store and scheduler are, and its passwords.

It gives these to admin keys alone, and never over a network without TLS. The answer says where things listen, not how the
caller reaches them: a host that means every address is filled in by the caller, who knows what it called.
"""

from urllib.parse import urlsplit, urlunsplit

import msgspec

from manager.api.cluster import VERSION
from manager.api.exchange import Call, Reply
from manager.api.operations import Operation
from manager.api.query import parse_query
from manager.core.addresses import in_url, is_loopback
from manager.core.answers_join import JoinDask, JoinLimits, JoinStore, JoinView
from manager.core.errors import RocyardError
from manager.core.requests import KeyScope
from manager.results import shared_url
from manager.settings import Settings
from manager.tls import bare_url


class NotJoinable(RocyardError):
    """No other machine can join this cluster as it is set up."""

    status = 409


class JoinRoutes:
    """What this route needs.

    Args:
        settings: of the cluster.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def join(self, call: Call) -> Reply:
        """What a node agent of another machine needs."""
        parse_query(call.query, ())
        return Reply(200, msgspec.json.encode(join_view(self._settings)))

    def operations(self) -> tuple[Operation, ...]:
        """The routes."""
        return (
            Operation(
                name="join", method="GET", path="/v1/join", access=KeyScope.ADMIN, handler=self.join,
                summary="Tell what a node agent on another machine needs, the store's passwords among it.",
                answer=JoinView, errors=(NotJoinable,),
            ),
        )  # fmt: skip


def join_view(settings: Settings) -> JoinView:
    """The answer.

    Raises:
        NotJoinable: passwords would travel in the clear, or the store is reached by a socket of this machine.
    """
    store, dask, node, tasks = settings.store, settings.dask, settings.node, settings.tasks
    if not settings.tls.directory and not is_loopback(settings.api.host):
        raise NotJoinable(
            "This cluster has no TLS, and its passwords are not sent over a network without: make certificates with "
            "'rocyard certs DIR', set tls.directory, and start the cluster again."
        )
    if urlsplit(store.url.value).scheme == "unix":
        raise NotJoinable(
            "The store is reached by a unix socket, which no other machine can use: set store.url to a rediss:// URL."
        )
    return JoinView(
        version=VERSION,
        store=JoinStore(
            url=_outward(store.url.value, store.host),
            worker_url=_outward(store.worker_url.value, store.host),
            deadline_s=store.deadline_s,
        ),
        dask=JoinDask(host=dask.host, port=dask.port, worker_threads=dask.worker_threads),
        limits=JoinLimits(
            beat_s=node.beat_s,
            lease_beats=node.lease_beats,
            executor_crashes_max=settings.slots.executor_crashes_max,
            grace_s=tasks.grace_s,
            result_bytes_max=tasks.result_bytes_max,
            log_bytes_max=tasks.log_bytes_max,
            inline_bytes_max=settings.results.inline_bytes_max,
            results_url=shared_url(settings),
        ),
    )


def _outward(url: str, host: str) -> str:
    """The store's URL with the host that it listens on, where this process reaches it by loopback."""
    if not url:
        return ""
    parts = urlsplit(bare_url(url))
    if is_loopback(host) or not is_loopback(parts.hostname or ""):
        return urlunsplit(parts)
    user = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{in_url(host)}:{parts.port}"))
