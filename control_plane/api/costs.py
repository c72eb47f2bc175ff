"""/api/costs, /api/budget."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from litestar import get, put
from litestar.params import Parameter
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.auth import SEE_COSTS, SET_BUDGET
from control_plane.money import usd
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.costs import Budget, ChangeBudget, CostGroups, CostOut, Costs, Summary
from control_plane.services import costs
from control_plane.services.listing import Paging
from control_plane.services.scope import Principal
from control_plane.tables.money import CostType


@get("/api/costs", guards=[SEE_COSTS], tags=["costs"], summary="The ledger's records, or their sums by groupBy")
async def list_costs(
    session: AsyncSession,
    who: Principal,
    paging: Paging,
    first: Annotated[date | None, Parameter(query="from", description="first UTC day")] = None,
    last: Annotated[date | None, Parameter(query="to", description="last UTC day")] = None,
    cost_type: Annotated[CostType | None, Parameter(query="type")] = None,
    job: str | None = None,
    group_by: Annotated[costs.GroupBy | None, Parameter(query="groupBy")] = None,
) -> Ok[Costs] | Ok[CostGroups]:
    chosen = costs.Filter(first, last, cost_type, job)
    if group_by is not None:
        return ok(CostGroups(groups=await costs.grouped(session, who.team_id, chosen, group_by)))
    rows, pagination = await costs.listed(session, who.team_id, paging, chosen)
    return ok(Costs(costs=[CostOut.seen(row) for row in rows], pagination=pagination))


@get("/api/costs/summary", guards=[SEE_COSTS], tags=["costs"], summary="The UTC month so far, and its forecast")
async def summary(session: AsyncSession, who: Principal) -> Ok[Summary]:
    return ok(await costs.summary(session, who.team_id))


@put("/api/budget", guards=[SET_BUDGET], tags=["costs"], summary="Set the team's monthly budget; null: unlimited")
async def set_budget(data: ChangeBudget, session: AsyncSession, who: Principal) -> Ok[Budget]:
    team = await costs.set_budget(session, who, data.monthly_budget)
    limit = team.monthly_budget_microusd
    return ok(Budget(monthly_budget=None if limit is None else usd(limit)))
