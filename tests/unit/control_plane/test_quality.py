"""Stars by the stated rule."""

from __future__ import annotations

import pytest

from control_plane.services.quality import LABELS, rate


@pytest.mark.parametrize(
    ("before", "after", "stars"),
    [
        (4.0, 4.0, 1), (4.0, 5.0, 1), (4.0, 3.97, 1), (4.0, 3.95, 2), (4.0, 3.75, 3), (4.0, 3.5, 4), (4.0, 3.2, 5),
        (4.0, 0.1, 5), (4.0, 0.0, 5),
    ],
)  # fmt: skip
def test_stars_grow_with_the_improvement(before: float, after: float, stars: int) -> None:
    quality = rate(validation_before=before, validation_after=after, training_first=4.0, training_last=after)
    assert (quality.stars, quality.label) == (stars, LABELS[stars])


def test_fitting_the_training_data_alone_costs_a_star() -> None:
    def stars(after: float, training: float) -> int:
        rated = rate(validation_before=4.0, validation_after=after, training_first=4.0, training_last=training)
        return rated.stars

    assert stars(3.0, 2.0) == 5
    assert stars(3.0, 1.9) == 4
    assert stars(4.0, 0.1) == 1


def test_without_validation_data_nothing_is_proven() -> None:
    def stars(first: float | None, last: float | None) -> int:
        return rate(validation_before=None, validation_after=None, training_first=first, training_last=last).stars

    assert stars(4.0, 1.0) == 3
    assert stars(4.0, 3.9) == 2
    assert stars(None, None) == 1
