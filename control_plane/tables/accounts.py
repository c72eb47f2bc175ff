"""Who may do what: users, teams, keys, sessions, and what they did."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.tables.base import Base, Json, Row, enum_column


class Role(StrEnum):
    USER = "USER"
    ADMIN = "ADMIN"
    BILLING_ADMIN = "BILLING_ADMIN"


class Tier(StrEnum):
    FREE = "FREE"
    STARTER = "STARTER"
    PROFESSIONAL = "PROFESSIONAL"
    ENTERPRISE = "ENTERPRISE"


class TeamRole(StrEnum):
    OWNER = "OWNER"
    MEMBER = "MEMBER"


class Scope(StrEnum):
    READ = "read"
    TRAIN = "train"
    ADMIN = "admin"


class SessionKind(StrEnum):
    COOKIE = "COOKIE"
    TOKEN = "TOKEN"


class User(Row, Base):
    __tablename__ = "users"

    email: Mapped[str] = mapped_column(String(320), unique=True)
    """Case-folded."""
    password_hash: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(100))
    organization: Mapped[str | None] = mapped_column(String(200))
    role: Mapped[Role] = mapped_column(enum_column(Role), default=Role.USER)
    subscription_tier: Mapped[Tier] = mapped_column(enum_column(Tier), default=Tier.FREE)
    deactivated_at: Mapped[datetime | None]


class Team(Row, Base):
    """Owns everything. Its row is locked whenever money is held or posted."""

    __tablename__ = "teams"
    __table_args__ = (CheckConstraint("monthly_budget_microusd > 0", name="budget_positive"),)

    name: Mapped[str] = mapped_column(String(100))
    personal_of: Mapped[str | None] = mapped_column(ForeignKey("users.id"), unique=True)
    monthly_budget_microusd: Mapped[int | None] = mapped_column(BigInteger)
    """None: unlimited."""
    fair_share_weight: Mapped[int] = mapped_column(Integer, default=1)
    quotas: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    mlflow_experiment_id: Mapped[str | None] = mapped_column(String(64))


class Membership(Row, Base):
    __tablename__ = "memberships"
    __table_args__ = (UniqueConstraint("team_id", "user_id"), Index(None, "user_id"))

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    role: Mapped[TeamRole] = mapped_column(enum_column(TeamRole), default=TeamRole.MEMBER)


class Invitation(Row, Base):
    __tablename__ = "invitations"
    __table_args__ = (Index(None, "team_id"),)

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    email: Mapped[str] = mapped_column(String(320))
    role: Mapped[TeamRole] = mapped_column(enum_column(TeamRole), default=TeamRole.MEMBER)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    expires_at: Mapped[datetime]
    accepted_at: Mapped[datetime | None]


class ApiKey(Row, Base):
    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "team_id"),)

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    created_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(100))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the whole key, hex; keys carry 256 random bits."""
    scopes: Mapped[list[Any]] = mapped_column(Json)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuthSession(Row, Base):
    """A signed-in browser (COOKIE) or script (TOKEN): the same thing with another life."""

    __tablename__ = "auth_sessions"
    __table_args__ = (Index(None, "user_id"),)

    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    kind: Mapped[SessionKind] = mapped_column(enum_column(SessionKind))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class SigninFailure(Row, Base):
    """Failed sign-ins, for throttling by account and address."""

    __tablename__ = "signin_failures"
    __table_args__ = (Index(None, "subject", "created_at"),)

    subject: Mapped[str] = mapped_column(String(330))
    """``email:…`` or ``address:…``."""


class Webhook(Row, Base):
    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "team_id"),)

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    created_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(128))
    previous_secret: Mapped[str | None] = mapped_column(String(128))
    previous_secret_until: Mapped[datetime | None]
    """Until then messages bear the signature of the previous secret too."""
    events: Mapped[list[Any]] = mapped_column(Json, default=list)
    """Types that it wants to hear of; none: all."""
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    failing_since: Mapped[datetime | None]
    """The first failure since the last delivery that was taken."""
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None] = mapped_column(Text)


class AuditEvent(Row, Base):
    """Append-only: who did what to which object, when, from where."""

    __tablename__ = "audit_events"
    __table_args__ = (Index(None, "team_id", "created_at"), Index(None, "object_type", "object_id"))

    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.id"))
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    action: Mapped[str] = mapped_column(String(64))
    object_type: Mapped[str] = mapped_column(String(32))
    object_id: Mapped[str] = mapped_column(String(64))
    address: Mapped[str | None] = mapped_column(String(64))
    details: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)


class IdempotencyKey(Row, Base):
    """The first answer to a creating request; kept 24 h."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (UniqueConstraint("scope", "key"), Index(None, "created_at"))

    scope: Mapped[str] = mapped_column(String(200))
    """Team (or address, before sign-in), method and route."""
    key: Mapped[str] = mapped_column(String(255))
    body_sha256: Mapped[str] = mapped_column(String(64))
    status_code: Mapped[int] = mapped_column(Integer)
    answer: Mapped[dict[str, Any]] = mapped_column(Json)
