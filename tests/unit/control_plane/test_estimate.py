"""Estimates: steps are exact, speed and money follow from stated figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.money import microusd
from control_plane.services import presets
from control_plane.services.catalog import Catalog
from control_plane.services.estimate import Figures, estimate, plan, shape, speeds
from control_plane.settings import Settings
from trainer.config import Hyperparameters

CATALOG = Catalog.load(Settings())
SMOLLM = CATALOG.base_models["HuggingFaceTB/SmolLM2-135M-Instruct"]
CPU = CATALOG.gpu_types["cpu"]
FIGURES = Figures(conversations=100, tokens=20_000, learned_tokens=9_000, validation_conversations=10)


def recipe(**changes: object) -> Hyperparameters:
    return presets.resolve(CATALOG, "balanced", None, changes, SMOLLM).hyperparameters


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 5 * 12),
        ({"numEpochs": 1, "batchSize": 90}, 1),
        ({"numEpochs": 1, "batchSize": 89}, 2),
        ({"maxSteps": 7}, 7),
        ({"maxSteps": 1000}, 60),
        ({"validationFraction": 0.0, "numEpochs": 1, "batchSize": 1}, 100),
        ({"validationFraction": 0.5, "numEpochs": 1, "batchSize": 1}, 50),
    ],
)
def test_steps(changes: dict[str, object], steps: int) -> None:
    assert plan(FIGURES, recipe(**changes)).steps == steps


def test_the_training_tokens_of_whole_epochs_are_the_conversations_tokens() -> None:
    assert plan(FIGURES, recipe(numEpochs=3)).training_tokens == pytest.approx(3 * 90 * 200)
    assert plan(FIGURES, recipe(numEpochs=3, maxSeqLength=64)).training_tokens == pytest.approx(3 * 90 * 64)


def test_the_adapters_size_is_that_of_the_real_model() -> None:
    """rank × Σ (in + out) over SmolLM2's seven projections and thirty layers: 576 wide, 192 for keys, 1536 within."""
    real = 16 * 30 * (1152 + 2 * 768 + 1152 + 3 * 2112)
    assert shape(SMOLLM, recipe(), 200, 0.45).adapter_parameters == pytest.approx(real, rel=0.01)


def test_flops_a_token_follow_the_formula() -> None:
    head = 49152 * 576
    body = 134515008 - head
    made = shape(SMOLLM, recipe(), 200, 0.5)
    expected = 4 * body + 4 * 0.5 * head + 6 * made.adapter_parameters + 3 * 2 * 30 * 576 * 200
    assert made.training == pytest.approx(expected)
    assert made.forward < made.training / 2


def test_like_jobs_replace_the_catalogs_speed_from_the_third_on() -> None:
    assert speeds([100, 100], CPU, 5e8).p50 == pytest.approx(0.11e12 / 5e8)
    measured = speeds([100, 200, 300], CPU, 5e8)
    assert (measured.p10, measured.p50, measured.p90) == pytest.approx((120, 200, 280))


@given(
    conversations=st.integers(2, 10**6),
    mean=st.integers(2, 4000),
    share=st.floats(0.01, 1),
    epochs=st.integers(1, 100),
    batch=st.integers(1, 512),
    rank=st.integers(1, 512),
)
def test_ranges_are_ordered_and_money_is_time_times_price(
    conversations: int, mean: int, share: float, epochs: int, batch: int, rank: int
) -> None:
    tokens = conversations * mean
    figures = Figures(
        conversations=conversations,
        tokens=tokens,
        learned_tokens=max(1, int(tokens * share)),
        validation_conversations=conversations // 10,
    )
    h = recipe(numEpochs=epochs, batchSize=batch, loraRank=rank)
    made, expected, upper = estimate(figures, SMOLLM, h, CPU, 1, [], 360_000, 23_000)
    assert 0 < made.duration_s.p10 < made.duration_s.p50 < made.duration_s.p90
    assert made.tokens_per_s.p10 < made.tokens_per_s.p50 < made.tokens_per_s.p90
    assert microusd(made.compute_cost.p10) <= expected <= upper == microusd(made.compute_cost.p90)
    assert upper == pytest.approx(made.duration_s.p90 * 100, rel=0.02, abs=10)
    assert microusd(made.total_cost.p50) == expected + microusd(made.storage_cost.p50)


def test_two_gpus_halve_the_time_not_the_price() -> None:
    figures = Figures(conversations=10**5, tokens=10**8, learned_tokens=10**7, validation_conversations=0)
    one, _, _ = estimate(figures, SMOLLM, recipe(), CPU, 1, [], 360_000, 0)
    two, _, _ = estimate(figures, SMOLLM, recipe(), CPU, 2, [], 360_000, 0)
    assert two.duration_s.p50 == pytest.approx(one.duration_s.p50 / 2, rel=0.01)
    assert microusd(two.compute_cost.p50) == pytest.approx(microusd(one.compute_cost.p50), rel=0.01)
