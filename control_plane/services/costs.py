"""What was spent, by whom, on what, and what the month will come to."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import ValidationFailed
from control_plane.money import microusd, usd
from control_plane.schemas.base import Pagination
from control_plane.schemas.costs import Alert, CostGroup, Summary
from control_plane.services import budget
from control_plane.services.alerts import THRESHOLDS, cost_alerts
from control_plane.services.listing import Paging, paginate
from control_plane.services.scope import Principal
from control_plane.tables import CostRecord, Team, now
from control_plane.tables.money import CostType

COLUMNS = {
    "recordedAt": CostRecord.recorded_at,
    "billingPeriod": CostRecord.billing_period,
    "amount": CostRecord.amount_microusd,
}
GROUPS: dict[str, Any] = {
    "day": CostRecord.billing_period,
    "type": CostRecord.cost_type,
    "job": CostRecord.job_id,
    "user": CostRecord.created_by,
}
GroupBy = Literal["day", "type", "job", "user"]
LARGEST_BUDGET = Decimal(1_000_000_000)


class Filter(NamedTuple):
    """Days are UTC and both ends belong to the period."""

    first: date | None = None
    last: date | None = None
    type: CostType | None = None
    job_id: str | None = None


def _filtered(query: Select[Any], team_id: str, chosen: Filter) -> Select[Any]:
    query = query.where(CostRecord.team_id == team_id)
    if chosen.first:
        query = query.where(CostRecord.billing_period >= _midnight(chosen.first))
    if chosen.last:
        query = query.where(CostRecord.billing_period < _midnight(chosen.last + timedelta(days=1)))
    if chosen.type:
        query = query.where(CostRecord.cost_type == chosen.type)
    if chosen.job_id:
        query = query.where(CostRecord.job_id == chosen.job_id)
    return query


async def listed(
    session: AsyncSession, team_id: str, paging: Paging, chosen: Filter
) -> tuple[list[CostRecord], Pagination]:
    return await paginate(session, _filtered(select(CostRecord), team_id, chosen), paging, COLUMNS, CostRecord.id)


async def grouped(session: AsyncSession, team_id: str, chosen: Filter, by: GroupBy) -> list[CostGroup]:
    """Sums in ascending order of the key."""
    key = GROUPS[by]
    query = select(key, func.sum(CostRecord.amount_microusd), func.count()).group_by(key).order_by(key)
    rows = await session.execute(_filtered(query, team_id, chosen))
    return [
        CostGroup(key=k.date().isoformat() if isinstance(k, datetime) else k, amount=usd(int(total)), records=count)
        for k, total, count in rows
    ]


async def summary(session: AsyncSession, team_id: str) -> Summary:
    """The UTC month so far. The forecast adds what is held, or if it is more the daily mean for the days left."""
    at = now()
    limit = await session.scalar(select(Team.monthly_budget_microusd).where(Team.id == team_id))
    posted = await budget.posted_this_month(session, team_id, at)
    held = await budget.held(session, team_id)
    elapsed = (at - budget.month_start(at)) / timedelta(days=1)
    left = monthrange(at.year, at.month)[1] - elapsed
    at_this_rate = int(posted / max(elapsed, 1.0) * left)
    return Summary(
        month_to_date=usd(posted),
        held=usd(held),
        monthly_budget=None if limit is None else usd(limit),
        forecast=usd(posted + max(held, at_this_rate)),
        alerts=await _alerts(session, team_id, limit, at),
    )


async def _alerts(session: AsyncSession, team_id: str, limit: int | None, at: datetime) -> list[Alert]:
    """When this month's spending first reached each threshold of the budget."""
    if limit is None:
        return []
    running = func.sum(CostRecord.amount_microusd).over(order_by=(CostRecord.recorded_at, CostRecord.id))
    spent = (
        select(CostRecord.recorded_at, running.label("total"))
        .where(CostRecord.team_id == team_id, CostRecord.billing_period >= budget.month_start(at))
        .subquery()
    )
    alerts = []
    for threshold in THRESHOLDS:
        reached = select(func.min(spent.c.recorded_at)).where(spent.c.total * 100 >= limit * threshold)
        first = await session.scalar(reached)
        if first is not None:
            alerts.append(Alert(threshold=threshold, at=first))
    return alerts


async def set_budget(session: AsyncSession, who: Principal, amount: Decimal | None) -> Team:
    """Raises ValidationFailed unless ``amount`` is above zero; None: unlimited."""
    if amount is not None and not (amount.is_finite() and 0 < amount <= LARGEST_BUDGET):
        raise ValidationFailed.field("monthlyBudget", f"Must be above 0, at most {LARGEST_BUDGET}, or null")
    if amount is not None and amount != round(amount, 6):
        raise ValidationFailed.field("monthlyBudget", "Must have at most six decimals")
    limit = None if amount is None else microusd(amount)
    team = await budget.change(session, who.team_id, limit, user_id=who.user_id)
    await cost_alerts(session, team.id)
    return team


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
