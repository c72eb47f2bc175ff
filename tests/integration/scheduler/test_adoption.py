"""A scheduler is killed with work running; the next adopts all of it and starts none again. How long it takes is the
benchmark's to say (``python -m benchmarks.adoption``)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.adoption.scenes import on_ray, on_the_fake

ON_THE_FAKE = 1000
ON_POSTGRESQL = 200
ON_RAY = 4


async def test_a_thousand_jobs_are_adopted(tmp_path: Path) -> None:
    adoption = await on_the_fake(tmp_path, ON_THE_FAKE)
    assert (adoption.jobs, adoption.started) == (ON_THE_FAKE, [])


async def test_many_jobs_are_adopted_on_postgresql(tmp_path: Path, postgres_database_url: str) -> None:
    adoption = await on_the_fake(tmp_path, ON_POSTGRESQL, postgres_database_url)
    assert (adoption.jobs, adoption.started) == (ON_POSTGRESQL, [])


async def test_jobs_on_ray_are_adopted_in_the_processes_that_they_have(tmp_path: Path) -> None:
    adoption = await on_ray(tmp_path, ON_RAY)
    assert (adoption.jobs, adoption.started) == (ON_RAY, [])
