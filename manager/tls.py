"""Mutual TLS, from one folder: which files a role uses, and every TLS context that is made of them.

The folder is `tls.directory`, as ``rocyard certs`` makes it: ``ca.pem``, and ``ROLE.pem`` with ``ROLE.key`` for each role. A
process is handed the files of its own role and reads no other key. Owns the least version of TLS. Must not import Dask or
redis: those take paths, and a URL that names them.
"""

import contextlib
import socket
import ssl
import stat
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec

from manager.core.addresses import dialled, in_url, is_loopback, is_wildcard
from manager.core.errors import SettingsError
from manager.settings import Secret, Settings, TlsSettings

CA_NAME: Final = "ca.pem"
VERSION_MIN: Final = ssl.TLSVersion.TLSv1_3
STORE_VERSION_MIN: Final = ssl.TLSVersion.TLSv1_2
"""A store of one's own may be older; the embedded one is told to speak 1.3 alone."""
_PURPOSE: Final = 26
"""OpenSSL's code for a certificate that is for other uses: the store's is for no client."""
_SECURE_SCHEMES: Final = frozenset({"rediss", "unix"})


class Role(StrEnum):
    """Who a certificate is for. The name stands in its subject, as OU."""

    STORE = "store"
    SCHEDULER = "scheduler"
    CONTROLLER = "controller"
    API = "api"
    NODE = "node"
    AUTOSCALER = "autoscaler"
    CLIENT = "client"


class TlsFiles(msgspec.Struct, frozen=True):
    """Paths of one role's files: the cluster's CA, its own certificate, the key of that."""

    ca: str
    certificate: str
    key: str


def tls_files(tls: TlsSettings, role: Role) -> TlsFiles | None:
    """The files of `role`; None where TLS is off.

    Raises:
        SettingsError: one is missing, everybody may read the key, or others would not believe the certificate.
    """
    if not tls.directory:
        return None
    folder = Path(tls.directory).expanduser().absolute()
    found = TlsFiles(*(str(folder / name) for name in (CA_NAME, f"{role}.pem", f"{role}.key")))
    for path in (found.ca, found.certificate, found.key):
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise SettingsError(
                f"tls.directory: {path} cannot be read ({error.strerror}): 'rocyard certs {folder}' makes the files of a "
                "new cluster, and --node those of one more machine"
            ) from None
    # A group may read it: that is how Kubernetes hands a secret to a process that is not root.
    if Path(found.key).stat().st_mode & stat.S_IRWXO:
        raise SettingsError(f"tls.directory: {found.key} is open to everybody: chmod 600 {found.key}")
    _check_believed(found, f"'rocyard certs {folder} --renew' makes all of them anew, where the authority's key is kept")
    return found


def _check_believed(files: TlsFiles, remedy: str) -> None:
    """What others would refuse later, one by one and in words of OpenSSL, is told at once: a file that is none, another
    certificate's key, another authority, an end that has come.

    Raises:
        SettingsError: they would.
    """
    connects = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    connects.check_hostname, connects.verify_mode = False, ssl.CERT_NONE
    try:
        connects.load_cert_chain(files.certificate, files.key, password="")  # an encrypted key must not make it ask
        listens = server_context(files)
    except ssl.SSLError as error:
        why = error.reason or "no PEM, or an encrypted key"
        raise SettingsError(
            f"tls.directory: {files.certificate} and {files.key} are no certificate with its key ({why}): {remedy}"
        ) from None
    try:
        listens.load_verify_locations(files.ca)
    except ssl.SSLError:
        raise SettingsError(f"tls.directory: {files.ca} is no certificate: copy the cluster's ca.pem there") from None
    listens.verify_mode = ssl.CERT_REQUIRED
    try:
        _shake_hands(listens, connects)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code != _PURPOSE:
            raise SettingsError(
                f"tls.directory: {files.certificate} is not believed by who has {files.ca} ({error.verify_message}): {remedy}"
            ) from None


def _shake_hands(listens: ssl.SSLContext, connects: ssl.SSLContext) -> None:
    """Two contexts meet in memory.

    Raises:
        ssl.SSLError: they do not come together.
    """
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (connects.wrap_bio(back, there), listens.wrap_bio(there, back, server_side=True))
    for _ in range(3):  # TLS 1.3 takes two turns
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


def settings_for(settings: Settings, role: Role) -> Settings:
    """The settings as a process of `role` uses them: its URLs of the store name its certificate.

    Raises:
        SettingsError: a file of the role is missing, or the store's URL is a plain one.
    """
    files = tls_files(settings.tls, role)
    if files is None:
        return settings
    store = settings.store
    named = msgspec.structs.replace(store, url=_named(store.url, files), worker_url=_named(store.worker_url, files))
    return msgspec.structs.replace(settings, store=named)


def dask_address(settings: Settings) -> str:
    """Where the processes of this cluster reach the Dask scheduler."""
    scheme = "tls" if settings.tls.directory else "tcp"
    return f"{scheme}://{in_url(dialled(settings.dask.host))}:{settings.dask.port}"


def api_url(settings: Settings) -> str:
    """Where this machine reaches the API."""
    scheme = "https" if settings.tls.directory else "http"
    return f"{scheme}://{in_url(dialled(settings.api.host))}:{settings.api.port}"


def dashboard_url(settings: Settings) -> str:
    """Where this machine reaches the Dask dashboard."""
    scheme = "https" if settings.tls.directory else "http"
    return f"{scheme}://{in_url(dialled(settings.dask.host))}:{settings.dask.dashboard_port}"


def bare_url(url: str) -> str:
    """A URL of the store without the names of our files."""
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if not name.startswith("ssl_")]
    return urlunsplit(parts._replace(query=urlencode(kept)))


def _named(url: Secret, files: TlsFiles) -> Secret:
    if not url.value:
        return url
    parts = urlsplit(url.value)
    if parts.scheme not in _SECURE_SCHEMES:
        raise SettingsError(
            f"store.url is {parts.scheme}://, but tls.directory is set: give the store TLS and write rediss://, or leave "
            "tls.directory empty"
        )
    given = parse_qsl(parts.query)
    if parts.scheme == "unix" or any(name.startswith("ssl_") for name, _ in given):
        return url  # who names files of their own means them
    names = {"ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": files.key}
    return Secret(urlunsplit(parts._replace(query=urlencode([*given, *names.items()], safe="/"))))


# --- contexts -----------------------------------------------------------------------------------------------------


def client_context(ca: str, certificate: str = "", key: str = "", least: ssl.TLSVersion = VERSION_MIN) -> ssl.SSLContext:
    """For who connects: the other side must be of `ca` (empty: of an authority that this machine trusts) and be the host
    that was meant.

    Args:
        ca: path of the authority's certificate.
        certificate: path of one's own, for who asks for one.
        key: path of its key; empty where the certificate's file holds it too.
        least: oldest version of TLS.
    """
    context = ssl.create_default_context(cafile=ca or None)
    context.minimum_version = least
    if certificate:
        context.load_cert_chain(certificate, key or None)
    return context


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For who listens and asks no certificate of others: the API and metrics."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSION_MIN
    context.load_cert_chain(files.certificate, files.key)
    return context


def metrics_context(settings: Settings, role: Role, host: str) -> ssl.SSLContext | None:
    """For ``/metrics`` on `host`: where TLS is on and others than this machine can connect; else it is served plain."""
    files = tls_files(settings.tls, role)
    return None if files is None or is_loopback(host) else server_context(files)


def metrics_url(host: str, port: int, context: ssl.SSLContext | None) -> str:
    """Where others find ``/metrics`` that is served on `host` with `context`; every address goes by this machine's name."""
    named = socket.gethostname() if is_wildcard(host) else host
    return f"{'http' if context is None else 'https'}://{in_url(named)}:{port}/metrics"


def dask_security(files: TlsFiles, side: str) -> dict[str, Any]:
    """Arguments of Dask's ``Security``: mutual TLS or nothing.

    Args:
        files: of the process's role.
        side: what it is to Dask: ``scheduler``, ``worker`` or ``client``.
    """
    return {
        "require_encryption": True,
        "tls_min_version": VERSION_MIN,
        "tls_ca_file": files.ca,
        f"tls_{side}_cert": files.certificate,
        f"tls_{side}_key": files.key,
    }
