"""The environment variables of the cluster manager that Rocyard replaces, as other names of our settings.

Names such as API_KEY or LOG_LEVEL may lie in anybody's environment and mean something else there. So they count where
somebody has put them for a cluster: in ``.env``; in the environment of a process only with ROCYARD_OLD_NAMES=true; and
nowhere with ROCYARD_OLD_NAMES=false. Each stands below our own variables. docs/old-names.md is held to the table by a test.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final
from urllib.parse import quote

import msgspec

from manager.core.errors import SettingsError
from manager.settings_sources import Origin, SettingPath, Values, is_from_kubernetes, kind_of

SWITCH: Final = "ROCYARD_OLD_NAMES"
EXAMPLE_KEY: Final = "your-development-api-key"
"""Stands in the old guide: everybody knows it."""
STORE_URL: Final = "store.url"

_SWITCH_WORDS: Final = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_LEVELS: Final = {
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "critical": "error",
    "fatal": "error",
}
_FORMATS: Final = {"json": "json", "text": "console", "console": "console"}
_MODES: Final = {word: "active" if on else "off" for word, on in _SWITCH_WORDS.items()}


class OldName(msgspec.Struct, frozen=True):
    """An old variable.

    Attributes:
        setting: ours. Those of the store are put together into its URL.
        default: what the old guide gives.
        words: what it may hold, in small letters, and what that is with us; empty: a value is taken as it stands.
    """

    name: str
    setting: str
    default: str
    words: Mapping[str, str] = {}


OLD_NAMES: Final = (
    OldName("REDIS_HOST", STORE_URL, "localhost"),
    OldName("REDIS_PORT", STORE_URL, "6379"),
    OldName("REDIS_DB", STORE_URL, "0"),
    OldName("REDIS_PASSWORD", STORE_URL, ""),
    OldName("API_HOST", "api.host", "0.0.0.0"),
    OldName("API_PORT", "api.port", "8000"),
    OldName("API_KEY", "api.key", EXAMPLE_KEY),
    OldName("MAX_WORKERS", "autoscaler.workers_max", "10"),
    OldName("TASK_TIMEOUT", "tasks.time_limit_s", "300"),
    OldName("HEARTBEAT_INTERVAL", "node.beat_s", "30"),
    OldName("WORKER_REGISTRATION_TIMEOUT", "node.registration_s", "60"),
    OldName("LOG_LEVEL", "log.level", "INFO", _LEVELS),
    OldName("LOG_FORMAT", "log.format", "json", _FORMATS),
    OldName("GPU_MEMORY_THRESHOLD", "node.memory_ratio_max", "0.8"),
    OldName("MODEL_CACHE_SIZE", "slots.idle_per_node_max", "5"),
    OldName("AUTO_SCALE_ENABLED", "autoscaler.mode", "true", _MODES),
)
_STORE: Final = tuple(old for old in OLD_NAMES if old.setting == STORE_URL)


class OldValues(msgspec.Struct, frozen=True):
    """What old variables say.

    Attributes:
        values: settings from them.
        names: the variables behind each setting.
        problems: what is wrong with them, one text each.
    """

    values: Values
    names: dict[SettingPath, tuple[str, ...]]
    problems: tuple[str, ...]


def read_old_names(dotenv: Mapping[str, str], environ: Mapping[str, str]) -> OldValues:
    """The settings that old variables hold; one of the environment, where those count, wins over one in ``.env``.

    Raises:
        SettingsError: the switch is neither true nor false.
    """
    wanted = _switch({**dotenv, **environ}.get(SWITCH))
    found: dict[str, tuple[str, str]] = {}
    if wanted is not False:
        found |= _given(dotenv, ".env")
    if wanted:
        found |= _given(environ, "the environment")
    values: Values = {}
    names: dict[SettingPath, tuple[str, ...]] = {}
    problems: list[str] = []
    for setting, members, read in _settings():
        here = {name: found[name][0] for name in members if name in found}
        if not here:
            continue
        path = tuple(setting.split("."))
        places = " and ".join(dict.fromkeys(found[name][1] for name in here))
        s, them = ("s", "them") if len(here) > 1 else ("", "it")
        place = f"{' and '.join(here)}, old name{s} in {places}; {SWITCH}=false leaves {them} alone"
        try:
            values[path] = Origin(read(here), place, "variable")
            names[path] = tuple(here)
        except ValueError as error:
            problems.append(f"{error} ({place})")
    return OldValues(values, names, tuple(problems))


def note_on(old: OldValues, settled: Values) -> str | None:
    """One line on the old variables that took effect in `settled`; None where none did."""
    used = [name for path, names in old.names.items() if settled[path] is old.values[path] for name in names]
    if not used:
        return None
    return f"old names are in use: {', '.join(used)}; docs/old-names.md tells what differs, {SWITCH}=false leaves them alone"


def _settings() -> Iterator[tuple[str, tuple[str, ...], Callable[[Mapping[str, str]], str]]]:
    """Each setting with its old names, and what makes its value of theirs."""
    yield STORE_URL, tuple(old.name for old in _STORE), _store_url
    for old in OLD_NAMES:
        if old.setting != STORE_URL:
            yield old.setting, (old.name,), partial(_word, old)


def _switch(text: str | None) -> bool | None:
    if not text:
        return None
    wanted = _SWITCH_WORDS.get(text.strip().lower())
    if wanted is None:
        raise SettingsError(f"{SWITCH} must be true or false, not {kind_of(text)}")
    return wanted


def _given(variables: Mapping[str, str], place: str) -> dict[str, tuple[str, str]]:
    """The old variables among `variables` and where they stand. An empty one is none, as an empty password always was."""
    given = {old.name: variables[old.name].strip() for old in OLD_NAMES if old.name in variables}
    return {
        name: (value, place)
        for name, value in given.items()
        # Kubernetes sets REDIS_PORT=tcp://… beside a service that is called redis.
        if value and not is_from_kubernetes(name, value)
    }


def _word(old: OldName, given: Mapping[str, str]) -> str:
    value = given[old.name]
    if old.name == "API_KEY" and value == EXAMPLE_KEY:
        raise ValueError("API_KEY is the example of the old guide, which everybody knows: write a secret of your own, or none")
    if not old.words:
        return value
    ours = old.words.get(value.lower())
    if ours is None:
        raise ValueError(f"{old.name} must be one of {', '.join(old.words)}, not {kind_of(value)}")
    return ours


def _store_url(given: Mapping[str, str]) -> str:
    """The URL of the Redis that the four variables name; those that are not given have the old defaults."""
    host, port, db, password = (given.get(old.name, old.default) for old in _STORE)
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"REDIS_PORT must be a port from 1 to 65535, not {kind_of(port)}")
    if not db.isdecimal():
        raise ValueError(f"REDIS_DB must be a whole number from 0, not {kind_of(db)}")
    if "/" in host or "@" in host:
        raise ValueError("REDIS_HOST must be the name or the address of a host; for a URL use ROCYARD_STORE__URL")
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    login = f":{quote(password, safe='')}@" if password else ""
    return f"redis://{login}{shown}:{int(port)}/{int(db)}"
