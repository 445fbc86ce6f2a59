"""Where the need comes from: the leading controller's ``/metrics``, or a Prometheus that scrapes it.

A reading is whole or it is none: an answer that is empty, partial, doubled, not a number, or that warns, is no data. Whether
it is fresh is seen by its round changing, on this process's clock; no clocks are compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Protocol

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from manager.core.errors import RocyardError
from manager.core.leadership import BeatWatch
from manager.store import Store

NEED: Final = "rocyard_group_need_nodes"
ROUND: Final = "rocyard_group_need_round"
INFEASIBLE: Final = "rocyard_infeasible_tasks"
QUERY: Final = f'{{__name__=~"{NEED}|{ROUND}|{INFEASIBLE}"}}'
"""One question for all, so that all is of one moment."""
DEADLINE_S: Final = 3.0
NODES_MAX: Final = 1_000_000


class NoData(Exception):
    """The metrics say nothing that could be believed; says why."""


class Reading(msgspec.Struct, frozen=True):
    """Need and round by group, and infeasible tasks by reason."""

    needs: dict[str, int]
    rounds: dict[str, float]
    infeasible: dict[str, int]


class MetricsSource(Protocol):
    """Reads the metrics."""

    async def read(self, groups: Sequence[str]) -> Reading:
        """What they say of `groups`.

        Raises:
            NoData: nothing that could be believed.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


Samples = Iterable[tuple[str, Mapping[str, str], float]]
"""Name, labels and value."""


def reading_of(samples: Samples, groups: Sequence[str]) -> Reading:
    """The reading that can be believed of what was answered.

    Raises:
        NoData: something is missing, doubled, or no number of nodes.
    """
    found_by: dict[str, dict[str, float]] = {NEED: {}, ROUND: {}, INFEASIBLE: {}}
    for name, labels, value in samples:
        found = found_by.get(name)
        if found is None:
            continue
        key = labels.get("reason" if name == INFEASIBLE else "group", "")
        if name != INFEASIBLE and key not in groups:
            continue  # of a controller that knows other groups: what is missing of ours shows below
        if key in found:
            raise NoData(f"{name} has several values for {key!r}: more than one controller shows it")
        if not math.isfinite(value) or value < 0 or (name != ROUND and (value > NODES_MAX or value != int(value))):
            raise NoData(f"{name} of {key!r} is {value}")
        found[key] = value
    for group in groups:
        if group not in found_by[NEED] or group not in found_by[ROUND]:
            raise NoData(f"there is no {NEED} of {group!r}: no controller leads, or it has other settings")
    return Reading(
        needs={group: int(nodes) for group, nodes in found_by[NEED].items()},
        rounds=found_by[ROUND],
        infeasible={reason: int(tasks) for reason, tasks in found_by[INFEASIBLE].items()},
    )


class Freshness:
    """Whether readings are of now.

    Args:
        stale_s: a round that has not changed for so long is old.
    """

    def __init__(self, stale_s: float) -> None:
        self._stale_s = stale_s
        self._watch = BeatWatch()
        self._first: dict[str, float] = {}

    def check(self, reading: Reading, now_s: float) -> None:
        """Take note of the rounds.

        Raises:
            NoData: one is old, or was never seen to change.
        """
        problem = ""
        for group, mark in reading.rounds.items():
            unchanged_s = self._watch.silent_s(group, mark, now_s, now_s)
            if self._first.setdefault(group, mark) == mark:
                problem = problem or f"the need of {group!r} was not seen to change yet"
            elif unchanged_s >= self._stale_s:
                problem = problem or f"the need of {group!r} was computed {unchanged_s:.0f} s ago"
        if problem:
            raise NoData(problem)


class ScrapeSource:
    """Reads the leading controller's ``/metrics`` itself.

    Args:
        store: says where that is.
        client: makes the request.
    """

    def __init__(self, store: Store, client: httpx.AsyncClient) -> None:
        self._store = store
        self._client = client

    async def read(self, groups: Sequence[str]) -> Reading:
        """See `MetricsSource`."""
        try:
            record = msgspec.json.decode((await self._store.services()).get("controller", b"{}"), type=_Service)
            if not record.metrics_url:
                raise NoData("no controller has said where its metrics are")
            answer = await self._client.get(record.metrics_url)
            answer.raise_for_status()
            families = list(text_string_to_metric_families(answer.text))
        except (httpx.HTTPError, httpx.InvalidURL, RocyardError, msgspec.DecodeError, ValueError) as error:
            raise NoData(f"the controller's metrics cannot be read: {type(error).__name__}: {error}"[:200]) from error
        return reading_of(
            ((sample.name, sample.labels, sample.value) for family in families for sample in family.samples), groups
        )

    async def close(self) -> None:
        """See `MetricsSource`."""
        await self._client.aclose()


class _Service(msgspec.Struct, frozen=True):
    metrics_url: str = ""


class _Series(msgspec.Struct, frozen=True):
    metric: dict[str, str]
    value: tuple[float, str]


class _Vector(msgspec.Struct, frozen=True, tag_field="resultType", tag="vector"):
    result: Annotated[tuple[_Series, ...], msgspec.Meta(max_length=10_000)]


class _QueryAnswer(msgspec.Struct, frozen=True):
    status: str
    data: _Vector | None = None
    error: str = ""
    warnings: tuple[str, ...] = ()


def samples_of(content: bytes) -> list[tuple[str, dict[str, str], float]]:
    """The samples of Prometheus' answer to the question.

    Raises:
        NoData: it is no answer, an error, or one with a warning: that may be partial.
    """
    try:
        answer = msgspec.json.decode(content, type=_QueryAnswer)
        series = answer.data.result if answer.data is not None else ()
        samples = [(each.metric.get("__name__", ""), each.metric, float(each.value[1])) for each in series]
    except (msgspec.DecodeError, ValueError) as error:
        raise NoData(f"Prometheus' answer cannot be understood: {error}"[:200]) from error
    if answer.status != "success" or answer.warnings:
        raise NoData(f"Prometheus says: {'; '.join(answer.warnings) or answer.error or answer.status}"[:200])
    return samples


class PrometheusSource:
    """Asks a Prometheus.

    Args:
        url: its address, without ``/api``.
        client: makes the request.
    """

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self._url = f"{url.rstrip('/')}/api/v1/query"
        self._client = client

    async def read(self, groups: Sequence[str]) -> Reading:
        """See `MetricsSource`."""
        try:
            response = await self._client.post(self._url, data={"query": QUERY})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoData(f"Prometheus cannot be read: {type(error).__name__}: {error}"[:200]) from error
        return reading_of(samples_of(response.content), groups)

    async def close(self) -> None:
        """See `MetricsSource`."""
        await self._client.aclose()
