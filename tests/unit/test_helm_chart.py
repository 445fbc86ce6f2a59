"""The chart, rendered by a real Helm for every combination of values that matters: valid, closed, and fit for this code.

Nothing runs in a cluster here; docs/kubernetes.md says what that leaves open.
"""

import functools
import itertools
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.providers.kubernetes import ClusterAccess, KubernetesProvider
from manager.certs import make_certificates
from manager.core.devices import parse_fleet
from manager.core.errors import SettingsError
from manager.core.keys import Keys
from manager.settings import Settings, TlsSettings
from manager.settings_load import document_settings, load_settings
from manager.settings_sources import RESERVED_VARIABLES
from manager.store import server
from manager.tls import Role, TlsFiles, tls_files
from tests.unit import helm_chart as helm
from tests.unit.helm_chart import environment, find, names, notes, pod, pods, refusal, render, settings_text

ROOT = Path(__file__).resolve().parents[2]
GPUS: dict[str, Any] = {"devices": "8:mi300x", "workersMin": 1, "workersMax": 4}
SIMULATED: dict[str, Any] = {"devices": "2:mi300x", "resource": "none", "replicas": 3}
DARK = {"enabled": False}
TLS = {"existingSecret": "certificates"}
WITH_TLS: dict[str, Any] = {"tls": TLS, "autoscaler": {"prometheusUrl": "http://prometheus.monitoring:9090"}}
EXTERNAL = {"enabled": False, "existingSecret": "my-store"}

CHOICES: dict[str, tuple[Any, ...]] = {
    "groups": (
        {},
        {"mi300x": GPUS},
        {"sim": SIMULATED},
        {"a": GPUS, "sim": SIMULATED, "n": GPUS | {"resource": "nvidia.com/gpu"}},
    ),
    "tls": ({}, TLS),
    "store": ({}, {"existingSecret": "own"}, EXTERNAL, EXTERNAL | {"keys": {"workerUrl": ""}}),
    "autoscaler": ({}, {"mode": "shadow", "prometheusUrl": "http://prometheus.monitoring:9090"}, DARK),
    "networkPolicy": ({}, DARK, {"apiFrom": [{"podSelector": {}}], "daskFrom": [{"podSelector": {}}], "monitoringFrom": []}),
    "metrics": ({}, {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}),
}


def combinations() -> Iterator[dict]:
    """Each choice with each other one, two at a time, beside the defaults; and all of a kind at once."""
    seen: list[dict] = []
    for first, second in itertools.combinations(CHOICES, 2):
        for one, other in itertools.product(CHOICES[first], CHOICES[second]):
            values = {"groups": {"mi300x": GPUS, "sim": SIMULATED}} | {first: one, second: other}
            if values.get("tls") and not values.get("autoscaler"):
                values |= WITH_TLS
            if values not in seen:
                seen.append(values)
                yield values


@functools.cache
def rendered() -> tuple[tuple[str, list[dict]], ...]:
    return tuple((json.dumps(values, sort_keys=True), render(values)) for values in combinations())


@pytest.fixture(autouse=True)
def _needs_helm() -> None:
    helm.needed("helm_python")


def each_pod() -> Iterator[tuple[str, str, dict]]:
    for values, manifests in rendered():
        for name, spec in pods(manifests):
            yield values, name, spec


# --- as Kubernetes sees it ------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_say() -> None:
    from helm_python.chart import lint

    for values in ({}, {"groups": {"mi300x": GPUS, "sim": SIMULATED}} | WITH_TLS):
        report = lint(helm.CHART, values, strict=True)
        assert [m for m in report["messages"] if m["severity"] > 1] == []
        assert report["errors"] == []


def test_every_combination_is_valid_for_kubernetes() -> None:
    manifests = {json.dumps(m, sort_keys=True): m for _, found in rendered() for m in found if m["kind"] != "Secret"}
    manifests |= {m["metadata"]["name"]: m for m in render() if m["kind"] == "Secret"}
    assert len(manifests) > 60
    for manifest in manifests.values():
        if manifest["kind"] not in helm.CUSTOM:
            assert helm.problems(manifest) == [], manifest["metadata"]["name"]


def test_the_check_itself_sees_what_is_wrong() -> None:
    deployment = find(render(), "Deployment", "rocyard-api")
    deployment["spec"]["replicaz"] = 1
    assert any("replicaz" in problem for problem in helm.problems(deployment))


def test_no_two_objects_have_one_name() -> None:
    for values, manifests in rendered():
        found = [(m["kind"], m["metadata"]["name"]) for m in manifests]
        assert len(found) == len(set(found)), values
        assert all(len(name) <= 52 for _, name in found)


def test_two_releases_live_side_by_side() -> None:
    groups = {"groups": {"mi300x": GPUS}}
    one, other = (names(render(groups, name=name), "StatefulSet") for name in ("blue", "green-with-a-very-long-release-name"))
    assert one == {"blue-rocyard-node-mi300x", "blue-rocyard-store"}
    assert not one & other


def quantities(node: Any, key: str = "") -> Iterator[Any]:
    """Whatever stands where Kubernetes wants a quantity."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in {"limits", "requests"} and isinstance(value, dict):
                yield from value.values()
            elif name == "sizeLimit":
                yield value
            else:
                yield from quantities(value, name)
    elif isinstance(node, list):
        for item in node:
            yield from quantities(item)


def test_quantities_are_text() -> None:
    """A server-side apply refuses numbers."""
    found = [value for _, manifests in rendered() for value in quantities(manifests)]
    assert found
    assert [value for value in found if not isinstance(value, str)] == []


def test_services_lead_to_ports_of_pods() -> None:
    for values, manifests in rendered():
        templates = {
            m["metadata"]["name"]: m["spec"]["template"] for m in manifests if m["kind"] in {"Deployment", "StatefulSet"}
        }
        for service in (m for m in manifests if m["kind"] == "Service"):
            selector = service["spec"]["selector"].items()
            chosen = [t["spec"] for t in templates.values() if selector <= t["metadata"]["labels"].items()]
            assert chosen, (values, service["metadata"]["name"])
            for spec in chosen:
                offered = {p["name"]: p["containerPort"] for p in spec["containers"][0]["ports"]}
                assert all(offered[p["targetPort"]] == p["port"] for p in service["spec"]["ports"])
        for owner in (m for m in manifests if m["kind"] in {"Deployment", "StatefulSet"}):
            labels = owner["spec"]["template"]["metadata"]["labels"]
            assert owner["spec"]["selector"]["matchLabels"].items() <= labels.items()
            if "serviceName" in owner["spec"]:
                find(manifests, "Service", owner["spec"]["serviceName"])


# --- pods -----------------------------------------------------------------------------------------------------------


def test_every_pod_is_confined() -> None:
    for values, name, spec in each_pod():
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 10001, 10001), (values, name)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "initContainers" not in spec
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]
        assert "cpu" not in resources["limits"]
        assert spec["enableServiceLinks"] is False
        assert spec["automountServiceAccountToken"] is name.endswith("-autoscaler")
        assert not {"hostNetwork", "hostIPC"} & set(spec)
        assert all("hostPort" not in port for port in container.get("ports", []))
        assert {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"} <= {
            "configMap",
            "emptyDir",
            "projected",
            "secret",
        }
        assert all(v["emptyDir"].get("sizeLimit") for v in spec.get("volumes", []) if "emptyDir" in v)


def test_secret_files_are_for_the_owner_and_the_pods_group_alone() -> None:
    for _, name, spec in each_pod():
        for volume in spec.get("volumes", []):
            source = volume.get("secret") or volume.get("projected")
            if source:
                assert source["defaultMode"] == stat.S_IRUSR | stat.S_IRGRP, name
                assert source.get("items") or all(s["secret"]["items"] for s in source["sources"]), "only what is needed"


def test_the_hosts_processes_are_seen_only_by_nodes_with_real_devices() -> None:
    manifests = render({"groups": {"real": GPUS, "sim": SIMULATED, "told": GPUS | {"hostPID": False}}})
    seen = {name: spec.get("hostPID", False) for name, spec in pods(manifests)}
    assert {name for name, host in seen.items() if host} == {"rocyard-node-real"}
    assert "pod-security.kubernetes.io/enforce: privileged" in notes({"groups": {"real": GPUS}})
    assert "privileged" not in notes({"groups": {"sim": SIMULATED}})


def test_liveness_does_not_depend_on_the_store() -> None:
    for _, name, spec in each_pod():
        if name.endswith("-test"):
            continue
        (container,) = spec["containers"]
        offered = {port["name"] for port in container["ports"]}
        for kind in ("livenessProbe", "readinessProbe"):
            probe = container[kind]
            asked = probe.get("httpGet") or probe["tcpSocket"]
            assert probe["timeoutSeconds"] == 3
            assert asked["port"] in offered
            assert kind != "livenessProbe" or asked.get("path") != "/readyz"
    api = pod(render(), "rocyard-api")["containers"][0]
    assert api["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_images_are_named_by_version_or_digest() -> None:
    digest = "sha256:" + "a" * 64
    values = {
        "image": {"repository": "registry.example.org/rocyard", "digest": digest, "pullSecrets": ["registry"]},
        "groups": {
            "a": GPUS,
            "rocm": GPUS | {"image": {"repository": "registry.example.org/rocyard-rocm", "digest": "", "tag": "7"}},
        },
    }
    found = {name: spec["containers"][0]["image"] for name, spec in pods(render(values))}
    assert found["rocyard-api"] == found["rocyard-node-a"] == f"registry.example.org/rocyard@{digest}"
    assert found["rocyard-node-rocm"] == "registry.example.org/rocyard-rocm:7"
    assert all(spec["imagePullSecrets"] == [{"name": "registry"}] for _, spec in pods(render(values)))
    version = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())["appVersion"]
    assert pod(render(), "rocyard-api")["containers"][0]["image"] == f"rocyard:{version}"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_no_secret_stands_anywhere_but_in_secrets() -> None:
    for _, manifests in rendered():
        secret = {value for m in manifests if m["kind"] == "Secret" for value in m["stringData"].values()}
        rest = json.dumps([m for m in manifests if m["kind"] != "Secret"])
        assert [value for value in secret if value in rest] == []
        assert not re.search(r"rediss?://\w*:", rest)


def test_passwords_are_long_and_new_each_time() -> None:
    first, second = (find(render(), "Secret", "rocyard-store")["stringData"] for _ in range(2))
    assert {len(first["password"]), len(first["worker-password"])} == {43}
    assert len({first["password"], first["worker-password"], second["password"], second["worker-password"]}) == 4


# --- as this code sees it -------------------------------------------------------------------------------------------


def settings_of(manifests: list[dict], name: str, folder: Path) -> Settings:
    """The settings that the processes of a pod load, from files as the pod would find them."""
    spec = pod(manifests, name)
    texts = {"podIP": "10.1.2.3", "metadata.name": f"{name}-0", "status.podIP": "10.1.2.3"}
    variables: dict[str, str] = {}
    for key, value in environment(spec).items():
        variables[key] = value if isinstance(value, str) else texts[value["fieldRef"]["fieldPath"]]
    (folder / "rocyard.yaml").write_text(settings_text(manifests))
    variables["ROCYARD_CONFIG"] = str(folder / "rocyard.yaml")
    for volume in spec["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            for item in source["secret"]["items"]:
                file = folder / item["path"]
                file.unlink(missing_ok=True)
                file.write_text(f"secret-of-{item['path']}")
                file.chmod(0o440)
    variables = {key: value.replace("/run/secrets/rocyard/", f"{folder}/") for key, value in variables.items()}
    return load_settings(None, variables, {})


ROLES = ("api", "controller", "scheduler", "autoscaler", "node-mi300x", "node-sim")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("tls", [{}, WITH_TLS], ids=["plain", "tls"])
def test_each_role_loads_its_settings(tmp_path, monkeypatch, role, tls) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "groups": {"mi300x": GPUS, "sim": SIMULATED},
        "settings": {"tasks": {"retained_max": 12_000_000 // 2}},
    } | tls
    settings = settings_of(render(values), f"rocyard-{role}", tmp_path)
    assert settings.data_dir == "/var/lib/rocyard"
    assert settings.tasks.retained_max == 6_000_000
    assert settings.dask.host == ("0.0.0.0" if role == "scheduler" else "rocyard-scheduler")
    assert settings.store.url.value == ("" if role == "scheduler" else "secret-of-store-url")
    assert settings.store.worker_url.value == ("secret-of-worker-url" if role.startswith("node") else "")
    assert settings.api.key.value == ("secret-of-api-key" if role == "api" else "")
    assert settings.tls.directory == ("/run/secrets/rocyard-tls" if tls else "")
    if role not in {"api", "scheduler"}:
        own = getattr(settings, role.partition("-")[0])
        assert own.metrics_host == "10.1.2.3", "what is announced must lead here from other pods"
        port = pod(render(values), f"rocyard-{role}")["containers"][0]["ports"][0]["containerPort"]
        assert own.metrics_port == port


def test_a_node_is_told_who_and_what_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "groups": {
            "mi300x": GPUS | {"terminationGracePeriodSeconds": 900},
            "h100": GPUS | {"devices": "4:h100", "resource": "nvidia.com/gpu", "runtimeClassName": "nvidia"},
            "sim": SIMULATED,
        }
    }
    manifests = render(values)
    node = settings_of(manifests, "rocyard-node-mi300x", tmp_path).node
    assert (node.name, node.group, node.host, node.devices) == ("rocyard-node-mi300x-0", "mi300x", "10.1.2.3", "amd")
    assert node.stop_drain_s == 870
    assert pod(manifests, "rocyard-node-mi300x")["terminationGracePeriodSeconds"] == 900
    assert settings_of(manifests, "rocyard-node-h100", tmp_path).node.devices == "nvidia"
    simulated = settings_of(manifests, "rocyard-node-sim", tmp_path).node
    assert simulated.devices == "simulated"
    assert [len(node.devices) for node in parse_fleet(simulated.simulate)] == [2]
    limits = {name: spec["containers"][0]["resources"]["limits"] for name, spec in pods(manifests)}
    assert limits["rocyard-node-mi300x"]["amd.com/gpu"] == "8"
    assert limits["rocyard-node-h100"]["nvidia.com/gpu"] == "4"
    assert set(limits["rocyard-node-sim"]) == {"memory"}


def test_real_devices_have_one_agent_to_a_machine() -> None:
    manifests = render({"groups": {"mi300x": GPUS, "sim": SIMULATED}})
    (rule,) = pod(manifests, "rocyard-node-mi300x")["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    real, simulated = (
        find(manifests, "StatefulSet", f"rocyard-node-{group}")["spec"]["template"]["metadata"]["labels"]
        for group in ("mi300x", "sim")
    )
    wanted = rule["labelSelector"]["matchLabels"].items()
    assert wanted <= real.items()
    assert not wanted <= simulated.items()
    assert (rule["topologyKey"], rule["namespaceSelector"]) == ("kubernetes.io/hostname", {})
    assert "affinity" not in pod(manifests, "rocyard-node-sim")


def test_a_nodes_own_values_reach_its_pod() -> None:
    own = {
        "shm": "1Gi",
        "scratch": "3Gi",
        "supplementalGroups": [44, 109],
        "nodeSelector": {"gpu": "mi300x"},
        "tolerations": [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    }
    spec = pod(render({"groups": {"mi300x": GPUS | own}}), "rocyard-node-mi300x")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert volumes["data"]["emptyDir"] == {"sizeLimit": "3Gi"}
    assert spec["securityContext"]["supplementalGroups"] == [44, 109]
    assert (spec["nodeSelector"], spec["tolerations"]) == (own["nodeSelector"], own["tolerations"])
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert set(mounts) <= set(volumes)
    assert (mounts["shm"], mounts["models"]) == ("/dev/shm", "/models")


def test_every_variable_is_a_setting() -> None:
    known = {doc.variable for doc in document_settings()} | RESERVED_VARIABLES
    used = {name for _, _, spec in each_pod() for name in environment(spec)}
    assert "ROCYARD_NODE__HOST" in used
    assert {name for name in used if name.startswith("ROCYARD_")} == used
    assert used - known == set()


def test_every_role_is_a_command() -> None:
    from manager.cli.main import COMMANDS

    roles = {spec["containers"][0]["args"][0] for _, name, spec in each_pod() if not name.endswith(("-store", "-test"))}
    assert roles == {"api", "controller", "scheduler", "node", "autoscaler"}
    assert roles <= set(COMMANDS)


def test_what_the_chart_sets_cannot_be_set_beside_it() -> None:
    """Else a value would be ignored, or a secret stand in a ConfigMap."""
    by_variable = {doc.variable: doc.name for doc in document_settings()}
    chosen = {by_variable[name] for _, _, spec in each_pod() for name in environment(spec) if name in by_variable}
    tree = yaml.safe_load(settings_text(render()))
    chosen |= {f"{section}.{key}" for section, inner in tree.items() if isinstance(inner, dict) for key in inner}
    assert len(chosen) > 15
    for name in sorted(chosen | {"data_dir", "groups"}):
        section, _, key = name.partition(".")
        said = refusal({"settings": {section: {key: "x"} if key else "x"}})
        assert f"settings.{name} is the chart's own" in said


def test_the_autoscaler_finds_the_groups_and_may_scale_them_and_no_more() -> None:
    manifests = render({"groups": {"mi300x": GPUS, "sim": SIMULATED}}, namespace="prod")
    groups = yaml.safe_load(settings_text(manifests))["groups"]
    assert groups["mi300x"] == {
        "provider": "kubernetes",
        "devices": "8:mi300x",
        "workers_min": 1,
        "workers_max": 4,
        "namespace": "prod",
        "labels": {},
        "workload": "statefulset/rocyard-node-mi300x",
    }
    workloads = {group["workload"].removeprefix("statefulset/") for group in groups.values()}
    assert workloads == names(manifests, "StatefulSet") - {"rocyard-store"}
    role = find(manifests, "Role", "rocyard-autoscaler")
    assert role["rules"] == [
        {
            "apiGroups": ["apps"],
            "resources": ["statefulsets/scale"],
            "resourceNames": sorted(workloads),
            "verbs": ["get", "update"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
    ]
    binding = find(manifests, "RoleBinding", "rocyard-autoscaler")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "rocyard-autoscaler", "namespace": "prod"}]
    assert [spec["serviceAccountName"] for _, spec in pods(manifests)].count("rocyard-autoscaler") == 1
    assert {m["kind"] for m in manifests} & {"ClusterRole", "ClusterRoleBinding"} == set()


def test_without_groups_there_is_no_right_to_scale() -> None:
    """An empty list of names would mean every StatefulSet."""
    assert [rule["resources"] for rule in find(render(), "Role", "rocyard-autoscaler")["rules"]] == [["pods"]]


def test_the_provider_takes_what_the_chart_names(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = "a" * 20
    manifests = render({"groups": {long: GPUS}}, name="a-release-with-a-name-of-many-letters")
    (tmp_path / "rocyard.yaml").write_text(settings_text(manifests))
    groups = load_settings(tmp_path / "rocyard.yaml", {}, {}).groups
    KubernetesProvider(groups, ClusterAccess(url="http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("autoscaler", "replicas"),
    [
        pytest.param({}, None, id="active: the number is the autoscaler's"),
        pytest.param({"mode": "shadow"}, 3, id="shadow: it is the chart's"),
        pytest.param({"enabled": False}, 3, id="none: it is the chart's"),
    ],
)
def test_who_says_how_many_nodes(autoscaler, replicas) -> None:
    manifests = render({"groups": {"sim": SIMULATED}, "autoscaler": autoscaler})
    spec = find(manifests, "StatefulSet", "rocyard-node-sim")["spec"]
    assert spec.get("replicas") == replicas
    assert spec["podManagementPolicy"] == "Parallel"


def test_nodes_have_the_labels_of_their_group_and_are_started_anew_for_others() -> None:
    manifests = render(
        {"groups": {"mi300x": GPUS | {"labels": {"rack": "a"}}, "sim": {"devices": "1:mi300x/cpx-nps4", "resource": "none"}}}
    )
    settings = yaml.safe_load(settings_text(manifests))
    assert settings["groups"]["mi300x"]["labels"] == {"rack": "a"}

    def noted(name: str) -> str | None:
        return find(manifests, "StatefulSet", name)["spec"]["template"]["metadata"]["annotations"].get("rocyard/labels")

    assert (noted("rocyard-node-mi300x"), noted("rocyard-node-sim")) == ('{"rack":"a"}', None)


def test_without_the_autoscaler_nothing_of_it_is_left() -> None:
    manifests = render({"autoscaler": DARK, "groups": {"mi300x": GPUS}})
    assert [m for m in manifests if m["metadata"]["name"].endswith("autoscaler")] == []
    assert {m["kind"] for m in manifests} & {"Role", "RoleBinding"} == set()


def test_nodes_are_not_started_anew_for_settings_of_the_autoscaler() -> None:
    def checksum(values: dict, name: str, kind: str) -> str:
        return find(render(values), kind, name)["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]

    before = {"groups": {"mi300x": GPUS}}
    bounds = {"groups": {"mi300x": GPUS | {"workersMax": 9}}, "settings": {"autoscaler": {"period_s": 7}}}
    others = before | {"settings": {"tasks": {"time_limit_s": "2h"}}}
    node, leader = ("rocyard-node-mi300x", "StatefulSet"), ("rocyard-controller", "Deployment")
    assert checksum(before, *node) == checksum(bounds, *node) != checksum(others, *node)
    assert len({checksum(values, *leader) for values in (before, bounds, others)}) == 3


# --- store and TLS --------------------------------------------------------------------------------------------------


def test_the_store_is_set_as_the_embedded_one() -> None:
    text = find(render(), "ConfigMap", "rocyard-store")["data"]["store.conf"]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    own = server._configuration(Path("/data"), server._Kept("p", "w", 6379), (8, 1, 0), "0.0.0.0", None).splitlines()
    differ = ("bind ", "dir ", "user ", "port ")
    assert {line for line in own if not line.startswith(differ)} <= set(lines)
    added = set(lines) - set(own)
    assert {line.split()[0] for line in added} == {"bind", "dir", "maxmemory", "aclfile"}
    acl = find(render(), "Secret", "rocyard-store")["stringData"]["users.acl"].splitlines()
    theirs = [re.sub(r" [>#]\S+", "", line) for line in own if line.startswith("user ")]
    assert [re.sub(r" #[0-9a-f]{64}", "", line) for line in acl] == theirs
    assert f"~{Keys().heartbeat('*')} " in acl[2]


def test_a_store_of_ones_own_replaces_the_charts() -> None:
    manifests = render({"store": EXTERNAL | {"keys": {"url": "redis-url", "workerUrl": ""}}, "groups": {"mi300x": GPUS}})
    assert "rocyard-store" not in names(manifests, "StatefulSet") | names(manifests, "Secret") | names(manifests, "Service")
    spec = pod(manifests, "rocyard-node-mi300x")
    assert "ROCYARD_STORE__WORKER_URL" not in environment(spec)
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "secrets"]
    assert volume["projected"]["sources"] == [
        {"secret": {"name": "my-store", "items": [{"key": "redis-url", "path": "store-url"}]}},
    ]


def test_the_stores_volume_is_claimed() -> None:
    values = {"store": {"storage": {"size": "100Gi", "className": "fast"}}}
    (claim,) = find(render(values), "StatefulSet", "rocyard-store")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "storageClassName" not in find(render(), "StatefulSet", "rocyard-store")["spec"]["volumeClaimTemplates"][0]["spec"]


def test_with_tls_each_role_has_its_own_certificate_and_no_other() -> None:
    manifests = render({"groups": {"mi300x": GPUS}} | WITH_TLS)
    for name, spec in pods(manifests):
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls"]
        paths = {item["path"] for item in volume["secret"]["items"]}
        role = name.removeprefix("rocyard-").partition("-")[0]
        assert paths == ({"ca.pem"} if role == "test" else {"ca.pem", f"{role}.pem", f"{role}.key"})
        assert role == "test" or role in set(Role)
        probes = [
            spec["containers"][0].get(kind, {}).get("httpGet") for kind in ("livenessProbe", "readinessProbe", "startupProbe")
        ]
        assert {probe["scheme"] for probe in probes if probe} <= {"HTTPS"}
    assert find(manifests, "Secret", "rocyard-store")["stringData"]["url"].startswith("rediss://rocyard:")
    lines = set(find(manifests, "ConfigMap", "rocyard-store")["data"]["store.conf"].splitlines())
    own = server._listening(
        6379, TlsFiles(*(f"/run/secrets/rocyard-tls/{name}" for name in ("ca.pem", "store.pem", "store.key")))
    )
    assert {line.replace('"', "") for line in own} <= lines
    assert "port 6379" not in lines
    assert "https://localhost:8000" in notes(WITH_TLS)
    assert "There is no TLS" in notes()


def test_keys_are_taken_with_the_mode_that_the_chart_mounts_them_with(tmp_path) -> None:
    """The owner is root, and the pod's group may read."""
    spec = pod(render(WITH_TLS), "rocyard-api")
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "tls"]
    made = tmp_path / "made"
    make_certificates(made, (), 90)
    for item in volume["secret"]["items"]:
        (tmp_path / item["path"]).write_bytes((made / item["path"]).read_bytes())
        (tmp_path / item["path"]).chmod(volume["secret"]["defaultMode"])
    files = tls_files(TlsSettings(directory=str(tmp_path)), Role.API)
    assert files is not None
    assert Path(files.key).name == "api.key"
    (tmp_path / "api.key").chmod(0o444)
    with pytest.raises(SettingsError):
        tls_files(TlsSettings(directory=str(tmp_path)), Role.API)


# --- monitoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [{}, WITH_TLS], ids=["plain", "tls"])
def test_every_part_is_scraped(tls) -> None:
    monitor = {"serviceMonitor": {"enabled": True, "interval": "10s", "labels": {"release": "prometheus"}}}
    manifests = render({"metrics": monitor, "groups": {"mi300x": GPUS}} | tls)
    found = find(manifests, "ServiceMonitor", "rocyard")
    assert found["metadata"]["labels"]["release"] == "prometheus"
    ports = {endpoint["port"] for endpoint in found["spec"]["endpoints"]}
    selector = found["spec"]["selector"]["matchLabels"].items()
    scraped = {
        m["metadata"]["name"]
        for m in manifests
        if m["kind"] == "Service"
        and selector <= m["metadata"]["labels"].items()
        and ports & {p["name"] for p in m["spec"]["ports"]}
    }
    assert scraped == {f"rocyard-{part}" for part in ("api", "controller", "scheduler", "node", "autoscaler")}
    assert {endpoint.get("scheme") for endpoint in found["spec"]["endpoints"]} == {"https" if tls else None}
    assert names(render(), "ServiceMonitor") == set()


def test_machines_are_emptied_one_node_at_a_time() -> None:
    budgets = {
        m["metadata"]["name"]: m["spec"] for m in render({"groups": {"mi300x": GPUS}}) if m["kind"] == "PodDisruptionBudget"
    }
    assert set(budgets) == {"rocyard-api", "rocyard-controller", "rocyard-node-mi300x"}
    assert {spec["maxUnavailable"] for spec in budgets.values()} == {1}
    one = {"api": {"replicas": 1}, "controller": {"replicas": 1}}
    assert names(render(one), "PodDisruptionBudget") == set()
    assert names(render({"podDisruptionBudgets": False}), "PodDisruptionBudget") == set()


# --- who may speak to whom ------------------------------------------------------------------------------------------

PARTS = ("api", "controller", "scheduler", "node", "autoscaler", "store", "test")
PORTS = (8000, 8786, 8787, 9101, 9102, 9103, 6379, 40_000)
FLOWS = {
    *((part, "store", 6379) for part in ("api", "controller", "node", "autoscaler")),
    ("controller", "scheduler", 8786),
    ("node", "scheduler", 8786),
    ("autoscaler", "controller", 9101),
    ("test", "api", 8000),
    # Dask workers take any port.
    *((part, "node", port) for part in ("scheduler", "node") for port in PORTS),
}


def allowed(policies: list[dict], source: str, target: str, port: int) -> bool:
    """Whether the policies let a pod of one part open a connection to one of another."""
    labels = {part: {"app.kubernetes.io/name": "rocyard", "app.kubernetes.io/instance": "rocyard"} for part in PARTS}
    for part, own in labels.items():
        own["app.kubernetes.io/component"] = part

    def open_to(owner: str, peer: str, direction: str, key: str) -> bool:
        mine = [p["spec"] for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels[owner].items()]
        assert mine, "somebody is under no policy"
        return any(
            (not rule.get("ports") or port in {p["port"] for p in rule["ports"]})
            and (key not in rule or any(fits(who, labels[peer]) for who in rule[key]))
            for spec in mine
            for rule in spec.get(direction, [])
        )

    return open_to(source, target, "egress", "to") and open_to(target, source, "ingress", "from")


def fits(peer: dict, labels: dict) -> bool:
    return "podSelector" in peer and peer["podSelector"]["matchLabels"].items() <= labels.items()


def policies_of(values: dict) -> list[dict]:
    return [m for m in render({"groups": {"mi300x": GPUS}} | values) if m["kind"] == "NetworkPolicy"]


def test_parts_reach_each_other_where_they_must_and_nowhere_else() -> None:
    policies = policies_of({})
    found = {way for way in itertools.product(PARTS, PARTS, PORTS) if allowed(policies, *way)}
    assert found == FLOWS


def test_everything_is_under_a_policy_for_both_directions() -> None:
    for policy in policies_of({}):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    (deny,) = [p["spec"] for p in policies_of({}) if p["metadata"]["name"] == "rocyard-deny"]
    assert set(deny) == {"podSelector", "policyTypes"}
    assert set(deny["podSelector"]["matchLabels"]) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
    assert names(render({"networkPolicy": DARK}), "NetworkPolicy") == set()


def test_the_autoscaler_alone_reaches_kubernetes_and_not_the_machines_own_service() -> None:
    blocks = {
        policy["metadata"]["name"]: peer["ipBlock"]
        for policy in policies_of({})
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    }
    assert blocks == {"rocyard-autoscaler": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}


def test_who_may_call_the_api_can_be_limited() -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]
    (spec,) = [p["spec"] for p in policies_of({"networkPolicy": {"apiFrom": peers}}) if p["metadata"]["name"] == "rocyard-api"]
    assert spec["ingress"][0]["from"][0] == peers[0]
    assert len(spec["ingress"][0]["from"]) == 2, "`helm test` too"
    (spec,) = [p["spec"] for p in policies_of({}) if p["metadata"]["name"] == "rocyard-api"]
    assert spec["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]


def test_tasks_may_reach_what_is_named() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}], "ports": [{"port": 443, "protocol": "TCP"}]}
    policies = policies_of({"networkPolicy": {"nodeEgress": [rule]}, "store": EXTERNAL})
    (node,) = [p["spec"] for p in policies if p["metadata"]["name"] == "rocyard-node"]
    assert rule in node["egress"]
    assert {"ports": [{"port": 6379, "protocol": "TCP"}]} in node["egress"], "a store of one's own is anywhere"


# --- results --------------------------------------------------------------------------------------------------------

KEEPERS = {"rocyard-api", "rocyard-controller", "rocyard-node-mi300x"}


def test_who_keeps_reads_or_removes_results_has_their_volume() -> None:
    manifests = render({"groups": {"mi300x": GPUS}, "results": {"existingClaim": "shared"}})
    url = yaml.safe_load(settings_text(manifests))["results"]["url"]
    for name, spec in pods(manifests):
        claims = [v["persistentVolumeClaim"] for v in spec.get("volumes", []) if v["name"] == "results"]
        mounts = [m["mountPath"] for c in spec["containers"] for m in c.get("volumeMounts", []) if m["name"] == "results"]
        assert (claims, mounts) == (([{"claimName": "shared"}], [url]) if name in KEEPERS else ([], [])), name
    assert [problem for m in manifests for problem in helm.problems(m)] == []


def test_an_object_store_is_reached_with_credentials_that_no_other_part_has() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}], "ports": [{"port": 443, "protocol": "TCP"}]}
    own = {"url": "s3://bucket/folder", "existingSecret": "credentials"}
    values = {"groups": {"mi300x": GPUS}, "results": own, "networkPolicy": {"resultsEgress": [rule]}}
    manifests = render(values)
    assert yaml.safe_load(settings_text(manifests))["results"] == {"url": "s3://bucket/folder"}
    for name, spec in pods(manifests):
        given = [source for container in spec["containers"] for source in container.get("envFrom", [])]
        assert given == ([{"secretRef": {"name": "credentials"}}] if name in KEEPERS else []), name
        assert "results" not in {volume["name"] for volume in spec.get("volumes", [])}
    open_to = {m["metadata"]["name"] for m in manifests if m["kind"] == "NetworkPolicy" and rule in m["spec"].get("egress", [])}
    assert open_to == {"rocyard-api", "rocyard-controller", "rocyard-node"}
    assert [problem for m in manifests for problem in helm.problems(m)] == []


def test_without_a_place_for_results_there_is_none() -> None:
    assert yaml.safe_load(settings_text(render({})))["results"] == {"url": ""}


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"imagee": {}}, ["imagee"], id="unknown value"),
        pytest.param({"api": {"replica": 2}}, ["/api", "replica"], id="unknown value within"),
        pytest.param({"api": {"replicas": "2"}}, ["/api/replicas", "got string, want integer"], id="text for a number"),
        pytest.param({"api": {"replicas": 0}}, ["/api/replicas", "minimum"], id="no API"),
        pytest.param({"api": {"memory": 512}}, ["/api/memory", "got number, want string"], id="a quantity that is a number"),
        pytest.param({"api": {"memory": "512MB"}}, ["/api/memory", "512MB"], id="a quantity in words of ours"),
        pytest.param({"groups": {"a": {}}}, ["/groups/a", "devices"], id="a group without devices"),
        pytest.param({"groups": {"A_b": GPUS}}, ["invalid propertyName 'A_b'"], id="a group's name"),
        pytest.param({"groups": {"a": GPUS | {"devices": "mi300x"}}}, ["/groups/a/devices"], id="devices without a count"),
        pytest.param({"groups": {"a": GPUS | {"resource": "gpu"}}}, ["/groups/a/resource"], id="a resource that is none"),
        pytest.param({"groups": {"a": GPUS | {"hostPid": True}}}, ["/groups/a", "hostPid"], id="a misspelt name"),
        pytest.param({"groups": {"a": GPUS | {"terminationGracePeriodSeconds": 10}}}, ["minimum"], id="no time to end"),
        pytest.param({"groups": {"a": GPUS | {"workersMin": 5}}}, ["groups.a.workersMin is above"], id="bounds"),
        pytest.param({"groups": {"a": SIMULATED | {"devices": "2:192GiB"}}}, ["need a model, such as 2:mi300x"], id="no model"),
        pytest.param({"autoscaler": {"mode": "off"}}, ["/autoscaler/mode", "'active', 'shadow'"], id="mode"),
        pytest.param({"autoscaler": {"prometheusUrl": "http://me:pw@p:9090"}}, ["prometheusUrl"], id="a password in a URL"),
        pytest.param({"tls": TLS}, ["the autoscaler needs autoscaler.prometheusUrl"], id="metrics of pods over TLS"),
        pytest.param({"store": {"enabled": False}}, ["store.existingSecret must name a Secret"], id="no store"),
        pytest.param({"store": {"keys": {"url": "x"}}}, ["name the Secret"], id="keys of no Secret"),
        pytest.param({"store": {"url": "redis://:pw@h"}}, ["/store", "url"], id="a password in the values"),
        pytest.param({"results": {"url": "/srv/results"}}, ["/results/url"], id="a folder of each pod's own"),
        pytest.param({"results": {"url": "s3://b/f", "existingClaim": "c"}}, ["name one of them"], id="two places for results"),
        pytest.param({"results": {"existingSecret": "s"}}, ["results.url, which is empty"], id="credentials for nothing"),
        pytest.param({"apiKey": "ry_0123456789abcdef"}, ["/apiKey", "want object"], id="a key in the values"),
        pytest.param(
            {"settings": {"store": {"url": "redis://:pw@h"}}}, ["settings.store.url is the chart's own"], id="a secret setting"
        ),
        pytest.param({"settings": {"groups": {}}}, ["settings.groups is the chart's own"], id="a setting of the chart's"),
        pytest.param({"networkPolicy": {"apiFrom": [{}]}}, ["/networkPolicy/apiFrom/0"], id="a peer that is everybody"),
        pytest.param({"networkPolicy": {"kubernetesApi": {"cidrs": []}}}, ["cidrs"], id="no way to Kubernetes"),
        pytest.param({"image": {"digest": "sha256:abc"}}, ["/image/digest"], id="half a digest"),
    ],
)
def test_wrong_values_are_refused_with_their_place(values, words) -> None:
    said = refusal(values)
    assert [word for word in words if word not in said] == [], said


def uncommented(name: str) -> dict:
    """The example above an empty value, as values."""
    text = (helm.CHART / "values.yaml").read_text()
    match = re.search(rf"# Example:\n((?:#.*\n)+){name}: {{}}\n", text)
    assert match is not None
    return yaml.safe_load(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))


def test_the_example_of_a_group_is_right_and_names_all_that_it_may_have() -> None:
    example = uncommented("groups")
    manifests = render(example)
    assert find(manifests, "StatefulSet", "rocyard-node-mi300x")
    schema = json.loads((helm.CHART / "values.schema.json").read_text())
    assert set(example["groups"]["mi300x"]) == set(schema["definitions"]["group"]["properties"])


def test_the_example_of_a_group_shows_the_defaults() -> None:
    example = uncommented("groups")
    shown = {key: value for key, value in example["groups"]["mi300x"].items() if key != "supplementalGroups"}
    bare = {"groups": {"mi300x": {"devices": "8:mi300x"}}}
    shown_manifests = [m for m in render({"groups": {"mi300x": shown}}) if m["kind"] != "Secret"]
    assert shown_manifests == [m for m in render(bare) if m["kind"] != "Secret"]


def test_the_example_of_settings_is_right(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rocyard.yaml").write_text(settings_text(render(uncommented("settings"))))
    assert load_settings(tmp_path / "rocyard.yaml", {}, {}).tasks.time_limit_s == 7200


def test_every_value_has_its_meaning_and_stands_in_the_schema() -> None:
    schema = json.loads((helm.CHART / "values.schema.json").read_text())
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())

    def compare(known: dict, given: dict, path: str) -> None:
        assert set(given) == set(known["properties"]) - {"global"}, path
        assert known["additionalProperties"] is False
        for name, inner in given.items():
            if "properties" in known["properties"][name]:
                compare(known["properties"][name], inner, f"{path}.{name}")

    compare(schema, values, "values")


def test_the_page_names_every_value_and_has_the_stores_users_right() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    assert [name for name in values if f"`{name}`" not in text and f"`{name}." not in text] == []
    assert [name for name in values["networkPolicy"] if f"{name}`" not in text and name != "enabled"] == []
    users = find(render(), "Secret", "rocyard-store")["stringData"]["users.acl"].splitlines()
    rights = [re.sub(r"^.*?#[0-9a-f]{64} ", "", line) for line in users]
    assert [right for right in rights if right not in text] == []
