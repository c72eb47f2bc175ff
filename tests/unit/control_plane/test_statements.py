"""Statements by month, on both databases: they add up to the records, and what is over stays as it was."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select

from control_plane.db import Database
from control_plane.errors import ValidationFailed
from control_plane.schemas.costs import Statement, StatementLine, StatementSummary
from control_plane.services import statements
from control_plane.states import Outcome, Status, StopReason
from control_plane.tables import CostRecord, TrainingJob, base
from control_plane.tables.money import CostType
from scheduler.verify import verify
from tests.ledgers import checkpoint, finish_job, next_attempt, report, running, settle, tear
from tests.rows import make_team

OCTOBER, NOVEMBER = datetime(2026, 10, 31, 23, 59, tzinfo=UTC), datetime(2026, 11, 30, 12, tzinfo=UTC)


class Books:
    """A job that pauses in October; in November its last checkpoint is found torn, and it is done again."""

    def __init__(self, database: Database, clock: list[datetime]) -> None:
        self.database, self.clock = database, clock

    async def october(self) -> None:
        async with self.database.write() as session:
            team = await make_team(session)
        self.team_id = team.id
        self.idle, _ = await running(self.database, team=team, name="=1+1")
        await report(self.database, (self.idle, _), {"0": {"training": 10_000}})
        self.first = await running(self.database, team=team)
        self.used = await checkpoint(self.database, self.first, 5, {"0": {"training": 10_000}})
        await checkpoint(self.database, self.first, 9, {"0": {"training": 30_000}})
        await report(self.database, self.first, {"0": {"training": 30_000}})
        await settle(self.database, self.first, Outcome.STOPPED, stop_reason=StopReason.PAUSE, held_ms=30_000)

    async def november(self) -> None:
        self.clock[0] = NOVEMBER
        async with self.database.write() as session:
            job = await session.get_one(TrainingJob, self.first[0])
            session.add(
                CostRecord(
                    team_id=job.team_id,
                    created_by=job.created_by,
                    cost_type=CostType.API_CALLS,
                    amount_microusd=7,
                    details={},
                    billing_period=NOVEMBER.replace(hour=0),
                )
            )
        second = await next_attempt(self.database, self.first)
        assert await tear(self.database, self.first[0], self.used, second[1])
        await report(self.database, second, {"0": {"training": 25_000}})
        await settle(self.database, second, Outcome.COMPLETED, held_ms=25_000)
        await finish_job(self.database, self.first[0], Status.COMPLETED)

    async def listed(self) -> list[StatementSummary]:
        async with self.database.read() as session:
            return await statements.listed(session, self.team_id)

    async def of(self, month: str) -> Statement:
        async with self.database.read() as session:
            return await statements.statement(session, self.team_id, statements.Month.named(month))


@pytest.fixture
async def books(database: Database, monkeypatch: pytest.MonkeyPatch) -> Books:
    clock = [OCTOBER]
    monkeypatch.setattr(base, "clock", lambda: clock[0])
    books = Books(database, clock)
    await books.october()
    return books


@pytest.mark.parametrize(("at", "closed"), [((11, 1, 23, 59), False), ((11, 2, 0, 0), True)])
def test_a_month_is_closed_a_day_after_its_end(
    monkeypatch: pytest.MonkeyPatch, at: tuple[int, int, int, int], closed: bool
) -> None:
    monkeypatch.setattr(base, "clock", lambda: datetime(2026, *at, tzinfo=UTC))
    assert statements.Month.named("2026-10").closed is closed


async def test_a_month_that_is_over_never_changes(books: Books) -> None:
    (before,), lines = await books.listed(), await books.of("2026-10")
    assert before == StatementSummary(
        month="2026-10",
        closed=False,
        total="0.004000",
        by_type={"COMPUTE": "0.004000"},
        jobs=2,
        reversed="0.000000",
        absorbed_ms=0,
    )
    await books.november()
    november, october = await books.listed()
    before.closed = lines.closed = True
    assert (october, await books.of("2026-10")) == (before, lines)
    assert november == StatementSummary(
        month="2026-11",
        closed=False,
        total="0.000507",
        by_type={"API_CALLS": "0.000007", "COMPUTE": "0.000500"},
        jobs=1,
        reversed="-0.002000",
        absorbed_ms=20_000,
    )
    async with books.database.read() as session:
        assert await verify(session) == []


async def test_lines_and_totals_add_up_to_the_records(books: Books) -> None:
    await books.november()
    made = await books.of("2026-11")
    assert (made.opening, made.total, made.closing) == ("0.004000", "0.000507", "0.004507")
    assert made.lines[1] == StatementLine(
        cost_type=CostType.COMPUTE,
        job_id=books.first[0],
        job_name="a job",
        records=3,
        charged="0.002500",
        reversed="-0.002000",
        amount="0.000500",
        gpu_ms=5_000,
        absorbed_ms=20_000,
    )
    async with books.database.read() as session:
        assert await session.scalar(select(func.sum(CostRecord.amount_microusd))) == 4_507
    empty = await books.of("2026-12")
    assert (empty.opening, empty.total, empty.closing, empty.lines) == ("0.004507", "0.000000", "0.004507", [])
    assert (await books.of("2026-09")).closing == "0.000000"


async def test_as_csv_without_what_a_user_wrote(books: Books) -> None:
    text = statements.as_csv(await books.of("2026-10"))
    assert "=1+1" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["jobId"]: (row["costType"], row["amount"], row["gpuMs"]) for row in rows} == {
        books.idle: ("COMPUTE", "0.001000", "10000"),
        books.first[0]: ("COMPUTE", "0.003000", "30000"),
    }


def test_months_follow_each_other_to_the_last() -> None:
    month = statements.Month.named("2027-11")
    names = [month.name]
    for _ in range(15):
        month = statements.Month.of(month.end)
        names.append(month.name)
    assert names[:3] + names[-1:] == ["2027-11", "2027-12", "2028-01", "2029-02"]


@pytest.mark.parametrize("name", ["2026-13", "2026-1", "october", "0000-01", "9999-12", "2026-10-01", " 2026-10", ""])
def test_what_is_no_month(name: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        statements.Month.named(name)
    assert (refused.value.fields or {}).keys() == {"month"}
