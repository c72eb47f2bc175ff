"""API keys: shown once, kept as a prefix and a digest."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Forbidden, NotFound, ValidationFailed
from control_plane.schemas.accounts import CreateKey
from control_plane.services.accounts import audit, digest
from control_plane.services.scope import Principal, get_owned, owned
from control_plane.tables import ApiKey, Membership, User, now
from control_plane.tables.accounts import Scope, TeamRole

PREFIX = "br_"
_PREFIX_LENGTH = len(PREFIX) + 10
INCLUDED = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.TRAIN: frozenset({Scope.READ, Scope.TRAIN}),
    Scope.ADMIN: frozenset(Scope),
}
"""What a scope allows."""


def allowed(scopes: list[str]) -> frozenset[Scope]:
    return frozenset().union(*(INCLUDED[Scope(s)] for s in scopes))


def derive(secret: bytes, nonce: str) -> str:
    """The key that belongs to a nonce: a repeated request can be answered alike, and the key is stored nowhere."""
    random = hmac.new(secret, f"api-key:{nonce}".encode(), hashlib.sha256).digest()
    return PREFIX + base64.urlsafe_b64encode(random).rstrip(b"=").decode()


async def create(session: AsyncSession, who: Principal, body: CreateKey, key: str) -> ApiKey:
    """Keep ``key`` for the caller's team. Raises ValidationFailed, Forbidden for more than the caller may do."""
    if not body.scopes:
        raise ValidationFailed.field("scopes", "Name at least one of: read, train, admin")
    if body.expires_at is not None and body.expires_at <= now():
        raise ValidationFailed.field("expiresAt", "Must be in the future")
    if not allowed([*body.scopes]) <= who.scopes:
        raise Forbidden("A key may not do more than the one that creates it")
    row = ApiKey(
        team_id=who.team_id,
        created_by=who.user_id,
        name=body.name,
        prefix=key[:_PREFIX_LENGTH],
        digest=digest(key),
        scopes=sorted(set(body.scopes)),
        expires_at=body.expires_at,
    )
    session.add(row)
    await session.flush()
    audit(session, "create", "api_key", row.id, user_id=who.user_id, team_id=who.team_id)
    return row


async def listed(session: AsyncSession, who: Principal) -> list[ApiKey]:
    """The caller's own keys in the team; an owner sees everybody's."""
    query = owned(ApiKey, who.team_id).where(ApiKey.revoked_at.is_(None)).order_by(ApiKey.id.desc())
    if not who.owns_team:
        query = query.where(ApiKey.created_by == who.user_id)
    return list(await session.scalars(query))


async def revoke(session: AsyncSession, who: Principal, key_id: str) -> None:
    """Raises NotFound for a key that is not there or not the caller's to revoke."""
    key = await get_owned(session, ApiKey, who.team_id, key_id)
    if key.revoked_at is not None or not (who.owns_team or key.created_by == who.user_id):
        raise NotFound("API key not found")
    key.revoked_at = now()
    audit(session, "revoke", "api_key", key.id, user_id=who.user_id, team_id=who.team_id)


async def bearer_of(session: AsyncSession, key: str) -> tuple[ApiKey, User, TeamRole] | None:
    """The living key, its creator and the creator's role; a key dies with its creator's membership."""
    found = (
        await session.execute(
            select(ApiKey, User, Membership.role)
            .join(User, User.id == ApiKey.created_by)
            .join(Membership, (Membership.user_id == ApiKey.created_by) & (Membership.team_id == ApiKey.team_id))
            .where(
                ApiKey.prefix == key[:_PREFIX_LENGTH],
                ApiKey.revoked_at.is_(None),
                or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
                User.deactivated_at.is_(None),
            )
        )
    ).first()
    if found is None or not hmac.compare_digest(found[0].digest, digest(key)):
        return None
    return found[0], found[1], found[2]


def used_long_ago(key: ApiKey) -> bool:
    """Uses are noted to the minute."""
    return key.last_used_at is None or key.last_used_at < now() - timedelta(minutes=1)


async def touch(session: AsyncSession, key_id: str) -> None:
    """Note that a key was used."""
    await session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now()))
