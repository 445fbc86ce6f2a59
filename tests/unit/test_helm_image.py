"""The Dockerfile, as far as it can be checked where no image can be built: what it copies, runs and leaves behind."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from manager.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    """What is copied from this tree."""
    return [source for rest in arguments("COPY") if "--from=" not in rest for source in rest.split()[:-1]]


def test_every_instruction_is_known():
    assert {name for name, _ in instructions()} <= KNOWN
    assert instructions()[0][0] == "ARG"


def test_the_base_is_an_argument_with_a_default_and_no_latest():
    assert {rest.split(" AS ")[0] for rest in arguments("FROM")} == {"${BASE_IMAGE}"}
    (default,) = [rest.partition("=")[2] for rest in arguments("ARG") if rest.startswith("BASE_IMAGE=")]
    version = re.fullmatch(r"python:3\.(\d+)-slim-\w+", default)
    assert version
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert int(version[1]) >= int(needs.removeprefix(">=3."))


def test_what_is_copied_is_there_and_reaches_the_builder():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert set(copied()) == let_in
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_every_package_and_what_the_build_needs_is_copied():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {f"{package}/" for package in packages} <= set(copied())
    assert {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]} <= set(
        copied()
    )


@pytest.mark.parametrize(
    "path", [".env", "manager/.env", "manager/tls.key", "plugins/x/ca.pem", "manager/__pycache__/", "a/b.pyc"]
)
def test_secrets_and_leavings_do_not_reach_the_builder(path):
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    last = [rule for rule in rules if fnmatch.fnmatch(path, rule.removeprefix("!").replace("**/", "*"))][-1]
    assert not last.startswith("!")


def test_no_secret_is_built_in():
    named = " ".join([*arguments("ARG"), *arguments("ENV")])
    assert not re.search(r"(?i)(password|passwd|token|secret|api_?key)\s*=", named)
    assert not re.search(r"ry_\w{8}|rediss?://|-----BEGIN", (ROOT / "Dockerfile").read_text())


def test_it_runs_as_the_user_that_the_chart_names_and_not_as_root():
    helpers = (ROOT / "helm/rocyard/templates/_helpers.tpl").read_text()
    uid = re.search(r"runAsUser: (\d+)", helpers)[1]
    assert arguments("USER") == [f"{uid}:{uid}"]
    after = [name for name, _ in instructions()][[name for name, _ in instructions()].index("USER") :]
    assert "RUN" not in after
    settings = re.search(r'"data_dir" "([^"]+)"', helpers)[1]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments("ENV"))))
    assert environment["HOME"] == settings == arguments("WORKDIR")[-1]
    assert environment["PYTHONSAFEPATH"] == "1"


def test_roles_are_arguments_and_signals_reach_the_process():
    """In the form of a list there is no shell between."""
    assert [yaml.safe_load(rest) for rest in (*arguments("ENTRYPOINT"), *arguments("CMD"))] == [["rocyard"], ["--help"]]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    assert {"api", "controller", "scheduler", "node"} <= set(COMMANDS)


def test_torch_is_neither_pinned_nor_replaced():
    (install,) = [rest for rest in arguments("RUN") if "pip install" in rest and "constraints" in rest]
    assert "grep -v '^torch=='" in install
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [need for need in needs if need.startswith("torch")]
    assert '"$before" != "$after"' in install


@pytest.mark.parametrize("script", arguments("RUN"))
def test_what_is_run_is_a_shell_script(script):
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
