"""Alembic's versions and the tables say the same, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from control_plane import migrations
from control_plane.db import Database
from control_plane.settings import Settings
from control_plane.tables import Base


@pytest.fixture
async def empty_postgres(postgres_socket: str) -> AsyncIterator[str]:
    admin = await asyncpg.connect(host=postgres_socket, user="postgres", database="postgres")
    await admin.execute("CREATE DATABASE migrated")
    yield f"postgresql+asyncpg://postgres@/migrated?host={postgres_socket}"
    await admin.execute("DROP DATABASE migrated WITH (FORCE)")
    await admin.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An installation whose database does not exist yet (SQLite) or is empty."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("empty_postgres")
    return Settings(data_dir=tmp_path / "100 % new", database_url=url)


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return list(compare_metadata(context, Base.metadata))


async def test_head_is_what_the_tables_say(settings: Settings) -> None:
    assert await migrations.upgrade(settings) == migrations.head_revision()

    database = Database(settings.database_url)
    async with database.read() as session:
        assert await migrations.current_revision(session) == migrations.head_revision()
        assert await (await session.connection()).run_sync(differences) == []
    await database.close()


async def test_upgrading_again_changes_nothing(settings: Settings) -> None:
    await migrations.upgrade(settings)
    database = Database(settings.database_url)
    async with database.write() as session:
        await session.execute(text("INSERT INTO scheduler_lease VALUES (1, 7, 0, 'me', '2026-11-23T00:00:00+00:00')"))

    await migrations.upgrade(settings)

    async with database.read() as session:
        assert await session.scalar(text("SELECT epoch FROM scheduler_lease")) == 7
    await database.close()


async def test_several_may_upgrade_at_once(settings: Settings) -> None:
    revisions = await asyncio.gather(*(migrations.upgrade(settings) for _ in range(3)))
    assert set(revisions) == {migrations.head_revision()}


async def test_an_empty_database_has_no_revision(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    database = Database(settings.database_url)
    async with database.read() as session:
        assert await migrations.current_revision(session) is None
    await database.close()


async def test_a_database_of_a_newer_version_is_left_alone(settings: Settings) -> None:
    await migrations.upgrade(settings)
    database = Database(settings.database_url)
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '29991231_future'"))

    with pytest.raises(migrations.UnknownVersion, match="29991231_future"):
        await migrations.upgrade(settings)

    async with database.read() as session:
        assert await migrations.current_revision(session) == "29991231_future"
    await database.close()
