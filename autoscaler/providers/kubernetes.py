"""Nodes as the pods of StatefulSets: sizes are set by the ``/scale`` subresource, and the highest ordinals come and go.

The one module that speaks to Kubernetes. It reads ``/scale`` and, where it may, the pods; it writes the number of replicas and
nothing else, so the rights that it needs are ``statefulsets/scale: get, update`` on the named objects, and ``pods: list``.

Writers are fenced by the object's ``resourceVersion``: a change names the version that was listed, and Kubernetes refuses it
when anything has happened since. So of two autoscalers only one can act on a listing. The leader's token goes along as the name
of the field's manager, where people see it (``kubectl get --show-managed-fields``); to keep it in an annotation and compare it
would take the right to change the StatefulSet itself, and with that its image.
"""

import asyncio
import email.utils
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, TypeVar

import httpx
import msgspec

from autoscaler.providers.interface import Instance, Listing, ProviderRefused, ProviderUnavailable
from manager.core.errors import SettingsError, StartError
from manager.log import get_logger
from manager.settings import GroupSettings

DEADLINE_S: Final = 5.0
"""Longest wait for one answer: an autoscaler that waits for longer than a period is blind for that long."""
PAGE_PODS: Final = 500
"""What kubectl asks for at once."""
PAGES_MAX: Final = 40
"""Twice the nodes that a group may have (10,000): those that end are listed too."""
REPLICAS_MAX: Final = 100_000
"""More nodes than any Kubernetes has: such an answer is wrong."""
PODLESS_S: Final = 30.0
"""Kubernetes makes a pod within a second of being asked; one that is not there after so long is refused by somebody."""
TEXT_MAX: Final = 300
"""Of what Kubernetes says: enough for its reason, and it may be long."""
SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_WORKLOAD: Final = re.compile(r"statefulset/([a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?)")
_REFUSALS: Final = frozenset({400, 403, 404, 405, 413, 422})
"""Answers to a change that the same change would get again: it is wrong, not allowed, or over a quota."""
_ON_THE_WAY: Final = frozenset({"ContainerCreating", "PodInitializing"})

log = get_logger("rocyard.autoscaler")
T = TypeVar("T")


class ClusterAccess(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the API server.

    Attributes:
        url: without a path.
        token_path: of the service account's token, read for each call since it is renewed in place; None sends none.
        ca_path: who vouches for the server; None for a plain URL, as ``kubectl proxy`` gives one.
    """

    url: str
    token_path: Path | None = None
    ca_path: Path | None = None


def access_in_cluster(environ: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> ClusterAccess:
    """The access that Kubernetes gives to a pod.

    Raises:
        StartError: this is no pod, or one without a service account's token.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise StartError(
            "a group has provider kubernetes, but this process runs in no pod (KUBERNETES_SERVICE_HOST is not set): run the "
            "autoscaler in the cluster, or give the group provider local"
        )
    token_path, ca_path = directory / "token", directory / "ca.crt"
    for path in (token_path, ca_path):
        if not path.is_file():
            raise StartError(f"{path} is not there: the autoscaler's pod needs automountServiceAccountToken: true")
    return ClusterAccess(
        url=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        token_path=token_path,
        ca_path=ca_path,
    )


# --- what Kubernetes answers, as far as it is read ------------------------------------------------------------------


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    resource_version: str


class _Replicas(msgspec.Struct, frozen=True):
    replicas: Annotated[int, msgspec.Meta(ge=0, le=REPLICAS_MAX)] = 0  # Kubernetes leaves out what is 0


class _ScaleStatus(msgspec.Struct, frozen=True):
    selector: str = ""


class _Scale(msgspec.Struct, frozen=True, tag_field="kind", tag="Scale"):
    metadata: _Metadata
    spec: _Replicas
    status: _ScaleStatus


class _PodMetadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    creation_timestamp: Annotated[datetime, msgspec.Meta(tz=True)]
    deletion_timestamp: datetime | None = None


class _Condition(msgspec.Struct, frozen=True):
    type: str
    status: str
    reason: str = ""
    message: str = ""


class _Waiting(msgspec.Struct, frozen=True):
    reason: str = ""
    message: str = ""


class _ContainerState(msgspec.Struct, frozen=True):
    waiting: _Waiting | None = None


class _Container(msgspec.Struct, frozen=True):
    state: _ContainerState = _ContainerState()


class _PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[_Condition, ...] = ()
    init_container_statuses: tuple[_Container, ...] = ()
    container_statuses: tuple[_Container, ...] = ()


class _Pod(msgspec.Struct, frozen=True):
    metadata: _PodMetadata
    status: _PodStatus


class _ListMetadata(msgspec.Struct, frozen=True, rename={"following": "continue"}):
    following: str = ""


class _PodList(msgspec.Struct, frozen=True, tag_field="kind", tag="PodList"):
    metadata: _ListMetadata
    items: tuple[_Pod, ...]


class _Failure(msgspec.Struct, frozen=True):
    """A ``Status``: why not."""

    message: str = ""


# --- the provider ---------------------------------------------------------------------------------------------------


class _Target(msgspec.Struct, frozen=True):
    """One StatefulSet."""

    namespace: str
    name: str

    @property
    def scale_path(self) -> str:
        return f"/apis/apps/v1/namespaces/{self.namespace}/statefulsets/{self.name}/scale"

    def __str__(self) -> str:
        return f"statefulset/{self.name} in namespace {self.namespace}"


class KubernetesProvider:
    """Groups that are StatefulSets.

    Args:
        groups: those with ``provider: kubernetes``, by name.
        access: where the API server is.
        deadline_s: longest wait for one answer.

    Raises:
        SettingsError: a group names no StatefulSet, or that of another group.
        StartError: the certificate of the API server's authority cannot be read.
    """

    def __init__(self, groups: Mapping[str, GroupSettings], access: ClusterAccess, deadline_s: float = DEADLINE_S) -> None:
        self._targets = _targets_of(groups)
        self._token_path = access.token_path
        self._deadline_s = deadline_s
        self._client = httpx.AsyncClient(
            base_url=access.url,
            verify=_tls(access.ca_path) if access.ca_path is not None else True,
            timeout=deadline_s,
            trust_env=False,  # a proxy for the internet is none for the API server
        )
        self._missing_since_s: dict[str, float] = {}
        """Instances that have no pod yet, and when that was first seen, on this process's monotonic clock."""
        self._may_see_pods = True

    async def list(self, group: str) -> Listing:
        """Everything that was asked for, in the order of ordinals; pods above that number are on their way out.

        Raises:
            ProviderUnavailable: no answer, or not a whole one.
        """
        target = self._targets[group]
        scale = await self._scale(f"reading {target}", target)
        pods, now = await self._pods(target, scale.status.selector)
        names = [f"{target.name}-{ordinal}" for ordinal in range(scale.spec.replicas)]
        self._note_missing(target, [name for name in names if pods is None or name not in pods])
        return Listing(
            group=group,
            instances=tuple(self._instance(name, pods, now) for name in names),
            ordered=True,
            version=scale.metadata.resource_version,
        )

    def new_names(self, listing: Listing, count: int) -> tuple[str, ...]:
        """The next ordinals."""
        name, there = self._targets[listing.group].name, len(listing.instances)
        return tuple(f"{name}-{ordinal}" for ordinal in range(there, there + count))

    async def add(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """Raise the number of replicas so that `names` are among them.

        Raises:
            ProviderUnavailable: nothing is known of the outcome, or the StatefulSet has changed since it was listed.
            ProviderRefused: `names` are not the next ordinals, or Kubernetes will not.
        """
        following = self.new_names(listing, len(names))
        if names != following:
            raise ProviderRefused(f"a StatefulSet adds its next ordinals, {_joined(following)}, not {_joined(names)}")
        await self._resize(listing, len(listing.instances) + len(names), token)

    async def remove(self, listing: Listing, names: tuple[str, ...], token: int) -> None:
        """Lower the number of replicas so that `names` are no longer among them.

        Raises:
            ProviderUnavailable: nothing is known of the outcome, or the StatefulSet has changed since it was listed.
            ProviderRefused: `names` are not the highest ordinals, or Kubernetes will not.
        """
        kept = len(listing.instances) - len(names)
        highest = tuple(instance.name for instance in listing.instances[max(0, kept) :])
        if kept < 0 or set(names) != set(highest):
            raise ProviderRefused(f"a StatefulSet removes its highest ordinals, {_joined(highest)}, not {_joined(names)}")
        await self._resize(listing, kept, token)

    async def close(self) -> None:
        """Let go of connections. Nodes stay."""
        await self._client.aclose()

    # --- changing ---------------------------------------------------------------------------------------------------

    async def _resize(self, listing: Listing, replicas: int, token: int) -> None:
        """Set the number of replicas, if the StatefulSet is still as it was listed."""
        if replicas == len(listing.instances):
            return
        target = self._targets[listing.group]
        doing = f"scaling {target} from {len(listing.instances)} to {replicas}"
        body = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {"name": target.name, "namespace": target.namespace, "resourceVersion": listing.version},
            "spec": {"replicas": replicas},
        }
        query = {"fieldManager": f"rocyard-autoscaler-{token}"}
        answer = await self._call("PUT", doing, target.scale_path, query, msgspec.json.encode(body))
        if answer.status_code == httpx.codes.CONFLICT:
            # Somebody was faster, perhaps this very call when its answer was lost: what counts is what is there now.
            now = await self._scale(doing, target)
            if now.spec.replicas != replicas:
                raise ProviderUnavailable(f"{doing}: it has changed since it was listed and has {now.spec.replicas} replicas")
            return
        if answer.status_code in _REFUSALS:
            raise ProviderRefused(_why(doing, answer))
        if not answer.is_success:
            raise ProviderUnavailable(_why(doing, answer))
        done = _whole(doing, answer, target)
        if done.spec.replicas != replicas:
            raise ProviderRefused(f"{doing}: something in the cluster has made it {done.spec.replicas}")

    # --- reading ----------------------------------------------------------------------------------------------------

    async def _pods(self, target: _Target, selector: str) -> tuple[dict[str, _Pod] | None, datetime]:
        """The pods by name and the time there, or None where pods may not be seen."""
        doing = f"listing the pods of {target}"
        now = datetime.now(UTC)
        if not selector:
            raise ProviderUnavailable(f"{doing}: its /scale names no selector")
        pods: dict[str, _Pod] = {}
        following = ""
        for _ in range(PAGES_MAX):
            query = {"labelSelector": selector, "limit": str(PAGE_PODS)} | ({"continue": following} if following else {})
            answer = await self._call("GET", doing, f"/api/v1/namespaces/{target.namespace}/pods", query)
            if answer.status_code == httpx.codes.FORBIDDEN:
                if self._may_see_pods:
                    log.warning("pods_not_seen", reason=_why(doing, answer))
                self._may_see_pods = False
                return None, now
            if not answer.is_success:
                raise ProviderUnavailable(_why(doing, answer))
            page = _decode(doing, answer, _PodList)
            pods |= {pod.metadata.name: pod for pod in page.items}
            following = page.metadata.following
            if not following:
                self._may_see_pods = True
                return pods, _clock_of(answer) or now
        raise ProviderUnavailable(f"{doing}: more than {PAGES_MAX * PAGE_PODS} pods")

    def _note_missing(self, target: _Target, missing: Iterable[str]) -> None:
        now_s = time.monotonic()
        others = {n: s for n, s in self._missing_since_s.items() if n.rpartition("-")[0] != target.name}
        self._missing_since_s = others | {name: self._missing_since_s.get(name, now_s) for name in missing}

    def _instance(self, name: str, pods: dict[str, _Pod] | None, now: datetime) -> Instance:
        pod = pods.get(name) if pods is not None else None
        if pod is not None:
            age_s = max(0.0, (now - pod.metadata.creation_timestamp).total_seconds())
            return Instance(name=name, age_s=age_s, problem=_problem_of(pod))
        age_s = time.monotonic() - self._missing_since_s[name]
        late = pods is not None and age_s >= PODLESS_S
        return Instance(name=name, age_s=age_s, problem="NoPod: kubectl describe says why it is not made" if late else "")

    async def _scale(self, doing: str, target: _Target) -> _Scale:
        answer = await self._call("GET", doing, target.scale_path, {})
        if not answer.is_success:
            raise ProviderUnavailable(_why(doing, answer))
        return _whole(doing, answer, target)

    async def _call(
        self, method: str, doing: str, path: str, query: dict[str, str], body: bytes | None = None
    ) -> httpx.Response:
        """One request, answered whole and in time.

        Raises:
            ProviderUnavailable: it was not.
        """
        headers = {"accept": "application/json"}
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            if self._token_path is not None:
                headers["authorization"] = f"Bearer {self._token_path.read_text(encoding='ascii').strip()}"
            # httpx counts its timeout anew with each piece that arrives.
            async with asyncio.timeout(self._deadline_s):
                return await self._client.request(method, path, params=query, content=body, headers=headers)
        except TimeoutError as error:
            raise ProviderUnavailable(f"{doing}: no answer within {self._deadline_s:g} s") from error
        except (httpx.HTTPError, OSError, UnicodeDecodeError) as error:
            raise ProviderUnavailable(f"{doing}: {type(error).__name__}: {error}"[:TEXT_MAX]) from error


def _targets_of(groups: Mapping[str, GroupSettings]) -> dict[str, _Target]:
    targets = {name: _target_of(name, group) for name, group in groups.items()}
    owners: dict[str, str] = {}
    for group, target in targets.items():
        if target.name in owners:
            raise SettingsError(
                f"groups.{group} and groups.{owners[target.name]} both name statefulset/{target.name}: each needs one whose "
                "name is its own, since nodes are called after their pods"
            )
        owners[target.name] = group
    return targets


def _target_of(group: str, settings: GroupSettings) -> _Target:
    match = _WORKLOAD.fullmatch(settings.workload)
    if match is None:
        raise SettingsError(
            f"groups.{group}.workload must be statefulset/NAME with provider kubernetes, such as "
            f"statefulset/rocyard-node-{group}, not {settings.workload!r}"
        )
    return _Target(settings.namespace, match[1])


def _tls(ca_path: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_path)
    except OSError as error:
        raise StartError(f"{ca_path} is no certificate of an authority: {error}") from error


def _whole(doing: str, answer: httpx.Response, target: _Target) -> _Scale:
    """The ``Scale`` that was answered, if it is of `target` and can be changed with a precondition."""
    scale = _decode(doing, answer, _Scale)
    if scale.metadata.name != target.name or not scale.metadata.resource_version:
        raise ProviderUnavailable(f"{doing}: the answer is about something else, or not whole")
    return scale


def _decode(doing: str, answer: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.DecodeError as error:
        raise ProviderUnavailable(f"{doing}: the answer is not whole: {error}"[:TEXT_MAX]) from error


def _why(doing: str, answer: httpx.Response) -> str:
    """What was being done and what Kubernetes says to it."""
    try:
        message = msgspec.json.decode(answer.content, type=_Failure).message
    except msgspec.DecodeError:
        message = ""
    return f"{doing}: {answer.status_code} {answer.reason_phrase}: {message}"[:TEXT_MAX].rstrip(": ")


def _clock_of(answer: httpx.Response) -> datetime | None:
    """The server's clock, by which pods are dated; ours may differ."""
    try:
        return email.utils.parsedate_to_datetime(answer.headers["date"]).replace(tzinfo=UTC)
    except (KeyError, ValueError):
        return None


def _problem_of(pod: _Pod) -> str:
    """Why the pod does not start; empty where it runs or may still come."""
    if pod.metadata.deletion_timestamp is not None:
        return ""  # it ends, and its StatefulSet makes it anew
    status = pod.status
    if status.phase == "Failed":
        return _told(status.reason or "Failed", status.message)
    for condition in status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            return _told(condition.reason, condition.message)
    for container in (*status.init_container_statuses, *status.container_statuses):
        waiting = container.state.waiting
        if waiting is not None and waiting.reason not in _ON_THE_WAY:
            return _told(waiting.reason or "Waiting", waiting.message)
    return ""


def _told(reason: str, message: str) -> str:
    return f"{reason}: {message}"[:TEXT_MAX].rstrip(": ")


def _joined(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
