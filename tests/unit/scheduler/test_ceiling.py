"""What running jobs are granted, together, stays within their team's budget: on both databases, in every order."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services import budget, paused
from control_plane.states import Outcome, StopReason
from control_plane.tables import Attempt, BudgetHold, CostRecord, TrainingJob, base
from scheduler import ledger
from scheduler.finish import tell_cost
from tests.conftest import without_fsync
from tests.ledgers import checkpoint, finish_job, next_attempt, settle, violations
from tests.rows import make_running_job, make_team

SECOND = 100
"""Micro-dollars of a GPU-second."""
AHEAD_MS = 1_800_000
FORCED_AFTER_MS = 25_000
"""GPU time after its allowance at which a supervisor ends its child by force."""


@dataclass
class Running:
    """A job as its supervisor sees it: it uses what it is granted, and a little more until it has stopped."""

    ids: tuple[str, str]
    used_ms: int = 0
    allowance_ms: int = 0


class Team:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs: list[Running] = []

    async def begin(self, limit: int | None, holds: list[int], gpu_count: int = 1) -> None:
        """Jobs half way through, with a checkpoint after every step."""
        progress: dict[str, Any] = {"total_steps": 200, "total_epochs": 200, "current_step": 100}
        async with self.database.write() as session:
            team = await make_team(session, budget_microusd=limit)
        self.team_id = team.id
        for hold in holds:
            async with self.database.write() as session:
                job, attempt = await make_running_job(
                    session, team=team, held_microusd=hold, gpu_count=gpu_count, **progress
                )
            self.jobs.append(Running((job.id, attempt.id)))

    async def hear(self, job: Running) -> None:
        """One batch: its usage in, its allowance out."""
        async with self.database.write() as session:
            row = await session.get_one(TrainingJob, job.ids[0], with_for_update=True)
            attempt = await session.get_one(Attempt, job.ids[1])
            await ledger.record(session, attempt, {"0": {"training": job.used_ms}})
            if await ledger.post(session, row, attempt):
                await tell_cost(session, row)
            await ledger.reserve(session, row, ahead_ms=AHEAD_MS * row.gpu_count)
            job.allowance_ms = await ledger.allowance_ms(session, row, attempt, AHEAD_MS * row.gpu_count)

    def use(self, job: Running, ms: int, late_ms: int = 0) -> None:
        """Run on, with or without a scheduler, up to ``late_ms`` past the allowance; without one it does not start."""
        if job.allowance_ms:
            job.used_ms = max(job.used_ms, min(job.used_ms + ms, job.allowance_ms + late_ms))

    async def end(self, job: Running, outcome: Outcome = Outcome.STOPPED) -> None:
        """The attempt ends as it stands, and the job goes on in another."""
        await self.hear(job)
        reason = StopReason.BUDGET if outcome is Outcome.STOPPED else None
        await settle(self.database, job.ids, outcome, stop_reason=reason)
        job.ids = await next_attempt(self.database, job.ids, recovery=outcome is Outcome.FAULT)
        job.used_ms, job.allowance_ms = 0, 0

    async def posted(self) -> Counter[str]:
        """Micro-dollars by month."""
        sums: Counter[str] = Counter()
        async with self.database.read() as session:
            for period, amount in await session.execute(select(CostRecord.billing_period, CostRecord.amount_microusd)):
                sums[f"{period:%Y-%m}"] += amount
        return sums

    async def can_go_on(self, job: Running) -> bool:
        async with self.database.read() as session:
            return (await paused.means(session, await session.get_one(TrainingJob, job.ids[0]))).sufficient

    async def held(self, job: Running) -> int:
        async with self.database.read() as session:
            hold = select(BudgetHold.amount_microusd).where(BudgetHold.job_id == job.ids[0])
            return (await session.scalars(hold)).one()


@pytest.fixture
def team(database: Database) -> Team:
    return Team(database)


async def test_jobs_at_their_ceilings_do_not_share_the_same_free_budget(team: Team) -> None:
    await team.begin(100 * SECOND, [20 * SECOND] * 3)
    for job in team.jobs:
        job.used_ms = 15_000
    await asyncio.gather(*(team.hear(job) for job in team.jobs))
    assert sum(job.allowance_ms for job in team.jobs) == 100_000
    for job in team.jobs:
        team.use(job, 200_000, FORCED_AFTER_MS)
    await asyncio.gather(*(team.hear(job) for job in team.jobs))
    assert sum(job.used_ms for job in team.jobs) == 175_000
    assert (await team.posted()).total() == 175 * SECOND
    assert await violations(team.database) == []


async def test_a_submission_and_a_running_job_at_once_do_not_get_the_same_money(team: Team) -> None:
    await team.begin(100 * SECOND, [20 * SECOND])
    team.jobs[0].used_ms = 15_000

    async def submit() -> int:
        async with team.database.write() as session:
            await budget.lock_team(session, team.team_id)
            free = await budget.available(session, team.team_id)
            await asyncio.sleep(0.05)
            assert free == await budget.available(session, team.team_id)
            return free or 0

    free, _ = await asyncio.gather(submit(), team.hear(team.jobs[0]))
    assert free in (0, 80 * SECOND)
    assert team.jobs[0].allowance_ms == 100_000


async def test_within_its_estimate_a_job_takes_nothing_from_the_free_budget(team: Team) -> None:
    await team.begin(1_000 * SECOND, [200 * SECOND])
    (job,) = team.jobs
    for used_ms, hold, allowance_ms in (
        (100_000, 200, 200_000),
        (140_000, 200, 200_000),
        (140_001, 260, 260_000),
        (199_999, 260, 260_000),
        (230_000, 350, 350_000),
    ):
        job.used_ms = used_ms
        await team.hear(job)
        assert (await team.held(job) // SECOND, job.allowance_ms) == (hold, allowance_ms)


async def test_each_rank_has_time_in_reserve(team: Team) -> None:
    await team.begin(10_000 * SECOND, [10 * SECOND], gpu_count=4)
    await team.hear(team.jobs[0])
    assert team.jobs[0].allowance_ms == 2 * 4 * 60_000
    assert await team.held(team.jobs[0]) == 480 * SECOND


async def test_absorbed_time_is_not_paid_for(team: Team) -> None:
    await team.begin(100 * SECOND, [100 * SECOND])
    (job,) = team.jobs
    job.used_ms = 60_000
    await team.end(job, Outcome.FAULT)
    await team.hear(job)
    assert job.allowance_ms == 100_000
    await checkpoint(team.database, job.ids, 1, {"0": {"training": 30_000}})
    job.used_ms = 60_000
    await team.end(job, Outcome.FAULT)
    await team.hear(job)
    assert job.allowance_ms == 70_000


async def test_a_lowered_budget_stops_what_is_beyond_it(team: Team) -> None:
    await team.begin(100 * SECOND, [40 * SECOND, 40 * SECOND])
    async with team.database.write() as session:
        await budget.change(session, team.team_id, 50 * SECOND)
    for job in team.jobs:
        await team.hear(job)
        assert job.allowance_ms == 10_000
    await finish_job(team.database, team.jobs[0].ids[0])
    await team.hear(team.jobs[1])
    assert job.allowance_ms == 50_000


async def test_without_a_budget_nothing_is_reserved(team: Team) -> None:
    await team.begin(None, [10 * SECOND])
    (job,) = team.jobs
    job.used_ms = 50_000
    await team.hear(job)
    assert job.allowance_ms == 50_000 + AHEAD_MS
    assert await team.held(job) == 10 * SECOND
    async with team.database.write() as session:
        await budget.change(session, team.team_id, 80 * SECOND)
    await team.hear(job)
    assert job.allowance_ms == 80_000


async def test_a_new_month_pays_for_more(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [datetime(2026, 11, 30, 23, 59, tzinfo=UTC)]
    monkeypatch.setattr(base, "clock", lambda: clock[0])
    await team.begin(100 * SECOND, [100 * SECOND])
    (job,) = team.jobs
    december, january = datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    for used_ms, next_month in ((100_000, december), (200_000, january)):
        while job.used_ms < used_ms:
            await team.hear(job)
            team.use(job, 50_000)
        await team.hear(job)
        assert job.allowance_ms == job.used_ms == used_ms
        assert not await team.can_go_on(job)
        clock[0] = next_month
        assert await team.can_go_on(job)
    assert await team.posted() == {"2026-11": 100 * SECOND, "2026-12": 100 * SECOND}
    assert await violations(team.database) == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hear"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("use"), st.integers(0, 2), st.integers(0, 200_000)),
        st.tuples(st.just("stop"), st.integers(0, 2), st.integers(0, FORCED_AFTER_MS)),
        st.tuples(st.just("fault"), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("month"), st.just(0), st.just(0)),
        st.tuples(st.just("budget"), st.just(0), st.integers(1, 60_000)),
    ),
    max_size=25,
)


@given(limit=st.integers(1, 60_000), shares=st.lists(st.integers(0, 100), min_size=1, max_size=3), steps=STEPS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_order_of_events_passes_the_budget(
    sqlite_template: Path, tmp_path: Path, limit: int, shares: list[int], steps: list[tuple[str, int, int]]
) -> None:
    shutil.copyfile(sqlite_template, tmp_path / "test.sqlite3")
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.sqlite3")
    without_fsync(database)
    team = Team(database)
    clock = [datetime(2026, 1, 31, 23, tzinfo=UTC)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "clock", lambda: clock[0])
        await team.begin(limit, [limit * share // sum([*shares, 1]) for share in shares])
        for step in steps:
            await take(team, clock, *step)
            assert await violations(database) == []
            if "budget" not in {kind for kind, *_ in steps}:
                overruns = len(team.jobs) * FORCED_AFTER_MS * SECOND // 1000
                assert max((await team.posted()).values(), default=0) <= limit + overruns
    await database.close()


async def take(team: Team, clock: list[datetime], kind: str, pick: int, value: int) -> None:
    job = team.jobs[pick % len(team.jobs)]
    match kind:
        case "hear":
            await team.hear(job)
        case "use":
            team.use(job, value)
        case "stop":
            team.use(job, 10_000_000, value)
            await team.end(job)
        case "fault":
            if value:
                await checkpoint(team.database, job.ids, value, {"0": {"training": job.used_ms // value}})
            await team.end(job, Outcome.FAULT)
        case "month":
            clock[0] = clock[0].replace(month=min(12, clock[0].month + 1), day=1)
        case "budget":
            async with team.database.write() as session:
                await budget.change(session, team.team_id, value)
