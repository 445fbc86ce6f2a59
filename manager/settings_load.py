"""Builds the settings: defaults, then YAML, old names, ``.env``, ``ROCYARD_…`` variables and flags; the later wins.

Owns how a value becomes a setting and how a mistake is told: every unknown key and every wrong value is reported at
once, with the place where it stands and the nearest right name. It reads what it is given, starts nothing, and logs
nothing: values may be secrets.
"""

import difflib
import re
import stat
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from manager.core.errors import SettingsError
from manager.core.node_kinds import node_kind
from manager.core.quantities import format_memory, parse_duration, parse_memory
from manager.core.requests import ResourceRequest
from manager.core.selectors import labels_of
from manager.core.shapes import Resources
from manager.core.wanted import WrongField, resources_of
from manager.old_names import note_on, read_old_names
from manager.settings import FunctionSettings, Secret, Settings
from manager.settings_sources import (
    PREFIX,
    Origin,
    SettingPath,
    Values,
    kind_of,
    read_dotenv,
    read_flags,
    read_variables,
    read_yaml,
    variable_of,
)

ANY_NAME: Final = "NAME"
"""Stands in documents for a name that the user chooses, such as a tenant's."""
SECRET_BYTES_MAX: Final = 64 * 1024
PROBLEMS_MAX: Final = 20
"""More at once help nobody."""

_NODE_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_API_KEY: Final = re.compile(r"[\x21-\x7e]{16,256}")
_TARGET: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class SettingDoc(msgspec.Struct, frozen=True):
    """What the code knows of one setting: all but its meaning. In `name`, ``NAME`` stands for any name."""

    name: str
    variable: str
    kind: str
    default: str
    unit: str


class Loaded(msgspec.Struct, frozen=True):
    """The settings, where the YAML was, and what a person should be told about them."""

    settings: Settings
    path: Path | None
    notes: tuple[str, ...]


def load_settings(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Settings:
    """The settings; see `read_settings`."""
    return read_settings(path, environ, overrides).settings


def read_settings(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Loaded:
    """The settings and notes on them.

    Args:
        path: a YAML file; else the one that ROCYARD_CONFIG names, else ``./rocyard.yaml`` if there is one.
        environ: the environment.
        overrides: flags, ``section.key`` to text.

    Raises:
        SettingsError: all that is wrong, with `details["problems"]` one text each.
    """
    dotenv = read_dotenv(Path(".env"))
    variables = {**dotenv, **environ}
    source = _yaml_path(path, variables)
    values: Values = read_yaml(source) if source else {}
    old = read_old_names(dotenv, environ)
    values |= old.values
    values |= read_variables(dotenv, ".env")
    values |= read_variables(environ, "environment")
    values |= read_flags(overrides)
    _inherit(values)
    builder = _Builder(variables)
    builder.problems += old.problems
    settings = builder.build(Settings, (), values)
    problems = builder.problems or _contradictions(settings)
    if problems:
        shown = problems[:PROBLEMS_MAX]
        text = shown[0] if len(problems) == 1 else f"{len(problems)} settings are wrong:\n  - " + "\n  - ".join(shown)
        raise SettingsError(text, problems=tuple(shown))
    assert isinstance(settings, Settings)
    if note := note_on(old, values):
        builder.notes.append(note)
    return Loaded(settings, source, tuple(builder.notes))


def _inherit(values: Values) -> None:
    """What `tenants.NAME` leaves out is as under `tenant`."""
    names = {path[1] for path in values if path[0] == "tenants" and len(path) > 2}
    for path, origin in list(values.items()):
        if path[0] == "tenant" and len(path) == 2:
            for name in names:
                values.setdefault(("tenants", name, path[1]), origin)


@cache
def document_settings() -> tuple[SettingDoc, ...]:
    """Every setting, in the order of `Settings`."""
    return tuple(_document(Settings, ()))


class _Builder:
    """One reading of `values` into structs. Collects problems instead of stopping at the first."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.problems: list[str] = []
        self.notes: list[str] = []

    def build(self, cls: type, path: SettingPath, values: Values) -> Any:
        """A `cls` from what `values` hold below `path`; None if there is a problem anywhere."""
        children = self._children(path, values)
        known = {field.name: field for field in msgspec.structs.fields(cls)}
        built: dict[str, Any] = {}
        for name, below in children.items():
            if name not in known:
                self._unknown((*path, name), below, tuple(known))
                continue
            read = self._field(known[name].type, (*path, name), below)
            if read is not msgspec.UNSET:
                built[name] = read
        for name, field in known.items():
            if field.required and name not in children:
                self.problems.append(f"{'.'.join((*path, name))} is missing: {'.'.join(path)} needs it")
        return None if self.problems else cls(**built)

    def _field(self, kind: Any, path: SettingPath, values: Values) -> Any:
        """The value of one field, or UNSET after a problem was noted."""
        info = inspect.type_info(kind)
        match info:
            case inspect.StructType(cls=cls) if cls is Secret:
                return self._leaf(path, values, lambda origin: self._secret(path, origin))
            case inspect.StructType(cls=cls):
                return self.build(cls, path, values)
            case inspect.DictType(value_type=inspect.StructType(cls=cls)):
                return {name: self.build(cls, (*path, name), below) for name, below in self._children(path, values).items()}
            case inspect.DictType(value_type=one):
                read = {name: self._one(one, (*path, name), below) for name, below in self._children(path, values).items()}
                return {name: value for name, value in read.items() if value is not msgspec.UNSET}
            case _:
                return self._leaf(path, values, lambda origin: _named(path, _convert(kind, info, path[-1], origin)))

    def _one(self, info: inspect.Type, path: SettingPath, values: Values) -> Any:
        """One value of a mapping that has plain ones, or UNSET after a problem was noted."""
        assert isinstance(info, inspect.StrType)
        return self._leaf(path, values, lambda origin: _convert(str, info, path[-1], origin))

    def _leaf(self, path: SettingPath, values: Values, read: Any) -> Any:
        deeper = [origin for below, origin in values.items() if below != path]
        if deeper:
            self.problems.append(f"{'.'.join(path)} is one value, not a mapping ({deeper[0].place})")
            return msgspec.UNSET
        origin = values[path]
        try:
            return read(origin)
        except ValueError as error:
            self.problems.append(f"{'.'.join(path)}: {error} ({origin.place})")
            return msgspec.UNSET

    def _children(self, path: SettingPath, values: Values) -> dict[str, Values]:
        """`values` below `path` by their next name. A section may be empty, but not a plain value."""
        children: dict[str, Values] = {}
        for below, origin in values.items():
            if below != path:
                children.setdefault(below[len(path)], {})[below] = origin
            elif origin.value not in (None, {}):
                where = ".".join(path)
                self.problems.append(f"{where} is a section with keys below it, not {kind_of(origin.value)} ({origin.place})")
        return children

    def _unknown(self, path: SettingPath, values: Values, siblings: tuple[str, ...]) -> None:
        for below, origin in values.items():
            if origin.source == "variable":
                self.problems.append(f"unknown variable {origin.place}{_nearest_variable(below)}")
        origins = [origin for origin in values.values() if origin.source != "variable"]
        if origins:
            near = _nearest_name(path, siblings)
            self.problems.append(f"unknown setting '{'.'.join(path)}' ({origins[0].place}){near}")

    def _secret(self, path: SettingPath, origin: Origin) -> Secret:
        secret = self._revealed(path, origin)
        if path == ("api", "key") and secret.value and not _API_KEY.fullmatch(secret.value):
            raise ValueError("must be 16 to 256 letters, digits and signs, without spaces: who has it may do everything")
        return secret

    def _revealed(self, path: SettingPath, origin: Origin) -> Secret:
        """The secret that `origin` holds or names. Messages never hold the value."""
        text = origin.value
        if not isinstance(text, str):
            raise ValueError("must be text: 'env:NAME', 'file:/path' or the secret itself")  # noqa: TRY004 -- collected
        scheme, _, rest = text.partition(":")
        if scheme == "env":
            if not self.variables.get(rest):
                raise ValueError(f"the variable {rest} that it names is not set")
            return Secret(self.variables[rest])
        if scheme == "file":
            return Secret(_read_secret(Path(rest)))
        if text and origin.source != "variable":
            name = ".".join(path)
            self.notes.append(f"{name} is written out in {origin.place}; 'env:NAME' or 'file:/path' keeps it out of there")
        return Secret(text)


def _convert(kind: Any, info: inspect.Type, name: str, origin: Origin) -> Any:
    value = origin.value
    unit = _unit(name)
    if isinstance(value, str):
        # parse_memory refuses 0, which is a fine limit or reserve; plain digits are left to the type.
        if unit == "bytes" and not value.strip().isdigit():
            value = parse_memory(value)
        elif unit == "seconds" and value.strip().lower() not in {"null", "nan"}:
            value = parse_duration(value)
    try:
        return msgspec.convert(value, kind, strict=origin.source == "yaml")
    except msgspec.ValidationError as error:
        raise ValueError(f"must be {_describe(info, unit)}, not {kind_of(origin.value)}") from error


def _read_secret(path: Path) -> str:
    try:
        status = path.stat()
        if not path.is_absolute() or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"'file:' needs the absolute path of a plain file, not {str(path)!r}")
        if status.st_mode & stat.S_IROTH:
            raise ValueError(f"{path} can be read by everybody: chmod o-r {path}")
        if status.st_size > SECRET_BYTES_MAX:
            raise ValueError(f"{path} is too large for a secret")
        text = path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without its cause: that one holds the bytes.
        raise ValueError(f"{path} is not UTF-8 text") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def _yaml_path(path: Path | None, variables: Mapping[str, str]) -> Path | None:
    if path is not None:
        return path.expanduser()
    if variables.get("ROCYARD_CONFIG"):
        return Path(variables["ROCYARD_CONFIG"]).expanduser()
    here = Path("rocyard.yaml")
    return here if here.exists() else None


def _contradictions(settings: Settings) -> list[str]:
    """Settings that are each right but do not go together."""
    problems: list[str] = []
    tasks, api, controller, dask = settings.tasks, settings.api, settings.controller, settings.dask
    if tasks.time_limit_s > tasks.time_limit_s_max:
        problems.append("tasks.time_limit_s is above tasks.time_limit_s_max")
    if api.args_bytes_max > api.body_bytes_max:
        problems.append("api.args_bytes_max is above api.body_bytes_max: no request could carry such arguments")
    if controller.term_s < 2 * controller.period_s:
        problems.append("controller.term_s must be at least twice controller.period_s, or a leader loses its term at work")
    own = settings.autoscaler
    if own.term_s < 2 * own.period_s:
        problems.append("autoscaler.term_s must be at least twice autoscaler.period_s, or it loses its term at work")
    for name, group in settings.groups.items():
        try:
            node_kind(group.devices)
        except ValueError as error:
            problems.append(f"groups.{name}.devices: {error}")
        try:
            labels_of(group.labels.items())
        except ValueError as error:
            problems.append(f"groups.{name}.labels: {error}")
        if group.workers_min > group.workers_max:
            problems.append(f"groups.{name}.workers_min is above groups.{name}.workers_max")
    try:
        labels_of(settings.node.labels.items())
    except ValueError as error:
        problems.append(f"node.labels: {error}")
    ports = {"api.port": api.port, "dask.port": dask.port, "dask.dashboard_port": dask.dashboard_port}
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if port and port in taken:
            problems.append(f"{name} and {taken[port]} are both {port}: give them different ports")
        taken.setdefault(port, name)
    for name, function in settings.functions.items():
        where = f"functions.{name}"
        try:
            function_resources(function)
        except WrongField as error:
            problems.append(f"{where}.{error.field}: {error}")
        if not _TARGET.fullmatch(function.target):
            problems.append(f"{where}.target must be 'module:callable', not {function.target!r}")
        if (function.time_limit_s or 0) > tasks.time_limit_s_max:
            problems.append(f"{where}.time_limit_s is above tasks.time_limit_s_max")
    return problems


def function_resources(function: FunctionSettings) -> Resources:
    """What a task of the function asks for unless it says otherwise.

    Raises:
        WrongField: says what was wrong and what would be right.
    """
    return resources_of(
        ResourceRequest(
            memory=function.memory,
            gpus=function.gpus,
            share=function.share or None,
            architecture=function.architecture or None,
            device_model=function.device_model or None,
            labels=function.labels or None,
            cpus=function.cpus or None,
            host_memory=function.host_memory or None,
            exclusive=function.exclusive or None,
            model=function.model or None,
        )
    )


def _nearest_variable(path: SettingPath) -> str:
    # Without the prefix, which would make all of them look alike.
    known = {doc.variable.removeprefix(PREFIX): doc.variable for doc in document_settings()}
    near = difflib.get_close_matches(variable_of(path).removeprefix(PREFIX), known, n=1, cutoff=0.6)
    return f": did you mean {known[near[0]]}?" if near else ": docs/settings.md lists all"


def _nearest_name(path: SettingPath, siblings: tuple[str, ...]) -> str:
    """The sibling that looks like the last name, else the setting anywhere that does, else what there is."""
    near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f": did you mean '{'.'.join((*path[:-1], near[0]))}'?"
    elsewhere = {doc.name.rpartition(".")[2]: doc.name for doc in reversed(document_settings())}
    near = difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.75)
    if near:
        return f": did you mean '{elsewhere[near[0]]}'?"
    return f": known here are {', '.join(siblings)}"


def _document(cls: type, path: SettingPath) -> Iterator[SettingDoc]:
    for field in msgspec.structs.fields(cls):
        here = (*path, field.name)
        info = inspect.type_info(field.type)
        match info:
            case inspect.StructType(cls=below) if below is not Secret:
                yield from _document(below, here)
            case inspect.DictType(value_type=inspect.StructType(cls=below)):
                yield from _document(below, (*here, ANY_NAME))
            case inspect.DictType(value_type=one):
                one_here = (*here, ANY_NAME)
                yield SettingDoc(".".join(one_here), variable_of(one_here), _describe(one, ""), "empty", "")
            case _:
                unit = _unit(field.name)
                kind = _describe(info, unit)
                yield SettingDoc(".".join(here), variable_of(here), kind, _show(field, unit), unit)


def _unit(name: str) -> str:
    words = name.split("_")
    if "bytes" in words:
        return "bytes"
    return "seconds" if "s" in words else ""


def _show(field: msgspec.structs.FieldInfo, unit: str) -> str:
    if field.required:
        return "required"
    default = field.default
    if default is None:
        return "null"
    if default in ("", Secret()):
        return "empty"
    if unit == "bytes":
        return format_memory(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _describe(info: inspect.Type, unit: str) -> str:
    """What `info` accepts, for people."""
    match info:
        case inspect.UnionType(types=options):
            return " or ".join(_describe(option, unit) for option in options)
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(str(value) for value in values)
        case inspect.StructType():
            return "a secret: 'env:NAME', 'file:/path' or the text itself"
        case inspect.StrType():
            return "text"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            noun = {"bytes": "a size such as 24GiB", "seconds": "a duration such as 90s or 5m"}.get(unit)
            return (noun or ("a whole number" if isinstance(info, inspect.IntType) else "a number")) + _bounds(info)
        case _:
            raise NotImplementedError(f"no words for {info}")


def _named(path: SettingPath, value: Any) -> Any:
    """`value`, if it can be what `path` names: a node's name is a folder's too, and stands in paths of the API."""
    if path == ("node", "name") and value and not _NODE_NAME.fullmatch(value):
        raise ValueError(f"must be letters, digits, '.', '_' and '-', at most 63, not {value[:80]!r}")
    return value


def _bounds(info: inspect.IntType | inspect.FloatType) -> str:
    low = f"from {info.ge:g}" if info.ge is not None else f"above {info.gt:g}" if info.gt is not None else ""
    high = f" up to {info.le:.10g}" if info.le is not None else ""
    return f" ({(low + high).strip()})" if low or high else ""
