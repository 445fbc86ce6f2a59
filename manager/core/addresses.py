"""Hosts as people write them in settings and URLs: which are loopback, which mean "every address", how they stand in a URL.

Nothing is looked up: a name that is not ``localhost`` counts as reachable from outside.
"""

import ipaddress
from typing import Final

_WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})


def is_wildcard(host: str) -> bool:
    """Whether a server that listens on `host` listens on every address."""
    return host in _WILDCARDS


def is_loopback(host: str) -> bool:
    """Whether `host` is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dialled(host: str) -> str:
    """Where this machine reaches a server of its own that listens on `host`."""
    if not is_wildcard(host):
        return host
    return "::1" if host == "::" else "127.0.0.1"


def in_url(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
