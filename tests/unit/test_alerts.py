"""Alerts, recording rules and the Grafana dashboard: known metrics only, each alert explained, and each tried by promtool."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from manager import metrics
from manager.leader_metrics import NODE_STATES

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "config" / "prometheus" / "rules" / "rocyard.yml"
DASHBOARD = ROOT / "config" / "grafana" / "rocyard.json"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDINGS = {rule["record"]: rule for group in GROUPS for rule in group["rules"] if "record" in rule}
PANELS = json.loads(DASHBOARD.read_text())["panels"]
STEP_S = 15
DEVICE = 'hostname="node-0", gpu_id="1", gpu_uuid="GPU-1", card_model="MI300X"'
DEVICE_LABELS = {"hostname": "node-0", "gpu_id": "1", "gpu_uuid": "GPU-1", "card_model": "MI300X"}


def promtool_or_skip() -> str:
    found = shutil.which("promtool")
    if found is None:
        reason = "needs promtool (on Debian: apt-get install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def promtool(*args: str | Path) -> None:
    ran = subprocess.run([promtool_or_skip(), *map(str, args)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


class Case(msgspec.Struct, frozen=True):
    """Series with which an alert fires after `minutes`, and series with which it must not. Values stand 15 s apart.

    `labels` are those that the alert bears besides its severity.
    """

    fires: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str] = {}
    minutes: int = 12


API = 'instance="a:1"'
LONG = "x120"  # for half an hour
CASES = {
    "RocyardStoreErrors": Case(
        fires={f'rocyard_store_errors_total{{{API}, kind="StoreUnavailable"}}': f"0+1{LONG}"},
        quiet={f'rocyard_store_errors_total{{{API}, kind="StoreUnavailable"}}': f"0 0 0 3+0{LONG}"},
        labels={"instance": "a:1", "kind": "StoreUnavailable"},
    ),
    "RocyardStoreNotSyncing": Case(
        fires={f"rocyard_store_unsynced{{{API}}}": f"1+0{LONG}", 'rocyard_store_unsynced{instance="b:1"}': f"0+0{LONG}"},
        quiet={f"rocyard_store_unsynced{{{API}}}": f"0+0{LONG}"},
    ),
    "RocyardStoreRefused": Case(
        fires={f'rocyard_store_refused{{{API}, reason="replaced"}}': f"1+0{LONG}"},
        quiet={f'rocyard_store_refused{{{API}, reason="replaced"}}': f"0+0{LONG}"},
        labels={"reason": "replaced"},
    ),
    "RocyardNoLeader": Case(
        fires={f"rocyard_leader{{{API}}}": f"0+0{LONG}"},
        quiet={f"rocyard_leader{{{API}}}": f"0+0{LONG}", 'rocyard_leader{instance="b:1"}': f"1+0{LONG}"},
    ),
    "RocyardRoundsStopped": Case(
        fires={f"rocyard_leader{{{API}}}": f"1+0{LONG}", f"rocyard_rounds_total{{{API}}}": f"7+0{LONG}"},
        quiet={f"rocyard_leader{{{API}}}": f"1+0{LONG}", f"rocyard_rounds_total{{{API}}}": f"7+8{LONG}"},
    ),
    "RocyardQueueStuck": Case(
        fires={
            f"rocyard_queue_oldest_wait_seconds{{{API}}}": f"0+15{LONG}",
            f'tasks_total{{{API}, status="SUCCEEDED"}}': f"5+0{LONG}",
            f'rocyard_queue_tasks{{{API}, status="RUNNING"}}': f"0+0{LONG}",
        },
        quiet={  # one long task holds everything up: that is no fault
            f"rocyard_queue_oldest_wait_seconds{{{API}}}": f"0+15{LONG}",
            f'tasks_total{{{API}, status="SUCCEEDED"}}': f"5+0{LONG}",
            f'rocyard_queue_tasks{{{API}, status="RUNNING"}}': f"1+0{LONG}",
        },
        minutes=20,
    ),
    "RocyardTasksNeverFit": Case(
        fires={f'rocyard_infeasible_tasks{{{API}, reason="ExceedsLargestDevice"}}': f"2+0{LONG}"},
        quiet={f'rocyard_infeasible_tasks{{{API}, reason="ExceedsLargestDevice"}}': f"0+0{LONG}"},
        labels={"reason": "ExceedsLargestDevice"},
    ),
    "RocyardTasksFailing": Case(
        fires={
            f'tasks_total{{{API}, status="FAILED"}}': f"0+1{LONG}",
            f'tasks_total{{{API}, status="SUCCEEDED"}}': f"0+2{LONG}",
        },
        quiet={
            f'tasks_total{{{API}, status="FAILED"}}': f"0+1{LONG}",
            f'tasks_total{{{API}, status="SUCCEEDED"}}': f"0+9{LONG}",
        },
        minutes=20,
    ),
    "RocyardExecutorsCrashing": Case(
        fires={f'rocyard_executor_restarts_total{{{API}, reason="Crashed"}}': f"0+1{LONG}"},
        quiet={f'rocyard_executor_restarts_total{{{API}, reason="Cancelled"}}': f"0+1{LONG}"},
        labels={"instance": "a:1"},
    ),
    "RocyardMemoryExceeded": Case(
        fires={f'rocyard_executor_restarts_total{{{API}, reason="MemoryExceeded"}}': f"_x40 1+0{LONG}"},
        quiet={f'rocyard_executor_restarts_total{{{API}, reason="MemoryExceeded"}}': f"1+0{LONG}"},
        labels={"instance": "a:1"},
        minutes=20,
    ),
    "RocyardNodeLost": Case(
        fires={f'rocyard_nodes{{{API}, state="lost"}}': f"1+0{LONG}"},
        quiet={f'rocyard_nodes{{{API}, state="lost"}}': f"0+0{LONG}", f'rocyard_nodes{{{API}, state="live"}}': f"2+0{LONG}"},
    ),
    "RocyardNodeSilent": Case(
        fires={f'rocyard_nodes{{{API}, state="silent"}}': "0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0"},
        quiet={f'rocyard_nodes{{{API}, state="silent"}}': "0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0"},
        minutes=5,
    ),
    "RocyardNodeWithoutWorker": Case(
        fires={f'rocyard_nodes{{{API}, state="no_worker"}}': f"1+0{LONG}"},
        quiet={f'rocyard_nodes{{{API}, state="no_worker"}}': f"1x8 0+0{LONG}"},
    ),
    "RocyardDeviceUnhealthy": Case(
        fires={f"rocyard_device_healthy{{{DEVICE}}}": f"1 1 0+0{LONG}"},
        quiet={f"rocyard_device_healthy{{{DEVICE}}}": f"1+0{LONG}"},
        labels=DEVICE_LABELS,
    ),
    "RocyardForeignMemory": Case(
        fires={
            f"rocyard_device_memory_foreign_bytes{{{DEVICE}}}": f"12+0{LONG}",
            f"rocyard_device_memory_total_bytes{{{DEVICE}}}": f"192+0{LONG}",
        },
        quiet={
            f"rocyard_device_memory_foreign_bytes{{{DEVICE}}}": f"2+0{LONG}",
            f"rocyard_device_memory_total_bytes{{{DEVICE}}}": f"192+0{LONG}",
        },
        labels=DEVICE_LABELS,
    ),
    "RocyardOvercommitted": Case(
        fires={
            f"rocyard_device_memory_leased_bytes{{{DEVICE}}}": f"193+0{LONG}",
            f"rocyard_device_memory_total_bytes{{{DEVICE}}}": f"192+0{LONG}",
        },
        quiet={
            f"rocyard_device_memory_leased_bytes{{{DEVICE}}}": f"192+0{LONG}",
            f"rocyard_device_memory_total_bytes{{{DEVICE}}}": f"192+0{LONG}",
        },
        labels=DEVICE_LABELS,
    ),
    "RocyardAutoscalerBlind": Case(
        fires={
            f"rocyard_autoscaler_metrics_known{{{API}}}": f"0+0{LONG}",
            f'rocyard_autoscaler_size_nodes{{{API}, group="g"}}': f"2+0{LONG}",
        },
        quiet={f"rocyard_autoscaler_metrics_known{{{API}}}": f"0+0{LONG}"},  # every other process shows 0 as well
        labels={"instance": "a:1"},
    ),
    "RocyardAutoscalerBackingOff": Case(
        fires={f'rocyard_autoscaler_actions_total{{{API}, action="add", result="failed"}}': f"0x4 1 1 2 2 3 3 4+0{LONG}"},
        quiet={f'rocyard_autoscaler_actions_total{{{API}, action="add", result="done"}}': f"0+1{LONG}"},
        labels={"action": "add"},
        minutes=8,
    ),
    "RocyardTargetDown": Case(
        fires={f'up{{job="rocyard", kind="node", {API}}}': f"1 1 0+0{LONG}"},
        quiet={f'up{{job="rocyard", kind="node", {API}}}': f"1 1 0 0 0 1+0{LONG}", f'up{{job="other", {API}}}': f"0+0{LONG}"},
        labels={"job": "rocyard", "kind": "node", "instance": "a:1"},
    ),
    "RocyardProcessRestarting": Case(
        fires={f'rocyard_process_restarts_total{{{API}, process="worker"}}': f"0 0 1 2 3 4 5+0{LONG}"},
        quiet={f'rocyard_process_restarts_total{{{API}, process="worker"}}': f"0 0 1 2+0{LONG}"},
        labels={"instance": "a:1", "process": "worker"},
    ),
    "RocyardApiErrors": Case(
        fires={
            f'rocyard_api_requests_total{{{API}, method="GET", route="/v1/tasks", status="503"}}': f"0+1{LONG}",
            f'rocyard_api_requests_total{{{API}, method="GET", route="/v1/tasks", status="200"}}': f"0+9{LONG}",
        },
        quiet={
            f'rocyard_api_requests_total{{{API}, method="GET", route="/v1/tasks", status="404"}}': f"0+9{LONG}",
            f'rocyard_api_requests_total{{{API}, method="GET", route="/v1/tasks", status="200"}}': f"0+1{LONG}",
        },
    ),
    "RocyardHookErrors": Case(
        fires={f'rocyard_hook_errors_total{{{API}, hook="transition"}}': f"_x30 1+0{LONG}"},
        quiet={f'rocyard_hook_errors_total{{{API}, hook="transition"}}': f"4+0{LONG}"},
        labels={"instance": "a:1", "hook": "transition"},
    ),
    "RocyardLoopErrors": Case(
        fires={f'rocyard_loop_errors_total{{{API}, loop="beat"}}': f"4x30 5+0{LONG}"},
        quiet={f'rocyard_loop_errors_total{{{API}, loop="beat"}}': f"4+0{LONG}"},
        labels={"instance": "a:1", "loop": "beat"},
    ),
}


def rendered(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels.get(match[1], ""), template)


def promtool_test(name: str, case: Case, *, fires: bool) -> dict[str, Any]:
    rule = ALERTS[name]
    expected = []
    if fires:
        notes = {key: rendered(text, case.labels) for key, text in rule["annotations"].items()}
        expected = [{"exp_labels": rule["labels"] | case.labels, "exp_annotations": notes}]
    series = case.fires if fires else case.quiet
    return {
        "name": f"{name} {'fires' if fires else 'is quiet'}",
        "interval": f"{STEP_S}s",
        "input_series": [{"series": series_name, "values": values} for series_name, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{case.minutes}m", "alertname": name, "exp_alerts": expected}],
    }


def test_every_alert_fires_when_it_should_and_not_when_it_should_not(tmp_path: Path) -> None:
    assert CASES.keys() == ALERTS.keys()
    tests = [promtool_test(name, case, fires=fires) for name, case in CASES.items() for fires in (True, False)]
    file = tmp_path / "alerts.json"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": f"{STEP_S}s", "tests": tests}))
    promtool("test", "rules", file)


def test_recording_rules_compute_what_their_names_say(tmp_path: Path) -> None:
    series = {
        'tasks_total{instance="a", status="SUCCEEDED"}': f"0+30{LONG}",
        'tasks_total{instance="b", status="SUCCEEDED"}': f"0+15{LONG}",
        'tasks_total{instance="b", status="FAILED"}': f"0+15{LONG}",
        'rocyard_device_memory_total_bytes{gpu_uuid="1"}': f"100+0{LONG}",
        'rocyard_device_memory_total_bytes{gpu_uuid="2"}': f"300+0{LONG}",
        'rocyard_device_memory_leased_bytes{gpu_uuid="2"}': f"100+0{LONG}",
        'rocyard_device_memory_used_bytes{gpu_uuid="1"}': f"40+0{LONG}",
        'rocyard_device_utilisation_ratio{gpu_uuid="1"}': f"0.5+0{LONG}",
        'rocyard_device_utilisation_ratio{gpu_uuid="2"}': f"0+0{LONG}",
        'rocyard_api_requests_total{status="500"}': f"0+15{LONG}",
        'rocyard_api_requests_total{status="200"}': f"0+45{LONG}",
    }
    expected = {
        'rocyard:tasks:rate5m{status="SUCCEEDED"}': 3,
        "rocyard:tasks_failed:ratio15m": 0.25,
        "rocyard:device_memory_leased:ratio": 0.25,
        "rocyard:device_memory_used:ratio": 0.1,
        "rocyard:device_utilisation:mean": 0.25,
        "rocyard:api_errors:ratio5m": 0.25,
    }
    assert {name.partition("{")[0] for name in expected} == RECORDINGS.keys()
    tests = [
        {"expr": name, "eval_time": "20m", "exp_samples": [{"labels": name, "value": value}]}
        for name, value in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": tests}],
    }
    file = tmp_path / "recordings.json"
    file.write_text(json.dumps(document))
    promtool("test", "rules", file)


def test_the_example_configuration_and_the_rules_are_valid() -> None:
    promtool("check", "config", "--syntax-only", ROOT / "config" / "prometheus" / "prometheus.yml")
    promtool("check", "rules", RULES)


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_every_alert_says_what_is_wrong_and_where_it_is_explained(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert name in headings
    assert anchor == name.lower()


def test_only_alerts_that_there_are_are_explained() -> None:
    explained = re.findall(r"^## (Rocyard\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(ALERTS)


# --- names of metrics -------------------------------------------------------------------------------------------------


def known_series() -> dict[str, set[str]]:
    """Every series of ours with the labels that it has."""
    found: dict[str, set[str]] = {"up": {"job"}}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            labels = set(metric._labelnames)
            match family.type:
                case "counter":
                    found[f"{family.name}_total"] = labels
                case "histogram":
                    found |= {f"{family.name}_{end}": labels | {"le"} for end in ("bucket", "sum", "count")}
                case _:
                    found[family.name] = labels
    return found


def expressions() -> dict[str, str]:
    """Every expression that is written down, by where it stands."""
    found = {name: str(rule["expr"]) for name, rule in (ALERTS | RECORDINGS).items()}
    for panel in PANELS:
        found |= {f"panel {panel['id']} {target['refId']}": target["expr"] for target in panel.get("targets", ())}
    return found


@pytest.mark.parametrize("where", sorted(expressions()))
def test_an_expression_names_metrics_and_labels_that_there_are(where: str) -> None:
    expression = expressions()[where]
    known = known_series() | {name: {"status"} for name in RECORDINGS}
    used = re.findall(r"\b((?:rocyard|tasks?|up)\b[\w:]*|(?:rocyard|tasks?)_\w+)(\{[^}]*\})?", expression)
    assert used
    for name, selector in used:
        assert name in known, f"{where} asks for {name}"
        for label in re.findall(r"(\w+)\s*(?:=|!=|=~|!~)", selector):
            assert label in known[name] | {"instance", "job", "kind", "node"}, f"{where} asks {name} for {label}"


def test_states_of_nodes_that_are_asked_for_exist() -> None:
    asked = {state for text in expressions().values() for state in re.findall(r'rocyard_nodes\{state="(\w+)"', text)}
    assert asked
    assert asked <= set(NODE_STATES)


# --- Grafana ----------------------------------------------------------------------------------------------------------


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {(place["x"] + across, place["y"] + down) for across in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies upon another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]


def test_every_expression_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    found = {name: text for name, text in expressions().items() if name.startswith("panel")}
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__rate_interval|\$__interval", "1m", text).replace("$node", ".*")}
        for number, text in enumerate(found.values())
    ]
    file = tmp_path / "panels.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)
