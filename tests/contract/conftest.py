"""Fixtures of the contract tests: servers of both programs, and a lab that is recounted when its test ends."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.contract.store_harness import FAST, PROGRAMS, Lab, StoreServer, check_invariants, connected


@pytest.fixture(scope="session", params=PROGRAMS)
def store_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A server for all tests of the session, one after the other."""
    server = StoreServer(tmp_path_factory.mktemp(request.param), request.param, *FAST).start()
    yield server
    server.kill()


@pytest.fixture
async def lab(store_server: StoreServer) -> AsyncIterator[Lab]:
    """An empty store with the library; everything is recounted at the end."""
    async with connected(store_server.url) as made:
        yield made
        await check_invariants(made.store)


@pytest.fixture(params=PROGRAMS)
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    """A server that its test may kill."""
    server = StoreServer(tmp_path / "data", request.param).start()
    yield server
    server.kill()
