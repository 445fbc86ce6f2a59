"""Certificates, TLS contexts made of them, and what a joining node makes of the cluster's answer."""

import datetime as dt
import socket
import ssl
import stat
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from manager.api.join import NotJoinable, join_view
from manager.certs import Certificates, list_certificates, make_certificates
from manager.cli.exits import Exit
from manager.cli.join import joined_settings
from manager.cli.main import main
from manager.client import Client
from manager.client_address import find_cluster
from manager.core.addresses import dialled, in_url, is_loopback, is_wildcard
from manager.core.errors import BadRequest, RocyardError, SettingsError, StartError
from manager.metrics import serve_metrics
from manager.results import with_default_folder
from manager.settings import ResultSettings, Secret, Settings, TlsSettings
from manager.store.server import EmbeddedStore
from manager.tls import (
    Role,
    TlsFiles,
    api_url,
    bare_url,
    client_context,
    dask_address,
    metrics_context,
    metrics_url,
    server_context,
    settings_for,
    tls_files,
)
from plugins.node.worker_config import node_host


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that a test reads and does not change."""
    made = tmp_path_factory.mktemp("tls") / "certs"
    make_certificates(made, ("gpu-head.example.org", "10.0.0.5"), 90)
    return made


def files(folder: Path, role: Role = Role.API) -> TlsFiles:
    found = tls_files(TlsSettings(directory=str(folder)), role)
    assert found is not None
    return found


def _outdate(folder: Path, role: str) -> None:
    """The role's certificate once more, by the same authority and for the same key, but of a time that is over."""
    authority, old = certificate(folder / "ca.pem"), certificate(folder / f"{role}.pem")
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder(subject_name=old.subject, extensions=list(old.extensions))
        .issuer_name(authority.subject)
        .public_key(old.public_key())
        .serial_number(5)
        .not_valid_before(now - dt.timedelta(days=2))
        .not_valid_after(now - dt.timedelta(days=1))
    )
    (folder / f"{role}.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def sans(path: Path) -> set[str]:
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def settings(**sections: dict) -> Settings:
    base = Settings()
    return msgspec.structs.replace(
        base, **{name: msgspec.structs.replace(getattr(base, name), **fields) for name, fields in sections.items()}
    )


class TestFolder:
    def test_each_role_has_a_certificate_with_its_name_in_it(self, folder: Path):
        for role in Role:
            (unit,) = certificate(folder / f"{role}.pem").subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            assert unit.value == role.value

    def test_keys_are_their_owners_alone(self, folder: Path):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        keys = list(folder.glob("*.key"))
        assert len(keys) == len(Role) + 1
        assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}

    def test_they_are_for_this_machine_and_for_the_hosts_named(self, folder: Path):
        assert sans(folder / "api.pem") >= {"localhost", "127.0.0.1", "::1", "gpu-head.example.org", "10.0.0.5"}

    def test_they_hold_as_long_as_asked(self, folder: Path):
        left = certificate(folder / "api.pem").not_valid_after_utc - dt.datetime.now(dt.UTC)
        assert dt.timedelta(days=89) < left <= dt.timedelta(days=90)

    def test_a_second_call_changes_nothing(self, folder: Path):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(BadRequest, match="--renew"):
            make_certificates(folder, (), 90)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_renewal_keeps_the_authority_and_the_hosts_and_changes_the_rest(self, tmp_path: Path):
        make_certificates(tmp_path, ("10.0.0.5",), 5)
        make_certificates(tmp_path, (), 5, node="gpu-2")
        ca, old = (tmp_path / "ca.pem").read_bytes(), (tmp_path / "api.key").read_bytes()
        made = make_certificates(tmp_path, (), 30, renew=True)
        assert (tmp_path / "ca.pem").read_bytes() == ca
        assert (tmp_path / "api.key").read_bytes() != old
        assert "10.0.0.5" in sans(tmp_path / "api.pem")
        assert str(tmp_path / "nodes" / "gpu-2" / "node.pem") in made.made
        assert all(one.expires_at > dt.datetime.now(dt.UTC) + dt.timedelta(days=29) for one in made.certificates)
        assert not list(tmp_path.rglob("*.tmp"))

    def test_one_more_node_has_a_folder_to_be_copied_without_the_authoritys_key(self, tmp_path: Path):
        make_certificates(tmp_path, (), 90)
        made = make_certificates(tmp_path, ("10.0.0.7",), 90, node="gpu-2")
        own = tmp_path / "nodes" / "gpu-2"
        assert {path.name for path in own.iterdir()} == {"ca.pem", "node.pem", "node.key"}
        assert sans(own / "node.pem") == {"gpu-2", "10.0.0.7"}
        assert made.made == (str(own / "node.pem"),)
        assert files(own, Role.NODE).certificate == str(own / "node.pem")
        with pytest.raises(BadRequest, match="--renew"):
            make_certificates(tmp_path, (), 90, node="gpu-2")

    @pytest.mark.parametrize("name", ["../x", "a/b", "-x", "A", "x" * 65, "a\n"])
    def test_a_node_cannot_be_called_a_path(self, folder: Path, name: str):
        with pytest.raises(BadRequest, match="cannot name a node"):
            make_certificates(folder, (), 90, node=name)

    @pytest.mark.parametrize("host", ["*", "a b", "http://x", "x;y", "", "999.1.1.1"])
    def test_what_is_no_host_is_refused_before_anything_is_written(self, tmp_path: Path, host: str):
        with pytest.raises(BadRequest, match="is no host"):
            make_certificates(tmp_path / "new", (host,), 90)
        assert not (tmp_path / "new").exists()

    def test_a_folder_with_other_files_is_left_as_it_is(self, tmp_path: Path):
        (tmp_path / "mine").write_text("x")
        tmp_path.chmod(0o755)
        with pytest.raises(BadRequest, match="holds other files"):
            make_certificates(tmp_path, (), 90)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755

    def test_a_node_needs_an_authority(self, tmp_path: Path):
        with pytest.raises(BadRequest, match="no authority yet"):
            make_certificates(tmp_path, (), 90, node="gpu-2")

    def test_without_the_authoritys_key_none_are_made(self, tmp_path: Path):
        make_certificates(tmp_path, (), 90)
        (tmp_path / "ca.key").unlink()
        with pytest.raises(RocyardError, match="is not there"):
            make_certificates(tmp_path, (), 90, renew=True)

    def test_another_authoritys_key_is_refused(self, tmp_path: Path, folder: Path):
        make_certificates(tmp_path, (), 90)
        (tmp_path / "ca.key").write_bytes((folder / "ca.key").read_bytes())
        with pytest.raises(RocyardError, match="is not the key of"):
            make_certificates(tmp_path, (), 90, renew=True)

    def test_the_list_shows_what_lies_there(self, folder: Path):
        shown = list_certificates(folder)
        assert [one.role for one in shown.certificates] == ["ca", *Role]
        assert b"BEGIN" not in msgspec.json.encode(shown)


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    """The version of TLS after a handshake in memory; raises what either side says."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=host)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return str(ours.version())


class TestContexts:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "gpu-head.example.org", "10.0.0.5"])
    def test_a_client_believes_its_cluster_by_each_of_its_names(self, folder: Path, host: str):
        ours = files(folder, Role.NODE)
        client = client_context(ours.ca, ours.certificate, ours.key)
        assert shaken(server_context(files(folder)), client, host) == "TLSv1.3"

    def test_another_host_is_not_believed(self, folder: Path):
        with pytest.raises(ssl.SSLCertVerificationError, match="match"):
            shaken(server_context(files(folder)), client_context(files(folder).ca), "10.0.0.6")

    def test_another_authority_is_not_believed(self, folder: Path, tmp_path: Path):
        make_certificates(tmp_path, (), 90)
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            shaken(server_context(files(tmp_path)), client_context(files(folder).ca), "localhost")

    def test_a_clients_certificate_does_not_pass_for_a_server(self, folder: Path):
        with pytest.raises(ssl.SSLCertVerificationError):
            shaken(server_context(files(folder, Role.CLIENT)), client_context(files(folder).ca), "localhost")

    def test_old_tls_is_refused(self, folder: Path):
        old = ssl.create_default_context(cafile=files(folder).ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            shaken(server_context(files(folder)), old, "localhost")

    def test_metrics_on_a_network_have_tls_and_nothing_else(self, folder: Path):
        tls = settings(tls={"directory": str(folder)})
        assert metrics_context(tls, Role.NODE, "127.0.0.1") is None
        assert metrics_context(Settings(), Role.NODE, "0.0.0.0") is None
        port, close = serve_metrics("127.0.0.1", 0, metrics_context(tls, Role.NODE, "0.0.0.0"))
        try:
            url = f"https://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, timeout=5, context=client_context(files(folder).ca)) as answer:
                assert b"rocyard_" in answer.read()
            with pytest.raises((urllib.error.URLError, OSError)):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
            with (
                socket.create_connection(("127.0.0.1", port), 5),
                urllib.request.urlopen(url, timeout=5, context=client_context(files(folder).ca)) as answer,
            ):
                assert answer.status == 200, "one who says nothing holds up another"
        finally:
            close()


class TestFiles:
    def test_off_is_off(self):
        assert tls_files(TlsSettings(), Role.API) is None
        assert settings_for(Settings(), Role.API) == Settings()

    def test_what_is_missing_is_named_with_the_command_that_makes_it(self, tmp_path: Path):
        with pytest.raises(SettingsError, match=r"ca\.pem cannot be read.*rocyard certs"):
            tls_files(TlsSettings(directory=str(tmp_path)), Role.API)

    @pytest.mark.parametrize(("broken", "words"), [
        pytest.param("junk", "are no certificate with its key", id="no certificate"),
        pytest.param("key", "are no certificate with its key", id="another's key"),
        pytest.param("authority", r"is not believed by who has .*ca\.pem", id="another authority"),
        pytest.param("expired", "certificate has expired", id="expired"),
        pytest.param("ca", r"ca\.pem is no certificate", id="the authority's file is none"),
    ])  # fmt: skip
    def test_what_others_would_refuse_is_told_at_the_start(self, tmp_path: Path, broken: str, words: str):
        own, other = tmp_path / "own", tmp_path / "other"
        make_certificates(own, (), 90)
        make_certificates(other, (), 90)
        match broken:
            case "junk":
                (own / "api.pem").write_text("junk")
            case "key":
                (own / "api.key").write_bytes((own / "store.key").read_bytes())
            case "authority":
                for name in ("api.pem", "api.key"):
                    (own / name).write_bytes((other / name).read_bytes())
            case "expired":
                _outdate(own, "api")
            case "ca":
                (own / "ca.pem").write_text("junk")
        with pytest.raises(SettingsError, match=words):
            files(own)

    @pytest.mark.parametrize("role", list(Role))
    def test_what_was_made_is_believed(self, folder: Path, role: Role):
        assert tls_files(TlsSettings(directory=str(folder)), role) is not None

    def test_a_key_that_everybody_may_read_is_refused(self, tmp_path: Path):
        make_certificates(tmp_path, (), 90)
        (tmp_path / "api.key").chmod(0o640)
        assert files(tmp_path).key == str(tmp_path / "api.key")
        (tmp_path / "api.key").chmod(0o604)
        with pytest.raises(SettingsError, match="chmod 600"):
            files(tmp_path)

    def test_each_role_shows_the_store_its_own_certificate(self, folder: Path):
        base = settings(
            tls={"directory": str(folder)},
            store={"url": Secret("rediss://rocyard:p%40w@h:1/0"), "worker_url": Secret("rediss://worker:w@h:1/0")},
        )
        own = settings_for(base, Role.NODE)
        for url in (own.store.url.value, own.store.worker_url.value):
            named = parse_qs(urlsplit(url).query)
            assert named["ssl_certfile"] == [str(folder / "node.pem")]
            assert named["ssl_keyfile"] == [str(folder / "node.key")]
            assert named["ssl_ca_certs"] == [str(folder / "ca.pem")]
        assert bare_url(own.store.url.value) == base.store.url.value
        assert settings_for(own, Role.NODE) == own

    def test_a_plain_store_beside_tls_is_refused(self, folder: Path):
        with pytest.raises(SettingsError, match="rediss://"):
            settings_for(settings(tls={"directory": str(folder)}, store={"url": Secret("redis://h")}), Role.API)

    def test_metrics_on_every_address_go_by_the_machines_name(self, folder: Path):
        secure = server_context(files(folder))
        assert metrics_url("0.0.0.0", 9, secure) == f"https://{socket.gethostname()}:9/metrics"
        assert metrics_url("::1", 9, None) == "http://[::1]:9/metrics"

    def test_addresses_follow(self, folder: Path):
        tls = settings(tls={"directory": str(folder)}, api={"host": "0.0.0.0"}, dask={"host": "::1", "port": 9})
        assert (api_url(tls), dask_address(tls)) == ("https://127.0.0.1:8000", "tls://[::1]:9")
        assert (api_url(Settings()), dask_address(Settings())) == ("http://127.0.0.1:8000", "tcp://127.0.0.1:8786")


class TestStore:
    def test_a_network_without_tls_is_refused(self, tmp_path: Path):
        with pytest.raises(StartError, match=r"store\.host is '0\.0\.0\.0'.*rocyard certs"):
            EmbeddedStore(tmp_path, host="0.0.0.0").prepare()

    def test_an_address_of_another_machine_is_refused(self, tmp_path: Path, folder: Path):
        with pytest.raises(StartError, match=r"store\.host: '198\.51\.100\.1' is no address of this machine"):
            EmbeddedStore(tmp_path, host="198.51.100.1", tls=files(folder, Role.STORE)).prepare()

    def test_a_program_without_tls_is_refused_with_the_remedy(self, tmp_path: Path, folder: Path):
        fake = tmp_path / "redis-server"
        fake.write_text(
            "#!/bin/sh\n"
            '[ "$1" = --version ] && { echo "Redis server v=7.2.0"; exit; }\n'
            "echo \"at line 1 >>> 'tls-port 0' Bad directive\"; exit 1\n"
        )
        fake.chmod(0o755)
        own = files(folder, Role.STORE)
        with pytest.raises(StartError, match=r"built without TLS.*install redis-server"):
            EmbeddedStore(tmp_path / "data", program=str(fake), tls=own).prepare()
        assert EmbeddedStore(tmp_path / "data", program=str(fake)).prepare().url.value.startswith("redis://")


class TestJoin:
    def test_passwords_do_not_go_over_a_network_without_tls(self):
        with pytest.raises(NotJoinable, match="no TLS"):
            join_view(settings(api={"host": "0.0.0.0"}, store={"url": Secret("redis://a:b@127.0.0.1:1/0")}))

    def test_a_unix_socket_is_no_address(self):
        with pytest.raises(NotJoinable, match="unix socket"):
            join_view(settings(store={"url": Secret("unix:///run/redis.sock")}))

    def test_the_answer_names_no_file_of_the_server(self, folder: Path):
        base = settings(tls={"directory": str(folder)}, store={"url": Secret("rediss://a:b@10.0.0.5:1/0")})
        view = join_view(settings_for(base, Role.API))
        assert view.store.url == "rediss://a:b@10.0.0.5:1/0"

    def cluster(self, folder: Path, **hosts: str) -> Settings:
        """As `rocyard up` hands it to its API."""
        store = hosts.get("store", "127.0.0.1")
        return settings(
            tls={"directory": str(folder)},
            api={"host": "0.0.0.0"},
            dask={"host": hosts.get("dask", "127.0.0.1"), "port": 8786},
            store={
                "host": store,
                "url": Secret(f"rediss://rocyard:p@{in_url(dialled(store))}:7/0"),
                "worker_url": Secret(f"rediss://worker:w@{in_url(dialled(store))}:7/0"),
            },
            node={"beat_s": 0.7},
        )

    def test_every_address_means_the_one_that_was_called(self, folder: Path):
        view = join_view(self.cluster(folder, store="0.0.0.0", dask="0.0.0.0"))
        own = joined_settings(Settings(), view, "gpu-head")
        assert own.store.url.value == "rediss://rocyard:p@gpu-head:7/0"
        assert own.store.worker_url.value == "rediss://worker:w@gpu-head:7/0"
        assert (own.dask.host, own.dask.port, own.node.beat_s) == ("gpu-head", 8786, 0.7)

    def test_a_named_address_stays(self, folder: Path):
        own = joined_settings(Settings(), join_view(self.cluster(folder, store="10.0.0.5", dask="10.0.0.6")), "gpu-head")
        assert (own.store.url.value, own.dask.host) == ("rediss://rocyard:p@10.0.0.5:7/0", "10.0.0.6")

    def test_results_go_where_all_nodes_can_reach_them(self, folder: Path):
        cluster = self.cluster(folder, store="10.0.0.5", dask="10.0.0.6")
        own_machine = with_default_folder(cluster)
        assert own_machine.results.url
        assert joined_settings(Settings(), join_view(own_machine), "gpu-head").results.url == ""
        shared = msgspec.structs.replace(cluster, results=ResultSettings(url="/srv/results", inline_bytes_max=7))
        assert joined_settings(Settings(), join_view(shared), "gpu-head").results == shared.results

    @pytest.mark.parametrize(
        ("hosts", "named"),
        [({}, "store.host and dask.host"), ({"dask": "0.0.0.0"}, "store.host"), ({"store": "10.0.0.5"}, "dask.host")],
    )
    def test_loopback_is_out_of_reach_of_another_machine(self, folder: Path, hosts: dict, named: str):
        view = join_view(self.cluster(folder, **hosts))
        with pytest.raises(StartError, match=f"machine: {named} there is loopback"):
            joined_settings(Settings(), view, "gpu-head")
        assert joined_settings(Settings(), view, "127.0.0.1").dask.port == 8786


class TestAddresses:
    @pytest.mark.parametrize(
        ("host", "loopback", "wildcard", "local"),
        [
            ("127.0.0.1", True, False, "127.0.0.1"),
            ("127.3.2.1", True, False, "127.3.2.1"),
            ("::1", True, False, "::1"),
            ("localhost", True, False, "localhost"),
            ("0.0.0.0", False, True, "127.0.0.1"),
            ("::", False, True, "::1"),
            ("10.0.0.5", False, False, "10.0.0.5"),
            ("gpu-head", False, False, "gpu-head"),
        ],
    )
    def test_hosts(self, host: str, loopback: bool, wildcard: bool, local: str):
        assert (is_loopback(host), is_wildcard(host), dialled(host)) == (loopback, wildcard, local)

    def test_a_node_is_reached_where_it_says_else_beside_the_scheduler(self):
        assert node_host(settings(node={"host": "10.1.1.1"}, dask={"host": "127.0.0.1"})) == "10.1.1.1"
        assert node_host(settings(dask={"host": "127.0.0.2"})) == "127.0.0.2"
        assert node_host(settings(dask={"host": "0.0.0.0"})) == "0.0.0.0"

    def test_a_node_is_reached_at_the_address_from_which_it_reaches_the_scheduler(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("198.51.100.1", 9))  # nothing is sent; nobody has this address
            except OSError:
                pytest.skip("no way leads out of this machine")
            assert node_host(settings(dask={"host": "198.51.100.1"})) == probe.getsockname()[0]


class TestCommand:
    def test_it_says_what_lies_where(self, tmp_path: Path, capsys):
        assert main(["certs", str(tmp_path / "new"), "--host", "gpu-head", "--days", "7", "-o", "json"]) == Exit.OK
        shown = msgspec.json.decode(capsys.readouterr().out, type=Certificates)
        assert {one.role for one in shown.certificates} == {"ca", *Role}
        assert len(shown.made) == len(Role)
        assert all(Path(one.certificate).exists() and Path(one.key).exists() for one in shown.certificates)

    def test_people_are_told_what_to_do_next(self, tmp_path: Path, capsys):
        assert main(["certs", str(tmp_path)]) == Exit.OK
        told = capsys.readouterr()
        assert "scheduler.key" in told.out
        assert f"tls.directory: {tmp_path}" in told.err
        assert main(["certs", str(tmp_path), "--node", "gpu-2"]) == Exit.OK
        assert "rocyard node --join https://HOST:PORT --certs FOLDER" in capsys.readouterr().err

    def test_a_second_call_is_refused(self, tmp_path: Path, capsys):
        main(["certs", str(tmp_path)])
        assert main(["certs", str(tmp_path)]) == Exit.USAGE
        assert "--renew" in capsys.readouterr().err

    def test_without_its_package_it_says_which_to_install(self, tmp_path: Path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "cryptography", None)
        monkeypatch.delitem(sys.modules, "manager.certs")
        assert main(["certs", str(tmp_path)]) == Exit.USAGE
        assert "pip install 'rocyard[tls]'" in capsys.readouterr().err


class TestClient:
    def test_what_is_no_authority_is_named(self, tmp_path: Path):
        (tmp_path / "ca.pem").write_text("nonsense")
        for path in (tmp_path / "ca.pem", tmp_path / "nowhere.pem"):
            with pytest.raises(SettingsError, match=f"{path} is no certificate of an authority.*ROCYARD_CA"):
                Client.at("https://127.0.0.1:1", "ry_x", str(path))

    def test_the_local_file_names_the_authority_and_the_variable_wins(self, tmp_path: Path):
        (tmp_path / "client.json").write_text('{"url": "https://127.0.0.1:1", "api_key": "ry_x", "ca": "/c/ca.pem"}')
        there = str(tmp_path)
        assert find_cluster(None, None, {}, there).ca == "/c/ca.pem"
        assert find_cluster("https://127.0.0.1:1", "ry_y", {}, there).ca == "/c/ca.pem"
        assert find_cluster("https://elsewhere:1", "ry_y", {}, there).ca == ""
        assert find_cluster(None, None, {"ROCYARD_CA": "/other.pem"}, there).ca == "/other.pem"
        assert find_cluster(None, None, {"ROCYARD_CA": "/other.pem"}, there, "/given.pem").ca == "/given.pem"
