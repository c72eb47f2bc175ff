"""Work that the scheduler runs (training jobs, verdicts), what it is about and what comes out of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.states import Stage, Status, StopReason
from control_plane.states import WorkKind as WorkKind
from control_plane.tables.base import Base, Json, Row, enum_column, now


class DatasetFormat(StrEnum):
    BRIGHTRUN_LORA_V4 = "BRIGHTRUN_LORA_V4"
    BRIGHTRUN_LORA_V3 = "BRIGHTRUN_LORA_V3"
    OPENAI_MESSAGES = "OPENAI_MESSAGES"
    SHAREGPT = "SHAREGPT"
    ALPACA = "ALPACA"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"


class DatasetStatus(StrEnum):
    UPLOADING = "UPLOADING"
    VALIDATING = "VALIDATING"
    READY = "READY"
    ERROR = "ERROR"


class ModelStatus(StrEnum):
    STORED = "STORED"
    DEPLOYED = "DEPLOYED"
    ARCHIVED = "ARCHIVED"


class Owned:
    """Belongs to a team; the tenant predicate (``services.scope``) reads ``team_id``."""

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    created_by: Mapped[str] = mapped_column(ForeignKey("users.id"))


class Work:
    """What every kind of work has for the scheduler: a status, an attempt fence, a place in the queue."""

    status: Mapped[Status] = mapped_column(enum_column(Status), default=Status.QUEUED)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Number of the current attempt; 0 before the first. A write for another attempt changes nothing."""
    stop_requested: Mapped[StopReason | None] = mapped_column(enum_column(StopReason))
    paused_by: Mapped[StopReason | None] = mapped_column(enum_column(StopReason))
    reconnecting: Mapped[bool] = mapped_column(Boolean, default=False)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    """Higher first."""
    queue_reason: Mapped[str | None] = mapped_column(String(300))
    queued_at: Mapped[datetime] = mapped_column(default=now)
    not_before: Mapped[datetime | None]
    """Pause before the next try after a platform fault."""
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    retry_count: Mapped[int] = mapped_column(Integer, default=0)
    """Platform faults so far."""
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_stack: Mapped[str | None] = mapped_column(Text)


class Dataset(Owned, Row, Base):
    __tablename__ = "datasets"
    __table_args__ = (Index(None, "team_id", "status"), Index(None, "team_id", "created_at"))

    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str | None] = mapped_column(Text)
    format: Mapped[DatasetFormat | None] = mapped_column(enum_column(DatasetFormat))
    stated_format: Mapped[DatasetFormat | None] = mapped_column(enum_column(DatasetFormat))
    status: Mapped[DatasetStatus] = mapped_column(enum_column(DatasetStatus), default=DatasetStatus.UPLOADING)
    base_model: Mapped[str] = mapped_column(String(200))
    """The base model of the first verdict."""
    storage_key: Mapped[str] = mapped_column(String(400), unique=True)
    file_name: Mapped[str] = mapped_column(String(255))
    file_size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    total_training_pairs: Mapped[int | None] = mapped_column(Integer)
    total_validation_pairs: Mapped[int | None] = mapped_column(Integer)
    total_tokens: Mapped[int | None] = mapped_column(BigInteger)
    avg_turns_per_conversation: Mapped[float | None] = mapped_column(Float)
    avg_tokens_per_turn: Mapped[float | None] = mapped_column(Float)
    training_ready: Mapped[bool] = mapped_column(Boolean, default=False)
    uploaded_at: Mapped[datetime | None]
    validated_at: Mapped[datetime | None]
    processed_at: Mapped[datetime | None]
    validation_errors: Mapped[list[Any] | None] = mapped_column(Json)
    sample_data: Mapped[list[Any] | None] = mapped_column(Json)
    error_message: Mapped[str | None] = mapped_column(Text)
    deleted_at: Mapped[datetime | None]


class Verdict(Work, Row, Base):
    """One per dataset, base model and revision; zero-GPU work."""

    __tablename__ = "verdicts"
    __table_args__ = (UniqueConstraint("dataset_id", "base_model", "revision"), Index(None, "status", "queued_at"))

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    base_model: Mapped[str] = mapped_column(String(200))
    revision: Mapped[str] = mapped_column(String(64))
    max_seq_length: Mapped[int] = mapped_column(Integer)
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    passed: Mapped[bool | None] = mapped_column(Boolean)
    counts: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """Findings by code, all of them."""
    findings: Mapped[list[Any] | None] = mapped_column(Json)
    """The first 100 of each code: line, pointer, code, severity, found, advice."""
    statistics: Mapped[dict[str, Any] | None] = mapped_column(Json)


class TrainingJob(Owned, Work, Row, Base):
    __tablename__ = "training_jobs"
    __table_args__ = (
        Index(None, "team_id", "status"),
        Index(None, "team_id", "created_at"),
        Index(None, "status", "queued_at"),
        Index(None, "dataset_id"),
    )

    name: Mapped[str] = mapped_column(String(200))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    base_model: Mapped[str] = mapped_column(String(200))
    base_model_revision: Mapped[str] = mapped_column(String(64))
    preset_id: Mapped[str] = mapped_column(String(32))
    base_preset: Mapped[str] = mapped_column(String(32))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(Json)
    """The full resolved set, wire names (``trainer.config.Hyperparameters``)."""
    gpu_type: Mapped[str] = mapped_column(String(64))
    gpu_count: Mapped[int] = mapped_column(Integer)
    current_stage: Mapped[Stage] = mapped_column(enum_column(Stage), default=Stage.QUEUED)
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    current_epoch: Mapped[int | None] = mapped_column(Integer)
    total_epochs: Mapped[int] = mapped_column(Integer)
    current_step: Mapped[int | None] = mapped_column(Integer)
    total_steps: Mapped[int | None] = mapped_column(Integer)
    current_metrics: Mapped[dict[str, Any] | None] = mapped_column(Json)
    estimated_start_at: Mapped[datetime | None]
    estimated_completion_at: Mapped[datetime | None]
    estimate: Mapped[dict[str, Any]] = mapped_column(Json)
    estimated_total_cost_microusd: Mapped[int] = mapped_column(BigInteger)
    current_cost_microusd: Mapped[int] = mapped_column(BigInteger, default=0)
    final_cost_microusd: Mapped[int | None] = mapped_column(BigInteger)
    price_version_id: Mapped[str] = mapped_column(ForeignKey("price_versions.id"))
    price_microusd_per_hour: Mapped[int] = mapped_column(BigInteger)
    """Of one GPU of this type, pinned at acceptance."""
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("training_jobs.id"))
    parent_model_id: Mapped[str | None] = mapped_column(String(36))
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    artifact_prefix: Mapped[str | None] = mapped_column(String(400))
    """Storage key prefix of the MLflow run's artifacts."""
    mirrored_seq: Mapped[int] = mapped_column(Integer, default=0)
    """Events up to this seq stand in MLflow."""
    mirrored_status: Mapped[str | None] = mapped_column(String(24))
    event_seq: Mapped[int] = mapped_column(Integer, default=0)
    """The last ``job_events.seq`` given."""
    artifact_id: Mapped[str | None] = mapped_column(String(36))
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """Quality as the trainer reported it, gathered from its events."""


class ModelArtifact(Owned, Row, Base):
    __tablename__ = "model_artifacts"
    __table_args__ = (Index(None, "team_id", "status"), Index(None, "team_id", "created_at"))

    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"), unique=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(Integer, default=1)
    description: Mapped[str | None] = mapped_column(Text)
    status: Mapped[ModelStatus] = mapped_column(enum_column(ModelStatus), default=ModelStatus.STORED)
    deployed_at: Mapped[datetime | None]
    quality_metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    training_summary: Mapped[dict[str, Any]] = mapped_column(Json)
    configuration: Mapped[dict[str, Any]] = mapped_column(Json)
    artifacts: Mapped[dict[str, Any]] = mapped_column(Json)
    """File name → {key, size, sha256}."""
    parent_model_id: Mapped[str | None] = mapped_column(ForeignKey("model_artifacts.id"))
    deleted_at: Mapped[datetime | None]
