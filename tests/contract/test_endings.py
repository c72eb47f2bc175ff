"""How attempts end with every executor: as asked, by force, or by what befalls them."""

from __future__ import annotations

import asyncio
import time

import pytest

from control_plane.states import Outcome, StopReason
from scheduler.executor import AttemptGone, Liveness
from tests.contract.harness import FOREVER, TOLERANCE_MS, Follower, Harness, until_all_is_free


async def test_a_stop_request_ends_in_a_stored_checkpoint(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 3)

    await harness.executor.stop(spec.name, StopReason.PAUSE, epoch=1)
    await harness.executor.stop(spec.name, StopReason.PAUSE, epoch=1)
    ending = await follower.to_the_end()

    assert (ending.outcome, ending.stop_reason) == (Outcome.STOPPED, StopReason.PAUSE)
    (stored,) = follower.of("stored")
    assert stored["step"] == follower.of("metrics")[-1]["step"]
    assert all(times.end_ms for times in ending.times)


async def test_who_waits_can_be_stopped(harness: Harness) -> None:
    first, second = await harness.spec(FOREVER), await harness.spec(FOREVER)
    await harness.executor.start(first)
    await Follower(harness.executor, first.name).until("started")
    await harness.executor.start(second)
    follower = Follower(harness.executor, second.name)
    await follower.until("pending")

    await harness.executor.stop(second.name, StopReason.CANCEL, epoch=1)
    ending = await follower.to_the_end()

    assert (ending.outcome, ending.stop_reason) == (Outcome.STOPPED, StopReason.CANCEL)
    assert ending.times == []
    assert follower.of("started") == []


async def test_a_killed_child_is_a_fault_of_the_platform(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 10)

    harness.kill_child(spec.name)
    ending = await follower.to_the_end()

    assert (ending.outcome, ending.code) == (Outcome.FAULT, "CHILD_KILLED")
    assert "SIGKILL" in ending.message
    (times,) = ending.times
    assert abs(times.end_ms - times.start_ms - follower.used_ms()) <= TOLERANCE_MS


@pytest.mark.parametrize(("code", "outcome"), [("NAN_LOSS", Outcome.FAILED), ("CRASHED", Outcome.FAULT)])
async def test_the_childs_last_word_says_whose_fault_it_was(harness: Harness, code: str, outcome: Outcome) -> None:
    spec = await harness.spec([{"do": "fail", "code": code}])
    await harness.executor.start(spec)

    ending = await Follower(harness.executor, spec.name).to_the_end()

    assert (ending.outcome, ending.code, ending.stack) == (outcome, code, "stack")
    assert ending.message == "it went wrong do better"


async def test_a_child_without_a_last_word_is_a_fault(harness: Harness) -> None:
    spec = await harness.spec([{"do": "exit", "code": 3, "stderr": "Segfault or so"}])
    await harness.executor.start(spec)

    ending = await Follower(harness.executor, spec.name).to_the_end()

    assert (ending.outcome, ending.code) == (Outcome.FAULT, "CHILD_EXITED")
    assert "code 3" in ending.message


async def test_a_killed_rank_is_confirmed_dead_and_frees_its_place(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 10)

    killed_at = time.time()
    harness.kill_rank(spec.name)
    ending = await follower.to_the_end()

    assert time.time() - killed_at < 3
    assert (ending.outcome, ending.code) == (Outcome.FAULT, "RANK_DIED")
    (times,) = ending.times
    tail_ms = times.end_ms - times.start_ms - follower.used_ms()
    assert -TOLERANCE_MS <= tail_ms <= 1000
    assert abs(times.end_ms - killed_at * 1000) <= 1000
    await until_all_is_free(harness.executor)


async def test_a_killed_supervisor_takes_its_gang_along(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 10)
    used_ms, killed_at = follower.used_ms(), time.time()

    harness.kill_supervisor(spec.name)
    with pytest.raises(AttemptGone):
        await follower.to_the_end()

    assert (await harness.executor.look()).actors[spec.name] == Liveness.DEAD
    while not all(times.end_ms for times in await harness.executor.times(spec.name)):
        assert time.time() - killed_at < 5
        await asyncio.sleep(0.03)
    (times,) = await harness.executor.times(spec.name)
    assert times.end_ms - times.start_ms >= used_ms - TOLERANCE_MS
    assert abs(times.end_ms - killed_at * 1000) <= 1500
    await harness.executor.start(spec)
    with pytest.raises(AttemptGone):
        await follower.poll()
    await harness.executor.release(spec.name, epoch=1)
    assert harness.remains(spec.name) == []
    await until_all_is_free(harness.executor)


async def test_without_a_further_allowance_it_stops_by_itself(harness: Harness) -> None:
    spec = await harness.spec(FOREVER, allowance_ms=600)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name, allowance_ms=600)

    ending = await follower.to_the_end()

    assert (ending.outcome, ending.stop_reason) == (Outcome.STOPPED, StopReason.BUDGET)
    assert len(follower.of("stored")) == 1
    assert 600 <= follower.used_ms() < 2000


async def test_a_larger_allowance_keeps_it_running(harness: Harness) -> None:
    spec = await harness.spec([{"do": "train", "steps": 60}, {"do": "finish"}], allowance_ms=1)
    follower = Follower(harness.executor, spec.name, allowance_ms=60_000)
    await harness.executor.start(spec)

    assert (await follower.to_the_end()).outcome == Outcome.COMPLETED


async def test_a_deaf_child_is_ended_after_a_grace_period(harness: Harness) -> None:
    spec = await harness.spec([{"do": "emit", "event": {"type": "phase", "name": "training"}}, {"do": "hang"}])
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("phase")

    await harness.executor.stop(spec.name, StopReason.CANCEL, epoch=1)
    ending = await follower.to_the_end()

    assert (ending.outcome, ending.code) == (Outcome.FAULT, "UNRESPONSIVE")
    assert ending.stop_reason == StopReason.CANCEL


async def test_a_hung_child_is_ended(harness: Harness) -> None:
    script = [{"do": "train", "steps": 5}, {"do": "hang"}]
    spec = await harness.spec(script, hang_floor_s=0.8)
    await harness.executor.start(spec)

    ending = await Follower(harness.executor, spec.name).to_the_end()

    assert (ending.outcome, ending.code, ending.stop_reason) == (Outcome.FAULT, "HUNG", None)


@pytest.mark.parametrize("phase", ["evaluating", "saving"])
async def test_a_child_that_hangs_outside_of_training_is_ended_too(harness: Harness, phase: str) -> None:
    script = [{"do": "emit", "event": {"type": "phase", "name": phase}}, {"do": "hang"}]
    spec = await harness.spec(script, hang_floor_s=0.8)
    await harness.executor.start(spec)

    ending = await Follower(harness.executor, spec.name).to_the_end()

    assert (ending.outcome, ending.code) == (Outcome.FAULT, "HUNG")


async def test_who_does_not_stop_at_the_allowance_is_ended_by_force(harness: Harness) -> None:
    script = [{"do": "emit", "event": {"type": "phase", "name": "training"}}, {"do": "hang"}]
    spec = await harness.spec(script, allowance_ms=600, overrun_ms=500)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name, allowance_ms=600)

    ending = await follower.to_the_end()

    assert (ending.outcome, ending.code, ending.stop_reason) == (Outcome.FAULT, "OVER_ALLOWANCE", StopReason.BUDGET)
    assert 1100 <= follower.used_ms() < 2000
    assert all(times.end_ms for times in ending.times)


async def test_releasing_a_running_attempt_leaves_nothing(harness: Harness) -> None:
    spec = await harness.spec(FOREVER)
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    await follower.until("metrics", 3)
    assert harness.remains(spec.name) != []

    await harness.executor.release(spec.name, epoch=1)
    await harness.executor.release(spec.name, epoch=1)

    assert harness.remains(spec.name) == []
    assert (await harness.executor.look()).actors[spec.name] == Liveness.DEAD
    await until_all_is_free(harness.executor)
    assert all(times.end_ms for times in await harness.executor.times(spec.name))
    with pytest.raises(AttemptGone):
        await harness.executor.poll(spec.name, 0, epoch=1, allowance_ms=None)


async def test_an_ended_attempt_answers_until_it_is_released(harness: Harness) -> None:
    spec = await harness.spec([{"do": "finish"}])
    await harness.executor.start(spec)
    follower = Follower(harness.executor, spec.name)
    ending = await follower.to_the_end()

    await until_all_is_free(harness.executor)
    await harness.executor.stop(spec.name, StopReason.CANCEL, epoch=1)
    assert (await follower.poll()).ending == ending
