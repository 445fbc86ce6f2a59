"""A whole cluster with TLS on: what it runs, whom it refuses, and a second machine (by other addresses) that joins it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from distributed import Security
from distributed.comm import connect as dask_connect

from manager.certs import make_certificates
from manager.client import Client
from manager.client_errors import ClusterUnreachable
from manager.core.answers_nodes import WorkerState
from manager.core.errors import StoreUnavailable
from manager.core.lifecycle import TaskStatus
from manager.core.requests import KeyScope
from manager.settings import TlsSettings
from manager.store.store import connect
from manager.tls import Role, TlsFiles, client_context, dask_security, tls_files
from tests.integration.cluster import Cluster, eventually

pytestmark = [pytest.mark.timeout(240), pytest.mark.integration]

HEAD = "127.0.0.2"
SECOND = "127.0.0.3"


def files(folder: Path, role: Role) -> TlsFiles:
    found = tls_files(TlsSettings(directory=str(folder)), role)
    assert found is not None
    return found


def named(url: str, given: TlsFiles) -> str:
    return f"{url}?ssl_ca_certs={given.ca}&ssl_certfile={given.certificate}&ssl_keyfile={given.key}"


class TlsCluster(Cluster):
    """A cluster that listens on `HEAD` with TLS."""

    def __init__(self, directory: Path) -> None:
        self.certs = directory / "certs"
        make_certificates(self.certs, (HEAD,), 2)
        make_certificates(self.certs, (SECOND,), 2, node="second")
        hosts = {f"ROCYARD_{part}__HOST": HEAD for part in ("API", "DASK", "STORE")}
        super().__init__(directory, {**hosts, "ROCYARD_TLS__DIRECTORY": str(self.certs)}, "1x1:mi300x")

    def kept(self) -> dict:
        return json.loads((self.directory / "data" / "store.json").read_text())

    def store_url(self) -> str:
        kept = self.kept()
        return named(f"rediss://rocyard:{kept['password']}@{HEAD}:{kept['port']}/0", files(self.certs, Role.CLIENT))

    def dask_address(self) -> str:
        return super().dask_address().replace("tcp://", "tls://")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsCluster]:
    cluster = TlsCluster(tmp_path_factory.mktemp("tls"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of another cluster, for the same hosts."""
    folder = tmp_path_factory.mktemp("strangers") / "certs"
    make_certificates(folder, (HEAD,), 2)
    return folder


def said(host: str, port: int, words: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """All that a server answers to `words`; nothing where it hangs up."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5) as plain:
        plain.settimeout(5)
        peer = plain if context is None else context.wrap_socket(plain, server_hostname=host)
        with peer:
            peer.sendall(words)
            return peer.recv(4096)
    return b""


def test_a_task_runs(cluster: TlsCluster) -> None:
    assert cluster.client.address.url.startswith(f"https://{HEAD}:")
    assert cluster.client.submit("echo", {"x": 1}).result(30) == {"x": 1}


def test_no_port_takes_a_plain_connection(cluster: TlsCluster) -> None:
    ports = {
        (found.laddr.ip, found.laddr.port)
        for process in cluster.family()
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }
    secure = {place for place in ports if place[0] == HEAD}
    assert len(secure) >= 5, "store, scheduler, dashboard, API, Dask worker"
    assert {place[0] for place in ports - secure} == {"127.0.0.1"}, "/metrics, on loopback"
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    for host, port in secure:
        for words in (b"GET /livez HTTP/1.0\r\n\r\n", b"PING\r\n"):
            assert said(host, port, words)[:1] in {b"", b"\x15"}, f"{port} answers {words!r}"  # \x15: an alert of TLS
        with socket.create_connection((host, port), 5) as plain, anybody.wrap_socket(plain) as peer:
            assert peer.version() == "TLSv1.3"


def test_the_store_takes_only_certificates_of_its_own_authority(cluster: TlsCluster, strangers: Path) -> None:
    kept = cluster.kept()
    place = f"rocyard:{kept['password']}@{HEAD}:{kept['port']}/0"
    ours, theirs = files(cluster.certs, Role.CLIENT), files(strangers, Role.CLIENT)

    async def ping(url: str) -> None:
        store = connect(url, 3.0, "test")
        try:
            await store.ping()
        finally:
            await store.connection.close()

    asyncio.run(ping(cluster.store_url()))
    bare = f"rediss://{place}?ssl_ca_certs={ours.ca}"
    mixed = f"{bare}&ssl_certfile={theirs.certificate}&ssl_keyfile={theirs.key}"
    for refused in (f"redis://{place}", bare, mixed, named(f"rediss://{place}", theirs)):
        with pytest.raises(StoreUnavailable):
            asyncio.run(ping(refused))
    other_name = cluster.store_url().replace(f"@{HEAD}:", "@127.0.0.9:")
    with pytest.raises(StoreUnavailable):
        asyncio.run(ping(other_name))


def test_the_scheduler_takes_only_certificates_of_its_own_authority(cluster: TlsCluster, strangers: Path) -> None:
    async def reach(address: str, given: TlsFiles | None) -> None:
        arguments = {} if given is None else Security(**dask_security(given, "client")).get_connection_args("client")
        comm = await dask_connect(address, timeout=1.5, **arguments)
        await comm.close()

    address = cluster.dask_address()
    asyncio.run(reach(address, files(cluster.certs, Role.CLIENT)))
    for place, given in ((address.replace("tls://", "tcp://"), None), (address, files(strangers, Role.CLIENT))):
        with pytest.raises(OSError):  # noqa: PT011 -- whichever of its kinds
            asyncio.run(reach(place, given))


def test_the_api_is_believed_by_its_own_authority_alone(cluster: TlsCluster, strangers: Path) -> None:
    url, key = cluster.client.address.url, cluster.client.address.api_key.value
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https://", "http://") + "/livez", timeout=5)
    for ca in ("", str(strangers / "ca.pem")):
        with Client.at(url, key, ca) as client, pytest.raises(ClusterUnreachable, match="ROCYARD_CA"):
            client.status()
    assert httpx.get(f"{url}/livez", verify=client_context(cluster.client.address.ca)).status_code == 200


def test_keys_still_decide_who_may_ask_for_passwords(cluster: TlsCluster) -> None:
    address = cluster.client.address
    key = cluster.client.create_key("vision", KeyScope.USER).key
    answer = httpx.get(f"{address.url}/v1/join", verify=client_context(address.ca), headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 403
    assert "rediss" not in answer.text


def test_a_backup_is_made_over_tls(cluster: TlsCluster, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "manager.cli.main", "backup", str(tmp_path / "b"), "--output", "json"]
    done = subprocess.run(argv, env=cluster.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] > 0


def test_certificates_are_renewed_while_tasks_run(cluster: TlsCluster) -> None:
    gate = cluster.directory / "gate"
    task = cluster.client.submit("until", {"path": str(cluster.witness_path), "gate": str(gate)})
    cluster.wait_started(task)
    places = {
        "store": (HEAD, cluster.kept()["port"]),
        "scheduler": (HEAD, urlsplit(cluster.dask_address()).port),
        "api": (HEAD, urlsplit(cluster.client.address.url).port),
    }
    make_certificates(cluster.certs, (), 2, renew=True)
    for role, place in places.items():
        new = ssl.PEM_cert_to_DER_cert((cluster.certs / f"{role}.pem").read_text())

        def shows(place: tuple[str, int] = place) -> bytes:
            with contextlib.suppress(OSError):
                return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(place, timeout=2))
            return b""

        assert shows() != new, "a certificate of an earlier start"
        old = cluster.role(role)
        old.terminate()
        gone, _ = psutil.wait_procs([old], 8)
        assert gone, f"something holds up the end of {role}: is it a client's idle connection?"
        cluster.wait_role(role, old.pid)
        eventually(lambda new=new, shows=shows: shows() == new, 20, f"{role} with its new certificate")
    eventually(lambda: [w.state for w in cluster.client.workers()] == [WorkerState.LIVE], 30, "the Dask worker's return")
    gate.touch()
    (view,) = cluster.wait_all([task])
    assert (view.status, view.attempt) == (TaskStatus.SUCCEEDED, 1)
    assert cluster.client.submit("echo", {"x": 3}).result(30) == {"x": 3}


@contextlib.contextmanager
def joined(cluster: TlsCluster, folder: Path, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """``rocyard node --join`` as on another machine: a folder, addresses and devices of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCYARD_")}
    own = {
        "ROCYARD_DATA_DIR": str(folder / "data"),
        "ROCYARD_API_KEY": cluster.client.address.api_key.value,
        "ROCYARD_NODE__HOST": SECOND,
        "ROCYARD_NODE__DEVICES": "simulated",
        "ROCYARD_NODE__SIMULATE": "2x4:mi300x",
        "ROCYARD_NODE__SIMULATED_NODE": "1",  # other devices than the first machine's
    }
    command = [sys.executable, "-m", "manager.cli.main", "node", *arguments]
    with (folder / "node.log").open("wb") as output:
        process = subprocess.Popen(
            command, env={**kept, **own, **environ}, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_second_machine_joins_and_runs_tasks(cluster: TlsCluster, tmp_path: Path) -> None:
    url = cluster.client.address.url
    arguments = ("--join", url, "--certs", str(cluster.certs / "nodes" / "second"), "--name", "second")
    with joined(cluster, tmp_path, *arguments) as agent:

        def live() -> bool:
            assert agent.poll() is None, (tmp_path / "node.log").read_text()
            return any(w.node == "second" and w.state is WorkerState.LIVE for w in cluster.client.workers())

        eventually(live, 60, "the second machine among the workers")
        task = cluster.client.submit("echo", {"x": 2}, gpus=4)  # as many as only that machine has
        assert task.result(60) == {"x": 2}
        assert task.view().node == "second"
        addresses = {row.node: urlsplit(row.address) for row in cluster.state().nodes}
        assert {node: (place.scheme, place.hostname) for node, place in addresses.items()} == {
            "node-0": ("tls", HEAD),
            "second": ("tls", SECOND),
        }
        row = next(row for row in cluster.state().nodes if row.node == "second")
        assert row.info.pid == agent.pid
    eventually(lambda: any(row.node == "second" and row.left for row in cluster.state().nodes), 20, "its leave")


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        pytest.param((), {}, "--certs is missing", id="no certificates"),
        pytest.param(("--certs", "STRANGERS"), {}, "is not believed", id="another authority"),
        pytest.param(("--certs", "OWN"), {"ROCYARD_API_KEY": "ry_aaaaaaaa_" + "A" * 43}, "key is not valid", id="no key"),
        pytest.param(("--certs", "NOWHERE"), {}, "rocyard certs", id="no folder"),
    ],
)
def test_who_cannot_join_is_told_why(
    cluster: TlsCluster, strangers: Path, tmp_path: Path, arguments: tuple[str, ...], environ: dict[str, str], words: str
) -> None:
    folders = {"OWN": cluster.certs / "nodes" / "second", "STRANGERS": strangers, "NOWHERE": tmp_path / "nowhere"}
    given = [str(folders.get(word, word)) for word in arguments]
    with joined(cluster, tmp_path, "--join", cluster.client.address.url, *given, **environ) as agent:
        assert agent.wait(60) != 0
    assert words in (tmp_path / "node.log").read_text()
