"""How well training went, by a stated rule; pure.

Improvement is how much of the validation loss of the untouched base model training took away
(1 − after / before): under 1 % is one star, under 5 % two, under 10 % three, under 20 % four, from there five.
One star less when the adapter fits its training data much better than what it has not seen (validation loss above
1.5 × training loss). Without validation data the training loss stands in, and no more than three stars are given.
"""

from __future__ import annotations

from typing import NamedTuple

THRESHOLDS = (0.01, 0.05, 0.10, 0.20)
OVERFIT_RATIO = 1.5
UNPROVEN_STARS = 3
LABELS = {1: "No improvement", 2: "Slight", 3: "Fair", 4: "Good", 5: "Excellent"}


class Quality(NamedTuple):
    stars: int
    label: str


def rate(
    *,
    validation_before: float | None,
    validation_after: float | None,
    training_first: float | None,
    training_last: float | None,
) -> Quality:
    """Losses in nats per learned token; None where there is no such figure."""
    proven = bool(validation_before) and validation_after is not None
    before, after = (validation_before, validation_after) if proven else (training_first, training_last)
    if not before or after is None:
        return _quality(1)
    stars = 1 + sum(after <= before * (1 - threshold) for threshold in THRESHOLDS)
    if not proven:
        return _quality(min(stars, UNPROVEN_STARS))
    if training_last and after > OVERFIT_RATIO * training_last:
        stars -= 1
    return _quality(max(1, stars))


def _quality(stars: int) -> Quality:
    return Quality(stars, LABELS[stars])
