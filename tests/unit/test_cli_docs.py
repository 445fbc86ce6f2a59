"""docs/cli.md and docs/client.md say what the code does."""

import inspect
import re
from pathlib import Path

import click
import pytest

import rocyard
from manager.cli.exits import Exit
from manager.cli.main import COMMANDS, root
from manager.cli.session import CommonOption

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLI = (DOCS / "cli.md").read_text(encoding="utf-8")
CLIENT = (DOCS / "client.md").read_text(encoding="utf-8")


def commands():
    context = click.Context(root)
    for name in COMMANDS:
        found = root.get_command(context, name)
        if isinstance(found, click.Group):
            yield from ((f"{name} {sub}", command) for sub, command in found.commands.items())
        else:
            yield name, found


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_and_option_is_documented(name, command):
    assert f"`rocyard {name}" in CLI
    for option in command.params:
        if isinstance(option, click.Option) and not isinstance(option, CommonOption):
            assert option.opts[-1] in CLI, f"{name} {option.opts[-1]}"


def test_every_documented_command_exists():
    known = {name for name, _ in commands()} | {"keys", "autoscaler"}
    for name in re.findall(r"^\| `rocyard ([a-z]+(?: (?:create|list|revoke|history))?)", CLI, re.MULTILINE):
        assert name in known


def test_every_exit_code_is_documented():
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", CLI, re.MULTILINE))
    assert {int(code) for code in table} == set(Exit)


def test_every_public_name_is_documented():
    for name in rocyard.__all__:
        assert name in CLIENT, name


def test_every_call_of_the_client_is_documented():
    for name, _ in inspect.getmembers(rocyard.Client, inspect.isfunction):
        if not name.startswith("_") and name not in {"close", "at"}:
            assert f"`{name}(" in CLIENT, name
