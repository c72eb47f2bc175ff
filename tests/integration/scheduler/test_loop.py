"""Work from its row to its end."""

from __future__ import annotations

import pytest

from control_plane.services.datasets import validate
from control_plane.services.lifecycle import transition
from control_plane.states import Outcome, Stage, Status, StopReason
from control_plane.tables import (
    Attempt,
    BudgetHold,
    Checkpoint,
    Dataset,
    JobLog,
    MetricsPoint,
    ModelArtifact,
    Notification,
    TrainingJob,
)
from control_plane.tables.money import HoldState
from control_plane.tables.work import DatasetStatus
from scheduler.executor import Unreachable
from tests.integration.scheduler.conftest import House
from tests.integration.scheduler.looking import PLAN, in_order, rows, stop
from tests.rows import events_of, make_job, make_team


async def test_a_job_from_its_row_to_its_model(house: House) -> None:
    job_id = await house.new_job(total_steps=20)
    async with house.scheduling():
        name = await house.until_running(job_id)
        fake = house.executor
        fake.clock.advance(3)
        fake.emit(name, PLAN, {"type": "evaluation", "step": 0, "epoch": 0, "validation_loss": 3.0, "perplexity": 20.0})
        fake.emit(
            name, {"type": "sample", "when": "before", "prompt": [{"role": "user", "content": "hi"}], "answer": "?"}
        )
        house.train(name, 1, 10)
        await house.put_checkpoint(name, 10, best=True)
        house.train(name, 11, 20)
        fake.emit(name, {"type": "evaluation", "step": 20, "epoch": 0, "validation_loss": 2.0, "perplexity": 7.4})
        fake.emit(name, {"type": "log", "level": "WARNING", "message": "hm\0", "metadata": {"loss": float("nan")}})
        await house.until_heard(name)
        running = await house.job(job_id)
        assert (running.status, running.current_stage, running.progress) == (Status.RUNNING, Stage.TRAINING, 100.0)
        assert running.estimated_completion_at is not None
        house.complete(name)
        job = await house.until_job(job_id, "COMPLETED")
        await house.until("release", lambda: rows(house, Attempt, Attempt.released))

        async def mirrored() -> bool:
            return house.tracking.of_job(job_id).status == "FINISHED"

        await house.until("the mirror", mirrored)
    assert (job.current_step, job.progress, job.current_stage) == (20, 100.0, Stage.COMPLETED)
    assert job.final_cost_microusd == 2_300
    assert job.current_metrics is not None
    assert job.current_metrics["validationLoss"] == 2.0
    await in_order(house)

    (model,) = await rows(house, ModelArtifact)
    assert job.artifact_id == model.id
    assert model.artifacts["adapter_model.safetensors"]["size"] == 10
    assert model.quality_metrics["stars"] == 4
    assert model.quality_metrics["before"]["samples"][0]["answer"] == "?"
    assert model.training_summary["totalCost"] == "0.002300"
    (notice,) = await rows(house, Notification)
    assert (notice.type, notice.priority, notice.action_url) == ("JOB_COMPLETE", "HIGH", f"/models/{model.id}")
    assert [hold.state for hold in await rows(house, BudgetHold)] == [HoldState.CLOSED]
    assert [point.step for point in await rows(house, MetricsPoint)] == list(range(1, 21))

    events = await events_of(house.database, job_id)
    kinds = [event.type for event in events]
    assert (kinds.count("metrics"), kinds[-1]) == (21, "complete")
    assert events[-1].payload == {"status": "COMPLETED", "artifactId": model.id}
    progress = next(event.payload for event in reversed(events) if event.type == "progress")
    assert progress == {"progress": 100.0, "step": 20, "totalSteps": 20, "epoch": 0}
    cost = [event.payload for event in events if event.type == "cost"][-1]
    assert cost == {"currentCost": "0.002300", "estimatedTotalCost": "1.000000"}
    stages = [event.payload["stage"] for event in events if event.type == "stage"]
    assert stages == ["INITIALIZING", "INITIALIZING", "TRAINING", "COMPLETED"]
    assert "hm" in [entry.message for entry in await rows(house, JobLog)]

    run = house.tracking.of_job(job_id)
    assert run.history("training_loss") == [(step, 4.0 / step) for step in range(1, 21)]
    assert run.history("validation_loss") == [(0, 3.0), (20, 2.0)]
    assert run.params["loraRank"] == "8"
    assert run.tags["brightrun.final_cost_usd"] == "0.002300"
    assert run.ended == job.completed_at


async def test_a_verdict_makes_its_dataset_ready_in_one_step(house: House) -> None:
    verdict_id = await house.new_verdict()
    report = {
        "format": "SHAREGPT", "passed": True, "counts": {}, "findings": [], "sample": [],
        "statistics": {
            "trainingConversations": 3, "validationConversations": 1, "tokens": 80,
            "avgTurnsPerConversation": 2.0, "avgTokensPerTurn": 10.0,
        },
    }  # fmt: skip
    async with house.scheduling():
        name = await house.until_running(verdict_id)
        spec = house.executor.attempts[name].spec
        assert (spec.config["kind"], spec.demand.resources, spec.stage_in[0].path) == (
            "verdict",
            {"slot_io": 1},
            "dataset",
        )
        house.executor.emit(name, {"type": "progress", "percent": 40.0}, {"type": "verdict", "report": report})

        async def begun() -> bool:
            return (await house.verdict(verdict_id)).progress == 40.0

        await house.until("progress", begun)
        (dataset,) = await rows(house, Dataset)
        assert dataset.status is DatasetStatus.VALIDATING
        house.executor.emit(name, {"type": "finished", "outcome": "completed"})
        house.executor.end(name, Outcome.COMPLETED)

        async def ready() -> bool:
            return (await rows(house, Dataset))[0].status is DatasetStatus.READY

        await house.until("the dataset", ready)
        assert (await house.verdict(verdict_id)).status is Status.COMPLETED


async def test_a_failed_verdict_says_so_at_the_dataset(house: House) -> None:
    verdict_id = await house.new_verdict()
    async with house.scheduling():
        name = await house.until_running(verdict_id)
        failed = {"type": "failed", "code": "MODEL_UNAVAILABLE", "message": "No tokenizer.", "advice": "Fetch it."}
        house.executor.emit(name, failed)
        house.executor.end(name, Outcome.FAILED, code="MODEL_UNAVAILABLE", message="No tokenizer. Fetch it.")

        async def refused() -> bool:
            return (await rows(house, Dataset))[0].status is DatasetStatus.ERROR

        await house.until("the dataset", refused)
    verdict = await house.verdict(verdict_id)
    assert (verdict.status, verdict.error_message) == (Status.FAILED, "No tokenizer. Fetch it.")


async def test_a_failed_verdict_that_is_asked_for_anew_before_its_actors_are_gone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, reachable = house.executor.release, False

    async def refuse(name: str, *, epoch: int) -> None:
        if not reachable:
            raise Unreachable("no answer")
        await release(name, epoch=epoch)

    monkeypatch.setattr(house.executor, "release", refuse)
    verdict_id = await house.new_verdict()
    async with house.scheduling():
        name = await house.until_running(verdict_id)
        house.executor.end(name, Outcome.FAILED, code="MODEL_UNAVAILABLE", message="No tokenizer.")

        async def failed() -> bool:
            return (await house.verdict(verdict_id)).status is Status.FAILED

        await house.until("the verdict's end", failed)
        verdict = await house.verdict(verdict_id)
        async with house.database.write() as session:
            _, again = await validate(session, verdict.team_id, verdict.dataset_id, verdict.base_model, house.catalog)
        reachable = True
        assert again.id != verdict_id
        await house.until_running(again.id)

        async def gone() -> bool:
            return (await house.attempts(verdict_id))[0].released

        await house.until("its release", gone)


@pytest.mark.parametrize(
    ("reason", "status"), [(StopReason.CANCEL, Status.CANCELLED), (StopReason.PAUSE, Status.PAUSED)]
)
async def test_a_users_stop_keeps_what_was_done(house: House, reason: StopReason, status: Status) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        attempt = house.executor.attempts[name]

        def save(asked: StopReason) -> None:
            house.executor.emit(name, {"type": "phase", "name": "saving"})
            house.executor.store(name, 7)
            house.executor.end(name, Outcome.STOPPED)

        attempt.on_stop = save
        house.train(name, 1, 7)
        await house.until_heard(name)
        assert not await stop(house, job_id, reason)
        job = await house.until_job(job_id, status)
        assert (job.stop_requested, job.final_cost_microusd) == (None, 700 if status is Status.CANCELLED else None)
        if status is Status.PAUSED:
            assert job.paused_by is StopReason.PAUSE
            async with house.database.write() as session:
                await transition(session, await session.get_one(TrainingJob, job_id), Status.QUEUED)
            second = await house.until_running(job_id, 2)
            assert house.executor.attempts[second].spec.resume_points[0].step == 7
            assert not (await house.attempts(job_id))[1].recovery
    await in_order(house)


async def test_without_mlflow_new_jobs_wait_and_running_ones_go_on(house: House) -> None:
    running = await house.new_job()
    house.executor.total["slot_cpu"] = 2.0
    async with house.scheduling():
        name = await house.until_running(running)
        house.tracking.down = True
        waiting = await house.new_job()

        async def told() -> bool:
            return "MLflow" in ((await house.job(waiting)).queue_reason or "")

        await house.until("a reason", told)
        house.train(name, 1, 20)
        house.complete(name)
        await house.until_job(running, "COMPLETED")
        assert (await house.job(waiting)).attempt == 0
        house.tracking.down = False
        await house.until_running(waiting)

        async def mirrored() -> bool:
            run = house.tracking.of_job(running)
            return run.status == "FINISHED" and len(run.history("training_loss")) == 20

        await house.until("the mirror", mirrored)


async def test_an_event_that_cannot_be_understood_holds_up_nothing(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        fake = house.executor
        fake.emit(name, {"type": "unheard-of"}, {"type": "metrics", "step": "x"}, {"type": "phase", "name": "dancing"})
        fake.emit(name, {"type": "metrics", "step": 1, "epoch": 0, "training_loss": float("nan"), "learning_rate": 1.0})
        house.train(name, 2, 3)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    assert [point.step for point in await rows(house, MetricsPoint)] == [2, 3]


async def test_the_last_two_checkpoints_and_the_best_stay(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        keys = {}
        for step in (5, 10, 15, 20):
            keys[step] = await house.put_checkpoint(name, step, best=step == 10)
        await house.until_heard(name)
        await house.put_checkpoint(name, 25)

        async def kept() -> bool:
            left = [step for step, key in keys.items() if await house.storage.list(key)]
            return left == [10, 20]

        await house.until("the files to go", kept)
    left = await rows(house, Checkpoint, Checkpoint.deleted_at.is_(None))
    assert [checkpoint.step for checkpoint in left] == [10, 20, 25]


async def test_a_scheduler_sweeps_up_what_another_left_behind(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        keys = [await house.put_checkpoint(name, step) for step in (5, 10, 15)]
        await house.until_heard(name)
    await house.storage.put(f"{keys[0]}/left-over", b"x")
    async with house.scheduling():

        async def gone() -> bool:
            return not await house.storage.list(keys[0])

        await house.until("the sweep", gone)
    assert await house.storage.list(keys[1])


async def test_the_allowance_follows_the_use_and_the_budget(house: House) -> None:
    async with house.database.write() as session:
        team = await make_team(session, budget_microusd=1_000)
        job_id = (await make_job(session, team, held_microusd=1_000)).id
    async with house.scheduling():
        name = await house.until_running(job_id)
        attempt = house.executor.attempts[name]
        assert attempt.allowance_ms == attempt.spec.allowance_ms == 10_000
        house.train(name, 1, 11)
        job = await house.until_job(job_id, "PAUSED")
    assert job.paused_by is StopReason.BUDGET
    assert job.current_cost_microusd == 1_100
    alerts = await rows(house, Notification, Notification.type == "COST_ALERT")
    assert sorted((alert.details or {})["threshold"] for alert in alerts) == [80, 100]
    await in_order(house)
