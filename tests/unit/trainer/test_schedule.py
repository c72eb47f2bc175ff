from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.config import Hyperparameters
from trainer.schedule import Schedule


def schedule(conversations: int = 11, **changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "learning_rate": 1.0, "batch_size": 4, "num_epochs": 2, "lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0.0,
        "seed": 1, "warmup_ratio": 0.0,
    }  # fmt: skip
    return Schedule(np.arange(100, 100 + conversations), Hyperparameters(**{**settings, **changes}))


def test_every_epoch_visits_each_conversation_once_in_its_own_order() -> None:
    plan = schedule()
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    epochs = [[int(row) for step in range(e * 3, e * 3 + 3) for row in plan.batch(step)] for e in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100, 111))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[1][4:8] == plan.batch(4).tolist()
    assert schedule(seed=2).batch(0).tolist() != epochs[0][:4]
    assert [plan.epoch(done) for done in (0, 1, 3, 4, 6)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(("max_steps", "total"), [(None, 6), (4, 4), (99, 6)])
def test_total_steps(max_steps: int | None, total: int) -> None:
    assert schedule(max_steps=max_steps).total_steps == total


def test_evaluations_and_checkpoints_come_at_intervals_or_epoch_ends_and_at_the_end() -> None:
    plan = schedule(max_steps=5)
    assert [done for done in range(6) if plan.evaluates(done)] == [0, 3, 5]
    assert [done for done in range(6) if plan.saves(done)] == [3, 5]
    plan = schedule(max_steps=5, eval_steps=2, checkpoint_steps=4)
    assert [done for done in range(6) if plan.evaluates(done)] == [0, 2, 4, 5]
    assert [done for done in range(6) if plan.saves(done)] == [4, 5]


def test_learning_rates() -> None:
    def rates(name: str) -> list[float]:
        plan = schedule(40, num_epochs=1, warmup_ratio=0.2, lr_scheduler=name)
        return [round(plan.learning_rate(step), 4) for step in range(plan.total_steps)]

    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("linear") == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine")[1:] == [1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]


def test_dropout_seeds_differ() -> None:
    plans = (schedule(), schedule(seed=2))
    seeds = {plan.dropout_seed(step, micro) for plan in plans for step in range(20) for micro in range(5)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
