"""Options of the test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seed", default="1", help="seed of the random deaths in tests/integration/test_soak.py")
