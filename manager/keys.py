"""API keys: making, checking, listing and revoking them. The store has only a hash of each key's secret.

A key is the text ``ry_<8 id>_<43 secret>``: the id names the record, the secret is 256 random bits in base64url. Owns the
form of the text and of the record. Must not cache: who checks keys often does that, for as long as its settings say.
"""

import hashlib
import hmac
import re
import secrets
import time
from typing import Final

import msgspec

from manager.core.answers import utc, utc_or_none
from manager.core.answers_tenants import KeyView
from manager.core.errors import BadRequest, NotFound, RocyardError
from manager.core.requests import NAME_PATTERN, KeyScope
from manager.store import Store

_KEY: Final = re.compile(r"ry_([0-9a-z]{8})_([A-Za-z0-9_-]{43})")
_NAME: Final = re.compile(NAME_PATTERN)
_ID_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_MAY: Final[dict[KeyScope, frozenset[KeyScope]]] = {
    KeyScope.ADMIN: frozenset(KeyScope),
    KeyScope.USER: frozenset({KeyScope.USER, KeyScope.READ}),
    KeyScope.READ: frozenset({KeyScope.READ}),
}
assert _MAY.keys() == set(KeyScope)


class LastAdminKey(RocyardError):
    """The last admin key cannot be revoked: make another one first."""

    status = 409


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """The record of a key.

    Attributes:
        digest: SHA-256 of the secret, in hexadecimal. The secret has 256 bits of its own, so no salt is needed.
        created_ms, revoked_ms: milliseconds since 1970, UTC.
    """

    key_id: str
    digest: str
    tenant: str
    scope: KeyScope
    created_ms: int
    revoked_ms: int | None = None

    def may(self, scope: KeyScope) -> bool:
        """Whether this key has the rights of `scope`."""
        return scope in _MAY[self.scope]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ApiKey).decode
_NOBODY: Final = hashlib.sha256(secrets.token_bytes(32)).hexdigest()


def parse_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key's text; None where it cannot be one."""
    match = _KEY.fullmatch(text)
    return (match.group(1), match.group(2)) if match else None


def is_tenant(name: str) -> bool:
    """Whether a tenant can be called that."""
    return _NAME.fullmatch(name) is not None and not name.endswith("\n")


def make_key(tenant: str, scope: KeyScope, now_ms: int) -> tuple[str, ApiKey]:
    """A new key: its text, to be shown once, and its record.

    Raises:
        BadRequest: a tenant cannot be called that.
    """
    if not is_tenant(tenant):
        raise BadRequest(f"{tenant[:80]!r} cannot name a tenant: use a-z, 0-9 and '-', at most 63, not '-' first")
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    secret = secrets.token_urlsafe(32)
    return f"ry_{key_id}_{secret}", ApiKey(key_id, _digest(secret), tenant, scope, now_ms)


def fixed_key(text: str) -> ApiKey:
    """The record of a key that the settings fix: it stands in no store, and is checked like all others."""
    return ApiKey("settings", _digest(text), "default", KeyScope.ADMIN, 0)


def verify(record: ApiKey | None, secret: str) -> bool:
    """Whether `secret` is that of `record` and the key is in force. Takes the same time where there is no record."""
    right = hmac.compare_digest(_digest(secret), _NOBODY if record is None else record.digest)
    return right and record is not None and record.revoked_ms is None


def view_of(record: ApiKey) -> KeyView:
    """The record as it may be shown."""
    return KeyView(
        key_id=record.key_id,
        tenant=record.tenant,
        scope=record.scope,
        created_at=utc(record.created_ms),
        revoked_at=utc_or_none(record.revoked_ms),
    )


async def create_key(store: Store, tenant: str, scope: KeyScope) -> tuple[str, ApiKey]:
    """Make a key and keep its record. Returns the text, which nobody can read again, and the record."""
    text, record = make_key(tenant, scope, _now_ms())
    await store.put_api_key(record.key_id, _encode(record))
    return text, record


async def read_key(store: Store, key_id: str) -> ApiKey | None:
    """The record of a key."""
    blob = await store.api_key(key_id)
    return None if blob is None else _decode(blob)


async def list_keys(store: Store) -> list[ApiKey]:
    """All keys, revoked ones too, by id."""
    return [_decode(blob) for blob in (await store.api_keys()).values()]


async def revoke_key(store: Store, key_id: str) -> ApiKey:
    """Revoke a key; every API process refuses it within `api.key_cache_s`. Revoking it again changes nothing.

    Raises:
        NotFound: there is no such key.
        LastAdminKey: nobody could make another one.
    """
    keys = {record.key_id: record for record in await list_keys(store)}
    record = keys.get(key_id)
    if record is None:
        raise NotFound("There is no key by that id; see GET /v1/keys.")
    if record.revoked_ms is not None:
        return record
    admins = [other for other in keys.values() if other.scope is KeyScope.ADMIN and other.revoked_ms is None]
    if record.scope is KeyScope.ADMIN and len(admins) == 1:
        raise LastAdminKey
    revoked = msgspec.structs.replace(record, revoked_ms=_now_ms())
    await store.put_api_key(key_id, _encode(revoked))
    return revoked


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
