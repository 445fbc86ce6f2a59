"""Where Prometheus finds every process of the cluster: the route of its HTTP service discovery.

Processes say in the store where their metrics are; this only tells what they said, without those that are gone.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from manager.api.exchange import Call, Reply
from manager.api.operations import Operation
from manager.api.query import parse_query
from manager.core.requests import KeyScope
from manager.store import Store

SAID_S_MAX: Final = 180.0
"""A process that says again and again where it is, and has not for so long, is gone."""
_PER_NODE: Final = ("node/", "worker/")
_encode = msgspec.json.Encoder().encode


class TargetGroup(msgspec.Struct, frozen=True):
    """One process, as Prometheus' HTTP service discovery wants it: its address, and labels for relabelling."""

    targets: tuple[str, ...]
    labels: dict[str, str]


class _Said(msgspec.Struct, frozen=True):
    """What of a process's record counts here. `at_ms` only where it is written again and again."""

    metrics_url: str = ""
    at_ms: int | None = None


_said = msgspec.json.Decoder(_Said).decode
Targets = tuple[TargetGroup, ...]


def targets(services: Mapping[str, bytes], nodes: Iterable[str], now_ms: int) -> Targets:
    """Every process that serves metrics, by name; each address once.

    Args:
        services: what processes said, by their names: ``KIND``, ``KIND/NODE`` or ``KIND:which one``.
        nodes: those that have not left. What was said of others counts no more.
        now_ms: the time.
    """
    present = set(nodes)
    found: dict[str, TargetGroup] = {}
    for name, blob in sorted(services.items()):
        try:
            said = _said(blob)
        except msgspec.DecodeError:
            continue
        parts = urlsplit(said.metrics_url)
        kind, _, node = name.partition("/")
        gone = said.at_ms is not None and now_ms - said.at_ms > SAID_S_MAX * 1000
        if not parts.netloc or gone or (name.startswith(_PER_NODE) and node not in present):
            continue
        labels = {
            "__scheme__": parts.scheme,
            "__metrics_path__": parts.path or "/metrics",
            "__meta_rocyard_name": name,
            "__meta_rocyard_kind": kind.partition(":")[0],
            "__meta_rocyard_node": node,
        }
        found.setdefault(said.metrics_url, TargetGroup((parts.netloc,), labels))
    return tuple(found.values())


class TargetRoutes:
    """What the route needs.

    Args:
        store: the process's connection.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def targets(self, call: Call) -> Reply:
        """Every process that serves metrics."""
        parse_query(call.query, ())
        state = await self._store.look(leader=False)
        nodes = [row.node for row in state.nodes if not row.left]
        return Reply(200, _encode(targets(await self._store.services(), nodes, time.time_ns() // 1_000_000)))

    def operations(self) -> tuple[Operation, ...]:
        """The route."""
        return (
            Operation(
                name="metrics_targets", method="GET", path="/v1/metrics/targets", access=KeyScope.READ, handler=self.targets,
                summary="List where every process serves its metrics, for Prometheus' HTTP service discovery.", answer=Targets,
            ),
        )  # fmt: skip
