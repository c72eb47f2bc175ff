from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import TINY, Client, House, base_models_file

__all__ = ["TINY"]


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_models_file(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"), base_models).start()
    yield house
    house.stop()


@pytest.fixture(scope="module")
def client(house: House) -> Client:
    return Client(house)
