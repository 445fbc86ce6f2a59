"""Metrics: the names, their document, and the server that shows them."""

import re
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from manager import metrics
from manager.core.errors import StartError
from manager.metrics import exposition, one_of, serve_metrics

ROOT = Path(__file__).resolve().parents[2]
DECLARED = {name: value for name, value in vars(metrics).items() if isinstance(value, MetricWrapperBase)}


def rows() -> dict[str, tuple[str, ...]]:
    """Name to type, labels and meaning of each metric, as the code has it."""
    table = {}
    for metric in DECLARED.values():
        (family,) = metric.describe()
        name = f"{family.name}_total" if isinstance(metric, Counter) else family.name
        table[name] = (
            family.type,
            ", ".join(f"`{label}`" for label in metric._labelnames) or "–",
            family.documentation,
        )
    return table


def test_the_document_lists_every_metric_as_it_is():
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = {}
    for match in re.finditer(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE):
        *cells, source = (cell.strip() for cell in match[2].split("|"))
        documented[match[1]] = tuple(cells)
        assert source
    assert documented == rows()


@pytest.mark.parametrize("name", sorted(rows()))
def test_names_are_ours_and_in_base_units(name):
    assert name.startswith("rocyard_") or name in {"tasks_total", "task_duration_seconds"}
    assert not re.search(r"_(ms|milliseconds|mib|gib|mb|gb|percent|minutes)(_|$)", name)


def test_no_label_can_grow_without_end():
    unbounded = {"task_id", "slot_id", "tenant", "path", "url", "address", "worker", "shape", "function", "pid", "user"}
    found = [name for name, metric in DECLARED.items() if unbounded & set(metric._labelnames)]
    assert found == ["TENANT_TASKS", "TENANT_GPUS", "TENANT_MEMORY"], "whose tenants are bounded (see LeaderMetrics)"


def test_a_label_from_outside_is_kept_bounded():
    assert [one_of(value, frozenset({"GET"})) for value in ("GET", "BREW")] == ["GET", "other"]


def families(text: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text)}


def test_everything_is_served_on_the_one_address_given():
    port, close = serve_metrics("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert {name.removesuffix("_total") for name in rows()} <= families(text)
        assert families(text) == families(exposition()[0].decode())
        assert "_created" not in text
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(StartError, match=f"metrics cannot listen on 127.0.0.1:{port}"):
            serve_metrics("127.0.0.1", port)
    finally:
        close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
