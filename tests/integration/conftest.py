"""Fixtures of the integration tests: clusters of real processes."""

from collections.abc import Iterator

import pytest

from tests.integration.cluster import Cluster, clusters


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for a module's tests."""
    yield from clusters(tmp_path_factory.mktemp("cluster"))
