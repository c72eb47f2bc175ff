"""Jobs as their team sees them: made, looked at, renamed. How they move is ``lifecycle``'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, ValidationFailed
from control_plane.schemas.base import Pagination
from control_plane.schemas.jobs import ChangeJob, CreateJob, Estimate, NewJob, Warning
from control_plane.services import budget, lifecycle, presets, prices
from control_plane.services.accounts import audit
from control_plane.services.catalog import BaseModelEntry, Catalog, GpuType
from control_plane.services.datasets import verdict_for
from control_plane.services.estimate import Figures, estimate, measured_speeds, plan
from control_plane.services.listing import Paging, paginate
from control_plane.services.scope import Principal, get_owned, owned
from control_plane.states import TERMINAL, Status
from control_plane.tables import Dataset, ModelArtifact, PriceVersion, TrainingJob, Verdict, uuid7
from control_plane.tables.work import DatasetStatus

COLUMNS = {
    "createdAt": TrainingJob.created_at,
    "name": TrainingJob.name,
    "status": TrainingJob.status,
    "priority": TrainingJob.priority,
    "startedAt": TrainingJob.started_at,
    "completedAt": TrainingJob.completed_at,
}


class Prepared(NamedTuple):
    """A job that could be accepted now."""

    dataset: Dataset
    model: BaseModelEntry
    preset: presets.Resolved
    gpu: GpuType
    price: PriceVersion
    estimate: Estimate
    expected_microusd: int
    upper_microusd: int
    steps: int
    warnings: list[Warning]


async def prepare(
    session: AsyncSession, who: Principal, body: CreateJob, catalog: Catalog, default_model: str, *, lock: bool = False
) -> Prepared:
    """Resolve and estimate. Raises ValidationFailed naming every bad field, NotFound, Conflict for the dataset."""
    model, gpu, resolved = resolve(body, catalog, default_model)
    if body.parent_model_id is not None:
        await _check_parent(session, who.team_id, body.parent_model_id, model, resolved)
    dataset = await get_owned(session, Dataset, who.team_id, body.dataset_id, lock=lock)
    verdict = require_ready(dataset, await verdict_for(session, dataset.id, model), model)
    price = await prices.current(session)
    if gpu.id not in price.gpu_microusd_per_hour:
        raise ValidationFailed.field("gpuConfig.type", f"{gpu.id} has no price yet")
    figures = msgspec.convert(verdict.statistics, Figures)
    made, expected, upper = estimate(
        figures,
        model,
        resolved.hyperparameters,
        gpu,
        body.gpu_config.count,
        await measured_speeds(session, gpu.id, model.id),
        price.gpu_microusd_per_hour[gpu.id],
        price.storage_microusd_per_gib_month,
    )
    warnings = [
        Warning(field=f"hyperparameters.{name}", message=message)
        for name, message in presets.unusual(catalog, resolved.hyperparameters).items()
    ]
    steps = plan(figures, resolved.hyperparameters).steps
    return Prepared(dataset, model, resolved, gpu, price, made, expected, upper, steps, warnings)


def resolve(body: CreateJob, catalog: Catalog, default_model: str) -> tuple[BaseModelEntry, GpuType, presets.Resolved]:
    """What the request names, from the catalog. Raises ValidationFailed with a message for every bad field."""
    fields: dict[str, list[str]] = {}
    model_id = body.base_model or default_model
    model = catalog.base_models.get(model_id)
    if model is None:
        fields["baseModel"] = [f"Unknown base model. Choose one of: {', '.join(catalog.base_models)}"]
    gpu = catalog.gpu_types.get(body.gpu_config.type)
    if gpu is None:
        fields["gpuConfig.type"] = [f"Unknown GPU type. Choose one of: {', '.join(catalog.gpu_types)}"]
    elif body.gpu_config.count not in gpu.counts:
        fields["gpuConfig.count"] = [f"Choose one of: {', '.join(map(str, gpu.counts))}"]
    resolved = None
    try:
        overrides = presets.given(body.hyperparameters)
        resolved = presets.resolve(catalog, body.preset_id, body.base_preset, overrides, model)
    except ValidationFailed as error:
        fields |= error.fields or {}
    if fields or model is None or gpu is None or resolved is None:
        raise ValidationFailed("Invalid input data", fields=fields)
    return model, gpu, resolved


def require_ready(dataset: Dataset, verdict: Verdict | None, model: BaseModelEntry) -> Verdict:
    """The verdict that lets the dataset be trained on. Raises Conflict, naming the call that makes one."""
    here = f"/api/datasets/{dataset.id}"
    judge = f'POST {here}/validate {{"baseModel": "{model.id}"}}'
    if dataset.status is DatasetStatus.UPLOADING:
        raise Conflict(f"The dataset's upload is not confirmed: POST {here}/confirm")
    if verdict is None:
        raise Conflict(f"The dataset has no verdict for {model.id}: {judge}")
    if verdict.passed:
        return verdict
    if verdict.passed is not None:
        raise Conflict(f"The dataset has errors that must be mended first: GET {here}/errors")
    if verdict.status in TERMINAL:
        raise Conflict(f"The dataset's examination for {model.id} failed ({verdict.error_message}): {judge}")
    raise Conflict(f"The dataset is being examined for {model.id}: wait for GET {here}")


async def _check_parent(
    session: AsyncSession, team_id: str, parent_id: str, model: BaseModelEntry, resolved: presets.Resolved
) -> None:
    parent = await get_owned(session, ModelArtifact, team_id, parent_id)
    trained = parent.configuration
    if (trained["baseModel"], trained["revision"]) != (model.id, model.revision):
        raise ValidationFailed.field("parentModelId", f"It was trained on {trained['baseModel']}, not on {model.id}")
    wanted = msgspec.to_builtins(resolved.hyperparameters)
    same = ("loraRank", "targetModules", "useRslora")
    fields = {
        f"hyperparameters.{name}": [f"Must be the parent model's: {trained['hyperparameters'][name]}"]
        for name in same
        if wanted[name] != type(wanted[name])(trained["hyperparameters"][name])
    }
    if fields:
        raise ValidationFailed("Invalid input data", fields=fields)


async def submit(
    session: AsyncSession, who: Principal, body: CreateJob, catalog: Catalog, default_model: str
) -> NewJob:
    """Accept a job: hold its upper estimate, pin the price, queue it; all in the caller's one transaction.

    Raises NotFound, ValidationFailed, Conflict, BudgetExceeded.
    """
    ready = await prepare(session, who, body, catalog, default_model, lock=True)
    job = await accept(session, who, body, ready)
    position = (await queue_positions(session, [job]))[job.id]
    return NewJob(job_id=job.id, queue_position=position, estimate=ready.estimate, warnings=ready.warnings)


async def accept(session: AsyncSession, who: Principal, body: CreateJob, ready: Prepared, **fields: Any) -> TrainingJob:
    """Insert a prepared job with its hold; ``fields``: further columns. Raises BudgetExceeded."""
    hyperparameters = ready.preset.hyperparameters
    job = TrainingJob(
        id=uuid7(),
        team_id=who.team_id,
        created_by=who.user_id,
        name=body.name or f"{ready.dataset.name} on {ready.model.name}"[:200],
        dataset_id=ready.dataset.id,
        base_model=ready.model.id,
        base_model_revision=ready.model.revision,
        preset_id=ready.preset.preset_id,
        base_preset=ready.preset.base_preset,
        hyperparameters=msgspec.to_builtins(hyperparameters),
        gpu_type=ready.gpu.id,
        gpu_count=body.gpu_config.count,
        priority=body.priority,
        total_epochs=hyperparameters.num_epochs,
        total_steps=ready.steps,
        estimate=msgspec.to_builtins(ready.estimate),
        estimated_total_cost_microusd=ready.expected_microusd,
        price_version_id=ready.price.id,
        price_microusd_per_hour=ready.price.gpu_microusd_per_hour[ready.gpu.id],
        parent_model_id=body.parent_model_id,
        **fields,
    )
    await budget.lock_team(session, who.team_id)
    session.add(job)
    await session.flush()
    await budget.hold(session, who.team_id, job.id, ready.upper_microusd)
    await lifecycle.append_event(session, job.id, "stage", lifecycle.stage_payload(job))
    action = "retry" if job.retry_of else "create"
    audit(session, action, "job", job.id, user_id=who.user_id, team_id=who.team_id)
    await session.flush()
    return job


async def listed(
    session: AsyncSession, team_id: str, paging: Paging, status: Status | None, dataset_id: str | None
) -> tuple[list[TrainingJob], Pagination]:
    query = owned(TrainingJob, team_id)
    if status is not None:
        query = query.where(TrainingJob.status == status)
    if dataset_id is not None:
        query = query.where(TrainingJob.dataset_id == dataset_id)
    return await paginate(session, query, paging, COLUMNS, TrainingJob.id)


async def change(session: AsyncSession, team_id: str, job_id: str, body: ChangeJob) -> TrainingJob:
    """Raises Conflict for a priority that can no longer matter."""
    job = await get_owned(session, TrainingJob, team_id, job_id, lock=True)
    if body.priority is not UNSET and body.priority != job.priority:
        if job.status is not Status.QUEUED:
            raise Conflict(f"The priority can be changed only while the job is QUEUED; it is {job.status}")
        job.priority = body.priority
    if body.name is not UNSET:
        job.name = body.name
    await session.flush()
    return job


async def queue_positions(session: AsyncSession, jobs: Sequence[TrainingJob]) -> dict[str, int]:
    """1 for the job that starts next, for those of ``jobs`` that are queued."""
    queued = [job.id for job in jobs if job.status is Status.QUEUED]
    if not queued:
        return {}
    order = (TrainingJob.priority.desc(), TrainingJob.queued_at, TrainingJob.id)
    queue = (
        select(TrainingJob.id, func.row_number().over(order_by=order).label("position"))
        .where(TrainingJob.status == Status.QUEUED)
        .subquery()
    )
    rows = await session.execute(select(queue.c.id, queue.c.position).where(queue.c.id.in_(queued)))
    return {row.id: row.position for row in rows}


async def price_numbers(session: AsyncSession, jobs: Sequence[TrainingJob]) -> dict[str, int]:
    """Price version id → number."""
    ids = {job.price_version_id for job in jobs}
    rows = await session.execute(select(PriceVersion.id, PriceVersion.number).where(PriceVersion.id.in_(ids)))
    return {row.id: row.number for row in rows}
