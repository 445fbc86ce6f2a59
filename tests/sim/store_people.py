"""Who asks things of the cluster: clients of the API, operators, and a controller that acts on what it saw long ago.

Each is a process of its own with a connection of its own. A client sends a submission again, as it was, until it knows what
has become of it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from manager.core.errors import IdempotencyConflict, NameTaken, QuotaExceeded, StoreUnavailable, UnknownDependency
from manager.core.ids import array_id, new_id
from manager.core.lifecycle import FINAL, AfterFailed, Cordon, SlotFlag
from manager.core.model import ClusterState, IdempotencyKey, Submission, TaskSpec
from manager.core.quantities import GIB
from manager.core.shapes import Resources, Shape, shape_id, shape_of
from manager.store import Store
from manager.store.connection import StoreReplyError
from tests.contract.store_harness import Violation
from tests.sim.store_cluster import FUNCTION
from tests.sim.store_loop import Process, SimLoop
from tests.sim.store_net import Network, SimConnection

ACTIVE_MAX = 60
NODES = ("n1", "n2", "n3")


class Person:
    """One process that asks."""

    def __init__(self, loop: SimLoop, network: Network, rng: random.Random, name: str) -> None:
        self.process = Process(loop, name)
        self.rng = rng
        self.store = Store(SimConnection(network))  # type: ignore[arg-type]

    async def again(self, send: Callable[[], Awaitable[Any]], tries: int = 200) -> Any:
        """Send it until there is an answer. A submission that took place, and of which all is forgotten since, gets none."""
        for _ in range(tries):
            try:
                return await send()
            except StoreUnavailable:
                await asyncio.sleep(0.1 + self.rng.random())
        return None


class Client(Person):
    """One tenant's client."""

    def __init__(self, loop: SimLoop, network: Network, rng: random.Random, tenant: str) -> None:
        super().__init__(loop, network, rng, f"client-{tenant}")
        self.tenant = tenant
        self.accepted: list[str] = []
        self.final: dict[str, str] = {}
        self.busy = True
        self._last: tuple[IdempotencyKey, list[Submission], list[str]] | None = None
        self._names = 0

    async def live(self, until_s: float) -> None:
        """Submit, ask, cancel, until that time."""
        loop = self.process.loop
        acts = {self.submit: 10, self.submit_again: 2, self.cancel: 2, self.read: 4}
        while loop.now_s < until_s:
            await self.rng.choices(list(acts), list(acts.values()))[0]()
            await asyncio.sleep(self.rng.expovariate(1 / self.rng.choice((0.05, 0.5, 2.0))))
        self.busy = False

    def _spec(self, before: list[str]) -> TaskSpec:
        rng = self.rng
        more: dict[str, Any] = {}
        if rng.random() < 0.15:
            more["start_timeout_s"] = rng.choice((0.5, 5.0, 60.0))
        if rng.random() < 0.15:
            more["total_timeout_s"] = rng.choice((0.5, 5.0, 60.0))
        if rng.random() < 0.1:
            self._names += 1
            more["name"] = f"{self.tenant}-{rng.randrange(1 + self._names)}"
        if (parents := before + self.accepted[-8:]) and rng.random() < 0.25:
            more["after"] = tuple(dict.fromkeys(rng.choices(parents, k=rng.choice((1, 1, 2, 3)))))
            more["after_failed"] = rng.choice((AfterFailed.FAIL, AfterFailed.RUN))
        if rng.random() < 0.08:
            more["count"] = rng.choice((1, 4, 9))
        if rng.random() < 0.2:
            more["retry_on"] = rng.choice((("ValueError",), ("KeyError",)))
        return TaskSpec(
            FUNCTION,
            msgspec.Raw(b"{}"),
            Resources(memory_bytes=rng.choice((1, 1, 2)) * GIB, gpus=rng.choice((1, 1, 1, 1, 2))),
            rng.choice((-10, 0, 0, 10)),
            rng.choice((1, 3)),
            rng.choice((1.0, 5.0, 20.0)),
            **more,
        )

    def _submission(self, before: list[str]) -> Submission:
        spec = self._spec(before)
        shape = shape_of(self.tenant, "env", spec.resources, self.rng.choice((0, 0, 0, 2)))
        digest = str(self.rng.getrandbits(32))
        return Submission(array_id() if spec.count else new_id(), shape_id(shape), shape, spec, digest)

    def probe(self, shape: str, what: Shape) -> str:
        """Submit a plain task of that shape; its id."""
        spec = TaskSpec(FUNCTION, msgspec.Raw(b"{}"), what.resources)
        one = Submission(new_id(), shape, what, spec)
        self.process.spawn(self.store.submit(what.tenant, 10 * ACTIVE_MAX, [one]))
        return one.task_id

    async def submit(self) -> None:
        wanted: list[Submission] = []
        for _ in range(self.rng.choice((1, 1, 1, 4))):
            wanted.append(self._submission([one.task_id for one in wanted if not one.spec.name]))
        key = IdempotencyKey(str(self.rng.getrandbits(32)), "body") if self.rng.random() < 0.3 else None
        await self._send(key, wanted)

    async def _send(self, key: IdempotencyKey | None, wanted: list[Submission]) -> None:
        try:
            reply = await self.again(lambda: self.store.submit(self.tenant, ACTIVE_MAX, wanted, key))
        except (QuotaExceeded, NameTaken, UnknownDependency):
            return
        if reply is not None:
            self.accepted += [task_id for task_id, status in reply.tasks if status is not None and not reply.replayed]
            if key is not None and not reply.replayed:
                self._last = (key, wanted, [task_id for task_id, _ in reply.tasks])

    async def submit_again(self) -> None:
        """The same request with its key, as one that has lost the answer does; or another one with that key."""
        if self._last is None:
            return
        key, wanted, ids = self._last
        fresh = [msgspec.structs.replace(one, task_id=array_id() if one.spec.count else new_id()) for one in wanted]
        other = self.rng.random() < 0.3
        if other:
            key = msgspec.structs.replace(key, digest="another body")
        try:
            reply = await self.again(lambda: self.store.submit(self.tenant, ACTIVE_MAX, fresh, key))
        except IdempotencyConflict:
            return
        except (QuotaExceeded, NameTaken, UnknownDependency):
            self._last = None  # the clock has jumped over the day that a key holds
            return
        if reply is None:
            self._last = None
        elif not reply.replayed:
            self._last = None
            self.accepted += [task_id for task_id, _ in reply.tasks]
        elif any(one.spec.name for one in wanted):
            return  # the key may have had its day, and the name says the same
        elif other or [task_id for task_id, _ in reply.tasks] != ids:
            raise Violation("same-key-same-task", f"{key}: {reply}, was {ids}")

    async def cancel(self) -> None:
        if self.accepted:
            task_id = self.rng.choice(self.accepted[-20:])
            if task_id.endswith("0000"):
                await self.again(lambda: self.store.cancel_array(task_id, self.tenant, 0))
            else:
                await self.again(lambda: self.store.cancel(task_id, self.tenant))

    async def read(self) -> None:
        """Look how a task does: what was final once stays so."""
        if self.accepted:
            task_id = self.rng.choice(self.accepted[-30:])
            record = await self.again(lambda: self.store.task(task_id))
            if record is not None and record.status in FINAL:
                was = self.final.setdefault(task_id, record.status)
                if was != record.status:
                    raise Violation("final-is-final", f"{task_id}: a client saw {was}, then {record.status}")


class Operator(Person):
    """Cordons nodes, and lifts that again."""

    async def live(self, until_s: float) -> None:
        loop = self.process.loop
        while loop.now_s < until_s:
            await asyncio.sleep(self.rng.expovariate(1 / 8.0))
            node, mode = self.rng.choice(NODES), self.rng.choice((Cordon.CORDON, Cordon.DRAIN, Cordon.DRAIN))
            deadline_s = self.rng.choice((None, 0.5, 5.0))
            remove = self.rng.random() < 0.3
            await self.again(lambda: self.store.cordon(node, mode, "operator", deadline_s, remove=remove), 3)  # noqa: B023
            await asyncio.sleep(self.rng.expovariate(1 / 4.0))
            await self.again(lambda: self.store.cordon(node, Cordon.NONE, "operator"), 3)  # noqa: B023


class Meddler(Person):
    """A controller that is wrong about everything: it acts on old looks, with the tokens of its past, or of who leads."""

    def __init__(self, loop: SimLoop, network: Network, rng: random.Random, token: Callable[[], int]) -> None:
        super().__init__(loop, network, rng, "meddler")
        self._token = token
        self._states: list[ClusterState] = []
        self._tokens = [1]

    async def live(self, until_s: float) -> None:
        loop = self.process.loop
        while loop.now_s < until_s:
            await asyncio.sleep(self.rng.expovariate(1 / 0.4))
            try:
                if not self._states or self.rng.random() < 0.3:
                    self._states = [*self._states[-3:], await self.store.look(leader=False)]
                    self._tokens = [*self._tokens[-3:], self._token()]
                await self._meddle()
            except (StoreUnavailable, StoreReplyError):
                pass

    async def _meddle(self) -> None:
        rng, store = self.rng, self.store
        state, token = rng.choice(self._states), rng.choice(self._tokens)
        slots = [slot.slot_id for slot in state.slots] or ["none"]
        some = rng.sample(slots, min(2, len(slots)))
        choices: list[Callable[[], Awaitable[object]]] = [
            lambda: store.fence(token, "Meddled", some[:1]),
            lambda: store.flag(token, rng.choice(list(SlotFlag)[1:]), some),
            lambda: store.drop(token, "Meddled", some),
            lambda: store.planned(token, rng.randrange(2), [(queue.shape_id, 3) for queue in state.queues]),
            lambda: store.age(token, rng.choice((0.0, 60.0)), [queue.shape_id for queue in state.queues]),
            store.due,
            lambda: store.sweep(token, 0, 30, 0),
        ]
        strangers = [row.incarnation for row in state.nodes] + [new_id()]
        stranger = rng.choice(strangers)
        others = [slot.slot_id for slot in state.slots if slot.incarnation not in ("", stranger)]
        if others:  # one agent speaks for what another one has
            other = rng.choice(others)
            choices += [
                lambda: store.next(other, stranger, 1, ()),
                lambda: store.close_slot(other, stranger, "Meddled"),
            ]
        if state.queues:
            queue = rng.choice(state.queues)
            choices += [
                lambda: store.request_slot(token, new_id(), queue.shape_id, 0),
                lambda: store.refuse(token, queue.shape_id),
                lambda: store.warm(queue.shape_id, queue.shape, rng.randrange(2), 5.0),
                lambda: store.unload([queue.shape_id]),
            ]
        if state.nodes and rng.random() < 0.1:
            row = rng.choice(state.nodes)
            choices = [lambda: store.lost(token, row.node, row.incarnation)]
        await rng.choice(choices)()
