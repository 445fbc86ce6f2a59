"""Where a list goes on, as a text that nobody can change.

A cursor is signed with the digest of the key that got it and is bound to tenant and filters: one that was changed, or that
another key got, is refused. So it needs no secret of its own, and every API process understands it, after a restart too.
"""

import base64
import binascii
import hashlib
import hmac
from typing import Final

from manager.core.errors import BadRequest
from manager.keys import ApiKey

_MAC_BYTES: Final = 16


def encode_cursor(key: ApiKey, filters: tuple[str, ...], before: int) -> str:
    """The cursor for tasks before the sequence number `before`."""
    number = before.to_bytes(8)
    return base64.urlsafe_b64encode(number + _mac(key, filters, number)).decode().rstrip("=")


def decode_cursor(key: ApiKey, filters: tuple[str, ...], text: str) -> int:
    """The sequence number that `text` was made from.

    Raises:
        BadRequest: it was not made for this key and these filters.
    """
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    number, mac = raw[:8], raw[8:]
    if len(raw) != 8 + _MAC_BYTES or not hmac.compare_digest(mac, _mac(key, filters, number)):
        raise BadRequest("cursor: it is not one that this key got for these filters; begin again without it.", field="cursor")
    return int.from_bytes(number)


def _mac(key: ApiKey, filters: tuple[str, ...], number: bytes) -> bytes:
    message = b"cursor\0" + "\0".join((key.tenant, *filters)).encode() + b"\0" + number
    return hmac.new(key.digest.encode(), message, hashlib.sha256).digest()[:_MAC_BYTES]
