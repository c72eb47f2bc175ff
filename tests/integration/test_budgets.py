"""Budgets hold whatever happens at once, and whoever is dead."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, text

from control_plane.db import Database
from control_plane.services import budget
from control_plane.services.lifecycle import log_entry
from control_plane.services.scope import get_owned
from control_plane.states import Status, WorkKind
from control_plane.tables import BudgetHold, Dataset, Team, TrainingJob, now
from control_plane.tables.money import HoldState
from scheduler.work import get_work
from tests.factories import error_of, job_body, make_account, ready_dataset
from tests.integration.api.server import Server
from tests.rows import make_job, make_verdict

SUBMISSIONS = 200
FIT = 10
PATIENCE_S = 110


@pytest.fixture
async def server(tmp_path: Path, database_url: str) -> AsyncIterator[Server]:
    server = Server(tmp_path, database_url)
    await server.ready("/health/live")
    yield server
    server.stop()
    server.log.close()


async def test_of_200_submissions_at_once_ten_fit(server: Server, database: Database) -> None:
    limits = httpx.Limits(max_connections=SUBMISSIONS)
    async with httpx.AsyncClient(base_url=server.settings.public_url, timeout=PATIENCE_S, limits=limits) as http:
        ada = await make_account(http)
        body = job_body(await ready_dataset(ada, database))
        estimate = (await ada.data("POST", "/api/jobs/estimate", body))["estimate"]
        upper = round(float(estimate["computeCost"]["p90"]) * 1_000_000)
        limit = FIT * upper + upper // 2
        await ada.data("PUT", "/api/budget", {"monthlyBudget": f"{limit / 1_000_000:.6f}"})

        answers = await asyncio.gather(*(ada.call("POST", "/api/jobs", body) for _ in range(SUBMISSIONS)))

    assert Counter(answer.status_code for answer in answers) == {201: FIT, 402: SUBMISSIONS - FIT}
    refused = [error_of(answer, 402, "BUDGET_EXCEEDED") for answer in answers if answer.status_code == 402]
    assert len({error["message"] for error in refused}) == 1
    async with database.read() as session:
        accepted = await session.scalar(select(func.count()).where(TrainingJob.status == Status.QUEUED))
        held = await session.scalar(
            select(func.sum(BudgetHold.amount_microusd)).where(BudgetHold.state == HoldState.OPEN)
        )
        assert (accepted, held) == (FIT, FIT * upper)
        assert await session.scalar(select(Team.monthly_budget_microusd)) == limit


async def test_who_changes_a_row_keeps_nobody_from_referring_to_it(postgres_database_url: str) -> None:
    """A job that is accepted holds its dataset, then its team; one that ends holds the team, and makes a model of the
    dataset: neither may wait for the other's first."""
    database = Database(postgres_database_url)
    async with database.write() as session:
        job = await make_job(session)
    async with database.write() as changing:
        dataset = await get_owned(changing, Dataset, job.team_id, job.dataset_id, lock=True)
        await get_work(changing, WorkKind.JOB, job.id, lock=True)
        await budget.lock_team(changing, job.team_id)
        async with database.write() as referring:
            await referring.execute(text("SET LOCAL lock_timeout = '2s'"))
            await make_verdict(referring, dataset)
            referring.add(log_entry(job.id, now(), "INFO", "It refers to the job.", None))
    await database.close()
