from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tiny_model import make_tiny_model
from trainer.config import BaseModel, BaseModelSource, Hyperparameters, TrainConfig, VerdictConfig
from trainer.protocol import Event

TEXT = "the a cat dog sat ran on under mat tree and why how because blue red seven happy slow river"
WORDS = TEXT.split()


class Recorder:
    """Collects events; ``react`` is called with each."""

    def __init__(self, react: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self.react = react

    def __call__(self, event: Event) -> None:
        msgspec.json.encode(event)
        self.events.append(event)
        if self.react:
            self.react(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def v4_rows(count: int, seed: int = 0, turns: int = 2) -> list[dict[str, Any]]:
    """Sound BRIGHTRUN_LORA_V4 rows of differing lengths."""
    rng = random.Random(seed)
    return [
        {
            "conversation_id": f"c{index}",
            "turns": [
                {"role": ("user", "assistant")[turn % 2], "content": sentence(rng, rng.randint(2, 12))}
                for turn in range(rng.choice((turns, turns + 2)))
            ],
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base_model(tiny: Path) -> BaseModel:
    return BaseModel(id="tests/tiny", revision="r1", source=BaseModelSource(kind="folder", location=str(tiny)))


@pytest.fixture
def verdict_config(tmp_path: Path, base_model: BaseModel) -> VerdictConfig:
    return VerdictConfig(
        base_model=base_model,
        dataset_path=str(tmp_path / "data.jsonl"),
        work_dir=str(tmp_path / "work"),
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def train_config(tmp_path: Path, base_model: BaseModel) -> TrainConfig:
    """Two epochs of six steps on the CPU; the dataset is there."""
    for name in ("work", "cache", "out"):
        (tmp_path / name).mkdir()
    return TrainConfig(
        base_model=base_model,
        dataset_path=str(write_jsonl(tmp_path / "data.jsonl", v4_rows(27))),
        work_dir=str(tmp_path / "work"),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        job_id="job",
        attempt=1,
        name="A test",
        device="cpu",
        hyperparameters=Hyperparameters(
            learning_rate=5e-3,
            batch_size=4,
            num_epochs=2,
            lora_rank=4,
            lora_alpha=8,
            lora_dropout=0.1,
            max_seq_length=256,
        ),
    )
