"""SQL that differs between the two databases."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.tables import Base

ROW = {"key_share": True}
"""``with_for_update`` of a row that is to be changed: its key is left alone, so that who inserts rows that refer to it
does not wait for it, nor it for them."""


async def insert_or_nothing(session: AsyncSession, table: type[Base], **values: Any) -> bool:
    """Insert a row unless a unique constraint says that it is there already. True if it was inserted.

    Of two transactions that insert the same at once, the second waits for the first to end.
    """
    dialect = postgresql if _is_postgresql(session) else sqlite
    statement = dialect.insert(table).values(**values).on_conflict_do_nothing()
    result = await session.execute(statement)
    return bool(result.rowcount)  # type: ignore[attr-defined]


async def lock_name(session: AsyncSession, name: str) -> None:
    """Let no other transaction hold the same name; until this one ends. SQLite's writers already queue."""
    if _is_postgresql(session):
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        await session.execute(select(func.pg_advisory_xact_lock(number)))


def _is_postgresql(session: AsyncSession) -> bool:
    return bool(session.get_bind().dialect.name == "postgresql")
