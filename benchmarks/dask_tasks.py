# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""What a GPU task of a Dask client costs: each task that is held, each round over all that are held, and a cold start:
``python benchmarks/dask_tasks.py``.

It starts a small simulated cluster of its own for the cold start; the rest is the scheduler's ledger alone.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import os
import socket
import statistics
import time

from distributed import Client

import rocyard
from manager.cli.own_cluster import own_cluster
from manager.core.devices import Device
from manager.core.gpu_tasks import direct_shape
from manager.core.lifecycle import SlotKind
from manager.core.quantities import GIB
from manager.core.shapes import Resources
from plugins.ledger import Ledger, SlotRequest
from plugins.node.link import Report

COUNTS = (1_000, 10_000, 50_000)
CLASSES = 20
RUNS = 30


def ledger_costs(count: int) -> tuple[float, float, float]:
    """Microseconds to hold one, of a round in which none fits, and of a round that places one."""
    book = Ledger()
    devices = tuple(Device(f"d{n}", n, "simulated", "m", "gfx942", 192 * GIB, str(n)) for n in range(8))
    for number in range(10):
        book.register(Report(f"n{number}", "i", 1, devices, 0, ()), 0.0)
    for node, view in book.index.nodes.items():
        for uuid in view.pools:
            book.ask(SlotRequest(f"{node}{uuid}", direct_shape(Resources(190 * GIB)), kind=SlotKind.DIRECT), 0.0)
    filled = book.decide(0.0)
    assert len(filled) == 80
    began = time.perf_counter()
    for number in range(count):
        shape = direct_shape(Resources((40 + number % CLASSES) * GIB))
        book.ask(SlotRequest(f"s{number}", shape, "", (0, number), SlotKind.DIRECT), 0.0)
    asked = time.perf_counter() - began
    blocked, placing = [], []
    for assignment in filled[:RUNS]:
        began = time.perf_counter()
        assert book.decide(1.0) == []
        blocked.append(time.perf_counter() - began)
        book.ended(assignment.slot_id, 1.0)
        began = time.perf_counter()
        placed = book.decide(1.0)
        placing.append((time.perf_counter() - began) / len(placed))
    return asked / count * 1e6, statistics.median(blocked) * 1e6, statistics.median(placing) * 1e6


def cold_starts() -> tuple[float, float, float]:
    """Milliseconds: of a plain task, of a GPU task one after the other, and of each of many at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    fixed = {"ROCYARD_DASK__PORT": str(port), "ROCYARD_AUTOSCALER__MODE": "off"}
    with (
        own_cluster(os.environ, simulate="1x4:mi300x", variables=fixed),
        Client(f"tcp://127.0.0.1:{port}", timeout=20) as client,  # type: ignore[no-untyped-call]  # Dask's
    ):
        plain, alone = [], []
        for number in range(RUNS + 1):
            began = time.perf_counter()
            client.submit(abs, number, pure=False).result()
            plain.append(time.perf_counter() - began)
            began = time.perf_counter()
            with rocyard.gpu(memory="8GiB"):
                client.submit(abs, number, pure=False).result()
            alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        with rocyard.gpu(memory="8GiB"):
            client.gather(client.map(abs, range(100), pure=False))
        together = (time.perf_counter() - began) / 100
    return statistics.median(plain[1:]) * 1e3, statistics.median(alone[1:]) * 1e3, together * 1e3


def main() -> None:
    print("held tasks   hold µs   round, none fits µs   round, per task placed µs")
    for count in COUNTS:
        print("{:10,d} {:9.1f} {:21.1f} {:27.1f}".format(count, *ledger_costs(count)))
    print("cold start: plain task {:.0f} ms, GPU task {:.0f} ms, of 100 at once {:.0f} ms each".format(*cold_starts()))


if __name__ == "__main__":
    main()
