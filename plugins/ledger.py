"""The scheduler's book of slots: what is asked for, what is placed, which node is reachable. It knows nothing of Dask.

Keyed by node and device. The state of a Dask task never frees a lease: a lease ends when the agent says that the slot is
closed, when the slot is missing from a registration report, when the node registers another incarnation, or when the leader
says so. A slot whose Dask task was lost keeps its lease and may only be placed on its own node again.
"""

import msgspec

from manager.core.placement import Grant, Index, Placed, Unplaced, Verdict, place
from manager.core.shapes import Shape
from plugins.node.link import Beat, Report


class SlotRequest(msgspec.Struct, frozen=True):
    """A slot that Dask was asked to run.

    Attributes:
        slot_id: the slot.
        shape: what it is leased to.
        node: the only node it may go to, where it has lived there before; else empty.
    """

    slot_id: str
    shape: Shape
    node: str = ""


class Assignment(msgspec.Struct, frozen=True):
    """Send this slot's Dask task to this node."""

    slot_id: str
    grant: Grant


class Ledger:
    """Requests, leases and nodes. Changed only by its methods, each a delta."""

    def __init__(self) -> None:
        self.index = Index()
        self.requests: dict[str, SlotRequest] = {}
        self.held: dict[str, tuple[Verdict, ...]] = {}
        self.reported: set[str] = set()

    def ask(self, request: SlotRequest) -> None:
        """A slot is to be placed."""
        self.requests[request.slot_id] = request
        self.held.setdefault(request.slot_id, ())

    def hold(self, slot_id: str) -> None:
        """The slot's Dask task has no worker (any more): place it again."""
        if slot_id in self.requests:
            self.held.setdefault(slot_id, ())

    def forget(self, slot_id: str) -> None:
        """Dask has forgotten the slot's task. Its lease, if it has one, stays."""
        self.requests.pop(slot_id, None)
        self.held.pop(slot_id, None)

    def ended(self, slot_id: str, now_s: float) -> None:
        """The agent said that the slot is closed or was never opened, or the leader took it back unopened."""
        self.index.free(slot_id, now_s)
        self.forget(slot_id)

    def register(self, report: Report, now_s: float) -> None:
        """A node's Dask worker registers. The report is the whole truth about that node."""
        index = self.index
        index.add_node(report.node, report.incarnation, report.devices, report.reserve_bytes)
        live = {slot.slot_id: slot.grant for slot in report.slots}
        for slot_id in index.slots_on(report.node):
            if slot_id not in live:
                index.free(slot_id, now_s)
        for slot_id, grant in live.items():
            if slot_id in index.grants and index.grants[slot_id] != grant:
                index.free(slot_id, now_s)
            index.lease(slot_id, grant, now_s)
        view = index.nodes[report.node]
        view.reachable, view.lost, view.cordoned = True, False, report.cordoned
        self.reported.add(report.node)

    def unreachable(self, node: str) -> None:
        """The node has no Dask worker now. Its leases stay."""
        if (view := self.index.nodes.get(node)) is not None:
            view.reachable = False

    def hear(self, beat: Beat, now_s: float, silent: bool) -> None:
        """News of a node, `silent`: its agent did not answer, so place nothing new there."""
        for slot_id in beat.closed:
            self.index.free(slot_id, now_s)
        view = self.index.nodes.get(beat.node)
        if view is None:
            return
        view.cordoned = beat.cordoned or silent
        for use in beat.uses:
            self.index.observe(beat.node, use, now_s - beat.age_s)

    def lost(self, node: str, incarnation: str) -> None:
        """The leader has ended all slots of this incarnation in the store: nothing more is placed there."""
        view = self.index.nodes.get(node)
        if view is not None and view.incarnation == incarnation:
            view.lost = True
            for slot_id in self.index.slots_on(node):
                self.index.free(slot_id)

    def decide(self, now_s: float) -> list[Assignment]:
        """Place what is held and fits, oldest first; each assignment is leased at once. Equal shapes are answered once."""
        blocked: dict[Shape, tuple[Verdict, ...]] = {}
        assignments: list[Assignment] = []
        for slot_id in list(self.held):
            request = self.requests[slot_id]
            grant = self._grant(request, blocked)
            if grant is None:
                self.held[slot_id] = blocked.get(request.shape, ())
                continue
            self.index.lease(slot_id, grant, now_s)
            del self.held[slot_id]
            assignments.append(Assignment(slot_id, grant))
        return assignments

    def _grant(self, request: SlotRequest, blocked: dict[Shape, tuple[Verdict, ...]]) -> Grant | None:
        """Where the slot may go now. One that has a lease, or a node that it lived on, may go nowhere else."""
        leased = self.index.grants.get(request.slot_id)
        if leased is not None or request.node:
            home = leased.node if leased is not None else request.node
            view = self.index.nodes.get(home)
            if view is None or not view.reachable or view.lost:
                return None
            # Without a lease after its node has reported, the slot is gone; the agent is asked all the same, and says so.
            return leased or Grant(home, (), 0)
        if request.shape in blocked:
            return None
        match place(request.shape, self.index):
            case Placed(grant):
                return grant
            case Unplaced(verdicts):
                blocked[request.shape] = verdicts
                return None
