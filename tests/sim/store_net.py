"""The network between the simulated processes and the store: calls that are lost, late, doubled, or whose answers are lost.

`SimConnection` stands where a `StoreConnection` does. A call is on its way by itself: it arrives though its sender has been
killed since, and what was published is told to whoever listens then.
"""

import asyncio
import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manager.core.errors import StoreUnavailable
from manager.store.connection import StoreReplyError
from tests.sim.store_loop import CURRENT, Process, SimLoop

if TYPE_CHECKING:
    from tests.sim.store_server import SimStore

DEADLINE_S = 3.0


@dataclass(frozen=True)
class Weather:
    """How bad the network is; each is a chance."""

    request_lost: float = 0.0
    answer_lost: float = 0.0  # the call happened
    again: float = 0.0  # it arrives a second time
    late: float = 0.0
    word_lost: float = 0.0  # something that was published

    @property
    def calm(self) -> bool:
        return self == CALM


CALM = Weather()
FAIR = Weather(request_lost=0.005, answer_lost=0.01, again=0.05, late=0.03, word_lost=0.05)
FOUL = Weather(request_lost=0.05, answer_lost=0.2, again=0.2, late=0.15, word_lost=0.3)


class Network:
    """All connections to the one store.

    Args:
        saw: told of each call of a function in the order in which they happened, with its answer and what it published.
    """

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        store: "SimStore",
        now_ms: Callable[[], int],
        saw: Callable[[tuple[Any, ...], Any], None],
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.store = store
        self.now_ms = now_ms
        self.saw = saw
        self.weather = CALM
        self.down_until_s = 0.0
        self.closed = False
        self.welcome: Callable[[tuple[Any, ...]], bool] = lambda _call: True
        self.cut: set[str] = set()  # processes that do not reach the store
        self._waiting: dict[asyncio.Future[Any], None] = {}  # in the order in which they were sent
        self._listeners: list[_Listener] = []
        self._nobody = contextvars.Context()

    @property
    def down(self) -> bool:
        return self.loop.now_s < self.down_until_s

    def delay_s(self) -> float:
        if self.rng.random() < self.weather.late:
            return self.rng.choice((0.05, 0.5, 2.0, 6.0)) * self.rng.random()
        return 0.0005

    def at(self, delay_s: float, function: Callable[..., object], *args: Any) -> None:
        """Have it happen by itself, whatever becomes of who asked for it."""
        self.loop.call_later(delay_s, function, *args, context=self._nobody.copy())

    def restart(self, seconds: float) -> None:
        """The store is gone for so long, and all connections to it are cut."""
        self.down_until_s = self.loop.now_s + seconds
        for future in list(self._waiting):
            _fail(future)
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            _fail(listener.broken)

    def send(self, sender: Process | None, args: tuple[Any, ...], future: asyncio.Future[Any]) -> None:
        """Put a call on its way."""
        weather, chance = self.weather, self.rng.random()
        name = sender.name if sender is not None else ""
        self._waiting[future] = None
        future.add_done_callback(lambda done: self._waiting.pop(done, None))
        if self.closed or self.down or name in self.cut:
            self.at(0.001, _fail, future)
        elif chance < weather.request_lost:
            if self.rng.random() < 0.5:
                self.at(0.001, _fail, future)
        else:
            delay_s = self.delay_s()
            self.at(delay_s, self._arrive, args, future)
            if self.rng.random() < weather.again and args[1] not in _SENT_ONCE:
                self.at(delay_s + self.rng.expovariate(1 / self.rng.choice((0.01, 1.0, 20.0))), self._arrive, args, None)

    def _arrive(self, args: tuple[Any, ...], future: asyncio.Future[Any] | None) -> None:
        if self.closed or self.down:
            if future is not None:
                _fail(future)
            return
        if not self.welcome(args):
            if future is not None:
                _fail(future)
            return
        reply, said = self.store.run(self.now_ms(), args)
        if args[0] == "FCALL":
            self.saw(args, reply)
            for channel, text in said:
                self._publish(channel, text)
        if future is None:
            return
        if self.rng.random() < self.weather.answer_lost:
            if self.rng.random() < 0.5:
                self.at(0.001, _fail, future)  # the connection broke: whoever asks sends it again at once
            return
        self.at(self.delay_s(), _answer, future, reply)

    def _publish(self, channel: str, text: str) -> None:
        for listener in self._listeners:
            if channel in listener.channels and self.rng.random() >= self.weather.word_lost:
                self.loop.call_later(self.delay_s(), listener.hear, channel, text, context=listener.process.context.copy())

    async def listen(self, channels: list[str], on_message: Callable[[str, str], None]) -> None:
        """As `StoreConnection.subscribe`."""
        process = CURRENT.get()
        assert process is not None
        if self.closed or self.down or process.name in self.cut:
            await asyncio.sleep(0.01)
            raise StoreUnavailable("the store cannot be reached")
        listener = _Listener(process, frozenset(channels), on_message, self.loop.create_future())
        self._listeners.append(listener)
        self.loop.call_later(0.001, listener.hear, "", "subscribed")
        try:
            await listener.broken
        finally:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def forget(self, process: Process) -> None:
        """It was killed: nobody listens there any more."""
        self._listeners = [listener for listener in self._listeners if listener.process is not process]


_SENT_ONCE = frozenset({"ry_cordon"})
"""A person's word that came again later would undo the next one; the client sends it again within its deadline only."""


@dataclass(eq=False)
class _Listener:
    process: Process
    channels: frozenset[str]
    on_message: Callable[[str, str], None]
    broken: asyncio.Future[None]

    def hear(self, channel: str, text: str) -> None:
        if not self.broken.done():
            self.on_message(channel, text)


def _fail(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(StoreUnavailable("the connection to the store broke; nothing is known of the call"))
        future.exception()


def _answer(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, StoreReplyError):
        future.set_exception(reply)
        future.exception()
    else:
        future.set_result(reply)


class SimConnection:
    """A connection of one process."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.deadline_s = DEADLINE_S
        self.connected = True
        self.gate = None

    async def call(self, *args: Any, deadline_s: float | None = None) -> Any:
        """As `StoreConnection.call`."""
        loop = self.network.loop
        future: asyncio.Future[Any] = loop.create_future()
        self.network.send(CURRENT.get(), args, future)
        timer = loop.call_later(self.deadline_s if deadline_s is None else deadline_s, _fail, future)
        try:
            return await future
        finally:
            timer.cancel()

    async def subscribe(self, channels: list[str], on_message: Callable[[str, str], None]) -> None:
        """As `StoreConnection.subscribe`."""
        await self.network.listen(channels, on_message)

    async def close(self) -> None:
        """As `StoreConnection.close`."""
