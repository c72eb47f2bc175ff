"""A rank without Ray around it: what it does when its time is up, and when the object store does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from control_plane.states import Outcome, StopReason
from control_plane.storage import Storage
from scheduler.cluster import rank as ranks
from scheduler.cluster.rank import Rank, Report
from scheduler.cluster.watch import Watch
from tests.contract.harness import CHILD, Script, make_spec
from tests.fakes import Clock
from trainer.config import World

SOON_S = 5.0
CODE, MESSAGE = "UNRESPONSIVE", "its time is up"


class Slow(Storage):
    """``hangs``: an upload whose key contains it never ends."""

    hangs = ""

    async def upload(self, path: Any, key: str) -> None:
        if self.hangs and self.hangs in key:
            await asyncio.Event().wait()
        await super().upload(path, key)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "Storage", Slow)
    monkeypatch.setattr(ranks, "_node_address", lambda: "127.0.0.1")


class Bench:
    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.events: list[dict[str, Any]] = []

    async def poll(self) -> Report:
        report = await self.rank.poll(len(self.events))
        self.events += [event for _, _, event in report.events]
        return report

    async def until(self, kind: str) -> None:
        async with asyncio.timeout(SOON_S):
            while kind not in [event["type"] for event in self.events]:
                await self.poll()
                await asyncio.sleep(0.01)

    async def until_phase(self, name: str) -> None:
        async with asyncio.timeout(SOON_S):
            while {"type": "phase", "name": name} not in self.events:
                await self.poll()
                await asyncio.sleep(0.01)

    async def until_state(self, state: str) -> Report:
        async with asyncio.timeout(SOON_S):
            while (report := await self.poll()).state != state:
                await asyncio.sleep(0.01)
        return report


@asynccontextmanager
async def running(folder: Path, script: Script, monkeypatch: pytest.MonkeyPatch, hangs: str) -> AsyncIterator[Bench]:
    monkeypatch.setattr(Slow, "hangs", hangs)
    url = (folder / "objects").as_uri()
    spec = await make_spec(Storage(url), url, str(folder / "work"), script)
    rank = Rank(spec, 0, list(CHILD))
    bench = Bench(rank)
    try:
        await bench.until_state("ready")
        await rank.launch(World())
        yield bench
    finally:
        rank._task.cancel()
        await asyncio.wait({rank._task})


async def test_a_store_that_hangs_while_stopping_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Script = [{"do": "train", "steps": 100_000}]
    async with running(tmp_path, script, monkeypatch, hangs="/checkpoints/") as bench:
        await bench.until("metrics")
        await bench.rank.stop(StopReason.PAUSE)
        async with asyncio.timeout(SOON_S):
            while bench.rank._last_word is None or bench.rank._child is None or bench.rank._child.running:
                await asyncio.sleep(0.01)
        assert (await bench.poll()).state == "running"
        await bench.rank.give_up(CODE, MESSAGE)
        await bench.rank.give_up(CODE, MESSAGE)
        ending = (await bench.until_state("ended")).ending
    assert ending is not None
    assert (ending.outcome, ending.code, ending.stop_reason) == (Outcome.FAULT, "NOT_STORED", StopReason.PAUSE)
    assert "stored" not in [event["type"] for event in bench.events]
    (warning,) = [event["message"] for event in bench.events if event["type"] == "log"]
    assert "did not take it in time" in warning


async def test_a_child_that_has_nothing_new_to_save_leaves_its_time_to_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its steps were: the watch hears that only what was saved before is still being stored."""
    script: Script = [{"do": "train", "steps": 100_000, "checkpoint_every": 1}]
    clock = Clock()
    watched = Watch(hang_floor_s=600, grace_s=20, clock=clock)
    async with running(tmp_path, script, monkeypatch, hangs="/checkpoints/") as bench:
        await bench.until("metrics")
        for _ in range(3):
            clock.advance(60)
            watched.heard({"type": "metrics"})
        await bench.rank.stop(StopReason.PAUSE)
        watched.stopping()
        await bench.until_phase("saving")
        for event in bench.events:
            watched.heard(event)
        clock.advance(21)
        overdue = watched.overdue()
    assert overdue is not None
    assert overdue.message == "its checkpoint was not stored within 20 s"


async def test_a_store_that_hangs_at_the_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Script = [{"do": "adapter", "step": 1}, {"do": "finish"}]
    async with running(tmp_path, script, monkeypatch, hangs="/adapter/") as bench:
        async with asyncio.timeout(SOON_S):
            while bench.rank._child is None or bench.rank._child.running:
                await asyncio.sleep(0.01)
        await bench.rank.give_up(CODE, MESSAGE)
        ending = (await bench.until_state("ended")).ending
    assert ending is not None
    assert (ending.outcome, ending.code) == (Outcome.FAULT, "NOT_STORED")


async def test_a_child_that_is_deaf_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Script = [{"do": "emit", "event": {"type": "phase", "name": "evaluating"}}, {"do": "hang"}]
    async with running(tmp_path, script, monkeypatch, hangs="") as bench:
        await bench.until("phase")
        await bench.rank.stop(StopReason.CANCEL)
        await bench.rank.give_up(CODE, MESSAGE)
        ending = (await bench.until_state("ended")).ending
    assert ending is not None
    assert (ending.outcome, ending.code, ending.message) == (Outcome.FAULT, CODE, MESSAGE)
    assert ending.stop_reason is StopReason.CANCEL


@pytest.mark.parametrize(
    ("kills", "outcome", "code"), [(1, Outcome.FAILED, "OUT_OF_MEMORY"), (0, Outcome.FAULT, "CHILD_KILLED")]
)
async def test_a_child_that_the_kernel_ended_for_want_of_memory_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, outcome: Outcome, code: str
) -> None:
    counter = iter((0, kills))
    monkeypatch.setattr("scheduler.cluster.child.oom_kills", lambda: next(counter))
    async with running(tmp_path, [{"do": "die"}], monkeypatch, hangs="") as bench:
        ending = (await bench.until_state("ended")).ending
    assert ending is not None
    assert (ending.outcome, ending.code) == (outcome, code)
    assert ("maxSeqLength" in ending.message) is (outcome is Outcome.FAILED)


async def test_signs_of_work_are_counted_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Script = [{"do": "emit", "event": {"type": "beat"}}] * 3 + [{"do": "finish"}]
    async with running(tmp_path, script, monkeypatch, hangs="") as bench:
        report = await bench.until_state("ended")
    assert report.beats == 3
    assert [event["type"] for event in bench.events] == ["finished"]


async def test_time_counts_only_from_the_supervisors_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "hangs", "")
    url = (tmp_path / "objects").as_uri()
    rank = Rank(await make_spec(Storage(url), url, str(tmp_path / "work"), [{"do": "finish"}]), 0, list(CHILD))
    try:
        await asyncio.sleep(0.2)  # Ray has made it, but does not know so yet
        called = time.monotonic()
        usages = [sum((await rank.poll(0)).usage.values()) for _ in range(3)]
        assert usages == sorted(usages)
        assert usages[-1] <= (time.monotonic() - called) * 1000
    finally:
        rank._task.cancel()
        await asyncio.wait({rank._task})
