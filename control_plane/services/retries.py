"""A job that ended without a model, taken up again as a new job that goes on from what the old one left behind."""

from __future__ import annotations

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, NotFound, ValidationFailed
from control_plane.schemas.jobs import CreateJob, GpuConfig, Overrides
from control_plane.services import jobs, lifecycle
from control_plane.services.catalog import Catalog
from control_plane.services.scope import Principal, get_owned
from control_plane.states import Status
from control_plane.tables import TrainingJob

RETRIED = frozenset({Status.FAILED, Status.CANCELLED})
INHERITED_RESULT = ("before", "samples")
"""Of ``TrainingJob.result``: what the untouched base model scored and answered, which is not asked twice."""


async def retry(
    session: AsyncSession, who: Principal, job_id: str, catalog: Catalog
) -> tuple[TrainingJob, jobs.Prepared]:
    """A new job with the recipe of one that failed or was cancelled, at today's price.

    Raises NotFound, Conflict (it has not ended; its dataset, parent or base model's revision is no longer there),
    ValidationFailed (its GPU shape, base model or a value of its recipe is no longer offered), BudgetExceeded.
    """
    old = await get_owned(session, TrainingJob, who.team_id, job_id, lock=True)
    if old.status not in RETRIED:
        raise Conflict(lifecycle.refusal("retry", old))
    body = _request(old)
    try:
        ready = await jobs.prepare(session, who, body, catalog, old.base_model, lock=True)
    except NotFound as gone:
        raise Conflict(f"The job cannot be retried, what it was made of is gone ({gone}): POST /api/jobs") from gone
    if ready.model.revision != old.base_model_revision:
        raise Conflict(
            f"{old.base_model} is now offered at revision {ready.model.revision}, the job began with "
            f"{old.base_model_revision}: POST /api/jobs starts a new one"
        )
    result = {name: old.result[name] for name in INHERITED_RESULT if name in old.result} if old.result else None
    job = await jobs.accept(session, who, body, ready, retry_of=old.id, result=result or None)
    return job, ready


def _request(old: TrainingJob) -> CreateJob:
    """The body with which the same job would be asked for. Raises ValidationFailed."""
    try:
        recipe = msgspec.convert(old.hyperparameters, Overrides)
    except msgspec.ValidationError as error:
        raise ValidationFailed.field("hyperparameters", f"The recipe is no longer valid: {error}") from error
    return CreateJob(
        dataset_id=old.dataset_id,
        preset_id=old.preset_id,
        gpu_config=GpuConfig(type=old.gpu_type, count=old.gpu_count),
        base_model=old.base_model,
        base_preset=old.base_preset if old.preset_id == "custom" else None,
        hyperparameters=recipe,
        name=old.name,
        priority=old.priority,
        parent_model_id=old.parent_model_id,
    )
