"""Which nodes the leader declares lost: those that were silent while they could be heard."""

import asyncio
import time

import msgspec
import pytest

from manager import leader_nodes
from manager.leader_nodes import LeaderNodes
from manager.settings import NodeSettings, Settings
from tests.unit.factories import node_row, state

LEASE_S = 12.0
SETTINGS = Settings(node=NodeSettings(beat_s=2.0, lease_beats=6))


def look(nodes, beats, asked_s, took_s=0.0):
    """What a look finds: seconds of silence by node."""
    rows = tuple(msgspec.structs.replace(node_row(name, [24.0]), beat=beat) for name, beat in beats.items())
    return nodes.silence(msgspec.structs.replace(state([]), nodes=rows), asked_s, asked_s + took_s)


@pytest.fixture
def nodes():
    return LeaderNodes(SETTINGS, None, lambda: 1)


def test_silence_is_counted_while_rounds_are_slow(nodes):
    """Each takes five seconds since Dask answers late: who is dead is found all the same."""
    look(nodes, {"dead": 1, "alive": 1}, 0.0)
    assert look(nodes, {"dead": 1, "alive": 3}, 5.0) == {"dead": 5.0, "alive": 0.0}
    assert look(nodes, {"dead": 1, "alive": 6}, 15.0) == {"dead": 15.0, "alive": 0.0}


def test_who_could_not_be_heard_is_not_silent(nodes):
    look(nodes, {"a": 1}, 0.0)
    nodes.deaf()
    assert look(nodes, {"a": 1}, 60.0) == {"a": 0.0}
    assert look(nodes, {"a": 1}, 65.0) == {"a": 5.0}


def test_a_store_that_answers_late_has_held_up_beats_as_well(nodes):
    look(nodes, {"a": 1}, 0.0)
    assert look(nodes, {"a": 1}, 1.0, took_s=30.0)["a"] < LEASE_S
    assert look(nodes, {"a": 1}, 31.5)["a"] < 2.0


def test_silence_begins_anew_with_each_term(nodes):
    look(nodes, {"a": 1}, 0.0)
    nodes.forget()
    assert look(nodes, {"a": 1}, 100.0) == {"a": 0.0}


def test_a_machine_that_stood_still_blames_nobody(nodes):
    now_s = time.monotonic()
    look(nodes, {"a": 1}, now_s - 60.0)

    async def tick():
        nodes._on_tick(now_s - 59.0)  # the timer was due so long ago
        nodes.stop()

    asyncio.run(tick())
    assert look(nodes, {"a": 1}, now_s)["a"] < 2.0


def test_a_timer_that_is_hardly_late_forgives_nothing(nodes):
    now_s = time.monotonic()
    look(nodes, {"a": 1}, now_s - 60.0)

    async def tick():
        nodes._on_tick(time.monotonic() - leader_nodes.STAND_STILL_S / 2)
        nodes.stop()

    asyncio.run(tick())
    assert look(nodes, {"a": 1}, now_s)["a"] == 60.0
