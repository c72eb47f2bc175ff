"""The model that a completed job leaves behind."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.services.quality import rate
from control_plane.tables import AttemptUsage, CostRecord, Dataset, MetricsPoint, ModelArtifact, TrainingJob, uuid7
from control_plane.tables.money import CostType
from control_plane.tables.runs import Attempt


async def create(session: AsyncSession, job: TrainingJob) -> ModelArtifact:
    """Make the artifact from what the trainer told (``job.result``); the job's last charge is posted by now."""
    gathered: dict[str, Any] = job.result or {}
    trained: dict[str, Any] = gathered.get("trained") or {}
    model = ModelArtifact(
        id=uuid7(),
        team_id=job.team_id,
        created_by=job.created_by,
        job_id=job.id,
        dataset_id=job.dataset_id,
        name=job.name,
        version=await _version(session, job.parent_model_id),
        quality_metrics=await _quality_metrics(session, job, gathered, trained),
        training_summary=await _training_summary(session, job, trained),
        configuration={
            "baseModel": job.base_model,
            "revision": job.base_model_revision,
            "presetId": job.preset_id,
            "hyperparameters": job.hyperparameters,
            "gpuConfig": {"type": job.gpu_type, "count": job.gpu_count},
        },
        artifacts=gathered["adapter"]["files"],
        parent_model_id=job.parent_model_id,
    )
    session.add(model)
    await session.flush()
    return model


async def _version(session: AsyncSession, parent_id: str | None) -> int:
    parent = await session.get(ModelArtifact, parent_id) if parent_id else None
    return parent.version + 1 if parent else 1


async def _quality_metrics(
    session: AsyncSession, job: TrainingJob, gathered: dict[str, Any], trained: dict[str, Any]
) -> dict[str, Any]:
    before = gathered.get("before") or {}
    samples = gathered.get("samples") or {}
    first, last = await _training_losses(session, job.id)
    final_training = trained.get("finalTrainingLoss", last)
    final_validation = trained.get("finalValidationLoss")
    quality = rate(
        validation_before=before.get("validationLoss"),
        validation_after=final_validation,
        training_first=first,
        training_last=final_training,
    )
    return {
        "finalTrainingLoss": final_training,
        "finalValidationLoss": final_validation,
        "perplexity": trained.get("perplexity"),
        "bestStep": gathered["adapter"].get("bestStep"),
        "stars": quality.stars,
        "label": quality.label,
        "before": {
            "validationLoss": before.get("validationLoss"),
            "perplexity": before.get("perplexity"),
            "samples": samples.get("before", []),
        },
        "after": {
            "validationLoss": final_validation,
            "perplexity": trained.get("perplexity"),
            "samples": samples.get("after", []),
        },
    }


async def _training_losses(session: AsyncSession, job_id: str) -> tuple[float | None, float | None]:
    query = select(MetricsPoint.training_loss).where(MetricsPoint.job_id == job_id).limit(1)
    first = await session.scalar(query.order_by(MetricsPoint.step))
    last = await session.scalar(query.order_by(MetricsPoint.step.desc()))
    return first, last


async def _training_summary(session: AsyncSession, job: TrainingJob, trained: dict[str, Any]) -> dict[str, Any]:
    dataset = await session.get_one(Dataset, job.dataset_id)
    gpu_ms = await session.scalar(
        select(func.coalesce(func.sum(AttemptUsage.gpu_ms), 0))
        .join(Attempt, Attempt.id == AttemptUsage.attempt_id)
        .where(Attempt.work_id == job.id)
    )
    cost = await session.scalar(
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0)).where(
            CostRecord.job_id == job.id, CostRecord.cost_type == CostType.COMPUTE
        )
    )
    return {
        "datasetName": dataset.name,
        "durationS": round(int(gpu_ms or 0) / 1000 / job.gpu_count, 1),
        "totalCost": usd(int(cost or 0)),
        "gpu": f"{job.gpu_count} × {job.gpu_type}",
        "tokens": trained.get("tokens"),
        "tokensPerS": trained.get("tokensPerS"),
    }
