"""The agent's prober: looks at the devices through a child process, under a deadline.

Drivers can hang in the kernel, where nothing ends the process that asked. So only a child asks. There is never more
than one: while one cannot be killed, none is started. To be used from a thread that lives as long as the agent, since
the kernel ends the child with the thread that started it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from manager.core.devices import Device, DeviceKind, Probe, SourceKind, carried, with_known
from manager.core.errors import StartError
from plugins.node.devices.child import Order
from plugins.node.devices.driver_process import DriverProcess, NoAnswerError
from plugins.node.devices.interface import visibility

START_S: Final = 10.0
"""Deadline of a child's first answer: importing and starting a driver's package takes seconds on a busy node."""
BACKOFF_S: Final = (0.5, 30.0)
"""Pause before a new child: doubled with each failure in a row, within these."""
_CLOCK_S: Final = 0.02
"""A wait may end this much early by the clock that it is then held against."""


class Simulated(msgspec.Struct, frozen=True):
    """Which simulated devices: the fleet's text, the number of the node in it, and the node's folder."""

    fleet: str
    node: int
    directory: Path


class Rejection(msgspec.Struct, frozen=True):
    """Why a kind of source is not used."""

    kind: SourceKind
    reason: str


class Detection(msgspec.Struct, frozen=True):
    """Which kind of source to use, and why not those that come before it."""

    kind: SourceKind
    rejected: tuple[Rejection, ...] = ()


class _StillStartingError(Exception):
    """The child has not answered yet, and may take its time. Control flow of this module only."""


class Prober:
    """Looks at the devices of one kind.

    Args:
        kind: which source; see `detect`.
        simulated: which simulated devices, for that kind.
        deadline_s: how long one look may take. A driver that starts may take `START_S`, over several looks.
        env: what the child inherits, less all ``ROCYARD_`` variables; ours if not given.
        match_pids: whether the driver's process ids mean the same here; found out if not given.
        rediscover_s: see `Order`.
        clock: seconds that only go forward.

    Attributes:
        kind: as given.
        hung: whether the last look ran into its deadline.
        starting: whether that was because the driver is still starting.
        failures: looks in a row that gave no answer.
    """

    def __init__(
        self,
        kind: SourceKind,
        *,
        simulated: Simulated | None = None,
        deadline_s: float = 2.0,
        env: Mapping[str, str] | None = None,
        match_pids: bool | None = None,
        rediscover_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (kind == "simulated") != (simulated is not None):
            raise ValueError("a prober of simulated devices needs to know which, and no other one does")
        self.kind: SourceKind = kind
        self.hung = False
        self.starting = False
        self.failures = 0
        self._directory = str(simulated.directory.absolute()) if simulated else ""
        self._env = dict(os.environ if env is None else env)
        self._order = Order(
            kind=kind,
            parent_pid=os.getpid(),
            rocm_path=self._env.get("ROCM_PATH") or "/opt/rocm",
            fleet=simulated.fleet if simulated else "",
            node=simulated.node if simulated else 0,
            directory=self._directory,
            match_pids=match_pids,
            rediscover_s=rediscover_s,
        )
        self._deadline_s = deadline_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._child: DriverProcess | None = None
        self._stuck: DriverProcess | None = None
        self._question: asyncio.Task[Probe] | None = None
        self._asked_at = 0.0
        self._not_before = 0.0
        self._last: Probe | None = None
        self._last_at = 0.0
        self._error = ""

    async def probe(self) -> Probe:
        """One look at the devices, within the deadline; trouble is in the answer. Callers take turns."""
        async with self._lock:
            now = self._clock()
            if self._stuck is not None and await self._stuck.kill(_CLOCK_S):
                self._stuck = None
            if self._stuck is None and (self._child is not None or now >= self._not_before):
                self.starting = False
                try:
                    probe = await self._look()
                except _StillStartingError as error:
                    self._error = str(error)
                    self.starting = True
                except NoAnswerError as error:
                    self._error = str(error)
                    await self._discard()
                else:
                    return self._accept(probe)
            told = self._error + (f" (process {self._stuck.pid} cannot be killed)" if self._stuck is not None else "")
            return carried(self._last, self._clock() - self._last_at, told)

    async def _look(self) -> Probe:
        """Ask the child, started if need be. The late answer to an earlier question is passed over: what it read is
        older than this look.

        Raises:
            _StillStartingError: there is time left for its first answer.
            NoAnswerError: it gave no answer in time.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._deadline_s
        while True:
            try:
                child = self._child = self._child or await DriverProcess.start(self._order, self._env)
            except OSError as error:
                raise NoAnswerError(f"the device prober cannot be started: {error}") from error
            late, question = self._question is not None, self._question
            if question is None:
                question = self._question = asyncio.create_task(child.ask(len(self._last.devices) if self._last else 0))
                self._asked_at = loop.time()
            done, _ = await asyncio.wait([question], timeout=max(0.0, until - loop.time()))
            if not done:
                break
            self._question = None
            probe = question.result()
            if not late:
                self.hung = False
                return probe
        self.hung = True
        if not child.answered and loop.time() - self._asked_at < START_S - _CLOCK_S:
            raise _StillStartingError(f"the {self.kind} driver is still starting")
        waited_s = self._deadline_s if child.answered else max(START_S, self._deadline_s)
        raise NoAnswerError(f"the {self.kind} driver did not answer within {waited_s:g} s")

    def _accept(self, probe: Probe) -> Probe:
        """The child answered: remember it, or stand in for it if the driver failed."""
        self.failures = 0
        now = self._clock()
        if not probe.complete:
            self._error = probe.error
            return carried(self._last, now - self._last_at, probe.error)
        self._last = with_known(self._last.devices if self._last else (), probe)
        self._last_at = now
        return self._last

    async def _discard(self) -> None:
        """End the child; the next one waits the longer the more failed in a row."""
        low_s, high_s = BACKOFF_S
        self._not_before = self._clock() + min(high_s, low_s * 2 ** min(self.failures, 10))
        self.failures += 1
        await self._end_child()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        question, self._question = self._question, None
        if question is not None:
            question.cancel()
            await asyncio.wait([question])
        if child is not None and not await child.kill():
            self._stuck = child

    def visibility(self, devices: Sequence[Device]) -> dict[str, str]:
        """Environment variables by which a child process sees exactly `devices`; clear `VISIBILITY_VARIABLES` first."""
        return visibility(devices, self._directory)

    async def close(self) -> None:
        """End the child."""
        async with self._lock:
            await self._end_child()


def chosen(looks: Sequence[tuple[SourceKind, Probe, bool]], simulated: bool) -> Detection:
    """Which kind to use, of `looks` (kind, what it gave, whether it hung) in order of preference.

    A driver that hangs is a driver: its node waits for it, rather than pretend to have other devices.

    Raises:
        StartError: none, and there is no simulation either.
    """
    rejected: list[Rejection] = []
    for kind, probe, hung in looks:
        if probe.devices or hung:
            return Detection(kind, tuple(rejected))
        rejected.append(Rejection(kind, probe.error or "its driver shows no devices"))
    if simulated:
        return Detection("simulated", tuple(rejected))
    reasons = "; ".join(f"{each.kind}: {each.reason}" for each in rejected)
    remedy = "set node.simulate, such as '2x2:mi300x', to simulate some"
    raise StartError(f"this node has no devices ({reasons}): {remedy}")


async def detect(
    kind: DeviceKind, simulated: Simulated | None, env: Mapping[str, str] | None = None, deadline_s: float = START_S
) -> Detection:
    """Which source to use: `kind` itself, or for "auto" AMD's, else NVIDIA's, else the simulated one.

    Raises:
        StartError: "auto" found nothing, and there is no simulation.
    """
    if kind != "auto":
        return Detection(kind)
    kinds: tuple[SourceKind, ...] = ("amd", "nvidia")
    probers = [Prober(each, env=env, deadline_s=deadline_s) for each in kinds]
    try:
        probes = await asyncio.gather(*(prober.probe() for prober in probers))
    finally:
        await asyncio.gather(*(prober.close() for prober in probers))
    looks = [(prober.kind, probe, prober.hung) for prober, probe in zip(probers, probes, strict=True)]
    return chosen(looks, simulated is not None)
