"""Alembic runs this file. The connection, with its transaction, comes from ``control_plane.migrations``."""

from typing import Any, Literal

from alembic import context

from control_plane.tables import Base
from control_plane.tables.base import Json, UtcDateTime


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Migrations name plain types only, so that a later change of our own types cannot rewrite history."""
    if kind != "type":
        return False
    if isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if item is Json:
        return "JSON"
    if getattr(item, "native_enum", None) is False:
        return f"sa.String(length={item.length})"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_item=render_item,
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
