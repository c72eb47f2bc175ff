"""Users, their teams, and the sessions in which they act."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta

from sqlalchemy import case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import EmailExists, Forbidden
from control_plane.schemas.accounts import Signup
from control_plane.services.sql import lock_name
from control_plane.tables import AuditEvent, AuthSession, Membership, Team, User, now
from control_plane.tables.accounts import Role, SessionKind, TeamRole

TOKEN_PREFIX = "brt_"


def fold(email: str) -> str:
    return email.strip().casefold()


def digest(token: str) -> str:
    """SHA-256, hex: enough for tokens of 256 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


async def signup(session: AsyncSession, body: Signup, password_hash: str, *, policy: str, address: str) -> User:
    """A user with a personal team; the first of an installation is its administrator.

    Raises EmailExists; Forbidden when ``policy`` (open, invitation, closed) lets nobody in without more.
    """
    await lock_name(session, "signup")
    first = not await session.scalar(select(func.count()).select_from(User))
    if not first and policy != "open":
        raise Forbidden("Signing up is closed" if policy == "closed" else "Signing up is by invitation")
    email = fold(body.email)
    if await session.scalar(select(User.id).where(User.email == email)):
        raise EmailExists("An account with this email already exists", fields={"email": ["Already in use"]})
    user = User(
        email=email,
        password_hash=password_hash,
        name=body.name,
        organization=body.organization,
        role=Role.ADMIN if first else Role.USER,
    )
    session.add(user)
    await session.flush()
    team = Team(name=body.name, personal_of=user.id)
    session.add(team)
    await session.flush()
    session.add(Membership(team_id=team.id, user_id=user.id, role=TeamRole.OWNER))
    audit(session, "signup", "user", user.id, user_id=user.id, team_id=team.id, address=address)
    await session.flush()
    return user


def audit(
    session: AsyncSession,
    action: str,
    object_type: str,
    object_id: str,
    *,
    user_id: str,
    team_id: str | None = None,
    address: str | None = None,
) -> None:
    """Note who did what to which object."""
    session.add(
        AuditEvent(
            action=action,
            object_type=object_type,
            object_id=object_id,
            user_id=user_id,
            team_id=team_id,
            address=address,
        )
    )


async def by_email(session: AsyncSession, email: str) -> User | None:
    """A user who may sign in."""
    return await session.scalar(select(User).where(User.email == fold(email), User.deactivated_at.is_(None)))


async def open_session(session: AsyncSession, user_id: str, kind: SessionKind, ttl_s: int) -> tuple[str, datetime]:
    """A new session's token (kept nowhere but with its bearer) and when it ends."""
    token = (TOKEN_PREFIX if kind is SessionKind.TOKEN else "") + secrets.token_urlsafe(32)
    expires_at = now() + timedelta(seconds=ttl_s)
    session.add(AuthSession(user_id=user_id, kind=kind, digest=digest(token), expires_at=expires_at))
    await session.flush()
    return token, expires_at


async def close_session(session: AsyncSession, session_id: str) -> None:
    await session.execute(
        update(AuthSession)
        .where(AuthSession.id == session_id, AuthSession.revoked_at.is_(None))
        .values(revoked_at=now())
    )


async def session_of(session: AsyncSession, token: str, kind: SessionKind) -> tuple[AuthSession, User] | None:
    """The living session that a token opens, and its user."""
    found = (
        await session.execute(
            select(AuthSession, User)
            .join(User, User.id == AuthSession.user_id)
            .where(
                AuthSession.digest == digest(token),
                AuthSession.kind == kind,
                AuthSession.revoked_at.is_(None),
                AuthSession.expires_at > now(),
                User.deactivated_at.is_(None),
            )
        )
    ).first()
    return (found[0], found[1]) if found else None


async def teams_of(session: AsyncSession, user_id: str) -> list[tuple[Team, TeamRole]]:
    """A user's teams, the personal one first."""
    foreign = case((Team.personal_of == user_id, 0), else_=1)
    rows = await session.execute(
        select(Team, Membership.role)
        .join(Membership, Membership.team_id == Team.id)
        .where(Membership.user_id == user_id)
        .order_by(foreign, Team.created_at, Team.id)
    )
    return [(team, role) for team, role in rows]


async def role_in(session: AsyncSession, user_id: str, team_id: str) -> TeamRole | None:
    return await session.scalar(
        select(Membership.role).where(Membership.user_id == user_id, Membership.team_id == team_id)
    )


async def personal_team(session: AsyncSession, user_id: str) -> str:
    team_id = await session.scalar(select(Team.id).where(Team.personal_of == user_id))
    assert team_id is not None, f"user {user_id} has no personal team"
    return team_id
