"""The scheduler's book of slots: what is asked for, what is placed, which node is reachable. It knows nothing of Dask.

Keyed by node and device. The state of a Dask task never frees a lease: a lease ends when the agent says that the slot is
closed, when the slot is missing from a registration report, when the node registers another incarnation, or when the leader
says so. A slot whose Dask task was lost keeps its lease and may only be placed on its own node again. A slot of kind DIRECT
is asked for anew, under a new id, each time that its task is to run.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Final

import msgspec

from manager.core.index import Index
from manager.core.lifecycle import SlotKind
from manager.core.placement import find
from manager.core.policies import DEFAULT_POLICY
from manager.core.shapes import Grant, Shape
from plugins.held import Held, Priority
from plugins.node.link import Beat, Report

GONE_S: Final = 3600.0
"""A node with no Dask worker and no lease for so long is forgotten: names of nodes that scaling took away do not come back."""
KEPT_S: Final = 10.0
"""Room that the leader has had kept, and no longer asks for, is given to anybody after this: a leader may be gone."""
PLACING_S: Final = 5.0
"""A slot that was placed less than this ago is on its way to its agent, not late."""


class SlotRequest(msgspec.Struct, frozen=True):
    """A slot that Dask was asked to run.

    Attributes:
        slot_id: the slot.
        shape: what it is leased to.
        node: the only node it may go to, where it has lived there before; else empty.
        priority: Dask's own of its task; lower goes first.
        kind: what it is for.
        places: names of nodes (or their hosts, or addresses of their workers) of which one must do; empty: any does.
    """

    slot_id: str
    shape: Shape
    node: str = ""
    priority: Priority = ()
    kind: SlotKind = SlotKind.TASKS
    places: frozenset[str] = frozenset()


class DirectClass(msgspec.Struct, frozen=True, order=True):
    """What requests of Dask's own users have in common for placement."""

    memory_bytes: int
    gpus: int
    places: tuple[str, ...]


class DirectWaiting(msgspec.Struct, frozen=True):
    """How many Dask tasks of one size wait for room."""

    memory_bytes: int
    gpus: int
    count: int
    oldest_wait_s: float


class Assignment(msgspec.Struct, frozen=True):
    """Send this slot's Dask task to this node. `fresh`: its lease was made by this decision; no agent knows of it yet."""

    slot_id: str
    grant: Grant
    fresh: bool = True


class Ledger:
    """Requests, leases and nodes. Changed only by its methods, each a delta."""

    def __init__(self) -> None:
        self.index = Index()
        self.requests: dict[str, SlotRequest] = {}
        self.held = Held()
        self.names: dict[str, frozenset[str]] = {}  # node → what it may be called in `SlotRequest.places`
        self.placed_s: dict[str, float] = {}
        self._generations: dict[str, tuple[str, int]] = {}  # node → of whom it has registered last
        self._away_s: dict[str, float] = {}  # node without a Dask worker → since when
        self._kept_s = 0.0
        self._cordoned: frozenset[str] = frozenset()
        self._cordoned_there: set[str] = set()

    def ask(self, request: SlotRequest, now_s: float) -> None:
        """A slot is to be placed."""
        self.requests[request.slot_id] = request
        self._hold(request.slot_id, now_s)

    def hold(self, slot_id: str, now_s: float) -> None:
        """The slot's Dask task has no worker (any more): place it again."""
        if slot_id in self.requests:
            self._hold(slot_id, now_s)
            self.placed_s.pop(slot_id, None)

    def _hold(self, slot_id: str, now_s: float) -> None:
        request = self.requests[slot_id]
        self.held.push(slot_id, request.priority, self._class(request), now_s)

    def _class(self, request: SlotRequest) -> Hashable:
        """What is placed alike. A slot that has a home, or room that is kept for it, is like no other."""
        slot_id, shape = request.slot_id, request.shape
        if request.node or slot_id in self.index.grants or slot_id in self.index.kept:
            return slot_id
        if request.kind is SlotKind.DIRECT:
            return DirectClass(shape.memory_bytes, shape.gpus, tuple(sorted(request.places)))
        return shape.memory_bytes, shape.gpus

    def _sort(self, slots: Iterable[str], now_s: float) -> None:
        """Leases or kept room of these have changed, and so may have their classes."""
        for slot_id in slots:
            if slot_id in self.held:
                self._hold(slot_id, now_s)

    def _alone(self) -> list[str]:
        """Held slots that are classes of their own."""
        return [kind for kind in self.held.kinds() if isinstance(kind, str)]

    def forget(self, slot_id: str) -> None:
        """Dask has forgotten the slot's task. Its lease, if it has one, stays."""
        self.requests.pop(slot_id, None)
        self.held.discard(slot_id)
        self.placed_s.pop(slot_id, None)
        self.index.unkeep(slot_id)

    def keep(self, grants: Mapping[str, Grant], now_s: float) -> None:
        """The leader has slots closed so that these held ones fit there: nobody else gets that room. Replaces the last."""
        before = list(self.index.kept)
        for slot_id in before:
            self.index.unkeep(slot_id)
        for slot_id, grant in grants.items():
            if slot_id in self.held:
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
        self._generations[report.node] = report.incarnation, report.generation
        self._away_s.pop(report.node, None)
        index = self.index
        index.add_node(report.node, report.incarnation, report.devices, report.reserve_bytes, report.slots_max)
        live = {slot.slot_id: slot.grant for slot in report.slots}
        for slot_id in index.slots_on(report.node):
            if slot_id not in live:
                index.free(slot_id, now_s)
        for slot_id, grant in live.items():
            if slot_id in index.grants and index.grants[slot_id] != grant:
                index.free(slot_id, now_s)
            index.lease(slot_id, grant, now_s)
        self._sort((*self._alone(), *live), now_s)
        # `lost` stays: an incarnation that the leader has fenced may register before it has learned of that.
        view = index.nodes[report.node]
        view.reachable = True
        self._note_cordon(report.node, there=report.cordoned)

    def cordon(self, nodes: frozenset[str]) -> None:
        """The leader says on which nodes nothing new may be placed."""
        changed, self._cordoned = self._cordoned ^ nodes, nodes
        for node in changed:
            self._note_cordon(node, there=node in self._cordoned_there)

    def _note_cordon(self, node: str, *, there: bool) -> None:
        """A node is cordoned if the leader or its own agent says so: who is told first depends."""
        (self._cordoned_there.add if there else self._cordoned_there.discard)(node)
        if (view := self.index.nodes.get(node)) is not None:
            view.cordoned = there or node in self._cordoned

    def unreachable(self, node: str, now_s: float) -> None:
        """The node has no Dask worker now. Its leases stay."""
        if (view := self.index.nodes.get(node)) is not None:
            view.reachable = False
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

    def lost(self, node: str, incarnation: str, now_s: float) -> None:
        """The leader has ended all slots of this incarnation in the store: nothing more is placed there."""
        view = self.index.nodes.get(node)
        if view is not None and view.incarnation == incarnation:
            view.lost = True
            self.closed(self.index.slots_on(node), now_s)

    def where(self, slot_id: str, now_s: float) -> str:
        """``held``, ``placing`` (just now), ``placed``, or ``leased``: it has a lease, but no Dask task."""
        if slot_id in self.held:
            return "held"
        if slot_id not in self.requests:
            return "leased"
        return "placing" if now_s - self.placed_s.get(slot_id, now_s) < PLACING_S else "placed"

    def direct_waiting(self, now_s: float) -> list[DirectWaiting]:
        """Dask tasks that wait, by size; the most first."""
        sizes: dict[tuple[int, int], tuple[int, float]] = {}
        for waiting in self.held.waiting():
            if isinstance(waiting.kind, DirectClass):
                size = (waiting.kind.memory_bytes, waiting.kind.gpus)
                count, since_s = sizes.get(size, (0, now_s))
                sizes[size] = (count + waiting.count, min(since_s, waiting.since_s))
        rows = [DirectWaiting(*size, count, now_s - since_s) for size, (count, since_s) in sizes.items()]
        return sorted(rows, key=lambda row: (-row.count, row.memory_bytes, row.gpus))

    def decide(self, now_s: float) -> list[Assignment]:
        """Place what is held and fits, in order of priority; each assignment is leased at once."""
        if self.index.kept and now_s - self._kept_s > KEPT_S:
            self.keep({}, now_s)
        too_large: list[tuple[int, int]] = []
        assignments: list[Assignment] = []
        following = self.held.round()
        while (slot_id := following.next()) is not None:
            request = self.requests[slot_id]
            leased = self.index.grants.get(slot_id)
            kept = self.index.kept.get(slot_id)
            grant = self._home(request, leased) if leased is not None or request.node else self._new(request, too_large)
            if grant is None:
                continue
            self.index.lease(slot_id, grant, now_s)
            self.held.discard(slot_id)
            self.placed_s[slot_id] = now_s
            assignments.append(Assignment(slot_id, grant, fresh=leased is None))
            following.placed()
            if kept is not None:  # it may have gone elsewhere, and left the room that was kept for it
                too_large.clear()
                following.again()
        return assignments

    def undo(self, assignment: Assignment, now_s: float) -> None:
        """Dask did not take it: hold it again. A lease that was there before stays, since its agent has the slot open."""
        if assignment.fresh:
            self.index.free(assignment.slot_id, now_s)
        self.hold(assignment.slot_id, now_s)

    def allowed(self, request: SlotRequest) -> Index:
        """The part of the ledger in which the request may be placed; only to be looked at."""
        if not request.places:
            return self.index
        part = Index()
        part.nodes = {
            node: view for node, view in self.index.nodes.items() if request.places & self.names.get(node, frozenset())
        }
        return part

    def _home(self, request: SlotRequest, leased: Grant | None) -> Grant | None:
        """A slot that has a lease, or a node that it lived on, may go nowhere else."""
        home = leased.node if leased is not None else request.node
        view = self.index.nodes.get(home)
        if view is None or not view.reachable or view.lost:
            return None
        # Without a lease after its node has reported, the slot is gone; the agent is asked all the same, and says so.
        return leased or Grant(home, (), 0)

    def _new(self, request: SlotRequest, too_large: list[tuple[int, int]]) -> Grant | None:
        """Where a new slot fits. Within one decision room only shrinks, so what is as large as a failure is not tried."""
        shape = request.shape
        kept = self.index.unkeep(request.slot_id)
        if kept is None and any(shape.memory_bytes >= memory and shape.gpus >= gpus for memory, gpus in too_large):
            return None
        grant = find(shape.resources, self.allowed(request), DEFAULT_POLICY)
        if grant is None and kept is not None:
            self.index.keep(request.slot_id, kept)
        elif grant is None and not request.places:
            too_large.append((shape.memory_bytes, shape.gpus))
        return grant
