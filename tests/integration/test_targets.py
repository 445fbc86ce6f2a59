"""Every process of a real cluster says where its metrics are, and a real Prometheus finds and scrapes them all by that."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from manager.api.targets import targets
from manager.ports import free_port
from tests.integration.cluster import Cluster, eventually, program_or_skip

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
KINDS = {"api", "autoscaler", "controller", "node", "scheduler", "supervisor", "worker"}


def key_of(cluster: Cluster) -> str:
    return cluster.client.address.api_key.value


def groups(cluster: Cluster) -> list[dict[str, Any]]:
    """What the route tells."""
    url = f"{cluster.client.address.url}/v1/metrics/targets"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {key_of(cluster)}"}, trust_env=False)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert isinstance(found, list)
    return found


def kinds(found: list[dict[str, Any]]) -> set[str]:
    return {group["labels"]["__meta_rocyard_kind"] for group in found}


def urls(found: list[dict[str, Any]]) -> dict[str, str]:
    """Name → URL of its metrics."""
    return {
        group["labels"]["__meta_rocyard_name"]: "{}://{}{}".format(
            group["labels"]["__scheme__"], group["targets"][0], group["labels"]["__metrics_path__"]
        )
        for group in found
    }


def complete(cluster: Cluster) -> list[dict[str, Any]]:
    return eventually(
        lambda: found if kinds(found := groups(cluster)) == KINDS and len(found) == 9 else None,
        15,
        "all processes to be told of",
    )


def test_every_process_serves_its_metrics_where_it_says(cluster: Cluster) -> None:
    found = urls(complete(cluster))
    assert {name for name in found if "/" in name} == {"node/node-0", "node/node-1", "worker/node-0", "worker/node-1"}
    telling = {
        "api": "rocyard_api_requests_total{",
        "autoscaler": "rocyard_autoscaler_metrics_known",
        "controller": 'rocyard_nodes{state="live"} 2.0',
        "node": 'rocyard_device_healthy{card_model="AMD Instinct MI300X (simulated)"',
        "scheduler": "dask_scheduler_workers{",
        "supervisor": "rocyard_process_restarts_total",
        "worker": "dask_worker_threads",
    }
    for name, url in found.items():
        kind = name.partition("/")[0].partition(":")[0]

        def says(url: str = url, kind: str = kind) -> bool:
            answer = httpx.get(url, trust_env=False)
            assert answer.status_code == 200
            return telling[kind] in answer.text

        eventually(says, 10, f"{name} to say {telling[kind]}")


def test_a_key_that_may_read_is_needed(cluster: Cluster) -> None:
    url = f"{cluster.client.address.url}/v1/metrics/targets"
    assert httpx.get(url, trust_env=False).status_code == 401
    reader = cluster.client.create_key("monitoring", "read")
    assert httpx.get(url, headers={"Authorization": f"Bearer {reader.key}"}, trust_env=False).status_code == 200


def test_a_dask_worker_that_is_started_again_is_told_of_at_its_new_place(cluster: Cluster) -> None:
    before = urls(complete(cluster))["worker/node-1"]
    cluster.dask_worker("node-1").kill()

    def moved() -> bool:
        now = urls(groups(cluster)).get("worker/node-1")
        return now is not None and now != before and httpx.get(now, trust_env=False).status_code == 200

    eventually(moved, 20, "the next worker's metrics")


@pytest.fixture
def prometheus(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """A Prometheus with the example's configuration, but for the address, the key's file and the pace; its URL."""
    program = program_or_skip("prometheus", "prometheus")
    config = yaml.safe_load((ROOT / "config" / "prometheus" / "prometheus.yml").read_text())
    (tmp_path / "key").write_text(key_of(cluster))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "config" / "prometheus" / "rules" / "rocyard.yml")]
    discovery = config["scrape_configs"][0]["http_sd_configs"][0]
    discovery["url"] = f"{cluster.client.address.url}/v1/metrics/targets"
    discovery["refresh_interval"] = "1s"
    discovery["authorization"]["credentials_file"] = str(tmp_path / "key")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port("127.0.0.1")
    with (tmp_path / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, trust_env=False)
    except httpx.TransportError:
        return []
    return answer.json()["data"]["result"] if answer.status_code == 200 else []


def test_prometheus_scrapes_every_process_and_no_alert_fires(cluster: Cluster, prometheus: str) -> None:
    complete(cluster)

    def scraped() -> bool:
        found = ask(prometheus, 'up{job="rocyard"} == 1')
        return len(found) == 9 and {series["metric"]["kind"] for series in found} == KINDS

    eventually(scraped, 30, "nine targets that are up")
    nodes = {series["metric"]["node"] for series in ask(prometheus, 'up{kind="worker"}')}
    assert nodes == {"node-0", "node-1"}
    eventually(lambda: ask(prometheus, "rocyard:device_memory_leased:ratio"), 20, "a recording rule to have been computed")
    rules = httpx.get(f"{prometheus}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
    alerts = httpx.get(f"{prometheus}/api/v1/alerts", trust_env=False).json()["data"]["alerts"]
    assert [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"] == []


def test_what_is_gone_is_not_told_of() -> None:
    now_ms = int(time.time() * 1000)
    said = {
        "api:here:1": b'{"metrics_url": "http://a:1/metrics", "at_ms": %d}' % now_ms,
        "api:here:2": b'{"metrics_url": "http://a:2/metrics", "at_ms": %d}' % (now_ms - 600_000),
        "controller": b'{"metrics_url": "https://[::1]:3/metrics"}',
        "controller:again": b'{"metrics_url": "https://[::1]:3/metrics"}',
        "node/left": b'{"metrics_url": "http://a:4/metrics"}',
        "node/there": b'{"metrics_url": "http://a:5/metrics"}',
        "silent": b"{}",
        "broken": b"\xff",
    }
    found = targets(said, ["there"], now_ms)
    assert [group.targets for group in found] == [("a:1",), ("[::1]:3",), ("a:5",)]
    assert found[1].labels["__scheme__"] == "https"
    assert found[2].labels["__meta_rocyard_node"] == "there"
