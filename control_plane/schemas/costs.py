"""Costs and budgets on the wire."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from control_plane.money import usd
from control_plane.schemas.base import In, Money, Out, Pagination
from control_plane.tables import CostRecord
from control_plane.tables.money import CostType


class CostOut(Out):
    id: str
    job_id: str | None
    attempt_id: str | None
    created_by: str
    cost_type: CostType
    amount: Money
    details: dict[str, Any]
    billing_period: datetime
    recorded_at: datetime

    @classmethod
    def seen(cls, record: CostRecord) -> CostOut:
        return cls.of(record, amount=usd(record.amount_microusd))


class CostGroup(Out):
    key: str | None
    """Day (YYYY-MM-DD), cost type, job id or user id."""
    amount: Money
    records: int


class Costs(Out):
    pagination: Pagination
    costs: list[CostOut]


class CostGroups(Out):
    groups: list[CostGroup]


class Alert(Out):
    threshold: int
    """Per cent of the budget."""
    at: datetime


class Summary(Out):
    month_to_date: Money
    held: Money
    monthly_budget: Money | None
    forecast: Money
    alerts: list[Alert]


class ChangeBudget(In):
    monthly_budget: Decimal | None


class Budget(Out):
    monthly_budget: Money | None


class StatementSummary(Out):
    month: str
    """YYYY-MM, UTC."""
    closed: bool
    """The month has been over for a day: nothing of it changes any more."""
    total: Money
    by_type: dict[str, Money]
    jobs: int
    reversed: Money
    """The part of the total that was given back; not above zero."""
    absorbed_ms: int
    """GPU-milliseconds that the platform bore."""


class Statements(Out):
    statements: list[StatementSummary]


class StatementLine(Out):
    cost_type: CostType
    job_id: str | None
    job_name: str | None
    records: int
    charged: Money
    reversed: Money
    amount: Money
    """Charged and reversed together."""
    gpu_ms: int
    """Billed, less what was reversed."""
    absorbed_ms: int


class Statement(Out):
    month: str
    closed: bool
    opening: Money
    """All that was charged before the month."""
    total: Money
    """The sum of the lines."""
    closing: Money
    lines: list[StatementLine]


class StatementData(Out):
    statement: Statement
