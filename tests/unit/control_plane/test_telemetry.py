"""A curve in few points keeps its ends, its extremes and its evaluations."""

from __future__ import annotations

from collections.abc import Set

from hypothesis import given
from hypothesis import strategies as st

from control_plane.services.telemetry import Point, downsample


def curve(losses: list[float], evaluated: Set[int] = frozenset()) -> list[Point]:
    return [Point(step, loss, step in evaluated) for step, loss in enumerate(losses, 1)]


def test_few_points_are_all_shown() -> None:
    assert downsample(curve([3.0, 2.0, 1.0]), 3) == [1, 2, 3]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=400), st.integers(2, 100))
def test_ends_and_extremes_are_kept_within_the_bound(losses: list[float], most: int) -> None:
    points = curve(losses)
    steps = downsample(points, most)
    assert len(steps) <= max(most, 2)
    assert steps == sorted(set(steps))
    assert {1, len(points)} <= set(steps)
    if most >= 4:
        kept = [points[step - 1].loss for step in steps]
        assert (min(kept), max(kept)) == (min(losses), max(losses))


def test_evaluations_are_kept_as_far_as_half_the_room_goes() -> None:
    some = downsample(curve([1.0] * 1000, {100, 500, 900}), 20)
    assert {100, 500, 900} <= set(some)
    many = downsample(curve([1.0] * 999 + [9.0] + [1.0] * 1000, set(range(1, 2000, 2))), 50)
    assert len(many) <= 50
    assert 1000 in many
