"""The agent's table of slots with a store that is played: what is noted there is closed there, and nobody waits for ever."""

import asyncio

import pytest

from manager.core.errors import StoreUnavailable
from manager.core.quantities import GIB
from manager.settings import SlotSettings, TaskSettings
from manager.store.connection import StoreReplyError
from plugins.node.link import DirectOutcome, EndDirect, OpenDirect
from plugins.node.slot_executor import Ending, SlotContext
from plugins.node.slot_table import SlotTable
from tests.integration.dask_world import eventually
from tests.unit import factories as make

pytestmark = pytest.mark.integration

ASKED = OpenDirect(1, "s", ("d0",), GIB, "call", "result")


class PlayedStore:
    """It notes direct slots, and may be away, or answer nonsense."""

    def __init__(self):
        self.open = set()
        self.away = asyncio.Event()
        self.asked = asyncio.Event()
        self.answer = None

    async def open_direct(self, slot_id, node, incarnation, devices, memory_bytes):
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
