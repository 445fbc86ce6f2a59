"""The prober's child process: holds the driver and answers `Ask` with `Answer`. A driver that hangs hangs only it.

Started by `plugins.node.devices.probe` as ``python -m plugins.node.devices.child ORDER`` and by nobody else. Ends with
its parent. What drivers print goes to standard error: standard output is the answers' alone.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from manager.core.devices import Device, Probe, SourceKind, parse_fleet
from manager.core.wire import FrameReader, pack
from plugins.node.devices.amd import AmdSource
from plugins.node.devices.interface import DeviceError, DeviceSource
from plugins.node.devices.nvidia import NvidiaSource
from plugins.node.devices.simulated import SimulatedSource

_PR_SET_PDEATHSIG: Final = 1


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """Look at the devices now.

    Attributes:
        number: comes back in `Answer`.
        known: how many devices the asker knows of. While fewer are found, one is unwell.
    """

    number: int
    known: int


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the look gave."""

    number: int
    probe: Probe


class Order(msgspec.Struct, frozen=True):
    """What a child is to do.

    Attributes:
        kind: which source.
        parent_pid: ends when this is no longer its parent.
        rocm_path: where ROCm is installed.
        fleet, node, directory: for the simulated source: the fleet's text, the number of the node, its folder.
        match_pids: whether the driver's process ids mean the same here; None finds out.
        rediscover_s: while a device is unhealthy, open the driver anew at most this often: it may know better by now,
            but starting a driver is not cheap.
    """

    kind: SourceKind
    parent_pid: int
    rocm_path: str = "/opt/rocm"
    fleet: str = ""
    node: int = 0
    directory: str = ""
    match_pids: bool | None = None
    rediscover_s: float = 30.0


def open_source(order: Order) -> DeviceSource:
    """The source that `order` names.

    Raises:
        DeviceError: its driver does not start.
    """
    match order.kind:
        case "amd":
            return AmdSource(Path(order.rocm_path), order.match_pids)
        case "nvidia":
            return NvidiaSource(order.match_pids)
        case "simulated":
            nodes = parse_fleet(order.fleet)
            if not 0 <= order.node < len(nodes):
                raise DeviceError(f"the fleet {order.fleet!r} has no node {order.node}: it has {len(nodes)}")
            return SimulatedSource(nodes[order.node], Path(order.directory))


class Looker:
    """Looks at the devices, and opens the driver anew when it failed or a device is unwell."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._source: DeviceSource | None = None
        self._devices: tuple[Device, ...] = ()
        self._opened_at = 0.0

    def look(self, known: int) -> Probe:
        """One look; trouble is in the answer. `known`: as in `Ask`."""
        try:
            if self._source is None:
                self._source = open_source(self._order)
                self._opened_at = time.monotonic()
                self._devices = self._source.discover()
            probe = Probe(self._devices, self._source.read(), "", complete=True)
        except Exception as error:  # noqa: BLE001  the top of the loop: whatever a driver's package raises, say it
            told = str(error) if isinstance(error, DeviceError) else f"{type(error).__name__}: {error}"
            self._drop()
            return Probe((), (), told, complete=False)
        unwell = len(probe.devices) < known or not all(reading.healthy for reading in probe.readings)
        if unwell and time.monotonic() - self._opened_at >= self._order.rediscover_s:
            self._drop()
        return probe

    def _drop(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    """Answer until the parent closes our standard input."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    end_with_parent(order.parent_pid)
    answers = os.dup(1)
    os.dup2(2, 1)
    looker, frames = Looker(order), FrameReader()
    while data := os.read(0, 65536):
        for body in frames.feed(data):
            ask = msgspec.msgpack.decode(body, type=Ask)
            unsent = memoryview(pack(Answer(ask.number, looker.look(ask.known))))
            while unsent:
                unsent = unsent[os.write(answers, unsent) :]


if __name__ == "__main__":
    main()
