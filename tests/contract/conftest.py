from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.contract.harness import NEWEST, FakeHarness, Harness, RayHarness, until_all_is_free
from tests.ray_cluster import RayCluster, ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ray_harness(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHarness]:
    harness = RayHarness(cluster, tmp_path_factory.mktemp("ray"))
    yield harness
    asyncio.run(harness.executor.close())


@pytest.fixture(params=["fake", "ray"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    """The fake, and the real one; afterwards every attempt is released and nothing of it remains."""
    harness = FakeHarness(tmp_path) if request.param == "fake" else request.getfixturevalue("ray_harness")
    yield harness
    look = await harness.executor.look()
    for name, liveness in look.actors.items():
        if liveness == "alive":
            await harness.executor.release(name, epoch=NEWEST)
            assert harness.remains(name) == []
    await until_all_is_free(harness.executor)
