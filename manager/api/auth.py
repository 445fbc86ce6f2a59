"""Who asks: from the Authorization header to an API key's record.

Owns the cache of records. A record is read again when it is older than `api.key_cache_s`, so a revoked key is refused that
soon; where the store cannot be read then, the request is refused as well. What is cached is records, never secrets: the
secret is hashed and compared at each request. The one key that the settings may fix (`api.key`) is an admin's of the tenant
`default`, stands in no store, and ends when the settings no longer hold it.
"""

import re
import time
from typing import Final

import msgspec

from manager.core.errors import Forbidden, Unauthorized
from manager.core.requests import KeyScope
from manager.keys import ApiKey, fixed_key, read_key, verify
from manager.settings import Secret
from manager.store import Store

CACHED_MAX: Final = 10_000
"""Ids that are remembered, unknown ones too: guessing must cost neither memory nor a read of the store each time."""

_HEADER: Final = re.compile(rb"[Bb]earer ry_([0-9a-z]{8})_([A-Za-z0-9_-]{43})")
_ANY_KEY: Final = re.compile(rb"[Bb]earer ([\x21-\x7e]{16,256})")


class _Known(msgspec.Struct, frozen=True):
    """A record as it was read, and when it is too old (on this process's monotonic clock)."""

    record: ApiKey | None
    until_s: float


class Authenticator:
    """Checks keys against the store.

    Args:
        store: where the records are.
        cache_s: how long a record is believed.
        fixed: the key that the settings fix; empty where they fix none.
    """

    def __init__(self, store: Store, cache_s: float, fixed: Secret) -> None:
        self._store = store
        self._cache_s = cache_s
        self._fixed = fixed_key(fixed.value) if fixed.value else None
        self._known: dict[bytes, _Known] = {}

    async def key(self, header: bytes, scope: KeyScope) -> ApiKey:
        """The key that the header holds, if it may do what `scope` may.

        Raises:
            Unauthorized: no key, or none that is in force.
            Forbidden: the key has fewer rights.
            StoreUnavailable: the key could not be checked.
        """
        if self._fixed is not None:
            given = _ANY_KEY.fullmatch(header)
            if given is not None and verify(self._fixed, given.group(1).decode()):
                return self._fixed  # an admin's: it may do what any scope may
        match = _HEADER.fullmatch(header)
        if match is None:
            raise Unauthorized
        key_id, secret = match.groups()
        known = self._known.get(key_id)
        if known is None or known.until_s < time.monotonic():
            known = await self._read(key_id)
        record = known.record
        if not verify(record, secret.decode()) or record is None:
            raise Unauthorized("That key is not valid: it is unknown, wrong or revoked.")
        if not record.may(scope):
            raise Forbidden(f"This key's scope is {record.scope.value!r}; that takes {scope.value!r}.")
        return record

    async def _read(self, key_id: bytes) -> _Known:
        record = await read_key(self._store, key_id.decode())
        if len(self._known) >= CACHED_MAX:
            self._known.pop(next(iter(self._known)))
        known = _Known(record, time.monotonic() + self._cache_s)
        self._known[key_id] = known
        return known
