"""Device-seconds and quotas as values: what a slot is charged, who starts where, and what a quota still lets work."""

import msgspec
import pytest
from prometheus_client import REGISTRY

from manager.core.lifecycle import SlotKind, SlotStatus
from manager.core.model import NodeRow, TenantRow
from manager.core.quantities import GIB
from manager.core.shapes import Grant
from manager.core.shares import CREDIT_MAX_S, DeviceSizes, QuotaLeft, accounted, at_quota
from manager.leader_metrics import TENANTS_SHOWN_MAX, LeaderMetrics
from tests.unit import factories as make


def sizes(gib, *, pool=""):
    row = make.node_row("a", gib)
    devices = tuple(msgspec.structs.replace(device, pool=pool) for device in row.info.devices)
    info = msgspec.structs.replace(row.info, devices=devices)
    return DeviceSizes(msgspec.structs.replace(make.state([]), nodes=(msgspec.structs.replace(row, info=info),)))


@pytest.mark.parametrize(
    ("grant", "part"),
    [
        pytest.param(Grant("a", ("d0",), 12 * GIB), 0.125, id="a part of its memory"),
        pytest.param(Grant("a", ("d0",), 12 * GIB, share_milli=500), 0.5, id="the larger of memory and compute"),
        pytest.param(Grant("a", ("d0", "d1"), 96 * GIB), 2.0, id="of each device"),
        pytest.param(Grant("a", ("d0",), 1 * GIB, exclusive=True), 1.0, id="all of it for itself"),
        pytest.param(Grant("b", ("d0",), 1 * GIB), 1.0, id="what is not known counts whole"),
    ],
)
def test_the_part_of_a_device(grant, part):
    assert sizes([96.0, 96.0]).part(grant) == part


def test_devices_that_share_a_pool_have_a_part_of_it_each():
    of_two = sizes([48.0, 48.0], pool="p")
    assert of_two.part(Grant("a", ("d0",), 24 * GIB)) == 1.0
    assert of_two.part(Grant("a", ("d0",), 48 * GIB)) == 2.0, "it has the other's part too"


def look(*rows, waiting=("x", "y"), slots=(), had=None):
    """Tenants x and y with a shape each, which are called alike; `had` are the virtual times of shapes."""
    queues = [make.queue(name, make.shape(24, tenant=name), 9 if name in waiting else 0) for name in "xy"]
    queues = [msgspec.structs.replace(queue, vtime_s=(had or {}).get(queue.shape_id)) for queue in queues]
    state = make.state(queues, slots, {"a": [24, 24]})
    return msgspec.structs.replace(state, tenants=tuple(rows))


def of(state):
    return {row.tenant: row.vtime_s for row in state.tenants}


def slot(name, **more):
    return make.opened(f"{name}0", name, "a", "d0" if name == "x" else "d1", **more)


def test_a_tenant_is_charged_for_what_is_at_work_by_its_weight():
    rows = TenantRow(tenant="x", weight=4.0, vtime_s=10.0), TenantRow(tenant="y", vtime_s=10.0)
    state = accounted(look(*rows, slots=[slot("x"), slot("y")], had={"x": 1.0, "y": 1.0}), {}, {}, 2.0)
    assert of(state) == {"x": 10.5, "y": 12.0}
    assert [queue.vtime_s for queue in state.queues] == [3.0, 3.0], "within the tenant there are no weights"


@pytest.mark.parametrize(
    "free",
    [
        pytest.param({"idle_s": 3.0}, id="idle"),
        pytest.param({}, id="of somebody who uses Dask"),
    ],
)
def test_what_ends_for_whoever_waits_and_what_is_not_ours_costs_nothing(free):
    lazy = slot("x", **free)
    if not free:
        lazy = msgspec.structs.replace(lazy, kind=SlotKind.DIRECT, status=SlotStatus.OPEN)
    rows = TenantRow(tenant="x", vtime_s=10.0), TenantRow(tenant="y", vtime_s=10.0)
    assert of(accounted(look(*rows, slots=[lazy]), {}, {}, 5.0)) == {"x": 10.0, "y": 10.0}


@pytest.mark.parametrize(
    ("x", "waiting", "expected"),
    [
        pytest.param(None, "xy", 100.0, id="new: level with who is served"),
        pytest.param(40.0, "y", 100.0, id="wants nothing: it saves nothing"),
        pytest.param(90.0, "xy", 90.0, id="waits: it keeps what it is behind"),
        pytest.param(1.0, "xy", 100.0 - CREDIT_MAX_S, id="within bounds"),
        pytest.param(500.0, "xy", 500.0, id="what it has had is not forgotten"),
    ],
)
def test_where_a_tenant_stands(x, waiting, expected):
    rows = TenantRow(tenant="x", vtime_s=x), TenantRow(tenant="y", vtime_s=100.0)
    state = accounted(look(*rows, waiting=waiting, slots=[slot("y")], had={"y": 100.0}), {}, {}, 0.0)
    assert of(state)["x"] == expected


def test_what_nobody_can_serve_is_no_measure_for_those_who_come():
    """Its virtual time stands still for ever: a newcomer would have all until it has caught up with the others."""
    stuck = TenantRow(tenant="stuck", vtime_s=0.0)
    at_its_limit = TenantRow(tenant="x", vtime_s=50.0, gpus=1, gpus_max=1)
    state = look(stuck, at_its_limit, TenantRow(tenant="y", vtime_s=1000.0), slots=[slot("x"), slot("y")])
    queue = make.queue("s", make.shape(999, tenant="stuck"), 5)
    new = make.queue("n", make.shape(24, tenant="new"), 5)
    state = msgspec.structs.replace(state, queues=(*state.queues, queue, new))
    assert of(accounted(state, {}, {}, 0.0))["new"] == 1000.0


def test_the_next_leader_goes_on_from_what_is_written():
    rows = TenantRow(tenant="x", vtime_s=70.0), TenantRow(tenant="y", vtime_s=75.0)
    first = accounted(look(*rows, had={"x": 7.0, "y": 9.0}), {}, {}, 0.0)
    assert of(first) == {"x": 70.0, "y": 75.0}
    again = accounted(look(*rows), {"x": 71.0, "y": 75.5}, {"x": 8.0}, 0.0)
    assert of(again) == {"x": 71.0, "y": 75.5}, "what this leader has counted since is newer"


@pytest.mark.parametrize(
    ("row", "full"),
    [
        ({}, False),
        ({"running": 2, "running_max": 2}, True),
        ({"gpus": 1, "gpus_max": 2}, False),
        ({"memory_bytes": 3, "memory_bytes_max": 2}, True),
    ],
)
def test_who_is_at_the_quota(row, full):
    assert at_quota(TenantRow(tenant="t", **row)) == full


def test_shapes_take_of_the_quota_one_after_the_other():
    left = QuotaLeft(TenantRow(tenant="t", gpus_max=5, running_max=4, memory_bytes_max=40 * GIB))
    assert left.take(2, 16 * GIB, 9) == 2
    assert left.take(1, 1 * GIB, 9) == 1
    assert left.take(1, 1 * GIB, 9) == 0


def test_the_metrics_name_the_busiest_tenants_and_sum_the_others():
    rows = tuple(TenantRow(tenant=f"t{i:03}", running=i, gpus=1) for i in range(TENANTS_SHOWN_MAX + 2))
    state = msgspec.structs.replace(make.state([]), tenants=rows)

    def silent_s(row: NodeRow) -> float:
        return 0.0

    def value(tenant: str) -> float | None:
        return REGISTRY.get_sample_value("rocyard_tenant_tasks", {"tenant": tenant, "state": "running"})

    metrics = LeaderMetrics(10.0)
    metrics.show(state, silent_s)
    assert (value("t101"), value("t001"), value("")) == (101.0, None, 1.0)
    assert REGISTRY.get_sample_value("rocyard_tenant_gpus", {"tenant": ""}) == 2.0
    metrics.show(msgspec.structs.replace(state, tenants=rows[:1]), silent_s)
    assert (value("t101"), value("t000"), value("")) == (None, 0.0, None)
    metrics.hide()
    assert value("t000") is None
