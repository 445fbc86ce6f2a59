# ruff: noqa: E402 -- the search path must be put right before anything else is imported
"""How long `explain` and `plan` take where much waits: ``python benchmarks/explain.py``.

A real store with 200 nodes of eight devices, slots of other shapes on all of them, and 10,000 waiting tasks of 50 shapes, each
of which has a slot that is held for want of room; the real API over HTTP. Each question comes so long after the one before
that the look at the store is made for it alone. The CPU is that of API and client together; the store is another process.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the standard library's `http`

import argparse
import asyncio
import cProfile
import pstats
import random
import statistics
import subprocess
import tempfile
import time

import httpx
import msgspec

from manager.api.serve import bind, build_server, keep_for_good, url_of
from manager.api.watch import FRESH_S
from manager.core.devices import MODELS, Device
from manager.core.functions import PublishedFunction, encode_published
from manager.core.ids import new_id
from manager.core.model import DeviceUse, NodeInfo, Submission, TaskSpec
from manager.core.quantities import GIB
from manager.core.requests import KeyScope
from manager.core.shapes import Resources, grant_of, shape_id, shape_of
from manager.keys import create_key
from manager.settings import Secret, Settings
from manager.store import Store
from manager.store.server import EmbeddedStore, is_ready
from manager.store.store import connect

TENANT = "bench"
MODEL = MODELS["mi300x"]
HELD_GIB = (100, 120, 140, 150)
"""What slots of others lease: on each device one of these, so that nothing that waits fits anywhere."""
BATCH = 500


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of question, in milliseconds."""

    question: str
    count: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    max_ms: float


def device(node: int, index: int) -> Device:
    name = f"GPU-{node:04d}-{index}"
    return Device(name, index, "simulated", MODEL.model, MODEL.architecture, MODEL.memory_bytes, name)


async def fill(store: Store, nodes: int, tasks: int, shapes: int) -> list[str]:
    """The cluster of the question; ids of what waits."""
    _, _, beat, _ = await store.lead("bench", 0, 0, "read")
    _, token, _, _ = await store.lead("bench", 0, beat, "take")
    function = PublishedFunction(name="f", doc="", schema=msgspec.Raw(b'{"type":"object"}'), memory_bytes=GIB)
    await store.publish_function("f", encode_published(function))
    held = [Resources(size * GIB) for size in HELD_GIB]
    for resources in held:
        shape = shape_of(TENANT, "default", resources)
        spec = TaskSpec("f", msgspec.Raw(b"{}"), resources)
        await store.submit(TENANT, 10**6, [Submission(new_id(), shape_id(shape), shape, spec) for _ in range(nodes * 2)])
    for node in range(nodes):
        name, incarnation = f"node-{node:04d}", new_id()
        devices = tuple(device(node, index) for index in range(8))
        info = NodeInfo(hostname=name, pid=1, source="simulated", version="0", devices=devices, reserve_bytes=GIB, cpus=128)
        await store.register(name, incarnation, info)
        await store.put_heartbeat(name, "tcp://0", [DeviceUse(uuid=each.uuid, used_bytes=GIB) for each in devices])
        for index, each in enumerate(devices):
            resources = held[(node + index) % len(held)]
            slot = new_id()
            await store.request_slot(token, slot, shape_id(shape_of(TENANT, "default", resources)), 0)
            await store.open_slot(slot, incarnation, grant_of(resources, name, (each.uuid,)))
            await store.next(slot, incarnation, 1, [])
    waiting: list[str] = []
    wanted: set[str] = set()
    for at in range(0, tasks, BATCH):
        batch = []
        for number in range(at, min(at + BATCH, tasks)):
            resources = Resources((100 + number % shapes) * GIB)
            shape = shape_of(TENANT, "default", resources)
            spec = TaskSpec("f", msgspec.Raw(b"{}"), resources, priority=number % 3)
            batch.append(Submission(new_id(), shape_id(shape), shape, spec))
        await store.submit(TENANT, 10**6, batch)
        waiting += [each.task_id for each in batch]
        wanted |= {each.shape_id for each in batch}
    for identity in sorted(wanted):
        await store.request_slot(token, new_id(), identity, 0)
    return waiting


async def ask(client: httpx.AsyncClient, question: str, waiting: list[str], count: int, pause_s: float) -> Timed:
    """Ask about random tasks, one after the other."""
    chance, took = random.Random(7), []
    cpu_s = time.process_time()
    for _ in range(count):
        await asyncio.sleep(pause_s)
        began = time.perf_counter()
        if question == "plan":
            body = {"function": "f", "resources": {"memory": f"{chance.randint(100, 149)}GiB"}}
            reply = await client.post("/v1/plan", json=body)
        else:
            reply = await client.get(f"/v1/tasks/{chance.choice(waiting)}/explain")
        took.append((time.perf_counter() - began) * 1000)
        assert reply.status_code == 200, reply.text
    name = question if pause_s else f"{question}, the look known"
    return Timed(
        question=name,
        count=count,
        p50_ms=round(statistics.median(took), 1),
        p95_ms=round(statistics.quantiles(took, n=20, method="inclusive")[18], 1),
        cpu_ms=round((time.process_time() - cpu_s) / count * 1000, 1),
        max_ms=round(max(took), 1),
    )


async def measure(url: str, args: argparse.Namespace) -> list[Timed]:
    store = connect(url, 10.0, "bench")
    await store.deploy()
    key, _ = await create_key(store, TENANT, KeyScope.ADMIN)
    waiting = await fill(store, args.nodes, args.tasks, args.shapes)
    settings = Settings()
    settings = msgspec.structs.replace(settings, store=msgspec.structs.replace(settings.store, url=Secret(url)))
    listener = bind("127.0.0.1", 0)
    server = build_server(settings, listener)
    keep_for_good()  # as the API's process does
    running = asyncio.create_task(server.run_until_stopped())
    while not server.started:  # noqa: ASYNC110 -- the server has no event for it
        await asyncio.sleep(0.01)
    profile = cProfile.Profile() if args.profile else None
    try:
        async with httpx.AsyncClient(
            base_url=url_of(listener), headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False
        ) as client:
            await ask(client, "explain", waiting, 5, FRESH_S)
            if profile is not None:
                profile.enable()
            found = [await ask(client, "explain", waiting, args.questions, 1.5 * FRESH_S)]
            if profile is not None:
                profile.disable()
                pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
            found.append(await ask(client, "explain", waiting, args.questions, 0.0))
            found.append(await ask(client, "plan", waiting, args.questions, 1.5 * FRESH_S))
    finally:
        server.should_exit = True
        await running
        listener.close()
        await store.connection.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--shapes", type=int, default=50, help="kinds of requests among the waiting tasks")
    parser.add_argument("--questions", type=int, default=100, help="of each kind")
    parser.add_argument("--profile", action="store_true", help="say where the time of explain goes")
    parser.add_argument("--json", action="store_true", help="one JSON line for each kind of question")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = EmbeddedStore(Path(folder)).prepare()
        process = subprocess.Popen(spec.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.stdin is not None
            process.stdin.write(spec.stdin_text.value.encode())
            process.stdin.close()
            end_s = time.monotonic() + 20
            while not is_ready(spec.url.value):
                if time.monotonic() > end_s:
                    raise SystemExit("the store did not start")
                time.sleep(0.05)
            found = asyncio.run(measure(spec.url.value, args))
        finally:
            process.kill()
            process.wait()
    for row in found:
        if args.json:
            print(msgspec.json.encode(row).decode())
        else:
            times = f"p50 {row.p50_ms:7.1f} ms   p95 {row.p95_ms:7.1f} ms   max {row.max_ms:7.1f} ms"
            print(f"{row.question:25} {times}   CPU {row.cpu_ms:6.1f} ms")


if __name__ == "__main__":
    main()
