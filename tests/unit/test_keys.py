"""The table of keys is true: for the library of functions, for `Keys`, and in docs/state.md, with its state machine."""

import re
from pathlib import Path

import pytest

from manager.core import keys as keys_module
from manager.core.keys import Keys
from manager.core.lifecycle import (
    ACTIVE,
    CRASHES_MAX,
    FINAL,
    LOSSES_MAX,
    NEXT,
    SLOT_NEXT,
    Outcome,
    SlotFlag,
    TaskStatus,
)
from manager.store.schema import library_source

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "state.md").read_text()
LIBRARY = library_source()


def documented() -> dict[str, tuple[str, str, str]]:
    """Key → type, writer, meaning, from the module's table."""
    table = keys_module.__doc__.split("\n======================  ")[2]
    rows = [re.split(r"\s{2,}|(?<=channel) ", line, maxsplit=3) for line in table.splitlines()[1:] if line.strip()]
    return {row[0]: (row[1], row[2], row[3]) for row in rows}


def name(key: str) -> str:
    """The part of a key that does not vary: ``t:`` of ``t:ID``."""
    return re.sub(r":[A-Z]+$", ":", key)


def test_the_library_uses_the_keys_of_the_table_and_no_others():
    used = set(re.findall(r"p \.\. '([a-z]+:?)'", LIBRARY)) | {"ta:", "tt:"}
    known = {name(key) for key in documented()}
    known.remove("leader:autoscaler")  # made of leader and a role
    others = {"fn:", "functions", "key:", "keys", "services"}  # plain records: no function touches them
    assert used == known - others


@pytest.mark.parametrize("method", [m for m in vars(Keys) if not m.startswith("_") and m != "prefix"])
def test_each_name_that_python_builds_is_in_the_table(method: str):
    member = vars(Keys)[method]
    made = member.fget(Keys("p:")) if isinstance(member, property) else member(Keys("p:"), "X")
    known = {name(key) for key in documented()}
    assert re.sub(r":X$", ":", made.removeprefix("p:")) in known


def test_all_keys_share_one_hash_tag():
    assert re.fullmatch(r"\{\w+\}:", Keys().prefix)


def test_the_page_has_the_table_of_keys():
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([^|]+) \| ([^|]+) \|$", DOC, re.MULTILINE)
    assert {row[0]: tuple(cell.strip() for cell in row[1:]) for row in rows} == documented()


def table(heading: str) -> dict[str, set[str]]:
    """State → following states, from the first table under a heading of the page."""
    section = DOC.split(f"\n## {heading}\n")[1].strip().split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[2:]]
    return {row[0]: {word for word in row[2].split(", ") if word} for row in rows}


def test_the_page_has_the_states():
    assert table("Tasks") == {str(s): {str(f) for f in following} for s, following in NEXT.items()}
    assert table("Slots") == {str(s): {str(f) for f in following} for s, following in SLOT_NEXT.items()}


def test_the_page_has_every_outcome_and_flag():
    assert set(re.findall(r"^\| ([A-Z]) ", DOC, re.MULTILINE)) == {outcome.value for outcome in Outcome}
    assert all(flag.value in DOC for flag in SlotFlag if flag)


def test_the_page_names_each_function_that_changes_something():
    registered = set(re.findall(r"'(ry_\w+)'", LIBRARY))
    reads = {"ry_state", "ry_list", "ry_position", "ry_cancels", "ry_kept", "ry_known"}
    beside = {"ry_started", "ry_log", "ry_beat"}  # they change no state of a task or slot
    assert set(re.findall(r"`(ry_\w+)`", DOC)) == registered - reads - beside


def test_the_library_has_the_limits_and_states_of_the_lifecycle():
    assert f"local CRASHES_MAX = {CRASHES_MAX}\n" in LIBRARY
    assert f"local LOSSES_MAX = {LOSSES_MAX}\n" in LIBRARY
    live = re.search(r"local LIVE = \{(.*)\}", LIBRARY)
    assert live is not None
    assert set(re.findall(r"(\w+) = true", live[1])) == set(ACTIVE)
    states = set(re.findall(r"'([A-Z_]{6,})'", LIBRARY)) & {status.value for status in TaskStatus}
    assert states >= {status.value for status in FINAL}
