"""What a team was charged, month by month. A month that is closed never changes: whatever is found out later is
recorded, and so stands, in the month in which that happens."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import ValidationFailed
from control_plane.money import usd
from control_plane.schemas.costs import Statement, StatementLine, StatementSummary
from control_plane.services.budget import month_start
from control_plane.tables import CostRecord, TrainingJob, now
from control_plane.tables.money import gpu_ms_of_record, kind_of_record

MONTH = re.compile(r"(2\d{3})-(0[1-9]|1[0-2])")
SETTLED_AFTER = timedelta(days=1)
"""A month is closed so long after its end: the clock of a machine that records may be behind."""
CSV_COLUMNS = ("month", "costType", "jobId", "records", "charged", "reversed", "amount", "gpuMs", "absorbedMs")


class Month(NamedTuple):
    """A UTC month: from ``first`` up to, but not with, ``end``."""

    first: datetime
    end: datetime

    @classmethod
    def of(cls, at: datetime) -> Month:
        first = month_start(at)
        return cls(first, month_start(first + timedelta(days=31)))

    @classmethod
    def named(cls, name: str) -> Month:
        """Raises ValidationFailed unless it is YYYY-MM."""
        parts = MONTH.fullmatch(name)
        if parts is None:
            raise ValidationFailed.field("month", "Must be a month as YYYY-MM")
        return cls.of(datetime(int(parts[1]), int(parts[2]), 1, tzinfo=UTC))

    @property
    def name(self) -> str:
        return f"{self.first:%Y-%m}"

    @property
    def closed(self) -> bool:
        return self.end + SETTLED_AFTER <= now()


_REVERSAL, _ABSORBED = kind_of_record() == "reversal", kind_of_record() == "absorbed"


def _sum(*, of: Any, where: Any = True) -> Any:
    return func.coalesce(func.sum(case((where, of), else_=0)), 0)


SUMS = (
    func.count().label("records"),
    _sum(of=CostRecord.amount_microusd).label("amount"),
    _sum(of=CostRecord.amount_microusd, where=_REVERSAL).label("reversed"),
    func.coalesce(func.sum(case((_ABSORBED, 0), else_=gpu_ms_of_record())), 0).label("gpu_ms"),
    _sum(of=gpu_ms_of_record(), where=_ABSORBED).label("absorbed_ms"),
)


async def listed(session: AsyncSession, team_id: str) -> list[StatementSummary]:
    """Every month with records, the newest first."""
    days = await session.scalars(select(CostRecord.billing_period).where(CostRecord.team_id == team_id).distinct())
    months = sorted({Month.of(day) for day in days}, reverse=True)
    return [await _summary(session, team_id, month) for month in months]


async def _summary(session: AsyncSession, team_id: str, month: Month) -> StatementSummary:
    jobs = func.count(CostRecord.job_id.distinct()).label("jobs")
    rows = await _sums(session, team_id, month, (CostRecord.cost_type,), jobs)
    return StatementSummary(
        month=month.name,
        closed=month.closed,
        total=_total(rows, "amount"),
        by_type={row.cost_type: usd(int(row.amount)) for row in rows},
        jobs=sum(row.jobs for row in rows),
        reversed=_total(rows, "reversed"),
        absorbed_ms=sum(int(row.absorbed_ms) for row in rows),
    )


async def statement(session: AsyncSession, team_id: str, month: Month) -> Statement:
    """Lines by type and job; ``opening`` is all that was ever charged before the month, ``closing`` with it."""
    rows = await _sums(session, team_id, month, (CostRecord.cost_type, CostRecord.job_id))
    ids = [row.job_id for row in rows if row.job_id]
    jobs = await session.execute(select(TrainingJob.id, TrainingJob.name).where(TrainingJob.id.in_(ids)))
    names = {job.id: job.name for job in jobs}
    before = select(_sum(of=CostRecord.amount_microusd)).where(
        CostRecord.team_id == team_id, CostRecord.billing_period < month.first
    )
    opening = int(await session.scalar(before) or 0)
    total = sum(int(row.amount) for row in rows)
    return Statement(
        month=month.name,
        closed=month.closed,
        opening=usd(opening),
        total=usd(total),
        closing=usd(opening + total),
        lines=[_line(row, names.get(row.job_id)) for row in rows],
    )


async def _sums(
    session: AsyncSession, team_id: str, month: Month, keys: tuple[Any, ...], *more: Any
) -> Sequence[Row[Any]]:
    """``SUMS`` (and ``more``) of the month's records for each combination of ``keys``."""
    query: Select[Any] = select(*keys, *more, *SUMS).where(
        CostRecord.team_id == team_id, CostRecord.billing_period >= month.first, CostRecord.billing_period < month.end
    )
    return (await session.execute(query.group_by(*keys).order_by(*keys))).all()


def _line(row: Row[Any], job_name: str | None) -> StatementLine:
    return StatementLine(
        cost_type=row.cost_type,
        job_id=row.job_id,
        job_name=job_name,
        records=row.records,
        charged=usd(int(row.amount) - int(row.reversed)),
        reversed=usd(int(row.reversed)),
        amount=usd(int(row.amount)),
        gpu_ms=int(row.gpu_ms),
        absorbed_ms=int(row.absorbed_ms),
    )


def _total(rows: Sequence[Row[Any]], name: str) -> str:
    return usd(sum(int(getattr(row, name)) for row in rows))


def as_csv(made: Statement) -> str:
    """Its lines. Without the jobs' names: what a user wrote may be a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for line in made.lines:
        figures = (line.records, line.charged, line.reversed, line.amount, line.gpu_ms, line.absorbed_ms)
        writer.writerow([made.month, line.cost_type, line.job_id or "", *figures])
    return text.getvalue()
