"""Guarded budgets: what open jobs may still cost is held, so that no number of submissions can pass the ceiling.

Everything here runs in the caller's transaction, under the lock on the team's row.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import BudgetExceeded, NotFound
from control_plane.money import usd
from control_plane.tables import BudgetHold, CostRecord, Team, now
from control_plane.tables.money import HoldState


def month_start(at: datetime) -> datetime:
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


async def lock_team(session: AsyncSession, team_id: str) -> Team:
    """The team, its row locked until the transaction ends (on SQLite the whole database already is)."""
    team = await session.scalar(
        select(Team).where(Team.id == team_id).with_for_update().execution_options(populate_existing=True)
    )
    if team is None:
        raise NotFound("Team not found")
    return team


async def posted_this_month(session: AsyncSession, team_id: str, at: datetime | None = None) -> int:
    """Micro-dollars posted in the UTC month of ``at`` (default: now)."""
    total = await session.scalar(
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0)).where(
            CostRecord.team_id == team_id, CostRecord.billing_period >= month_start(at or now())
        )
    )
    return int(total or 0)


async def held(session: AsyncSession, team_id: str) -> int:
    """Micro-dollars that open holds still reserve: each hold less what its job has been charged."""
    charged = (
        select(CostRecord.job_id, func.sum(CostRecord.amount_microusd).label("charged"))
        .where(CostRecord.team_id == team_id)
        .group_by(CostRecord.job_id)
        .subquery()
    )
    rest = BudgetHold.amount_microusd - func.coalesce(charged.c.charged, 0)
    total = await session.scalar(
        select(func.coalesce(func.sum(case((rest > 0, rest), else_=0)), 0))
        .select_from(BudgetHold)
        .outerjoin(charged, charged.c.job_id == BudgetHold.job_id)
        .where(BudgetHold.team_id == team_id, BudgetHold.state == HoldState.OPEN)
    )
    return int(total or 0)


async def available(session: AsyncSession, team_id: str) -> int | None:
    """Micro-dollars that may still be held this month; None: unlimited. Negative when the ceiling is passed."""
    budget = await session.scalar(select(Team.monthly_budget_microusd).where(Team.id == team_id))
    if budget is None:
        return None
    return budget - await posted_this_month(session, team_id) - await held(session, team_id)


async def hold(session: AsyncSession, team_id: str, job_id: str, amount_microusd: int) -> BudgetHold:
    """Reserve for a job. Raises BudgetExceeded when the month's budget cannot hold it."""
    await lock_team(session, team_id)
    free = await available(session, team_id)
    if free is not None and amount_microusd > free:
        raise BudgetExceeded(
            f"This job may cost up to {usd(amount_microusd)} USD, but only {usd(max(free, 0))} USD of the team's "
            "monthly budget is free. Raise the budget (PUT /api/budget) or make the job smaller."
        )
    row = BudgetHold(team_id=team_id, job_id=job_id, amount_microusd=amount_microusd)
    session.add(row)
    await session.flush()
    return row


async def close_hold(session: AsyncSession, job_id: str) -> bool:
    """Release what a job still reserves. True the one time that it does."""
    result = await session.execute(
        update(BudgetHold)
        .where(BudgetHold.job_id == job_id, BudgetHold.state == HoldState.OPEN)
        .values(state=HoldState.CLOSED, closed_at=now())
    )
    return bool(result.rowcount)  # type: ignore[attr-defined]
