"""``brightrun ledger verify``, on both databases, while the installation is at work and while it is not there."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text

from control_plane import migrations
from control_plane.db import Database
from control_plane.settings import Settings
from tests.unit.scheduler.test_verify import fill


@pytest.fixture
async def empty_postgres(postgres_socket: str) -> AsyncIterator[str]:
    admin = await asyncpg.connect(host=postgres_socket, user="postgres", database="postgres")
    await admin.execute("CREATE DATABASE verified")
    yield f"postgresql+asyncpg://postgres@/verified?host={postgres_socket}"
    await admin.execute("DROP DATABASE verified WITH (FORCE)")
    await admin.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = "" if request.param == "sqlite" else request.getfixturevalue("empty_postgres")
    return Settings(data_dir=tmp_path / "data", database_url=url)


async def command(installation: Settings, *arguments: str) -> tuple[int, str, str]:
    """Exit code and what was written of ``brightrun ledger verify``."""
    argv = [sys.executable, "-m", "control_plane.cli", "ledger", "verify", *arguments]
    env = {**os.environ, **installation.to_env(), "BRIGHTRUN_DATA_DIR": "/nowhere"}
    process = await asyncio.create_subprocess_exec(*argv, env=env, stdout=-1, stderr=-1)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command(installation: Settings) -> None:
    folder = ("--data-dir", str(installation.data_dir))
    code, _, said = await command(installation, *folder)
    assert (code, "Traceback" in said) == (2, False)
    assert "There is no database at" in said or "`brightrun migrate`" in said
    assert not installation.data_dir.exists()

    await migrations.upgrade(installation)
    database = Database(installation.database_url)
    ids = await fill(database)
    assert await command(installation, *folder) == (
        0,
        "The ledger balances: 9 records of 2 jobs and 3 attempts, 16 rules\n",
        "",
    )
    async with database.write() as session:  # the installation may be at work
        await session.execute(text("UPDATE cost_records SET amount_microusd = amount_microusd + 7"))
        if installation.is_sqlite:
            code, said, _ = await command(installation, *folder)
            assert code == 0
    code, said, _ = await command(installation, *folder)
    assert code == 1
    assert said.startswith("VIOLATED kinds of records: ")
    assert said.count("VIOLATED") == 1
    code, said, _ = await command(installation, *folder, "--all")
    assert f"VIOLATED rounded once: {ids['job']}: " in said
    async with database.write() as session:
        await session.execute(text("DELETE FROM alembic_version"))
    await database.close()
    code, _, said = await command(installation, *folder)
    assert (code, "`brightrun migrate`" in said) == (2, True)


async def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "brightrun.sqlite3").write_text("hello" * 1000)
    for url in ("", f"postgresql+asyncpg://postgres:secret@/x?host={tmp_path}"):
        installation = Settings(data_dir=tmp_path, database_url=url)
        code, _, said = await command(installation, "--data-dir", str(tmp_path))
        assert (code, "cannot be read" in said, "Traceback" in said, "secret" in said) == (2, True, False, False)
