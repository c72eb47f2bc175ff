"""Storage by the day: one STORAGE record for each team and UTC day that is over, at the price of that day."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from typing import Any, NamedTuple

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.money import GIB, storage_charge
from control_plane.services import budget
from control_plane.services.alerts import cost_alerts
from control_plane.services.prices import of_day
from control_plane.services.sql import insert_or_nothing
from control_plane.tables import (
    Checkpoint,
    CostRecord,
    Dataset,
    Membership,
    ModelArtifact,
    PriceVersion,
    Team,
    TrainingJob,
    now,
)
from control_plane.tables.accounts import TeamRole
from control_plane.tables.money import CostType
from scheduler.lease import Lease, LeaseLost
from scheduler.pause import pause

log = logging.getLogger(__name__)
CHECK_S = 60.0
CATCH_UP = timedelta(days=31)
"""Days that were missed for longer are given up."""
KEPT = timedelta(days=7)
"""How long the files of a deleted dataset or model stay, and cost."""
DAY = timedelta(days=1)


class Stored(NamedTuple):
    team_id: str
    kind: str
    """datasets, checkpoints or models."""
    size: int
    since: datetime
    until: datetime | None


class Accrual:
    """Every day that is over is charged once, whoever charges it how often: ``dedupe_key`` is unique. A team whose
    storage costs nothing gets no record."""

    def __init__(self, database: Database, lease: Lease) -> None:
        self._database = database
        self._lease = lease
        self._done: date | None = None
        """All days up to this one are charged; only a cache."""

    async def run(self) -> None:
        """Forever; raises LeaseLost."""
        while True:
            try:
                await self.catch_up()
            except LeaseLost:
                raise
            except Exception:
                log.exception("storage could not be charged")
            await pause(CHECK_S)

    async def catch_up(self) -> int:
        """Charge the days that are over and not charged yet, oldest first; how many records that made."""
        yesterday = now().date() - DAY
        day = max(yesterday - CATCH_UP, self._done or date.min) + DAY
        made = 0
        while day <= yesterday:
            made += await self._charge(day)
            self._done = day
            day += DAY
        return made

    async def _charge(self, day: date) -> int:
        async with self._database.read() as session:
            version = await of_day(session, day)
            keys = select(CostRecord.dedupe_key).where(CostRecord.dedupe_key.like(f"storage:%:{day}"))
            charged = set(await session.scalars(keys))
            bills = _bills([stored async for stored in _stored_on(session, day)], day)
        if version is None:
            return 0
        made = 0
        for team_id, kinds in sorted(bills.items()):
            amount = storage_charge(sum(kinds.values()), version.storage_microusd_per_gib_month, day)
            if amount and _key(team_id, day) not in charged:
                async with self._lease.write() as session:
                    made += await _post(session, team_id, day, kinds, amount, version)
        return made


async def _post(
    session: AsyncSession, team_id: str, day: date, kinds: dict[str, int], amount: int, version: PriceVersion
) -> bool:
    await budget.lock_team(session, team_id)
    at = now()
    size = sum(kinds.values())
    inserted = await insert_or_nothing(
        session,
        CostRecord,
        team_id=team_id,
        created_by=await _owner(session, team_id),
        cost_type=CostType.STORAGE,
        amount_microusd=amount,
        details={
            "kind": "charge",
            "day": day.isoformat(),
            "bytes": size,
            "gibDays": f"{size / GIB:.9f}",
            **kinds,
            "priceVersion": version.number,
        },
        billing_period=at.replace(hour=0, minute=0, second=0, microsecond=0),
        recorded_at=at,
        created_at=at,
        updated_at=at,
        dedupe_key=_key(team_id, day),
    )
    if inserted:
        await cost_alerts(session, team_id)
    return inserted


async def _owner(session: AsyncSession, team_id: str) -> str:
    """Who answers for what belongs to the team as a whole: its first owner."""
    first = (
        select(Membership.user_id)
        .where(Membership.team_id == team_id, Membership.role == TeamRole.OWNER)
        .order_by(Membership.created_at, Membership.id)
        .limit(1)
    )
    personal = select(Team.personal_of).where(Team.id == team_id)
    found = await session.scalar(first) or await session.scalar(personal)
    if found is None:
        raise LookupError(f"team {team_id} has no owner")
    return found


async def _stored_on(session: AsyncSession, day: date) -> AsyncIterator[Stored]:
    """What was in the object store at some time of the day."""
    start, end = _midnight(day), _midnight(day + DAY)
    datasets = select(Dataset.team_id, Dataset.file_size, Dataset.uploaded_at, Dataset.deleted_at).where(
        Dataset.uploaded_at < end, _kept_until(Dataset.deleted_at, start - KEPT)
    )
    checkpoints = (
        select(TrainingJob.team_id, Checkpoint.file_size, Checkpoint.created_at, Checkpoint.deleted_at)
        .join(TrainingJob, TrainingJob.id == Checkpoint.job_id)
        .where(Checkpoint.created_at < end, _kept_until(Checkpoint.deleted_at, start))
    )
    models = select(
        ModelArtifact.team_id, ModelArtifact.artifacts, ModelArtifact.created_at, ModelArtifact.deleted_at
    ).where(ModelArtifact.created_at < end, _kept_until(ModelArtifact.deleted_at, start - KEPT))
    for team_id, size, uploaded_at, deleted_at in await session.execute(datasets):
        yield Stored(team_id, "datasets", size, uploaded_at or end, deleted_at and deleted_at + KEPT)
    for team_id, size, since, deleted_at in await session.execute(checkpoints):
        yield Stored(team_id, "checkpoints", size, since, deleted_at)
    for team_id, artifacts, since, deleted_at in await session.execute(models):
        size = sum(int(file["size"]) for file in artifacts.values())
        yield Stored(team_id, "models", size, since, deleted_at and deleted_at + KEPT)


def _kept_until(deleted_at: Any, moment: datetime) -> Any:
    return or_(deleted_at.is_(None), deleted_at > moment)


def _bills(stored: list[Stored], day: date) -> dict[str, dict[str, int]]:
    """Team → kind → bytes, as the mean over the day."""
    start, end = _midnight(day), _midnight(day + DAY)
    byte_us: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for entry in stored:
        until = end if entry.until is None else min(entry.until, end)
        share = max(until - max(entry.since, start), timedelta(0))
        byte_us[entry.team_id][entry.kind] += entry.size * (share // timedelta(microseconds=1))
    whole = DAY // timedelta(microseconds=1)
    return {
        team: {kind: round(Fraction(total, whole)) for kind, total in kinds.items()} for team, kinds in byte_us.items()
    }


def _key(team_id: str, day: date) -> str:
    return f"storage:{team_id}:{day}"


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
