"""The transactions that post, as the scheduler makes them: a batch with usage, the end that settles, a fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import func, select

from control_plane.db import Database
from control_plane.states import Outcome
from control_plane.storage import Storage
from control_plane.tables import (
    Attempt,
    AttemptUsage,
    BudgetHold,
    Checkpoint,
    CostRecord,
    ModelArtifact,
    Notification,
    TrainingJob,
)
from scheduler.collect import Collector, Place
from scheduler.executor import Batch, Ending, RankTimes, UpEvent
from scheduler.lease import Lease
from tests.gone import GoneExecutor
from tests.rows import make_running_job, make_team

EPOCH = 1
"""Of the lease that is taken before any deed."""
USED, SAVED, USED_AT_THE_END = ({"0": {"training": ms}} for ms in (20_000, 12_000, 25_000))
HELD_MS = 25_200
AT = 1.8e9
STORED = {"type": "stored", "step": 2, "epoch": 0, "loss": 1.0, "key": "k", "size": 1, "sha256": "0", "usage": SAVED}
METRICS = {"type": "metrics", "step": 3, "epoch": 0, "training_loss": 1.0, "learning_rate": 1e-4}
ADAPTER = {"type": "adapter", "files": {"a": {"key": "a", "size": 1, "sha256": "0"}}, "best_step": 2}


class Scheduled(NamedTuple):
    """A scheduler's collector, and the job that it acts on."""

    collector: Collector
    attempt_id: str

    async def charge(self) -> None:
        """A checkpoint and what has been used: a charge, and more reserved."""
        await self._hear(0, [STORED, METRICS], USED)

    async def complete(self) -> None:
        """The last charge, the hold released, the artifact made."""
        await self._hear(2, [ADAPTER], USED_AT_THE_END, Ending(Outcome.COMPLETED, times=_held()))

    async def lose(self) -> None:
        """A reversal of what was charged past the checkpoint, and that and the tail absorbed."""
        await self.collector.declare_fault(self.attempt_id, "name", "SUPERVISOR_DIED", "It died")

    async def _hear(self, cursor: int, events: list[Any], usage: Any, ending: Ending | None = None) -> None:
        ups = [UpEvent(cursor + number, AT, event) for number, event in enumerate(events, 1)]
        await self.collector.apply(self.attempt_id, "name", Place(cursor, None, {}), Batch(ups, usage, ending))


def _held() -> list[RankTimes]:
    return [RankTimes(0, 1_000, 1_000 + HELD_MS, "node")]


DEEDS: dict[str, Callable[[Scheduled], Awaitable[None]]] = {
    "charge": Scheduled.charge,
    "complete": Scheduled.complete,
    "lose": Scheduled.lose,
}


async def act(deed: str, database: Database, folder: Path, job_id: str) -> None:
    lease = Lease(database, 60)
    lease.epoch = EPOCH
    storage = Storage((folder / "objects").as_uri())
    executor: Any = GoneExecutor(*_held())
    collector = Collector(database, lease, executor, storage, allowance_s=1800)
    await DEEDS[deed](Scheduled(collector, f"{job_id}/1"))


async def begin(database: Database, folder: Path, job_id: str, deed: str) -> None:
    """A job under a budget, about to be charged for the first time or, for the other deeds, again."""
    await Lease(database, 60).try_acquire()
    async with database.write() as session:
        team = await make_team(session, budget_microusd=1_000_000)
        _, attempt = await make_running_job(session, id=job_id, team=team, held_microusd=3_000)
        attempt.id = f"{job_id}/1"
    if deed != "charge":
        await act("charge", database, folder, job_id)


async def stands(database: Database, job_id: str) -> dict[str, Any]:
    """All that a deed changes, but for dates and ids."""
    mine = Attempt.work_id == job_id
    usage = select(AttemptUsage.kind, AttemptUsage.gpu_ms, AttemptUsage.absorbed_ms).join(Attempt)
    async with database.read() as session:
        job = await session.get_one(TrainingJob, job_id)
        records = await session.scalars(select(CostRecord).where(CostRecord.job_id == job_id))
        counted = {
            table.__name__: await session.scalar(select(func.count()).where(where))
            for table, where in (
                (Checkpoint, Checkpoint.job_id == job_id),
                (ModelArtifact, ModelArtifact.job_id == job_id),
                (Notification, Notification.team_id == job.team_id),
            )
        }
        return counted | {
            "job": (job.status, job.current_cost_microusd, job.final_cost_microusd, job.retry_count, job.event_seq),
            "attempt": (
                await session.execute(select(Attempt.outcome, Attempt.event_cursor, Attempt.held_ms).where(mine))
            ).one(),
            "usage": sorted((await session.execute(usage.where(mine))).all()),
            "records": sorted((r.details["kind"], r.details["gpuMs"], r.amount_microusd) for r in records),
            "hold": (
                await session.execute(
                    select(BudgetHold.amount_microusd, BudgetHold.state).where(BudgetHold.job_id == job_id)
                )
            ).one(),
        }
