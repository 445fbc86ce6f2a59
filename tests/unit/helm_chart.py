"""The chart as a real Helm renders it: manifests as dictionaries, and Kubernetes' own schemas for them.

Where the wheels are missing the tests are skipped, and where CI is set they fail.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "rocyard"
KUBERNETES = ("1.25.0", "1.37.0")
"""Whose schemas the manifests are held to, strictly: the oldest that Chart.yaml admits, and the newest that the package has."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times faster, where PyYAML was built with it."""
CUSTOM = {"ServiceMonitor"}
"""Kinds that clusters add: no schema of theirs is at hand."""


def needed(module: str) -> Any:
    """A test-only package."""
    if os.environ.get("CI"):
        return __import__(module)
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[test]'")


@functools.cache
def chart() -> Any:
    needed("helm_python")
    from helm_python.chart import Chart

    return Chart.load(CHART)


def render(values: dict | None = None, name: str = "rocyard", namespace: str = "gpu") -> list[dict]:
    """All manifests."""
    files = chart().render(values or {}, name=name, namespace=namespace)
    texts = [text for path, text in files.items() if not path.endswith(".txt")]
    return [doc for text in texts for doc in yaml.load_all(text, Loader=LOADER) if doc]


def notes(values: dict | None = None) -> str:
    files = chart().render(values or {}, name="rocyard", namespace="gpu")
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


def refusal(values: dict) -> str:
    """What Helm says to values that it refuses."""
    from helm_python.errors import HelmError

    with pytest.raises(HelmError) as caught:
        render(values)
    return str(caught.value)


def find(manifests: list[dict], kind: str, name: str) -> dict:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def names(manifests: list[dict], kind: str) -> set[str]:
    return {m["metadata"]["name"] for m in manifests if m["kind"] == kind}


def pods(manifests: list[dict]) -> Iterator[tuple[str, dict]]:
    """The name and specification of each pod that the manifests lead to."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]
        elif manifest["kind"] in {"Deployment", "StatefulSet"}:
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def pod(manifests: list[dict], name: str) -> dict:
    return dict(pods(manifests))[name]


def environment(spec: dict) -> dict[str, Any]:
    """The variables of a pod's one container: values, or where they come from."""
    (container,) = spec["containers"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", [])}


def settings_text(manifests: list[dict]) -> str:
    (found,) = [m for m in manifests if m["kind"] == "ConfigMap" and "rocyard.yaml" in m["data"]]
    return found["data"]["rocyard.yaml"]


def problems(manifest: dict) -> list[str]:
    """What the schemas of Kubernetes have against it."""
    return [
        f"{version}: {'.'.join(map(str, error.instance_path))}: {error.message}"
        for version in KUBERNETES
        for error in _validator(version, manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
    ]


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema_rs.Draft202012Validator:
    # What kubernetes_validate.validate does, a thousand times faster: it reads its files anew for each manifest.
    group, _, number = api_version.partition("/")
    name = f"{group.split('.')[0]}-{number}" if number else group
    return jsonschema_rs.Draft202012Validator(_schema(version, f"{kind.lower()}-{name}"), registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> jsonschema_rs.Registry:
    definitions = _schema(version, "_definitions")
    return jsonschema_rs.Registry([(definitions["$id"], definitions)])


def _schema(version: str, name: str) -> dict:
    needed("kubernetes_validate")
    from kubernetes_validate.utils import schema_contents

    return schema_contents(f"kubernetes-json-schema/v{version}-local-strict/{name}.json", version)
