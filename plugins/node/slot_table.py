"""The agent's slots: which are live, opening them, telling them what the store says, ending them.

It checks for itself that what is granted fits what it has leased. A slot is live from the moment that its request is accepted
until nothing of it is left: a report made in between must have it.
"""

import asyncio
import os
import shutil
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from manager.core.devices import Device
from manager.core.errors import StoreUnavailable
from manager.core.shapes import SHARE_MILLI_MAX, Grant
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS
from plugins.node.direct import DirectRunner
from plugins.node.link import DirectEnded, DirectOutcome, EndDirect, LiveSlot, OpenDirect, OpenSlot
from plugins.node.runner import SlotRunner
from plugins.node.slot_executor import Ending, SlotContext

CLOSED_KEPT: Final = 512
"""Closed slots that each beat repeats: far more than can end between two beats that arrive."""
STORE_PAUSE_S: Final = 0.2

log = get_logger("rocyard.agent")


class SlotTable:
    """All slots of one agent.

    Args:
        node: the node's name.
        slots_max: most slots at once.
        reserve_bytes: memory of each device that is never leased.
        devices: the node's devices now.
        context: what a slot that opens now shares with the others.
        ask_beat: called when a beat would tell something.

    Attributes:
        live: by id.
        closed: ids of the slots that ended last.
        cordoned: nothing new is to come, so that the end of a slot is news for the store.
    """

    def __init__(
        self,
        node: str,
        slots_max: int,
        reserve_bytes: int,
        devices: Callable[[], tuple[Device, ...]],
        context: Callable[[], SlotContext],
        ask_beat: Callable[[], None],
    ) -> None:
        self.node = node
        self.slots_max = slots_max
        self.reserve_bytes = reserve_bytes
        self.live: dict[str, SlotRunner | DirectRunner] = {}
        self.closed: deque[str] = deque(maxlen=CLOSED_KEPT)
        self.cordoned = False
        self._draining = False
        self._devices = devices
        self._context = context
        self._ask_beat = ask_beat
        self._tasks: set[asyncio.Task[None]] = set()
        self._direct_starts = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    # --- what the Dask worker asks ------------------------------------------------------------------------------

    def report(self) -> tuple[LiveSlot, ...]:
        """Everything that lives, opened or about to be."""
        return tuple(LiveSlot(slot_id, runner.grant) for slot_id, runner in self.live.items())

    async def open(self, request: OpenSlot) -> str:
        """Open a slot, or adopt it where it is open; returns when it has ended, with the reason."""
        slot_id = request.slot_id
        runner = self.live.get(slot_id)
        if runner is None:
            grant = request.grant
            if slot_id in self.closed or not grant.devices:
                return "Gone"
            if (problem := self._over(grant)) is not None:
                log.error("slot_over_committed", slot=slot_id, problem=problem)
                return "OverCommitted"
            runner = self.live[slot_id] = SlotRunner(slot_id, grant, self._context())
            if self._draining:
                runner.drain()  # it closes as soon as it is open, and another one is planned elsewhere
            self._spawn(self._serve(runner))
        return await asyncio.shield(runner.finished)

    async def open_direct(self, request: OpenDirect) -> DirectEnded:
        """Run a Dask task in a slot of its own; returns when nothing is left of it."""
        slot_id = request.slot_id
        runner = self.live.get(slot_id)
        if runner is None:
            grant = request.grant
            if slot_id in self.closed or not grant.devices:
                problem: str | None = "Gone"
            elif self._draining:
                problem = "Draining"
            elif (problem := self._over(grant)) is not None:
                log.error("slot_over_committed", slot=slot_id, problem=problem)
            if problem is not None:
                self.closed.append(slot_id)
                return DirectEnded(DirectOutcome.AGAIN, problem, opened=False)
            runner = self.live[slot_id] = DirectRunner(request, self._context(), self._direct_starts)
            self._spawn(self._serve_direct(runner))
        await asyncio.shield(runner.finished)
        return runner.outcome if isinstance(runner, DirectRunner) else DirectEnded(DirectOutcome.AGAIN, "Gone", opened=False)

    async def end_direct(self, request: EndDirect) -> str:
        """End a direct slot, opened or not; returns when nothing is left of it, and it will never be opened."""
        runner = self.live.get(request.slot_id)
        if runner is None:
            if request.slot_id not in self.closed:
                self.closed.append(request.slot_id)
            return "Gone"
        if not isinstance(runner, DirectRunner):
            return "Kept"  # a Dask worker has no say about slots of the leader's
        if request.gently:
            runner.end_gently()
        else:
            runner.end(Ending.STOPPED)
        return await asyncio.shield(runner.finished)

    async def _serve_direct(self, runner: DirectRunner) -> None:
        try:
            await runner.run()
        except Exception:
            LOOP_ERRORS.labels(loop="direct").inc()
            log.exception("loop_failed", loop="direct", slot=runner.slot_id)
        finally:
            self._gone(runner)
            if not runner.finished.done():  # its end could not be told to the store; its Dask worker waits for it all the same
                runner.finished.set_result("Failed")

    async def _serve(self, runner: SlotRunner) -> None:
        """From the store's word to the slot's end."""
        context = runner.context
        try:
            while True:
                try:
                    reply = await context.store.open_slot(runner.slot_id, context.incarnation, runner.grant)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(STORE_PAUSE_S)
            if reply.shape is not None and reply.word in ("OK", "ADOPTED"):
                log.info("slot_opened", slot=runner.slot_id, devices=runner.grant.devices, shape=reply.shape_id)
                await runner.run(reply.shape)
            else:
                log.warning("slot_refused", slot=runner.slot_id, word=reply.word)
                if reply.word == "FENCED":
                    self._ask_beat()
        except Exception:
            LOOP_ERRORS.labels(loop="slot").inc()
            log.exception("loop_failed", loop="slot", slot=runner.slot_id)
        finally:
            self._gone(runner)
            if not runner.finished.done():
                runner.finished.set_result("Refused")

    def _gone(self, runner: SlotRunner | DirectRunner) -> None:
        """Nothing is left of it."""
        # In a thread: to delete what a task has left may take seconds, in which the agent would seem dead to its executors.
        self._spawn(asyncio.to_thread(shutil.rmtree, runner.context.scratch / runner.slot_id, ignore_errors=True))
        self.live.pop(runner.slot_id, None)
        self.closed.append(runner.slot_id)
        if self.cordoned:
            self._ask_beat()

    def _over(self, grant: Grant) -> str | None:
        """What is leased on these devices and their pools, and this, must fit; why not, or None."""
        if grant.node != self.node:
            return f"this is node {self.node}, and what was granted is {grant.node}'s"
        if len(self.live) >= self.slots_max:
            return f"this node has {len(self.live)} slots, which is all that it may have (node.slots_max)"
        devices = {device.uuid: device for device in self._devices()}
        if missing := [uuid for uuid in grant.devices if uuid not in devices]:
            return f"there is no device {missing[0]}"
        others = [runner.grant for runner in self.live.values()]
        for uuid in grant.devices:
            there = [other for other in others if uuid in other.devices]
            if there and (grant.exclusive or any(other.exclusive for other in there)):
                return f"{uuid}: a slot that wants it for itself and another one cannot both have it"
            share_milli = sum(other.share_milli for other in there)
            if share_milli + grant.share_milli > SHARE_MILLI_MAX:
                return f"{uuid}: {share_milli} thousandths are leased, {grant.share_milli} more were granted"
        pools = {devices[uuid].pool_key: devices[uuid].memory_bytes for uuid in grant.devices}
        for pool, total_bytes in pools.items():
            leased = sum(_bytes_of(other, pool, devices) for other in others)
            granted = _bytes_of(grant, pool, devices)
            if leased + granted > total_bytes - self.reserve_bytes:
                return f"{pool}: {leased} bytes are leased of {total_bytes}, {granted} more were granted"
        return None

    # --- what the store says --------------------------------------------------------------------------------------

    def beats(self) -> list[tuple[str, bool]]:
        """Each slot that the store has opened, and whether it is idle."""
        return [(runner.slot_id, runner.idle) for runner in self.live.values() if runner.opened]

    def tell(self, slot_id: str, word: str) -> None:
        """A word of the beat's reply about one slot."""
        runner = self.live.get(slot_id)
        if runner is None:
            return
        if word == "fenced":
            runner.end(Ending.FENCED)
        elif word == "preempt":
            runner.end(Ending.PREEMPTED)
        elif isinstance(runner, DirectRunner):
            return  # it has no work but its own, and ends with its task
        elif word.startswith("cancel:"):
            runner.cancel({word.removeprefix("cancel:")})
        else:
            runner.wake()

    def hear(self, text: str) -> None:
        """A message of the wake channel: ``work SLOT``, ``cancel SLOT``, ``flag SLOT``."""
        word, _, slot_id = text.partition(" ")
        if word == "subscribed":  # whatever was said before is lost: ask all, and the beat asks for the rest
            for runner in self.live.values():
                runner.wake()
            self._ask_beat()
        elif (told := self.live.get(slot_id)) is not None:
            if word == "cancel" and isinstance(told, SlotRunner):
                self._spawn(self._cancel(told))
                return
            told.wake()
            if word == "flag":
                self._ask_beat()

    async def _cancel(self, runner: SlotRunner) -> None:
        try:
            runner.cancel(await runner.context.store.cancels(runner.slot_id))
        except StoreUnavailable:
            self._ask_beat()  # the beat tells again

    async def drain(self) -> None:
        """Have every slot end at its next task boundary; returns when none is left."""
        self._draining = True
        while self.live:
            runners = list(self.live.values())
            for runner in runners:
                runner.drain()
            await asyncio.wait([runner.finished for runner in runners], return_when=asyncio.FIRST_COMPLETED)

    async def end_all(self, why: Ending, timeout_s: float) -> None:
        """End every slot and wait until nothing of them is left."""
        runners = list(self.live.values())
        for runner in runners:
            runner.end(why)
        if runners:
            await asyncio.wait([runner.finished for runner in runners], timeout=timeout_s)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _bytes_of(grant: Grant, pool: str, devices: Mapping[str, Device]) -> int:
    """What a grant leases of one pool: its memory for each of its devices there."""
    return grant.memory_bytes * sum(uuid in devices and devices[uuid].pool_key == pool for uuid in grant.devices)
