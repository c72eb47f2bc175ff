"""The team's owners hear when the month's spending reaches a threshold of the budget: once each, in each month."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.money import usd
from control_plane.services import budget
from control_plane.services.notifications import notify
from control_plane.tables import Membership, now
from control_plane.tables.accounts import TeamRole
from control_plane.tables.notices import NotificationPriority, NotificationType

THRESHOLDS = {80: NotificationPriority.HIGH, 100: NotificationPriority.CRITICAL}
"""Per cent of the monthly budget."""


async def cost_alerts(session: AsyncSession, team_id: str) -> None:
    """To be called in each transaction that posts costs or changes the budget, after it has; repeating it is harmless.

    Under the lock of the team's row, so that of two transactions the later one sees what both have posted.
    """
    team = await budget.lock_team(session, team_id)
    limit = team.monthly_budget_microusd
    if limit is None:
        return
    at = now()
    posted = await budget.posted_this_month(session, team_id, at)
    reached = [threshold for threshold in THRESHOLDS if posted * 100 >= limit * threshold]
    if not reached:
        return
    owners = await session.scalars(
        select(Membership.user_id).where(Membership.team_id == team_id, Membership.role == TeamRole.OWNER)
    )
    for user_id in owners.all():
        for threshold in reached:
            await notify(
                session,
                user_id=user_id,
                team_id=team_id,
                type=NotificationType.COST_ALERT,
                title=f"{threshold} % of the monthly budget is spent",
                message=f"{team.name} has spent {usd(posted)} of {usd(limit)} USD in {at:%B %Y}.",
                priority=THRESHOLDS[threshold],
                action_url="/costs",
                details={"threshold": threshold, "posted": usd(posted), "monthlyBudget": usd(limit)},
                dedupe_key=f"{NotificationType.COST_ALERT}:{team_id}:{at:%Y-%m}:{threshold}:{user_id}",
            )
