"""The chart's roles as processes: each started as its container starts it, with the variables and files that were rendered.

What stands in for Kubernetes is loopback: names of Services and addresses of pods become 127.0.0.1, mounted folders become real
ones, and ports free ones. So nobody hands settings from role to role here, as `rocyard up` does.
"""

import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manager.certs import make_certificates
from manager.ports import free_port
from tests.integration.cluster import eventually
from tests.integration.test_helm_store import ChartStore
from tests.unit import helm_chart as helm

pytestmark = pytest.mark.integration
PORTS = (8000, 8786, 8787, 9101, 9102, 9103)
ROLES = ("scheduler", "controller", "node-sim", "api")
VALUES = {
    "groups": {"sim": {"devices": "2:mi300x", "resource": "none", "terminationGracePeriodSeconds": 60}},
    "autoscaler": {"enabled": False},
}


class Roles:
    """Processes of one release."""

    def __init__(self, folder: Path, store: ChartStore, certificates: Path | None) -> None:
        self.folder = folder
        self.certificates = certificates
        self.manifests = helm.render(VALUES | ({"tls": {"existingSecret": "certificates"}} if certificates else {}))
        self.ports = {port: free_port("127.0.0.1") for port in PORTS}
        self.key = helm.find(self.manifests, "Secret", "rocyard-api-key")["stringData"]["api-key"]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        verify = ssl.create_default_context(cafile=certificates / "ca.pem") if certificates else True
        headers = {"authorization": f"Bearer {self.key}"}
        self.client = httpx.Client(headers=headers, timeout=20, trust_env=False, verify=verify)
        text = self._local(helm.settings_text(self.manifests))
        for port, here in self.ports.items():
            text = re.sub(rf"port: {port}$", f"port: {here}", text, flags=re.MULTILINE)
        (folder / "rocyard.yaml").write_text(text)
        for name, content in {"store-url": store.url, "worker-url": store.worker_url, "api-key": self.key}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o440)

    def _local(self, text: str) -> str:
        text = text.replace("rocyard-scheduler", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
        text = text.replace("/etc/rocyard/", f"{self.folder}/").replace("/run/secrets/rocyard/", f"{self.folder}/")
        return text.replace("/run/secrets/rocyard-tls", str(self.certificates)).replace(
            "/var/lib/rocyard", f"{self.folder}/data"
        )

    def start(self, role: str) -> None:
        spec = helm.pod(self.manifests, f"rocyard-{role}")
        fields = {"status.podIP": "127.0.0.1", "metadata.name": f"rocyard-{role}-0"}
        variables = {
            name: self._local(value) if isinstance(value, str) else fields[value["fieldRef"]["fieldPath"]]
            for name, value in helm.environment(spec).items()
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
        argv = (str(Path(sys.executable).with_name("rocyard")), *spec["containers"][0]["args"])
        log = (self.folder / f"{role}.log").open("ab")
        with log:
            environ = kept | variables | {"PYTHONSAFEPATH": "1"}
            self.processes[role] = subprocess.Popen(argv, env=environ, cwd=self.folder, stdout=log, stderr=log)

    def get(self, port: int, path: str) -> httpx.Response | None:
        try:
            return self.client.get(self.url(port, path))
        except httpx.TransportError:
            for role, process in self.processes.items():
                assert process.poll() is None, f"{role} ended: {(self.folder / f'{role}.log').read_text()[-2000:]}"
            return None

    def url(self, port: int, path: str) -> str:
        # Agents and controller serve plain metrics on loopback, which a pod's address is not.
        secure = self.certificates is not None and port in {8000, 8787}
        return f"{'https' if secure else 'http'}://127.0.0.1:{self.ports[port]}{path}"

    def stop(self) -> None:
        self.client.close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module", params=["plain", "tls"])
def roles(request, tmp_path_factory) -> Iterator[Roles]:
    helm.needed("helm_python")
    certificates = tmp_path_factory.mktemp("certificates") if request.param == "tls" else None
    if certificates:
        make_certificates(certificates, ("rocyard-store", "rocyard-api"), 1)
    store = ChartStore(tmp_path_factory.mktemp("store"), certificates)
    store.start()
    roles = Roles(tmp_path_factory.mktemp("roles"), store, certificates)
    try:
        for role in ROLES:
            roles.start(role)
        yield roles
    finally:
        roles.stop()
        store.kill()


def probes(role: str) -> Iterator[tuple[int, str]]:
    """Port and path of each probe of a role."""
    (container,) = helm.pod(helm.render(VALUES), f"rocyard-{role}")["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if kind in container:
            yield ports[container[kind]["httpGet"]["port"]], container[kind]["httpGet"]["path"]


@pytest.mark.parametrize("role", ROLES)
def test_every_probe_is_answered(roles, role):
    for port, path in probes(role):
        eventually(
            lambda port=port, path=path: (a := roles.get(port, path)) is not None and a.status_code == 200, 40, f"{role} {path}"
        )


def test_a_task_runs_on_the_node_of_the_group(roles):
    def nodes() -> list[dict]:
        answer = roles.get(8000, "/v1/workers")
        return answer.json()["workers"] if answer is not None and answer.status_code == 200 else []

    (node,) = eventually(nodes, 40, "the node is registered")
    assert (node["node"], node["group"]) == ("rocyard-node-sim-0", "sim")
    assert len(node["devices"]) == 2
    url = roles.url(8000, "/v1/tasks")
    made = eventually(
        lambda: (a := roles.client.post(url, json={"function": "echo", "args": {"x": 7}})).is_success and a, 20, "accepted"
    )
    done = roles.client.get(f"{url}/{made.json()['task_id']}?wait=15").json()
    assert (done["status"], done["result"]) == ("SUCCEEDED", {"x": 7}), done


def test_a_node_that_is_ended_leaves_at_once_when_it_has_nothing_to_do(roles):
    """Its pod has a minute, but nobody waits for idle slots."""
    node = roles.processes["node-sim"]
    node.send_signal(signal.SIGTERM)
    assert node.wait(20) == 0
