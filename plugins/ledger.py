"""The scheduler's book of slots: what is asked for, what is placed, which node is reachable. It knows nothing of Dask.

Keyed by node and device. The state of a Dask task never frees a lease: a lease ends when the agent says that the slot is
closed, when the slot is missing from a registration report, when the node registers another incarnation, or when the leader
says so. A slot whose Dask task was lost keeps its lease and may only be placed on its own node again. A slot of kind DIRECT
is asked for anew, under a new id, each time that its task is to run.

Room is kept for two kinds of slot: for those of the leader where it says so, and for Dask tasks that have waited for long while
others passed them (`manager.core.reservations`), where the ledger itself says so.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import numpy as np

from manager.core.index import Index
from manager.core.lifecycle import SlotKind
from manager.core.outlook import DemandCounter
from manager.core.placement import Policy, Verdict, find, verdict
from manager.core.policies import DEFAULT_POLICY
from manager.core.reservations import best_room, grant_in, is_ready, room_on
from manager.core.shapes import Grant, Resources, Shape, asks_for_all_of, grant_of
from manager.core.table import Ints, Table
from plugins.held import Held, Priority
from plugins.node.link import Beat, Report

GONE_S: Final = 3600.0
"""A node with no Dask worker and no lease for so long is forgotten: names of nodes that scaling took away do not come back."""
KEPT_S: Final = 10.0
"""Room that the leader has had kept, and no longer asks for, is given to anybody after this: a leader may be gone."""
PLACING_S: Final = 5.0
"""A slot that was placed less than this ago is on its way to its agent, not late."""
RESERVE_AFTER_S: Final = 5.0
"""As the setting ``placement.reserve_after_s``, where nobody has set it."""
RESERVED_MAX: Final = 8
"""Dask tasks for which room is kept at once. The more there are, the more of the cluster stands empty and waits for them."""
RESERVE_PERIOD_S: Final = 1.0
"""Time between two looks at who needs room kept, and where: one of them searches all nodes."""
PLACES_MAX: Final = 256
"""Choices of nodes by users that are remembered as rows; more than that and all are forgotten."""


class SlotRequest(msgspec.Struct, frozen=True):
    """A slot that Dask was asked to run.

    Attributes:
        slot_id: the slot.
        shape: what it is leased to.
        node: the only node it may go to, where it has lived there before; else empty.
        priority: Dask's own of its task; lower goes first.
        kind: what it is for.
        places: names of nodes (or their hosts, or addresses of their workers) of which one must do; empty: any does.
        learned: what it needs where that turned out to be more than its shape says.
    """

    slot_id: str
    shape: Shape
    node: str = ""
    priority: Priority = ()
    kind: SlotKind = SlotKind.TASKS
    places: frozenset[str] = frozenset()
    learned: Resources | None = None

    @property
    def resources(self) -> Resources:
        """What it is placed with."""
        return self.learned or self.shape.resources


class Alike(msgspec.Struct, frozen=True):
    """What requests have in common that are placed alike: if the first does not fit, none does.

    `alone` is the slot of one that is like no other: it has a home, or room that is kept for it.
    """

    resources: Resources
    places: frozenset[str] = frozenset()
    kind: SlotKind = SlotKind.TASKS
    alone: str = ""


class DirectWaiting(msgspec.Struct, frozen=True):
    """How many Dask tasks that need the same wait for room."""

    resources: Resources
    count: int
    oldest_wait_s: float


class Assignment(msgspec.Struct, frozen=True):
    """Send this slot's Dask task to this node. `fresh`: its lease was made by this decision; no agent knows of it yet."""

    slot_id: str
    grant: Grant
    fresh: bool = True


class Ledger:
    """Requests, leases and nodes. Changed only by its methods, each a delta.

    Args:
        policy: says which of all places that fit is best.
        reserve_after_s: a Dask task that has waited for longer, while others passed it, has room kept for it.
    """

    def __init__(self, policy: Policy = DEFAULT_POLICY, reserve_after_s: float = RESERVE_AFTER_S) -> None:
        self.policy = policy
        self.mix = DemandCounter()
        self.reserve_after_s = reserve_after_s
        self.index = Index()
        self.requests: dict[str, SlotRequest] = {}
        self.held: Held[Alike] = Held()
        self.reserved: dict[str, Grant] = {}  # Dask task's slot → the room that is kept for it, in `index.kept` too
        self.names: dict[str, frozenset[str]] = {}  # node → what it may be called in `SlotRequest.places`
        self.placed_s: dict[str, float] = {}
        self._generations: dict[str, tuple[str, int]] = {}  # node → of whom it has registered last
        self._away_s: dict[str, float] = {}  # node without a Dask worker → since when
        self._kept_s = 0.0
        self._passed: dict[str, float] = {}  # held slot of a Dask task that others went before → when it last looked for room
        self._reserved_s = 0.0
        self._rows: dict[frozenset[str], Ints] = {}  # rows of `_rows_of` that places stand for
        self._rows_of: Table | None = None
        self._cordoned: frozenset[str] = frozenset()
        self._cordoned_there: set[str] = set()

    def ask(self, request: SlotRequest, now_s: float) -> None:
        """A slot is to be placed."""
        self.requests[request.slot_id] = request
        if not request.node:  # one that has lived before was counted then
            self.mix.note(request.resources)
        self._hold(request.slot_id, now_s)

    def hold(self, slot_id: str, now_s: float) -> None:
        """The slot's Dask task has no worker (any more): place it again."""
        if slot_id in self.requests:
            self._hold(slot_id, now_s)
            self.placed_s.pop(slot_id, None)

    def _hold(self, slot_id: str, now_s: float) -> None:
        request = self.requests[slot_id]
        self.held.push(slot_id, request.priority, self._class(request), now_s)

    def _class(self, request: SlotRequest) -> Alike:
        slot_id = request.slot_id
        is_alone = request.node or slot_id in self.index.grants or slot_id in self.index.kept
        return Alike(request.resources, request.places, request.kind, slot_id if is_alone else "")

    def _sort(self, slots: Iterable[str], now_s: float) -> None:
        """Leases or kept room of these have changed, and so may have their classes."""
        for slot_id in slots:
            if slot_id in self.held:
                self._hold(slot_id, now_s)

    def _alone(self) -> list[str]:
        """Held slots that are like no other."""
        return [kind.alone for kind in self.held.kinds() if kind.alone]

    def forget(self, slot_id: str) -> None:
        """Dask has forgotten the slot's task. Its lease, if it has one, stays."""
        self.requests.pop(slot_id, None)
        self.held.discard(slot_id)
        self.placed_s.pop(slot_id, None)
        self._unkeep(slot_id)
        self._passed.pop(slot_id, None)

    def _unkeep(self, slot_id: str) -> Grant | None:
        """Keep no room for the slot, whoever had it kept; what was kept."""
        self.reserved.pop(slot_id, None)
        return self.index.unkeep(slot_id)

    def keep(self, grants: Mapping[str, Grant], now_s: float) -> None:
        """The leader has slots closed so that these held ones fit there: nobody else gets that room. Replaces the last."""
        # What two are to have of one node might never be free at once for either: the leader's word goes first.
        nodes = {grant.node for grant in grants.values()}
        before = [slot_id for slot_id, grant in self.index.kept.items() if slot_id not in self.reserved or grant.node in nodes]
        for slot_id in before:
            self._unkeep(slot_id)
        for slot_id, grant in grants.items():
            if slot_id in self.held:
                self._unkeep(slot_id)
                self.index.keep(slot_id, grant)
        self._kept_s = now_s
        self._sort((*before, *grants), now_s)

    def ended(self, slot_id: str, now_s: float) -> None:
        """The agent said that the slot is closed or was never opened, or the leader took it back unopened."""
        self.index.free(slot_id, now_s)
        self.forget(slot_id)

    def closed(self, slots: Iterable[str], now_s: float) -> None:
        """The agent says that nothing is left of these."""
        gone = [slot_id for slot_id in slots if self.index.free(slot_id, now_s) is not None]
        self._sort(gone, now_s)

    def is_outdated(self, report: Report) -> bool:
        """Whether a newer Dask worker of the same agent has registered before: what this one says is not so any more."""
        incarnation, generation = self._generations.get(report.node, ("", 0))
        return report.incarnation == incarnation and report.generation < generation

    def register(self, report: Report, now_s: float, names: Iterable[str] = ()) -> None:
        """A node's Dask worker registers. The report is the whole truth about that node.

        Args:
            report: what its agent says.
            now_s: the scheduler's clock.
            names: what the node may be called beside its own name.
        """
        self._forget_nodes(now_s)
        self.names[report.node] = frozenset({report.node, *names})
        self._rows_of = None
        self._generations[report.node] = report.incarnation, report.generation
        self._away_s.pop(report.node, None)
        index = self.index
        index.add_node(
            report.node,
            report.incarnation,
            report.devices,
            report.reserve_bytes,
            report.slots_max,
            cpu_milli=report.cpu_milli,
            host_memory_bytes=report.host_memory_bytes,
            labels=report.labels,
        )
        live = {slot.slot_id: slot.grant for slot in report.slots}
        for slot_id in index.slots_on(report.node):
            if slot_id not in live:
                index.free(slot_id, now_s)
        for slot_id, grant in live.items():
            if slot_id in index.grants and index.grants[slot_id] != grant:
                index.free(slot_id, now_s)
            index.lease(slot_id, grant, now_s)
        self._leave_room_of_other_places(report.node, now_s)
        self._sort((*self._alone(), *live), now_s)
        # `lost` stays: an incarnation that the leader has fenced may register before it has learned of that.
        index.mark(report.node, reachable=True)
        self._note_cordon(report.node, there=report.cordoned)

    def _leave_room_of_other_places(self, node: str, now_s: float) -> None:
        """The node may be called otherwise than before: who must go to what it was called has no room kept there."""
        names = self.names[node]
        for slot_id in [slot_id for slot_id, kept in self.reserved.items() if kept.node == node]:
            places = self.requests[slot_id].places
            if places and places.isdisjoint(names):
                self._unkeep(slot_id)
                self._sort([slot_id], now_s)

    def cordon(self, nodes: frozenset[str]) -> None:
        """The leader says on which nodes nothing new may be placed."""
        changed, self._cordoned = self._cordoned ^ nodes, nodes
        for node in changed:
            self._note_cordon(node, there=node in self._cordoned_there)

    def _note_cordon(self, node: str, *, there: bool) -> None:
        """A node is cordoned if the leader or its own agent says so: who is told first depends."""
        (self._cordoned_there.add if there else self._cordoned_there.discard)(node)
        self.index.mark(node, cordoned=there or node in self._cordoned)

    def unreachable(self, node: str, now_s: float) -> None:
        """The node has no Dask worker now. Its leases stay."""
        if node in self.index.nodes:
            self.index.mark(node, reachable=False)
            self._away_s[node] = now_s

    def left(self, nodes: Iterable[str], now_s: float) -> None:
        """The leader says that the agents of these have stopped cleanly: they are not coming back soon."""
        for node in nodes:
            if node in self._away_s:
                self._away_s[node] = now_s - 2 * GONE_S
        self._forget_nodes(now_s)

    def _forget_nodes(self, now_s: float) -> None:
        """Forget nodes that have been away for long and have nothing."""
        for node in [node for node, since_s in self._away_s.items() if now_s - since_s > GONE_S]:
            if not self.index.nodes[node].slots:
                self.index.remove_node(node)
                self._rows_of = None
                self._cordoned_there.discard(node)
                del self._away_s[node], self.names[node], self._generations[node]

    def hear(self, beat: Beat, now_s: float, *, heard_s: float, silent: bool) -> None:
        """News of a node.

        Args:
            beat: what its agent has said.
            now_s: the scheduler's clock.
            heard_s: seconds since the agent said it; its readings are so much older.
            silent: its agent has not answered since: place nothing new there.
        """
        self.closed(beat.closed, now_s)
        view = self.index.nodes.get(beat.node)
        if view is None:
            return
        self._note_cordon(beat.node, there=beat.cordoned or silent)
        for use in beat.uses:
            self.index.observe(beat.node, use, now_s - beat.age_s - heard_s)

    def silent(self, node: str) -> None:
        """The node's agent has not said a word since it has registered: nothing new goes there until it does."""
        self._note_cordon(node, there=True)

    def lost(self, node: str, incarnation: str, now_s: float) -> None:
        """The leader has ended all slots of this incarnation in the store: nothing more is placed there."""
        view = self.index.nodes.get(node)
        if view is not None and view.incarnation == incarnation:
            self.index.mark(node, lost=True)
            self.closed(self.index.slots_on(node), now_s)

    def where(self, slot_id: str, now_s: float) -> str:
        """``held``, ``placing`` (just now), ``placed``, or ``leased``: it has a lease, but no Dask task."""
        if slot_id in self.held:
            return "held"
        if slot_id not in self.requests:
            return "leased"
        return "placing" if now_s - self.placed_s.get(slot_id, now_s) < PLACING_S else "placed"

    def direct_waiting(self, now_s: float) -> list[DirectWaiting]:
        """Dask tasks that wait, by what they need; the most first."""
        needs: dict[Resources, tuple[int, float]] = {}
        for waiting in self.held.waiting():
            if waiting.kind.kind is SlotKind.DIRECT:
                count, since_s = needs.get(waiting.kind.resources, (0, now_s))
                needs[waiting.kind.resources] = (count + waiting.count, min(since_s, waiting.since_s))
        rows = [DirectWaiting(resources, count, now_s - since_s) for resources, (count, since_s) in needs.items()]
        return sorted(rows, key=lambda row: (-row.count, row.resources.memory_bytes, row.resources.gpus))

    def decide(self, now_s: float) -> list[Assignment]:
        """Place what is held and fits, in order of priority; each assignment is leased at once."""
        if len(self.index.kept) > len(self.reserved) and now_s - self._kept_s > KEPT_S:
            self.keep({}, now_s)
        if (self._passed or self.reserved) and now_s - self._reserved_s >= RESERVE_PERIOD_S:
            self._reserve(now_s)
        failed: list[Resources] = []
        blocked: list[str] = []
        assignments: list[Assignment] = []
        following = self.held.round()
        while (slot_id := following.next()) is not None:
            request = self.requests[slot_id]
            leased = self.index.grants.get(slot_id)
            kept = self.index.kept.get(slot_id)
            if leased is not None or request.node:
                grant = self._home(request, leased)
            else:
                grant = self._new(request, failed) if kept is None else self._with_room(request, kept, failed)
                if grant is not None and blocked:
                    for passed in blocked:
                        self._passed.setdefault(passed, 0.0)
                    blocked.clear()
            if grant is None:
                if request.kind is SlotKind.DIRECT:
                    blocked.append(slot_id)
                continue
            if kept is not None:
                self._unkeep(slot_id)
            self.index.lease(slot_id, grant, now_s)
            self.held.discard(slot_id)
            self._passed.pop(slot_id, None)
            self.placed_s[slot_id] = now_s
            assignments.append(Assignment(slot_id, grant, fresh=leased is None))
            following.placed()
            if kept is not None and kept != grant:  # it has gone elsewhere, and left the room that was kept for it
                failed.clear()
                following.again()
        return assignments

    def undo(self, assignment: Assignment, now_s: float) -> None:
        """Dask did not take it: hold it again. A lease that was there before stays, since its agent has the slot open."""
        if assignment.fresh:
            self.index.free(assignment.slot_id, now_s)
        self.hold(assignment.slot_id, now_s)

    def verdicts(self, slot_id: str) -> list[Verdict]:
        """What each node that it may go to says to a held slot that does not fit; none where it would."""
        request, kept = self.requests[slot_id], self.index.unkeep(slot_id)  # its own room is not in its way
        try:
            if self._new(request, []) is not None:
                return []
            views = self.index.nodes
            allowed = sorted(views) if not request.places else sorted(self._allowed(request.places))
            return [verdict(request.resources, views[node]) for node in allowed]
        finally:
            if kept is not None:
                self.index.keep(slot_id, kept)

    def _allowed(self, places: frozenset[str]) -> frozenset[str]:
        """The nodes that places stand for."""
        return frozenset(node for node in self.index.nodes if not places.isdisjoint(self.names.get(node, ())))

    def _rows_at(self, places: frozenset[str]) -> Ints | None:
        """Rows of the index's table that places stand for; None: all. Remembered until a node comes or goes."""
        if not places:
            return None
        table = self.index.table
        if self._rows_of is not table or len(self._rows) > PLACES_MAX:
            self._rows_of = table
            self._rows = {}
        rows = self._rows.get(places)
        if rows is None:
            rows = np.array(sorted(table.row_of[node] for node in self._allowed(places)), np.int64)
            self._rows[places] = rows
        return rows

    def _home(self, request: SlotRequest, leased: Grant | None) -> Grant | None:
        """A slot that has a lease, or a node that it lived on, may go nowhere else."""
        home = leased.node if leased is not None else request.node
        view = self.index.nodes.get(home)
        if view is None or not view.reachable or view.lost:
            return None
        # Without a lease after its node has reported, the slot is gone; the agent is asked all the same, and says so.
        return leased or Grant(home, (), 0)

    def _new(self, request: SlotRequest, failed: list[Resources]) -> Grant | None:
        """Where a new slot fits. Within one round room only shrinks, so what asks for as much as a failure is not tried."""
        resources = request.resources
        if any(asks_for_all_of(resources, other) for other in failed):
            return None
        grant = find(resources, self.index, self.policy, self.mix.demand, only=self._rows_at(request.places))
        if grant is None and not request.places:
            failed.append(resources)
        return grant

    def _with_room(self, request: SlotRequest, kept: Grant, failed: list[Resources]) -> Grant | None:
        """The room that is kept for the slot where that is free now, else any other that is."""
        if kept != grant_of(request.resources, kept.node, kept.devices):  # the leader has learned something else meanwhile
            self.index.unkeep(request.slot_id)
            grant = self._new(request, [])
            self.index.keep(request.slot_id, kept)
            return grant
        view = self.index.nodes.get(kept.node)
        if view is not None and is_ready(request.slot_id, kept, view):
            return kept
        return self._new(request, failed)

    # --- room for Dask tasks that others pass ---------------------------------------------------------------------------

    def _reserve(self, now_s: float) -> None:
        """Have room kept for who has waited for too long while others passed, and see whether what is kept still will do."""
        self._reserved_s = now_s
        for slot_id, kept in list(self.reserved.items()):
            self._review(slot_id, kept, now_s)
        since_s = now_s - self.reserve_after_s
        waiting = [s for s in self._passed if s not in self.index.kept and self.held.since_s(s) <= since_s]
        if waiting and len(self.reserved) < RESERVED_MAX:
            # In turns: one that fits nowhere, however empty, is not in the way of the others.
            self._search(min(waiting, key=lambda s: (self._passed[s], self.held.place(s))), now_s)
        elif self.reserved:
            self._search(next(iter(self.reserved)), now_s)  # elsewhere there may be less to wait for by now

    def _search(self, slot_id: str, now_s: float) -> None:
        """Keep the room that will be free first of all. Looks at every node: once in each period."""
        request = self.requests[slot_id]
        self._passed[slot_id] = now_s
        self._unkeep(slot_id)
        nodes = self._allowed(request.places) if request.places else None
        room = best_room(request.resources, self.index, nodes)
        if room is not None:
            self._keep_for(slot_id, grant_in(room, request.resources))
        self._sort([slot_id], now_s)

    def _review(self, slot_id: str, kept: Grant, now_s: float) -> None:
        """Keep the devices of the same node that will be free first; none where the node will not do any more."""
        request = self.requests[slot_id]
        self._unkeep(slot_id)
        view = self.index.nodes.get(kept.node)
        room = None if view is None else room_on(request.resources, view, self.index)
        if room is not None:
            self._keep_for(slot_id, grant_in(room, request.resources))
        self._sort([slot_id], now_s)

    def _keep_for(self, slot_id: str, grant: Grant) -> None:
        self.index.keep(slot_id, grant)
        self.reserved[slot_id] = grant
