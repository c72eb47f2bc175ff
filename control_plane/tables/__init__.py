"""Every table. Column names are the wire names in snake_case."""

from control_plane.tables.accounts import (
    ApiKey,
    AuditEvent,
    AuthSession,
    IdempotencyKey,
    Invitation,
    Membership,
    SigninFailure,
    Team,
    User,
    Webhook,
)
from control_plane.tables.base import Base, now, uuid7
from control_plane.tables.money import BudgetHold, CostRecord, PriceVersion
from control_plane.tables.notices import Notification, Outbox
from control_plane.tables.runs import (
    Attempt,
    AttemptUsage,
    Checkpoint,
    ClusterState,
    JobEvent,
    JobLog,
    MetricsPoint,
    SchedulerLease,
)
from control_plane.tables.work import Dataset, ModelArtifact, TrainingJob, Verdict, Work

__all__ = [
    "ApiKey",
    "Attempt",
    "AttemptUsage",
    "AuditEvent",
    "AuthSession",
    "Base",
    "BudgetHold",
    "Checkpoint",
    "ClusterState",
    "CostRecord",
    "Dataset",
    "IdempotencyKey",
    "Invitation",
    "JobEvent",
    "JobLog",
    "Membership",
    "MetricsPoint",
    "ModelArtifact",
    "Notification",
    "Outbox",
    "PriceVersion",
    "SchedulerLease",
    "SigninFailure",
    "Team",
    "TrainingJob",
    "User",
    "Verdict",
    "Webhook",
    "Work",
    "now",
    "uuid7",
]
