"""Who acts, in which team, and the one place where the tenant predicate is written."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import NotFound
from control_plane.tables import Base, User
from control_plane.tables.accounts import Role, Scope, TeamRole

Entity = TypeVar("Entity", bound=Base)


class Principal(msgspec.Struct, frozen=True):
    """The caller of a request, as its credential proved, acting in one team."""

    user: User
    team_id: str
    team_role: TeamRole
    scopes: frozenset[Scope]
    session_id: str | None = None
    """Of the console session or access token; None for an API key."""
    key_id: str | None = None

    @property
    def user_id(self) -> str:
        return self.user.id

    @property
    def owns_team(self) -> bool:
        return self.team_role is TeamRole.OWNER or self.user.role is Role.ADMIN


def owned(entity: type[Entity], team_id: str) -> Select[Entity]:
    """A query for what belongs to a team and is not deleted."""
    table: Any = entity
    query = select(entity).where(table.team_id == team_id)
    return query.where(table.deleted_at.is_(None)) if hasattr(entity, "deleted_at") else query


async def get_owned(
    session: AsyncSession, entity: type[Entity], team_id: str, entity_id: str, *, lock: bool = False
) -> Entity:
    """Raises NotFound for what is not there, and for what is somebody else's.

    ``lock``: its row until the transaction ends.
    """
    table: Any = entity
    query = owned(entity, team_id).where(table.id == entity_id)
    if lock:
        query = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    found = await session.scalar(query)
    if found is None:
        raise NotFound(f"{_title(entity)} not found")
    return found


def _title(entity: type[Base]) -> str:
    return {"ModelArtifact": "Model", "TrainingJob": "Job", "ApiKey": "API key"}.get(entity.__name__, entity.__name__)
