"""One run: a cluster, its load, its faults, what is seen of it, and the verdict."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from manager.log import configure_logging
from manager.settings import LogSettings
from tests.chaos import history
from tests.chaos.checker import Verdict, check
from tests.chaos.cluster import ChaosCluster
from tests.chaos.history import Fault, Run, Writer, now
from tests.chaos.load import Load
from tests.chaos.nemesis import Nemesis
from tests.chaos.plan import plan
from tests.chaos.report import write
from tests.chaos.witnesses import Watch, dump_store

HEAL_S: Final = 30.0
HEAL_SHORT_S: Final = 15.0
SHORT_S: Final = 120.0
"""A shorter run has less time to heal, too."""
QUIET_S: Final = 6.0
"""The load ends so long before the run does, so that what waits ends in it."""
DRAIN_S: Final = 90.0
PROGRESS_S: Final = 10.0


def heal_s_of(seconds: float) -> float:
    """How long the end of a run is without faults."""
    return HEAL_SHORT_S if seconds < SHORT_S else HEAL_S


async def run(seed: int, seconds: float, folder: Path, say: Callable[[str], None]) -> Verdict:
    """Run it; histories and reports are in `folder` afterwards."""
    configure_logging("chaos", LogSettings(level="error"))
    cluster = ChaosCluster(folder / "cluster")
    try:
        began = now()
        await cluster.begin()
        say(f"{now() - began:.0f} s: the cluster is up")
        for kind, why in cluster.skipped.items():
            say(f"no '{kind}': {why}")
        await _run(seed, seconds, folder, cluster, say)
    finally:
        await cluster.end()
    verdict = check(folder)
    faults = list(history.read(folder / history.FAULTS, Fault))
    write(folder, _read_run(folder), verdict, faults)
    return verdict


def _read_run(folder: Path) -> Run:
    return msgspec.json.decode((folder / history.RUN).read_bytes(), type=Run)


async def _run(seed: int, seconds: float, folder: Path, cluster: ChaosCluster, say: Callable[[str], None]) -> None:
    calls, faults, ends, rows = (Writer(folder / name) for name in (history.CALLS, history.FAULTS, history.ENDS, history.STORE))
    witness = folder / history.TASKS
    watch = Watch(lambda: cluster.direct_store_url, witness, ends)
    load = Load(cluster.url, cluster.client.address.api_key.value, str(witness), seed, calls)
    nemesis = Nemesis(cluster, watch, faults)
    heal_s = heal_s_of(seconds)
    began = now()
    watching = asyncio.create_task(watch.run())
    telling = asyncio.create_task(_tell(began, load, watch, nemesis, say))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(began + seconds - QUIET_S))
            group.create_task(nemesis.run(plan(seed, seconds, heal_s), began))
        with contextlib.suppress(TimeoutError):  # what has not ended then is told by the checker
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + began + seconds + DRAIN_S - now()):
                await _drain(watch)
    finally:
        telling.cancel()
        watching.cancel()
        await asyncio.gather(telling, watching, return_exceptions=True)
    ended = now()
    recount = await dump_store(cluster.direct_store_url, rows, cluster.results)
    done = Run(
        seed=seed,
        seconds=seconds,
        heal_s=heal_s,
        began=began,
        ended=ended,
        program=cluster.program,
        cpus=os.cpu_count() or 1,
        recount=recount,
        died=cluster.died,
        skipped=cluster.skipped,
    )
    (folder / history.RUN).write_bytes(msgspec.json.encode(done))
    for writer in (calls, faults, ends, rows):
        writer.close()


async def _drain(watch: Watch) -> None:
    """Wait until every task has ended, by two looks in a row."""
    quiet = 0
    while quiet < 2:
        watch.looked.clear()
        await watch.looked.wait()
        quiet = quiet + 1 if watch.live == 0 else 0


async def _tell(began: float, load: Load, watch: Watch, nemesis: Nemesis, say: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        say(
            f"{now() - began:.0f} s: {load.acknowledged} of {load.attempted} accepted, {watch.ended} ended, {watch.live} live, "
            f"{nemesis.done} faults, now: {', '.join(nemesis.under_way.values()) or 'none'}"
        )
