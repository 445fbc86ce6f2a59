"""The scheduler's ledger against anything in any order, checked by arithmetic of its own: nothing is ever promised twice,
nothing that fits stays held, everyone has a turn, all comes back in the end, and what is kept up to date is what is true.

Sizes, nodes and devices are few, and small in number, so that whatever is asked for is in somebody's way. That the checks see
faults is tests/unit/test_ledger_mutants.py's.
"""

import itertools
from collections import Counter

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manager.core.lifecycle import SlotKind
from manager.core.placement import find
from manager.core.policies import POLICIES
from manager.core.quantities import GIB
from manager.core.reservations import best_room, grant_in
from manager.core.shapes import Grant, Resources, Shape
from manager.core.table import Table
from plugins.ledger import GONE_S, KEPT_S, RESERVED_MAX, Ledger, SlotRequest
from plugins.node.link import LiveSlot, Report
from tests.unit import factories as make

RESERVE_BYTES = GIB // 2
TICK_S = 1 / 64
"""Times are exact in binary, so that a reading can be made at the very moment of a change."""
PLAIN = make.devices(24.5, 24.5)
# Two quadrants with two devices each, as a card in CPX has them.
SPLIT = tuple(msgspec.structs.replace(device, pool=f"q{at // 2}") for at, device in enumerate(make.devices(*[24.5] * 4)))
OTHER = tuple(msgspec.structs.replace(device, architecture="gfx90a") for device in make.devices(48.5))
ZONE = (("zone", "x"),)
NODES = {
    "a": Report("a", "", 1, PLAIN, RESERVE_BYTES, (), slots_max=4, cpu_milli=8000, host_memory_bytes=64 * GIB),
    "b": Report("b", "", 1, SPLIT, RESERVE_BYTES, (), cpu_milli=8000, labels=ZONE),
    "c": Report("c", "", 1, OTHER, RESERVE_BYTES, (), slots_max=3, host_memory_bytes=64 * GIB, labels=ZONE),
    # Comes later, and in the order of names between the others.
    "ab": Report("ab", "", 1, PLAIN[:1], RESERVE_BYTES, (), slots_max=2, cpu_milli=8000),
}
SIZES = (6, 12, 24)  # the larger ones are what some of the smaller ones leave when they end
EXTRAS = (
    {},
    {},
    {},
    {"share_milli": 500},
    {"share_milli": 1000},
    {"exclusive": True},
    {"cpu_milli": 4000},
    {"cpu_milli": 8000},
    {"host_memory_bytes": 32 * GIB},
    {"labels": ZONE},
    {"architectures": ("gfx942",)},
    {"architectures": ("gfx90a",)},
    {"model": "m"},
)
needs = st.builds(
    lambda gib, gpus, extra: make.need(gib, gpus, **extra),
    st.sampled_from(SIZES),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from(EXTRAS),
)
large = st.sampled_from(
    [
        make.need(24),
        make.need(24, 2),
        make.need(48),
        make.need(12, 4),
        make.need(6, exclusive=True),
        make.need(6, share_milli=1000),
        make.need(6, cpu_milli=8000),
        make.need(6, host_memory_bytes=64 * GIB),
    ]
)
small = st.sampled_from(
    [
        make.need(6),
        make.need(6),
        make.need(6, share_milli=500),
        make.need(6, cpu_milli=4000),
        make.need(6, host_memory_bytes=32 * GIB),
    ]
)
priorities = st.sampled_from([0, 0, 1])
places = st.sampled_from([frozenset(), frozenset(), frozenset(), frozenset("a"), frozenset("bc"), frozenset(["h1"])])
nodes = st.sampled_from(["a", "a", "b", "c", "ab"])
picks = st.integers(0, 10_000)


class Played:
    """One node's agent, and what is true there; of each pool and device as the ledger must believe it."""

    def __init__(self, node: str, life: int = 1) -> None:
        self.node = node
        self.life = life
        self.host = "h1"
        self.live: dict[str, Grant] = {}
        self.closed: list[str] = []
        self.away_s = 0.0
        self.reachable = self.cordoned = self.silent = self.lost = self.known = False
        self.unread()

    def unread(self) -> None:
        """Nothing was read yet."""
        self.foreign: Counter[str] = Counter()  # of each pool
        self.used: dict[str, dict[str, int]] = {}  # pool → slot → bytes
        self.changed: dict[str, float] = {}  # pool → when a lease there has changed last
        self.sick: set[str] = set()

    def report(self) -> Report:
        live = tuple(LiveSlot(slot, grant) for slot, grant in self.live.items())
        return msgspec.structs.replace(NODES[self.node], incarnation=f"i{self.life}", slots=live, cordoned=self.cordoned)


class World(RuleBasedStateMachine):
    """The ledger, agents that do what they are told, and a book of our own."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), filled=st.lists(small, min_size=4, max_size=14))
    def begin(self, policy, filled):
        self.policy = POLICIES[policy]
        self.ledger = Ledger(self.policy, reserve_after_s=TICK_S)
        self.now_s = 128.0
        self.agents = {node: Played(node) for node in NODES}
        self.numbers = itertools.count()
        self.turns: dict[str, int] = {}  # held slot → who came first
        self.grants: dict[str, Grant] = {}
        self.homes: dict[str, tuple[Shape, str]] = {}  # slot that the leader has asked for → where it has lived
        self.leader_cordons: frozenset[str] = frozenset()
        self.refuses = False
        self.asked: list[Resources] = []
        for node in "abc":
            self.register(node)
        for resources in filled:
            self.ask_for_dask(resources, 0, frozenset())
        self.pump()

    # --- what may happen ----------------------------------------------------------------------------------------------

    @rule(resources=needs | large, priority=priorities, learned=st.sampled_from([0, 0, 0, 6]))
    def a_slot_is_asked_for(self, resources, priority, learned):
        more = msgspec.structs.replace(resources, memory_bytes=resources.memory_bytes + learned * GIB) if learned else None
        self.ask(SlotRequest(f"s{next(self.numbers)}", shape(resources), priority=(priority,), learned=more))
        self.pump()

    @rule(resources=needs, priority=priorities, places=places, count=st.integers(1, 3))
    def dask_tasks_are_ready(self, resources, priority, places, count):
        for _ in range(count):
            self.ask_for_dask(resources, priority, places)
        self.pump()

    @rule(resources=large, flood=small, count=st.integers(2, 6), first=st.booleans(), by_leader=st.booleans(), places=places)
    def a_large_one_comes_with_a_flood(self, resources, flood, count, first, by_leader, places):
        """Of the flood some are placed after it, and some of what was there before ends."""
        for at in range(count):
            if at == 1 and by_leader:
                self.ask(SlotRequest(f"s{next(self.numbers)}", shape(resources), priority=(0 if first else 1,)))
            elif at == 1:
                self.ask_for_dask(resources, 0 if first else 1, places)
            self.ask_for_dask(flood, 0, frozenset())
        self.pump()
        self.now_s += 1.25
        for agent in self.agents.values():
            for slot in list(agent.live)[:1]:
                self.end(slot, agent, by_dask=True)
        self.pump()
        self.now_s += 1.25
        self.pump()

    @precondition(lambda self: any(agent.live for agent in self.agents.values()))
    @rule(some=st.lists(picks, min_size=1, max_size=4), by_dask=st.booleans())
    def slots_end(self, some, by_dask):
        for pick in some:
            if live := [(slot, agent) for agent in self.agents.values() for slot in agent.live]:
                slot, agent = chosen(live, pick)
                self.end(slot, agent, by_dask=by_dask)
        self.pump()

    @precondition(lambda self: self.ledger.requests)
    @rule(pick=picks)
    def a_task_is_cancelled(self, pick):
        """Its slot lives until its agent says otherwise."""
        self.ledger.forget(chosen(sorted(self.ledger.requests), pick))
        self.pump()

    @precondition(lambda self: any(self.ledger.requests[slot].kind is SlotKind.TASKS for slot in self.ledger.held))
    @rule(pick=picks)
    def a_slot_turns_out_to_need_more(self, pick):
        requests = self.ledger.requests
        request = requests[chosen([slot for slot in self.ledger.held if requests[slot].kind is SlotKind.TASKS], pick)]
        more = msgspec.structs.replace(request.resources, memory_bytes=request.resources.memory_bytes + 6 * GIB)
        self.ask(msgspec.structs.replace(request, learned=more))
        self.pump()

    @precondition(lambda self: set(self.homes) - set(self.ledger.requests))
    @rule(pick=picks)
    def a_slot_is_asked_for_again(self, pick):
        """It has lived somewhere and may live there still, or have ended."""
        slot = chosen(sorted(set(self.homes) - set(self.ledger.requests)), pick)
        self.ask(SlotRequest(slot, *self.homes[slot]))
        self.pump()

    @rule()
    def dask_takes_nothing_the_next_time(self):
        self.refuses = True

    @rule(
        node=nodes,
        foreign=st.sampled_from([0, 0, 0, 6, 24]),
        over=st.sampled_from([-1, 0, 6]),
        pick=picks,
        read=st.sampled_from(["now", "now", "at", "before", "long ago"]),
        is_heard_late=st.booleans(),
    )
    def a_node_beats(self, node, foreign, over, pick, read, is_heard_late):
        agent = self.agents[node]
        device = chosen(NODES[node].devices, pick)
        pool = device.pool_key
        self.now_s += TICK_S
        for slot in agent.closed:
            self.ended(slot)
        here = [slot for slot, grant in agent.live.items() if on_pool(grant, node)[pool]]
        used = {slot: on_pool(agent.live[slot], node)[pool] + over * GIB for slot in here}
        changed_s = agent.changed.get(pool, 0.0)
        read_s = {"now": self.now_s, "at": changed_s, "before": changed_s - TICK_S, "long ago": -1e6}[read]
        age_s = self.now_s - read_s
        beat = make.beat(
            node,
            msgspec.structs.replace(make.use(device.uuid), foreign_bytes=foreign * GIB, slots=used),
            closed=tuple(agent.closed),
            age_s=0.0 if is_heard_late else age_s,
            cordoned=agent.cordoned,
        )
        self.ledger.hear(beat, self.now_s, heard_s=age_s if is_heard_late else 0.0, silent=False)
        if agent.known:
            agent.silent = False
            before = agent.used.get(pool, {})
            known = {slot: size for slot, size in used.items() if slot in self.grants}
            late = read_s < changed_s
            agent.sick.discard(device.uuid)
            agent.foreign[pool] = max(agent.foreign[pool], foreign * GIB) if late else foreign * GIB
            agent.used[pool] = {s: max(known.get(s, 0), before.get(s, 0)) for s in {*known, *before}} if late else known
        self.pump()

    @rule(node=nodes, pick=picks, ends=st.booleans(), read=st.sampled_from(["at", "before", "long ago"]))
    def a_late_reading_comes(self, node, pick, ends, read):
        """Others were there when leases changed last, as far as is known; an older reading has not seen that yet."""
        self.a_node_beats(node, 6, 6, pick, "now", is_heard_late=False)
        agent = self.agents[node]
        if ends and agent.live:
            self.end(chosen(sorted(agent.live), pick), agent, by_dask=True)
        self.pump()
        self.a_node_beats(node, 0, -1, pick, read, is_heard_late=ends)

    @rule(node=nodes, trouble=st.sampled_from(["sick", "cordoned", "silent", "worker", "left", "lost"]), pick=picks)
    def a_node_is_in_trouble(self, node, trouble, pick):
        agent = self.agents[node]
        match trouble:
            case "sick":
                uuid = chosen(NODES[node].devices, pick).uuid
                beat = make.beat(node, make.use(uuid, healthy=False), cordoned=agent.cordoned)
                self.ledger.hear(beat, self.now_s, heard_s=0.0, silent=agent.silent)
                if agent.known:
                    agent.sick.add(uuid)
            case "cordoned":
                agent.cordoned = True
                self.ledger.hear(make.beat(node, cordoned=True), self.now_s, heard_s=0.0, silent=agent.silent)
            case "silent":
                agent.silent = agent.known
                self.ledger.silent(node)
            case "worker" | "left":
                self.worker_goes(node)
                if trouble == "left":
                    agent.away_s = -GONE_S if agent.known else agent.away_s
                    self.forget_nodes()
                    self.ledger.left([node], self.now_s)
            case "lost":
                self.ledger.lost(node, f"i{agent.life - 1}", self.now_s)  # its predecessor: that is no news
                self.ledger.lost(node, f"i{agent.life}", self.now_s)
                agent.lost = agent.known
                agent.live.clear()  # its slots have their tombstones
                for slot in self.slots_on(node):
                    self.ended(slot)
        self.pump()

    @rule(what=st.sampled_from(["cordons", "cordons", "scheduler", "away"]), nodes=st.sets(nodes, min_size=1, max_size=2))
    def something_rare_happens(self, what, nodes):
        match what:
            case "cordons":
                self.leader_cordons = frozenset() if self.leader_cordons else frozenset(nodes)
                self.ledger.cordon(self.leader_cordons)
            case "scheduler":
                self.the_scheduler_starts_anew()
            case "away":
                for node in nodes:
                    self.is_away_for_long(node)
        self.pump()

    def is_away_for_long(self, node):
        """With nothing on it, so that it is forgotten when the next one registers."""
        agent = self.agents[node]
        for slot in list(agent.live):
            self.end(slot, agent, by_dask=False)
        beat = make.beat(node, closed=tuple(agent.closed), cordoned=agent.cordoned)
        self.ledger.hear(beat, self.now_s, heard_s=0.0, silent=agent.silent)
        for slot in agent.closed:
            self.ended(slot)
        self.worker_goes(node)
        self.now_s += 2 * GONE_S
        other = next(name for name in NODES if name != node)
        self.a_worker_registers(other, anew=False, host=self.agents[other].host)

    @rule(node=nodes, anew=st.booleans(), host=st.sampled_from(["h1", "h2"]))
    def a_worker_registers(self, node, anew, host):
        """The next one of the same agent, or the first one of the next agent."""
        self.worker_goes(node)
        agent = self.agents[node]
        if anew or agent.lost:
            self.forget_nodes()
            for slot in self.slots_on(node):
                self.ended(slot)
            self.agents[node] = Played(node, agent.life + 1)
        self.agents[node].host = host
        self.register(node)
        self.pump()

    def the_scheduler_starts_anew(self):
        """It learns of leases from what registers."""
        self.ledger = Ledger(self.policy, reserve_after_s=TICK_S)
        self.leader_cordons = frozenset()
        self.grants.clear()
        self.turns.clear()
        for agent in self.agents.values():
            agent.unread()
            was_known, agent.known, agent.reachable, agent.silent = agent.known, False, False, False
            if was_known and not agent.lost:
                self.register(agent.node)

    @rule()
    def all_is_well_again(self):
        self.leader_cordons = frozenset()
        self.ledger.cordon(self.leader_cordons)
        for node, spec in NODES.items():
            if node == "ab" and not self.agents[node].known:
                continue
            if self.agents[node].lost or not self.agents[node].reachable:
                self.a_worker_registers(node, anew=False, host=self.agents[node].host)
            agent = self.agents[node]
            agent.cordoned = agent.silent = False
            agent.sick.clear()
            agent.foreign.clear()
            agent.used.clear()
            uses = [make.use(device.uuid) for device in spec.devices]
            self.now_s += TICK_S
            self.ledger.hear(make.beat(node, *uses), self.now_s, heard_s=0.0, silent=False)
        self.pump()

    @precondition(lambda self: self.ledger.held)
    @rule(picked=st.lists(picks, min_size=0, max_size=4))
    def the_leader_has_room_kept(self, picked):
        waiting = [slot for slot in self.ledger.held if self.ledger.requests[slot].kind is SlotKind.TASKS]
        room = {}
        scratch = self.ledger.index.copy()
        for pick in picked if waiting else ():
            slot = chosen(waiting, pick)
            found = best_room(self.ledger.requests[slot].resources, scratch)
            if found is not None and slot not in self.grants and not self.ledger.requests[slot].node and slot not in room:
                room[slot] = grant_in(found, self.ledger.requests[slot].resources)
                scratch.keep(slot, room[slot])
        self.ledger.keep(room, self.now_s)
        self.pump()

    @rule(seconds=st.sampled_from([1.25, 1.25, 1.25, 30.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.pump()

    def end(self, slot, agent, *, by_dask):
        """The slot ends at its agent; the scheduler hears of it from Dask at once, or later from the agent."""
        del agent.live[slot]
        agent.closed.append(slot)
        if by_dask and agent.reachable and slot in self.ledger.requests and slot not in self.ledger.held:
            self.ended(slot)
            self.ledger.ended(slot, self.now_s)

    def worker_goes(self, node):
        agent = self.agents[node]
        agent.reachable, agent.away_s = False, self.now_s
        self.ledger.unreachable(node, self.now_s)
        for slot in self.slots_on(node):
            if slot in self.ledger.requests and slot not in self.ledger.held:
                if self.ledger.requests[slot].kind is SlotKind.DIRECT:
                    self.ledger.forget(slot)
                    if agent.live.pop(slot, None) is not None:
                        agent.closed.append(slot)
                else:
                    self.ledger.hold(slot, self.now_s)
                    self.turns[slot] = next(self.numbers)

    def ask_for_dask(self, resources, priority, places):
        slot = f"d{next(self.numbers)}"
        self.ask(SlotRequest(slot, shape(resources), "", (priority,), SlotKind.DIRECT, places))

    def ask(self, request):
        if request.slot_id not in self.ledger.held:
            self.turns[request.slot_id] = next(self.numbers)
        self.ledger.ask(request, self.now_s)
        self.asked = [request.resources, *self.asked[:2]]

    # --- the book -----------------------------------------------------------------------------------------------------

    def slots_on(self, node):
        return [slot for slot, grant in self.grants.items() if grant.node == node]

    def forget_nodes(self):
        """As each registration does: of nodes that have been away for long and have nothing, nothing is remembered."""
        for agent in self.agents.values():
            if agent.known and not agent.reachable and self.now_s - agent.away_s > GONE_S and not self.slots_on(agent.node):
                agent.known = agent.silent = agent.lost = False
                agent.life += 1  # what was fenced never comes back under the same name
                agent.live.clear()
                agent.unread()

    def register(self, node):
        self.forget_nodes()
        agent = self.agents[node]
        self.ledger.register(agent.report(), self.now_s, names=(agent.host,))
        agent.reachable = agent.known = True
        agent.silent = False
        for slot in self.slots_on(node):
            if slot not in agent.live:
                self.ended(slot)
        for slot, grant in agent.live.items():
            if slot not in self.grants:
                self.grants[slot] = grant
                self.touch(grant)

    def ended(self, slot):
        grant = self.grants.pop(slot, None)
        if grant is not None:
            self.touch(grant)
            for used in self.agents[grant.node].used.values():
                used.pop(slot, None)

    def touch(self, grant):
        """A lease has changed there, now."""
        if self.agents[grant.node].known:
            self.agents[grant.node].changed.update(dict.fromkeys(on_pool(grant, grant.node), self.now_s))

    def pump(self):
        self.now_s += TICK_S
        assignments = self.decided()
        if self.refuses and assignments:
            self.refuses = False
            for assignment in assignments:
                self.ledger.undo(assignment, self.now_s)
                self.what_dask_did_not_take_is_held(assignment)
                self.turns[assignment.slot_id] = next(self.numbers)
                if assignment.fresh:
                    self.touch(assignment.grant)
            assignments = self.decided()
        for assignment in assignments:
            self.it_goes_only_where_it_may(assignment)
            slot, grant = assignment.slot_id, assignment.grant
            if assignment.fresh and grant.devices:
                self.it_goes_only_where_it_fits(assignment)
            if assignment.fresh:
                self.grants[slot] = grant
                self.touch(grant)
            agent = self.agents[grant.node]
            if slot in agent.live:
                continue
            if grant.devices and not any(slot in other.closed for other in self.agents.values()):
                agent.live[slot] = grant
                if self.ledger.requests[slot].kind is SlotKind.TASKS:
                    self.homes[slot] = self.ledger.requests[slot].shape, grant.node
            elif slot not in agent.closed:
                agent.closed.append(slot)  # no agent opens what has ended

    def decided(self):
        ledger, looked_s, kept = self.ledger, self.ledger._reserved_s, set(self.ledger.index.kept)
        assignments = ledger.decide(self.now_s)
        if ledger._reserved_s == looked_s:
            self.of_those_alike_the_first_goes_first([row for row in assignments if row.slot_id not in kept])
        return assignments

    def of_those_alike_the_first_goes_first(self, assignments):
        ledger = self.ledger
        waiting: dict[object, tuple[object, str]] = {}
        for slot in ledger.held:
            if slot not in ledger.index.kept and slot not in self.grants and not ledger.requests[slot].node:
                place = ledger.requests[slot].priority, self.turns[slot]
                waiting[alike(ledger.requests[slot])] = min(
                    waiting.get(alike(ledger.requests[slot]), (place, slot)), (place, slot)
                )
        for assignment in assignments:
            request = ledger.requests[assignment.slot_id]
            if assignment.fresh and not request.node and alike(request) in waiting:
                place = request.priority, self.turns[assignment.slot_id]
                assert place < waiting[alike(request)][0], f"{waiting[alike(request)]} came before {assignment}"

    def what_dask_did_not_take_is_held(self, assignment):
        assert assignment.slot_id in self.ledger.held
        assert (assignment.slot_id in self.ledger.index.grants) == (not assignment.fresh)

    def it_goes_only_where_it_may(self, assignment):
        slot, grant = assignment.slot_id, assignment.grant
        request, agent = self.ledger.requests[slot], self.agents[grant.node]
        assert agent.reachable
        assert not agent.lost
        assert slot not in self.ledger.held
        assert assignment.fresh == (slot not in self.grants)
        if not assignment.fresh:
            assert grant == self.grants[slot]
        elif request.node:
            assert grant == Grant(request.node, (), 0)
        else:
            assert not request.places or request.places & {grant.node, agent.host}

    def it_goes_only_where_it_fits(self, assignment):
        request, grant = self.ledger.requests[assignment.slot_id], assignment.grant
        resources = request.learned or request.shape.resources
        assert len(set(grant.devices)) == resources.gpus
        assert grant == Grant(
            grant.node,
            grant.devices,
            resources.memory_bytes,
            resources.share_milli,
            resources.cpu_milli,
            resources.host_memory_bytes,
            resources.exclusive,
            resources.model,
        )
        assert self.could_take(resources, grant.node, grant.devices, self.grants), f"{grant} was not free"

    def could_take(self, resources, node, uuids, taken):
        """Whether these devices of the node have room beside `taken`, by what is known of the node."""
        agent, spec = self.agents[node], NODES[node]
        if not agent.reachable or agent.lost or agent.cordoned or agent.silent or node in self.leader_cordons:
            return False
        here = {slot: grant for slot, grant in taken.items() if grant.node == node}
        if len(here) >= spec.slots_max or not set(resources.labels) <= set(spec.labels):
            return False
        milli = sum(grant.cpu_milli for grant in here.values()) + resources.cpu_milli
        if spec.cpu_milli and resources.cpu_milli and milli > spec.cpu_milli:
            return False
        size = sum(grant.host_memory_bytes for grant in here.values()) + resources.host_memory_bytes
        if spec.host_memory_bytes and resources.host_memory_bytes and size > spec.host_memory_bytes:
            return False
        wanted: Counter[str] = Counter()
        for device in spec.devices:
            if device.uuid in uuids:
                wanted[device.pool_key] += resources.memory_bytes
                others = [grant for grant in here.values() if device.uuid in grant.devices]
                if resources.architectures and device.architecture not in resources.architectures:
                    return False
                if any(grant.exclusive for grant in others) or (resources.exclusive and others):
                    return False
                milli = sum(grant.share_milli for grant in others) + resources.share_milli
                if resources.share_milli and milli > 1000:
                    return False
        if any(device.uuid in agent.sick for device in spec.devices if device.pool_key in wanted):
            return False
        return all(memory_bytes <= self.left(node, pool, here) for pool, memory_bytes in wanted.items())

    def left(self, node, pool, here):
        """Bytes of the pool beside slots that have these grants on the node."""
        agent = self.agents[node]
        used = agent.used.get(pool, {})
        sizes = {slot: on_pool(grant, node)[pool] for slot, grant in here.items()}
        taken = sum(max(size, used.get(slot, 0)) for slot, size in sizes.items() if size)
        return usable(node, pool) - agent.foreign[pool] - taken

    def on(self, node):
        """Grants on the node, and those of room that is kept there."""
        kept = {slot: grant for slot, grant in self.ledger.index.kept.items() if grant.node == node}
        return {slot: self.grants[slot] for slot in self.slots_on(node)}, kept

    def known(self):
        """What the ledger says of each node that it must know."""
        if hasattr(self, "ledger"):
            for agent in self.agents.values():
                if agent.known:
                    yield agent, NODES[agent.node], self.ledger.index.nodes[agent.node]

    @invariant()
    def nothing_is_promised_twice(self):
        for agent, spec, _ in self.known():
            here = list(self.on(agent.node)[0].values())
            with_devices = [grant for grant in here if grant.devices]
            assert len(with_devices) <= spec.slots_max
            assert not spec.cpu_milli or sum(grant.cpu_milli for grant in here) <= spec.cpu_milli
            assert not spec.host_memory_bytes or sum(grant.host_memory_bytes for grant in here) <= spec.host_memory_bytes
            nobody_has_more_than_there_is(agent.node, here)

    @invariant()
    def what_is_kept_can_be_given_when_all_has_ended(self):
        for agent, spec, _ in self.known():
            kept = list(self.on(agent.node)[1].values())
            assert len(kept) <= spec.slots_max
            assert not spec.cpu_milli or sum(grant.cpu_milli for grant in kept) <= spec.cpu_milli
            assert not spec.host_memory_bytes or sum(grant.host_memory_bytes for grant in kept) <= spec.host_memory_bytes
            nobody_has_more_than_there_is(agent.node, kept)

    @invariant()
    def leases_are_those_of_the_book(self):
        if hasattr(self, "ledger"):
            assert self.ledger.index.grants == self.grants
            assert set(self.ledger.index.nodes) == {agent.node for agent in self.agents.values() if agent.known}
        for agent, _, view in self.known():
            here, kept = self.on(agent.node)
            assert (view.slots, view.kept) == (set(here), set(kept))
            assert view.models == Counter(grant.model for grant in here.values() if grant.model)

    @invariant()
    def flags_are_what_was_said_last(self):
        for agent, _, view in self.known():
            is_cordoned = agent.cordoned or agent.silent or agent.node in self.leader_cordons
            assert (view.reachable, view.cordoned, view.lost) == (agent.reachable, is_cordoned, agent.lost)
            assert set().union(*(pool.sick for pool in view.pools.values())) == agent.sick

    @invariant()
    def memory_that_is_free_is_nobodys(self):
        for agent, _, view in self.known():
            here, kept = self.on(agent.node)
            for key, pool in view.pools.items():
                in_rooms = sum(on_pool(grant, agent.node)[key] for grant in kept.values())
                assert pool.free_bytes == self.left(agent.node, key, here) - in_rooms

    @invariant()
    def compute_that_is_free_is_nobodys(self):
        for agent, spec, view in self.known():
            here, kept = self.on(agent.node)
            both = [*here.items(), *kept.items()]
            for device in spec.devices:
                on_it = [(slot, grant) for slot, grant in both if device.uuid in grant.devices]
                its = view.devices[device.uuid]
                assert its.free_milli == 1000 - sum(grant.share_milli for _, grant in on_it)
                assert its.alone == {slot for slot, grant in on_it if grant.exclusive}
                assert {*its.slots, *its.kept} == {slot for slot, _ in on_it}

    @invariant()
    def what_is_free_of_a_host_is_nobodys(self):
        for agent, spec, view in self.known():
            both = [*self.on(agent.node)[0].values(), *self.on(agent.node)[1].values()]
            if spec.cpu_milli:
                assert view.cpu_free_milli == spec.cpu_milli - sum(grant.cpu_milli for grant in both)
            if spec.host_memory_bytes:
                assert view.host_free_bytes == spec.host_memory_bytes - sum(grant.host_memory_bytes for grant in both)

    @invariant()
    def nothing_that_fits_is_held(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        kept = {f"kept for {slot}": grant for slot, grant in ledger.index.kept.items()}
        tried = set()
        for slot in ledger.held:
            request = ledger.requests[slot]
            room = ledger.index.kept.get(slot)
            if slot in self.grants or request.node:
                home = self.grants[slot].node if slot in self.grants else request.node
                assert not self.agents[home].reachable or self.agents[home].lost, f"{slot} could go home to {home}"
                continue
            if room is None and alike(request) in tried:
                continue
            tried.add(alike(request))
            taken = {**self.grants, **kept}
            resources = request.resources
            for node in NODES:
                if not request.places or request.places & {node, self.agents[node].host}:
                    for uuids in uuids_of(node, resources.gpus):
                        assert not self.could_take(resources, node, uuids, taken), f"{slot} fits on {node} {uuids}"
            if room is not None and room.memory_bytes == resources.memory_bytes:
                del taken[f"kept for {slot}"]
                assert not self.could_take(resources, room.node, room.devices, taken), f"the room of {slot} is free: {room}"

    @invariant()
    def room_is_kept_for_few_who_wait(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        assert len(ledger.reserved) <= RESERVED_MAX
        assert ledger.reserved.items() <= ledger.index.kept.items()
        for slot, grant in ledger.index.kept.items():
            request = ledger.requests[slot]
            assert slot in ledger.held
            assert (request.kind is SlotKind.DIRECT) == (slot in ledger.reserved)
            if request.kind is SlotKind.DIRECT:
                assert grant == Grant(grant.node, grant.devices, *msgspec.structs.astuple(grant_like(request.resources))[2:])

    @invariant()
    def columns_and_what_is_remembered_of_them_are_as_if_made_now(self):
        if not hasattr(self, "ledger"):
            return
        index, demand = self.ledger.index, self.ledger.mix.demand
        assert index.table.is_equal(Table(index.nodes.values()))
        afresh = index.copy()
        for resources in self.asked:
            assert find(resources, index, self.policy, demand) == find(resources, afresh, self.policy, demand)

    def teardown(self):
        if hasattr(self, "ledger"):
            self.all_is_well_again()
            self.everyone_has_a_turn()
            self.all_comes_back()

    def everyone_has_a_turn(self):
        """Of all that could be placed somewhere when nothing else was, nothing waits for ever."""
        for _ in range(len(self.ledger.held)):
            if not self.ledger.held:
                break
            for agent in self.agents.values():
                agent.closed += agent.live
                agent.live.clear()
                self.now_s += TICK_S
                self.ledger.hear(make.beat(agent.node, closed=tuple(agent.closed)), self.now_s, heard_s=0.0, silent=False)
                for slot in agent.closed:
                    self.ended(slot)
            self.now_s += KEPT_S
            self.pump()
        for slot in self.ledger.held:
            request = self.ledger.requests[slot]
            for node in NODES:
                if not request.places or request.places & {node, self.agents[node].host}:
                    for uuids in uuids_of(node, request.resources.gpus):
                        assert not self.could_take(request.resources, node, uuids, {}), f"{slot} has had no turn on {node}"

    def all_comes_back(self):
        ledger = self.ledger
        for slot in list(ledger.requests):
            ledger.forget(slot)
        for agent in self.agents.values():
            agent.closed += agent.live
            ledger.hear(make.beat(agent.node, closed=tuple(agent.closed)), self.now_s, heard_s=0.0, silent=False)
        assert (ledger.index.grants, ledger.index.kept, ledger.reserved, len(ledger.held)) == ({}, {}, {}, 0)
        for view in ledger.index.nodes.values():
            assert view.slots == view.kept == set()
            assert not view.models
            assert view.cpu_free_milli == view.cpu_milli
            assert view.host_free_bytes == view.host_memory_bytes
            for pool in view.pools.values():
                assert pool.free_bytes == pool.usable_bytes
            for device in view.devices.values():
                assert (device.free_milli, device.alone, device.slots, device.kept) == (1000, set(), {}, {})


def shape(resources):
    fields = {name: getattr(resources, name) for name in Resources.__struct_fields__}
    return Shape(tenant="t", environment="e", **fields)


def chosen(options, pick):
    return options[pick % len(options)]


def alike(request):
    return request.resources, request.places, request.kind


def grant_like(resources):
    """What is granted to them, of no node in particular."""
    more = resources.share_milli, resources.cpu_milli, resources.host_memory_bytes, resources.exclusive, resources.model
    return Grant("", (), resources.memory_bytes, *more)


def uuids_of(node, gpus):
    """All choices of so many devices of the node."""
    return itertools.combinations([device.uuid for device in NODES[node].devices], gpus)


def usable(node, pool):
    """Bytes that the pool could promise empty."""
    return next(device.memory_bytes for device in NODES[node].devices if device.pool_key == pool) - RESERVE_BYTES


def on_pool(grant, node):
    """Bytes of the grant on each pool of the node."""
    sizes = Counter()
    for device in NODES[node].devices:
        if device.uuid in grant.devices:
            sizes[device.pool_key] += grant.memory_bytes
    return sizes


def nobody_has_more_than_there_is(node, grants):
    """The devices of the node do for all of these at once."""
    memory: Counter[str] = Counter()
    for device in NODES[node].devices:
        on_it = [grant for grant in grants if device.uuid in grant.devices]
        assert sum(grant.share_milli for grant in on_it) <= 1000
        assert len(on_it) <= 1 or not any(grant.exclusive for grant in on_it)
        memory[device.pool_key] += sum(grant.memory_bytes for grant in on_it)
        assert memory[device.pool_key] <= usable(node, device.pool_key)


World.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestWhateverComesInAnyOrder = World.TestCase
