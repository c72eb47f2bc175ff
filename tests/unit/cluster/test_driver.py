"""What a node that has lost its power finds on its disk when it is back."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_a_node_removes_what_nobody_lives_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler.cluster import driver, gcs  # not when collected: Ray reads its environment when imported

    def actor(name: str) -> gcs.Actor:
        return gcs.Actor("id", name, "ALIVE", 1, 0, "127.0.0.1", "node", 1)

    strays = ["01-ab-1-r0", "01-ab-1-s", "01-cd-12-r1"]
    kept = ["01-ab-2-r0", "01-ab-2-s", "01-ef-1-r0", "huggingface", "01-ab-3-x"]
    for name in strays + kept:
        (tmp_path / name / "output").mkdir(parents=True)
    living = [actor("01-ab/2"), actor("01-ab/2/r0"), actor("01-ef/1/r0"), actor("unnamed")]
    monkeypatch.setattr(gcs, "live_actors", lambda: living)

    driver.sweep_strays(str(tmp_path))

    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(kept)
    driver.sweep_strays(str(tmp_path / "not there"))
