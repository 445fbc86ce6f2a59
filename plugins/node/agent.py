"""The node agent: one per node. It probes devices, supervises one Dask worker, owns the slots and their executors, and is
the only process of the node that may write tasks in the store.

Its parts: `Prober` looks at devices, `WorkerSupervisor` keeps the Dask worker, `SlotRunner` is one slot. This module joins
them: registration, heartbeat, wake-ups, requests of the Dask worker, and what to do when this incarnation was fenced.
"""

import asyncio
import os
import shutil
import signal
import socket
import time
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec

from manager.core.devices import Device, Probe
from manager.core.errors import RocyardError, StoreUnavailable
from manager.core.ids import new_id
from manager.core.index import Grant
from manager.core.model import DeviceUse, NodeInfo
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS, SLOTS
from manager.settings import Settings
from manager.store import Store, StoreConnection
from plugins.node.attribution import attribute
from plugins.node.device_metrics import DeviceMetrics
from plugins.node.devices.probe import Prober
from plugins.node.executors import Pulse
from plugins.node.link import (
    Answer,
    AskBeat,
    AskReport,
    Beat,
    Ended,
    LiveSlot,
    OpenSlot,
    Refused,
    Report,
    Request,
    serve_link,
)
from plugins.node.publishing import Functions
from plugins.node.runner import SlotRunner
from plugins.node.slot_environment import SlotEnvironment
from plugins.node.slot_executor import Ending, SlotContext
from plugins.node.worker_config import WorkerConfig, worker_config
from plugins.node.worker_supervisor import WorkerSupervisor, worker_environment

PULSE_S: Final = 0.5
CLOSED_KEPT: Final = 512
"""Closed slots that each beat repeats: far more than can end between two beats that arrive."""
STOOD_STILL_S: Final = 1.5
STOP_S: Final = 5.0
READINGS_ABOVE_LEASE: Final = 2
"""A slot must be seen above its lease so often in a row before it is ended."""
MEMORY_TOLERANCE_BYTES: Final = 64 * 1024 * 1024
"""What drivers account to a process beyond its own allocations differs by so much from call to call."""

log = get_logger("rocyard.agent")


class Agent:
    """One node. `run` returns when `stop` was called."""

    def __init__(
        self,
        settings: Settings,
        node: str,
        store: Store,
        listener: StoreConnection,
        prober: Prober,
        directory: Path,
        socket_path: Path,
    ) -> None:
        self.settings = settings
        self.node = node
        self.store = store
        self.listener = listener
        self.prober = prober
        self.directory = directory
        self.socket_path = str(socket_path)
        self.incarnation = new_id()
        self.devices: tuple[Device, ...] = ()
        self.uses: tuple[DeviceUse, ...] = ()
        self.runners: dict[str, SlotRunner] = {}
        self.closed: deque[str] = deque(maxlen=CLOSED_KEPT)
        self.functions = Functions(settings.functions, dict(os.environ))
        self.pulse = Pulse()
        self.lease_s = settings.node.beat_s * settings.node.lease_beats
        self.worker = WorkerSupervisor(self._worker_config, worker_environment(dict(os.environ)))
        self.metrics_url = ""
        self._read_s = time.monotonic()
        self._above: dict[str, int] = {}
        self._beat_now = asyncio.Event()
        self._stopped = asyncio.Event()
        self._registered = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._device_metrics = DeviceMetrics(node)

    # --- life ---------------------------------------------------------------------------------------------------

    async def run(self, metrics_url: str) -> None:
        """Register, serve, and leave cleanly when stopped."""
        self.metrics_url = metrics_url
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.directory / "slots", ignore_errors=True)
        self._pulse()
        # The Dask worker needs seconds to start: it does so while we look at the devices and register.
        server = await serve_link(self.socket_path, self._answer)
        loops = [asyncio.create_task(self.worker.run()), asyncio.create_task(self._forever("publish", self._publish_loop))]
        await self._look_at_devices()
        await self._register()
        self._registered.set()
        loops += [
            asyncio.create_task(self._forever("beat", self._beat_loop)),
            asyncio.create_task(self._forever("listen", self._listen_loop)),
            asyncio.create_task(self._forever("probe", self._probe_loop)),
        ]
        try:
            await self._stopped.wait()
        finally:
            server.close()
            for loop in loops:
                loop.cancel()
            await self._leave()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopped.set()

    async def _leave(self) -> None:
        await asyncio.gather(self.worker.stop(), self._end_all(Ending.STOPPED))
        try:
            async with asyncio.timeout(STOP_S):
                await self.store.leave(self.node, self.incarnation)
        except (RocyardError, TimeoutError) as error:
            log.warning("left_without_store", error=str(error))
        await self.prober.close()
        shutil.rmtree(self.directory / "slots", ignore_errors=True)
        log.info("agent_stopped", node=self.node)

    async def _end_all(self, why: Ending) -> None:
        runners = list(self.runners.values())
        for runner in runners:
            runner.end(why)
        if runners:
            await asyncio.wait([runner.finished for runner in runners], timeout=STOP_S)

    async def _forever(self, name: str, loop: Any) -> None:
        while True:
            try:
                await loop()
            except StoreUnavailable as error:
                log.warning("store_unavailable", loop=name, error=str(error))
                await asyncio.sleep(0.2)
            except Exception:
                LOOP_ERRORS.labels(loop=name).inc()
                log.exception("loop_failed", loop=name)
                await asyncio.sleep(1.0)

    def _pulse(self) -> None:
        """The agent's sign of life to its executors, from the loop that does the agent's work."""
        self.pulse.beat()
        asyncio.get_running_loop().call_later(PULSE_S, self._pulse)

    # --- store: registration, beats, wake-ups ---------------------------------------------------------------------

    async def _register(self) -> None:
        info = NodeInfo(
            hostname=socket.gethostname(),
            pid=os.getpid(),
            source=self.prober.kind,
            version=self.functions.version,
            devices=self.devices,
            reserve_bytes=self.settings.node.reserve_bytes,
            slots_max=self.settings.node.slots_max,
            cpus=len(os.sched_getaffinity(0)),
            metrics_url=self.metrics_url,
        )
        while True:
            try:
                if await self.store.register(self.node, self.incarnation, info):
                    log.info("agent_registered", node=self.node, incarnation=self.incarnation, devices=len(self.devices))
                    return
                self.incarnation = new_id()
            except StoreUnavailable as error:
                log.warning("store_unavailable", loop="register", error=str(error))
                await asyncio.sleep(0.2)

    async def _beat_loop(self) -> None:
        while True:
            began_s = time.monotonic()
            slots = [(runner.slot_id, runner.idle) for runner in self.runners.values() if runner.shape is not None]
            holds, words = await self.store.beat(self.node, self.incarnation, slots)
            if not holds:
                await self._start_over()
                continue
            for slot_id, word in words:
                self._tell(slot_id, word)
            await self._pause(self.settings.node.beat_s)
            late_s = time.monotonic() - began_s - self.settings.node.beat_s
            if late_s > STOOD_STILL_S:
                self.worker.forgive(late_s)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._beat_now.wait()
        except TimeoutError:
            pass
        self._beat_now.clear()

    def _tell(self, slot_id: str, word: str) -> None:
        runner = self.runners.get(slot_id)
        if runner is None:
            return
        if word == "fenced":
            runner.end(Ending.FENCED)
        elif word == "preempt":
            runner.end(Ending.PREEMPTED)
        elif word.startswith("cancel:"):
            runner.cancel({word.removeprefix("cancel:")})
        else:
            runner.wake()

    async def _start_over(self) -> None:
        """This incarnation was fenced: nothing of it may go on. A new one registers with nothing."""
        log.error("agent_fenced", node=self.node, incarnation=self.incarnation, slots=len(self.runners))
        await self._end_all(Ending.FENCED)
        self.incarnation = new_id()
        await self._register()
        self.worker.restart()

    async def _listen_loop(self) -> None:
        await self.listener.subscribe([self.store.keys.wake(self.node)], self._on_message)

    def _on_message(self, _channel: str, text: str) -> None:
        word, _, slot_id = text.partition(" ")
        if word == "subscribed":  # whatever was said before is lost: ask all, and the beat asks for the rest
            for runner in self.runners.values():
                runner.wake()
            self._beat_now.set()
            return
        if (told := self.runners.get(slot_id)) is None:
            return
        if word == "cancel":
            self._spawn(self._cancel(told))
            return
        told.wake()
        if word == "flag":
            self._beat_now.set()

    async def _cancel(self, runner: SlotRunner) -> None:
        try:
            runner.cancel(await self.store.cancels(runner.slot_id))
        except StoreUnavailable:
            self._beat_now.set()  # the beat tells again

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish_loop(self) -> None:
        await self.functions.describe()
        await self.functions.publish(self.store)
        await self._stopped.wait()

    # --- the Dask worker's requests -----------------------------------------------------------------------------

    def _worker_config(self, generation: int) -> WorkerConfig:
        return worker_config(self.settings, self.node, self.incarnation, generation, self.socket_path, self.directory)

    async def _answer(self, request: Request) -> Answer:
        if request.generation != self.worker.generation:
            return Refused(f"this worker is of generation {request.generation}, the newest is {self.worker.generation}")
        match request:
            case AskReport():
                await self._registered.wait()
                return self._report()
            case AskBeat():
                self.worker.heard()
                age_s = time.monotonic() - self._read_s
                return Beat(self.node, tuple(self.closed), self.uses, age_s)
            case OpenSlot():
                return Ended(await self._open(request))

    def _report(self) -> Report:
        return Report(
            node=self.node,
            incarnation=self.incarnation,
            generation=self.worker.generation,
            devices=self.devices,
            reserve_bytes=self.settings.node.reserve_bytes,
            slots_max=self.settings.node.slots_max,
            slots=tuple(LiveSlot(slot_id, runner.grant) for slot_id, runner in self.runners.items()),
        )

    async def _open(self, request: OpenSlot) -> str:
        """Open a slot, or adopt it where it is open; returns when it has ended, with the reason."""
        slot_id = request.slot_id
        runner = self.runners.get(slot_id)
        if runner is None:
            if slot_id in self.closed or not request.devices:
                return "Gone"
            grant = Grant(self.node, request.devices, request.memory_bytes)
            if (problem := self._over(grant)) is not None:
                log.error("slot_over_committed", slot=slot_id, problem=problem)
                return "OverCommitted"
            # Live from here on: a report that is made while the store is asked must have it.
            runner = self.runners[slot_id] = SlotRunner(slot_id, grant, self._context())
            self._spawn(self._serve(runner))
        return await asyncio.shield(runner.finished)

    async def _serve(self, runner: SlotRunner) -> None:
        """From the store's word to the slot's end."""
        try:
            while True:
                try:
                    reply = await self.store.open_slot(
                        runner.slot_id, self.node, runner.context.incarnation, runner.grant.devices
                    )
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.2)
            if reply.shape is not None and reply.word in ("OK", "ADOPTED"):
                log.info("slot_opened", slot=runner.slot_id, devices=runner.grant.devices, shape=reply.shape_id)
                await runner.run(reply.shape)
            else:
                log.warning("slot_refused", slot=runner.slot_id, word=reply.word)
                if reply.word == "FENCED":
                    self._beat_now.set()
        except Exception:
            LOOP_ERRORS.labels(loop="slot").inc()
            log.exception("loop_failed", loop="slot", slot=runner.slot_id)
        finally:
            shutil.rmtree(self.directory / "slots" / runner.slot_id, ignore_errors=True)
            self.runners.pop(runner.slot_id, None)
            self.closed.append(runner.slot_id)
            if not runner.finished.done():
                runner.finished.set_result("Refused")

    def _over(self, grant: Grant) -> str | None:
        """The agent's own check: what it has leased on these devices, and this, must fit."""
        if len(self.runners) >= self.settings.node.slots_max:
            return f"this node has {len(self.runners)} slots, which is all that it may have (node.slots_max)"
        totals = {device.uuid: device.memory_bytes for device in self.devices}
        for uuid in grant.devices:
            leased = sum(r.grant.memory_bytes for r in self.runners.values() if uuid in r.grant.devices)
            if uuid not in totals:
                return f"there is no device {uuid}"
            if leased + grant.memory_bytes > totals[uuid] - self.settings.node.reserve_bytes:
                return f"{uuid}: {leased} bytes are leased of {totals[uuid]}, {grant.memory_bytes} more were granted"
        return None

    def _context(self) -> SlotContext:
        environment = SlotEnvironment(self.devices, self.prober, dict(os.environ))
        return SlotContext(
            store=self.store,
            incarnation=self.incarnation,
            functions=self.functions.specs,
            interpreter=self.functions.interpreter,
            environment=environment,
            pulse=self.pulse,
            lease_s=self.lease_s,
            scratch=self.directory / "slots",
            slots=self.settings.slots,
            tasks=self.settings.tasks,
        )

    # --- devices ------------------------------------------------------------------------------------------------

    async def _look_at_devices(self) -> None:
        """Wait for the first complete look: what has no devices registers none."""
        while True:
            probe = await self.prober.probe()
            if probe.complete or probe.devices:
                self._take(probe)
                return
            log.error("devices_unknown", error=probe.error)
            await asyncio.sleep(self.settings.node.probe_s)

    async def _probe_loop(self) -> None:
        while True:
            await asyncio.sleep(self.settings.node.probe_s)
            began_s = time.monotonic()
            probe = await self.prober.probe()
            self._read_s = began_s
            known = {device.uuid for device in self.devices}
            self._take(probe)
            if {device.uuid for device in self.devices} - known:
                await self._register()
                self.worker.restart()  # its registration report is what tells the scheduler of new devices

    def _take(self, probe: Probe) -> None:
        self.devices = probe.devices or self.devices
        sessions = {r.work.session: r.slot_id for r in self.runners.values()}
        leases: dict[str, dict[str, int]] = {device.uuid: {} for device in self.devices}
        for runner in self.runners.values():
            for uuid in runner.grant.devices:
                leases.setdefault(uuid, {})[runner.slot_id] = runner.grant.memory_bytes
        self.uses = tuple(
            attribute(reading, lambda pid: sessions.get(_session(pid)), leases.get(reading.uuid, {}))
            for reading in probe.readings
        )
        self._device_metrics.show(self.devices, self.uses, leases)
        self._mind_leases()
        SLOTS.labels(status="live").set(len(self.runners))

    def _mind_leases(self) -> None:
        """End what takes more than its lease, seen twice in a row."""
        above: dict[str, int] = {}
        for use in self.uses:
            for slot_id, used_bytes in use.slots.items():
                runner = self.runners.get(slot_id)
                if runner is not None and used_bytes > runner.grant.memory_bytes + MEMORY_TOLERANCE_BYTES:
                    above[slot_id] = self._above.get(slot_id, 0) + 1
                    if above[slot_id] == READINGS_ABOVE_LEASE:
                        runner.exceeded(used_bytes)
        self._above = above


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def install_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT stop the agent cleanly."""
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, agent.stop)


def service_record(metrics_url: str) -> bytes:
    """What an agent tells of its process."""
    return msgspec.json.encode({"pid": os.getpid(), "metrics_url": metrics_url})
