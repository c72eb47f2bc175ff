"""The collector and the ledger against a naive oracle that shares no code with them.

A job's history is a list of slices of GPU time, each paid by the user until something makes it the platform's. The same
history is heard in different ways (split, late, repeated, over the turn of a month) and must cost the same every time.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import SimpleNamespace
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
    cuts: list[int]
    """Places at which it is heard."""

    @property
    def heard(self) -> Slices:
        return self.slices[: max(0, len(self.slices) - self.unheard)] if self.end == "DEAD" else self.slices


slices = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, RANKS - 1), st.sampled_from(KINDS), st.integers(1, 9_000))),
    max_size=9,
)
ENDS = ("FAULT", "DEAD", "PREEMPT", "PAUSE", "BUDGET", "CANCEL", "FAILED", "COMPLETED")
attempts = st.builds(
    History,
    slices=slices,
    end=st.sampled_from(ENDS[:5]),
    torn=st.integers(0, KEPT),
    unheard=st.integers(0, 3),
    tail_ms=st.integers(0, 400),
    cuts=st.lists(st.integers(0, 9), max_size=4),
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
        if history.end in ("FAULT", "DEAD", "PREEMPT"):
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
        self.times: list[RankTimes] = []

        async def times(_name: str) -> list[RankTimes]:
            return self.times

        lease = Lease(self.database, 60)
        await lease.try_acquire()
        executor: Any = SimpleNamespace(times=times)
        self.collector = Collector(
            self.database, lease, executor, Storage((self.folder / "objects").as_uri()), allowance_s=1800
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
        await self.hear(attempt.id, history, [{**first, "step": used[0].step if used else 0}])
        async with self.database.read() as session:
            return (await session.get_one(TrainingJob, self.job_id)).status

    async def hear(self, attempt_id: str, history: History, events: list[dict[str, Any]]) -> None:
        """Batch by batch, each also a second time, and lower usage between them."""
        usage: dict[str, dict[str, int]] = {str(rank): {} for rank in range(RANKS)}
        batches: list[tuple[Place, Batch]] = []
        place: Place | None = Place(0, None, {})
        number = 0
        for position, entry in enumerate(history.heard):
            if position and self.split and position in history.cuts and place is not None:
                number, place = await self._batch(attempt_id, place, number, events, usage, batches)
                events = []
            if entry is None:
                events.append(self.stored(usage))
            else:
                rank, kind, ms = entry
                usage[str(rank)][kind] = usage[str(rank)].get(kind, 0) + ms
        held = Counter({rank: history.tail_ms for rank in range(RANKS)})
        for rank, _, ms in filter(None, history.slices):
            held[rank] += ms
        self.times = [RankTimes(rank, 1, 1 + ms, "n") for rank, ms in held.items()]
        if history.end == "COMPLETED":
            file = {"key": "m/adapter/a", "size": 1, "sha256": "0"}
            events.append({"type": "adapter", "files": {"a": file}, "best_step": 1})
        ending = self.ending(history.end)
        assert place is not None
        await self._batch(attempt_id, place, number, events, usage, batches, ending)
        if ending is None:
            await self.collector.declare_fault(attempt_id, "x", "SUPERVISOR_DIED", "dead")
        for old, batch in batches:
            assert await self.collector.apply(attempt_id, "x", old, batch) is None

    async def _batch(
        self,
        attempt_id: str,
        place: Place,
        number: int,
        events: list[dict[str, Any]],
        usage: dict[str, dict[str, int]],
        batches: list[tuple[Place, Batch]],
        ending: Ending | None = None,
    ) -> tuple[int, Place]:
        ups = [UpEvent(number + n, 1e9, event) for n, event in enumerate(events, 1)]
        batch = Batch(ups, {rank: dict(kinds) for rank, kinds in usage.items()}, ending)
        reached = await self.collector.apply(attempt_id, "x", place, batch)
        assert reached is not None
        if ups:
            batches.append((place, batch))
            assert await self.collector.apply(attempt_id, "x", place, batch) is None
        if ending is None and self.split:
            lower = {rank: {kind: ms // 2 for kind, ms in kinds.items()} for rank, kinds in usage.items()}
            await self.collector.apply(attempt_id, "x", reached, Batch([], lower))
            self.clock[0] += timedelta(days=11)
        await self.sound()
        return number + len(ups), reached

    def stored(self, usage: dict[str, dict[str, int]]) -> dict[str, Any]:
        step = next(self.numbers)
        stamp = {rank: dict(kinds) for rank, kinds in usage.items()}
        return {
            "type": "stored",
            "step": step,
            "epoch": 0,
            "loss": 1.0,
            "key": f"k/{step}",
            "size": 1,
            "sha256": "0",
            "usage": stamp,
        }

    def ending(self, end: str) -> Ending | None:
        if end == "DEAD":
            return None
        if end in ("FAULT", "FAILED", "COMPLETED"):
            return Ending(end, "" if end == "COMPLETED" else "CODE", "said", times=self.times)
        return Ending("STOPPED", stop_reason=end, times=self.times)

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
                recovery = history.end in ("FAULT", "DEAD", "PREEMPT")
                if status in TERMINAL:
                    break
            await hearing.sound()
            costs.append(await hearing.ledger())
        await hearing.database.close()
    assert costs[0] == costs[1] == ({n: ms for n, ms in oracle.billed().items() if ms}, oracle.cost())
