"""All that the rules need to know, read with one query a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.services.budget import SET_BUDGET
from control_plane.states import Outcome, Status, WorkKind
from control_plane.tables import (
    Attempt,
    AttemptUsage,
    AuditEvent,
    BudgetHold,
    Checkpoint,
    CostRecord,
    Dataset,
    JobEvent,
    ModelArtifact,
    Notification,
    PriceVersion,
    Team,
    TrainingJob,
    now,
)
from control_plane.tables.money import CostType, HoldState
from control_plane.tables.notices import NotificationType

KEPT = timedelta(days=7)
"""How long the files of a deleted dataset or model stay, and cost."""


class Version(NamedTuple):
    id: str
    number: int
    effective_from: datetime
    gpu_microusd_per_hour: dict[str, int]
    storage_microusd_per_gib_month: int


class Job(NamedTuple):
    id: str
    team_id: str
    status: Status
    created_at: datetime
    gpu_type: str
    gpu_count: int
    price_version_id: str
    price_microusd_per_hour: int
    current_cost_microusd: int
    final_cost_microusd: int | None
    attempt: int
    retry_of: str | None


class Execution(NamedTuple):
    """An attempt."""

    id: str
    work_id: str
    number: int
    outcome: Outcome | None
    exit_reason: str | None
    held_ms: int | None
    recovery: bool
    started_at: datetime | None
    resumed_from: str | None
    cluster_id: str | None


class Saved(NamedTuple):
    """A checkpoint."""

    id: str
    job_id: str
    attempt_id: str
    step: int
    usage: dict[str, dict[str, int]]
    file_size: int
    created_at: datetime
    deleted_at: datetime | None


class Usage(NamedTuple):
    attempt_id: str
    rank: int
    kind: str
    gpu_ms: int
    absorbed_ms: int


class Record(NamedTuple):
    id: str
    team_id: str
    job_id: str | None
    attempt_id: str | None
    cost_type: CostType
    amount_microusd: int
    details: dict[str, Any]
    billing_period: datetime
    recorded_at: datetime
    updated_at: datetime
    dedupe_key: str | None

    @property
    def kind(self) -> str:
        return str(self.details.get("kind"))

    @property
    def gpu_ms(self) -> int:
        return int(self.details.get("gpuMs", 0))

    @property
    def month(self) -> str:
        return f"{self.billing_period:%Y-%m}"


class Stored(NamedTuple):
    """Something in the object store, and when it was there."""

    team_id: str
    size: int
    since: datetime
    until: datetime | None


class Hold(NamedTuple):
    updated_at: datetime
    job_id: str
    amount_microusd: int
    state: HoldState
    closed_at: datetime | None


class Change(NamedTuple):
    """Of a team's budget."""

    team_id: str
    at: datetime
    details: dict[str, Any]


class Alert(NamedTuple):
    id: str
    team_id: str
    user_id: str
    created_at: datetime
    details: dict[str, Any]
    dedupe_key: str


@dataclass(frozen=True)
class Books:
    """Records in the order in which they were made, changes of budgets too."""

    at: datetime
    """Now, or the newest row's time if the clock was set back."""
    teams: dict[str, int | None]
    """Id → monthly budget."""
    changes: dict[str, list[Change]]
    """By team."""
    versions: dict[str, Version]
    jobs: dict[str, Job]
    attempts: dict[str, Execution]
    usage: dict[str, list[Usage]]
    """By attempt."""
    checkpoints: dict[str, list[Saved]]
    """By attempt, deleted ones too."""
    told: dict[str, dict[str, Any]]
    """Payload of the last ``cost`` event, by job."""
    stored: dict[str, list[Stored]]
    """By team."""
    compute: dict[str | None, list[Record]]
    """COMPUTE records by job."""
    records: list[Record]
    holds: dict[str, Hold]
    """By job."""
    alerts: list[Alert]

    @classmethod
    async def read(cls, session: AsyncSession) -> Books:
        records = await _rows(session, Record, CostRecord, order=(CostRecord.recorded_at, CostRecord.id))
        changes = select(AuditEvent.team_id, AuditEvent.created_at, AuditEvent.details).where(
            AuditEvent.action == SET_BUDGET
        )
        found = await session.execute(changes.order_by(AuditEvent.created_at, AuditEvent.id))
        holds = await _rows(session, Hold, BudgetHold)
        teams = await session.execute(select(Team.id, Team.monthly_budget_microusd))
        jobs = _by_id(await _rows(session, Job, TrainingJob, order=(TrainingJob.id,)))
        checkpoints = await _rows(session, Saved, Checkpoint)
        return cls(
            at=max([now(), *(hold.updated_at for hold in holds), *(record.recorded_at for record in records[-1:])]),
            teams={row.id: row.monthly_budget_microusd for row in teams},
            changes=_grouped((Change(*row) for row in found), "team_id"),
            versions=_by_id(await _rows(session, Version, PriceVersion)),
            jobs=jobs,
            attempts=_by_id(
                await _rows(session, Execution, Attempt, Attempt.work_kind == WorkKind.JOB, order=(Attempt.id,))
            ),
            usage=_grouped(await _rows(session, Usage, AttemptUsage), "attempt_id"),
            checkpoints=_grouped(checkpoints, "attempt_id"),
            told=await _told(session),
            stored=_grouped(await _stored(session, checkpoints, jobs), "team_id"),
            compute=_grouped((record for record in records if record.cost_type is CostType.COMPUTE), "job_id"),
            records=records,
            holds={hold.job_id: hold for hold in holds},
            alerts=await _rows(session, Alert, Notification, Notification.type == NotificationType.COST_ALERT),
        )

    def charged(self, job_id: str) -> int:
        """Micro-dollars of the job's COMPUTE records."""
        return sum(record.amount_microusd for record in self.compute.get(job_id, ()))

    def overrun(self, job_id: str) -> int:
        """Micro-dollars that the job was charged beyond its hold."""
        hold = self.holds.get(job_id)
        return max(0, self.charged(job_id) - (hold.amount_microusd if hold else 0))


async def _rows(session: AsyncSession, kind: Any, table: Any, *where: Any, order: tuple[Any, ...] = ()) -> list[Any]:
    """Rows of ``table`` as ``kind``, whose fields are named as its columns are."""
    columns = [getattr(table, name) for name in kind._fields]
    found = await session.execute(select(*columns).where(*where).order_by(*order))
    return [kind(*row) for row in found]


async def _told(session: AsyncSession) -> dict[str, dict[str, Any]]:
    last = (
        select(JobEvent.payload)
        .where(JobEvent.job_id == TrainingJob.id, JobEvent.type == "cost")
        .order_by(JobEvent.seq.desc())
        .limit(1)
        .scalar_subquery()
    )
    return {job_id: payload for job_id, payload in await session.execute(select(TrainingJob.id, last)) if payload}


async def _stored(session: AsyncSession, checkpoints: list[Saved], jobs: dict[str, Job]) -> list[Stored]:
    found = [Stored(jobs[c.job_id].team_id, c.file_size, c.created_at, c.deleted_at) for c in checkpoints]
    datasets = select(Dataset.team_id, Dataset.file_size, Dataset.uploaded_at, Dataset.deleted_at)
    for team_id, size, uploaded_at, deleted_at in await session.execute(datasets):
        if uploaded_at:
            found.append(Stored(team_id, size, uploaded_at, deleted_at and deleted_at + KEPT))
    models = select(ModelArtifact.team_id, ModelArtifact.artifacts, ModelArtifact.created_at, ModelArtifact.deleted_at)
    for team_id, files, since, deleted_at in await session.execute(models):
        size = sum(int(file["size"]) for file in files.values())
        found.append(Stored(team_id, size, since, deleted_at and deleted_at + KEPT))
    return found


def _by_id(rows: Iterable[Any]) -> dict[str, Any]:
    return {row.id: row for row in rows}


def _grouped(rows: Iterable[Any], field: str) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        groups[getattr(row, field)].append(row)
    return dict(groups)
