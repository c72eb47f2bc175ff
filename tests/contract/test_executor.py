"""What every executor does, told once: the fake for the scheduler's tests, and the real one on a Ray cluster."""

from __future__ import annotations

import asyncio

import pytest

from control_plane.states import Outcome, StopReason
from scheduler.executor import AttemptGone, Batch, Demand, Liveness, ResumePoint, StaleEpoch
from tests.contract.harness import FOREVER, TOLERANCE_MS, Follower, Harness


async def until_ended(harness: Harness, name: str) -> Batch:
    """The first answer to an unmoved cursor."""
    async with asyncio.timeout(30):
        while (batch := await harness.executor.poll(name, 0, epoch=1, allowance_ms=None)).state != "ended":
            await asyncio.sleep(0.05)
    return batch


async def test_runs_to_completion(harness: Harness) -> None:
    script = [
        {"do": "train", "steps": 10, "checkpoint_every": 5},
        {"do": "adapter", "step": 10},
        {"do": "finish", "step": 10},
    ]
    spec = await harness.spec(script)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)

    ending = await follower.to_the_end()

    assert ending.outcome == Outcome.COMPLETED
    assert [event.number for event in follower.events] == list(range(1, len(follower.events) + 1))
    assert follower.events[0].event["type"] == "started"
    assert follower.events[-1].event["type"] == "finished"
    assert [event["step"] for event in follower.of("metrics")] == list(range(1, 11))
    first, second = follower.of("stored")
    assert (first["step"], second["step"]) == (5, 10)
    assert first["key"] == f"{spec.artifact_prefix}/checkpoints/a1-s5"
    assert 0 < first["usage"]["0"]["training"] < second["usage"]["0"]["training"]
    (adapter,) = follower.of("adapter")
    assert adapter["files"]["adapter_config.json"]["key"] == f"{spec.artifact_prefix}/adapter/adapter_config.json"
    assert (await harness.executor.look()).actors[spec.name] == Liveness.ALIVE


async def test_meters_what_the_cluster_recorded(harness: Harness) -> None:
    spec = await harness.spec([{"do": "sleep", "s": 0.3}, {"do": "train", "steps": 20}, {"do": "finish"}])
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)

    ending = await follower.to_the_end()

    (times,) = ending.times
    assert abs(times.end_ms - times.start_ms - follower.used_ms()) <= TOLERANCE_MS
    assert follower.batch is not None
    assert follower.batch.usage["0"]["loading"] >= 300
    assert follower.batch.usage["0"]["training"] >= 380
    assert await harness.executor.times(spec.name) == ending.times


async def test_usage_only_grows(harness: Harness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 30}, {"do": "finish"}])
    await harness.executor.start(spec)
    follower, before = Follower(harness.executor, spec.name), {}

    while not (batch := await follower.poll()).ending:
        now = batch.usage.get("0", {})
        assert all(now[kind] >= spent for kind, spent in before.items())
        before = now
        await asyncio.sleep(0.03)


async def test_starting_twice_starts_once(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 5)

    await harness.executor.start(spec)

    await follower.until("metrics", 15)
    assert len(follower.of("started")) == 1
    steps = [event["step"] for event in follower.of("metrics")]
    assert steps == list(range(1, len(steps) + 1))


async def test_the_same_cursor_gets_the_same_answer(harness: Harness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 700, "every_s": 0}, {"do": "finish"}])
    await harness.executor.start(spec)
    await until_ended(harness, spec.name)

    follower = Follower(harness.executor, spec.name)
    await follower.to_the_end()

    whole = follower.events
    assert len(whole) > 700
    last = await harness.executor.poll(spec.name, whole[-4].number, epoch=1, allowance_ms=None)
    again = await harness.executor.poll(spec.name, whole[-4].number, epoch=1, allowance_ms=None)
    assert last.events == again.events == whole[-3:]
    assert last.ending == again.ending is not None
    nothing = await harness.executor.poll(spec.name, whole[-1].number, epoch=1, allowance_ms=None)
    assert nothing.events == []
    assert nothing.ending == last.ending


async def test_an_answer_is_bounded_and_the_ending_comes_with_the_last_event(harness: Harness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 1200, "every_s": 0}, {"do": "finish"}])
    await harness.executor.start(spec)
    first = await until_ended(harness, spec.name)

    assert [event.number for event in first.events] == list(range(1, 501))
    assert first.ending is None
    follower = Follower(harness.executor, spec.name)
    assert (await follower.to_the_end()).outcome == Outcome.COMPLETED
    assert len(follower.of("metrics")) == 1200


async def test_an_older_scheduler_is_refused(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    newer = Follower(harness.executor, spec.name, epoch=5)
    await newer.until("started")

    with pytest.raises(StaleEpoch):
        await harness.executor.poll(spec.name, 0, epoch=4, allowance_ms=None)
    with pytest.raises(StaleEpoch):
        await harness.executor.stop(spec.name, StopReason.CANCEL, epoch=4)
    with pytest.raises(StaleEpoch):
        await harness.executor.release(spec.name, epoch=4)

    await newer.until("metrics", 3)
    assert newer.batch is not None
    assert newer.batch.state == "running"


async def test_an_attempt_that_never_was_is_gone(harness: Harness) -> None:
    with pytest.raises(AttemptGone):
        await harness.executor.poll("nobody/1", 0, epoch=1, allowance_ms=None)
    with pytest.raises(AttemptGone):
        await harness.executor.stop("nobody/1", StopReason.CANCEL, epoch=1)
    assert await harness.executor.times("nobody/1") == []
    await harness.executor.release("nobody/1", epoch=1)
    assert "nobody/1" not in (await harness.executor.look()).actors


async def test_who_finds_no_place_waits_for_it(harness: Harness) -> None:
    first, second = await harness.spec(FOREVER), await harness.spec([{"do": "finish"}])
    await harness.executor.start(first)
    await Follower(harness.executor, first.name).until("started")
    await harness.executor.start(second)
    follower = Follower(harness.executor, second.name)

    pending = await follower.until("pending")

    assert pending["reason"] == "NO_RESOURCES"
    assert follower.batch is not None
    assert follower.batch.state == "pending"
    assert follower.used_ms() == 0
    async with asyncio.timeout(5):
        while (await harness.executor.look()).free["slot_cpu"] != 0:
            await asyncio.sleep(0.03)
    await harness.executor.release(first.name, epoch=1)
    assert (await follower.to_the_end()).outcome == Outcome.COMPLETED


async def test_what_cannot_be_placed_says_so(harness: Harness) -> None:
    spec = await harness.spec(FOREVER, demand=Demand({"slot_cpu": 99}))
    await harness.executor.start(spec)

    pending = await Follower(harness.executor, spec.name).until("pending")

    assert pending["reason"] == "INFEASIBLE"


async def test_a_new_scheduler_adopts_what_runs(harness: Harness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 60}, {"do": "finish"}])
    await harness.executor.start(spec)
    before = Follower(harness.executor, spec.name)
    await before.until("metrics", 5)

    await harness.new_scheduler()
    assert (await harness.executor.look()).actors[spec.name] == Liveness.ALIVE
    after = Follower(harness.executor, spec.name, epoch=2)
    after.events = list(before.events)
    ending = await after.to_the_end()

    assert ending.outcome == Outcome.COMPLETED
    assert [event.number for event in after.events] == list(range(1, len(after.events) + 1))
    assert [event["step"] for event in after.of("metrics")] == list(range(1, 61))


async def test_zero_gpu_work_is_not_metered(harness: Harness) -> None:
    report = {"type": "verdict", "report": {"counts": {}}}
    script = [{"do": "emit", "event": report}, {"do": "finish"}]
    spec = await harness.spec(
        script, kind="verdict", demand=Demand({"slot_io": 1}, metered=False), artifact_prefix=None
    )
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)

    assert (await follower.to_the_end()).outcome == Outcome.COMPLETED
    assert follower.of("verdict") == [report]
    assert follower.used_ms() == 0


async def test_resumes_from_the_newest_whole_checkpoint(harness: Harness) -> None:
    first = await harness.spec([{"do": "train", "steps": 20, "checkpoint_every": 10}, {"do": "finish"}])
    await harness.executor.start(first)
    follower = Follower(harness.executor, first.name)
    await follower.to_the_end()
    points = [
        ResumePoint(f"checkpoint-{stored['step']}", stored["key"], stored["sha256"], stored["step"])
        for stored in reversed(follower.of("stored"))
    ]
    await harness.tear(points[0])
    await harness.executor.release(first.name, epoch=1)

    second = await harness.spec([{"do": "finish"}], resume_points=tuple(points))
    await harness.executor.start(second)
    follower = Follower(harness.executor, second.name)
    await follower.to_the_end()

    (started,) = follower.of("started")
    assert (started["checkpoint_id"], started["step"]) == ("checkpoint-10", 10)
    (log,) = follower.of("log")
    assert log["level"] == "WARNING"
    assert "step 20" in log["message"]
