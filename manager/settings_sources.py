"""Reads settings out of a YAML file, a ``.env`` file and the environment, as flat paths with the place each came from.

Owns what may stand in those files (no duplicate keys, no aliases, nothing deep or large) and nothing about which
settings exist: that is `manager.settings_load`.
"""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import yaml
from dotenv.parser import parse_stream

from manager.core.errors import SettingsError

PREFIX: Final = "ROCYARD_"
RESERVED_VARIABLES: Final = frozenset(
    {
        "ROCYARD_CONFIG",
        "ROCYARD_URL",
        "ROCYARD_API_KEY",
        "ROCYARD_CA",
        "ROCYARD_OLD_NAMES",
        "ROCYARD_TASK_ID",
        "ROCYARD_ATTEMPT",
        "ROCYARD_ARRAY_INDEX",
        "ROCYARD_ARRAY_COUNT",
        "ROCYARD_SIMULATED_DEVICES",
        "ROCYARD_SIMULATED_DIR",
    }
)
"""Variables with our prefix that are no settings: where the YAML lies, what the client reads, what a task finds, and
whether old names count."""

FILE_BYTES_MAX: Final = 1024 * 1024
"""A thousand times a real settings file, and read in an instant."""
DEPTH_MAX: Final = 16
"""Settings are four deep."""

# Kubernetes puts ROCYARD_API_SERVICE_HOST, ROCYARD_API_PORT=tcp://… into each pod near a service called rocyard-api.
_KUBERNETES_NAME: Final = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_KUBERNETES_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")

SettingPath = tuple[str, ...]


class Origin(msgspec.Struct, frozen=True):
    """One value and where it stands.

    Attributes:
        value: as read: text from variables and flags, anything from YAML.
        place: for people: ``rocyard.yaml``, ``ROCYARD_API__PORT, environment``.
        source: what kind of place; decides how names are written in messages.
    """

    value: Any
    place: str
    source: Literal["yaml", "variable", "flag"]


Values = dict[SettingPath, Origin]
"""Settings by path, such as ``("api", "port")``. An empty section is its own path."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: what YAML allows beyond it is a mistake in settings, or an attack on the reader."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not allowed")
        self.depth += 1
        if self.depth > DEPTH_MAX:
            raise self._refusal(f"nested more than {DEPTH_MAX} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refusal(self, what: str) -> yaml.MarkedYAMLError:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=what, problem_mark=mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="a key must be a plain name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Values:
    """The settings in one YAML file; an empty file holds none.

    Raises:
        SettingsError: the file cannot be read, is no YAML, or is no mapping.
    """
    text = _read_file(path)
    try:
        document = _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Dates and numbers that look right but are not raise plain errors.
        raise SettingsError(f"{path} is not readable as YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{path} must be a mapping such as 'api: {{port: 8000}}', not {kind_of(document)}")
    return dict(_flatten(document, (), path.name))


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a ``.env`` file, unexpanded; no file holds none.

    Raises:
        SettingsError: names the line that cannot be read.
    """
    if not path.is_file():
        return {}
    variables: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_read_file(path))):
        if binding.error or (binding.key is not None and binding.value is None):
            raise SettingsError(f"{path}, line {binding.original.line}: write NAME=value")
        if binding.key is not None and binding.value is not None:
            variables[binding.key] = binding.value
    return variables


def read_variables(variables: Mapping[str, str], place: str) -> Values:
    """The settings among `variables`: ``ROCYARD_SECTION__KEY`` is ``section.key``. Names of others are left alone."""
    values: Values = {}
    for name, value in variables.items():
        if not name.upper().startswith(PREFIX) or name in RESERVED_VARIABLES or is_from_kubernetes(name, value):
            continue
        # A name in the wrong case keeps it, so that it is reported instead of taken for the right one.
        rest = name[len(PREFIX) :]
        path = tuple((rest.lower() if name.isupper() else rest).split("__"))
        values[path] = Origin(value, f"{name}, {place}", "variable")
    return values


def read_flags(overrides: Mapping[str, str]) -> Values:
    """The settings among command line flags: ``section.key`` to text."""
    return {tuple(name.split(".")): Origin(value, f"flag {name}", "flag") for name, value in overrides.items()}


def variable_of(path: SettingPath) -> str:
    """The variable that sets `path`."""
    return PREFIX + "__".join(path).upper()


def kind_of(value: object) -> str:
    """What `value` is, for people, with the value where it is short."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return f"the number {value!r}"[:60]
        case str():
            return f"the text {value[:60]!r}"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


def is_from_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes put this variable there, for a service near the pod."""
    return bool(_KUBERNETES_NAME.search(name) or (name.endswith("_PORT") and _KUBERNETES_VALUE.match(value)))


def _read_file(path: Path) -> str:
    try:
        if not path.is_file():
            raise SettingsError(f"{path} is not a file: name a YAML file, or leave it out for the defaults")
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise SettingsError(f"{path} is larger than {FILE_BYTES_MAX} bytes: this is no settings file")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _flatten(mapping: dict[Any, Any], path: SettingPath, place: str) -> Iterator[tuple[SettingPath, Origin]]:
    for key, value in mapping.items():
        here = (*path, str(key))
        if isinstance(value, dict) and value:
            yield from _flatten(value, here, place)
        else:
            yield here, Origin(value, place, "yaml")
