"""Which functions this node can run: the built-in ones, those of installed packages, and those of the settings.

Owns the merging and checking of registrations. It imports no user code: a target is text until an executor resolves it.
"""

import asyncio
import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

import msgspec

from manager.core import wire
from manager.core.errors import SettingsError
from manager.core.functions import DEFAULT_ENVIRONMENT, NAME_PATTERN, PublishedFunction, is_function_name
from manager.core.shapes import Resources
from manager.core.wanted import WrongField
from manager.settings import FunctionSettings
from manager.settings_load import function_resources
from plugins.node.executors import describe

ENTRY_POINT_GROUP: Final = "rocyard.functions"

BUILTINS: Final[Mapping[str, FunctionSettings]] = {
    "echo": FunctionSettings(target="plugins.node.functions.basic:echo", memory="256MiB"),
    "sleep": FunctionSettings(target="plugins.node.functions.basic:sleep", memory="256MiB"),
    "fail": FunctionSettings(target="plugins.node.functions.basic:fail", memory="256MiB"),
    # On a real device torch's context alone takes about half a GiB.
    "matmul": FunctionSettings(target="plugins.node.functions.matmul:matmul", memory="2GiB"),
    "digits_train": FunctionSettings(target="plugins.node.functions.digits:digits_train", memory="2GiB"),
    "digits_classify": FunctionSettings(target="plugins.node.functions.digits:digits_classify", memory="2GiB"),
}

_TARGET: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class FunctionSpec(msgspec.Struct, frozen=True):
    """One function and how to run it.

    Attributes:
        name: what tasks call it.
        target: ``module:callable``.
        resources: what a task of it asks for unless it says otherwise.
        time_limit_s: its own limit; None is the cluster's default.
        python: absolute path of its executor's interpreter; empty is the agent's own.
        path: directory at the front of its import path; empty is none.
        max_tasks_per_slot: how many of its tasks one slot serves; 0 is no limit.
        schema: JSON Schema of its arguments; empty until it is described, and where `error` is set.
        doc: first paragraph of its documentation.
        error: why it cannot be used, else empty.
    """

    name: str
    target: str
    resources: Resources
    time_limit_s: float | None = None
    python: str = ""
    path: str = ""
    max_tasks_per_slot: int = 0
    schema: bytes = b""
    doc: str = ""
    error: str = ""


def load_functions(
    configured: Mapping[str, FunctionSettings],
    builtins: Mapping[str, FunctionSettings] = BUILTINS,
    installed: Iterable[EntryPoint] | None = None,
) -> dict[str, FunctionSpec]:
    """All functions by name. Settings win over installed packages, and both over the built-in ones.

    Args:
        configured: the section ``functions`` of the settings.
        builtins: those of Rocyard.
        installed: entry points whose name is the function's and whose value its target; those of `ENTRY_POINT_GROUP` if
            not given. Their packages are not imported.

    Raises:
        SettingsError: names the setting or the package, and what would be right.
    """
    specs = {name: _spec(name, settings, f"built-in function {name}") for name, settings in builtins.items()}
    origins: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP) if installed is None else installed:
        origin = f"entry point {point.name!r} of {point.dist.name if point.dist is not None else 'a package'}"
        if point.name in origins and point.name not in configured:
            raise SettingsError(f"{origin} and {origins[point.name]} have one name: set functions.{point.name} to choose")
        origins[point.name] = origin
        specs[point.name] = _spec(point.name, FunctionSettings(target=point.value), origin)
    specs |= {name: _spec(name, settings, f"functions.{name}") for name, settings in configured.items()}
    return dict(sorted(specs.items()))


def environment_id(spec: FunctionSpec) -> str:
    """What the executor of `spec` must be: equal ids can share one."""
    if not spec.python and not spec.path:
        return DEFAULT_ENVIRONMENT
    return "py-" + hashlib.blake2b(f"{spec.python}\0{spec.path}".encode(), digest_size=4).hexdigest()


async def described(
    specs: Mapping[str, FunctionSpec], deadline_s: float, environ: Mapping[str, str]
) -> dict[str, FunctionSpec]:
    """`specs` with schema, doc and error, as one throw-away executor for each environment found them.

    Args:
        specs: by name.
        deadline_s: for each function.
        environ: the agent's environment.
    """
    environments: dict[str, list[FunctionSpec]] = {}
    for spec in specs.values():
        environments.setdefault(environment_id(spec), []).append(spec)
    answers = await asyncio.gather(*(_described_together(group, deadline_s, environ) for group in environments.values()))
    found = {name: answer for group in answers for name, answer in group.items()}
    return {
        name: msgspec.structs.replace(spec, schema=found[name].schema, doc=found[name].doc, error=found[name].error)
        for name, spec in specs.items()
    }


def published(spec: FunctionSpec) -> PublishedFunction:
    """`spec` as the store holds it."""
    return PublishedFunction(
        name=spec.name,
        doc=spec.doc,
        schema=msgspec.Raw(spec.schema or b"{}"),
        memory_bytes=spec.resources.memory_bytes,
        gpus=spec.resources.gpus,
        time_limit_s=spec.time_limit_s,
        environment=environment_id(spec),
        max_tasks_per_slot=spec.max_tasks_per_slot,
        error=spec.error,
        resources=spec.resources,
    )


async def _described_together(
    group: list[FunctionSpec], deadline_s: float, environ: Mapping[str, str]
) -> dict[str, wire.Description]:
    path = [group[0].path] if group[0].path else []
    answers = await describe(group[0].python, [spec.target for spec in group], path, deadline_s, environ)
    return {spec.name: answer for spec, answer in zip(group, answers, strict=True)}


def _spec(name: str, settings: FunctionSettings, origin: str) -> FunctionSpec:
    if not is_function_name(name):
        raise SettingsError(f"{origin}: {name!r} cannot name a function; a name fits {NAME_PATTERN}")
    if not _TARGET.fullmatch(settings.target):
        raise SettingsError(f"{origin}: target {settings.target!r} is not of the form 'package.module:callable'")
    try:
        resources = function_resources(settings)
    except WrongField as error:
        raise SettingsError(f"{origin}: {error.field}: {error}") from None
    return FunctionSpec(
        name=name,
        target=settings.target,
        resources=resources,
        time_limit_s=settings.time_limit_s,
        python=_interpreter(settings.python, origin),
        path=_directory(settings.path, origin),
        max_tasks_per_slot=settings.max_tasks_per_slot,
    )


def _interpreter(python: str, origin: str) -> str:
    """Absolute path of an interpreter; empty for our own. Links stay: a virtual environment is known by its link."""
    if not python:
        return ""
    found = shutil.which(Path(python).expanduser())
    if found is None:
        raise SettingsError(f"{origin}: python {python!r} is not a program on this machine")
    absolute = Path(found).absolute()
    return "" if absolute == Path(sys.executable).absolute() else str(absolute)


def _directory(path: str, origin: str) -> str:
    if not path:
        return ""
    found = Path(path).expanduser().absolute()
    if not found.is_dir():
        raise SettingsError(f"{origin}: path {path!r} is not a directory on this machine")
    return str(found)
