"""A random walk through the store: everybody acts at once, on stale views, twice, and dies in between.

Each seed is a little history: tenants submit and cancel, agents claim and finish and are replaced by new incarnations
while their zombies go on, leaders come and go while old ones still write, any call may be sent again at any later time,
and any answer may be lost. Every few steps all is recounted; at the end everything must have drained into final states.

    SEED=17 python -m pytest tests/contract/test_store_walk.py      replays one seed
    SEEDS=2000 python -m pytest tests/contract/test_store_walk.py   runs more
"""

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from manager.core.errors import QuotaExceeded, RegistrationRefused
from manager.core.ids import new_id
from manager.core.lifecycle import FINAL, Cordon, Outcome, SlotFlag, SlotStatus, TaskStatus
from manager.core.model import BeatReply, Claim, ClusterState, End, NextReply, TenantRow
from manager.store.store import Swept
from tests.contract.store_harness import Lab, StoreServer, Violation, check_invariants, connected, granted, info, submission

SEEDS = 40
STEPS = 400
CHECK_STEPS = 25
NODES = ("n1", "n2", "n3")
TENANTS = ("red", "blue")
QUOTA = 25
FORGETFUL = 8
"""Final tasks that a sweep keeps."""


@dataclass
class Held:
    """A slot as its agent knows it."""

    slot: str
    claims: dict[str, Claim] = field(default_factory=dict)
    ends: list[End] = field(default_factory=list)


@dataclass
class WalkAgent:
    node: str
    incarnation: str = field(default_factory=new_id)
    zombie: bool = False  # a newer incarnation registered, or the leader declared it lost
    slots: dict[str, Held] = field(default_factory=dict)
    direct: list[str] = field(default_factory=list)


@dataclass
class Leader:
    """A controller with what it last saw; it may have been replaced since."""

    name: str
    token: int = 0
    state: ClusterState | None = None


class Walk:
    """One seed's history."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.store = lab.store
        self.rng = random.Random(seed)
        self.agents: list[WalkAgent] = []
        self.leaders = [Leader("one"), Leader("two")]
        self.token = 0  # of the true leader
        self.late: list[Callable[[], Awaitable[object]]] = []
        self.accepted: dict[str, str] = {}
        self.final: dict[str, tuple[str, str]] = {}
        self.commits: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.claimed_by: dict[tuple[str, int], str] = {}
        self.slot_number = 0
        self.cordoned: set[str] = set()  # by an operator, who has not asked for a removal

    # --- how calls go ---------------------------------------------------------------------------------------------

    async def call(self, send: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """Send it, perhaps again later; the answer, and whether it arrives."""
        if self.rng.random() < 0.2:
            self.late.append(send)
        answer = await send()
        if self.rng.random() < 0.1:
            answer = await send()
        return answer, self.rng.random() < 0.85

    async def next(self, agent: WalkAgent, slot: str, n: int, ends: tuple[End, ...]) -> NextReply:
        was_zombie = agent.zombie
        reply = await self.store.next(slot, agent.incarnation, n, ends)
        if was_zombie and reply.word != "FENCED":
            raise Violation("zombie-refused", f"{agent.incarnation} got {reply.word}")
        for ended, status in zip(ends, reply.statuses, strict=False):
            if status in FINAL:
                self.commits[ended.task_id] = self.commits.get(ended.task_id, 0) + 1
                if self.commits[ended.task_id] > 1:
                    raise Violation("one-commit", f"{ended.task_id}: {self.commits[ended.task_id]}")
        for claim in reply.claims:
            key = (claim.task_id, claim.attempt)
            if self.claimed_by.setdefault(key, slot) != slot:
                raise Violation("one-claim", f"{key}: {self.claimed_by[key]} and {slot}")
        return reply

    # --- what may happen ------------------------------------------------------------------------------------------

    async def submit(self) -> None:
        tenant = self.rng.choice(TENANTS)
        wanted = [
            submission(tenant, self.rng.choice((1, 1, 2)), self.rng.choice((-10, 0, 0, 10)), self.rng.choice((1, 3)))
            for _ in range(self.rng.choice((1, 1, 1, 4)))
        ]

        async def send() -> bool:
            try:
                await self.store.submit(tenant, QUOTA, wanted)
            except QuotaExceeded:
                return False
            return True

        accepted = await send()
        if accepted:
            self.accepted |= {s.task_id: tenant for s in wanted}
            if self.rng.random() < 0.3:
                await send()  # at once: a submission is sent again within seconds, and a sweep keeps hours

    async def cancel(self) -> None:
        if self.accepted:
            task_id = self.rng.choice(list(self.accepted)[-30:])
            await self.call(lambda: self.store.cancel(task_id, self.accepted[task_id]))

    async def register(self) -> None:
        """An agent starts; one that was there before is dead, or thinks that it is not."""
        node = self.rng.choice(NODES)
        agent = WalkAgent(node)
        # Now and then it says that it has a device which another node may have as well.
        said = info(f"gpu-{node}", *self.rng.choice(((), (), ("gpu-shared",))), machine="m")

        async def send() -> bool:
            done = await self.store.register(node, agent.incarnation, said)
            if done and agent.zombie:
                raise Violation("zombie-refused", f"{agent.incarnation} registered")
            return done

        try:
            await send()
        except RegistrationRefused:
            return  # whoever was there before is there still
        for old in self.agents:
            if old.node == node:
                old.zombie = True
        self.agents.append(agent)
        self.agents = self.agents[-7:]
        await self.call(send)

    async def cordon(self) -> None:
        """An operator, an autoscaler without a term, or an agent says what a node may still take on."""
        node, mode = self.rng.choice(NODES), self.rng.choice(list(Cordon))
        by = self.rng.choice(("operator", "operator", "autoscaler", "agent"))
        incarnation = self.rng.choice([a.incarnation for a in self.agents if a.node == node] or ["nobody"])
        proof = {"incarnation": incarnation} if by == "agent" else {"token": 7} if by == "autoscaler" else {}
        # Sent once: an operator's word that comes late would undo the next one.
        remove = self.rng.random() < 0.3
        word = await self.store.cordon(node, mode, by, remove=remove, **proof)
        if word == "OK" and by == "autoscaler":
            raise Violation("old-leader-refused", f"an autoscaler without a term cordoned {node}")
        if by != "operator" and word == "OK" and node in self.cordoned:
            raise Violation("operators-cordon-kept", f"{by} changed {node}")
        if by == "operator" and word == "OK":
            # A removal ends its cordon when the node comes again.
            (self.cordoned.add if mode is not Cordon.NONE and not remove else self.cordoned.discard)(node)

    async def direct(self) -> None:
        """An agent opens a slot for a Dask task, or ends one."""
        if not self.agents:
            return
        agent = self.rng.choice(self.agents)
        if agent.direct and self.rng.random() < 0.5:
            slot = agent.direct.pop()
            await self.call(lambda: self.store.close_slot(slot, agent.incarnation, "done"))
            return
        self.slot_number += 1
        slot = f"d{self.slot_number}"

        async def send() -> str:
            word = await self.store.open_direct(slot, agent.incarnation, granted(agent.node, "gpu-0", memory_bytes=1))
            if agent.zombie and word != "FENCED":
                raise Violation("zombie-refused", f"{agent.incarnation} opened a direct slot: {word}")
            return word

        await self.call(send)
        agent.direct.append(slot)

    async def keep_warm(self) -> None:
        one = submission(self.rng.choice(TENANTS))
        if self.rng.random() < 0.5:
            await self.call(lambda: self.store.warm(one.shape_id, one.shape, self.rng.randrange(3), 60))
        else:
            await self.call(lambda: self.store.unload([one.shape_id]))

    async def beat(self) -> None:
        if not self.agents:
            return
        agent = self.rng.choice(self.agents)
        slots = [(held.slot, not held.claims) for held in agent.slots.values()]

        async def send() -> BeatReply:
            answer = await self.store.beat(agent.node, agent.incarnation, slots)
            if answer.holds and agent.zombie:
                raise Violation("zombie-refused", f"{agent.incarnation} beat")
            return answer

        reply, arrives = await self.call(send)
        if arrives:
            for slot, word in reply.words:
                if word == "fenced":
                    agent.slots.pop(slot, None)
                elif word.startswith("cancel:") and (held := agent.slots.get(slot)):
                    self.finish_one(held, word.removeprefix("cancel:"), Outcome.CANCELLED)
            if not reply.holds:
                agent.slots.clear()

    async def open(self) -> None:
        state = next((leader.state for leader in self.leaders if leader.state), None)
        if not self.agents or state is None:
            return
        requested = [s.slot_id for s in state.slots if s.status is SlotStatus.REQUESTED]
        if requested:
            agent, slot = self.rng.choice(self.agents), self.rng.choice(requested)

            async def send() -> str:
                word = (await self.store.open_slot(slot, agent.incarnation, granted(agent.node, "gpu-0"))).word
                if agent.zombie and word != "FENCED":
                    raise Violation("zombie-refused", f"{agent.incarnation} opened a slot: {word}")
                if word == "OK" and agent.node in self.cordoned:
                    raise Violation("nothing-new-on-cordoned", f"{slot} opened on {agent.node}")
                return word

            word, arrives = await self.call(send)
            if arrives and word in ("OK", "ADOPTED"):
                agent.slots.setdefault(slot, Held(slot))

    def finish_one(self, held: Held, task_id: str, outcome: Outcome) -> None:
        claim = held.claims.pop(task_id, None)
        if claim is not None:
            payload = f'"{task_id}/{claim.attempt}"'.encode()
            if outcome in (Outcome.FAILED, Outcome.FAILED_FOR_GOOD, Outcome.OUT_OF_MEMORY, Outcome.CRASHED):
                payload = b'{"type":"E","message":"%d"}' % claim.attempt
            age = None if outcome is Outcome.RETURNED else 0.01
            chance = self.rng.choice((0.0, 0.0, 0.9))
            held.ends.append(End(task_id, claim.attempt, outcome, payload, age, age, chance))

    async def work(self) -> None:
        """An agent goes on with one of its slots, as the slot runner does."""
        busy = [(agent, held) for agent in self.agents for held in agent.slots.values()]
        if not busy:
            return
        agent, held = self.rng.choice(busy)
        for task_id in list(held.claims):
            if self.rng.random() < 0.6:
                self.finish_one(held, task_id, self.rng.choices(list(Outcome), (12, 4, 1, 1, 1, 1, 1, 3, 2))[0])
        n = 0 if held.claims else self.rng.choice((1, 1, 4))
        ends = tuple(held.ends)
        reply, arrives = await self.call(lambda: self.next(agent, held.slot, n, ends))
        if not arrives:
            return  # as the runner: the ends are kept, and told again
        del held.ends[: len(ends)]
        match reply.word:
            case "FENCED":
                agent.slots.pop(held.slot, None)
            case "WORK":
                held.claims = {claim.task_id: claim for claim in reply.claims}
                started = [(claim.task_id, claim.attempt, 0.0) for claim in reply.claims[:1]]
                await self.call(lambda: self.store.started(held.slot, agent.incarnation, started))
            case "CLOSE" | "DRAIN" | "PREEMPT":
                await self.close(agent, held)

    async def close_one(self) -> None:
        busy = [(agent, held) for agent in self.agents for held in agent.slots.values()]
        if busy:
            await self.close(*self.rng.choice(busy))

    async def close(self, agent: WalkAgent, held: Held) -> None:
        agent.slots.pop(held.slot, None)
        await self.call(lambda: self.store.close_slot(held.slot, agent.incarnation, "Idle"))

    async def leave(self) -> None:
        if self.agents and self.rng.random() < 0.3:
            agent = self.rng.choice(self.agents)
            agent.slots.clear()
            if not agent.zombie:
                self.agents.remove(agent)
            await self.call(lambda: self.store.leave(agent.node, agent.incarnation))

    # --- leaders --------------------------------------------------------------------------------------------------

    async def take_over(self) -> None:
        leader = self.rng.choice(self.leaders)
        _, token, beat, _ = await self.store.lead("", 0, 0, "read")
        holder = f"{leader.name}-{new_id()}"
        (done, now, *_), _ = await self.call(lambda: self.store.lead(holder, token, beat, "take"))
        if not done or now <= self.token:
            raise Violation("term-taken", f"{holder} took {token} and got {now}")
        leader.token = self.token = now

    async def look(self) -> None:
        leader = self.rng.choice(self.leaders)
        leader.state = await self.store.look(leader=True)

    async def lead(self) -> None:
        """A controller acts on what it saw, perhaps long ago, with the token that it had."""
        leader = self.rng.choice(self.leaders)
        state = leader.state
        if state is None or not leader.token:
            return
        token = leader.token
        open_ = [s.slot_id for s in state.slots if s.status is SlotStatus.OPEN]
        requested = [s.slot_id for s in state.slots if s.status is SlotStatus.REQUESTED]
        slot = self.rng.choice([*open_, *requested]) if state.slots else "none"
        limit = self.rng.choice((None, None, 2))
        choices: list[Callable[[], Awaitable[object]]] = [
            lambda: self.store.fence(token, "Test", [slot]),
            lambda: self.store.flag(token, self.rng.choice(list(SlotFlag)[1:]), [slot]),
            lambda: self.store.drop(token, "Test", [slot, *requested[:1]]),
            lambda: self.store.planned(token, self.rng.randrange(2), [(q.shape_id, 3) for q in state.queues]),
            lambda: self.store.age(token, self.rng.choice((0.0, 60.0)), [q.shape_id for q in state.queues]),
            lambda: self.store.share(
                token,
                [TenantRow(tenant=self.rng.choice(TENANTS), gpus_max=self.rng.choice((None, 1, 3)), running_max=limit)],
                [(q.shape_id, 1.5) for q in state.queues],
            ),
        ]
        if state.queues:
            shape = self.rng.choice(state.queues).shape_id
            self.slot_number += 1
            name, served_max = f"s{self.slot_number}", self.rng.choice((0, 0, 2))
            choices += [lambda: self.store.request_slot(token, name, shape, served_max)] * 6
        if state.nodes:
            row = self.rng.choice(state.nodes)
            choices.append(lambda: self.lose(token, row.node, row.incarnation))
        act = self.rng.choice(choices)

        async def send() -> object:
            old = token != self.token
            answer = await act()
            refused = answer is None or answer is False
            if old and not refused:
                raise Violation("old-leader-refused", f"token {token}, now {self.token}: {answer!r}")
            return answer

        await self.call(send)

    async def lose(self, token: int, node: str, incarnation: str) -> bool:
        done, _ = await self.store.lost(token, node, incarnation)
        if done:
            for agent in self.agents:
                if agent.incarnation == incarnation:
                    agent.zombie = True
        return done

    async def sweep(self) -> None:
        leader = self.rng.choice(self.leaders)
        if leader.token:
            answer = await self.store.sweep(leader.token, 0, FORGETFUL, 0)
            if leader.token != self.token and answer != Swept(0, 0):
                raise Violation("old-leader-refused", f"swept {answer}")

    async def again(self) -> None:
        """A call from long ago arrives once more."""
        if self.late:  # mostly soon, as what lies in a buffer of a connection that was cut
            first = max(0, len(self.late) - 5) if self.rng.random() < 0.7 else 0
            await self.late.pop(self.rng.randrange(first, len(self.late)))()

    async def stray(self) -> None:
        """An agent speaks for a slot that another one holds."""
        busy = [(agent, held) for agent in self.agents for held in agent.slots.values()]
        if busy:
            owner, held = self.rng.choice(busy)
            ends = tuple(End(i, c.attempt, Outcome.SUCCEEDED, b'"stray"') for i, c in held.claims.items())
            for agent in self.agents:
                if agent is not owner and (await self.next(agent, held.slot, 1, ends)).word != "FENCED":
                    raise Violation("stranger-refused", f"{agent.incarnation} spoke for {held.slot}")

    # --- the whole ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        acts = {
            self.submit: 6, self.cancel: 2, self.register: 1, self.beat: 3, self.open: 6, self.work: 20, self.close_one: 1,
            self.leave: 1, self.take_over: 1, self.look: 4, self.lead: 6, self.sweep: 1, self.again: 8, self.stray: 1,
            self.cordon: 1, self.direct: 2, self.keep_warm: 1,
        }  # fmt: skip
        await self.take_over()
        for node in NODES:
            agent = WalkAgent(node)
            self.agents.append(agent)
            await self.store.register(node, agent.incarnation, info(f"gpu-{node}", machine="m"))
        for step in range(STEPS):
            await self.rng.choices(list(acts), list(acts.values()))[0]()
            if self.rng.random() < 0.1:
                await self.store.due()
            if step % CHECK_STEPS == 0:
                await self.check()
        await self.drain()

    async def check(self) -> None:
        found = await check_invariants(self.store)
        tasks = found.tasks
        for task_id, task in tasks.items():
            if int(task["attempt"]) < self.attempts.get(task_id, 0):
                raise Violation("attempt-never-lowered", f"{task_id}: {task['attempt']} after {self.attempts[task_id]}")
            self.attempts[task_id] = int(task["attempt"])
            result = task.get("result", "")
            now = (task["state"], result)
            if TaskStatus(task["state"]) in FINAL and self.final.setdefault(task_id, now) != now:
                raise Violation("final-is-final", f"{task_id}: {self.final[task_id]} became {task['state']} {result}")
            if task["state"] == "SUCCEEDED" and result != f'"{task_id}/{task["attempt"]}"':
                raise Violation("result-of-its-attempt", f"{task_id} attempt {task['attempt']}: {result}")
        missing = {i for i in self.accepted if i not in tasks} - self.final.keys() - self.commits.keys()
        swept = {event["i"] for event in found.ends}
        if missing - swept:
            raise Violation("nothing-lost", str(missing - swept))

    async def drain(self) -> None:
        """Nobody dies any more: all that is left must come to its end."""
        while self.late:
            await self.late.pop()()
        await self.take_over()
        assert await self.store.share(self.token, [TenantRow(tenant=tenant) for tenant in TENANTS], [])
        self.agents = [WalkAgent(node) for node in NODES]
        for agent in self.agents:
            await self.store.cordon(agent.node, Cordon.NONE, "operator")
            assert await self.store.register(agent.node, agent.incarnation, info(f"gpu-{agent.node}", machine="m"))
        for round_ in range(200):
            for task_id in (await check_invariants(self.store)).zset("due"):
                await self.lab.raw("ZADD", f"{self.store.keys.prefix}due", 0, task_id)
            await self.store.due()
            state = await self.store.look(leader=True)
            waiting = [queue for queue in state.queues if queue.depth]
            if not waiting and not any(slot.running for slot in state.slots):
                break
            for queue in waiting:
                slot = f"drain-{round_}-{queue.shape_id}"
                assert await self.store.request_slot(self.token, slot, queue.shape_id, 0)
                agent = self.rng.choice(self.agents)
                assert (await self.store.open_slot(slot, agent.incarnation, granted(agent.node, "gpu-0"))).word == "OK"
                held = Held(slot)
                while (reply := await self.next(agent, slot, 4, tuple(held.ends))).word == "WORK":
                    held = Held(slot, {claim.task_id: claim for claim in reply.claims})
                    for task_id in list(held.claims):
                        self.finish_one(held, task_id, Outcome.SUCCEEDED)
        else:
            raise Violation("all-drains", "work is left after 200 rounds")
        await self.check()
        found = await check_invariants(self.store)
        left = [task_id for task_id, task in found.tasks.items() if TaskStatus(task["state"]) not in FINAL]
        if left:
            raise Violation("all-drains", str(left))


async def walk(server: StoreServer, seed: int) -> None:
    """One seed on an empty store.

    Raises:
        Violation: with a note of how to replay it.
    """
    async with connected(server.url) as lab:
        await walk_on(lab, seed, server.name)


async def walk_on(lab: Lab, seed: int, name: str) -> None:
    """One seed in this lab, which must be empty."""
    try:
        await Walk(lab, seed).run()
    except Exception as error:
        error.add_note(f"SEED={seed} python -m pytest tests/contract/test_store_walk.py -k {name}")
        raise


async def test_every_walk_keeps_the_invariants_and_drains(store_server: StoreServer):
    one = os.environ.get("SEED")
    for seed in [int(one)] if one else range(int(os.environ.get("SEEDS", SEEDS))):
        await walk(store_server, seed)
