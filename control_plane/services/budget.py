"""Guarded budgets: what open jobs may still cost is held, so that no number of submissions can pass the ceiling.

Everything here runs in the caller's transaction, under the lock on the team's row.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ScalarSelect, case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import BudgetExceeded, NotFound
from control_plane.money import usd
from control_plane.tables import AuditEvent, BudgetHold, CostRecord, Team, now
from control_plane.tables.money import HoldState

SET_BUDGET = "set budget"
"""The audit action of ``change``."""


def month_start(at: datetime) -> datetime:
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


async def lock_team(session: AsyncSession, team_id: str) -> Team:
    """The team, its row locked until the transaction ends (on SQLite the whole database already is)."""
    team = await session.scalar(
        select(Team).where(Team.id == team_id).with_for_update(key_share=True).execution_options(populate_existing=True)
    )
    if team is None:
        raise NotFound("Team not found")
    return team


def _posted(team_id: str, at: datetime) -> ScalarSelect[Any]:
    return (
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0))
        .where(CostRecord.team_id == team_id, CostRecord.billing_period >= month_start(at))
        .scalar_subquery()
    )


def _held(team_id: str) -> ScalarSelect[Any]:
    charged = (
        select(func.coalesce(func.sum(CostRecord.amount_microusd), 0))
        .where(CostRecord.job_id == BudgetHold.job_id)
        .correlate(BudgetHold)
        .scalar_subquery()
    )
    rest = BudgetHold.amount_microusd - charged
    return (
        select(func.coalesce(func.sum(case((rest > 0, rest), else_=0)), 0))
        .where(BudgetHold.team_id == team_id, BudgetHold.state == HoldState.OPEN)
        .scalar_subquery()
    )


async def posted_this_month(session: AsyncSession, team_id: str, at: datetime | None = None) -> int:
    """Micro-dollars posted in the UTC month of ``at`` (default: now)."""
    return int(await session.scalar(select(_posted(team_id, at or now()))) or 0)


async def held(session: AsyncSession, team_id: str) -> int:
    """Micro-dollars that open holds still reserve: each hold less what its job has been charged."""
    return int(await session.scalar(select(_held(team_id))) or 0)


async def available(session: AsyncSession, team_id: str) -> int | None:
    """Micro-dollars that may still be held this month; None: unlimited. Negative when the ceiling is passed.

    One statement: a charge that is committed meanwhile moves from held to posted, and must not be seen in neither.
    """
    rest = Team.monthly_budget_microusd - _posted(team_id, now()) - _held(team_id)
    found = await session.scalar(select(rest).where(Team.id == team_id))
    return None if found is None else int(found)


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


async def change(session: AsyncSession, team_id: str, limit: int | None, *, user_id: str | None = None) -> Team:
    """Set the team's monthly budget in micro-dollars; None: unlimited.

    The audit event says what was posted and held at that moment. That may be more than ``limit``: running jobs are then
    granted less than they hold, but may have used it before they hear of it.
    """
    team = await lock_team(session, team_id)
    details = {
        "from": team.monthly_budget_microusd,
        "to": limit,
        "posted": await posted_this_month(session, team_id),
        "held": await held(session, team_id),
    }
    team.monthly_budget_microusd = limit
    session.add(
        AuditEvent(
            action=SET_BUDGET,
            object_type="team",
            object_id=team_id,
            user_id=user_id,
            team_id=team_id,
            details=details,
        )
    )
    await session.flush()
    return team
