"""Work from its row to its end, and every way in which that may be disturbed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services.lifecycle import request_stop, transition
from control_plane.states import Outcome, Stage, Status, StopReason
from control_plane.tables import (
    Attempt,
    BudgetHold,
    Checkpoint,
    ClusterState,
    Dataset,
    JobLog,
    MetricsPoint,
    ModelArtifact,
    Notification,
    TrainingJob,
)
from control_plane.tables.money import HoldState
from control_plane.tables.work import DatasetStatus
from scheduler.executor import AttemptSpec, Demand, Unreachable
from scheduler.loop import ClusterLost
from scheduler.verify import verify
from tests.integration.scheduler.conftest import House
from tests.rows import events_of, make_job, make_team

PLAN = {"type": "plan", "total_steps": 20, "total_epochs": 1, "train_conversations": 80, "validation_conversations": 8}


async def rows(house: House, table: Any, *where: Any) -> list[Any]:
    async with house.database.read() as session:
        return list(await session.scalars(select(table).where(*where).order_by(table.id)))


async def in_order(house: House) -> None:
    """The ledger balances."""
    async with house.database.read() as session:
        assert await verify(session) == []


async def stop(house: House, job_id: str, reason: StopReason) -> bool:
    async with house.database.write() as session:
        return await request_stop(session, await session.get_one(TrainingJob, job_id), reason)


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


async def lose_rank(house: House, name: str) -> None:
    house.executor.end(name, Outcome.FAULT, code="RANK_DIED", message="the actor died")


async def lose_supervisor(house: House, name: str) -> None:
    house.executor.lose(name)


@pytest.mark.parametrize("lose", [lose_rank, lose_supervisor])
async def test_a_platform_fault_goes_on_from_the_last_checkpoint(house: House, lose: Any) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.emit(name, PLAN)
        house.train(name, 1, 10)
        await house.put_checkpoint(name, 10)
        house.train(name, 11, 13)
        await house.until_heard(name)
        await lose(house, name)
        second = await house.until_running(job_id, 2)
        point = house.executor.attempts[second].spec.resume_points[0]
        assert (point.step, point.key) == (
            10,
            f"{house.executor.attempts[second].spec.artifact_prefix}/checkpoints/a1-s10",
        )
        house.executor.clock.advance(2)
        house.train(second, 11, 20)
        house.complete(second)
        job = await house.until_job(job_id, "COMPLETED")
    attempts = await house.attempts(job_id)
    assert [attempt.outcome for attempt in attempts] == [Outcome.FAULT, Outcome.COMPLETED]
    assert [attempt.recovery for attempt in attempts] == [False, True]
    assert (attempts[1].resumed_from, job.retry_count) == (point.checkpoint_id, 1)
    assert [attempt.held_ms for attempt in attempts] == [13_000, 12_000]
    assert job.final_cost_microusd == 2_000
    assert [point.step for point in await rows(house, MetricsPoint)] == list(range(1, 21))
    warnings = [entry.message for entry in await rows(house, JobLog) if entry.level == "WARNING"]
    assert "goes on from step 10" in warnings[0]
    await in_order(house)


async def test_after_too_many_faults_the_job_fails(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        for number in range(1, 5):
            name = await house.until_running(job_id, number)
            house.train(name, 1, 2)
            house.executor.end(name, Outcome.FAULT, code="CHILD_KILLED", message="ended by SIGKILL", stack="stack")
        job = await house.until_job(job_id, "FAILED")
    assert (job.error_code, job.error_message, job.error_stack) == ("CHILD_KILLED", "ended by SIGKILL", "stack")
    assert (job.retry_count, job.final_cost_microusd) == (4, 0)
    (notice,) = await rows(house, Notification)
    assert (notice.type, notice.priority, notice.action_url) == ("JOB_FAILED", "HIGH", f"/training/jobs/{job_id}")
    assert (await events_of(house.database, job_id))[-1].payload == {
        "code": "CHILD_KILLED",
        "message": "ended by SIGKILL",
    }
    await in_order(house)


async def test_a_users_fault_is_not_tried_again(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 3)
        failed = {"type": "failed", "code": "NAN_LOSS", "message": "Loss is NaN.", "advice": "Lower the rate."}
        house.executor.emit(name, failed)
        house.executor.end(name, Outcome.FAILED, code="NAN_LOSS", message="Loss is NaN. Lower the rate.")
        job = await house.until_job(job_id, "FAILED")
    assert (job.error_code, job.error_message) == ("NAN_LOSS", "Loss is NaN. Lower the rate.")
    assert (job.attempt, job.final_cost_microusd) == (1, 300)
    await in_order(house)


async def test_completion_without_an_adapter_is_a_fault(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.executor.end(name, Outcome.COMPLETED)
        await house.until_running(job_id, 2)
    assert (await house.attempts(job_id))[0].exit_reason == "NO_ADAPTER"


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


async def test_a_new_cluster_means_that_the_old_attempt_is_lost(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
        await house.until_heard(name)
        house.executor.new_cluster()
        await house.until_running(job_id, 2)
        await house.until("the note", lambda: rows(house, Attempt, Attempt.cluster_id == "cluster-2"))
    first, second = await house.attempts(job_id)
    assert (first.exit_reason, first.cluster_id, second.number) == ("CLUSTER_LOST", "cluster-1", 2)


async def test_while_the_cluster_is_away_nothing_fails(house: House) -> None:
    running, waiting = await house.new_job(), await house.new_job()
    async with house.scheduling():
        name = await house.until_running(running)
        await house.until_heard(name)
        house.executor.reachable = False

        async def shown() -> bool:
            (state,) = await rows(house, ClusterState)
            told = (await house.job(waiting)).queue_reason
            return (await house.job(running)).reconnecting and not state.reachable and "reached" in (told or "")

        await house.until("reconnecting", shown)
        assert (await house.job(running)).status is Status.RUNNING
        house.executor.reachable = True

        async def back() -> bool:
            return not (await house.job(running)).reconnecting

        await house.until("connected", back)
        house.complete(name)
        await house.until_job(running, "COMPLETED")
        await house.until_running(waiting)
    assert len(await house.attempts(running)) == 1


async def test_a_driver_whose_cluster_stays_away_ends(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.loop.CLUSTER_PATIENCE_S", 0.1)
    task = asyncio.create_task(house.scheduler().run(asyncio.Event()))
    await house.until("a look", lambda: rows(house, ClusterState, ClusterState.reachable))
    house.executor.reachable = False
    with pytest.raises(ClusterLost):
        await asyncio.wait_for(task, 10)
    assert not await rows(house, ClusterState, ClusterState.reachable)
    house.executor.reachable = True
    async with house.scheduling():
        await house.until("a look", lambda: rows(house, ClusterState, ClusterState.reachable))


async def test_one_that_never_reached_a_cluster_waits_for_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.loop.CLUSTER_PATIENCE_S", 0.1)
    house.executor.reachable = False
    job_id = await house.new_job()
    async with house.scheduling():
        await asyncio.sleep(0.4)
        house.executor.reachable = True
        await house.until_running(job_id)


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


async def test_a_scheduler_killed_between_commit_and_start_is_taken_over(house: House) -> None:
    job_id = await house.new_job()
    asked = asyncio.Event()

    async def never(spec: AttemptSpec) -> None:
        asked.set()
        await asyncio.Event().wait()

    start, house.executor.start = house.executor.start, never  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(asked.wait(), 10)
    await house.kill(task, first)
    assert (await house.job(job_id)).status is Status.INITIALIZING
    assert house.executor.attempts == {}

    house.executor.start = start  # type: ignore[method-assign]
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    assert list(house.executor.attempts) == [f"{job_id}/1"]
    assert len(house.tracking.runs) == 1


async def test_a_scheduler_killed_between_start_and_its_note_adopts(house: House) -> None:
    job_id = await house.new_job()
    started = asyncio.Event()
    start = house.executor.start

    async def die_after(spec: AttemptSpec) -> None:
        await start(spec)
        started.set()
        await asyncio.Event().wait()

    house.executor.start = die_after  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(started.wait(), 10)
    await house.kill(task, first)
    assert (await house.attempts(job_id))[0].cluster_id is None
    async with house.scheduling():
        house.complete(f"{job_id}/1")
        await house.until_job(job_id, "COMPLETED")
        await house.until("the note", lambda: rows(house, Attempt, Attempt.cluster_id == "cluster-1"))
    assert len(await house.attempts(job_id)) == 1


async def test_a_killed_scheduler_in_mid_job_is_replaced_and_nothing_is_told_twice(house: House) -> None:
    job_id = await house.new_job()
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    name = await house.until_running(job_id)
    house.train(name, 1, 7)
    await house.until_heard(name)
    await house.kill(task, first)
    house.train(name, 8, 20)
    async with house.scheduling():
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    events = await events_of(house.database, job_id)
    assert [e.payload["step"] for e in events if e.type == "metrics"] == list(range(1, 21))
    assert (await house.job(job_id)).final_cost_microusd == 2_000
    await in_order(house)


async def test_of_two_schedulers_one_acts(house: House) -> None:
    job_id = await house.new_job()
    first, second = house.scheduler("one:x/1/1.0"), house.scheduler("two:x/1/1.0")
    task = asyncio.create_task(first.run(asyncio.Event()))
    name = await house.until_running(job_id)
    async with house.scheduling(second):
        house.train(name, 1, 5)
        await house.until_heard(name)
        assert second.lease.epoch == 0
        await house.kill(task, first)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        assert second.lease.epoch == 2
    await in_order(house)


async def test_an_answer_that_gets_lost_starts_nothing_twice(house: House) -> None:
    job_id = await house.new_job()
    house.executor.lost_answers = ["start", "poll", "poll", "times", "release"]
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 20)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        await house.until("release", lambda: rows(house, Attempt, Attempt.released))
    assert len(await house.attempts(job_id)) == 1
    await in_order(house)


class Unlucky(Database):
    """Commits whose callers see an error: every third."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.writes = 0

    def write(self) -> Any:
        self.writes += 1
        return self._lost(super().write()) if self.writes > 3 and self.writes % 3 == 0 else super().write()

    def _lost(self, inner: Any) -> Any:
        class Lost:
            async def __aenter__(self) -> Any:
                return await inner.__aenter__()

            async def __aexit__(self, *error: Any) -> None:
                await inner.__aexit__(*error)
                raise ConnectionError("the commit's answer was lost")

        return Lost()


async def test_commits_whose_success_nobody_sees_change_nothing(
    house: House, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.collect.LONGEST_PAUSE_S", 0.05)
    unlucky = Unlucky(database_url)
    job_id = await house.new_job()
    async with house.scheduling(house.scheduler(database=unlucky)):
        name = await house.until_running(job_id)
        for step in range(1, 21):
            house.train(name, step, step)
            await house.until_heard(name)
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
    assert unlucky.writes > 20
    await unlucky.close()
    events = await events_of(house.database, job_id)
    assert [e.payload["step"] for e in events if e.type == "metrics"] == list(range(1, 21))
    assert len(await rows(house, Notification)) == len(await rows(house, ModelArtifact)) == 1
    assert (await house.job(job_id)).final_cost_microusd == 2_000
    await in_order(house)


async def test_a_stuck_supervisor_delays_no_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.executor.total["slot_cpu"] = 2.0
    stuck, other = await house.new_job(), await house.new_job()
    poll = house.executor.poll

    async def hang(name: str, cursor: int, **rest: Any) -> Any:
        if name.startswith(stuck):
            await asyncio.Event().wait()
        return await poll(name, cursor, **rest)

    monkeypatch.setattr(house.executor, "poll", hang)
    async with house.scheduling():
        await house.until_running(stuck)
        name = await house.until_running(other)
        house.complete(name)
        await house.until_job(other, "COMPLETED")


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


async def test_an_attempt_whose_events_cannot_be_stored_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.collect.LONGEST_PAUSE_S", 0.05)
    verdict_id = await house.new_verdict()
    async with house.scheduling():
        name = await house.until_running(verdict_id)
        house.executor.emit(name, {"type": "verdict", "report": {"nonsense": True}})
        house.executor.end(name, Outcome.COMPLETED)
        await house.until_running(verdict_id, 2)
    assert (await house.attempts(verdict_id))[0].exit_reason == "EVENTS_REFUSED"


async def test_supervisors_that_nobody_knows_are_ended(house: House) -> None:
    stray = AttemptSpec("stray/1", "stray", 1, {}, Demand(resources={"slot_cpu": 1}), ())
    await house.executor.start(stray)
    async with house.scheduling():

        async def gone() -> bool:
            return not house.executor.attempts["stray/1"].alive

        await house.until("the stray's end", gone)


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


async def test_an_orderly_end_leaves_running_work_alone(house: House) -> None:
    job_id = await house.new_job()
    async with house.scheduling():
        name = await house.until_running(job_id)
    assert house.executor.attempts[name].alive
    async with house.scheduling() as again:
        house.complete(name)
        await house.until_job(job_id, "COMPLETED")
        assert again.lease.epoch == 2


async def test_a_cluster_that_fails_in_a_call_is_asked_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    look, calls = house.executor.look, 0

    async def flaky() -> Any:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise (Unreachable("no"), RuntimeError("a bug"), TimeoutError())[calls - 1]
        return await look()

    monkeypatch.setattr(house.executor, "look", flaky)
    job_id = await house.new_job()
    async with house.scheduling():
        await house.until_running(job_id)


async def test_a_new_cluster_is_no_proof_while_old_nodes_may_live(house: House) -> None:
    house.settings = replace(house.settings, node_timeout_s=1.0)
    job_id = await house.new_job()
    async with house.scheduling():
        await asyncio.sleep(1.1)
        name = await house.until_running(job_id)
        await house.until_heard(name)
        house.executor.new_cluster()

        async def reconnecting() -> bool:
            return (await house.job(job_id)).reconnecting

        await house.until("reconnecting", reconnecting)
        assert (await house.attempts(job_id))[0].outcome is None
        await house.until_running(job_id, 2)
    assert (await house.attempts(job_id))[0].exit_reason == "CLUSTER_LOST"


async def test_a_supervisor_that_answers_nothing_is_ended(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.policy.SILENCE_S", 0.3)
    monkeypatch.setattr("scheduler.policy.RECONNECTING_S", 0.1)
    job_id = await house.new_job()
    poll, deaf = house.executor.poll, False

    async def silence(name: str, cursor: int, **rest: Any) -> Any:
        if deaf and name.endswith("/1"):
            raise Unreachable("no answer")
        return await poll(name, cursor, **rest)

    monkeypatch.setattr(house.executor, "poll", silence)
    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 5)
        await house.put_checkpoint(name, 5)
        await house.until_heard(name)
        deaf = True
        second = await house.until_running(job_id, 2)
        assert not house.executor.attempts[name].alive
        house.complete(second)
        await house.until_job(job_id, "COMPLETED")
    assert (await house.attempts(job_id))[0].exit_reason == "SUPERVISOR_DIED"
    await in_order(house)


async def test_a_cancelled_job_is_ended_though_its_supervisor_is_deaf(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.policy.SILENCE_STOPPING_S", 0.3)
    job_id = await house.new_job()

    async def silence(*_: Any, **__: Any) -> Any:
        raise Unreachable("no answer")

    async with house.scheduling():
        name = await house.until_running(job_id)
        house.train(name, 1, 5)
        await house.until_heard(name)
        monkeypatch.setattr(house.executor, "poll", silence)
        monkeypatch.setattr(house.executor, "stop", silence)
        assert not await stop(house, job_id, StopReason.CANCEL)
        job = await house.until_job(job_id, "CANCELLED")
    assert not house.executor.attempts[name].alive
    assert (job.attempt, job.final_cost_microusd) == (1, 0)
    await in_order(house)


async def test_a_scheduler_superseded_while_it_makes_a_run_leaves_no_other(house: House) -> None:
    job_id = await house.new_job()
    made = asyncio.Event()
    ensure = house.tracking.ensure_run

    async def hang(**asked: Any) -> Any:
        await ensure(**asked)
        made.set()
        await asyncio.Event().wait()

    house.tracking.ensure_run = hang  # type: ignore[method-assign]
    first = house.scheduler()
    task = asyncio.create_task(first.run(asyncio.Event()))
    await asyncio.wait_for(made.wait(), 10)
    await house.kill(task, first)
    assert (await house.job(job_id)).mlflow_run_id is None

    house.tracking.ensure_run = ensure  # type: ignore[method-assign]
    async with house.scheduling():
        name = await house.until_running(job_id)
        job = await house.job(job_id)
        house.tracking.stray(team_id=job.team_id, job_id=job_id, name="of a request that came late")
        house.complete(name)

        async def alone() -> bool:
            return [(key, run.status) for key, run in house.tracking.runs.items()] == [(job.mlflow_run_id, "FINISHED")]

        await house.until("the stray to go", alone)
