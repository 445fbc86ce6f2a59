"""The agent's table of slots with a store that is played: what is noted there is closed there, and nobody waits for ever."""

import asyncio
import os
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from manager.core.devices import Probe, ProcessUse, Reading, parse_fleet
from manager.core.errors import StoreUnavailable
from manager.core.model import MemoryNote
from manager.core.quantities import GIB, KIB
from manager.core.shapes import Grant
from manager.results import NoResults
from manager.settings import SlotSettings, TaskSettings
from manager.store.connection import StoreReplyError
from plugins.node.device_watch import DeviceWatch
from plugins.node.link import DirectOutcome, EndDirect, LiveSlot, OpenDirect, Report, decode_report, encode_report
from plugins.node.runner import SlotRunner
from plugins.node.slot_executor import Ending, SlotContext
from plugins.node.slot_table import SlotTable
from tests.integration.dask_world import eventually
from tests.unit import factories as make

pytestmark = pytest.mark.integration

ASKED = OpenDirect(1, "s", Grant("a", ("d0",), GIB), "call", "result")


class PlayedStore:
    """It notes direct slots, and may be away, or answer nonsense."""

    def __init__(self):
        self.open = set()
        self.away = asyncio.Event()
        self.asked = asyncio.Event()
        self.answer = None

    async def open_direct(self, slot_id, incarnation, grant):
        word = "ADOPTED" if slot_id in self.open else "OK"
        self.open.add(slot_id)
        self.asked.set()
        if self.away.is_set():
            raise StoreUnavailable
        return word

    async def close_slot(self, slot_id, incarnation, reason):
        if self.away.is_set():
            raise StoreUnavailable
        if self.answer is not None:
            raise self.answer
        self.open.discard(slot_id)


def table_of(store, directory):
    context = SlotContext(
        store=store,
        incarnation="i1",
        functions={},
        interpreter=lambda _: ("", ()),
        environment=lambda _devices, _home: {},
        pulse=None,
        lease_s=10.0,
        scratch=directory,
        slots=SlotSettings(),
        tasks=TaskSettings(),
        results=NoResults(),
        inline_bytes_max=KIB,
    )
    return SlotTable("a", 8, 0, lambda: make.devices(24), lambda: context, lambda: None)


async def opening(table):
    return asyncio.create_task(table.open_direct(ASKED))


async def test_a_slot_that_the_store_has_noted_without_an_answer_is_closed_there(tmp_path):
    store = PlayedStore()
    table = table_of(store, tmp_path)
    store.away.set()
    answer = await opening(table)
    await store.asked.wait()
    ending = asyncio.create_task(table.end_direct(EndDirect(1, "s")))
    await eventually(lambda: store.open == {"s"} and table.live["s"]._why is Ending.CANCELLED, "it is noted, and not wanted")
    store.away.clear()
    assert (await asyncio.wait_for(answer, 5)).outcome is DirectOutcome.AGAIN
    await asyncio.wait_for(ending, 5)
    assert store.open == set(), "the leader would else keep its memory for ever"
    assert (table.live, list(table.closed)) == ({}, ["s"])


async def test_a_fenced_agent_waits_for_no_answer(tmp_path):
    store = PlayedStore()
    table = table_of(store, tmp_path)
    store.away.set()
    answer = await opening(table)
    await store.asked.wait()
    await table.end_all(Ending.FENCED, 5.0)
    assert (await asyncio.wait_for(answer, 5)).outcome is DirectOutcome.AGAIN
    assert table.live == {}


async def test_an_end_that_the_store_cannot_take_keeps_nobody_waiting(tmp_path):
    store = PlayedStore()
    table = table_of(store, tmp_path)
    store.away.set()
    store.answer = StoreReplyError("ERR something that nobody has thought of")
    answer = await opening(table)
    await store.asked.wait()
    ending = asyncio.create_task(table.end_direct(EndDirect(1, "s")))
    await eventually(lambda: table.live["s"]._why is not None, "it is not wanted")
    store.away.clear()
    assert (await asyncio.wait_for(answer, 5)).outcome is DirectOutcome.AGAIN
    await asyncio.wait_for(ending, 5)
    assert table.live == {}


# --- what the agent checks for itself -----------------------------------------------------------------------------------


def table_with(*grants, reserve=0):
    """The table of a node with a partitioned MI300X that has these slots."""
    devices = parse_fleet("1x1:mi300x/cpx-nps4")[0].devices
    table = SlotTable("a", 80, reserve, lambda: devices, lambda: None, lambda: None)
    for number, granted in enumerate(grants):
        table.live[f"s{number}"] = SlotRunner(f"s{number}", granted, None)
    return table


def grant(*numbers, gib=24.0, node="a", **more):
    return Grant(node, tuple(f"SIM-000-00.{number}" for number in numbers), int(gib * GIB), **more)


@pytest.mark.parametrize(
    ("there", "wanted", "said"),
    [
        pytest.param([grant(0)], grant(1), None, id="two share a pool"),
        pytest.param([grant(0), grant(1)], grant(0, gib=1), "NPS4/0: 51539607552 bytes are leased", id="the pool is full"),
        pytest.param([grant(0), grant(1)], grant(2), None, id="another pool is not"),
        pytest.param([], grant(0, 1), None, id="both of a pool"),
        pytest.param([grant(1, gib=1)], grant(0, 1), "NPS4/0", id="both need room for both"),
        pytest.param([grant(0, gib=1, exclusive=True)], grant(0, gib=1), "for itself", id="somebody has it alone"),
        pytest.param([grant(0, gib=1)], grant(0, gib=1, exclusive=True), "for itself", id="it is not alone"),
        pytest.param([grant(0, gib=1)], grant(1, gib=1, exclusive=True), None, id="alone on its device, not on the pool"),
        pytest.param([grant(0, gib=1, share_milli=600)], grant(0, gib=1, share_milli=400), None, id="shares that fit"),
        pytest.param([grant(0, gib=1, share_milli=600)], grant(0, gib=1, share_milli=401), "600 thousandths", id="and not"),
        pytest.param([], grant(0, node="b"), "this is node a", id="another node's"),
        pytest.param([], Grant("a", ("GPU-7",), GIB), "there is no device GPU-7", id="no such device"),
    ],
)
async def test_the_agent_checks_what_it_is_granted(there, wanted, said):
    found = table_with(*there)._over(wanted)
    assert (found is None) if said is None else (said in found)


async def test_the_reserve_is_of_each_pool():
    table = table_with(grant(0, gib=23.5), reserve=GIB)
    assert table._over(grant(1, gib=23.5)) is None
    assert "NPS4/0" in table._over(grant(1, gib=24))


async def test_the_report_has_all_of_each_grant():
    granted = grant(0, share_milli=250, cpu_milli=1500, host_memory_bytes=GIB, exclusive=True, model="llama")
    report = decode_report(encode_report(Report("a", "i1", 1, (), 0, table_with(granted).report())))
    assert report.slots == (LiveSlot("s0", granted),)


# --- what the devices read ----------------------------------------------------------------------------------------------


class PlayedProber:
    """Tells what is played: bytes in use of each pool, all of it by this test's own processes."""

    kind = "simulated"
    starting = False

    def __init__(self, devices):
        self.devices = devices
        self.used = {}

    async def probe(self):
        readings = []
        for device in self.devices:
            used = self.used.get(device.pool_key, 0)
            holders = (ProcessUse(os.getpid(), used),) if used else ()
            readings.append(Reading(device.uuid, used, healthy=True, processes=holders, processes_known=True))
        return Probe(self.devices, tuple(readings), "", complete=True)


@pytest.fixture
def watched():
    """A watch over a partitioned MI300X and a table whose one slot has both devices of the first pool, and this process."""

    async def make_one(name):
        table = table_with(grant(0, 1, gib=8))
        runner = table.live["s0"]
        runner.work._executor = SimpleNamespace(guard_pid=os.getsid(0), kill=lambda: None, current=None)
        watch = DeviceWatch(name, PlayedProber(table._devices()), 0.001)
        await watch.first_look(table)
        return watch, table, runner

    return make_one


async def test_what_a_pool_reads_is_told_with_each_of_its_devices_and_shown_once(watched):
    watch, table, _ = await watched("node-of-pools")
    watch.prober.used = {"SIM-000-00/NPS4/0": 10 * GIB}
    assert not await watch.look(table)
    uses = {use.uuid: (use.used_bytes, use.foreign_bytes, use.slots) for use in watch.uses}
    assert uses["SIM-000-00.0"] == uses["SIM-000-00.1"] == (10 * GIB, 0, {"s0": 10 * GIB})
    assert uses["SIM-000-00.2"] == (0, 0, {})
    shown = {
        name: [
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == name and sample.labels.get("hostname") == "node-of-pools"
        ]
        for name in ("rocyard_device_memory_total_bytes", "rocyard_device_memory_leased_bytes", "rocyard_device_healthy")
    }
    total, leased, healthy = (sum(values) for values in shown.values())
    assert (total, leased, healthy) == (192 * GIB, 16 * GIB, 8)


async def test_a_slot_with_both_devices_of_a_pool_may_use_twice_its_lease_and_no_more(watched):
    watch, table, runner = await watched("node-of-pairs")
    watch.prober.used = {"SIM-000-00/NPS4/0": 16 * GIB}
    for _ in range(3):
        await watch.look(table)
    assert watch.notes(table) == [MemoryNote("s0", 8 * GIB)]
    watch.noted(watch.notes(table))
    watch.prober.used = {"SIM-000-00/NPS4/0": 20 * GIB}
    await watch.look(table)
    assert runner._note is None
    await watch.look(table)
    assert runner._note == MemoryNote("s0", 10 * GIB, 10 * GIB)
    assert runner._closing is Ending.MEMORY, "it takes no more tasks"
    assert watch.notes(table) == [runner._note]
