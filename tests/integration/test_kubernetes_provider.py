"""The Kubernetes provider against an emulated API server that answers late, wrongly, in part, or not at all.

What is emulated is the server's manner with clients, not Kubernetes: tests/integration/kubernetes_api.py says what it knows.
"""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl

import pytest

from autoscaler.providers import kubernetes
from autoscaler.providers.interface import Instance, Listing, ProviderRefused, ProviderUnavailable
from autoscaler.providers.kubernetes import ClusterAccess, KubernetesProvider, access_in_cluster
from manager.core.errors import SettingsError, StartError
from manager.settings import GroupSettings
from tests.integration.kubernetes_api import FakeKubernetes, Fault

pytestmark = pytest.mark.integration

DEADLINE_S = 20.0
SHORT_S = 1.0  # where the server is silent
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: 3 Insufficient amd.com/gpu.",
        }
    ],
}


def waiting(reason: str, message: str = "", kind: str = "containerStatuses") -> dict:
    return {"phase": "Pending", kind: [{"name": "node", "state": {"waiting": {"reason": reason, "message": message}}}]}


def group(workload: str = "statefulset/yard", namespace: str = "gpu") -> GroupSettings:
    return GroupSettings(provider="kubernetes", devices="8:mi300x", namespace=namespace, workload=workload)


@pytest.fixture
async def api():
    async with FakeKubernetes().running() as fake:
        fake.statefulset("yard", 3)
        for ordinal in range(3):
            fake.pod(f"yard-{ordinal}", age_s=60 + ordinal)
        yield fake


@pytest.fixture
async def provider(api: FakeKubernetes, tmp_path):
    (tmp_path / "token").write_text("token-1\n")
    access = ClusterAccess(url=api.url, token_path=tmp_path / "token")
    provider = KubernetesProvider({"mi300x": group()}, access, DEADLINE_S)
    yield provider
    await provider.close()


@contextlib.contextmanager
def hurried(provider: KubernetesProvider, fault: Fault):
    """Does not wait long for a server that this fault makes silent."""
    with pytest.MonkeyPatch.context() as patch:
        if fault.kind in ("hang", "drip"):
            patch.setattr(provider, "_deadline_s", SHORT_S)
        yield


# --- listing --------------------------------------------------------------------------------------------------------


async def test_a_listing_has_each_ordinal_with_its_age_by_the_servers_clock(provider):
    assert await provider.list("mi300x") == Listing(
        group="mi300x",
        instances=(
            Instance(name="yard-0", age_s=60),
            Instance(name="yard-1", age_s=61),
            Instance(name="yard-2", age_s=62),
        ),
        ordered=True,
        version="100",
    )


async def test_a_group_of_none_is_empty_though_the_answer_leaves_out_its_zero(api, provider):
    api.touch("yard", replicas=0)
    api.pods.clear()
    listing = await provider.list("mi300x")
    assert (listing.instances, listing.version) == ((), "101")


async def test_a_pod_above_the_number_that_was_asked_for_is_on_its_way_out_and_not_listed(api, provider):
    api.touch("yard", replicas=2)
    assert [i.name for i in (await provider.list("mi300x")).instances] == ["yard-0", "yard-1"]


async def test_all_pages_of_pods_are_read(api, provider):
    api.page = 2
    api.pods["gpu"][2]["status"] = UNSCHEDULABLE
    assert (await provider.list("mi300x")).instances[2].problem.startswith("Unschedulable")
    assert len([seen for seen in api.requests if seen.path.endswith("/pods")]) == 2


async def test_ten_and_more_are_in_the_order_of_ordinals(api, provider):
    api.touch("yard", replicas=12)
    assert [i.name for i in (await provider.list("mi300x")).instances][9:] == ["yard-9", "yard-10", "yard-11"]


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        pytest.param({"phase": "Running"}, "", id="runs"),
        pytest.param({"phase": "Pending"}, "", id="just made"),
        pytest.param(waiting("ContainerCreating"), "", id="starting"),
        pytest.param(waiting("PodInitializing", kind="initContainerStatuses"), "", id="initialising"),
        pytest.param(UNSCHEDULABLE, "Unschedulable: 0/3 nodes: 3 Insufficient amd.com/gpu.", id="no place"),
        pytest.param(waiting("ImagePullBackOff", "Back-off pulling"), "ImagePullBackOff: Back-off pulling", id="no image"),
        pytest.param(waiting("CrashLoopBackOff"), "CrashLoopBackOff", id="crashes"),
        pytest.param(waiting("ErrImagePull", kind="initContainerStatuses"), "ErrImagePull", id="no image for its init"),
        pytest.param({"phase": "Failed", "reason": "Evicted", "message": "disk"}, "Evicted: disk", id="evicted"),
        pytest.param({"phase": "Failed"}, "Failed", id="failed without a word"),
    ],
)
async def test_a_pod_that_does_not_start_says_why(api, provider, status, problem):
    api.pods["gpu"][1]["status"] = status
    assert [i.problem for i in (await provider.list("mi300x")).instances] == ["", problem, ""]


async def test_a_long_reason_is_cut(api, provider):
    api.pods["gpu"][0]["status"] = waiting("ErrImagePull", "x" * 5000)
    assert len((await provider.list("mi300x")).instances[0].problem) == kubernetes.TEXT_MAX


async def test_a_pod_that_is_replaced_has_no_problem(api, provider):
    api.pods["gpu"].clear()
    for ordinal in range(3):
        api.pod(f"yard-{ordinal}", status=waiting("CrashLoopBackOff"), ending=True)
    assert [i.problem for i in (await provider.list("mi300x")).instances] == ["", "", ""]


async def test_a_pod_that_nobody_makes_is_a_problem_after_a_while(api, provider, monkeypatch):
    del api.pods["gpu"][2]
    first = (await provider.list("mi300x")).instances[2]
    assert (first.problem, first.age_s < 5) == ("", True)
    monkeypatch.setattr(kubernetes, "PODLESS_S", 0.0)
    late = (await provider.list("mi300x")).instances[2]
    assert late.problem.startswith("NoPod")
    assert late.age_s >= first.age_s
    api.pod("yard-2", age_s=1)
    assert (await provider.list("mi300x")).instances[2] == Instance(name="yard-2", age_s=1)


async def test_without_the_right_to_see_pods_there_are_still_names(api, provider):
    api.denied.add("list pods")
    for _ in range(2):
        listing = await provider.list("mi300x")
        assert [(i.name, i.problem, i.age_s < 5) for i in listing.instances] == [(f"yard-{n}", "", True) for n in range(3)]


async def test_the_token_is_read_anew_for_each_call(api, provider, tmp_path):
    await provider.list("mi300x")
    api.token = "token-2"
    with pytest.raises(ProviderUnavailable, match="401"):
        await provider.list("mi300x")
    (tmp_path / "token").write_text("token-2")
    assert len((await provider.list("mi300x")).instances) == 3
    (tmp_path / "token").unlink()
    with pytest.raises(ProviderUnavailable, match="No such file"):
        await provider.list("mi300x")


READS = [
    pytest.param(Fault("status", 403), "403 Forbidden: injected", id="forbidden"),
    pytest.param(
        Fault("status", 404, "statefulsets.apps not found"), "404 Not Found: statefulsets.apps not found", id="not found"
    ),
    pytest.param(Fault("status", 429), "429", id="too many requests"),
    pytest.param(Fault("status", 500), "500", id="broken"),
    pytest.param(Fault("status", 503), "503", id="overloaded"),
    pytest.param(Fault("status", 302), "302", id="sent elsewhere"),
    pytest.param(Fault("hang"), f"no answer within {SHORT_S:g} s", id="silent"),
    pytest.param(Fault("drip"), f"no answer within {SHORT_S:g} s", id="a byte now and then"),
    pytest.param(Fault("truncate"), "RemoteProtocolError", id="cut off"),
    pytest.param(Fault("lost"), "RemoteProtocolError", id="closed without a word"),
    pytest.param(Fault("half"), "not whole", id="half a document"),
    pytest.param(Fault("raw", text=""), "not whole", id="nothing"),
    pytest.param(Fault("raw", text="{}"), "not whole", id="an empty object"),
    pytest.param(Fault("raw", text="[]"), "not whole", id="a list"),
    pytest.param(Fault("raw", text="null"), "not whole", id="null"),
    pytest.param(Fault("raw", text='{"kind":"Status","status":"Success"}'), "not whole", id="another kind"),
    pytest.param(Fault("raw", text='\xff\xfe{"kind"'), "not whole", id="no text"),
]
SCALES = [
    pytest.param('"metadata":{"name":"yard","resourceVersion":"1"},"status":{"selector":"app=yard"}', id="no specification"),
    pytest.param('"metadata":{"name":"yard"},"spec":{},"status":{"selector":"app=yard"}', id="no version"),
    pytest.param(
        '"metadata":{"name":"yard","resourceVersion":""},"spec":{},"status":{"selector":"app=yard"}', id="empty version"
    ),
    pytest.param(
        '"metadata":{"name":"other","resourceVersion":"1"},"spec":{},"status":{"selector":"app=yard"}', id="another's"
    ),
    pytest.param('"metadata":{"name":"yard","resourceVersion":"1"},"spec":{},"status":{}', id="no selector"),
    pytest.param(
        '"metadata":{"name":"yard","resourceVersion":"1"},"spec":{"replicas":-1},"status":{"selector":"a"}', id="negative"
    ),
    pytest.param(
        '"metadata":{"name":"yard","resourceVersion":"1"},"spec":{"replicas":2e9},"status":{"selector":"a"}', id="absurd"
    ),
    pytest.param(
        '"metadata":{"name":"yard","resourceVersion":"1"},"spec":{"replicas":"3"},"status":{"selector":"a"}', id="text"
    ),
]


@pytest.mark.parametrize(("fault", "says"), READS)
async def test_a_scale_that_cannot_be_read_is_no_listing(api, provider, fault, says):
    api.fail("GET scale", fault)
    with hurried(provider, fault), pytest.raises(ProviderUnavailable, match=says):
        await provider.list("mi300x")
    assert len((await provider.list("mi300x")).instances) == 3


@pytest.mark.parametrize("text", SCALES)
async def test_a_scale_that_is_not_whole_is_no_listing(api, provider, text):
    api.fail("GET scale", Fault("raw", text='{"kind":"Scale",' + text + "}"))
    with pytest.raises(ProviderUnavailable):
        await provider.list("mi300x")


@pytest.mark.parametrize(("fault", "says"), [case for case in READS if case.id != "forbidden"])
async def test_pods_that_cannot_be_read_are_no_listing(api, provider, fault, says):
    api.fail("GET pods", fault)
    with hurried(provider, fault), pytest.raises(ProviderUnavailable, match=says):
        await provider.list("mi300x")


async def test_a_page_that_fails_leaves_no_part_of_a_listing(api, provider):
    api.page = 1
    api.fail("GET pods", Fault("ok"), Fault("status", 410, "continue token expired"))
    with pytest.raises(ProviderUnavailable, match="410 Gone: continue token expired"):
        await provider.list("mi300x")


async def test_pages_without_end_are_given_up(api, provider):
    api.fail("GET pods", *(Fault("raw", text='{"kind":"PodList","metadata":{"continue":"1"},"items":[]}') for _ in range(50)))
    with pytest.raises(ProviderUnavailable, match="more than 20000 pods"):
        await provider.list("mi300x")


async def test_a_server_that_is_not_there_is_unavailable(tmp_path):
    provider = KubernetesProvider({"g": group()}, ClusterAccess(url="http://127.0.0.1:1"), DEADLINE_S)
    with pytest.raises(ProviderUnavailable, match="ConnectError"):
        await provider.list("g")
    await provider.close()


# --- adding and removing --------------------------------------------------------------------------------------------


async def test_new_names_are_the_next_ordinals_and_asking_changes_nothing(api, provider):
    listing = await provider.list("mi300x")
    assert provider.new_names(listing, 2) == provider.new_names(listing, 2) == ("yard-3", "yard-4")
    assert provider.new_names(listing, 0) == ()
    assert api.writes() == []


async def test_adding_sets_the_number_and_names_version_and_token(api, provider):
    listing = await provider.list("mi300x")
    await provider.add(listing, provider.new_names(listing, 2), 42)
    assert api.replicas("yard") == 5
    (seen,) = api.writes()
    assert (seen.method, seen.path) == ("PUT", "/apis/apps/v1/namespaces/gpu/statefulsets/yard/scale")
    assert seen.query == {"fieldManager": "rocyard-autoscaler-42"}
    assert seen.body["metadata"]["resourceVersion"] == "100"
    assert seen.headers["authorization"] == "Bearer token-1"


async def test_the_highest_ordinals_are_removed_in_whatever_order_they_are_named(api, provider):
    await provider.remove(await provider.list("mi300x"), ("yard-2", "yard-1"), 1)
    assert api.replicas("yard") == 1


async def test_all_can_be_removed(api, provider):
    await provider.remove(await provider.list("mi300x"), ("yard-0", "yard-1", "yard-2"), 1)
    assert api.replicas("yard") == 0


async def test_removing_or_adding_nothing_asks_nobody(api, provider):
    listing = await provider.list("mi300x")
    await provider.remove(listing, (), 1)
    await provider.add(listing, (), 1)
    assert api.writes() == []


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("yard-0",), id="the lowest"),
        pytest.param(("yard-1",), id="one in the middle"),
        pytest.param(("yard-0", "yard-2"), id="with a gap"),
        pytest.param(("yard-2", "yard-2"), id="one twice"),
        pytest.param(("yard-3",), id="one that is not there"),
        pytest.param(("other-2",), id="another's"),
        pytest.param(("yard-0", "yard-1", "yard-2", "yard-3"), id="more than there are"),
    ],
)
async def test_what_is_not_at_the_end_is_not_removed(api, provider, names):
    with pytest.raises(ProviderRefused, match="highest ordinals, yard-"):
        await provider.remove(await provider.list("mi300x"), names, 1)
    assert (api.replicas("yard"), api.writes()) == (3, [])


@pytest.mark.parametrize("names", [("yard-4",), ("yard-2",), ("yard-4", "yard-3"), ("other-3",)])
async def test_what_is_not_next_is_not_added(api, provider, names):
    with pytest.raises(ProviderRefused, match="next ordinals, yard-3"):
        await provider.add(await provider.list("mi300x"), names, 1)
    assert (api.replicas("yard"), api.writes()) == (3, [])


async def test_a_repeat_changes_nothing_more(api, provider):
    listing = await provider.list("mi300x")
    for _ in range(3):
        await provider.add(listing, ("yard-3",), 1)
    assert api.replicas("yard") == 4
    listing = await provider.list("mi300x")
    for _ in range(3):
        await provider.remove(listing, ("yard-3",), 1)
    assert api.replicas("yard") == 3


@pytest.mark.parametrize("lost", [Fault("lost"), Fault("truncate"), Fault("half"), Fault("drip")], ids=lambda fault: fault.kind)
async def test_a_change_whose_answer_was_lost_is_unknown_and_its_repeat_harmless(api, provider, lost):
    listing = await provider.list("mi300x")
    api.fail("PUT scale", lost)
    with hurried(provider, lost), pytest.raises(ProviderUnavailable):
        await provider.add(listing, ("yard-3", "yard-4"), 1)
    assert api.replicas("yard") == 5
    await provider.add(listing, ("yard-3", "yard-4"), 1)
    assert api.replicas("yard") == 5


@pytest.mark.parametrize("others", [2, 3, 7])
async def test_what_changed_since_it_was_listed_is_left_alone(api, provider, others):
    """Also where only the version went on: what was decided on is not what is there."""
    listing = await provider.list("mi300x")
    api.touch("yard", replicas=others)
    with pytest.raises(ProviderUnavailable, match=f"changed since it was listed and has {others} replicas"):
        await provider.add(listing, ("yard-3",), 1)
    with pytest.raises(ProviderUnavailable, match="changed since it was listed"):
        await provider.remove(listing, ("yard-1", "yard-2"), 1)
    assert api.replicas("yard") == others


async def test_a_listing_from_a_stale_read_changes_nothing(api, provider):
    api.stale = {"replicas": 2, "version": 99}
    listing = await provider.list("mi300x")
    assert len(listing.instances) == 2
    with pytest.raises(ProviderUnavailable):
        await provider.remove(listing, ("yard-1",), 1)
    assert api.replicas("yard") == 3


async def test_of_two_autoscalers_with_one_listing_only_one_acts(api, provider):
    listing = await provider.list("mi300x")
    await provider.remove(listing, ("yard-2",), 7)
    with pytest.raises(ProviderUnavailable):
        await provider.add(listing, ("yard-3",), 6)
    assert api.replicas("yard") == 2


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (403, "exceeded quota: gpus"),
        (403, "is forbidden"),
        (404, "not found"),
        (422, "must be greater"),
    ],
)
async def test_what_kubernetes_will_not_do_is_refused_with_its_reason(api, provider, status, text):
    listing = await provider.list("mi300x")
    api.fail("PUT scale", Fault("status", status, text))
    with pytest.raises(ProviderRefused, match=f"from 3 to 4: {status} .*{text}"):
        await provider.add(listing, ("yard-3",), 1)
    assert api.replicas("yard") == 3


async def test_a_missing_right_is_refused(api, provider):
    api.denied.add("update scale")
    with pytest.raises(ProviderRefused, match="cannot update"):
        await provider.add(await provider.list("mi300x"), ("yard-3",), 1)


@pytest.mark.parametrize("status", [401, 409, 429, 500, 503])
async def test_what_may_pass_is_unavailable(api, provider, status):
    listing = await provider.list("mi300x")
    api.fail("PUT scale", Fault("status", status))
    with pytest.raises(ProviderUnavailable):
        await provider.add(listing, ("yard-3",), 1)
    assert api.replicas("yard") == 3
    await provider.add(listing, ("yard-3",), 1)
    assert api.replicas("yard") == 4


async def test_a_silent_server_holds_nobody_longer_than_the_deadline(api, provider):
    listing = await provider.list("mi300x")
    api.fail("PUT scale", silent := Fault("hang"))
    async with asyncio.timeout(DEADLINE_S):
        with hurried(provider, silent), pytest.raises(ProviderUnavailable, match="no answer within"):
            await provider.add(listing, ("yard-3",), 1)


async def test_a_number_that_something_in_the_cluster_has_changed_is_refused(api, provider):
    listing = await provider.list("mi300x")
    still = '"metadata":{"name":"yard","resourceVersion":"9"},"spec":{"replicas":3},"status":{"selector":"app=yard"}'
    api.fail("PUT scale", Fault("raw", text='{"kind":"Scale",' + still + "}"))
    with pytest.raises(ProviderRefused, match="has made it 3"):
        await provider.add(listing, ("yard-3",), 1)


async def test_groups_do_not_touch_each_other(api, tmp_path):
    (tmp_path / "token").write_text("token-1")
    api.statefulset("small", 1, namespace="other")
    access = ClusterAccess(url=api.url, token_path=tmp_path / "token")
    provider = KubernetesProvider({"a": group(), "b": group("statefulset/small", "other")}, access, DEADLINE_S)
    await provider.add(await provider.list("b"), ("small-1",), 1)
    assert (api.replicas("yard"), api.replicas("small", "other")) == (3, 2)
    assert [i.name for i in (await provider.list("a")).instances] == ["yard-0", "yard-1", "yard-2"]
    await provider.close()


# --- settings and access --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "workload", ["", "yard", "deployment/yard", "statefulset/", "statefulset/Yard", "statefulset/a/scale", "statefulset/../x"]
)
def test_a_group_must_name_a_statefulset(workload):
    with pytest.raises(SettingsError, match=r"groups\.mi300x\.workload must be statefulset/NAME"):
        KubernetesProvider({"mi300x": group(workload)}, ClusterAccess(url="http://127.0.0.1:1"))


def test_two_groups_may_not_name_the_same_statefulset():
    with pytest.raises(SettingsError, match=r"groups\.b and groups\.a both name statefulset/yard"):
        KubernetesProvider({"a": group(), "b": group()}, ClusterAccess(url="http://127.0.0.1:1"))


def test_the_access_of_a_pod_is_found(tmp_path):
    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_text("c")
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert access_in_cluster(environ, tmp_path).url == "https://10.0.0.1:6443"
    assert access_in_cluster(environ | {"KUBERNETES_SERVICE_HOST": "fd00::1"}, tmp_path).url == "https://[fd00::1]:6443"
    with pytest.raises(StartError, match="runs in no pod"):
        access_in_cluster({}, tmp_path)
    (tmp_path / "token").unlink()
    with pytest.raises(StartError, match="automountServiceAccountToken"):
        access_in_cluster(environ, tmp_path)


def test_a_broken_certificate_of_the_authority_stops_the_start(tmp_path):
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(StartError, match=r"ca\.crt is no certificate"):
        KubernetesProvider({}, ClusterAccess(url="https://127.0.0.1:1", ca_path=tmp_path / "ca.crt"))


async def test_over_tls_the_servers_certificate_is_checked(tmp_path):
    (tmp_path / "token").write_text("token-1")
    tls = {name: _certificate(tmp_path / name) for name in ("ours", "strangers")}
    async with FakeKubernetes().running(tls["ours"]) as api:
        api.statefulset("yard", 1)
        for name, trusted in (("ours", True), ("strangers", False)):
            access = ClusterAccess(url=api.url, token_path=tmp_path / "token", ca_path=tmp_path / name / "cert.pem")
            provider = KubernetesProvider({"g": group()}, access, 5.0)
            if trusted:
                assert len((await provider.list("g")).instances) == 1
            else:
                with pytest.raises(ProviderUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                    await provider.list("g")
            await provider.close()
    assert {seen.headers["authorization"] for seen in api.requests} == {"Bearer token-1"}


def _certificate(folder) -> ssl.SSLContext:
    """A server's context with a certificate of its own for 127.0.0.1, which is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
