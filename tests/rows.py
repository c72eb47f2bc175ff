"""Rows for tests that need work in a database and no API: a team, a dataset, a job, a verdict."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services import budget
from control_plane.states import Status
from control_plane.tables import (
    Attempt,
    Dataset,
    JobEvent,
    Membership,
    PriceVersion,
    Team,
    TrainingJob,
    User,
    Verdict,
    now,
    uuid7,
)
from control_plane.tables.accounts import TeamRole
from control_plane.tables.work import DatasetStatus
from trainer.config import Hyperparameters

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
PRICE = 360_000
"""Micro-dollars an hour: 100 a second."""


async def make_team(session: AsyncSession, *, budget_microusd: int | None = None) -> Team:
    user = User(id=uuid7(), email=f"{uuid7()}@example.com", password_hash="x", name="Ada")
    team = Team(id=uuid7(), name="Ada's team", monthly_budget_microusd=budget_microusd)
    session.add_all([user, team])
    await session.flush()
    session.add(Membership(team_id=team.id, user_id=user.id, role=TeamRole.OWNER))
    team.personal_of = user.id
    await session.flush()
    return team


async def make_price(session: AsyncSession, microusd_per_hour: int = PRICE) -> PriceVersion:
    found = await session.get(PriceVersion, "price")
    if found is None:
        found = PriceVersion(
            id="price",
            number=1,
            effective_from=now(),
            gpu_microusd_per_hour={"cpu": microusd_per_hour},
            storage_microusd_per_gib_month=0,
        )
        session.add(found)
        await session.flush()
    return found


async def make_dataset(session: AsyncSession, team: Team, **fields: Any) -> Dataset:
    assert team.personal_of is not None
    dataset_id = uuid7()
    values: dict[str, Any] = {
        "id": dataset_id,
        "team_id": team.id,
        "created_by": team.personal_of,
        "name": "conversations",
        "status": DatasetStatus.READY,
        "base_model": MODEL,
        "storage_key": f"datasets/{team.id}/{dataset_id}/source",
        "file_name": "conversations.jsonl",
        "file_size": 100,
    }
    dataset = Dataset(**{**values, **fields})
    session.add(dataset)
    await session.flush()
    return dataset


async def make_job(
    session: AsyncSession,
    team: Team | None = None,
    *,
    dataset: Dataset | None = None,
    held_microusd: int = 1_000_000,
    price_microusd: int = PRICE,
    **fields: Any,
) -> TrainingJob:
    """A QUEUED job with its hold; ``fields`` override columns."""
    team = team or await make_team(session)
    dataset = dataset or await make_dataset(session, team)
    price = await make_price(session, price_microusd)
    recipe = Hyperparameters(
        learning_rate=1e-4, batch_size=4, num_epochs=1, lora_rank=8, lora_alpha=16, lora_dropout=0.0
    )
    values: dict[str, Any] = {
        "id": uuid7(),
        "team_id": team.id,
        "created_by": team.personal_of,
        "name": "a job",
        "dataset_id": dataset.id,
        "base_model": MODEL,
        "base_model_revision": REVISION,
        "preset_id": "balanced",
        "base_preset": "balanced",
        "hyperparameters": msgspec.to_builtins(recipe),
        "gpu_type": "cpu",
        "gpu_count": 1,
        "total_epochs": 1,
        "estimate": {},
        "estimated_total_cost_microusd": held_microusd,
        "price_version_id": price.id,
        "price_microusd_per_hour": price.gpu_microusd_per_hour["cpu"],
    }
    job = TrainingJob(**{**values, **fields})
    session.add(job)
    await session.flush()
    await budget.hold(session, team.id, job.id, held_microusd)
    return job


async def make_running_job(session: AsyncSession, **fields: Any) -> tuple[TrainingJob, Attempt]:
    """A job that trains in its first attempt."""
    job = await make_job(session, **{"status": Status.RUNNING, "attempt": 1, **fields})
    return job, await make_attempt(session, job)


async def make_attempt(session: AsyncSession, work: TrainingJob | Verdict, **fields: Any) -> Attempt:
    """The work's current attempt, as a scheduler's dispatch leaves it."""
    values: dict[str, Any] = {
        "id": uuid7(),
        "work_kind": "JOB" if isinstance(work, TrainingJob) else "VERDICT",
        "work_id": work.id,
        "number": work.attempt,
        "actor_name": f"{work.id}/{work.attempt}",
        "lease_epoch": 1,
        "cluster_id": "cluster-1",
    }
    attempt = Attempt(**{**values, **fields})
    session.add(attempt)
    await session.flush()
    return attempt


async def make_verdict(session: AsyncSession, dataset: Dataset, **fields: Any) -> Verdict:
    values: dict[str, Any] = {
        "id": uuid7(),
        "team_id": dataset.team_id,
        "dataset_id": dataset.id,
        "base_model": MODEL,
        "revision": REVISION,
        "max_seq_length": 512,
    }
    verdict = Verdict(**{**values, **fields})
    session.add(verdict)
    await session.flush()
    return verdict


async def events_of(database: Database, job_id: str) -> list[JobEvent]:
    """In order; asserts that their seqs have no gap."""
    async with database.read() as session:
        events = list(await session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return events
