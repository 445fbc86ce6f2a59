"""Options of the test suite, and the order of its files."""

from pathlib import Path

import pytest

REAL_PROCESSES = ("integration", "chaos")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seed", default="1", help="seed of the random deaths in tests/integration/test_soak.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests may take long first, then the others with real processes: whoever tests last has short files left."""
    longest: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker is not None and marker.args else 0.0
        longest[item.path] = max(longest.get(item.path, 0.0), seconds)
    items.sort(key=lambda item: (-longest[item.path], item.path.parent.name not in REAL_PROCESSES))
