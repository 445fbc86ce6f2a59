"""Whether a store keeps what it accepts, by what it says of itself. Pure: `/readyz` and `rocyard doctor` ask and tell.

A fault means that tasks cannot be accepted, or that an accepted one may be gone for good. A warning is for a person: it costs
at most the last moment before a power cut, or cannot be known.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

SETTINGS: Final = ("appendonly", "appendfsync", "maxmemory-policy", "save", "stop-writes-on-bgsave-error")
"""What is asked of the store's settings."""
SECTIONS: Final = ("persistence", "replication", "memory")
"""What is asked of INFO."""
FULL_RATIO: Final = 0.9


class Durability(msgspec.Struct, frozen=True):
    """What is to be said of a store, in sentences.

    Attributes:
        fsync: ``always``, ``everysec``, ``no``, ``off`` or ``unknown``.
        faults: why it must not be given tasks.
        warnings: what somebody should know.
    """

    fsync: str
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def fsync_of(config: Mapping[str, str] | None) -> str:
    """How the store syncs: ``off`` where it writes no log, ``unknown`` where it may not be asked."""
    if config is None:
        return "unknown"
    return config.get("appendfsync", "unknown") if config.get("appendonly") == "yes" else "off"


def durability_of(config: Mapping[str, str] | None, info: Mapping[str, str]) -> Durability:
    """What is to be said of a store with these settings (None: it does not tell them) and this INFO."""
    fsync = fsync_of(config)
    faults, warnings = [], []
    if info.get("role", "master") != "master":
        faults.append("The store is a replica and refuses writes: store.url must lead to the primary.")
    if info.get("aof_last_write_status", "ok") != "ok":
        faults.append("The store cannot write its log, mostly because its disk is full: see the store's own log.")
    match fsync:
        case "always":
            pass
        case "everysec":
            warnings.append(
                "The store syncs once a second: a power cut loses up to two seconds of tasks. Set 'appendfsync always'."
            )
        case "unknown":
            warnings.append("The store does not let its durability be checked (CONFIG is not allowed): see to it yourself.")
        case "off":
            faults.append("The store writes no log, and forgets accepted tasks: set 'appendonly yes' and 'appendfsync always'.")
        case _:
            faults.append(f"The store never syncs its log (appendfsync {fsync}): set 'appendfsync always'.")
    stops = config is not None and config.get("save") and config.get("stop-writes-on-bgsave-error") == "yes"
    if stops and info.get("rdb_last_bgsave_status", "ok") != "ok":
        faults.append("The store could not save a snapshot and refuses writes since: see its own log, mostly its disk is full.")
    used, most = int(info.get("used_memory", "0")), int(info.get("maxmemory", "0"))
    policy = info.get("maxmemory_policy", "noeviction")
    if most and policy != "noeviction":
        faults.append(f"The store may throw tasks away (maxmemory-policy {policy}): set 'maxmemory-policy noeviction'.")
    if most and used > FULL_RATIO * most:
        warnings.append("The store is nearly full; when it is, new tasks are refused: raise maxmemory, or keep fewer tasks.")
    return Durability(fsync, tuple(faults), tuple(warnings))


def info_lines(text: str) -> dict[str, str]:
    """INFO's answer as pairs."""
    pairs = (line.partition(":") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}
