"""Prices, the append-only ledger, and what is held against budgets."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, ForeignKey, Index, Integer, String, cast
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.tables.base import Base, Json, Row, enum_column, now
from control_plane.tables.work import Owned


class CostType(StrEnum):
    COMPUTE = "COMPUTE"
    STORAGE = "STORAGE"
    DATA_TRANSFER = "DATA_TRANSFER"
    API_CALLS = "API_CALLS"


class HoldState(StrEnum):
    OPEN = "OPEN"
    CLOSED = "CLOSED"


class PriceVersion(Row, Base):
    __tablename__ = "price_versions"

    number: Mapped[int] = mapped_column(Integer, unique=True)
    effective_from: Mapped[datetime]
    gpu_microusd_per_hour: Mapped[dict[str, Any]] = mapped_column(Json)
    """By GPU type."""
    storage_microusd_per_gib_month: Mapped[int] = mapped_column(BigInteger)
    transfer_microusd_per_gib: Mapped[int] = mapped_column(BigInteger, default=0)
    microusd_per_api_call: Mapped[int] = mapped_column(BigInteger, default=0)


class CostRecord(Owned, Row, Base):
    """Append-only. A correction is a new record that reverses an old one."""

    __tablename__ = "cost_records"
    __table_args__ = (Index(None, "team_id", "billing_period"), Index(None, "job_id"))

    job_id: Mapped[str | None] = mapped_column(ForeignKey("training_jobs.id"))
    attempt_id: Mapped[str | None] = mapped_column(ForeignKey("attempts.id"))
    cost_type: Mapped[CostType] = mapped_column(enum_column(CostType))
    amount_microusd: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, Any]] = mapped_column(Json)
    """kind (charge, reversal, absorbed), gpuType, gpuCount, gpuMs, priceVersion."""
    billing_period: Mapped[datetime]
    """Start of the UTC day."""
    recorded_at: Mapped[datetime] = mapped_column(default=now)
    dedupe_key: Mapped[str | None] = mapped_column(String(120), unique=True)
    """Of what is accrued once a period (``storage:<team>:<day>``); COMPUTE records have none."""


def kind_of_record() -> ColumnElement[str]:
    """``details.kind``, in SQL."""
    kind: ColumnElement[str] = CostRecord.details["kind"].as_string()
    return kind


def gpu_ms_of_record() -> ColumnElement[int]:
    """``details.gpuMs``, in SQL; signed."""
    return cast(CostRecord.details["gpuMs"].as_string(), BigInteger)


class BudgetHold(Row, Base):
    """What a job may still cost, reserved against its team's month. Closed exactly once."""

    __tablename__ = "budget_holds"
    __table_args__ = (Index(None, "team_id", "state"),)

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("training_jobs.id"), unique=True)
    amount_microusd: Mapped[int] = mapped_column(BigInteger)
    """The whole reservation; what is posted for the job counts against it."""
    state: Mapped[HoldState] = mapped_column(enum_column(HoldState), default=HoldState.OPEN)
    closed_at: Mapped[datetime | None]
