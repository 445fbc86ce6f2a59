"""The page ``/rocyard`` of Dask's dashboard: each device as a bar with its slots, and the queue. A preload of the scheduler.

What it says is computed in `plugins.dashboard_rows`, once a second for all who look, and not at all while nobody does:
the callback belongs to the page of a browser, and ends with it. It reads the ledger and changes nothing.
"""

import time
import weakref
from collections.abc import Mapping
from typing import Any, Final

from bokeh.core.properties import without_property_validation
from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d
from bokeh.models.widgets import DataTable, Div, StringFormatter, TableColumn
from bokeh.plotting import figure
from distributed.dashboard import scheduler as dask_dashboard
from distributed.dashboard.components import DashboardComponent, add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.scheduler import Scheduler
from distributed.utils import log_errors

from manager.core.devices import Device
from manager.core.news import News
from manager.core.quantities import GIB
from plugins.dashboard_columns import (
    BARS,
    INNER,
    PIECES,
    TEXTS,
    WRONG,
    View,
    bars_data,
    inner_data,
    marks_data,
    names_data,
    pieces_data,
    summary_html,
)
from plugins.dashboard_rows import Layout, direct_columns, layout_of, node_bars, queue_columns, slot_texts
from plugins.node.link import decode_report
from plugins.scheduler import PlacementPlugin

PATH: Final = "/rocyard"
PERIOD_MS: Final = 1000
ROW_PX: Final = 24
FRAME_PX: Final = 64
"""Axis and title above and below the rows."""
TABLE_ROW_PX: Final = 26
TABLE_ROWS_MAX: Final = 24
"""More rows than this are scrolled."""
QUEUE_PX: Final = 520
PATCHES_MAX: Final = 200
"""With more cells than this changed, Bokeh takes all of them in less time than these one by one."""
_HATCH: Final = {
    "hatch_pattern": "hatch", "hatch_color": "#444444", "hatch_alpha": 0.7, "hatch_scale": 8, "hatch_weight": 1,
}  # fmt: skip
TICKS_GIB: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Steps of the axis."""


class Views:
    """The last view of one scheduler, shared by all pages that look at it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._devices: dict[str, tuple[Device, ...]] = {}
        self._read: dict[str, Any] = {}
        self._view: View | None = None
        self._made_s = 0.0

    def view(self) -> View:
        """At most one period old."""
        now_s = time.monotonic()
        if self._view is None or now_s - self._made_s >= PERIOD_MS / 2000:
            self._view, self._made_s = self._make(), now_s
        return self._view

    def _make(self) -> View:
        scheduler = self._scheduler()
        plugin = scheduler.plugins.get(PlacementPlugin.name) if scheduler is not None else None
        if not isinstance(plugin, PlacementPlugin):
            return View((), layout_of(()), {}, News(), ())
        ledger = plugin.ledger
        self._learn_devices(plugin)
        nodes = node_bars(ledger.index, plugin.news, self._devices)
        shapes = {slot: request.shape for slot, request in ledger.requests.items()}
        texts = slot_texts(nodes, ledger.index, plugin.news, shapes)
        return View(nodes, layout_of(nodes), texts, plugin.news, tuple(ledger.direct_waiting(time.monotonic())))

    def _learn_devices(self, plugin: PlacementPlugin) -> None:
        """Names of devices, from the reports that Dask workers registered with; kept while a worker is away."""
        for node, address in plugin.addresses.items():
            worker = plugin.scheduler.workers.get(address)
            data = None if worker is None else worker.extra.get("rocyard")
            if data is not None and self._read.get(node) is not data:
                report = decode_report(data)
                self._read[node] = data
                if report is not None:
                    self._devices[node] = report.devices


class DevicesPanel(DashboardComponent):
    """The bars."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self.drawn: View | None = None
        self.pieces = ColumnDataSource({name: [] for name in PIECES})
        self.inner = ColumnDataSource({name: [] for name in INNER})
        self.bars = ColumnDataSource({name: [] for name in BARS})
        self.names = ColumnDataSource({name: [] for name in TEXTS})
        self.marks = ColumnDataSource({name: [] for name in TEXTS})
        self.summary = Div(text="", sizing_mode="stretch_width", name="rocyard_summary")
        self.figure = self._figure()
        self.root = column(self.summary, self.figure, sizing_mode="stretch_width", name="rocyard_devices")
        self.source = self.pieces

    def _figure(self) -> Any:
        plot: Any = figure(
            tools="",
            toolbar_location=None,
            height=FRAME_PX,
            sizing_mode="stretch_width",
            x_range=Range1d(start=0, end=1),
            y_range=Range1d(start=1, end=0),
            x_axis_location="above",
            name="rocyard_bars",
            min_border_right=24,
        )
        plot.grid.visible = False
        plot.outline_line_color = None
        plot.yaxis.axis_line_color = plot.yaxis.major_tick_line_color = None
        plot.yaxis.major_label_text_font_size = "12px"
        plot.xaxis.axis_label = "GiB"
        plot.xaxis.axis_label_standoff = 2
        plot.xaxis.minor_tick_line_color = None
        pieces = plot.rect(
            x="x", y="y", width="w", height=0.8, source=self.pieces, fill_color="colour", line_color="#777777", line_width=0.5,
            **_HATCH,
        )  # fmt: skip
        plot.rect(x="x", y="y", width="w", height=0.36, source=self.inner, fill_color="colour", line_color=None, **_HATCH)
        plot.rect(
            x="x", y="y", width="w", height=0.8, source=self.bars, fill_color=None, line_color="line", line_width="line_width"
        )
        plot.text(
            x="x", y="y", text="text", source=self.marks, text_baseline="middle", text_align="center",
            text_font_size="11px", text_font_style="bold", text_color=WRONG,
            background_fill_color="#ffffff", padding=1,
        )  # fmt: skip
        plot.text(
            x="x", y="y", text="text", source=self.names, text_baseline="middle", text_font_size="13px", text_font_style="bold"
        )
        plot.add_tools(HoverTool(renderers=[pieces], tooltips="@tip{safe}", point_policy="follow_mouse"))
        return plot

    @without_property_validation
    @log_errors
    def update(self) -> None:
        """Bring the page up to date; sends nothing where nothing has changed."""
        view = self.views.view()
        before, self.drawn = self.drawn, view
        if before is view:
            return
        if before is None or before.layout != view.layout:
            self._lay_out(view.layout)
        for source, data in (
            (self.pieces, pieces_data(view)),
            (self.inner, inner_data(view)),
            (self.bars, bars_data(view)),
            (self.names, names_data(view)),
            (self.marks, marks_data(view)),
        ):
            _send(source, data)
        text = summary_html(view)
        if self.summary.text != text:
            self.summary.text = text

    def _lay_out(self, layout: Layout) -> None:
        plot = self.figure
        plot.height = FRAME_PX + max(1, layout.rows) * ROW_PX
        plot.y_range.start, plot.y_range.end = layout.rows - 0.4, -0.6
        plot.x_range.start, plot.x_range.end = 0, layout.width / GIB * 1.005
        plot.yaxis.ticker = FixedTicker(ticks=sorted(layout.labels))
        plot.yaxis.major_label_overrides = dict(layout.labels)
        plot.xaxis.ticker, plot.xaxis.major_label_overrides = _ticks(layout)
        plot.xaxis.axis_label = f"devices 0 to {layout.columns - 1} of each node, GiB" if layout.dense else "GiB"


class QueuePanel(DashboardComponent):
    """The queue by shape, and below it the Dask tasks that wait for room."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self.queue = ColumnDataSource(queue_columns(()))
        self.direct = ColumnDataSource(direct_columns(()))
        self.queue_title = Div(text="", name="rocyard_queue_title")
        self.direct_title = Div(text="", name="rocyard_direct_title")
        self.queue_table = _table(
            self.queue,
            {
                "needs": ("needs", 90),
                "tenant": ("tenant", 90),
                "waiting": ("waiting", 70),
                "oldest": ("oldest", 70),
                "open": ("slots", 50),
                "asked": ("asked", 50),
                "running": ("running", 70),
            },
        )
        self.direct_table = _table(
            self.direct, {"needs": ("needs", 180), "waiting": ("waiting", 150), "oldest": ("oldest", 150)}
        )
        self.root = column(
            self.queue_title, self.queue_table, self.direct_title, self.direct_table, width=QUEUE_PX, name="rocyard_queue"
        )
        self.source = self.queue

    @without_property_validation
    @log_errors
    def update(self) -> None:
        """Bring the page up to date; sends nothing where nothing has changed."""
        view = self.views.view()
        queues = view.news.queues
        waiting = sum(queue.depth for queue in queues)
        shapes = f"{len(queues)} {'shape' if len(queues) == 1 else 'shapes'}"
        title = f"<b>Queue</b>: {waiting:,} waiting, {shapes}"
        _show(self.queue_title, self.queue_table, self.queue, title, queue_columns(queues), visible=True)
        count = sum(row.count for row in view.direct)
        title = f"<b>Dask tasks that wait for room</b>: {count:,}"
        _show(self.direct_title, self.direct_table, self.direct, title, direct_columns(view.direct), visible=bool(view.direct))


def _send(source: ColumnDataSource, data: dict[str, list[Any]]) -> None:
    """Tell the browser what has changed, and no more: most of a large cluster is as it was a second ago."""
    before = source.data
    if all(len(before[name]) == len(values) for name, values in data.items()):
        changed = {
            name: [(number, new) for number, (old, new) in enumerate(zip(before[name], values, strict=True)) if old != new]
            for name, values in data.items()
        }
        changes = {name: patches for name, patches in changed.items() if patches}
        if not changes:
            return
        if sum(map(len, changes.values())) <= PATCHES_MAX:
            source.patch(changes)
            return
    source.data = data


def _show(
    title: Div, table: DataTable, source: ColumnDataSource, text: str, data: dict[str, list[str]], *, visible: bool
) -> None:
    if title.text != text:
        title.text = text
    if dict(source.data) != data:
        source.data = data
        table.height = TABLE_ROW_PX * (1 + min(TABLE_ROWS_MAX, max(1, len(next(iter(data.values()))))))
    if title.visible != visible:
        title.visible = table.visible = visible


def _table(source: ColumnDataSource, columns: Mapping[str, tuple[str, int]]) -> DataTable:
    plain = StringFormatter(nan_format="–")
    return DataTable(
        source=source,
        columns=[
            TableColumn(field=field, title=title, width=width, formatter=plain, sortable=False)
            for field, (title, width) in columns.items()
        ],
        index_position=None,
        width=QUEUE_PX,
        height=TABLE_ROW_PX * 2,
        row_height=TABLE_ROW_PX,
        reorderable=False,
        selectable=False,
        stylesheets=[":host { z-index: 0; }"],  # below Dask's menu when the page is scrolled
    )


def _ticks(layout: Layout) -> tuple[FixedTicker, dict[float, str]]:
    """GiB below one axis; where devices stand side by side, each begins at 0 again."""
    largest = layout.width - (layout.columns - 1) * layout.stride
    across = 2 if layout.columns > 1 else 8
    step = next((step for step in TICKS_GIB if largest / GIB / step <= across), TICKS_GIB[-1])
    values = range(0, int(largest / GIB) + 1, step)
    places = {column * layout.stride / GIB + value: str(value) for column in range(layout.columns) for value in values}
    return FixedTicker(ticks=list(places)), places


# --- Dask's side ----------------------------------------------------------------------------------------------------

_views: "weakref.WeakKeyDictionary[Scheduler, Views]" = weakref.WeakKeyDictionary()


@log_errors
def rocyard_page(scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    """Make the page for one browser."""
    views = _views.setdefault(scheduler, Views(scheduler))
    devices, queue = DevicesPanel(views), QueuePanel(views)
    for panel in (devices, queue):
        panel.update()
        add_periodic_callback(doc, panel, PERIOD_MS)
    doc.add_root(row(devices.root, queue.root, sizing_mode="stretch_width", spacing=24, name="rocyard"))
    doc.title = "Rocyard"
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)
    doc.theme = BOKEH_THEME


def register_page() -> None:
    """Have dashboards that start from now on serve the page."""
    dask_dashboard.applications[PATH] = rocyard_page


def dask_setup(scheduler: Scheduler) -> None:
    """Preload hook: our page in the menu, and Dask's GPU page, which it shows only where the scheduler's host has NVML."""
    pages = dask_dashboard.template_variables(scheduler)["pages"]  # the list that the pages have, not a copy
    for place, name in ((1, PATH.strip("/")), (5, "gpu")):
        if name not in pages:
            pages.insert(place, name)
