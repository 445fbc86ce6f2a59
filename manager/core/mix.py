"""The mix of requests that the scheduler has learned, as it travels: to the leader, into the store, and to who asks. Pure."""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import msgspec

from manager.core.shapes import Resources

CLASSES_TOLD_MAX: Final = 256
"""Classes of requests that are told, those with the largest shares: as many as an outlook looks at."""


class Mix(msgspec.Struct, frozen=True):
    """How often each class of requests comes.

    Attributes:
        revision: stands for all the rest: mixes that say the same have the same one, whoever counted. Empty: nothing is known.
        counted: how many requests it was learned from.
        shares: classes with their part of all requests.
    """

    revision: str = ""
    counted: int = 0
    shares: tuple[tuple[Resources, float], ...] = ()


NO_MIX: Final = Mix()

encode_mix = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Mix).decode


def mix_of(shares: Iterable[tuple[Resources, float]], counted: int) -> Mix:
    """The mix of these shares, without the rarest where there are too many."""
    kept = tuple(shares)
    if len(kept) > CLASSES_TOLD_MAX:
        kept = tuple(sorted(kept, key=lambda share: -share[1])[:CLASSES_TOLD_MAX])
    revision = sha256(msgspec.json.encode((counted, kept))).hexdigest()[:16]
    return Mix(revision, counted, kept)


@lru_cache(maxsize=4)
def decode_mix(raw: bytes) -> Mix:
    """The mix in the store, the same object for the same bytes. One that another version wrote and this one cannot read is
    none: it says what is likely to come, and work is placed without it.
    """
    try:
        return _decode(raw) if raw else NO_MIX
    except msgspec.DecodeError:
        return NO_MIX


def mix_from(plain: Any) -> Mix | None:
    """The mix in plain values, as the scheduler tells it; None where there is none, or none that this version can read."""
    try:
        return msgspec.convert(plain, Mix | None)
    except msgspec.ValidationError:
        return None
