"""An emulated Kubernetes API server: `/scale` of StatefulSets and pods, over real sockets, with faults on demand.

It knows what matters to a client that scales: resource versions and 409, tokens and 401, rights and 403, pages, what is left
out when it is zero. Nothing runs in it: a test says what the pods look like.
"""

import asyncio
import contextlib
import datetime as dt
import email.utils
import json
import re
import ssl
from collections.abc import AsyncIterator
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

SCALE = re.compile(r"/apis/apps/v1/namespaces/([^/]+)/statefulsets/([^/]+)/scale")
PODS = re.compile(r"/api/v1/namespaces/([^/]+)/pods")
REASONS = {
    200: "OK", 302: "Found", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict", 410: "Gone",
    422: "Unprocessable Entity", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


class Seen(NamedTuple):
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: dict


class Fault(NamedTuple):
    """What happens to one request in place of, or on top of, its answer.

    `kind`: "status" answers so at once; "hang" says nothing; "drip" sends a byte now and then; "truncate" ends in the
    middle; "half" is well-formed HTTP with half the JSON; "lost" does what was asked and closes; "raw" answers 200 with
    `text`.
    """

    kind: str
    status: int = 500
    text: str = ""


class FakeKubernetes:
    def __init__(self) -> None:
        self.scales: dict[tuple[str, str], dict] = {}
        self.pods: dict[str, list[dict]] = {}
        self.token = "token-1"
        self.denied: set[str] = set()
        self.page = 500
        self.clock = dt.datetime(2026, 11, 23, 12, 0, 0, tzinfo=dt.UTC)
        self.faults: dict[str, list[Fault]] = {}
        self.stale: dict | None = None
        self.requests: list[Seen] = []
        self.url = ""

    # --- the world ----------------------------------------------------------------------------------------------

    def statefulset(self, name: str, replicas: int, namespace: str = "gpu") -> None:
        self.scales[namespace, name] = {"replicas": replicas, "version": 100}

    def replicas(self, name: str, namespace: str = "gpu") -> int:
        return self.scales[namespace, name]["replicas"]

    def touch(self, name: str, replicas: int | None = None, namespace: str = "gpu") -> None:
        """Somebody else writes: the version goes on, perhaps the size too."""
        scale = self.scales[namespace, name]
        scale["version"] += 1
        if replicas is not None:
            scale["replicas"] = replicas

    def pod(self, name: str, age_s: float = 60.0, status: dict | None = None, ending: bool = False, namespace: str = "gpu"):
        created = self.clock - dt.timedelta(seconds=age_s)
        metadata = {"name": name, "namespace": namespace, "creationTimestamp": created.strftime("%Y-%m-%dT%H:%M:%SZ")}
        if ending:
            metadata["deletionTimestamp"] = self.clock.strftime("%Y-%m-%dT%H:%M:%SZ")
        pod = {"metadata": metadata, "spec": {"containers": []}, "status": status or {"phase": "Running"}}
        self.pods.setdefault(namespace, []).append(pod)

    def fail(self, what: str, *faults: Fault) -> None:
        """The next requests of the kind ("GET scale", "PUT scale", "GET pods") meet these."""
        self.faults.setdefault(what, []).extend(faults)

    def writes(self) -> list[Seen]:
        return [seen for seen in self.requests if seen.method != "GET"]

    # --- HTTP ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["FakeKubernetes"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        self._open: set[asyncio.Task] = set()
        try:
            yield self
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._open.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        seen = Seen(method, parts.path, query, headers, json.loads(body) if body else {})
        self.requests.append(seen)
        what = f"{method} {'scale' if SCALE.fullmatch(parts.path) else 'pods'}"
        fault = self.faults[what].pop(0) if self.faults.get(what) else None
        if fault is not None and fault.kind == "status":
            status, answer = fault.status, failure(fault.status, fault.text or "injected")
        elif fault is not None and fault.kind == "hang":
            await asyncio.sleep(3600)
        else:
            status, answer = self._answer(seen)
        if fault is not None and fault.kind == "lost":
            return False
        content = fault.text.encode("latin-1") if fault is not None and fault.kind == "raw" else json.dumps(answer).encode()
        sent = content[: len(content) // 2] if fault is not None and fault.kind in {"truncate", "half"} else content
        length = len(sent) if fault is not None and fault.kind == "half" else len(content)
        date = email.utils.format_datetime(self.clock, usegmt=True)
        retry = "Retry-After: 1\r\n" if status == 429 else ""
        writer.write(
            f"HTTP/1.1 {status} {REASONS[status]}\r\nDate: {date}\r\nContent-Type: application/json\r\n{retry}"
            f"Content-Length: {length}\r\n\r\n".encode()
        )
        if fault is not None and fault.kind == "drip":
            for byte in sent:
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.write(sent)
        await writer.drain()
        return fault is None or fault.kind != "truncate"

    # --- what it answers ----------------------------------------------------------------------------------------

    def _answer(self, seen: Seen) -> tuple[int, dict]:
        if seen.headers.get("authorization") != f"Bearer {self.token}":
            return 401, failure(401, "Unauthorized")
        if match := SCALE.fullmatch(seen.path):
            return self._scale(seen, match[1], match[2])
        if (match := PODS.fullmatch(seen.path)) and seen.method == "GET":
            return self._pods(seen, match[1])
        return 404, failure(404, "the server could not find the requested resource")

    def _scale(self, seen: Seen, namespace: str, name: str) -> tuple[int, dict]:
        verb = {"GET": "get", "PUT": "update", "PATCH": "patch"}.get(seen.method, seen.method)
        if f"{verb} scale" in self.denied:
            return 403, failure(403, f'statefulsets.apps "{name}" is forbidden: User "x" cannot {verb} resource')
        there = self.scales.get((namespace, name))
        if there is None:
            return 404, failure(404, f'statefulsets.apps "{name}" not found')
        if seen.method == "GET":
            shown, self.stale = self.stale or there, None
            return 200, scale_of(namespace, name, shown)
        asked = seen.body
        if asked["kind"] != "Scale" or asked["apiVersion"] != "autoscaling/v1" or asked["metadata"]["name"] != name:
            return 422, failure(422, "the name of the object does not match the name on the URL")
        wanted = asked["metadata"].get("resourceVersion")
        if wanted and wanted != str(there["version"]):
            return 409, failure(
                409, f'Operation cannot be fulfilled on statefulsets.apps "{name}": the object has been modified'
            )
        if asked["spec"].get("replicas", 0) < 0:
            return 422, failure(422, "spec.replicas: must be greater than or equal to 0")
        there["replicas"] = asked["spec"].get("replicas", 0)
        there["version"] += 1
        return 200, scale_of(namespace, name, there)

    def _pods(self, seen: Seen, namespace: str) -> tuple[int, dict]:
        if "list pods" in self.denied:
            return 403, failure(403, 'pods is forbidden: User "x" cannot list resource "pods"')
        name = seen.query["labelSelector"].removeprefix("app=")
        pods = [p for p in self.pods.get(namespace, []) if p["metadata"]["name"].rpartition("-")[0] == name]
        begin, page = int(seen.query.get("continue", 0)), min(self.page, int(seen.query["limit"]))
        metadata = {"resourceVersion": "7"} | ({"continue": str(begin + page)} if begin + page < len(pods) else {})
        return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": pods[begin : begin + page]}


def scale_of(namespace: str, name: str, there: dict) -> dict:
    """As the real server writes it: what is 0 is left out of the specification, not of the status."""
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": str(there["version"])},
        "spec": {"replicas": there["replicas"]} if there["replicas"] else {},
        "status": {"replicas": there["replicas"], "selector": f"app={name}"},
    }


def failure(status: int, message: str) -> dict:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
