"""What the API knows of the cluster: one look each second, and what can only be known by watching.

Whether a node or a leader lives is seen by its beat changing, on this process's monotonic clock: no clocks are compared.
Submissions are checked against the last look, at most about a second old; who asks about the cluster gets a fresh one.
"""

import asyncio
import time
from functools import cached_property
from typing import Final

import msgspec

from manager.core.answers import utc
from manager.core.answers_cluster import DependencyState, DependencyView, LeaderView
from manager.core.index import Index, index_of
from manager.core.model import ClusterState, NodeInfo, NodeRow
from manager.core.node_kinds import Capacity
from manager.core.packing import PackGroup
from manager.settings import AutoscalerSettings, ControllerSettings, NodeSettings
from manager.store import Store

LOOK_S: Final = 1.0
FRESH_S: Final = 0.2
"""Answers about the cluster are this old at most; a flood of such questions costs five looks a second."""
FSYNC_S: Final = 5.0
AUTOSCALER: Final = "autoscaler"
"""The role of autoscalers, who have a leader of their own."""


class Snapshot(msgspec.Struct, frozen=True, dict=True):
    """One look.

    Attributes:
        silent: nodes whose beat has not changed for a lease, or that were never seen to beat for so long.
        capacity: what the known nodes could hold were they empty; the same object until what there is has changed.
        at_s: when, on this process's monotonic clock.
        registration_s: a Dask worker that has not reported for so long has failed to register.
        dependencies: how the parts are that others need.
    """

    state: ClusterState
    silent: frozenset[str]
    capacity: Capacity
    leader: LeaderView
    fsync: str
    at_s: float
    registration_s: float
    dependencies: tuple[DependencyView, ...]

    @cached_property
    def index(self) -> Index:
        """The ledger that follows from `state`; nobody may change it. Made when somebody asks: submissions need none."""
        return index_of(self.state)

    def store_now_ms(self) -> int:
        """The store's clock now, as far as this process can tell."""
        return self.state.now_ms + int((time.monotonic() - self.at_s) * 1000)

    def live(self) -> list[NodeRow]:
        """Nodes whose agent beats."""
        return [n for n in self.state.nodes if not n.left and not n.fenced and n.node not in self.silent]


class _Seen(msgspec.Struct, frozen=True):
    """The last beat of somebody, and when it was first seen."""

    beat: tuple[str, int]
    at_s: float
    changed: bool


class ClusterWatch:
    """Looks at the cluster.

    Args:
        store: asked each second.
        node, controller, autoscaler: say how long a silence is meant.
        groups: nodes of these can be added, so what they could hold is feasible.
    """

    def __init__(
        self,
        store: Store,
        node: NodeSettings,
        controller: ControllerSettings,
        autoscaler: AutoscalerSettings,
        groups: tuple[PackGroup, ...] = (),
    ) -> None:
        self._store = store
        self._groups = groups
        self._lease_s = node.beat_s * node.lease_beats
        self._term_s = controller.term_s
        self._scaler_term_s = autoscaler.term_s
        self._scaler_wanted = autoscaler.mode != "off"
        self._details: dict[str, str] = {}
        self._nodes: dict[str, _Seen] = {}
        self._registration_s = node.registration_s
        self._leader: _Seen | None = None
        self._scaler: _Seen | None = None
        self._since: dict[str, tuple[DependencyState, int]] = {}
        self._fsync = ("unknown", float("-inf"))
        self._there: tuple[tuple[str, NodeInfo], ...] = ()
        self._capacity = Capacity({})
        self._looking: asyncio.Task[Snapshot] | None = None
        self.snapshot: Snapshot | None = None

    async def look(self) -> Snapshot:
        """Look now; callers at the same time share one look.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def fresh(self) -> Snapshot:
        """The last look if it is fresh, else a new one.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        last = self.snapshot
        return last if last is not None and time.monotonic() - last.at_s < FRESH_S else await self.look()

    async def _look(self) -> Snapshot:
        state, (_, token, beat, holder), (_, scaler_token, scaler_beat, scaler) = await asyncio.gather(
            self._store.look(leader=False),
            self._store.lead("", 0, 0, "read"),
            self._store.lead("", 0, 0, "read", AUTOSCALER),
        )
        now_s = time.monotonic()
        if now_s - self._fsync[1] >= FSYNC_S:
            self._fsync = (await self._store.fsync_policy(), now_s)
        self._nodes = {row.node: _observe(self._nodes.get(row.node), (row.incarnation, row.beat), now_s) for row in state.nodes}
        self._leader = _observe(self._leader, (f"{token} {holder}", beat), now_s)
        self._scaler = _observe(self._scaler, (f"{scaler_token} {scaler}", scaler_beat), now_s)
        leads = _beating(self._leader, holder, now_s, self._term_s)
        scales = _beating(self._scaler, scaler, now_s, self._scaler_term_s) if scaler_token else None
        self._note_states(_states(leads, state.dask, scales, scaler_seen=scaler_token > 0), state)
        silent = frozenset(name for name, seen in self._nodes.items() if now_s - seen.at_s >= self._lease_s)
        self.snapshot = Snapshot(
            state=state,
            silent=silent,
            capacity=self._capacity_of(state),
            leader=LeaderView(holder, token, leads),
            fsync=self._fsync[0],
            at_s=now_s,
            registration_s=self._registration_s,
            dependencies=tuple(
                DependencyView(name=name, state=known, since_at=utc(since_ms), detail=self._details[name])
                for name, (known, since_ms) in self._since.items()
            ),
        )
        return self.snapshot

    def _capacity_of(self, state: ClusterState) -> Capacity:
        """What there could be room for. With no node known nothing can be said: some may be on their way."""
        there = tuple((row.node, row.info) for row in state.nodes if not row.left)
        if there != self._there:
            groups = [(group.name, group.kind) for group in self._groups if group.nodes_max]
            self._there, self._capacity = there, Capacity.of(there, groups if there else ())
        return self._capacity

    def _note_states(self, states: dict[str, tuple[DependencyState, str]], state: ClusterState) -> None:
        """Remember since when each part is as it is; of Dask the leader knows better."""
        if not self._scaler_wanted and states["autoscaler"][0] is not DependencyState.OK:
            del states["autoscaler"]
            self._since.pop("autoscaler", None)
        self._details = {name: detail for name, (_, detail) in states.items()}
        for name, (known, _) in states.items():
            if name not in self._since or self._since[name][0] is not known:
                self._since[name] = (known, state.now_ms)
        if self._since["scheduler"][0] is not DependencyState.UNKNOWN and state.dask_ms is not None:
            self._since["scheduler"] = (self._since["scheduler"][0], state.dask_ms)


def _states(
    leads: bool | None, dask: bool | None, scales: bool | None, *, scaler_seen: bool
) -> dict[str, tuple[DependencyState, str]]:
    """What follows for each part, with a word about it where that is needed."""
    ok, unknown, down = DependencyState
    as_state = {True: ok, None: unknown, False: down}
    return {
        "store": (ok, ""),
        "api": (ok, ""),
        "controller": (as_state[leads], "" if leads is not False else "none leads"),
        "scheduler": (unknown, "only a controller that leads can tell")
        if leads is False
        else (
            as_state[dask],
            "" if dask is not False else "the controller does not reach it",
        ),
        "autoscaler": (as_state[scales], "" if scaler_seen and scales is not False else "none runs"),
    }


def _observe(seen: _Seen | None, beat: tuple[str, int], now_s: float) -> _Seen:
    if seen is None:
        return _Seen(beat, now_s, changed=False)
    return seen if seen.beat == beat else _Seen(beat, now_s, changed=True)


def _beating(seen: _Seen, holder: str, now_s: float, term_s: float) -> bool | None:
    """Whether a leader beats; None while it has not been watched for long enough to tell."""
    if not holder:
        return False
    if now_s - seen.at_s >= term_s:
        return False
    return True if seen.changed else None
