"""The database's versions. ``upgrade`` brings any older (or empty) database to the newest, all or nothing.

A new version: change the tables, then ``python -m control_plane.migrations "what changed"``, and read what it wrote.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from control_plane.db import Database
from control_plane.settings import Settings

_LOCK = 0x6272696768747275
"""Key of the PostgreSQL advisory lock: of two processes that upgrade at once, one waits."""


class UnknownVersion(Exception):
    """The database is at a version that this code does not know: it has been used by a newer one."""


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, made in code so that it depends on no working directory."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    made.set_main_option("file_template", "%%(rev)s")
    made.attributes["connection"] = connection
    return made


@cache
def head_revision() -> str:
    """The version that this code expects of its database."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise RuntimeError("control_plane/migrations/versions is empty")
    return head


async def current_revision(database: AsyncSession | AsyncConnection) -> str | None:
    """The version that the database is at; None: nothing has been applied to it."""
    connection = await database.connection() if isinstance(database, AsyncSession) else database
    return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())


async def upgrade(settings: Settings) -> str:
    """Bring the database to the head revision in one transaction, and return it. Repeating it is harmless.

    Raises UnknownVersion.
    """
    database = Database(settings.database_url)
    if settings.is_sqlite:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        # Changing a table on SQLite means copying and dropping it, which must not cascade into those that refer to it.
        event.listen(database.engine.sync_engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=OFF"))
    try:
        async with database.write() as session:
            connection = await session.connection()
            if not settings.is_sqlite:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            await connection.run_sync(_upgrade)
    finally:
        await database.close()
    return head_revision()


def _upgrade(connection: Connection) -> None:
    try:
        command.upgrade(config(connection), "head")
    except CommandError as error:
        raise UnknownVersion(f"the database cannot be used by this version of BrightRun: {error}") from error
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        if broken:
            raise RuntimeError(f"the migration left {len(broken)} rows without their parents, first: {broken[0]}")
