"""From what the page ``/rocyard`` shows to columns for Bokeh: places in GiB and rows, colours, texts. Pure, without Bokeh.

Owns the colours and every piece of HTML; what others chose (names of nodes, tenants) is escaped here.
"""

import html
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from manager.core.news import News
from manager.core.quantities import GIB, format_memory
from plugins.dashboard_rows import Bar, Layout, NodeBars, Part, Piece, SlotText, summary_text
from plugins.ledger import DirectWaiting

NAMED_MAX: Final = 12
"""Nodes or devices that one line names."""
# Okabe and Ito's colours, which people with any kind of colour blindness tell apart; what is nobody's lease is hatched too.
COLOURS: Final[dict[Part, str]] = {
    Part.LEASED: "#a9cfe8",
    Part.DIRECT: "#a6dcc8",
    Part.USED: "#0072b2",
    Part.OVER: "#d55e00",
    Part.KEPT: "#ffffff",
    Part.FOREIGN: "#e69f00",
    Part.ALONE: "#a9cfe8",
    Part.FREE: "#f7f7f7",
    Part.RESERVE: "#d9d9d9",
}
HATCHES: Final[dict[Part, str]] = {
    Part.OVER: "x",
    Part.KEPT: "right_diagonal_line",
    Part.FOREIGN: "left_diagonal_line",
    Part.ALONE: "horizontal_line",
    Part.RESERVE: "dot",
}
MEANINGS: Final[dict[Part, str]] = {
    Part.LEASED: "leased to a slot",
    Part.DIRECT: "leased to a Dask task",
    Part.USED: "measured use",
    Part.OVER: "use above the lease",
    Part.FOREIGN: "used by others",
    Part.ALONE: "left empty for a slot that has the device for itself",
    Part.KEPT: "kept for a slot that waits",
    Part.FREE: "free",
    Part.RESERVE: "reserve",
}
assert COLOURS.keys() == set(Part) == MEANINGS.keys()
UPON: Final = frozenset({Part.USED, Part.OVER})
WRONG: Final = "#b3261e"
HELD_BACK: Final = "#e69f00"

PIECES: Final = ("x", "w", "y", "colour", "hatch", "tip")
INNER: Final = ("x", "w", "y", "colour", "hatch")
BARS: Final = ("x", "w", "y", "line", "line_width")
TEXTS: Final = ("x", "y", "text")


class View(msgspec.Struct, frozen=True):
    """All that a page shows at one moment. `direct` are tasks of Dask's own users that wait for room, by size."""

    nodes: tuple[NodeBars, ...]
    layout: Layout
    slots: Mapping[str, SlotText]
    news: News
    direct: tuple[DirectWaiting, ...]


def pieces_data(view: View) -> dict[str, list[Any]]:
    """What lies side by side in all bars, in GiB, with what is said of each."""
    data: dict[str, list[Any]] = {name: [] for name in PIECES}
    for node in view.nodes:
        for bar in node.bars:
            device = _device_tip(node, bar)
            for piece in bar.pieces:
                if piece.part not in UPON:
                    _add_piece(data, view.layout, bar, piece)
                    data["tip"].append(_tip(piece, view.slots.get(piece.slot)) + device)
    return data


def inner_data(view: View) -> dict[str, list[Any]]:
    """What slots are measured to use, upon their leases."""
    data: dict[str, list[Any]] = {name: [] for name in INNER}
    for node in view.nodes:
        for bar in node.bars:
            for piece in bar.pieces:
                if piece.part in UPON:
                    _add_piece(data, view.layout, bar, piece)
    return data


def _add_piece(data: dict[str, list[Any]], layout: Layout, bar: Bar, piece: Piece) -> None:
    place = layout.places[bar.node, bar.uuid]
    data["x"].append((place.offset + (piece.left + piece.right) / 2) / GIB)
    data["w"].append((piece.right - piece.left) / GIB)
    data["y"].append(place.row)
    data["colour"].append(COLOURS[piece.part])
    data["hatch"].append(HATCHES.get(piece.part, "blank"))


def _tip(piece: Piece, slot: SlotText | None) -> str:
    if slot is None:
        return _tip_rows({MEANINGS[piece.part]: format_memory(piece.right - piece.left)})
    return _tip_rows(
        {
            "slot": slot.slot,
            "serves": slot.kind,
            "tenant": slot.tenant,
            "shape": slot.needs,
            "uses": slot.used,
            "tasks running": slot.running,
        }
    )


def _device_tip(node: NodeBars, bar: Bar) -> str:
    state = ", ".join(text for text in (bar.note, node.note) if text)
    return "<hr>" + _tip_rows(
        {
            "device" if bar.devices == 1 else "devices": f"{bar.node} / {bar.name} {bar.model}",
            "leased": f"{format_memory(bar.leased_bytes)} of {format_memory(bar.total_bytes)}",
            **({"others use": format_memory(bar.foreign_bytes)} if bar.foreign_bytes else {}),
            "free": format_memory(bar.free_bytes),
            **({"state": state} if state else {}),
        }
    )


def _tip_rows(texts: Mapping[str, str]) -> str:
    return "".join(f"{name} <b>{html.escape(text)}</b><br>" for name, text in texts.items())


def bars_data(view: View) -> dict[str, list[Any]]:
    """The frames of the devices, in GiB."""
    data: dict[str, list[Any]] = {name: [] for name in BARS}
    for node in view.nodes:
        for bar in node.bars:
            place = view.layout.places[bar.node, bar.uuid]
            data["x"].append((place.offset + bar.total_bytes / 2) / GIB)
            data["w"].append(bar.total_bytes / GIB)
            data["y"].append(place.row)
            data["line"].append(WRONG if bar.note else HELD_BACK if node.note else "#777777")
            data["line_width"].append(2 if bar.note or node.note else 1)
    return data


def marks_data(view: View) -> dict[str, list[Any]]:
    """What is wrong with devices, upon these."""
    data: dict[str, list[Any]] = {name: [] for name in TEXTS}
    for bar in (bar for node in view.nodes for bar in node.bars if bar.note):
        place = view.layout.places[bar.node, bar.uuid]
        data["x"].append((place.offset + bar.total_bytes / 2) / GIB)
        data["y"].append(place.row)
        data["text"].append(f"✕ {bar.note}")
    return data


def names_data(view: View) -> dict[str, list[Any]]:
    """Names of nodes that stand above their devices."""
    notes = {node.node: node.note for node in view.nodes}
    rows = list(view.layout.heads.items())
    return {
        "x": [0] * len(rows),
        "y": [number for number, _ in rows],
        "text": [f"{name}  ▲ {notes[name]}" if notes[name] else name for _, name in rows],
    }


def summary_html(view: View) -> str:
    """What stands above the bars: the cluster in one line, the legend, and what is wrong."""
    text = f"<b>{html.escape(summary_text(view.nodes))}</b>"
    if not view.nodes:
        text = "<b>No node has registered yet.</b>"
    shown = {piece.part for node in view.nodes for bar in node.bars for piece in bar.pieces}
    shown |= {Part.LEASED, Part.USED, Part.FREE}
    keys = [_key(COLOURS[part], HATCHES.get(part), MEANINGS[part]) for part in Part if part in shown]
    lines = [text, " ".join(keys), *(f"<b style='color:{WRONG}'>{html.escape(line)}</b>" for line in _what_is_wrong(view))]
    return "".join(f"<div style='margin:2px 0 4px'>{line}</div>" for line in lines)


def _what_is_wrong(view: View) -> list[str]:
    """A line for each thing that is wrong, with the nodes or devices that it holds for."""
    found: dict[str, list[str]] = {}
    for node in view.nodes:
        if node.note:
            found.setdefault(node.note, []).append(node.node)
        for bar in node.bars:
            if bar.note:
                found.setdefault(bar.note, []).append(f"{node.node}/{bar.name}")
    return [
        f"▲ {note}: {', '.join(names[:NAMED_MAX])}" + (f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else "")
        for note, names in found.items()
    ]


def _key(colour: str, hatch: str | None, meaning: str) -> str:
    """One entry of the legend."""
    angles = {"left_diagonal_line": "135deg", "right_diagonal_line": "45deg", "x": "45deg"}
    angle = angles.get(hatch or "", "90deg" if hatch == "dot" else "0deg")
    lines = f"repeating-linear-gradient({angle}, #555 0 1px, {colour} 1px 5px)" if hatch else colour
    swatch = f"display:inline-block;width:18px;height:11px;border:1px solid #555;background:{lines};margin-right:5px"
    return f"<span style='white-space:nowrap;margin-right:14px'><span style='{swatch}'></span>{meaning}</span>"
