"""One HTTP connection pool of the client: sending, waiting, trying again, and how errors come out.

GETs are sent again, and submissions, each of which bears a key by which the API knows it. Other POSTs are sent once: whether
one whose answer was lost has done its work is not known.
"""

import base64
import hashlib
import random
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from manager.client_address import CA_VARIABLE, ClusterAddress, checked_key
from manager.client_errors import ClusterUnreachable, UnexpectedAnswer, error_of
from manager.core.errors import BadRequest, RocyardError, SettingsError, Unauthorized
from manager.tls import client_context

ANSWER_S: Final = 15.0
"""Longest wait for an answer: over the store's deadline on the server, so that its words arrive and not our timeout."""
CONNECT_S: Final = 5.0
IDLE_CONNECTION_S: Final = 2.0
"""Under the server's own limit (uvicorn: 5 s): a POST must not go out on a connection that is just being closed."""
CONNECTIONS_MAX: Final = 32
"""Threads that share a client: more than any program of ours starts."""
PATIENCE_S: Final = 5.0
"""How long a GET is tried again: a restart of the API takes less."""
SUBMIT_PATIENCE_S: Final = 10.0
"""The same of a submission: a store that restarts takes less, too."""
PAUSE_S_MAX: Final = 2.0
PIECE_BYTES: Final = 128 * 1024
"""Of a large answer, at once."""

_FULL: Final = b'"code":"StoreFull"'
"""This lasts: whoever asks decides for how long it is worth while."""
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")
"""What the API takes, less spaces at the ends: these are no part of a header."""

T = TypeVar("T")


class Wire:
    """Sends requests to one cluster with one key. Safe to share between threads."""

    def __init__(self, address: ClusterAddress, transport: httpx.BaseTransport | None = None) -> None:
        self.address = address
        self._answered = False
        key = checked_key(address.api_key.value, address.key_source)
        self._http = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, keepalive_expiry=IDLE_CONNECTION_S),
            transport=transport,
            verify=_trusted(address),
            # A proxy of the environment cannot know our loopback.
            trust_env=urlsplit(address.url).hostname not in {"127.0.0.1", "::1", "localhost"},
        )

    def post(self, path: str, body: bytes, kind: type[T], query: Mapping[str, str] | None = None) -> T:
        """POST once."""
        return self._once("POST", path, body, kind, query)

    def submit(self, path: str, body: bytes, kind: type[T], key: str) -> T:
        """POST until there is an answer, or `SUBMIT_PATIENCE_S` has gone by without one: however often, it is accepted once.

        Raises:
            RocyardError: where `details` has the key, whether it was accepted is not known: ask again with that.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return self._again("POST", path, kind, SUBMIT_PATIENCE_S, key, content=body, headers=headers)

    def delete(self, path: str, kind: type[T], query: Mapping[str, str] | None = None) -> T:
        """DELETE once."""
        return self._once("DELETE", path, b"", kind, query)

    def _once(self, method: str, path: str, body: bytes, kind: type[T], query: Mapping[str, str] | None) -> T:
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            response = self._http.request(method, path, content=body, params=query, headers=headers)
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TransportError as error:
            raise self._no_answer(error) from error
        return self._decoded(response, kind)

    def get(
        self,
        path: str,
        kind: type[T],
        query: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        patience_s: float = PATIENCE_S,
    ) -> T:
        """GET until there is an answer, or `patience_s` has gone by without a useful one."""
        timeout = httpx.Timeout(ANSWER_S + wait_s, connect=CONNECT_S)
        return self._again("GET", path, kind, patience_s, params=query, timeout=timeout)

    def _again(self, method: str, path: str, kind: type[T], patience_s: float, key: str = "", **request: Any) -> T:
        """As `get`, or `submit` with its key."""
        end_s = time.monotonic() + patience_s
        attempt, unknown = 0, False
        while True:
            try:
                response = self._http.request(method, path, **request)
                passes = response.status_code in {502, 503, 504} and _FULL not in response.content
                unknown = unknown or (bool(key) and passes)
                if not passes or time.monotonic() >= end_s:
                    return self._decoded(response, kind)
                self._answered = True
            except httpx.TransportError as error:
                unknown = unknown or (bool(key) and not isinstance(error, httpx.ConnectError))
                # What has never answered is most likely not there: say so at once, unless it may have taken something.
                if (not self._answered and not unknown) or time.monotonic() >= end_s:
                    raise (self._no_answer(error, idempotency_key=key) if unknown else self._unreachable(error)) from error
            except RocyardError as error:
                if unknown and error.retryable:
                    error.details["idempotency_key"] = key
                raise
            # Full jitter, so that the clients of a restarted API do not come back together.
            time.sleep(min(random.uniform(0, min(PAUSE_S_MAX, 0.1 * 2**attempt)), max(end_s - time.monotonic(), 0)))  # noqa: S311
            attempt += 1

    def stream(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The body of a GET, piece by piece; the last one comes only if all are what the server has.

        Raises:
            ClusterUnreachable: it broke off: the API was stopped, or what it has is damaged, which it tells by that.
            UnexpectedAnswer: what came is not what its digest (``Repr-Digest``) is of.
        """
        digest, held = hashlib.sha256(), b""
        try:
            with self._http.stream("GET", path, params=query) as response:
                self._answered = True
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                for piece in response.iter_raw(PIECE_BYTES):
                    digest.update(piece)
                    if held:
                        yield held
                    held = piece
        except httpx.TransportError as error:
            if not self._answered or isinstance(error, httpx.ConnectError):
                raise self._unreachable(error) from error
            raise ClusterUnreachable(
                f"{self.address.url}{path} broke off ({_words(error)}). Ask for it again; if it breaks off there each time, "
                "its file is damaged, and the log of the API says how: then submit the task again, or put the file back."
            ) from error
        told = response.headers.get("repr-digest", "")
        if told and told != f"sha-256=:{base64.b64encode(digest.digest()).decode()}:":
            raise UnexpectedAnswer(f"{path} is not what the server says that it has sent: its SHA-256 is {digest.hexdigest()}.")
        if held:
            yield held

    def _decoded(self, response: httpx.Response, kind: type[T]) -> T:
        self._answered = True
        if response.is_success:
            try:
                return msgspec.json.decode(response.content, type=kind)
            except msgspec.DecodeError as error:
                words = f"{response.request.url.path} answered what this client does not understand ({error})"
                raise UnexpectedAnswer(f"{words}: are {self.address.url} and this client of one version?") from error
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> RocyardError:
        refusal = error_of(response.status_code, response.content)
        if isinstance(refusal, Unauthorized):
            return Unauthorized(f"{refusal} The key came from {self.address.key_source}.", **refusal.details)
        return refusal

    def _no_answer(self, error: httpx.TransportError, **details: str) -> ClusterUnreachable:
        return ClusterUnreachable(
            f"{self.address.url} did not answer ({_words(error)}); whether it did what was asked is not known.", **details
        )

    def _unreachable(self, error: httpx.TransportError) -> ClusterUnreachable:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            believed = self.address.ca or "an authority that this machine trusts"
            return ClusterUnreachable(
                f"{self.address.url} is not believed: its certificate is none of {believed} for that name ({_words(error)}). "
                f"Set {CA_VARIABLE} to the path of the cluster's ca.pem, and name it by what its certificate is for."
            )
        if "WRONG_VERSION_NUMBER" in str(error):
            return ClusterUnreachable(f"{self.address.url} answers without TLS: write http:// for a cluster that has none.")
        return ClusterUnreachable(
            f"No cluster answers at {self.address.url} ({_words(error)}; the address is from {self.address.source}). "
            "Start one with 'rocyard up', or set ROCYARD_URL."
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _trusted(address: ClusterAddress) -> ssl.SSLContext | bool:
    if not address.ca or not address.url.startswith("https://"):
        return True
    try:
        return client_context(address.ca)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{address.ca} is no certificate of an authority ({error}): set {CA_VARIABLE} to one") from None


def checked_idempotency_key(given: str) -> str:
    """`given`, which can be sent.

    Raises:
        BadRequest: it is no key; says what one is.
    """
    if not _IDEMPOTENCY_KEY.fullmatch(given):
        words = "1 to 255 printable ASCII characters, no space at either end."
        raise BadRequest(f"Idempotency-Key: {words}", field="Idempotency-Key")
    return given


def segment(text: str) -> str:
    """`text` as one segment of a path: an id from outside must not reach another route."""
    if not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise BadRequest(f"{text[:80]!r} is no id.")
    return text


def _words(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
