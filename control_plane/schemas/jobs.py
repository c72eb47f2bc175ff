"""Jobs, their estimates, events and by-products on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from control_plane.money import usd
from control_plane.schemas.base import In, Money, MoneyRange, Name, Out, Pagination, Range
from control_plane.states import ACTIVE, Outcome, Stage, Status, StopReason
from control_plane.tables import TrainingJob
from trainer.config import Hyperparameters

Priority = Annotated[int, Meta(ge=-100, le=100)]

if TYPE_CHECKING:
    Overrides = Any
else:
    Overrides = msgspec.defstruct(
        "Overrides",
        [(f.name, f.type | UnsetType, UNSET) for f in msgspec.structs.fields(Hyperparameters)],
        bases=(In,),
        module=__name__,
    )
    Overrides.__doc__ = "Any of the hyperparameters; the preset gives the others."


class GpuConfig(In):
    type: str
    count: int


class CreateJob(In):
    """Body of POST /api/jobs and of POST /api/jobs/estimate."""

    dataset_id: str
    preset_id: str
    gpu_config: GpuConfig
    base_model: str | None = None
    base_preset: str | None = None
    """What ``custom`` starts from; balanced if absent."""
    hyperparameters: Overrides | None = None
    name: Name | None = None
    priority: Priority = 0
    parent_model_id: str | None = None


class ChangeJob(In):
    name: Name | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET


class Estimate(Out):
    compute_cost: MoneyRange
    storage_cost: MoneyRange
    total_cost: MoneyRange
    duration_s: Range
    tokens_per_s: Range


class Warning(Out):
    field: str
    message: str


class EstimateData(Out):
    estimate: Estimate
    warnings: list[Warning]


class NewJob(Out):
    job_id: str
    queue_position: int
    estimate: Estimate
    warnings: list[Warning]


class GpuChoice(Out):
    type: str
    count: int


class MetricsOut(Out):
    timestamp: datetime
    epoch: int
    step: int
    training_loss: float
    validation_loss: float | None
    learning_rate: float
    gradient_norm: float | None
    throughput: float
    gpu_utilization: float | None
    gpu_memory: int | None


class LogOut(Out):
    id: str
    timestamp: datetime
    level: str
    message: str
    metadata: dict[str, Any] | None


class CheckpointOut(Out):
    id: str
    attempt_id: str
    step: int
    epoch: int
    loss: float
    file_size: int
    sha256: str
    best: bool
    created_at: datetime
    deleted_at: datetime | None


class AttemptOut(Out):
    id: str
    number: int
    actor_name: str
    cluster_id: str | None
    node: str | None
    resumed_from: str | None
    recovery: bool
    started_at: datetime | None
    allocation_started_at: datetime | None
    allocation_ended_at: datetime | None
    held_ms: int | None
    outcome: Outcome | None
    exit_reason: str | None
    exit_message: str | None
    created_at: datetime


class JobOut(Out):
    id: str
    team_id: str
    created_by: str
    name: str
    dataset_id: str
    base_model: str
    base_model_revision: str
    preset_id: str
    base_preset: str
    hyperparameters: dict[str, Any]
    gpu_config: GpuChoice
    priority: int
    status: Status
    current_stage: Stage
    stop_requested: StopReason | None
    stopping: bool
    """It has been asked to stop and still holds its GPUs."""
    paused_by: StopReason | None
    reconnecting: bool
    progress: float
    current_epoch: int | None
    total_epochs: int
    current_step: int | None
    total_steps: int | None
    current_metrics: dict[str, Any] | None
    queue_reason: str | None
    queue_position: int | None
    estimated_start_at: datetime | None
    queued_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    estimated_completion_at: datetime | None
    estimate: dict[str, Any]
    current_cost: Money
    estimated_total_cost: Money
    final_cost: Money | None
    price_version: int
    price_per_hour: Money
    error_code: str | None
    error_message: str | None
    error_stack: str | None
    retry_count: int
    retry_of: str | None
    parent_model_id: str | None
    mlflow_run_id: str | None
    artifact_id: str | None
    created_at: datetime
    updated_at: datetime
    metrics: list[MetricsOut] | None
    """Only with the single job."""

    @classmethod
    def seen(
        cls, job: TrainingJob, price_version: int, queue_position: int | None, metrics: list[MetricsOut] | None = None
    ) -> JobOut:
        final = job.final_cost_microusd
        return cls.of(
            job,
            gpu_config=GpuChoice(type=job.gpu_type, count=job.gpu_count),
            queue_position=queue_position,
            stopping=job.status in ACTIVE and job.stop_requested is not None,
            current_cost=usd(job.current_cost_microusd),
            estimated_total_cost=usd(job.estimated_total_cost_microusd),
            final_cost=None if final is None else usd(final),
            price_version=price_version,
            price_per_hour=usd(job.price_microusd_per_hour),
            metrics=metrics,
        )


class JobData(Out):
    job: JobOut


class RetriedJob(NewJob):
    """Answer of POST /api/jobs/{id}/retry: that of POST /api/jobs, and the new job itself."""

    job: JobOut


class Jobs(Out):
    jobs: list[JobOut]
    pagination: Pagination


class Metrics(Out):
    metrics: list[MetricsOut]


class Logs(Out):
    logs: list[LogOut]
    pagination: Pagination


class Checkpoints(Out):
    checkpoints: list[CheckpointOut]


class Attempts(Out):
    attempts: list[AttemptOut]
