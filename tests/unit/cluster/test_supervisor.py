"""How a gang is ended: for certain, or the attempt has not ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.executor import AttemptSpec, Demand, StaleEpoch


@dataclass
class Ray:
    """Two ranks, of which the second does not die at once, and their place."""

    kills: list[str] = field(default_factory=list)
    dies_at_kill: int = 2
    known: bool = True
    questions: int = 0

    def kill(self, handle: Any, *, no_restart: bool) -> None:
        self.kills.append(handle.name)

    def actor(self, actor_id: str) -> Any:
        from scheduler.cluster import gcs

        self.questions += 1
        if self.questions == 3:
            raise ConnectionError("GCS does not answer")
        if actor_id == "r1" and not self.known:
            return None
        dead = actor_id == "r0" or self.kills.count("r1") >= self.dies_at_kill
        return gcs.Actor(actor_id, f"a/1/{actor_id}", "DEAD" if dead else "ALIVE", 5, 9 if dead else 0, "n", "n", 1)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    from scheduler.cluster import gcs, supervisor  # not when collected: Ray reads its environment when imported

    ray = Ray()
    monkeypatch.setattr(supervisor, "ray", ray)
    monkeypatch.setattr(supervisor, "DEATH_S", 0.1)
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "remove_placement_group", lambda _: None)
    monkeypatch.setattr(gcs, "actor", ray.actor)
    monkeypatch.setattr(gcs, "placement", lambda _: ("REMOVED", ""))
    return ray


async def supervisor_of_two(folder: Path) -> Any:
    from scheduler.cluster.supervisor import Member, Supervisor

    spec = AttemptSpec("a/1", "a", 1, {}, Demand({"slot_cpu": 1}, ranks=2), (), work_root=str(folder), epoch=3)
    supervisor = Supervisor(spec, [])
    supervisor._task.cancel()
    await asyncio.wait({supervisor._task})
    for rank in ("r0", "r1"):
        handle: Any = SimpleNamespace(name=rank, _actor_id=SimpleNamespace(hex=lambda rank=rank: rank))
        supervisor._gang.append(Member(handle))
    return supervisor


async def test_a_gang_has_not_ended_while_a_rank_may_live(tmp_path: Path, ray: Ray) -> None:
    """It is killed again, whatever goes wrong meanwhile; no rank's time is missing."""
    times = await (await supervisor_of_two(tmp_path))._disband()
    assert [(rank.rank, rank.end_ms) for rank in times] == [(0, 9), (1, 9)]
    assert ray.kills == ["r0", "r1", "r0", "r1"]


async def test_a_rank_that_ray_never_heard_of_is_not_waited_for_forever(tmp_path: Path, ray: Ray) -> None:
    ray.known = False
    times = await (await supervisor_of_two(tmp_path))._disband()
    assert [rank.rank for rank in times] == [0]
    assert len(ray.kills) == 4


async def test_only_the_newest_scheduler_may_end_it(tmp_path: Path, ray: Ray) -> None:
    ray.dies_at_kill = 1
    supervisor = await supervisor_of_two(tmp_path)
    with pytest.raises(StaleEpoch):
        await supervisor.shutdown(2)
    assert ray.kills == []
    await supervisor.shutdown(3)
    assert ray.kills == ["r0", "r1"]
