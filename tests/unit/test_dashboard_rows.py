"""What the page /rocyard shows: bars that are the ledger's, at four devices and at hundreds, and no word that acts."""

import itertools
import time

import msgspec
import pytest

from manager.core.devices import parse_fleet
from manager.core.index import Index
from manager.core.lifecycle import SlotKind
from manager.core.model import DeviceUse
from manager.core.news import News, QueueNews, SlotNews, news_of
from manager.core.quantities import GIB
from manager.core.shapes import Grant
from plugins.dashboard_columns import COLOURS, MEANINGS, View, bars_data, inner_data, marks_data, pieces_data, summary_html
from plugins.dashboard_rows import Part, direct_columns, layout_of, node_bars, queue_columns, slot_texts, spans
from plugins.ledger import DirectWaiting
from tests.unit import factories as make

EVIL = "<script>alert(1)</script>"


def view_of(index, news=None, shapes=None):
    news = news or News()
    nodes = node_bars(index, news, {name: tuple(make.device(u, 1) for u in node.pools) for name, node in index.nodes.items()})
    return View(nodes, layout_of(nodes), slot_texts(nodes, index, news, shapes or {}), news, ())


def pieces(index, news=None):
    """Part → GiB from and to, of the only device."""
    ((bar,),) = (node.bars for node in node_bars(index, news or News(), {}))
    return [(piece.part.value, piece.left / GIB, piece.right / GIB, piece.slot) for piece in bar.pieces]


def test_a_bar_is_made_of_slots_then_others_then_kept_then_free_then_reserve():
    index = make.index({"a": [100]}, reserve_gib=2)
    index.lease("s1", make.grant("a", "d0", 20))
    index.lease("s2", make.grant("a", "d0", 10))
    index.keep("s3", make.grant("a", "d0", 16))
    index.observe("a", make.use("d0", foreign=5, s1=8), 1.0)
    news = News(slots=(SlotNews("s2", SlotKind.DIRECT, 0),))
    assert pieces(index, news) == [
        ("slot", 0, 20, "s1"),
        ("used", 0, 8, "s1"),
        ("direct", 20, 30, "s2"),
        ("foreign", 30, 35, ""),
        ("kept", 35, 51, "s3"),
        ("free", 51, 98, ""),
        ("reserve", 98, 100, ""),
    ]


def test_use_above_a_lease_takes_room_of_its_own():
    index = make.index({"a": [100]})
    index.lease("s1", make.grant("a", "d0", 20))
    index.lease("s2", make.grant("a", "d0", 10))
    index.observe("a", make.use("d0", s1=26), 1.0)
    assert pieces(index)[:4] == [
        ("slot", 0, 20, "s1"),
        ("used", 0, 20, "s1"),
        ("over", 20, 26, "s1"),
        ("slot", 26, 36, "s2"),
    ]


def test_a_bar_ends_where_its_device_does():
    index = make.index({"a": [100]}, reserve_gib=1)
    index.lease("s1", make.grant("a", "d0", 90))
    index.observe("a", make.use("d0", foreign=60), 1.0)
    found = pieces(index)
    assert ("foreign", 90, 100, "") in found
    assert max(right for _, _, right, _ in found) == 100
    assert not [piece for piece in found if piece[0] == "free"]


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_few_devices_have_a_row_each_below_their_node(nodes):
    index = make.index({f"node-{number}": [100] * 8 for number in range(nodes)})
    layout = view_of(index).layout
    assert not layout.dense
    assert layout.rows == nodes * 9
    assert sorted([*layout.heads, *layout.labels]) == list(range(layout.rows))
    assert {place.offset for place in layout.places.values()} == {0}


def test_many_devices_stand_side_by_side_and_do_not_overlap():
    index = make.index({f"node-{number}": [192] * 8 for number in range(64)})
    index.mark("node-10", cordoned=True)
    view = view_of(index)
    layout = view.layout
    assert layout.dense
    assert layout.rows == 64
    assert list(layout.labels.values())[:3] == ["node-0", "node-1", "node-2"]
    assert layout.labels[10] == "▲ node-10"
    row = sorted(place.offset for place in layout.places.values() if place.row == 3)
    assert all(right - left > 192 * GIB for left, right in itertools.pairwise(row))
    assert layout.width == row[-1] + 192 * GIB


def test_the_largest_cluster_is_drawn_in_a_fraction_of_its_second():
    index = make.index({f"node-{number}": [192] * 8 for number in range(64)})
    for number in range(64 * 8 * 4):
        index.lease(f"s{number}", make.grant(f"node-{number % 64}", f"d{number // 64 % 8}", 40))
    began_s = time.process_time()
    view = view_of(index)
    drawn = pieces_data(view)
    inner_data(view), bars_data(view), marks_data(view), summary_html(view)
    assert time.process_time() - began_s < 0.5
    assert sum(colour == COLOURS[Part.LEASED] for colour in drawn["colour"]) == 64 * 8 * 4


def test_what_is_wrong_is_marked_and_said():
    index = make.index({"a": [100, 100], "b": [100], "c": [100], "d": [100]})
    index.observe("a", make.use("d1", healthy=False), 1.0)
    index.mark("b", cordoned=True)
    index.mark("c", reachable=False)
    index.mark("d", lost=True)
    view = view_of(index)
    assert marks_data(view)["text"] == ["✕ unhealthy"]
    text = summary_html(view)
    for words in ("unhealthy: a/0", "cordoned: b", "no Dask worker: c", "lost: d"):
        assert words in text
    assert bars_data(view)["line_width"] == [1, 2, 2, 2, 2]


def test_a_slot_says_what_it_is():
    index = make.index({"a": [100, 100]})
    index.lease("s1", make.grant("a", "d0 d1", 20))
    index.observe("a", make.use("d0", s1=5), 1.0)
    index.observe("a", make.use("d1", s1=7), 1.0)
    news = News(slots=(SlotNews("s1", SlotKind.TASKS, 1),))
    text = view_of(index, news, {"s1": make.shape(20, gpus=2, tenant="vision")}).slots["s1"]
    assert (text.needs, text.tenant, text.leased, text.used, text.running) == ("2 × 20 GiB", "vision", "40 GiB", "12 GiB", "1")


def partitioned(*leases):
    """The bars of a MI300X in CPX/NPS4 with these slots: their texts and their view."""
    devices = parse_fleet("1x1:mi300x/cpx-nps4")[0].devices
    index = Index()
    index.add_node("a", "i1", devices, GIB)
    for number, (uuids, grant) in enumerate(leases):
        index.lease(f"s{number}", Grant("a", tuple(f"SIM-000-00.{each}" for each in uuids), **grant))
    nodes = node_bars(index, News(), {"a": devices})
    return index, View(nodes, layout_of(nodes), slot_texts(nodes, index, News(), {}), News(), ())


def test_devices_that_share_their_memory_are_one_bar():
    large, small = {"memory_bytes": 20 * GIB}, {"memory_bytes": GIB}
    index, view = partitioned(((0,), large), ((1,), large), ((2, 3), small))
    index.observe("a", DeviceUse(uuid="SIM-000-00.2", used_bytes=2 * GIB, slots={"s2": 2 * GIB}), 1.0)
    bars = view.nodes[0].bars
    assert [bar.name for bar in bars] == ["0–1", "2–3", "4–5", "6–7"]
    assert next(iter(view.layout.labels.values())) == "0–1  2 × MI300X CPX/NPS4"
    assert [(bar.total_bytes, bar.leased_bytes, bar.free_bytes) for bar in bars[:2]] == [
        (48 * GIB, 40 * GIB, 7 * GIB),
        (48 * GIB, 2 * GIB, 45 * GIB),
    ]
    assert "1 node, 8 devices, 188 GiB: leased 42 GiB" in summary_html(view)
    assert "devices <b>a / 0–1 2 × MI300X CPX/NPS4" in pieces_data(view)["tip"][0]
    assert slot_texts(view.nodes, index, News(), {})["s2"].used == "2 GiB", "what both devices read is one use"


def test_what_nobody_else_can_have_is_not_free():
    lone = {"memory_bytes": 8 * GIB, "exclusive": True, "share_milli": 250}
    _, view = partitioned(((0,), lone), ((2,), lone), ((3,), lone))
    first, second = (bar.pieces for bar in view.nodes[0].bars[:2])
    assert [piece.part for piece in first] == [Part.LEASED, Part.FREE, Part.RESERVE], "its neighbour may have the rest"
    assert [piece.part for piece in second] == [Part.LEASED, Part.LEASED, Part.ALONE, Part.RESERVE]
    assert view.slots["s1"].needs == "8 GiB, 25 % of the compute, for itself"
    assert MEANINGS[Part.ALONE] in summary_html(view)


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([1, 0], "0–1"), ([0, 1, 2, 5, 7, 8], "0–2, 5, 7–8")])
def test_spans(numbers, text):
    assert spans(numbers) == text


def test_words_of_others_are_shown_and_do_nothing():
    index = make.index({EVIL: [100]})
    index.lease("s1", make.grant(EVIL, "d0", 20))
    index.mark(EVIL, cordoned=True)
    view = view_of(index, shapes={"s1": make.shape(20, tenant=EVIL)})
    html = summary_html(view) + "".join(pieces_data(view)["tip"])
    assert EVIL not in html
    assert "&lt;script&gt;" in html


def test_tables_of_what_waits():
    queue = QueueNews("s", "vision", 24 * GIB, 2, 1200, 3, 1, 2, 61.0)
    assert {name: cells[0] for name, cells in queue_columns([queue]).items()} == {
        "needs": "2 × 24 GiB",
        "tenant": "vision",
        "waiting": "1,200",
        "oldest": "61.0 s",
        "open": "3",
        "asked": "1",
        "running": "2",
    }
    waiting = direct_columns([DirectWaiting(make.need(16), 40, 3.0)])
    assert {name: cells[0] for name, cells in waiting.items()} == {"needs": "16 GiB", "waiting": "40", "oldest": "3.0 s"}


def test_the_news_names_open_slots_and_direct_ones_first():
    shape = make.shape(8)
    slots = [make.opened(f"s{number:04d}", "x", "a", "d0") for number in range(600)]
    direct = msgspec.structs.replace(make.opened("zzz", "", "a", "d0"), kind=SlotKind.DIRECT, running=0)
    news = news_of(make.state([make.queue("x", shape, 1)], [make.requested("asked", "x"), *slots, direct]))
    assert len(news.slots) == 512
    assert news.slots[0] == SlotNews("zzz", SlotKind.DIRECT, 0)
    assert news.slots[1] == SlotNews("s0000", SlotKind.TASKS, 1)
