"""A batch of events is stored once, whoever stores it how often, on both databases."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select

from control_plane.db import Database
from control_plane.states import Outcome, Status, StopReason
from control_plane.storage import Storage
from control_plane.tables import (
    Attempt,
    AttemptUsage,
    Checkpoint,
    CostRecord,
    JobEvent,
    JobLog,
    MetricsPoint,
    Notification,
    TrainingJob,
)
from scheduler.collect import ANSWER_S, Collector, Place
from scheduler.executor import Batch, Ending, RankTimes, UpEvent
from scheduler.lease import Lease, LeaseLost
from tests.fakes import FakeExecutor
from tests.rows import events_of, make_attempt, make_running_job

START = Place(0, None, {})
TABLES = (JobEvent, MetricsPoint, Checkpoint, JobLog, CostRecord, AttemptUsage, Notification)


def event(number: int, **fields: Any) -> UpEvent:
    return UpEvent(number, 1_700_000_000.0 + number, fields)


def metrics(number: int, step: int, loss: float = 1.0) -> UpEvent:
    return event(number, type="metrics", step=step, epoch=0, training_loss=loss, learning_rate=1e-4)


def stored(number: int, step: int, **fields: Any) -> UpEvent:
    return event(number, type="stored", step=step, epoch=0, loss=1.0, key=f"k/s{step}", size=9, sha256="0", **fields)


BATCH = Batch(
    [
        event(1, type="started", node="n1", ranks=1, checkpoint_id=None, step=0),
        event(2, type="phase", name="training"),
        metrics(3, 1),
        metrics(4, 2),
        event(5, type="evaluation", step=2, epoch=0, validation_loss=2.5, perplexity=12.2),
        stored(6, 2, usage={"0": {"training": 11_000}}),
        event(7, type="log", level="INFO", message="hello"),
    ],
    {"0": {"loading": 2_000, "training": 12_000}},
)
ADAPTER = event(8, type="adapter", files={"a": {"key": "k/adapter/a", "size": 1, "sha256": "0"}}, best_step=2)


class Bench:
    """A collector and one job that it hears."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.executor = FakeExecutor()
        self.lease = Lease(database, 60)
        self.storage = Storage(folder.as_uri())
        self.collector = self.another()

    def another(self, lease: Lease | None = None) -> Collector:
        return Collector(self.database, lease or self.lease, self.executor, self.storage, allowance_s=1800)

    async def begin(self, **fields: Any) -> None:
        await self.lease.try_acquire()
        async with self.database.write() as session:
            job, attempt = await make_running_job(session, **{"status": Status.INITIALIZING, **fields})
        self.job_id, self.attempt_id = job.id, attempt.id

    async def apply(self, batch: Batch, place: Place = START, collector: Collector | None = None) -> Place | None:
        return await (collector or self.collector).apply(self.attempt_id, "x/1", place, batch)

    async def count(self) -> dict[str, int]:
        async with self.database.read() as session:
            return {
                table.__tablename__: await session.scalar(select(func.count()).select_from(table)) or 0
                for table in TABLES
            }

    async def job(self) -> TrainingJob:
        async with self.database.read() as session:
            return await session.get_one(TrainingJob, self.job_id)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    bench = Bench(database, tmp_path)
    await bench.begin()
    return bench


async def test_a_batch_becomes_rows(bench: Bench) -> None:
    place = await bench.apply(BATCH)
    assert place is not None
    assert (place.cursor, place.ended, place.allowance_ms) == (7, False, 14_000 + 1_800_000)
    job = await bench.job()
    assert (job.status, job.current_step, job.current_cost_microusd) == (Status.RUNNING, 2, 1_400)
    assert job.current_metrics is not None
    assert job.current_metrics["validationLoss"] == 2.5
    assert await bench.count() == {
        "job_events": 10,
        "metrics_points": 2,
        "checkpoints": 1,
        "job_logs": 3,
        "cost_records": 1,
        "attempt_usage": 2,
        "notifications": 0,
    }
    events = await events_of(bench.database, bench.job_id)
    kinds = "log stage stage metrics metrics metrics log log progress cost"
    assert [event.type for event in events] == kinds.split()


async def test_the_same_batch_again_changes_nothing(bench: Bench) -> None:
    await bench.apply(BATCH)
    before = await bench.count()
    assert await bench.apply(BATCH) is None
    assert await bench.apply(BATCH, collector=bench.another()) is None
    assert await bench.count() == before
    assert (await bench.job()).current_cost_microusd == 1_400


async def test_of_two_collectors_at_once_one_stores(bench: Bench) -> None:
    places = await asyncio.gather(*(bench.apply(BATCH, collector=bench.another()) for _ in range(4)))
    assert sum(place is not None for place in places) == 1
    assert (await bench.count())["metrics_points"] == 2
    await events_of(bench.database, bench.job_id)


async def test_a_superseded_scheduler_stores_nothing(bench: Bench) -> None:
    stale = Lease(bench.database, 60)
    stale.epoch = bench.lease.epoch - 1
    with pytest.raises(LeaseLost):
        await bench.apply(BATCH, collector=bench.another(stale))
    assert (await bench.count())["job_events"] == 0


async def test_an_attempt_that_is_not_the_current_one_changes_nothing(bench: Bench) -> None:
    async with bench.database.write() as session:
        job = await session.get_one(TrainingJob, bench.job_id)
        job.attempt = 2
        await make_attempt(session, job)
    assert await bench.apply(BATCH) is None
    assert set((await bench.count()).values()) == {0}


async def test_an_ending_ends_once(bench: Bench) -> None:
    place = await bench.apply(BATCH)
    assert place is not None
    times = [RankTimes(0, 1_000, 16_000, "n1")]
    last = Batch([ADAPTER], {"0": {"loading": 2_000, "training": 12_500}}, Ending("COMPLETED", times=times))
    ended = await bench.apply(last, place)
    assert ended is not None
    assert ended.ended
    before = await bench.count()
    assert await bench.apply(last, place) is None
    await bench.collector.declare_fault(bench.attempt_id, "x/1", "SUPERVISOR_DIED", "too late")
    assert await bench.count() == before
    job = await bench.job()
    assert (job.status, job.final_cost_microusd) == (Status.COMPLETED, 1_450)
    async with bench.database.read() as session:
        attempt = await session.get_one(Attempt, bench.attempt_id)
    assert (attempt.outcome, attempt.held_ms) == (Outcome.COMPLETED, 15_000)


async def test_an_answer_that_was_long_on_its_way_is_asked_for_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be older than the end of the ranks that it does not know."""
    monkeypatch.setattr("scheduler.collect.ENDS_KNOWN_S", 0.05)
    old, true = RankTimes(0, 1_000, 0, "n1"), RankTimes(0, 1_000, 16_000, "n1")
    answers = [true, old]

    async def times(name: str) -> list[RankTimes]:
        answer = answers.pop()
        if answer is old:
            await asyncio.sleep(0.1)
        return [answer]

    monkeypatch.setattr(bench.executor, "times", times)
    usage = {"0": {"loading": 2_000, "training": 12_500}}
    await bench.apply(Batch([ADAPTER], usage, Ending("FAULT", "RANK_DIED", times=[old])))
    async with bench.database.read() as session:
        assert (await session.get_one(Attempt, bench.attempt_id)).held_ms == 15_000


async def test_repeated_steps_overwrite_their_points(bench: Bench) -> None:
    place = await bench.apply(Batch([metrics(1, 1, 3.0), metrics(2, 2, 2.0)]))
    assert place is not None
    await bench.apply(Batch([metrics(3, 2, 1.5), metrics(4, 3, 1.2)]), place)
    async with bench.database.read() as session:
        points = await session.execute(
            select(MetricsPoint.step, MetricsPoint.training_loss).order_by(MetricsPoint.step)
        )
        assert [tuple(point) for point in points] == [(1, 3.0), (2, 1.5), (3, 1.2)]


async def test_a_checkpoint_told_twice_is_one(bench: Bench) -> None:
    place = await bench.apply(Batch([stored(1, 5, best=True), stored(2, 5), stored(3, 7, best=True)]))
    assert place is not None
    async with bench.database.read() as session:
        found = await session.execute(select(Checkpoint.step, Checkpoint.best).order_by(Checkpoint.step))
        assert [tuple(row) for row in found] == [(5, False), (7, True)]


async def test_lower_usage_takes_nothing_back(bench: Bench) -> None:
    place = await bench.apply(BATCH)
    assert place is not None
    await bench.apply(Batch([], {"0": {"training": 500}}), place)
    assert (await bench.job()).current_cost_microusd == 1_400


async def test_nothing_new_writes_nothing(bench: Bench) -> None:
    place = await bench.apply(BATCH)
    assert place is not None
    updated = (await bench.job()).updated_at
    assert await bench.apply(Batch([], BATCH.usage), place) is place
    assert (await bench.job()).updated_at == updated


async def test_waiting_for_a_place_is_told(bench: Bench) -> None:
    await bench.apply(Batch([event(1, type="pending", reason="NO_RESOURCES")]))
    assert "Waits" in ((await bench.job()).queue_reason or "")
    (told,) = await events_of(bench.database, bench.job_id)
    assert (told.type, told.payload["status"]) == ("stage", "INITIALIZING")


async def test_progress_starts_at_the_step_that_it_goes_on_from(bench: Bench) -> None:
    plan = {"total_steps": 40, "total_epochs": 2, "train_conversations": 80, "validation_conversations": 8}
    await bench.apply(Batch([event(1, type="plan", start_step=10, **plan)]))
    job = await bench.job()
    assert (job.current_step, job.total_steps, job.total_epochs, job.progress) == (10, 40, 2, 25.0)


async def test_a_cancel_beats_the_pause_that_was_heard(bench: Bench) -> None:
    async with bench.database.write() as session:
        (await session.get_one(TrainingJob, bench.job_id)).stop_requested = StopReason.CANCEL
    await bench.apply(Batch([], {}, Ending("STOPPED", stop_reason="PAUSE")))
    assert (await bench.job()).status is Status.CANCELLED


async def test_only_the_platforms_faults_count(bench: Bench) -> None:
    await bench.apply(Batch([], {}, Ending("STOPPED", stop_reason="PREEMPT")))
    job = await bench.job()
    assert (job.status, job.retry_count, job.not_before) == (Status.QUEUED, 0, None)


@pytest.mark.parametrize(
    ("slept_s", "allowance_s", "spent"), [(0.0, 1800, False), (500.0, 1800, False), (0.0, 0, True)]
)
async def test_silence_is_what_was_listened_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, slept_s: float, allowance_s: int, spent: bool
) -> None:
    """Not what this process slept through. Who is silent for longer than it was granted must have stopped."""
    monkeypatch.setattr("scheduler.collect.POLL_S", 0.01)
    monkeypatch.setattr("scheduler.collect.OVERRUN_MS", 0)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + offset)
    monkeypatch.setattr("scheduler.collect.time", clock)
    offset, collector = (
        0.0,
        Collector(bench.database, bench.lease, bench.executor, bench.storage, allowance_s=allowance_s),
    )
    async with asyncio.TaskGroup() as group:
        collector.follow(bench.attempt_id, "nobody/1", group)
        while not collector.silent_s():
            await asyncio.sleep(0.01)
        before, offset = collector.silent_s()["nobody/1"], slept_s
        await asyncio.sleep(0.3)
        grown_s = collector.silent_s()["nobody/1"] - before
        assert 0 < grown_s < ANSWER_S + 10
        assert (collector.spent() == {"nobody/1"}) is spent
        collector.forget_silences()
        collector._tasks[bench.attempt_id].cancel()
