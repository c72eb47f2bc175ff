"""What happens is enqueued once for each receiver, in the transaction in which it happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select, text

from control_plane.db import Database
from control_plane.services.alerts import cost_alerts
from control_plane.services.datasets import apply_verdict
from control_plane.services.lifecycle import request_stop, transition
from control_plane.services.notifications import notify, notify_owners
from control_plane.states import Status, StopReason
from control_plane.tables import (
    CostRecord,
    Membership,
    Notification,
    Outbox,
    Team,
    TrainingJob,
    User,
    Webhook,
    now,
    uuid7,
)
from control_plane.tables.accounts import TeamRole
from control_plane.tables.money import CostType
from control_plane.tables.notices import Channel, NotificationType
from tests.conftest import without_fsync
from tests.factories import BROKEN, SOUND
from tests.rows import make_dataset, make_job, make_team, make_verdict


@pytest.fixture
async def mailing(database_url: str) -> AsyncIterator[Database]:
    """The database of an installation with mail."""
    database = Database(database_url, mail=True)
    without_fsync(database)
    yield database
    await database.close()


async def make_webhook(database: Database, team: Team, **fields: Any) -> str:
    values = {"id": uuid7(), "url": "https://receiver.example/", "secret": "whsec_AA==", **fields}
    async with database.write() as session:
        session.add(Webhook(team_id=team.id, created_by=team.personal_of, **values))
    return str(values["id"])


async def enqueued(database: Database, channel: Channel = Channel.WEBHOOK) -> list[tuple[str, dict[str, Any]]]:
    """(type, data) in order."""
    async with database.read() as session:
        rows = await session.scalars(select(Outbox).where(Outbox.channel == channel).order_by(Outbox.id))
        return [(row.payload["type"], row.payload["data"]) for row in rows]


async def move(database: Database, job_id: str, target: Status, **fields: Any) -> bool:
    async with database.write() as session:
        return await transition(session, await session.get_one(TrainingJob, job_id), target, **fields)


async def test_a_job_tells_of_each_of_its_stations_once(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session)
        job_id = (await make_job(session, team)).id
    await make_webhook(database, team)
    stations = [
        *(
            (Status.INITIALIZING, {"attempt": 1}),
            (Status.RUNNING, {}),
            (Status.PAUSED, {"paused_by": StopReason.BUDGET}),
        ),
        *((Status.QUEUED, {}), (Status.PAUSED, {"paused_by": StopReason.PAUSE}), (Status.QUEUED, {})),
        *(
            (Status.INITIALIZING, {}),
            (Status.RUNNING, {}),
            (Status.FAILED, {"error_code": "OOM", "error_message": "no"}),
        ),
    ]
    for target, fields in stations:
        if target is Status.INITIALIZING:
            async with database.write() as session:
                (await session.get_one(TrainingJob, job_id)).attempt += 1
            fields = {}
        assert await move(database, job_id, target, **fields)
        await asyncio.gather(*(move(database, job_id, target, **fields) for _ in range(2)))

    told = await enqueued(database)
    assert [event for event, _ in told] == ["job.started", "job.paused", "job.paused", "job.started", "job.failed"]
    assert [data["attempt"] for event, data in told if event == "job.started"] == [1, 2]
    assert [data["pausedBy"] for event, data in told if event == "job.paused"] == ["BUDGET", "PAUSE"]
    assert told[-1][1] == {
        **{"teamId": team.id, "jobId": job_id, "name": "a job", "status": "FAILED", "attempt": 2, "pausedBy": None},
        **{"errorCode": "OOM", "errorMessage": "no", "finalCost": "0.000000", "artifactId": None},
        **{"baseModel": told[-1][1]["baseModel"], "datasetId": told[-1][1]["datasetId"]},
    }


async def test_nothing_is_told_of_what_was_rolled_back(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session)
        job_id = (await make_job(session, team)).id
    await make_webhook(database, team)
    with suppress(RuntimeError):
        async with database.write() as session:
            await request_stop(session, await session.get_one(TrainingJob, job_id), StopReason.CANCEL)
            raise RuntimeError
    assert await enqueued(database) == []
    async with database.write() as session:
        await request_stop(session, await session.get_one(TrainingJob, job_id), StopReason.CANCEL)
    assert [event for event, _ in await enqueued(database)] == ["job.cancelled"]


async def test_another_teams_webhooks_hear_nothing(database: Database) -> None:
    async with database.write() as session:
        team, other = await make_team(session), await make_team(session)
        job_id = (await make_job(session, team)).id
    await make_webhook(database, other)
    assert await move(database, job_id, Status.CANCELLED)
    assert await enqueued(database) == []


@pytest.mark.parametrize(
    ("report", "event"), [(SOUND, "dataset.ready"), (BROKEN, "dataset.failed"), (None, "dataset.failed")]
)
async def test_a_dataset_tells_of_its_verdict(database: Database, report: dict[str, Any] | None, event: str) -> None:
    async with database.write() as session:
        team = await make_team(session)
        dataset = await make_dataset(session, team, status="VALIDATING")
        verdict = await make_verdict(session, dataset)
    await make_webhook(database, team)
    for _ in range(2):
        async with database.write() as session:
            await apply_verdict(session, await session.merge(verdict), report)
    ((told, data),) = await enqueued(database)
    assert told == event
    assert data["datasetId"] == dataset.id
    assert data["status"] == ("READY" if event == "dataset.ready" else "ERROR")
    assert data["actionUrl"] == f"/datasets/{dataset.id}"


async def add_owner(database: Database, team: Team, **fields: Any) -> str:
    async with database.write() as session:
        user = User(id=uuid7(), email=f"{uuid7()}@example.com", password_hash="x", name="B", **fields)
        session.add(user)
        await session.flush()
        session.add(Membership(team_id=team.id, user_id=user.id, role=TeamRole.OWNER))
    return str(user.id)


async def spend(
    database: Database, team: Team, amount_microusd: int, before_the_commit: Callable[[], Awaitable[None]] | None = None
) -> None:
    async with database.write() as session:
        record = CostRecord(
            team_id=team.id,
            created_by=team.personal_of,
            cost_type=CostType.STORAGE,
            amount_microusd=amount_microusd,
            details={},
            billing_period=now().replace(hour=0, minute=0, second=0, microsecond=0),
        )
        session.add(record)
        await session.flush()
        await cost_alerts(session, team.id)
        if before_the_commit is not None:
            await before_the_commit()


async def test_a_budgets_alert_reaches_each_owner_and_each_webhook_once(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session, budget_microusd=1_000_000)
    webhooks = [await make_webhook(database, team, events=events) for events in ([], ["cost.alert"])]
    await make_webhook(database, team, events=["job.failed"])
    await add_owner(database, team)
    await spend(database, team, 790_000)
    assert await enqueued(database) == []
    await asyncio.gather(*(spend(database, team, 10_000) for _ in range(4)))
    assert [data["threshold"] for _, data in await enqueued(database)] == [80, 80]
    await asyncio.gather(*(spend(database, team, 100_000) for _ in range(4)))
    await add_owner(database, team)
    await spend(database, team, 1)

    told = await enqueued(database)
    assert Counter((event, data["threshold"]) for event, data in told) == {
        ("cost.alert", 80): 2,
        ("cost.alert", 100): 2,
    }
    async with database.read() as session:
        assert set(await session.scalars(select(Outbox.target))) == set(webhooks)
        notices = list(await session.scalars(select(Notification.details)))
    assert Counter(details["threshold"] for details in notices if details) == {80: 3, 100: 3}


async def test_what_is_posted_at_the_same_time_reaches_a_threshold_together(postgres_database_url: str) -> None:
    """The second posts while the first has not committed (SQLite's writers queue)."""
    database = Database(postgres_database_url)
    async with database.write() as session:
        team = await make_team(session, budget_microusd=100_000)

    async def post_the_other_half() -> None:
        second = asyncio.create_task(spend(database, team, 50_000))
        tasks.append(second)
        waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        async with database.read() as session:
            while not second.done() and not await session.scalar(waits):
                await asyncio.sleep(0.01)

    tasks: list[asyncio.Task[None]] = []
    await spend(database, team, 50_000, before_the_commit=post_the_other_half)
    await asyncio.gather(*tasks)
    async with database.read() as session:
        notices = list(await session.scalars(select(Notification.details)))
    await database.close()
    assert sorted(details["threshold"] for details in notices if details) == [80, 100]


async def test_mail_goes_to_each_recipient_once_and_to_nobody_who_left(mailing: Database) -> None:
    async with mailing.write() as session:
        team = await make_team(session)
    second = await add_owner(mailing, team)
    await add_owner(mailing, team, deactivated_at=now())
    for _ in range(2):
        async with mailing.write() as session:
            await notify_owners(
                session, team.id, event_key="SYSTEM:x", type=NotificationType.SYSTEM, title="Title", message="Text",
                action_url="/settings",
            )  # fmt: skip
    async with mailing.read() as session:
        rows = list(await session.scalars(select(Outbox)))
    assert {row.target for row in rows} == {team.personal_of, second}
    assert len(rows) == 2
    assert rows[0].payload == {"subject": "Title", "text": "Text", "actionUrl": "/settings"}
    assert {row.channel for row in rows} == {Channel.MAIL}


async def test_without_mail_there_is_none(database: Database) -> None:
    async with database.write() as session:
        team = await make_team(session)
        assert await notify(
            session,
            user_id=str(team.personal_of),
            team_id=None,
            type=NotificationType.SYSTEM,
            title="Title",
            message="Text",
            dedupe_key=f"SYSTEM:x:{team.personal_of}",
        )
        assert list(await session.scalars(select(Outbox))) == []
