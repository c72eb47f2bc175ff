"""The collector and the ledger against a naive oracle that shares no code with them.

A job's history is a list of slices of GPU time, each paid by the user until something makes it the platform's. The same
history is heard in different ways (split, late, repeated, permuted, over the turn of a month) and must cost the same
every time.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services import statements
from control_plane.states import TERMINAL, Status
from control_plane.storage import Storage
from control_plane.tables import Attempt, AttemptUsage, Checkpoint, CostRecord, TrainingJob, base
from scheduler.collect import Collector, Place
from scheduler.executor import Batch, Ending, RankTimes, UpEvent
from scheduler.lease import Lease
from scheduler.verify import verify
from tests.conftest import without_fsync
from tests.gone import GoneExecutor
from tests.rows import make_attempt, make_job

RANKS = 2
KINDS = ("loading", "training", "evaluating", "saving")
PRICE = 359_999
KEPT = 2
"""Checkpoints that are kept."""

Slices = list[tuple[int, str, int] | None]
"""(rank, kind, milliseconds); None: a checkpoint is stored here."""


@dataclass
class History:
    """Of one attempt. ``torn``: so many of the newest checkpoints cannot be read when it starts."""

    slices: Slices
    end: str
    torn: int
    unheard: int
    """Slices at its end that nobody heard of, if it died."""
    tail_ms: int
    answers: list[tuple[int | None, int]]
    """(events that whoever asks has heard of, None: all that are stored; slices that are over), in order of arrival."""

    @property
    def heard(self) -> Slices:
        return self.slices[: max(0, len(self.slices) - self.unheard)] if self.end == "DEAD" else self.slices


slices = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, RANKS - 1), st.sampled_from(KINDS), st.integers(1, 9_000))),
    max_size=9,
)
LOST = ("FAULT", "DEAD", "PREEMPT")
RELOADED = (*LOST, "BUDGET")
"""After these the platform pays for loading again; nobody set a budget, so BUDGET means that no scheduler was there."""
ENDS = ("FAULT", "DEAD", "PREEMPT", "PAUSE", "BUDGET", "CANCEL", "FAILED", "COMPLETED")
attempts = st.builds(
    History,
    slices=slices,
    end=st.sampled_from(ENDS[:5]),
    torn=st.integers(0, KEPT),
    unheard=st.integers(0, 3),
    tail_ms=st.integers(0, 400),
    answers=st.lists(st.tuples(st.none() | st.integers(0, 9), st.integers(0, 9)), max_size=6),
)


class Oracle:
    """Who pays for which slice."""

    def __init__(self) -> None:
        self.paid: list[dict[str, Any]] = []
        self.points: list[tuple[int, int]] = []
        """Whole checkpoints, oldest first: (attempt, its slices by then)."""

    def attempt(self, number: int, history: History, recovery: bool) -> None:
        if history.torn and self.points:
            self.points = self.points[: max(0, len(self.points) - history.torn)]
            kept_attempt, kept_slices = self.points[-1] if self.points else (0, 0)
            for piece in self.paid:
                if (piece["attempt"], piece["place"]) >= (kept_attempt, kept_slices):
                    piece["user"] = False
        last_point = 0
        for place, entry in enumerate(history.heard):
            if entry is None:
                self.points.append((number, place))
                last_point = place
            else:
                user = not (recovery and entry[1] == "loading")
                self.paid.append({"attempt": number, "place": place, "ms": entry[2], "user": user})
        if history.end in LOST:
            for piece in self.paid:
                if piece["attempt"] == number and piece["place"] >= last_point:
                    piece["user"] = False
        self.points = self.points[-KEPT:]

    def billed(self) -> dict[int, int]:
        """Milliseconds by attempt."""
        sums: dict[int, int] = defaultdict(int)
        for piece in self.paid:
            sums[piece["attempt"]] += piece["ms"] if piece["user"] else 0
        return dict(sums)

    def cost(self) -> int:
        return round(Fraction(sum(self.billed().values()) * PRICE, 3_600_000))


class Told:
    """What an attempt's supervisor has to tell."""

    def __init__(self, history: History, first: dict[str, Any], steps: Iterator[int]) -> None:
        self.ups, self.known, self.usage = [UpEvent(1, 1e9, first)], [1], [usage_of([])]
        for place, entry in enumerate(history.heard, 1):
            self.usage.append(usage_of(history.heard[:place]))
            if entry is None:
                self.ups.append(UpEvent(len(self.ups) + 1, 1e9, stored(next(steps), self.usage[-1])))
            self.known.append(len(self.ups))
        if history.end == "COMPLETED":
            file = {"key": "m/adapter/a", "size": 1, "sha256": "0"}
            self.ups.append(UpEvent(len(self.ups) + 1, 1e9, {"type": "adapter", "files": {"a": file}, "best_step": 1}))
        self.known[-1] = len(self.ups)
        used = usage_of(history.slices)
        self.times = [RankTimes(int(r), 1, 1 + sum(used[r].values()) + history.tail_ms, "n") for r in used]
        self.ending = ending(history.end, self.times)

    def answer(self, since: int, place: int) -> Batch:
        """Events after number ``since``, once the ``place``-th slice (or entry) is over."""
        place = place % len(self.known)
        last = place == len(self.known) - 1
        usage = {rank: dict(kinds) for rank, kinds in self.usage[place].items()}
        return Batch(self.ups[since : self.known[place]], usage, self.ending if last else None)


def usage_of(slices: Slices) -> dict[str, dict[str, int]]:
    usage: dict[str, dict[str, int]] = {str(rank): {} for rank in range(RANKS)}
    for rank, kind, ms in filter(None, slices):
        usage[str(rank)][kind] = usage[str(rank)].get(kind, 0) + ms
    return usage


def stored(step: int, usage: dict[str, dict[str, int]]) -> dict[str, Any]:
    files = {"key": f"k/{step}", "size": 1, "sha256": "0"}
    return {"type": "stored", "step": step, "epoch": 0, "loss": 1.0, "usage": usage, **files}


def ending(end: str, times: list[RankTimes]) -> Ending | None:
    if end == "DEAD":
        return None
    if end in ("FAULT", "FAILED", "COMPLETED"):
        return Ending(end, "" if end == "COMPLETED" else "CODE", "said", times=times)
    return Ending("STOPPED", stop_reason=end, times=times)


@dataclass
class Hearing:
    """One job in a database of its own, and a collector that hears its attempts."""

    database: Database
    folder: Path
    split: bool
    clock: list[datetime]
    closed: dict[str, Any] = field(default_factory=dict)
    numbers: Any = field(default_factory=lambda: count(1))

    async def begin(self) -> None:
        self.executor: Any = GoneExecutor()
        lease = Lease(self.database, 60)
        await lease.try_acquire()
        self.collector = Collector(
            self.database, lease, self.executor, Storage((self.folder / "objects").as_uri()), allowance_s=1800
        )
        async with self.database.write() as session:
            job = await make_job(session, gpu_count=RANKS, price_microusd=PRICE)
            self.job_id, self.team_id = job.id, job.team_id

    async def attempt(self, history: History, recovery: bool) -> Status:
        async with self.database.write() as session:
            job = await session.get_one(TrainingJob, self.job_id)
            job.attempt, job.status, job.result = job.attempt + 1, Status.INITIALIZING, None
            job.stop_requested = job.paused_by = None
            attempt = await make_attempt(session, job, recovery=recovery)
            order = (Checkpoint.step.desc(), Checkpoint.created_at.desc())
            whole = select(Checkpoint).where(Checkpoint.deleted_at.is_(None)).order_by(*order)
            points = list(await session.scalars(whole))
        used = points[history.torn :][:1]
        first = {"type": "started", "node": "n", "ranks": RANKS, "checkpoint_id": used[0].id if used else None}
        await self.hear(attempt.id, history, {**first, "step": used[0].step if used else 0})
        async with self.database.read() as session:
            return (await session.get_one(TrainingJob, self.job_id)).status

    async def hear(self, attempt_id: str, history: History, first: dict[str, Any]) -> None:
        """What a supervisor may have answered at any time to anybody, in any order; then the rest."""
        told = Told(history, first, self.numbers)
        self.executor.held = told.times
        answers = history.answers if self.split else []
        for since, place in answers:
            cursor, ended = await self.cursor(attempt_id)
            if await self.apply(attempt_id, told, cursor if since is None else since % (len(told.ups) + 1), place):
                self.clock[0] += timedelta(days=11)
                await self.sound()
        cursor, ended = await self.cursor(attempt_id)
        assert await self.apply(attempt_id, told, cursor, -1) is not ended
        if told.ending is None:
            await self.collector.declare_fault(attempt_id, "x", "SUPERVISOR_DIED", "dead")
        for since, place in [(0, -1), *answers]:
            assert not await self.apply(attempt_id, told, since or 0, place)
        await self.sound()

    async def apply(self, attempt_id: str, told: Told, since: int, place: int) -> bool:
        """Whether an answer counted; it must, just if it goes on from where the attempt has been heard."""
        cursor, ended = await self.cursor(attempt_id)
        batch = told.answer(since, place)
        counted = await self.collector.apply(attempt_id, "x", Place(since, None, {}), batch) is not None
        assert counted is (since == cursor and not ended)
        reached = batch.events[-1].number if counted and batch.events else cursor
        assert await self.cursor(attempt_id) == (reached, ended or (counted and batch.ending is not None))
        return counted

    async def cursor(self, attempt_id: str) -> tuple[int, bool]:
        """… and whether the attempt has ended."""
        async with self.database.read() as session:
            attempt = await session.get_one(Attempt, attempt_id)
            return attempt.event_cursor, attempt.outcome is not None

    async def sound(self) -> None:
        """The ledger verifies, and no month that is over has changed."""
        async with self.database.read() as session:
            assert await verify(session) == []
            months = await statements.listed(session, self.team_id)
        closed = {month.month: month for month in months if month.closed}
        assert {name: closed[name] for name in self.closed} == self.closed
        self.closed = closed

    async def ledger(self) -> tuple[dict[int, int], int]:
        """Billed milliseconds by attempt and the job's cost, by its records."""
        async with self.database.read() as session:
            numbers = dict((await session.execute(select(Attempt.id, Attempt.number))).all())
            records = list(await session.scalars(select(CostRecord)))
            job = await session.get_one(TrainingJob, self.job_id)
            rows = list(await session.scalars(select(AttemptUsage)))
            months = await statements.listed(session, self.team_id)
        billed: dict[int, int] = defaultdict(int)
        for record in records:
            if record.details["kind"] != "absorbed":
                billed[numbers[record.attempt_id]] += record.details["gpuMs"]
        total = sum(record.amount_microusd for record in records)
        assert total == job.current_cost_microusd
        assert total == sum(round(Fraction(month.total) * 1_000_000) for month in months)
        assert sum(billed.values()) == sum(row.gpu_ms - row.absorbed_ms for row in rows)
        return {number: ms for number, ms in billed.items() if ms}, total


@given(histories=st.lists(attempts, min_size=1, max_size=5), last=st.sampled_from(ENDS))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
async def test_however_it_is_heard_a_history_costs_what_the_oracle_says(
    sqlite_template: Path, tmp_path: Path, histories: list[History], last: str
) -> None:
    histories[-1].end = last
    oracle, costs = Oracle(), []
    for split in (True, False):
        path = tmp_path / f"{split}.sqlite3"
        shutil.copyfile(sqlite_template, path)
        hearing = Hearing(Database(f"sqlite+aiosqlite:///{path}"), tmp_path, split, [datetime(2026, 1, 25, tzinfo=UTC)])
        without_fsync(hearing.database)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "clock", lambda hearing=hearing: hearing.clock[0])
            await hearing.begin()
            recovery = False
            for number, history in enumerate(histories, 1):
                status = await hearing.attempt(history, recovery)
                if not split:
                    oracle.attempt(number, history, recovery)
                recovery = history.end in RELOADED
                if status in TERMINAL:
                    break
            await hearing.sound()
            costs.append(await hearing.ledger())
        await hearing.database.close()
    assert costs[0] == costs[1] == ({n: ms for n, ms in oracle.billed().items() if ms}, oracle.cost())
