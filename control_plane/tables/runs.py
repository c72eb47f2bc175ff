"""One execution of work and what it told us: attempts, events, and their projections."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.states import Outcome, WorkKind
from control_plane.tables.base import Base, Json, Row, enum_column, now


class Attempt(Row, Base):
    """One execution. Committed before Ray is asked; its actor name is a function of its work and number."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("work_id", "number"), Index(None, "outcome"))

    work_kind: Mapped[WorkKind] = mapped_column(enum_column(WorkKind))
    work_id: Mapped[str] = mapped_column(String(36))
    number: Mapped[int] = mapped_column(Integer)
    actor_name: Mapped[str] = mapped_column(String(80), unique=True)
    cluster_id: Mapped[str | None] = mapped_column(String(64))
    node: Mapped[str | None] = mapped_column(String(255))
    lease_epoch: Mapped[int] = mapped_column(Integer)
    """Of the scheduler that dispatched it."""
    resumed_from: Mapped[str | None] = mapped_column(String(36))
    """Checkpoint id that it started from."""
    recovery: Mapped[bool] = mapped_column(Boolean, default=False)
    """Its loading is absorbed (``states.recovery_after``)."""
    event_cursor: Mapped[int] = mapped_column(Integer, default=0)
    """Number of the last event collected; moved only by compare-and-set."""
    started_at: Mapped[datetime | None]
    allocation_started_at: Mapped[datetime | None]
    allocation_ended_at: Mapped[datetime | None]
    held_ms: Mapped[int | None] = mapped_column(BigInteger)
    """GPU-milliseconds that its ranks held by Ray's own actor table, known when it has ended."""
    outcome: Mapped[Outcome | None] = mapped_column(enum_column(Outcome))
    exit_reason: Mapped[str | None] = mapped_column(String(64))
    exit_message: Mapped[str | None] = mapped_column(Text)
    released: Mapped[bool] = mapped_column(Boolean, default=False)
    """Its Ray actors are known to be gone."""


class AttemptUsage(Row, Base):
    """Cumulative GPU-milliseconds of one rank by kind; only ever raised."""

    __tablename__ = "attempt_usage"
    __table_args__ = (UniqueConstraint("attempt_id", "rank", "kind"),)

    attempt_id: Mapped[str] = mapped_column(ForeignKey("attempts.id"))
    rank: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(16))
    """loading, training, evaluating, saving; ``tail``: between the last report and the actor's recorded end."""
    gpu_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    absorbed_ms: Mapped[int] = mapped_column(BigInteger, default=0)
    """The part of gpu_ms that is the platform's to bear."""


class JobEvent(Row, Base):
    """What the streams replay. ``seq`` is given under the job row's lock and has no gap."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "seq"), UniqueConstraint("attempt_id", "number"))

    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"))
    seq: Mapped[int] = mapped_column(Integer)
    type: Mapped[str] = mapped_column(String(16))
    """progress, metrics, cost, stage, log, complete, error (the stream's event names)."""
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    attempt_id: Mapped[str | None] = mapped_column(ForeignKey("attempts.id"))
    number: Mapped[str | None] = mapped_column(String(24))
    """Where it came from within the attempt: event number, and a part when one event gives several."""


class MetricsPoint(Row, Base):
    __tablename__ = "metrics_points"
    __table_args__ = (UniqueConstraint("job_id", "step"), Index(None, "job_id", "timestamp"))

    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"))
    timestamp: Mapped[datetime] = mapped_column(default=now)
    epoch: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(Integer)
    training_loss: Mapped[float] = mapped_column(Float)
    validation_loss: Mapped[float | None] = mapped_column(Float)
    learning_rate: Mapped[float] = mapped_column(Float)
    gradient_norm: Mapped[float | None] = mapped_column(Float)
    throughput: Mapped[float] = mapped_column(Float)
    gpu_utilization: Mapped[float | None] = mapped_column(Float)
    gpu_memory: Mapped[int | None] = mapped_column(BigInteger)


class Checkpoint(Row, Base):
    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("attempt_id", "step"), Index(None, "job_id", "step"))

    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"))
    attempt_id: Mapped[str] = mapped_column(ForeignKey("attempts.id"))
    step: Mapped[int] = mapped_column(Integer)
    epoch: Mapped[int] = mapped_column(Integer)
    loss: Mapped[float] = mapped_column(Float)
    storage_key: Mapped[str] = mapped_column(String(500))
    """Prefix of the checkpoint's files."""
    file_size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    """Of its manifest."""
    best: Mapped[bool] = mapped_column(Boolean, default=False)
    usage: Mapped[dict[str, Any]] = mapped_column(Json)
    """The attempt's cumulative GPU-milliseconds at this point: {rank: {kind: ms}}."""
    deleted_at: Mapped[datetime | None]


class JobLog(Row, Base):
    __tablename__ = "job_logs"
    __table_args__ = (Index(None, "job_id", "timestamp"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"))
    timestamp: Mapped[datetime] = mapped_column(default=now)
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """``metadata`` on the wire (SQLAlchemy keeps that name for itself)."""


class SchedulerLease(Base):
    """One row. Every scheduler write locks it and compares the epoch."""

    __tablename__ = "scheduler_lease"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, default=1)
    epoch: Mapped[int] = mapped_column(Integer, default=0)
    beat: Mapped[int] = mapped_column(BigInteger, default=0)
    holder: Mapped[str] = mapped_column(String(128), default="")
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class ClusterState(Base):
    """One row, written by the scheduler's tick: what the API tells of a cluster that it never asks."""

    __tablename__ = "cluster_state"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, default=1)
    reachable: Mapped[bool] = mapped_column(Boolean, default=False)
    cluster_id: Mapped[str] = mapped_column(String(64), default="")
    free: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    total: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)
