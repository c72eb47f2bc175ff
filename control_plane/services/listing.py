"""Lists by pages, sorted by named columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import ValidationFailed
from control_plane.schemas.base import Pagination

Row = TypeVar("Row")


class Paging(msgspec.Struct, frozen=True):
    page: int = 1
    page_size: int = 20
    sort_by: str | None = None
    order: Literal["asc", "desc"] = "desc"


async def paginate(
    session: AsyncSession, query: Select[Row], paging: Paging, columns: Mapping[str, Any], tie: Any
) -> tuple[list[Row], Pagination]:
    """One page and where it stands. ``columns``: wire name → column, the first is the default; ``tie`` makes the order
    total. Raises ValidationFailed for another ``sortBy``."""
    name = paging.sort_by or next(iter(columns))
    if name not in columns:
        raise ValidationFailed.field("sortBy", f"Choose one of: {', '.join(columns)}")
    total = await session.scalar(select(func.count()).select_from(query.order_by(None).subquery())) or 0
    keys = [c.desc() if paging.order == "desc" else c.asc() for c in (columns[name], tie)]
    rows = await session.scalars(
        query.order_by(keys[0].nulls_last(), keys[1])
        .limit(paging.page_size)
        .offset((paging.page - 1) * paging.page_size)
    )
    pages = -(-total // paging.page_size)
    return list(rows), Pagination(page=paging.page, page_size=paging.page_size, total=total, total_pages=pages)


def containing(column: Any, text: str) -> Any:
    """Case-insensitive search for ``text`` as it is: its ``%`` and ``_`` stand for themselves."""
    return func.lower(column).contains(text.lower(), autoescape=True)
