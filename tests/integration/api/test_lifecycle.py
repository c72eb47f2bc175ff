"""Cancel, pause, resume and retry in every status, over HTTP, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select, update

from control_plane.db import Database
from control_plane.states import ACTIVE, Status, StopReason
from control_plane.tables import (
    AuditEvent,
    BudgetHold,
    Checkpoint,
    Dataset,
    JobEvent,
    JobLog,
    MetricsPoint,
    PriceVersion,
    TrainingJob,
    now,
)
from control_plane.tables.money import HoldState
from control_plane.tables.work import DatasetStatus
from tests.factories import Account, data_of, error_of, job_body, make_account, ready_dataset
from tests.integration.api.conftest import Http
from tests.rows import make_attempt

Q, N, R, P, C, F, X = Status
"""QUEUED, INITIALIZING, RUNNING, PAUSED, COMPLETED, FAILED, CANCELLED."""
ACTIONS = ("cancel", "pause", "resume", "retry")
LEADS_TO: dict[tuple[Status, str], Status] = {
    (Q, "cancel"): X,
    (Q, "pause"): P,
    (N, "cancel"): N,
    (N, "pause"): N,
    (R, "cancel"): R,
    (R, "pause"): R,
    (P, "cancel"): X,
    (P, "resume"): Q,
    (F, "retry"): F,
    (X, "retry"): X,
}
"""What is legal, and the status right after it; everything else is a conflict."""
ADVICE: dict[Status, str] = {
    Q: "starts by itself",
    N: "/pause or",
    R: "/pause or",
    P: "/resume lets it go on",
    C: "parentModelId",
    F: "/retry makes a new job",
    X: "/retry makes a new job",
}


class Jobs:
    """A team's jobs, put into any status, with a checkpoint each."""

    def __init__(self, ada: Account, db: Database, dataset_id: str) -> None:
        self.ada, self.db, self.dataset_id = ada, db, dataset_id

    async def put(self, status: Status, **fields: Any) -> str:
        made = await self.ada.data("POST", "/api/jobs", job_body(self.dataset_id))
        job_id = str(made["jobId"])
        async with self.db.write() as session:
            values: dict[str, Any] = {"status": status, "attempt": 1}
            if status is P:
                values["paused_by"] = StopReason.PAUSE
            await session.execute(update(TrainingJob).where(TrainingJob.id == job_id).values(**(values | fields)))
            job = await session.get_one(TrainingJob, job_id)
            attempt = await make_attempt(session, job)
            point = Checkpoint(job_id=job_id, attempt_id=attempt.id, step=7, epoch=0, loss=1.0, usage={})
            point.storage_key, point.file_size, point.sha256 = f"k/{job_id}", 1, "0" * 64
            session.add(point)
        return job_id

    async def call(self, job_id: str, action: str, **headers: str) -> Any:
        return await self.ada.call("POST", f"/api/jobs/{job_id}/{action}", {}, **headers)

    async def of(self, job_id: str) -> TrainingJob:
        async with self.db.read() as session:
            return await session.get_one(TrainingJob, job_id)

    async def traces(self, job_id: str) -> tuple[Any, ...]:
        """Everything that an action could leave behind."""
        job = await self.of(job_id)
        async with self.db.read() as session:
            counts = [
                await session.scalar(select(func.count()).select_from(table).where(*where))
                for table, where in (
                    (JobEvent, [JobEvent.job_id == job_id]),
                    (JobLog, [JobLog.job_id == job_id]),
                    (AuditEvent, [AuditEvent.object_id == job_id]),
                    (TrainingJob, []),
                )
            ]
            hold = await session.scalar(select(BudgetHold.state).where(BudgetHold.job_id == job_id))
        return job.status, job.stop_requested, job.paused_by, hold, *counts

    async def checkpoint_stays(self, job_id: str) -> bool:
        found = (await self.ada.data("GET", f"/api/jobs/{job_id}/checkpoints"))["checkpoints"]
        return [(checkpoint["step"], checkpoint["deletedAt"]) for checkpoint in found] == [(7, None)]


@pytest.fixture
async def jobs(both: Http, database: Database) -> Jobs:
    ada = await make_account(both)
    return Jobs(ada, database, await ready_dataset(ada, database))


@pytest.mark.parametrize("action", ACTIONS)
async def test_every_status_and_action(jobs: Jobs, action: str) -> None:
    for status in Status:
        job_id = await jobs.put(status)
        before = await jobs.traces(job_id)
        answer = await jobs.call(job_id, action)
        target = LEADS_TO.get((status, action))
        assert await jobs.checkpoint_stays(job_id)
        if target is None:
            message = error_of(answer, 409, "CONFLICT")["message"]
            assert f"Cannot {action} a job that is {status}" in message
            assert ADVICE[status] in message
            assert await jobs.traces(job_id) == before, (status, action)
            continue
        assert answer.status_code == (201 if action == "retry" else 202), (status, action, answer.text)
        assert (await jobs.of(job_id)).status is target
        seen = (await jobs.ada.data("GET", f"/api/jobs/{job_id}"))["job"]
        assert seen["stopping"] is (status in ACTIVE), (status, action)
        assert seen["stopRequested"] == (action.upper() if status in ACTIVE else None)


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
async def test_repeating_an_accepted_request_is_harmless(jobs: Jobs, action: str) -> None:
    for status in (status for status, legal in LEADS_TO if legal == action):
        job_id = await jobs.put(status)
        assert (await jobs.call(job_id, action)).status_code == 202
        once = await jobs.traces(job_id)
        again = await jobs.call(job_id, action)
        assert again.status_code == (202 if status in ACTIVE else 409)
        assert await jobs.traces(job_id) == once, (status, action)


async def test_a_stop_that_is_pending_is_told(jobs: Jobs) -> None:
    job_id = await jobs.put(R)
    asked = data_of(await jobs.call(job_id, "pause"))["job"]
    assert (asked["status"], asked["stopping"], asked["stopRequested"]) == ("RUNNING", True, "PAUSE")
    resumed = error_of(await jobs.call(job_id, "resume"), 409, "CONFLICT")
    assert "stopping already" in resumed["message"]
    asked = data_of(await jobs.call(job_id, "cancel"))["job"]
    assert asked["stopRequested"] == "CANCEL"
    asked = data_of(await jobs.call(job_id, "pause"))["job"]
    assert asked["stopRequested"] == "CANCEL"
    logs = (await jobs.ada.data("GET", f"/api/jobs/{job_id}/logs?order=asc"))["logs"]
    assert [log["message"].split(".")[0] for log in logs] == [
        "Stopping: the job is being paused, with a checkpoint from which it will go on",
        "Stopping: the job is being cancelled",
    ]


async def test_a_users_pause_outlasts_the_budgets(jobs: Jobs) -> None:
    job_id = await jobs.put(P, paused_by=StopReason.BUDGET, queue_reason="Waits for the budget")
    paused = data_of(await jobs.call(job_id, "pause"))["job"]
    assert (paused["status"], paused["pausedBy"], paused["queueReason"]) == ("PAUSED", "PAUSE", None)
    error_of(await jobs.call(job_id, "pause"), 409, "CONFLICT")


async def test_somebody_elses_job_is_not_found(jobs: Jobs, both: Http) -> None:
    job_id = await jobs.put(F)
    bob = await make_account(both)
    for action in ACTIONS:
        error_of(await bob.call("POST", f"/api/jobs/{job_id}/{action}", {}), 404, "NOT_FOUND")


async def test_a_retry_has_the_same_recipe_at_todays_price(jobs: Jobs) -> None:
    old_id = await jobs.put(F, result={"before": {"validationLoss": 3.0}, "adapter": {"files": {}}})
    async with jobs.db.write() as session:
        price = {"effective_from": now(), "gpu_microusd_per_hour": {"cpu": 720_000}}
        session.add(PriceVersion(number=2, storage_microusd_per_gib_month=0, **price))
    made = data_of(await jobs.call(old_id, "retry"))
    old = (await jobs.ada.data("GET", f"/api/jobs/{old_id}"))["job"]
    new = (await jobs.ada.data("GET", f"/api/jobs/{made['jobId']}"))["job"]
    same = ("datasetId", "baseModel", "baseModelRevision", "presetId", "basePreset", "hyperparameters", "gpuConfig")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert (new["retryOf"], new["status"], new["name"]) == (old_id, "QUEUED", old["name"])
    assert (old["priceVersion"], new["priceVersion"], new["pricePerHour"]) == (1, 2, "0.720000")
    assert (made["job"]["id"], made["queuePosition"]) == (new["id"], 1)
    assert made["estimate"] == new["estimate"]
    assert (await jobs.of(new["id"])).result == {"before": {"validationLoss": 3.0}}
    async with jobs.db.read() as session:
        hold = await session.scalar(select(BudgetHold).where(BudgetHold.job_id == new["id"]))
        audited = await session.scalars(select(AuditEvent.action).where(AuditEvent.object_id == new["id"]))
        assert hold is not None
        assert hold.state is HoldState.OPEN
        assert list(audited) == ["retry"]


async def test_a_retry_with_the_same_key_is_one_job_and_the_key_is_each_jobs_own(jobs: Jobs) -> None:
    first, second = await jobs.put(F), await jobs.put(X)
    answers = [await jobs.call(first, "retry", Idempotency_Key="k") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    other = data_of(await jobs.call(second, "retry", Idempotency_Key="k"))
    assert other["job"]["retryOf"] == second


async def test_a_retry_that_cannot_be_is_refused_with_what_to_do(jobs: Jobs) -> None:
    ada = jobs.ada
    job_id = await jobs.put(F)
    await ada.data("PUT", "/api/budget", {"monthlyBudget": "0.000001"})
    assert "PUT /api/budget" in error_of(await jobs.call(job_id, "retry"), 402, "BUDGET_EXCEEDED")["message"]
    await ada.data("PUT", "/api/budget", {"monthlyBudget": None})

    async def refused(status: int, code: str, told: str, **fields: Any) -> None:
        broken = await jobs.put(F, **fields)
        error = error_of(await jobs.call(broken, "retry"), status, code)
        assert told in f"{error['message']} {error.get('fields')}"

    await refused(400, "VALIDATION_ERROR", "gpuConfig.type", gpu_type="abacus")
    await refused(400, "VALIDATION_ERROR", "gpuConfig.count", gpu_count=64)
    await refused(400, "VALIDATION_ERROR", "baseModel", base_model="nobody/nothing")
    await refused(400, "VALIDATION_ERROR", "hyperparameters", hyperparameters={"loraRank": "many"})
    await refused(409, "CONFLICT", "revision", base_model_revision="another")
    await refused(409, "CONFLICT", "Model not found", parent_model_id="gone")

    async with jobs.db.write() as session:
        await session.execute(update(Dataset).values(status=DatasetStatus.UPLOADING))
    error_of(await jobs.call(job_id, "retry"), 409, "CONFLICT")
    async with jobs.db.write() as session:
        await session.execute(update(Dataset).values(status=DatasetStatus.READY, deleted_at=now()))
    assert "Dataset not found" in error_of(await jobs.call(job_id, "retry"), 409, "CONFLICT")["message"]


async def test_the_curve_of_a_retried_job_has_the_steps_that_it_went_on_from(jobs: Jobs) -> None:
    """first: steps 1-9, checkpoint 7; second goes on from 7 to 12, checkpoint 10; third from 10."""
    ids: list[str] = []
    for first, last in ((1, 9), (8, 12), (11, 15)):
        job_id = await jobs.put(F, retry_of=ids[-1] if ids else None)
        async with jobs.db.write() as session:
            job = await session.get_one(TrainingJob, job_id)
            if ids:
                whence = await session.scalar(select(Checkpoint).where(Checkpoint.job_id == ids[-1]))
                assert whence is not None
                job.attempt = 2
                await make_attempt(session, job, resumed_from=whence.id)
                own = await session.scalar(select(Checkpoint).where(Checkpoint.job_id == job_id))
                assert own is not None
                own.step = 10
            figures = {"epoch": 0, "training_loss": float(len(ids)), "learning_rate": 1e-4, "throughput": 1.0}
            session.add_all(MetricsPoint(job_id=job_id, step=step, **figures) for step in range(first, last + 1))
        ids.append(job_id)
    curve = (await jobs.ada.data("GET", f"/api/jobs/{ids[-1]}/metrics"))["metrics"]
    assert [point["step"] for point in curve] == list(range(1, 16))
    assert [point["trainingLoss"] for point in curve] == [0.0] * 7 + [1.0] * 3 + [2.0] * 5
    assert len((await jobs.ada.data("GET", f"/api/jobs/{ids[0]}/metrics"))["metrics"]) == 9
