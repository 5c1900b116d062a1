"""A cluster of two nodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from local_cluster import LocalCluster, install, local_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes; skips where a cluster cannot run."""
    if reason := install():
        pytest.skip(reason)
    with local_cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as running:
        yield running
