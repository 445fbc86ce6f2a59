"""A cluster's certificates: one authority, one certificate for each role, and one for each further node.

Owns what stands in a certificate and how the folder is laid out. Needs the package cryptography, and nothing else of
Rocyard does. It never replaces an authority, nor a certificate unless it is told to renew. Keys are readable by their owner
alone from their first moment.
"""

import datetime as dt
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from manager.core.errors import BadRequest, RocyardError
from manager.tls import CA_NAME, Role

CA_KEY_NAME: Final = "ca.key"
NODES_NAME: Final = "nodes"
CA_DAYS: Final = 3650
CLOCK_SKEW: Final = dt.timedelta(hours=1)
"""Certificates hold from so long ago, for machines whose clocks are late."""
LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_NODE: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class CertificateView(msgspec.Struct, frozen=True):
    """A certificate in the folder.

    Attributes:
        role: who it is for: ``ca``, or one of `Role`.
        name: of the node, for one made with ``--node``.
        hosts: names and addresses that it proves.
        certificate, key: paths.
    """

    role: str
    name: str
    hosts: tuple[str, ...]
    certificate: str
    key: str
    expires_at: dt.datetime


class Certificates(msgspec.Struct, frozen=True):
    """What lies in the folder now, and what of it this call made."""

    directory: str
    ca: str
    made: tuple[str, ...]
    certificates: tuple[CertificateView, ...]


class _Authority(msgspec.Struct, frozen=True):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(directory: Path, hosts: Sequence[str], days: int, *, node: str = "", renew: bool = False) -> Certificates:
    """Make a cluster's certificates, or one for one more node, or all that there are anew.

    Args:
        directory: the folder; it is made.
        hosts: more names and addresses by which the cluster, or the node, is reached. None at a renewal keeps what was.
        days: how long they hold.
        node: make only this node's, in a folder of its own to be copied to its machine.
        renew: make them anew under the same authority.

    Raises:
        BadRequest: a name that is none, or there are certificates already and none were to be renewed.
        RocyardError: the folder or the authority's key cannot be used.
    """
    directory = directory.expanduser().absolute()
    for host in hosts:
        _general_name(host)
    if node and not _NODE.fullmatch(node):
        raise BadRequest(f"{node[:80]!r} cannot name a node: use a-z, 0-9, '.' and '-', at most 63")
    try:
        made = _make(directory, tuple(hosts), days, node, renew=renew)
        return list_certificates(directory, made)
    except OSError as error:
        raise RocyardError(f"{error.filename or directory} cannot be used: {error.strerror}") from error


def list_certificates(directory: Path, made: Sequence[str] = ()) -> Certificates:
    """What lies in the folder."""
    found = [_view(directory / CA_NAME, directory / CA_KEY_NAME, "ca", "")]
    found += [
        _view(path, path.with_suffix(".key"), path.stem, "") for role in Role if (path := directory / f"{role}.pem").exists()
    ]
    for path in sorted((directory / NODES_NAME).glob("*/node.pem")):
        found.append(_view(path, path.with_suffix(".key"), Role.NODE, path.parent.name))
    return Certificates(str(directory), str(directory / CA_NAME), tuple(made), tuple(found))


def _make(directory: Path, hosts: tuple[str, ...], days: int, node: str, *, renew: bool) -> tuple[str, ...]:
    """Write what is asked for; the paths of the certificates."""
    exists = (directory / CA_NAME).exists()
    if (node or renew) and not exists:
        raise BadRequest(f"{directory} has no authority yet: 'rocyard certs {directory}' makes one, with all certificates")
    if exists and not node and not renew:
        raise BadRequest(
            f"{directory} has certificates already: --renew makes them anew under the same authority; for a new authority "
            "choose another folder, and then restart the whole cluster with it"
        )
    if node and not renew and (directory / NODES_NAME / node / CA_NAME).exists():
        raise BadRequest(f"there is a certificate for {node} already: --renew makes it anew")
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True)
    elif not exists and any(directory.iterdir()):
        # It may be anybody's, /etc among them: neither its mode is ours to change, nor are keys to lie among other files.
        raise BadRequest(f"{directory} holds other files: name a folder that is empty, or one that is not there yet")
    directory.chmod(0o700)
    authority = _read_authority(directory) if exists else _make_authority(directory)
    targets: list[tuple[Path, Role, str]] = []
    if not node:
        targets += [(directory, role, "") for role in Role]
    names = [node] if node else sorted(path.parent.name for path in (directory / NODES_NAME).glob("*/node.pem"))
    targets += [(directory / NODES_NAME / name, Role.NODE, name) for name in names]
    made = []
    for folder, role, name in targets:
        path = folder / f"{role}.pem"
        known = _hosts_of(path) if renew and not hosts and path.exists() else (*_own_hosts(name), *hosts)
        _issue(authority, folder, role, name, tuple(dict.fromkeys(known)), days)
        made.append(str(path))
    return tuple(made)


def _own_hosts(node: str) -> tuple[str, ...]:
    if node:
        return (node,)
    name = socket.gethostname()
    return (*LOOPBACK_HOSTS, name) if _HOST.fullmatch(name) else LOOPBACK_HOSTS


def _make_authority(directory: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    mark = os.urandom(4).hex()  # two clusters' authorities are told apart by people
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Rocyard CA {mark}")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        _builder(name, name, key, now, now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    # The key first: a certificate without its key would be taken for a whole authority.
    _write(directory / CA_KEY_NAME, _key_pem(key), 0o600)
    _write(directory / CA_NAME, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return _Authority(certificate, key)


def _read_authority(directory: Path) -> _Authority:
    path = directory / CA_KEY_NAME
    if not path.exists():
        raise RocyardError(f"{path} is not there: certificates are made where the authority's key is kept")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((directory / CA_NAME).read_bytes())
    except (ValueError, TypeError) as error:
        raise RocyardError(f"the authority in {directory} is damaged: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise RocyardError(f"{path} is not the key of {directory / CA_NAME}")
    return _Authority(certificate, key)


def _issue(authority: _Authority, folder: Path, role: Role, node: str, hosts: tuple[str, ...], days: int) -> None:
    """Write one certificate with its key, and the authority's certificate beside them where it is a folder of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    ends = min(now + dt.timedelta(days=days), authority.certificate.not_valid_after_utc)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, node or f"rocyard-{role}"),
        ]
    )
    # A client's proves no host: whoever has it must not pass for the API.
    is_server = role is not Role.CLIENT
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if is_server else [])
    builder = (
        _builder(subject, authority.certificate.subject, key, now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if is_server:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _write(folder / f"{role}.key", _key_pem(key), 0o600)
    _write(folder / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    if node:
        _write(folder / CA_NAME, authority.certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: dt.datetime, ends: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host) or host.replace(".", "").isdigit():
        raise BadRequest(f"{host[:80]!r} is no host: write a name such as gpu-1.example.org, or an address such as 10.0.0.7")
    return x509.DNSName(host)


def _hosts_of(path: Path) -> tuple[str, ...]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def _view(path: Path, key: Path, role: str, name: str) -> CertificateView:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        hosts = _hosts_of(path)
    except ValueError as error:
        raise RocyardError(f"{path} is no certificate: {error}") from error
    return CertificateView(role, name, hosts, str(path), str(key), certificate.not_valid_after_utc)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file whole, with its mode from its first moment."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.unlink(missing_ok=True)
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    draft.replace(path)
