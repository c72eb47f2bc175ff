"""SQL that differs between the two databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.tables import Base


async def insert_or_nothing(session: AsyncSession, table: type[Base], **values: Any) -> bool:
    """Insert a row unless a unique constraint says that it is there already. True if it was inserted."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values).on_conflict_do_nothing()
    result = await session.execute(statement)
    return bool(result.rowcount)  # type: ignore[attr-defined]
