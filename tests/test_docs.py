"""Documentation that names things is held to the things: links, tests, and what the README says of this tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["traps.md", "dask.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text()))
    there = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert named - there == set()
    assert len(named) > 40


def test_every_fault_has_a_row_that_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| F\d+ .*\|$", text, re.MULTILINE)]
    assert [row[0] for row in rows] == [f"F{number}" for number in range(1, 47)]
    there = {file.name for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    missing = {row[0]: [name for name in re.findall(r"`(?:\w+/)*(\w+\.py)`", row[4]) if name not in there] for row in rows}
    assert {number: names for number, names in missing.items() if names} == {}
    assert all(re.search(r"`[\w/]*test_\w+\.py`", row[4]) for row in rows), "a row names no test"


def test_the_readme_names_commands_that_exist() -> None:
    from manager.cli.main import COMMANDS

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"\.venv/bin/rocyard (\w+)", text))
    assert used
    assert used <= set(COMMANDS)
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", text)) <= targets | {"make"}


def test_every_page_is_reached_from_the_readme_or_the_architecture() -> None:
    reached = (ROOT / "README.md").read_text() + (ROOT / "docs" / "architecture.md").read_text()
    lost = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in reached]
    assert set(lost) <= {"architecture.md"}


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(page.name[:4]) for page in (ROOT / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
