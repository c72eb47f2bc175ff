"""A request that is sent again."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import update

from control_plane.app import create_app
from control_plane.db import Database
from control_plane.services import jobs as job_service
from control_plane.settings import Settings
from control_plane.tables import (
    IdempotencyKey,
    now,
)
from tests.factories import Account, data_of, error_of, job_body, make_account, ready_dataset
from tests.integration.api.conftest import Http, client_of, holds


async def test_the_same_request_twice_is_one_job_and_another_body_a_conflict(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    first = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k1")
    again = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k1")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    differs = await ada.call("POST", "/api/jobs", job_body(dataset_id, name="x"), Idempotency_Key="k1")
    error_of(differs, 409, "CONFLICT")
    too_long = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k" * 256)
    error_of(too_long, 400, "VALIDATION_ERROR")
    other = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k2")
    assert data_of(other)["jobId"] != data_of(first)["jobId"]
    assert (await ada.data("GET", "/api/jobs"))["pagination"]["total"] == 2


async def test_repetitions_at_once_are_one_job(both: Http, database: Database) -> None:
    ada = await make_account(both)
    body = job_body(await ready_dataset(ada, database))
    answers = await asyncio.gather(*(ada.call("POST", "/api/jobs", body, Idempotency_Key="same") for _ in range(6)))
    assert {a.status_code for a in answers} == {201}
    assert len({data_of(a)["jobId"] for a in answers}) == 1
    assert len(await holds(database)) == 1


async def test_a_refusal_is_not_kept_and_a_kept_answer_expires(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    await ada.data("PUT", "/api/budget", {"monthlyBudget": "0.000001"})
    refused = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k")
    error_of(refused, 402, "BUDGET_EXCEEDED")
    await ada.data("PUT", "/api/budget", {"monthlyBudget": None})
    first = await ada.data("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k")
    async with db.write() as session:
        await session.execute(update(IdempotencyKey).values(created_at=now().replace(year=2020)))
    assert (await ada.data("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k"))["jobId"] != first["jobId"]


async def test_a_crash_between_the_work_and_the_answer_leaves_nothing_or_all(
    ada: Account, db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request dies after the job was inserted; the repetition, at another process, makes it once."""
    dataset_id = await ready_dataset(ada, db)

    async def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(job_service, "queue_positions", killed)
        failed = await ada.call("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k")
    error = error_of(failed, 500, "INTERNAL_ERROR")
    assert "killed" not in failed.text
    assert error["message"]
    assert await holds(db) == []
    async with client_of(create_app(settings)) as http:
        other = Account(http, ada.email, ada.user_id, "")
        other.headers = ada.headers
        made = await other.data("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k")
    repeated = await ada.data("POST", "/api/jobs", job_body(dataset_id), Idempotency_Key="k")
    assert repeated["jobId"] == made["jobId"]
    assert len(await holds(db)) == 1


async def test_datasets_and_accounts_are_made_once_too(ada: Account, http: Http) -> None:
    body = {"name": "d", "fileName": "d.jsonl", "fileSize": 3}
    first, again = [await ada.data("POST", "/api/datasets", body, Idempotency_Key="k") for _ in range(2)]
    assert first["datasetId"] == again["datasetId"]
    assert (await http.put(again["uploadUrl"], content=b"abc")).status_code == 200
    signup = {"email": "twice@example.com", "password": "long enough", "name": "Twice"}
    headers = {"Idempotency-Key": "k"}
    answers = [await http.post("/api/auth/signup", json=signup, headers=headers) for _ in range(2)]
    assert [a.status_code for a in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
