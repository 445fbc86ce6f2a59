"""Fixtures of the integration tests: clusters of real processes, and an API of its own on a real store."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.integration.api_world import RunningStore, World, running_store, serving
from tests.integration.cluster import Cluster, clusters


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for a module's tests."""
    yield from clusters(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def store_server() -> Iterator[RunningStore]:
    """A store for a module's tests."""
    with running_store() as server:
        yield server


@pytest.fixture
async def world(store_server: RunningStore) -> AsyncIterator[World]:
    """An API on that store, emptied."""
    async with serving(store_server.url) as world:
        yield world
