"""Jobs: refused with every bad field named, accepted once, held against the budget, stopped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import func, select, update

from control_plane.api import streams
from control_plane.db import Database
from control_plane.states import Stage, Status
from control_plane.tables import (
    ClusterState,
    CostRecord,
    JobLog,
    MetricsPoint,
    PriceVersion,
    TrainingJob,
    now,
)
from control_plane.tables.money import CostType, HoldState
from tests.factories import Account, data_of, error_of, job_body, make_account, ready_dataset
from tests.integration.api.conftest import Http, holds
from tests.rows import events_of, make_attempt

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def micro(amount: str) -> int:
    whole, fraction = amount.split(".")
    assert len(fraction) == 6
    return int(whole) * 1_000_000 + int(fraction)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"presetId": "reckless"}, {"presetId"}),
        ({"presetId": 5}, {"presetId"}),
        ({"gpuConfig": {"type": "cpu", "count": 3}}, {"gpuConfig.count"}),
        ({"gpuConfig": {"type": "cpu", "count": "1"}}, {"gpuConfig.count"}),
        ({"gpuConfig": {"type": "abacus", "count": 1}}, {"gpuConfig.type"}),
        ({"gpuConfig": {"type": "cpu"}}, {"gpuConfig.count"}),
        ({"gpuConfig": "cpu"}, {"gpuConfig"}),
        ({"gpuConfig": {"type": "cpu", "count": 1, "speed": 9}}, {"gpuConfig.speed"}),
        ({"baseModel": "nobody/nothing"}, {"baseModel"}),
        ({"basePreset": "aggressive"}, {"basePreset"}),
        ({"presetId": "custom", "basePreset": "reckless"}, {"basePreset"}),
        ({"priority": 1000}, {"priority"}),
        ({"priority": True}, {"priority"}),
        ({"name": ""}, {"name"}),
        ({"budget": 5}, {"budget"}),
        (
            {"hyperparameters": {"learningRate": "fast", "batchSize": 2.5, "color": "red"}},
            {"hyperparameters.learningRate", "hyperparameters.batchSize", "hyperparameters.color"},
        ),
        (
            {
                "presetId": "reckless",
                "gpuConfig": {"type": "cpu", "count": 3},
                "hyperparameters": {"learningRate": 5, "loraRank": 0, "targetModules": ["x"], "precision": "fp32"},
            },
            {
                "presetId",
                "gpuConfig.count",
                "hyperparameters.learningRate",
                "hyperparameters.loraRank",
                "hyperparameters.targetModules",
            },
        ),
        ({"hyperparameters": {"maxSeqLength": 100_000}}, {"hyperparameters.maxSeqLength"}),
        ({"hyperparameters": {"learningRate": None}}, {"hyperparameters.learningRate"}),
        ({"hyperparameters": {"quantization": "4bit"}}, {"hyperparameters.quantization"}),
        ({"hyperparameters": {"targetModules": []}}, {"hyperparameters.targetModules"}),
    ],
)
async def test_every_bad_field_is_named(somebody: Account, change: dict[str, Any], fields: set[str]) -> None:
    for path in ("/api/jobs", "/api/jobs/estimate"):
        error = error_of(await somebody.call("POST", path, job_body("any") | change), 400, "VALIDATION_ERROR")
        assert error["fields"].keys() == fields
        assert all(messages and all(messages) for messages in error["fields"].values())


async def test_missing_fields_and_bodies_that_are_no_object(ada: Account) -> None:
    error = error_of(await ada.call("POST", "/api/jobs", {}), 400, "VALIDATION_ERROR")
    assert error["fields"] == {"datasetId": ["Required"], "presetId": ["Required"], "gpuConfig": ["Required"]}
    for content in (b"", b"[]", b"null", b'"text"', b"{", b"\xff", b"[" * 100_000):
        response = await ada.http.post("/api/jobs", content=content, headers=ada.headers)
        error_of(response, 400, "VALIDATION_ERROR")
    large = b'{"name": "' + b"x" * 3_000_000 + b'"}'
    error_of(await ada.http.post("/api/jobs", content=large, headers=ada.headers), 413, "PAYLOAD_TOO_LARGE")


async def test_an_accepted_job(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    estimate = await ada.data("POST", "/api/jobs/estimate", job_body(dataset_id))
    response = await ada.call("POST", "/api/jobs", job_body(dataset_id, name="first"))
    assert response.status_code == 201
    made = data_of(response)
    assert made["queuePosition"] == 1
    assert made["estimate"] == estimate["estimate"]
    for figure in ("computeCost", "storageCost", "totalCost"):
        p10, p50, p90 = (micro(made["estimate"][figure][p]) for p in ("p10", "p50", "p90"))
        assert p10 <= p50 <= p90
    assert made["estimate"]["durationS"]["p10"] < made["estimate"]["durationS"]["p90"]

    job = (await ada.data("GET", f"/api/jobs/{made['jobId']}"))["job"]
    expected = {
        "name": "first",
        "status": "QUEUED",
        "currentStage": "QUEUED",
        "presetId": "balanced",
        "basePreset": "balanced",
        "gpuConfig": {"type": "cpu", "count": 1},
        "totalSteps": 60,
        "totalEpochs": 5,
        "currentCost": "0.000000",
        "finalCost": None,
        "priceVersion": 1,
        "pricePerHour": "0.360000",
        "metrics": [],
    }
    assert job.items() >= expected.items()
    assert job["hyperparameters"]["batchSize"] == 8
    assert job["estimatedTotalCost"] == made["estimate"]["computeCost"]["p50"]
    assert await holds(db) == [(HoldState.OPEN, micro(made["estimate"]["computeCost"]["p90"]))]
    (event,) = await events_of(db, job["id"])
    assert (event.type, event.payload["status"]) == ("stage", "QUEUED")


async def test_overrides_make_a_preset_custom(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)

    async def presets(**fields: Any) -> tuple[str, str, int]:
        made = await ada.data("POST", "/api/jobs", job_body(dataset_id, **fields))
        job = (await ada.data("GET", f"/api/jobs/{made['jobId']}"))["job"]
        return job["presetId"], job["basePreset"], job["hyperparameters"]["loraRank"]

    assert await presets(presetId="aggressive") == ("aggressive", "aggressive", 32)
    assert await presets(presetId="aggressive", hyperparameters={"loraRank": 32}) == ("aggressive", "aggressive", 32)
    assert await presets(presetId="aggressive", hyperparameters={"loraRank": 4}) == ("custom", "aggressive", 4)
    assert await presets(presetId="custom") == ("custom", "balanced", 16)
    assert await presets(presetId="custom", basePreset="conservative") == ("custom", "conservative", 8)


async def test_unusual_values_are_warned_of(ada: Account, db: Database) -> None:
    body = job_body(await ready_dataset(ada, db), hyperparameters={"learningRate": 0.009, "maxSteps": 5})
    warnings = (await ada.data("POST", "/api/jobs/estimate", body))["warnings"]
    assert {w["field"] for w in warnings} == {"hyperparameters.learningRate", "hyperparameters.maxSteps"}


async def test_an_unknown_dataset_is_not_found(ada: Account) -> None:
    error_of(await ada.call("POST", "/api/jobs", job_body("none")), 404, "NOT_FOUND")
    error_of(await ada.call("POST", "/api/jobs", job_body("none", parentModelId="none")), 404, "NOT_FOUND")


async def test_no_number_of_submissions_at_once_passes_the_budget(both: Http, database: Database) -> None:
    """Each names a dataset of its own, so that only the team's row brings them together."""
    ada = await make_account(both)
    datasets = [await ready_dataset(ada, database) for _ in range(8)]
    dataset_id = datasets[0]
    estimate = (await ada.data("POST", "/api/jobs/estimate", job_body(dataset_id)))["estimate"]
    upper = micro(estimate["computeCost"]["p90"])
    budget = upper * 5 // 2
    await ada.data("PUT", "/api/budget", {"monthlyBudget": f"{budget / 1e6:.6f}"})

    answers = await asyncio.gather(*(ada.call("POST", "/api/jobs", job_body(d)) for d in datasets))

    assert sorted(a.status_code for a in answers) == [201, 201] + [402] * 6
    assert await holds(database) == [(HoldState.OPEN, upper)] * 2
    refused = next(a for a in answers if a.status_code == 402)
    assert "PUT /api/budget" in error_of(refused, 402, "BUDGET_EXCEEDED")["message"]
    summary = await ada.data("GET", "/api/costs/summary")
    assert (micro(summary["held"]), summary["monthToDate"]) == (upper * 2, "0.000000")
    async with database.read() as session:
        assert await session.scalar(select(func.count()).select_from(TrainingJob)) == 2

    cancelled = data_of(next(a for a in answers if a.status_code == 201))["jobId"]
    await ada.data("POST", f"/api/jobs/{cancelled}/cancel", {})
    assert (await ada.call("POST", "/api/jobs", job_body(dataset_id))).status_code == 201


async def test_what_a_job_was_charged_is_not_held_twice(ada: Account, db: Database) -> None:
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    ((_, upper),) = await holds(db)
    async with db.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        for amount in (1000, 500, -200):
            session.add(cost_of(job, amount))
    summary = await ada.data("GET", "/api/costs/summary")
    assert (summary["monthToDate"], micro(summary["held"])) == ("0.001300", upper - 1300)


def cost_of(job: TrainingJob, amount: int) -> CostRecord:
    return CostRecord(
        team_id=job.team_id,
        created_by=job.created_by,
        job_id=job.id,
        cost_type=CostType.COMPUTE,
        amount_microusd=amount,
        details={"kind": "charge"},
        billing_period=now().replace(hour=0, minute=0, second=0, microsecond=0),
    )


async def test_cancel_ends_a_queued_job_at_once_and_asks_for_the_end_of_a_running_one(
    ada: Account, db: Database
) -> None:
    dataset_id = await ready_dataset(ada, db)
    queued, running = [(await ada.data("POST", "/api/jobs", job_body(dataset_id)))["jobId"] for _ in range(2)]
    async with db.write() as session:
        await session.execute(
            update(TrainingJob)
            .where(TrainingJob.id == running)
            .values(status=Status.RUNNING, current_stage=Stage.TRAINING, attempt=1)
        )

    ended = await ada.call("POST", f"/api/jobs/{queued}/cancel", {})
    assert ended.status_code == 202
    assert data_of(ended)["job"].items() >= {"status": "CANCELLED", "finalCost": "0.000000"}.items()
    assert [e.type for e in await events_of(db, queued)] == ["stage", "stage", "complete"]
    error_of(await ada.call("POST", f"/api/jobs/{queued}/cancel", {}), 409, "CONFLICT")

    asked = (await ada.data("POST", f"/api/jobs/{running}/cancel", {}))["job"]
    assert (asked["status"], asked["stopRequested"]) == ("RUNNING", "CANCEL")
    assert sorted(state for state, _ in await holds(db)) == [HoldState.CLOSED, HoldState.OPEN]


async def test_pause_and_resume_a_queued_job(ada: Account, db: Database) -> None:
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    error_of(await ada.call("POST", f"/api/jobs/{job_id}/resume", {}), 409, "CONFLICT")
    paused = (await ada.data("POST", f"/api/jobs/{job_id}/pause", {}))["job"]
    assert (paused["status"], paused["pausedBy"]) == ("PAUSED", "PAUSE")
    resumed = (await ada.data("POST", f"/api/jobs/{job_id}/resume", {}))["job"]
    assert (resumed["status"], resumed["queuePosition"]) == ("QUEUED", 1)


async def test_name_and_priority_change_and_order_the_queue(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    first, second = [(await ada.data("POST", "/api/jobs", job_body(dataset_id)))["jobId"] for _ in range(2)]
    changed = (await ada.data("PATCH", f"/api/jobs/{second}", {"priority": 5, "name": "urgent"}))["job"]
    assert (changed["name"], changed["priority"], changed["queuePosition"]) == ("urgent", 5, 1)
    listed = (await ada.data("GET", "/api/jobs?status=QUEUED&sortBy=priority"))["jobs"]
    assert [(j["id"], j["queuePosition"]) for j in listed] == [(second, 1), (first, 2)]
    await ada.data("POST", f"/api/jobs/{second}/cancel", {})
    error_of(await ada.call("PATCH", f"/api/jobs/{second}", {"priority": 9}), 409, "CONFLICT")
    assert (await ada.data("PATCH", f"/api/jobs/{second}", {"name": "late"}))["job"]["name"] == "late"


async def test_a_new_price_is_for_new_jobs(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    old = (await ada.data("POST", "/api/jobs", job_body(dataset_id)))["jobId"]
    async with db.write() as session:
        session.add(
            PriceVersion(
                number=2,
                effective_from=now(),
                gpu_microusd_per_hour={"cpu": 720_000},
                storage_microusd_per_gib_month=0,
            )
        )
    new = (await ada.data("POST", "/api/jobs", job_body(dataset_id)))["jobId"]
    seen = {j["id"]: (j["priceVersion"], j["pricePerHour"]) for j in (await ada.data("GET", "/api/jobs"))["jobs"]}
    assert seen == {old: (1, "0.360000"), new: (2, "0.720000")}
    assert [g["id"] for g in (await ada.data("GET", "/api/gpu-types"))["gpuTypes"]] == ["cpu"]
    body = job_body(dataset_id, gpuConfig={"type": "l4", "count": 1})
    assert "gpuConfig.type" in error_of(await ada.call("POST", "/api/jobs", body), 400, "VALIDATION_ERROR")["fields"]


async def test_what_a_job_tells_of_itself(ada: Account, db: Database) -> None:
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    async with db.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        job.attempt = 1
        await make_attempt(session, job)
        for step in range(1, 101):
            loss = 9.0 if step == 42 else 3 - step / 100
            session.add(
                MetricsPoint(job_id=job_id, epoch=1, step=step, training_loss=loss, learning_rate=1e-4, throughput=200)
            )
        session.add(JobLog(job_id=job_id, level="INFO", message="hello", details={"a": 1}))
        session.add(JobLog(job_id=job_id, level="ERROR", message="oh"))
    path = f"/api/jobs/{job_id}"
    assert len((await ada.data("GET", path))["job"]["metrics"]) == 100
    few = (await ada.data("GET", f"{path}/metrics?maxPoints=10"))["metrics"]
    assert len(few) <= 10
    assert {1, 42, 100} <= {p["step"] for p in few}
    assert [entry["message"] for entry in (await ada.data("GET", f"{path}/logs?level=ERROR"))["logs"]] == ["oh"]
    logs = (await ada.data("GET", f"{path}/logs?order=asc"))["logs"]
    assert [entry["metadata"] for entry in logs] == [{"a": 1}, None]
    assert [a["number"] for a in (await ada.data("GET", f"{path}/attempts"))["attempts"]] == [1]
    assert (await ada.data("GET", f"{path}/checkpoints"))["checkpoints"] == []


async def test_choices_and_their_free_capacity(ada: Account, db: Database) -> None:
    presets = await ada.data("GET", "/api/presets")
    assert {p["id"] for p in presets["presets"]} == {"conservative", "balanced", "aggressive"}
    assert presets["limits"]["loraRank"]["max"] == 512
    models = (await ada.data("GET", "/api/base-models"))["baseModels"]
    assert [(m["id"], m["isDefault"]) for m in models] == [(MODEL, True)]
    before = {g["id"]: (g["free"], g["total"]) for g in (await ada.data("GET", "/api/gpu-types"))["gpuTypes"]}
    assert before["cpu"] == (None, None)
    total = {"slot_cpu": 2.0, "GPU": 4.0, "accelerator_type:H100": 1.0}
    async with db.write() as session:
        session.add(ClusterState(reachable=True, free={**total, "slot_cpu": 1.0, "GPU": 3.0}, total=total))
    after = {g["id"]: (g["free"], g["total"]) for g in (await ada.data("GET", "/api/gpu-types"))["gpuTypes"]}
    assert (after["cpu"], after["h100"], after["l4"]) == ((1, 2), (3, 4), (0, 0))


async def test_the_dashboard_counts(ada: Account, db: Database) -> None:
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    async with db.write() as session:
        session.add(cost_of(await session.get_one(TrainingJob, job_id), 2_500_000))
    assert await ada.data("GET", "/api/dashboard/stats") == {
        "totalDatasets": 1,
        "activeJobs": 1,
        "completedModels": 0,
        "totalCost": "2.500000",
    }


async def test_a_stream_ends_when_its_reader_may_read_no_more(
    ada: Account, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "COMMENT_S", 0.05)
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    stream = asyncio.create_task(ada.call("GET", f"/api/jobs/{job_id}/stream"))
    await asyncio.sleep(0.3)
    assert not stream.done()
    await ada.data("POST", "/api/auth/signout")
    text = (await asyncio.wait_for(stream, 5)).text
    assert text.count("event: stage") == 1
    assert ": still here" in text
