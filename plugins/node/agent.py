"""The node agent: one per node. It supervises one Dask worker, owns the slots and their executors, and is the only process of
the node that may write tasks in the store.

Its parts: `DeviceWatch` looks at devices, `SlotTable` has the slots, `WorkerSupervisor` keeps the Dask worker. This module
joins them: registration, heartbeat, wake-ups, requests of the Dask worker, what to do when this incarnation was fenced, and
how it stops: at once, after its slots have ended, or for good when the node was removed.
"""

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from manager.core.devices import reserve_of
from manager.core.errors import RegistrationRefused, RocyardError, StoreFull, StoreUnavailable
from manager.core.ids import new_id
from manager.core.lifecycle import Cordon
from manager.core.model import BeatReply, NodeInfo
from manager.core.selectors import labels_of
from manager.log import get_logger
from manager.metrics import LOOP_ERRORS
from manager.results import ResultStore
from manager.settings import Settings
from manager.store import Store, StoreConnection
from plugins.node.device_watch import DeviceWatch
from plugins.node.devices.probe import Prober
from plugins.node.executors import Pulse
from plugins.node.host import host_cpus, host_memory_bytes
from plugins.node.link import (
    Answer,
    AskBeat,
    AskReport,
    Beat,
    EndDirect,
    Ended,
    OpenDirect,
    OpenSlot,
    Refused,
    Report,
    Request,
    serve_link,
)
from plugins.node.publishing import Functions
from plugins.node.slot_environment import SlotEnvironment
from plugins.node.slot_executor import Ending, SlotContext
from plugins.node.slot_table import SlotTable
from plugins.node.worker_config import WorkerConfig, worker_config
from plugins.node.worker_supervisor import WorkerSupervisor, worker_environment

PULSE_S: Final = 0.5
STOOD_STILL_S: Final = 1.5
STOP_S: Final = 5.0
STORE_PAUSE_S: Final = 0.2
REFUSED_PAUSE_S: Final = 1.0
"""A registration that was refused is tried again: who has the device may leave, or be declared lost."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

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
        results: ResultStore,
    ) -> None:
        self.settings = settings
        self.node = node
        self.store = store
        self.listener = listener
        self.prober = prober
        self.directory = directory
        self.results = results
        self.socket_path = str(socket_path)
        self.incarnation = new_id()
        self.functions = Functions(settings.functions, dict(os.environ))
        self.pulse = Pulse()
        self.metrics_url = ""
        self.cpus = host_cpus()
        self.host_memory_bytes = host_memory_bytes()
        group = settings.groups.get(settings.node.group)
        self.labels = labels_of({**(group.labels if group is not None else {}), **settings.node.labels}.items())
        self.watch = DeviceWatch(node, prober, settings.node.probe_s)
        self.worker = WorkerSupervisor(self._worker_config, worker_environment(dict(os.environ)), settings.node.registration_s)
        self._beat_now = asyncio.Event()
        self.slots = SlotTable(
            node,
            settings.node.slots_max,
            settings.node.reserve_bytes,
            devices=lambda: self.watch.devices,
            context=self._context,
            ask_beat=self._beat_now.set,
        )
        self._stopped = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopping = False
        self._removed = False
        self._cordoned = False
        self._devices_changed = False
        self._refused = ""
        self._heartbeat: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heartbeat.set_result(None)
        self._registered = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------

    async def run(self, metrics_url: str) -> bool:
        """Register, serve, and leave cleanly when stopped. True: the node was removed, nobody may start its agent again."""
        self.metrics_url = metrics_url
        shutil.rmtree(self.directory / "slots", ignore_errors=True)
        self._pulse()
        # The Dask worker needs seconds to start: it does so while we look at the devices and register.
        server = await serve_link(self.socket_path, self._answer)
        loops = [asyncio.create_task(self.worker.run()), asyncio.create_task(self._forever("publish", self._publish))]
        joining = asyncio.create_task(self._join())
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({joining, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                joining.result()
                loops += [
                    asyncio.create_task(self._forever("beat", self._beat)),
                    asyncio.create_task(self._forever("listen", self._listen)),
                    asyncio.create_task(self._forever("probe", self._look)),
                ]
                await stopped
                await self._finish()
        finally:
            server.close()
            for loop in (*loops, joining, stopped):
                loop.cancel()
            await self._leave()
        return self._removed

    def stop(self) -> None:
        """Have `run` return: after its slots have ended, if there is time for that; asked again, at once."""
        if self._stopped.is_set():
            self._hurry.set()
        self._stopped.set()

    async def _join(self) -> None:
        await self.watch.first_look(self.slots)
        await self._register()

    async def _finish(self) -> None:
        """Take nothing new, and let the slots come to their next task boundary, for as long as `node.stop_drain_s` allows."""
        seconds = self.settings.node.stop_drain_s
        if self._removed or not seconds:
            return
        self._stopping = True
        log.info("agent_drains", node=self.node, slots=len(self.slots.live), most_s=seconds)
        work = [asyncio.create_task(self._cordon_self()), asyncio.create_task(self.slots.drain())]
        hurry = asyncio.create_task(self._hurry.wait())
        waiting: set[asyncio.Future[Any]] = {asyncio.gather(*work), hurry}
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        log.info("agent_drained", node=self.node, slots_left=len(self.slots.live))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _cordon_self(self) -> None:
        """Have nothing new placed here. The Dask worker hears of it too, but what is on its way is refused by the store."""
        while True:
            try:
                await self.store.cordon(self.node, Cordon.DRAIN, "agent", incarnation=self.incarnation)
            except StoreUnavailable as error:
                log.warning("store_unavailable", loop="cordon", error=str(error))
                await asyncio.sleep(STORE_PAUSE_S)
            else:
                return

    @property
    def cordoned(self) -> bool:
        """Whether nothing new is to be placed here."""
        return self._cordoned or self._stopping

    async def _leave(self) -> None:
        await asyncio.gather(self.worker.stop(), self.slots.end_all(Ending.STOPPED, STOP_S))
        try:
            async with asyncio.timeout(STOP_S):
                await self.store.leave(self.node, self.incarnation)
        except (RocyardError, TimeoutError) as error:
            log.warning("left_without_store", error=str(error))
        await self.prober.close()
        shutil.rmtree(self.directory / "slots", ignore_errors=True)
        log.info("agent_stopped", node=self.node)

    async def _forever(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take `step` again and again; trouble with one is no trouble for the next."""
        while True:
            try:
                await step()
            except (StoreUnavailable, StoreFull) as error:
                log.warning("store_unavailable", loop=name, error=str(error))
                await asyncio.sleep(STORE_PAUSE_S)
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
        while True:
            if await self._try_to_register():
                return
            await asyncio.sleep(REFUSED_PAUSE_S)

    async def _try_to_register(self) -> bool:
        """Register as soon as the store answers. False: it refuses what this agent says of its devices."""
        self.slots.reserve_bytes = self._reserve_bytes()
        info = NodeInfo(
            hostname=socket.gethostname(),
            pid=os.getpid(),
            source=self.prober.kind,
            version=self.functions.version,
            devices=self.watch.devices,
            reserve_bytes=self.slots.reserve_bytes,
            slots_max=self.settings.node.slots_max,
            cpus=self.cpus,
            metrics_url=self.metrics_url,
            group=self.settings.node.group,
            machine=_machine(self.prober.kind),
            host_memory_bytes=self.host_memory_bytes,
            labels=self.labels,
        )
        while True:
            try:
                if await self.store.register(self.node, self.incarnation, info):
                    log.info("agent_registered", node=self.node, incarnation=self.incarnation, devices=len(info.devices))
                    self._refused = ""
                    return True
                self.incarnation = new_id()
            except RegistrationRefused as error:
                if str(error) != self._refused:
                    log.error("registration_refused", node=self.node, problem=str(error))
                self._refused = str(error)
                return False
            except StoreUnavailable as error:
                log.warning("store_unavailable", loop="register", error=str(error))
                await asyncio.sleep(STORE_PAUSE_S)

    async def _beat(self) -> None:
        began_s = time.monotonic()
        reply = await self.store.beat(self.node, self.incarnation, self.slots.beats())
        if not reply.holds:
            await self._start_over()
            return
        self._note(reply)
        try:
            async with asyncio.timeout(self.settings.node.beat_s):
                await self._beat_now.wait()
        except TimeoutError:
            pass
        self._beat_now.clear()
        late_s = time.monotonic() - began_s - self.settings.node.beat_s
        if late_s > STOOD_STILL_S:
            self.worker.forgive(late_s)

    def _note(self, reply: BeatReply) -> None:
        self._cordoned = self.slots.cordoned = reply.cordoned
        self._registered.set()
        for slot_id, word in reply.words:
            self.slots.tell(slot_id, word)
        if reply.leave and not self.slots.live:
            log.info("node_removed", node=self.node)
            self._removed = True
            self._stopped.set()

    async def _start_over(self) -> None:
        """This incarnation was fenced: nothing of it may go on. A new one registers with nothing."""
        log.error("agent_fenced", node=self.node, incarnation=self.incarnation, slots=len(self.slots.live))
        await self.slots.end_all(Ending.FENCED, STOP_S)
        self.incarnation = new_id()
        self._registered.clear()  # a new incarnation may be cordoned otherwise; its first beat says
        await self._register()
        self.worker.restart()

    async def _listen(self) -> None:
        def hear(_channel: str, text: str) -> None:
            if text == "node":  # somebody has cordoned it, or lifted that
                self._beat_now.set()
            else:
                self.slots.hear(text)

        await self.listener.subscribe([self.store.keys.wake(self.node)], hear)

    async def _look(self) -> None:
        if await self.watch.look(self.slots):
            self._devices_changed = True
        if self._devices_changed and await self._try_to_register():
            self._devices_changed = False
            self.worker.restart()  # its registration report is what tells the scheduler of new devices
        if notes := self.watch.notes(self.slots):
            await self.store.note_memory(self.incarnation, notes)
            self.watch.noted(notes)

    async def _publish(self) -> None:
        await self.functions.describe()
        while True:
            try:
                await self.functions.publish(self.store)
                break
            except (StoreUnavailable, StoreFull) as error:
                log.warning("store_unavailable", loop="publish", error=str(error))
                await asyncio.sleep(STORE_PAUSE_S)
        await self._stopped.wait()

    # --- the Dask worker's requests -----------------------------------------------------------------------------

    def _worker_config(self, generation: int) -> WorkerConfig:
        return worker_config(self.settings, self.node, self.incarnation, generation, self.socket_path, self.directory)

    async def _answer(self, request: Request) -> Answer:
        if request.generation != self.worker.generation and not isinstance(request, EndDirect):
            return Refused(f"this worker is of generation {request.generation}, the newest is {self.worker.generation}")
        match request:
            case AskReport():
                await self._registered.wait()
                return Report(
                    node=self.node,
                    incarnation=self.incarnation,
                    generation=self.worker.generation,
                    devices=self.watch.devices,
                    reserve_bytes=self.slots.reserve_bytes,
                    slots_max=self.settings.node.slots_max,
                    slots=self.slots.report(),
                    cordoned=self.cordoned,
                    cpu_milli=self.cpus * 1000,
                    host_memory_bytes=self.host_memory_bytes,
                    labels=self.labels,
                )
            case AskBeat():
                self.worker.heard()
                age_s = time.monotonic() - self.watch.read_s
                if not self.settings.store.worker_url.value and self._heartbeat.done():
                    self._heartbeat = asyncio.create_task(self._beat_for_worker(request.address))
                return Beat(self.node, tuple(self.slots.closed), self.watch.uses, age_s, self.cordoned)
            case OpenSlot():
                return Ended(await self.slots.open(request))
            case OpenDirect():
                return await self.slots.open_direct(request)
            case EndDirect():
                return Ended(await self.slots.end_direct(request))

    async def _beat_for_worker(self, address: str) -> None:
        """The worker's heartbeat, for one that was given no right to the store of its own (store.worker_url)."""
        try:
            await self.store.put_heartbeat(self.node, address, self.watch.uses)
        except (StoreUnavailable, StoreFull) as error:
            log.warning("store_unavailable", loop="heartbeat", error=str(error))

    def _reserve_bytes(self) -> int:
        node = self.settings.node
        return reserve_of(self.watch.devices, node.reserve_bytes, node.memory_ratio_max)

    def _context(self) -> SlotContext:
        return SlotContext(
            store=self.store,
            incarnation=self.incarnation,
            functions=self.functions.specs,
            interpreter=self.functions.interpreter,
            environment=SlotEnvironment(self.watch.devices, self.prober, dict(os.environ)),
            pulse=self.pulse,
            lease_s=self.settings.node.beat_s * self.settings.node.lease_beats,
            scratch=self.directory / "slots",
            slots=self.settings.slots,
            tasks=self.settings.tasks,
            results=self.results,
            inline_bytes_max=self.settings.results.inline_bytes_max,
        )


def _machine(source: str) -> str:
    """What all agents of this machine say of it, in containers too. Simulated devices are the host's that simulates them."""
    try:
        return "" if source == "simulated" else BOOT_ID.read_text().strip()
    except OSError:
        return ""


def install_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT stop the agent cleanly."""
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, agent.stop)


def service_record(metrics_url: str) -> bytes:
    """What an agent tells of its process."""
    return msgspec.json.encode({"pid": os.getpid(), "metrics_url": metrics_url})
