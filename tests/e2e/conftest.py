from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import Client, House
from tests.tiny_model import make_tiny_model

TINY = "tests/tiny-random-llama"


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    file = folder.parent / "base_models.yaml"
    entry = {
        "id": TINY,
        "name": "Tiny random Llama",
        "revision": "1",
        "source": {"kind": "folder", "location": str(folder), "revision": "1"},
        "parameters": 4_000_000,
        "hiddenSize": 64,
        "layers": 2,
        "vocabularySize": 49152,
        "contextLength": 2048,
        "license": "none",
    }
    file.write_text(json.dumps({"baseModels": [entry]}))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"), base_models).start()
    yield house
    house.stop()


@pytest.fixture(scope="module")
def client(house: House) -> Client:
    return Client(house)
