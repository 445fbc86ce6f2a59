"""The controller: looks at the state, decides with pure functions, applies the answer; every step idempotent.

It looks every period, and sooner when the store's functions say that a round is worth while. Only the leader acts, and each
of its writes bears its token. It must not run user code and must not place: that is the scheduler plugin's.
"""

import asyncio
import math
import os
import signal
import socket
import time
from typing import Final

import msgspec

from manager.core.direct_room import closes_for_direct
from manager.core.errors import StoreFull, StoreUnavailable
from manager.core.ids import new_id
from manager.core.index import index_of
from manager.core.leadership import GivingWay
from manager.core.lifecycle import SlotFlag, SlotStatus
from manager.core.model import ClusterState, QueueRow
from manager.core.news import news_of
from manager.core.planner import Plan, plan
from manager.core.reconcile import drains, repairs
from manager.dask_side import DaskSide, DaskUnavailable, RunSlot, SlotOnDask
from manager.foresight import limits_of
from manager.group_needs import GroupNeeds
from manager.leader import Leadership
from manager.leader_metrics import LeaderMetrics
from manager.leader_nodes import LeaderNodes
from manager.leader_refusals import LeaderRefusals
from manager.leader_results import LeaderResults
from manager.leader_shares import LeaderShares, retention_of
from manager.log import configure_logging, get_logger
from manager.metrics import LOOP_ERRORS, QUEUE_TASKS, ROUND_DURATION, ROUNDS, SLOTS, TIMED_STEPS, serve_metrics
from manager.results import NoResults, ResultStore, open_results
from manager.settings import Settings
from manager.store import Store, StoreConnection
from manager.store.calls import IDS_MAX
from manager.store.schema import Membership
from manager.store.store import connect
from manager.tls import Role, dask_address, metrics_context, metrics_url, tls_files

ROUND_PAUSE_S: Final = 0.02
"""Between two rounds that were asked for: what is asked for within this time is one round."""
DUE_CALLS_MAX: Final = 10
"""Calls for what time brings, in one round: each does a bounded part, and a round must not take long."""
SWEEP_S: Final = 30.0
SWEEP_CALLS_MAX: Final = 20
"""Of one round, each short: what ends in a busy cluster must not outrun what is forgotten."""
KEEP_UP_PAUSE_S: Final = 0.5
TOMBSTONE_S: Final = 3600.0
"""A closed slot's id is remembered for this long: far over the time that any request can lie in a buffer."""
GIVE_WAY_S: Final = 15.0
"""A leader that reaches no Dask for so long lets another candidate try: over the time in which a scheduler starts again."""
STAND_BACK_S: Final = 3.0
"""It leaves the term to others for so long: time for each of them to look whether there is a leader."""
CLOCK_SLACK_MS: Final = 60_000
"""By so much the store's clock may gain on ours within a term, before less is forgotten than it says."""

log = get_logger("rocyard.controller")


class Controller:
    """One candidate for leader. `run` returns when `stop` was called."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        listener: StoreConnection,
        dask_side: DaskSide,
        results: ResultStore | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.listener = listener
        self.dask = dask_side
        holder = f"{socket.gethostname()}/{os.getpid()}/{new_id()}"
        self.leadership = Leadership(store, holder, settings.controller.term_s)
        self.limits = limits_of(settings)
        self.service = b""
        self._announced = False
        self._needs = GroupNeeds(settings)
        self._metrics = LeaderMetrics(settings.node.beat_s * settings.node.lease_beats)
        self._nodes = LeaderNodes(settings, store, self._token)
        self._shares = LeaderShares(settings, store)
        self._refusals = LeaderRefusals(settings, store)
        self._results = LeaderResults(store, results or NoResults(), self._token)
        self._looked_s: float | None = None
        self._swept_s = 0.0
        self._told_workers: dict[str, str] | None = None
        self._kept = False
        self._clock: tuple[int, float] | None = None
        self._giving_way = GivingWay(GIVE_WAY_S)
        self._dask_error = ""
        self._wake = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping = True
        self._wake.set()

    def _token(self) -> int:
        """Of the term that this controller has; 0: it does not lead."""
        return self.leadership.token if self.leadership.leads else 0

    async def run(self) -> None:
        """Look, decide, act, until stopped; then resign."""
        beside = [asyncio.create_task(self._listen()), asyncio.create_task(self._results.run())]
        self._nodes.start()
        try:
            while not self._stopping:
                began_s = time.monotonic()
                again_s = await self._guarded_round()
                pause = min(self.settings.controller.period_s, again_s)
                await self._sleep(max(ROUND_PAUSE_S, pause - (time.monotonic() - began_s)))
        finally:
            for task in beside:
                task.cancel()
            self._nodes.stop()
            await self.leadership.resign()
            await self.dask.close()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
            await asyncio.sleep(ROUND_PAUSE_S)
        except TimeoutError:
            pass
        self._wake.clear()

    async def _listen(self) -> None:
        while True:
            try:
                await self.listener.subscribe([self.store.keys.ctl], lambda _channel, _text: self._wake.set())
            except StoreUnavailable:
                await asyncio.sleep(0.2)
            except Exception:
                LOOP_ERRORS.labels(loop="controller_listen").inc()
                log.exception("loop_failed", loop="controller_listen")
                await asyncio.sleep(1.0)

    async def _guarded_round(self) -> float:
        try:
            if not await self.leadership.step():
                self._giving_way.stopped()
                self._nodes.forget()
                self._looked_s = self._clock = None
                self._announced = False
                self._shares.forget()
                self._needs.hide()
                self._metrics.hide()
                return min(1.0, self.settings.controller.period_s)
            with ROUND_DURATION.time():
                again_s = await self.round()
            ROUNDS.inc()
            return again_s
        except StoreUnavailable as error:
            log.warning("round_without_store", error=str(error))
            self._nodes.deaf()
            return 0.5
        except Exception:
            LOOP_ERRORS.labels(loop="controller").inc()
            log.exception("loop_failed", loop="controller")
            return 1.0

    async def round(self) -> float:
        """One round as leader; seconds until the next one is due at the latest."""
        if not self._announced:
            # Who leads, and no other, says where the controller's metrics are: the autoscaler decides from them.
            self._announced = await self._say_where("controller", self.service)
        asked_s = time.monotonic()
        state = await self.store.look(leader=True)
        silent_s = self._nodes.silence(state, asked_s, time.monotonic())
        state = self._account(state)
        for status, count in (await self.store.counts()).items():
            QUEUE_TASKS.labels(status=status).set(count)
        if await self._nodes.fence(state, silent_s):
            self._wake.set()
        self._metrics.show(state, lambda row: silent_s[row.node])
        following = await self._due()
        await self._refusals.refuse(self.leadership.token, state)
        await self._sweep(state)
        again_s = self.settings.controller.period_s if following is None else max(ROUND_PAUSE_S, following)
        again_s = min(again_s, await self._drain(state))
        # Before anything is opened: no slot of a tenant may claim before its quota is known.
        await self._shares.tell(self.leadership.token, state)
        if risen := await self._shares.age(self.leadership.token, state):
            log.info("tasks_aged", tasks=risen)
        try:
            # Before anything is placed: a scheduler that has just started knows of no cordon.
            await self.dask.tell(news_of(state))
            on_dask, workers = await self.dask.slots()
            await self._pass_mix(state)
            self._needs.show(state, self.dask.direct, self.leadership.token, time.monotonic())
            dropped = await self._repair(state, on_dask)
            planned = await self._plan(state, on_dask, dropped)
        except DaskUnavailable as error:
            self._needs.show(state, (), self.leadership.token, time.monotonic())  # what was held there is gone with it
            await self._note_dask(state, error)
            if self._giving_way.fails(time.monotonic()):
                await self.leadership.give_way(STAND_BACK_S)
            return min(again_s, 0.25)
        self._giving_way.works()
        await self._note_dask(state, None)
        await self._announce_dask(workers)
        return min(again_s, planned.again_s or again_s)

    # --- steps --------------------------------------------------------------------------------------------------

    def _account(self, state: ClusterState) -> ClusterState:
        """The look with what tenants and shapes have had until now, and what the metrics say."""
        now_s = time.monotonic()
        elapsed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        by_status: dict[SlotStatus, int] = dict.fromkeys(SlotStatus, 0)
        for slot in state.slots:
            by_status[slot.status] += 1
        SLOTS.labels(status="requested").set(by_status[SlotStatus.REQUESTED])
        SLOTS.labels(status="open").set(by_status[SlotStatus.OPEN])
        return self._shares.account(state, elapsed_s)

    async def _due(self) -> float | None:
        """Have happen what time brings; seconds until there is more of it, None where nothing waits for a time."""
        counts: dict[str, int] = {}
        following: float | None = 0.0
        for _ in range(DUE_CALLS_MAX):
            done, following = await self.store.due()
            for step, count in (("retried", done.retried), ("expired", done.expired), ("told", done.told), ("made", done.made)):
                if count:
                    counts[step] = counts.get(step, 0) + count
                    TIMED_STEPS.labels(step=step).inc(count)
            if following != 0:
                break
        if counts:
            tell = log.debug if counts.keys() == {"retried"} else log.info  # a herd of retries is nobody's news
            tell("tasks_moved_on", **counts)
        return following

    async def _pass_mix(self, state: ClusterState) -> None:
        """What the scheduler has learned of requests goes into the store; one that has just started is given it back."""
        mix = self.dask.mix
        if mix is None:
            return
        if mix.revision:
            await self.store.put_mix(self.leadership.token, mix)
        elif state.mix.revision:
            await self.dask.tell(news_of(state, with_mix=True))  # before anything is submitted to it anew

    async def _note_dask(self, state: ClusterState, error: DaskUnavailable | None) -> None:
        """Say whether Dask is there, in the store for `rocyard status` and in the log; only where that has changed."""
        if self._dask_error != str(error or ""):
            self._dask_error = str(error or "")
            if error is None:
                log.info("dask_available")
            else:
                log.warning("dask_unavailable", error=str(error))
        if state.dask is not (error is None):
            await self.store.reached(self.leadership.token, dask=error is None)

    async def _drain(self, state: ClusterState) -> float:
        """Flag what is open on nodes that are being drained (nothing new opens there); seconds until the next deadline."""
        todo = drains(state)
        for flag, slots in ((SlotFlag.DRAIN, todo.drain), (SlotFlag.PREEMPT, todo.preempt)):
            if slots:
                log.info("slots_draining", slots=slots, flag=flag.value)
                await self.store.flag(self.leadership.token, flag, slots)
        return math.inf if todo.next_ms is None else max(ROUND_PAUSE_S, (todo.next_ms - state.now_ms) / 1000)

    async def _repair(self, state: ClusterState, on_dask: dict[str, SlotOnDask]) -> frozenset[str]:
        """Bring Dask in line with the store; the slots that were taken back."""
        known = {slot_id: (slot.state, slot.node) for slot_id, slot in on_dask.items()}
        todo = repairs(state, known, self.settings.slots.open_deadline_s)
        queues = {queue.shape_id: queue for queue in state.queues}
        dropped = await self._drop(list(todo.drop), "NotOpened")
        if todo.forget:
            await self.dask.dropped(list(todo.forget))
        for node, incarnation in todo.tell_lost:
            # After the tombstones: what was placed there and never opened is refused when the node wakes up.
            await self.dask.lost(node, incarnation)
        for item in todo.resubmit:
            if (queue := queues.get(item.slot.shape_id)) is not None:
                await self.dask.submit(item.slot.slot_id, queue.shape, item.node, queue.resources)
                log.info("slot_resubmitted", slot=item.slot.slot_id, node=item.node)
        return dropped

    async def _announce_dask(self, workers: dict[str, str]) -> None:
        """Say where Dask's own processes serve metrics: they have no right to tell the store themselves."""
        if workers == self._told_workers:
            return
        scheme = "https" if self.settings.tls.directory else "http"
        try:
            places = await self.dask.metrics_places(workers)
        except DaskUnavailable as error:
            log.warning("dask_unavailable", error=str(error))
            return
        for name, place in places.items():
            if not await self._say_where(name, msgspec.json.encode({"metrics_url": f"{scheme}://{place}/metrics"})):
                return
        self._told_workers = workers

    async def _say_where(self, name: str, blob: bytes) -> bool:
        """Say where a process is. False: the store is full, which is no reason not to lead: only leaders make room in it."""
        try:
            await self.store.put_service(name, blob)
        except StoreFull as error:
            log.debug("service_not_announced", service=name, error=str(error))
            return False
        return True

    async def _drop(self, slots: list[str], reason: str) -> frozenset[str]:
        if not slots:
            return frozenset()
        dropped = await self.store.drop(self.leadership.token, reason, slots)
        if dropped:
            log.info("slots_dropped", slots=dropped, reason=reason)
            await self.dask.dropped(dropped)
        return frozenset(dropped or ())

    async def _plan(self, state: ClusterState, on_dask: dict[str, SlotOnDask], dropped: frozenset[str]) -> Plan:
        if dropped:
            state = msgspec.structs.replace(state, slots=tuple(s for s in state.slots if s.slot_id not in dropped))
        held = frozenset(s.slot_id for s in state.slots if (d := on_dask.get(s.slot_id)) and d.state == "held")
        index = index_of(state)
        answer = plan(state, index, held, self.limits)
        queues = {queue.shape_id: queue for queue in state.queues}
        for item in answer.open:
            for _ in range(item.count):
                await self._open(queues[item.shape_id], item.served_max)
        ending = frozenset(close.slot_id for close in answer.close)
        closes = [*answer.close, *closes_for_direct(state, index, self.dask.direct, ending)]
        for close in closes:
            log.info("slot_closing", slot=close.slot_id, reason=close.reason, flag=close.flag.value)
        if answer.keep or self._kept:
            self._kept = bool(answer.keep)
            await self.dask.keep(dict(answer.keep))  # before the victims go: nobody else may take their room
        for flag in (SlotFlag.CLOSE, SlotFlag.PREEMPT):
            if slots := [close.slot_id for close in closes if close.flag is flag]:
                await self.store.flag(self.leadership.token, flag, slots)
        await self._drop(list(answer.drop), "NotNeeded")
        await self.store.planned(self.leadership.token, answer.held, answer.wake_at)
        return answer

    async def _open(self, queue: QueueRow, served_max: int) -> None:
        slot_id = new_id()
        if not self.leadership.leads:
            return
        needs = queue.resources
        if await self.store.request_slot(self.leadership.token, slot_id, queue.shape_id, served_max):
            log.info("slot_requested", slot=slot_id, shape=queue.shape_id, memory_bytes=needs.memory_bytes, gpus=needs.gpus)
            await self.dask.submit(slot_id, queue.shape, "", needs)

    def _steady_ms(self, store_ms: int, now_s: float) -> int:
        """The time by which things are forgotten: the store's, but a jump forward of its clock within a term is none."""
        if self._clock is None:
            self._clock = (store_ms, now_s)
        first_ms, first_s = self._clock
        return min(store_ms, first_ms + int((now_s - first_s) * 1000) + CLOCK_SLACK_MS)

    async def _sweep(self, state: ClusterState) -> None:
        now_s = time.monotonic()
        if now_s - self._swept_s < SWEEP_S:
            return
        now_ms = self._steady_ms(state.now_ms, now_s)
        usual, tenants = retention_of(self.settings, now_ms)
        closed_before = now_ms - int(TOMBSTONE_S * 1000)
        tasks = slots = files = 0
        self._swept_s = 0.0  # unless all of it is done below, the next round goes on
        for _ in range(SWEEP_CALLS_MAX):
            swept = await self.store.sweep(self.leadership.token, usual.ended_before_ms, usual.kept, closed_before, tenants)
            self._results.forget(swept.files)
            tasks, slots, files = tasks + swept.tasks, slots + swept.slots, files + len(swept.files)
            if max(swept.tasks, swept.slots) < IDS_MAX:
                self._swept_s = now_s
                break
        if tasks or slots:
            log.info("swept", tasks=tasks, slots=slots, files=files)
        self._metrics.show_fsync(await self.store.fsync_policy())


async def serve(settings: Settings, run_slot: RunSlot) -> None:
    """Run one controller until SIGTERM."""
    results = open_results(settings, prepare=False)  # a results store that is away must not stop the cluster
    deadline_s = settings.store.deadline_s
    membership = Membership(settings.store.cluster, founder=True)
    store = connect(settings.store.url.value, deadline_s, "controller", membership=membership)
    listener = StoreConnection(settings.store.url.value, deadline_s, "controller-listen")
    dask = DaskSide(dask_address(settings), run_slot, tls_files(settings.tls, Role.CONTROLLER))
    controller = Controller(settings, store, listener, dask, results)
    membership.on_outdated = controller.stop
    host = settings.controller.metrics_host
    secure = metrics_context(settings, Role.CONTROLLER, host)
    port, stop_metrics = serve_metrics(host, settings.controller.metrics_port, secure)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, controller.stop)
    controller.service = msgspec.json.encode({"pid": os.getpid(), "metrics_url": metrics_url(host, port, secure)})
    keeping_up = asyncio.create_task(_keep_up(store))
    try:
        await controller.run()
    finally:
        keeping_up.cancel()
        stop_metrics()
        await listener.close()
        await store.connection.close()
    membership.raise_if_outdated()


async def _keep_up(store: Store) -> None:
    """Bring the store's data to our schema, beside the rounds: an upgrade may take longer than a leader's term. Then see again
    and again that nobody has replaced its functions by hand.
    """
    migrated = False
    while True:
        try:
            if not migrated:
                await store.migrate()
                migrated = True
            await store.deploy()
            pause_s = SWEEP_S
        except StoreUnavailable:
            pause_s = KEEP_UP_PAUSE_S
        except Exception:
            LOOP_ERRORS.labels(loop="controller_keep_up").inc()
            log.exception("loop_failed", loop="controller_keep_up")
            pause_s = SWEEP_S
        await asyncio.sleep(pause_s)


def run(settings: Settings, run_slot: RunSlot) -> int:
    """The process's main function."""
    configure_logging("controller", settings.log)
    asyncio.run(serve(settings, run_slot))
    return 0
