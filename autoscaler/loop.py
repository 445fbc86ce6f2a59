"""The loop: looks at everything, has the policy decide, does what it says, writes it down. What came of it is seen by the
next look; nothing is remembered that a new process could not do without.

Only the leader acts, and each of its changes bears its token. Must not decide: that is `autoscaler.policy`'s.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final, assert_never

import msgspec

from autoscaler.journal import SHADOW, Journal
from autoscaler.metrics_source import Freshness, MetricsSource, NoData, Reading
from autoscaler.observe import History, Watcher
from autoscaler.policy import (
    Action,
    Add,
    Decision,
    Drain,
    GroupView,
    Hold,
    Limits,
    Member,
    Observation,
    Phase,
    Reason,
    Remove,
    Uncordon,
    backoff_s,
    decide,
)
from autoscaler.providers.interface import Listing, Provider, ProviderRefused, ProviderUnavailable
from manager.core.answers_autoscaler import DecisionNote, ScalingAction, ScalingGroup
from manager.core.errors import StoreUnavailable
from manager.core.lifecycle import Cordon
from manager.core.model import ClusterState
from manager.core.packing import PackGroup, pack
from manager.leader import Leadership
from manager.log import get_logger
from manager.metrics import (
    AUTOSCALER_ACTIONS,
    AUTOSCALER_METRICS_KNOWN,
    AUTOSCALER_SIZE,
    AUTOSCALER_TARGET,
    LOOP_ERRORS,
)
from manager.settings import Settings
from manager.store import Store

BY: Final = "autoscaler"
NAMES_MAX: Final = 1000
"""Names that a provider is asked for at once: over any step from fewer nodes; larger groups double in more steps."""
DONE: Final = "done"

log = get_logger("rocyard.autoscaler")


class _Starts:
    """How the starts of a group's nodes went."""

    def __init__(self) -> None:
        self.failures = 0
        self.until_s = 0.0
        self.reason = ""
        self.starting: frozenset[str] = frozenset()
        self.up_s: float | None = None


class Autoscaler:
    """One candidate for the autoscaler that acts.

    Args:
        settings: the whole tree.
        store: the process's connection.
        leadership: of the role.
        providers: by group.
        source: of the metrics.
        pack_groups: the groups, as they are packed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        leadership: Leadership,
        providers: Mapping[str, Provider],
        source: MetricsSource,
        pack_groups: tuple[PackGroup, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        own = settings.autoscaler
        self.settings = own
        self.groups = settings.groups
        self.store = store
        self.leadership = leadership
        self.providers = providers
        self.source = source
        self.clock = clock
        self.limits = Limits(
            up_window_s=own.up_window_s,
            down_window_s=own.down_window_s,
            tolerance=own.tolerance,
            step_up_max=own.step_up_max,
            step_down_max=own.step_down_max,
            workers_max=own.workers_max,
            settle_s=settings.slots.open_deadline_s,
        )
        self._pack_groups = pack_groups
        self._watcher = Watcher(settings.node.registration_s, settings.node.beat_s)
        self._fresh = Freshness(own.metrics_stale_s)
        self._ups = {name: History(own.up_window_s) for name in settings.groups}
        self._downs = {name: History(own.down_window_s) for name in settings.groups}
        self._starts = {name: _Starts() for name in settings.groups}
        self._journal = Journal(store)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()

    async def run(self) -> None:
        """Decide each period until stopped; then resign."""
        try:
            while not self._stopping.is_set():
                began_s = self.clock()
                try:
                    await self.tick()
                except StoreUnavailable as error:
                    log.warning("tick_without_store", error=str(error))
                except Exception:
                    LOOP_ERRORS.labels(loop="autoscaler").inc()
                    log.exception("loop_failed", loop="autoscaler")
                try:
                    async with asyncio.timeout(max(0.05, self.settings.period_s - (self.clock() - began_s))):
                        await self._stopping.wait()
                except TimeoutError:
                    pass
        finally:
            await self.leadership.resign()

    async def tick(self) -> Decision | None:
        """Look, decide, act once; None where another process leads."""
        if not await self.leadership.step():
            self._forget()
            return None
        listings = dict(zip(self.groups, await asyncio.gather(*(self._list(name) for name in self.groups)), strict=True))
        reading, unknown = await self._read()
        # The store last: what is about to end was seen idle a moment ago.
        state = await self.store.look(leader=False)
        now_s = self.clock()
        members = {
            name: None if listing is None else self._watcher.members(listing, state, now_s)
            for name, listing in listings.items()
        }
        self._watcher.keep({row.node for row in state.nodes} | {m.name for each in members.values() for m in each or ()})
        truths = self._truths(state, reading, now_s)
        views = []
        for name, listing in listings.items():
            self._note_starts(name, members[name])
            views.append(self._view(name, listing, members[name], reading, truths, now_s))
        decision = decide(Observation(tuple(views)), self.limits)
        effects = [await self._apply(action, listings) for action in decision.actions if not isinstance(action, Hold)]
        note = self._note(views, decision, effects, reading, unknown, now_s)
        if await self._journal.write(self.leadership.token, note, now_s):
            log.info("decided", **msgspec.to_builtins(note))
        self._show(decision, known=reading is not None)
        return decision

    def _forget(self) -> None:
        """Another process leads: what was seen before it is no ground to remove anything afterwards."""
        for history in (*self._ups.values(), *self._downs.values()):
            history.clear()

    # --- looking ------------------------------------------------------------------------------------------------

    async def _list(self, group: str) -> Listing | None:
        try:
            return await self.providers[group].list(group)
        except ProviderUnavailable as error:
            log.warning("provider_unavailable", group=group, error=str(error))
            return None

    async def _read(self) -> tuple[Reading | None, str]:
        """What the metrics say, or why they are not believed."""
        try:
            reading = await self.source.read(tuple(self.groups))
            self._fresh.check(reading, self.clock())
        except NoData as error:
            return None, str(error)
        return reading, ""

    def _truths(self, state: ClusterState, reading: Reading | None, now_s: float) -> dict[str, int]:
        """The need by the queue itself, where the metrics do not tell it: they are silent, or a group gets no nodes now."""
        blocked = {name for name, starts in self._starts.items() if starts.until_s > now_s}
        if reading is not None and not blocked:
            return {}
        packing = pack(state, self._pack_groups, self.settings.drain_target_s, blocked=blocked)
        return {need.group: need.nodes for need in packing.needs}

    def _view(
        self,
        name: str,
        listing: Listing | None,
        members: tuple[Member, ...] | None,
        reading: Reading | None,
        truths: Mapping[str, int],
        now_s: float,
    ) -> GroupView:
        group, starts = self.groups[name], self._starts[name]
        need = None if reading is None else reading.needs[name]
        truth = truths.get(name)
        known = [nodes for nodes in (need, truth) if nodes is not None]
        step = min(NAMES_MAX, max(self.limits.step_up_max, len(members or ())))
        return GroupView(
            name=name,
            workers_min=group.workers_min,
            workers_max=group.workers_max,
            need=need,
            truth=truth,
            ups=self._ups[name].add(max(known, default=None), now_s),
            downs=self._downs[name].add(need, now_s),
            members=members,
            ordered=listing is not None and listing.ordered,
            new_names=() if listing is None else self.providers[name].new_names(listing, step),
            blocked_s=max(0.0, starts.until_s - now_s),
            since_up_s=None if starts.up_s is None else now_s - starts.up_s,
        )

    def _note_starts(self, group: str, members: tuple[Member, ...] | None) -> None:
        """A node that has come up ends the pause of its group."""
        if members is None:
            return
        starts = self._starts[group]
        live = {member.name for member in members if member.phase is Phase.LIVE}
        if starts.starting & live:
            starts.failures, starts.until_s, starts.reason = 0, 0.0, ""
        starts.starting = frozenset(member.name for member in members if member.phase is Phase.STARTING)

    def _note_failure(self, group: str, reason: str) -> None:
        starts = self._starts[group]
        starts.failures += 1
        pause_s = backoff_s(starts.failures, self.settings.backoff_s, self.settings.backoff_s_max)
        starts.until_s, starts.reason = self.clock() + pause_s, reason
        log.warning("start_failed", group=group, failures=starts.failures, pause_s=pause_s, reason=reason)

    # --- acting -------------------------------------------------------------------------------------------------

    async def _apply(self, action: Add | Drain | Uncordon | Remove, listings: Mapping[str, Listing | None]) -> ScalingAction:
        kind = type(action).__name__.lower()
        listing = listings[action.group]
        assert listing is not None  # nothing is decided about a group that could not be listed
        if self.settings.mode == "shadow":
            result = SHADOW
        elif not self.leadership.leads:
            result = "not done: another autoscaler leads"
        else:
            try:
                result = await self._do(action, listing)
            except (ProviderUnavailable, ProviderRefused, StoreUnavailable) as error:
                result = f"{type(error).__name__}: {error}"[:300]
                if isinstance(action, Add):
                    self._note_failure(action.group, result)
        AUTOSCALER_ACTIONS.labels(action=kind, result=result if result in {DONE, SHADOW} else "failed").inc()
        return ScalingAction(kind, action.group, action.names, action.reason.value, result)

    async def _do(self, action: Action, listing: Listing) -> str:
        provider, token = self.providers[listing.group], self.leadership.token
        match action:
            case Add():
                await provider.add(listing, action.names, token)
                self._starts[action.group].up_s = self.clock()
                return DONE
            case Drain():
                return await self._cordon(action.names, Cordon.DRAIN)
            case Uncordon():
                self._starts[action.group].up_s = self.clock()
                return await self._cordon(action.names, Cordon.NONE)
            case Remove():
                return await self._remove(action, listing, provider)
            case Hold():
                return DONE
            case _:
                assert_never(action)

    async def _cordon(self, names: tuple[str, ...], mode: Cordon) -> str:
        answers = {name: await self.store.cordon(name, mode, BY, token=self.leadership.token) for name in names}
        wrong = [f"{name}: {answer}" for name, answer in answers.items() if answer != "OK"]
        return ", ".join(wrong) or DONE

    async def _remove(self, action: Remove, listing: Listing, provider: Provider) -> str:
        """End them. One that was not registered when it was chosen, and is now, may have work: it is drained instead."""
        spared = set()
        for name in action.unregistered:
            answer = await self.store.cordon(name, Cordon.DRAIN, BY, token=self.leadership.token)
            if answer != "NONE":
                spared.add(name)
        names = tuple(name for name in action.names if name not in spared)
        if listing.ordered and spared:
            # Only the last ones can go: those before one that stays, stay.
            last = max(place for place, each in enumerate(listing.instances) if each.name in spared)
            after = {each.name for each in listing.instances[last + 1 :]}
            names = tuple(name for name in names if name in after)
        if action.reason is Reason.NOT_REGISTERED:
            problems = [each.problem for each in listing.instances if each.name in action.names and each.problem]
            self._note_failure(action.group, problems[0] if problems else "not registered in time")
        if names:
            await provider.remove(listing, names, self.leadership.token)
        return DONE if not spared else f"drained instead, since they have registered: {', '.join(sorted(spared))}"

    # --- telling ------------------------------------------------------------------------------------------------

    def _note(
        self,
        views: list[GroupView],
        decision: Decision,
        effects: list[ScalingAction],
        reading: Reading | None,
        unknown: str,
        now_s: float,
    ) -> DecisionNote:
        by_name = {view.name: view for view in views}
        groups = []
        for result in decision.groups:
            members = by_name[result.group].members or ()
            starts = self._starts[result.group]
            groups.append(
                ScalingGroup(
                    group=result.group,
                    need=result.need,
                    truth=by_name[result.group].truth,
                    size=result.size,
                    starting=sum(m.phase is Phase.STARTING for m in members),
                    busy=sum(m.busy for m in members),
                    draining=sum(m.cordoned_by == BY for m in members),
                    target=result.target,
                    reason=result.reason.value,
                    blocked_s=round(max(0.0, starts.until_s - now_s), 1),
                    blocked_reason=starts.reason,
                )
            )
        return DecisionNote(
            mode=self.settings.mode,
            metrics=unknown,
            groups=tuple(groups),
            actions=tuple(effects),
            infeasible={} if reading is None else reading.infeasible,
        )

    def _show(self, decision: Decision, *, known: bool) -> None:
        AUTOSCALER_METRICS_KNOWN.set(known)
        for group in decision.groups:
            AUTOSCALER_SIZE.labels(group=group.group).set(group.size)
            AUTOSCALER_TARGET.labels(group=group.group).set(group.target)
