"""/api/costs, /api/budget."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from litestar import Response, get, put
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from control_plane.api.context import AnyRequest, Caller, Pages, Session
from control_plane.auth import SEE_COSTS, SET_BUDGET
from control_plane.money import usd
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.costs import (
    Budget,
    ChangeBudget,
    CostGroups,
    CostOut,
    Costs,
    StatementData,
    Statements,
    Summary,
)
from control_plane.services import costs, statements
from control_plane.tables.money import CostType


@get("/api/costs", guards=[SEE_COSTS], tags=["costs"], summary="The ledger's records, or their sums by groupBy")
async def list_costs(
    session: Session,
    who: Caller,
    paging: Pages,
    first: Annotated[date | None, QueryParameter(name="from", description="first UTC day")] = None,
    last: Annotated[date | None, QueryParameter(name="to", description="last UTC day")] = None,
    cost_type: Annotated[CostType | None, QueryParameter(name="type")] = None,
    job: FromQuery[str | None] = None,
    group_by: Annotated[costs.GroupBy | None, QueryParameter(name="groupBy")] = None,
) -> Ok[Costs] | Ok[CostGroups]:
    chosen = costs.Filter(first, last, cost_type, job)
    if group_by is not None:
        return ok(CostGroups(groups=await costs.grouped(session, who.team_id, chosen, group_by)))
    rows, pagination = await costs.listed(session, who.team_id, paging, chosen)
    return ok(Costs(costs=[CostOut.seen(row) for row in rows], pagination=pagination))


@get("/api/costs/summary", guards=[SEE_COSTS], tags=["costs"], summary="The UTC month so far, and its forecast")
async def summary(session: Session, who: Caller) -> Ok[Summary]:
    return ok(await costs.summary(session, who.team_id))


@get("/api/costs/statements", guards=[SEE_COSTS], tags=["costs"], summary="Months with costs, the newest first")
async def list_statements(session: Session, who: Caller) -> Ok[Statements]:
    return ok(Statements(statements=await statements.listed(session, who.team_id)))


@get("/api/costs/statements/{month:str}", guards=[SEE_COSTS], tags=["costs"], summary="A month by type and job; or CSV")
async def get_statement(
    month: FromPath[str], request: AnyRequest, session: Session, who: Caller
) -> Response[Ok[StatementData]] | Response[str]:
    made = await statements.statement(session, who.team_id, statements.Month.named(month))
    if "text/csv" not in request.headers.get("Accept", ""):
        return Response(ok(StatementData(statement=made)))
    name = f'attachment; filename="brightrun-{made.month}.csv"'
    return Response(statements.as_csv(made), media_type="text/csv", headers={"Content-Disposition": name})


@put("/api/budget", guards=[SET_BUDGET], tags=["costs"], summary="Set the team's monthly budget; null: unlimited")
async def set_budget(data: JSONBody[ChangeBudget], session: Session, who: Caller) -> Ok[Budget]:
    team = await costs.set_budget(session, who, data.monthly_budget)
    limit = team.monthly_budget_microusd
    return ok(Budget(monthly_budget=None if limit is None else usd(limit)))
