"""Figures at a glance."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.schemas.notices import Stats
from control_plane.services.scope import owned
from control_plane.states import ACTIVE, Status
from control_plane.tables import CostRecord, Dataset, ModelArtifact, TrainingJob
from control_plane.tables.work import ModelStatus


async def stats(session: AsyncSession, team_id: str) -> Stats:
    active = owned(TrainingJob, team_id).where(TrainingJob.status.in_({Status.QUEUED, *ACTIVE}))
    done = owned(ModelArtifact, team_id).where(ModelArtifact.status.in_({ModelStatus.STORED, ModelStatus.DEPLOYED}))
    queries = (owned(Dataset, team_id), active, done)
    datasets, jobs, models = [
        await session.scalar(select(func.count()).select_from(query.subquery())) or 0 for query in queries
    ]
    spent = await session.scalar(
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0)).where(CostRecord.team_id == team_id)
    )
    return Stats(total_datasets=datasets, active_jobs=jobs, completed_models=models, total_cost=usd(int(spent or 0)))
