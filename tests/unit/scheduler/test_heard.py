"""What supervisors say, before it is believed."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.executor import UpEvent
from scheduler.heard import Adapter, Pending, Started, Stored, clean, parse
from trainer.protocol import Failed, Log, Metrics, Phase

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_every_kind_has_its_type() -> None:
    told: list[dict[str, Any]] = [
        {"type": "pending", "reason": "NO_RESOURCES"},
        {"type": "started", "node": "n", "ranks": 2, "checkpoint_id": None, "step": 0},
        {"type": "stored", "step": 1, "epoch": 0, "loss": 1.0, "key": "k", "size": 1, "sha256": "0"},
        {"type": "adapter", "files": {}, "best_step": 3},
        {"type": "phase", "name": "saving"},
        {"type": "metrics", "step": 1, "epoch": 0, "training_loss": 1.0, "learning_rate": 1e-4},
        {"type": "log", "level": "INFO", "message": "m"},
        {"type": "failed", "code": "NAN_LOSS", "message": "m"},
    ]
    heard = parse([UpEvent(number, 0.0, event) for number, event in enumerate(told, 1)])
    assert [type(h.event) for h in heard] == [Pending, Started, Stored, Adapter, Phase, Metrics, Log, Failed]
    assert [h.number for h in heard] == list(range(1, 9))


def test_what_cannot_be_understood_is_left_out() -> None:
    good = {"type": "phase", "name": "loading"}
    bad: list[dict[str, Any]] = [{}, {"type": 7}, {"type": "phase", "name": "x"}, {"type": "metrics", "step": 1}]
    heard = parse([UpEvent(number, 0.0, event) for number, event in enumerate([*bad, good], 1)])
    assert [h.number for h in heard] == [5]
    assert parse([UpEvent(1, 1e300, good)]) == []


@given(json_values)
def test_what_is_left_can_be_stored_as_json_anywhere(value: Any) -> None:
    text = json.dumps(clean(value), allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in text
    text.encode()


def test_ordinary_values_stay_as_they_are() -> None:
    value = {"a": [1, 2.5, "ä😀", None, True], "b": {"c": "d"}}
    assert clean(value) == value
