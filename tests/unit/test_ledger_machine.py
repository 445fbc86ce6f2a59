"""The scheduler's ledger against anything in any order, checked by arithmetic of its own: nothing is ever promised twice,
nothing that fits stays held, all comes back in the end, and what is kept up to date equals what is built afresh.
"""

import itertools
from collections import Counter

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manager.core.index import Index
from manager.core.lifecycle import SlotKind
from manager.core.policies import POLICIES
from manager.core.quantities import GIB
from manager.core.reservations import best_room, grant_in
from manager.core.shapes import Grant, Resources, Shape
from plugins.ledger import RESERVED_MAX, Ledger, SlotRequest
from plugins.node.link import LiveSlot, Report
from tests.unit import factories as make

RESERVE_BYTES = GIB // 2
PLAIN = make.devices(24, 24)
# Two quadrants with two devices each, as a card in CPX has them.
SPLIT = tuple(msgspec.structs.replace(device, pool=f"q{at // 2}") for at, device in enumerate(make.devices(32, 32, 32, 32)))
OTHER = tuple(msgspec.structs.replace(device, architecture="gfx90a") for device in make.devices(48))
NODES = {
    "a": Report("a", "", 1, PLAIN, RESERVE_BYTES, (), slots_max=4, cpu_milli=8000, host_memory_bytes=64 * GIB),
    "b": Report("b", "", 1, SPLIT, RESERVE_BYTES, (), cpu_milli=16000, labels=(("zone", "x"),)),
    "c": Report("c", "", 1, OTHER, RESERVE_BYTES, (), slots_max=3, labels=(("zone", "x"),)),
}
# Few, so that they meet: one of each dimension, some that only some nodes could take, and one that none could.
needs = st.sampled_from(
    [
        make.need(2),
        make.need(6),
        make.need(11),
        make.need(23),
        make.need(31),
        make.need(11, 2),
        make.need(23, 2),
        make.need(15, 4),
        make.need(6, share_milli=500),
        make.need(6, exclusive=True),
        make.need(2, cpu_milli=5000),
        make.need(2, host_memory_bytes=40 * GIB),
        make.need(11, labels=(("zone", "x"),)),
        make.need(11, architectures=("gfx942",)),
        make.need(40, architectures=("gfx90a",)),
        make.need(40, 2),
    ]
)
places = st.sampled_from([frozenset(), frozenset(), frozenset("a"), frozenset("bc")])
picks = st.integers(0, 10_000)


class Played:
    """One node's agent, and what is true there."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.life = 1
        self.live: dict[str, Grant] = {}
        self.closed: list[str] = []
        self.foreign: Counter[str] = Counter()  # of each pool, as the ledger must believe it
        self.used: dict[str, dict[str, int]] = {}  # pool → slot → bytes, the same
        self.sick: set[str] = set()
        self.reachable = self.cordoned = self.lost = False

    def report(self) -> Report:
        live = tuple(LiveSlot(slot, grant) for slot, grant in self.live.items())
        return msgspec.structs.replace(NODES[self.node], incarnation=f"i{self.life}", slots=live, cordoned=self.cordoned)


class World(RuleBasedStateMachine):
    """The ledger, agents that do what they are told, and a book of our own."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy):
        self.ledger = Ledger(POLICIES[policy], reserve_after_s=0.05)
        self.now_s = 100.0
        self.agents = {node: Played(node) for node in NODES}
        self.numbers = itertools.count()
        self.grants: dict[str, Grant] = {}
        for node in NODES:
            self.register(node)

    # --- what may happen ----------------------------------------------------------------------------------------------

    @rule(resources=needs, learned=st.sampled_from([None, None, None, 4]))
    def a_slot_is_asked_for(self, resources, learned):
        more = learned and msgspec.structs.replace(resources, memory_bytes=resources.memory_bytes + learned * GIB)
        slot = f"s{next(self.numbers)}"
        self.ledger.ask(SlotRequest(slot, shape(resources), learned=more), self.now_s)
        assert self.ledger.requests[slot].resources.memory_bytes == resources.memory_bytes + (learned or 0) * GIB
        self.pump()

    @rule(resources=needs, priority=st.integers(-1, 1), places=places, count=st.integers(1, 4))
    def dask_tasks_are_ready(self, resources, priority, places, count):
        for _ in range(count):
            slot = f"d{next(self.numbers)}"
            request = SlotRequest(slot, shape(resources), "", (priority,), SlotKind.DIRECT, frozenset(places))
            self.ledger.ask(request, self.now_s)
        self.pump()

    @precondition(lambda self: any(agent.live for agent in self.agents.values()))
    @rule(pick=picks, by_dask=st.booleans())
    def a_slot_ends(self, pick, by_dask):
        slot, agent = chosen([(slot, agent) for agent in self.agents.values() for slot in agent.live], pick)
        del agent.live[slot]
        agent.closed.append(slot)
        if by_dask and agent.reachable and slot in self.ledger.requests and slot not in self.ledger.held:
            self.ended(slot)
            self.ledger.ended(slot, self.now_s)
        self.pump()

    @precondition(lambda self: self.ledger.requests)
    @rule(pick=picks)
    def a_task_is_cancelled(self, pick):
        """Its slot lives until its agent says otherwise."""
        self.ledger.forget(chosen(sorted(self.ledger.requests), pick))
        self.pump()

    @rule(
        node=st.sampled_from("abc"),
        foreign=st.sampled_from([0, 0, 0, 4, 30]),
        over=st.booleans(),
        pick=picks,
        late=st.booleans(),
    )
    def a_node_beats(self, node, foreign, over, pick, late):
        agent = self.agents[node]
        device = chosen(NODES[node].devices, pick)
        pool = device.pool_key
        here = [slot for slot, grant in agent.live.items() if on_pool(grant, node)[pool]]
        used = {slot: on_pool(agent.live[slot], node)[pool] + (GIB if over else -GIB) for slot in here}
        beat = make.beat(
            node,
            msgspec.structs.replace(make.use(device.uuid), foreign_bytes=foreign * GIB, slots=used),
            closed=tuple(agent.closed),
            age_s=1e6 if late else 0.0,
            cordoned=agent.cordoned,
        )
        self.ledger.hear(beat, self.now_s, heard_s=0.0, silent=False)
        for slot in agent.closed:
            self.ended(slot)
        before = agent.used.get(pool, {})
        known = {slot: size for slot, size in used.items() if slot in self.grants}
        agent.sick.discard(device.uuid)
        agent.foreign[pool] = max(agent.foreign[pool], foreign * GIB) if late else foreign * GIB
        agent.used[pool] = {s: max(known.get(s, 0), before.get(s, 0)) for s in {*known, *before}} if late else known
        self.pump()

    @rule(node=st.sampled_from("abc"), trouble=st.sampled_from(["sick", "cordoned", "worker", "lost"]), pick=picks)
    def a_node_is_in_trouble(self, node, trouble, pick):
        agent = self.agents[node]
        match trouble:
            case "sick":
                uuid = chosen(NODES[node].devices, pick).uuid
                beat = make.beat(node, make.use(uuid, healthy=False), cordoned=agent.cordoned)
                self.ledger.hear(beat, self.now_s, heard_s=0.0, silent=False)
                agent.sick.add(uuid)
            case "cordoned":
                agent.cordoned = True
                self.ledger.hear(make.beat(node, cordoned=True), self.now_s, heard_s=0.0, silent=False)
            case "worker":
                self.worker_goes(node)
            case "lost":
                self.ledger.lost(node, f"i{agent.life}", self.now_s)
                agent.lost = True
                agent.live.clear()  # its slots have their tombstones
                for slot, grant in list(self.grants.items()):
                    if grant.node == node:
                        self.ended(slot)
        self.pump()

    @rule(node=st.sampled_from("abc"), anew=st.booleans())
    def a_worker_registers(self, node, anew):
        """The next one of the same agent, or the first one of the next agent."""
        self.worker_goes(node)
        agent = self.agents[node]
        if anew or agent.lost:
            self.agents[node] = Played(node)
            self.agents[node].life = agent.life + 1
        self.register(node)
        self.pump()

    @rule()
    def all_is_well_again(self):
        for node, spec in NODES.items():
            if self.agents[node].lost or not self.agents[node].reachable:
                self.a_worker_registers(node, anew=False)
            agent = self.agents[node]
            agent.cordoned = False
            agent.sick.clear()
            agent.foreign.clear()
            agent.used.clear()
            uses = [make.use(device.uuid) for device in spec.devices]
            self.now_s += 0.01
            self.ledger.hear(make.beat(node, *uses), self.now_s, heard_s=0.0, silent=False)
        self.pump()

    @rule(picked=st.lists(picks, max_size=2))
    def the_leader_has_room_kept(self, picked):
        waiting = [slot for slot in self.ledger.held if self.ledger.requests[slot].kind is SlotKind.TASKS]
        room = {}
        scratch = self.ledger.index.copy()
        for pick in picked if waiting else ():
            slot = chosen(waiting, pick)
            found = best_room(self.ledger.requests[slot].resources, scratch)
            if found is not None and slot not in self.ledger.index.grants:
                room[slot] = grant_in(found, self.ledger.requests[slot].resources)
                scratch.keep(slot, room[slot])
        self.ledger.keep(room, self.now_s)
        self.pump()

    @rule(seconds=st.sampled_from([1.1, 1.1, 30.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.pump()

    def worker_goes(self, node):
        agent = self.agents[node]
        agent.reachable = False
        self.ledger.unreachable(node, self.now_s)
        for slot, grant in list(self.grants.items()):
            if grant.node == node and slot in self.ledger.requests and slot not in self.ledger.held:
                if self.ledger.requests[slot].kind is SlotKind.DIRECT:
                    self.ledger.forget(slot)
                    if agent.live.pop(slot, None) is not None:
                        agent.closed.append(slot)
                else:
                    self.ledger.hold(slot, self.now_s)

    # --- the book -----------------------------------------------------------------------------------------------------

    def register(self, node):
        agent = self.agents[node]
        self.ledger.register(agent.report(), self.now_s, names=())
        agent.reachable = True
        for slot, grant in list(self.grants.items()):
            if grant.node == node and slot not in agent.live:
                self.ended(slot)
        self.grants.update(agent.live)

    def ended(self, slot):
        grant = self.grants.pop(slot, None)
        if grant is not None:
            for used in self.agents[grant.node].used.values():
                used.pop(slot, None)

    def pump(self):
        self.now_s += 0.01
        for assignment in self.ledger.decide(self.now_s):
            slot, grant = assignment.slot_id, assignment.grant
            agent = self.agents[grant.node]
            assert agent.reachable
            assert not agent.lost
            if not assignment.fresh or not grant.devices:
                assert slot in self.grants or not grant.devices
                continue
            resources = self.ledger.requests[slot].resources
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
            assert not self.ledger.requests[slot].places or grant.node in self.ledger.requests[slot].places
            assert self.could_take(resources, grant.node, grant.devices, self.grants), f"{grant} was not free"
            self.grants[slot] = agent.live[slot] = grant

    def could_take(self, resources, node, uuids, taken):
        """Whether these devices of the node have room beside `taken`, by what is known of the node."""
        agent, spec = self.agents[node], NODES[node]
        if not agent.reachable or agent.lost or agent.cordoned:
            return False
        here = {slot: grant for slot, grant in taken.items() if grant.node == node}
        if len(here) >= spec.slots_max:
            return False
        if spec.cpu_milli and sum(grant.cpu_milli for grant in here.values()) + resources.cpu_milli > spec.cpu_milli:
            return False
        host_bytes = sum(grant.host_memory_bytes for grant in here.values()) + resources.host_memory_bytes
        if spec.host_memory_bytes and host_bytes > spec.host_memory_bytes:
            return False
        if not set(resources.labels) <= set(spec.labels):
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
                if sum(grant.share_milli for grant in others) + resources.share_milli > 1000:
                    return False
        for pool, memory_bytes in wanted.items():
            members = [device for device in spec.devices if device.pool_key == pool]
            if any(device.uuid in agent.sick for device in members):
                return False
            used = agent.used.get(pool, {})
            promised = sum(
                max(on_pool(g, node)[pool], used.get(s, 0) if on_pool(g, node)[pool] else 0) for s, g in here.items()
            )
            if promised + agent.foreign[pool] + memory_bytes > members[0].memory_bytes - RESERVE_BYTES:
                return False
        return True

    @invariant()
    def nothing_is_promised_twice(self):
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.index.grants == self.grants
        for node, spec in NODES.items():
            here = [grant for grant in self.grants.values() if grant.node == node]
            assert len(here) <= spec.slots_max
            assert not spec.cpu_milli or sum(grant.cpu_milli for grant in here) <= spec.cpu_milli
            assert not spec.host_memory_bytes or sum(grant.host_memory_bytes for grant in here) <= spec.host_memory_bytes
            memory: Counter[str] = Counter()
            for device in spec.devices:
                others = [grant for grant in here if device.uuid in grant.devices]
                assert sum(grant.share_milli for grant in others) <= 1000
                assert len(others) <= 1 or not any(grant.exclusive for grant in others)
                memory[device.pool_key] += sum(grant.memory_bytes for grant in others)
                assert memory[device.pool_key] <= device.memory_bytes - RESERVE_BYTES

    @invariant()
    def nothing_that_fits_is_held(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        taken = {**self.grants, **{f"kept for {slot}": grant for slot, grant in ledger.index.kept.items()}}
        for slot in ledger.held:
            request = ledger.requests[slot]
            if slot in self.grants or request.node:
                continue
            assert set(ledger.reserved) <= set(ledger.held)
            for node in request.places or NODES:
                for devices in itertools.combinations(NODES[node].devices, request.resources.gpus):
                    uuids = tuple(device.uuid for device in devices)
                    assert not self.could_take(request.resources, node, uuids, taken), f"{slot} fits on {node} {uuids}"

    @invariant()
    def room_is_kept_for_few_who_wait_and_only_where_they_could_fit(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        assert len(ledger.reserved) <= RESERVED_MAX
        assert ledger.reserved.items() <= ledger.index.kept.items()
        for slot, grant in ledger.reserved.items():
            assert slot in ledger.held
            assert ledger.requests[slot].kind is SlotKind.DIRECT
            assert not ledger.requests[slot].places or grant.node in ledger.requests[slot].places
            for device in NODES[grant.node].devices:
                if device.uuid in grant.devices:
                    assert grant.memory_bytes <= device.memory_bytes - RESERVE_BYTES

    @invariant()
    def the_ledger_equals_one_built_afresh(self):
        if hasattr(self, "ledger"):
            afresh = rebuilt(self.ledger.index)
            assert self.ledger.index.table.is_equal(afresh.table)
            for node, view in self.ledger.index.nodes.items():
                other = afresh.nodes[node]
                assert {k: pool.free_bytes for k, pool in view.pools.items()} == {
                    k: pool.free_bytes for k, pool in other.pools.items()
                }
                assert (view.slots, view.kept) == (other.slots, other.kept)

    def teardown(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        for slot in list(ledger.requests):
            ledger.forget(slot)
        for agent in self.agents.values():
            agent.closed += agent.live
            agent.live.clear()
            ledger.hear(make.beat(agent.node, closed=tuple(agent.closed)), self.now_s, heard_s=0.0, silent=False)
        assert (ledger.index.grants, ledger.index.kept, ledger.reserved, len(ledger.held)) == ({}, {}, {}, 0)
        for view in ledger.index.nodes.values():
            assert view.slots == view.kept == set()
            for pool in view.pools.values():
                assert pool.free_bytes == pool.usable_bytes - pool.foreign_bytes
            for device in view.devices.values():
                assert (device.free_milli, device.alone) == (1000, set())


def shape(resources):
    fields = {name: getattr(resources, name) for name in Resources.__struct_fields__}
    return Shape(tenant="t", environment="e", **fields)


def chosen(options, pick):
    return options[pick % len(options)]


def on_pool(grant, node):
    """Bytes of the grant on each pool of the node."""
    sizes = Counter()
    for device in NODES[node].devices:
        if device.uuid in grant.devices:
            sizes[device.pool_key] += grant.memory_bytes
    return sizes


def rebuilt(index):
    """The same ledger, made at once from what is true now."""
    afresh = Index()
    for node, view in index.nodes.items():
        spec = NODES[node]
        afresh.add_node(
            *(node, view.incarnation, spec.devices, spec.reserve_bytes, spec.slots_max),
            cpu_milli=spec.cpu_milli,
            host_memory_bytes=spec.host_memory_bytes,
            labels=spec.labels,
        )
        other = afresh.nodes[node]
        other.reachable, other.cordoned, other.lost = view.reachable, view.cordoned, view.lost
    for slot, grant in index.grants.items():
        afresh.lease(slot, grant)
    for slot, grant in index.kept.items():
        afresh.keep(slot, grant)
    for node, view in index.nodes.items():
        for key, pool in view.pools.items():
            other = afresh.nodes[node].pools[key]
            other.foreign_bytes, other.used, other.sick = pool.foreign_bytes, dict(pool.used), set(pool.sick)
            other.settle()
    afresh._table = None
    return afresh


World.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWhateverComesInAnyOrder = World.TestCase
