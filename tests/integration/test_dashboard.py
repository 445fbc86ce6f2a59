"""Pages of Dask's dashboard on a real cluster: its GPU pages know our devices, and our own page says what the ledger says."""

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import httpx
import pytest
from distributed import Client as DaskClient
from PIL import Image

from manager.core.quantities import GIB
from plugins.node.devices.simulated import DeviceFault, Faults, write_faults
from tests.integration.browser import Browser, chromium_or_skip
from tests.integration.cluster import Cluster, clusters, eventually

pytestmark = pytest.mark.integration
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the scheduler has no tests to import

T = TypeVar("T")
DRAWN = "typeof Bokeh !== 'undefined' && Bokeh.documents.length > 0 && Bokeh.documents[0].roots().length > 0"
SOURCES = """[...Bokeh.documents[0]._all_models.values()].filter(model => model.type == 'ColumnDataSource')
  .map(model => Object.fromEntries(Object.entries(model.data).map(([name, values]) => [name, [...values]])))"""
LEASED, USED, FOREIGN, RESERVE = "#a9cfe8", "#0072b2", "#e69f00", "#d9d9d9"
MEASURED = (20 + 4 * 140 + 12) * GIB


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and no autoscaler that adds more of them for what is to wait here."""
    yield from clusters(tmp_path_factory.mktemp("cluster"), {"ROCYARD_AUTOSCALER__MODE": "off"})


@pytest.fixture(scope="module")
def base_url(cluster: Cluster) -> str:
    found = re.search(r"Dask dashboard\s+(http://\S+)/status", cluster.output.read_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def busy(cluster: Cluster) -> Iterator[None]:
    """Three slots that hold memory, a shape that waits, and 12 GiB of others on the first device."""
    write_faults(cluster.directory / "data" / "nodes" / "node-0" / "devices", faults(12))
    tasks = [
        cluster.client.submit("sleep", {"seconds": 300, "memory_bytes": 20 * GIB}, memory="24GiB"),
        *(
            cluster.client.submit("sleep", {"seconds": 300, "memory_bytes": 140 * GIB}, memory="150GiB", gpus=2)
            for _ in range(2)
        ),
    ]

    def measured() -> bool:
        devices = [device for worker in cluster.client.workers() for device in worker.devices]
        return sum(device.used_bytes or 0 for device in devices) >= MEASURED

    eventually(measured, 30, "what the tasks hold to be measured")
    tasks += [cluster.client.submit("sleep", {"seconds": 300}, memory="190GiB", gpus=2) for _ in range(7)]
    yield
    write_faults(cluster.directory / "data" / "nodes" / "node-0" / "devices", Faults())
    for task in tasks:
        task.cancel()


def faults(foreign_gib: int) -> Faults:
    return Faults(devices={"0": DeviceFault(foreign_bytes=foreign_gib * GIB)})


def get(url: str) -> str:
    answer = httpx.get(url, timeout=10, trust_env=False)
    assert answer.status_code == 200
    return answer.text


def on_scheduler(cluster: Cluster, question: Callable[..., T]) -> T:
    """What `question(dask_scheduler=…)` answers inside the scheduler."""

    async def ask() -> Any:
        async with DaskClient(cluster.dask_address(), asynchronous=True, set_as_default=False) as client:
            return await client.run_on_scheduler(question)

    return asyncio.run(ask())


def ledger(dask_scheduler: Any) -> dict[str, Any]:
    """What the ledger has, of each device; runs in the scheduler."""
    plugin = dask_scheduler.plugins["rocyard-placement"]
    return {
        f"{view.name}/{pool.key}": {
            "leases": dict(pool.leases),
            "used": dict(pool.used),
            "foreign": pool.foreign_bytes,
            "reserve": pool.reserve_bytes,
            "total": pool.total_bytes,
        }
        for view in plugin.ledger.index.nodes.values()
        for pool in view.pools.values()
    }


def panes(dask_scheduler: Any) -> dict[str, Any]:
    """What Dask's own GPU panes would draw; runs in the scheduler."""
    from distributed.dashboard.components.nvml import GPUCurrentLoad
    from distributed.dashboard.components.rmm import RMMMemoryUsage

    load, rmm = GPUCurrentLoad(dask_scheduler), RMMMemoryUsage(dask_scheduler)
    load.update()
    rmm.update()
    return {
        "memory": list(load.source.data["memory"]),
        "utilization": list(load.source.data["utilization"]),
        "title": load.memory_figure.title.text,
        "largest": load.memory_figure.x_range.end,
        "rmm_gpu_used": list(rmm.source.data["gpu_used"]),
        "workers": {
            worker.extra["rocyard"]: {"extra": worker.extra["gpu"], "metrics": dict(worker.metrics)}
            for worker in dask_scheduler.workers.values()
        },
    }


PAGES = ("rocyard", "gpu", "individual-gpu-memory", "individual-gpu-utilization", "individual-rmm-memory", "status", "workers")


@pytest.mark.parametrize("page", PAGES)
def test_pages_answer_and_the_menu_names_ours_and_the_gpu_page(base_url: str, page: str) -> None:
    text = get(f"{base_url}/{page}")
    if not page.startswith("individual"):  # those have no menu
        assert re.findall(r'<a href="(rocyard|gpu)">', text) == ["rocyard", "gpu"]


def test_dasks_own_gpu_panes_show_the_sum_of_each_workers_devices(cluster: Cluster, busy: None) -> None:
    def shown() -> dict[str, Any] | None:
        found = on_scheduler(cluster, panes)
        return found if sum(found["memory"]) == MEASURED else None

    found = eventually(shown, 15, "the workers' metrics to have reached the scheduler")
    assert len(found["memory"]) == 2
    assert found["largest"] == 2 * 192 * GIB
    assert found["title"] == "GPU Memory: 592.00 GiB / 768.00 GiB"
    assert max(found["utilization"]) > 0
    assert sum(found["rmm_gpu_used"]) == 4 * MEASURED  # that pane draws four pieces of each worker
    for worker in found["workers"].values():
        assert worker["extra"] == {"memory-total": 2 * 192 * GIB, "name": "2 × AMD Instinct MI300X (simulated)"}
        devices = worker["metrics"]["rocyard_devices"]
        assert [device["index"] for device in devices] == [0, 1]
        assert sum(device["memory-used"] for device in devices) == worker["metrics"]["gpu_memory_used"]
        assert worker["metrics"]["gpu"]["memory-used"] == worker["metrics"]["gpu_memory_used"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium_or_skip()
    with Browser(width=1400, height=700) as found:
        yield found


def sums(sources: list[dict[str, list[Any]]]) -> dict[str, float]:
    """GiB of all pieces of each colour."""
    found: dict[str, float] = {}
    for source in sources:
        for colour, width in zip(source.get("colour", ()), source.get("w", ()), strict=False):
            found[colour] = round(found.get(colour, 0) + width, 3)
    return found


def test_the_bars_are_the_ledgers(cluster: Cluster, busy: None, base_url: str, browser: Browser, tmp_path: Path) -> None:
    pools = on_scheduler(cluster, ledger)
    assert len(pools) == 4
    browser.open(f"{base_url}/rocyard")
    browser.wait_for(DRAWN)

    def agrees() -> bool:
        pools = on_scheduler(cluster, ledger)
        expected = {
            LEASED: sum(sum(pool["leases"].values()) for pool in pools.values()) / GIB,
            USED: sum(sum(pool["used"].values()) for pool in pools.values()) / GIB,
            FOREIGN: sum(pool["foreign"] for pool in pools.values()) / GIB,
            RESERVE: sum(pool["reserve"] for pool in pools.values()) / GIB,
        }
        assert (expected[LEASED], expected[FOREIGN]) == (624, 12)
        found = sums(browser.evaluate(SOURCES))
        return {colour: found.get(colour) for colour in expected} == expected

    eventually(agrees, 15, "the page to agree with the ledger")

    def waiting() -> tuple[str, str, str] | None:
        queue = next(source for source in browser.evaluate(SOURCES) if "asked" in source)
        rows = list(zip(queue["needs"], queue["waiting"], queue["tenant"], queue["running"], strict=True))
        return next((row[1:] for row in rows if row[0] == "2 × 190 GiB"), None)

    assert eventually(waiting, 15, "the shape that waits to be shown") == ("7", "default", "0")
    sources = browser.evaluate(SOURCES)
    tips = "".join(tip for source in sources for tip in source.get("tip", ()))
    for slot in {slot for pool in pools.values() for slot in pool["leases"]}:
        assert slot in tips
    text = browser.evaluate("document.title")
    assert text == "Rocyard"
    assert not browser.errors()
    picture = tmp_path / "rocyard.png"
    browser.screenshot(picture)
    with Image.open(picture) as image:
        pixels = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert pixels is not None
    counts = {f"#{red:02x}{green:02x}{blue:02x}": count for count, (red, green, blue) in pixels}
    assert counts.get(USED, 0) > 2000, "measured use is drawn"
    assert counts.get(LEASED, 0) > 2000, "leases are drawn"


def test_the_page_follows_the_cluster_while_somebody_looks(
    cluster: Cluster, busy: None, base_url: str, browser: Browser
) -> None:
    browser.open(f"{base_url}/rocyard")
    browser.wait_for(DRAWN)
    before = sums(browser.evaluate(SOURCES))[LEASED]
    # As many pieces as before: only what has changed of them is sent.
    write_faults(cluster.directory / "data" / "nodes" / "node-0" / "devices", faults(13))
    eventually(lambda: sums(browser.evaluate(SOURCES))[FOREIGN] == 13, 15, "the memory of others to grow on the page")
    task = cluster.client.submit("sleep", {"seconds": 300}, memory="1GiB")
    try:
        eventually(lambda: sums(browser.evaluate(SOURCES))[LEASED] == before + 1, 15, "the new slot to be drawn")
    finally:
        task.cancel()
